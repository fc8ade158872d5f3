"""Sweeps by role, on prompts of any lengths, against a loop over single prompts with hooks."""

from __future__ import annotations

import functools
import gc
import re

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
import xarray as xr
from oracle import model

from patching_demo import (
    attribute,
    interval,
    ioi_task,
    noise_task,
    patch,
    paths,
    prompt_task,
    sweep,
)
from patching_demo.engine import checks, runner
from patching_demo.engine.kinds import KINDS
from patching_demo.sweeps import question
from patching_demo.sweeps.question import Question
from patching_demo.tasks import Task

QUIET = {"progress": False}

#: Subjects of one to three tokens, in templates of several lengths; clean and corrupted differ.
CLEAN = [
    "When Mary and John went to the park, John gave the ball to",
    "After Tom and James ran home, James gave a drink to",
    "The cat sat on the mat. Then Dan and Sid went to the shops, Dan gave an apple to",
    "After Amy and Martin went to the park, Martin gave a drink to",
    "When Mary and Tom went to the park, Tom gave the ball to",
]
CORRUPTED = [
    "When Mary and John went to the park, home Mary gave the ball to",
    "After Tom and James ran home, Tom gave a drink to",
    "The dog sat on the mat. Then Dan and Sid went to the shops, the cat gave an apple to",
    "After Amy and Martin went to the park, Amy gave a drink to",
    "When John and Tom went to the park, home John gave the ball to",
]
SUBJECT = (
    [", John", ", James", ", Dan", ", Martin", ", Tom"],
    [", home Mary", ", Tom", ", the cat", ", Amy", ", home John"],
)
FIRST = (
    ["Mary and", "Tom and", "Dan and", "Amy and", "Mary and"],
    ["Mary and", "Tom and", "Dan and", "Amy and", "John and"],
)
ANSWERS = {
    "one token": [(" Mary", " John"), (" Tom", " James"), (" Sid", " Dan"), (" Amy", " Martin"),
                  (" Mary", " Tom")],
    "several tokens": [(" Mary and John", " John"), (" Tom", " James home"),
                       (" Sid and the dog", " Sid and Dan"), (" Amy", " Martin"),
                       (" Mary", " Tom and")],
    "several answers": [([" Mary", " Amy home"], [" John", " Dan"]), (" Tom", " James"),
                        ([" Sid", " Tom"], " Dan"), (" Amy", [" Martin", " Sid to the"]),
                        (" Mary", " Tom")],
}  # fmt: skip


@functools.lru_cache(None)
def task_of(name: str, answers: str = "one token", metric: str = "logit difference") -> Task:
    roles = {"first": FIRST, "subject": SUBJECT}
    return prompt_task(model(name), CLEAN, CORRUPTED, ANSWERS[answers], roles=roles, metric=metric)


