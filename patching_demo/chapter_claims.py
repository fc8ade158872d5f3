"""The predictions of each chapter, as functions of labelled results.

Every threshold on a patch is a share of clean minus corrupted, or one such share as a part of
another, so that it means the same on each model a chapter may run on. Where a claim is about
attention or depth, it is a share of a head's attention or of the layers. Claims about single heads
of GPT-2 small (Wang et al., 2022, "Interpretability in the Wild") are checked on that model only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xarray as xr

from patching_demo.claims import Checks
from patching_demo.results import share
from patching_demo.tasks import Task

__all__ = [
    "baselines",
    "crossing",
    "first_patch",
    "gpt2_small_heads",
    "heads_to_look_at",
    "induction",
    "induction_attention",
    "ioi_blocks",
    "ioi_heads",
    "ioi_positions",
    "most_attended",
    "noising",
    "positions_of",
    "previous_token_attention",
    "strong_heads",
    "top_head",
]

#: Names under which GPT-2 small may run.
GPT2_SMALL = ("gpt2-small", "gpt2", "openai-community/gpt2")

#: Heads of GPT-2 small and what Wang et al. (2022) found them to do, as (layer, head).
IOI_CIRCUIT = {
    "name mover": ((9, 9), (9, 6), (10, 0)),
    "S-inhibition": ((7, 3), (7, 9), (8, 6), (8, 10)),
    "induction": ((5, 5), (6, 9)),
    "duplicate-token": ((0, 1), (0, 10), (3, 0)),
}


# Readings of a result ----------------------------------------------------------------------------


def positions_of(result: xr.DataArray) -> tuple[int, int]:
    """(S2, END): the first position that has something to patch, and the last one.

    Raises:
        ValueError: the result has no positions that agree or differ.
    """
    if "agrees" not in result.coords:
        raise ValueError(f"the result has no positions, only {list(result.dims)}")
    return int(np.argmax(~result["agrees"].values)), result.sizes["position"] - 1


def crossing(result: xr.DataArray) -> int:
    """The first layer at which a residual-stream patch at END brings back more than one at S2.

    ``result`` has dimensions layer and position. The number of layers where there is no such layer.
    """
    s2, end = positions_of(result)
    ahead = (result.isel(position=end) > result.isel(position=s2)).values
    return int(ahead.argmax()) if ahead.any() else len(ahead)


def top_head(result: xr.DataArray) -> tuple[int, int]:
    """(layer, head) of the head whose patch brings back most, of a result by layer and head."""
    order = result.transpose("layer", "head").fillna(-np.inf)
    layer, head = np.unravel_index(int(order.values.argmax()), order.shape)
    return int(layer), int(head)


def strong_heads(result: xr.DataArray, part: float = 0.5) -> list[str]:
    """Labels of the heads that bring back at least ``part`` of what the best one does, best first.

    ``result`` has dimensions layer and head.
    """
    shares = share(result).stack(cell=("layer", "head")).dropna("cell")
    shares = shares.isel(cell=np.argsort(-shares.values, kind="stable"))
    return [str(label) for label in shares["head_label"].values[shares >= part * shares.max()]]


def heads_to_look_at(heads: xr.DataArray, n: int = 3) -> list[tuple[int, int]]:
    """The ``n`` heads with the largest effects by output, pattern and query, as (layer, head).

    ``heads`` has dimensions kind, layer and head. The first of each kind come first, and no head
    comes twice. Keys and values are left out, as several heads may share one.
    """
    found = []
    for kind in ("out", "pattern", "q"):
        effects = _effects(heads.sel(kind=kind)).transpose("layer", "head")
        best = np.argsort(-effects.values, axis=None, kind="stable")[:n]
        found.append([tuple(map(int, np.unravel_index(k, effects.shape))) for k in best])
    return list(dict.fromkeys(pair for place in zip(*found, strict=True) for pair in place))


def _at(place: tuple[int, int]) -> dict[str, int]:
    return dict(zip(("layer", "head"), place, strict=True))


def _label(result: xr.DataArray, place: dict[str, int]) -> str:
    return str(result["head_label"].sel(place).item())


def _kind(result: xr.DataArray, kind: str) -> xr.DataArray:
    return share(result.sel(kind=kind))


def _best(result: xr.DataArray, kind: str) -> float:
    """The largest share that one patch of this kind brings back."""
    return float(_kind(result, kind).max())


def _ratio(part: float, whole: float) -> float:
    # Where there is no whole, no part of it is small or large; NaN fails every claim.
    return part / whole if whole > 0 else float("nan")


def _effects(result: xr.DataArray) -> xr.DataArray:
    """Absolute shares, 0 where there is nothing to patch."""
    values = abs(share(result)).fillna(0.0)
    return values.where(~values["agrees"], 0.0) if "agrees" in values.coords else values


def _quarters(result: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """The first and the last quarter of the layers, at least one layer each."""
    size = max(result.sizes["layer"] // 4, 1)
    return result.isel(layer=slice(0, size)), result.isel(layer=slice(-size, None))


def _attention(model: Any, tokens: torch.Tensor, offset: int, start: int) -> xr.DataArray:
    """Mean attention from each position to the one ``offset`` before it, by layer and head.

    Only positions from ``start`` on count.
    """
    names = [f"blocks.{i}.attn.hook_pattern" for i in range(model.cfg.n_layers)]
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=names)
    rows = []
    for name in names:
        diagonal = cache[name].float().diagonal(-offset, dim1=-2, dim2=-1)  # [batch, head, dest]
        rows.append(diagonal[..., max(start - offset, 0) :].mean((0, 2)).cpu().numpy())
    labels = [[f"L{i}H{j}" for j in range(len(row))] for i, row in enumerate(rows)]
    return xr.DataArray(
        np.stack(rows),
        dims=("layer", "head"),
        coords={
            "layer": np.arange(len(rows)),
            "head": np.arange(len(rows[0])),
            "head_label": (("layer", "head"), labels),
        },
        attrs={
            "metric": "mean attention",
            "units": "mean attention",
            "clean_baseline": 1.0,
            "corrupted_baseline": 0.0,
            "clean_name": "all",
            "corrupted_name": "none",
            "model": str(model.cfg.model_name),
        },
        name="value",
    )


def previous_token_attention(model: Any, task: Task) -> xr.DataArray:
    """How much each head attends to the token just before, on the clean input, by layer and head.

    Both copies of the sequence count, without the BOS token.
    """
    out = _attention(model, task.clean_tokens, offset=1, start=2)
    return out.assign_attrs(what="mean attention to the token just before", task=task.name)


def induction_attention(model: Any, task: Task) -> xr.DataArray:
    """How much each head attends, from the second copy, to the token after the first occurrence.

    That token is ``seq_len - 1`` places back (Olsson et al., 2022). By layer and head.
    """
    length = (task.clean_tokens.shape[1] - 1) // 2
    out = _attention(model, task.clean_tokens, offset=length - 1, start=length + 1)
    what = "mean attention to the token after the first copy of the current one"
    return out.assign_attrs(what=what, task=task.name)


def most_attended(
    model: Any, task: Task, layer: int, head: int, position: int
) -> tuple[str, float]:
    """(label, share): where a head looks most from one position of the clean input, on average."""
    name = f"blocks.{layer}.attn.hook_pattern"
    weights = task.clean_cache(model, name)[name][:, head, position].float().mean(0)
    best = int(weights.argmax())
    return task.position_labels[best], float(weights[best])


# Chapter 1 ---------------------------------------------------------------------------------------


def first_patch(
    result: xr.DataArray, by_hand: Mapping[tuple[int, int], float], task: Task
) -> Checks:
    """What the first patches should show.

    Args:
        result: the normalised resid_pre sweep, by layer and position.
        by_hand: un-normalised values of hand-written patches by (layer, position).
        task: un-normalised, for the scale of ``by_hand``.
    """
    shares = share(result)
    s2, end = positions_of(result)
    early, late = _quarters(shares)
    clean, corrupted = task.clean_baseline, task.corrupted_baseline
    spread = clean - corrupted
    apart = [
        abs((value - corrupted) / spread - float(shares[layer, position]))
        for (layer, position), value in by_hand.items()
    ]
    checks = Checks("A first patch: expected and measured")
    checks.at_least(
        "the right name first",
        "In the clean run the model prefers the right name: the clean baseline is above zero, as a "
        "share of its distance from the corrupted one.",
        clean / abs(spread) if spread else float("nan"),
        0.25,
    )
    checks.at_most(
        "the sign turned",
        "Both batches hold the same prompts with right and wrong exchanged, so the two baselines "
        "add up to zero.",
        abs(clean + corrupted) / abs(spread) if spread else float("nan"),
        0.01,
    )
    checks.at_least(
        "layer 0, S2",
        "The patch replaces all that differs, so everything comes back.",
        float(shares[0, s2]),
        0.99,
    )
    checks.at_most(
        "layer 0, END",
        "Both prompts end in the same word, so nothing comes back.",
        abs(float(shares[0, end])),
        0.01,
    )
    checks.at_most(
        "before S2",
        "Both runs are the same there in every layer, so nothing changes.",
        float(abs(shares[:, :s2]).max()),
        0.001,
    )
    checks.at_most(
        "by hand and by sweep",
        "A sweep gives the numbers of hand-written hooks; this is the largest disagreement.",
        max(apart),
        0.001,
    )
    checks.at_least(
        "early, S2 has it",
        "In the first quarter of the layers, the stream at S2 brings back nearly all (mean).",
        float(early.isel(position=s2).mean()),
        0.8,
    )
    checks.at_least(
        "late, END has it",
        "In the last quarter, the stream at END brings back most (mean).",
        float(late.isel(position=end).mean()),
        0.5,
    )
    return checks


# Chapters 3 and 4 --------------------------------------------------------------------------------


def noising(task: Task) -> Task:
    """The task turned round: corrupted activations go into the clean run, to see what breaks.

    Normalised, so that 0 is the intact run and 1 the corrupted one.

    Raises:
        ValueError: if the two baselines are equal.
    """
    return replace(
        task,
        name=f"{task.name}, noising",
        clean_tokens=task.corrupted_tokens,
        corrupted_tokens=task.clean_tokens,
        clean_strings=task.corrupted_strings,
        corrupted_strings=task.clean_strings,
        clean_baseline=task.corrupted_baseline,
        corrupted_baseline=task.clean_baseline,
    ).normalised()


def induction(
    denoised: xr.DataArray,
    by_position: xr.DataArray,
    noised: xr.DataArray,
    previous: xr.DataArray,
    repeated: xr.DataArray,
) -> Checks:
    """Where the two halves of induction are, by patches and by attention.

    Args:
        denoised: AA into AB, every head kind over all positions.
        by_position: the same by position.
        noised: BA into AA, head outputs over all positions.
        previous: :func:`previous_token_attention`.
        repeated: :func:`induction_attention`.
    """
    out = _kind(denoised, "out")
    whole = float(out.max())
    layer, head = top_head(out)
    broken = share(noised)
    label = _label(out, _at((layer, head)))
    checks = Checks("Induction: expected and measured")
    checks.at_least(
        "one head stands out",
        "The output of a single head brings back a good part of the score.",
        whole,
        0.15,
    )
    checks.at_most(
        "it sits above layer 0",
        "It needs what layer 0 wrote, so no head of layer 0 brings back nearly as much; as a part "
        "of the best output.",
        _ratio(float(out.sel(layer=0).max()), whole),
        0.5,
    )
    for kind, word in (("q", "query"), ("pattern", "pattern")):
        checks.at_least(
            f"{word} matters",
            f"AB spoils the second copy, from which the head looks back, so its {word} brings back "
            "most of what the output does.",
            _ratio(_best(denoised, kind), whole),
            0.5,
        )
    for kind, word in (("k", "key"), ("v", "value")):
        checks.at_most(
            f"{word} does not",
            f"The first copy is intact, and there the head finds its {word}s, so these bring back "
            "little of what the output does.",
            _ratio(_best(denoised, kind), whole),
            0.25,
        )
    own = _kind(by_position, "out").sel(layer=layer, head=head)
    checks.at_most(
        "each position helps itself",
        "A patch at one position mends the prediction made there, so no single one brings back "
        "much of the mean.",
        float(own.where(~own["agrees"]).max()),
        0.25,
    )
    checks.at_least(
        "induction attention",
        f"The head found by patching ({label}) looks at the token after the first occurrence.",
        float(repeated.sel(layer=layer, head=head)),
        0.3,
    )
    looking = _at(top_head(repeated))
    checks.at_least(
        "patches and attention agree on it",
        f"The other way round, the head that does so most ({_label(out, looking)}) brings back a "
        "good part of what the best output does.",
        _ratio(float(out.sel(looking)), whole),
        0.5,
    )
    checks.at_least(
        "what brings it back is needed too",
        f"With the output of {label} corrupted in the clean run, a part of the score is lost.",
        float(broken.sel(layer=layer, head=head)),
        0.1,
    )
    first = broken.sel(layer=[0])
    _, early = top_head(first)
    label = f"L0H{early}"
    checks.at_least(
        "a layer-0 head is needed",
        "With one head of layer 0 corrupted, a good part of the score is lost.",
        float(first.max()),
        0.15,
    )
    checks.at_least(
        "previous-token attention",
        f"That head ({label}) looks at the token just before.",
        float(previous.sel(layer=0, head=early)),
        0.3,
    )
    looking = _at(top_head(previous.sel(layer=[0])))
    checks.at_least(
        "patches and attention agree on that too",
        "The other way round, of what is lost with one head of layer 0, a good part is lost with "
        f"the one that does so most ({_label(first, looking)}).",
        _ratio(float(first.sel(looking)), float(first.max())),
        0.5,
    )
    return checks


#: What each corrupted input should leave of every kind, as a part of what the output brings back:
#: +1 for at least half, -1 for not much, by corrupted input.
EXPECTED = {
    "AB": {"q": 1, "k": -1, "v": -1, "pattern": 1},
    "BA": {"q": -1, "k": -1, "v": -1, "pattern": -1},
    "BB": {"q": -1, "k": -1, "v": 1, "pattern": -1},
    "BC": {"q": -1, "k": -1, "v": -1, "pattern": -1},
}
_WORDS = {"q": "queries", "k": "keys", "v": "values", "pattern": "patterns"}
_WHY = {
    "AB": {
        "q": "the second copy is spoilt, and with it the question",
        "k": "the first copy offers the right keys already",
        "v": "the first copy holds the right values already",
        "pattern": "a clean pattern points to intact values",
    },
    "BA": {
        "q": "the question is right already, but nothing answers it",
        "k": "clean keys only point to the wrong values",
        "v": "clean values stand where no head looks",
        "pattern": "a clean pattern points to the wrong values",
    },
    "BB": {
        "q": "a clean question finds no key, so at best the head stops copying B",
        "k": "a clean key meets no question, so at best the head stops copying B",
        "v": "the head looks to the right place already and finds A there",
        "pattern": "the pattern is the same as in the clean run",
    },
    "BC": {
        "q": "a clean question finds no key",
        "k": "a clean key meets no question",
        "v": "clean values stand where no head looks",
        "pattern": "a clean pattern points to the wrong values",
    },
}


def baselines(
    results: Mapping[str, xr.DataArray], probabilities: Mapping[str, xr.DataArray]
) -> Checks:
    """Which kinds bring the score back, for each corrupted input.

    What counts is the score above guessing, which is the corrupted baseline of BC, where there is
    nothing to copy. BB's own baseline is below that: there the model copies the wrong sequence, and
    a patch that merely stops it raises the score to guessing.

    Args:
        results: by corrupted input (AB, BA, BB, BC), un-normalised, every head kind over all
            positions, with dimensions kind, layer and head.
        probabilities: the same, scored by the probability. Only baselines are read.
    """
    guess = float(results["BC"].attrs["corrupted_baseline"])
    checks = Checks(
        "Four corrupted inputs, expected and measured: outputs as a share above guessing, the "
        "other kinds as a part of what the best output brings back"
    )
    for name, result in results.items():
        clean = float(result.attrs["clean_baseline"])
        floor = max(float(result.attrs["corrupted_baseline"]), guess)

        def above(kind: str, result=result, clean=clean, floor=floor) -> float:
            best = float(result.sel(kind=kind).max())
            return (best - floor) / (clean - floor)

        checks.at_least(
            f"{name}: outputs",
            "They bring it back: they are what the rest of the model reads.",
            above("out"),
            0.15,
        )
        for kind, sign in EXPECTED[name].items():
            part = _ratio(above(kind), above("out"))
            if sign > 0:
                text = f"They matter: {_WHY[name][kind]}."
                checks.at_least(f"{name}: {_WORDS[kind]}", text, part, 0.5)
            else:
                text = f"They do not bring it back: {_WHY[name][kind]}."
                checks.at_most(f"{name}: {_WORDS[kind]}", text, part, 0.5)
    lowest = {kind: _kind(results["BA"], kind).min() for kind in ("k", "pattern")}
    checks.at_most(
        "BA: a clean key or pattern can do harm",
        "It points to the right place, and there B stands, so that head copies B; the lowest of "
        "each kind, as a share of clean minus corrupted.",
        float(max(lowest.values())),
        -0.02,
    )
    checks.at_most(
        "BA: a clean output of layer 0 can do harm",
        "With it tokens of B carry the notes that belong to A, so the heads that look for such a "
        "note copy B; the lowest, as a share of clean minus corrupted.",
        float(_kind(results["BA"], "out").sel(layer=0).min()),
        -0.05,
    )
    clean = float(results["BB"].attrs["clean_baseline"])
    checks.at_most(
        "BB is worse than guessing",
        "On BB the model copies B where A is asked for, so it starts below BC; as a share of clean "
        "minus BC.",
        (float(results["BB"].attrs["corrupted_baseline"]) - guess) / (clean - guess),
        -0.05,
    )
    wrong, low = (float(probabilities[n].attrs["corrupted_baseline"]) for n in ("BB", "BC"))
    high = float(probabilities["BC"].attrs["clean_baseline"])
    checks.at_most(
        "a probability does not tell them apart",
        "On BB and on BC the right token has a probability near zero: their distance, as a share "
        "of clean minus BC.",
        _ratio(abs(wrong - low), high - low),
        0.05,
    )
    return checks


# Chapter 2 ---------------------------------------------------------------------------------------


def ioi_blocks(blocks: xr.DataArray) -> Checks:
    """Where the information is and what moves it.

    Args:
        blocks: by kind (resid_pre, resid_mid, attn_out, mlp_out among them), layer and position.
    """
    stream, middle = (_kind(blocks, kind) for kind in ("resid_pre", "resid_mid"))
    s2, end = positions_of(blocks)
    early, late = _quarters(stream)
    attention, mlp = (_kind(blocks, kind).isel(position=end) for kind in ("attn_out", "mlp_out"))
    prepared = int(_kind(blocks, "mlp_out").isel(position=s2).fillna(-np.inf).argmax("layer"))
    strongest = int(abs(attention).fillna(0.0).argmax("layer"))
    depth = blocks.sizes["layer"]
    checks = Checks("Residual stream, attention and MLPs: expected and measured")
    checks.at_least(
        "early, S2 has it",
        "In the first quarter of the layers, the stream at S2 brings back nearly all (mean).",
        float(early.isel(position=s2).mean()),
        0.8,
    )
    checks.at_most(
        "early, END has not",
        "In the same layers, the stream at END brings back nothing (largest).",
        float(abs(early.isel(position=end)).max()),
        0.1,
    )
    checks.at_most(
        "late, S2 has no more",
        "In the last quarter, the stream at S2 brings back little (mean).",
        float(abs(late.isel(position=s2)).mean()),
        0.3,
    )
    checks.at_least(
        "late, END has it",
        "In the last quarter, the stream at END brings back most (mean).",
        float(late.isel(position=end).mean()),
        0.5,
    )
    checks.at_most(
        "the same step after attention",
        "The stream in the middle of each layer has its step where the stream before the layer "
        "has it; distance as a share of all layers.",
        abs(crossing(middle) - crossing(stream)) / depth,
        0.1,
    )
    checks.at_least(
        "attention brings it to END",
        "The attention output of some single layer, at END, brings back a good part.",
        float(attention.max()),
        0.1,
    )
    checks.at_most(
        "it does so at the step",
        "That layer lies close to where END overtakes S2; distance as a share of all layers.",
        abs(strongest - crossing(stream)) / depth,
        0.25,
    )
    checks.at_most(
        "MLPs do less at END",
        "All MLP effects at END together, as a part of all attention effects there.",
        _ratio(float(abs(mlp).sum()), float(abs(attention).sum())),
        0.75,
    )
    checks.at_most(
        "MLPs prepare S2 early",
        "Of all MLPs at S2, the one that brings back most stands in the first layers; its layer as "
        "a share of all.",
        prepared / depth,
        0.25,
    )
    return checks


def ioi_heads(heads: xr.DataArray) -> Checks:
    """How many heads matter, and by which of their parts.

    Args:
        heads: by kind, layer and head, over all positions.
    """
    out = _effects(heads.sel(kind="out"))
    ordered = np.sort(out.values, axis=None)[::-1]
    few = max(round(ordered.size / 10), 1)
    checks = Checks("Single heads: expected and measured")
    checks.at_least(
        "a handful carries most",
        f"The strongest tenth of the heads ({few} of {ordered.size}) carries most of all effects "
        "of head outputs, in absolute value.",
        _ratio(float(ordered[:few].sum()), float(ordered.sum())),
        0.5,
    )
    checks.at_most(
        "most carry nothing",
        "The output of a head in the middle of the ranking moves the score by next to nothing.",
        float(np.median(out.values)),
        0.02,
    )
    quarter, _ = _quarters(out)
    checks.at_most(
        "the first layers do little",
        "Of all effects of head outputs, little lies in the first quarter of the layers.",
        _ratio(float(quarter.sum()), float(out.sum())),
        0.25,
    )
    checks.at_most(
        "keys do little",
        "All that differs comes at S2 or after, so the keys of what stands before are the same; "
        "all effects of keys, as a part of those of outputs.",
        _ratio(float(_effects(heads.sel(kind="k")).sum()), float(out.sum())),
        0.5,
    )
    query, pattern = (_kind(heads, kind).fillna(0.0).values.ravel() for kind in ("q", "pattern"))
    checks.at_least(
        "queries make the patterns",
        "So where a pattern matters, it does so by its query: correlation of both effects over "
        "all heads.",
        float(np.corrcoef(query, pattern)[0, 1]) if query.std() * pattern.std() > 0 else np.nan,
        0.5,
        units="",
    )
    checks.at_least(
        "one head is felt",
        "The output of some single head brings back a noticeable part.",
        _best(heads, "out"),
        0.1,
    )
    return checks


def ioi_positions(heads: xr.DataArray) -> Checks:
    """At which positions heads matter.

    Args:
        heads: by kind, layer, position and head.
    """
    s2, end = positions_of(heads)
    out = _effects(heads.sel(kind="out"))
    total = float(out.sum())
    checks = Checks("Heads by position: expected and measured")
    checks.at_least(
        "S2 and END stand out",
        "Of all effects of head outputs, in absolute value, most lie at these two positions.",
        _ratio(float(out.isel(position=[s2, end]).sum()), total),
        0.7,
    )
    first, second = (
        _ratio(
            float((out.isel(position=place) * out["layer"]).sum()),
            float(out.isel(position=place).sum()),
        )
        for place in (s2, end)
    )
    checks.at_least(
        "S2 first, END later",
        "Heads that matter at S2 come before those that matter at END: distance of their mean "
        "layers, weighted by effect, as a share of all layers.",
        (second - first) / heads.sizes["layer"],
        0.05,
    )
    return checks


def gpt2_small_heads(heads: xr.DataArray, by_position: xr.DataArray) -> Checks:
    """What Wang et al. (2022) found the heads of GPT-2 small to do, by patching.

    On any other model every claim is listed as not checked.

    Args:
        heads: by kind, layer and head, over all positions.
        by_position: the same by position.
    """
    model = str(heads.attrs.get("model", ""))
    known = model in GPT2_SMALL
    checks = Checks("Published heads of GPT-2 small")

    def add(name: str, expected: str, measure: Any, threshold: float, units: str = "share") -> None:
        if known:
            checks.at_least(name, expected, measure(), threshold, units)
        else:
            reason = f"the heads are those of GPT-2 small, and this is {model}"
            checks.not_checked(name, expected, "at least", threshold, reason, units)

    def total(kind: str, group: str, place: int | None = None) -> float:
        result = heads if place is None else by_position.isel(position=[place])
        values = _effects(result.sel(kind=kind))
        return sum(float(values.sel(layer=i, head=j).sum()) for i, j in IOI_CIRCUIT[group])

    def against_others(group: str) -> float:
        values = _effects(heads.sel(kind="out"))
        inside = [pair for pairs in IOI_CIRCUIT.values() for pair in pairs]
        everyone, named = float(values.sum()), sum(float(values[i, j]) for i, j in inside)
        others = (everyone - named) / (values.size - len(inside))
        return _ratio(total("out", group) / len(IOI_CIRCUIT[group]), others)

    def at(place: int, group: str) -> float:
        values = _effects(by_position.sel(kind="out"))
        everywhere = sum(float(values.sel(layer=i, head=j).sum()) for i, j in IOI_CIRCUIT[group])
        return _ratio(total("out", group, place), everywhere)

    s2, end = positions_of(by_position)
    for group, factor in (
        ("name mover", 3.0),
        ("S-inhibition", 3.0),
        ("induction", 3.0),
        ("duplicate-token", 1.0),
    ):
        labels = ", ".join(f"L{i}H{j}" for i, j in IOI_CIRCUIT[group])
        add(
            f"{group} heads",
            f"{labels} matter more than heads outside the circuit do (mean absolute effect of the "
            "output, against theirs).",
            lambda group=group: against_others(group),
            factor,
            "×",
        )
    for group, place, where in (
        ("name mover", end, "END"),
        ("S-inhibition", end, "END"),
        ("induction", s2, "S2"),
        ("duplicate-token", s2, "S2"),
    ):
        add(
            f"{group} heads work at {where}",
            f"Most of what their outputs do, they do at {where}.",
            lambda group=group, place=place: at(place, group),
            0.6,
        )
    add(
        "name movers look elsewhere",
        "Their patterns matter more than their values (total effects).",
        lambda: _ratio(total("pattern", "name mover"), total("v", "name mover")),
        1.0,
        "×",
    )
    add(
        "S-inhibition heads carry something else",
        "Their values matter more than their patterns (total effects).",
        lambda: _ratio(total("v", "S-inhibition"), total("pattern", "S-inhibition")),
        1.0,
        "×",
    )
    return checks
