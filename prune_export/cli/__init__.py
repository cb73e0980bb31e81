"""The command line: parses arguments, calls the package, and prints.

Exit status: 0 done, 1 a verification gate or a stage failed, 2 bad input (recipe, model, machine).
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Final

from prune_export.cli import console
from prune_export.errors import PruneExportError, PublishError, StageError, VerifyError

_QUIET_LIBRARIES: Final = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "BITSANDBYTES_NOWELCOME": "1",
}

_INTERRUPTED: Final = 130


def main() -> None:
    """Runs the command line; errors of this package become three lines and an exit status."""
    verbose = "--verbose" in sys.argv or "-v" in sys.argv
    if not verbose:
        for variable, value in _QUIET_LIBRARIES.items():
            os.environ.setdefault(variable, value)
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
    from prune_export.cli.commands import app
    from prune_export.cli.help import Abort, UsageError, usage_problem

    try:
        # The status of what ended early, such as `--version`; None after a command.
        status = app(prog_name="prune-export", standalone_mode=False) or 0
    except UsageError as error:
        where, problem, fix = usage_problem(error)
        if problem:
            console.show_problem(where, problem, fix)
        raise SystemExit(2) from None
    except PruneExportError as error:
        if verbose:
            console.errors.print_exception()
        console.show_error(error, as_json="--json" in sys.argv)
        failed = isinstance(error, StageError | VerifyError | PublishError)
        raise SystemExit(1 if failed else 2) from None
    except (KeyboardInterrupt, Abort):
        status = _INTERRUPTED
    if status == _INTERRUPTED:
        console.errors.put("interrupted; the same command goes on from here")
    raise SystemExit(status)


__all__ = ["main"]
