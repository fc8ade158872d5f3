"""Whatever the public entry points are given, they answer, or raise what they document.

``FUZZ_CASES`` sets how many cases are tried in each test; the slow test tries 10,000 in all.
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
from patching_demo.engine import checks
from patching_demo.engine.kinds import KINDS
from patching_demo.sweeps import sweep as labelled_sweep

CASES = int(os.environ.get("FUZZ_CASES", "12"))
SLOW_CASES = 10_000
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
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    checks._warned.clear()


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


def the_pair() -> Any:
    if not hasattr(the_pair, "made"):
        the_pair.made = make_pair(tiny.model("gpt2"), BATCH, N_POS, differ=(1,))
    return the_pair.made


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


def check_sweep(tokens: Any, cache: Any, metric: Any, name: str, options: Any) -> None:
    found = answers_or_refuses(
        lambda: getattr(patching, f"get_act_patch_{name}")(
            tiny.model("gpt2"), tokens, cache, metric, **options
        )
    )
    if isinstance(found, Tensor):
        assert torch.isfinite(found).all()


def check_generic(
    tokens: Any, metric: Any, setter: Any, activation: Any, names: Any, frame: Any, options: Any
) -> None:
    answers_or_refuses(
        lambda: patching.generic_activation_patch(
            tiny.model("gpt2"),
            tokens,
            the_pair().cache,
            metric,
            setter,
            activation,
            names,
            frame,
            **options,
        )
    )


def check_metric(kind: str, answers: Any, positions: Any, logits: Any) -> None:
    def call() -> Any:
        metric = getattr(metrics, kind)(answers, positions)
        return metric(logits)

    answers_or_refuses(call)


def check_task(clean: Any, corrupted: Any, answers: Any) -> None:
    answers_or_refuses(lambda: prompt_task(tiny.model("gpt2"), clean, corrupted, answers))


def check_induction(corrupted: Any, batch: Any, seq_len: Any, number: Any) -> None:
    answers_or_refuses(
        lambda: induction_task(
            tiny.model("attn-only"), corrupted, batch=batch, seq_len=seq_len, seed=number
        )
    )


def check_labelled(kinds: Any, by: Any, options: Any) -> None:
    answers_or_refuses(
        lambda: labelled_sweep(tiny.model("gpt2"), the_task(), kinds, by=by, **options)
    )


def the_task() -> Any:
    if not hasattr(the_task, "made"):
        data = the_pair()
        the_task.made = prompt_task(
            tiny.model("gpt2"), data.clean, data.corrupted, [(9, 11), (12, 30)]
        )
    return the_task.made


@lru_cache(None)
def the_corrupted_cache() -> Any:
    with torch.no_grad():
        return tiny.model("gpt2").run_with_cache(the_pair().corrupted)[1]


def check_direct(layer: Any, head: Any, component: Any, tokens: Any, metric: Any) -> None:
    data = the_pair()
    try:
        answers_or_refuses(
            lambda: patching.get_act_patch_direct_path(
                tiny.model("gpt2"),
                tokens,
                data.cache,
                the_corrupted_cache(),
                metric,
                layer,
                head,
                component,
                verbose=False,
            )
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


def check_results(what: str, result: Any, other: Any, number: Any, name: Any) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "share": lambda: results.share(result),
        "largest": lambda: results.largest_cells(result, number),
        "combine": lambda: results.combine({"a": result, "b": other}, "run"),
        "save": lambda: results.save(result, "r.json"),
        "save as": lambda: results.save(result, name),
        "load": lambda: results.load(name),
    }
    found = answers_or_refuses(calls[what])
    if what == "save" and found is not None:
        back = results.load(found)
        xr.testing.assert_allclose(back, result)


def check_figures(draws: str, result: Any, along: Any) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "heatmap": lambda: plots.heatmap(result),
        "curves": lambda: plots.curves(result, along=along),
        "bars": lambda: plots.bars(result, along=along),
    }
    found = answers_or_refuses(calls[draws])
    assert found is None or found.to_json()


def check_names(name: Any, task: Any) -> None:
    """Names that are none, so that no hub is asked."""
    for call in (models.check_name, models.load_model, lambda n: models.resolve_model(n, task)):
        with pytest.raises((ValueError, TypeError)):
            call(name)
        answers_or_refuses(lambda call=call: call(name))


prompts = mostly(
    "When Mary and John", st.text(max_size=12), junk, st.lists(st.text(max_size=8), max_size=3)
)
#: Entry point: (its check, what it is given, its share of the cases)
ENTRY_POINTS: dict[str, tuple[Callable[..., None], Callable[[], list[Any]], int]] = {
    "sweeps": (
        check_sweep,
        lambda: [
            token_inputs(),
            caches(),
            metric_inputs(),
            st.sampled_from([*oracle.SWEEPS, *oracle.COMBINED]),
            few_options,
        ],
        34,
    ),
    "generic": (
        check_generic,
        lambda: [
            mostly(the_pair().corrupted, token_inputs()),
            metric_inputs(),
            mostly(plain_patching.layer_pos_patch_setter, setters, junk),
            activations,
            axes,
            mostly(None, frames()),
            few_options,
        ],
        22,
    ),
    "metrics": (
        check_metric,
        lambda: [
            st.sampled_from(["LogitDifference", "LogProb", "Probability"]),
            mostly([[1, 2], [3, 4]], junk, tensors()),
            mostly([1, 2], junk, tensors(), st.integers(-3, 5)),
            mostly(torch.zeros(2, 4, 128), junk, tensors()),
        ],
        14,
    ),
    "prompt_task": (
        check_task,
        lambda: [
            mostly("Then Mary went to the store", prompts, token_inputs()),
            mostly("Then John went to the store", prompts, token_inputs()),
            mostly((" Mary", " John"), st.tuples(st.text(max_size=5), st.text(max_size=5)), junk),
        ],
        10,
    ),
    "induction_task": (
        check_induction,
        lambda: [
            mostly("AB", st.text(max_size=2), junk),
            mostly(2, junk, st.integers(-2, 4)),
            mostly(6, junk, st.integers(-2, 40)),
            mostly(0, junk),
        ],
        3,
    ),
    "labelled sweep": (
        check_labelled,
        lambda: [
            mostly("resid_pre", st.lists(st.sampled_from(["q", "z", "resid_mid"])), junk),
            mostly("pos", st.sampled_from(["all_pos", "position"]), junk),
            few_options,
        ],
        4,
    ),
    "direct path": (
        check_direct,
        lambda: [
            mostly(0, junk, st.integers(-3, 3)),
            mostly(1, junk, st.integers(-3, 6)),
            mostly("q", st.sampled_from(["k", "v", "z"]), junk),
            token_inputs(),
            metric_inputs(),
        ],
        3,
    ),
    "results": (
        check_results,
        lambda: [
            st.sampled_from(["share", "largest", "combine", "save", "save as", "load"]),
            labelled(),
            labelled(),
            mostly(3, junk, st.integers(-2, 10**6)),
            junk,
        ],
        6,
    ),
    "figures": (
        check_figures,
        lambda: [
            st.sampled_from(["heatmap", "curves", "bars"]),
            labelled(),
            st.sampled_from(["layer", "position", "head", "kind", "nonsense"]),
        ],
        3,
    ),
    "names": (
        check_names,
        lambda: [
            junk.filter(lambda value: not isinstance(value, str) or "/" not in value),
            mostly("ioi", junk),
        ],
        1,
    ),
}
assert sum(share for *_, share in ENTRY_POINTS.values()) == 100


def fuzz(name: str, cases: int) -> None:
    check, ingredients, _ = ENTRY_POINTS[name]
    drawn = st.tuples(*ingredients())

    @seed(int(os.environ.get("FUZZ_SEED", "0")))
    @settings(QUIET, max_examples=cases)
    @given(drawn)
    def run(arguments: tuple[Any, ...]) -> None:
        check(*arguments)

    run()


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_entry_points_answer_or_refuse(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # A store may be given any name.
    fuzz(name, CASES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_ten_thousand_cases(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUZZ_SEED", "1")
    fuzz(name, SLOW_CASES * ENTRY_POINTS[name][2] // 100)
