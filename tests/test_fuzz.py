"""Whatever the public entry points are given, they answer, or raise what they document.

The slow test tries 10,000 cases in all, or as many as ``FUZZ_CASES`` says.
"""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pandas as pd
import pytest
import tiny
import torch
import xarray as xr
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from oracle import make_pair
from torch import Tensor
from transformer_lens import patching as plain_patching

import patching_demo
from patching_demo import (
    induction_task,
    metrics,
    models,
    patching,
    plots,
    prompt_task,
    results,
)
from patching_demo.engine.kinds import KINDS
from patching_demo.sweeps import sweep as labelled_sweep

CASES = 12
SLOW_CASES = int(os.environ.get("FUZZ_CASES", "10000"))
DOCUMENTED = (TypeError, ValueError, OSError)
PACKAGE = Path(patching_demo.__file__).parent
BATCH, N_POS = 2, 4

QUIET = settings(
    deadline=None,
    database=None,
    max_examples=CASES,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def answers_or_refuses(call: Callable[[], Any]) -> Any:
    """The call's value, or None if it was refused by the package itself in a documented way.

    An error of a documented type that comes up inside another library was not foreseen.
    """
    try:
        return call()
    except DOCUMENTED as error:
        frames = traceback.extract_tb(error.__traceback__)
        inner = Path(frames[-1].filename)
        # What the file system has to say comes from wherever it was asked.
        assert isinstance(error, OSError) or PACKAGE in inner.parents, (
            f"{type(error).__name__} from {inner}:{frames[-1].lineno}: {error}"
        )
        assert len(str(error)) > 15, f"no more is said than {error!r}"
        return None


# ---- ingredients: mostly right, so that most cases get past the first check


@st.composite
def mostly(draw: st.DrawFn, right: Any, *wrong: st.SearchStrategy[Any]) -> Any:
    """``right`` (a value, or a strategy) in four cases of five."""
    if draw(st.integers(0, 4)):
        return draw(right) if isinstance(right, st.SearchStrategy) else right
    return draw(st.one_of(*wrong))


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.lists(st.integers(-3, 300), max_size=5),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.builds(object),
)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
dtypes = st.sampled_from(
    [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.float16]
    + [torch.complex64, torch.float64, torch.bfloat16, torch.int8]
)


@st.composite
def tensors(draw: st.DrawFn, shape: Any = None) -> Tensor:
    out = torch.full(draw(shapes) if shape is None else shape, draw(st.integers(-2, 200)))
    return out.to(draw(dtypes))


@lru_cache(None)
def the_pair() -> Any:
    return make_pair(tiny.model("gpt2"), BATCH, N_POS, differ=(1,))


def token_inputs() -> st.SearchStrategy[Any]:
    good = the_pair().corrupted
    return mostly(
        good,
        junk,
        tensors(),
        tensors(shape=(BATCH, N_POS)),
        st.sampled_from(
            [
                good.numpy(),
                good.tolist(),
                good.int(),
                good[:1],
                good[:, :-1],
                good.double(),
                good.numpy().astype(object),
                np.array([["a", "b"]]),
                [[1, 2], [3]],
                [[2**70, 1]],
                ["text", "text"],
                good.to_sparse(),
                good.to("meta"),
            ]
        ),
    )


@st.composite
def caches(draw: st.DrawFn) -> Any:
    usual = dict(the_pair().cache.items())
    what = draw(st.sampled_from(["whole"] * 4 + ["less", "changed", "junk", "model's"]))
    if what == "junk":
        return draw(junk)
    if what == "model's":
        return the_pair().cache
    if what == "less":
        for gone in draw(st.sets(st.sampled_from(sorted(usual)), min_size=1, max_size=5)):
            usual.pop(gone)
    if what == "changed":
        for name in draw(st.sets(st.sampled_from(sorted(usual)), min_size=1, max_size=40)):
            value = usual[name]
            usual[name] = draw(
                st.one_of(
                    junk,
                    tensors(),
                    st.sampled_from(
                        [
                            value[:1],
                            value[..., :1],
                            value.half(),
                            value.double(),
                            value.long(),
                            value * float("nan"),
                            value.numpy(),
                            value.transpose(0, 1),
                            value.to("meta"),
                            value.to(torch.complex64),
                        ]
                    ),
                )
            )
    return usual


