# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,-all
#     notebook_metadata_filter: kernelspec,execution,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Approximate, then verify
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/patching-demo/patching-demo/blob/main/notebooks/08_approximate_then_verify.ipynb)
#
# From the chapters before you need three things. A [sweep](01_setup.ipynb) runs the model once for
# each place that it patches. The prompts and the score are those of [chapter
# 2](02_ioi_patching.ipynb): 0 is the corrupted baseline, 1 the clean one. A head has a query, a key
# and a pattern, and each can be patched by itself.
#
# A sweep is exact, and its price grows with the number of places. A gradient has one price for all
# places together. It tells how the score begins to change, and from that one can *guess* what each
# patch would do. This is **attribution patching** ([Nanda,
# 2023](https://www.neelnanda.io/mechanistic-interpretability/attribution-patching)).
#
# A guess is worth what is known about its mistakes. This chapter lays guesses beside measurements,
# finds where they are wrong and why, tries two corrections, and ends with a way to work: estimate
# everything, then measure what looks large.
#
# In Colab, choose a GPU before you start: **Runtime > Change runtime type**.

# %% tags=["hide-input"]
# Installs the package where it is not there yet, as in Colab.
import importlib.util

if importlib.util.find_spec("patching_demo") is None:
    print("Installing patching-demo")
    # %pip install --quiet "patching-demo @ git+https://github.com/patching-demo/patching-demo"

# %%
import time

import numpy as np
import pandas as pd
import torch
import xarray as xr
from patching_demo import (
    attribute,
    combine,
    ioi_task,
    notebook,
    plots,
    prompt_task,
    sweep,
)
from patching_demo.claims import Claims, Exercise
from patching_demo.results import effect_sizes, largest_cells

notebook.setup()

# %% tags=["parameters"]
MODEL = "auto"

# %%
model = notebook.model(MODEL)
task = ioi_task(model).normalised()
S2, END = task.agree_until, task.clean_tokens.shape[1] - 1
print(f"Corrupted baseline: {task.corrupted_baseline:.4f}")
print(f"Clean baseline:     {task.clean_baseline:.4f}")

# %% [markdown]
# ## What a gradient can tell
#
# Think of the score as a function of one activation, with everything after it. At the corrupted
# value the function has a height, which is the corrupted baseline, and a slope, which is the
# gradient. A straight line with that slope, followed as far as the clean value, ends at the
# estimate:
#
# *estimate = corrupted score + (clean activation − corrupted activation) · gradient*
#
# Here it is for the attention output of one layer, in plain PyTorch. The hook makes the activation a
# starting point for gradients. One number for each position comes out.

# %%
LAYER = 2 * model.cfg.n_layers // 3
name = f"blocks.{LAYER}.hook_attn_out"
start = {}


def begin_here(activation, hook):
    start["corrupted"] = activation.detach().requires_grad_()
    return start["corrupted"]


with torch.enable_grad():
    logits = model.run_with_hooks(
        task.corrupted_tokens, fwd_hooks=[(name, begin_here)]
    )
    score = task.metric(logits)
    (gradient,) = torch.autograd.grad(score, start["corrupted"])

clean_cache = task.clean_cache(model)
moved = clean_cache[name] - start["corrupted"].detach()
by_hand = score.detach() + (moved * gradient).sum(dim=(0, 2))

# %% [markdown]
# `attribute` does the same for every layer. It takes the arguments of `sweep` and returns a result
# with the same labels. **Expect** the same numbers.

# %%
one_kind = attribute(model, task, "attn_out")
by_attribute = one_kind.sel(layer=LAYER)
largest = int(abs(by_attribute).argmax("position"))
print(f"By hand:   {by_hand[largest].item():.6f}")
print(f"attribute: {by_attribute[largest].item():.6f}")

# %% [markdown]
# ## Every kind, estimated and measured
#
# The backward pass meets every activation on its way. So one more kind of activation costs next to
# nothing. Below, all ten kinds are estimated.

# %%
BLOCK_KINDS = ["resid_pre", "attn_out", "mlp_out"]
HEAD_KINDS = ["out", "q"]
ALL_BLOCK_KINDS = [*BLOCK_KINDS, "resid_mid", "resid_post"]
ALL_HEAD_KINDS = [*HEAD_KINDS, "k", "v", "pattern"]
seconds = {}


def timed(name, run):
    """What a function returns; its seconds are kept under a name."""
    begin = time.perf_counter()
    result = run()
    seconds[name] = time.perf_counter() - begin
    return result


