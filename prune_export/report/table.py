"""Makes the summary table of a run: plain rows, and the same rows as Markdown.

The command line draws the rows with rich, the page and the card with HTML and Markdown; all show
the same cells, so no number is formatted twice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prune_export.display.notebook import html_table
from prune_export.report.reading import Report, perplexity_change, text_from_blocks
from prune_export.report.sparse import kernels_text, stray_text, weights_text
from prune_export.units import text_from_bytes, text_from_count
from prune_export.verify.results import Perplexity, Speed

Tone = Literal["better", "worse", "same", "plain"]
_MARKED = re.compile(r"[\\`*\[\]|~$#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
"""What Markdown may read as markup; an underscore inside a word it does not."""

COLUMNS = ("", "dense", "result", "change")


@dataclass(frozen=True)
class Row:
    """A row of the table; `tone` says how to colour the change.

    `group` is size, quality, speed, sparsity or check, so that a renderer can draw a rule between
    groups.
    """

    group: Literal["size", "quality", "speed", "sparsity", "check"]
    label: str
    dense: str
    result: str
    change: str
    tone: Tone = "plain"

    @property
    def cells(self) -> tuple[str, str, str, str]:
        return self.label, self.dense, self.result, self.change


def summary_rows(report: Report | Mapping[str, Any]) -> list[Row]:
    """Makes the rows of the summary table, in order; columns as in `COLUMNS`."""
    report = Report.of(report)
    return [
        *_size_rows(report), *_quality_rows(report), *_speed_rows(report),
        *_sparsity_rows(report), *_check_rows(report),
    ]  # fmt: skip


def summary_html(report: Report | Mapping[str, Any]) -> str:
    """Writes the summary table as HTML, for a notebook."""
    report = Report.of(report)
    rows = [row.cells for row in summary_rows(report)]
    return html_table(report.recipe.description or report.recipe.name, COLUMNS, rows)


def where_to_look(report: Report | Mapping[str, Any]) -> list[tuple[str, str]]:
    """Lists the parts of a result: (path inside it, what is there)."""
    report = Report.of(report)
    return [
        (".", "the checkpoint: AutoModelForCausalLM.from_pretrained loads it"),
        *(
            (f"{export.directory}/", f"the engine that {export.exporter} built, and its record")
            for export in report.exports
        ),
        ("report.html", "figures, intervals, raw sample counts, provenance"),
        ("README.md", "the model card; `prune-export publish` uploads it with the model"),
    ]


def markdown(rows: list[Row]) -> str:
    """Writes rows as a GitHub table, every cell escaped."""
    head = [_markdown_line(COLUMNS), "|:--|--:|--:|:--|"]
    return "\n".join([*head, *(_markdown_line(row.cells) for row in rows)]) + "\n"


def escape_markdown(text: str) -> str:
    """Escapes text for a Markdown paragraph or table cell."""
    flat = " ".join(text.split())
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        flat = flat.replace(character, entity)
    return _MARKED.sub(r"\\\g<0>", flat)


def number(value: float, digits: int = 2) -> str:
    """Formats a number: `21.93`, `1,234`, `1.2e+08`, `not a number`, `infinite`."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite"
    if abs(value) >= 1e6:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}f}"


def times(value: float) -> str:
    """Formats a factor: `1.23×`, or as `number` does where it is not finite."""
    return f"{number(value)}×" if math.isfinite(value) else number(value)


def interval(low: float, high: float) -> str:
    """Formats an interval: `1.20–1.26`; empty when either end is not finite."""
    return f"{low:.2f}–{high:.2f}" if math.isfinite(low) and math.isfinite(high) else ""


def percent_change(before: float, after: float) -> str:
    """Formats a change: `−15.8 %`; `0 %` where nothing changed, empty without a base."""
    if not before:
        return ""
    change = 100 * (after - before) / before
    if abs(change) < 0.05:
        return "0 %" if after == before else f"{'−' if change < 0 else '+'}<0.1 %"
    return f"{'−' if change < 0 else '+'}{abs(change):.1f} %"


def workload_text(speed: Speed) -> str:
    """Words a workload: `prompt 128, new 32`, with the batch where it is not 1."""
    load = speed.workload
    batch = f"batch {load.batch}, " if load.batch != 1 else ""
    return f"{batch}prompt {load.prompt}, new {load.new}"


def speed_text(speed: Speed) -> str:
    """Words a speed: `1.23× faster (1.20–1.26)` or `no speedup: 1.01× (0.99–1.03)`."""
    bounds = interval(speed.low, speed.high)
    tail = f" ({bounds})" if bounds else ""
    if speed.verdict == "no speedup":
        return f"no speedup: {times(speed.ratio)}{tail}"
    return f"{times(speed.ratio)} {speed.verdict}{tail}"


def has_bound(speed: Speed) -> bool:
    """Whether the speedup has a known bound by memory traffic."""
    return speed.phase == "decode" and math.isfinite(speed.bound) and speed.bound > 0


def _size_rows(report: Report) -> list[Row]:
    base, result = report.base, report.result
    rows = []
    if base.layers != result.layers or report.removed_blocks:
        gone = base.layers - result.layers
        change = f"−{gone} (blocks {text_from_blocks(report.removed_blocks)})" if gone else "none"
        rows.append(Row("size", "blocks", str(base.layers), str(result.layers), change))
    sizes = (
        ("parameters", base.parameters, result.parameters, text_from_count),
        ("checkpoint", base.bytes, result.bytes, text_from_bytes),
    )
    for label, before, after, text in sizes:
        change = percent_change(before, after)
        tone: Tone = "better" if after < before else "same" if after == before else "worse"
        rows.append(Row("size", label, text(before), text(after), change, tone))
    return rows + _zero_rows(report)


