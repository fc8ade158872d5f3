"""What a patch is scored by: metrics that say which logits they read.

A metric turns logits into one number per example. Each metric here also states *where* it
reads: the positions, per example, and the vocabulary entries. A sweep can then compute only
those logits, and padded prompts are read at their own last token instead of at a pad.

>>> import torch
>>> logits = torch.tensor([[[0.0, 0.0, 0.0], [3.0, 1.0, 0.0]]])  # one example, two positions
>>> metric = LogitDifference([[0, 1]], positions=1)
>>> metric(logits).item()
2.0
>>> metric.normalised(clean=4.0, corrupted=0.0)(logits).item()
0.5
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from patching_demo.engine.tokens import whole_numbers

__all__ = [
    "AnswerOdds",
    "FunctionMetric",
    "LogProb",
    "LogitDifference",
    "Metric",
    "Normalised",
    "PerExample",
    "Probability",
    "reads",
]


#: A row of a prompt, and the tokens wanted at the positions read there; see :class:`AnswerOdds`.
Answer = tuple[int, "Sequence[tuple[int, int]]"]


class Metric(ABC):
    """A number per example, read from logits at known positions.

    Calling a metric with logits ``[batch, pos, d_vocab]`` gives a scalar tensor, the mean over
    the batch. That is :meth:`read` (gather what is needed) followed by :meth:`from_read`
    (compute), and a sweep that already holds only the needed logits calls the latter itself.

    Attributes:
        name: What is measured, in words.
        units: "logits", "nats", "probability" or "share of clean - corrupted".
        positions: int64 ``[batch, n_positions]``, absolute and not negative.
        tokens: int64 ``[batch, n_tokens]``, the vocabulary entries read, or None where the
            whole vocabulary is needed (a log-softmax, for instance).
    """

    name: str
    units: str
    positions: Tensor
    tokens: Tensor | None
    _by_row = ("positions", "tokens")

    def read(self, logits: Tensor) -> Tensor:
        """Gather what the metric needs: ``[batch, n_positions, n_tokens or d_vocab]``.

        ``logits`` is ``[batch, pos, d_vocab]``.

        Raises:
            TypeError: if ``logits`` is not a tensor.
            ValueError: if the shape does not fit the metric's batch, positions or tokens.
        """
        self._check(logits)
        batch, _, d_vocab = logits.shape
        rows = torch.arange(batch, device=logits.device)
        positions = self.positions.to(logits.device)
        if self.tokens is None:
            return logits[rows[:, None], positions]
        tokens = self.tokens.to(logits.device)
        return logits[rows[:, None, None], positions[:, :, None], tokens[:, None, :]]

    @abstractmethod
    def from_read(self, read: Tensor) -> Tensor:
        """The metric per example ``[..., batch]`` from what :meth:`read` gathers.

        ``read`` is ``[..., batch, n_positions, n_tokens or d_vocab]``: leading dimensions are
        allowed, so that many patched runs are scored at once.
        """

    def __call__(self, logits: Tensor) -> Tensor:
        """The mean over the batch, a scalar tensor, of logits ``[batch, pos, d_vocab]``."""
        return self.from_read(self.read(logits)).mean()

    @property
    def per_example(self) -> PerExample:
        """The same metric without the mean: logits ``[batch, pos, d_vocab]`` to ``[batch]``."""
        return PerExample(self)

    def normalised(self, clean: float, corrupted: float) -> Normalised:
        """Rescale so that the corrupted baseline is 0 and the clean baseline is 1.

        Raises:
            ValueError: if the baselines are equal, differ by rounding alone, or are not finite.
        """
        return Normalised(self, clean, corrupted)

    @property
    def selectable(self) -> bool:
        """Whether :meth:`select` knows all that belongs to single rows of the batch."""
        return type(self).__module__ == __name__

    def select(self, rows: Tensor, shift: Tensor | None = None) -> Metric:
        """The same metric for some rows of the batch, read so many positions further on.

        Args:
            rows: int64 ``[n]``.
            shift: int64 ``[n]``; 0 where None.
        """
        chosen = copy.copy(self)
        for name in self._by_row:
            values = getattr(self, name)
            if values is not None:
                setattr(chosen, name, values[rows.to(values.device)])
        if shift is not None:
            chosen.positions = chosen.positions + shift.to(chosen.positions)[:, None]
        return chosen

    def __repr__(self) -> str:
        batch, n_positions = self.positions.shape
        return f"<{self.name} ({self.units}), batch {batch}, {n_positions} position(s) each>"

    def _check(self, logits: Tensor) -> None:
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"the metric '{self.name}' takes a tensor of logits, got {type(logits).__name__}"
            )
        shape = tuple(logits.shape)
        if logits.ndim != 3:
            raise ValueError(
                f"the metric '{self.name}' takes logits [batch, pos, d_vocab], got shape {shape}"
            )
        batch = self.positions.shape[0]
        if shape[0] != batch:
            raise ValueError(
                f"the metric '{self.name}' was made for a batch of {batch}, got logits of shape "
                f"{shape}: make the metric for these prompts"
            )
        last = int(self.positions.max())
        if last >= shape[1]:
            raise ValueError(
                f"the metric '{self.name}' reads position {last}, but the logits have only "
                f"{shape[1]} positions (shape {shape})"
            )
        highest = self._highest_token()
        if highest >= shape[2]:
            raise ValueError(
                f"the metric '{self.name}' reads token {highest}, but the vocabulary has only "
                f"{shape[2]} entries"
            )

    def _highest_token(self) -> int:
        return -1 if self.tokens is None else int(self.tokens.max())


class LogitDifference(Metric):
    """Logit of the right answer minus logit of the wrong one, in logits.

    The metric of the IOI work (Wang et al., 2022). A difference of d logits means that the
    right answer is exp(d) times as probable as the wrong one.

    Args:
        answer_tokens: int ``[batch, 2]``, (right, wrong) for each example.
        positions: where to read: one absolute position for all, or ``[batch]``, or
            ``[batch, n]`` (the mean over the n positions is taken).

    Raises:
        ValueError: on wrong shapes, negative positions or token ids.
        TypeError: if ids or positions are not integers.
    """

    name, units = "logit difference", "logits"

    def __init__(self, answer_tokens: Any, positions: Any) -> None:
        self.tokens = _indices(answer_tokens, "answer_tokens")
        if self.tokens.ndim != 2 or self.tokens.shape[1] != 2:
            raise ValueError(
                "answer_tokens must be [batch, 2], a (right, wrong) pair for each example, got "
                f"shape {tuple(self.tokens.shape)}"
            )
        self.positions = _positions(positions, batch=self.tokens.shape[0])

    def from_read(self, read: Tensor) -> Tensor:
        read = _at_least_float32(read)
        return (read[..., 0] - read[..., 1]).mean(-1)


class _AnswerLogProb(Metric):
    """Shared by the metrics that need a softmax over the vocabulary."""

    _by_row = ("positions", "tokens", "answers")

    def __init__(self, answers: Any, positions: Any) -> None:
        answers = _indices(answers, "answers")
        if answers.ndim == 1:
            answers = answers[:, None]
        if answers.ndim != 2 or answers.shape[1] == 0:
            raise ValueError(
                f"answers must be [batch] or [batch, n_positions], got shape {tuple(answers.shape)}"
            )
        self.answers = answers
        self.tokens = None
        self.positions = _positions(positions, batch=answers.shape[0])
        if self.positions.shape != answers.shape:
            raise ValueError(
                "one answer is needed for each position read: answers have shape "
                f"{tuple(answers.shape)}, positions {tuple(self.positions.shape)}"
            )

    def _log_probs(self, read: Tensor) -> Tensor:
        log_probs = _at_least_float32(read).log_softmax(-1)
        answers = self.answers.to(read.device).expand(log_probs.shape[:-1])
        return log_probs.gather(-1, answers[..., None])[..., 0]

    def _highest_token(self) -> int:
        return int(self.answers.max())


class LogProb(_AnswerLogProb):
    """Log-probability of the right answer, in nats, averaged over the positions read.

    The negative of a cross-entropy loss: 0 is certainty, and higher is better.

    Args:
        answers: int ``[batch, n_positions]`` (or ``[batch]`` for one position each).
        positions: ``[batch, n_positions]``, or one position for all, or ``[batch]``. The
            prediction of the token at position p is read at position p - 1.

    Raises:
        ValueError: on wrong shapes, negative positions or token ids.
        TypeError: if ids or positions are not integers.
    """

    name, units = "log-probability", "nats"

    def from_read(self, read: Tensor) -> Tensor:
        return self._log_probs(read).mean(-1)


class Probability(_AnswerLogProb):
    """Probability of the right answer, from 0 to 1, averaged over the positions read.

    It saturates: an effect that takes the answer from hopeless to unlikely is invisible here
    and plain in :class:`LogProb` or :class:`LogitDifference`.

    Args and errors are those of :class:`LogProb`.
    """

    name, units = "probability", "probability"

    def from_read(self, read: Tensor) -> Tensor:
        return self._log_probs(read).exp().mean(-1)


class AnswerOdds(Metric):
    """How probable right answers are, and wrong ones, where an answer may have several tokens.

    The probability of an answer is that of its first token times that of each later one after
    those before it. So a prompt is run once for each answer that has several tokens, followed by
    all of them but the last; what several answers share out is added up. Every row of a prompt has
    the prompt's value.

    Args:
        right: for each prompt its right answers, each a list of (row, [(place, token), ...]): the
            row of the prompt that is read, counted from 0, and which token is wanted at which of
            the positions read there.
        wrong: the same for wrong answers; none for a prompt without any.
        positions: int ``[batch, n_positions]``, where each row is read.
        scored_as: "logit difference" for the log-probability of the right answers minus that of
            the wrong ones, in nats; for single tokens that is the logit difference.
            "log-probability" and "probability" score right answers alone.

    Raises:
        ValueError: on negative positions or an unknown score.
    """

    def __init__(
        self,
        right: Sequence[Sequence[Answer]],
        wrong: Sequence[Sequence[Answer]],
        positions: Any,
        scored_as: str = "logit difference",
    ) -> None:
        self.right, self.wrong = [list(own) for own in right], [list(own) for own in wrong]
        self.positions = _positions(positions, batch=None)
        self.rows_per_prompt = len(self.positions) // len(self.right)
        self.tokens = None
        self.kind = scored_as
        names = {
            "logit difference": ("log-probability difference", "nats"),
            "log-probability": ("log-probability", "nats"),
            "probability": ("probability", "probability"),
        }
        if scored_as not in names:
            raise ValueError(f"scored_as must be one of {', '.join(names)}, got {scored_as!r}")
        self.name, self.units = names[scored_as]

    def scored_as(self, name: str) -> AnswerOdds:
        """The same answers by another score."""
        return AnswerOdds(self.right, self.wrong, self.positions, name)

    def select(self, rows: Tensor, shift: Tensor | None = None) -> Metric:
        chosen = super().select(rows, shift)
        prompts = (rows[:: self.rows_per_prompt] // self.rows_per_prompt).tolist()
        chosen.right = [self.right[i] for i in prompts]
        chosen.wrong = [self.wrong[i] for i in prompts]
        return chosen

    def from_read(self, read: Tensor) -> Tensor:
        log_probs = _at_least_float32(read).log_softmax(-1)
        right = self._of_answers(log_probs, self.right)
        if self.kind == "probability":
            values = right.exp()
        elif self.kind == "log-probability":
            values = right
        else:
            values = right - self._of_answers(log_probs, self.wrong)
        return values.repeat_interleave(self.rows_per_prompt, -1)

    def _of_answers(self, log_probs: Tensor, answers: Sequence[Sequence[Answer]]) -> Tensor:
        """The log-probability ``[..., prompt]`` that any of its answers follows each prompt."""
        found = []
        for prompt, own in enumerate(answers):
            each = [
                torch.stack(
                    [
                        log_probs[..., prompt * self.rows_per_prompt + row, place, token]
                        for place, token in wanted
                    ]
                ).sum(0)
                for row, wanted in own
            ]
            found.append(torch.stack(each).logsumexp(0))
        return torch.stack(found, dim=-1)

    def _highest_token(self) -> int:
        every = [*self.right, *self.wrong]
        return max(t for answers in every for _, wanted in answers for _, t in wanted)


class Normalised(Metric):
    """Another metric rescaled to 0 at the corrupted and 1 at the clean baseline.

    A value is the share of the distance between the two runs that a patch covers. Values below
    0 and above 1 are possible and mean what they say.

    Raises:
        ValueError: if the baselines are equal, differ by rounding alone, or are not finite.
    """

    def __init__(self, metric: Metric, clean: float, corrupted: float) -> None:
        clean, corrupted = float(clean), float(corrupted)
        check_scale(clean, corrupted, metric.name, metric.units)
        self.metric, self.clean, self.corrupted = metric, clean, corrupted
        self.name = f"{metric.name}, normalised"
        self.units = "share of clean - corrupted"
        self.positions, self.tokens = metric.positions, metric.tokens

    @property
    def selectable(self) -> bool:
        return self.metric.selectable

    def select(self, rows: Tensor, shift: Tensor | None = None) -> Metric:
        return Normalised(self.metric.select(rows, shift), self.clean, self.corrupted)

    def read(self, logits: Tensor) -> Tensor:
        return self.metric.read(logits)

    def from_read(self, read: Tensor) -> Tensor:
        return (self.metric.from_read(read) - self.corrupted) / (self.clean - self.corrupted)


def check_scale(clean: float, corrupted: float, name: str, units: str) -> None:
    """Refuse baselines between which there is nothing to share out.

    Raises:
        ValueError: if one is not finite, or they differ by no more than rounding may.
    """
    for which, value in (("clean", clean), ("corrupted", corrupted)):
        if not math.isfinite(value):
            raise ValueError(
                f"the {which} baseline of '{name}' is {value}: look for a metric or "
                "a model that overflows before normalising"
            )
    if as_good_as_equal(clean, corrupted, units):
        are = (
            f"both {clean}" if clean == corrupted else f"{clean} and {corrupted}, as good as equal"
        )
        raise ValueError(
            f"clean and corrupted baselines of '{name}' are {are}: a share of their difference "
            "would be rounding, magnified. Choose prompts on which the model's answers differ, or "
            "use the metric un-normalised"
        )


def as_good_as_equal(clean: float, corrupted: float, units: str) -> bool:
    """Whether two baselines differ by no more than rounding may.

    >>> as_good_as_equal(3.0, 3.0 + 1e-7, "logits")
    True
    """
    # Logits are of order ten, and carry seven digits in single precision.
    size = max(abs(clean), abs(corrupted), 1.0 if units in ("logits", "nats") else 0.0)
    return abs(clean - corrupted) <= 1e-5 * size


class PerExample:
    """A metric that keeps the batch: logits ``[batch, pos, d_vocab]`` to ``[batch]``.

    It reads the same places as the metric it wraps.
    """

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.name, self.units = metric.name, metric.units
        self.positions, self.tokens = metric.positions, metric.tokens
        self.read, self.from_read = metric.read, metric.from_read

    def __call__(self, logits: Tensor) -> Tensor:
        return self.from_read(self.read(logits))

    def __repr__(self) -> str:
        return f"<per example: {self.metric!r}>"


class FunctionMetric(Metric):
    """A reader's own function of the logits at given positions; see :func:`reads`.

    ``function`` takes ``[batch, n_positions, d_vocab]`` and returns ``[batch]``, or a single
    number for the whole batch (which then has no per-example values).

    Raises:
        TypeError: if the function returns something that is not a number or a tensor.
        ValueError: if it returns any other shape.
    """

    def __init__(
        self, function: Callable[[Tensor], Any], positions: Any, *, name: str, units: str
    ) -> None:
        self.function, self.name, self.units = function, name, units
        self.positions = _positions(positions, batch=None)
        self.tokens, self._each = None, False

    def from_read(self, read: Tensor) -> Tensor:
        lead = read.shape[:-3]
        if not lead:
            return self._one(read).expand(read.shape[0])
        # The function knows one batch, not stacks of patched runs.
        each = [self._one(run).expand(run.shape[0]) for run in read.flatten(0, len(lead) - 1)]
        return torch.stack(each).reshape(*lead, read.shape[-3])

    @property
    def selectable(self) -> bool:
        return False  # The function may know which row is which.

    @property
    def per_example(self) -> PerExample:
        own = copy.copy(self)
        own._each = True  # It insists on one value for each example.
        return PerExample(own)

    def _one(self, read: Tensor) -> Tensor:
        value = self.function(read)
        if isinstance(value, (int, float)):
            value = torch.tensor(float(value), device=read.device)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the metric '{self.name}' returned {type(value).__name__}, not a number or tensor"
            )
        if value.ndim > 1 or (value.ndim == 1 and value.shape[0] not in (1, read.shape[0])):
            raise ValueError(
                f"the metric '{self.name}' returned shape {tuple(value.shape)}: return one number "
                f"for each of the {read.shape[0]} examples, or one for the batch"
            )
        if self._each and value.shape != read.shape[:1]:
            raise ValueError(
                f"the metric '{self.name}' returns one number for the whole batch: per-example "
                f"values need one for each of the {read.shape[0]} examples (drop the mean)"
            )
        return value.to(read.device)


def reads(
    positions: Any, *, name: str | None = None, units: str = "metric units"
) -> Callable[[Callable[[Tensor], Any]], FunctionMetric]:
    """Turn a function of some logits into a metric that is given only those.

    A bare function of all logits works in every sweep too; saying where it reads saves
    computing the rest.

    Args:
        positions: int ``[batch, n]`` or ``[batch]``: the positions that the function gets.
        name: shown in figures; the function's own name where None.
        units: shown in figures.

    Raises:
        ValueError: on negative positions or wrong shapes.
        TypeError: if positions are not integers.

    >>> import torch
    >>> @reads([[1], [0]])
    ... def top_logit(logits):  # [batch, 1, d_vocab]
    ...     return logits.amax((-2, -1))
    >>> top_logit(torch.arange(12.0).reshape(2, 2, 3))
    tensor(6.5000)
    >>> top_logit.name
    'top logit'
    """

    def decorate(function: Callable[[Tensor], Any]) -> FunctionMetric:
        label = name or getattr(function, "__name__", "metric").replace("_", " ")
        return FunctionMetric(function, positions, name=label, units=units)

    return decorate


def _at_least_float32(values: Tensor) -> Tensor:
    # Differences and softmaxes of half-precision logits lose digits that fp32 keeps for free.
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _indices(values: Any, what: str) -> Tensor:
    """Indices as an int64 tensor, none of them negative."""
    tensor = whole_numbers(values, what)
    if int(tensor.min()) < 0:
        hint = "; count from the start: the last of n positions is n - 1" * (what == "positions")
        raise ValueError(f"{what} must not be negative, got {int(tensor.min())}{hint}")
    return tensor


def _positions(values: Any, batch: int | None) -> Tensor:
    """Positions as ``[batch, n_positions]``."""
    positions = _indices(values, "positions")
    if positions.ndim == 0 and batch is not None:
        positions = positions.expand(batch)
    if positions.ndim == 1:
        positions = positions[:, None]
    if positions.ndim != 2:
        raise ValueError(
            f"positions must be [batch] or [batch, n_positions], got {tuple(positions.shape)}"
        )
    if batch is not None and positions.shape[0] != batch:
        raise ValueError(
            f"positions are given for {positions.shape[0]} examples, answers for {batch}"
        )
    return positions.contiguous()
