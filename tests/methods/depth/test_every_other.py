"""Blocks at even distances, by hand."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from prune_export.arch import Arch
from prune_export.calibrate import ModelView
from prune_export.checkpoint import Checkpoint
from prune_export.contracts import HasPlanNote
from prune_export.methods.depth.every_other import EveryOther


@pytest.mark.parametrize(
    ("layers", "amount", "dropped"),
    [
        # fairseq's own example for 16 layers keeps 0,2,4,6,8,10,12,14.
        (16, {"sparsity": 0.5}, [1, 3, 5, 7, 9, 11, 13, 15]),
        (12, {"remove": 4}, [2, 5, 8, 11]),
        (10, {"remove": 3}, [2, 5, 9]),
        (6, {"remove": 5}, [0, 1, 2, 3, 5]),
        (5, {"remove": 1}, [4]),
        (5, {"layers": (3, 0)}, [0, 3]),
    ],
)
def test_the_blocks_that_go(layers: int, amount: dict[str, object], dropped: list[int]) -> None:
    arch = Arch.from_config(LlamaConfig(num_hidden_layers=layers).to_dict())
    nothing = Checkpoint(path=None, config={}, entries={})  # type: ignore[arg-type]
    method = EveryOther(**amount)  # type: ignore[arg-type]
    found = method.decide(ModelView(arch, nothing, {}))
    assert found.log["dropped"] == dropped
    assert method.predict(arch).layers == layers - len(dropped)


def test_it_warns_in_the_plan_and_in_the_log() -> None:
    method = EveryOther(remove=2)
    assert isinstance(method, HasPlanNote)
    arch = Arch.from_config(LlamaConfig(num_hidden_layers=6).to_dict())
    nothing = Checkpoint(path=None, config={}, entries={})  # type: ignore[arg-type]
    assert "LayerDrop" in method.note(arch)
    assert "LayerDrop" in method.decide(ModelView(arch, nothing, {})).log["warning"]
