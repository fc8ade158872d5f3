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
# # Enough and needed
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/patching-demo/patching-demo/blob/main/notebooks/05_two_directions.ipynb)
#
# Does one head matter? That is two questions. Is the head **enough** to bring the answer back? And
# does the answer **need** it? The two can have opposite answers ([Heimersheim and Nanda,
# 2024](https://arxiv.org/abs/2404.15255)). This chapter asks both, of a toy and of a real model.
#
# From the chapters before you need three things. Chapters [1](01_setup.ipynb) and
# [2](02_ioi_patching.ipynb) *denoise*: they put clean activations into the corrupted run.
# [Chapter 3](03_induction_patching.ipynb) has one figure that *noises*: it puts corrupted activations
# into the clean run. [Chapter 4](04_changing_the_corrupted_baseline.ipynb) shows that the corrupted
# input is part of the question.
#
# In Colab, choose a GPU before you start: **Runtime > Change runtime type**. Without one, this
# chapter takes about two minutes.

# %% tags=["hide-input"]
# Installs the package where it is not there yet, as in Colab.
import importlib.util

if importlib.util.find_spec("patching_demo") is None:
    print("Installing patching-demo")
    # %pip install --quiet "patching-demo @ git+https://github.com/patching-demo/patching-demo"

# %%
from itertools import combinations, product

import numpy as np
import pandas as pd
import torch
import xarray as xr
from patching_demo import (
    combine,
    ioi_task,
    noise_task,
    notebook,
    patch,
    plots,
    prompt_task,
    sweep,
)
from patching_demo.claims import Claims, Exercise
from patching_demo.sweeps import sweep_metrics

notebook.setup()

# %% tags=["parameters"]
MODEL = "auto"

# %%
model = notebook.model(MODEL)

# %% [markdown]
# ## A circuit of two heads
#
# Two heads read the same prompt. Each writes 1 in the clean run and 0 in the corrupted one. A neuron
# reads the sum of both, and its output is the answer.
#
# - In the **OR** circuit, one head will do.
# - In the **AND** circuit, it takes both.

# %%
GATES = {
    "OR": lambda heads: heads.sum().clamp(max=1),
    "AND": lambda heads: torch.relu(heads.sum() - 1),
}
CLEAN, CORRUPTED = torch.ones(2), torch.zeros(2)


def answer(gate, source, target, patched):
    """Run on `target`, with the patched heads taken from `source`."""
    heads = target.clone()
    heads[patched] = source[patched]
    return GATES[gate](heads).item()


# %% [markdown]
# **Expect** the two directions to disagree.
#
# - OR: one clean head is enough, so denoising shows each of them. Neither is needed, as the other
#   is still there. So noising shows nothing, unless both are patched.
# - AND: one clean head is not enough, so denoising shows nothing, unless both are patched. But the
#   answer needs each of them, so noising shows both.

# %%
rows = [
    (
        gate,
        name,
        answer(gate, CLEAN, CORRUPTED, heads),
        1 - answer(gate, CORRUPTED, CLEAN, heads),
    )
    for gate in GATES
    for name, heads in (
        ("first", [0]),
        ("second", [1]),
        ("both", [0, 1]),
    )
]
toy = pd.DataFrame(
    rows,
    columns=["circuit", "patched", "denoising: back", "noising: lost"],
)
plots.table(
    toy,
    "Two heads, two gates: the part of the answer that comes back "
    "when heads are denoised, and that is lost when they are noised.",
)

# %% [markdown]
# With denoising alone you would say that the heads of the AND circuit do nothing. With noising
# alone, you would say so of the OR circuit. Both are wrong.
#
# Patched together, the two heads look the same in both circuits. To tell the circuits apart, patch
# heads **alone and together, in both directions**.

# %% [markdown]
# ## Prompts that can tell the directions apart
#
# The prompts of chapter 2 can't. There the corrupted prompts are the clean ones, swapped within
# each pair. To noise a prompt is to denoise its partner: it is the same run, and right and wrong
# trade places. **Expect** the two directions to return the same shares, for every patch.
#
# `reversed()` swaps the two inputs. The scale turns with them: 0 is the run that activations are
# put into, and 1 the run that they come from. So a share is always how far the patch has moved the
# answer, from one run towards the other.

