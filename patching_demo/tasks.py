"""What is patched: pairs of clean and corrupted prompts, the answers, and how they are scored.

A :class:`Task` holds everything a sweep needs besides the model. The three builders check the
mistakes that otherwise give a plausible, meaningless figure: prompts of a pair that tokenise to
different lengths, answers of several tokens, prompts that do not differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from patching_demo.engine.checks import check_bridge, warn_once
from patching_demo.engine.isolation import isolated
from patching_demo.engine.tokens import (
    check_ids,
    check_length,
    config_number,
    device_of,
    name_of,
    pads,
    whole_numbers,
)
from patching_demo.metrics import LogitDifference, LogProb, Metric, Normalised, Probability

__all__ = [
    "CORRUPTIONS",
    "METRICS",
    "IOI_ANSWERS",
    "IOI_PROMPTS",
    "Task",
    "induction_task",
    "ioi_task",
    "prompt_task",
]

#: Names of the metrics a task can be scored by.
METRICS = ("logit difference", "log-probability", "probability")

#: What the two halves of the corrupted induction input are; the clean input is always AA.
CORRUPTIONS = ("AB", "BA", "BB", "BC")

# (template, the two names). Each gives two prompts, one for each name as the repeated subject,
# so that swapping within a pair corrupts only who is repeated.
_IOI_PAIRS = (
    ("When{0} and{1} went to the shops,{s} gave the bag to", (" John", " Mary"), (0, 1)),
    ("When{0} and{1} went to the park,{s} gave the ball to", (" Tom", " James"), (1, 0)),
    ("When{0} and{1} went to the shops,{s} gave an apple to", (" Dan", " Sid"), (1, 0)),
    ("After{0} and{1} went to the park,{s} gave a drink to", (" Martin", " Amy"), (1, 0)),
)

#: Eight indirect-object prompts, in pairs that differ in one name.
IOI_PROMPTS = tuple(
    template.format(*names, s=names[subject])
    for template, names, subjects in _IOI_PAIRS
    for subject in subjects
)

#: The indirect object and the subject of each of :data:`IOI_PROMPTS`, so the right and wrong name.
IOI_ANSWERS = tuple(
    (names[1 - subject], names[subject])
    for _, names, subjects in _IOI_PAIRS
    for subject in subjects
)


@dataclass(frozen=True, eq=False)
class Task:
    """Clean and corrupted inputs with a metric and its two baselines.

    Attributes:
        name: Short name, used in figure titles.
        clean_tokens: int64 ``[batch, pos]``; activations are taken from runs on these.
        corrupted_tokens: int64 ``[batch, pos]``; activations are patched into runs on these.
        metric: Logits ``[batch, pos, d_vocab]`` to a scalar.
        clean_baseline: ``metric`` of the clean run, in the metric's units.
        corrupted_baseline: ``metric`` of the corrupted run, in the same units.
        position_labels: A unique label for each position, such as "John 10".
        position_tokens: The token behind each label, with its spaces, such as " John". Where
            rows hold random tokens, the place in the sequence instead.
        clean_strings: Decoded tokens of every clean prompt, ``batch`` lists of ``pos`` strings.
        corrupted_strings: The same for the corrupted prompts.
        answers: int64 ``[batch, 2]`` (right, wrong), or ``[batch, n]`` right tokens.
        lengths: int64 ``[batch]``, the tokens of each prompt without padding.
        model_name: The model that the baselines belong to.
        direction: "denoising" patches what the answer needs into prompts that lack it;
            "noising" is the reverse, see :meth:`reversed`.
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

    @property
    def agree_until(self) -> int:
        """The first position at which any clean prompt differs from its corrupted one.

        In a causal model every activation before it is the same in both runs.
        """
        differs = (self.clean_tokens != self.corrupted_tokens).any(0)
        return int(differs.int().argmax())

    def normalised(self) -> Task:
        """The same task scored from 0 (corrupted baseline) to 1 (clean baseline).

        Raises:
            ValueError: if the two baselines are equal, or differ by rounding alone.
        """
        metric = self.metric.normalised(self.clean_baseline, self.corrupted_baseline)
        return replace(self, metric=metric, clean_baseline=1.0, corrupted_baseline=0.0)

    def with_metric(self, model: Any, metric: Metric | str) -> Task:
        """The same prompts scored by another metric, with its baselines measured on ``model``.

        ``metric`` is a metric or one of :data:`METRICS`.

        Raises:
            ValueError: if the metric is unknown, does not fit, or is not finite on these prompts.
        """
        if isinstance(metric, str):
            metric = _named_metric(metric, self.answers, self.metric.positions)
        clean, corrupted = _baselines(model, self.clean_tokens, self.corrupted_tokens, metric)
        return replace(
            self,
            metric=metric,
            clean_baseline=clean,
            corrupted_baseline=corrupted,
            model_name=name_of(model),
        )

    def on(self, model: Any) -> Task:
        """The same prompts with the baselines of another model, such as a fine-tuned copy.

        A normalised task is normalised anew, by that model's baselines.

        Raises:
            ValueError: if the model reads the tokens as other text, or cannot take them.
        """
        check_bridge(model)
        for which, tokens, strings in (
            ("clean tokens", self.clean_tokens, self.clean_strings),
            ("corrupted tokens", self.corrupted_tokens, self.corrupted_strings),
        ):
            check_ids(model, tokens, which)
            check_length(model, tokens.shape[1], which)
            theirs = [_strings(model, row) for row in tokens.tolist()]
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
        clean, corrupted, metric = self.corrupted_baseline, self.clean_baseline, self.metric
        if isinstance(metric, Normalised):
            clean, corrupted = self.clean_baseline, self.corrupted_baseline
            metric = metric.metric.normalised(metric.corrupted, metric.clean)
        return replace(
            self,
            clean_tokens=self.corrupted_tokens,
            corrupted_tokens=self.clean_tokens,
            clean_strings=self.corrupted_strings,
            corrupted_strings=self.clean_strings,
            clean_baseline=clean,
            corrupted_baseline=corrupted,
            metric=metric,
            direction="noising" if self.direction == "denoising" else "denoising",
        )

    @property
    def attention_mask(self) -> Tensor:
        """Which tokens are text and not padding: bool ``[batch, pos]``."""
        places = torch.arange(self.clean_tokens.shape[1], device=self.clean_tokens.device)
        return places < self.lengths.to(places.device)[:, None]

    def clean_cache(self, model: Any, names_filter: Any = None) -> Any:
        """Activations of the clean run, as ``run_with_cache`` returns them, without gradients.

        ``names_filter`` limits what is kept: a hook name, a list of them, or a function of one.
        """
        return _cache(model, self.clean_tokens, names_filter)

    def corrupted_cache(self, model: Any, names_filter: Any = None) -> Any:
        """Activations of the corrupted run; see :meth:`clean_cache`."""
        return _cache(model, self.corrupted_tokens, names_filter)

    def __repr__(self) -> str:
        batch, length = self.clean_tokens.shape
        return (
            f"<Task {self.name!r} on {self.model_name}: {batch} prompt(s) of {length} tokens, "
            f"{self.metric.name}: clean {self.clean_baseline:.4f}, "
            f"corrupted {self.corrupted_baseline:.4f}>"
        )


