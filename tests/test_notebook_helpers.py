"""What notebooks call around their experiments: the model, the runtime's description, sentences."""

from __future__ import annotations

import re
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
import xarray as xr
from IPython.display import Markdown

from patching_demo import notebook
from patching_demo.engine.kinds import kind_label
from patching_demo.models import MODEL_ENV


def test_the_model_is_the_one_that_is_resolved_and_said(capsys, monkeypatch):
    monkeypatch.delenv(MODEL_ENV, raising=False)
    model = notebook.model("attn-only-2l-demo", "induction")
    assert model.cfg.model_name == "attn-only-2l-demo"
    assert capsys.readouterr().out == "Model: attn-only-2l-demo (asked for).\n"
    with pytest.raises(ValueError, match="can't do the ioi task"):
        notebook.model("attn-only-2l-demo", "ioi")
    monkeypatch.setenv(MODEL_ENV, "nothing-of-the-kind")
    with pytest.raises(ValueError, match="'nothing-of-the-kind'"):
        notebook.model()


def test_a_sentence_is_displayed_as_markdown_with_its_numbers_typeset(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    notebook.say("A share of -71% in `x[-1]`")
    (sentence,) = shown
    assert isinstance(sentence, Markdown)
    assert sentence.data == notebook.typeset("A share of -71% in `x[-1]`") != "A share of -71%"
    assert "−71 %" in sentence.data and "`x[-1]`" in sentence.data


def test_setup_seeds_and_turns_gradients_off(capsys):
    try:
        notebook.setup()
        first = torch.rand(1)
        notebook.setup()
        assert torch.equal(first, torch.rand(1))
        assert not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)
    assert capsys.readouterr().out == 2 * (notebook.runtime() + "\n")


def test_the_diagram_speaks_to_screen_readers_and_needs_no_network():
    markup = notebook.diagram()._repr_html_()
    assert 'role="img"' in markup and 'fill="currentColor"' in markup
    for element in ("title", "desc"):
        (identifier,) = re.findall(rf'<{element} id="([\w-]+)">', markup)
        assert re.search(rf'aria-labelledby="[^"]*\b{identifier}\b', markup)
    assert "http" not in markup.replace("http://www.w3.org/2000/svg", "")
    assert repr(notebook.diagram()).startswith("Two grids of activations")


@pytest.mark.parametrize("where", ["plain Python", "Jupyter", "Google Colab"])
@pytest.mark.parametrize("gpu", [False, True])
def test_the_runtime_is_described_in_three_lines(where, gpu, monkeypatch):
    there = {"ipykernel": where != "plain Python", "google.colab": where == "Google Colab"}
    for name, present in there.items():
        monkeypatch.delitem(sys.modules, name, raising=False)
        if present:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    runtime, device, versions = notebook.runtime().splitlines()
    assert runtime.startswith(f"Runtime: {where}, Python 3.")
    assert device.startswith("Device: GPU (a card)" if gpu else "Device: no GPU; CPU with ")
    assert ("Change runtime type" in device) == (where == "Google Colab" and not gpu)
    assert f"torch {torch.__version__.partition('+')[0]}" in versions


def test_the_largest_effects_stand_in_a_table_with_the_kind_in_words():
    result = xr.DataArray(
        np.array([[[0.0, 0.5]], [[0.9, 0.1]]]),
        dims=("kind", "layer", "head"),
        coords={"kind": ["q", "out"], "layer": [0], "head": [0, 1]},
        attrs={"clean_baseline": 1.0, "corrupted_baseline": 0.0, "metric": "logit difference"},
    ).assign_coords(head_label=(("layer", "head"), [["L0H0", "L0H1"]]))
    shown = notebook.largest(result, 2)._repr_html_()
    assert "The 2 patches that move the logit difference furthest" in shown
    first, second = (shown.index(label) for label in ("L0H0", "L0H1"))
    assert first < second
    assert ">q<" not in shown and kind_label("q") in shown
    plain = notebook.largest(result.sel(kind="q", drop=True), 1)._repr_html_()
    assert "L0H1" in plain and "kind" not in plain
    sure = result.assign_coords(low=result - 0.25, high=result + 0.25)
    assert "output L0H0  90 %       65 %       115 %" in repr(notebook.largest(sure, 1))
