"""The explorer panel without a browser: widgets are set as a reader would set them."""

from __future__ import annotations

import asyncio
import re
import threading
from contextlib import nullcontext
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from patching_demo import explorer, load_model, paths, plan, plots, prompt_task, sweep
from patching_demo.engine.bridge import attached_hooks
from patching_demo.explorer import Panel, markup, widgets
from patching_demo.plots.theme import number
from patching_demo.results import attention

PATIENCE = 60
HEADS = ("out", "q", "k", "v", "pattern")


@pytest.fixture
def model():
    return tiny.model("gpt2")


@pytest.fixture
def panel(model):
    return Panel(model)


class Markup(HTMLParser):
    """The tags, the attributes and the text of a piece of HTML; every tag must be closed."""

    def __init__(self, markup: str):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], "", []
        self.feed(markup)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def all_markup(panel) -> Markup:
    """Everything that the panel shows as HTML."""
    parts = (panel.advice, panel.status, panel.picture, panel.cell)
    return Markup("".join(part.value for part in parts))


def looks_and_words(picture: str) -> list[tuple[str, str]]:
    """Of each cell, in order, its CSS and what a screen reader says of it."""
    rules = re.findall(r"(#T_[^{]*){([^}]*)}", picture)
    css = {cell.strip()[1:]: look for cells, look in rules for cell in cells.split(",")}
    cells = re.findall(r'<td id="([^"]*)"[^>]*><span title="([^"]*)"', picture)
    return [(css[cell], words) for cell, words in cells]


def finished(panel):
    """The panel after its Run button was pressed and the sweep has ended."""
    panel.run_button.click()
    assert panel.wait(PATIENCE) and panel.error is None
    return panel


def repeated(panel):
    """What the lines that the panel shows give, which is what it shows."""
    namespace = {"model": panel._model}
    exec(panel.code, namespace)
    np.testing.assert_allclose(namespace["result"].values, panel.result.values, atol=1e-5)
    assert panel.result.attrs == namespace["result"].attrs
    return namespace["result"]


def test_panel_opens_ready_to_run(panel):
    assert not panel.run_button.disabled and panel.stop_button.disabled
    assert "Ready" in panel.advice.value
    # The name that differs is marked in both prompts.
    assert panel.advice.value.count("<mark") == 2
    assert panel.result is None and panel.code == ""
    with pytest.raises(RuntimeError, match="press Run"):
        panel.figure()


@pytest.mark.parametrize(
    ("field", "typed", "says"),
    [
        ("clean", "John gave the bag to", "as many tokens"),
        ("clean", widgets.IOI_PROMPTS[1], "nothing to patch"),
        ("corrupted", "  ", "is empty"),
        ("right", "Mary", "leading space"),
        ("wrong", " Mary", "same token"),
        ("wrong", " Xerxes", "not in the tokenizer"),
        ("wrong", "", "no token"),
    ],
)
def test_what_does_not_fit_is_refused_in_words_as_it_is_typed(panel, field, typed, says):
    before = getattr(panel, field).value
    getattr(panel, field).value = typed
    assert panel.run_button.disabled
    shown = Markup(panel.advice.value)
    assert says in shown.text and "Change this first" in shown.text
    assert not re.search(r"[.:]\.", shown.text), "a sentence ends in one full stop"
    # Where both prompts can be read, their tokens stand below the sentence.
    assert ("table" in shown.tags) == bool(typed.strip() or field != "corrupted")
    with pytest.raises(ValueError, match=re.escape(says)):
        panel.run()
    getattr(panel, field).value = before
    assert not panel.run_button.disabled and "Ready" in panel.advice.value


def test_model_in_training_mode_is_refused_in_words():
    model = tiny.fresh("gpt2").train()
    panel = Panel(model)
    assert panel.run_button.disabled and "model.eval()" in panel.advice.value


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_every_choice_of_the_menu_gives_what_sweep_gives(name):
    model = tiny.model(name)
    panel = Panel(model)
    task = prompt_task(model, panel.clean.value, panel.corrupted.value, (" Mary", " John"))
    for _, (kinds, by) in panel.choice.options:
        panel.choice.value = (kinds, by)
        finished(panel)
        kinds = kinds if isinstance(kinds, str) else list(kinds)
        expected = sweep(model, task, kinds, by=by, progress=False)
        np.testing.assert_allclose(panel.result.values, expected.values, rtol=1e-4, atol=1e-5)
        assert panel.result.attrs == expected.attrs
        # Each table is whole: as many cells as numbers, unless it was trimmed to the largest.
        cells = Markup(panel.picture.value).tags.count("td")
        across = next(d for d in ("position", "role", "head") if d in expected.dims)
        n_rows = expected.size // expected.sizes[across]
        assert cells == expected.size or n_rows > markup.MOST_ROWS


