"""The explorer in JupyterLab in a real browser: type, be refused, run, read, copy, stop.

`make browser` runs this. The model is a tiny random one, so that the seconds go to the browser.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
import tiny
import xarray as xr

from patching_demo import paths, prompt_task, sweep
from patching_demo.plots.theme import number

# One JupyterLab serves all of them.
pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[1]
# Milliseconds; generous, for CI machines are slow and shared.
TIMEOUT = 180_000
TOKEN = "explorer"
# Sweeps of heads by position are slowed down, so that there is time to stop one.
SOURCE = """\
import time
import tiny
from patching_demo import explorer
from patching_demo.explorer import widgets
panel, sweep = explorer.Panel(tiny.model("gpt2")), widgets.sweep
def slow(*args, on_progress, **options):
    def asleep(done, total):
        time.sleep(1.0 if panel.choice.value == ("out", "pos") else 0)
        return on_progress(done, total)
    return sweep(*args, on_progress=asleep, **options)
widgets.sweep = slow
panel"""
# JupyterLab would ask, over the notebook, whether to fetch news.
NEWS = "user-settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
PROMPTS = [f"When <b> gave $x$ to {name} the bag <script> to" for name in ("John", "Mary")]
ANSWERS = (" Mary", " John")
PATCHED = 12  # a position after the name that differs
# Keeps, in `said`, what the panel says of its run from now on.
WATCH_STATUS = """() => {
    window.said = [];
    window.watch?.disconnect();
    window.watch = new MutationObserver(
        () => said.push(document.querySelector('.jp-OutputArea [role=status]').textContent.trim())
    );
    watch.observe(document.body, {subtree: true, childList: true, characterData: true});
}"""
ATTACK = "<img src=x onerror=window.executed=1>"


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[str]:
    """The address of a notebook in a JupyterLab with settings and a home of its own."""
    home = tmp_path_factory.mktemp("lab")
    work = home / "work"
    work.mkdir()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SOURCE)])
    notebook.metadata["kernelspec"] = {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    nbformat.write(notebook, work / "explorer.ipynb")
    news = home / "config_dir" / "lab" / NEWS
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false"}', encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folders = ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR")
    settings = {f"JUPYTER_{name}": str(home / name.lower()) for name in folders}
    settings |= {"HOME": str(home), "IPYTHONDIR": str(home / "ipython")}
    settings |= {"JUPYTER_PREFER_ENV_PATH": "1", "OMP_NUM_THREADS": "1"}
    settings["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    options = (
        "--no-browser --allow-root --ip=127.0.0.1 --ServerApp.port_retries=0 "
        f"--port={port} --IdentityProvider.token={TOKEN} --ServerApp.root_dir={work} "
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate --LabApp.news_url="
    )
    log = home / "log"
    with log.open("w", encoding="utf-8") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options.split()],
            env=os.environ | settings,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + TIMEOUT / 1000
        while not _answers(f"http://127.0.0.1:{port}/api"):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/lab/tree/explorer.ipynb?token={TOKEN}"
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(30)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def page(lab) -> Iterator:
    """The notebook with its one cell run, so that the panel shows."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from picture import chromium
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium(),
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(TIMEOUT)
        page.strangers = []
        own = lab.split("/lab/")[0]
        page.on("request", lambda r: _note_stranger(page.strangers, r.url, own))
        page.goto(lab)
        page.locator(".jp-Notebook .jp-CodeCell .cm-content").first.click()
        page.keyboard.press("Shift+Enter")
        page.get_by_text("Ready:").wait_for()
        yield page
        browser.close()


def _note_stranger(strangers: list[str], address: str, own: str) -> None:
    if not address.startswith((own, "data:", "blob:")):
        strangers.append(address)


def run_button(page):
    return page.locator(".jp-OutputArea .widget-button", has_text="Run")


def stop_button(page):
    return page.locator(".jp-OutputArea .widget-button", has_text="Stop")


