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
# # Your own prompts, and how sure you may be
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/patching-demo/patching-demo/blob/main/notebooks/06_your_own_prompts.ipynb)
#
# Eight prompts of one length are a fine start. Yet your own question comes with prompts of several
# lengths, and with answers of more than one token. And a mean over eight prompts may be luck.
#
# This chapter goes from two sentences to a hundred, and puts an interval around every number:
#
# 1. two sentences that you type, and **roles** that name the places in them;
# 2. the same question in a **chat**;
# 3. a **table** of prompts, and a set of countries and their capitals;
# 4. a hundred indirect-object prompts, in **both orders** of the names;
# 5. chapter 2's claims again, each with its **interval**.
#
# From earlier chapters you need three things. A patch is scored as a
# [share](01_setup.ipynb) of clean minus corrupted. On indirect objects, the information moves
# [from S2 to END](02_ioi_patching.ipynb). The [choice of corrupted
# input](04_changing_the_corrupted_baseline.ipynb) is the choice of question.
#
# In Colab, choose a GPU before you start: **Runtime > Change runtime type**.

# %% tags=["hide-input"]
# Installs the package where it is not there yet, as in Colab.
import importlib.util

if importlib.util.find_spec("patching_demo") is None:
    print("Installing patching-demo")
    # %pip install --quiet "patching-demo @ git+https://github.com/patching-demo/patching-demo"

# %%
import io

import numpy as np
import pandas as pd
import xarray as xr
from IPython.display import display
from patching_demo import (
    Task,
    capital_task,
    combine,
    interval,
    ioi_task,
    notebook,
    plots,
    prompt_task,
    share,
    sweep,
)
from patching_demo.claims import Claims, Exercise
from patching_demo.results import top_head

notebook.setup()

# %% tags=["parameters"]
MODEL = "auto"

# %%
model = notebook.model(MODEL)
depth = model.cfg.n_layers
# Every second layer is enough to see where the stream has its step.
LAYERS = np.arange(0, depth, 2)
early, late = LAYERS < depth // 4, LAYERS >= depth - depth // 4

# %% [markdown]
# ## Two sentences
#
# France and New Zealand have names of different lengths. So the two prompts below do not line up,
# and position 6 of one is another word than position 6 of the other. A sweep by position refuses
# such a pair.
#
# A **role** names a place by the text that ends there. Here `subject` is the last token of the
# country. Every task has a role END as well, the last token of the prompt. A patch by role copies
# from the role's place in the clean prompt to its place in the corrupted one.

# %%
pair = prompt_task(
    model,
    "The capital of France is",
    "The capital of New Zealand is",
    (" Paris", " Wellington"),
    roles={"subject": ("of France", "of New Zealand")},
)
print(pair)
plots.tokens_table(pair)

# %% [markdown]
# The sweep has a row for each layer, and a column for each role. **Expect** what chapter 2 found for
# names: early on the subject holds the answer, and late in the model END does.

# %%
first = sweep(model, pair.normalised(), "resid_pre", by="role")
plots.heatmap(
    first, title="Clean residual stream patched into the other country"
)

# %%
notebook.largest(first)

# %% [markdown]
# Change the sentences, the roles and the answers, and run these cells again. What does not fit is
# refused, with the tokens and the way out.
#
# ## The same question in a chat
#
# A model that was trained to chat expects its turns to be marked. `chat=True` puts each prompt into
# the tokenizer's own template, as what a user says. The answer then stands at the start of a reply,
# without a space before it.

# %%
if getattr(model.tokenizer, "chat_template", None) is not None:
    chat = prompt_task(
        model,
        "What is the capital of France? Answer in one word.",
        "What is the capital of New Zealand? Answer in one word.",
        ("Paris", "Wellington"),
        roles={"subject": ("of France", "of New Zealand")},
        chat=True,
    )
    display(plots.tokens_table(chat))
    notebook.say(
        "As a sentence, the model prefers Paris by "
        f"{pair.clean_baseline:.2f} on the clean prompt and by "
        f"{pair.corrupted_baseline:.2f} on the corrupted one; in the "
        f"chat, by {chat.clean_baseline:.2f} and by "
        f"{chat.corrupted_baseline:.2f}."
    )
