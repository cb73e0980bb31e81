"""The style of all figures: one palette, one font, and PNG bytes that depend on the data alone.

The colours are Okabe and Ito's, told apart with every common colour-vision deficiency; the font is
the one that matplotlib carries, so that a figure is the same on every machine.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.ft2font import FT2Font

from prune_export.report.reading import shorten

INK: Final = "#1f2430"
MUTED: Final = "#667085"
RULE: Final = "#d5d9e0"
GRID: Final = "#eceef2"
DENSE: Final = "#98a0ad"
PRUNED: Final = "#d55e00"
HEALED: Final = "#0072b2"
ENGINE: Final = "#56a3d4"
GOOD: Final = "#0072b2"
BAD: Final = "#d55e00"
NEUTRAL: Final = "#7a8290"

DPI: Final = 200

_STYLE: Final[dict[str, Any]] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "text.color": INK,
    "text.parse_math": False,  # a `$` in a model's name is a dollar sign
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "xtick.major.size": 3.0,
    "ytick.major.size": 3.0,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "prune-export",
}


@contextmanager
def styled() -> Iterator[None]:
    """Applies this style inside a `with`, whatever the user's matplotlibrc says."""
    # The backend is not touched: a Figure with its own Agg canvas needs none.
    defaults = {
        key: value for key, value in mpl.rcParamsDefault.items() if not key.startswith("backend")
    }
    with mpl.rc_context({**defaults, **_STYLE}):
        yield


def new_figure(width: float, height: float) -> Figure:
    """Makes an empty figure (sizes in inches), drawn by Agg and known to no global state."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path, source: str = "") -> None:
    """Writes a figure as PNG; equal figures give equal bytes, as no time or version is stored."""
    buffer = io.BytesIO()
    metadata = {"Software": None} | ({"Source": source} if source else {})
    figure.savefig(buffer, format="png", dpi=DPI, metadata=metadata)
    path.write_bytes(buffer.getvalue())


@functools.cache
def distance_colors() -> Colormap:
    """The colour map of distances: dark blue (near) to light green (far)."""
    return ListedColormap(mpl.colormaps["YlGnBu_r"](np.linspace(0.0, 0.86, 256)))


def title(axes: Axes, text: str, note: str = "") -> None:
    """Sets a bold title at the left edge, with a muted line of explanation under it."""
    lines = note.count("\n") + 1 if note else 0
    axes.set_title(text, loc="left", fontsize=10.0, fontweight="bold", pad=8.0 + 12.5 * lines)
    if note:
        axes.annotate(
            note, (0, 1), xytext=(0, 7), textcoords="offset points", xycoords="axes fraction",
            fontsize=8.0, color=MUTED, va="bottom", linespacing=1.35,
        )  # fmt: skip


def label(text: str, most: int = 28) -> str:
    """Makes text fit for a figure: short, on one line, every glyph in the font."""
    flat = " ".join(str(text).split())
    known = _glyphs()
    return shorten("".join(one if ord(one) in known else "?" for one in flat), most)


@functools.cache
def _glyphs() -> frozenset[int]:
    return frozenset(FT2Font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap())