def _zero_rows(report: Report) -> list[Row]:
    """Rows on the zeros of the last sparse stage, unless healing filled them."""
    rows: list[Row] = []
    for stage in report.stages:
        if stage.kind == "heal" and stage.parameters.get("keep_zeros") is False:
            rows = []
        if "mask_digest" in stage.log:
            zeros, weights = (int(stage.log[key]) for key in ("zeros", "weights"))
            share = f"{100 * zeros / weights:.1f} % of {text_from_count(weights)}"
            pattern = str(stage.log["pattern"])
            kept = "no pattern" if pattern.endswith("unstructured") else f"{pattern} kept"
            rows = [Row("size", f"zeros made by {stage.name}", "", share, kept)]
    return rows


def _quality_rows(report: Report) -> list[Row]:
    dense = report.perplexity("dense")
    before = number(dense.value) if dense else "not measured"
    rows = []
    made = "quantized" if report.quantizes and not report.prunes else "pruned"
    named = [("pruned", f"perplexity, {made}"), ("healed", "perplexity, healed")]
    named += [(entry.name, f"perplexity, {entry.name}") for entry in report.engine_perplexities]
    for name, label in named:
        after = report.perplexity(name)
        if after is None:
            continue
        change, tone = _perplexity_text(dense, after)
        rows.append(Row("quality", label, before, number(after.value), change, tone))
    if not rows and dense is not None:
        rows.append(Row("quality", "perplexity", before, "not measured", ""))
    for task in report.verification.tasks if report.verification else ():
        base = "not measured" if task.dense is None else number(task.dense, 4)
        shift = "" if task.dense is None else f"{task.pruned - task.dense:+.4f}".replace("-", "−")
        label = f"{task.name}, {task.metric}" + (f", {task.engine}" if task.engine else "")
        rows.append(Row("quality", label, base, number(task.pruned, 4), shift))
    return rows


def _perplexity_text(dense: Perplexity | None, after: Perplexity) -> tuple[str, Tone]:
    change = perplexity_change(dense, after)
    if change is None:
        return ("", "plain") if math.isfinite(after.value) else ("broken", "worse")
    tail = ""
    if change.low is not None and change.high is not None:
        tail = f" ({interval(change.low, change.high)})"
    tone: Tone = "worse" if change.ratio > 1.005 else "better" if change.ratio < 0.995 else "same"
    return f"{times(change.ratio)}{tail}", tone


def _speed_rows(report: Report) -> list[Row]:
    tones: dict[str, Tone] = {"faster": "better", "slower": "worse", "no speedup": "same"}
    speeds = report.verification.speed if report.verification else []
    many = len({speed.workload for speed in speeds}) > 1
    return [
        Row(
            "speed",
            f"{speed.phase}, {speed.engine}" + (f" ({workload_text(speed)})" if many else ""),
            f"{number(speed.dense_tokens_per_second, 1)} tok/s",
            f"{number(speed.pruned_tokens_per_second, 1)} tok/s",
            speed_text(speed),
            tones[speed.verdict],
        )
        for speed in speeds
    ]


def _sparsity_rows(report: Report) -> list[Row]:
    """Rows on each engine's patterns and sparse kernels, and on their gain."""
    tones: dict[str, Tone] = {"faster": "better", "slower": "worse", "no speedup": "same"}
    rows = []
    checks = report.verification
    for one in checks.sparsity if checks else ():
        tone: Tone = "better" if one.proven else "worse" if one.asked else "same"
        label = f"sparse weights, {one.engine}"
        rows.append(Row("sparsity", label, "", weights_text(one), kernels_text(one), tone))
        many = len({gain.workload for gain in one.gain}) > 1
        rows += [
            Row(
                "sparsity",
                f"sparsity off → on, {gain.phase}, {gain.engine}"
                + (f" ({workload_text(gain)})" if many else ""),
                f"{number(gain.dense_tokens_per_second, 1)} tok/s",
                f"{number(gain.pruned_tokens_per_second, 1)} tok/s",
                speed_text(gain),
                tones[gain.verdict],
            )
            for gain in one.gain
        ]
    return rows


def _check_rows(report: Report) -> list[Row]:
    checks = report.verification
    if checks is None:
        return [Row("check", "verification", "", "not run", "nothing above was verified", "worse")]
    rows = []
    if not checks.reload.ok:
        rows.append(Row("check", "reload", "", "FAILED", "stock transformers", "worse"))
    rows += [
        Row(
            "check",
            f"parity, {parity.engine}",
            "",
            "FAILED",
            f"logit error {parity.max_logit_error:.2g}, allowed {parity.tolerance:.2g}",
            "worse",
        )
        for parity in checks.parity
        if not parity.ok
    ]
    rows += [
        Row("check", f"provider, {one.engine}", "", "FAILED", stray_text(one), "worse")
        for one in checks.placement
        if not one.ok
    ]
    rows += [
        Row(
            "check",
            f"gate: {gate.what}",
            f"claimed {number(gate.claimed)}",
            number(gate.measured),
            "holds" if gate.ok else "FAILED",
            "better" if gate.ok else "worse",
        )
        for gate in checks.gates
    ]
    return rows


def _markdown_line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(escape_markdown(cell) for cell in cells) + " |"
