"""Claims decide by their numbers, show what they decide, and fail on results that are not so."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import tiny
import xarray as xr

from patching_demo import chapter_claims, induction_task, ioi_task, load_model, sweep
from patching_demo.claims import Checks, Claim, ClaimFailed
from patching_demo.tasks import CORRUPTIONS, Task

HEAD_KINDS = ["out", "q", "k", "v", "pattern"]
SHUFFLES = 20


# Claims and tables ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("relation", "measured", "holds"),
    [
        ("at least", 0.5, True),
        ("at least", 0.49, False),
        ("at most", 0.5, True),
        ("at most", 0.51, False),
        ("at least", math.nan, False),
        ("at most", math.nan, False),
        ("at least", math.inf, True),
        ("at most", math.inf, False),
    ],
)
def test_verdict_follows_from_the_number(relation, measured, holds):
    claim = Claim("name", "text", measured, relation, 0.5)
    assert claim.holds is holds
    assert claim.verdict == ("holds" if holds else "fails")


def test_failure_names_claim_measurement_and_threshold():
    checks = Checks("title")
    checks.at_least("early enough", "It comes early.", 0.123, 0.5)
    checks.at_most("late enough", "It comes late.", 0.1, 0.5)
    with pytest.raises(ClaimFailed) as failure:
        checks.verify()
    assert isinstance(failure.value, AssertionError)
    for part in ("early enough", "12 %", "at least 50 %", "It comes early."):
        assert part in str(failure.value)
    assert "late enough" not in str(failure.value)
    assert [claim.name for claim in checks.failed] == ["early enough"]


def test_show_displays_the_table_before_it_fails(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    checks = Checks("title")
    checks.at_least("early", "It comes early.", 0.1, 0.5)
    with pytest.raises(ClaimFailed):
        checks.show()
    assert "✗ fails" in shown[0]._repr_html_() and "early" in repr(shown[0])


def test_unchecked_claims_neither_hold_nor_fail():
    checks = Checks("title")
    checks.not_checked("heads", "Known heads matter.", "at least", 0.5, "this is another model")
    checks.verify()
    assert checks["heads"].holds is None
    markup = checks._repr_html_()
    assert ">not checked<" in markup and "holds" not in markup
    for shown in (markup, repr(checks)):
        assert "1 of 1 not checked here: this is another model" in shown


def test_no_claims_do_not_pass():
    with pytest.raises(ValueError, match="no claims"):
        Checks("title").verify()


def test_claims_refuse_what_cannot_be_decided():
    with pytest.raises(ValueError, match="threshold"):
        Claim("name", "text", 0.1, "at least", math.nan)
    with pytest.raises(ValueError, match="relation"):
        Claim("name", "text", 0.1, "about", 0.1)
    with pytest.raises(ValueError, match="reason"):
        Claim("name", "text", None, "at least", 0.1)
    checks = Checks("title")
    checks.at_least("name", "text", 1.0, 0.5)
    with pytest.raises(ValueError, match="already"):
        checks.at_most("name", "text", 1.0, 0.5)
    with pytest.raises(KeyError):
        checks["other"]


def test_table_shows_text_as_text_and_names_its_columns():
    checks = Checks("<i>title</i> $x$")
    checks.at_least("<b>name</b>", "a < b & $y$", 0.5, 0.1)
    markup = checks._repr_html_()
    for raw in ("<i>", "<b>", "$x$", "$y$", "a < b"):
        assert raw not in markup.replace('aria-label="&lt;i&gt;title&lt;/i&gt; $x$"', "")
    assert "&lt;b&gt;name" in markup
    assert markup.count('scope="col"') == 5 and 'scope="row"' in markup
    assert "&lt;i&gt;title&lt;/i&gt;" in markup.split("<table")[0]
    assert 'tabindex="0"' in markup and 'aria-label="' in markup


def test_small_shares_are_not_rounded_onto_their_threshold():
    claim = Claim("name", "text", 0.0249, "at most", 0.02)
    assert claim.written(claim.measured) == "2.5 %" and claim.verdict == "fails"


# Results with a known circuit in them -----------------------------------------------------------


def noise(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return 0.0005 * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def labelled(
    values: np.ndarray, dims: tuple[str, ...], kinds: list[str], model: str
) -> xr.DataArray:
    """Values as `sweep` would label them, with the last five of fifteen positions differing."""
    coords: dict = {"kind": kinds}
    sizes = dict(zip(dims, values.shape, strict=True))
    coords["layer"] = np.arange(sizes["layer"])
    if "position" in dims:
        coords["position"] = [f"token {i}" for i in range(sizes["position"])]
        coords["agrees"] = ("position", np.arange(sizes["position"]) < 10)
    if "head" in dims:
        coords["head"] = np.arange(sizes["head"])
        labels = [[f"L{i}H{j}" for j in range(sizes["head"])] for i in range(sizes["layer"])]
        coords["head_label"] = (("layer", "head"), labels)
    attrs = {"clean_baseline": 1.0, "corrupted_baseline": 0.0, "metric": "m", "model": model}
    return xr.DataArray(values, dims=dims, coords=coords, attrs=attrs)


def ioi_blocks() -> xr.DataArray:
    """A staircase: S2 holds everything up to layer 7, END from then on."""
    values = noise((4, 12, 15), seed=1)
    for stream in (0, 3):
        values[stream, :8, 10], values[stream, 8:, 14] = 1.0, 0.9
    values[1, 8, 14], values[1, 5, 10], values[2, 0, 10] = 0.6, 0.3, 1.0
    values[2, 10, 14] = 0.1
    values[:, :, :10] = 0.0
    kinds = ["resid_pre", "attn_out", "mlp_out", "resid_mid"]
    return labelled(values, ("kind", "layer", "position"), kinds, "smollm2-135m")


def ioi_heads(model: str) -> tuple[xr.DataArray, xr.DataArray]:
    """The published circuit of GPT-2 small, over all positions and by position."""
    values = planted_circuit()
    positions = labelled(values, ("kind", "layer", "position", "head"), HEAD_KINDS, model)
    heads = labelled(values.sum(2), ("kind", "layer", "head"), HEAD_KINDS, model)
    return heads, positions


def planted_circuit() -> np.ndarray:
    """Effects [kind, layer, position, head] at the published heads and nearly none elsewhere."""
    values = noise((5, 12, 15, 12), seed=2)
    values[:, :, :10] = 0.0
    for group, place, by, size in (
        ("name mover", 14, "pattern", 0.2),
        ("S-inhibition", 14, "v", 0.15),
        ("induction", 10, "pattern", 0.12),
        ("duplicate-token", 10, "pattern", 0.08),
    ):
        for layer, head in chapter_claims.IOI_CIRCUIT[group]:
            values[0, layer, place, head] = size
            values[HEAD_KINDS.index(by), layer, place, head] = size
            if by == "pattern":  # made by the query
                values[HEAD_KINDS.index("q"), layer, place, head] = size
    return values


def shuffled(result: xr.DataArray, seed: int) -> xr.DataArray:
    """The same values in other places."""
    values = np.random.default_rng(seed).permutation(result.values.ravel())
    return result.copy(data=values.reshape(result.shape))


@pytest.fixture(scope="module")
def demo_tasks() -> tuple[object, dict[str, Task]]:
    """The shipped model, and short induction tasks on it."""
    model = load_model("attn-only-2l-demo")
    return model, {name: induction_task(model, name, seq_len=10) for name in CORRUPTIONS}


@dataclass
class Scale:
    """The baselines of a task, which is all that a claim reads of one."""

    clean_baseline: float = 1.0
    corrupted_baseline: float = -1.0


MIRRORED = Scale()


@pytest.fixture(scope="module")
def chapters(demo_tasks) -> dict[str, Callable[[Callable], Checks]]:
    """For each chapter's part: its claims, over results that went through a given function."""
    model, tasks = demo_tasks
    quiet = {"progress": False}
    heads = {
        name: sweep(model, task, HEAD_KINDS, by="all_pos", **quiet) for name, task in tasks.items()
    }
    by_position = sweep(model, tasks["AB"], HEAD_KINDS, by="pos", **quiet)
    noised = sweep(model, chapter_claims.noising(tasks["BA"]), "out", by="all_pos", **quiet)
    previous = chapter_claims.previous_token_attention(model, tasks["AB"])
    repeated = chapter_claims.induction_attention(model, tasks["AB"])
    blocks = ioi_blocks()
    stream = blocks.sel(kind="resid_pre").assign_attrs(kind="resid_pre")
    published, published_by_position = ioi_heads("gpt2-small")
    # On an un-normalised scale from -1 to 1.
    by_hand = {(0, place): 2 * float(stream[0, place]) - 1 for place in (9, 10, 14)}
    chances = {
        name: heads[name].assign_attrs(
            clean_baseline=math.exp(task.clean_baseline),
            corrupted_baseline=math.exp(task.corrupted_baseline),
        )
        for name, task in tasks.items()
    }

    return {
        "first patch": lambda f, task=MIRRORED: chapter_claims.first_patch(
            f(stream), by_hand, task
        ),
        "blocks": lambda f: chapter_claims.ioi_blocks(f(blocks)),
        "heads": lambda f: chapter_claims.ioi_heads(f(published)),
        "positions": lambda f: chapter_claims.ioi_positions(f(published_by_position)),
        "published heads": lambda f: chapter_claims.gpt2_small_heads(
            f(published), f(published_by_position)
        ),
        "induction": lambda f: chapter_claims.induction(
            f(heads["AB"]), f(by_position), f(noised), f(previous), f(repeated)
        ),
        "baselines": lambda f, chances=chances: chapter_claims.baselines(
            {n: f(r) for n, r in heads.items()}, chances
        ),
    }


