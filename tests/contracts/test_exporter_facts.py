"""Every exporter declares what its engines are, and nobody else keeps a table of exporters."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import prune_export
from prune_export import registry
from prune_export.exporter_facts import ExporterFacts, SparseNote, packages_of_exporters
from prune_export.machine import describe

NAMES = registry.names("exporters")
PACKAGE = Path(prune_export.__file__).parent
DECLARED: dict[str, Any] = {
    "DIRECTORY": str, "RUNS_CODE": bool, "RUNS_ON": (frozenset, type(None)), "PACKAGES": tuple,
    "SPARSE_NOTE": SparseNote, "EXAMPLE": str, "RUNTIME": str,
}  # fmt: skip

ALLOWED = {
    "doctor.py": {"onnx", "tensorrt", "gguf"},  # extras of the package, called like the exporters
    # The format of a model that is read, not the engine that is written:
    "checkpoint/filled.py": {"gguf"},
    "checkpoint/gguf.py": {"gguf"},
    "checkpoint/gguf_header.py": {"gguf"},
    "execution/asked.py": {"gguf"},
    "execution/inputs.py": {"gguf"},
    "planning/making.py": {"gguf"},
    "report/card.py": {"onnx"},  # the Hub's tag for a graph of that format
    "recipe/search.py": {"onnx"},  # a default of the recipe, which names an exporter
}


@pytest.mark.parametrize("name", NAMES)
def test_an_exporter_declares_its_facts(name: str) -> None:
    kind = registry.find("exporters", name)
    for attribute, expected in DECLARED.items():
        assert attribute in vars(kind), f"{name} leaves {attribute} to its default"
        assert isinstance(vars(kind)[attribute], expected), attribute
    assert isinstance(kind().calibrates, bool)
    facts = ExporterFacts.of(kind)
    assert facts == ExporterFacts.of_name(name)
    assert facts.runs_on is None or facts.runs_on <= {"cpu", "cuda"}
    assert set(facts.packages) <= set(packages_of_exporters())
    assert not facts.example or Path(inspect.getfile(kind)).with_name(facts.example).is_file()


def test_who_declares_nothing_gets_the_defaults() -> None:
    assert ExporterFacts.of(object) == ExporterFacts() == ExporterFacts.of_name("of a plug-in gone")
    assert ExporterFacts().sparse_note.unasked == "sparse kernels were not asked for"


def test_a_measurement_names_the_versions_it_always_did() -> None:
    """They are part of the key of kept timings: one more, or one less, measures all again."""
    assert packages_of_exporters() == (
        "torch", "onnx", "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai", "tensorrt",
        "tensorrt_rtx_cu13_bindings",
    )  # fmt: skip
    assert {"torch", "onnx", "onnxruntime", "prune-export"} <= describe().keys()


def test_nobody_else_names_an_exporter() -> None:
    found = {
        (str(file.relative_to(PACKAGE)), name)
        for file in (*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.j2"))
        if file.relative_to(PACKAGE).parts[0] != "exporters"
        for name in exporters_in(file)
    }
    assert found == {(file, name) for file, names in ALLOWED.items() for name in names}


def exporters_in(file: Path) -> Iterator[str]:
    """The exporters' names that stand in quotes, in a file of Python or in a template."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        constants = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant))
        yield from (str(node.value) for node in constants if node.value in NAMES)
    else:
        yield from (name for name in NAMES if f'"{name}"' in text or f"'{name}'" in text)