# %%
swapped = ioi_task(model)
S2, END = swapped.agree_until, swapped.clean_tokens.shape[1] - 1
at_end = [END]

one_way, other_way = (
    sweep(model, task, "attn_out", positions=at_end)
    for task in (
        swapped.normalised(),
        swapped.normalised().reversed(),
    )
)
apart = float(abs(one_way - other_way).max())

# %% tags=["remove-input"]
notebook.say(
    "Over the attention outputs of all layers at END, the two "
    f"directions differ by at most {apart:.0e} of clean minus "
    "corrupted. That is rounding."
)

# %% [markdown]
# So we need a different kind of corrupted prompt. Let a **third person** give, one who was not
# named before. Here it is one of the people of the previous pair.
#
# Now nothing in the corrupted prompt says which of the two names is right. Both prompts of a pair
# even become the same sentence. **Expect** a corrupted baseline of zero: right and wrong cancel out.

# %%
third = swapped.clean_tokens[::2, S2].roll(1).repeat_interleave(2)
corrupted_tokens = swapped.clean_tokens.clone()
corrupted_tokens[:, S2] = third

task = prompt_task(
    model,
    swapped.clean_tokens,
    corrupted_tokens,
    swapped.answers.tolist(),
    name="a third person gives",
)
plots.tokens_table(task, rows=2)

# %%
print(f"Logit difference, clean:     {task.clean_baseline:.4f}")
nothing = task.corrupted_baseline
rounded = round(nothing, 4) + 0.0  # no minus sign
print(f"Logit difference, corrupted: {rounded:.4f}")

# %% [markdown]
# ## Both directions on the same sweep
#
# The output of each head, at all positions at once, first denoised and then noised. In chapter 2 the
# first quarter of the layers did little by single heads, so it is left out here.
#
# **Expect** mostly the same heads in both directions, as few heads are a pure OR or AND. But look
# for heads that do more in one direction than in the other.