def test_menu_leaves_out_what_the_model_does_not_have():
    names = [kinds for _, (kinds, _) in Panel(tiny.model("neox-parallel")).choice.options]
    assert "resid_mid" not in names and "resid_pre" in names


def test_prompts_of_other_lengths_are_swept_by_the_part_that_is_named(model):
    prompts = ("When Mary went home, Mary gave the bag to", "When John went, John gave the bag to")
    panel = Panel(model, clean=prompts[0], corrupted=prompts[1])
    assert panel.run_button.disabled and "Patch at the named part" in panel.advice.value
    panel.choice.value = ("resid_pre", "role")
    assert "Ready" in panel.advice.value and "11 and 10 tokens" in panel.advice.value
    panel.part.value = ", Peter | , John"
    assert "does not occur" in panel.advice.value and panel.run_button.disabled
    panel.part.value = ", Mary | , John"
    finished(panel)
    assert panel.result["role"].values.tolist() == [", Mary", "END"]
    repeated(panel)
    panel.places.children[1].value = 0
    assert "clean prompt has ' Mary' and the corrupted one ' John'" in Markup(panel.cell.value).text


def test_noising_is_swept_and_says_which_run_is_which(panel):
    finished(panel)
    first = panel.result
    panel.direction.value = "noising"
    assert "earlier settings" in panel.status.value
    finished(panel)
    assert not np.allclose(panel.result.values, first.values)
    repeated(panel)
    picture, cell = Markup(panel.picture.value).text, Markup(panel.cell.value).text
    clean = number(first.attrs["clean_baseline"])
    assert f"{clean}, the clean baseline" in picture and "towards corrupted" in picture
    assert "share of corrupted minus clean" in cell and "the corrupted prompt has" in cell


@pytest.mark.parametrize("metric", widgets.METRICS)
def test_code_repeats_the_numbers(model, metric):
    prompts = ('John gave the "bag" to', 'Mary gave the "bag" to')
    panel = Panel(model, clean=prompts[0], corrupted=prompts[1], metric=metric)
    panel.right.value, panel.wrong.value = " John", " Mary"
    panel.choice.value = (HEADS, "all_pos")
    finished(panel)
    assert panel.figure() == plots.heatmap(repeated(panel))


def test_selection_shows_the_numbers_of_the_cell(panel):
    finished(panel)
    # At first the largest effect is shown, and it is the one marked in the picture.
    clean, corrupted = (panel.result.attrs[f"{w}_baseline"] for w in ("clean", "corrupted"))
    best = panel.result.values[panel.largest.value]
    assert abs(best - corrupted) == np.abs(panel.result.values - corrupted).max()
    layer, position = panel.places.children
    for at in ((1, 12), (0, 10)):
        layer.value, position.value = at
        value = float(panel.result[at])
        text = Markup(panel.cell.value).text
        assert f"Layer {at[0]}" in text and panel.result["position"].values[at[1]] in text
        for shown in (value, value - corrupted, clean, corrupted):
            assert number(shown) in text
        assert panel.picture.value.count('aria-current="true"') == 1
        marked = re.search(r'title="([^"]*)" aria-current', panel.picture.value)[1]
        assert marked.endswith(number(value)) and f"layer {at[0]}," in marked
    assert "' John'" in text and "' Mary'" in text
    # A click in the list goes to that cell.
    panel.largest.index = 3
    assert (layer.value, position.value) == panel.largest.value
    # Where the prompts agree no number is passed off as measured.
    position.value = 2
    assert "nothing to patch" in panel.cell.value


