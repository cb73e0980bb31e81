"""Writes docs/families.md: what is proven of each model family, by the tests that prove it.

    python -m docs.families_page > docs/families.md

What tests list (who is refused by which method, which families an engine was compared for) is read
from them; what exporters refuse is asked of them. tests/deriving/test_families_page.py compares the
page with this.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from transformers import AutoConfig

from prune_export.arch import Arch
from prune_export.arch.facts import cuts_of
from prune_export.arch.table import Table, tables
from prune_export.deriving.proof import WIDTHS
from prune_export.errors import PlanError
from prune_export.exporters.gguf.shapes import ARCHITECTURES
from prune_export.exporters.onnx import Onnx
from prune_export.exporters.ort_genai.support import architectures
from prune_export.machine import Machine
from prune_export.modeling import register
from tests.contracts.refused import REFUSED, WHOLE_HEADS
from tests.deriving.test_whole_run import MODEL_TYPE as EXPORTED
from tests.exporters.gguf.test_writing import FAMILIES as GGUF
from tests.exporters.onnx.graphs import UNTRACEABLE
from tests.exporters.ort_genai.test_ort_genai import RIGHT
from tests.heal.test_contracts import FAMILIES as HEALED

ROOT: Final = Path(__file__).parents[1]
MACHINE: Final = Machine(device="cpu", ram_bytes=4 << 30, gpu_bytes=0, threads=1)
RESULTS: Final = "*-derived-families.json"
SHORT: Final = {
    "mlp": "MLP", "moe": "experts' width", "shared": "shared expert", "expert": "experts",
    "kv": "heads",
}  # fmt: skip
HEADER: Final = """\
# What is proven of which family

<!-- made by docs/families_page.py from the tests; do not edit -->

**yes**: tests prove it on random models of this family, in every release. **refused**: the plan
says no, and why; the reasons are below. **not tried**: nothing refuses it, and no test has run it.

| column | proven by |
|:--|:--|
| depth | `tests/arch/test_families.py`: a cut computes as the blocks bypassed, also with a cache |
| width | `tests/arch/test_families.py`, `tests/contracts/test_width_methods.py`: cut = silenced |
| sparse | `tests/contracts/test_methods.py`, `tests/methods/sparse`: every method, N:M, GPTQ |
| heal | `tests/heal/test_contracts.py`: *trained* by all healers; *one step*: nothing is mixed up |
| onnx | `tests/exporters/onnx`: prefill and decode agree with PyTorch |
| ort_genai | `tests/exporters/ort_genai/test_ort_genai.py`: agrees with PyTorch |
| gguf | `tests.exporters.gguf.test_writing.py`: read back, it computes the same |

"""


def _arch_of(model_type: str, table: Table) -> Arch:
    full = AutoConfig.for_model(model_type, **table.tiny.config).to_dict()
    return Arch.from_config(full)


def _row_of(model_type: str, table: Table, notes: dict[str, str]) -> list[str]:
    own = table.family
    return [
        f"`{model_type}`",
        _depth(table),
        _width(model_type, table),
        "refused ¹" if model_type in REFUSED["magnitude"] else "yes",
        "trained" if model_type in {kind for kind, *_ in HEALED.values()} else "one step",
        _onnx(model_type, table, notes),
        _genai(own, table),
        "yes" if model_type in {kind for kind, _ in GGUF}
        else "not tried" if model_type in ARCHITECTURES else "refused ²",
    ]  # fmt: skip


def _depth(table: Table) -> str:
    if table.config.depth_requires:
        return "yes ⁴"
    if table.layer_sets:
        return "yes ⁵"
    return "yes"


def _width(model_type: str, table: Table) -> str:
    if model_type in REFUSED["minitron"]:
        return "refused ¹"
    cuts = [axis for axis in cuts_of(table) if axis in SHORT]
    if model_type in WHOLE_HEADS and "kv" in cuts:
        cuts.remove("kv")
    return ", ".join(SHORT[axis] for axis in cuts) or "refused"


def _onnx(model_type: str, table: Table, notes: dict[str, str]) -> str:
    try:
        Onnx().check(_arch_of(model_type, table), MACHINE)
    except PlanError as error:
        notes[model_type] = error.problem
        return "refused ³"
    return "not tried" if model_type in UNTRACEABLE else "yes"


def _genai(family: str, table: Table) -> str:
    names = {name.lower() for name, _ in RIGHT.values()}
    if family.replace("_", "") in names or f"{family}text" in names:
        return "yes"
    return "not tried" if set(table.architectures) & architectures() else "refused ²"


def page() -> str:
    """The page, as it must stand in docs/families.md."""
    register()
    notes: dict[str, str] = {}
    known = sorted(tables().items())
    rows = [_row_of(name, table, notes) for name, table in known if table.derived is None]
    columns = ["family", "depth", "width", "sparse", "heal", "onnx", "ort_genai", "gguf"]
    lines = [_line(columns), "|:--" * len(columns) + "|", *map(_line, rows)]
    reasons = [
        "¹ All experts of a block are one tensor on disk, or (bloom) heads have slopes by their "
        "number and the MLP is four times as wide as the states.",
        "² The runtime has no architecture of it: onnxruntime-genai's model builder, or llama.cpp "
        "as far as `prune-export gguf` writes for it.",
        "³ " + " ".join(f"`{name}`: {why}." for name, why in sorted(notes.items())),
        "⁴ Only the last ones, where the config says that blocks compute with their number.",
        "⁵ Blocks are of several kinds: cuts whose rest its config cannot say are refused.",
    ]
    return HEADER + "\n".join([*lines, "", *(f"{one}\n" for one in reasons), *_derived()])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _derived() -> Iterator[str]:
    files = sorted((ROOT / "benchmarks" / "results").glob(RESULTS))
    if not files:
        return
    report = json.loads(files[-1].read_text(encoding="utf-8"))
    have = tables()
    types = [one for one in report["types"] if one["model_type"] not in have]
    proven = [one for one in types if one["came"] == "proven"]
    rest = [one for one in types if one["came"] != "proven"]
    yield "## Types without a table"
    yield ""
    yield (
        f"What came of deriving a table for {len(types)} other types of transformers "
        f"{report['versions']['transformers']}, each at its class's default config "
        f"([raw results](../benchmarks/results/{files[-1].name}), by "
        f"`benchmarks/derive_types.py`). {len(proven)} are proven: shapes, depth, the cache, "
        "calibration by blocks; widths as listed. Other types were not tried."
    )
    yield ""
    yield "| type | widths proven | graphs | processor seconds |"
    yield "|:--|:--|:--|--:|"
    for one in proven:
        widths = [what for what, word, _ in one["checks"] if word == "holds" and what in
                  WIDTHS.values()]  # fmt: skip
        graphs = f"refused: {one['untraceable']}" if one["untraceable"] else "not tried"
        graphs = "onnx: yes" if one["model_type"] == EXPORTED else graphs
        seconds = f"{one['processor_seconds']:.1f}"
        yield _line([f"`{one['model_type']}`", ", ".join(widths) or "none", graphs, seconds])
    yield ""
    yield "| type | not proven, and refused, because |"
    yield "|:--|:--|"
    for one in rest:
        yield _line([f"`{one['model_type']}`", _why(one)])
    yield ""


def _why(one: dict[str, Any]) -> str:
    if one["came"] == "disproved":
        what, _, found = next(check for check in one["checks"] if check[1] == "disproved")
        return f"{what}: {found}"[:160]
    return str(one["why"])[:160]


if __name__ == "__main__":
    sys.stdout.write(page())