every_block = timed(
    "blocks, gradient",
    lambda: attribute(model, task, ALL_BLOCK_KINDS),
)
every_head = timed(
    "heads, gradient",
    lambda: attribute(model, task, ALL_HEAD_KINDS, by="all_pos"),
)

# %% [markdown]
# And all are measured, with one patched run for each cell. The five kinds that this chapter goes on
# with are measured in every layer. The other five are measured in every fourth one, which is enough
# for a picture. `where` says so: it is true for each cell that is asked for.


# %%
def asked_for(estimates, kinds):
    """Some kinds in every layer, the others in every fourth."""
    return estimates.kind.isin(kinds) | (estimates.layer % 4 == 0)


exact_every_block = timed(
    "blocks, exact",
    lambda: sweep(
        model,
        task,
        ALL_BLOCK_KINDS,
        where=asked_for(every_block, BLOCK_KINDS),
    ),
)
exact_every_head = timed(
    "heads, exact",
    lambda: sweep(
        model,
        task,
        ALL_HEAD_KINDS,
        by="all_pos",
        where=asked_for(every_head, HEAD_KINDS),
    ),
)
blocks, exact_blocks = (
    part.sel(kind=BLOCK_KINDS)
    for part in (every_block, exact_every_block)
)
heads, exact_heads = (
    part.sel(kind=HEAD_KINDS) for part in (every_head, exact_every_head)
)


def effects(result):
    """Values where there is something to patch; NaN elsewhere."""
    if "agrees" in result.coords:
        return result.where(~result.agrees)
    return result


def count(*results):
    """How many cells have something to patch."""
    return sum(
        int(effects(result).notnull().sum()) for result in results
    )


# %% tags=["remove-input"]
notebook.say(
    f"Measured: **{count(exact_every_block, exact_every_head):,} "
    "cells** in "
    f"{seconds['blocks, exact'] + seconds['heads, exact']:.1f} "
    "seconds. Estimated: "
    f"**{count(every_block, every_head):,} cells** in "
    f"{seconds['blocks, gradient'] + seconds['heads, gradient']:.1f} "
    "seconds."
)

# %% [markdown]
# Now hold one against the other. Each point is a cell. To the right is what patching it does,
# upwards what was estimated. On the dashed line both are equal.
#
# What to expect? A straight line is a good guess if the step is small, or if what follows is nearly
# straight. One attention output is a small part of the residual stream. So **expect** attention
# outputs near the line. A patch of the *whole* stream is a large step. **Expect** it far off, at all
# three places of a block. The first MLP prepares the token for all later layers, and replacing its
# output is as large a step. **Expect** that cell to be wrong, too.

# %%
plots.scatter(
    every_block,
    exact_every_block,
    title="Block activations: gradient estimates against patches",
)

# %% [markdown]
# Now the heads. A head's output is a sum of values, weighted by its pattern. So it is straight in the
# pattern, and small. **Expect** patterns on the line. A query has the softmax between it and the
# pattern. **Expect** it further off.

# %%
plots.scatter(
    every_head,
    exact_every_head,
    title="Heads, all positions: gradient estimates against patches",
)


# %% [markdown]
# The same in numbers. *Recall* is the part of the ten largest effects that is among the ten largest
# estimates. In the residual stream it says little: early at S2, many layers bring back everything, and
# which ten are largest is a matter of rounding.


# %%
def ranks(estimate, exact, top=10):
    """Where in the list of estimates the largest effects stand."""
    listed, true = (
        np.argsort(
            -effect_sizes(result).values, axis=None, kind="stable"
        )
        for result in (estimate, exact)
    )
    return np.argsort(listed)[true[:top]] + 1


def recall(estimate, exact, checked):
    """The part of the ten largest effects among the first estimates."""
    return float((ranks(estimate, exact) <= checked).mean())


def error(estimate, exact):
    """Mean distance of estimates from what was measured."""
    return float(abs(effects(estimate) - exact).mean())


def agreement(method, estimates, measured):
    """One row for each kind: how estimates fare."""
    rows = []
    for kind in measured.kind.values:
        estimate, exact = (
            result.sel(kind=kind) for result in (estimates, measured)
        )
        rows.append(
            {
                "kind": str(kind),
                "method": method,
                "correlation": float(
                    xr.corr(effects(estimate), effects(exact))
                ),
                "mean error": error(estimate, exact),
                "recall of ten": recall(estimate, exact, 10),
            }
        )
    return rows