@pytest.mark.parametrize("choice", [("resid_pre", "pos"), ("out", "pos"), (HEADS, "all_pos")])
def test_every_cell_of_the_picture_says_where_it_is(panel, choice):
    panel.choice.value = choice
    finished(panel)
    for at in np.ndindex(panel.result.shape):
        panel.picked.value = ",".join(map(str, at))  # As a click on the cell does.
        assert panel.picked.value == ""
        assert tuple(menu.value for menu in panel.places.children) == at
        places = re.findall(r'aria-current="true" data-at="([^"]*)"', panel.picture.value)
        assert places == [",".join(map(str, at))]
        if not np.isnan(panel.result.values[at]) and "nothing to patch" not in panel.cell.value:
            assert number(float(panel.result.values[at])) in panel.cell.value
    listed = re.findall(r'data-at="([^"]*)"', panel.picture.value)
    assert sorted(listed) == sorted(",".join(map(str, at)) for at in np.ndindex(panel.result.shape))


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
@pytest.mark.parametrize("kind", ["out", "k", "pattern"])
def test_paths_into_a_head_are_a_click_away(name, kind):
    model = tiny.model(name)
    panel = Panel(model, kinds=kind, by="all_pos")
    with pytest.raises(RuntimeError, match="no such head is shown"):
        panel.run_paths("q")
    finished(panel)
    shared = model.cfg.n_heads // (model.cfg.n_key_value_heads or model.cfg.n_heads)
    own = kind == "k" and shared > 1  # Such a head belongs to several queries.
    panel.picked.value = "0,1"
    assert all(button.disabled for button in panel.into.values())  # No head comes before it.
    panel.picked.value = "1,1"
    head = 1 if own else 1 // shared
    task = panel.task
    assert panel.into["q"].disabled == panel.attention_button.disabled == own
    for receiver, index in (("q", 1), ("k", head), ("v", head)):
        if panel.into[receiver].disabled:
            with pytest.raises(RuntimeError, match="no such head is shown"):
                panel.run_paths(receiver)
            continue
        panel.run_button.click()
        panel.picked.value = "1,1"
        panel.into[receiver].click()
        assert panel.wait(PATIENCE) and panel.error is None
        expected = paths(model, task, [(receiver, 1, index)], progress=False)
        np.testing.assert_allclose(panel.result.values, expected.values, atol=1e-5)
        assert panel.result.attrs == expected.attrs
        repeated(panel)
        panel.picked.value = "1,1"
        assert "No path leads" in panel.cell.value and "No path leads" in panel.picture.value
        assert f"L1H{index}" in Markup(panel.picture.value).text


def test_a_sweep_without_heads_offers_no_paths(panel):
    finished(panel)
    assert panel.about_head.layout.display == "none"
    with pytest.raises(RuntimeError, match="no such head is shown"):
        panel.run_paths("k")


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_attention_of_the_chosen_head_is_a_click_away(model, direction):
    clean, corrupted = (
        "When Mary went home, Mary gave the bag to",
        "When John went, John gave it to",
    )
    panel = Panel(model, clean=clean, corrupted=corrupted)
    panel.part.value = ", Mary | , John"
    panel.choice.value, panel.direction.value = ("out", "role"), direction
    finished(panel)
    panel.picked.value = "1,0,2"
    panel.attention_button.click()
    tables = panel.patterns.value.split("<table")[1:]
    prompts = [("clean", clean), ("corrupted", corrupted)]
    prompts = prompts if direction == "denoising" else prompts[::-1]
    for table, (which, text) in zip(tables, prompts, strict=True):
        expected = attention(model, model.to_tokens(text)).sel(layer=1, head=2).values
        shown = [int(cell) for cell in re.findall(r">(\d+)</span>", table)]
        assert f"L1H2 in the {which} prompt" in table
        assert shown == [round(100 * float(weight)) for weight in expected.ravel()]
    Markup(panel.patterns.value)
    finished(panel)
    assert panel.patterns.value == ""


def test_attention_that_cannot_be_read_is_said(panel, monkeypatch):
    panel.choice.value = ("out", "all_pos")
    finished(panel)

    def refuse(*_):
        raise ValueError("the model has no blocks.0.attn.hook_pattern")

    monkeypatch.setattr(widgets, "attention", refuse)
    panel.attention_button.click()
    assert "no blocks.0.attn.hook_pattern" in panel.status.value and not panel.patterns.value


def test_picture_says_where_nothing_was_patched_and_colours_by_direction(panel):
    finished(panel)
    result = panel.result
    clean, corrupted = (result.attrs[f"{w}_baseline"] for w in ("clean", "corrupted"))
    cells = looks_and_words(panel.picture.value)
    assert len(cells) == result.size
    rows = result.values.reshape(-1)
    agrees = np.tile(result["agrees"].values, result.sizes["layer"])
    for (look, words), value, agree in zip(cells, rows, agrees, strict=True):
        assert ("nothing to patch" in words) == agree == ("repeating" in look)
        share = (value - corrupted) / (clean - corrupted)
        if not agree and abs(share) > 0.1:
            red, _, blue = (int(part, 16) for part in re.search(r"#(..)(..)(..)", look).groups())
            assert (blue > red) == (share > 0), (look, words)


