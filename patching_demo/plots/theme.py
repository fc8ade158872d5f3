"""The look that all figures share: colours, text that is shown as text, numbers in words."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly

#: Colour of all text that does not sit on a button: a grey that reads on white and on near-black
#: paper. It stands here alone, so that a page which knows its theme can replace it.
INK = "#767676"

#: Where nothing was measured because nothing exists. Translucent, so it darkens a light page and
#: lightens a dark one, and differs from the near-white of "no effect" on both.
GAP = "rgba(127,127,127,0.34)"

#: Behind positions at which clean and corrupted inputs agree.
BAND = "#dedede"

#: The lines of hatching where a page can draw it.
HATCH = "#b2b2b2"

# Orange and blue differ for every common kind of colour-blindness. The stops crowd around the
# middle because single places rarely carry a large share of the effect: a tenth of the range is
# visible, and the ends still tell half from all.
DIVERGING = [
    [0.0, "#5c2a04"],
    [0.2, "#a85408"],
    [0.36, "#e08a3c"],
    [0.45, "#f6cda2"],
    [0.5, "#f7f7f7"],
    [0.55, "#b3d4ee"],
    [0.64, "#5a9fd4"],
    [0.8, "#1f66a8"],
    [1.0, "#08305f"],
]

#: From nothing to all, for attention weights.
SEQUENTIAL = [[0.0, "#f7f7f7"], [0.1, "#bdd7ee"], [0.4, "#5a9fd4"], [1.0, "#08305f"]]

#: Colours of lines and bars, apart from each other also to colour-blind readers and visible on
#: light and dark pages; dashes, symbols and patterns say it again.
LINES = ["#2f7fc1", "#d9731a", "#2a9d7c", "#b66fb5", "#8a8a1e", "#c44e4e"]
DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"]
SYMBOLS = ["circle", "square", "diamond", "triangle-up", "x", "cross"]
PATTERNS = ["", "/", "x", ".", "\\", "-", "|", "+"]

#: Buttons and menus keep dark on light in every theme: plotly's highlight, which marks the chosen
#: button, is always nearly white. The others are darker than that, so that the choice can be seen.
MENU = {
    "bgcolor": "#cfcfcf",
    "bordercolor": "#8c8c8c",
    "font": {"color": "#222222", "size": 12},
}


def escape(text: Any) -> str:
    """Text that plotly shows as it is, neither as its HTML subset nor as LaTeX.

    >>> escape("<b>$x$")
    '&lt;b&gt;&#36;x&#36;'
    """
    text = html.escape(_one_line(text), quote=False).replace("$", "&#36;")
    # A template's own placeholders begin so.
    return text.replace("%{", "&#37;{")


def as_html(text: Any) -> str:
    """Markup that shows the text as it is in a page, neither as markup nor as LaTeX.

    >>> as_html("<b>$x$")
    '&lt;b&gt;<span>$</span>x<span>$</span>'
    """
    # A dollar alone in its element opens no formula, in whichever version of MathJax the page has.
    return html.escape(_one_line(text)).replace("$", "<span>$</span>")


def _one_line(text: Any) -> str:
    """Line ends and tabs as a programmer writes them: a figure or a cell would swallow them."""
    return str(text).replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def short_label(text: str) -> str:
    """A position label short enough for an axis, with its number kept.

    >>> short_label("<|im_start|> 0"), short_label("John 10")
    ('<|im_sta… 0', 'John 10')
    """
    if len(text) <= 11:
        return text
    name, space, place = text.rpartition(" ")
    keep = max(1, 10 - len(space + place))
    return f"{name[:keep]}…{space}{place}"


def number(value: float) -> str:
    """A number as a person would write it: up to three digits, a real minus sign.

    >>> number(-10.3412), number(0.5), number(0.04567), number(12345.6), number(-2e30)
    ('−10.3', '0.5', '0.0457', '12346', '−2e+30')
    """
    if not math.isfinite(value):
        return str(value)
    if value == 0 or abs(value) < 5e-7:
        return "0"
    if abs(value) >= 1e9:
        return f"{value:.3g}".replace("-", "−")
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}".replace("-", "−")
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(share: float, digits: int = 0) -> str:
    """A share in per cent, with a real minus sign.

    >>> percent(-0.421), percent(0.0042, digits=1)
    ('−42 %', '0.4 %')
    """
    if not math.isfinite(share):
        return str(share)
    if abs(share) >= 1e9:
        return f"{number(100 * share)} %"
    return signed(f"{share:.{digits}%}").replace("%", " %")


def signed(text: str) -> str:
    """A number's text with a real minus sign, and none before a zero."""
    return (text if text.strip("-0.%") else text.lstrip("-")).replace("-", "−")


def title(main: str, below: str) -> tuple[dict[str, dict[str, Any]], int]:
    """A title with a smaller line below it, just above what follows it.

    Returns:
        what to set for a "wide" window and for a "narrow" telephone, as plotly breaks no lines,
        and the pixels that the higher of the two needs.
    """
    made = {}
    # As many letters as fit in a wide font: where there is no Helvetica, many have DejaVu Sans.
    for which, (of_main, of_below) in {"wide": (72, 96), "narrow": (38, 50)}.items():
        first, second = textwrap.wrap(main, of_main) or [""], textwrap.wrap(below, of_below)
        text = f"<b>{'<br>'.join(map(escape, first))}</b>"
        if second:
            text += f'<br><span style="font-size:12px">{"<br>".join(map(escape, second))}</span>'
        made[which] = text, 20 + 19 * len(first) + 17 * len(second)
    height = max(needs for _, needs in made.values())
    # The top anchor of a title of several lines is the baseline of its first.
    settings = {
        which: {"title.text": text, "title.pad.t": 23 + height - needs}
        for which, (text, needs) in made.items()
    }
    return settings, height


def compact(values: Any) -> np.ndarray:
    """Numbers with few digits, in the form that is smallest in a figure's JSON."""
    values = np.asarray(values, dtype=np.float64)
    # Plotly 6 and later pack arrays as base64, where float32 is half the size. Plotly 5 writes
    # decimals, where float32 would be written with the seventeen digits of a float64.
    if int(plotly.__version__.split(".")[0]) >= 6:
        with np.errstate(over="ignore"):
            return values.astype(np.float32)
    return np.array([float(f"{value:.4g}") for value in values.flat]).reshape(values.shape)


def sentence(*parts: str) -> str:
    """Parts with semicolons between them; empty ones are left out."""
    return "; ".join(filter(None, parts)) + "."


def listed(words: Sequence[str]) -> str:
    """Words as in a sentence.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    words = list(words)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
