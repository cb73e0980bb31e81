"""Makes a result again from its lock and its recipe, and says what came out otherwise, and why.

What does not train is to come out with the same bytes: data, pruned weights, exported graphs. What
trains, and all that is made of it, is to measure the same: training adds in an order that depends
on the processor. Nothing is taken from the store that the first run used.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from prune_export.errors import CheckpointError, RecipeError
from prune_export.execution import Options, run
from prune_export.execution.asked import model_of
from prune_export.execution.context import RunContext
from prune_export.execution.inputs import open_base
from prune_export.exporter_facts import ExporterFacts
from prune_export.progress import Progress, Silent
from prune_export.recipe import PUBLISHED_NAME, Recipe
from prune_export.recipe.document import MAX_BYTES
from prune_export.recipe.fetching import fetches
from prune_export.recipe.remote import fetched_files
from prune_export.report.reading import perplexity_change
from prune_export.store import Store, sha256_of_file
from prune_export.system.files import REPORT_BYTES, read_json_object, read_regular
from prune_export.system.written import LOCK, listed
from prune_export.verify.results import Perplexity, Verification

MARGIN: Final = 0.02
"""A difference of perplexity that is certain and larger counts, however windows differ."""

_FEWEST: Final = 8
"""Windows below which a measured perplexity has no interval to speak of."""

_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")

_NAMES: Final = (LOCK, PUBLISHED_NAME, "report.json", "verify.json")
_UNTRAINED: Final = ("dense", "pruned")
_NOT_REASONS: Final = ("memory_bytes", "cores")


@dataclass(frozen=True)
class Made:
    """What a run wrote down: the folder of its small files, and what they say.

    `lock` and `report` are as they were read, `checks` is None where nothing was verified.
    """

    folder: Path
    lock: Mapping[str, Any]
    report: Mapping[str, Any]
    checks: Verification | None


@dataclass(frozen=True)
class Finding:
    """One thing that was compared: `how` is `bytes` or `quality`; `said` is a sentence about it."""

    what: str
    how: str
    same: bool
    said: str


@dataclass(frozen=True)
class Reproduction:
    """All that was compared, and, where something came out otherwise, why it may have."""

    target: str
    findings: tuple[Finding, ...]
    reasons: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether everything came out as it was to."""
        return all(one.same for one in self.findings)

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def read_made(target: str) -> Made:
    """Reads what a run wrote down: of its directory, or of `owner/name[@revision]` on the Hub.

    From the Hub only lock, recipe, report and verification are fetched, no weights.

    Raises:
        CheckpointError: it is no result, or one of these files is not of the form we write.
        RecipeError: the Hub does not give them.
    """
    folder = Path(target)
    if not folder.is_dir():
        if not target.startswith("hf://") and not _HUB_ID.fullmatch(target):
            raise CheckpointError(
                target,
                "is no directory, and no Hub id (`org/name`, `org/name@revision`)",
                "give the `out/` of a run, or a model of the Hub that was published by this tool",
            )
        uri = target if target.startswith("hf://") else f"hf://{target}"
        folder = fetched_files(uri, _NAMES[:2], _NAMES[2:])
    lock = read_json_object(folder / LOCK, "the lock of a result", REPORT_BYTES)
    _check_lock(folder / LOCK, lock)
    text = read_regular(folder / PUBLISHED_NAME, MAX_BYTES, "a recipe", error=RecipeError)
    if hashlib.sha256(text).hexdigest() != lock["recipe_sha256"]:
        raise RecipeError(
            str(folder / PUBLISHED_NAME),
            "is not the recipe that the lock beside it was written for",
            "take both files from the same run",
        )
    report, checks = folder / "report.json", folder / "verify.json"
    try:
        return Made(
            folder, lock,
            read_json_object(report, "a report", REPORT_BYTES) if report.is_file() else {},
            Verification.from_json(read_json_object(checks, "a verification", REPORT_BYTES))
            if checks.is_file() else None,
        )  # fmt: skip
    except ValidationError:
        raise CheckpointError(
            str(checks), "is not what this tool writes", "take the file that the run wrote"
        ) from None