else:
    notebook.say(
        f"The tokenizer of {pair.model_name} has no chat template, so "
        "there is nothing to show here."
    )

# %% [markdown]
# ## A table of prompts
#
# More prompts come from a table, such as a CSV file: one row for each pair, with the columns clean,
# corrupted, right and wrong. Each further column is a role. Where a role is another text in the
# corrupted prompt, that text stands in a column whose name ends in `_corrupted`.

# %%
CSV = """clean,corrupted,right,wrong,word,word_corrupted
The opposite of hot is,The opposite of high is, cold, low,hot,high
The opposite of big is,The opposite of rich is, small, poor,big,rich
Up is not down. Old is not,Up is not down. Dry is not, new, wet,Old,Dry
It is no longer dry but,It is no longer full but, wet, empty,dry,full
"""
frame = pd.read_csv(io.StringIO(CSV))
opposites = Task.from_frame(model, frame)
print(opposites)

# %% [markdown]
# A row that cannot form a pair raises an error that names it.
#
# ## Countries and capitals
#
# The package brings a set of countries in three templates. Nothing in it has one length: not the
# templates, not the countries, and not the capitals. An answer of several tokens is scored by the
# log-probability of all of them, right minus wrong.
#
# A prompt that the model gets wrong says little about how it gets others right. So the first step
# is to **keep what the model solves**.

# %%
capitals = capital_task(model, n=24)
solved = capitals.solved()
plots.tokens_table(solved, rows=3)

# %% tags=["remove-input"]
lengths = solved.lengths.tolist()
notebook.say(
    f"The {len(solved)} prompts that are left have from {min(lengths)} "
    f"to {max(lengths)} tokens, their answers included up to the last "
    "token but one."
)

# %% [markdown]
# With `per_prompt=True` a sweep keeps one value for each prompt. Then `interval` draws as many
# prompts again and again, with replacement, and asks how far the mean moves. What it returns is the
# mean, with a lower and an upper bound between which nineteen of twenty draws lie. The hover of each
# cell shows them.
#
# **Expect** the same two columns as for the single pair. And **expect** less than all at END in the
# last layers. There the patch settles the first token of the answer. The tokens after it are read
# at places of their own, and these still have the other country to look at.

# %%
by_prompt = sweep(
    model,
    solved,
    "resid_pre",
    by="role",
    layers=LAYERS,
    per_prompt=True,
)
countries = interval(share(by_prompt))
plots.heatmap(
    countries,
    title="Clean residual stream patched into another country's prompt",
)

# %%
notebook.largest(countries)

# %% [markdown]
# The same as curves. The bands are the intervals.

# %%
plots.curves(
    countries,
    along="layer",
    title="Countries: the stream at the subject and at END",
    caption="Each point is the share of clean minus corrupted that a "
    "patch of the stream before a layer brings back; bands are "
    "intervals by bootstrap over prompts.",
)

# %%
claims = Claims("Countries and capitals: expected and measured")
subject, end = (
    interval(
        share(
            by_prompt.sel(role=role)[:, part].mean(
                "layer", keep_attrs=True
            )
        )
    )
    for role, part in (("subject", early), ("END", late))
)
claims.check(
    "early, the subject has it",
    "In the first quarter of the layers, the stream at the last token "
    "of the country brings back most (mean).",
    subject,
    at_least=0.5,
    by_bound=True,
)
claims.check(
    "late, END has it",
    "In the last quarter, the stream at END brings back a good part "
    "(mean).",
    end,
    at_least=0.3,
    by_bound=True,
)
claims.check(
    "but not all of it",
    "The later tokens of an answer are read elsewhere, so even in the "
    "last quarter END brings back less than everything (mean).",
    end,
    at_most=0.95,
    by_bound=True,
)
claims.check(
    "early, END does not",
    "Before the first layer, END holds the same word in both prompts; "
    "largest share in the first quarter.",
    abs(countries.sel(role="END")[early]).max(),
    at_most=0.2,
)
claims.show()

