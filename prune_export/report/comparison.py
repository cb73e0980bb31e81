"""Any number of models and engines side by side: one table, one Pareto figure, one page.

What was measured together (`measured`) stands against the first entry, timed in turns. What is read
from reports of different runs (`from_reports`) was not, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from prune_export.display.escapes import escaped_page
from prune_export.report import style
from prune_export.report.html import environment, figure_of
from prune_export.report.pareto import Point, Range, beaten_by, draw_pareto
from prune_export.report.reading import ExportReading, Report, perplexity_change, shorten
from prune_export.report.table import interval, number, times, workload_text
from prune_export.units import text_from_bytes
from prune_export.verify.results import Perplexity, Speed

COLUMNS: Final = (
    "",
    "runtime",
    "perplexity",
    "against the first",
    "decode",
    "prefill",
    "bytes",
    "",
)
_PICTURE: Final = "comparison.png"
_PAGE: Final = "comparison.html"
_SIDE_FILES: Final = frozenset({".json", ".txt", ".model", ".jinja", ".log", ".md", ".py"})


@dataclass(frozen=True)
class Entry:
    """A model or engine that is compared.

    `runtime` is pytorch or an exporter with its precision; `decode` and `prefill` are times as fast
    as the first entry, with what is not noise around them; `bytes` are those of its weight files;
    `tokens_per_second` are of decoding. `speeds` are the raw samples.
    """

    label: str
    runtime: str
    perplexity: Perplexity | None = None
    decode: float | None = None
    decode_range: Range | None = None
    prefill: float | None = None
    prefill_range: Range | None = None
    bytes: int | None = None
    tokens_per_second: float | None = None
    speeds: tuple[Speed, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """The entries, the first of which the others are compared with, and what limits it."""

    entries: tuple[Entry, ...]
    caveats: tuple[str, ...] = ()
    machine: dict[str, str] = field(default_factory=dict)

    @property
    def points(self) -> list[Point]:
        """The entries in quality, speed and bytes; intervals are those against the first."""
        return [self._point(one) for one in self.entries]

    @property
    def beaten(self) -> list[str]:
        """For each entry the label of the best one that beats it in all; '' where none does."""
        found = beaten_by(self.points)
        return ["" if place is None else self.entries[place].label for place in found]

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """A row an entry, as `COLUMNS` names its cells."""
        return [
            (
                one.label,
                one.runtime,
                number(one.perplexity.value) if one.perplexity else "not measured",
                self._change_text(one),
                _speed_text(one.decode, one.decode_range, first=one is self.entries[0]),
                _speed_text(one.prefill, one.prefill_range, first=one is self.entries[0]),
                text_from_bytes(one.bytes) if one.bytes else "not known",
                rival,
            )
            for one, rival in zip(self.entries, self.beaten, strict=True)
        ]

    def to_json(self) -> dict[str, Any]:
        """All of it, raw samples included."""
        return {
            "entries": [
                asdict(one) | {"beaten_by": rival or None}
                for one, rival in zip(self.entries, self.beaten, strict=True)
            ],
            "caveats": list(self.caveats),
            "machine": self.machine,
        }

    def _range(self, one: Entry) -> Range | None:
        """The 95 % interval of a perplexity, paired by window with the first one."""
        first = self.entries[0].perplexity
        change = perplexity_change(first, one.perplexity)
        if first is None or change is None or change.low is None or change.high is None:
            return None
        return first.value * change.low, first.value * change.high

    def _point(self, one: Entry) -> Point:
        return Point(
            one.label, one.perplexity.value if one.perplexity else None, one.decode, one.bytes,
            self._range(one), one.decode_range, group=one.runtime,
        )  # fmt: skip

    def _change_text(self, one: Entry) -> str:
        change = perplexity_change(self.entries[0].perplexity, one.perplexity)
        if change is None or one is self.entries[0]:
            return ""
        bounds = interval(change.low, change.high) if change.low and change.high else ""
        return times(change.ratio) + (f" ({bounds})" if bounds else "")


def with_speed(entry: Entry, speeds: Sequence[Speed]) -> Entry:
    """Adds speeds that were measured in turns with the first entry."""
    found = replace(entry, speeds=tuple(speeds))
    for one in speeds:
        if one.phase == "decode":
            found = replace(
                found, decode=one.ratio, decode_range=_not_noise(one),
                tokens_per_second=one.pruned_tokens_per_second,
            )  # fmt: skip
        else:
            found = replace(found, prefill=one.ratio, prefill_range=_not_noise(one))
    return found


def as_reference(entry: Entry, others: Sequence[Entry]) -> Entry:
    """The first entry: 1.0 by definition, with the widest noise floor that was met beside it."""
    floors = {"decode": (1.0, 1.0), "prefill": (1.0, 1.0)}
    rates = []
    for other in others:
        for one in other.speeds:
            low, high = floors[one.phase]
            floors[one.phase] = min(low, one.floor_low), max(high, one.floor_high)
            if one.phase == "decode":
                rates.append(one.dense_tokens_per_second)
    if not rates:
        return entry
    return replace(
        entry, decode=1.0, decode_range=floors["decode"], prefill=1.0,
        prefill_range=floors["prefill"], tokens_per_second=sorted(rates)[len(rates) // 2],
    )  # fmt: skip


def from_reports(directories: Sequence[Path], names: Sequence[str] | None = None) -> Comparison:
    """Compares results by what their reports say; measures nothing.

    Perplexities are kept where they are of the same text and tokens as the first one's, speeds
    where they are of the same workload on a machine that calls itself the same.

    Raises:
        CheckpointError: a directory has no report, or a broken one.
    """
    entries: list[Entry] = []
    caveats: list[str] = []
    texts: list[str] = []
    machines: list[dict[str, str]] = []
    for directory, label in zip(directories, names or labels_of(directories), strict=True):
        report = Report.load(directory / "report.json")
        texts.append(_text_of(report))
        checks = report.verification
        machines.append(_machine_of(checks.machine if checks else {}))
        same_text = bool(texts[-1]) and texts[-1] == texts[0]
        same_machine = machines[-1] == machines[0]
        if not same_text:
            caveats.append(f"{label}: its perplexities are of another text; they are left out")
        if not same_machine:
            caveats.append(f"{label}: it was timed on another machine; its speeds are left out")
        found = list(_entries_of(report, directory, label, first=not entries))
        entries += [
            replace(
                one,
                perplexity=one.perplexity if same_text else None,
                speeds=one.speeds if same_machine else (),
            )
            for one in found
        ]
    if len(directories) > 1:
        caveats.append(
            "speeds of different runs were not timed in turns: what else the machine did then is "
            "in them (`compare` without `--from-reports` times them in turns)"
        )
    return Comparison(_against_first(entries, caveats), tuple(caveats), machines[0])


def write_comparison(found: Comparison, out: Path) -> list[Path]:
    """Writes comparison.png and comparison.html into `out`; the same comparison, the same bytes."""
    out.mkdir(parents=True, exist_ok=True)
    picture = _draw(found, out / _PICTURE)
    page = environment().get_template("comparison.html.j2").render(
        found=found, columns=COLUMNS, figure=figure_of(picture) if picture else None,
    )  # fmt: skip
    (out / _PAGE).write_text(escaped_page(page), encoding="utf-8")
    return [*([picture] if picture else []), out / _PAGE]


def weight_file_bytes(directory: Path) -> int:
    """The bytes of an engine's files, without what stands beside the weights as text."""
    return sum(
        file.stat().st_size
        for file in directory.iterdir()
        if file.is_file() and file.suffix not in _SIDE_FILES
    )