def ioi_task(model: Any, *, metric: str = "logit difference") -> Task:
    """Eight indirect-object prompts, each corrupted by swapping in its pair's other subject.

    "When John and Mary went to the shops, John gave the bag to" should end in " Mary". The
    corrupted prompt names Mary the second time, so its right answer is " John". The task and
    metric are those of Wang et al. (2022), "Interpretability in the Wild".

    Args:
        model: a TransformerBridge with a tokenizer.
        metric: one of :data:`METRICS`.

    Raises:
        ValueError: if the tokenizer splits one of the names, so that the task does not exist
            for this model.
    """
    swapped = [IOI_PROMPTS[i ^ 1] for i in range(len(IOI_PROMPTS))]
    return prompt_task(
        model,
        list(IOI_PROMPTS),
        swapped,
        list(IOI_ANSWERS),
        metric=metric,
        name="indirect object identification",
    )


def induction_task(
    model: Any, corrupted: str = "AB", batch: int = 4, seq_len: int = 20, seed: int = 0
) -> Task:
    """Repeated random tokens, scored by the log-probability of the second copy.

    The clean input is a BOS token and the random sequence A twice. The corrupted one replaces
    one or both copies by other random sequences, B and C: "AB", "BA", "BB" or "BC". The metric
    is the mean log-probability, in nats, of tokens 2 to ``seq_len`` of A where the clean input
    repeats them; the first token of the second copy cannot be foreseen. Not normalised. After
    Olsson et al. (2022), "In-context Learning and Induction Heads".

    A, B and C share no token within a row where the vocabulary is large enough. The same seed
    gives the same A, B and C for every value of ``corrupted``.

    Args:
        model: a TransformerBridge; a tokenizer is not needed.
        corrupted: one of :data:`CORRUPTIONS`.
        batch: number of rows.
        seq_len: length of A; inputs have ``1 + 2 * seq_len`` tokens.
        seed: of the random tokens.

    Raises:
        ValueError: if ``corrupted`` is unknown, or ``batch``, ``seq_len`` or ``seed`` do not fit.
    """
    if corrupted not in CORRUPTIONS:
        raise ValueError(f"corrupted must be one of {', '.join(CORRUPTIONS)}, got {corrupted!r}")
    for name, value, least, why in (
        ("batch", batch, 1, ""),
        ("seed", seed, 0, ""),
        ("seq_len", seq_len, 2, ": the first token of the second copy is not scored"),
    ):
        wrong = not isinstance(value, Integral) or isinstance(value, bool)
        if wrong or not least <= value < 2**63:
            raise ValueError(
                f"{name} must be a whole number of at least {least}, got {value!r}{why}"
            )
    check_bridge(model)
    context = config_number(model, "n_ctx")
    if context is not None and 1 + 2 * seq_len > context:
        raise ValueError(
            f"inputs of 1 + 2 * {seq_len} tokens are too long for this model, which takes at most "
            f"{context}: use a seq_len of at most {(context - 1) // 2}"
        )
    bos, choices = _induction_vocabulary(model)
    if len(choices) < seq_len + 1:
        raise ValueError(
            f"seq_len {seq_len} needs more distinct tokens than this vocabulary offers "
            f"({len(choices)}): use a smaller one"
        )
    copies = _random_sequences(choices, batch, seq_len, seed)
    device = device_of(model)
    first = torch.full((batch, 1), bos)

    def tokens(spelling: str) -> Tensor:
        return torch.cat([first, *(copies[letter] for letter in spelling)], dim=1).to(device)

    answers = copies["A"][:, 1:].to(device)
    positions = torch.arange(seq_len + 1, 2 * seq_len).expand(batch, -1).to(device)
    # Rows hold different tokens, so a label names the place in the sequence, not a token.
    copy = [f"A{i}" for i in range(1, seq_len + 1)]
    clean, other = tokens("AA"), tokens(corrupted)
    return _build(
        model,
        name=f"induction, AA against {corrupted}",
        clean=clean,
        corrupted=other,
        metric=LogProb(answers, positions),
        answers=answers,
        lengths=torch.full((batch,), clean.shape[1]),
        names=["BOS", *copy, *copy],
    )


