"""Type two prompts, press a button, read the sweep: a panel for Jupyter and Colab.

:class:`Panel` checks prompts and answers as they are typed and says what to change,
runs the sweep without blocking the notebook, draws it, shows any cell's numbers, and writes the
lines of code that repeat it.

A click on a cell of the heatmap, or an arrow key in it, shows that cell; from a head it is one more
click to the paths that lead into it, and to its attention.

The heatmap is an HTML table, made in ``markup``. It needs nothing but ipywidgets 7.7 or later: a
plotly figure inside an output widget stays blank in Colab, and plotly's own widget needs a package
that is not there. :meth:`Panel.figure` returns the same result as a plotly figure.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import Any

import ipywidgets as widgets
import plotly.graph_objects as go
import torch
import xarray as xr
from torch import Tensor

from patching_demo import plots
from patching_demo.engine.bridge import hook_point
from patching_demo.engine.checks import check_bridge
from patching_demo.engine.kinds import BLOCK_KINDS, HEAD_KINDS, KINDS
from patching_demo.engine.runner import SweepStopped
from patching_demo.engine.tokens import heads_of, key_value_heads
from patching_demo.explorer.markup import (
    LARGEST,
    attention_table,
    cell_table,
    entries,
    heatmap_table,
    largest_effects,
    paragraph,
    prompts_table,
)
from patching_demo.models import MODELS
from patching_demo.plots import theme
from patching_demo.plots.facts import RUNS, baseline_names, kinds_of
from patching_demo.results import attention
from patching_demo.sweeps import paths, sweep
from patching_demo.sweeps.question import check_positions
from patching_demo.tasks import IOI_ANSWERS, IOI_PROMPTS, METRICS, Task, prompt_task
from patching_demo.tasks.task import position_labels

_TOGETHER = ("resid_pre", "attn_out", "mlp_out")

_RECEIVERS = {"q": "queries", "k": "keys", "v": "values"}

_Choice = tuple[Any, str]  # kinds (a name, or several in a tuple) and by
_Head = tuple[int, int | None, int]  # layer, head (None where several share it), key-value head


class Panel(widgets.VBox):
    """A panel in which to patch prompts of your own; display it as the last line of a cell.

    In a notebook a sweep runs in a thread, on modules of its own, so cells may use the model
    meanwhile and the Stop button is heard. Widgets are changed by the kernel's own loop alone, as
    Colab does not show what a thread changes. Where no loop runs, as in a script, :meth:`run`
    returns when the sweep has ended.

    Args:
        model: a TransformerBridge with a tokenizer, in eval mode.
        clean: what the clean prompt says at first, like the other arguments.
        corrupted: the corrupted prompt.
        answers: (right, wrong).
        kinds: as for :func:`patching_demo.sweep`, one of those that the menu has.
        by: "pos", "role" for the named part and the end, or "all_pos" for whole heads.
        metric: one of :data:`patching_demo.tasks.METRICS`.

    Attributes:
        result: what the picture shows, labelled as by :func:`patching_demo.sweep` or
            :func:`patching_demo.paths`, or None.
        task: its prompts and metric, or None.
        code: the lines that repeat it, or "".
        error: the exception that ended the last run, or None.

    Raises:
        TypeError: if the model is no TransformerBridge.
        ValueError: if the model has no tokenizer, or the menus do not have ``kinds``, ``by`` or
            ``metric``. Prompts that do not fit raise nothing; the panel says what to change.
    """

    def __init__(
        self,
        model: Any,
        *,
        clean: str = IOI_PROMPTS[0],
        corrupted: str = IOI_PROMPTS[1],
        answers: tuple[str, str] = IOI_ANSWERS[0],
        kinds: str | tuple[str, ...] = "resid_pre",
        by: str = "pos",
        metric: str = METRICS[0],
    ) -> None:
        check_bridge(model)
        if getattr(model, "tokenizer", None) is None:
            raise ValueError(
                "this model has no tokenizer, so it cannot read prompts: load one that does, for "
                'instance load_model("smollm2-135m"), or use induction_task and sweep'
            )
        choices = _choices(model)
        chosen = (kinds if isinstance(kinds, str) else tuple(kinds), by)
        if chosen not in choices.values():
            known = ", ".join(map(str, choices.values()))
            raise ValueError(f"kinds and by must be one of {known}, got {chosen}")
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
        self._model = model
        self.result: xr.DataArray | None = None
        self.task: Task | None = None
        self.error: BaseException | None = None
        self._dry: Task | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._outcome: Callable[[], None] | None = None
        self._selecting = self._busy = False
        self._settings_shown: tuple[Any, ...] | None = None
        self._ran: tuple[Any, ...] | None = None
        self._head: _Head | None = None

        def made(kind: Any, name: str = "", width: str = "98%", **options: Any) -> Any:
            layout = {"width": width, "max_width": "98%"} if width else {}
            if name:
                options |= {"description": name, "style": {"description_width": "120px"}}
            return kind(layout=widgets.Layout(**layout), **options)

        def row(*parts: Any) -> widgets.HBox:
            return widgets.HBox(parts, layout=widgets.Layout(flex_flow="row wrap"))

        self.clean = made(widgets.Textarea, "clean prompt", rows=2, value=clean)
        self.corrupted = made(widgets.Textarea, "corrupted prompt", rows=2, value=corrupted)
        self.right = made(widgets.Text, "right answer", "", value=answers[0])
        self.wrong = made(widgets.Text, "wrong answer", "", value=answers[1])
        options = list(choices.items())
        self.choice = made(widgets.Dropdown, "patch", "540px", options=options, value=chosen)
        self.metric = made(widgets.Dropdown, "metric", "", options=METRICS, value=metric)
        self.direction = made(widgets.Dropdown, "direction", "", options=tuple(RUNS))
        self.part = made(
            widgets.Text, "named part", "460px", placeholder="of both prompts, or one | other"
        )
        self.advice, self.status, self.picture, self.cell, self.patterns = (
            made(widgets.HTML) for _ in range(5)
        )
        self.picked = widgets.Text(layout=widgets.Layout(display="none"))
        self.picked.add_class("patching-picked")
        self.run_button = widgets.Button(description="Run", button_style="primary", icon="play")
        self.stop_button = widgets.Button(description="Stop", icon="stop", disabled=True)
        self.progress = made(widgets.IntProgress, width="180px", min=0, max=1)
        self.largest = made(widgets.Select, "largest effects", "460px", options=[], rows=LARGEST)
        self.places = row()
        self.into = {
            kind: made(widgets.Button, width="auto", description=f"Paths into its {words}")
            for kind, words in _RECEIVERS.items()
        }
        self.attention_button = made(widgets.Button, width="auto", description="Its attention")
        self.about_head = row(*self.into.values(), self.attention_button)
        self.code_box = made(widgets.Textarea, "copy as code", rows=14)
        # The numbers of a cell stand above the picture, so that both fit on a screen.
        shown = [self.places, self.cell, self.about_head, self.picked]
        beside = widgets.VBox(shown, layout=widgets.Layout(flex="1 1 320px"))
        self._answer = widgets.VBox(
            [row(self.largest, beside), self.picture, self.patterns, self.code_box],
            layout=widgets.Layout(display="none"),
        )
        super().__init__(
            [
                self.clean,
                self.corrupted,
                row(self.right, self.wrong),
                row(self.choice, self.metric),
                row(self.direction, self.part),
                self.advice,
                row(self.run_button, self.stop_button, self.progress),
                self.status,
                self._answer,
            ]
        )
        self.add_class("patching-panel")
        for typed in (self.clean, self.corrupted, self.right, self.wrong, self.part, self.choice):
            typed.observe(lambda change: self._check(), names="value")
        for menu in (self.metric, self.direction):
            menu.observe(lambda change: self._note_change(), names="value")
        self.run_button.on_click(lambda button: self.run())
        self.stop_button.on_click(lambda button: self.stop())
        self.largest.observe(lambda change: self._go(self.largest.value), names="value")
        self.picked.observe(lambda change: self._pick(), names="value")
        for kind, button in self.into.items():
            button.on_click(lambda button, kind=kind: self.run_paths(kind))
        self.attention_button.on_click(lambda button: self._show_attention())
        self._check()

    @property
    def code(self) -> str:
        """The lines that repeat the sweep that is shown."""
        return self.code_box.value

    @property
    def running(self) -> bool:
        """Whether a sweep is under way."""
        return self._busy

    def run(self) -> None:
        """Start the sweep that the panel asks for, as the Run button does.

        Raises:
            ValueError: if prompts or answers do not fit; the message says what to change.
            RuntimeError: if a sweep is already under way.
        """
        if self._dry is None:
            raise ValueError(self._problem)
        self._start(self._sweep, self._dry, self._settings())

    def run_paths(self, kind: str) -> None:
        """Measure the direct paths from every head into the head that is shown, as a button does.

        Args:
            kind: what of the head receives: "q", "k" or "v".

        Raises:
            RuntimeError: if no head is shown, or, for "q", one that several heads share, or if a
                sweep is already under way.
        """
        layer, *heads = self._head or (None, None, None)
        head = heads[0 if kind == "q" else 1]
        if head is None:
            raise RuntimeError("no such head is shown: run a sweep of heads, and choose one")
        part = (kind, layer, head)
        self._start(self._paths, self.task, self._ran, part)

    def _start(self, job: Callable[..., Any], *asked: Any) -> None:
        """Start work that returns a task, a result, the settings and the lines that repeat it."""
        if self.running:
            raise RuntimeError("a sweep is under way: wait() for it or stop() it first")
        self._stop.clear()
        self._busy, self.error = True, None
        self._allow()
        self.progress.value = 0
        self._say("Measuring both prompts unpatched ...")
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._work(lambda function, *args: function(*args), job, *asked)
            return
        context = copy_context()  # By this a kernel knows the cell that the panel belongs to.

        def later(function: Callable[..., None], *args: Any) -> None:
            with suppress(RuntimeError):  # The loop was closed: wait() still shows the end.
                loop.call_soon_threadsafe(function, *args, context=context)

        # A daemon, so that a kernel that is shut down does not wait for it.
        thread = threading.Thread(target=self._work, args=(later, job, *asked), daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # There may be too many.
            self._fail(error)
        else:
            self._thread = thread

    def stop(self) -> None:
        """Ask the sweep to end; the picture of the one before stays."""
        self._stop.set()
        if self.running:
            self._say("Stopping ...")

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the sweep has ended, at most ``timeout`` seconds; whether it has."""
        if self._thread is not None:
            self._thread.join(timeout)
            if not self._thread.is_alive():
                self._conclude()
        return not self.running

    def figure(self) -> go.Figure:
        """The result as a plotly figure, as :func:`patching_demo.plots.heatmap` draws it.

        Raises:
            RuntimeError: if there is no result yet.
        """
        if self.result is None:
            raise RuntimeError("there is no result yet: press Run, or call run() and wait()")
        return plots.heatmap(self.result)

    # Before a run -------------------------------------------------------------------------------

    def _settings(self) -> tuple[Any, ...]:
        typed = (self.clean, self.corrupted, self.right, self.wrong, self.part)
        menus = (self.direction, self.choice, self.metric)
        return tuple(widget.value for widget in (*typed, *menus))

    def _check(self) -> None:
        """Check what is typed, say what to change, and allow or refuse to run."""
        typed = [w.value for w in (self.clean, self.corrupted, self.right, self.wrong)]
        self._dry, self._problem = None, ""
        try:
            roles = _roles(self.part.value)
            dry = prompt_task(_Dry(self._model), *typed[:2], tuple(typed[2:]), roles=roles)
            if self.choice.value[1] != "role":
                check_positions(self._model, dry)
            self._dry = dry
        except (TypeError, ValueError) as error:
            # The panel has one pair, and shows the tokens as a table below the sentence.
            self._problem = str(error).removeprefix("pair 1: ").replace(" of prompt 1", "")
            self._problem = self._problem.replace(
                "Name roles and use by='role'", "Patch at the named part and the end"
            )
            words = self._problem.split("\n")[0].rstrip(":.") + "."
            self.advice.value = paragraph("Change this first", words) + self._tokens()
        else:
            ends = [int(place[0]) + 1 for place in dry.roles["END"]]
            words = f"{ends[0]} and {ends[1]} tokens"
            if dry.same_lengths:
                differ = int((dry.clean_tokens[0] != dry.corrupted_tokens[0]).sum())
                words = f"{ends[0]} tokens each, which differ at {differ} position"
                words += "s" * (differ > 1)
            words += (
                f", the first that differs being {dry.agree_until}. The answers are "
                f"{typed[2]!r} and {typed[3]!r}."
            )
            self.advice.value = paragraph("Ready", words) + self._tokens()
        self._note_change()

    def _tokens(self) -> str:
        """Both prompts token by token, also where they cannot make a task."""
        prompts = [self.clean.value, self.corrupted.value]
        if not all(prompt.strip() for prompt in prompts):
            return ""
        rows = [
            self._model.to_tokens(prompt, truncate=False, move_to_device=False)[0].tolist()
            for prompt in prompts
        ]
        decode = self._model.tokenizer.decode
        strings = [[decode([i], clean_up_tokenization_spaces=False) for i in row] for row in rows]
        return prompts_table(rows, strings)

    def _note_change(self) -> None:
        self._allow()
        if self.running or self.result is None:
            return
        if self._settings() == self._settings_shown:
            self._say("The picture below is of these settings.")
        else:
            self._say("The picture below is of your earlier settings. Press Run for a new one.")

    # The run ------------------------------------------------------------------------------------

    def _work(self, later: Callable[..., Any], job: Callable[..., Any], *asked: Any) -> None:
        """Do a job, and leave what is shown to ``later``, which calls a function in the loop."""
        started = time.monotonic()

        def on_progress(done: int, total: int) -> bool:
            later(self._note_progress, done, total)
            return self._stop.is_set()

        try:
            found = job(*asked, progress=False, on_progress=on_progress)
        except (SweepStopped, KeyboardInterrupt):
            words = "Stopped. The model is as it was; press Run to start again."
            self._outcome = partial(self._finish, words)
        except BaseException as error:
            self._outcome = partial(self._fail, error)
        else:
            self._outcome = partial(self._succeed, *found, started)
        later(self._conclude)

    def _sweep(self, dry: Task, settings: tuple[Any, ...], **options: Any) -> tuple[Any, ...]:
        *_, direction, (kinds, by), metric = settings
        task = dry.with_metric(self._model, metric)
        task = task if direction == task.direction else task.reversed()
        names = kinds if isinstance(kinds, str) else list(kinds)
        result = sweep(self._model, task, names, by=by, **options)
        return task, result, settings, _code(settings, task.model_name)

    def _paths(
        self, task: Task, settings: tuple[Any, ...], part: tuple[str, int, int], **options: Any
    ) -> tuple[Any, ...]:
        result = paths(self._model, task, [part], **options)
        return task, result, settings, _code(settings, task.model_name, part)

    def _note_progress(self, done: int, total: int) -> None:
        if self._busy:
            self.progress.max, self.progress.value = total, done
            if not self._stop.is_set():
                self._say(f"{done} of {total} cells done ...")

    def _conclude(self) -> None:
        """Show how the run ended, once."""
        outcome, self._outcome = self._outcome, None
        if outcome is not None:
            try:
                outcome()
            except BaseException as error:  # An interrupt, too, must not leave the panel busy.
                self._fail(error)
                if not isinstance(error, Exception):
                    raise

    def _succeed(
        self,
        task: Task,
        result: xr.DataArray,
        settings: tuple[Any, ...],
        code: str,
        started: float,
    ) -> None:
        self.task, self.result, self._settings_shown = task, result, None
        self._head = None
        self._show(code)
        self._settings_shown = self._ran = settings
        self.progress.value = self.progress.max
        self._finish(f"Done in {time.monotonic() - started:.1f} s.")

    def _fail(self, error: BaseException) -> None:
        self.error = error
        self._finish(_first_line(error), "It did not work")

    def _finish(self, words: str, head: str = "") -> None:
        self._busy = False
        self._allow()
        self._say(words, head)
        if self.result is not None and self._settings() != self._settings_shown:
            self._say(f"{words} The picture below is of your earlier settings.", head)

    def _say(self, words: str, head: str = "") -> None:
        self.status.value = f'<div role="status" aria-live="polite">{paragraph(head, words)}</div>'

    # The result ---------------------------------------------------------------------------------

    def _show(self, code: str) -> None:
        result = self.result
        self._selecting = True
        self.places.children = [
            widgets.Dropdown(
                options=[(words, i) for i, words in enumerate(entries(result, str(dim)))],
                value=0,
                description=str(dim),
                layout=widgets.Layout(width="230px"),
                style={"description_width": "60px"},
            )
            for dim in result.dims
        ]
        for menu in self.places.children:
            menu.observe(lambda change: self._show_cell(), names="value")
        self.largest.options = largest_effects(result)
        self.code_box.value, self.patterns.value = code, ""
        self.largest.index = 0 if self.largest.options else None
        self._selecting = False
        self._go(self.largest.value or (0,) * result.ndim)
        self._answer.layout.display = ""

    def _pick(self) -> None:
        """Go to the cell of the picture that was clicked."""
        picked, self.picked.value = self.picked.value, ""  # So that a second click is heard, too.
        if picked:
            self._go(tuple(int(index) for index in picked.split(",")))

    def _go(self, at: tuple[int, ...] | None) -> None:
        """Show a cell, by its place along the result's dimensions."""
        if self._selecting or at is None:
            return
        self._selecting = True
        for menu, index in zip(self.places.children, at, strict=True):
            menu.value = index
        self._selecting = False
        self._show_cell()

    def _show_cell(self) -> None:
        if self._selecting:
            return
        at = tuple(menu.value for menu in self.places.children)
        self.cell.value = cell_table(self.result, self.task, at)
        self.picture.value = heatmap_table(self.result, at)
        self._head = self._head_at(at)
        self.about_head.layout.display = "" if self._head else "none"
        self._allow()

    def _head_at(self, at: tuple[int, ...]) -> _Head | None:
        """The head that a cell is about, None if the cell is about no head."""
        if "head" not in self.result.dims:
            return None
        cell = self.result.isel(dict(zip(self.result.dims, at, strict=True)))
        layer, head = int(cell["layer"]), int(cell["head"])
        n_heads, there = self._model.cfg.n_heads, heads_of(self._model, KINDS[kinds_of(cell)[0]])
        if head >= there:  # A gap in a picture of several kinds.
            return None
        if there < n_heads:
            return layer, None, head
        return layer, head, head * key_value_heads(self._model) // n_heads

    def _allow(self) -> None:
        """Enable the buttons that can be pressed now.

        Paths lead from earlier layers only, and a query belongs to one head.
        """
        self.run_button.disabled = self._busy or self._dry is None
        self.stop_button.disabled = not self._busy
        layer, head, _ = self._head or (0, None, None)
        for kind, button in self.into.items():
            button.disabled = self._busy or layer == 0 or (kind == "q" and head is None)
        self.attention_button.disabled = head is None

    def _show_attention(self) -> None:
        """Show where the head that is chosen attends in both prompts."""
        layer, head, _ = self._head
        source, target = baseline_names(self.result)
        both = {source: self.task.clean_tokens, target: self.task.corrupted_tokens}
        strings = (self.task.clean_strings[0], self.task.corrupted_strings[0])
        ends = [int(end[0]) + 1 for end in self.task.roles["END"]]
        try:
            tables = [
                attention_table(
                    attention(self._model, tokens[:1, :end], position_labels(words[:end])),
                    layer, head, which,
                )
                for (which, tokens), words, end in zip(both.items(), strings, ends, strict=True)
            ]  # fmt: skip
        except Exception as error:
            self._say(_first_line(error), "There is no attention to show")
        else:
            self.patterns.value = "".join(tables)