# %% [markdown]
# The first three were decided by the bound of the interval, not by the mean. Such a claim holds for
# other prompts of this kind as well, as far as these prompts are a fair sample of them.
#
# ## A hundred indirect objects, in both orders
#
# In *When John and Mary went ..., John gave*, the right name stands second. Turn the first two
# around, and it stands first. The two orders are called BABA and ABBA, after the order of the names:
# A is the right one. A model could solve one of them by position alone, "name the one that came
# first". A fair set has both.
#
# `ioi_task` draws as many prompts as you ask for. Names, places and things are single tokens for
# this tokenizer, and the templates have several lengths. The roles are IO, S1 and S2, the places of
# the three names, and END.

# %%
hundred = ioi_task(model, n=100)
kept = hundred.solved()
plots.tokens_table(kept, rows=4)

# %%
abba = (kept.roles["IO"][0] < kept.roles["S1"][0]).numpy()

# %% tags=["remove-input"]
notebook.say(
    f"Of the prompts that are kept, {abba.sum()} are ABBA and "
    f"{(~abba).sum()} BABA. Their mean logit difference is "
    f"{kept.clean_values.numpy()[abba].mean():.2f} and "
    f"{kept.clean_values.numpy()[~abba].mean():.2f}."
)

# %% [markdown]
# Two questions at once, about the stream and about what attention and MLPs add to it at END. A mask
# for `where` says which cells are asked for, and one sweep of three kinds runs the prompts once. The
# eight prompts of chapter 2 are asked the same; we come back to their numbers below. Values of the
# hundred stay logit differences, and become shares afterwards: so any part of the prompts can have
# baselines of its own.
#
# **Expect** chapter 2's staircase with S2 and END for its two columns. IO and S1 come before the
# first difference, so there is nothing to patch.

# %%
KINDS = ["resid_pre", "attn_out", "mlp_out"]
cell = xr.Dataset(
    coords={
        "kind": KINDS,
        "layer": np.arange(depth),
        "role": list(kept.roles),
    }
)
wanted = xr.where(
    cell.kind == "resid_pre",
    cell.layer.isin(LAYERS),
    cell.role == "END",
)
eight = ioi_task(model).normalised()
few = sweep(model, eight, KINDS, by="role", where=wanted)
many = sweep(
    model, kept, KINDS, by="role", where=wanted, per_prompt=True
)
stream = many.sel(kind="resid_pre", layer=LAYERS)
sure = interval(share(stream))
plots.heatmap(
    sure,
    title=f"Clean residual stream patched by role, {len(kept)} prompts",
)

# %%
notebook.largest(sure)

# %% [markdown]
# What do attention and MLPs add at END? **Expect** attention to stand out in some layers near the
# step, and MLPs to do less.

# %%
outputs = many.sel(kind=KINDS[1:], role="END")
plots.curves(
    interval(share(outputs)),
    along="layer",
    title="Clean attention and MLP outputs patched at END",
    caption="Each point is the share of clean minus corrupted that one "
    "layer's output brings back at END; bands are intervals by "
    "bootstrap over prompts.",
)

# %% [markdown]
# Now heads. `positions` keeps a sweep to some of the roles. The eight prompts of chapter 2 screen all
# heads at END, and the hundred measure the 24 that look largest. A head that eight prompts have
# missed stays missed: that is the price.

# %%
screened = sweep(model, eight, "out", by="role", positions=["END"]).sel(
    role="END"
)
least = np.sort(abs(screened), axis=None)[-24]
heads = sweep(
    model,
    kept,
    "out",
    by="role",
    positions=["END"],
    where=abs(screened) >= least,
    per_prompt=True,
).sel(role="END")
at_end = interval(share(heads))
notebook.largest(at_end, 8)

# %% [markdown]
# Does the order of the names matter to them? Take the prompts of each order by themselves, with
# their own baselines. **Expect** the strongest heads to work in both: they read a name, wherever it
# stands.


# %%
def chosen(result, prompts):
    """Some of the prompts, as shares of their own clean minus corrupted."""
    part = result.isel(prompt=prompts)
    return share(
        part.assign_attrs(
            clean_baseline=float(part.clean_baseline.mean()),
            corrupted_baseline=float(part.corrupted_baseline.mean()),
        )
    )