def prompt_task(
    model: Any,
    clean: str | Sequence[str] | Any,
    corrupted: str | Sequence[str] | Any,
    answers: Any,
    *,
    metric: str = "logit difference",
    name: str = "own prompts",
) -> Task:
    """A task from your own prompts and the answers that tell them apart.

    Prompts of one pair must have the same number of tokens. Pairs may differ in length from each
    other: they are padded on the right, which in a causal model changes nothing before the
    padding, and each is scored at its own last token.

    Args:
        model: a TransformerBridge with a tokenizer.
        clean: a prompt or a list of them, a tokenizer's output, or integer tokens
            ``[batch, pos]``. What is padding, the tokenizer's attention mask says; of tokens
            alone, only a pad token that neither begins nor ends texts is taken as padding.
        corrupted: as many prompts, each with as many tokens as its clean one.
        answers: (right, wrong), or a list of such pairs, one for each prompt or one for all.
            Strings of one token each, with the leading space a word has inside a sentence; token
            ids are taken as they are.
        metric: one of :data:`METRICS`; the last two score the right answer alone.
        name: used in figure titles.

    Raises:
        TypeError: if prompts or answers are of the wrong kind.
        ValueError: if they cannot make a meaningful task; the message shows the tokens and what
            to change.
    """
    check_bridge(model)
    if isinstance(clean, str) != isinstance(corrupted, str):
        raise TypeError(
            "give clean and corrupted prompts in the same form: both str, or both lists"
        )
    clean_rows = _prompt_rows(model, clean, "clean")
    corrupted_rows = _prompt_rows(model, corrupted, "corrupted")
    if len(clean_rows) != len(corrupted_rows):
        raise ValueError(
            f"there are {len(clean_rows)} clean and {len(corrupted_rows)} corrupted prompts: each "
            "clean prompt needs one corrupted prompt"
        )
    for number, (one, other) in enumerate(zip(clean_rows, corrupted_rows, strict=True), 1):
        if len(one) != len(other):
            raise ValueError(
                f"pair {number}: the clean prompt has {len(one)} tokens and the corrupted one "
                f"{len(other)}, so positions do not correspond. Change words until both have as "
                f"many tokens:\n{_aligned(model, one, other)}"
            )
        if one == other:
            raise ValueError(
                f"pair {number}: clean and corrupted prompt are the same "
                f"({_shown(model, one)}), so there is nothing to patch"
            )
    answer_rows = _answer_rows(model, answers, clean_rows, clean)
    lengths = torch.tensor([len(row) for row in clean_rows])
    pad = getattr(getattr(model, "tokenizer", None), "pad_token_id", None)
    clean_tokens, corrupted_tokens = (
        _right_padded(rows, 0 if pad is None else pad).to(device_of(model))
        for rows in (clean_rows, corrupted_rows)
    )
    positions = (lengths - 1)[:, None].to(device_of(model))
    answer_tokens = torch.tensor(answer_rows, device=device_of(model))
    return _build(
        model,
        name=name,
        clean=clean_tokens,
        corrupted=corrupted_tokens,
        metric=_named_metric(metric, answer_tokens, positions),
        answers=answer_tokens,
        lengths=lengths,
        names=None,
    )


