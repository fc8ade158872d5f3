"""Tasks that come with the package: indirect objects, capitals and induction."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
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

# (template, the two names, which of them is the subject). Two after each other differ in who is
# repeated alone, so that swapping within such a pair corrupts only that.
_IOI = [
    (template, names, subject)
    for template, names, subjects in (
        ("When{0} and{1} went to the shops,{s} gave the bag to", (" John", " Mary"), (0, 1)),
        ("When{0} and{1} went to the park,{s} gave the ball to", (" Tom", " James"), (1, 0)),
        ("When{0} and{1} went to the shops,{s} gave an apple to", (" Dan", " Sid"), (1, 0)),
        ("After{0} and{1} went to the park,{s} gave a drink to", (" Martin", " Amy"), (1, 0)),
    )
    for subject in subjects
]

#: Eight indirect-object prompts, in pairs that differ in one name.
IOI_PROMPTS = tuple(template.format(*names, s=names[at]) for template, names, at in _IOI)

#: The indirect object and the subject of each of :data:`IOI_PROMPTS`, so the right and wrong name.
IOI_ANSWERS = tuple((names[1 - subject], names[subject]) for _, names, subject in _IOI)


# What other prompts are drawn from. Things begin with a consonant, as "a" stands before them.
_IOI_TEMPLATES = (
    "When{0} and{1} went to the{place},{s} gave a{thing} to",
    "After{0} and{1} had lunch at the{place},{s} gave a{thing} to",
    "While{0} and{1} were on the way home from the{place},{s} gave a{thing} to",
    "Last week{0} and{1} met in front of the{place}. Before it was dark,{s} gave a{thing} to",
)
_NAMES = (
    "Adam Alan Alex Alice Amy Andrew Anna Anthony Ben Bob Brian Carl Charles Chris Dan Daniel "
    "David Emily Emma Eric George Greg Henry Jack James Jane Jason Jeff Jennifer Jessica Jim Joe "
    "John Jonathan Joseph Josh Julia Justin Kate Keith Kelly Kevin Laura Linda Lisa Louis Maria "
    "Martin Mary Matthew Michael Mike Nick Patrick Paul Peter Philip Rachel Richard Robert Ryan "
    "Sam Sarah Scott Simon Stephen Steve Susan Thomas Tim Tom Tony Walter William"
)
_PLACES = (
    "airport bank beach church cinema garden hospital hotel house library market museum office "
    "park restaurant school shop station store theatre zoo"
)
_THINGS = (
    "bag ball basket bell book bottle box camera card cup drink flower gift hat jacket key knife "
    "lamp letter map necklace pen phone picture plate ring rose ticket toy watch"
)

# Neither name of a pair holds the other, as in Mexico City.
_CAPITALS = tuple(
    tuple(f" {name}" for name in pair.split(": "))
    for pair in (
        "Argentina: Buenos Aires, Australia: Canberra, Austria: Vienna, Bangladesh: Dhaka, "
        "Belgium: Brussels, Bulgaria: Sofia, Canada: Ottawa, Chile: Santiago, China: Beijing, "
        "Croatia: Zagreb, Cuba: Havana, Denmark: Copenhagen, Ecuador: Quito, Egypt: Cairo, "
        "Ethiopia: Addis Ababa, Finland: Helsinki, France: Paris, Germany: Berlin, Ghana: Accra, "
        "Greece: Athens, Hungary: Budapest, India: New Delhi, Iran: Tehran, Iraq: Baghdad, "
        "Ireland: Dublin, Italy: Rome, Japan: Tokyo, Kenya: Nairobi, Malaysia: Kuala Lumpur, "
        "Mongolia: Ulaanbaatar, Morocco: Rabat, Nepal: Kathmandu, New Zealand: Wellington, "
        "Nigeria: Abuja, Norway: Oslo, Pakistan: Islamabad, Peru: Lima, Poland: Warsaw, "
        "Portugal: Lisbon, Romania: Bucharest, Russia: Moscow, Saudi Arabia: Riyadh, "
        "Senegal: Dakar, Serbia: Belgrade, South Korea: Seoul, Spain: Madrid, Sweden: Stockholm, "
        "Thailand: Bangkok, Turkey: Ankara, Uruguay: Montevideo, Venezuela: Caracas, "
        "Vietnam: Hanoi"
    ).split(", ")
)
_CAPITAL_TEMPLATES = (
    "The capital of{country} is",
    "Question: what is the capital of{country}? Answer:",
    "On every map, the capital city of{country} is called",
)


def ioi_task(model: Any, *, n: int = 8, seed: int = 0, metric: str = "logit difference") -> Task:
    """Indirect-object prompts, each corrupted by making the other person its subject.

    "When John and Mary went to the shops, John gave the bag to" should end in " Mary". The
    corrupted prompt names Mary the second time, so its right answer is " John". The task and
    metric are those of Wang et al. (2022), "Interpretability in the Wild".

    Its roles are IO and S1, where the right and the wrong name first stand, S2, where the wrong
    one stands again, and END. They are the same places in the corrupted prompts.

    Eight prompts, the default, are always :data:`IOI_PROMPTS`, in pairs that corrupt each other.
    Any other number is drawn: names, places and things that are single tokens for this tokenizer,
    in templates of several lengths. IO stands first in every other prompt (ABBA) and second in
    the rest (BABA). No prompt occurs twice.

    Args:
        model: a TransformerBridge with a tokenizer.
        n: number of prompts.
        seed: of the draw, for which eight prompts have no need.
        metric: one of :data:`METRICS`.

    Raises:
        ValueError: if ``n`` or ``seed`` is no whole number, or too few words are single tokens
            for ``n`` prompts; if the tokenizer splits one of the names of the eight prompts, so
            that this task does not exist for the model.
    """
    check_bridge(model)
    _check_whole("n", n, 1)
    _check_whole("seed", seed, 0)
    drawn = [(*fixed, {}) for fixed in _IOI] if n == len(_IOI) else _drawn_ioi(model, n, seed)
    clean, corrupted, answers = [], [], []
    roles: dict[str, tuple[list[str], list[str]]] = {"IO": ([], []), "S1": ([], []), "S2": ([], [])}
    for template, names, subject, words in drawn:
        right, wrong = names[1 - subject], names[subject]
        places = {"IO": f"{{{1 - subject}}}", "S1": f"{{{subject}}}", "S2": "{s}"}
        for which, (prompts, second) in enumerate(((clean, wrong), (corrupted, right))):
            filled = {**words, "s": second}
            prompts.append(template.format(*names, **filled))
            for role, place in places.items():
                # All of the text up to the name: nothing shorter is sure to occur only once.
                roles[role][which].append(_up_to(place, template).format(*names, **filled))
        answers.append((right, wrong))
    return prompt_task(
        model,
        clean,
        corrupted,
        answers,
        metric=metric,
        name="indirect object identification",
        roles=roles,
    )


def capital_task(
    model: Any, *, n: int | None = None, seed: int = 0, metric: str = "logit difference"
) -> Task:
    """Countries and their capitals, each prompt corrupted by naming another country.

    "The capital of France is" should end in " Paris", and of the corrupted prompt, "The capital of
    New Zealand is", in " Wellington". The right answer is the capital of the clean prompt's
    country, the wrong one that of the other. Countries and capitals have any number of tokens, so
    prompts have many lengths: sweep it by role. The roles are subject, the last token of the
    country, and END.

    Args:
        model: a TransformerBridge with a tokenizer.
        n: number of prompts; one for each country where None. More countries than there are
            come again in another template.
        seed: of the order of countries, and of which other country each is paired with.
        metric: one of :data:`METRICS`.

    Raises:
        ValueError: if ``n`` or ``seed`` is no whole number, or there are not so many prompts.
    """
    check_bridge(model)
    most = len(_CAPITALS) * len(_CAPITAL_TEMPLATES)
    n = len(_CAPITALS) if n is None else n
    _check_whole("n", n, 1)
    _check_whole("seed", seed, 0)
    if n > most:
        raise ValueError(
            f"n must be at most {most}, {len(_CAPITALS)} countries in {len(_CAPITAL_TEMPLATES)} "
            f"templates, got {n}"
        )
    rng = random.Random(seed)
    order = rng.sample(_CAPITALS, len(_CAPITALS))
    prompts, subjects = ([], []), ([], [])
    answers = []
    for number in range(n):
        turn, place = divmod(number, len(order))
        template = _CAPITAL_TEMPLATES[(turn + place) % len(_CAPITAL_TEMPLATES)]
        pair = order[place], rng.choice(order[:place] + order[place + 1 :])
        for which, (country, _) in enumerate(pair):
            prompts[which].append(template.format(country=country))
            subjects[which].append(_up_to("{country}", template).format(country=country))
        answers.append((pair[0][1], pair[1][1]))
    return prompt_task(
        model,
        *prompts,
        answers,
        metric=metric,
        name="capitals of countries",
        roles={"subject": subjects},
    )


def _drawn_ioi(
    model: Any, n: int, seed: int
) -> list[tuple[str, tuple[str, str], int, dict[str, str]]]:
    """For each prompt its template, the two names, which of them is the subject, and the rest."""
    names, places, things = (
        _single_tokens(model, words.split()) for words in (_NAMES, _PLACES, _THINGS)
    )
    kinds = [(template, subject) for template in _IOI_TEMPLATES for subject in (1, 0)]
    most = len(kinds) * len(names) * max(0, len(names) - 1) * len(places) * len(things)
    if n > most:
        raise ValueError(
            f"{n} prompts cannot be drawn: {len(names)} names, {len(places)} places and "
            f"{len(things)} things are single tokens for this tokenizer, which make {most}. Ask "
            "for fewer, or make your own with prompt_task, whose answers may have several tokens"
        )
    rng, drawn = random.Random(seed), {}
    while len(drawn) < n:
        template, subject = kinds[len(drawn) % len(kinds)]
        one, other = rng.sample(names, 2)
        words = (("place", rng.choice(places)), ("thing", rng.choice(things)))
        drawn[template, (one, other), subject, words] = None
    return [(*prompt, dict(words)) for *prompt, words in drawn]


def _single_tokens(model: Any, words: Sequence[str]) -> list[str]:
    """Those of the words that are single tokens inside a sentence, with their leading space."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(
            "this model has no tokenizer, so no words can be drawn: use induction_task"
        )
    unknown = getattr(tokenizer, "unk_token_id", None)
    spaced = [f" {word}" for word in words]
    tokens = [
        model.to_tokens(w, prepend_bos=False, truncate=False, move_to_device=False)[0].tolist()
        for w in spaced
    ]
    return [
        word for word, ids in zip(spaced, tokens, strict=True) if len(ids) == 1 and ids != [unknown]
    ]


