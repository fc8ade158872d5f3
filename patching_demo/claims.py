"""Predictions that are executed: what was expected, what was measured, and whether it holds.

A chapter states a prediction, computes a number, and compares the two here. The reader sees a
table; a prediction that fails fails the notebook, so no text can say what is not so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from patching_demo.plots.tables import Html, table
from patching_demo.plots.theme import number, percent

__all__ = ["Checks", "Claim", "ClaimFailed"]

Relation = Literal["at least", "at most"]


class ClaimFailed(AssertionError):
    """A prediction that does not hold; the message says which, with measurement and threshold."""


@dataclass(frozen=True)
class Claim:
    """One prediction and the number that decides it.

    Attributes:
        name: A few words, unique within its :class:`Checks`.
        expected: The prediction in a sentence.
        measured: The number that decides, or None where it was not measured.
        relation: "at least" or "at most".
        threshold: What ``measured`` is compared with, in the same units.
        units: "share" (of clean minus corrupted, or of another share) or any other word.
        not_checked: Why it was not measured; empty where it was.
    """

    name: str
    expected: str
    measured: float | None
    relation: Relation
    threshold: float
    units: str = "share"
    not_checked: str = ""

    def __post_init__(self) -> None:
        if self.relation not in ("at least", "at most"):
            raise ValueError(f"relation is 'at least' or 'at most', got {self.relation!r}")
        if not math.isfinite(self.threshold):
            raise ValueError(f"the threshold of {self.name!r} is {self.threshold}: give a number")
        if (self.measured is None) != bool(self.not_checked):
            raise ValueError(f"{self.name!r} needs either a measured number or a reason for none")

    @property
    def holds(self) -> bool | None:
        """Whether it holds; None where it was not checked. A measured NaN does not hold."""
        if self.measured is None:
            return None
        if self.relation == "at least":
            return self.measured >= self.threshold
        return self.measured <= self.threshold

    @property
    def verdict(self) -> str:
        """ "holds", "fails", or why there is no verdict.

        >>> Claim("early", "it is early", 0.97, "at least", 0.5).verdict
        'holds'
        >>> Claim("early", "it is early", float("nan"), "at least", 0.5).verdict
        'fails'
        """
        if self.holds is None:
            return f"not checked: {self.not_checked}"
        return "holds" if self.holds else "fails"

    def written(self, value: float | None) -> str:
        """A number in the claim's units.

        >>> Claim("early", "it is early", 0.97, "at least", 0.5).written(0.97)
        '97 %'
        """
        if value is None:
            return "–"
        if not math.isfinite(value):
            return str(value)
        if self.units == "share":
            # One decimal where rounding would hide on which side of a threshold a share lies.
            digits = 0 if abs(value) >= 0.1 or round(value, 2) == value else 1
            return percent(value, digits)
        return f"{number(value)} {self.units}".strip()

    @property
    def required(self) -> str:
        """Relation and threshold in words."""
        return f"{self.relation} {self.written(self.threshold)}"


class Checks:
    """The predictions of one part of a chapter, as a table and as a test.

    Args:
        title: the table's caption.

    >>> checks = Checks("What the first sweep should show")
    >>> checks.at_least("early", "The subject's position carries all of it.", 0.97, 0.9)
    >>> checks.at_most("late", "It carries nothing in the last layers.", 0.3, 0.1)
    >>> checks
    What the first sweep should show
    early: The subject's position carries all of it. 97 %, at least 90 %: holds
    late: It carries nothing in the last layers. 30 %, at most 10 %: fails
    >>> checks.verify()
    Traceback (most recent call last):
        ...
    patching_demo.claims.ClaimFailed: 'late' fails: measured 30 %, expected at most 10 % (It ...)
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.claims: list[Claim] = []

    def at_least(
        self, name: str, expected: str, measured: float, threshold: float, units: str = "share"
    ) -> None:
        """Add a claim that ``measured`` is at least ``threshold``.

        Raises:
            ValueError: if the name is taken or the threshold is not a number.
        """
        self.add(Claim(name, expected, float(measured), "at least", threshold, units))

    def at_most(
        self, name: str, expected: str, measured: float, threshold: float, units: str = "share"
    ) -> None:
        """Add a claim that ``measured`` is at most ``threshold``; errors as :meth:`at_least`."""
        self.add(Claim(name, expected, float(measured), "at most", threshold, units))

    def not_checked(
        self,
        name: str,
        expected: str,
        relation: Relation,
        threshold: float,
        reason: str,
        units: str = "share",
    ) -> None:
        """Add a claim that cannot be decided here, and say why; errors as :meth:`at_least`."""
        self.add(Claim(name, expected, None, relation, threshold, units, reason))

    def add(self, claim: Claim) -> None:
        """Add a claim.

        Raises:
            ValueError: if its name is taken.
        """
        if claim.name in {other.name for other in self.claims}:
            raise ValueError(f"there is a claim {claim.name!r} already: give this one its own name")
        self.claims.append(claim)

    def __iter__(self) -> Iterator[Claim]:
        return iter(self.claims)

    def __len__(self) -> int:
        return len(self.claims)

    def __getitem__(self, name: str) -> Claim:
        """The claim of that name; KeyError if there is none."""
        for claim in self.claims:
            if claim.name == name:
                return claim
        raise KeyError(name)

    @property
    def caption(self) -> str:
        """The title, and how many claims were not checked and why, if any were not."""
        open_ = [claim.not_checked for claim in self.claims if claim.holds is None]
        if not open_:
            return self.title
        reasons = "; ".join(dict.fromkeys(reason for reason in open_ if reason))
        return f"{self.title} ({len(open_)} of {len(self)} not checked here: {reasons})"

    @property
    def failed(self) -> list[Claim]:
        """The claims that were measured and do not hold."""
        return [claim for claim in self.claims if claim.holds is False]

    def verify(self) -> None:
        """Do nothing if every claim that was measured holds.

        Raises:
            ClaimFailed: naming each claim that does not.
            ValueError: if there are no claims, as that would pass without a check.
        """
        if not self.claims:
            raise ValueError(f"{self.title!r} has no claims, so there is nothing to verify")
        if self.failed:
            raise ClaimFailed(
                "; ".join(
                    f"{c.name!r} fails: measured {c.written(c.measured)}, expected {c.required} "
                    f"({c.expected})"
                    for c in self.failed
                )
            )

    def show(self) -> None:
        """Display the table, then :meth:`verify`: a failure shows beside what it failed.

        Raises:
            ClaimFailed: if a claim that was measured does not hold.
            ValueError: if there are no claims.
        """
        from IPython.display import display

        display(Html(self._repr_html_(), repr(self)))
        self.verify()

    def _repr_html_(self) -> str:
        # The word says it all; the sign helps to find a failure among many.
        # Why a claim was not checked stands in the caption, once for all that share the reason.
        verdicts = {True: "✓ holds", False: "✗ fails", None: "not checked"}
        rows = [
            (c.expected, c.written(c.measured), c.required, verdicts[c.holds]) for c in self.claims
        ]
        names = pd.Index([claim.name for claim in self.claims], name="claim")
        columns = ["expected", "measured", "required", "verdict"]
        return table(pd.DataFrame(rows, names, columns), self.caption)._repr_html_()

    def __repr__(self) -> str:
        lines = [
            f"{c.name}: {c.expected} {c.written(c.measured)}, {c.required}: {c.verdict}"
            for c in self.claims
        ]
        return "\n".join([self.caption, *lines])