def runtime_text(exporter: str, parameters: dict[str, Any]) -> str:
    """Words an engine: `onnx int8`, the precision where it has one."""
    precision = parameters.get("precision")
    return f"{exporter} {precision}" if isinstance(precision, str) else exporter


def labels_of(directories: Sequence[Path]) -> list[str]:
    """Short names that tell the directories apart."""
    last = [path.resolve().name or str(path) for path in directories]
    return last if len(set(last)) == len(last) else [str(path) for path in directories]


def _draw(found: Comparison, path: Path) -> Path | None:
    points = found.points
    sides = [
        ("speed", "decoding speed over the first one, right is better", "Quality over speed"),
        ("bytes", "bytes of weights, left is better", "Quality over bytes"),
    ]
    drawable = [
        side for side in sides
        if any(_known(one.perplexity) and _known(getattr(one, side[0])) for one in points)
    ]  # fmt: skip
    if not drawable:
        return None
    with style.styled():
        figure = style.new_figure(7.2, 4.4 * len(drawable))
        for axes, (across, words, title) in zip(
            figure.subplots(len(drawable), 1, squeeze=False)[:, 0], drawable, strict=True
        ):
            draw_pareto(
                axes, points, across="speed" if across == "speed" else "bytes", across_label=words,
                title=title, note="filled: beaten by none in quality, speed and bytes",
            )  # fmt: skip
        style.save(figure, path)
    return path


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _not_noise(one: Speed) -> Range:
    """What the ratio may be: its 95 % interval, never narrower than the noise floor."""
    return min(one.low, one.ratio * one.floor_low), max(one.high, one.ratio * one.floor_high)