class Odd:
    """Has a metric's attributes, of any kind."""

    def __init__(self, positions: Any, tokens: Any, read: Any) -> None:
        self.positions, self.tokens, self.what = positions, tokens, read

    def read(self, logits: Tensor) -> Any:
        return self.what

    def from_read(self, read: Any) -> Any:
        return read

    def __call__(self, logits: Tensor) -> Tensor:
        return logits.mean()


def metric_inputs() -> st.SearchStrategy[Any]:
    usual = the_pair().metrics
    single = mostly(
        usual["difference"],
        junk,
        st.sampled_from([usual["log-probability"], usual["all logits"]]),
        st.sampled_from([oracle.all_logits_per_example, usual["difference"].per_example]),
        junk.map(lambda value: lambda logits: value),
        tensors().map(lambda value: lambda logits: value),
        st.builds(Odd, junk | tensors(), junk | tensors(), junk | tensors()),
        st.just(make_pair(tiny.model("gpt2"), 3, 3).metrics["difference"]),
    )
    return st.one_of(
        single, single, single, st.dictionaries(st.text(max_size=3), single, max_size=3)
    )


option_inputs = st.fixed_dictionaries(
    {"progress": st.just(False)},
    optional={
        "reduce": mostly("scalar", st.sampled_from(["mean", "none", "sum"]), junk),
        "baseline": st.booleans(),
        "memory": mostly(None, junk, st.integers(-5, 10**12), st.floats()),
        "check": mostly(0, junk, st.integers(-5, 40), st.floats()),
        "seed": mostly(0, junk, st.integers()),
        "store": mostly(None, junk),
        "typo": st.none(),
    },
)
#: Few draw each option, else nearly all cases would stop at one of them.
few_options = mostly({"progress": False}, option_inputs)
axis = st.sampled_from(["layer", "pos", "head", "head_index", "dest_pos", "src_pos", "neuron"])
axes = mostly(
    None,
    st.lists(axis, max_size=4),
    st.sampled_from(list(oracle.SWEEPS.values())).map(lambda row: list(row[2])),
    junk,
)


@st.composite
def frames(draw: st.DrawFn) -> Any:
    if draw(st.integers(0, 4)) == 0:
        return draw(junk)
    columns = draw(st.sampled_from([row[2] for row in oracle.SWEEPS.values()]))
    columns = list(columns) if draw(st.booleans()) else draw(st.lists(axis, max_size=4))
    number = mostly(0, st.integers(-5, 5), st.floats(), junk)
    rows = draw(st.lists(st.tuples(*[number] * len(columns)), max_size=3))
    return pd.DataFrame(rows, columns=columns)


setters = st.sampled_from([*patching.SETTERS, lambda activation, index, clean: activation])
activations = mostly(
    "resid_pre",
    st.sampled_from(
        [
            *[kind.activation for kind in KINDS.values()],
            "post",
            "nonsense",
            "embed",
            "hook_embed",
            "result",
            "mlp",
        ]
    ),
    junk,
)


# ---- the entry points


def fuzz_sweeps(draw: Any) -> None:
    name = draw(st.sampled_from([*oracle.SWEEPS, *oracle.COMBINED]))
    inputs = draw(token_inputs()), draw(caches()), draw(metric_inputs())
    options = draw(few_options)
    sweep = getattr(patching, f"get_act_patch_{name}")
    found = answers_or_refuses(lambda: sweep(tiny.model("gpt2"), *inputs, **options))
    if isinstance(found, Tensor):
        assert torch.isfinite(found).all()


def fuzz_generic(draw: Any) -> None:
    tokens = draw(mostly(the_pair().corrupted, token_inputs()))
    metric, options = draw(metric_inputs()), draw(few_options)
    setter = draw(mostly(plain_patching.layer_pos_patch_setter, setters, junk))
    where = draw(activations), draw(axes), draw(mostly(None, frames()))
    answers_or_refuses(
        lambda: patching.generic_activation_patch(
            tiny.model("gpt2"), tokens, the_pair().cache, metric, setter, *where, **options
        )
    )


