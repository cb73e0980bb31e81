"""Times sparse TensorRT engines against dense ones, and against themselves without sparse kernels.

    python benchmarks/gpu/sparse_engines.py --dense DIR --sparse DIR --work DIR --precision fp16 fp8
    python benchmarks/gpu/sparse_engines.py … --engine onnx --quick   # does it run at all, anywhere

`--dense` and `--sparse` are checkpoints of one model; the second's weights hold 2 of 4, or a
pattern that `--sliding` rewrites. For each precision three engines are built, all else equal: of
the dense weights; of the sparse ones with sparse kernels forbidden; of the sparse ones with them
allowed. Two ratios are measured at every prompt size from 1 to 4096 and in decode: sparse against
dense, which is what a user gains, and sparse against the same weights without sparse kernels, which
is what the kernels gain. Where an interval holds 1, the verdict is that there is no speedup. What
the builder said and which kernels the engine names is in the result; raw samples are kept. The
result is written after each precision, with the reason where one failed; the exit code is then 1.

No script in this directory may have the name of a library: Python would import it instead.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _result

from prune_export.checkpoint import Checkpoint
from prune_export.contracts import BuildRecord, Work
from prune_export.errors import PruneExportError
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.recipe.stages import Workload
from prune_export.verify import Effort, Engine, measure_speed, tokens_without_text
from prune_export.verify.results import Speed, to_json

PROMPTS = (1, 16, 64, 256, 1024, 4096)
NEW = 16
CONTEXT = max(PROMPTS) + NEW


@dataclass(frozen=True)
class Variant:
    """One engine: what it is called, whose weights it has, and whether sparse kernels may run."""

    name: str
    checkpoint: Path
    sparse: bool


@dataclass(frozen=True)
class Built:
    """A variant as it was built."""

    variant: Variant
    record: BuildRecord
    path: Path

    @property
    def engine(self) -> Engine:
        return Engine.of(self.record, self.path, trusted=True)


def variants(dense: Path, sparse: Path) -> tuple[Variant, Variant, Variant]:
    """The three engines, in the order in which they are compared with the last one."""
    return (
        Variant("dense weights", dense, False),
        Variant("sparse weights, kernels off", sparse, False),
        Variant("sparse weights, kernels on", sparse, True),
    )


def exporter(engine: str, precision: str, variant: Variant, sliding: bool, batch: int) -> Any:
    """The exporter of a variant; `onnx`, without sparse kernels, stands in where no GPU is."""
    if engine == "onnx":
        from prune_export.exporters.onnx import Onnx

        return Onnx(precision=precision, logits="last", sliding=sliding and variant.sparse)
    from prune_export.exporters.tensorrt import Tensorrt
    from prune_export.exporters.tensorrt.profiles import Span

    return Tensorrt(
        flavor="rtx" if engine == "rtx" else "tensorrt",
        precision=precision,
        sparse=variant.sparse,
        # The windows make weights larger: without sparse kernels they would only cost.
        sliding=sliding and variant.sparse,
        batch=Span(batch, batch),
        prompt=Span(max(PROMPTS), max(PROMPTS)),
        context=Span(CONTEXT, CONTEXT),
    )


def build(entry: Any, variant: Variant, out: Path, work: Work) -> Built:
    """The engine in `out`, built unless it is there."""
    kept = out / "record.json"
    if kept.is_file():
        return Built(
            variant, BuildRecord.from_json(json.loads(kept.read_text(encoding="utf-8"))), out
        )
    out.mkdir(parents=True, exist_ok=True)
    scratch = work.scratch / out.name
    scratch.mkdir(parents=True, exist_ok=True)
    entry.check(Checkpoint.open(variant.checkpoint).arch(), work.machine)
    record = entry.export(variant.checkpoint, out, replace(work, scratch=scratch))
    kept.write_text(json.dumps(record.to_json()), encoding="utf-8")
    return Built(variant, record, out)


def compared(
    built: Sequence[Built], workloads: Sequence[Workload], machine: Machine, effort: Effort
) -> Iterator[tuple[str, list[Speed]]]:
    """The last engine against each of the others."""
    ids, last = tokens_without_text(), built[-1]
    for other in built[:-1]:
        name = f"{last.variant.name} against {other.variant.name}"
        yield (
            name,
            measure_speed(
                other.engine, last.engine, workloads, ids, machine, name=name, effort=effort
            ),
        )


def lines(precision: str, name: str, speeds: Sequence[Speed]) -> Iterator[str]:
    """A table for people: one line for a prompt size and phase."""
    yield f"{precision}: {name}"
    for one in speeds:
        where = f"batch {one.workload.batch} {one.phase} {one.workload.prompt:>5}"
        yield f"  {where:28} {one.ratio:5.2f}x ({one.low:.2f}-{one.high:.2f})  {one.verdict}"


def kernels(built: Sequence[Built]) -> list[Mapping[str, Any]]:
    """What each build shows of sparse kernels."""
    return [{"engine": one.variant.name, **one.record.sparsity, "seconds": one.record.seconds}
            for one in built]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--sparse", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--engine", choices=("tensorrt", "rtx", "onnx"), default="tensorrt")
    parser.add_argument("--precision", nargs="+", default=["fp16"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompts", type=int, nargs="+", default=list(PROMPTS))
    parser.add_argument("--sliding", action="store_true")
    parser.add_argument("--minutes", type=float, default=3.0, help="for each comparison")
    parser.add_argument("--quick", action="store_true", help="three rounds of two small workloads")
    parser.add_argument("--name", default="tensorrt")
    parser.add_argument("--results", type=Path, default=_result.RESULTS)
    given = parser.parse_args()
    machine = Machine.detect(threads=2 if given.engine == "onnx" else None)
    prompts, batches = ([16], [1]) if given.quick else (given.prompts, given.batch)
    workloads = [Workload(batch, prompt, NEW) for batch in batches for prompt in prompts]
    effort = Effort(seconds=60 * given.minutes)
    if given.quick:
        effort = Effort(launches=3, rounds=1, most_launches=3, seconds=1.0)
    work = Work(machine, Silent(), given.work / "scratch")
    found: dict[str, Any] = {}
    about = {
        "model": given.sparse.name, "engine": given.engine, "sliding": given.sliding,
        "minutes": given.minutes, "precisions": found,
    }  # fmt: skip
    for precision in given.precision:
        found[precision] = own = {}
        try:
            built = [
                build(
                    exporter(given.engine, precision, one, given.sliding, max(batches)), one,
                    given.work / f"{precision}-{at}", work,
                )
                for at, one in enumerate(variants(given.dense, given.sparse))
            ]  # fmt: skip
            own["builds"] = kernels(built)
            own["toolchain"] = dict(built[-1].record.toolchain)
            own["speeds"] = {}
            for name, measured in compared(built, workloads, machine, effort):
                print("\n".join(lines(precision, name, measured)), flush=True)
                own["speeds"][name] = to_json(measured)
        except Exception as error:  # another precision may work; what failed is a result
            own["failed"] = str(error) or type(error).__name__
            if not isinstance(error, PruneExportError):
                own["failed"] = traceback.format_exc()
            print(f"{precision}: {own['failed']}", flush=True)
        saved = _result.save(given.name, about, results=given.results)
    print(saved)
    if any("failed" in own for own in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
