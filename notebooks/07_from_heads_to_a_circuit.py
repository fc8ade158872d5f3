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
# # From heads to a circuit
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/patching-demo/patching-demo/blob/main/notebooks/07_from_heads_to_a_circuit.ipynb)
#
# From [chapter 1](01_setup.ipynb) you need the score: 0 at the corrupted baseline, 1 at the clean one.
# From [chapter 2](02_ioi_patching.ipynb), the task, and that a few heads carry most of the effect.
# From [chapter 5](05_two_directions.ipynb), that *enough* and *needed* are two questions.
#
# A list of heads is not an explanation yet. Who writes the answer? Who tells those heads where to
# look, and who tells them? This chapter follows the arrows back from the logits to the tokens
# ([Wang et al., 2022](https://arxiv.org/abs/2211.00593); [Goldowsky-Dill et al.,
# 2023](https://arxiv.org/abs/2304.05969)). Then it asks whether what was found is the circuit: is it
# enough, is it needed, and is it better than as many heads drawn at random?
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
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
import xarray as xr
from patching_demo import (
    combine,
    complement,
    ioi_task,
    notebook,
    patch,
    paths,
    plots,
    sweep,
)
from patching_demo.claims import Claims, Exercise
from patching_demo.plots.theme import percent
from patching_demo.results import effect_sizes, strong_heads, top_head

notebook.setup()

# %% tags=["parameters"]
MODEL = "auto"

# %%
model = notebook.model(MODEL)

# %% [markdown]
# The prompts are those of chapter 2: four pairs, and swapping the two prompts of a pair makes the
# corrupted input.

# %%
task = ioi_task(model)
scored = task.normalised()
END = task.clean_tokens.shape[1] - 1
print(f"Logit difference, clean:     {task.clean_baseline:.4f}")
print(f"Logit difference, corrupted: {task.corrupted_baseline:.4f}")

# %% [markdown]
# ## Who writes the answer
#
# A patch of a head's output has its **total effect**. The head may write the answer itself, or it may
# tell a later head what to do. The two look the same in a sweep.
#
# So freeze everything after the head. Every other head and MLP keeps its corrupted output, even if
# what it reads has changed. What the patch still does to the logits is the head's **direct
# effect**. `paths` with the receiver `"logits"` measures it, for every head.
#
# **Expect** fewer heads than in the sweep, and late ones.

# %%
direct = paths(model, scored, "logits")
plots.heatmap(direct, title="Direct effect of each head on the logits")

# %%
notebook.largest(direct, 8)

# %% [markdown]
# Now the total effects beside them. **Expect** some heads with a large total effect and next to no
# direct one: they work through others.

# %%
total = sweep(model, scored, "out", by="all_pos")
both = combine({"direct": direct, "total": total}, dim="effect")
flat = both.stack(cell=("layer", "head"))
order = np.argsort(-abs(flat).max("effect").values)[:10]
flat = flat.isel(cell=np.sort(order)).reset_index("cell")
plots.bars(
    flat.swap_dims(cell="head_label"),
    along="head_label",
    title="Direct and total effects of the strongest heads",
    caption="Two bars for each of the ten strongest heads, early ones "
    "on the left: the share that its clean output brings back "
    "directly, and in total.",
)

# %% [markdown]
# ## One path by hand
#
# Who tells the writers what to do? Take two heads, a *sender* and a later *receiver*. The path from
# one to the other takes two runs on the corrupted prompts:
#
# 1. Freeze all outputs of heads and MLPs at their corrupted values, but let the sender write its
#    clean output. Keep what the receiver now takes in, for instance its query.
# 2. Run again with nothing frozen, and patch that query in. Score the answer.
#
# The first run sees to it that only this one path can change the query. The second lets the
# receiver act on it, by whatever route.

# %%
LAYERS = range(model.cfg.n_layers)
ATTENTION = [f"blocks.{i}.attn.hook_z" for i in LAYERS]
MLPS = [f"blocks.{i}.hook_mlp_out" for i in LAYERS]
clean = task.clean_cache(model, ["hook_embed", *ATTENTION])
corrupted = task.corrupted_cache(model, [*ATTENTION, *MLPS])


