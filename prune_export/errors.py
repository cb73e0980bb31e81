"""The errors of this package, and how they read.

An error says where it happened, what was got versus expected, and what to do about it:

    recipes/qwen.yaml:14  stages.0.prune.sparsity
      got 60, expected a fraction in [0, 1)
      write `sparsity: 0.6`

The tree:

    PruneExportError
    ├── RecipeError        the recipe is malformed (file, line and key are known)
    ├── UnsupportedArch    the architecture tables do not describe this model
    ├── PlanError          the work cannot succeed; raised before any byte is written
    │   └── MissingExtra   an optional package is not installed
    ├── CheckpointError    a model directory is broken, unsafe or incomplete
    ├── StageError         a stage failed while it ran (log and resume command are known)
    ├── VerifyError        an artifact does not do what is claimed (claimed, measured)
    └── PublishError       the Hub refused, or what is to be published is not fit for it
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PruneExportError(Exception):
    """Root of the tree; three lines: where, got versus expected, what to do."""

    def __init__(self, where: str, problem: str, fix: str = "") -> None:
        self.where = where
        self.problem = problem
        self.fix = fix
        super().__init__("\n  ".join(line for line in (where, problem, fix) if line))

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.where, self.problem, self.fix)


class RecipeError(PruneExportError):
    """A recipe that cannot mean anything; `where` is `file:line  key.path`."""


class UnsupportedArch(PruneExportError):
    """A model that the architecture tables do not describe exactly."""


class PlanError(PruneExportError):
    """Work that cannot succeed, found before any byte is written."""


class MissingExtra(PlanError):
    """An optional package is missing; the fix names the extra that brings it."""

    @classmethod
    def of(cls, needed_by: str, package: str, extra: str) -> MissingExtra:
        """Makes the error for `needed_by` when `package`, part of `extra`, cannot be imported."""
        return cls(
            needed_by,
            f"needs the package {package}, which is not installed",
            f'run `pip install "prune-export[{extra}]"`',
        )


class CheckpointError(PruneExportError):
    """A model directory or file that is broken, unsafe or incomplete."""


class StageError(PruneExportError):
    """A stage that failed while it ran; what it had finished is kept for the next run."""


class VerifyError(PruneExportError):
    """An artifact that does not do what it, or its recipe, claims."""


class PublishError(PruneExportError):
    """Something that cannot be published, or a Hub that refused it."""


def did_you_mean(got: str, known: Iterable[str], *, shown: int = 8) -> str:
    """Words a hint: the close matches to `got`, or else all that is known."""
    options = sorted(known)
    close = difflib.get_close_matches(got, options, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(f"`{name}`" for name in close) + "?"
    listed = ", ".join(f"`{name}`" for name in options[:shown])
    return f"known: {listed}" + (", …" if len(options) > shown else "") if options else ""