plots.table(
    pd.DataFrame(
        agreement("gradient", blocks, exact_blocks)
        + agreement("gradient", heads, exact_heads)
    ).drop(columns="method"),
    "Gradient estimates beside measured effects; errors are shares of "
    "clean minus corrupted.",
)

# %% [markdown]
# ## Where it is wrong
#
# Look at the worst cell of each kind: the one whose estimate lies furthest from its measurement.


# %%
def furthest(estimate, exact):
    """Where estimate and measurement lie furthest apart, by index."""
    gap = abs(effects(estimate) - exact).fillna(0)
    return gap.argmax(list(gap.dims))


def place_of(cell):
    """What a cell is called."""
    if "head_label" in cell.coords:
        return cell.head_label.item()
    return f"L{cell.layer.item()}, {cell.position.item()}"


rows = []
for estimates, measured in (
    (blocks, exact_blocks),
    (heads, exact_heads),
):
    for kind in measured.kind.values:
        pair = [part.sel(kind=kind) for part in (estimates, measured)]
        estimate, exact = (part.isel(furthest(*pair)) for part in pair)
        rows.append(
            {
                "kind": str(kind),
                "worst cell": place_of(exact),
                "measured": float(exact),
                "estimated": float(estimate),
            }
        )
plots.table(
    pd.DataFrame(rows),
    "The worst estimate of each kind, as shares of clean minus "
    "corrupted.",
)

# %% [markdown]
# ## Why: part of the way
#
# To see what the gradient misses, do not jump to the clean activation. Go there in steps, and
# measure at each. The estimate is the straight line that leaves the start with the same slope.
#
# Two cells are followed: the worst MLP output and the worst attention output. If the line fails,
# **expect** the curve to leave it on the way: flat at first, and steep later.

# %%
HOOKS = {
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "q": "attn.hook_q",
}
STEPS = np.linspace(0, 1, 5)


def part_of_the_way(kind, layer, where):
    """Scores with an activation moved in steps to its clean value."""
    name = f"blocks.{layer}.{HOOKS[kind]}"
    clean = clean_cache[name][where]
    scores = [task.corrupted_baseline]
    for part in STEPS[1:]:

        def go(activation, hook, part=float(part)):
            activation = activation.clone()
            activation[where] = torch.lerp(
                activation[where], clean.to(activation), part
            )
            return activation

        logits = model.run_with_hooks(
            task.corrupted_tokens, fwd_hooks=[(name, go)]
        )
        scores.append(task.metric(logits).item())
    return scores


def walk(lines, title, caption, **marks):
    """Curves over the way from corrupted to clean."""
    way = [notebook.typeset(f"{part:.0%}") for part in STEPS]
    return plots.curves(
        xr.DataArray(
            list(lines.values()),
            dims=("curve", "part of the way"),
            coords={"curve": list(lines), "part of the way": way},
            attrs=exact_blocks.attrs | {"by": "", "kind": ""} | marks,
        ),
        along="part of the way",
        title=title,
        caption=caption,
    )


# %%
lines, ends = {}, {}
for kind in ("mlp_out", "attn_out"):
    pair = [part.sel(kind=kind) for part in (blocks, exact_blocks)]
    at = furthest(*pair)
    estimate, exact = (part.isel(at) for part in pair)
    lines[kind] = part_of_the_way(
        kind, int(exact.layer), (slice(None), int(at["position"]))
    )
    lines[f"{kind}, line"] = STEPS * float(estimate)
    ends[kind] = exact, float(estimate)

walk(
    lines,
    title="The worst MLP and attention output, patched in steps",
    caption="Each curve is the score with one activation part of the "
    "way from its corrupted to its clean value; each line leaves the "
    "start with the same slope and goes straight on.",
)

# %% tags=["remove-input"]
below = all(abs(guess) < abs(exact) for exact, guess in ends.values())
notebook.say(
    (
        "In both cases the score hardly moves at the start, so the "
        "gradient sees little. "
        if below
        else "The curves leave their lines on the way. "
    )
    + " ".join(
        f"For {kind} at {place_of(exact)} the line ends at {guess:.2f} "
        f"and the curve at {float(exact):.2f}."
        for kind, (exact, guess) in ends.items()
    )
)

