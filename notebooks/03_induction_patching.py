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
# # Patching induction heads
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/patching-demo/patching-demo/blob/main/notebooks/03_induction_patching.ipynb)
#
# Show a model a sequence it has never seen, then show it the start of the same sequence again.
# Even a small model continues the copy. It cannot have learned the sequence, so it must look it
# up.
#
# Two heads in a row can do that ([Elhage et al.,
# 2021](https://transformer-circuits.pub/2021/framework/index.html); [Olsson et al.,
# 2022](https://arxiv.org/abs/2209.11895)):
#
# - a **previous-token head** in an early layer writes at each position which token stood just
#   before;
# - an **induction head** in a later layer asks "where did my current token stand before?", finds
#   the position that has it as *previous* token, and copies the token found there.
#
# This chapter looks for both in a model of two attention-only layers. There is nothing else in it,
# so there is little room to hide.
#
# From the chapters before you need three things. A [sweep](01_setup.ipynb) patches one place at a
# time. A head has an output, a query, a key, a value and a pattern, and [each can be
# patched](02_ioi_patching.ipynb). A patch shows only what differs between the two inputs.
#
# In Colab no GPU is needed for this chapter; the model is tiny.

# %% tags=["hide-input"]
# Installs the package where it is not there yet, as in Colab.
import importlib.util

if importlib.util.find_spec("patching_demo") is None:
    print("Installing patching-demo")
    # %pip install --quiet "patching-demo @ git+https://github.com/patching-demo/patching-demo"

# %%
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
from patching_demo.results import (
    attention,
    attention_back,
    effect_sizes,
    strong_heads,
    top_head,
)
from patching_demo.sweeps import sweep_metrics

notebook.setup()

# %% tags=["parameters"]
MODEL = "auto"

# %%
model = notebook.model(MODEL, "induction")

# %% [markdown]
# ## The task: A, then A again
#
# Draw a random sequence and call it **A**. The clean input is `BOS A A`. The corrupted input is
# `BOS A B`, where B is another random sequence: the second half repeats nothing.
#
# Rows of the batch hold different random tokens. So the labels name the place, not the token: `A3`
# is the third token of a copy, and the number after it is the position in the whole input.

# %%
task = induction_task(model, corrupted="AB")
plots.tokens_table(task, rows=1)

# %% [markdown]
# ## The score
#
# The score is the **mean log-probability of A's tokens in the second half**, in nats. It asks: how
# well would you continue the copy? Zero is certainty. The first token of the second half is left
# out, as nothing predicts it.
#
# The question is the same for both runs. In the corrupted run the second half is B, but the model
# is still scored on A, so it can only guess.
#
# Unlike in the last chapters, this score is *not* normalised. Read every number against the two
# baselines.

# %%
clean, corrupted = task.clean_baseline, task.corrupted_baseline
print(f"Clean baseline (AA):     {clean:.4f} nats")
print(f"Corrupted baseline (AB): {corrupted:.4f} nats")

# %% tags=["remove-input"]
import math

notebook.say(
    "In the clean run the right token gets a probability of about "
    f"exp({clean:.2f}) = {math.exp(clean):.0%}; in the corrupted run, "
    f"of about exp({corrupted:.2f}) = {math.exp(corrupted):.2%}. With "
    f"{model.cfg.d_vocab} tokens in the vocabulary, a blind guess is "
    f"right {1 / model.cfg.d_vocab:.2%} of the time."
)

# %% [markdown]
# ## Every head, all positions at once
#
# What should patching show? Think through what AB spoils, and what it leaves.
#
# - The first copy is **intact**. There the induction head finds its **keys** ("before me stood
#   A3") and its **values** ("I am A4"). Patching them puts in what is there already.
# - The second half is **spoilt**. From there the head looks back. Its **query** asks for the wrong
#   token, so its **pattern** is wrong, so its **output** is wrong. Patching any of the three
#   should help.
#
# So **expect** output, query and pattern to matter, but not key and value.