def by_hand(bridge, task: Task, patches, answers, metric="logit difference") -> np.ndarray:
    """The metric of each prompt alone, with hooks: no batch, no padding, no engine.

    ``patches`` maps a hook name to (axis of positions, role, head or None).
    """
    values = []
    prompts = zip(CLEAN, CORRUPTED, answers, strict=True)
    for number, (clean, corrupted, pair) in enumerate(prompts):
        row = number * task.rows_per_prompt
        with torch.no_grad():
            _, cache = bridge.run_with_cache(clean)

        def patched(activation, hook, name, row=row, cache=cache):
            axis, role, head = patches[name]
            here, there = (int(places[row]) for places in task.roles[role])
            to, of = activation.select(axis, there), cache[name].select(axis, here)
            if head is None:
                to.copy_(of)
            else:
                to[:, head] = of[:, head]
            return activation

        hooks = [(name, functools.partial(patched, name=name)) for name in patches]

        def log_prob(answer, corrupted=corrupted, hooks=hooks):
            ids = bridge.to_tokens(answer, prepend_bos=False)[0]
            tokens = torch.cat([bridge.to_tokens(corrupted)[0], ids[:-1]])[None]
            with torch.no_grad():
                logits = bridge.run_with_hooks(tokens, fwd_hooks=hooks)[0]
            return logits[-len(ids) :].log_softmax(-1).gather(1, ids[:, None]).sum()

        right, wrong = (
            torch.stack([log_prob(a) for a in ([side] if isinstance(side, str) else side)])
            .logsumexp(0)
            for side in pair
        )  # fmt: skip
        score = {"logit difference": right - wrong, "log-probability": right}
        values.append(float(score.get(metric, right.exp())))
    return np.array(values)


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("gpt2", "several tokens"),
        ("llama-gqa", "several answers"),
        ("gemma2", "one token"),
        ("neox-parallel", "several tokens"),
    ],
)
def test_every_cell_by_role_is_a_run_of_each_prompt_alone(name, answers):
    bridge, task = model(name), task_of(name, answers)
    kinds = ["resid_pre", "attn_out", "mlp_out"], ["out", "q", "k", "v"]
    for group in kinds:
        found = sweep(bridge, task, group, by="role", per_prompt=True, **QUIET)
        assert list(found.role.values) == ["first", "subject", "END"]
        spread = float(found.max() - found.min())
        rng = np.random.default_rng(0)
        for _ in range(6):
            at = {dim: int(rng.integers(found.sizes[dim])) for dim in found.dims if dim != "prompt"}
            cell = found.isel(at)
            kind = KINDS[str(cell.kind.values)]
            role, head = str(cell.role.values), at.get("head")
            if cell.isnull().all():  # Keys and values have fewer heads.
                assert head >= 2
                continue
            hook = f"blocks.{at['layer']}.{kind.hook}"
            wanted = by_hand(bridge, task, {hook: (1, role, head)}, ANSWERS[answers])
            np.testing.assert_allclose(cell, wanted, atol=1e-4 * spread + 1e-5)
    mean = sweep(bridge, task, "out", by="role", **QUIET)
    xr.testing.assert_allclose(
        mean, found.sel(kind="out").mean("prompt").drop_vars("kind"), atol=1e-6
    )


@pytest.mark.parametrize("metric", ["log-probability", "probability"])
@pytest.mark.parametrize("answers", ["several tokens", "several answers"])
def test_answers_of_several_tokens_by_every_metric(metric, answers):
    bridge, task = model("gpt2"), task_of("gpt2", answers, metric)
    again = task_of("gpt2", answers).with_metric(bridge, metric)
    for own in (task, again):
        found = sweep(bridge, own, "resid_pre", by="role", per_prompt=True, layers=1, **QUIET)
        hook = {"blocks.1.hook_resid_pre": (1, "subject", None)}
        wanted = by_hand(bridge, own, hook, ANSWERS[answers], metric)
        np.testing.assert_allclose(found.sel(role="subject"), wanted, atol=1e-5)
        unpatched = by_hand(bridge, own, {}, ANSWERS[answers], metric)
        np.testing.assert_allclose(own.corrupted_values, unpatched, atol=1e-5)
        np.testing.assert_allclose(found.corrupted_baseline, unpatched, atol=1e-5)