def _speed_text(ratio: float | None, between: Range | None, *, first: bool) -> str:
    if ratio is None:
        return "not timed"
    if first:
        return "1×"
    bounds = interval(*between) if between else ""
    return times(ratio) + (f" ({bounds})" if bounds else "")


def _text_of(report: Report) -> str:
    """What tells the evaluation text and its tokens apart; empty where it was not noted."""
    return str(report.data.get(report.evaluation, {}).get("fingerprint") or "")


def _machine_of(machine: dict[str, str]) -> dict[str, str]:
    return {key: machine.get(key, "") for key in ("processor", "cores", "gpu")}


def _entries_of(report: Report, directory: Path, label: str, *, first: bool) -> list[Entry]:
    """The dense model (of the first report alone), the result, and its engines."""
    found = []
    if first:
        found.append(
            Entry(
                f"{shorten(report.base.name, 30)} (dense)",
                "pytorch",
                report.perplexity("dense"),
                bytes=report.base.bytes,
            )
        )
    checkpoint = report.perplexity(report.final_name)
    found.append(Entry(label, "pytorch", checkpoint, bytes=report.result.bytes))
    speeds = report.verification.speed if report.verification else []
    for export in report.exports:
        names = (export.exporter, export.directory)
        mine = [one for one in speeds if one.engine in names]
        load = mine[0].workload if mine else None
        found.append(
            Entry(
                f"{label}/{export.directory}",
                runtime_text(export.exporter, export.parameters),
                report.perplexity(names[0]) or report.perplexity(names[1]),
                bytes=_engine_bytes(export, directory),
                speeds=tuple(one for one in mine if one.workload == load),
            )
        )
    return found


def _engine_bytes(export: ExportReading, directory: Path) -> int | None:
    place = directory / export.directory
    return weight_file_bytes(place) if place.is_dir() else export.weight_bytes


def _against_first(entries: list[Entry], caveats: list[str]) -> tuple[Entry, ...]:
    """Speeds in tokens per second, over those of the first entry that was timed."""
    timed = [one for one in entries if one.speeds]
    if not timed:
        return tuple(entries)
    load = timed[0].speeds[0].workload
    base = {one.phase: one.pruned_tokens_per_second for one in timed[0].speeds}
    caveats.append(f"speeds are over {timed[0].label}, at {workload_text(timed[0].speeds[0])}")
    done = []
    for entry in entries:
        found = entry
        for one in entry.speeds:
            if one.workload != load or not base.get(one.phase):
                continue
            ratio = one.pruned_tokens_per_second / base[one.phase]
            low, high = _not_noise(one)
            between = (ratio * low / one.ratio, ratio * high / one.ratio)
            if one.phase == "decode":
                found = replace(
                    found, decode=ratio, decode_range=between,
                    tokens_per_second=one.pruned_tokens_per_second,
                )  # fmt: skip
            else:
                found = replace(found, prefill=ratio, prefill_range=between)
        done.append(found)
    return tuple(done)