#: The functions that the tests below run on shuffled results.
CHECKED = {
    "first_patch",
    "ioi_blocks",
    "ioi_heads",
    "ioi_positions",
    "gpt2_small_heads",
    "induction",
    "baselines",
}
PARTS = [
    "first patch",
    "blocks",
    "heads",
    "positions",
    "published heads",
    "induction",
    "baselines",
]


@pytest.mark.parametrize("part", PARTS)
def test_claims_hold_on_a_circuit(chapters, part):
    checks = chapters[part](lambda result: result)
    checks.verify()
    assert all(claim.holds for claim in checks), "a claim was not checked"


@pytest.mark.parametrize("part", PARTS)
def test_claims_fail_on_shuffled_results(chapters, part):
    failures = 0
    for seed in range(SHUFFLES):
        checks = chapters[part](lambda result, seed=seed: shuffled(result, seed))
        try:
            checks.verify()
        except ClaimFailed:
            failures += 1
    # A shuffle may by chance put the few large values where they belong.
    assert failures >= 0.9 * SHUFFLES


@pytest.mark.parametrize("part", PARTS)
def test_each_claim_can_fail_by_itself(chapters, part):
    wrong = [lambda result, seed=seed: shuffled(result, seed) for seed in range(SHUFFLES)]
    # In any order, values have the same middle and the same largest one; these do not.
    for baseline in ("clean_baseline", "corrupted_baseline"):
        wrong.append(lambda result, at=baseline: xr.full_like(result, result.attrs[at]))
    names = {claim.name for claim in chapters[part](lambda result: result)}
    for change in wrong:
        names -= {claim.name for claim in chapters[part](change).failed}
    # These compare two baselines, and no cell: see the next test.
    assert names <= {
        "BB is worse than guessing",
        "a probability does not tell them apart",
        "the right name first",
        "the sign turned",
    }


