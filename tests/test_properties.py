"""What holds for any prompts, metric positions and budget."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import tiny
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import make_pair
from torch import Tensor

from patching_demo import patching
from patching_demo.engine import packs, skipping
from patching_demo.metrics import LogitDifference

settings.register_profile(
    "sweeps",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
QUICK = settings(settings.get_profile("sweeps"), max_examples=10)

KINDS = tuple(name for name in oracle.SWEEPS if "dest_src" not in name)
MODELS = ("gpt2", "neox-parallel", "llama-gqa", "attn-only")


def exists(name: str, kind: str) -> bool:
    return not (
        (name == "neox-parallel" and kind == "resid_mid")
        or (name == "attn-only" and kind in ("resid_mid", "mlp_out"))
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[str, str, Any, Any]:
    """A model, a kind of sweep, prompts, and a metric that reads somewhere."""
    name, kind = draw(st.sampled_from(MODELS)), draw(st.sampled_from(KINDS))
    assume(exists(name, kind))
    batch, n_pos = draw(st.integers(1, 3)), draw(st.integers(2, 7) | st.integers(18, 40))
    # Late in a long prompt, so that many short runs share a group, and at times anywhere.
    first = draw(st.integers(0 if n_pos < 8 else n_pos - 9, n_pos - 1) | st.integers(0, n_pos - 1))
    differ = {first, *draw(st.sets(st.integers(first, n_pos - 1), max_size=4))}
    data = make_pair(tiny.model(name), batch, n_pos, tuple(sorted(differ)), draw(st.integers(0, 9)))
    rows = st.lists(st.integers(0, n_pos - 1), min_size=2, max_size=2)
    positions = draw(st.lists(rows, min_size=batch, max_size=batch))
    answers = [[5 + 3 * row, 90 - row] for row in range(batch)]
    metric = draw(st.sampled_from([LogitDifference(answers, positions), *data.metrics.values()]))
    return name, kind, data, metric


def sweep(name: str, kind: str, data: Any, metric: Any, **options: Any) -> Tensor:
    return getattr(patching, f"get_act_patch_{kind}")(
        tiny.model(name), data.corrupted, data.cache, metric, **{"progress": False, **options}
    )


def assert_same(one: Tensor, other: Tensor, baseline: float) -> None:
    """Equal to a few roundings of the metric's size."""
    scale = max(float(other.abs().max()), abs(baseline), 1e-3)
    assert one.shape == other.shape
    assert float((one - other).abs().max()) <= 2e-5 * scale


def baseline_of(name: str, data: Any, metric: Any) -> float:
    with torch.no_grad():
        return float(metric(tiny.model(name)(data.corrupted)))


@QUICK
@given(
    problem=problems(),
    memory=st.sampled_from([1, 1_000, 20_000, 10**9, None]),
    check=st.sampled_from([0, 1, 7]),
    seed=st.integers(0, 5),
    call_tokens=st.sampled_from([1, 7, 40, 10_000]),
)
def test_results_do_not_depend_on_how_the_sweep_is_run(
    problem: Any, memory: int | None, check: int, seed: int, call_tokens: int
) -> None:
    name, kind, data, metric = problem
    usual = sweep(name, kind, data, metric)
    if data.clean.shape[1] > 7:  # One long run at a time takes long and shows no more.
        memory, call_tokens = memory and max(memory, 20_000), max(call_tokens, 40)
    before = dict(packs.CALL_TOKENS)
    packs.CALL_TOKENS["cpu"] = call_tokens
    try:
        other = sweep(name, kind, data, metric, memory=memory, check=check, seed=seed)
    finally:
        packs.CALL_TOKENS.update(before)
    assert_same(other, usual, baseline_of(name, data, metric))


