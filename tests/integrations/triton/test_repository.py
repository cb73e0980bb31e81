"""A model repository: its files, its configs' states, and the streamed text's stop strings."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from prune_export_triton import configs
from prune_export_triton.served_model import Held
from prune_export_triton.writing import write_repository

from prune_export.contracts import Work
from prune_export.errors import PlanError
from prune_export.exporters.onnx import Onnx
from prune_export.machine import Machine
from prune_export.plugins import load_model
from prune_export.progress import Silent


@pytest.fixture(scope="module")
def engine(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "tiny"
    machine = Machine(device="cpu", ram_bytes=8 << 30, gpu_bytes=0, threads=1)
    Onnx().export(tiny_llama, folder, Work(machine, Silent(), folder.parent))
    return folder


@pytest.fixture(scope="module")
def repository(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("models")
    found = write_repository(engine, to, name="small")
    assert found.backend == "onnxruntime"
    return to


@pytest.mark.slow
def test_a_repository_holds_the_model_its_config_and_a_compose_file(repository: Path) -> None:
    files = {one.relative_to(repository).as_posix() for one in repository.rglob("*")}
    assert files >= {"compose.yaml", "small/config.pbtxt", "small/1/model.onnx"}
    assert not [one for one in files if "partial" in one]


def test_the_states_of_the_config_carry_the_cache_from_step_to_step(
    repository: Path, tiny_llama: Path
) -> None:
    """Does by hand what Triton does with `state`: the logits are those of the whole text."""
    text = (repository / "small" / "config.pbtxt").read_text(encoding="utf-8")
    pairs = re.findall(r'input_name: "(.+)"\n +output_name: "(.+)"', text)
    begin = re.findall(r'initial_state {\n +name: "\w+"\n.+\n +dims: \[(.+)\]', text)
    cache = {
        name: np.zeros([1, *map(int, dims.split(","))], np.float32)
        for (name, _), dims in zip(pairs, begin, strict=True)
    }
    session = onnxruntime.InferenceSession(str(repository / "small" / "1" / "model.onnx"))
    assert {one.name for one in session.get_inputs()} == {
        "input_ids", "attention_mask", "position_ids", *cache,
    }  # fmt: skip
    ids, seen, rows = np.array([[5, 9, 60, 61, 7]]), 0, []
    for part in (ids[:, :3], ids[:, 3:4], ids[:, 4:]):
        total = seen + part.shape[1]
        fed = {"input_ids": part, "attention_mask": np.ones((1, total), np.int64),
               "position_ids": np.arange(seen, total)[None]}  # fmt: skip
        names = ["logits", *(output for _, output in pairs)]
        logits, *after = session.run(names, fed | cache)
        cache = {name: value for (name, _), value in zip(pairs, after, strict=True)}
        rows, seen = [*rows, logits], total
    with torch.no_grad():
        expected = load_model(tiny_llama, dtype=torch.float32).eval()(torch.from_numpy(ids)).logits
    np.testing.assert_allclose(rows[-1][:, -1], expected[:, -1].numpy(), atol=1e-4)


def test_what_is_there_already_or_cannot_be_served_is_refused(
    repository: Path, engine: Path, tiny_llama: Path
) -> None:
    with pytest.raises(PlanError, match="is there already"):
        write_repository(engine, repository, name="small")
    with pytest.raises(PlanError, match="use letters"):
        write_repository(engine, repository, name="../outside")
    with pytest.raises(PlanError, match="there are: pytorch"):
        write_repository(tiny_llama, repository, name="other")
    with pytest.raises(PlanError, match="--engine aoti"):
        write_repository(engine, repository, engine="aoti", name="other")


def test_an_engine_of_tensorrt_has_two_profiles_and_the_models_cache(tiny_llama: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny_llama)
    graph = configs.graph_of_config(config, {"precision": "bf16"})
    assert len(graph.caches) == 12
    assert graph.caches[0] == configs.Cache(0, "key", 2, 8, "BF16")
    text = configs.with_state("small", graph, "tensorrt")
    assert 'platform: "tensorrt_plan"' in text
    assert 'profile: ["0", "1"]' in text


@given(some.lists(some.text("ab", max_size=4)), some.text("ab", min_size=1, max_size=4))
def test_no_text_passes_a_stop_string_however_it_is_cut(parts: list[str], stop: str) -> None:
    held = Held([stop, ""])
    found = "".join(held.add(part) for part in parts if not held.met) + held.text
    whole = "".join(parts)
    assert held.met == (stop in whole)
    assert found == whole.partition(stop)[0]
