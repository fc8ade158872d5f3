"""Tasks that come with the package: indirect objects and induction."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from patching_demo.engine.checks import check_bridge
from patching_demo.engine.tokens import config_number, device_of
from patching_demo.metrics import LogProb
from patching_demo.tasks.prompts import prompt_task
from patching_demo.tasks.task import Task, build

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
    return build(
        model,
        name=f"induction, AA against {corrupted}",
        clean=clean,
        corrupted=other,
        metric=LogProb(answers, positions),
        answers=answers,
        lengths=torch.full((batch,), clean.shape[1]),
        names=["BOS", *copy, *copy],
    )


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
