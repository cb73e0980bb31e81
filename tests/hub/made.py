"""A result to publish, and calls of the Hub in a process that is online."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from prune_export.report import write_report
from tests.hub.fake_hub import GOOD, FakeHub

FULL = Path(__file__).parents[1] / "report" / "full.json"
CALLS = Path(__file__).parent / "hub_calls.py"
SECRET = "hf_" + "ABCdef123" * 4


def make_result(out: Path) -> Path:
    """A small result directory, with things beside it that must stay here."""
    out.mkdir(parents=True)
    report = json.loads(FULL.read_text(encoding="utf-8"))
    write_report(report, out)
    files = {
        "config.json": '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}',
        "generation_config.json": "{}",
        "tokenizer.json": '{"version": "1.0"}',
        "LICENSE": "Apache-2.0",
        "prune_recipe.yaml": report["recipe"]["text"],
        "prune_recipe.lock.json": '{"lock": 1}',
        "report.json": json.dumps(report),
        "verify.json": json.dumps(report["verification"]),
        "onnx/config.json": '{"model_type": "llama"}',
        "onnx/model.onnx": "graph",
        "onnx/model.onnx_data": "weights",
        "onnx/tokenizer.json": "{}",
        "genai/config.json": '{"model_type": "llama"}',
        "genai/genai_config.json": "{}",
        "genai/model.onnx": "graph, other",
        "genai/model.plan": "machine code",
        ".eval_results/mmlu_pro.yaml": "- {dataset: {id: a/b, task_id: c}, value: 1}",
        # None of the following may leave.
        ".eval_results/notes.txt": "mine",
        ".eval_results/.hidden.yaml": "mine",
        ".env": "HF_TOKEN=" + SECRET,
        "onnx/.cache.json": "{}",
        "figures/notes.txt": "mine",
        "figures/deep/more.png": "mine",
        "store/prune-1/manifest.json": "{}",
        "scratch.safetensors.tmp": "half a file",
        "notes.md": "mine: " + SECRET,
    }
    for name, text in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    weight = np.arange(6000, dtype=np.float32)
    save_file({"a": weight[:4000]}, out / "model-00001-of-00002.safetensors")
    save_file({"b": weight[4000:]}, out / "model-00002-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = {"metadata": {"total_size": 24000}, "weight_map": shards}
    (out / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return out


EXPECTED = {
    ".eval_results/mmlu_pro.yaml",
    "LICENSE", "README.md", "config.json", "figures/block_scores.png", "figures/distance_map.png",
    "figures/loss_curve.png", "figures/quality.png", "figures/speed.png", "figures/summary.png",
    "generation_config.json", "genai/config.json", "genai/genai_config.json", "genai/model.onnx",
    "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    "model.safetensors.index.json", "onnx/config.json", "onnx/model.onnx", "onnx/model.onnx_data",
    "onnx/tokenizer.json", "prune_recipe.lock.json", "prune_recipe.yaml", "report.html",
    "report.json", "tokenizer.json", "verify.json",
}  # fmt: skip


def called(
    fake: FakeHub, home: Path, calls: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], str]:
    """The outcomes of calls made online by one fresh process, and all that it printed."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))
    } | {
        "HF_ENDPOINT": fake.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": GOOD, "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(CALLS.parents[2]),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(CALLS)], input=json.dumps(calls), env=environment, text=True,
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), done.stdout + done.stderr


def uploading(directory: Path, repo_id: str, **extra: Any) -> dict[str, Any]:
    environment = extra.pop("environment", {})
    arguments = {"directory": str(directory), "repo_id": repo_id} | extra
    return {"function": "publish", "arguments": arguments, "environment": environment}
