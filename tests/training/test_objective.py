"""Keys of a distillation that would not do what they say are refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from prune_export.training.losses.objective import Distill


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"beta": 0.3}, "beta: 0.3"),
        ({"beta": 0.3, "divergence": "reverse_kl"}, "beta: 0.3"),
        ({"new_tokens": 64}, "new_tokens: 64"),
        ({"sampling_temperature": 1.0}, "sampling_temperature: 1"),
    ],
)
def test_a_key_of_another_way_to_distil_is_refused(keys: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError, match=f"`{key}` is of"):
        Distill(**keys)


def test_all_keys_written_out_with_their_defaults_stand() -> None:
    written = Distill().model_dump()
    assert Distill(**written) == Distill()
    assert Distill(beta=0.3, divergence="jsd").beta == 0.3
    assert Distill(on_policy=0.5, new_tokens=64, sampling_temperature=1.0).new_tokens == 64
