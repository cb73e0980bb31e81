"""Makes report.html: one self-contained file, with nothing to fetch and no script.

Everything from the report is text to the template engine, which escapes it; a content security
policy in the page forbids every request besides.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from prune_export.display.escapes import escaped_page
from prune_export.report import table
from prune_export.report.caveats import caveats, failed
from prune_export.report.figures import figure_title, names_by_stage
from prune_export.report.healing import healing_text
from prune_export.report.reading import (
    Change,
    Report,
    StageReading,
    perplexity_change,
    text_from_blocks,
)
from prune_export.report.sparse import kernels_text, pays_text, stray_text, weights_text
from prune_export.units import text_from_bytes, text_from_count, text_from_seconds
from prune_export.verify.results import Parity, Perplexity, Speed

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_CSS_DPI = 96


@dataclass(frozen=True)
class Figure:
    """A PNG as a data URI, with its size in CSS pixels."""

    name: str
    title: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Tile:
    """One number at the top of the page."""

    label: str
    value: str
    note: str
    tone: table.Tone


def render_page(report: Report | Mapping[str, Any], figures: Path) -> str:
    """Renders the page of a report, with the PNG files of the directory `figures` inside it."""
    report = Report.of(report)
    found = caveats(report)
    page = environment().get_template("report.html.j2").render(
        report=report,
        status=_status(report),
        sentence=what_was_done(report),
        tiles=_tiles(report),
        columns=table.COLUMNS,
        rows=table.summary_rows(report),
        failures=[one.text for one in found if one.kind == "failure"],
        limits=[one.text for one in found if one.kind == "limit"],
        figures={
            path.name: figure_of(path)
            for path in sorted(figures.glob("*.png"))
            if path.name != "summary.png"
        },
        by_stage=names_by_stage(report),
        removed=frozenset(report.removed_blocks),
    )  # fmt: skip
    return escaped_page(page)


def figure_of(path: Path) -> Figure:
    """Reads a PNG file as a data URI.

    Raises:
        ValueError: the file is not a PNG.
    """
    from prune_export.report.style import DPI  # matplotlib with it

    data = path.read_bytes()
    if not data.startswith(_PNG_MAGIC):
        raise ValueError(f"{path} is not a PNG file")
    width, height = struct.unpack(">II", data[16:24])
    return Figure(
        path.stem,
        figure_title(path.stem),
        "data:image/png;base64," + base64.b64encode(data).decode(),
        width * _CSS_DPI // DPI,
        height * _CSS_DPI // DPI,
    )


def what_was_done(report: Report) -> str:
    """Says in one sentence what was removed by what, how it was healed, and how exported."""
    parts = []
    if report.removed_blocks:
        count = len(report.removed_blocks)
        names = _named(report.prunes)
        parts.append(
            f"{count} of {report.base.layers} blocks ({text_from_blocks(report.removed_blocks)}) "
            f"were removed by {names}"
        )
    elif report.prunes:
        parts.append(f"pruned by {_named(report.prunes)}")
    if report.heals:
        parts.append(f"healed with {_named(report.heals)}")
    for stage in report.quantizes:
        grid = stage.log.get("grid")
        parts.append(f"quantized by {stage.name}" + (f" ({grid})" if grid else ""))
    if report.exports:
        engines = ", ".join(export.directory for export in report.exports)
        parts.append(f"exported to {engines}")
    text = "; ".join(parts) or "nothing was changed"
    return text[0].upper() + text[1:] + "."


def _named(stages: Sequence[StageReading]) -> str:
    """The names of stages, each once, and in how many rounds they were done."""
    names = " and ".join(dict.fromkeys(stage.name for stage in stages))
    rounds = max((stage.round[1] for stage in stages if stage.round), default=0)
    return f"{names} in {rounds} rounds" if rounds else names


def _status(report: Report) -> tuple[str, str]:
    """The tone and words of the badge."""
    if report.verification is None:
        return "limit", "not verified"
    return ("failure", "verification failed") if failed(report) else ("good", "verified")


def _tiles(report: Report) -> list[Tile]:
    base, result = report.base, report.result
    change = table.percent_change(base.parameters, result.parameters)
    tiles = [
        Tile(
            "parameters",
            change,
            f"{text_from_count(base.parameters)} → {text_from_count(result.parameters)}",
            "better" if result.parameters < base.parameters else "same",
        )
    ]
    dense, final = report.perplexity("dense"), report.perplexity(report.final_name)
    if final is not None:
        shift = perplexity_change(dense, final)
        before = f"{table.number(dense.value)} → " if dense else ""
        tiles.append(
            Tile(
                f"perplexity, {report.final_name}",
                table.times(shift.ratio) if shift else table.number(final.value),
                f"{before}{table.number(final.value)}",
                "plain" if math.isfinite(final.value) else "worse",
            )
        )
    tones: dict[str, table.Tone] = {"faster": "better", "slower": "worse"}
    speeds = report.verification.speed if report.verification else []
    for one in [one for one in speeds if one.phase == "decode"][:3]:
        note = f"{one.verdict}, {table.interval(one.low, one.high)}"
        value = table.times(one.ratio)
        if one.verdict == "no speedup":
            value, note = "no speedup", f"{value}, {table.interval(one.low, one.high)}"
        tiles.append(Tile(f"decode, {one.engine}", value, note, tones.get(one.verdict, "same")))
    return tiles


def _parity_words(one: Parity) -> str:
    if not one.ok:
        return "FAILED"
    return "agrees" if one.tolerance > 0 else "reported, not gated"


def _share_of_bound(one: Speed) -> str:
    """Words the share of the memory bound: `98 % of 1.19×` in decode; empty elsewhere."""
    if not table.has_bound(one) or not math.isfinite(one.ratio):
        return ""
    return f"{100 * one.ratio / one.bound:.0f} % of {table.times(one.bound)}"


def _rounds(one: Speed) -> str:
    """Counts samples: `14 + 14 in 3 launches`, dense + pruned, in so many fresh processes."""
    launches = f" in {len(one.rounds)} launches" if len(one.rounds) > 1 else ""
    return f"{len(one.dense_seconds)} + {len(one.pruned_seconds)}{launches}"


def _change_words(change: Change | None) -> str:
    if change is None:
        return ""
    if change.low is None or change.high is None:
        return table.times(change.ratio)
    return f"{table.times(change.ratio)} ({table.interval(change.low, change.high)})"


def _against_dense(report: Report, entry: Perplexity) -> str:
    return "" if entry.name == "dense" else _change_words(
        perplexity_change(report.perplexity("dense"), entry)
    )  # fmt: skip


def scalars(log: Mapping[str, Any]) -> dict[str, str]:
    """The scalar entries of a stage's log, as text."""
    return {
        key.replace("_", " "): value_text(value)
        for key, value in log.items()
        if isinstance(value, str | int | float | bool)
    }


def value_text(value: Any) -> str:
    """Writes a parameter's value as in a recipe."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(value_text(one) for one in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {value_text(one)}" for key, one in value.items())
    return "–" if value is None else str(value)


def ticked(text: str) -> Markup:
    """The text with what stands between backticks as code; all of it is escaped."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # one is left over
        return escape(text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if place % 2 else escape(part)
        for place, part in enumerate(parts)
    )


@cache
def environment() -> jinja2.Environment:
    """The template engine of all pages: it escapes every value."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("prune_export.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "against_dense": lambda entry, report: _against_dense(report, entry),
        "blocks": text_from_blocks,
        "bytes": text_from_bytes,
        "count": text_from_count,
        "healing": healing_text,
        "kernels": kernels_text,
        "number": table.number,
        "parity": _parity_words,
        "pays": pays_text,
        "rounds": _rounds,
        "scalars": scalars,
        "seconds": text_from_seconds,
        "share": _share_of_bound,
        "speed": table.speed_text,
        "stray": stray_text,
        "ticked": ticked,
        "times": table.times,
        "value": value_text,
        "weights": weights_text,
        "workload": table.workload_text,
    }
    environment.globals["interval"] = table.interval
    return environment
