"""A task from one's own prompts, checked for what otherwise makes a plausible, wrong figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from numbers import Integral
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from patching_demo.engine.checks import check_bridge, warn_once
from patching_demo.engine.tokens import (
    check_ids,
    check_length,
    config_number,
    device_of,
    pads,
    whole_numbers,
)
from patching_demo.metrics import Answer, AnswerOdds, Metric
from patching_demo.tasks.task import (
    Task,
    build,
    checked_metric_name,
    named_metric,
    strings_of,
)

#: The role that every prompt has: its last token, where the answer is predicted.
END = "END"


def prompt_task(
    model: Any,
    clean: str | Sequence[str] | Any,
    corrupted: str | Sequence[str] | Any,
    answers: Any,
    *,
    metric: str = "logit difference",
    name: str = "own prompts",
    roles: Mapping[str, Any] | None = None,
    chat: bool = False,
) -> Task:
    """A task from your own prompts and the answers that tell them apart.

    Prompts may have any lengths: they are padded on the right, which in a causal model changes
    nothing before the padding, and each is scored at its own last token. Where the prompts of a
    pair have different lengths, positions do not correspond, and sweeps go by role.

    Args:
        model: a TransformerBridge with a tokenizer.
        clean: a prompt or a list of them, a tokenizer's output, or integer tokens
            ``[batch, pos]``. What is padding, the tokenizer's attention mask says; of tokens
            alone, only a pad token that neither begins nor ends texts is taken as padding.
        corrupted: as many prompts.
        answers: (right, wrong), or a list of such pairs, one for each prompt or one for all. An
            answer is a string, with the leading space a word has inside a sentence, or a token id;
            a list in its place holds several answers, of which any is right. Where one has several
            tokens, or there are several, the metric is made of their log-probabilities, see
            :class:`patching_demo.metrics.AnswerOdds`.
        metric: one of :data:`METRICS`; the last two score right answers alone.
        name: used in figure titles.
        roles: by name, what in a prompt a sweep by role patches: a substring, of which the last
            token counts, or a position. One for all prompts, a list with one for each, or a tuple
            of two such for clean and corrupted prompts. "END", the last token, is always there.
        chat: put each prompt into the tokenizer's chat template, as a user's message to answer.

    Raises:
        TypeError: if prompts or answers are of the wrong kind.
        ValueError: if they cannot make a meaningful task; the message shows the tokens and what
            to change.
    """
    check_bridge(model)
    checked_metric_name(metric)
    clean, corrupted = map(_listed, (clean, corrupted))
    if isinstance(clean, str) != isinstance(corrupted, str):
        raise TypeError(
            "give clean and corrupted prompts in the same form: both str, or both lists"
        )
    if chat:
        clean, corrupted = (_in_chat(model, own) for own in (clean, corrupted))
    sides = {
        which: _prompt_rows(model, given, which, quiet=chat)
        for which, given in (("clean", clean), ("corrupted", corrupted))
    }
    count = len(sides["clean"])
    if count != len(sides["corrupted"]):
        raise ValueError(
            f"there are {count} clean and {len(sides['corrupted'])} corrupted prompts: each "
            "clean prompt needs one corrupted prompt"
        )
    for number, (one, other) in enumerate(zip(*sides.values(), strict=True), 1):
        if one == other:
            raise ValueError(
                f"pair {number}: clean and corrupted prompt are the same "
                f"({_shown(model, one)}), so there is nothing to patch"
            )
    pairs = _answer_pairs(model, answers, count, clean)
    places = {which: _role_places(model, roles or {}, rows, which) for which, rows in sides.items()}
    return _from_rows(model, sides, places, pairs, metric, name=name)


def noise_task(
    model: Any,
    prompts: str | Sequence[str] | Any,
    answers: Any,
    roles: Mapping[str, Any],
    *,
    scale: float = 3.0,
    seed: int = 0,
    metric: str = "logit difference",
    name: str = "noise",
) -> Task:
    """A task whose corrupted run is the clean one with noise on the embeddings of some tokens.

    Meng et al. (2022) corrupt the subject of a sentence so, instead of swapping it for another.
    What a sweep finds depends on the choice (Zhang & Nanda, 2024).

    Args:
        model: a TransformerBridge with a tokenizer.
        prompts, answers, metric, name: as for :func:`prompt_task`.
        roles: by name, the part of each prompt that gets noise: a substring, all tokens of which
            get it, or a position. A sweep by role patches the last of them.
        scale: of the Gaussian noise, in standard deviations of the model's token embeddings.
        seed: of the noise, which is drawn anew for every token.

    Raises:
        TypeError: if prompts or answers are of the wrong kind.
        ValueError: as :func:`prompt_task`, and if there is no role, or ``scale`` is not above 0.
        RuntimeError: if the model's embedding cannot be extended.
    """
    check_bridge(model)
    if not roles:
        raise ValueError("name a role that gets the noise, such as roles={'subject': 'France'}")
    if not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale!r}")
    prompts = _listed(prompts)
    rows = _prompt_rows(model, prompts, "clean")
    pairs = _answer_pairs(model, answers, len(rows), prompts)
    noisy: list[set[int]] = [set() for _ in rows]
    for role, given in roles.items():
        for found, what in zip(noisy, _of_prompts(given, rows, role, "clean"), strict=True):
            found |= set(_tokens_of(model, *what))
    table = model.embed.original_component.weight.detach()
    size, generator = config_number(model, "d_vocab") or len(table), torch.Generator("cpu")
    generator.manual_seed(seed)
    corrupted, vectors = [list(row) for row in rows], []
    for row, changed, own in zip(rows, corrupted, noisy, strict=True):
        for place in sorted(own):
            noise = torch.randn(table.shape[1], generator=generator, device="cpu").to(table)
            changed[place] = size + len(vectors)
            vectors.append(table[row[place]] + scale * table.std() * noise)
    sides = {"clean": rows, "corrupted": corrupted}
    places = dict.fromkeys(sides, _role_places(model, roles, rows, "clean"))
    more = torch.stack(vectors)
    metric = checked_metric_name(metric)
    return _from_rows(model, sides, places, pairs, metric, name=name, extra_embeddings=more)


def _listed(prompts: Any) -> Any:
    """A column of a table or an array as a list, if it holds text."""
    own = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    return own if isinstance(own, list) and all(isinstance(p, str) for p in own) else prompts


def _from_rows(
    model: Any,
    sides: Mapping[str, Sequence[Sequence[int]]],
    places: Mapping[str, Mapping[str, Sequence[int]]],
    pairs: Sequence[Any],
    metric: str,
    **parts: Any,
) -> Task:
    """A task of token ids and role's places of clean and corrupted prompts, and their answers."""
    suffixes, scored = _scoring(pairs, metric)
    each, device = len(suffixes[0]), device_of(model)
    tokens, lengths, pad = {}, {}, getattr(getattr(model, "tokenizer", None), "pad_token_id", None)
    for which, rows in sides.items():
        whole = [[*row, *suffix] for row, own in zip(rows, suffixes, strict=True) for suffix in own]
        for row in whole:
            check_length(model, len(row), f"a {which} prompt with its answer")
        lengths[which] = torch.tensor([len(row) for row in whole], device="cpu")
        padded = [torch.tensor(row, device="cpu") for row in whole]
        padded = pad_sequence(padded, batch_first=True, padding_value=0 if pad is None else pad)
        tokens[which] = padded.to(device)
    ends = [len(row) for row in sides["corrupted"] for _ in range(each)]
    ends = torch.tensor(ends, device="cpu")
    firsts = [[side[0][0] for side in pair] for pair in pairs for _ in range(each)]
    answers = torch.tensor(firsts, device=device)
    return build(
        model,
        clean=tokens["clean"],
        corrupted=tokens["corrupted"],
        metric=scored(answers, ends, lengths["corrupted"], device),
        answers=answers,
        lengths=lengths["clean"],
        corrupted_lengths=lengths["corrupted"],
        roles={
            role: tuple(
                torch.tensor(places[which][role], device="cpu").repeat_interleave(each)
                for which in sides
            )
            for role in places["clean"]
        },
        rows_per_prompt=each,
        **parts,
    )


