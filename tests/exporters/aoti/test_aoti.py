"""PyTorch's ahead-of-time compiler: the same numbers; sparse kernels only where they are faster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from prune_export.arch import Arch
from prune_export.arch.table import table_for
from prune_export.contracts import Work
from prune_export.errors import PlanError, StageError
from prune_export.exporters.aoti import Aoti, exporter, graph
from prune_export.exporters.aoti.sparse import (
    SparseLinear,
    Timing,
    candidates,
    chosen,
    fits,
    holds_two_of_four,
    pack,
    probed,
    replaced,
)
from prune_export.machine import Machine
from prune_export.progress import Silent

MACHINE = Machine("cpu", 4 << 30, 0, 1)
ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def arch() -> Arch:
    return Arch.from_config({"model_type": "llama", **table_for("llama").tiny.config})


def two_of_four(outputs: int, inputs: int) -> torch.Tensor:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))
    order = torch.rand(outputs, inputs // 4, 4, generator=torch.Generator().manual_seed(1))
    keep = order.argsort(-1).argsort(-1) < 2
    return weight * keep.view(outputs, inputs)


@pytest.fixture
def kernels_on_cpu() -> Any:
    """The operators for the CPU, CUTLASS's by unpacking: layers rely on what they compute."""
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

    def product(mat1: torch.Tensor, meta: torch.Tensor, mat2: torch.Tensor, **_: Any) -> Any:
        assert mat2.shape[1] % 8 == 0, "the kernel takes whole groups of 8 columns"
        return sparse_semi_structured_to_dense_cutlass(mat1, meta) @ mat2

    library = torch.library.Library("aten", "IMPL")
    library.impl("_sparse_semi_structured_mm", product, "CPU")
    # cuSPARSELt's are the matrix itself, and a product with it.
    library.impl("_cslt_compress", lambda weight: weight.clone(), "CPU")
    library.impl("_cslt_sparse_mm", lambda packed, columns, *_: packed @ columns, "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize("tokens", [(1, 1), (2, 5), (1, 8)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_sparse_layer_is_the_dense_one(
    tokens: tuple[int, int], bias: bool, kernels_on_cpu: Any
) -> None:
    dense = nn.Linear(64, 32, bias=bias, dtype=torch.bfloat16)
    with torch.no_grad():
        dense.weight.copy_(two_of_four(32, 64))
        x = torch.randn(*tokens, 64, dtype=torch.bfloat16)
        sparse = SparseLinear(dense.weight, dense.bias, "cutlass")
        torch.testing.assert_close(sparse(x), dense(x), rtol=2e-2, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel", [pytest.param("cutlass", marks=pytest.mark.all_pairs), "cusparselt"]
)
def test_a_sparse_layer_is_compiled(kernel: Any, kernels_on_cpu: Any, tmp_path: Path) -> None:
    """The compiler treats both operators on a CPU as it does on a GPU."""
    settings = {**ENDS, **table_for("llama").tiny.config, "num_hidden_layers": 1,
                "hidden_size": 64, "intermediate_size": 64}  # fmt: skip
    config = AutoConfig.for_model("llama", **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.copy_(two_of_four(64, 64))
    ids = torch.arange(12).view(2, 6)
    wanted = model(ids).logits.detach()
    layers = dict(candidates(model, model.get_output_embeddings()))
    assert list(replaced(model, layers, {(64, 64): (kernel, 1.0)})) == list(layers)
    sizes = graph.cache_sizes(model)
    graph.compiled(model, sizes, tmp_path / "model.pt2", last=False)
    run = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2"))
    cache = graph.empty_cache(sizes, 2, 0, wanted)
    got, _ = run(ids, torch.ones_like(ids), torch.arange(6).repeat(2, 1), cache)
    assert (got - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_the_mask_that_is_exported_is_not_aligned_by_chance() -> None:
    """CUDA's attention pads a mask unless 8 divides its rows; what is traced holds for all."""
    sizes = graph.EXAMPLE
    assert (sizes["new"] + sizes["past"]) % 8
    assert min(sizes.values()) > 1


def test_packed_weights_are_half_and_lose_nothing() -> None:
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

    weight = two_of_four(32, 128).half()
    packed, meta = pack(weight, "cutlass")
    assert packed.shape == (32, 64)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(packed, meta), weight)


def test_what_holds_two_of_four() -> None:
    weight = two_of_four(8, 16)
    assert holds_two_of_four(weight)
    weight[3, 4:7] = 1
    assert not holds_two_of_four(weight)
    assert not holds_two_of_four(torch.zeros(8, 15))


def test_sizes_that_kernels_take() -> None:
    assert fits("cutlass", 64, 128)
    assert not fits("cutlass", 48, 128)
    assert not fits("cutlass", 64, 96)
    assert fits("cusparselt", 48, 96)
    assert not fits("cusparselt", 40, 96)


def test_what_wins_is_chosen_and_nothing_where_nothing_wins() -> None:
    timings = [
        Timing("dense", 64, 64, 1.0), Timing("cutlass", 64, 64, 0.8),
        Timing("cusparselt", 64, 64, 0.5),
        Timing("dense", 32, 64, 1.0), Timing("cutlass", 32, 64, 0.99),
        Timing("cusparselt", 32, 64, None, "illegal instruction"),
        Timing("dense", 16, 64, 1.0), Timing("cutlass", 16, 64, 1.4),
    ]  # fmt: skip
    assert chosen(timings) == {(64, 64): ("cusparselt", 2.0)}
    assert chosen([one for one in timings if one.kernel != "dense"]) == {}


def test_only_layers_whose_shape_has_a_winner_are_replaced() -> None:
    model = nn.ModuleDict({
        "one": nn.Linear(64, 32, bias=False), "other": nn.Linear(64, 64, bias=False),
        "dense": nn.Linear(64, 32, bias=False), "head": nn.Linear(64, 32, bias=False),
    })  # fmt: skip
    with torch.no_grad():
        for name in ("one", "other", "head"):
            model[name].weight.copy_(two_of_four(*model[name].weight.shape))
    model.half()
    layers = dict(candidates(model, model["head"]))
    assert list(layers) == ["one", "other"]
    assert replaced(model, layers, {(32, 64): ("cutlass", 1.5)}) == {"one": "cutlass"}
    kinds = {name: type(module) for name, module in model.items()}
    assert kinds["one"] is SparseLinear
    assert {kinds[name] for name in ("other", "dense", "head")} == {nn.Linear}


@pytest.mark.slow
def test_a_kernel_that_does_not_run_is_told_with_its_reason() -> None:
    """In processes of their own; on a CPU only the dense product runs."""
    found = probed([(64, 128), (48, 128)], "bfloat16", 16, "cpu")
    dense = [one for one in found if one.kernel == "dense"]
    assert [(one.outputs, one.inputs) for one in dense] == [(48, 128), (64, 128)]
    assert all(one.seconds is not None and one.seconds > 0 for one in dense)
    others = [one for one in found if one.kernel != "dense"]
    assert [(one.kernel, one.outputs) for one in others] == [
        ("cutlass", 64), ("cusparselt", 48), ("cusparselt", 64),
    ]  # fmt: skip
    assert all(one.seconds is None and one.reason for one in others)
    assert chosen(found) == {}


def test_where_nothing_wins_no_speedup_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.for_model("llama", **{**ENDS, **table_for("llama").tiny.config})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(two_of_four(*module.weight.shape))
    fault = Timing("cutlass", 32, 32, None, "illegal instruction")
    monkeypatch.setattr("prune_export.exporters.aoti.sparse.probed", lambda shapes, *_: [fault])
    work = Work(MACHINE, Silent(), Path())
    found, notes, saved = Aoti(precision="bf16", sparse=True)._made_sparse(model, work)
    layers = 7 * config.num_hidden_layers
    assert (found["asked"], found["proven"]) == (True, False)
    assert (found["eligible"], found["chosen"], saved) == (layers, 0, 0)
    assert found["weights"]["held"][0]["pattern"] == "2 of 4"
    assert notes == (
        "sparse kernels: none is faster than dense here, no speedup (cutlass: illegal instruction)",
    )


def test_what_cannot_work_is_refused_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match="round fp32 to 10 bits\n  write `precision: bf16`"):
        Aoti(sparse=True)
    with pytest.raises(PlanError, match="needs an NVIDIA GPU"):
        Aoti(sparse=True, precision="bf16").check(arch(), MACHINE)
    Aoti().check(arch(), MACHINE)
    monkeypatch.setattr(exporter.shutil, "which", lambda name: None)
    with pytest.raises(PlanError, match="needs a C\\+\\+ compiler"):
        Aoti().check(arch(), MACHINE)