def test_single_answers_in_lists_score_as_those_without():
    bridge = model("gpt2")
    lists = [([a], [b]) for a, b in ANSWERS["one token"]]
    plain, task = task_of("gpt2"), prompt_task(bridge, CLEAN, CORRUPTED, lists)
    assert task.clean_baseline == plain.clean_baseline
    assert task.rows_per_prompt == 1
    # Two right answers of one token each need no longer prompts.
    two = prompt_task(
        bridge, CLEAN, CORRUPTED, [([a, " Rome"], b) for a, b in ANSWERS["one token"]]
    )
    assert two.rows_per_prompt == 1 and two.clean_baseline > plain.clean_baseline


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "gemma2"])
def test_sets_paths_and_estimates_take_roles(name):
    bridge, task = model(name), task_of(name)
    parts = [("resid_pre", 1, None, "subject"), ("q", 1, 1, "END"), ("out", 0, 2, "first")]
    found = patch(bridge, task, {"three": parts}, per_prompt=True, **QUIET)
    wanted = by_hand(
        bridge,
        task,
        {
            "blocks.1.hook_resid_pre": (1, "subject", None),
            "blocks.1.attn.hook_q": (1, "END", 1),
            "blocks.0.attn.hook_z": (1, "first", 2),
        },
        ANSWERS["one token"],
    )
    np.testing.assert_allclose(found.sel(set="three"), wanted, atol=2e-4)
    with pytest.raises(ValueError, match="pair 1: the clean prompt has"):
        paths(bridge, task, "logits", **QUIET)


def test_an_estimate_by_role_is_the_difference_times_the_gradient():
    bridge, task = model("gpt2"), task_of("gpt2")
    found = attribute(bridge, task, "mlp_out", by="role", per_prompt=True)
    for number, (clean, corrupted) in enumerate(zip(CLEAN, CORRUPTED, strict=True)):
        name = "blocks.1.hook_mlp_out"
        with torch.no_grad():
            _, cache = bridge.run_with_cache(clean)
        kept = {}

        def keep(activation, hook, kept=kept):
            kept["own"] = activation
            return activation

        embedded = lambda e, hook: e.detach().requires_grad_()  # noqa: E731
        logits = bridge.run_with_hooks(
            corrupted, fwd_hooks=[("hook_embed", embedded), (name, keep)]
        )
        right, wrong = task.answers[number].tolist()
        value = logits[0, -1, right] - logits[0, -1, wrong]
        (gradient,) = torch.autograd.grad(value, kept["own"])
        for role, (here, there) in task.roles.items():
            h, t = int(here[number]), int(there[number])
            moved = cache[name][0, h] - kept["own"][0, t]
            wanted = float(value + (moved * gradient[0, t]).sum())
            assert float(found.sel(layer=1, role=role)[number]) == pytest.approx(wanted, abs=1e-4)


def test_paths_into_a_role_of_pairs_of_equal_length():
    bridge = model("llama-gqa")
    prompts = ["After Tom and James ran home, James gave a drink to",
               "The cat sat. After Amy and Dan went home, Dan gave a drink to"]  # fmt: skip
    others = ["After Tom and James ran home, Tom gave a drink to",
              "The cat sat. After Amy and Dan went home, Amy gave a drink to"]  # fmt: skip
    subject = ([", James", ", Dan"], [", Tom", ", Amy"])
    answers = [(" Tom", " James"), (" Amy", " Dan")]
    task = prompt_task(bridge, prompts, others, answers, roles={"S2": subject})
    found = paths(bridge, task, [("v", 2, 1, "S2")], per_prompt=True, **QUIET)
    # Alone, each prompt has its role at a place of its own; all other positions are left out.
    for number in (0, 1):
        alone = prompt_task(
            bridge, prompts[number], others[number], answers[number],
            roles={"S2": (subject[0][number], subject[1][number])},
        )  # fmt: skip
        own = paths(bridge, alone, [("v", 2, 1, "S2")], **QUIET)
        np.testing.assert_allclose(found[number], own, atol=1e-5)
    everywhere = paths(bridge, task, [("v", 2, 1)], per_prompt=True, **QUIET)
    assert not np.allclose(everywhere.values[0, :2], found.values[0, :2], atol=1e-4)


