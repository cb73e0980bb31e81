"""Validates a report from outside, where its readers compute with it.

report.json names engines and holds free accounts of methods (`log`); it may be a stranger's. Keys
that nobody computes with may hold anything, within bounds that keep drawing and writing finite.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

from prune_export.contracts import StageLog
from prune_export.errors import CheckpointError
from prune_export.system.files import DEEPEST, is_deeper

LARGEST: Final = 10**18
"""No number of a report is larger: a model of 2026 has 10**13 parameters."""
MOST_LAYERS: Final = 10_000
_MOST_MAP: Final = 1_000

Count = Annotated[int, Field(ge=0, le=LARGEST)]
Layers = Annotated[int, Field(ge=0, le=MOST_LAYERS)]
Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]

_Step = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]


class _Open(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]


def _square(table: list[list[float | None]] | None) -> list[list[float | None]] | None:
    if table and any(len(row) < len(table) for row in table):
        raise ValueError("its rows must be as long as it has rows")
    return table


class _Log(_Open, total=False):
    dropped: list[Layers] | None
    kept: list[Layers] | None
    loss: list[tuple[_Step, float | None] | tuple[_Step, float | None, float | None]] | None
    notes: list[str] | None
    distance_map: Annotated[
        list[list[float | None]] | None, Field(max_length=_MOST_MAP), AfterValidator(_square)
    ]
    block_scores: Annotated[list[float | None] | None, Field(max_length=MOST_LAYERS)]
    zeros: Count
    weights: Annotated[int, Field(ge=1, le=LARGEST)]
    pattern: str


class _Data(_Open, total=False):
    dataset: str | None
    files: list[str] | dict[str, str] | None


class _Target(_Open, total=False):
    speedup: _Step | None
    latency_ms: _Step | None
    parameters: _Step | None


_LOG: Final = TypeAdapter(_Log)
_DATA: Final = TypeAdapter(_Data)
_TARGET: Final = TypeAdapter(_Target)


def _log(found: dict[str, Any]) -> dict[str, Any]:
    _LOG.validate_python(found)
    if "mask_digest" in found and not {"zeros", "weights", "pattern"} <= found.keys():
        raise ValueError("has a mask_digest, but not zeros, weights and pattern")
    return found


def _data(found: dict[str, Any]) -> dict[str, Any]:
    _DATA.validate_python(found)
    return found


def _target(found: dict[str, Any]) -> dict[str, Any]:
    _TARGET.validate_python(found)
    return found


if TYPE_CHECKING:  # readers may use the keys of the contract alone, and find them typed
    Log = StageLog
else:
    Log = Annotated[dict[str, Any], AfterValidator(_log)]
"""A method's or the healer's account: the parts that figures are made of have their types."""
Data = Annotated[dict[str, Any], AfterValidator(_data)]
Target = Annotated[dict[str, Any], AfterValidator(_target)]


def refuse_unbounded(report: Any) -> None:
    """Refuses a report that is nested too deep, or has numbers too long to print.

    Raises:
        CheckpointError: naming the bound.
    """
    if is_deeper(report, DEEPEST):
        raise CheckpointError("report.json", f"is nested deeper than {DEEPEST} levels", _AGAIN)
    level: list[Any] = [report]
    while level:
        inner: list[Any] = []
        for one in level:
            if isinstance(one, Mapping):
                inner.extend(one.values())
            elif isinstance(one, list | tuple):
                inner.extend(one)
            elif type(one) is int and abs(one) > LARGEST:
                raise CheckpointError(
                    "report.json", f"holds a number of {len(f'{one:x}')} hexadecimal digits", _AGAIN
                )
        level = inner


_AGAIN: Final = "run the recipe again with this version to write the report anew"