# %% [markdown]
# ## Why: saturated attention
#
# The other mistake is a false alarm: a large estimate where nothing happens. Attention makes many of
# them. A query acts through a softmax, whose weights lie between 0 and 1. A straight line knows no
# such bound.
#
# Kramár et al. ([2024](https://arxiv.org/abs/2403.00745)) therefore put the patched query through
# the softmax, and go on with the gradient only from the pattern. They do the same for a key. Here
# this is `method="gradient+qk"`. Let the code find the query whose estimate it changes most.

# %%
corrected = timed(
    "heads, gradient+qk",
    lambda: attribute(
        model, task, HEAD_KINDS, by="all_pos", method="gradient+qk"
    ),
)
by_method = [
    part.sel(kind="q") for part in (heads, corrected, exact_heads)
]
at = furthest(*by_method[:2])
guess, mended, measured = (part.isel(at) for part in by_method)
layer, head = int(measured["layer"]), int(measured["head"])

# %% tags=["remove-input"]
notebook.say(
    f"It is the query of **{place_of(measured)}**. The gradient "
    f"estimates {float(guess):.3f}, with the correction it is "
    f"{float(mended):.3f}, and the patch itself brings back "
    f"{float(measured):.3f}."
)

# %% [markdown]
# Follow this query, too, from its corrupted to its clean value. **Expect** the opposite of before: a
# curve that soon stops rising, as the attention has moved as far as it can.

# %%
walk(
    {
        "query": part_of_the_way(
            "q", layer, (slice(None), slice(None), head)
        ),
        "query, line": STEPS * float(guess),
    },
    title=f"The query of {place_of(measured)}, patched in steps",
    caption="The curve is the score with the query of one head part of "
    "the way from its corrupted to its clean value, at all positions; "
    "the line leaves the start with the same slope and goes straight "
    "on, up to the estimate.",
    clean_name="estimate",
    clean_baseline=float(guess),
)

# %% [markdown]
# What went wrong can be seen in its attention. Put the clean query in, keep all else, and look at the
# position where the pattern changes most. Below is where the head looks from there: before, after,
# and where a straight line says that it looks.

# %%
query, pattern = (
    f"blocks.{layer}.attn.hook_{part}" for part in ("q", "pattern")
)
corrupted = task.corrupted_cache(model, [pattern])[pattern]
before = corrupted[:, head].cpu().double()
seen = {}


def put_in_clean(activation, hook):
    activation = activation.clone()
    activation[:, :, head] = clean_cache[query][:, :, head]
    return activation


def keep(activation, hook):
    seen["after"] = activation[:, head].cpu().double()
    return activation


model.run_with_hooks(
    task.corrupted_tokens,
    fwd_hooks=[(query, put_in_clean), (pattern, keep)],
)
after = seen["after"]

# The slope of a softmax: each weight grows with its own score, as far
# as that grows more than the mean.
grown = (after / before).log().nan_to_num(0, 0, 0)
mean = (before * grown).sum(-1, keepdim=True)
straight = before + before * (grown - mean)

prompt, place = divmod(
    int((straight - after).abs().amax(-1).argmax()), after.shape[1]
)
tokens = [
    f"{token.strip()} {i}"
    for i, token in enumerate(task.corrupted_strings[prompt])
]
looks = pd.DataFrame(
    {
        "looks at": tokens[: place + 1],
        "corrupted query": before[prompt, place, : place + 1].tolist(),
        "clean query": after[prompt, place, : place + 1].tolist(),
        "straight on": straight[prompt, place, : place + 1].tolist(),
    }
)
shown = looks.set_index("looks at").abs().max(axis=1).nlargest(4).index
plots.table(
    looks[looks["looks at"].isin(shown)],
    f"Attention of {place_of(measured)} from "
    f"{tokens[place]} in prompt {prompt + 1}, to the four positions "
    "with the largest numbers.",
)

# %% tags=["remove-input"]
beyond = float((straight - straight.clamp(0, 1)).abs().max())
notebook.say(
    "A weight of attention lies between 0 and 1. Straight on, this "
    f"head's weights leave that range by up to {beyond:.2f}. The "
    "estimate credits attention that no softmax can assign."
    if beyond > 0.1
    else "Straight on, the weights stay between 0 and 1 here, but end "
    "elsewhere than the softmax does."
)