def test_values_of_prompts_depend_on_no_order_grouping_or_splitting(monkeypatch):
    bridge, task = model("gpt2"), task_of("gpt2", "several tokens")
    whole = sweep(bridge, task, "resid_pre", by="role", per_prompt=True, **QUIET)
    order = [3, 0, 4, 2, 1]
    turned = sweep(bridge, task.select(order), "resid_pre", by="role", per_prompt=True, **QUIET)
    np.testing.assert_allclose(turned, whole[order], atol=1e-5)
    assert turned.attrs["corrupted_baseline"] == pytest.approx(task.corrupted_baseline, abs=1e-5)
    monkeypatch.setattr("patching_demo.tasks.task.GROUP_TOKENS", 1)  # Each prompt alone.
    split = sweep(bridge, task, "resid_pre", by="role", per_prompt=True, **QUIET)
    np.testing.assert_allclose(split, whole, atol=1e-5)
    apart = task.with_metric(bridge, "logit difference")
    for which in ("clean_values", "corrupted_values"):
        torch.testing.assert_close(getattr(apart, which), getattr(task, which))


def test_many_shapes_are_swept_in_the_memory_of_the_largest(monkeypatch):
    """What is kept while a shape is patched grows with its own tokens, not with other shapes."""
    bridge, held, run = model("gpt2"), [], Question.run

    def counted(question, cells):
        # All that has come since the sweep began: objects from before it are frozen.
        held.append(sum(o.nbytes for o in gc.get_objects() if type(o) is torch.Tensor))
        return run(question, cells)

    monkeypatch.setattr(Question, "run", counted)
    texts = [" the" * n for n in range(1, 31)]
    prompts = [[f"{name} sat on{text}" for text in texts] for name in ("Mary", "John")]
    task = prompt_task(bridge, *prompts, [(" Mary", " John")] * 30, roles={"on": "on"})
    for own in (task, task.select([29])):
        gc.collect()
        gc.freeze()
        sweep(bridge, own, "resid_pre", by="role", **QUIET)
    *many, alone = held
    assert len(many) == 30 and many[0] > many[-1] > 0  # The longest come first.
    assert max(many) < 1.1 * alone  # Its numbers of prompts take a little, too.


@pytest.mark.parametrize(
    ("check", "wanted"), [(None, [None, 0, None, 0]), (0, [0] * 4), (1, [1] * 4)]
)
def test_a_few_cells_are_rechecked_of_all_shapes_together(monkeypatch, check, wanted):
    bridge, task, checked, run = model("gpt2"), task_of("gpt2"), [], Question.run

    def counted(question, cells):
        checked.append(question.options.check)
        return run(question, cells)

    monkeypatch.setattr(Question, "run", counted)
    monkeypatch.setattr(runner, "MOST_RECHECKS", 2)
    sweep(bridge, task, "resid_pre", by="role", check=check, **QUIET)
    assert checked == wanted


@pytest.mark.parametrize("source", ["zero", "mean", "given"])
def test_other_sources_by_role(source):
    bridge, task = model("gpt2"), task_of("gpt2")
    name = "blocks.1.hook_mlp_out"
    _, cache = bridge.run_with_cache(task.clean_tokens)
    values = {"zero": "zero", "mean": "mean", "given": {name: 2 * cache[name]}}[source]
    found = sweep(
        bridge, task, "mlp_out", by="role", layers=[1], source=values, per_prompt=True, **QUIET
    ) if source != "given" else sweep(
        bridge, task, "mlp_out", by="role", layers=[1], per_prompt=True,
        source={f"blocks.{i}.hook_mlp_out": 2 * cache[f"blocks.{i}.hook_mlp_out"] for i in (0, 1)},
        **QUIET,
    )  # fmt: skip
    for role, (here, there) in task.roles.items():
        at = cache[name][torch.arange(5), here]
        for number in range(5):
            wanted = {"zero": 0 * at[0], "mean": at.mean(0), "given": 2 * at[number]}[source]

            def hook(activation, hook, wanted=wanted, place=int(there[number])):
                activation[0, place] = wanted
                return activation

            with torch.no_grad():
                logits = bridge.run_with_hooks(CORRUPTED[number], fwd_hooks=[(name, hook)])
            right, wrong = task.answers[number].tolist()
            expected = float(logits[0, -1, right] - logits[0, -1, wrong])
            cell = found.sel(layer=1, role=role)[number]
            assert float(cell) == pytest.approx(expected, abs=1e-4)


