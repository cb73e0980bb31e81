"""Reads what a TensorRT bindings wheel offers, without its libraries, into tensorrt_names.json.

    python tests/exporters/tensorrt/tensorrt_names.py UNPACKED_WHEEL 11.4.0.106

The bindings need libnvinfer only to resolve symbols; empty libraries of the same names do for
looking at the classes. It needs gcc, nm and readelf, and is run by hand for a new version.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any, Final

from prune_export.exporters.tensorrt.binding import USED, USED_OF_RTX

NAMES: Final = Path(__file__).with_suffix(".json")


def loaded(wheel: Path) -> Any:
    """The extension module of an unpacked wheel, its libraries replaced by empty ones."""
    package = wheel / "tensorrt_bindings"
    extension = next(package.glob("tensorrt*.so"))
    needed = [
        name
        for name in re.findall(r"NEEDED.*\[(.*)\]", told("readelf", "-d", str(extension)))
        if name.startswith("libnv")
    ]
    undefined = told("nm", "-D", "--undefined-only", str(extension)).splitlines()
    symbols = {line.split()[-1].partition("@")[0] for line in undefined}
    wanted = sorted(
        name for name in symbols if re.search(r"nvinfer|nvonnx|Registry|[cg]et\w*Infer|Nv", name)
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.c"
        source.write_text(
            "\n".join(
                f"char {name}[512];"
                if name.startswith("_ZT")
                else f"void* {name}(void){{return 0;}}"
                for name in wanted
            )
        )
        sys.setdlopenflags(os.RTLD_LAZY | os.RTLD_GLOBAL)
        for at, name in enumerate(needed):
            library = str(Path(folder) / name)
            body = [str(source)] if at == 0 else ["-xc", os.devnull]
            told("gcc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", library, *body)
            ctypes.CDLL(library, mode=os.RTLD_GLOBAL | os.RTLD_LAZY)
        stub = types.ModuleType("tensorrt_bindings")
        stub.__path__ = [str(package)]
        sys.modules["tensorrt_bindings"] = stub
        return importlib.import_module("tensorrt_bindings.tensorrt")


def told(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def names_of(module: Any) -> dict[str, list[str]]:
    """The public names of each class that we use."""
    kinds = {kind: getattr(module, kind, None) for kind in sorted({*USED, *USED_OF_RTX})}
    return {
        kind: sorted(name for name in dir(found) if not name.startswith("_"))
        for kind, found in kinds.items()
        if found is not None
    }


def main() -> None:
    known = json.loads(NAMES.read_text(encoding="utf-8")) if NAMES.is_file() else {}
    known[sys.argv[2]] = names_of(loaded(Path(sys.argv[1])))
    versions = [
        f'"{version}": {{\n'
        + ",\n".join(f'  "{kind}": {json.dumps(names)}' for kind, names in kinds.items())
        + "\n }"
        for version, kinds in sorted(known.items())
    ]
    NAMES.write_text("{\n " + ",\n ".join(versions) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
