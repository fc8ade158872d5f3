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
# # Patching a circuit that names people
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/patching-demo/patching-demo/blob/main/notebooks/02_ioi_patching.ipynb)
#
# *When John and Mary went to the shops, John gave the bag to* ... The model says *Mary*. This
# chapter finds out where in the model that answer comes from, from coarse to fine:
#
# 1. the residual stream, by layer and position: **where** is the information?
# 2. attention and MLP outputs: **which kind of part** moves it?
# 3. single heads: **which** ones?
# 4. their queries, keys, values and patterns: **how**?
# 5. all of that by position.
#
# From [chapter 1](01_setup.ipynb) you need three things. A patch copies one clean activation into the
# corrupted run. The score is 0 at the corrupted baseline and 1 at the clean one. S2 is where the
# prompts differ, and END is where the model predicts.
#
# In GPT-2 small this circuit has been taken apart head by head ([Wang et al.,
# 2022](https://arxiv.org/abs/2211.00593)), so there is something to compare with.
#
# In Colab, choose a GPU before you start: **Runtime > Change runtime type**. Without one, this
# chapter takes some minutes.

# %% tags=["hide-input"]
# Installs the package where it is not there yet, as in Colab.
import importlib.util

if importlib.util.find_spec("patching_demo") is None:
    print("Installing patching-demo")
    # %pip install --quiet "patching-demo @ git+https://github.com/patching-demo/patching-demo"

# %%
import numpy as np
import xarray as xr
from IPython.display import display
from patching_demo import (
    combine,
    interval,
    ioi_task,
    notebook,
    patch,
    plots,
    sweep,
)
from patching_demo.claims import Claims, Exercise
from patching_demo.results import (
    attention,
    crossing_layer,
    effect_sizes,
    strong_heads,
    top_head,
)
from patching_demo.sweeps import sweep_metrics

notebook.setup()

# %% tags=["parameters"]
MODEL = "auto"

# %%
model = notebook.model(MODEL)

# %% [markdown]
# ## Eight prompts in four pairs
#
# Within a pair the same two people are named, and each of them gives once. Swapping the two
# prompts of a pair makes the corrupted input. So the clean and the corrupted batch hold the same
# eight sentences, in another order.

# %%
task = ioi_task(model)
plots.tokens_table(task)

# %% [markdown]
# Averaging over both prompts of a pair has a purpose. Anything that favours one name over the other,
# such as its frequency, counts once for and once against the right answer, and cancels out.
#
# The answers are single tokens with their leading space. The first of each pair below is right for
# the clean prompt.

# %%
for prompt, (right, wrong) in zip(
    task.clean_strings, task.answers.tolist(), strict=True
):
    names = [
        model.tokenizer.decode([token]) for token in (right, wrong)
    ]
    print(
        f"{names[0]!r:>10} ({right:>5}) rather than {names[1]!r:>10} "
        f"({wrong:>5}):",
        "".join(prompt[1:]),
    )

# %% [markdown]
# ## The score, and its two baselines

# %%
print(f"Logit difference, clean:     {task.clean_baseline:.4f}")
print(f"Logit difference, corrupted: {task.corrupted_baseline:.4f}")

# %% [markdown]
# From here on the score is normalised: 0 is the corrupted baseline, 1 the clean one. Check it on
# the two runs themselves.

# %%
scored = task.normalised()
for name, tokens in (
    ("clean", task.clean_tokens),
    ("corrupted", task.corrupted_tokens),
):
    value = (
        round(scored.metric(model(tokens)).item(), 4) + 0.0
    )  # no minus sign before a zero
    print(f"Normalised, {name} run: {value:.4f}")

# %% [markdown]
# A value of 0.3 means: this one patch moves the logit difference 30 % of the way from corrupted to
# clean. Values below 0 move it further away. Values above 1 overshoot.

# %% [markdown]
# ## Where: the residual stream
#
# Patch the residual stream as it enters each layer, one position at a time.
#
# **Expect** a staircase. The prompts differ at S2, so early on, S2 holds the whole difference. The
# answer is read off at END, so late in the model END must hold it. Somewhere in between it moves.
# Positions before S2 are the same in both runs, so there is nothing to patch.