def test_reversed_and_normalised_by_role():
    bridge, task = model("llama-gqa"), task_of("llama-gqa")
    back = task.reversed()
    # All that is read follows from the last stream at END, whichever way it is patched.
    last = bridge.cfg.n_layers - 1
    for own, other in ((task, back), (back, task)):
        found = sweep(
            bridge, own, "resid_post", by="role", layers=last, per_prompt=True, **QUIET
        ).sel(role="END")
        np.testing.assert_allclose(found, other.corrupted_values, atol=1e-4)
    share = sweep(bridge, task.normalised(), "resid_post", by="role", layers=last, **QUIET)
    assert float(share.sel(role="END")) == pytest.approx(1, abs=1e-4)
    assert task.reversed().reversed().clean_baseline == task.clean_baseline
    assert task.normalised().reversed().corrupted_values.mean() == pytest.approx(0, abs=1e-5)


def test_roles_where_both_inputs_agree_are_marked_and_cost_nothing():
    bridge = model("gpt2")
    roles = {"IO": "Mary and", "S2": (", John", ", Mary")}
    task = prompt_task(
        bridge,
        "When Mary and John went to the park, John gave the ball to",
        "When Mary and John went to the park, Mary gave the ball to",
        (" Mary", " John"),
        roles=roles,
    )
    found = sweep(bridge, task, "resid_pre", by="role", **QUIET)
    assert found.agrees.values.tolist() == [True, False, False]
    assert np.all(found.sel(role="IO") == np.float32(task.corrupted_baseline))
    by_pos = sweep(bridge, task, "resid_pre", **QUIET)
    for role, (_, there) in task.roles.items():
        np.testing.assert_allclose(
            found.sel(role=role), by_pos.isel(position=int(there[0])), atol=1e-5
        )
    # Patterns have a counterpart here.
    pattern = sweep(bridge, task, "pattern", by="role", **QUIET)
    whole = sweep(bridge, task, "pattern", **QUIET).isel(position=-1)
    np.testing.assert_allclose(pattern.sel(role="END"), whole, atol=1e-5)


def test_what_has_no_counterpart_is_refused_with_the_way_out():
    bridge, task = model("gpt2"), task_of("gpt2")
    for call in (
        lambda: sweep(bridge, task, "resid_pre", **QUIET),
        lambda: sweep(bridge, task, "out", by="all_pos", **QUIET),
        lambda: attribute(bridge, task, "resid_pre"),
    ):
        with pytest.raises(ValueError, match=r"by='role'") as refusal:
            call()
        assert "corrupted  '<bos>'" in str(refusal.value)
    with pytest.raises(ValueError, match="'pattern' has no counterpart"):
        sweep(bridge, task, "pattern", by="role", **QUIET)
    with pytest.raises(ValueError, match="only roles correspond"):
        patch(bridge, task, {"a": [("out", 1, 1)]}, **QUIET)
    with pytest.raises(ValueError, match="no roles"):
        from patching_demo import induction_task

        sweep(bridge, induction_task(bridge), "out", by="role", **QUIET)


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        ({"S": "John"}, r"clean prompt 1: 'John' occurs 2 times in '<bos>' \| 'When'"),
        ({"S": "Paris"}, "does not occur"),
        ({"END": "ball"}, "always the last token"),
        ({"S": ["and John"]}, "names 1 places in 2"),
        ({"S": 99}, "no position 99"),
        ({"S": 1.5}, "1.5"),
        ({"S": ("and John", "and John", "and John")}, "a tuple is"),
    ],
)
def test_roles_that_name_no_one_token_are_refused(roles, said):
    prompts = ["When Mary and John went to the park, John gave the ball to"] * 2
    others = ["When Mary and John went to the park, Mary gave the ball to"] * 2
    with pytest.raises((ValueError, TypeError), match=said):
        prompt_task(model("gpt2"), prompts, others, [(" Mary", " John")], roles=roles)


