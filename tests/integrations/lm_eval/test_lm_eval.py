"""lm-eval on engines: its ONNX models take our exports, and ours scores as transformers does."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from prune_export_lm_eval.model import NAME, EngineLM, register
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, LlamaForCausalLM

from prune_export import engines
from prune_export.contracts import Work
from prune_export.exporters.onnx import Onnx
from prune_export.exporters.ort_genai import OrtGenai
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.verify import measure_engine_tasks, measure_tasks

TASK = """\
task: lanterns
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""
QUESTIONS = (
    ("The light that a keeper tends is in a", [" tower", " well", " drawer"], 0),
    ("Bread is made of", [" sand", " flour", " wool"], 1),
    ("A river runs into the", [" hat", " clock", " sea"], 2),
    ("Two blocks and two blocks are", [" four", " nine", " none"], 0),
)


@pytest.fixture(scope="module")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    lines = (json.dumps({"question": q, "choices": c, "answer": a}) for q, c, a in QUESTIONS)
    data.write_text("\n".join(lines), encoding="utf-8")
    (folder / "lanterns.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tasks(task_files: Path) -> TaskManager:
    return TaskManager(include_path=str(task_files), include_defaults=False)


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the tiny model, with heads as large as onnxruntime-genai's attention wants them."""
    folder = tmp_path_factory.mktemp("model")
    config = AutoConfig.from_pretrained(tiny_llama, head_dim=32, num_hidden_layers=2)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in tiny_llama.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def exports(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    machine = Machine(device="cpu", ram_bytes=8 << 30, gpu_bytes=0, threads=1)
    found = {"pytorch": model}
    for name, exporter in (("onnx", Onnx()), ("ort_genai", OrtGenai(logits="all"))):
        found[name] = tmp_path_factory.mktemp(name)
        exporter.export(model, found[name], Work(machine, Silent(), found[name].parent))
    return found


def sums(model: Any, tasks: TaskManager, **args: Any) -> np.ndarray:
    """The log likelihood of every choice of every question, `[questions, choices]`."""
    done = simple_evaluate(
        model=model, model_args=args or None, tasks=["lanterns"], bootstrap_iters=0,
        log_samples=True, task_manager=tasks,
    )  # fmt: skip
    samples = sorted(done["samples"]["lanterns"], key=lambda one: one["doc_id"])
    return np.array([[float(one[0]) for one in sample["filtered_resps"]] for sample in samples])


@pytest.fixture(scope="module")
def expected(model: Path, tasks: TaskManager) -> np.ndarray:
    return sums("hf", tasks, pretrained=str(model), dtype="float32", device="cpu",
                max_length=256)  # fmt: skip


def test_lm_evals_genai_model_takes_our_engine(
    exports: dict[str, Path], tasks: TaskManager, expected: np.ndarray
) -> None:
    found = sums("onnxruntime-genai", tasks, pretrained=str(exports["ort_genai"]))
    np.testing.assert_allclose(found, expected, atol=2e-2)


def test_lm_evals_onnxruntime_model_takes_our_portable_engine(
    exports: dict[str, Path], tasks: TaskManager, expected: np.ndarray
) -> None:
    found = sums("onnxruntime", tasks, pretrained=str(exports["onnx"]), max_length=256,
                 execution_provider="cpu")  # fmt: skip
    np.testing.assert_allclose(found, expected, atol=2e-2)


@pytest.mark.parametrize("engine", ["pytorch", "onnx", "ort_genai"])
def test_every_engine_scores_as_transformers_does(
    exports: dict[str, Path], tasks: TaskManager, expected: np.ndarray, engine: str
) -> None:
    opened = EngineLM(str(exports[engine]), engine=engine)
    np.testing.assert_allclose(sums(opened, tasks), expected, atol=2e-2)


def test_it_generates_and_stops_and_scores_long_texts(exports: dict[str, Path]) -> None:
    models = [EngineLM(str(exports[name]), engine=name) for name in ("pytorch", "onnx")]
    how = {"until": [], "max_gen_toks": 16}

    def said(model: Any, how: dict[str, Any]) -> str:
        request = Instance("generate_until", {}, ("The river", how), 0)
        return str(model.generate_until([request])[0])

    texts = [said(model, how) for model in models]
    assert texts[0] == texts[1]
    stop = texts[0][4:6]
    assert said(models[1], how | {"until": [stop]}) == texts[0].partition(stop)[0]
    long = Instance("loglikelihood_rolling", {}, ("bread and butter " * 40,), 0)
    totals = [model.loglikelihood_rolling([long])[0] for model in models]
    assert totals[0] == pytest.approx(totals[1], rel=1e-4)
    assert totals[0] < -600  # 680 bytes, in three windows


def test_a_first_token_is_added_where_transformers_adds_it(
    model: Path, tasks: TaskManager, tmp_path: Path
) -> None:
    folder = tmp_path / "begins"
    shutil.copytree(model, folder)
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    raw.save(str(folder / "tokenizer.json"))
    theirs = sums("hf", tasks, pretrained=str(folder), dtype="float32", device="cpu",
                  max_length=256)  # fmt: skip
    np.testing.assert_allclose(sums(EngineLM(str(folder)), tasks), theirs, atol=2e-2)


@pytest.mark.parametrize("name", ["onnx", "ort_genai"])
def test_the_recipes_tasks_measure_engines_as_they_measure_the_checkpoint(
    exports: dict[str, Path], task_files: Path, name: str
) -> None:
    machine = Machine(device="cpu", ram_bytes=8 << 30, gpu_bytes=0, threads=1)
    checkpoint = measure_tasks(["lanterns"], exports["pytorch"], machine, include=task_files,
                               dense=exports["pytorch"])  # fmt: skip
    engine = engines(exports[name])[name]
    found = measure_engine_tasks(
        ["lanterns"], engine, machine, beside=checkpoint, include=task_files
    )
    assert [replace(one, engine="") for one in found] == checkpoint
    assert {one.engine for one in found} == {name}


def test_lm_eval_knows_it_by_name(exports: dict[str, Path], tasks: TaskManager) -> None:
    register()
    found = sums(NAME, tasks, directory=str(exports["onnx"]), engine="onnx")
    assert found.shape == (4, 3)