def _scoring(pairs: Sequence[Any], metric: str) -> tuple[list[list[list[int]]], Any]:
    """What follows each prompt in each of its rows, and what makes the metric.

    ``pairs`` holds for each prompt its right and its wrong answers, each a list of token ids. A
    prompt needs a row for each answer of several tokens that is not the beginning of another.
    """
    if all(len(side) == len(side[0]) == 1 for pair in pairs for side in pair):
        return [[[]] for _ in pairs], lambda answers, ends, lengths, device: named_metric(
            metric, answers, (ends - 1)[:, None].to(device)
        )
    rows = []
    for pair in pairs:
        heads = sorted({tuple(answer[:-1]) for side in pair for answer in side}, key=len)
        kept = [
            head
            for i, head in enumerate(heads)
            if not any(longer[: len(head)] == head for longer in heads[i + 1 :])
        ]
        rows.append([list(head) for head in kept])
    most = max(map(len, rows))
    # Every prompt takes as many rows, so that the mean over rows is the mean over prompts.
    rows = [own + own[:1] * (most - len(own)) for own in rows]

    def read(prompt: int, answer: Sequence[int]) -> Answer:
        begins = [list(answer[:-1]) == row[: len(answer) - 1] for row in rows[prompt]]
        return begins.index(True), list(enumerate(answer))

    right, wrong = (
        [[read(i, answer) for answer in pair[side]] for i, pair in enumerate(pairs)]
        for side in (0, 1)
    )
    longest = max(len(answer) for pair in pairs for side in pair for answer in side)

    def made(answers: Any, ends: Any, lengths: Any, device: Any) -> Metric:
        places = (ends - 1)[:, None] + torch.arange(longest, device="cpu")
        places = torch.minimum(places, (lengths - 1)[:, None])
        return AnswerOdds(right, wrong, places.to(device), metric)

    return rows, made


