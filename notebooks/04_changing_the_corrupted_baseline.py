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
# # Changing the corrupted baseline
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/patching-demo/patching-demo/blob/main/notebooks/04_changing_the_corrupted_baseline.ipynb)
#
# The last chapter ended on a warning: a patch only shows what differs between the two inputs. So
# **the choice of corrupted input is the choice of question** ([Zhang and Nanda,
# 2024](https://arxiv.org/abs/2309.16042)).
#
# Here is the same model with the same clean input, AA, and four corrupted ones. The induction
# heads do the work. Which of their queries, keys, values, patterns and outputs seem to matter?
# Each time the answer is different, and each time you can predict it.
#
# From [the last chapter](03_induction_patching.ipynb) you need two things. An induction head finds
# where the current token stood before, and copies the token after it. The score is the mean
# log-probability of A's tokens in the second half.
#
# In Colab no GPU is needed for this chapter; the model is tiny.

# %% tags=["hide-input"]
# Installs the package where it is not there yet, as in Colab.
import importlib.util

if importlib.util.find_spec("patching_demo") is None:
    print("Installing patching-demo")
    # %pip install --quiet "patching-demo @ git+https://github.com/patching-demo/patching-demo"

# %%
import pandas as pd
from patching_demo import (
    combine,
    induction_task,
    interval,
    notebook,
    plots,
    share,
    sweep,
)
from patching_demo.claims import Claims, Exercise
from patching_demo.results import top_head
from patching_demo.sweeps import sweep_metrics

notebook.setup()

# %% tags=["parameters"]
MODEL = "auto"

# %%
model = notebook.model(MODEL, "induction")

# %% [markdown]
# ## Four ways to spoil a repetition
#
# A, B and C are random sequences without a token in common. The clean input is always `BOS A A`.
#
# | corrupted | first half | second half | what is gone |
# |---|---|---|---|
# | **AB** | A, intact | B | the question: the head looks for tokens of B |
# | **BA** | B | A, intact | the place: nothing answers, and the values are B's |
# | **BB** | B | B | nothing of the mechanism, only the content |
# | **BC** | B | C | everything |
#
# The score is that of the last chapter, in nats.

# %%
tasks = {
    name: induction_task(model, corrupted=name)
    for name in ("AB", "BA", "BB", "BC")
}

rows = [
    (name, t.clean_baseline, t.corrupted_baseline)
    for name, t in tasks.items()
]
plots.table(
    pd.DataFrame(
        rows,
        columns=[
            "corrupted input",
            "clean baseline",
            "corrupted baseline",
        ],
    ),
    "Mean log-probability of A's tokens, in nats, without any patch.",
)

# %% tags=["remove-input"]
guess, wrong = (
    tasks["BC"].corrupted_baseline,
    tasks["BB"].corrupted_baseline,
)
notebook.say(
    "Look at BB. With BC, where there is nothing to copy, the model "
    f"can only guess: {guess:.2f} nats. With BB it scores {wrong:.2f}, "
    "**worse than guessing**. The mechanism works, and copies B with "
    "confidence where we ask for A. Keep this in mind: under BB a "
    "patch can raise the score by merely *breaking* the copying."
)

# %% [markdown]
# ## What to expect
#
# Think of an induction head as a question and an answer. The **query** asks, from the second half.
# The **key** is what the first half offers to be found by. Both make the **pattern**, where the
# head looks. The **value** is what it finds there. Together they make the **output**.
#
# A patch of one kind brings the score back if everything *else* that the head needs is still
# right.