def test_an_interval_over_prompts_by_role():
    bridge, task = model("gpt2"), task_of("gpt2")
    result = interval(sweep(bridge, task, "resid_pre", by="role", per_prompt=True, **QUIET))
    moved = result.where(~result.agrees, drop=True)
    assert (moved.low <= moved + 1e-6).all() and (moved <= moved.high + 1e-6).all()


def test_a_frame_makes_the_same_task():
    bridge = model("gpt2")
    right, wrong = zip(*ANSWERS["one token"], strict=True)
    frame = pd.DataFrame(
        {
            "clean": CLEAN,
            "corrupted": CORRUPTED,
            "right": right,
            "wrong": wrong,
            "subject": SUBJECT[0],
            "subject_corrupted": SUBJECT[1],
        },
        index=list("abcde"),
    )
    task = Task.from_frame(bridge, frame)
    assert torch.equal(task.roles["subject"][1], task_of("gpt2").roles["subject"][1])
    assert task.clean_baseline == pytest.approx(task_of("gpt2").clean_baseline, abs=1e-6)
    with pytest.raises(ValueError, match="no column 'wrong'"):
        Task.from_frame(bridge, frame.drop(columns="wrong"))
    broken = frame.copy()
    broken.loc["c", "right"] = None
    with pytest.raises(ValueError, match="row 'c'"):
        Task.from_frame(bridge, broken)
    broken = frame.copy()
    broken.loc["d", "subject"] = "nowhere"
    with pytest.raises(ValueError, match="row 'd'"):
        Task.from_frame(bridge, broken)


def test_what_a_model_solves(capsys):
    bridge, task = model("gpt2"), task_of("gpt2")
    right = (task.clean_values > 0).numpy()
    assert right.any() and not right.all()
    kept = task.normalised().solved()
    assert len(kept) == right.sum()
    assert f"on {right.sum()} of 5" in capsys.readouterr().out
    assert kept.clean_baseline == 1
    plain = task.solved()
    assert float(plain.clean_values.min()) > 0
    other = tiny.fresh("gpt2", seed=9)
    theirs = (task.on(other).clean_values > 0).numpy()
    assert (theirs != right).any()
    for scored in (task, task.normalised()):
        assert scored.solved(other).clean_strings == task.select(theirs).clean_strings
    assert task.normalised().reversed().solved(bridge).clean_strings == (
        task.reversed().solved().clean_strings
    )
    assert plain.clean_baseline == pytest.approx(float(task.clean_values[right].mean()))
    with pytest.raises(ValueError, match="does not say which"):
        task.with_metric(bridge, "probability").solved(bridge)
    with pytest.raises(ValueError, match="no prompt"):
        task.select([])
    with pytest.raises(IndexError, match="the task has 5 prompts"):
        task.select([5])


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "gemma2"])
def test_noise_on_embeddings_is_what_a_hook_would_add(name):
    bridge = model(name)
    prompts, subject = CLEAN[:3], ["Mary and John went", "Tom and", "The cat"]
    pairs = ANSWERS["one token"][:3]
    task = noise_task(bridge, prompts, pairs, {"subject": subject}, scale=2.0, seed=1)
    table = bridge.embed.original_component.weight.detach()
    noise = task.extra_embeddings - table[
        torch.cat([own[moved] for own, moved in zip(
            task.clean_tokens, task.clean_tokens != task.corrupted_tokens, strict=True)])
    ]  # fmt: skip
    assert len(noise) == 4 + 2 + 2  # One vector for each token of the substrings.
    assert float(noise.std()) == pytest.approx(2 * float(table.std()), rel=0.25)
    # GPT-2 adds positions after, and Gemma scales what it looked up: as a hook on the lookup.
    found = sweep(bridge, task, ["resid_pre", "mlp_out"], by="role", per_prompt=True, **QUIET)
    start = 0
    for number, prompt in enumerate(prompts):
        tokens = bridge.to_tokens(prompt)
        places = (task.clean_tokens != task.corrupted_tokens)[number].nonzero()[:, 0]
        vectors = task.extra_embeddings[start : start + len(places)]
        start += len(places)

        def noisy(module, args, output, places=places, vectors=vectors):
            ratio = output[0, places[0]] / table[args[0][0, places[0]]]
            output = output.clone()
            output[0, places] = vectors * ratio
            return output

        with torch.no_grad():
            _, cache = bridge.run_with_cache(prompt)
        for kind, layer in (("resid_pre", 1), ("mlp_out", 0)):
            at = int(task.roles["subject"][0][number])

            def put(activation, hook, at=at, kind=kind, layer=layer, cache=cache):
                activation[0, at] = cache[f"blocks.{layer}.hook_{kind}"][0, at]
                return activation

            handle = bridge.embed.original_component.register_forward_hook(noisy)
            with torch.no_grad():
                logits = bridge.run_with_hooks(
                    tokens, fwd_hooks=[(f"blocks.{layer}.hook_{kind}", put)]
                )
            handle.remove()
            right, wrong = task.answers[number].tolist()
            wanted = float(logits[0, -1, right] - logits[0, -1, wrong])
            cell = found.sel(kind=kind, layer=layer, role="subject")[number]
            assert float(cell) == pytest.approx(wanted, abs=2e-4)
    # By position, and reversed, as any task; and the caller's model embeds what it did.
    assert sweep(bridge, task.reversed(), "resid_pre", **QUIET).sizes["position"] > 10
    assert bridge.embed.original_component.weight.shape[0] == len(table)
    with pytest.raises(ValueError, match="embeddings"):
        task.on(bridge)