def _role_places(
    model: Any, roles: Mapping[str, Any], rows: Sequence[Sequence[int]], which: str
) -> dict[str, list[int]]:
    """By role, its position in each clean or corrupted prompt."""
    places = {
        name: [_tokens_of(model, *own)[-1] for own in _of_prompts(given, rows, name, which)]
        for name, given in roles.items()
    }
    return {**places, END: [len(row) - 1 for row in rows]}


def _of_prompts(
    given: Any, rows: Sequence[Sequence[int]], name: str, which: str
) -> list[tuple[Sequence[int], Any, str]]:
    """What of each prompt a role names: its tokens, the substring or position, and where."""
    if name == END:
        raise ValueError(f"the role {END!r} is always the last token: choose another name")
    if isinstance(given, tuple):
        if len(given) != 2:
            raise ValueError(
                f"role {name!r}: a tuple is (for clean prompts, for corrupted ones), got "
                f"{given!r}; give one substring for each prompt as a list"
            )
        given = given[which == "corrupted"]
    given = given.tolist() if hasattr(given, "tolist") else given
    own = given if isinstance(given, (list, tuple)) else [given] * len(rows)
    if len(own) != len(rows):
        raise ValueError(f"role {name!r} names {len(own)} places in {len(rows)} {which} prompts")
    return [
        (row, what, f"role {name!r}, {which} prompt {number}")
        for number, (row, what) in enumerate(zip(rows, own, strict=True), 1)
    ]


def _tokens_of(model: Any, row: Sequence[int], what: Any, where: str) -> range:
    """The positions of a substring in a prompt, or one that is given."""
    if isinstance(what, Integral) and not isinstance(what, bool):
        if not -len(row) <= what < len(row):
            raise ValueError(f"{where}: there is no position {what} in {_shown(model, row)}")
        return range(int(what) % len(row), int(what) % len(row) + 1)
    if not isinstance(what, str) or not what.strip():
        raise TypeError(f"{where} must be a substring or a position, got {what!r}")
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(f"{where}: this model has no tokenizer, so give the position of {what!r}")
    texts = _read_so_far(tokenizer, tuple(row))
    whole, ends = texts[-1], list(map(len, texts))
    count = sum(whole.startswith(what, i) for i in range(len(whole)))
    if count != 1:
        times = "does not occur" if not count else f"occurs {count} times"
        raise ValueError(
            f"{where}: {what!r} {times} in {_shown(model, row)}. Name a longer part of the "
            "text that ends with the token you mean, or give its position"
        )
    begin = whole.index(what)
    if what[-1].isspace() and begin + len(what) not in ends:
        raise ValueError(
            f"{where}: {what!r} ends in a space, which belongs to the next token of "
            f"{_shown(model, row)}: write {what.rstrip()!r}"
        )
    first = next(i for i, end in enumerate(ends) if end > begin)
    last = next(i for i, end in enumerate(ends) if end >= begin + len(what))
    return range(first, last + 1)