# %% [markdown]
# ## What the corrections mend
#
# The second correction asks for the slope at several points. **Integrated gradients** ([Hanna et al.,
# 2024](https://arxiv.org/abs/2403.17806)) run the model on inputs between the corrupted and the clean
# one, and average the gradients. A slope that is flat at the start and steep later then counts.
#
# So **expect** this: the query-key correction removes false alarms among queries (and keys), and
# leaves all other kinds as they are. Integrated gradients help where the step is large: at the first
# MLP and in the residual stream.

# %%
smooth_blocks = timed(
    "blocks, integrated",
    lambda: attribute(
        model, task, BLOCK_KINDS, method="integrated", steps=3
    ),
)
smooth_heads = timed(
    "heads, integrated",
    lambda: attribute(
        model,
        task,
        HEAD_KINDS,
        by="all_pos",
        method="integrated",
        steps=3,
    ),
)

# %%
three_ways = {
    "gradient": heads,
    "gradient+qk": corrected,
    "integrated": smooth_heads,
}
plots.scatter(
    combine(three_ways, dim="method").sel(kind="q"),
    exact_heads.sel(kind="q"),
    title="Queries, estimated in three ways",
)

# %%
two_ways = {"gradient": blocks, "integrated": smooth_blocks}
plots.scatter(
    combine(two_ways, dim="method")
    .sel(kind=["resid_pre", "mlp_out"])
    .transpose("kind", "method", ...),
    exact_blocks.sel(kind=["resid_pre", "mlp_out"]),
    title="Residual stream and MLP outputs, estimated in two ways",
)

# %%
plots.table(
    pd.DataFrame(
        sum(
            (
                agreement(method, estimates, exact_heads)
                for method, estimates in three_ways.items()
            ),
            agreement("gradient", blocks, exact_blocks)
            + agreement("integrated", smooth_blocks, exact_blocks),
        )
    ).sort_values("kind", kind="stable"),
    "Each kind and method beside measured effects; errors are shares "
    "of clean minus corrupted.",
)


# %%
def remaining(part, whole, exact, kind):
    """The mean error of one method as a part of another's."""
    exact, part, whole = (
        result.sel(kind=kind) for result in (exact, part, whole)
    )
    return np.divide(error(part, exact), error(whole, exact))


mlp = [
    part.sel(kind="mlp_out", layer=0).isel(position=S2).item()
    for part in (blocks, smooth_blocks, exact_blocks)
]
pair = [part.sel(kind="q") for part in (corrected, exact_heads)]
left_over = [part.isel(furthest(*pair)) for part in pair]
qk_left = remaining(corrected, heads, exact_heads, "q")
smooth_left = remaining(smooth_heads, heads, exact_heads, "q")
stream_left = remaining(
    smooth_blocks, blocks, exact_blocks, "resid_pre"
)

# %% tags=["remove-input"]
notebook.say(
    f"The first MLP at S2 goes from {mlp[0]:.2f} to {mlp[1]:.2f}, "
    f"where the patch brings back {mlp[2]:.2f}. Of the mean error of "
    f"queries, the query-key correction leaves {qk_left:.0%}, and "
    f"integrated gradients leave {smooth_left:.0%}. Of that in the "
    f"residual stream, integrated gradients leave {stream_left:.0%}."
)
notebook.say(
    "The worst query that the correction leaves is that of "
    f"{place_of(left_over[1])}: {float(left_over[0]):.2f} estimated, "
    f"{float(left_over[1]):.2f} measured. From its pattern to the "
    "score the estimate is still a straight line, and later layers are "
    "not straight."
)

# %% [markdown]
# ## What was expected, and what was measured

