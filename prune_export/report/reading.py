"""Reads report.json into typed values, which table, figures, page and card share.

Nothing is measured here. What is derived (which base blocks are gone, the paired interval of a
perplexity) comes from what the report holds, so a reader can recompute it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from prune_export.contracts import StageLog
from prune_export.errors import CheckpointError, RecipeError
from prune_export.recipe import document
from prune_export.report.candidates import SearchReading
from prune_export.report.door import (
    Count,
    Data,
    Layers,
    Log,
    Seconds,
    refuse_unbounded,
)
from prune_export.system.files import REPORT_BYTES, read_json_object
from prune_export.verify.results import Perplexity, Verification


@dataclass(frozen=True)
class RecipeText:
    """The recipe: its name, its one-line description and its exact text."""

    name: str
    text: str
    description: str = ""


@dataclass(frozen=True)
class Base:
    """The base model; only one from the Hub has a `revision`, its commit."""

    model: str
    parameters: Count
    bytes: Count
    layers: Layers
    id: str = ""
    license: str | None = None
    dtype: str = ""
    revision: str | None = None
    wrapper: str = ""
    """The type of the larger model (of images and text) whose language model this is."""

    @property
    def name(self) -> str:
        """Its name: a Hub id, or the last part of a path."""
        return self.model if self.revision else Path(self.model).name or self.model


@dataclass(frozen=True)
class Size:
    """The size of the published checkpoint."""

    parameters: Count
    bytes: Count
    layers: Layers


@dataclass(frozen=True)
class StageReading:
    """One stage as it ran; `log` is the method's or the healer's own account.

    `data` names the data that it was given, empty where the report is older than the key.
    """

    index: int
    kind: Literal["prune", "quantize", "heal"]
    name: str
    parameters: dict[str, Any] = field(default_factory=dict)
    data: str = ""
    id: str = ""
    seconds: Seconds | None = None
    parameters_after: Count | None = None
    bytes_after: Count | None = None
    log: Log = field(default_factory=StageLog)
    round: tuple[int, int] | None = None
    """Which round of how many it was, where prune and heal were repeated."""

    @property
    def round_text(self) -> str:
        """Which round it was, in words after its name; empty where there was one."""
        return f", round {self.round[0]} of {self.round[1]}" if self.round else ""

    @property
    def dropped(self) -> tuple[int, ...]:
        """The blocks that it removed, as numbers in the stage's input."""
        return tuple(sorted(int(block) for block in self.log.get("dropped") or ()))

    @property
    def refitted(self) -> str:
        """The log of refits at the seams of its cut, or why there was none; may be empty."""
        log = self.log.get("refit") or {}
        if not log.get("taken"):
            return f"no projection was refitted: {log['why']}" if log.get("why") else ""
        done = [one for one in log.get("seams") or () if one.get("ridge") is not None]
        blocks = text_from_blocks(tuple(sorted(int(one["block"]) for one in done)))
        text = f"refitted {len(done)} projection{'' if len(done) == 1 else 's'} before what was "
        text += f"removed, in block{'' if len(done) == 1 else 's'} {blocks}"
        if losses := log.get("held_out_loss"):
            before, after = (as_number(loss) for loss in losses)
            text += f": held-out loss {before:.3f} before, {after:.3f} after"
        return text

    @property
    def losses(self) -> list[tuple[int, float, float | None]]:
        """(step, loss, learning rate) of each logged training step."""
        return [
            (int(row[0]), as_number(row[1]), as_number(row[2]) if len(row) > 2 else None)
            for row in self.log.get("loss") or ()
        ]