def path_by_hand(sender, head, receivers, frozen):
    """Score with one path patched: `frozen` hooks cannot react."""

    def write(activation, hook):
        activation = activation.clone()
        if hook.name in frozen:
            activation = corrupted[hook.name].clone()
        if hook.name == sender:
            here = slice(None) if head is None else np.s_[:, :, head]
            activation[here] = clean[sender][here]
        return activation

    taken_in = {}

    def keep(activation, hook):
        taken_in[hook.name] = activation.clone()

    parts = [
        (f"blocks.{layer}.attn.hook_{kind}", own)
        for kind, layer, own in receivers
    ]
    hooks = [(name, write) for name in dict.fromkeys([*frozen, sender])]
    hooks += [(name, keep) for name in {name for name, _ in parts}]
    model.run_with_hooks(task.corrupted_tokens, fwd_hooks=hooks)

    def put(activation, hook):
        activation = activation.clone()
        for name, own in parts:
            if name == hook.name:
                activation[:, :, own] = taken_in[name][:, :, own]
        return activation

    hooks = [(name, put) for name in taken_in]
    logits = model.run_with_hooks(
        task.corrupted_tokens, fwd_hooks=hooks
    )
    return scored.metric(logits).item()


# %% [markdown]
# Try it. The receivers are the **writers**, the heads whose direct effect is at least a third of the
# strongest. The sender is the head before them whose total effect exceeds its direct effect by
# most.

# %%
PART = 1 / 3


def heads_of(strong):
    """(layer, head) of each."""
    return [(int(x["layer"]), int(x["head"])) for x in strong]


def label(heads):
    return ", ".join(f"L{layer}H{head}" for layer, head in heads)


writer = top_head(direct)
writers = heads_of(strong_heads(direct, PART)) or heads_of([writer])
before = (total - direct).where(total.layer < min(writers)[0])
sender = total.isel(before.fillna(-np.inf).argmax(["layer", "head"]))
one_by_one = {
    label([head]): path_by_hand(
        ATTENTION[int(sender["layer"])],
        int(sender["head"]),
        [("q", *head)],
        ATTENTION + MLPS,
    )
    for head in writers
}

# %% tags=["remove-input"]
told = ", ".join(
    f"**{name}** {share:.1%}" for name, share in one_by_one.items()
)
notebook.say(
    f"Sent to the query of one writer and nowhere else, the clean output "
    f"of **{sender.head_label.item()}** brings back: {told}. In total "
    f"it brought back {float(sender):.1%}."
)

# %% [markdown]
# `paths` does this for every sender at once. It runs the model only where something can change, and
# returns the same numbers; a claim below compares them.

# %% [markdown]
# ## Who tells the writers
#
# Take the writers as one group. Ask two things of a group:
#
# - **Which of its inputs matters?** Patch all its queries at once, or all its keys, or all its values.
# - **Who writes that input?** For the inputs that matter most (two for the writers, one for the next
#   group), patch the path from every earlier head.
#
# The heads that send most make the next group, and the same two questions are asked of them.
#
# **Expect** a short list each time. And **expect** some inputs that no head sends: what a head reads at
# S2 may be the name itself.

# %%
N_KEY_VALUE = total.attrs["n_key_value_heads"]
SHARED = model.cfg.n_heads // N_KEY_VALUE
WORDS = {"q": "queries", "k": "keys", "v": "values"}