def fuzz_metrics(draw: Any) -> None:
    kind = draw(st.sampled_from(["LogitDifference", "LogProb", "Probability"]))
    answers = draw(mostly([[1, 2], [3, 4]], junk, tensors()))
    positions = draw(mostly([1, 2], junk, tensors(), st.integers(-3, 5)))
    logits = draw(mostly(torch.zeros(2, 4, 128), junk, tensors()))
    answers_or_refuses(lambda: getattr(metrics, kind)(answers, positions)(logits))


def fuzz_prompt_task(draw: Any) -> None:
    lists = st.lists(st.text(max_size=8), max_size=3)
    prompts = mostly("When Mary and John", st.text(max_size=12), junk, lists)
    clean = draw(mostly("Then Mary went to the store", prompts, token_inputs()))
    corrupted = draw(mostly("Then John went to the store", prompts, token_inputs()))
    words = st.text(max_size=5)
    answers = draw(mostly((" Mary", " John"), st.tuples(words, words), junk))
    answers_or_refuses(lambda: prompt_task(tiny.model("gpt2"), clean, corrupted, answers))


def fuzz_induction_task(draw: Any) -> None:
    corrupted = draw(mostly("AB", st.text(max_size=2), junk))
    batch = draw(mostly(2, junk, st.integers(-2, 4)))
    seq_len = draw(mostly(6, junk, st.integers(-2, 40)))
    number = draw(mostly(0, junk))
    model = tiny.model("attn-only")
    answers_or_refuses(lambda: induction_task(model, corrupted, batch, seq_len, number))


def fuzz_labelled_sweep(draw: Any) -> None:
    kinds = draw(mostly("resid_pre", st.lists(st.sampled_from(["q", "z", "resid_mid"])), junk))
    by = draw(mostly("pos", st.sampled_from(["all_pos", "position"]), junk))
    options = draw(few_options)
    answers_or_refuses(
        lambda: labelled_sweep(tiny.model("gpt2"), the_task(), kinds, by=by, **options)
    )


@lru_cache(None)
def the_task() -> Any:
    data = the_pair()
    return prompt_task(tiny.model("gpt2"), data.clean, data.corrupted, [(9, 11), (12, 30)])


@lru_cache(None)
def the_corrupted_cache() -> Any:
    with torch.no_grad():
        return tiny.model("gpt2").run_with_cache(the_pair().corrupted)[1]


def fuzz_direct_path(draw: Any) -> None:
    source = draw(mostly(0, junk, st.integers(-3, 3))), draw(mostly(1, junk, st.integers(-3, 6)))
    component = draw(mostly("q", st.sampled_from(["k", "v", "z"]), junk))
    caches = the_pair().cache, the_corrupted_cache()
    inputs = (tiny.model("gpt2"), draw(token_inputs()), *caches, draw(metric_inputs()), *source)
    try:
        answers_or_refuses(
            lambda: patching.get_act_patch_direct_path(*inputs, component, verbose=False)
        )
    except NotImplementedError:
        pass  # Documented for this function.


@lru_cache(None)
def a_result(kinds: Any = "out", by: str = "pos") -> xr.DataArray:
    kinds = list(kinds) if isinstance(kinds, tuple) else kinds
    return labelled_sweep(tiny.model("gpt2"), the_task(), kinds, by=by, progress=False)


@st.composite
def labelled(draw: st.DrawFn) -> Any:
    """A result, most often with something about it changed."""
    result = a_result(
        *draw(
            st.sampled_from(
                [("out", "pos"), ("resid_pre", "pos"), (("q", "v"), "all_pos"), (("q", "k"), "pos")]
            )
        )
    ).copy(deep=True)
    for change in draw(st.lists(st.sampled_from(list(CHANGES)), max_size=2)):
        result = CHANGES[change](draw, result)
    return result


def _without(draw: st.DrawFn, result: Any, what: str) -> Any:
    kept = dict(getattr(result, what))
    if kept:
        kept.pop(draw(st.sampled_from(sorted(map(str, kept)))), None)
    if what == "coords":
        return result.drop_vars([name for name in result.coords if name not in kept])
    result.attrs = kept
    return result


