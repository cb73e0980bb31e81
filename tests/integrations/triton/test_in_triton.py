"""The Python backend in a real tritonserver, and every config by Triton's own schema.

`make triton-check` makes the environment that this needs and runs it; `PRUNE_EXPORT_TRITON`
names one.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import string
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ENVIRONMENT = Path(os.environ.get("PRUNE_EXPORT_TRITON", "build/triton"))
PACKAGES = next(iter(ENVIRONMENT.glob("lib/python3.*/site-packages")), ENVIRONMENT)
SERVER = PACKAGES / "pytriton" / "tritonserver"
if not SERVER.is_dir():
    pytest.skip("no Triton: `make triton-check` installs one", allow_module_level=True)

from prune_export_triton import configs
from prune_export_triton.writing import write_repository
from transformers import AutoConfig, LlamaForCausalLM

from prune_export.contracts import Work
from prune_export.exporters.onnx import Onnx
from prune_export.exporters.ort_genai import OrtGenai
from prune_export.machine import Machine
from prune_export.plugins import load_model, load_tokenizer
from prune_export.progress import Silent

pytestmark = pytest.mark.slow
PROMPT = "The river runs"


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that says letters alone, with heads as onnxruntime-genai wants them."""
    folder = tmp_path_factory.mktemp("model")
    config = AutoConfig.from_pretrained(
        tiny_llama, head_dim=32, num_hidden_layers=2, tie_word_embeddings=False,
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    made = LlamaForCausalLM(config)
    letters = load_tokenizer(tiny_llama).convert_tokens_to_ids(list(string.ascii_letters))
    others = [token for token in range(config.vocab_size) if token not in letters]
    made.lm_head.weight.data[others] = 0
    made.save_pretrained(folder)
    for file in tiny_llama.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def repository(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to, made = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("engines")
    machine = Machine(device="cpu", ram_bytes=8 << 30, gpu_bytes=0, threads=1)
    for name, exporter in (("genai", OrtGenai(precision="fp32")), ("onnx", Onnx())):
        exporter.export(model, made / name, Work(machine, Silent(), made))
        write_repository(made / name, to, name=name)
    return to


@pytest.fixture(scope="module")
def address(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    backends = folder / "backends"
    shutil.copytree(SERVER / "backends", backends)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = SERVER / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, backends / "python")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    models = folder / "models"  # its wheel has no backend for the graph of onnx
    shutil.copytree(repository / "genai", models / "genai")
    command = [
        SERVER / "bin" / "tritonserver", "--model-repository", models, "--backend-directory",
        backends, "--allow-grpc", "0", "--allow-metrics", "0", "--http-address", "127.0.0.1",
        "--http-port", port,
    ]  # fmt: skip
    server = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {
            "PYTHONPATH": str(PACKAGES.resolve()),
            "LD_LIBRARY_PATH": str(PACKAGES.resolve() / "nvidia_pytriton.libs"),
        },
    )  # fmt: skip
    assert server.stdout is not None
    told: list[str] = []
    rest = threading.Thread(target=server.stdout.read)  # it never waits for us
    try:
        for line in server.stdout:
            told.append(line)
            if "Started HTTPService" in line:
                break
        else:
            raise AssertionError("".join(told)[-3000:])
        rest.start()
        while server.poll() is None and not _listens(port):
            time.sleep(0.05)  # the line comes a moment earlier
        yield f"http://127.0.0.1:{port}/v2"
    finally:
        server.terminate()
        server.wait(60)
        if rest.is_alive():
            rest.join()
        server.stdout.close()


def _listens(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def ask(address: str, path: str, **asked: Any) -> bytes:
    request = urllib.request.Request(
        f"{address}/models/genai/{path}", json.dumps({"text_input": PROMPT} | asked).encode()
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: bytes = answer.read()
    return found


def events(body: bytes) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in body.decode().splitlines() if line[:6] == "data: "]


@pytest.fixture(scope="module")
def expected(model: Path) -> str:
    reference, tokenizer = load_model(model, dtype=torch.float32).eval(), load_tokenizer(model)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    out = reference.generate(ids, max_new_tokens=24, do_sample=False)
    text = str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    assert len(set(text)) > 6
    return text


def test_text_is_that_of_transformers_whole_and_streamed(address: str, expected: str) -> None:
    whole = json.loads(ask(address, "generate", max_tokens=24))
    assert whole["text_output"] == expected
    assert whole["completion_tokens"] <= 24
    parts = events(ask(address, "generate_stream", max_tokens=24, stream=True))
    assert "".join(one["text_output"] for one in parts) == expected
    assert [one["finish_reason"] for one in parts][-1] == whole["finish_reason"]
    assert len(parts) > 4


def test_stop_strings_seeds_and_errors(address: str, expected: str) -> None:
    stop = expected[5:8]
    parts = events(ask(address, "generate_stream", max_tokens=24, stream=True, stop=stop))
    assert "".join(one["text_output"] for one in parts) == expected.partition(stop)[0]
    assert parts[-1]["finish_reason"] == "stop"

    def said(seed: int) -> str:
        warm = ask(address, "generate", max_tokens=12, temperature=1.5, seed=seed)
        return str(json.loads(warm)["text_output"])

    assert said(3) == said(3)
    assert len({said(seed) for seed in range(4)}) > 1
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(address, "generate", max_tokens=0)
    assert "do not fit" in refused.value.read().decode()
    assert json.loads(ask(address, "generate", max_tokens=1))["completion_tokens"] <= 1


def test_every_config_is_of_tritons_schema(repository: Path, model: Path) -> None:
    graph = configs.graph_of_config(AutoConfig.from_pretrained(model), {})
    texts = {
        "genai": (repository / "genai" / "config.pbtxt").read_text(),
        "onnx": (repository / "onnx" / "config.pbtxt").read_text(),
        "tensorrt": configs.with_state("tensorrt", graph, "tensorrt"),
    }
    done = subprocess.run(
        [ENVIRONMENT / "bin" / "python", "-c", READ], input=json.dumps(texts), text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"genai": 0, "onnx": 4, "tensorrt": 4}


READ = """
import json, sys
from pathlib import Path
import tritonclient
sys.path.insert(0, str(Path(tritonclient.__file__).parent / "grpc"))
import model_config_pb2
from google.protobuf import text_format
counts = {}
for name, text in json.load(sys.stdin).items():
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert config.name == name and config.input and config.output
    counts[name] = len(config.sequence_batching.state)
print(json.dumps(counts))
"""