# %%
KINDS = ["out", "q", "k", "v", "pattern"]
heads = sweep(model, task, KINDS, by="all_pos")
plots.heatmap(heads)

# %%
notebook.largest(heads)

# %%
best = top_head(heads.sel(kind="out"))
layer, head = int(best["layer"]), int(best["head"])
brought_back = float(share(best))
strong = strong_heads(heads.sel(kind="out"))

# %% tags=["remove-input"]
notebook.say(
    f"On {task.model_name}, of "
    f"{heads.sizes['layer'] * heads.sizes['head']} heads these bring "
    "back at least half as much by their output as the best: "
    f"**{', '.join(strong.head_label.values)}**. The clean output of "
    f"**L{layer}H{head}** alone moves the score from {corrupted:.2f} "
    f"to {float(best):.2f} nats, {brought_back:.0%} of the way to the "
    "clean baseline."
)

# %% [markdown]
# Shares of different patches do not add up to 100 %. Each patch is measured by itself. Two heads
# that do the same work may each bring back more than half.
#
# Would other random sequences say the same? Every row of the batch is one. `per_prompt=True` keeps a
# value for each, and `interval` says how far their mean may be off. **Expect** narrow intervals: all
# rows ask the same, and nothing but their tokens differs.

# %%
each_row = sweep(model, task, "out", by="all_pos", per_prompt=True)
plots.bars(
    interval(each_row),
    along="head",
    title="Clean head outputs, with intervals",
    caption="Each bar is the log-probability with one head's clean "
    "output; colours are layers, dashed lines the baselines, and "
    "whiskers intervals by bootstrap over the rows.",
)

# %% [markdown]
# ## What that head looks at
#
# If this is an induction head, its attention should show it. From each position of the second copy,
# **expect** it to look at the token *after* the first occurrence: one diagonal, one copy's length
# minus one to the left of the main one. The menu has the other heads that stand out.

# %%
effects = effect_sizes(heads)
strongest = [
    (int(found["layer"]), int(found["head"]))
    for kind in ("out", "pattern", "q")
    for found in strong_heads(effects.sel(kind=kind), part=0)[:2]
]
plots.attention_patterns(
    model,
    task.clean_tokens,
    list(dict.fromkeys(strongest)),
    task.position_labels,
)

# %% [markdown]
# The same number for every head: mean attention from the second copy to that diagonal.

# %%
looks = attention(model, task.clean_tokens, task.position_labels)
copy = (task.clean_tokens.shape[1] - 1) // 2
repeated = attention_back(looks, steps=copy - 1, start=copy + 1)
plots.bars(
    repeated,
    along="head",
    title="Attention to the token after the first occurrence",
    caption="Each bar is one head's mean attention to that token, "
    "from the second copy of the clean input; colours are layers, and "
    "1 would be all of its attention.",
)

# %% [markdown]
# ## Head by head, position by position
#
# Patch one head at one position at a time. The score is a mean over the positions of the second
# copy, and a patch at one position mends only the prediction made there. So **expect** the effect
# of an induction head to break up into many small pieces, one for each token.
#
# At the positions of the first copy the two inputs agree, so there is nothing to patch.

# %%
by_position = sweep(model, task, KINDS, by="pos")
plots.heatmap(by_position)

# %%
notebook.largest(by_position)

# %%
pieces = by_position.sel(kind="out", layer=layer, head=head)
total = float((pieces - corrupted).sum() / (clean - corrupted))
plots.curves(
    pieces,
    along="position",
    title=f"Output of L{layer}H{head}, one position at a time",
    caption="Each point is the log-probability after patching this "
    "head at one position; dashed lines mark the baselines, and in "
    "the grey band both inputs agree.",
)

# %% tags=["remove-input"]
notebook.say(
    "The largest single piece brings back "
    f"{float((pieces.max() - corrupted) / (clean - corrupted)):.0%} of "
    "clean minus corrupted. Together the pieces add up to "
    f"{total:.0%}; patched at once, the head brought back "
    f"{brought_back:.0%}."
)