ORDERS = {"ABBA": abba, "BABA": ~abba}
by_order = combine(
    {
        name: interval(chosen(heads, which))
        for name, which in ORDERS.items()
    },
    dim="order",
)
truth = at_end.stack(cell=("layer", "head"))
strongest = truth.isel(cell=np.argsort(-abs(truth.values))[:6])
lined_up = (
    by_order.stack(cell=("layer", "head"))
    .sel(cell=strongest.cell)
    .reset_index("cell")
    .swap_dims(cell="head_label")
    .rename(head_label="strongest heads")
)
plots.bars(
    lined_up,
    along="strongest heads",
    title="The strongest heads at END, in both orders of the names",
    caption="Each bar is the share that one head's clean output brings "
    "back at END; colours are orders, and whiskers intervals by "
    "bootstrap over prompts.",
)

# %% [markdown]
# ## Which of chapter 2's claims survive
#
# Chapter 2 made its claims on eight prompts. Here are the numbers behind eight of them, by role: from
# those eight prompts, and from the hundred.


# %%
ROLES = list(kept.roles)
S2, END = ROLES.index("S2"), ROLES.index("END")


def numbers(stream, outputs, heads):
    """What chapter 2's claims are about, from arrays of shares.

    Axes are layer and role; kind and layer; layer and head.
    """
    ahead = stream[:, END] > stream[:, S2]
    step = LAYERS[ahead.argmax()] if ahead.any() else depth
    attention, mlp = outputs
    return {
        "early, S2 has it": stream[early, S2].mean(),
        "early, END does not": abs(stream[early, END]).max(),
        "late, S2 no longer has it": abs(stream[late, S2]).mean(),
        "late, END has it": stream[late, END].mean(),
        "attention brings it to END": attention.max(),
        "it does so at the step": abs(abs(attention).argmax() - step)
        / depth,
        "MLPs do less at END": abs(mlp).sum() / abs(attention).sum(),
        "one head is felt": np.nanmax(heads),
    }


# The thresholds of chapter 2: at least, or at most, so much.
AT_LEAST = {
    "early, S2 has it": 0.8,
    "late, END has it": 0.5,
    "attention brings it to END": 0.1,
    "one head is felt": 0.1,
}
AT_MOST = {
    "early, END does not": 0.1,
    "late, S2 no longer has it": 0.3,
    "it does so at the step": 0.25,
    "MLPs do less at END": 0.75,
}

# %%
of_eight = numbers(
    few.sel(kind="resid_pre", layer=LAYERS).values,
    few.sel(kind=KINDS[1:], role="END").values,
    screened.values,
)


def on(prompts):
    """The numbers on the means over some of the prompts."""
    corrupted, clean = (
        stream[name].values[prompts].mean()
        for name in ("corrupted_baseline", "clean_baseline")
    )
    return numbers(
        *(
            (result.values[prompts].mean(0) - corrupted)
            / (clean - corrupted)
            for result in (stream, outputs, heads)
        )
    )


of_hundred = on(np.arange(len(kept)))
rng = np.random.default_rng(0)
drawn = pd.DataFrame(
    on(rng.integers(len(kept), size=len(kept))) for _ in range(1000)
)
low, high = drawn.quantile(0.025), drawn.quantile(0.975)

# %% [markdown]
# `interval` gives the bounds of a mean. For a largest value, a ratio or a layer, the same idea works
# by hand: draw the prompts again, compute the number again, and look between which bounds nineteen of
# twenty draws lie.
#
# A claim *survives* if both bounds satisfy it. It is *open* if its threshold lies between them.
#
# One caution: a largest value, or one made of absolute values, grows with noise, and each redraw adds
# some. Where the number itself lies at the edge of its interval, or outside, that is the reason.

# %%
rows = []
for name in of_hundred:
    least, most = AT_LEAST.get(name, -np.inf), AT_MOST.get(name, np.inf)
    required = f"≥ {least:.0%}" if name in AT_LEAST else f"≤ {most:.0%}"
    ends = [least <= bound <= most for bound in (low[name], high[name])]
    rows.append(
        {
            "claim": name,
            "verdict": "survives"
            if all(ends)
            else "open"
            if any(ends)
            else "falls",
            "required": required,
            "of 8": f"{of_eight[name]:.1%}",
            "held": "yes" if least <= of_eight[name] <= most else "no",
            f"of {len(kept)}": f"{of_hundred[name]:.1%}",
            "interval": f"{low[name]:.1%} to {high[name]:.1%}",
            "8 inside": "yes"
            if low[name] <= of_eight[name] <= high[name]
            else "no",
        }
    )