class _Dry:
    """A model without its forward pass: enough to check prompts and answers at typing speed."""

    def __init__(self, model: Any) -> None:
        self.tokenizer, self.cfg, self.training = model.tokenizer, model.cfg, model.training
        self.to_tokens, self.modules = model.to_tokens, model.modules

    def __call__(self, tokens: Tensor, return_type: str = "logits") -> Tensor:
        return torch.zeros(1).expand(*tokens.shape, self.cfg.d_vocab)


def _choices(model: Any) -> dict[str, _Choice]:
    """What can be patched in this model, by its name in the menu."""

    def there(kind: str) -> bool:
        hook = KINDS[kind].hook
        return all(hook_point(model, f"blocks.{i}.{hook}") for i in range(model.cfg.n_layers))

    blocks, heads = ([kind for kind in kinds if there(kind)] for kinds in (BLOCK_KINDS, HEAD_KINDS))
    found: dict[str, _Choice] = {f"{KINDS[k].describes} ({k})": (k, "pos") for k in blocks}
    together = tuple(kind for kind in _TOGETHER if kind in blocks)
    if len(together) > 1:
        found[f"{theme.listed(together)}, beside each other"] = (together, "pos")
    found |= {f"{KINDS[k].describes}, all positions at once": (k, "all_pos") for k in heads}
    rolled = [k for k in (*blocks, *heads) if k != "pattern"]  # It has no counterpart elsewhere.
    found |= {f"{KINDS[k].describes}, at the named part and the end": (k, "role") for k in rolled}
    if len(heads) > 1:
        found["every kind of head activation, all positions at once"] = (tuple(heads), "all_pos")
    return found | {f"{KINDS[k].describes}, position by position": (k, "pos") for k in heads}