def inputs(kind, heads):
    """Queries, keys or values of heads; some models share keys."""
    parts = [
        (kind, i, j if kind == "q" else j // SHARED) for i, j in heads
    ]
    return list(dict.fromkeys(parts))


groups, needs, senders = [writers], [], []
for follow in (2, 1):
    sets = {kind: inputs(kind, groups[-1]) for kind in WORDS}
    needs.append(patch(model, scored, sets))
    by_need = needs[-1]["set"].values[np.argsort(-needs[-1].values)]
    found = {
        str(kind): paths(model, scored, sets[kind])
        for kind in by_need[:follow]
    }
    senders.append(combine(found, dim="into"))
    strong = strong_heads(
        senders[-1].max("into", keep_attrs=True), PART
    )
    known = sum(groups, [])
    new = [head for head in heads_of(strong) if head not in known]
    groups.append(new or groups[-1])
sets = {kind: inputs(kind, groups[-1]) for kind in WORDS}
needs.append(patch(model, scored, sets))

# %%
for group, found in zip(groups, senders, strict=False):
    named = found.assign_coords(
        into=[WORDS[kind] for kind in found["into"].values]
    )
    plots.heatmap(
        named, title=f"Heads that send to {label(group)}"
    ).show()

# %%
notebook.largest(senders[0], 6)

# %%
notebook.largest(senders[1], 6)

# %% [markdown]
# ### Through the MLPs
#
# Those paths are direct: MLPs were frozen, too. But a head may write something that an MLP turns into
# what the receiver reads. `through="mlps"` lets the MLPs on the way react, and keeps attention
# frozen. Here it is for the strongest path into the writers.

# %%
first = senders[0].max(["layer", "head"])
main = first["into"][int(first.argmax("into"))].item()
through = paths(model, scored, inputs(main, groups[0]), through="mlps")
straight = senders[0].sel(into=main, drop=True)
two_ways = combine(
    {"direct": straight, "through MLPs": through}, dim="path"
)
flat = two_ways.stack(cell=("layer", "head")).dropna("cell")
order = np.argsort(-abs(flat).max("path").values)[:8]
flat = flat.isel(cell=np.sort(order)).reset_index("cell")
plots.bars(
    flat.swap_dims(cell="head_label"),
    along="head_label",
    title=f"Paths to the {WORDS[main]} of {label(groups[0])}",
    caption="Two bars for each of the eight strongest senders: the "
    "share brought back by the path that passes no MLP, and by all "
    "paths that pass MLPs or none.",
)

# %% [markdown]
# ### Down to the tokens
#
# Where no head sends much, what is left is the token itself. It reaches every later layer at its own
# position, mostly through the MLPs. `paths` has no sender for it, but the function from above does.
# Send the clean *embedding*, let MLPs react and freeze all attention: what arrives comes from the
# word at that position, and from no other.

# %%
MATTERS = 0.1
rows, from_token = [], []
for level, (group, need) in enumerate(zip(groups, needs, strict=True)):
    for kind, words in WORDS.items():
        best, share = "–", np.nan
        if level < 2 and kind in senders[level]["into"].values:
            head = top_head(senders[level].sel(into=kind))
            best = f"{head.head_label.item()} {percent(float(head))}"
        if need.sel(set=kind) >= MATTERS:
            share = path_by_hand(
                "hook_embed", None, inputs(kind, group), ATTENTION
            )
        from_token.append(share)
        rows.append(
            {
                "heads": label(group),
                "input": words,
                "all of it": percent(float(need.sel(set=kind))),
                "best sender": best,
                "token itself": percent(share).replace("nan", "–"),
            }
        )
plots.table(
    pd.DataFrame(rows).set_index("heads"),
    "What a clean input of each group brings back: all of it, what the "
    "best single head sends of it, and, where all of it matters, what "
    "the token itself sends through MLPs.",
)

# %% [markdown]
# ## The circuit, drawn
#
# Squares are heads, a row for each group. A line leads from a sender to the group whose input it
# writes; the wider it is, the more comes back. Lines from the tokens are what the embedding sends
# through the MLPs.

# %% tags=["hide-input"]
COLOURS = {
    "logits": "#767676",
    "queries": "#2f7fc1",
    "keys": "#8a8a1e",
    "values": "#d9731a",
}
arrows = [
    (label([(i, j)]), "logits", 0, direct.sel(layer=i, head=j))
    for i, j in groups[0]
]
for row, found in enumerate(senders, start=1):
    arrows += [
        (label([(i, j)]), WORDS[kind], row, sent.sel(layer=i, head=j))
        for kind in found["into"].values
        for sent in [found.sel(into=kind)]
        for i, j in groups[row]
    ]
rows = [(words, row) for row in (1, 2, 3) for words in WORDS.values()]
arrows += [
    ("tokens", words, row, share)
    for (words, row), share in zip(rows, from_token, strict=True)
]


def graph(least):
    """Groups as rows, from the tokens up to the logits."""
    figure, said = go.Figure(), {}
    at = {"tokens": (0.1, 0), "logits": (0.5, 4)}
    for row, heads in enumerate(groups, start=1):
        for i, head in enumerate(heads, start=1):
            at[label([head])] = i / (len(heads) + 1), 4 - row
        ends = [at[label([head])][0] for head in (heads[0], heads[-1])]
        figure.add_shape(
            x0=ends[0] - 0.12,
            x1=ends[1] + 0.12,
            y0=3.65 - row,
            y1=4.35 - row,
            line={"color": "#767676", "width": 1},
        )
    for sender, words, row, share in arrows:
        if not share >= least:
            continue
        aside = {"queries": -0.06, "values": 0.06}.get(words, 0)
        x, y = at[sender]
        group = f" of {label(groups[row - 1])}" if row else ""
        text = f"{sender} to {words}{group}: {float(share):.0%}"
        figure.add_scatter(
            x=[x + aside / 2, 0.5 + aside],
            y=[y + 0.2, 3.65 - row if row else 3.8],
            mode="lines",
            line={
                "color": COLOURS[words],
                "width": 1 + 20 * float(share),
            },
            name=f"to {words}",
            legendgroup=words,
            showlegend=words not in said.values(),
            hovertemplate=f"{text}<extra></extra>",
        )
        said[text] = words
    figure.add_scatter(
        x=[x for x, _ in at.values()],
        y=[y for _, y in at.values()],
        text=list(at),
        mode="markers+text",
        marker={"symbol": "square", "size": 46, "color": "#cfcfcf"},
        textfont={"color": "#222222", "size": 11},
        showlegend=False,
        hoverinfo="skip",
    )
    hidden = {"visible": False, "fixedrange": True}
    return figure.update_layout(
        title={"text": "<b>Who writes to whom</b>", "x": 0},
        title_font_size=14,
        height=560,
        margin={"l": 6, "r": 6, "t": 70, "b": 6},
        template="none",
        font={"color": "#767676"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": 1.01, "yanchor": "bottom"},
        xaxis={**hidden, "range": [0, 1]},
        yaxis={**hidden, "range": [-0.4, 4.3]},
        meta={
            "alt": f"Graph of the heads found. {'; '.join(said)}.",
            "caption": "Each line is a path that was patched; its width "
            "is the share that it brings back, its colour what it "
            "feeds. Heads in one outline received together.",
        },
    )


# %%
graph(least=0.05)

# %% [markdown]
# Read it from the bottom. Each row tells the next one something, and only the top row writes the
# answer. Where a line comes from the tokens, the chain has reached the words themselves.

# %% [markdown]
# ## Is the set enough
#
# Arrows were found one by one. Now patch the heads together: clean outputs of a whole set, put into the
# corrupted run at once. Take the writers first, then add one group after the other.
#
# **Expect** the set to bring back most of the answer. But **expect** early heads to add less than their own
# effects suggest: what they do, they do through later heads, which are patched already. Effects
# along one chain do not add up.

# %%
circuit = sum(groups, [])
parts = [("out", layer, head) for layer, head in circuit]
stages = {
    "writers": groups[0],
    "and their senders": groups[0] + groups[1],
    "all three groups": circuit,
    "all but the writers": groups[1] + groups[2],
}

# %% [markdown]
# A set of heads always brings back something. Compared with what? With **as many heads drawn at
# random**. So add heads one by one in the order of their total effect, best first, and beside them draw
# heads in random order, several times.

# %%
SIZES, DRAWS = [1, 2, 3, 4, 6, 8, 12], 6
every_head = [(i, j) for i in LAYERS for j in range(model.cfg.n_heads)]
draw = np.random.default_rng(0)
orders = [heads_of(strong_heads(total, 0))] + [
    [every_head[k] for k in draw.permutation(len(every_head))]
    for _ in range(DRAWS)
]
sets = {
    f"order {number}, {size} heads": order[:size]
    for number, order in enumerate(orders)
    for size in SIZES
}
patched = patch(
    model,
    scored,
    {
        name: [("out", layer, head) for layer, head in heads]
        for name, heads in {**stages, **sets}.items()
    },
)
plots.table(
    pd.DataFrame(
        {
            "heads": [len(heads) for heads in stages.values()],
            "brought back": [
                percent(float(patched.sel(set=name))) for name in stages
            ],
        },
        index=pd.Index(stages, name="patched together"),
    ),
    "What sets of heads bring back when their clean outputs are patched "
    "together.",
)

# %%
by_order = patched.values[len(stages) :].reshape(len(orders), -1)
strongest, drawn = by_order[0], by_order[1:]
middle = drawn.mean(0)
grown = xr.DataArray(
    [strongest, middle],
    dims=("order", "heads"),
    coords={
        "order": ["by effect", "at random"],
        "heads": SIZES,
        "low": (("order", "heads"), [strongest, drawn.min(0)]),
        "high": (("order", "heads"), [strongest, drawn.max(0)]),
    },
    attrs=patched.attrs,
)
plots.curves(
    grown,
    along="heads",
    title="Heads added one by one, patched together",
    caption="The share that so many heads bring back together: in the "
    "order of their total effect, and drawn at random (mean of several "
    "draws; the bars reach from the lowest to the highest).",
)

# %% [markdown]
# ## Is it all there is
#
# Enough is not all. In the patched run, everything else still works: other heads read what was patched
# and go on from there. Two harder tests take things *away*, in the clean run.
#
# - **Faithfulness**: ablate everything outside the set. Does the answer stay?
# - **Completeness**: ablate the set. Does the answer go?
#
# *Which run?* Both tests ask about the intact model, so the run that is patched must be the clean one. In
# `patch` that run is the corrupted one; `task.reversed()` exchanges the two.
#
# *Which source?* Zeros would also take away what a head does in every prompt, and push all later
# layers where they have never been. The **mean** over the prompts keeps what the prompts have in
# common: that a name comes next. It loses what tells them apart: which name. As both prompts of each
# pair are in the mean, it favours neither name.
#
# *Which units?* The logit difference that is left, as a part of the clean one: 1 is the intact model, 0
# is no preference for either name.
#
# MLPs are kept, as in Wang et al.: the set is one of heads. One row ablates them as well.
#
# **Expect** the answer to stay with the set alone, and to go without it. Random heads of the same
# number should do little when ablated. And the part that stays may be **larger than all**: the heads
# that write against the answer are outside the set, so they are ablated, too.

# %%
mlps = [("mlp_out", layer) for layer in LAYERS]
sizes = abs(total).values.ravel()
largest_first = [every_head[i] for i in np.argsort(-sizes)]
outside = complement(model, parts + mlps)
some = [order[: len(circuit)] for order in orders]
ablated = {
    "keep the set": outside,
    "keep no head": complement(model, mlps),
    "keep the set, no MLP": complement(model, parts),
    "ablate the set": parts,
    "ablate the writers": parts[: len(groups[0])],
    "ablate the strongest writer": parts[:1],
}
for number, order in enumerate(some[1:4], start=1):
    ablated[f"ablate random heads {number}"] = [
        ("out", layer, head) for layer, head in order
    ]
for size in (20, 40, 80):
    chosen = [("out", i, j) for i, j in largest_first[:size]]
    ablated[f"keep the {size} strongest"] = complement(
        model, chosen + mlps
    )
left = patch(model, task.reversed(), ablated, source="mean")
left = left / task.clean_baseline
plots.table(
    pd.DataFrame(
        {
            "heads ablated": [
                sum(part[0] == "out" for part in set_)
                for set_ in ablated.values()
            ],
            "answer left": [percent(float(value)) for value in left],
        },
        index=pd.Index(ablated, name="ablation"),
    ),
    "Logit difference that is left in the clean run, as a part of the "
    "clean one, with heads ablated by their mean over the prompts.",
)

# %% tags=["remove-input"]
whole, alone = (
    float(left.sel(set=name))
    for name in ("ablate the set", "keep the set")
)
notebook.say(
    f"With only {label(circuit)} at work, {alone:.0%} of the clean logit "
    f"difference is left. With only these ablated, {whole:.0%} is left."
)

# %% [markdown]
# The last rows keep more and more heads, in the order of the size of their effect, helpful or not. They
# show when the rest of the model no longer matters.

# %% [markdown]
# ## Leave one out
#
# Ablate the strongest writer alone, in the clean run. Its own contribution is gone. But the answer may
# fall by less than that, as later heads read the change and write something else than before. That is
# **self-repair** ([McGrath et al., 2023](https://arxiv.org/abs/2307.15771)).
#
# To see who steps in, keep what every head writes at END, with and without the ablation. Then
# add the *change* of one head to the last residual stream of the intact run, and read the logits. That
# is the direct effect of its change.
#
# **Expect** movement both ways. A head that writes against the answer has less to write against, so
# it writes less. A head that read what is gone does less of its own.

# %%
W_O = model.W_O  # [layer, head, d_head, d_model]
LAST = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
WRITER = ATTENTION[int(writer["layer"])], int(writer["head"])


def at_end(ablate):
    """What each head writes at END: [layer, batch, head, d_model]."""
    kept = {}

    def keep(activation, hook):
        if ablate and hook.name == WRITER[0]:
            activation = activation.clone()
            own = activation[:, :, WRITER[1]]
            activation[:, :, WRITER[1]] = own.mean(0)
        kept[hook.name] = activation[:, END].clone()
        return activation

    hooks = [(name, keep) for name in ATTENTION]
    model.run_with_hooks(task.clean_tokens, fwd_hooks=hooks)
    heads = torch.stack([kept[name] for name in ATTENTION])
    return torch.einsum("lbhd,lhde->lbhe", heads, W_O)


intact, changed = at_end(ablate=False), at_end(ablate=True)
stream = task.clean_cache(model, [LAST])[LAST][:, END]


def difference(streams):
    """Logit difference of streams [batch, head, d_model], by head."""
    logits = model.unembed(model.ln_final(streams))
    prompts = torch.arange(len(logits), device=logits.device)
    right, wrong = task.answers.T
    apart = logits[prompts, :, right] - logits[prompts, :, wrong]
    return apart.mean(0)


base = difference(stream[:, None])
steps = torch.stack(
    [
        difference(stream[:, None] + part) - base
        for part in changed - intact
    ]
)
lost = -float(steps[int(writer["layer"]), int(writer["head"])])
made_up = direct.copy(data=(steps / lost).numpy(force=True))
flat = made_up.where(made_up.head_label != writer.head_label)
flat = flat.stack(cell=("layer", "head")).dropna("cell")
order = np.argsort(-abs(flat).values)[:8]
flat = flat.isel(cell=np.sort(order)).reset_index("cell")
repair = flat.swap_dims(cell="head_label").assign_attrs(
    metric="direct effect of the change",
    units="share of the direct loss",
    clean_name="all of it",
    corrupted_name="nothing",
    by="",
)
plots.bars(
    repair,
    along="head_label",
    title=f"Who steps in when {writer.head_label.item()} is ablated",
    caption="Each bar is the change of one head's direct effect, as a "
    "part of what the ablated head no longer writes. Above zero it "
    "makes up for the loss, below it adds to it.",
)

# %% tags=["remove-input"]
fell = 1 - float(left.sel(set="ablate the strongest writer"))
first, last = repair[np.argsort(-repair.values)[[0, -1]]]
notebook.say(
    f"What **{writer.head_label.item()}** itself writes is "
    f"{lost / float(base):.0%} of the clean logit difference. With it "
    f"ablated, the logit difference falls by {fell:.0%}. The head that "
    f"makes up for most is **{first.head_label.item()}**, with "
    f"{float(first):.0%} of what was lost directly; the one that moves "
    f"most the other way is **{last.head_label.item()}**, with "
    f"{float(last):.0%}."
)

# %% [markdown]
# ## The circuit that was published
#
# For GPT-2 small the answers are known ([Wang et al., 2022](https://arxiv.org/abs/2211.00593)): **name
# movers** write the name, **S-inhibition heads** feed their queries, and **induction** and
# **duplicate-token heads** feed the values of those. The claims below hold the runs to it where
# the model is GPT-2 small. In another model head numbers mean nothing, and they are listed as not
# checked.

# %%
PUBLISHED = {
    "name mover": ["L9H9", "L9H6", "L10H0"],
    "S-inhibition": ["L7H3", "L7H9", "L8H6", "L8H10"],
}
is_gpt2_small = task.model_name in (
    "gpt2-small",
    "gpt2",
    "openai-community/gpt2",
)
claims = Claims(
    "Published heads of GPT-2 small, as a circuit",
    not_checked=""
    if is_gpt2_small
    else "the heads are those of GPT-2 small, and this is "
    f"{task.model_name}",
)
labels = direct.head_label
movers, inhibition = (
    labels.isin(PUBLISHED[role]) for role in PUBLISHED
)
sizes = effect_sizes(direct)
claims.check(
    "name movers write the answer",
    "Mean direct effect of the name movers, against the mean size of "
    "all heads outside the two groups.",
    direct.where(movers).mean(),
    of=sizes.where(~movers & ~inhibition).mean(),
    at_least=5.0,
    units="×",
)
claims.check(
    "S-inhibition heads do not",
    "Mean size of their direct effect, as a part of that of the name "
    "movers.",
    sizes.where(inhibition).mean(),
    of=sizes.where(movers).mean(),
    at_most=0.5,
)
claims.check(
    "S-inhibition heads feed the writers",
    f"What they send to the {WORDS[main]} of the writers found, through "
    "MLPs (mean), against the mean size of what all others send.",
    through.where(inhibition).mean(),
    of=abs(through).where(~inhibition).mean(),
    at_least=5.0,
    units="×",
)
claims.show()

# %% [markdown]
# ## What was expected, and what was measured

# %%
claims = Claims("From heads to a circuit: expected and measured")
errors = [
    abs(
        path_by_hand(
            ATTENTION[int(head["layer"])],
            int(head["head"]),
            inputs(kind, group),
            ATTENTION + MLPS,
        )
        - float(head)
    )
    for group, found in zip(groups, senders, strict=False)
    for kind in found["into"].values
    for head in [top_head(found.sel(into=kind))]
]
claims.check(
    "by hand and by paths",
    "For the strongest path of each kind, two hooked runs by hand "
    "return the number of `paths`; this is the largest disagreement.",
    max(errors),
    at_most=0.001,
)
ordered = np.sort(sizes, axis=None)[::-1]
few = round(ordered.size / 20)
claims.check(
    "few heads write the answer",
    f"The strongest twentieth of the heads ({few} of {ordered.size}) "
    "carries most of all direct effects, in absolute value.",
    ordered[:few].sum(),
    of=ordered.sum(),
    at_least=0.7,
)
late = sizes.layer >= 2 * model.cfg.n_layers / 3
claims.check(
    "the writers come late",
    "Of all direct effects, most lie in the last third of the layers.",
    sizes.where(late).sum(),
    of=sizes.sum(),
    at_least=0.7,
)
layer, head = groups[1][0]
claims.check(
    "a sender works through others",
    f"The head that sends most to the writers ({label(groups[1][:1])}) "
    "writes little to the logits itself; as a part of its total effect.",
    abs(direct.sel(layer=layer, head=head)),
    of=total.sel(layer=layer, head=head),
    at_most=0.5,
)
claims.check(
    "some inputs are the word itself",
    "Into the keys, queries or values of some group, the token alone "
    "brings back a good part (largest share).",
    np.nanmax(from_token),
    at_least=0.1,
)
together = float(patched.sel(set="all three groups"))
claims.check(
    "the set is enough",
    "Patched together, the heads found bring back most of the answer.",
    together,
    at_least=0.5,
)
senders_alone = sum(
    float(total.sel(layer=layer, head=head))
    for layer, head in circuit[len(groups[0]) :]
)
claims.check(
    "early heads add less than their own effects",
    "What the earlier groups add to the writers, as a part of what "
    "their heads bring back one by one, added up.",
    together - float(patched.sel(set="writers")),
    of=senders_alone,
    at_most=0.75,
)
equal = np.interp(len(circuit), SIZES, drawn.max(0))
claims.check(
    "and better than chance",
    "They bring back more than the best of the random draws of as many "
    "heads; the difference.",
    together - equal,
    at_least=0.25,
)
claims.check(
    "the set is faithful",
    "With every head outside the set ablated, most of the clean logit "
    "difference is left.",
    left.sel(set="keep the set"),
    at_least=0.5,
)
random_sets = [name for name in ablated if "random" in name]
claims.check(
    "random heads do little",
    "With as many random heads ablated, most of it stays (mean).",
    left.sel(set=random_sets).mean(),
    at_least=0.6,
)
claims.check(
    "the set is complete",
    "With the set ablated, most of it is gone.",
    left.sel(set="ablate the set"),
    at_most=0.5,
)
claims.check(
    "self-repair",
    "With the strongest writer ablated, some head makes up for a part of "
    "what it no longer writes.",
    repair.max(),
    at_least=0.02,
)
claims.check(
    "and its opposite",
    "Some other head adds to the loss.",
    repair.min(),
    at_most=-0.02,
)
claims.show()

# %% [markdown]
# ## Can you explain it?
#
# <details><summary>A head has a large total effect and no direct one. What does it do?</summary>
#
# It tells later heads something: where to look, or what to carry. Patch its paths to their queries, keys and
# values to learn which.
#
# </details>
#
# <details><summary>A set of heads brings back the whole answer when patched. Is it the
# circuit?</summary>
#
# Not yet. In the patched run all other heads still work. Ablate them: if the answer goes, the set needs
# more than itself. Then ablate the set: if the answer stays, the model has another way.
#
# </details>
#
# <details><summary>With a strong head ablated, the answer hardly falls. Was the head
# unimportant?</summary>
#
# Perhaps not. Later heads may have made up for it. Compare the fall with what the head itself wrote.
#
# </details>
#
# ## Exercises
#
# **1. A path through MLPs.** Take the head that sends most to the writers *through MLPs*. Use
# `path_by_hand` to get the same number with hooks: the receivers are `inputs(main, groups[0])`. Put the
# share into `answer_1`.

# %% tags=["exercise"]
answer_1 = None  # your code here

# %% tags=["exercise"]
best = top_head(through)
print(f"The head is {best.head_label.item()}.")
exercise_1 = Exercise(
    "Exercise 1", lambda share: abs(share - float(best)) < 0.001
)
exercise_1.check(answer_1)

# %% tags=["exercise", "hide-cell"]
# Solution of exercise 1
exercise_1.verify(
    path_by_hand(
        ATTENTION[int(best["layer"])],
        int(best["head"]),
        inputs(main, groups[0]),
        ATTENTION,
    )
)

# %% [markdown]
# **2. How many?** Take heads in the order of total effect, from `orders[0]`. How many must be patched
# together to bring back nine tenths of what the largest set of the curve does? Put the number into
# `answer_2`.

# %% tags=["exercise"]
answer_2 = None  # your code here


# %% tags=["exercise"]
def reached(number):
    first = [("out", i, j) for i, j in orders[0][:number]]
    return float(patch(model, scored, {"first": first})[0]) >= (
        0.9 * strongest[-1]
    )


exercise_2 = Exercise(
    "Exercise 2",
    lambda n: reached(n) and (n == 1 or not reached(n - 1)),
)
exercise_2.check(answer_2)

# %% tags=["exercise", "hide-cell"]
# Solution of exercise 2
firsts = {
    number: [("out", i, j) for i, j in orders[0][:number]]
    for number in range(1, SIZES[-1] + 1)
}
enough = patch(model, scored, firsts) >= 0.9 * strongest[-1]
exercise_2.verify(int(enough["set"][enough][0]))

# %% [markdown]
# Next: [Approximate, then verify](08_approximate_then_verify.ipynb).