# %%
EXPECTED = pd.DataFrame(
    {
        "AB": {
            "q": "yes: it is all that was wrong",
            "k": "no: right already",
            "v": "no: right already",
            "pattern": "yes: it points to intact values",
        },
        "BA": {
            "q": "no: right already, but nothing answers it",
            "k": "no: it only points to B's values",
            "v": "no: nobody looks there",
            "pattern": "no: it points to B's values",
        },
        "BB": {
            "q": "no: it finds no key",
            "k": "no: nothing asks for it",
            "v": "yes: the head looks there already, and finds A",
            "pattern": "no: right already",
        },
        "BC": {
            "q": "no: it finds no key",
            "k": "no: nothing asks for it",
            "v": "no: nobody looks there",
            "pattern": "no: it points to B's values",
        },
    }
)
WORDS = {"q": "query", "k": "key", "v": "value", "pattern": "pattern"}
plots.table(
    EXPECTED.rename(index=WORDS).T.rename_axis("corrupted"),
    "Does a clean patch of this kind bring the score back?",
)

# %% [markdown]
# The **output** is not in the table, as there the answer is always yes. It is what the rest of the model
# reads, whatever went wrong before it. For that reason it tells you least about *how* the head
# works.
#
# Some of these *no* are worse than nothing. Under BA, a clean key or pattern makes the head look to
# the right place. B stands there, and the head copies it. So **expect** some of these patches to
# *lower* the score. **Expect** the same of an output in layer 0. The keys are made from it, so with
# a clean one the tokens of B are found where tokens of A are looked for.

# %% [markdown]
# ## What the runs show

# %%
KINDS = ["out", "q", "k", "v", "pattern"]
metrics = ("log-probability", "probability")
measured = {
    name: sweep_metrics(
        model,
        {m: task.with_metric(model, m) for m in metrics},
        KINDS,
        by="all_pos",
    )
    for name, task in tasks.items()
}
results = {
    name: by_metric["log-probability"]
    for name, by_metric in measured.items()
}
together = combine(results)

plots.heatmap(
    together,
    title="Clean activations of heads patched into four corrupted runs",
    caption="One row of panels for each corrupted input, one column "
    "for each kind. Each cell is the share of clean minus corrupted "
    "that one head's patch brings back: white nothing, dark blue all, "
    "orange less than nothing.",
)

# %%
notebook.largest(together, 12)

# %% [markdown]
# Where these heads look is shown in [the last chapter](03_induction_patching.ipynb).
#
# The same in one line per input: the best that any head does with a patch of each kind.

# %%
plots.bars(
    together.max(["layer", "head"], keep_attrs=True),
    along="kind",
    title="The best head for each kind, under four corrupted inputs",
    caption="Each bar is the largest share of clean minus corrupted "
    "that one head's patch brings back; groups are kinds, colours are "
    "corrupted inputs.",
)

# %% tags=["remove-input"]
best = top_head(results["BC"].sel(kind="out"))
layer, head = int(best["layer"]), int(best["head"])
shares = together.sel(layer=layer, head=head)


def of(name, kind):
    value = round(float(shares.sel(corrupted=name, kind=kind)), 2)
    return f"{value + 0.0:+.0%}"  # no minus sign before a zero


notebook.say(
    f"On {tasks['AB'].model_name} the strongest head is "
    f"**L{layer}H{head}**. What a patch of it brings back, as a share "
    "of clean minus corrupted:\n\n"
    + "\n".join(
        f"- **{name}**: output {of(name, 'out')}, "
        + ", ".join(
            f"{word} {of(name, kind)}" for kind, word in WORDS.items()
        )
        for name in tasks
    )
)

# %% [markdown]
# Each row of the batch is another draw of A, B and C. So how sure are these shares? **Expect** whiskers
# that leave no doubt about which patches of this head help, and which do not.

# %%
by_row = {
    name: sweep(model, task, KINDS, by="all_pos", per_prompt=True)
    for name, task in tasks.items()
}
plots.bars(
    interval(combine(by_row)).sel(layer=layer, head=head),
    along="kind",
    title=f"What patches of L{layer}H{head} bring back, with intervals",
    caption="Each bar is the share of clean minus corrupted that a "
    "patch of this head brings back; groups are kinds, colours are "
    "corrupted inputs, whiskers intervals by bootstrap over the rows.",
)