verdicts = pd.DataFrame(rows).set_index("claim")
plots.table(
    verdicts.drop(columns="held"),
    "Chapter 2's claims on all prompts that are kept: the last column says "
    "whether the number from eight prompts lies inside the interval.",
)

# %% tags=["remove-input"]
survive = verdicts.index[verdicts.verdict == "survives"]
luck = verdicts.index[
    (verdicts.held == "yes") & (verdicts.verdict != "survives")
]
notebook.say(
    f"Of {len(verdicts)} claims, **{len(survive)}** survive. "
    + (
        "Held on the eight prompts, and are open or fall on the "
        f"hundred: **{', '.join(luck)}**. "
        if len(luck)
        else "None that held on the eight prompts is in doubt. "
    )
    + f"The number from eight prompts lies outside the interval for "
    f"{(verdicts['8 inside'] == 'no').sum()} of them: a claim may "
    "survive while its number does not."
)

# %% [markdown]
# ## What eight prompts cannot tell
#
# Take eight of the prompts at random, a thousand times, and ask each time which head matters most at
# END. **Expect** several names. And **expect** the winner to look better than it is: the largest of
# many noisy numbers is also the luckiest.

# %%
cells = heads.stack(cell=("layer", "head"))
eights = rng.permuted(np.tile(np.arange(len(kept)), (1000, 1)), axis=1)[
    :, :8
]
clean, corrupted = (
    heads[name].values[eights].mean(1, keepdims=True)
    for name in ("clean_baseline", "corrupted_baseline")
)
small = (cells.values[eights].mean(1) - corrupted) / (clean - corrupted)
winners = np.nanargmax(small, axis=1)
labels = truth.head_label.values
wins = pd.Series(labels[winners]).value_counts(normalize=True)
plots.bars(
    xr.DataArray(
        wins.values[:8],
        dims="strongest head",
        coords={"strongest head": wins.index[:8]},
        attrs={
            "clean_baseline": 1.0,
            "corrupted_baseline": 0.0,
            "clean_name": "all",
            "corrupted_name": "none",
            "metric": "share of draws",
            "units": "",
        },
    ),
    along="strongest head",
    title="Which head is strongest, by eight prompts",
    caption="Each bar is the share of a thousand draws of eight "
    "prompts in which this head brings back most at END.",
)

# %%
best = top_head(at_end)
SIZES = [*(n for n in (4, 8, 16, 32, 64) if n < len(kept)), len(kept)]
grown = [
    interval(
        chosen(heads, np.arange(n)).sel(
            layer=best["layer"], head=best["head"]
        )
    )
    for n in SIZES
]
growth = xr.DataArray(
    [float(cell) for cell in grown],
    dims="prompts",
    coords={
        "prompts": SIZES,
        "low": ("prompts", [float(cell.low) for cell in grown]),
        "high": ("prompts", [float(cell.high) for cell in grown]),
    },
    attrs={**grown[0].attrs, "prompts": ""},
)
plots.bars(
    growth,
    along="prompts",
    title=f"{best.head_label.item()} at END, from more and more "
    "prompts",
    caption="Each bar is the share that this head brings back, from "
    "the first so many prompts; whiskers are intervals by bootstrap "
    "over them.",
)

# %%
claims = Claims("How sure one may be: expected and measured")
claims.check(
    "most claims survive",
    "Of these claims of chapter 2, most hold on all prompts, at both "
    "ends of the interval.",
    len(survive) / len(verdicts),
    at_least=0.6,
)
for name, role, part, threshold in (
    ("early, S2 has it", "S2", early, 0.8),
    ("late, END has it", "END", late, 0.5),
):
    cell = stream.sel(role=role)[:, part]
    claims.check(
        name,
        "As chapter 2 has it, and decided by the bound of the interval.",
        interval(share(cell.mean("layer", keep_attrs=True))),
        at_least=threshold,
        by_bound=True,
    )