# %% [markdown]
# ## Where is the previous-token head?
#
# The sweeps above show next to nothing in layer 0. Does layer 0 do nothing? No: its work is done in
# the first copy, and **the first copy is the same in both inputs**. A patch only shows what
# differs.
#
# To see it, corrupt the *first* half: BA. And reverse the direction: put activations of the
# corrupted run into the clean one, and see what *breaks*. That is noising. It finds what the answer
# needs.
#
# `reversed()` exchanges the two inputs. The scale turns too: 0 is now the intact run, and 1 is the
# ruined one. **Expect** the induction head to matter again, and one head of layer 0 with it.

# %%
noising = induction_task(model, corrupted="BA").reversed().normalised()

noised = sweep(model, noising, "out", by="all_pos")
noised = noised.assign_attrs(
    corrupted_name="intact", clean_name="ruined"
)
plots.heatmap(
    noised,
    title="Corrupted head outputs put into the clean run",
    caption="Each cell is the share of the score that is lost with "
    "one head corrupted: 0 (white) nothing, 1 (dark blue) as much as "
    "with the whole first half corrupted.",
)

# %%
notebook.largest(noised)

# %%
early_head = top_head(noised.sel(layer=[0]))
early, lost = int(early_head["head"]), float(early_head)

# %% tags=["remove-input"]
notebook.say(
    f"In layer 0 it is **L0H{early}**: corrupt its output alone, and "
    f"{lost:.0%} of the score is gone. Here is what it looks at."
)

# %%
plots.attention_patterns(
    model, task.clean_tokens, [(0, early)], task.position_labels
)

# %%
previous = attention_back(looks, steps=1, start=2)
plots.bars(
    previous,
    along="head",
    title="Attention to the token just before",
    caption="Each bar is one head's mean attention to the token just "
    "before, on the clean input; colours are layers, and 1 would be "
    "all of its attention.",
)

# %% [markdown]
# ## What was expected, and what was measured

# %%
claims = Claims("Induction: expected and measured")
shares = share(heads)
out = shares.sel(kind="out")
most = shares.max(["layer", "head"])
whole = out.max()

claims.check(
    "one head stands out",
    "The output of a single head brings back a good part of the score.",
    whole,
    at_least=0.15,
)
claims.check(
    "it sits above layer 0",
    "It needs what layer 0 wrote, so no head of layer 0 brings back "
    "nearly as much; as a part of the best output.",
    out.sel(layer=0).max(),
    of=whole,
    at_most=0.5,
)
for kind, word in (("q", "query"), ("pattern", "pattern")):
    claims.check(
        f"{word} matters",
        "AB spoils the second copy, from which the head looks back, so "
        f"its {word} brings back most of what the output does.",
        most.sel(kind=kind),
        of=whole,
        at_least=0.5,
    )
for kind, word in (("k", "key"), ("v", "value")):
    claims.check(
        f"{word} does not",
        f"The first copy is intact, and there the head finds its "
        f"{word}s, so these bring back little of what the output does.",
        most.sel(kind=kind),
        of=whole,
        at_most=0.25,
    )
