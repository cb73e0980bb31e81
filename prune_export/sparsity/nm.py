"""The N:M pattern: at most `keep` of every `of` neighbouring weights are not zero.

Always keep and of, never a bare "2:4": the field writes both kept:group and zeros:group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from prune_export.errors import PlanError


@dataclass(frozen=True)
class Nm:
    """At most `keep` of every `of` weights, along the input dimension, stay.

    Raises:
        PlanError: it would keep all of them.
    """

    keep: Annotated[int, Field(ge=1, description="Weights kept in each group.")]
    of: Annotated[int, Field(ge=2, description="Weights in a group, along the input dimension.")]

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.of:
            raise PlanError(
                "nm",
                f"got keep {self.keep} of {self.of}, expected to keep fewer than there are",
                "write for example `nm: {keep: 2, of: 4}`",
            )

    @property
    def sparsity(self) -> float:
        """The fraction removed."""
        return 1 - self.keep / self.of

    def __str__(self) -> str:
        return f"{self.keep} of {self.of}"
