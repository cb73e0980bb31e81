"""Rotary scalings and exporters: what works is exact, and what does not is refused in the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from prune_export import registry
from prune_export.checkpoint import Checkpoint
from prune_export.contracts import Work
from prune_export.errors import PlanError
from prune_export.exporters._shared.rope import rope_kinds
from prune_export.exporters.aoti import Aoti
from prune_export.exporters.aoti.graph import cache_sizes, compiled
from prune_export.exporters.onnx import Onnx
from prune_export.progress import Silent
from tests.exporters.onnx.graphs import MACHINE, error, exported, saved

ORIGINAL = 8
"""Positions before scaling: prompts of the tests lie on both sides."""

BASE = {"rope_theta": 1e4}
LONG = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "yarn": LONG,
    "llama3": LONG | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": LONG | {"short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0]},
    "dynamic": {"factor": 2.0},
}
WORKS = [
    pytest.param("llama", "longrope"),
    *(
        pytest.param(*pair, marks=pytest.mark.slow)
        for pair in (
            ("llama", "linear"), ("llama", "yarn"), ("llama", "llama3"), ("phi3", "longrope"),
        )
    ),
]  # fmt: skip


def scaled(family: str, kind: str, path: Path, **changes: Any) -> Any:
    """A tiny model with this scaling; phi3 keeps the original length in its config as well."""
    if family == "phi3":
        changes |= {"original_max_position_embeddings": ORIGINAL}
    rope = {"rope_type": kind, **BASE, **ROPES[kind]}
    saved(family, path, rope_parameters=rope, max_position_embeddings=32, **changes)
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


def steps_of(model: Any, ids: np.ndarray, ends: tuple[int, ...]) -> np.ndarray:
    """Logits of parts that end at `ends`, through the cache."""
    parts, cache, start = [], None, 0
    for end in ends:
        with torch.no_grad():
            found = model(
                torch.from_numpy(ids[:, start:end]), past_key_values=cache, use_cache=True
            )
        parts.append(found.logits.numpy())
        cache, start = found.past_key_values, end
    return np.concatenate(parts, axis=1)


def check_runner(entry: Any, model: Any, path: Path) -> None:
    """Below the original length, beyond it at once, and across it with a cache."""
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 14))
    with entry.open(path, MACHINE) as runner:
        for ends in ((6,), (14,), (6, 7, 10, 14)):
            runner.reset()
            starts = (0, *ends[:-1])
            got = np.concatenate(
                [runner.step(ids[:, a:b])[0] for a, b in zip(starts, ends, strict=True)], axis=1
            )
            wanted = steps_of(model, ids, ends)
            assert error(got, wanted, np.ones(got.shape[:2])) < 2e-5, ends


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), WORKS)
def test_onnx_is_exact_on_both_sides_of_the_original_length(
    family: str, kind: str, tmp_path: Path
) -> None:
    model = scaled(family, kind, tmp_path / "dense")
    exported(Onnx(), tmp_path / "dense", tmp_path / "onnx")
    check_runner(Onnx(), model, tmp_path / "onnx")


@pytest.mark.slow
def test_aoti_is_exact_on_both_sides_of_the_original_length(tmp_path: Path) -> None:
    model = scaled("llama", "longrope", tmp_path / "dense", num_hidden_layers=1)
    entry = Aoti(logits="all")
    entry.export(tmp_path / "dense", tmp_path / "aoti", Work(MACHINE, Silent(), tmp_path))
    check_runner(entry, model, tmp_path / "aoti")


def test_dynamic_scaling_is_refused_by_every_exporter_with_what_is_the_same(tmp_path: Path) -> None:
    model = scaled("llama", "dynamic", tmp_path / "dense", num_hidden_layers=1)
    arch = Checkpoint.open(tmp_path / "dense").arch()
    for name in {*registry.names("exporters")} - {"gptq_format"}:  # which writes weights alone
        with pytest.raises(PlanError, match="no exporter takes rotary scaling `dynamic`") as caught:
            registry.find("exporters", name)().check(arch, MACHINE)
        assert '"rope_type": "default"' in caught.value.fix
        assert "32 positions" in caught.value.fix
    ids = torch.arange(32)[None]
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", attn_implementation="eager",
        rope_parameters={"rope_type": "default", **BASE},
    ).eval()  # fmt: skip
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, model(ids).logits)


def test_a_model_that_cannot_be_traced_prints_no_graph(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And both of torch's ways cannot trace a dynamic scaling, which is why it is refused."""
    model = scaled("llama", "dynamic", tmp_path / "dense", num_hidden_layers=1)
    capfd.readouterr()
    with pytest.raises(PlanError, match="torch cannot trace this model"):
        exported(Onnx(), tmp_path / "dense", tmp_path / "onnx")
    with pytest.raises(PlanError, match=r"torch\.export cannot follow"):
        compiled(model, cache_sizes(model), tmp_path / "model.pt2", last=True)
    shown = "".join(capfd.readouterr())
    assert "def forward" not in shown
    assert "symbolic_shapes" not in shown


def test_the_scalings_of_a_config() -> None:
    assert rope_kinds({}) == {"default"}
    assert rope_kinds({"rope_scaling": {"type": "yarn"}}) == {"yarn"}
    both = {"full_attention": {"rope_type": "linear"}, "sliding_attention": {"rope_theta": 1e4}}
    assert rope_kinds({"rope_parameters": both}) == {"default", "linear"}