def test_claims_about_baselines_can_fail_too(chapters):
    def right_on_bb(result: xr.DataArray) -> xr.DataArray:
        return result.assign_attrs(corrupted_baseline=result.attrs["clean_baseline"] - 1.0)

    assert not chapters["baselines"](right_on_bb)["BB is worse than guessing"].holds

    apart = {
        name: xr.DataArray(attrs={"clean_baseline": 0.9, "corrupted_baseline": low})
        for name, low in (("BB", 0.4), ("BC", 0.1))
    }
    alike = "a probability does not tell them apart"
    assert not chapters["baselines"](lambda result: result, apart)[alike].holds

    first = chapters["first patch"]
    wrong_name = first(lambda result: result, Scale(clean_baseline=-1.0, corrupted_baseline=1.0))
    assert not wrong_name["the right name first"].holds
    assert not first(lambda result: result, Scale(1.0, -0.5))["the sign turned"].holds


def test_published_heads_are_not_checked_on_another_model():
    checks = chapter_claims.gpt2_small_heads(*ioi_heads("smollm2-135m"))
    checks.verify()
    assert len(checks) > 5
    assert all(claim.holds is None and "smollm2-135m" in claim.verdict for claim in checks)


def test_published_heads_are_checked_on_gpt2_small_under_each_of_its_names(monkeypatch):
    """Sweeps of a model with GPT-2 small's layers and heads: random weights, then the circuit."""
    model = tiny.model("gpt2-12x12")
    monkeypatch.setattr(model.cfg, "model_name", "gpt2-small")
    task = ioi_task(model).normalised()
    heads, by_position = (
        sweep(model, task, HEAD_KINDS, by=by, progress=False) for by in ("all_pos", "pos")
    )
    assert by_position.dims == ("kind", "layer", "position", "head")
    assert heads.attrs["model"] == by_position.attrs["model"] == "gpt2-small"
    values = planted_circuit()
    for name in chapter_claims.GPT2_SMALL:
        heads, by_position = (r.assign_attrs(model=name) for r in (heads, by_position))
        checks = chapter_claims.gpt2_small_heads(heads, by_position)
        assert all(claim.holds is not None for claim in checks)
        assert {f"{group} heads" for group in chapter_claims.IOI_CIRCUIT} < {c.name for c in checks}
        with pytest.raises(ClaimFailed):
            checks.verify()
        planted, over_all = by_position.copy(data=values), heads.copy(data=values.sum(2))
        assert all(claim.holds for claim in chapter_claims.gpt2_small_heads(over_all, planted))
        for seed in range(5):
            wrong = shuffled(over_all, seed), shuffled(planted, seed)
            assert chapter_claims.gpt2_small_heads(*wrong).failed