def _named_metric(name: str, answers: Tensor, positions: Tensor) -> Metric:
    kinds: dict[str, Callable[[], Metric]] = {
        "logit difference": lambda: LogitDifference(answers, positions),
        "log-probability": lambda: LogProb(_right(answers, positions), positions),
        "probability": lambda: Probability(_right(answers, positions), positions),
    }
    if name not in kinds:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {name!r}")
    if name == "logit difference" and (answers.shape[1] != 2 or positions.shape[1] != 1):
        raise ValueError(
            "the logit difference needs a right and a wrong answer at one position, and this task "
            "has right answers alone: use the log-probability or the probability"
        )
    return kinds[name]()


def _right(answers: Tensor, positions: Tensor) -> Tensor:
    # (right, wrong) pairs at one position each, or already one right token for each position.
    return answers if answers.shape == positions.shape else answers[:, :1]


def _build(
    model: Any,
    *,
    name: str,
    clean: Tensor,
    corrupted: Tensor,
    metric: Metric,
    answers: Tensor,
    lengths: Tensor,
    names: list[str] | None,
) -> Task:
    if torch.equal(clean, corrupted):
        raise ValueError("clean and corrupted tokens are the same, so there is nothing to patch")
    clean_strings = [_strings(model, row) for row in clean.tolist()]
    corrupted_strings = [_strings(model, row) for row in corrupted.tolist()]
    if names is None:
        names = list(clean_strings[int(lengths.argmax())])
    clean_baseline, corrupted_baseline = _baselines(model, clean, corrupted, metric)
    return Task(
        name=name,
        clean_tokens=clean,
        corrupted_tokens=corrupted,
        metric=metric,
        clean_baseline=clean_baseline,
        corrupted_baseline=corrupted_baseline,
        position_labels=[f"{_label(name)} {i}" for i, name in enumerate(names)],
        position_tokens=names,
        clean_strings=clean_strings,
        corrupted_strings=corrupted_strings,
        answers=answers,
        lengths=lengths,
        model_name=name_of(model),
    )