def fill(page, name: str, text: str) -> None:
    page.get_by_label(name, exact=True).fill(text)


def test_a_prompt_that_does_not_fit_is_refused_as_it_is_typed(page):
    fill(page, "clean prompt", "John gave the bag to")
    page.get_by_text("as many tokens").wait_for()
    assert run_button(page).is_disabled()
    assert page.locator(".jp-OutputArea mark").count() > 2
    fill(page, "right answer", ATTACK)
    fill(page, "clean prompt", PROMPTS[0])
    fill(page, "corrupted prompt", PROMPTS[1])
    page.get_by_text(ATTACK).wait_for()
    assert run_button(page).is_disabled()
    # What was typed is shown, and nothing of it was made into a page.
    assert page.locator(".jp-OutputArea img").count() == 0
    assert page.evaluate("window.executed") is None


def run_prompts(page) -> xr.DataArray:
    """Type both prompts and answers, press Run, and give what the sweep should have found."""
    for name, text in (("clean prompt", PROMPTS[0]), ("corrupted prompt", PROMPTS[1])):
        fill(page, name, text)
    for name, text in zip(("right answer", "wrong answer"), ANSWERS, strict=True):
        fill(page, name, text)
    page.get_by_text("Ready:").wait_for()
    assert run_button(page).is_enabled()
    # The words of the run before may still stand there: what counts is that they go and come back.
    page.evaluate(WATCH_STATUS)
    run_button(page).click()
    page.wait_for_function(
        "() => said.some(words => !words.startsWith('Done')) && said.at(-1).startsWith('Done')"
    )
    model = tiny.model("gpt2")
    return sweep(model, prompt_task(model, *PROMPTS, ANSWERS), "resid_pre", progress=False)


def test_prompts_are_typed_run_and_read(page, tmp_path):
    expected = run_prompts(page)
    # For a person to look at: pytest keeps the folders of its last runs.
    page.locator(".jp-OutputArea-output .widget-vbox").first.screenshot(
        path=tmp_path / "explorer.png"
    )
    table = page.locator("table.patching-heatmap")
    assert table.count() == 1 and table.locator("td").count() == expected.size
    # Drawn, not merely there: cells have room, and those that were measured have colours.
    box = table.bounding_box()
    assert box["width"] > 300 and box["height"] > 30
    read = table.locator("td").evaluate_all(
        "cells => cells.map(c => [c.firstChild.title, getComputedStyle(c).backgroundColor])"
    )
    agrees = [bool(a) for _ in expected["layer"] for a in expected["agrees"].values]
    for (words, colour), value, agree in zip(read, expected.values.ravel(), agrees, strict=True):
        if agree:
            assert words.endswith("nothing to patch")
        else:
            assert words.endswith(f": {number(float(value))}"), words
            assert re.fullmatch(r"rgb\(.*\)", colour)
    assert len({colour for _, colour in read}) > 3
    assert "<b>" not in table.inner_html() and page.locator(".jp-OutputArea script").count() == 0
    assert page.locator(".jp-OutputArea .MathJax, .jp-OutputArea mjx-container").count() == 0
    assert page.strangers == []


def test_a_click_shows_the_numbers_of_a_cell(page):
    expected = run_prompts(page)
    page.get_by_label("layer", exact=True).select_option(label="1")
    page.get_by_label("position", exact=True).select_option(index=PATCHED)
    place = f"layer 1, position {expected['position'].values[PATCHED]}"
    page.wait_for_function(
        "place => document.querySelector('td [aria-current]')?.title.startsWith(place)", arg=place
    )
    assert page.get_by_text(place.capitalize(), exact=False).count() == 1
    page.get_by_label("largest effects").select_option(index=2)
    marked = page.locator("table.patching-heatmap td [aria-current]")
    chosen = page.get_by_label("largest effects").evaluate(
        "list => list.selectedOptions[0].textContent"
    )
    value = re.search(r":\s(\S+)", chosen)[1]
    page.wait_for_function(
        """value => document.querySelector('td [aria-current]')?.title.endsWith(': ' + value)""",
        arg=value,
    )
    assert marked.count() == 1
    # The numbers beside the list hold the same one.
    assert page.locator(f".jp-OutputArea td:text-is('{value}')").count() >= 1