@lru_cache(maxsize=512)
def _read_so_far(tokenizer: Any, row: tuple[int, ...]) -> list[str]:
    """The text of a prompt up to each token; several roles of it ask for that."""
    return [
        tokenizer.decode(
            row[: i + 1], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        for i in range(len(row))
    ]


def _in_chat(model: Any, prompts: Any) -> Any:
    """Prompts as users' messages in the tokenizer's chat template."""
    tokenizer = getattr(model, "tokenizer", None)
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("this model's tokenizer has no chat template: leave out chat=True")
    if isinstance(prompts, str):
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": prompts}], tokenize=False, add_generation_prompt=True
        )
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(p, str) for p in prompts):
        raise TypeError("chat=True needs prompts as text")
    return [_in_chat(model, prompt) for prompt in prompts]


def _prompt_rows(model: Any, prompts: Any, which: str, quiet: bool = False) -> list[list[int]]:
    """Token ids of each prompt, BOS included, without padding."""
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, (list, tuple)) and all(isinstance(p, str) for p in prompts):
        rows = [_tokenise(model, p, f"{which} prompt {i}", quiet) for i, p in enumerate(prompts, 1)]
    else:
        rows = _rows_of_tokens(model, prompts, which)
    if not rows:
        raise ValueError(f"there is no {which} prompt")
    for number, row in enumerate(rows, 1):
        check_length(model, len(row), f"{which} prompt {number}")
    return rows


def _tokenise(model: Any, text: str, what: str, quiet: bool) -> list[int]:
    if getattr(model, "tokenizer", None) is None:
        raise ValueError(
            "this model has no tokenizer, so prompts cannot be text: use induction_task, or give "
            "integer tokens [batch, pos] and answers as token ids"
        )
    if not text.strip():
        raise ValueError(f"{what} is empty")
    # One by one and untruncated: the tokenizer's own padding side and limit must not matter.
    ids = model.to_tokens(text, truncate=False, move_to_device=False)[0].tolist()
    bos = getattr(model.tokenizer, "bos_token", None)
    if bos and text.startswith(bos) and ids[:2] == [model.tokenizer.bos_token_id] * 2:
        if not quiet:
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


def _answer_pairs(model: Any, answers: Any, count: int, prompts: Any) -> list[Any]:
    """For each prompt its right and its wrong answers, each as token ids."""
    if hasattr(answers, "tolist"):
        answers = answers.tolist()
    if not isinstance(answers, (list, tuple)) or not answers:
        raise TypeError(
            "answers must be (right, wrong) or a list of such pairs, got "
            f"{type(answers).__name__} {answers!r}"
        )
    pairs = [p.tolist() if hasattr(p, "tolist") else p for p in answers]
    listed = [isinstance(p, (list, tuple)) for p in pairs]
    if not any(listed) and len(pairs) == count == 2:
        raise ValueError(
            f"answers {answers!r} for 2 prompts may be one (right, wrong) pair for both, or "
            f"one right answer each: for the first write [({pairs[0]!r}, {pairs[1]!r})], for "
            f"the second [({pairs[0]!r}, wrong), ({pairs[1]!r}, wrong)]"
        )
    if isinstance(answers, tuple) and len(answers) == 2 and all(isinstance(p, list) for p in pairs):
        if count == 2:
            raise ValueError(
                f"answers {answers!r} for 2 prompts may be several right and several wrong ones "
                f"for both, or one pair each: for the first write [({pairs[0]!r}, {pairs[1]!r})], "
                f"for the second [{tuple(pairs[0])!r}, {tuple(pairs[1])!r}]"
            )
        pairs = [answers]
    elif not all(listed):
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
        row = []
        for which, side in zip(("right", "wrong"), pair, strict=True):
            several = side if isinstance(side, (list, tuple)) else [side]
            if not several:
                raise ValueError(f"there is no {which} answer of prompt {number}")
            what = f"the {which} answer of prompt {number}"
            row.append(_apart([_answer_ids(model, answer, text, what) for answer in several]))
        for answer in row[0]:
            if answer in row[1]:
                raise ValueError(
                    f"right and wrong answer of prompt {number} are the same "
                    f"{'token' if len(answer) == 1 else 'tokens'} ({_shown(model, answer)}, id "
                    f"{', '.join(map(str, answer))}): the metric could not tell them apart"
                )
        rows.append(row)
    return rows