def test_many_heads_are_trimmed_to_the_largest_and_the_chosen(model, monkeypatch):
    monkeypatch.setattr(markup, "MOST_ROWS", 3)
    panel = finished(Panel(model, kinds="out"))
    rows = re.findall(r'<th scope="row"[^>]*>(L\d+H\d+)<', panel.picture.value)
    assert len(rows) == 3 and rows[0] in panel.largest.options[0][0]
    layer, _, head = panel.places.children
    other = next(i for i in range(8) if f"L{i // 4}H{i % 4}" not in rows)
    layer.value, head.value = divmod(other, 4)
    again = re.findall(r'<th scope="row"[^>]*>(L\d+H\d+)<', panel.picture.value)
    assert len(again) == 4 and again[-1] == f"L{other // 4}H{other % 4}"


def test_heads_that_do_not_exist_are_gaps():
    panel = finished(Panel(tiny.model("llama-gqa"), kinds=HEADS, by="all_pos"))
    missing = int(np.isnan(panel.result.values).sum())
    assert missing and panel.picture.value.count(': no value"') == missing
    assert "Grey: no value. This model has no such head" in panel.picture.value
    kind, _, head = panel.places.children
    kind.value, head.value = HEADS.index("k"), 3
    assert "share keys and values" in panel.cell.value and "nan" not in panel.cell.value.lower()
    assert panel.about_head.layout.display == "none"
    with pytest.raises(RuntimeError, match="no such head is shown"):
        panel.run_paths("k")
    head.value = 1
    assert panel.about_head.layout.display == ""


def test_html_and_latex_are_shown_as_text(model):
    prompts = [f"When <script> gave $x$ to {name} <b> $b$ the" for name in ("John", "Mary")]
    panel = Panel(model, clean=prompts[0], corrupted=prompts[1])
    finished(panel)
    panel.wrong.value = " <script>"
    shown = all_markup(panel)
    allowed = "style p b div table caption thead tbody tr th td span code mark"
    assert set(shown.tags) <= set(allowed.split())
    # What runs is the package's own, on one element, and nothing of what was typed is in it.
    runs = [what for name, what in shown.attributes if name.startswith("on")]
    assert runs == 2 * [markup.CHOOSE]
    assert "<b>" not in panel.advice.value.replace("<b>Ready:</b>", "")
    assert "<" in shown.text and "$" in shown.text
    # A dollar stands alone in its element, so that two of them never enclose a formula.
    parts = "".join(part.value for part in (panel.advice, panel.picture, panel.cell))
    text = re.sub(r'(title|aria-label)="[^"]*"', "", parts)
    assert text.count("$") == text.count("<span>$</span>") > 0


def test_quotes_in_tokens_end_no_attribute(panel):
    """The tiny tokenizer has none, but a typed prompt may."""
    finished(panel)
    hostile = ['"onmouseover="alert(1)', "'onclick='alert(2)", '"><script>alert(3)</script>']
    names = [f"{hostile[i % 3]} {i}" for i in range(panel.result.sizes["position"])]
    result = panel.result.assign_coords(position=names)
    shown = Markup(markup.heatmap_table(result, (1, 12)))
    plain = Markup(markup.heatmap_table(panel.result, (1, 12)))
    assert shown.tags == plain.tags
    assert [name for name, _ in shown.attributes] == [name for name, _ in plain.attributes]
    assert names[1] in [value for _, value in shown.attributes]


def test_stop_ends_a_sweep_and_leaves_everything_as_it_was():
    model = tiny.fresh("gpt2")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    panel = finished(Panel(model))
    first = panel.result
    panel.choice.value = ("out", "pos")

    def stop_at_once(change):
        if 0 < change["new"] < panel.progress.max:
            panel.stop_button.click()

    panel.progress.observe(stop_at_once, names="value")
    panel.run_button.click()
    assert panel.wait(PATIENCE) and panel.error is None
    panel.progress.unobserve_all()
    assert "Stopped" in panel.status.value and panel.progress.value < panel.progress.max
    assert panel.stop_button.disabled and not panel.run_button.disabled
    assert "earlier settings" in panel.status.value and panel.result is first
    assert not attached_hooks(model) and not model.training and torch.is_grad_enabled()
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    seen = []
    panel.progress.observe(lambda change: seen.append(change["new"]), names="value")
    finished(panel)
    assert len(seen) > 2 and seen[1:] == sorted(seen[1:]) and seen[-1] == panel.progress.max
    task = prompt_task(model, panel.clean.value, panel.corrupted.value, (" Mary", " John"))
    expected = sweep(model, task, "out", progress=False)
    np.testing.assert_allclose(panel.result.values, expected.values, atol=1e-5)


