"""The task: pairs of clean and corrupted prompts, what is right, and how it is scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patching_demo.engine.checks import check_bridge
from patching_demo.engine.isolation import isolated, with_more_tokens
from patching_demo.engine.tokens import check_ids, check_length, device_of, name_of
from patching_demo.metrics import (
    AnswerOdds,
    FunctionMetric,
    LogitDifference,
    LogProb,
    Metric,
    Normalised,
    Probability,
    reads,
)

#: Names of the metrics a task can be scored by.
METRICS = ("logit difference", "log-probability", "probability")

#: Tokens of prompts of one shape that are run together, so that memory does not grow with prompts.
GROUP_TOKENS = 256


@dataclass(frozen=True, eq=False)
class Task:
    """Clean and corrupted inputs with a metric and its two baselines.

    Attributes:
        name: Short name, used in figure titles.
        clean_tokens: int64 ``[batch, pos]``; activations are taken from runs on these.
        corrupted_tokens: int64 ``[batch, pos]``; activations are patched into runs on these.
        metric: Logits ``[batch, pos, d_vocab]`` of the corrupted prompts to a scalar.
        clean_baseline: ``metric`` of the clean run, in the metric's units.
        corrupted_baseline: ``metric`` of the corrupted run, in the same units.
        position_labels: A unique label for each position, such as "John 10".
        position_tokens: The token behind each label, with its spaces, such as " John". Where
            rows hold random tokens, the place in the sequence instead.
        clean_strings: Decoded tokens of every clean prompt, ``batch`` lists of ``pos`` strings.
        corrupted_strings: The same for the corrupted prompts.
        answers: int64 ``[batch, 2]`` (right, wrong), or ``[batch, n]`` right tokens. Of answers
            of several tokens, the first ones.
        lengths: int64 ``[batch]``, the tokens of each clean prompt without padding.
        model_name: The model that the baselines belong to.
        direction: "denoising" patches what the answer needs into prompts that lack it;
            "noising" is the reverse, see :meth:`reversed`.
        corrupted_lengths: int64 ``[batch]``, the tokens of each corrupted prompt.
        roles: Named positions: for each name, int64 ``[batch]`` in the clean and in the corrupted
            prompts.
        rows_per_prompt: How many rows of the batch a prompt takes; more than one where answers of
            several tokens follow it.
        clean_values: ``metric`` of the clean run for each prompt, None if it has no such values.
        corrupted_values: The same for the corrupted run.
        extra_embeddings: ``[n, d_model]``, what is embedded for the ids from ``d_vocab`` on, as
            :func:`patching_demo.tasks.noise_task` needs it.
    """

    name: str
    clean_tokens: Tensor
    corrupted_tokens: Tensor
    metric: Metric
    clean_baseline: float
    corrupted_baseline: float
    position_labels: list[str]
    position_tokens: list[str]
    clean_strings: list[list[str]]
    corrupted_strings: list[list[str]]
    answers: Tensor
    lengths: Tensor
    model_name: str
    direction: str = "denoising"
    corrupted_lengths: Tensor = field(default=None)  # type: ignore[assignment]
    roles: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    rows_per_prompt: int = 1
    clean_values: Tensor | None = None
    corrupted_values: Tensor | None = None
    extra_embeddings: Tensor | None = None

    def __post_init__(self) -> None:
        if self.corrupted_lengths is None:
            object.__setattr__(self, "corrupted_lengths", self.lengths)

    def __len__(self) -> int:
        """How many prompts it has."""
        return len(self.clean_tokens) // self.rows_per_prompt

    @property
    def same_lengths(self) -> bool:
        """Whether the prompts of every pair are equally long, so that positions correspond."""
        return torch.equal(self.lengths, self.corrupted_lengths)

    @property
    def agree_until(self) -> int:
        """The first position at which any clean prompt differs from its corrupted one.

        In a causal model every activation before it is the same in both runs.
        """
        shared = min(self.clean_tokens.shape[1], self.corrupted_tokens.shape[1])
        differs = (self.clean_tokens[:, :shared] != self.corrupted_tokens[:, :shared]).any(0)
        return int(differs.int().argmax()) if differs.any() else shared

    def agrees_at(self, role: str) -> bool:
        """Whether each prompt's text up to a role is that of its corrupted prompt."""
        here, there = self.roles[role]
        if not torch.equal(here, there):
            return False
        pairs = zip(here.tolist(), self.clean_tokens, self.corrupted_tokens, strict=True)
        return all(torch.equal(one[: at + 1], other[: at + 1]) for at, one, other in pairs)

    @property
    def clean_metric(self) -> Metric:
        """The metric where it reads in the clean prompts, which may have other lengths."""
        if self.same_lengths:
            return self.metric
        rows = torch.arange(len(self.lengths), device="cpu")
        return self.metric.select(rows, self.lengths - self.corrupted_lengths)

    def normalised(self) -> Task:
        """The same task scored from 0 (corrupted baseline) to 1 (clean baseline).

        Raises:
            ValueError: if the two baselines are equal, or differ by rounding alone.
        """
        low, span = self.corrupted_baseline, self.clean_baseline - self.corrupted_baseline
        metric = self.metric.normalised(self.clean_baseline, self.corrupted_baseline)
        scaled = {
            name: None if values is None else (values - low) / span
            for name, values in (
                ("clean_values", self.clean_values),
                ("corrupted_values", self.corrupted_values),
            )
        }
        return replace(self, metric=metric, clean_baseline=1.0, corrupted_baseline=0.0, **scaled)

    def with_metric(self, model: Any, metric: Metric | str | Callable[[Tensor], Any]) -> Task:
        """The same prompts scored by another metric, with its baselines measured on ``model``.

        ``metric`` is a metric, one of :data:`METRICS`, or a function of all logits ``[batch, pos,
        d_vocab]``; :func:`patching_demo.metrics.reads` makes one that is given fewer, and faster.

        Raises:
            ValueError: if the metric is unknown, does not fit, or is not finite on these prompts.
            TypeError: if it is nothing of these, or a function of all logits where the prompts of
                a pair have other lengths.
        """
        if isinstance(metric, str):
            own = self.metric.metric if isinstance(self.metric, Normalised) else self.metric
            if isinstance(own, AnswerOdds):
                metric = own.scored_as(checked_metric_name(metric))
            elif isinstance(own, FunctionMetric):
                raise ValueError(
                    f"the task is scored by the function {own.name!r}, which does not say where "
                    f"its answers are: call with_metric(model, {checked_metric_name(metric)!r}) on "
                    "the task as it was before"
                )
            else:
                metric = named_metric(metric, self.answers, self.metric.positions)
        elif not isinstance(metric, Metric):
            if not callable(metric) or not self.same_lengths:
                raise TypeError(
                    f"metric must be one of {', '.join(METRICS)}, or a metric, got {metric!r}: "
                    "patching_demo.metrics.reads makes one of a function that says where it reads"
                )
            everywhere = torch.arange(self.clean_tokens.shape[1], device="cpu")
            metric = reads(everywhere.expand(len(self.clean_tokens), -1))(metric)
        return replace(self, metric=metric)._measured(model)

    def on(self, model: Any) -> Task:
        """The same prompts with the baselines of another model, such as a fine-tuned copy.

        A normalised task is normalised anew, by that model's baselines.

        Raises:
            ValueError: if the model reads the tokens as other text, or cannot take them.
        """
        check_bridge(model)
        more = 0 if self.extra_embeddings is None else len(self.extra_embeddings)
        if more:
            raise ValueError(
                "the noise of this task belongs to another model's embeddings: make the task with "
                "this model"
            )
        for which, tokens, strings in (
            ("clean tokens", self.clean_tokens, self.clean_strings),
            ("corrupted tokens", self.corrupted_tokens, self.corrupted_strings),
        ):
            check_ids(model, tokens, which)
            check_length(model, tokens.shape[1], which)
            theirs = [strings_of(model, row) for row in tokens.tolist()]
            for ours, other in zip(chain(*strings), chain(*theirs), strict=True):
                if ours != other and getattr(model, "tokenizer", None) is not None:
                    raise ValueError(
                        f"the {which} have {ours!r} where the tokenizer of {name_of(model)} reads "
                        f"{other!r}: make the task with this model"
                    )
        device = device_of(model)
        moved = replace(
            self,
            clean_tokens=self.clean_tokens.to(device),
            corrupted_tokens=self.corrupted_tokens.to(device),
        )
        if isinstance(self.metric, Normalised):
            return moved.with_metric(model, self.metric.metric).normalised()
        return moved.with_metric(model, self.metric)

    def reversed(self) -> Task:
        """The same task with clean and corrupted prompts swapped: noising.

        Corrupted activations are patched into the clean run, and what the answer needs shows as
        a fall. Answers, metric and labels stay; a normalised metric is still 1 on the run that
        activations are taken from and 0 on the run they are patched into.
        """
        clean, corrupted, metric = self.corrupted_baseline, self.clean_baseline, self.clean_metric
        values = [self.corrupted_values, self.clean_values]
        if isinstance(metric, Normalised):
            clean, corrupted = self.clean_baseline, self.corrupted_baseline
            metric = metric.metric.normalised(metric.corrupted, metric.clean)
            values = [None if own is None else 1 - own for own in values]
        return replace(
            self,
            clean_tokens=self.corrupted_tokens,
            corrupted_tokens=self.clean_tokens,
            clean_strings=self.corrupted_strings,
            corrupted_strings=self.clean_strings,
            clean_baseline=clean,
            corrupted_baseline=corrupted,
            clean_values=values[0],
            corrupted_values=values[1],
            lengths=self.corrupted_lengths,
            corrupted_lengths=self.lengths,
            roles={name: (there, here) for name, (here, there) in self.roles.items()},
            metric=metric,
            direction="noising" if self.direction == "denoising" else "denoising",
        )

    def select(self, prompts: Any) -> Task:
        """The task on some of its prompts: their numbers, or truth values for all prompts.

        A normalised task is normalised anew, by the baselines of these prompts.

        Raises:
            ValueError: if there is none, or the metric has no values for single prompts.
            IndexError: if one does not exist.
        """
        asked = np.asarray(prompts)
        try:
            chosen = np.arange(len(self))[asked].reshape(-1).tolist() if asked.size else []
        except IndexError as error:
            raise IndexError(f"{error}: the task has {len(self)} prompts, the first is 0") from None
        if not chosen:
            raise ValueError("no prompt is selected, so there is no task")
        if self.clean_values is None or self.corrupted_values is None:
            raise ValueError(
                f"the metric {self.metric.name!r} is one number for the whole batch: select "
                "prompts before scoring by it"
            )
        plain = self._in_own_units()
        return self.part(chosen) if plain is self else plain.part(chosen).normalised()

    def _in_own_units(self) -> Task:
        """The task by the metric that a normalised one rescales, with the values of its prompts."""
        scale = self.metric
        if not isinstance(scale, Normalised):
            return self
        values = {}
        for which in ("clean_values", "corrupted_values"):
            own = getattr(self, which)
            if own is not None:
                values[which] = own * (scale.clean - scale.corrupted) + scale.corrupted
        return replace(self, metric=scale.metric, **values)

    def solved(self, model: Any = None) -> Task:
        """The task on the prompts where the model prefers the right answer; says how many.

        The right answer is preferred where the task's own metric, a difference between right and
        wrong, is above 0 on the clean prompt.

        Args:
            model: a TransformerBridge whose preferences count, if not of the one that the task
                was made with.

        Raises:
            ValueError: if there is none, or the metric does not compare right with wrong.
        """
        plain = self._in_own_units()
        if plain.metric.name not in ("logit difference", "log-probability difference"):
            raise ValueError(
                f"{plain.metric.name!r} does not say which answer the model prefers: score the "
                "task by the logit difference, with task.with_metric(model, 'logit difference') "
                "before any function of your own"
            )
        name, values = self.model_name, plain.clean_values
        if model is not None:
            _refuse_training(model)
            name, use = name_of(model), _Use()
            own = self.model_of(model, use)
            values, _ = self._values(own, self.clean_tokens, plain.clean_metric)
        if values is None:
            raise ValueError("the metric has no values for single prompts")
        right = (values > 0).numpy(force=True)
        print(
            f"{name} prefers the right answer on {right.sum()} of {len(right)} clean "
            f"prompts{'.' if right.all() else f'; {(~right).sum()} left out.'}"
        )
        if not right.any():
            raise ValueError(
                f"{name} prefers the wrong answer on every clean prompt, by "
                f"{-float(values.max()):.2f} or more: try prompts that it knows, or see with "
                "model.generate how it goes on"
            )
        return self.select(right)

    @classmethod
    def from_frame(cls, model: Any, frame: Any, **options: Any) -> Task:
        """A task from a table with a pair of prompts in each row.

        Args:
            model: a TransformerBridge with a tokenizer.
            frame: a pandas DataFrame with the columns clean, corrupted, right and wrong; every
                other column is a role, and one that ends in ``_corrupted`` holds the role of that
                name in the corrupted prompts, where it is another text. All columns hold text.
            options: of :func:`patching_demo.prompt_task`, such as ``metric`` and ``chat``.

        Raises:
            ValueError: if a column is missing, or a row makes no pair; the message names the row.
            TypeError: as :func:`patching_demo.prompt_task`.
        """
        from patching_demo.tasks.prompts import prompt_task

        needed = ("clean", "corrupted", "right", "wrong")
        for name in needed:
            if name not in frame:
                raise ValueError(f"the table has no column {name!r}, only {list(frame)}")
        empty = frame.isna().to_numpy()
        if empty.any():
            at = int(empty.any(axis=1).argmax())
            columns = list(frame.columns[empty[at]])
            raise ValueError(f"row {frame.index.tolist()[at]!r}: {columns} is empty")
        for name in frame:
            for row, value in zip(frame.index.tolist(), frame[name].tolist(), strict=True):
                if not isinstance(value, str):
                    raise TypeError(
                        f"row {row!r}: column {name!r} holds {value!r}, which is no text. Read "
                        "the table with dtype=str (and skipinitialspace=False, as an answer begins "
                        "with a space); leave out a column that is no role; token ids and "
                        "positions go to prompt_task"
                    )

        def task_of(rows: Any) -> Task:
            columns = {name: rows[name].tolist() for name in rows}
            roles = {
                name: (own, columns.get(f"{name}_corrupted", own))
                for name, own in columns.items()
                if name not in needed and not name.endswith("_corrupted")
            }
            answers = list(zip(columns["right"], columns["wrong"], strict=True))
            return prompt_task(
                model, columns["clean"], columns["corrupted"], answers, roles=roles, **options
            )

        try:
            return task_of(frame)
        except (ValueError, TypeError):
            for at, row in enumerate(frame.index.tolist()):
                try:
                    task_of(frame.iloc[[at]])
                except (ValueError, TypeError) as error:
                    raise type(error)(f"row {row!r}: {error}") from None
            raise

    def groups(self) -> list[list[int]]:
        """The prompts that have the same lengths and roles at the same places, so many at a time.

        Memory is bounded by that, as activations are kept of one such group only. The longest come
        first: what holds for them is soon seen to hold for shorter ones.
        """
        places = [self.lengths, self.corrupted_lengths, *chain(*self.roles.values())]
        rows = torch.stack([place.cpu() for place in places], dim=1)
        shapes: dict[bytes, list[int]] = {}
        for prompt, key in enumerate(rows.unflatten(0, (len(self), -1)).flatten(1).numpy()):
            shapes.setdefault(key.tobytes(), []).append(prompt)
        each = [own.view(len(self), -1).sum(dim=1) for own in places[:2]]
        tokens = torch.maximum(*each).tolist()  # that a prompt takes
        found = []
        for prompts in sorted(shapes.values(), key=lambda own: -tokens[own[0]]):
            size = max(1, GROUP_TOKENS // tokens[prompts[0]])
            found += [prompts[i : i + size] for i in range(0, len(prompts), size)]
        return found

    def rows_of(self, prompts: Iterable[int]) -> Tensor:
        """The rows of the batch that belong to these prompts."""
        each = self.rows_per_prompt
        rows = [prompt * each + i for prompt in prompts for i in range(each)]
        return torch.tensor(rows, device="cpu")

    def over_rows(self, values: Tensor, dim: int = 0) -> Tensor:
        """The mean over each prompt's rows of values that have one for each row along ``dim``."""
        if self.rows_per_prompt == 1:
            return values
        return values.unflatten(dim, (-1, self.rows_per_prompt)).mean(dim + 1 if dim >= 0 else dim)

    def part(self, prompts: Sequence[int]) -> Task:
        """These prompts alone, without padding that none of them needs, on the same scale."""
        rows = self.rows_of(prompts)
        listed = rows.tolist()
        lengths, corrupted_lengths = self.lengths[rows], self.corrupted_lengths[rows]
        n_pos, n_corrupted = int(lengths.max()), int(corrupted_lengths.max())
        means: dict[str, Any] = {}
        for which in ("clean", "corrupted"):
            values = getattr(self, f"{which}_values")
            if values is not None:
                means[f"{which}_values"] = values[list(prompts)]
                means[f"{which}_baseline"] = float(values[list(prompts)].mean())
        named = self.position_tokens == self.clean_strings[int(self.lengths.argmax())]
        tokens = self.position_tokens[:n_pos]
        if named:  # After the longest of the prompts.
            tokens = self.clean_strings[listed[int(lengths.argmax())]][:n_pos]
        return replace(
            self,
            clean_tokens=self.clean_tokens[rows.to(self.clean_tokens.device), :n_pos],
            corrupted_tokens=self.corrupted_tokens[
                rows.to(self.corrupted_tokens.device), :n_corrupted
            ],
            metric=self.metric.select(rows),
            position_labels=position_labels(tokens) if named else self.position_labels[:n_pos],
            position_tokens=tokens,
            clean_strings=[self.clean_strings[row][:n_pos] for row in listed],
            corrupted_strings=[self.corrupted_strings[row][:n_corrupted] for row in listed],
            answers=self.answers[rows.to(self.answers.device)],
            lengths=lengths,
            corrupted_lengths=corrupted_lengths,
            roles={name: (here[rows], there[rows]) for name, (here, there) in self.roles.items()},
            **means,
        )

    @property
    def attention_mask(self) -> Tensor:
        """Which tokens of the clean prompts are text and not padding: bool ``[batch, pos]``."""
        places = torch.arange(self.clean_tokens.shape[1], device=self.clean_tokens.device)
        return places < self.lengths.to(places.device)[:, None]

    def clean_cache(self, model: Any, names_filter: Any = None) -> Any:
        """Activations of the clean run, as ``run_with_cache`` returns them, without gradients.

        ``names_filter`` limits what is kept: a hook name, a list of them, or a function of one.
        """
        return self._cache(model, self.clean_tokens, names_filter)

    def corrupted_cache(self, model: Any, names_filter: Any = None) -> Any:
        """Activations of the corrupted run; see :meth:`clean_cache`."""
        return self._cache(model, self.corrupted_tokens, names_filter)

    def model_of(self, model: Any, user: Any = None) -> Any:
        """The model on modules of the task's own, with what the task embeds beyond the vocabulary.

        Args:
            model: a TransformerBridge.
            user: as for :func:`patching_demo.engine.isolation.isolated`.
        """
        if self.extra_embeddings is None:
            return isolated(model, user)
        return with_more_tokens(model, self.extra_embeddings)

    def _cache(self, model: Any, tokens: Tensor, names_filter: Any) -> Any:
        with torch.no_grad():  # The cache refers to its model, which so serves nobody else.
            return self.model_of(model).run_with_cache(tokens, names_filter=names_filter)[1]

    def _measured(self, model: Any) -> Task:
        """The task with its baselines measured on a model."""
        _refuse_training(model)
        found: dict[str, Any] = {"model_name": name_of(model)}
        use = _Use()
        model, metric = self.model_of(model, use), self.metric
        for which, tokens in (("clean", self.clean_tokens), ("corrupted", self.corrupted_tokens)):
            own = self.clean_metric if which == "clean" else metric
            values, baseline = self._values(model, tokens, own)
            if not math.isfinite(baseline):
                raise ValueError(
                    f"the metric '{metric.name}' is {baseline} on the {which} prompts: look at the "
                    "model's logits, or choose a metric that does not overflow"
                )
            found |= {f"{which}_values": values, f"{which}_baseline": baseline}
        return replace(self, **found)

    @torch.no_grad()
    def _values(self, model: Any, tokens: Tensor, metric: Metric) -> tuple[Tensor | None, float]:
        """A metric for each prompt, None where it has no such values, and over all of them."""
        each = self.rows_per_prompt
        size = max(1, 2 * GROUP_TOKENS // tokens.shape[1] // each)  # prompts
        if len(self) <= 2 * size or not metric.selectable:
            logits = model(tokens, return_type="logits")
            baseline = float(metric(logits))
            try:
                return self.over_rows(metric.per_example(logits)).cpu(), baseline
            except ValueError:  # It is one number for the batch.
                return None, baseline
        found = []
        # The shortest together: what is behind the last position that is read reaches nothing.
        lasts = metric.positions.cpu().amax(dim=1).view(-1, each).amax(dim=1)
        order = lasts.argsort(stable=True)
        for prompts in order.split(size):
            rows = self.rows_of(prompts.tolist())
            part = metric.select(rows)
            last = int(lasts[prompts].max()) + 1
            logits = model(tokens[rows.to(tokens.device), :last], return_type="logits")
            found.append(self.over_rows(part.per_example(logits)).cpu())
            del logits  # Else two batches of them are held at once.
        values = torch.cat(found)[order.argsort()]
        return values, float(values.mean())

    def __repr__(self) -> str:
        shortest, longest = int(self.lengths.min()), int(self.lengths.max())
        length = f"{shortest}" if shortest == longest else f"{shortest} to {longest}"
        return (
            f"<Task {self.name!r} on {self.model_name}: {len(self)} prompt(s) of {length} tokens, "
            f"{self.metric.name}: clean {self.clean_baseline:.4f}, "
            f"corrupted {self.corrupted_baseline:.4f}>"
        )


class _Use:
    """Of a model on modules of its own: they serve others once it is gone."""


def _refuse_training(model: Any) -> None:
    if getattr(model, "training", False):
        raise ValueError(
            "the model is in training mode, in which dropout makes every run different: call "
            "model.eval() first"
        )


def checked_metric_name(name: str) -> str:
    """The name, if it is one of :data:`METRICS`; ValueError otherwise."""
    if name not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {name!r}")
    return name


def named_metric(name: str, answers: Tensor, positions: Tensor) -> Metric:
    """The metric of that name, for answers of one token.

    Raises:
        ValueError: if there is none, or the answers do not fit it.
    """
    if checked_metric_name(name) == "logit difference":
        if answers.shape[1] != 2 or positions.shape[1] != 1:
            raise ValueError(
                "the logit difference needs a right and a wrong answer at one position, and this "
                "task has right answers alone: use the log-probability or the probability"
            )
        return LogitDifference(answers, positions)
    # (right, wrong) pairs at one position each, or already one right token for each position.
    right = answers if answers.shape == positions.shape else answers[:, :1]
    return (LogProb if name == "log-probability" else Probability)(right, positions)


def build(
    model: Any,
    *,
    clean: Tensor,
    corrupted: Tensor,
    lengths: Tensor,
    names: list[str] | None = None,
    **parts: Any,
) -> Task:
    """A task with its strings, labels and baselines.

    Args:
        model: a TransformerBridge.
        clean, corrupted: tokens, padded on the right.
        lengths: of the clean prompts.
        names: of the positions; the tokens of the longest clean prompt where None.
        parts: the other attributes of :class:`Task`.

    Raises:
        ValueError: if clean and corrupted tokens are the same.
    """
    if torch.equal(clean, corrupted):
        raise ValueError("clean and corrupted tokens are the same, so there is nothing to patch")
    clean_strings = [strings_of(model, row) for row in clean.tolist()]
    corrupted_strings = [strings_of(model, row) for row in corrupted.tolist()]
    if names is None:
        names = list(clean_strings[int(lengths.argmax())])
    return Task(
        clean_tokens=clean,
        corrupted_tokens=corrupted,
        clean_baseline=math.nan,
        corrupted_baseline=math.nan,
        position_labels=position_labels(names),
        position_tokens=names,
        clean_strings=clean_strings,
        corrupted_strings=corrupted_strings,
        lengths=lengths,
        model_name=name_of(model),
        **parts,
    )._measured(model)


def strings_of(model: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token; its number where there is no tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return [f"#{i}" for i in ids]
    size = getattr(getattr(model, "cfg", None), "d_vocab", math.inf)
    return [
        tokenizer.decode([i], clean_up_tokenization_spaces=False) if i < size else "noise"
        for i in ids
    ]


def position_labels(names: Sequence[str]) -> list[str]:
    """A unique label for each position, after the token there."""
    return [f"{_label(name)} {i}" for i, name in enumerate(names)]


def _label(token: str) -> str:
    return token.strip() or repr(token)[1:-1].replace(" ", "␣")