def _baselines(model: Any, clean: Tensor, corrupted: Tensor, metric: Metric) -> tuple[float, float]:
    if getattr(model, "training", False):
        raise ValueError(
            "the model is in training mode, in which dropout makes every run different: call "
            "model.eval() first"
        )
    values, model = [], isolated(model)
    with torch.no_grad():
        for which, tokens in (("clean", clean), ("corrupted", corrupted)):
            value = float(metric(model(tokens, return_type="logits")))
            if not math.isfinite(value):
                raise ValueError(
                    f"the metric '{metric.name}' is {value} on the {which} prompts: look at the "
                    "model's logits, or choose a metric that does not overflow"
                )
            values.append(value)
    return values[0], values[1]


def _cache(model: Any, tokens: Tensor, names_filter: Any) -> Any:
    with torch.no_grad():
        return isolated(model).run_with_cache(tokens, names_filter=names_filter)[1]


def _prompt_rows(model: Any, prompts: Any, which: str) -> list[list[int]]:
    """Token ids of each prompt, BOS included, without padding."""
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, (list, tuple)) and all(isinstance(p, str) for p in prompts):
        rows = [_tokenise(model, p, f"{which} prompt {i}") for i, p in enumerate(prompts, 1)]
    else:
        rows = _rows_of_tokens(model, prompts, which)
    if not rows:
        raise ValueError(f"there is no {which} prompt")
    for number, row in enumerate(rows, 1):
        check_length(model, len(row), f"{which} prompt {number}")
    return rows


def _tokenise(model: Any, text: str, what: str) -> list[int]:
    if getattr(model, "tokenizer", None) is None:
        raise ValueError(
            "this model has no tokenizer, so prompts cannot be text: use induction_task, or give "
            "integer tokens [batch, pos] and answers as token ids"
        )
    if not text.strip():
        raise ValueError(f"{what} is empty")
    # One by one and untruncated: the tokenizer's own padding side and limit must not matter.
    ids = model.to_tokens(text, truncate=False)[0].tolist()
    bos = getattr(model.tokenizer, "bos_token", None)
    if bos and text.startswith(bos) and ids[:2] == [model.tokenizer.bos_token_id] * 2:
        warn_once(f"the prompts begin with {bos!r} already, so no other BOS is put before them")
        return ids[1:]
    return ids