def in_a_loop(scenario):
    """Run a coroutine as a notebook's kernel runs cells, and wait for panels that it returns."""

    async def until_done():
        panels = await scenario()
        while any(panel.running for panel in panels):
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(until_done(), PATIENCE))


def test_in_a_notebook_the_kernel_stays_free_and_only_it_changes_widgets(model):
    """Two panels at once, while cells run the model: nothing reaches anything else."""
    one, other = Panel(model, kinds="out"), Panel(model, kinds="q", metric="probability")
    alone = [
        finished(Panel(model, kinds=k, metric=p.metric.value)).result
        for k, p in (("out", one), ("q", other))
    ]
    ids = model.to_tokens(one.clean.value)
    with torch.no_grad():
        logits = model(ids)
    threads, forwards = set(), 0
    for panel in (one, other):
        for widget in (panel.progress, panel.status, panel.picture, panel.run_button):
            widget.observe(lambda change: threads.add(threading.get_ident()))

    async def scenario():
        nonlocal forwards
        one.run_button.click()
        other.run_button.click()
        while one.running or other.running:
            with torch.no_grad():
                assert torch.equal(model(ids), logits)
                assert torch.equal(model.run_with_cache(ids)[0], logits)
            forwards += 1
            await asyncio.sleep(0)
        return one, other

    in_a_loop(scenario)
    assert threads == {threading.get_ident()} and forwards > 1
    for panel, expected in zip((one, other), alone, strict=True):
        assert panel.error is None
        np.testing.assert_allclose(panel.result.values, expected.values, atol=1e-5)


def test_while_a_sweep_runs_the_buttons_say_so(panel, monkeypatch):
    go_on, started = threading.Event(), threading.Event()
    plain, asked = widgets.sweep, panel.clean.value

    def slow(*args, **kwargs):
        started.set()
        assert go_on.wait(PATIENCE)
        return plain(*args, **kwargs)

    monkeypatch.setattr(widgets, "sweep", slow)

    async def scenario():
        panel.run_button.click()
        assert started.wait(PATIENCE)
        assert panel.running and panel.run_button.disabled and not panel.stop_button.disabled
        assert all(button.disabled for button in panel.into.values())
        assert not panel.wait(0.01)
        with pytest.raises(RuntimeError, match="under way"):
            panel.run()
        # Typing meanwhile does not free the button, and the result is that of what was asked.
        panel.clean.value = "John gave"
        assert panel.run_button.disabled
        go_on.set()
        return [panel]

    in_a_loop(scenario)
    assert panel.run_button.disabled and "earlier settings" in panel.status.value
    assert repr(asked) in panel.code
    panel.clean.value = asked
    assert not panel.run_button.disabled


def test_a_cell_may_wait_for_the_result(panel):
    async def scenario():
        panel.run()
        assert panel.wait(PATIENCE) and panel.result is not None
        return [panel]

    in_a_loop(scenario)
    assert "Done" in panel.status.value


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("choice", [("resid_pre", "pos"), ("out", "all_pos")])
@pytest.mark.parametrize("where", ["heatmap_table", "sweep"])
def test_what_fails_leaves_the_panel_free(panel, monkeypatch, choice, where, error):
    panel.choice.value = choice

    def fail(*_, **__):
        raise error

    interrupted = where == "heatmap_table" and error is KeyboardInterrupt
    with monkeypatch.context() as broken:
        broken.setattr(widgets, where, fail)
        with pytest.raises(error) if interrupted else nullcontext():
            panel.run()
    assert not panel.running and not panel.run_button.disabled
    if where == "heatmap_table" or error is ZeroDivisionError:
        assert isinstance(panel.error, error) and "did not work" in panel.status.value
    finished(panel)