# %%
BLOCK_KINDS = [
    "resid_pre",
    "attn_out",
    "resid_mid",
    "mlp_out",
    "resid_post",
]
blocks = sweep(model, scored, BLOCK_KINDS)

# %% tags=["figure-headline"]
plots.heatmap(
    blocks.sel(kind="resid_pre"),
    title="Clean residual stream patched into the corrupted run",
)

# %%
notebook.largest(blocks.sel(kind="resid_pre"))

# %%
S2, END = task.agree_until, task.clean_tokens.shape[1] - 1
stream = blocks.sel(kind="resid_pre")
step = crossing_layer(stream, S2, END)

# %% tags=["remove-input"]
notebook.say(
    f"On {task.model_name} the information leaves S2 and arrives at "
    f"END around layer **{step}** of {model.cfg.n_layers}: from there "
    "on, END brings back more than S2."
)

# %% [markdown]
# ## What kind of part: attention or MLP
#
# The residual stream is a sum. Each layer adds the output of its attention, and then that of its
# MLP. Patching the *stream* asks what has accumulated so far. Patching an *output* asks what this layer
# adds.
#
# First the stream in the middle of each layer, after attention and before the MLP. **Expect** the
# same staircase, as only one part lies between the two. So the figure is folded away.

# %% tags=["hide-output"]
plots.heatmap(
    blocks.sel(kind="resid_mid"),
    title="Clean residual stream after attention patched into the "
    "corrupted run",
)

# %% tags=["hide-output"]
notebook.largest(blocks.sel(kind="resid_mid"))

# %% [markdown]
# Now attention outputs. Only attention can carry anything from one position to another. So
# **expect** attention at END to matter just where the staircase has its step.

# %%
plots.heatmap(
    blocks.sel(kind="attn_out"),
    title="Clean attention outputs patched into the corrupted run",
)

# %%
notebook.largest(blocks.sel(kind="attn_out"))

# %% [markdown]
# And MLP outputs. An MLP works on each position separately. So **expect** MLPs to matter at S2 in the
# first layers, where they prepare the name, and to do less than attention at END.

# %%
plots.heatmap(
    blocks.sel(kind="mlp_out"),
    title="Clean MLP outputs patched into the corrupted run",
)

# %%
notebook.largest(blocks.sel(kind="mlp_out"))

# %% tags=["remove-input"]
notebook.say(
    "At S2, the MLP of the very first layer brings back "
    f"{float(blocks.sel(kind='mlp_out', layer=0).isel(position=S2)):.0%}. "
    "Only one attention stands before it, so it reads little more than "
    "the token itself."
)

# %% [markdown]
# All of them side by side, with one colour scale: the stream before a layer (`resid_pre`), what its
# attention adds (`attn_out`), the stream between (`resid_mid`), what its MLP adds (`mlp_out`), and
# the stream after the layer (`resid_post`), which is the stream before the next one.

# %%
plots.heatmap(
    blocks,
    title="Clean activations of every block kind patched into the "
    "corrupted run",
)

# %% [markdown]
# What was expected is now held against what was measured. A patch is scored as a share of clean
# minus corrupted, so each threshold means the same on any model.

