"""Predictions that are executed: what was expected, what was measured, and whether it holds.

A chapter states a prediction, computes a number, and compares the two here. The reader sees a
table; a prediction that fails fails the notebook, so no text can say what is not so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from patching_demo.plots.tables import Html, table
from patching_demo.plots.theme import as_html, number, percent

__all__ = ["Claim", "ClaimFailed", "Claims", "Exercise"]


class ClaimFailed(AssertionError):
    """A prediction that does not hold; the message says which, with measurement and threshold."""


@dataclass(frozen=True)
class Claim:
    """One prediction and the number that decides it.

    Attributes:
        name: A few words, unique within its :class:`Claims`.
        expected: The prediction in a sentence.
        measured: The number that decides, or None where it was not measured.
        relation: "at least" or "at most".
        threshold: What ``measured`` is compared with, in the same units.
        units: "share" (of clean minus corrupted, or of another share) or any other word.
        bound: The bound of an interval around ``measured`` that decides instead, or None.
    """

    name: str
    expected: str
    measured: float | None
    relation: Literal["at least", "at most"]
    threshold: float
    units: str = "share"
    bound: float | None = None

    @property
    def holds(self) -> bool | None:
        """Whether it holds; None where it was not measured. A measured NaN does not hold."""
        if self.measured is None:
            return None
        decisive = self.measured if self.bound is None else self.bound
        if self.relation == "at least":
            return decisive >= self.threshold
        return decisive <= self.threshold

    @property
    def verdict(self) -> str:
        """ "holds", "fails" or "not checked".

        >>> Claim("early", "it is early", 0.97, "at least", 0.5).verdict
        'holds'
        >>> Claim("early", "it is early", float("nan"), "at least", 0.5).verdict
        'fails'
        """
        return {True: "holds", False: "fails", None: "not checked"}[self.holds]

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
    def found(self) -> str:
        """The measurement in words, with the bound that decides where one does.

        >>> Claim("early", "it is early", 0.97, "at least", 0.5, bound=0.91).found
        '97 %, lower bound 91 %'
        """
        if self.bound is None:
            return self.written(self.measured)
        which = "lower" if self.relation == "at least" else "upper"
        return f"{self.written(self.measured)}, {which} bound {self.written(self.bound)}"

    @property
    def required(self) -> str:
        """Relation and threshold in words."""
        return f"{self.relation} {self.written(self.threshold)}"


class Claims:
    """The predictions of one part of a chapter, as a table and as a test.

    Args:
        title: the table's caption.
        not_checked: why none of them is decided here; empty where they are.

    >>> claims = Claims("What the first sweep should show")
    >>> claims.check("early", "The subject's position carries all of it.", 0.97, at_least=0.9)
    >>> claims.check("late", "It carries nothing in the last layers.", 0.3, at_most=0.1)
    >>> claims
    What the first sweep should show
    early: The subject's position carries all of it. 97 %, at least 90 %: holds
    late: It carries nothing in the last layers. 30 %, at most 10 %: fails
    >>> claims.verify()
    Traceback (most recent call last):
        ...
    patching_demo.claims.ClaimFailed: 'late' fails: measured 30 %, expected at most 10 % (It ...)
    """

    def __init__(self, title: str, not_checked: str = "") -> None:
        self.title, self.not_checked = title, not_checked
        self.claims: dict[str, Claim] = {}

    def check(
        self,
        name: str,
        expected: str,
        measured: Any,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        of: Any = 1.0,
        units: str = "share",
        by_bound: bool = False,
    ) -> None:
        """Add a claim: ``measured`` is at least, or at most, the given threshold.

        Args:
            name: a few words, unique among these claims.
            expected: the prediction in a sentence.
            measured: a number, or an array that holds one.
            at_least: the threshold, in the same units; give this one
            at_most: or this one.
            of: what ``measured`` is a part of: the claim is then about the part. It fails where
                ``of`` is not above zero, as there is no part of nothing.
            units: "share" (written in per cent) or any other word.
            by_bound: whether the bound of the interval of ``measured``, one cell of
                :func:`patching_demo.interval`, decides: the lower one for ``at_least``, the upper
                one for ``at_most``.

        Raises:
            ValueError: if the name is taken, there is not one finite threshold, or a bound is
                asked for that ``measured`` does not have, or of a part.
        """
        if name in self.claims:
            raise ValueError(f"there is a claim {name!r} already: give this one its own name")
        if (at_least is None) == (at_most is None):
            raise ValueError(f"{name!r} needs one threshold: give at_least or at_most")
        relation, threshold = ("at most", at_most) if at_least is None else ("at least", at_least)
        if not math.isfinite(threshold):
            raise ValueError(f"the threshold of {name!r} is {threshold}: give a number")
        value = bound = None
        if not self.not_checked:
            value = float(measured) / float(of) if float(of) > 0 else math.nan
        if by_bound:
            which = "low" if relation == "at least" else "high"
            if which not in getattr(measured, "coords", ()):
                raise ValueError(f"{name!r} has no interval: give a cell of interval(result)")
            if float(of) != 1:
                raise ValueError(
                    f"{name!r} is about a part, whose interval is not that of its numerator: "
                    "leave of= or by_bound= out"
                )
            bound = None if self.not_checked else float(measured[which])
        self.claims[name] = Claim(name, expected, value, relation, float(threshold), units, bound)

    @property
    def caption(self) -> str:
        """The title, and why the claims were not checked if they were not."""
        return f"{self.title} (not checked: {self.not_checked})" if self.not_checked else self.title

    @property
    def failed(self) -> list[Claim]:
        """The claims that were measured and do not hold."""
        return [claim for claim in self.claims.values() if claim.holds is False]

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
                    f"{c.name!r} fails: measured {c.found}, expected {c.required} ({c.expected})"
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

        display(self)
        self.verify()

    def _repr_html_(self) -> str:
        # The word says it all; the sign helps to find a failure among many.
        sign = {True: "✓ ", False: "✗ ", None: ""}
        rows = [
            (c.name, c.expected, c.found, c.required, sign[c.holds] + c.verdict)
            for c in self.claims.values()
        ]
        columns = ["claim", "expected", "measured", "required", "verdict"]
        frame = pd.DataFrame(rows, columns=columns).set_index("claim")
        return table(frame, self.caption)._repr_html_()

    def __repr__(self) -> str:
        lines = [
            f"{c.name}: {c.expected} {c.found}, {c.required}: {c.verdict}"
            for c in self.claims.values()
        ]
        return "\n".join([self.caption, *lines])


class Exercise:
    """A task for the reader, whose answer is checked: right, wrong, or not there yet.

    Args:
        title: what the verdict calls it.
        is_right: tells whether an answer is right; an error means that it is not.

    >>> exercise = Exercise("Exercise 1", lambda answer: answer == 3)
    >>> exercise.check(None)
    Exercise 1: no answer yet. Fill in the cell above, run it, and run this one again.
    >>> exercise.check(2)
    Exercise 1: wrong. The answer was 2.
    >>> exercise.verify(3)
    Exercise 1: right.
    """

    def __init__(self, title: str, is_right: Callable[[Any], Any]) -> None:
        self.title, self.is_right = title, is_right

    def check(self, answer: Any) -> Html:
        """The verdict on an answer; None stands for a cell that was left empty."""
        return self._judged(answer)[1]

    def verify(self, answer: Any) -> Html:
        """The verdict on a solution.

        Raises:
            ClaimFailed: if it is not right.
        """
        right, verdict = self._judged(answer)
        if not right:
            raise ClaimFailed(repr(verdict))
        return verdict

    def _judged(self, answer: Any) -> tuple[bool, Html]:
        right = False
        if answer is None:
            said = "no answer yet. Fill in the cell above, run it, and run this one again."
        else:
            try:
                right = bool(self.is_right(answer))
                said = "right." if right else f"wrong. The answer was {answer}."
            except Exception as error:  # A reader may have put anything there.
                said = f"wrong. The answer was {answer!r}, which cannot be checked: {error}"
        markup = f"<p><b>{as_html(self.title)}</b>: {as_html(said)}</p>"
        return right, Html(markup, f"{self.title}: {said}")