def _with_junk(draw: st.DrawFn, result: Any) -> Any:
    result.attrs[draw(st.sampled_from(sorted(result.attrs) or ["metric"]))] = draw(junk)
    return result


def _with_value(draw: st.DrawFn, result: Any) -> Any:
    value = draw(st.sampled_from([np.nan, np.inf, -np.inf, 0.0, 1e30]))
    where = draw(st.sampled_from(["one", "all"]))
    if result.size and result.dtype.kind == "f":
        result.values[(0,) * result.ndim if where == "one" else ...] = value
    return result


def _selected(draw: st.DrawFn, result: Any) -> Any:
    if not result.size or not result.dims:
        return result
    dim = draw(st.sampled_from(result.dims))
    return result.isel({dim: draw(st.sampled_from([0, [0], [], slice(1, None)]))})


def _renamed(draw: st.DrawFn, result: Any) -> Any:
    new = draw(st.sampled_from(["kind", "a $b$", "row"]))
    if not result.dims or new in result.dims or new in result.coords:
        return result
    return result.rename({result.dims[0]: new})


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "an attribute less": lambda draw, result: _without(draw, result, "attrs"),
    "a coordinate less": lambda draw, result: _without(draw, result, "coords"),
    "an odd attribute": _with_junk,
    "another value": _with_value,
    "a part": _selected,
    "turned": lambda draw, result: result.transpose(*draw(st.permutations(result.dims))),
    "renamed": _renamed,
    "another type": lambda draw, result: result.astype(draw(st.sampled_from(["f8", "f2", "i8"]))),
    "no result": lambda draw, result: xr.DataArray(draw(st.integers(0, 2))),
}


def fuzz_results(draw: Any) -> None:
    result, other, name = draw(labelled()), draw(labelled()), draw(junk)
    number = draw(mostly(3, junk, st.integers(-2, 10**6)))
    answers_or_refuses(lambda: results.share(result))
    answers_or_refuses(lambda: results.largest_cells(result, number))
    answers_or_refuses(lambda: results.combine({"a": result, "b": other}, "run"))
    answers_or_refuses(lambda: results.save(result, name))
    answers_or_refuses(lambda: results.load(name))
    saved = answers_or_refuses(lambda: results.save(result, "result"))
    if saved is not None:
        xr.testing.assert_allclose(results.load(saved), result)


def fuzz_figures(draw: Any) -> None:
    result = draw(labelled())
    along = draw(st.sampled_from(["layer", "position", "head", "kind", "nonsense"]))
    draws = draw(
        st.sampled_from(
            [
                lambda: plots.heatmap(result),
                lambda: plots.curves(result, along=along),
                lambda: plots.bars(result, along=along),
            ]
        )
    )
    found = answers_or_refuses(draws)
    assert found is None or found.to_json()


def fuzz_names(draw: Any) -> None:
    """Names that are none, so that no hub is asked."""
    name = draw(junk.filter(lambda value: not isinstance(value, str) or "/" not in value))
    for call in (models.check_name, models.load_model):
        with pytest.raises((ValueError, TypeError)):
            call(name)
        answers_or_refuses(lambda call=call: call(name))


#: Each entry point, and its share of the cases in per cent.
ENTRY_POINTS: dict[Callable[[Any], None], int] = {
    fuzz_sweeps: 34,
    fuzz_generic: 22,
    fuzz_metrics: 14,
    fuzz_prompt_task: 10,
    fuzz_induction_task: 3,
    fuzz_labelled_sweep: 4,
    fuzz_direct_path: 3,
    fuzz_results: 6,
    fuzz_figures: 3,
    fuzz_names: 1,
}
assert sum(ENTRY_POINTS.values()) == 100


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_entry_points_answer_or_refuse(
    entry_point: Any, slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # A store may be given any name.
    cases = SLOW_CASES * ENTRY_POINTS[entry_point] // 100 if slow else CASES

    @seed(int(slow))
    @settings(QUIET, max_examples=cases)
    @given(st.data())
    def run(data: Any) -> None:
        entry_point(data.draw)

    run()