# %%
scored = task.normalised()
noising = scored.reversed()
later = slice(model.cfg.n_layers // 4, None)
heads = combine(
    {
        name: sweep(model, which, "out", by="all_pos", layers=later)
        for name, which in (
            ("denoising", scored),
            ("noising", noising),
        )
    },
    dim="direction",
)
plots.heatmap(
    heads,
    title="Head outputs, in both directions",
    caption="Denoising: the share of the answer that one head's clean "
    "output brings back. Noising: the share that is lost with its "
    "corrupted one. White is nothing, dark blue all, orange a move the "
    "other way.",
)

# %%
notebook.largest(heads, 10)

# %%
by_head = heads.stack(cell=("layer", "head")).reset_index("cell")
by_head = by_head.swap_dims(cell="head_label")
order = np.argsort(-abs(by_head).max("direction").values)
strongest = by_head.isel(head_label=order[:8])
plots.bars(
    strongest,
    along="head_label",
    title="The strongest heads, in both directions",
    caption="Two bars for each head: the share of the answer that its "
    "clean output brings back (denoising), and the share that is lost "
    "with its corrupted one (noising).",
)

# %% tags=["remove-input"]
enough, needed = (
    strongest.sel(direction=name) for name in ("denoising", "noising")
)
ahead = int((abs(enough) > abs(needed)).sum())
widest = strongest.isel(
    head_label=int(abs(enough - needed).argmax("head_label"))
)
notebook.say(
    f"Of these {strongest.sizes['head_label']} heads, {ahead} move the "
    "answer further when they are denoised than when they are noised. "
    "Where that is so, others partly make up for a head that is lost. "
    f"The gap is widest at **{widest.head_label.item()}**: "
    f"{float(widest.sel(direction='denoising')):.0%} denoised, "
    f"{float(widest.sel(direction='noising')):.0%} noised."
)

# %% [markdown]
# A bar below zero is a head that works *against* the right answer. Put its clean output into the
# corrupted run, and the score moves away from the right name. Corrupt it in the clean run, and the
# score rises further.

# %% [markdown]
# ## A real pair that works like OR
#
# The toy says how to look for one: patch heads alone and together, in both directions. `patch` takes
# sets of any activations, and patches each set in one run. Here are all pairs of the strongest heads.
#
# Compare what a pair does with what its heads do alone, added up. The difference is the **surplus**
# of the pair.
#
# - OR: denoised, the second head adds little to the first, so the surplus is below zero. Noised, most
#   is lost only when both are gone, so it is above zero.
# - AND: the other way round.
# - Two heads in a row, where one reads the other, are neither. Each alone does what both do, so both
#   surpluses are below zero.
#
# A pair works like OR as far as *both* signs are right. So take the smaller of the two surpluses,
# each with the sign that OR asks for. **Expect** less than the toy's 1: more than two heads do this
# work.

# %%
parts = {
    label: ("out", int(layer), int(head))
    for label, layer, head in zip(
        strongest.head_label.values,
        strongest["layer"].values,
        strongest["head"].values,
        strict=True,
    )
}
pairs = {
    f"{one} + {two}": [parts[one], parts[two]]
    for one, two in combinations(parts, 2)
}
both = combine(
    {
        "denoising": patch(model, scored, pairs),
        "noising": patch(model, noising, pairs),
    },
    dim="direction",
)
alone = xr.concat(
    [
        strongest.sel(head_label=pair.split(" + ")).sum("head_label")
        for pair in pairs
    ],
    dim="set",
)
surplus = (both - alone).transpose("direction", "set")
denoised, noised = surplus
like_or = np.minimum(-denoised, noised)
like_and = np.minimum(denoised, -noised)
OR, AND = like_or.idxmax().item(), like_and.idxmax().item()

# %%
singles = strongest.sel(head_label=OR.split(" + "))
plots.bars(
    both.isel(set=[0, 0, 0])
    .copy(
        data=np.column_stack([singles.values, both.sel(set=OR).values])
    )
    .assign_coords(set=[*OR.split(" + "), "both"]),
    along="set",
    title="The pair that is most like OR",
    caption="For each head alone and for both: the share of the answer "
    "that clean outputs bring back (denoising), and the share that is "
    "lost with corrupted ones (noising).",
)

# %% tags=["remove-input"]
back, lost = (
    {
        "both": float(both.sel(set=OR, direction=name)),
        "sum": float(singles.sel(direction=name).sum()),
    }
    for name in ("denoising", "noising")
)
notebook.say(
    f"**{OR}.** Denoised, the two bring back {back['both']:.0%}; alone, "
    f"they would add up to {back['sum']:.0%}. Noised, {lost['both']:.0%} "
    f"is lost with the two; alone, {lost['sum']:.0%}. So each is worth "
    "less beside the other when you add heads, and more when you take "
    "them away: one can do a part of the other's work. By the same "
    f"measure the best AND among these pairs is {AND}, with "
    f"{float(like_and.max()):.1%}, against {float(like_or.max()):.1%} "
    "for this OR."
)

# %% [markdown]
# Noising alone would underrate both heads, as each is covered by the other. Such covering is common.
# A later chapter looks at it for whole circuits.

# %% [markdown]
# ## Ablation: what if it said nothing?
#
# Noising replaces an activation by what it is on another prompt. **Ablation** replaces it by something
# that says nothing about any prompt. `source="zero"` writes zeros, and `source="mean"` writes the mean
# over the eight prompts.
#
# Take the clean run, and replace the output of one attention or one MLP at END. Three replacements
# are three questions:
#
# - **The corrupted output.** What is lost if this part answers the other prompt? Only what *differs*
#   between the prompts can be lost.
# - **The mean.** What is lost if it keeps to what the prompts have in common? The names cancel out, and
#   the rest stays as later layers expect it.
# - **Zero.** What is lost if it is taken out? Also what it writes on every prompt alike. Later layers
#   have learnt to count on that, and in training no run was without it. What breaks then need not
#   have to do with names.
#
# **Expect** the first two to agree, and zero to find layers that the others do not.

# %%
replaced = combine(
    {
        name: sweep(
            model,
            noising,
            ["attn_out", "mlp_out"],
            positions=at_end,
            source=source,
        ).isel(position=0, drop=True)
        for name, source in (
            ("corrupted", "clean"),
            ("mean", "mean"),
            ("zero", "zero"),
        )
    },
    dim="replaced by",
)
for kind, what in (("attn_out", "Attention"), ("mlp_out", "MLP")):
    plots.curves(
        replaced.sel(kind=kind),
        title=f"{what} outputs at END replaced in the clean run",
        caption="Each line is the share of the answer that is lost when "
        "one layer's output at END is replaced: by the corrupted one, "
        "by its mean over prompts, or by zeros. Dashed lines mark 0, "
        "nothing lost, and 1, as much as on the corrupted prompts.",
    ).show()

# %% tags=["remove-input"]
by_zero = abs(replaced.sel({"replaced by": "zero"}))
by_other = abs(replaced.sel({"replaced by": "corrupted"}))
shown = (by_zero - by_other).argmax(["kind", "layer"])
where = by_zero.isel(shown)
notebook.say(
    f"The widest gap is at layer {int(where['layer'])}: zeros in place "
    f"of its {'attention' if where['kind'] == 'attn_out' else 'MLP'} "
    f"output move the score by {float(where):.0%}, the corrupted output "
    f"by {float(by_other.isel(shown)):.0%}."
)

# %% [markdown]
# Read a large effect of zeros as "the model counts on this layer", and not as "this layer knows the
# name". (`source="clean"`, the default, is the run that a task patches from. Reversed, that is the
# corrupted one.)

# %% [markdown]
# ## Three scores
#
# So far the score was the logit difference. Two others are in use:
#
# - The **logit difference** holds the right name against the wrong one, and nothing else.
# - The **log-probability** of the right name holds it against the whole vocabulary.
# - The **probability** is the same without the logarithm. It can't fall below zero. Where it is low
#   already, harm has no room to show ([Zhang and Nanda,
#   2024](https://arxiv.org/abs/2309.16042)).
#
# Go back to the swapped prompts of chapter 2, on which the corrupted run is sure of the wrong name.
# There, denoise the heads that were strong above: `where=` chooses them. **Expect** heads that help
# the *wrong* answer to show in the first two scores, and to vanish in the third.

# %%
METRICS = ("logit difference", "log-probability", "probability")
strong = abs(heads).max("direction") > 0.05
by_score = {name: swapped.with_metric(model, name) for name in METRICS}
by_metric = combine(
    sweep_metrics(
        model,
        {name: by_score[name].normalised() for name in METRICS},
        "out",
        by="all_pos",
        where=strong,
    ),
    dim="metric",
)
found = by_metric.stack(cell=("layer", "head")).reset_index("cell")
found = found.swap_dims(cell="head_label").dropna("head_label")
plots.bars(
    found.sortby(found.sel(metric="logit difference")),
    along="head_label",
    title="Strong heads denoised on swapped prompts, by three scores",
    caption="Three bars for each head: the share of clean minus "
    "corrupted that its clean output brings back, by each score; bars "
    "below zero move away from the right answer.",
)

# %%
lowest = found.isel(
    head_label=int(
        found.sel(metric="logit difference").argmin("head_label")
    )
)
hurt = {name: float(lowest.sel(metric=name)) for name in METRICS}

# %% tags=["remove-input"]
floor = by_score["probability"].corrupted_baseline
notebook.say(
    f"The head that helps the wrong name most is "
    f"**{lowest.head_label.item()}**. Its clean output moves the logit "
    f"difference by {hurt['logit difference']:+.0%} of clean minus "
    f"corrupted, the log-probability by {hurt['log-probability']:+.0%}, "
    f"and the probability by {hurt['probability']:+.1%}. The right name "
    f"has a probability of {floor:.1%} in the corrupted run. There is "
    "hardly anything left to lose."
)

# %% [markdown]
# No score is the right one. A probability can't see harm where the answer is hopeless already. The
# logit difference can't see a head that raises both names alike. Say which score you used, and look
# at a second one before you call a head useless.

# %% [markdown]
# ## Noise instead of another name, and windows of layers
#
# There is another way to corrupt a prompt: add **Gaussian noise** to the embedding of the word that
# matters ([Meng et al., 2022](https://arxiv.org/abs/2202.05262)). It needs no second prompt. But the
# model has never met such an embedding, so what breaks may be more than the name ([Zhang and Nanda,
# 2024](https://arxiv.org/abs/2309.16042)). `noise_task` adds it at S2, at three standard deviations of
# all embeddings.
#
# The same paper patches **windows** of layers: `window=5` patches five layers in a row, and names the
# middle one. Where several layers share some work, none of them is enough, and a window is. A
# window is blunter, too: it tells roughly where, and no longer which layer.
#
# **Expect** windows to bring back more than single layers. And **expect** noise and the third person to
# agree on where the name is read and where it is used, but not on every number.

# %%
noisy = noise_task(
    model,
    swapped.clean_tokens,
    swapped.answers.tolist(),
    roles={"S2": S2},
    name="noise on S2",
)
print(f"Logit difference, clean:      {noisy.clean_baseline:.4f}")
print(f"Logit difference, with noise: {noisy.corrupted_baseline:.4f}")

# %%
KINDS = ["attn_out", "mlp_out"]
every_second = dict(
    positions=[S2, END],
    layers=slice(None, None, 2),
)
windows = combine(
    {
        name: sweep(model, which, KINDS, window=5, **every_second)
        for name, which in (
            ("third person", scored),
            ("noise", noisy.normalised()),
        )
    },
    dim="corrupted",
)
plots.heatmap(
    windows,
    title="Clean windows of attention and MLP outputs, two corrupted "
    "runs",
    caption="One row of panels for each corrupted input. Each cell is "
    "the share of clean minus corrupted that the outputs of five layers "
    "in a row bring back at S2 or at END; a row is named by the middle "
    "layer, and every second one is shown. White is nothing, dark blue "
    "all, orange less than nothing.",
)

# %%
notebook.largest(windows, 10)

# %% [markdown]
# For comparison, single layers at END.

# %%
single = sweep(model, scored, KINDS, positions=at_end).max(
    ["layer", "position"]
)
third_person, noise = windows
window = third_person.isel(position=1).max("layer")
agreement = xr.corr(third_person, noise)
at = abs(third_person - noise).argmax(list(third_person.dims))
far = third_person.isel(at)

# %% tags=["remove-input"]
notebook.say(
    "At END, the best single layer brings back "
    f"{float(single.sel(kind='attn_out')):.0%} by its attention and "
    f"{float(single.sel(kind='mlp_out')):.0%} by its MLP. The best "
    f"window brings back {float(window.sel(kind='attn_out')):.0%} and "
    f"{float(window.sel(kind='mlp_out')):.0%}. Between the third person "
    "and noise, the windows of the figure correlate at "
    f"{float(agreement):.2f}. They are furthest apart at "
    f"{'S2' if far.position.item() == windows.position[0] else 'END'} in "
    f"{'attention' if far.kind.item() == 'attn_out' else 'MLP'} windows "
    f"around layer {int(far.layer)}: {float(far):+.0%} with the third "
    f"person, {float(noise.isel(at)):+.0%} with noise."
)

# %% [markdown]
# ## What was expected, and what was measured

# %%
claims = Claims("Two directions: expected and measured")
claims.check(
    "swapped prompts know one direction",
    "Where the corrupted prompts are the clean ones in another order, "
    "denoising and noising are the same; largest distance.",
    apart,
    at_most=0.001,
)
claims.check(
    "a third person says neither",
    "With a third person in the prompt, right and wrong cancel out: the "
    "corrupted logit difference, as a part of the clean one.",
    abs(nothing),
    of=task.clean_baseline,
    at_most=0.001,
)
claims.check(
    "both directions find the same heads",
    "Few heads are a pure OR or AND: correlation of what heads bring "
    "back and of what is lost with them.",
    xr.corr(*heads),
    at_least=0.5,
    units="",
)
claims.check(
    "a pair that works like OR",
    f"Denoised, {OR} bring back less than each alone, added up. "
    "Noised, more is lost. The smaller surplus.",
    like_or.max(),
    at_least=0.03,
)
claims.check(
    "zero is another question",
    "Zeros move the score differently from the corrupted outputs, and "
    "means move it much as those do: the ratio of the two distances, "
    "over all layers.",
    abs(replaced.sel({"replaced by": "zero"}) - replaced[0]).sum(),
    of=abs(replaced.sel({"replaced by": "mean"}) - replaced[0]).sum(),
    at_least=1.5,
    units="×",
)
claims.check(
    "harm that the logit difference shows",
    "Some head helps the wrong answer: its clean output moves the logit "
    "difference away from the right one.",
    hurt["logit difference"],
    at_most=-0.05,
)
claims.check(
    "harm that the probability hides",
    "The probability is near zero already: what it shows of that, as a "
    "part of what the logit difference shows.",
    abs(hurt["probability"]),
    of=-hurt["logit difference"],
    at_most=0.4,
)
claims.check(
    "noise finds much the same",
    "Noise and the third person agree on where the name is read and "
    "used: correlation over the windows of the figure.",
    agreement,
    at_least=0.5,
    units="",
)
claims.check(
    "windows bring back more",
    "Several MLPs share the work at END: the best window of five, "
    "against the best single one.",
    window.sel(kind="mlp_out"),
    of=single.sel(kind="mlp_out"),
    at_least=1.2,
    units="×",
)
claims.show()

# %% [markdown]
# ## Can you explain it?
#
# <details><summary>Noising a head changes nothing. Is it useless?</summary>
#
# It is not needed here. Another head may cover for it, as in OR. Denoise it, and noise it together
# with others, before you say more.
#
# </details>
#
# <details><summary>Denoising a head brings nothing back. Is it useless?</summary>
#
# It is not enough by itself. The answer may still need it, as in AND.
#
# </details>
#
# <details><summary>Why do denoising and noising agree exactly on the prompts of chapter 2?</summary>
#
# Its corrupted prompts are the clean ones in another order, and its score only changes sign when
# right and wrong are exchanged. Each noised run is the denoised run of the partner.
#
# </details>
#
# <details><summary>A layer matters when it is replaced by zeros, and not when it is replaced by its
# mean. What did you learn?</summary>
#
# That later layers count on something that it writes on every prompt. Not that it knows the answer.
#
# </details>
#
# ## Exercises
#
# **1. A majority.** Three heads write 0 or 1, and the answer is 1 if at least two of them write 1. Put
# that gate into `answer_1`, as a function of a tensor of three numbers, like those in `GATES`. Before
# you open the solution, say what denoising and noising of *one* head will show.

# %% tags=["exercise"]
answer_1 = None  # your code here


# %% tags=["exercise"]
def is_majority(gate):
    heads = (
        torch.tensor(ones) for ones in product([0.0, 1.0], repeat=3)
    )
    return all(gate(each) == (each.sum() >= 2) for each in heads)


exercise_1 = Exercise("Exercise 1", is_majority)
exercise_1.check(answer_1)

# %% tags=["exercise", "hide-cell"]
# Solution of exercise 1. One head alone is neither enough nor needed:
# neither direction shows anything. Only pairs do.
exercise_1.verify(lambda heads: (heads.sum() - 1).clamp(0, 1))

# %% [markdown]
# **2. A third head.** With both heads of the pair above noised, a part of the answer is left. Which one
# of the other strong heads, noised with the pair, takes most of it away? Use `patch`, `noising`,
# `pairs[OR]` and `parts`, and put the head's name into `answer_2`, as in `"L1H2"`.

# %% tags=["exercise"]
answer_2 = None  # your code here


# %% tags=["exercise", "hide-input"]
def takes_most(name):
    lost = patch(
        model,
        noising,
        {
            other: [*pairs[OR], part]
            for other, part in parts.items()
            if part not in pairs[OR]
        },
    )
    return lost.sel(set=name) == lost.max()


exercise_2 = Exercise("Exercise 2", takes_most)
exercise_2.check(answer_2)

# %% tags=["exercise", "hide-cell"]
# Solution of exercise 2
trios = {
    name: [*pairs[OR], parts[name]]
    for name in parts
    if name not in OR.split(" + ")
}
lost = patch(model, noising, trios)
exercise_2.verify(lost.idxmax().item())

# %% [markdown]
# Next: [Your own prompts, and how sure you may be](06_your_own_prompts.ipynb).
