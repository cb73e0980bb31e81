"""Makes tracing deterministic: the same graph in every process.

Python orders sets of text by a seed that each process draws anew. Code that walks such a set while
it computes, as Gemma 3 does with its kinds of attention, gives graphs of other bytes each time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class _Sorted(set[Any]):
    """A set that iterates in sorted order."""

    def __iter__(self) -> Iterator[Any]:
        return iter(sorted(super().__iter__(), key=repr))


@contextmanager
def sets_in_order(model: nn.Module) -> Iterator[None]:
    """Makes `set(…)` in the modules of the model's classes iterate in sorted order, in a `with`."""
    homes = {type(module).__module__ for module in model.modules()}
    changed = [sys.modules[home] for home in sorted(homes) if not hasattr(sys.modules[home], "set")]
    for home in changed:
        vars(home)["set"] = _Sorted
    try:
        yield
    finally:
        for home in changed:
            del vars(home)["set"]