def test_random_cells_agree_with_the_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep's own recheck of many cells, and an outside one; in every way to fill a pack."""
    seen: set[str] = set()
    right = packs.Pack.step

    def step(pack: packs.Pack, *arguments: Any) -> None:
        owner = pack.layout.owner
        if pack.cells[0].patches:  # Not the control runs of the proof.
            for group in owner.tolist():
                seen.add("shared" if len({*group} - {-1}) > 1 else "alone")
            seen.update(["last group full"] * bool((owner[-1] >= 0).all() and len(owner) > 1))
        right(pack, *arguments)

    monkeypatch.setattr(packs.Pack, "step", step)

    @QUICK
    @given(problem=problems(), cells=st.integers(3, 8), seed=st.integers(0, 99))
    def agree(problem: Any, cells: int, seed: int) -> None:
        name, kind, data, metric = problem
        found = sweep(name, kind, data, metric, check=cells, seed=seed)
        activation, setter, axes = oracle.SWEEPS[kind]
        index = oracle.every_cell(tiny.model(name), data.corrupted.shape[1], kind)
        index = index.sample(min(2 * cells, len(index)), random_state=seed, ignore_index=True)
        with torch.no_grad(), oracle.quiet():
            wanted = oracle.plain_patching.generic_activation_patch(
                tiny.model(name),
                data.corrupted,
                data.cache,
                metric,
                setter,
                activation,
                None,
                index,
            )
        flat = found[tuple(torch.tensor(index[axis].tolist()) for axis in axes)]
        assert_same(flat, wanted, baseline_of(name, data, metric))

    agree()
    assert seen == {"shared", "alone", "last group full"}


@QUICK
@given(problem=problems())
@pytest.mark.filterwarnings("ignore:there is nothing to patch")
def test_patching_a_run_with_its_own_cache_changes_nothing(problem: Any) -> None:
    """Bit for bit, as no cell of it has anything to run."""
    name, kind, data, metric = problem
    with torch.no_grad():
        _, own = tiny.model(name).run_with_cache(data.corrupted)
    found = sweep(name, kind, oracle.Pair(data.corrupted, data.corrupted, own, {}), metric)
    assert torch.equal(found, torch.full_like(found, baseline_of(name, data, metric)))


@QUICK
@given(problem=problems())
def test_the_engine_itself_changes_nothing_with_the_runs_own_cache(problem: Any) -> None:
    """To rounding, where no position is skipped because it agrees."""
    name, kind, data, metric = problem
    with torch.no_grad():
        _, own = tiny.model(name).run_with_cache(data.corrupted)
    pair = oracle.Pair(data.corrupted, data.corrupted, own, {})
    everything = lambda self, cells, differing: list(cells)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skipping.Survey, "narrowed", everything)
        patch.setattr(skipping.Survey, "warn_if_nothing_moves", lambda *_: None)
        found = sweep(name, kind, pair, metric)
    base = baseline_of(name, data, metric)
    assert_same(found, torch.full_like(found, base), base)


@QUICK
@given(problem=problems())
def test_a_stream_patched_where_prompts_differ_once_gives_the_clean_run(problem: Any) -> None:
    """With one position that differs, patching block 0's input there makes the prompts equal."""
    name, _, data, metric = problem
    model = tiny.model(name)
    position = int((data.clean != data.corrupted).any(dim=0).nonzero()[-1])
    corrupted = data.clean.clone()
    corrupted[:, position] = data.corrupted[:, position]
    assume(not torch.equal(corrupted, data.clean))
    pair = oracle.Pair(data.clean, corrupted, data.cache, {})
    found = sweep(name, "resid_pre", pair, metric)
    with torch.no_grad():
        clean = float(metric(model(data.clean)))
    scale = max(abs(clean), float(found.abs().max()), 1e-2)
    assert abs(float(found[0, position]) - clean) <= 2e-5 * scale


@QUICK
@given(problem=problems(), data=st.data())
def test_an_effect_before_the_first_difference_is_exactly_none(problem: Any, data: Any) -> None:
    name, kind, prompts, metric = problem
    first = int((prompts.clean != prompts.corrupted).any(dim=0).long().argmax())
    found = sweep(name, kind, prompts, metric)
    axes = ["pos" if axis == "dest_pos" else axis for axis in oracle.SWEEPS[kind][2]]
    if "pos" not in axes:
        return
    early = found.narrow(axes.index("pos"), 0, first)
    assert torch.equal(early, torch.full_like(early, baseline_of(name, prompts, metric)))


@QUICK
@given(problem=problems(), order=st.randoms(use_true_random=False))
def test_prompts_do_not_see_each_other(problem: Any, order: Any) -> None:
    """A batch in another order gives the same values in that order."""
    name, kind, data, _ = problem
    rows = list(range(len(data.clean)))
    order.shuffle(rows)
    model = tiny.model(name)
    usual = sweep(name, kind, data, oracle.all_logits_per_example, reduce="none").values
    with torch.no_grad():
        _, cache = model.run_with_cache(data.clean[rows])
    shuffled = oracle.Pair(data.clean[rows], data.corrupted[rows], cache, {})
    other = sweep(name, kind, shuffled, oracle.all_logits_per_example, reduce="none").values
    assert_same(other, usual[..., rows], 0.0)
