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
from IPython.display import display

from patching_demo import chapter_claims, combine, ioi_task, notebook, plots
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
# Averaging over both prompts of a pair has a purpose. Whatever favours one name over the other,
# because it is more frequent, say, counts once for and once against the right answer, and drops
# out.
#
# The answers are single tokens with their leading space. The first of each pair below is right for
# the clean prompt.

# %%
for prompt, (right, wrong) in zip(task.clean_strings, task.answers.tolist(), strict=True):
    names = [model.tokenizer.decode([token]) for token in (right, wrong)]
    print(
        f"{names[0]!r:>10} ({right:>5}) rather than {names[1]!r:>10} ({wrong:>5}):",
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
for name, tokens in (("clean", task.clean_tokens), ("corrupted", task.corrupted_tokens)):
    value = round(scored.metric(model(tokens)).item(), 4) + 0.0  # no minus sign before a zero
    print(f"Normalised, {name} run: {value:.4f}")

# %% [markdown]
# A value of 0.3 means: this one patch moves the logit difference 30 % of the way from corrupted to
# clean. Values below 0 move it further away. Values above 1 overshoot.
#
# Every sweep below is scored by three metrics at once, as that costs little more than one. The
# text uses the logit difference; the figure at the end of the chapter lets you compare.

# %%
METRICS = ("logit difference", "log-probability", "probability")
tasks = {name: task.with_metric(model, name).normalised() for name in METRICS}

# %% [markdown]
# ## Where: the residual stream
#
# Patch the residual stream as it enters each layer, one position at a time.
#
# **Expect** a staircase. The prompts differ at S2, so early on, S2 holds the whole difference. The
# answer is read off at END, so at last END must hold it. Somewhere in between it moves. All
# positions before S2 are the same in both runs; they are hatched, as there is nothing to patch.

# %%
BLOCK_KINDS = ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"]
block_sweeps = sweep_metrics(model, tasks, BLOCK_KINDS)
blocks = block_sweeps["logit difference"]

# %% tags=["figure-headline"]
plots.heatmap(
    blocks.sel(kind="resid_pre"), title="Clean residual stream patched into the corrupted run"
)

# %%
notebook.largest(blocks.sel(kind="resid_pre"))

# %%
S2, END = chapter_claims.positions_of(blocks)
cross = chapter_claims.crossing(blocks.sel(kind="resid_pre"))

# %% tags=["remove-input"]
notebook.say(
    f"On {task.model_name} the information leaves S2 and arrives at END around layer **{cross}** "
    f"of {model.cfg.n_layers}: from there on, END brings back more than S2."
)

# %% [markdown]
# ## What kind of part: attention or MLP
#
# The residual stream is a sum. Each layer adds the output of its attention, and then that of its
# MLP. Patching the *stream* asks what has gathered up to here. Patching an *output* asks what this
# layer adds.
#
# First the stream in the middle of each layer, after attention and before the MLP. **Expect** the
# same staircase, as only one part lies between the two.

# %%
plots.heatmap(
    blocks.sel(kind="resid_mid"),
    title="Clean residual stream after attention patched into the corrupted run",
)

# %%
notebook.largest(blocks.sel(kind="resid_mid"))

# %% [markdown]
# Now attention outputs. Only attention can carry anything from one position to another. So
# **expect** attention at END to matter just where the staircase has its step.

# %%
plots.heatmap(
    blocks.sel(kind="attn_out"), title="Clean attention outputs patched into the corrupted run"
)

# %%
notebook.largest(blocks.sel(kind="attn_out"))

# %% [markdown]
# And MLP outputs. An MLP works at one position by itself. So **expect** MLPs to matter at S2 in the
# first layers, where they prepare the name, and to do less than attention at END.

# %%
plots.heatmap(blocks.sel(kind="mlp_out"), title="Clean MLP outputs patched into the corrupted run")

# %%
notebook.largest(blocks.sel(kind="mlp_out"))

# %% tags=["remove-input"]
notebook.say(
    "At S2, the MLP of the very first layer brings back "
    f"{float(blocks.sel(kind='mlp_out', layer=0).isel(position=S2)):.0%}. Only one attention "
    "stands before it, so it reads little more than the token itself."
)

# %% [markdown]
# All of them side by side, with one colour scale: the stream before a layer (`resid_pre`), what its
# attention adds (`attn_out`), the stream between (`resid_mid`), what its MLP adds (`mlp_out`), and
# the stream after the layer (`resid_post`), which is the stream before the next one.

# %%
plots.heatmap(blocks, title="Clean activations of every block kind patched into the corrupted run")

# %%
chapter_claims.ioi_blocks(blocks).show()

# %% [markdown]
# ## Which: single heads
#
# The attention output of a layer is the sum of its heads. Patch the output of one head, at all
# positions at once. **Expect** a handful of heads to carry most of the effect, and many to carry
# none.

# %%
HEAD_KINDS = ["out", "q", "k", "v", "pattern"]
head_sweeps = sweep_metrics(model, tasks, HEAD_KINDS, by="all_pos")
heads = head_sweeps["logit difference"]

plots.heatmap(heads.sel(kind="out"), title="Clean head outputs patched into the corrupted run")

# %%
notebook.largest(heads.sel(kind="out"), 8)

# %% [markdown]
# Orange heads move the answer *away* from the clean one: with their clean output the corrupted run
# does worse. In GPT-2 small such heads have been described as *negative name movers*.
#
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
# **expect** its query to matter too, as that is what made it another one.

# %%
for kind, what in (("q", "queries"), ("k", "keys"), ("v", "values"), ("pattern", "patterns")):
    part = heads.sel(kind=kind)
    plots.heatmap(part, title=f"Clean {what} patched into the corrupted run").show()
    display(notebook.largest(part, 4))

# %% [markdown]
# Every kind at once, with one colour scale. Where several query heads share one key and one value,
# there are fewer keys and values to patch than heads; the missing ones are grey.

# %%
plots.heatmap(heads)

# %%
notebook.largest(heads, 8)

# %% tags=["remove-input"]
shared = model.cfg.n_heads // heads.attrs["n_key_value_heads"]
by_pattern = chapter_claims.strong_heads(heads.sel(kind="pattern"))
by_value = chapter_claims.strong_heads(heads.sel(kind="v"))
notebook.say(
    f"On {task.model_name}, the heads that bring back most by where they look are "
    f"**{', '.join(by_pattern)}**; by what they carry, **{', '.join(by_value)}**."
    + (
        f" In this model {shared} query heads in a row share one key and one value. Keys and "
        f"values are numbered by themselves: number 1 serves heads {shared} to {2 * shared - 1}."
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
plots.attention_patterns(
    model,
    task.clean_tokens,
    chapter_claims.heads_to_look_at(heads),
    task.position_labels,
    title="Where the strongest heads look, in the clean run",
)

# %% tags=["remove-input"]
for kind, what in (("out", "output"), ("pattern", "pattern")):
    layer, head = chapter_claims.top_head(heads.sel(kind=kind))
    where = {
        name: chapter_claims.most_attended(model, task, layer, head, place)
        for name, place in (("S2", S2), ("END", END))
    }
    notebook.say(
        f"**L{layer}H{head}**, the strongest head by {what}, looks most at "
        + " and ".join(
            f"`{label}` from {name} ({share:.0%} of its attention)"
            for name, (label, share) in where.items()
        )
        + "."
    )

# %%
chapter_claims.ioi_heads(heads).show()

# %% [markdown]
# ## Where, for every head
#
# Finally each head at each position: rows are heads, columns positions. The longest figure of the
# book is trimmed to the rows with the largest effects; a button shows the rest.
#
# **Expect** two columns to stand out, S2 and END. Heads that matter at S2 prepare; heads that
# matter at END write the answer, and sit in later layers. What a head looks at is in the figure
# <a href="#attention">above</a>.

# %%
position_sweeps = sweep_metrics(model, tasks, HEAD_KINDS, by="pos")
by_position = position_sweeps["logit difference"]

plots.heatmap(
    by_position.sel(kind="out"),
    title="Clean head outputs patched into the corrupted run, by position",
)

# %%
notebook.largest(by_position.sel(kind="out"), 8)

# %%
plots.heatmap(by_position)

# %%
notebook.largest(by_position, 8)

# %%
chapter_claims.ioi_positions(by_position).show()

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
# The numbers of heads mean nothing in another model. So these claims are checked where GPT-2 small
# runs, and are listed as not checked elsewhere.

# %%
chapter_claims.gpt2_small_heads(heads, by_position).show()

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
# and **Stop** ends it. Click one of the largest effects, or choose a layer and a position, and the
# numbers of that cell appear. **copy as code** gives the lines that repeat the sweep.

# %%
from patching_demo.explorer import explore

explore(model)

# %% [markdown]
# ## Can you say it?
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
# Next: [Patching induction heads](03_induction_patching.ipynb).