# %%
claims = Claims("Estimates: expected and measured")
pair = blocks, exact_blocks
claims.check(
    "a few lines of PyTorch",
    "The estimate made by hand is that of `attribute`; this is the "
    "largest disagreement.",
    np.abs(by_hand.numpy(force=True) - by_attribute.values).max(),
    at_most=0.001,
)
claims.check(
    "attention outputs are near the line",
    "Over all their cells, estimates track measurements (correlation).",
    xr.corr(*(effects(part.sel(kind="attn_out")) for part in pair)),
    at_least=0.5,
    units="",
)
claims.check(
    "patterns are on the line",
    "A head's output is straight in its pattern, so estimates of "
    "patterns track measurements (correlation).",
    xr.corr(
        *(
            effects(part.sel(kind="pattern"))
            for part in (every_head, exact_every_head)
        )
    ),
    at_least=0.8,
    units="",
)
claims.check(
    "queries are further off",
    "In the layers where both were measured, the mean error of queries "
    "is a multiple of that of patterns.",
    error(heads.sel(kind="q")[::4], exact_heads.sel(kind="q")[::4]),
    of=error(
        every_head.sel(kind="pattern"),
        exact_every_head.sel(kind="pattern"),
    ),
    at_least=1.5,
    units="×",
)
claims.check(
    "the first MLP is not",
    "At S2, its estimate is a small part of what its patch brings "
    "back.",
    mlp[0],
    of=mlp[2],
    at_most=0.6,
)
claims.check(
    "patched in steps, it starts late",
    "A quarter of the way, the worst outputs of an MLP and of attention "
    "have done less than the quarter that a line would (larger part of "
    "the two).",
    max(lines[kind][1] / lines[kind][-1] for kind in ends),
    at_most=0.2,
)
claims.check(
    "and ends where the sweep does",
    "All the way, those two have the values of the sweep (largest "
    "disagreement).",
    max(abs(lines[kind][-1] - ends[kind][0]) for kind in ends),
    at_most=0.001,
)
of_kinds = {
    kind: error(
        *(
            part.sel(kind=kind)[::4]
            for part in (every_block, exact_every_block)
        )
    )
    for kind in ALL_BLOCK_KINDS
}
claims.check(
    "the stream is furthest off",
    "The mean error in the residual stream, at the best of its three "
    "places, is a multiple of that of attention outputs.",
    min(of_kinds[kind] for kind in of_kinds if "resid" in kind),
    of=of_kinds["attn_out"],
    at_least=3.0,
    units="×",
)
claims.check(
    "the softmax made false alarms",
    "With queries put through it, their mean error is a part of what "
    "it was.",
    qk_left,
    at_most=0.75,
)
claims.check(
    "several slopes mend the stream",
    "With integrated gradients, so is the mean error in the residual "
    "stream.",
    stream_left,
    at_most=0.8,
)
claims.show()

# %% [markdown]
# ## What it takes to find the largest
#
# An estimate does not have to be right. It has to put the cells that matter near the top of the list,
# so that measuring the first few finds them. The question is then: **how many cells must you measure
# to have the ten that matter most?**
#
# **Expect** that a short list will do, and that each method misses other cells.

# %%
CHECKED = [10, 15, 20, 25, 30, 40, 50, 60, 80, 100]
OUTPUTS = ["attn_out", "mlp_out"]
found = xr.DataArray(
    [
        [recall(part, exact_heads, checked) for checked in CHECKED]
        for part in three_ways.values()
    ],
    dims=("method", "cells measured"),
    coords={
        "method": list(three_ways),
        "cells measured": [str(checked) for checked in CHECKED],
    },
    attrs={
        "metric": "recall of the ten largest effects",
        "clean_baseline": 1.0,
        "corrupted_baseline": 0.0,
        "clean_name": "all",
        "corrupted_name": "none",
        "model": task.model_name,
        "task": task.name,
    },
)
plots.curves(
    found,
    along="cells measured",
    title="Outputs and queries of heads: how many cells to measure",
    caption="Each line follows one method's estimates, largest first. "
    "It shows which part of the ten largest measured effects is among "
    "the first so many.",
)

# %% [markdown]
# As a price list, with the outputs of attention and MLPs. Seconds are those of this run, for the
# estimate and for measuring until all ten are found.


# %%
rankings = {
    "attention and MLPs, gradient": (
        blocks.sel(kind=OUTPUTS),
        exact_blocks.sel(kind=OUTPUTS),
    ),
    "attention and MLPs, integrated": (
        smooth_blocks.sel(kind=OUTPUTS),
        exact_blocks.sel(kind=OUTPUTS),
    ),
    **{
        f"heads, {method}": (estimates, exact_heads)
        for method, estimates in three_ways.items()
    },
}
price = []
for ranking, pair in rankings.items():
    needed = int(ranks(*pair).max())
    group, method = ranking.split(", ")
    group = "heads" if group == "heads" else "blocks"
    swept = exact_every_head if group == "heads" else exact_every_block
    per_cell = seconds[f"{group}, exact"] / count(swept)
    price.append(
        {
            "list": ranking,
            "cells": count(pair[1]),
            "to measure": needed,
            "estimate (s)": seconds[f"{group}, {method}"],
            "these (s)": needed * per_cell,
            "all (s)": count(pair[1]) * per_cell,
        }
    )