def _apart(answers: list[list[int]]) -> list[list[int]]:
    """Answers without those that another one is, or begins: they are counted with that one."""
    return [
        answer
        for i, answer in enumerate(answers)
        if not any(
            answer[: len(other)] == other and (answer != other or k < i)
            for k, other in enumerate(answers)
            if k != i
        )
    ]


def _lacks_space(prompt: str | None, answer: str) -> bool:
    """Whether the next word of a prompt would begin with a space, and the answer does not."""
    if not answer[:1].isalnum():
        return False
    # Not after an opening quote or a sign, nor where words stand without spaces, as in Chinese.
    ends = prompt is None or prompt[-1].isalnum() or prompt[-1] in ".,;:!?)]}%…’”»"
    return ends and (prompt is None or any(map(str.isspace, prompt.strip())))


def _answer_ids(model: Any, answer: Any, prompt: str | None, what: str) -> list[int]:
    if getattr(answer, "ndim", None) == 0:  # As argmax returns it.
        answer = answer.tolist()
    if isinstance(answer, Integral) and not isinstance(answer, bool):
        check_ids(model, torch.tensor([int(answer)], device="cpu"), what)
        return [int(answer)]
    if not isinstance(answer, str):
        raise TypeError(f"{what} must be a string or a token id, got {type(answer).__name__}")
    if getattr(model, "tokenizer", None) is None:
        raise ValueError(f"this model has no tokenizer: give {what} as a token id")
    if answer[-1:].isspace() and answer.strip():
        raise ValueError(
            f"{what} is {answer!r}, which ends in a space, and that would be part of the answer: "
            f"write {answer.rstrip()!r}"
        )
    ids = _ids_of(model, answer)
    spaced = _ids_of(model, " " + answer)
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    if (
        _lacks_space(prompt, answer)
        and len(spaced) <= len(ids)
        and spaced != ids
        and unknown not in spaced
    ):
        raise ValueError(
            f"{what} is {answer!r}, {_shown(model, ids)}, without a leading space. Inside a "
            f"sentence the model predicts {' ' + answer!r}, {_shown(model, spaced)}: write it "
            f"so, or give the token id {ids[0] if len(ids) == 1 else 'you mean'}"
        )
    if not ids:
        raise ValueError(f"{what} is {answer!r}, which has no token")
    if unknown in ids and answer != getattr(model.tokenizer, "unk_token", None):
        # Some models use one token as unknown, BOS and pad: a real answer is none of them.
        raise ValueError(f"{what}, {answer!r}, is not in the tokenizer's vocabulary")
    if prompt is not None and prompt[-1].isspace() and answer[:1].isspace():
        raise ValueError(
            f"the prompt {prompt!r} ends in a space and {what}, {answer!r}, begins with one: "
            "end the prompt without the space"
        )
    return ids


def _ids_of(model: Any, text: str) -> list[int]:
    if not text:
        return []
    ids = model.to_tokens(text, prepend_bos=False, truncate=False, move_to_device=False)
    return ids[0].tolist()


def _shown(model: Any, ids: Sequence[int]) -> str:
    return " | ".join(repr(token) for token in strings_of(model, ids)) or "no token"


def aligned(model: Any, one: Sequence[int], other: Sequence[int]) -> str:
    """A clean and a corrupted prompt's tokens below each other, in columns."""
    cells = [[repr(token) for token in strings_of(model, row)] for row in (one, other)]
    columns = max(map(len, cells))
    cells = [row + [""] * (columns - len(row)) for row in cells]
    widths = [max(len(a), len(b)) for a, b in zip(*cells, strict=True)]
    lines = []
    for title, row in zip(("clean", "corrupted"), cells, strict=True):
        body = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(f"  {title:<9}  {body.rstrip()}")
    return "\n".join(lines)
