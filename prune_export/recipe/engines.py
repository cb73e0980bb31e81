"""Engines as a recipe names them: an exporter with its keys, and what a search may choose among."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final

from prune_export import registry
from prune_export.exporter_facts import calibrates
from prune_export.recipe.stages import Stage, checker, plain

if TYPE_CHECKING:
    from prune_export.recipe.search import Search

QUANTIZE: Final = "quantize"
"""The key of an engine, beside its exporter, that says how its weights become coarse."""


@dataclass(frozen=True)
class Export:
    """One export: a registered exporter with its parameters."""

    name: str
    entry: Any

    def parameters(self) -> dict[str, Any]:
        """The entry's fields as plain data, defaults included."""
        return plain(self.entry)

    @property
    def calibrates(self) -> bool:
        """Whether it reads calibration data."""
        return calibrates(self.entry)


@dataclass(frozen=True)
class EngineOption:
    """An engine that a search may choose: an exporter, after a quantize stage if there is one."""

    export: Export
    quantize: Stage | None = None
    apart: str = ""
    """What tells it from others of the same label: `block_size 128`."""

    @property
    def label(self) -> str:
        """Precision and exporter, such as `int8 on ort_genai`."""
        return f"{self._kind} ({self.apart})" if self.apart else self._kind

    @property
    def _kind(self) -> str:
        precision = getattr(self.export.entry, "precision", "")
        parts = [str(precision), f"by {self.quantize.name}" if self.quantize else ""]
        return " ".join([*filter(None, parts), "on", self.export.name])


def engines_of(search: Search) -> Iterator[EngineOption]:
    """The engines among which a search chooses; the others are measured against the first.

    Where labels would be the same, they name what differs.
    """
    found = list(_options(search))
    for option in found:
        alike = [_keys(one) for one in found if one.label == option.label]
        own = _keys(option)
        differs = [key for key in own if any(other.get(key) != own[key] for other in alike)]
        yield replace(option, apart=", ".join(f"{key} {own[key]}" for key in differs))


def _keys(option: EngineOption) -> dict[str, Any]:
    found = {
        one.name: getattr(option.export.entry, one.name) for one in fields(option.export.entry)
    }
    own = option.quantize.entry if option.quantize else None
    for one in fields(own) if own else ():
        found[f"{QUANTIZE} {one.name}"] = getattr(own, one.name)
    return found


def _options(search: Search) -> Iterator[EngineOption]:
    for one in search.engines:
        item = dict(one)
        quantize = None
        if how := item.pop(QUANTIZE, None):
            body = dict(how)
            name, data = str(body.pop("method")), str(body.pop("data", "calibration"))
            entry = checker(registry.find("quantize", name)).validate_python(body)
            quantize = Stage("quantize", name, entry, data)
        ((name, keys),) = item.items()
        entry = checker(registry.find("exporters", name)).validate_python(keys or {})
        yield EngineOption(Export(name, entry), quantize)