plots.table(
    pd.DataFrame(price),
    "What it takes to find the ten largest effects of each list: how "
    "many cells to measure, and seconds for the estimate, for these "
    "cells and for all.",
)

# %% [markdown]
# ## Screen, then verify
#
# That is the way to work. `attribute` screens: it says which cells may matter. `sweep` verifies: with
# `where=` it measures those cells and no others. Its numbers are those of the full sweep, so nothing
# of the estimate stays in the result.
#
# Two methods are wrong in different places. So take the largest estimates of both.


# %%
def most(estimate, n):
    """The cells with the n largest estimates."""
    sizes = effect_sizes(estimate)
    return sizes >= np.sort(sizes, axis=None)[-n]


chosen = most(corrected, 20) | most(smooth_heads, 20)
verified = timed(
    "verifying",
    lambda: sweep(model, task, HEAD_KINDS, by="all_pos", where=chosen),
)
apart = abs(verified - exact_heads).max()
notebook.largest(verified, 8)

# %% tags=["remove-input"]
notebook.say(
    f"Measured: {count(verified)} of {count(exact_heads)} cells, in "
    f"{seconds['verifying']:.1f} seconds. Of the ten largest effects "
    f"of the full sweep, {recall(verified, exact_heads, 10):.0%} are "
    "among them."
)

# %% [markdown]
# What was not chosen was not measured. A screen that misses a cell says nothing about it. So choose
# generously, and sweep in full where estimates are known to fail and cells are few: the residual
# stream and the first MLP.

