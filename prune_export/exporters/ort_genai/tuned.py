"""The fastest engine of a checkpoint on this machine: block size, head, accuracy level, threads.

Each graph is built and compared with PyTorch as any engine is; one that is coarser than what was
asked for, by its KL from PyTorch, is left out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from prune_export.checkpoint import Checkpoint
from prune_export.checkpoint.grid_file import Grids
from prune_export.contracts import BuildRecord, Work
from prune_export.errors import StageError
from prune_export.exporters._shared.tuning import Setting, Tuned, settings_for, tune
from prune_export.exporters.ort_genai.runner import CONFIG

if TYPE_CHECKING:
    from prune_export.exporters.ort_genai.exporter import OrtGenai

_COARSER, _NATS = 1.25, 0.001
"""How many times the asked engine's KL from PyTorch counts as being as good, and nats besides."""

_GAIN: Final = 1.03
"""How many times as fast another graph must decode to be taken."""


def export_tuned(asked: OrtGenai, checkpoint: Path, out: Path, work: Work) -> BuildRecord:
    """Builds the graphs that may be faster than what is asked for, and keeps the fastest in `out`.

    Raises:
        StageError: not even the asked one is right.
    """
    start = perf_counter()
    plain = replace(asked, tune=False)
    vocab = int(Checkpoint.open(checkpoint).full_config()["vocab_size"])
    every = Setting(work.machine.threads)
    best: tuple[OrtGenai, BuildRecord, float] | None = None
    told: list[str] = []
    limit = 0.0
    for number, one in enumerate(graphs(plain, quantized=_quantized(checkpoint))):
        place = out if number == 0 else work.scratch / f"tuned-{number}"
        if number:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
        try:
            record, kl = one.export_tried(checkpoint, place, work)
        except StageError as error:
            if number == 0:
                raise
            told.append(f"{_named(plain, one)}: {error.problem}")
            continue
        (step,) = tune(place, "ort_genai", {}, [every], vocab, work).times
        limit = limit or _COARSER * kl + _NATS
        coarser = f", but coarser (KL {kl:.2g} nats)" if kl > limit else ""
        told.append(f"{_named(plain, one)}: {1 / step.decode:,.0f} tokens/s{coarser}")
        if best is None or (not coarser and step.decode * _GAIN < best[2]):
            best = one, record, step.decode
            if number:
                _take(place, out)
        if number:
            shutil.rmtree(place, ignore_errors=True)
    assert best is not None
    chosen, record, _ = best
    found = tune(out, "ort_genai", {}, settings_for(work.machine), vocab, work)
    found.write(out, work.machine)
    write_session(out / CONFIG, found)
    return replace(
        record,
        parameters=asdict(replace(chosen, tune=True)),
        seconds=perf_counter() - start,
        notes=(*record.notes, f"graphs tried here: {'; '.join(told)}", found.note()),
    )


def graphs(asked: OrtGenai, *, quantized: bool) -> Iterator[OrtGenai]:
    """What is asked for, and the graphs that may be as good and faster.

    The codes of a `quantized` checkpoint keep their groups.
    """
    yield asked
    if asked.precision not in ("int8", "int4"):
        return
    for block in (64, 128):
        if not quantized and block > asked.block_size:
            yield replace(asked, block_size=block)
    if asked.head == "same" and not (quantized and asked.precision == "int8"):
        yield replace(asked, head="int4" if asked.precision == "int8" else "int8")
    if asked.accuracy_level == 4:
        yield replace(asked, accuracy_level=1)


def write_session(config: Path, found: Tuned) -> None:
    """Writes threads and spinning into genai_config.json, which onnxruntime-genai follows."""
    said = json.loads(config.read_text(encoding="utf-8"))
    options = said["model"]["decoder"].setdefault("session_options", {})
    setting = found.best.setting
    options["intra_op_num_threads"] = setting.threads
    options["session.intra_op.allow_spinning"] = str(int(setting.spinning))
    config.write_text(json.dumps(said, indent=4), encoding="utf-8")


def _quantized(checkpoint: Path) -> bool:
    return Grids.of(Checkpoint.open(checkpoint)) is not None


def _named(asked: OrtGenai, one: OrtGenai) -> str:
    before: Mapping[str, Any] = asdict(asked)
    changed = [f"{key} {value}" for key, value in asdict(one).items() if value != before[key]]
    return ", ".join(changed) or f"block_size {one.block_size}"


def _take(place: Path, out: Path) -> None:
    """Puts an engine's files in the place of another's."""
    for file in list(out.iterdir()):
        file.unlink() if not file.is_dir() else shutil.rmtree(file)
    for file in list(place.iterdir()):
        shutil.move(str(file), out / file.name)
