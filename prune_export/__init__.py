"""Prune, heal, export and verify language models from a declarative recipe.

    from prune_export import Options, Recipe, load, plan, run

What is listed in `__all__` is the public face; everything else may move. It is imported when it is
first asked for, so that `import prune_export` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from prune_export.modeling import register_if_imported

if TYPE_CHECKING:
    from prune_export import contracts, errors, plugins
    from prune_export.execution import Options, RunResult, plan, run
    from prune_export.machine import Machine
    from prune_export.planning import Plan
    from prune_export.recipe import Recipe
    from prune_export.results.opening import engines
    from prune_export.results.provenance import Loaded, Provenance, load

__version__ = "0.1.0"

__all__ = [
    "Loaded",
    "Machine",
    "Options",
    "Plan",
    "Provenance",
    "Recipe",
    "RunResult",
    "__version__",
    "contracts",
    "engines",
    "errors",
    "load",
    "plan",
    "plugins",
    "run",
]

_HOMES: Final = {
    "Loaded": "results.provenance",
    "Machine": "machine",
    "Options": "execution",
    "Plan": "planning",
    "Provenance": "results.provenance",
    "Recipe": "recipe",
    "RunResult": "execution",
    "engines": "results.opening",
    "load": "results.provenance",
    "plan": "execution",
    "run": "execution",
}
"""Where each public name is made."""

register_if_imported()


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for."""
    if name in ("contracts", "errors", "plugins"):
        return import_module(f"prune_export.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'prune_export' has no attribute {name!r}")
    found = getattr(import_module(f"prune_export.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
