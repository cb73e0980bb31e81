"""`--help` as plain text: no line is wider than the terminal, and examples break between words."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, Final

import typer
from typer.core import TyperCommand, TyperGroup

from prune_export.cli import console

_WIDEST: Final = 100
_EXAMPLE: Final = "prune-export "

# Typer does not export these two, and has its own where earlier releases have click's.
UsageError: Final[type[Exception]] = next(
    one for one in typer.BadParameter.__mro__ if one.__name__ == "ClickException"
)
Abort: Final = typer.Abort


class Command(TyperCommand):
    """A command whose help is laid out here."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes the help: usage, what it does with examples, arguments, options."""
        formatter.write(console.output.shown("\n".join(_help(self, ctx, {}))))


class Group(TyperGroup):
    """A group of commands whose help is laid out here."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes the help: usage, what it is, options, commands."""
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        formatter.write(console.output.shown("\n".join(_help(self, ctx, commands))))


def usage_problem(error: Any) -> tuple[str, str, str]:
    """Where, what and what to do, of arguments that cannot be understood; empty after the help."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "prune-export"
    if type(error).__name__.startswith("NoArgsIsHelp"):
        console.errors.put(context.get_help() if context else error.format_message())
        return "", "", ""
    return path, error.format_message(), f"see `{path} --help`"


def _help(command: Any, context: Any, commands: dict[str, Any]) -> Iterator[str]:
    width = min(_WIDEST, shutil.get_terminal_size((80, 24)).columns)
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.get_params(context) if one not in arguments]
    words = [context.command_path, "[OPTIONS]"]
    words += [_name(one) if one.required else f"[{_name(one)}]" for one in arguments]
    words += ["COMMAND ..."] if commands else []
    yield from _wrapped("Usage: " + " ".join(words), width, "  ")
    yield ""
    yield from _prose(inspect.cleandoc(command.help or ""), width)
    for title, entries in (
        ("Arguments", [(_name(one), _meaning(one)) for one in arguments]),
        ("Options", [(_spelt(one), _meaning(one)) for one in options]),
        ("Commands", [(name, _first(one.help or "")) for name, one in commands.items()]),
    ):
        if entries:
            yield from ("", f"{title}:", *_listed(entries, width))


def _name(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _spelt(option: Any) -> str:
    spelt = ", ".join(sorted(option.opts, key=len))
    return spelt if option.is_flag else f"{spelt} {_name(option)}"


def _meaning(parameter: Any) -> str:
    """The help, and what is taken where it is not given."""
    found = str(getattr(parameter, "help", None) or "")
    default = parameter.default
    if parameter.required:
        return f"{found} Required."
    if isinstance(default, bool) or default in (None, ()) or callable(default):
        return found
    return f"{found} Default: {default}." if not isinstance(default, list) else found


def _first(text: str) -> str:
    return " ".join(text.partition("\n\n")[0].split())


def _prose(text: str, width: int) -> Iterator[str]:
    """Paragraphs, filled; lines that are examples stay lines of their own."""
    for number, paragraph in enumerate(text.split("\n\n")):
        if number:
            yield ""
        lines = [line.strip() for line in paragraph.splitlines() if line.strip(" \b")]
        if all(line.startswith(_EXAMPLE) for line in lines):
            for line in lines:
                yield from _example(line, width)
        else:
            yield from _wrapped(" ".join(lines), width, "")


def _example(line: str, width: int) -> Iterator[str]:
    """A command, continued on the next line where it must be."""
    parts: list[str] = []
    for word in line.split():
        # An option and its value stay together.
        if parts and parts[-1].startswith("-") and " " not in parts[-1] and word[0] != "-":
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    shown = "  " + parts[0]
    for part in parts[1:]:
        if len(shown) + len(part) + 3 > width:
            yield shown + " \\"
            shown = "      " + part
        else:
            shown += " " + part
    yield shown


def _listed(entries: Sequence[tuple[str, str]], width: int) -> Iterator[str]:
    """Names, and beside them what they mean."""
    margin = min(max(len(name) for name, _ in entries) + 4, 30)
    for name, meaning in entries:
        lines = textwrap.wrap(meaning, width - margin, break_on_hyphens=False) or [""]
        if len(name) + 4 > margin:
            yield f"  {name}"
        else:
            yield f"  {name}".ljust(margin) + lines.pop(0)
        yield from (" " * margin + line for line in lines)


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
