"""Commands that integrations bring, found by the entry points `prune_export.commands`.

Each entry names a function whose parameters are typer's, as those of the commands here; `serve` is
the first. One that cannot be imported says so when it is called, and harms no other command.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

from prune_export.errors import PlanError

_GROUP: Final = "prune_export.commands"


@dataclass(frozen=True)
class OtherCommand:
    """A command's name, and its function."""

    name: str
    command: Callable[..., Any]


def commands_of_others() -> Iterator[OtherCommand]:
    """Lists the commands of all that is installed, by name."""
    seen: set[str] = set()
    for entry in sorted(entry_points(group=_GROUP), key=lambda one: one.name):
        if entry.name not in seen:
            seen.add(entry.name)
            yield OtherCommand(entry.name, _loaded(entry))


def _loaded(entry: EntryPoint) -> Callable[..., Any]:
    try:
        found: Callable[..., Any] = entry.load()
    except Exception as error:  # whatever a module raises when it is imported
        return _broken(entry, error)
    return found


def _broken(entry: EntryPoint, error: Exception) -> Callable[[], None]:
    source = f" of {entry.dist.name}" if entry.dist else ""
    problem = f"{entry.value}{source} cannot be imported: {type(error).__name__}: {error}"

    def refuse() -> None:
        raise PlanError(
            f"prune-export {entry.name}", problem, "mend or upgrade that package, or uninstall it"
        )

    refuse.__doc__ = f"(does not work here: {problem})"
    return refuse