def _rows_of_tokens(model: Any, prompts: Any, which: str) -> list[list[int]]:
    what, mask = f"{which} tokens", None
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        prompts, mask = prompts["input_ids"], prompts.get("attention_mask")
    elif not hasattr(prompts, "__len__"):
        raise TypeError(
            f"{which} prompts must be a str, a list of str, integer tokens [batch, pos] or a "
            f"tokenizer's output, got {type(prompts).__name__}"
        )
    if isinstance(prompts, (list, tuple)) and all(isinstance(row, list) for row in prompts):
        if len(set(map(len, prompts))) > 1:  # Rows of their own lengths: nothing is padded.
            return [_rows_of_tokens(model, [row], which)[0] for row in prompts]
    tokens = whole_numbers(prompts, what)
    if tokens.ndim == 1:
        tokens = tokens[None]
    if tokens.ndim != 2:
        raise ValueError(f"{what} must be [batch, pos], got shape {tuple(tokens.shape)}")
    check_ids(model, tokens, what)
    if mask is not None:
        mask = whole_numbers(mask, "attention_mask") != 0
        if mask.numel() != tokens.numel():
            raise ValueError(f"the attention mask of the {what} has shape {tuple(mask.shape)}")
        mask = mask.view_as(tokens)
        rows = [row[text].tolist() for row, text in zip(tokens, mask, strict=True)]
        if [] in rows:
            raise ValueError(
                f"{which} prompt {rows.index([]) + 1} is empty: its mask is 0 throughout"
            )
        return rows
    _, sure, _ = pads(model, tokens, "left")
    pad, after, may = pads(model, tokens, "right")
    if sure[:, 0].any():
        number = int(sure[:, 0].nonzero()[0])
        raise ValueError(
            f"{which} prompt {number + 1} is padded on the left ({int(sure[number].sum())} pad "
            "tokens): patching runs take no attention mask, so the pads would be read as text and "
            "shift the positions. Pad on the right, or give the prompts as text"
        )
    if (after & may.any()).any():
        raise ValueError(
            f"{which} tokens end in several of token {pad}, which ends texts and pads them: give "
            "text, or the tokenizer's whole output with its attention mask"
        )
    if may.any():
        warn_once(
            f"some {which} prompts end in token {pad}, which ends texts and pads them. It is read "
            "as text: if it is padding, give the tokenizer's whole output with its attention mask"
        )
    return [row[~padding].tolist() for row, padding in zip(tokens, after, strict=True)]


def _answer_rows(
    model: Any, answers: Any, prompt_rows: list[list[int]], prompts: Any
) -> list[list[int]]:
    if hasattr(answers, "tolist"):
        answers = answers.tolist()
    if not isinstance(answers, (list, tuple)) or not answers:
        raise TypeError(
            "answers must be (right, wrong) or a list of such pairs, got "
            f"{type(answers).__name__} {answers!r}"
        )
    pairs = [p.tolist() if hasattr(p, "tolist") else p for p in answers]
    count = len(prompt_rows)
    if not any(isinstance(p, (list, tuple)) for p in pairs):
        if len(pairs) == count == 2:
            raise ValueError(
                f"answers {answers!r} for 2 prompts may be one (right, wrong) pair for both, or "
                f"one right answer each: for the first write [({pairs[0]!r}, {pairs[1]!r})], for "
                f"the second [({pairs[0]!r}, wrong), ({pairs[1]!r}, wrong)]"
            )
        pairs = [tuple(pairs)] if len(pairs) == 2 else [(p,) for p in pairs]
    if len(pairs) == 1:
        pairs = pairs * count
    if len(pairs) != count:
        raise ValueError(
            f"there are {len(pairs)} pairs of answers for {count} prompts: give one pair for each "
            "prompt, or one pair for all"
        )
    texts = [prompts] if isinstance(prompts, str) else prompts
    rows = []
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"answers of prompt {number} must be (right, wrong), got {pair!r}")
        text = texts[number - 1] if isinstance(texts, (list, tuple)) else None
        text = text if isinstance(text, str) else None
        row = [
            _answer_token(model, answer, text, f"the {which} answer of prompt {number}")
            for which, answer in zip(("right", "wrong"), pair, strict=True)
        ]
        if row[0] == row[1]:
            raise ValueError(
                f"right and wrong answer of prompt {number} are the same token "
                f"({pair[0]!r}, id {row[0]}): the metric could not tell them apart"
            )
        rows.append(row)
    return rows