def test_cells_of_the_picture_are_chosen_by_mouse_and_keyboard(page):
    expected = run_prompts(page)
    names = expected["position"].values

    def shown(layer: int, position: int) -> None:
        place = f"layer {layer}, position {names[position]}"
        page.wait_for_function(
            "place => document.querySelector('td [aria-current]')?.title.startsWith(place)",
            arg=place,
        )
        value = float(expected.values[layer, position])
        page.locator(f".jp-OutputArea td:text-is('{number(value)}')").first.wait_for()
        assert page.get_by_label("position", exact=True).input_value() == names[position]

    cells = page.locator("table.patching-heatmap td")
    for layer, position in ((0, PATCHED), (1, PATCHED - 2), (0, PATCHED)):
        cells.nth(layer * len(names) + position).click()
        shown(layer, position)
    # The picture is drawn anew each time, and keeps the keyboard.
    for key, layer, position in (
        ("ArrowDown", 1, PATCHED), ("ArrowLeft", 1, PATCHED - 1), ("ArrowUp", 0, PATCHED - 1),
        ("ArrowUp", 0, PATCHED - 1), ("ArrowRight", 0, PATCHED),
    ):  # fmt: skip
        page.wait_for_function("document.activeElement.matches('[data-picture]')")
        page.keyboard.press(key)
        shown(layer, position)


def test_paths_and_attention_of_a_head_are_a_click_away(page, tmp_path):
    run_prompts(page)
    kinds = page.get_by_label("patch", exact=True)
    kinds.select_option(label="head outputs, all positions at once")
    run_button(page).click()
    page.locator("table.patching-heatmap td [title^='layer 1, head 2:']").click()
    page.get_by_role("button", name="Its attention").click()
    page.get_by_text("L1H2 in the corrupted prompt").wait_for()
    page.get_by_role("button", name="Paths into its queries").click()
    page.get_by_text("No path leads").first.wait_for()
    page.locator(".jp-OutputArea-output .widget-vbox").first.screenshot(path=tmp_path / "paths.png")
    model = tiny.model("gpt2")
    task = prompt_task(model, *PROMPTS, ANSWERS)
    expected = paths(model, task, [("q", 1, 2)], progress=False)
    titles = page.locator("table.patching-heatmap td span").evaluate_all(
        "all => all.map(s => s.title)"
    )
    values = expected.values.ravel().tolist()
    for title, value in zip(titles, values, strict=True):
        assert title.endswith("no value" if value != value else number(value))
    kinds.select_option(index=0)


def test_code_can_be_copied(page):
    expected = run_prompts(page)
    code = page.get_by_label("copy as code").input_value()
    namespace = {"model": tiny.model("gpt2")}
    exec(code, namespace)
    assert (namespace["result"].values == expected.values).all()


def test_a_sweep_is_stopped(page):
    expected = run_prompts(page)
    kinds = page.get_by_label("patch", exact=True)
    kinds.select_option(label="head outputs, position by position")
    page.get_by_text("of your earlier settings").wait_for()
    run_button(page).click()
    page.get_by_text("cells done").wait_for()
    assert run_button(page).is_disabled()
    stop_button(page).click()
    page.get_by_text("Stopped.").wait_for()
    assert run_button(page).is_enabled() and stop_button(page).is_disabled()
    bar = page.locator(".jp-OutputArea .progress-bar")
    assert 0 < bar.evaluate("bar => bar.offsetWidth / bar.parentElement.offsetWidth") < 1
    # The earlier picture stays, and the panel works as before.
    assert page.locator("table.patching-heatmap td").count() == expected.size
    kinds.select_option(index=0)
    page.get_by_text("The picture below is of these settings.").wait_for()
    run_prompts(page)