def reproduce(
    target: str, options: Options, *, model: str | None = None, data_root: Path | None = None,
    progress: Progress | None = None,
) -> Reproduction:  # fmt: skip
    """Runs a result's recipe again into `options.out`, and compares what came of it.

    `model` stands for the base where the lock names none of the Hub; `data_root` is where the
    recipe's files lie. `options.store` is to be one that the first run did not fill.

    Raises:
        PruneExportError: the target is no result, what it needs is not there, or a stage fails.
    """
    first = read_made(target)
    recipe = recipe_of(first, data_root)
    spec = model or _base_of(first)
    for line in fetches(recipe, spec) if not Path(target).is_dir() else ():
        (progress or Silent()).say(f"the recipe fetches {line}")
    _check_base(first, recipe, spec, options, progress)
    run(recipe, spec, options, progress)
    return compared(target, first, read_made(str(options.out)))


def recipe_of(first: Made, data_root: Path | None) -> Recipe:
    """The recipe of a result, without measurements of speed, which are of one machine."""
    overrides = ["verify.speed=null"]
    return Recipe.load(first.folder / PUBLISHED_NAME, overrides=overrides, data_root=data_root)


def compared(target: str, first: Made, again: Made) -> Reproduction:
    """Compares what two runs of one recipe wrote down."""
    found = [*_of_folder(first), *_of_data(first, again), *_of_artifacts(first, again)]
    trained = any(one.how == "quality" for one in found)
    found += _of_quality(first, again) if trained else ()
    differs = any(not one.same for one in found) or trained
    return Reproduction(target, tuple(found), tuple(_reasons(first, again)) if differs else ())