def _up_to(slot: str, template: str) -> str:
    return template[: template.index(slot) + len(slot)]


def _check_whole(name: str, value: Any, least: int, why: str = "") -> None:
    wrong = not isinstance(value, Integral) or isinstance(value, bool)
    if wrong or not least <= value < 2**63:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}{why}")


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
    _check_whole("batch", batch, 1)
    _check_whole("seed", seed, 0)
    _check_whole("seq_len", seq_len, 2, ": the first token of the second copy is not scored")
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
    first = torch.full((batch, 1), bos, device="cpu")

    def tokens(spelling: str) -> Tensor:
        return torch.cat([first, *(copies[letter] for letter in spelling)], dim=1).to(device)

    answers = copies["A"][:, 1:].to(device)
    positions = torch.arange(seq_len + 1, 2 * seq_len, device="cpu").expand(batch, -1).to(device)
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
        lengths=torch.full((batch,), clean.shape[1], device="cpu"),
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
    return bos, torch.tensor(allowed, device="cpu")


def _random_sequences(choices: Tensor, batch: int, seq_len: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = partial(torch.randperm, len(choices), generator=generator, device="cpu")
    rows = []
    for _ in range(batch):
        if len(choices) >= 3 * seq_len:
            picks = drawn()[: 3 * seq_len]
        else:
            picks = torch.cat([drawn()[:seq_len] for _ in "ABC"])
        rows.append(choices[picks])
    return dict(zip("ABC", torch.stack(rows).split(seq_len, dim=1), strict=True))
