import json

import pytest
from pydantic import ValidationError

from prune_export.recipe.stages import Workload
from prune_export.verify.results import (
    Gate,
    Generation,
    Parity,
    Perplexity,
    Reload,
    Speed,
    Task,
    Verification,
    from_json,
    to_json,
)


def _verification(**changes: object) -> Verification:
    speed = Speed(
        engine="onnx",
        workload=Workload(batch=1, prompt=512, new=128),
        phase="decode",
        dense_seconds=[0.04, 0.05],
        pruned_seconds=[0.03, 0.03],
        ratio=1.5,
        low=1.4,
        high=1.6,
        floor_low=0.98,
        floor_high=1.02,
        bound=1.46,
        verdict="faster",
        dense_tokens_per_second=22.2,
        pruned_tokens_per_second=33.3,
    )
    fields: dict[str, object] = {
        "reload": Reload(True, "llama", [], [], 134515008, 2.5),
        "parity": [Parity("onnx", "pytorch", 5e-5, 1e-9, 64, 64, True, 0.02)],
        "perplexity": [Perplexity("dense", 15.2, 1, 4, 3, [2.72])],
        "generation": [Generation("dense", 12, 0, 1, 0, [{"prompt": "a", "text": "b"}])],
        "tasks": [Task("tiny", "acc", None, 0.5, 10)],
        "speed": [speed],
        "gates": [Gate("decode speedup", 1.4, 1.4, True)],
        "machine": {"processor": "x"},
    }
    return Verification(**{**fields, **changes})  # type: ignore[arg-type]


def test_survives_json() -> None:
    value = _verification()
    assert Verification.from_json(json.loads(json.dumps(value.to_json()))) == value


def test_lists_survive_json() -> None:
    speeds = _verification().speed
    assert from_json(list[Speed], json.loads(json.dumps(to_json(speeds)))) == speeds


def test_refuses_unknown_fields() -> None:
    data = _verification().to_json()
    data["parity"][0]["extra"] = 1
    with pytest.raises(ValidationError, match="extra"):
        Verification.from_json(data)


@pytest.mark.parametrize(
    "workload",
    [{"batch": 1, "prompt": 8}, {"batch": 0, "prompt": 8, "new": 4},
     {"batch": 1, "prompt": 8, "new": 4, "old": 1}],
)  # fmt: skip
def test_a_measurement_says_all_of_what_it_was_made_on(workload: dict[str, int]) -> None:
    """A recipe's workload has defaults; a report's, which is the same value, leaves none out."""
    data = _verification().to_json()
    data["speed"][0]["workload"] = workload
    with pytest.raises(ValidationError, match="workload"):
        Verification.from_json(data)


@pytest.mark.parametrize(
    "changes",
    [
        {"reload": Reload(False, "llama", ["lm_head.weight"], [], 1, 1.0)},
        {"parity": [Parity("onnx", "pytorch", 1.0, 1.0, 3, 64, False, 0.02)]},
        {"gates": [Gate("decode speedup", 1.4, 1.2, False)]},
    ],
)
def test_any_failure_makes_it_not_ok(changes: dict[str, object]) -> None:
    assert _verification().ok
    assert not _verification(**changes).ok