@dataclass(frozen=True)
class ExportReading:
    """One engine's build record and the directory that holds it."""

    directory: str
    exporter: str
    version: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    graph: str = ""
    weight_bytes: Count | None = None
    seconds: Seconds | None = None
    toolchain: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sparsity: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """A typed report.json; unknown keys are ignored, as later versions may add some."""

    __pydantic_config__ = ConfigDict(extra="ignore")

    version: Literal[1]
    recipe: RecipeText
    base: Base
    result: Size
    stages: list[StageReading] = field(default_factory=list)
    exports: list[ExportReading] = field(default_factory=list)
    data: dict[str, Data] = field(default_factory=dict)
    searches: list[SearchReading] = field(default_factory=list)
    verification: Verification | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    notes: list[str] = field(default_factory=list)
    reference: str = ""
    """The dense engine that a chosen one is compared with, such as `fp32 on onnx`."""

    @staticmethod
    def of(source: Report | Mapping[str, Any]) -> Report:
        """Reads a report from a dict.

        Raises:
            CheckpointError: a part is missing or of another type.
        """
        if isinstance(source, Report):
            return source
        refuse_unbounded(source)
        try:
            return TypeAdapter(Report).validate_python(_with_nan(source))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise CheckpointError(
                f"report.json  {'.'.join(str(part) for part in first['loc'])}",
                f"{first['msg']} ({error.error_count()} such)",
                "run the recipe again with this version to write the report anew",
            ) from None

    @staticmethod
    def load(path: Path) -> Report:
        """Reads a report from a file.

        Raises:
            CheckpointError: no such file, not JSON, or not a report.
        """
        return Report.of(read_json_object(path, "the report of a run", REPORT_BYTES))

    @property
    def prunes(self) -> list[StageReading]:
        return [stage for stage in self.stages if stage.kind == "prune"]

    @property
    def heals(self) -> list[StageReading]:
        return [stage for stage in self.stages if stage.kind == "heal"]

    @property
    def quantizes(self) -> list[StageReading]:
        return [stage for stage in self.stages if stage.kind == "quantize"]

    @cached_property
    def removed_blocks(self) -> tuple[int, ...]:
        """The blocks of the base model that all stages together removed."""
        left = list(range(self.base.layers))
        for stage in self.prunes:
            gone = set(stage.dropped)
            left = [block for place, block in enumerate(left) if place not in gone]
        return tuple(sorted(set(range(self.base.layers)) - set(left)))

    @property
    def final_name(self) -> Literal["healed", "pruned"]:
        """The name of the published checkpoint's perplexity entry."""
        return "healed" if self.heals else "pruned"

    def perplexity(self, name: str) -> Perplexity | None:
        """The measured perplexity of `dense`, `pruned`, `healed` or an engine."""
        entries = self.verification.perplexity if self.verification else ()
        return next((entry for entry in entries if entry.name == name), None)

    @cached_property
    def evaluation(self) -> str:
        """The name of the data source that perplexity was measured on."""
        try:
            recipe = document.parse(self.recipe.text, "recipe").data
            return str(recipe["verify"]["quality"]["perplexity"] or "evaluation")
        except (RecipeError, KeyError, TypeError):
            return "evaluation"

    @property
    def protocol(self) -> str:
        """Words the perplexity protocol: how windows begin, and which tokens count."""
        about = self.data.get(self.evaluation, {})
        words = {
            "every window": "each begun as the tokenizer begins a text",
            "first window": "cut from one stream, of which only the first has what the tokenizer "
            "puts before a text",
        }
        said = [words.get(str(about.get("prefix")), "")]
        said.append("only what the assistant says" if about.get("loss_on") == "assistant" else "")
        return ", ".join(filter(None, said))

    @property
    def engine_perplexities(self) -> list[Perplexity]:
        entries = self.verification.perplexity if self.verification else ()
        return [entry for entry in entries if entry.name not in ("dense", "pruned", "healed")]


def as_number(value: Any) -> float:
    """Turns a JSON number into a float; null is NaN."""
    return math.nan if value is None else float(value)


def _with_nan(report: Any) -> Any:
    """Replaces null by NaN where the report must have a number."""
    checks = report.get("verification") if isinstance(report, Mapping) else None
    if not isinstance(checks, Mapping):
        return report
    found = dict(checks)
    for part in ("perplexity", "parity", "speed", "sweep", "gates"):
        entries = checks.get(part) or []
        if not isinstance(entries, list):
            continue  # for the schema to refuse
        found[part] = [
            {key: _nan_for_null(value) for key, value in entry.items()}
            if isinstance(entry, Mapping)
            else entry
            for entry in entries
        ]
    return {**report, "verification": found}


def _nan_for_null(value: Any) -> Any:
    if isinstance(value, list):
        return [_nan_for_null(one) for one in value]
    return math.nan if value is None else value


def runs(blocks: Iterable[int]) -> list[tuple[int, int]]:
    """Finds unbroken runs: `[3, 5, 6, 7]` gives `[(3, 3), (5, 7)]`."""
    found: list[tuple[int, int]] = []
    for block in sorted(set(blocks)):
        if found and block == found[-1][1] + 1:
            found[-1] = (found[-1][0], block)
        else:
            found.append((block, block))
    return found


def text_from_blocks(blocks: Iterable[int]) -> str:
    """Words a list of blocks: `3, 5–7` for `[3, 5, 6, 7]`; `none` when empty."""
    parts = [f"{first}" if first == last else f"{first}–{last}" for first, last in runs(blocks)]
    return ", ".join(parts) or "none"


@dataclass(frozen=True)
class Change:
    """The ratio of two perplexities; `low` and `high` are its 95 % interval where known."""

    ratio: float
    low: float | None = None
    high: float | None = None


_LARGEST_LOSS = 1e100


def perplexity_change(before: Perplexity | None, after: Perplexity | None) -> Change | None:
    """Computes `after` / `before`, paired by window; None where either is not a number.

    The interval is exp(mean ± 1.96 standard errors) of the windows' loss differences, given only
    when both were measured on the same number of windows of the same length, and 8 at least.
    """
    if before is None or after is None:
        return None
    if not (math.isfinite(before.value) and math.isfinite(after.value) and before.value > 0):
        return None
    ratio = after.value / before.value
    paired = len(before.losses) == len(after.losses) >= 8 and before.length == after.length
    differences = [b - a for a, b in zip(before.losses, after.losses, strict=False)]
    # Squares of what is larger overflow; no loss that was measured comes near it.
    if not paired or not all(abs(one) < _LARGEST_LOSS for one in differences):
        return Change(ratio)
    mean, error = _mean_and_error(differences)
    return Change(ratio, _exp(mean - 1.96 * error), _exp(mean + 1.96 * error))


def _exp(value: float) -> float:
    """Computes exp; infinite where it overflows."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Computes the mean and its standard error, for two values or more."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def shorten(text: str, most: int) -> str:
    """Shortens text to `most` characters by leaving out the middle."""
    if len(text) <= most:
        return text
    tail = (most - 1) // 2
    return f"{text[: most - 1 - tail]}…{text[len(text) - tail :]}"