claims.check(
    "each position helps itself",
    "A patch at one position mends the prediction made there, so no "
    "single one brings back much of the mean.",
    share(pieces).where(~pieces.agrees).max(),
    at_most=0.25,
)
claims.check(
    "induction attention",
    f"The head found by patching (L{layer}H{head}) looks at the token "
    "after the first occurrence.",
    repeated.sel(layer=layer, head=head),
    at_least=0.3,
)
looking = top_head(repeated)
claims.check(
    "patches and attention agree on it",
    "Conversely, the head that does so most "
    f"({looking.head_label.item()}) brings back a good part of what "
    "the best output does.",
    out.sel(layer=looking["layer"], head=looking["head"]),
    of=whole,
    at_least=0.5,
)
claims.check(
    "what brings it back is needed too",
    f"With the output of L{layer}H{head} corrupted in the clean run, a "
    "part of the score is lost.",
    noised.sel(layer=layer, head=head),
    at_least=0.1,
)
claims.check(
    "a layer-0 head is needed",
    "With one head of layer 0 corrupted, a good part of the score is "
    "lost.",
    lost,
    at_least=0.15,
)
claims.check(
    "previous-token attention",
    f"That head (L0H{early}) looks at the token just before.",
    previous.sel(layer=0, head=early),
    at_least=0.3,
)
looking = top_head(previous.sel(layer=[0]))
claims.check(
    "patches and attention agree on that too",
    "Conversely, of what is lost with one head of layer 0, a good "
    "part is lost with the one that does so most "
    f"({looking.head_label.item()}).",
    noised.sel(layer=0, head=looking["head"]),
    of=lost,
    at_least=0.5,
)
claims.show()

# %% tags=["remove-input"]
notebook.say(
    f"So on {task.model_name}: **L0H{early}** notes the previous token "
    f"({float(previous.sel(layer=0, head=early)):.0%} of its attention "
    f"goes there), and **L{layer}H{head}** uses the note to find where "
    "the sequence goes on "
    f"({float(repeated.sel(layer=layer, head=head)):.0%}). Patching "
    "found both without looking at an attention pattern; the patterns "
    "confirm it."
)

# %% [markdown]
# ## Turn the knobs
#
# Choose the kind of activation and the score; the slider chooses the layer. A mean of probabilities
# puts less weight on very bad predictions than a mean of their logarithms. Do the same heads
# matter?

# %%
METRICS = ("log-probability", "probability")
scored = {name: task.with_metric(model, name) for name in METRICS}
plots.explore(
    combine(sweep_metrics(model, scored, KINDS, by="pos"), dim="metric")
)

# %% [markdown]
# ## Can you explain it?
#
# <details><summary>Under AB, why do keys and values of the induction head not matter?</summary>
#
# The head reads them from the first copy. That is A in both inputs, so the clean ones are there
# already.
#
# </details>
#
# <details><summary>A layer-0 head shows no effect under AB. May you conclude that the model does
# not use it?</summary>
#
# No. Only that nothing it computes *differently* under AB matters. Under BA the same head turned
# out to be needed.
#
# </details>
#
# ## Exercises
#
# **1. At itself.** Which head attends most to its own position, over the whole clean input? Use
# `attention_back`, and put the name into `answer_1`, as in `"L1H2"`.

# %% tags=["exercise"]
answer_1 = None  # your code here

# %% tags=["exercise", "hide-input"]
exercise_1 = Exercise(
    "Exercise 1",
    lambda name: (
        name == top_head(attention_back(looks, steps=0)).head_label
    ),
)
exercise_1.check(answer_1)

# %% tags=["exercise", "hide-cell"]
# Solution of exercise 1
itself = top_head(attention_back(looks, steps=0))
exercise_1.verify(itself.head_label.item())

# %% [markdown]
# **2. The query is needed.** Under AB, denoising showed that the query of the head found above is
# enough. Is it needed? Turn `task` around, so that the corrupted query goes into the clean run, and
# put the share of the score that is then lost into `answer_2`.

# %% tags=["exercise"]
answer_2 = None  # your code here


# %% tags=["exercise", "hide-input"]
def is_lost(answer):
    turned = task.reversed().normalised()
    lost = sweep(model, turned, "q", by="all_pos")
    found = lost.sel(layer=layer, head=head)
    return abs(float(answer) - float(found)) < 0.01


exercise_2 = Exercise("Exercise 2", is_lost)
exercise_2.check(answer_2)

# %% tags=["exercise", "hide-cell"]
# Solution of exercise 2
turned = sweep(model, task.reversed().normalised(), "q", by="all_pos")
exercise_2.verify(float(turned.sel(layer=layer, head=head)))

# %% [markdown]
# Next: [Changing the corrupted baseline](04_changing_the_corrupted_baseline.ipynb).
