"""`optimum-cli prune …`: what is typed after it goes to `prune-export` as it is.

optimum loads this file whenever its command line starts, so it imports nothing heavy.
"""

from __future__ import annotations

import sys
from argparse import REMAINDER, ArgumentParser
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class Prune(BaseOptimumCLICommand):  # type: ignore[misc]
    """Hands its arguments on."""

    COMMAND = CommandInfo(
        name="prune", help="Prune, heal, export and verify a language model by a recipe."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Takes whatever is typed; `--help` is that of prune-export."""

        def show_help(file: Any = None) -> None:
            del file
            _prune_export(["--help"])

        parser.add_argument("arguments", nargs=REMAINDER)
        parser.print_help = show_help  # type: ignore[method-assign]

    def run(self) -> None:
        """Runs the command; its exit status is optimum-cli's."""
        _prune_export(self.args.arguments or ["--help"])


def _prune_export(arguments: list[str]) -> None:
    from prune_export.cli import main

    sys.argv = ["prune-export", *arguments]
    main()


REGISTER_COMMANDS = [Prune]