def _roles(part: str) -> dict[str, tuple[list[str], list[str]]]:
    """The role that a part of the prompts names, the other part after a bar."""
    one, bar, other = (piece.strip() for piece in part.partition("|"))
    return {one: ([one], [other if bar else one])} if one else {}


def _first_line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _code(
    settings: tuple[Any, ...], model_name: str, into: tuple[str, int, int] | None = None
) -> str:
    clean, corrupted, right, wrong, part, direction, (kinds, by), metric = settings
    load = (
        f"model = load_model({model_name!r})"
        if model_name in MODELS
        else "# model: the one that this panel was given"
    )
    loader = "load_model, " if model_name in MODELS else ""
    kinds = kinds if isinstance(kinds, str) else list(kinds)
    measured = f"sweep(model, task, {kinds!r}, by={by!r})"
    names = "plots, prompt_task, sweep"
    if into:
        measured, names = f"paths(model, task, [{into!r}])", "paths, plots, prompt_task"
    return (
        f"from patching_demo import {loader}{names}\n\n"
        f"{load}\n"
        "task = prompt_task(\n"
        "    model,\n"
        f"    {clean!r},\n"
        f"    {corrupted!r},\n"
        f"    ({right!r}, {wrong!r}),\n"
        f"    metric={metric!r},\n"
        + (f"    roles={_roles(part)!r},\n" if part.strip() else "")
        + f"){'.reversed()' * (direction == 'noising')}\n"
        f"result = {measured}\n"
        "plots.heatmap(result)\n"
    )