def test_missing_cells_do_not_pass_as_zeros(chapters):
    with pytest.raises(ClaimFailed):
        chapters["blocks"](lambda result: xr.full_like(result, np.nan)).verify()


# Readings ---------------------------------------------------------------------------------------


def test_readings_of_results():
    blocks = ioi_blocks()
    assert chapter_claims.positions_of(blocks) == (10, 14)
    assert chapter_claims.crossing(blocks.sel(kind="resid_pre")) == 8
    never = xr.zeros_like(blocks.sel(kind="resid_pre"))
    assert chapter_claims.crossing(never) == 12
    heads, _ = ioi_heads("gpt2-small")
    out = heads.sel(kind="out")
    best = chapter_claims.top_head(out)
    assert best in chapter_claims.IOI_CIRCUIT["name mover"]
    strong = chapter_claims.strong_heads(out)
    assert strong[0] == f"L{best[0]}H{best[1]}"
    assert len(strong) == 9  # name movers, S-inhibition and induction heads: 0.1 of 0.2 and more
    with pytest.raises(ValueError, match="no positions"):
        chapter_claims.positions_of(out)
    looked_at = chapter_claims.heads_to_look_at(heads, 2)
    assert looked_at[0] == best and len(set(looked_at)) == len(looked_at) <= 6
    for kind in ("out", "pattern", "q"):
        assert chapter_claims.top_head(heads.sel(kind=kind)) in looked_at


def test_attention_readings_agree_with_the_pattern(demo_tasks):
    model, tasks = demo_tasks
    task = tasks["AB"]
    previous = chapter_claims.previous_token_attention(model, task)
    repeated = chapter_claims.induction_attention(model, task)
    cache = task.clean_cache(model, "blocks.0.attn.hook_pattern")
    pattern = cache["blocks.0.attn.hook_pattern"]  # [batch, head, dest, src]
    length = (task.clean_tokens.shape[1] - 1) // 2
    before = [pattern[:, 3, i, i - 1].mean() for i in range(2, 2 * length + 1)]
    after = [pattern[:, 3, i, i - length + 1].mean() for i in range(length + 1, 2 * length + 1)]
    assert float(previous[0, 3]) == pytest.approx(float(np.mean(before)), abs=1e-6)
    assert float(repeated[0, 3]) == pytest.approx(float(np.mean(after)), abs=1e-6)


def test_noising_turns_the_scale_round(demo_tasks):
    model, tasks = demo_tasks
    task = chapter_claims.noising(tasks["BA"])
    assert (task.clean_baseline, task.corrupted_baseline) == (1.0, 0.0)
    intact = task.metric(model(task.corrupted_tokens)).item()
    ruined = task.metric(model(task.clean_tokens)).item()
    assert intact == pytest.approx(0.0, abs=1e-5)
    assert ruined == pytest.approx(1.0, abs=1e-5)