def _check_lock(file: Path, lock: Mapping[str, Any]) -> None:
    def hashes(value: Any) -> bool:
        return isinstance(value, dict) and all(isinstance(one, str) for one in value.values())

    try:
        good = (
            isinstance(lock["recipe_sha256"], str)
            and isinstance(lock["base"]["id"], str)
            and isinstance(lock["base"]["model"], str)
            and isinstance(lock["base"]["revision"], str | None)
            and all(isinstance(one["fingerprint"], str) for one in lock["data"].values())
            and all(hashes(one["files"]) for one in lock["artifacts"].values())
            and hashes(lock["versions"])
        )
    except (KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise CheckpointError(
            str(file), "is not a lock of this tool", "take the file of the run that made the model"
        )


def _base_of(first: Made) -> str | None:
    base = first.lock["base"]
    return f"{base['model'].partition('@')[0]}@{base['revision']}" if base["revision"] else None


def _check_base(
    first: Made, recipe: Recipe, spec: str | None, options: Options, progress: Progress | None
) -> None:
    """Refuses another base than the lock's, before any work."""
    expected = first.lock["base"]
    if spec is None and not recipe.model:
        raise RecipeError(
            str(first.folder / LOCK),
            f"was made from the local model `{expected['model']}`, which is not on the Hub",
            "pass `--model` with the directory or .gguf file",
        )
    context = RunContext(
        Store(options.store), options.machine, progress or Silent(), command=options.command
    )
    base = open_base(context, *model_of(recipe, spec))
    if base.id != expected["id"]:
        raise CheckpointError(
            str(base.path),
            f"is not the model that the result was made from: {base.id}, expected "
            f"{expected['id']} (`{expected['model']}`)",
            "pass `--model` with the very same files",
        )


def _of_folder(first: Made) -> Iterator[Finding]:
    """Whether the files of a result directory still are what its run wrote."""
    there = {
        name: digest
        for name, digest in sorted(listed(first.folder).items())
        if digest and not name.endswith(".md") and (first.folder / name).is_file()
    }
    other = [
        name for name, digest in there.items() if sha256_of_file(first.folder / name) != digest
    ]
    if there:
        said = f"not what its run wrote: {_few(other)}" if other else f"{len(there)} files intact"
        yield Finding("the result itself", "bytes", not other, said)


def _of_data(first: Made, again: Made) -> Iterator[Finding]:
    for name, before in first.lock["data"].items():
        after = again.lock["data"].get(name)
        same = after is not None and before["fingerprint"] == after["fingerprint"]
        yield Finding(f"data.{name}", "bytes", same, "same tokens" if same else "other tokens")


def _of_artifacts(first: Made, again: Made) -> Iterator[Finding]:
    """Compares artifacts in the order they were made; what follows a training follows it too."""
    before, after = first.lock["artifacts"], again.lock["artifacts"]
    trained = False
    for name, one in before.items():
        kind, _, exporter = name.partition(".")
        trained = trained or name.endswith(".heal")
        bound = kind == "export" and ExporterFacts.of_name(exporter).runs_code
        if name not in after:
            yield Finding(name, "bytes", False, "was not made again")
            continue
        files, others = one["files"], after[name]["files"]
        differ = [file for file in sorted({*files, *others}) if files.get(file) != others.get(file)]
        if not differ:
            yield Finding(name, "bytes", True, f"same bytes, {len(files)} files")
        elif trained or bound:
            why = "trained" if trained else "compiled for one machine"
            yield Finding(name, "quality", True, f"{why}: {_few(differ)} differ, so it is measured")
        else:
            yield Finding(name, "bytes", False, f"other bytes: {_few(differ)}")
    for name in after.keys() - before.keys():
        yield Finding(name, "bytes", False, "was made only now")


def _of_quality(first: Made, again: Made) -> Iterator[Finding]:
    """Judges what was trained by what was measured of it."""
    if first.checks is None or again.checks is None:
        yield Finding("quality", "quality", False, "was not measured, so training can't be judged")
        return
    for parity in again.checks.parity:
        said = f"{'agrees' if parity.ok else 'does not agree'} with PyTorch"
        yield Finding(f"parity of {parity.engine}", "quality", parity.ok, said)
    later = {one.name: one for one in again.checks.perplexity}
    judged = [one for one in first.checks.perplexity if one.name not in _UNTRAINED]
    for before in judged:
        what = f"perplexity of {before.name}"
        if before.name not in later:
            yield Finding(what, "quality", False, "was not measured again")
        else:
            yield Finding(what, "quality", *judgement(before, later[before.name]))
    if not judged:
        yield Finding("quality", "quality", False, "was not measured, so training can't be judged")


def judgement(before: Perplexity, after: Perplexity) -> tuple[bool, str]:
    """Whether a perplexity came out again, in words.

    It has to lie within the 95 % interval of the first, over that one's windows. As windows differ
    among themselves more than two models do on the same window, it also must not differ for certain
    by more than `MARGIN`, paired by window.
    """
    said = f"{before.value:.4g} before, {after.value:.4g} now"
    losses = before.losses
    if len(losses) < _FEWEST or not all(map(math.isfinite, (*losses, after.value))):
        return False, f"{said}: {len(losses)} windows are too few for an interval, or not numbers"
    mean = math.fsum(losses) / len(losses)
    variance = math.fsum((one - mean) ** 2 for one in losses) / (len(losses) - 1)
    spread = 1.96 * math.sqrt(variance / len(losses))
    center = math.log(before.value) if before.value > 0 else mean
    within = abs(math.log(after.value) - center) <= spread if after.value > 0 else False
    said += f", its interval is {math.exp(center - spread):.4g} to {math.exp(center + spread):.4g}"
    change = perplexity_change(before, after)
    if change is None or change.low is None or change.high is None:
        return within, f"{said}; not paired, as the windows are others"
    certain = change.low > 1 + MARGIN or change.high < 1 - MARGIN
    said += f"; paired by window × {change.ratio:.4f} ({change.low:.4f} to {change.high:.4f})"
    return within and not certain, said


def _reasons(first: Made, again: Made) -> Iterator[str]:
    """Says in what the two runs differ that may change what comes out."""
    before = dict(first.report.get("machine") or {}) | dict(first.lock["versions"])
    now = dict(again.report.get("machine") or {}) | dict(again.lock["versions"])
    for name in sorted(before.keys() | now.keys()):
        if name not in _NOT_REASONS and before.get(name) != now.get(name):
            was, is_now = (one.get(name, "not there") for one in (before, now))
            yield f"{name}: {was} before, {is_now} now"
    sources = (first.report.get("data") or {}).items()
    for name, about in sources:
        if isinstance(about, dict) and about.get("dataset") and not about.get("revision"):
            yield f"data.{name}: the dataset was named without a revision, and may have changed"
    notes = first.report.get("notes")
    for note in notes if isinstance(notes, list) else ():
        if "as time was short" in str(note):
            yield f"the first run had a limit of time: {note}"
    if first.report.get("searches"):
        yield "a search chose by what it measured, and may choose otherwise elsewhere"


def _few(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def places(work: Path, options: Options) -> Options:
    """The options with result and store below one directory, which a later call goes on with."""
    return replace(options, out=work / "result", store=work / "store")