def _answer_token(model: Any, answer: Any, prompt: str | None, what: str) -> int:
    if isinstance(answer, Integral) and not isinstance(answer, bool):
        check_ids(model, torch.tensor([int(answer)]), what)
        return int(answer)
    if not isinstance(answer, str):
        raise TypeError(f"{what} must be a string or a token id, got {type(answer).__name__}")
    if getattr(model, "tokenizer", None) is None:
        raise ValueError(f"this model has no tokenizer: give {what} as a token id")
    ids = _answer_ids(model, answer)
    spaced = _answer_ids(model, " " + answer)
    open_ended = prompt is None or not prompt[-1].isspace()
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    lacks_space = answer[:1].isalnum() and open_ended
    if lacks_space and len(spaced) == 1 and spaced not in (ids, [unknown]):
        raise ValueError(
            f"{what} is {answer!r}, {_shown(model, ids)}, without a leading space. Inside a "
            f"sentence the model predicts {' ' + answer!r}, {_shown(model, spaced)}: write it "
            f"so, or give the token id {ids[0] if len(ids) == 1 else 'you mean'}"
        )
    if not ids:
        raise ValueError(f"{what} is {answer!r}, which has no token")
    if len(ids) > 1:
        raise ValueError(
            f"{what}, {answer!r}, is {len(ids)} tokens: {_shown(model, ids)}. The metric reads one "
            "next token: choose a word that is a single token in this model, or give the id of "
            f"its first piece, {ids[0]}"
        )
    if ids[0] == unknown and answer != getattr(model.tokenizer, "unk_token", None):
        # Some models use one token as unknown, BOS and pad: a real answer is none of them.
        raise ValueError(f"{what}, {answer!r}, is not in the tokenizer's vocabulary")
    if prompt is not None and prompt[-1].isspace() and answer[:1].isspace():
        raise ValueError(
            f"the prompt {prompt!r} ends in a space and {what}, {answer!r}, begins with one: "
            "end the prompt without the space"
        )
    return ids[0]


def _answer_ids(model: Any, text: str) -> list[int]:
    if not text:
        return []
    return model.to_tokens(text, prepend_bos=False, truncate=False)[0].tolist()


def _induction_vocabulary(model: Any) -> tuple[int, Tensor]:
    """The BOS token and the tokens that random sequences are drawn from."""
    size = config_number(model, "d_vocab")
    if size is None:
        raise ValueError("the model's config does not give a vocabulary size (cfg.d_vocab)")
    tokenizer = getattr(model, "tokenizer", None)
    bos = getattr(tokenizer, "bos_token_id", None)
    special = set(getattr(tokenizer, "all_special_ids", None) or ())
    bos = 0 if bos is None else bos
    # Large vocabularies start with bytes and end with rarities; small ones are used whole.
    low, high = (100, min(size, 10_000)) if size > 1_000 else (0, size)
    allowed = [token for token in range(low, high) if token != bos and token not in special]
    return bos, torch.tensor(allowed)


def _random_sequences(choices: Tensor, batch: int, seq_len: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(batch):
        if len(choices) >= 3 * seq_len:
            picks = torch.randperm(len(choices), generator=generator)[: 3 * seq_len]
        else:
            picks = torch.cat(
                [torch.randperm(len(choices), generator=generator)[:seq_len] for _ in "ABC"]
            )
        rows.append(choices[picks])
    return dict(zip("ABC", torch.stack(rows).split(seq_len, dim=1), strict=True))


def _right_padded(rows: list[list[int]], pad: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [pad] * (length - len(row)) for row in rows])


def _strings(model: Any, ids: Sequence[int]) -> list[str]:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return [f"#{i}" for i in ids]
    return [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids]


def _label(token: str) -> str:
    return token.strip() or repr(token)[1:-1].replace(" ", "␣")


def _shown(model: Any, ids: Sequence[int]) -> str:
    return " | ".join(repr(token) for token in _strings(model, ids)) or "no token"


def _aligned(model: Any, one: Sequence[int], other: Sequence[int]) -> str:
    """Two tokenisations below each other, in columns."""
    cells = [[repr(token) for token in _strings(model, row)] for row in (one, other)]
    columns = max(map(len, cells))
    cells = [row + [""] * (columns - len(row)) for row in cells]
    widths = [max(len(a), len(b)) for a, b in zip(*cells, strict=True)]
    lines = []
    for title, row in zip(("clean", "corrupted"), cells, strict=True):
        body = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(f"  {title:<9}  {body.rstrip()}")
    return "\n".join(lines)