def test_a_mean_is_of_the_roles_or_of_positions():
    bridge = model("gpt2")
    task = ioi_task(bridge).reversed()
    whole = {"mlp": [("mlp_out", 0)]}
    at_role = {"head": [("out", 0, 1, "S2")]}
    for sets in (whole | at_role, {"both": whole["mlp"] + at_role["head"]}):
        with pytest.raises(ValueError, match="this part names no role: measure such sets"):
            patch(bridge, task, sets, source="mean", **QUIET)
    for sets in (whole, at_role):
        assert patch(bridge, task, sets, source="mean", **QUIET).notnull().all()


def test_roles_that_share_a_token_of_some_prompts_have_no_mean():
    bridge = model("gpt2")
    clean = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]]
    corrupted = [[5, 6, 7, 20, 9, 10], [11, 12, 13, 21, 15, 16]]
    roles = {"a": [2, 3], "b": [3, 3]}
    task = prompt_task(bridge, clean, corrupted, [[5, 9], [11, 6]], roles=roles)
    with pytest.raises(ValueError, match="'a' and 'b' are the same token of some clean prompts"):
        sweep(bridge, task, "mlp_out", by="role", source="mean", **QUIET)
    assert sweep(bridge, task, "mlp_out", by="role", source="zero", **QUIET).notnull().all()


def test_long_sweeps_of_many_shapes_are_announced_once(monkeypatch):
    bridge, task = model("gpt2"), task_of("gpt2")
    monkeypatch.setattr(question, "LONG_SECONDS", 0.0)
    checks._warned.clear()
    with pytest.warns(UserWarning, match="patched runs will take about") as caught:
        found = sweep(bridge, task, "resid_pre", by="role", **QUIET)
    (said,) = (str(w.message) for w in caught if "will take about" in str(w.message))
    runs = int(re.match(r"([\d,]+) patched", said)[1].replace(",", ""))
    assert len(task.groups()) > 2 and runs >= found.size * 2