def test_a_gpu_without_cudas_headers_is_refused_in_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine where all of CUDA came with PyTorch's wheels."""
    from torch.utils import cpp_extension

    gpu = replace(MACHINE, device="cuda")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    with pytest.raises(PlanError, match="finds no CUDA toolkit\n  install the toolkit"):
        Aoti().check(arch(), gpu)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    with pytest.raises(PlanError, match=f"{tmp_path} has none"):
        Aoti().check(arch(), gpu)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    Aoti().check(arch(), gpu)


@pytest.mark.slow
def test_a_compiled_model_computes_what_pytorch_does(tmp_path: Path) -> None:
    settings = {**ENDS, **table_for("llama").tiny.config, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings)).eval()
    model.save_pretrained(tmp_path / "dense")
    entry = Aoti(logits="all")
    work = Work(MACHINE, Silent(), tmp_path)
    record = entry.export(tmp_path / "dense", tmp_path / "out", work)
    embedding = model.get_input_embeddings().weight
    read = sum(one.nbytes for one in model.parameters())
    tied = model.config.tie_word_embeddings
    assert record.weight_bytes == read - (0 if tied else embedding.nbytes)
    assert "within" in record.notes[0]
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (3, 9))
    with entry.open(tmp_path / "out", MACHINE) as runner:
        parts = [runner.step(ids[:, a:b]) for a, b in ((0, 5), (5, 6), (6, 9))]
        runner.reset()
        again, _ = runner.step(ids[:, :5])
    assert all(seconds > 0 for _, seconds in parts)
    got = np.concatenate([logits for logits, _ in parts], axis=1)
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    np.testing.assert_array_equal(again, got[:, :5])
    with pytest.raises(StageError, match="was compiled for cpu, and is to run on cuda"):
        entry.open(tmp_path / "out", replace(MACHINE, device="cuda"))
    (tmp_path / "out" / "model.pt2").write_bytes(b"nothing")
    with pytest.raises(StageError, match="does not load it"):
        entry.open(tmp_path / "out", MACHINE)
