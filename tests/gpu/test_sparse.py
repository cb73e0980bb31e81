"""Sparse kernels and providers on a real GPU: the same numbers, and the truth about who ran."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from prune_export.checkpoint import Checkpoint
from prune_export.contracts import Work
from prune_export.errors import PlanError
from prune_export.exporters.aoti import Aoti
from prune_export.exporters.aoti.sparse import MARGIN, chosen, probed
from prune_export.exporters.onnx import Onnx
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.verify import Engine, measure_placement

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

IDS = np.random.default_rng(0).integers(2, 250, (1, 24))


@pytest.fixture
def two_of_four(tmp_path: Path) -> Path:
    """A llama whose sizes every sparse kernel takes, and whose linear layers hold 2 of 4."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.weight.view(len(module.weight), -1, 4)[..., 2:] = 0
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_machine_knows_its_compute_capability() -> None:
    major, minor = torch.cuda.get_device_capability(0)
    assert Machine.detect(device="cuda").capability == 10 * major + minor


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_each_kernel_is_right_or_says_why_not(dtype: str) -> None:
    """A kernel that gives other numbers than dense is told as one that does not run."""
    found = probed([(4096, 4096)], dtype, 512, "cuda")
    assert {one.kernel for one in found} == {"dense", "cutlass", "cusparselt"}
    for one in found:
        assert (one.seconds is None) == bool(one.reason), one
        assert one.kernel != "dense" or one.seconds
        assert "is wrong" not in one.reason, one
    for kernel, gain in chosen(found).values():
        assert kernel != "dense"
        assert gain >= MARGIN


@pytest.mark.parametrize("sparse", [False, True])
def test_a_compiled_model_computes_the_same(
    sparse: bool, two_of_four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here any kernel that runs counts as faster, so that the sparse path is taken."""
    monkeypatch.setattr("prune_export.exporters.aoti.sparse.MARGIN", 0.0)
    machine = Machine.detect(device="cuda")
    work = Work(machine, Silent(), tmp_path)
    entry = Aoti(precision="bf16", sparse=sparse)
    try:
        entry.check(Checkpoint.open(two_of_four).arch(), machine)
    except PlanError as error:
        pytest.skip(str(error))
    made = entry.export(two_of_four, tmp_path / "out", work)
    if sparse:
        assert made.sparsity["eligible"] == 14
        runs = [one for one in made.sparsity["timings"] if one["seconds"] and
                one["kernel"] != "dense"]  # fmt: skip
        assert bool(runs) == bool(made.sparsity["chosen"])
    model = AutoModelForCausalLM.from_pretrained(two_of_four, dtype=torch.bfloat16).cuda()
    with torch.no_grad():
        wanted = model(torch.from_numpy(IDS).cuda()).logits[:, -1].float().cpu().numpy()
    with Aoti(precision="bf16").open(tmp_path / "out", machine) as runner:
        runner.step(IDS[:, :-1])
        got, _ = runner.step(IDS[:, -1:])
    assert np.abs(got[:, -1] - wanted).max() < 0.05 * np.abs(wanted).max()


def test_cuda_runs_all_that_multiplies(two_of_four: Path, tmp_path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    machine = Machine.detect(device="cuda")
    entry = Onnx(precision="fp16", provider="cuda")
    made = entry.export(two_of_four, tmp_path / "onnx", Work(machine, Silent(), tmp_path))
    (found,) = measure_placement(Engine.of(made, tmp_path / "onnx"), machine)
    assert found.asked == "CUDAExecutionProvider"
    assert found.ok, found.strayed