both = [
    by_order.sel(layer=best["layer"], head=best["head"], order=order)
    for order in ORDERS
]
for order, cell in zip(ORDERS, both, strict=True):
    claims.check(
        f"the strongest head works on {order}",
        f"{best.head_label.item()} brings back a part in this order "
        "of the names as well.",
        cell,
        at_least=0.05,
        by_bound=True,
    )
gained = small[np.arange(len(small)), winners] - truth.values[winners]
claims.check(
    "the winner of eight looks too good",
    "The head that is strongest on eight prompts brings back more on "
    "them than on the hundred (mean over draws).",
    gained.mean(),
    at_least=0.002,
)
claims.show()

# %% [markdown]
# So what does an interval say, and what not?
#
# - It speaks of prompts *like these*: the same templates, the same kinds of names. Of other templates
#   it says nothing.
# - It treats prompts as independent draws. Chapter 2's eight are not: within a pair, each corrupts
#   the other. Their interval would look surer than it is.
# - It is made for one cell. Of many cells, some lie outside theirs by chance.
#
# ## Can you explain it?
#
# <details><summary>A cell's interval is far above zero. May you conclude that the patch helps on
# every prompt?</summary>
#
# No, only that the mean over such prompts is above zero. The values of single prompts may lie on
# both sides: look at a sweep with <code>per_prompt=True</code>.
#
# </details>
#
# <details><summary>You keep only prompts that the model solves. What does that do to the
# result?</summary>
#
# It is now about cases in which the mechanism worked. How often it works, and what goes wrong
# elsewhere, it cannot say. So report how many were left out.
#
# </details>
#
# <details><summary>Two heads have intervals that overlap. Do they matter equally?</summary>
#
# Not necessarily. Both are measured on the same prompts, so take the difference for each prompt, and
# the interval of that.
#
# </details>
#
# ## Exercises
#
# **1. Both orders.** By how much does the model prefer the right name more in ABBA than in BABA? Take
# all prompts of `hundred`, the unsolved ones too, and put the difference of the two mean logit
# differences into `answer_1`.

# %% tags=["exercise"]
answer_1 = None  # your code here

# %% tags=["exercise", "hide-input"]
first_is_io = np.arange(len(hundred)) % 2 == 0
by_hand = hundred.clean_values.numpy()
exercise_1 = Exercise(
    "Exercise 1",
    lambda answer: (
        abs(
            float(answer)
            - by_hand[first_is_io].mean()
            + by_hand[~first_is_io].mean()
        )
        < 0.001
    ),
)
exercise_1.check(answer_1)

# %% tags=["exercise", "hide-cell"]
# Solution of exercise 1
io, s1 = hundred.roles["IO"][0], hundred.roles["S1"][0]
values = hundred.clean_values
exercise_1.verify(values[io < s1].mean() - values[io > s1].mean())

# %% [markdown]
# **2. Are two heads different?** Compare the two strongest heads at END, prompt by prompt. `heads`
# holds logit differences. Put the lower bound of the interval of the better one minus the other into
# `answer_2`, in logits and at the default level.

# %%
two = [strongest.isel(cell=i).head_label.item() for i in (0, 1)]
print("The two heads:", " and ".join(two))

# %% tags=["exercise"]
answer_2 = None  # your code here

# %% tags=["exercise", "hide-input"]
one, other = (
    cells.isel(cell=i)
    for i in (labels == two[0]).nonzero()[0].tolist()
    + (labels == two[1]).nonzero()[0].tolist()
)
exercise_2 = Exercise(
    "Exercise 2",
    lambda answer: (
        abs(float(answer) - float(interval(one - other).low)) < 0.001
    ),
)
exercise_2.check(answer_2)

# %% tags=["exercise", "hide-cell"]
# Solution of exercise 2
at = [
    {"layer": int(cell["layer"]), "head": int(cell["head"])}
    for cell in (strongest.isel(cell=0), strongest.isel(cell=1))
]
difference = heads.sel(at[0]) - heads.sel(at[1])
exercise_2.verify(interval(difference).low)

# %% [markdown]
# Next: [From heads to a circuit](07_from_heads_to_a_circuit.ipynb).