# %% [markdown]
# ## Numbers that need a second look
#
# **Queries and keys under BB.** A patch of either may raise the score. Does it bring the copying
# of A back? Compare with guessing.

# %% tags=["remove-input"]
level = float(results["BB"].sel(layer=layer, head=head, kind="q"))
notebook.say(
    f"With the clean query of L{layer}H{head} put into BB, the score "
    f"rises from {wrong:.2f} to {level:.2f} nats, a share of "
    f"{of('BB', 'q')}. That looks like a good part of the answer. But "
    f"guessing (BC) scores {guess:.2f}, which is "
    f"{'above' if guess > level else 'below'} that. A clean query "
    "looks for A, finds none, and this head stops copying B."
    + (
        " The number rose because the model became less wrong, not "
        "because it became right."
        if guess > level
        else ""
    )
)

# %% [markdown]
# **Keys and patterns under BA.** Here are patches that lower the score, as predicted. The head now
# copies B, as it does under BB.

# %% tags=["remove-input"]
level = float(results["BA"].sel(layer=layer, head=head, kind="pattern"))
notebook.say(
    f"With the clean pattern of L{layer}H{head} put into BA, the score "
    f"goes from {tasks['BA'].corrupted_baseline:.2f} to {level:.2f} "
    "nats. On BB, where every induction head copies B, it is "
    f"{wrong:.2f}."
)

# %% [markdown]
# The output of a head in layer 0 does the same.

# %% tags=["remove-input"]
below = together.sel(corrupted="BA", kind="out", layer=0)
early = int(below.argmin("head"))
notebook.say(
    f"The lowest output of layer 0 under BA is that of L0H{early}: "
    f"{float(below[early]):+.0%} of clean minus corrupted."
)

# %% [markdown]
# All of this is one lesson. **A number is only as good as the baselines beside it.** A share of
# clean minus corrupted says how far the score moved, not why.

# %% [markdown]
# ## What was expected, and what was measured
#
# Because of BB, "brings it back" has to mean *above guessing*. The claims below count from there:
# guessing is 0, and a negative number is worse than a guess. Keys, values, queries and patterns
# are compared with the output, which always works.

# %%
claims = Claims(
    "Four corrupted inputs, expected and measured: outputs as a share "
    "above guessing, the other kinds as a part of what the best output "
    "brings back"
)


def above_guessing(name, kind):
    """The best patch of one kind: 0 is a guess, 1 the clean run."""
    result = results[name]
    floor = max(result.attrs["corrupted_baseline"], guess)
    best = result.sel(kind=kind).max()
    return (best - floor) / (result.attrs["clean_baseline"] - floor)


for name in tasks:
    output = above_guessing(name, "out")
    claims.check(
        f"{name}: output",
        "It brings the score back: it is what the rest of the model "
        "reads.",
        output,
        at_least=0.15,
    )
    for kind, text in EXPECTED[name].items():
        yes = text.startswith("yes")
        claims.check(
            f"{name}: {WORDS[kind]}",
            f"Does it bring the score back? {text}.",
            above_guessing(name, kind),
            of=output,
            **{"at_least" if yes else "at_most": 0.5},
        )

# %% [markdown]
# And the numbers that needed a second look, as shares of clean minus corrupted.

# %%
under_ba = share(results["BA"])
for kind in ("k", "pattern"):
    claims.check(
        f"BA: a clean {WORDS[kind]} can lower the score",
        "It points to the right place, and there B stands, so that "
        "head copies B; the lowest.",
        under_ba.sel(kind=kind).min(),
        at_most=-0.02,
    )