# %%
claims = Claims("Screen, then verify: expected and measured")
outputs = [part.sel(kind="out") for part in (heads, exact_heads)]
claims.check(
    "a tenth of the list is enough",
    "Of the ten largest effects of head outputs, most are in the first "
    "tenth of the gradient's list.",
    recall(*outputs, outputs[1].size // 10),
    at_least=0.6,
)
claims.check(
    "a short list will do",
    "With the best of the three methods, so much of the whole list has "
    "the ten largest effects of outputs and queries.",
    min(ranks(part, exact_heads).max() for part in three_ways.values()),
    of=count(exact_heads),
    at_most=0.2,
)
# Of the ten, in how many of the three lists each is among the first twenty.
lists = sum(
    ranks(part, exact_heads) <= 20 for part in three_ways.values()
)
claims.check(
    "each method misses other cells",
    "Of the ten, some are among the first twenty of one method's list "
    "and not of another's.",
    np.isin(lists, [1, 2]).mean(),
    at_least=0.1,
)
claims.check(
    "what was verified is exact",
    "Measured with `where=`, a cell has the value of the full sweep; "
    "this is the largest disagreement.",
    apart,
    at_most=0.001,
)
claims.show()

# %% [markdown]
# ## A sweep that would take hours
#
# Now a question that nobody would answer with plain forward passes: a longer text, every head at
# every position. The text says early on where a ball was left, and asks for it at the end. The
# corrupted text names another place.

# %%
STORY = (
    "Martin left the ball at the{}. He went home, had some bread, read "
    "a book and slept until it was late. In the evening Amy came to "
    "see him. She wanted to play and asked him where the ball was. "
    "Martin told her that he had left the ball at the"
)
PLACES = (" park", " shops")
texts = [STORY.format(place) for place in PLACES]
story = prompt_task(
    model,
    clean=texts,
    corrupted=texts[::-1],
    answers=[PLACES, PLACES[::-1]],
    name="where the ball is",
)
print(
    f"{story.clean_tokens.shape[1]} tokens, "
    f"the first that differs is number {story.agree_until}"
)
print(
    f"Logit difference: {story.clean_baseline:.2f} clean, "
    f"{story.corrupted_baseline:.2f} corrupted"
)

# %% [markdown]
# First the estimates, of attention and MLP outputs and of every kind of head activation.

# %%
asked = story.normalised()
of_outputs, of_heads = timed(
    "screening",
    lambda: (
        attribute(model, asked, OUTPUTS),
        attribute(model, asked, ALL_HEAD_KINDS, method="gradient+qk"),
    ),
)

# %% [markdown]
# Then the cells with the largest estimates are measured.

# %%
KEPT = 20
sure_outputs, sure_heads = timed(
    "measuring",
    lambda: (
        sweep(model, asked, OUTPUTS, where=most(of_outputs, KEPT)),
        sweep(model, asked, ALL_HEAD_KINDS, where=most(of_heads, KEPT)),
    ),
)
notebook.largest(sure_outputs, 5)

# %%
notebook.largest(sure_heads, 10)

# %% [markdown]
# How long would plain forward passes take? Time a few, and multiply.

# %%
for repeat in range(3):
    timed(f"forward {repeat}", lambda: model(story.corrupted_tokens))
forward = min(seconds[f"forward {repeat}"] for repeat in range(3))
cells = count(of_outputs, of_heads)
plain = cells * forward
here = seconds["screening"] + seconds["measuring"]

# %% tags=["remove-input"]
notebook.say(
    f"This sweep has **{cells:,} cells**. One forward pass took "
    f"{forward:.2f} seconds here, so one for each cell would take "
    f"**{plain / 3600:.1f} hours**. Estimating all of them took "
    f"{seconds['screening']:.1f} seconds, and measuring the "
    f"{2 * KEPT} largest {seconds['measuring']:.1f} seconds: together "
    f"{here:.0f} seconds, {plain / here:,.0f} times faster."
)

# %% [markdown]
# ## When may I trust a gradient?
#
# - **To rank**, where each cell is a small part of the stream: outputs of heads, of attention and of
#   later MLPs.
# - **For queries and keys**, with the softmax in between (`"gradient+qk"`).
# - **Not** for the residual stream, and not for the first MLP. Their cells are few: sweep them.
# - **Never as the number that you report.** Verify it with `where=`.
#
# ## Can you explain it?
#
# <details><summary>An estimate is near zero. May you conclude that the patch does
# nothing?</summary>
#
# No. The score may be flat where the gradient was taken, and steep further on.
#
# </details>
#
# <details><summary>Why does the query-key correction leave the estimate of a head's output as it
# is?</summary>
#
# An output is patched after the softmax. What is straightened out there comes from later layers, and
# the correction does not reach these.
#
# </details>
#
# <details><summary>You verified the largest estimates. What do you know about the
# others?</summary>
#
# That their estimates are smaller. Their effects you have not measured.
#
# </details>
#
# ## Exercises
#
# **1. A head by hand.** Estimate what patching the output of one head does, over all positions at
# once. The head is the one whose output brings back most. Its activation is
# `blocks.LAYER.attn.hook_z`, with axes prompt, position, head and dimension. Put the estimate into
# `answer_1`.

# %%
best = exact_heads.sel(kind="out").argmax(["layer", "head"])
best_layer, best_head = int(best["layer"]), int(best["head"])
print(f"The head is L{best_layer}H{best_head}.")

# %% tags=["exercise"]
answer_1 = None  # your code here

# %% tags=["exercise"]
estimate = heads.sel(kind="out", layer=best_layer, head=best_head)
exercise_1 = Exercise(
    "Exercise 1", lambda answer: abs(answer - float(estimate)) < 0.001
)
exercise_1.check(answer_1)

# %% tags=["exercise", "hide-cell"]
# Solution of exercise 1
name = f"blocks.{best_layer}.attn.hook_z"
with torch.enable_grad():
    logits = model.run_with_hooks(
        task.corrupted_tokens, fwd_hooks=[(name, begin_here)]
    )
    score = task.metric(logits)
    (gradient,) = torch.autograd.grad(score, start["corrupted"])
moved = clean_cache[name] - start["corrupted"]
products = (moved * gradient)[:, :, best_head]
exercise_1.verify((score + products.sum()).item())

# %% [markdown]
# **2. What a screen misses.** Screen heads by the plain gradient (`heads`), and keep the thirty largest
# estimates. Of all cells that are left out, which has the largest measured effect? Put kind and head
# into `answer_2`, as in `("q", "L1H2")`.

# %% tags=["exercise"]
answer_2 = None  # your code here

# %% tags=["exercise", "hide-input"]
missed = effect_sizes(exact_heads).where(~most(heads, 30), 0)
cell = missed.isel(missed.argmax(list(missed.dims)))
exercise_2 = Exercise(
    "Exercise 2",
    lambda answer: tuple(answer) == (cell.kind.item(), place_of(cell)),
)
exercise_2.check(answer_2)

# %% tags=["exercise", "hide-cell"]
# Solution of exercise 2
kept = largest_cells(heads, 30)
kept = set(zip(kept["kind"], kept["label"], strict=True))
ranked = largest_cells(exact_heads, exact_heads.size)
exercise_2.verify(
    next(
        cell
        for cell in zip(ranked["kind"], ranked["label"], strict=True)
        if cell not in kept
    )
)
