"""What an exporter declares about itself, read in one place.

Nobody else keeps a table of exporters: whoever must know something of one asks here, and a plug-in
that declares nothing gets the answers that are safe to give.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from prune_export import registry


@dataclass(frozen=True)
class SparseNote:
    """What a report says beside sparse weights, where kernels were not asked for and where so."""

    unasked: str = "sparse kernels were not asked for"
    asked: str = ""


@dataclass(frozen=True)
class ExporterFacts:
    """The class attributes of an exporter that say what its engines are; all have a default.

    `RUNS_CODE`: they hold machine code, so that opening a stranger's would run it.
    `RUNS_ON`: the devices that they need one of, as `frozenset({"cuda"})`; None for any.
    `PACKAGES`: the distributions whose versions change what they do or how fast.
    `SPARSE_NOTE`: what a report says beside their sparse weights.
    `EXAMPLE`: the name of a template beside the exporter that shows in the model card how to run
    one; empty for none.
    `ALONE`: the file by which an engine's directory is known where no report is beside it; empty
    for engines that need their report.
    `RUNTIME`: what runs them, as the model card names it; empty for the exporter's own name.
    `UNOPENED`: why their engines cannot be opened here at all; empty for those that can.
    `WRITES_CODES`: in an integer precision (`int4`, `int8`) they write the codes of a quantized
    checkpoint as they are.
    """

    runs_code: bool = False
    runs_on: frozenset[str] | None = None
    packages: tuple[str, ...] = ()
    sparse_note: SparseNote = SparseNote()
    example: str = ""
    alone: str = ""
    runtime: str = ""
    unopened: str = ""
    writes_codes: bool = False

    @classmethod
    def of(cls, kind: Any) -> Self:
        """What the class of an exporter declares."""
        plain = cls()
        return cls(
            runs_code=bool(getattr(kind, "RUNS_CODE", plain.runs_code)),
            runs_on=getattr(kind, "RUNS_ON", plain.runs_on),
            packages=tuple(getattr(kind, "PACKAGES", plain.packages)),
            sparse_note=getattr(kind, "SPARSE_NOTE", plain.sparse_note),
            example=getattr(kind, "EXAMPLE", plain.example),
            alone=getattr(kind, "ALONE", plain.alone),
            runtime=str(getattr(kind, "RUNTIME", plain.runtime)),
            unopened=str(getattr(kind, "UNOPENED", plain.unopened)),
            writes_codes=bool(getattr(kind, "WRITES_CODES", plain.writes_codes)),
        )

    @classmethod
    def of_name(cls, name: str) -> Self:
        """What the exporter `name` declares; the defaults where none is registered as that."""
        if name not in registry.names("exporters"):
            return cls()
        return cls.of(registry.find("exporters", name))


def calibrates(entry: Any) -> bool:
    """Whether an exporter with these keys reads calibration data: its attribute `calibrates`."""
    return bool(getattr(entry, "calibrates", False))


def runs_code(entry: Any) -> bool:
    """Whether engines of an exporter with these keys hold machine code.

    All do where its class says `RUNS_CODE`, else those of which its attribute `runs_code` says so.
    """
    return ExporterFacts.of(type(entry)).runs_code or bool(getattr(entry, "runs_code", False))


def packages_of_exporters() -> tuple[str, ...]:
    """The distributions that any exporter names; one that cannot be imported runs nothing here."""
    found: list[str] = []
    for name in registry.names("exporters"):
        with suppress(ImportError):
            found += ExporterFacts.of_name(name).packages
    return tuple(dict.fromkeys(found))
