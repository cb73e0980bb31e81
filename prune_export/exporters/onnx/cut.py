"""Divides a traced graph into what is before, inside and after the transformer blocks.

Every node gets a stage: before the blocks, inside traced block j, or after the blocks. A node that
mixes stages (a residual past a block, a computation between two blocks) is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from prune_export.errors import PlanError
from prune_export.exporters.onnx.markers import DOMAIN
from prune_export.exporters.onnx.trace import Trace


@dataclass
class Cut:
    """The traced nodes by stage: before, in each block, and after.

    `sized` nodes read nothing of a block but its sizes, and are different in each. `hidden` names
    the residual state: `enter` and `leave` of all blocks, `in 0` and `out 0` of each.
    """

    before: list[Any] = field(default_factory=list)
    sized: list[Any] = field(default_factory=list)
    inside: dict[int, list[Any]] = field(default_factory=dict)
    after: list[Any] = field(default_factory=list)
    hidden: dict[str, str] = field(default_factory=dict)


def cut(trace: Trace, block_of: Callable[[str], int], is_size: Callable[[str], bool]) -> Cut:
    """Cuts the graph; `block_of` gives a weight's block or -1, `is_size` what differs by layer.

    Raises:
        PlanError: the model computes something that does not belong to one block.
    """
    final = 2 * (max(trace.kinds) + 1)
    stages = {
        value.name: 2 * block + 1 for value in trace.model.graph.inputs
        if (block := block_of(value.name)) >= 0
    }  # fmt: skip
    found = Cut()
    previous = ""
    sized: set[str] = set()
    for node in trace.model.graph:
        read = [value.name for value in node.inputs if value is not None]
        stage = max((stages.get(name, 0) for name in read), default=0)
        marker = node.op_type if node.domain == DOMAIN else ""
        if marker == "BlockInput":
            number = node.attributes["block"].as_int()
            if number and read[0] != previous:
                raise _mixed(f"something between blocks {number - 1} and {number}")
            if number == 0:
                found.hidden["enter"] = read[0]
            found.hidden[f"in {number}"] = node.outputs[0].name
            stage = 2 * number + 1
        elif marker == "BlockOutput":
            number = node.attributes["block"].as_int()
            found.hidden[f"out {number}"] = read[0]
            previous = found.hidden["leave"] = node.outputs[0].name
            stage = 2 * number + 2
        elif any(stages.get(name, 0) not in (0, stage) for name in read):
            raise _mixed(f"a {node.op_type} reads several blocks")
        elif stage == 0 and any(name in sized or is_size(name) for name in read):
            found.sized.append(node)
            sized |= {value.name for value in node.outputs}
        elif stage == 0:
            found.before.append(node)
        elif stage == final:
            found.after.append(node)
        elif stage % 2:
            found.inside.setdefault(stage // 2, []).append(node)
        else:
            raise _mixed(f"a {node.op_type} stands between two blocks")
        stages |= {value.name: stage for value in node.outputs}
    return found


def _mixed(what: str) -> PlanError:
    return PlanError(
        "onnx",
        f"the blocks of this model are not a plain chain: {what}",
        "export this model with another exporter",
    )