def test_a_thread_that_cannot_start_leaves_the_panel_free(panel, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    async def scenario():
        with monkeypatch.context() as broken:
            broken.setattr(threading.Thread, "start", refuse)
            panel.run()
        assert not panel.running and isinstance(panel.error, RuntimeError)
        panel.run()
        return [panel]

    in_a_loop(scenario)
    assert panel.error is None and "Done" in panel.status.value


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("out of <memory>\nand more"), "RuntimeError: out of &lt;memory&gt;"),
        (ValueError("the metric is nan"), "the metric is nan"),
    ],
)
def test_an_error_is_said_in_a_line_and_kept(panel, monkeypatch, error, says):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(widgets, "sweep", fails)
    panel.run()
    assert panel.wait(PATIENCE)
    assert says in panel.status.value and "did not work" in panel.status.value
    assert panel.error is error and panel.result is None
    assert not panel.run_button.disabled and panel.stop_button.disabled


def test_the_picture_says_when_the_settings_have_moved_on(panel):
    finished(panel)
    assert "Done" in panel.status.value
    panel.metric.value = "probability"
    assert "earlier settings" in panel.status.value
    panel.metric.value = "logit difference"
    assert "of these settings" in panel.status.value
    panel.metric.value = "probability"
    finished(panel)
    assert panel.result.attrs["metric"] == "probability"
    assert "earlier settings" not in panel.status.value


def test_numbers_in_the_picture_have_as_many_decimals_as_the_range_needs(panel):
    finished(panel)
    clean, corrupted = (panel.result.attrs[f"{w}_baseline"] for w in ("clean", "corrupted"))
    effect = np.abs(panel.result.values - corrupted).max()
    reach = max(abs(clean - corrupted), effect)
    written = re.findall(r">(−?[\d.]+)</span>", panel.picture.value)
    (places,) = {len(text.partition(".")[2]) for text in written}
    assert 10.0**-places <= reach / 10 < 10.0 ** (1 - places)
    agrees = panel.result["agrees"].values
    shown = [float(text.replace("−", "-")) for text in written]
    np.testing.assert_allclose(
        shown, panel.result.values[:, ~agrees].ravel(), atol=0.501 * 10.0**-places
    )
    assert not [text for text in written if text.startswith("−") and not float(text[1:])]


@pytest.mark.parametrize("apart", [0.0, 1e-7])
def test_effects_that_are_all_zero_have_a_picture(panel, apart):
    finished(panel)
    flat = panel.result.copy(data=np.full(panel.result.shape, 0.5, np.float32))
    flat.attrs.update(clean_baseline=0.5 + apart, corrupted_baseline=0.5)
    assert Markup(markup.heatmap_table(flat, (0, 0))).tags.count("td") == flat.size
    words, _ = markup.largest_effects(flat)[0]
    assert "%" not in words and "–" in markup.cell_table(flat, panel.task, (1, 12))


def test_wrong_arguments_are_refused(model):
    for given, options, match in (
        (tiny.model("attn-only"), {}, "no tokenizer"),
        (model.original_model, {}, "must be a TransformerBridge of a decoder, got GPT2LMHead"),
        (SimpleNamespace(), {}, "must be a TransformerBridge of a decoder"),
        (model, dict(by="all_pos"), "kinds and by must be one of .*'resid_pre'"),
        (model, dict(metric="accuracy"), "metric must be one of"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            Panel(given, **options)


def test_the_earlier_name_still_makes_a_panel(model):
    with pytest.warns(DeprecationWarning, match="now explorer.Panel"):
        assert explorer.explore is Panel
    with pytest.raises(AttributeError, match="no attribute 'sweeep'"):
        _ = explorer.sweeep


@pytest.mark.slow
def test_language_model_gives_its_first_picture_within_twenty_seconds():
    """Work as it is counted, on one core that does 60 billion operations a second."""
    panel = Panel(load_model("smollm2-135m"))
    assert panel.result is None and "15 tokens each" in panel.advice.value
    choices = [(k, by) for _, (k, by) in panel.choice.options if by == "all_pos" or k not in HEADS]
    assert {("resid_pre", "pos"), (HEADS, "all_pos")} <= {*choices}
    for choice in choices:
        panel.choice.value = choice
        panel.run()
        assert panel.wait(600) and panel.error is None
        assert "patching-heatmap" in panel.picture.value
        work = plan(panel._model, panel.task, choice[0], by=choice[1], speed=60e9)
        assert work.seconds < 20, f"{choice} takes {work}"
    # What was copied loads the model by its name, in a namespace that has nothing else.
    panel.choice.value = ("resid_pre", "pos")
    finished(panel)
    namespace: dict = {}
    exec(panel.code, namespace)
    np.testing.assert_allclose(namespace["result"].values, panel.result.values, atol=1e-3)