claims.check(
    "BA: a clean output of layer 0 can lower the score",
    "With it tokens of B carry the notes that belong to A, so the "
    "heads that look for such a note copy B; the lowest.",
    under_ba.sel(kind="out", layer=0).min(),
    at_most=-0.05,
)
clean = tasks["BB"].clean_baseline
claims.check(
    "BB is worse than guessing",
    "On BB the model copies B where A is asked for, so it starts below "
    "BC; as a share of clean minus BC.",
    wrong - guess,
    of=clean - guess,
    at_most=-0.05,
)
chances = {
    name: by_metric["probability"].attrs
    for name, by_metric in measured.items()
}
low = chances["BC"]["corrupted_baseline"]
claims.check(
    "a probability does not tell them apart",
    "On BB and on BC the right token has a probability near zero: "
    "their distance, as a share of clean minus BC.",
    abs(chances["BB"]["corrupted_baseline"] - low),
    of=chances["BC"]["clean_baseline"] - low,
    at_most=0.05,
)
claims.show()

# %% [markdown]
# ## Turn the knobs
#
# Choose the kind, the corrupted input and the score. Under *probability* the difference between
# wrong and guessing all but vanishes: both are near zero.

# %%
plots.explore(
    combine(
        {
            name: combine(by_metric, dim="metric")
            for name, by_metric in measured.items()
        },
        dim="corrupted",
    )
)

# %% [markdown]
# ## Can you explain it?
#
# <details><summary>Under BB values matter and patterns do not; under AB it is the other way round.
# Why?</summary>
#
# Under BB the head already looks to the right place, and finds B there: the content is wrong.
# Under AB the content is right, and the head looks to the wrong place.
#
# </details>
#
# <details><summary>Which corrupted input would you choose to learn where the head looks from?
# Which, to learn what it carries?</summary>
#
# AB changes the question and leaves the rest, so it isolates query and pattern. BB leaves the
# mechanism and changes the content, so it isolates the value.
#
# </details>
#
# <details><summary>BC is the most thorough corruption. Why not always use it?</summary>
#
# Because when everything is wrong, no single part is enough. Only the output helps, and that says
# nothing about how it comes about.
#
# </details>
#
# <details><summary>In chapter 2 the corrupted prompt had another name at S2, and the same template.
# What did the two prompts share there, and what could therefore not be found?</summary>
#
# They shared everything up to S2, both names among it, and every word after S2. So patching could
# not find what reads the first names, or what knows that a name has to come. It found what tells
# the two names apart.
#
# </details>
#
# ## Exercises
#
# **1. The best key.** Under which corrupted input does the best clean key bring back the largest share
# of clean minus corrupted? Put its name into `answer_1`, as in `"AB"`.

# %% tags=["exercise"]
answer_1 = None  # your code here

# %% tags=["exercise", "hide-input"]
exercise_1 = Exercise(
    "Exercise 1",
    lambda name: (
        together.sel(kind="k", corrupted=name).max()
        == together.sel(kind="k").max()
    ),
)
exercise_1.check(answer_1)

# %% tags=["exercise", "hide-cell"]
# Solution of exercise 1. A share alone: is it above guessing?
keys = together.sel(kind="k").max(["layer", "head"])
exercise_1.verify(keys.idxmax("corrupted").item())

# %% [markdown]
# **2. Above guessing.** Which head's clean *value* takes BB furthest? And does it get above guessing?
# Put the head's name and True or False into `answer_2`, as in `("L1H2", True)`.

# %% tags=["exercise"]
answer_2 = None  # your code here


# %% tags=["exercise", "hide-input"]
def is_best_value(answer):
    best = top_head(results["BB"].sel(kind="v"))
    return answer == (best.head_label.item(), float(best) > guess)


exercise_2 = Exercise("Exercise 2", is_best_value)
exercise_2.check(answer_2)

# %% tags=["exercise", "hide-cell"]
# Solution of exercise 2
carried = top_head(results["BB"].sel(kind="v"))
exercise_2.verify((carried.head_label.item(), float(carried) > guess))

# %% [markdown]
# Next: [Enough and needed](05_two_directions.ipynb).