# %%
claims = Claims(
    "Residual stream, attention and MLPs: expected and measured"
)
depth = model.cfg.n_layers
early, late = stream[: depth // 4], stream[-(depth // 4) :]
middle, attention_out, mlp_out = (
    blocks.sel(kind=kind)
    for kind in ("resid_mid", "attn_out", "mlp_out")
)

claims.check(
    "early, S2 has it",
    "In the first quarter of the layers, the stream at S2 brings back "
    "nearly all (mean).",
    early[:, S2].mean(),
    at_least=0.8,
)
claims.check(
    "early, END does not",
    "In the same layers, the stream at END brings back nothing "
    "(largest).",
    abs(early[:, END]).max(),
    at_most=0.1,
)
claims.check(
    "late, S2 no longer has it",
    "In the last quarter, the stream at S2 brings back little (mean).",
    abs(late[:, S2]).mean(),
    at_most=0.3,
)
claims.check(
    "late, END has it",
    "In the last quarter, the stream at END brings back most (mean).",
    late[:, END].mean(),
    at_least=0.5,
)
claims.check(
    "the same step after attention",
    "The stream in the middle of each layer has its step where the "
    "stream before the layer has it; distance as a share of all "
    "layers.",
    abs(crossing_layer(middle, S2, END) - step) / depth,
    at_most=0.1,
)
claims.check(
    "attention brings it to END",
    "The attention output of some single layer, at END, brings back a "
    "good part.",
    attention_out[:, END].max(),
    at_least=0.1,
)
claims.check(
    "it does so at the step",
    "The layer whose attention matters most at END lies close to where "
    "END overtakes S2; distance as a share of all layers.",
    abs(abs(attention_out[:, END]).argmax("layer") - step) / depth,
    at_most=0.25,
)
claims.check(
    "MLPs do less at END",
    "All MLP effects at END together, as a part of all attention "
    "effects there.",
    abs(mlp_out[:, END]).sum(),
    of=abs(attention_out[:, END]).sum(),
    at_most=0.75,
)
claims.check(
    "MLPs prepare S2 early",
    "Of all MLPs at S2, the one that brings back most stands in the "
    "first layers; its layer as a share of all.",
    mlp_out[:, S2].argmax("layer") / depth,
    at_most=0.25,
)
claims.show()

# %% [markdown]
# ## Which: single heads
#
# The attention output of a layer is the sum of its heads. Patch the output of one head, at all
# positions at once. **Expect** a handful of heads to carry most of the effect, and many to carry
# none.

# %%
HEAD_KINDS = ["out", "q", "k", "v", "pattern"]
heads = sweep(model, scored, HEAD_KINDS, by="all_pos")

plots.heatmap(
    heads.sel(kind="out"),
    title="Clean head outputs patched into the corrupted run",
)

# %%
notebook.largest(heads.sel(kind="out"), 8)

# %% [markdown]
# Orange heads move the answer *away* from the clean one: with their clean output the corrupted run
# scores lower. In GPT-2 small such heads have been described as *negative name movers*.
#
# Each share is a mean over eight prompts. How far might it be off? `per_prompt=True` keeps one value
# for each prompt, and `interval` asks what the mean would be if other prompts had been drawn: it draws
# eight of these eight, with replacement, again and again. **Expect** intervals as wide as many a
# share. [Chapter 6](06_your_own_prompts.ipynb) asks more prompts, and says what eight cannot tell.

# %%
leading = strong_heads(heads.sel(kind="out"), part=0)[:6]
each_prompt = sweep(
    model,
    scored,
    "out",
    by="all_pos",
    where=heads.head_label.isin(leading.head_label.values),
    per_prompt=True,
)
sure = interval(each_prompt).stack(cell=("layer", "head"))
sure = sure.dropna("cell").reset_index("cell")
plots.bars(
    sure.swap_dims(cell="head_label").sel(
        head_label=leading.head_label.values
    ),
    along="head_label",
    title="The strongest heads, with intervals",
    caption="Each bar is the share that one head's clean output brings "
    "back; whiskers are intervals by bootstrap over the eight prompts.",
)

# %% [markdown]
# Where the heads of this table look is shown <a href="#attention">further down</a>.

# %% [markdown]
# ## How: query, key, value, pattern
#
# A head looks somewhere, and carries something from there. The **pattern** is where it looks, made
# from **queries** and **keys**. The **value** is what it carries. Patch each by itself.
#
# - A head whose **query** or **pattern** matters looks to another place in the two runs.
# - A head whose **value** matters looks to the same place in both, and finds something else there.
# - A head whose **output** matters, but nothing else does, needs several of them at once.
#
# Both prompts are the same up to S2. So a head that looks back from S2 or END to the two names
# meets the same keys in both runs. **Expect** keys to do little. And where a pattern matters,
# **expect** its query to matter too, as the query is what changed it.
#
# Choose a kind above the figure.

# %%
plots.explore(
    heads,
    title="Clean activations of heads patched into the corrupted run",
)

# %%
for kind in ("q", "k", "v", "pattern"):
    display(notebook.largest(heads.sel(kind=kind), 3))

# %% [markdown]
# Every kind at once, with one colour scale. Where several query heads share one key and one value,
# there are fewer keys and values to patch than heads; the missing ones are grey.

# %%
plots.heatmap(heads)

# %%
notebook.largest(heads, 8)

# %% tags=["remove-input"]
shared = model.cfg.n_heads // heads.attrs["n_key_value_heads"]
by_pattern, by_value = (
    ", ".join(strong_heads(heads.sel(kind=kind)).head_label.values)
    for kind in ("pattern", "v")
)
notebook.say(
    f"On {task.model_name}, the heads that bring back most by where "
    f"they look are **{by_pattern}**; by what they carry, "
    f"**{by_value}**."
    + (
        f" In this model {shared} query heads in a row share one key "
        "and one value. Keys and values are numbered by themselves: "
        f"number 1 serves heads {shared} to {2 * shared - 1}."
        if shared > 1
        else ""
    )
)

# %% [markdown]
# <a id="attention"></a>
# ### What the strongest heads look at
#
# Here are the attention patterns of the heads with the largest effects of output, pattern or query.
# Choose one in the menu, and look at its rows of S2 and END. A head that looks, from S2, at what
# followed the same name before is an *induction head*; the next chapter is about those.

# %%
effects = effect_sizes(heads)
strongest = {
    (int(head["layer"]), int(head["head"]))
    for kind in ("out", "pattern", "q")
    for head in strong_heads(effects.sel(kind=kind), part=0)[:3]
}
plots.attention_patterns(
    model,
    task.clean_tokens,
    sorted(strongest),
    task.position_labels,
    title="Where the strongest heads look, in the clean run",
)

# %%
looks = attention(model, task.clean_tokens, task.position_labels)

# %% tags=["remove-input"]
for kind, what in (("out", "output"), ("pattern", "pattern")):
    best = top_head(heads.sel(kind=kind))
    rows = looks.sel(layer=best["layer"], head=best["head"])
    notebook.say(
        f"**{best.head_label.item()}**, the strongest head by {what}, "
        "looks most at "
        + " and ".join(
            f"`{rows[place].idxmax().item()}` from {name} "
            f"({float(rows[place].max()):.0%} of its attention)"
            for name, place in (("S2", S2), ("END", END))
        )
        + "."
    )

# %%
claims = Claims("Single heads: expected and measured")
out = effects.sel(kind="out")
ordered = np.sort(out, axis=None)[::-1]
few = round(out.size / 10)

claims.check(
    "a handful carries most",
    f"The strongest tenth of the heads ({few} of {out.size}) carries "
    "most of all effects of head outputs, in absolute value.",
    ordered[:few].sum(),
    of=ordered.sum(),
    at_least=0.5,
)
claims.check(
    "most carry nothing",
    "The output of a head in the middle of the ranking moves the score "
    "by next to nothing.",
    out.median(),
    at_most=0.02,
)
claims.check(
    "the first layers do little",
    "Of all effects of head outputs, little lies in the first quarter "
    "of the layers.",
    out[: depth // 4].sum(),
    of=out.sum(),
    at_most=0.25,
)
claims.check(
    "keys do little",
    "All that differs comes at S2 or after, so the keys of what stands "
    "before are the same; all effects of keys, as a part of those of "
    "outputs.",
    effects.sel(kind="k").sum(),
    of=out.sum(),
    at_most=0.5,
)
claims.check(
    "queries make the patterns",
    "So where a pattern matters, it does so by its query: correlation "
    "of both effects over all heads.",
    xr.corr(heads.sel(kind="q"), heads.sel(kind="pattern")),
    at_least=0.5,
    units="",
)
claims.check(
    "one head is felt",
    "The output of some single head brings back a noticeable part.",
    heads.sel(kind="out").max(),
    at_least=0.1,
)
claims.show()

# %% [markdown]
# ## Where, for the heads that matter
#
# Finally each head at each position: rows are heads, columns positions. That is the largest sweep
# of this chapter, and most of it would be spent on heads that did nothing above. So `where` keeps
# it to those with a part in the score: an effect of at least half a percent, at all positions at
# once. Cells that were not run are grey.
#
# Such a *screen* has a price. It misses a head that helps at one position and does as much harm at
# another.
#
# **Expect** two columns to stand out, S2 and END. Heads that matter at S2 prepare; heads that
# matter at END write the answer, and sit in later layers. What a head looks at is in the figure
# <a href="#attention">above</a>.
#
# This sweep is scored by three metrics at once. The text keeps to the logit difference; a figure at
# the end of the chapter compares them.

# %%
METRICS = ("logit difference", "log-probability", "probability")
tasks = {
    name: task.with_metric(model, name).normalised() for name in METRICS
}
position_sweeps = sweep_metrics(
    model, tasks, HEAD_KINDS, by="pos", where=abs(heads) >= 0.005
)
by_position = position_sweeps["logit difference"]

plots.heatmap(
    by_position.sel(kind="out"),
    title="Clean head outputs patched into the corrupted run, by "
    "position",
)

# %%
notebook.largest(by_position.sel(kind="out"), 8)

# %%
plots.heatmap(by_position)

# %%
notebook.largest(by_position, 8)

# %%
claims = Claims("Heads by position: expected and measured")
placed = effect_sizes(by_position).sel(kind="out")
at_s2, at_end = placed.isel(position=S2), placed.isel(position=END)

claims.check(
    "S2 and END stand out",
    "Of all effects of these heads' outputs, in absolute value, most "
    "lie at these two positions.",
    (at_s2 + at_end).sum(),
    of=placed.sum(),
    at_least=0.7,
)
first, second = (
    placed.layer.weighted(effect.sum("head")).mean()
    for effect in (at_s2, at_end)
)
claims.check(
    "S2 first, END later",
    "Heads that matter at S2 come before those that matter at END: "
    "distance of their mean layers, weighted by effect, as a share of "
    "all layers.",
    (second - first) / depth,
    at_least=0.05,
)
claims.show()

# %% [markdown]
# ## The heads that are known from GPT-2 small
#
# [Wang et al. (2022)](https://arxiv.org/abs/2211.00593) sorted the heads of GPT-2 small by what
# they do:
#
# - **duplicate-token heads** (L0H1, L0H10, L3H0) and **induction heads** (L5H5, L6H9) notice at S2
#   that this name was there before;
# - **S-inhibition heads** (L7H3, L7H9, L8H6, L8H10) carry that to END, and tell the last heads
#   which name *not* to look at;
# - **name movers** (L9H9, L9H6, L10H0) look at the other name and copy it.
#
# Head numbers mean nothing in another model. So these claims are checked where GPT-2 small runs, and
# are listed as not checked elsewhere.

# %%
CIRCUIT = {
    "name mover": ["L9H9", "L9H6", "L10H0"],
    "S-inhibition": ["L7H3", "L7H9", "L8H6", "L8H10"],
    "induction": ["L5H5", "L6H9"],
    "duplicate-token": ["L0H1", "L0H10", "L3H0"],
}
is_gpt2_small = task.model_name in (
    "gpt2-small",
    "gpt2",
    "openai-community/gpt2",
)
claims = Claims(
    "Published heads of GPT-2 small",
    not_checked=""
    if is_gpt2_small
    else "the heads are those of GPT-2 small, and this is "
    f"{task.model_name}",
)
labels = effects.head_label
known = labels.isin(sum(CIRCUIT.values(), []))
others = out.where(~known).mean()


def total(kind, group):
    """All effects of one kind of activation of a group of heads."""
    inside = labels.isin(CIRCUIT[group])
    return effects.sel(kind=kind).where(inside).sum()


for group, factor in (
    ("name mover", 3.0),
    ("S-inhibition", 3.0),
    ("induction", 3.0),
    ("duplicate-token", 1.0),
):
    claims.check(
        f"{group} heads",
        f"{', '.join(CIRCUIT[group])} matter more than heads outside "
        "the circuit do (mean absolute effect of the output, against "
        "theirs).",
        total("out", group) / len(CIRCUIT[group]),
        of=others,
        at_least=factor,
        units="×",
    )
for group, where, effect in (
    ("name mover", "END", at_end),
    ("S-inhibition", "END", at_end),
    ("induction", "S2", at_s2),
    ("duplicate-token", "S2", at_s2),
):
    inside = labels.isin(CIRCUIT[group])
    claims.check(
        f"{group} heads work at {where}",
        f"Most of what their outputs do, they do at {where}.",
        effect.where(inside).sum(),
        of=placed.where(inside).sum(),
        at_least=0.6,
    )
claims.check(
    "name movers look elsewhere",
    "Their patterns matter more than their values (total effects).",
    total("pattern", "name mover"),
    of=total("v", "name mover"),
    at_least=1.0,
    units="×",
)
claims.check(
    "S-inhibition heads carry something else",
    "Their values matter more than their patterns (total effects).",
    total("v", "S-inhibition"),
    of=total("pattern", "S-inhibition"),
    at_least=1.0,
    units="×",
)
claims.show()

# %% [markdown]
# ## Turn the knobs
#
# Choose what to patch and the score; the slider chooses the layer. All of it was computed above, so
# it works without a kernel.

# %%
plots.explore(combine(position_sweeps, dim="metric"))

# %% [markdown]
# ## Patch prompts of your own
#
# In Jupyter or Colab, the cell below opens a panel. Type a clean and a corrupted prompt, and a
# right and a wrong answer. The panel says what does not fit as you type. **Run** starts the sweep
# and **Stop** ends it. Click a cell of the picture, or one of the largest effects, and the numbers of
# that cell appear; arrow keys move from cell to cell. Where heads are patched, one more click shows
# where a head attends, or measures the paths that lead into it. **copy as code** shows the lines that
# repeat what you see.

# %%
from patching_demo.explorer import Panel

Panel(model)

# %% [markdown]
# ## Can you explain it?
#
# <details><summary>A head's output has no effect. Does the model not use it here?</summary>
#
# You may only conclude that what it does *differently* in the two runs does not matter by itself.
# It may do the same thing in both, or another head may do the same work.
#
# </details>
#
# <details><summary>The value of a head matters and its pattern does not. What does the head
# do?</summary>
#
# It looks to the same place in both runs and carries what differs there.
#
# </details>
#
# ## Exercises
#
# **1. Against the answer.** Which head's clean output moves the score furthest *away* from the clean
# run? Put its name into `answer_1`, as in `"L1H2"`.

# %% tags=["exercise"]
answer_1 = None  # your code here

# %% tags=["exercise", "hide-input"]
outputs = heads.sel(kind="out")
exercise_1 = Exercise(
    "Exercise 1",
    lambda name: (
        outputs.where(outputs.head_label == name).min() == outputs.min()
    ),
)
exercise_1.check(answer_1)

# %% tags=["exercise", "hide-cell"]
# Solution of exercise 1
lowest = heads.sel(kind="out").argmin(["layer", "head"])
exercise_1.verify(heads.sel(kind="out").isel(lowest).head_label.item())

# %% [markdown]
# **2. Together.** Shares of single patches need not add up. What do the three strongest heads of
# `leading` bring back when they are patched in *one* run? `patch(model, scored, {"three": parts})`
# does that, with parts such as `("out", 1, 2)` for the output of L1H2. Put the share into `answer_2`.

# %% tags=["exercise"]
answer_2 = None  # your code here


# %% tags=["exercise", "hide-input"]
def of_three(answer):
    parts = [
        ("out", int(head["layer"]), int(head["head"]))
        for head in leading[:3]
    ]
    together = patch(model, scored, {"three": parts})
    return abs(float(answer) - float(together[0])) < 0.01


exercise_2 = Exercise("Exercise 2", of_three)
exercise_2.check(answer_2)

# %% tags=["exercise", "hide-cell"]
# Solution of exercise 2
three = [
    ("out", int(head["layer"]), int(head["head"]))
    for head in leading[:3]
]
together = float(patch(model, scored, {"three": three})[0])
print(
    f"Together {together:.2f}, one by one {float(leading[:3].sum()):.2f}"
)
exercise_2.verify(together)

# %% [markdown]
# Next: [Patching induction heads](03_induction_patching.ipynb).
