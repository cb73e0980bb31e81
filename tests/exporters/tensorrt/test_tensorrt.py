"""TensorRT engines: rules, graphs, shapes, what builders say, and real builds ahead of time.

TensorRT-RTX builds ahead of time on any machine, so its builds are real. No engine can run here.
"""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from transformers import AutoConfig

from prune_export.arch import Arch
from prune_export.contracts import BuildRecord, Work
from prune_export.errors import CheckpointError, MissingExtra, PlanError, StageError
from prune_export.exporters._shared.ort_runner import OrtRunner
from prune_export.exporters.tensorrt import binding
from prune_export.exporters.tensorrt.exporter import ENGINE, Tensorrt
from prune_export.exporters.tensorrt.layers import layers_of, sparse_tactics
from prune_export.exporters.tensorrt.log import Layers, Log, sparsity_said
from prune_export.exporters.tensorrt.profiles import Sizes, Span
from prune_export.exporters.tensorrt.proof import record
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.verify.engine import Engine

MACHINE = Machine(device="cpu", ram_bytes=8 << 30, gpu_bytes=0, threads=1)
NAMES = json.loads(Path(__file__).with_name("tensorrt_names.json").read_text(encoding="utf-8"))
SMALL = {"batch": Span(1, 2), "prompt": Span(4, 8), "context": Span(8, 16)}
AHEAD = Tensorrt(flavor="rtx", compute_capability="sm89", **SMALL)
WEIGHTS = {"matrices": 3, "two_of_four": 2, "others": ["head"]}

rtx = pytest.mark.skipif(
    not binding.installed("rtx"), reason="TensorRT-RTX's wheels are not installed"
)


# The libraries


@pytest.mark.parametrize("version", sorted(NAMES))
def test_full_tensorrt_offers_all_that_is_used(version: str) -> None:
    offered = NAMES[version]
    lost = [
        f"{kind}.{name}"
        for kind, names in binding.USED.items()
        for name in names
        if name not in offered.get(kind, ())
    ]
    assert not lost


@rtx
def test_rtx_offers_all_that_is_used() -> None:
    loaded = binding.Binding.load("rtx")
    assert loaded.features.builds_ahead
    assert set(loaded.features.targets) <= {
        name.lower() for name in dir(loaded.module.ComputeCapability)
    }
    assert not hasattr(loaded.module.ComputeCapability, "SM90"), "Hopper may be built for now"


@rtx
@pytest.mark.parametrize("part", ["build", "runner", "log"])
def test_whatever_the_code_names_is_on_the_list(part: str) -> None:
    module = binding.Binding.load("rtx").module
    kinds = [vars(module)[kind] for kind in vars(module) if isinstance(vars(module)[kind], type)]
    theirs = {name for kind in kinds for name in dir(kind) if not name.startswith("_")}
    listed = {
        name
        for table in (binding.USED, binding.USED_OF_RTX)
        for kind, names in table.items()
        for name in (kind, *names)
    }
    source = Path(binding.__file__).with_name(f"{part}.py").read_text(encoding="utf-8")
    named = {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("torch", "np", "ids")
    }
    ours = {"append", "clear", "numpy", "reset", "reverse", "write"}
    assert named & (theirs | set(vars(module))) - ours - listed == set()


def test_a_library_without_what_is_used_is_refused() -> None:
    class Old:
        __version__ = "11.2.0"

    with pytest.raises(PlanError, match=r"lacks Builder\.create_builder_config"):
        binding.Binding.of(Old, "tensorrt")
    Old.__version__ = "10.13.3"
    with pytest.raises(PlanError, match=r"got version 10\.13\.3, expected 10\.15 and later"):
        binding.Binding.of(Old, "tensorrt")


# What the builder says


@pytest.mark.parametrize(
    ("lines", "eligible", "chosen"),
    [
        pytest.param(
            [
                "[03/23/2021-00:14:05] [I] [TRT] (Sparsity) Layers eligible for sparse math: "
                "conv1, conv2, conv3",
                "[03/23/2021-00:14:05] [I] [TRT] (Sparsity) TRT inference plan picked sparse "
                "implementation for layers: conv2, conv3",
            ],
            Layers(3, ("conv1", "conv2", "conv3")),
            Layers(2, ("conv2", "conv3")),
            id="8.x",
        ),
        pytest.param(
            [
                "(Sparsity) Found 39 layer(s) eligible to use sparse tactics",
                "(Sparsity) Chose 0 layer(s) using sparse tactics",
            ],
            Layers(39),
            Layers(0),
            id="10.x, none chosen",
        ),
        pytest.param(
            [
                "(Sparsity) Found 2 layer(s) eligible to use sparse tactics: "
                "layers.0/MatMul_42 + layers.0/Add_43, layers.0/MatMul_47",
                "(Sparsity) Chose 1 layer(s) using sparse tactics: layers.0/MatMul_47",
            ],
            Layers(2, ("layers.0/MatMul_42 + layers.0/Add_43", "layers.0/MatMul_47")),
            Layers(1, ("layers.0/MatMul_47",)),
            id="11.x",
        ),
        pytest.param(
            [
                "(Sparsity) Found 2 layer(s) eligible to use sparse tactics: a, b",
                "(Sparsity) Chose 2 layer(s) using sparse tactics: a, b",
                "(Sparsity) Found 2 layer(s) eligible to use sparse tactics: a, b",
                "(Sparsity) Chose 0 layer(s) using sparse tactics",
            ],
            Layers(2, ("a", "b")),
            Layers(0),
            id="the last pass counts",
        ),
        pytest.param(
            ["Detected 15 inputs", "(Refit + Sparsity): Refitting may fail"], None, None, id="none"
        ),
    ],
)
def test_the_log_is_read(lines: list[str], eligible: Layers | None, chosen: Layers | None) -> None:
    said = sparsity_said(lines)
    assert said.eligible == eligible
    assert said.chosen == chosen


def test_the_log_keeps_what_is_told_and_of_the_rest_only_sparsity() -> None:
    log = Log()
    log.add("VERBOSE", "Static check for parsing node: layers.0/MatMul_42")
    log.add("VERBOSE", "(Sparsity) Chose 1 layer(s) using sparse tactics: a")
    log.add("ERROR", "no")
    assert log.text == "[VERBOSE] (Sparsity) Chose 1 layer(s) using sparse tactics: a\n[ERROR] no\n"
    assert log.faults == ["no"]


SPARSE_KERNEL = "sm80_xmma_sparse_gemm_f16f16_f16f32_f32_tn_n_tilesize128x64x128_sptensor16x8x32"
DENSE_KERNEL = "sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x64x64_stage4_warpsize2x2x1"


def information(top: str, *tactics: str) -> str:
    layers = [
        {"Name": f"product {at}", "LayerType": "gemm", "HasSparseWeights": 1, "TacticName": tactic}
        for at, tactic in enumerate(tactics)
    ]
    return json.dumps({"Layers": layers, top: ["input_ids"]})


@pytest.mark.parametrize("top", ["Bindings", "I/O Tensors"])
def test_kernels_are_read_by_name_and_a_pattern_alone_is_no_proof(top: str) -> None:
    layers = layers_of(information(top, SPARSE_KERNEL, DENSE_KERNEL, ""))
    assert dict(sparse_tactics(layers)) == {"product 0": SPARSE_KERNEL}
    assert [layer.kind for layer in layers] == ["gemm"] * 3
    assert layers_of('{"Layers": ["a", "b"]}')[1].name == "b"
    with pytest.raises(StageError, match="has no layers"):
        layers_of("not JSON")


@pytest.mark.parametrize(
    ("lines", "tactics", "proven", "sentence"),
    [
        ((39, 0), None, False, "none; 39 layers were eligible, and the builder found dense"),
        ((39, 7), None, True, "7 layers run them, of 39 eligible"),
        (None, (SPARSE_KERNEL, DENSE_KERNEL), True, "1 layers run them, of an unknown number"),
        (None, (DENSE_KERNEL,), False, "none; the builder found no layer eligible"),
        (None, ("",), None, "unproven until it is profiled there"),
        (None, None, None, "unproven until it is profiled there"),
    ],
)
def test_the_record_says_no_more_than_was_shown(
    lines: tuple[int, int] | None,
    tactics: tuple[str, ...] | None,
    proven: bool | None,
    sentence: str,
) -> None:
    log = Log()
    if lines:
        log.add("INFO", f"(Sparsity) Found {lines[0]} layer(s) eligible to use sparse tactics")
        log.add("INFO", f"(Sparsity) Chose {lines[1]} layer(s) using sparse tactics")
    layers = layers_of(information("Bindings", *tactics)) if tactics else None
    found, notes = record(True, log, layers, WEIGHTS)
    assert found["proven"] is proven
    assert sentence in notes[0]
    json.dumps(found)


def test_dense_weights_run_no_sparse_kernel_whatever_was_asked() -> None:
    found, notes = record(True, Log(), None, {"matrices": 3, "two_of_four": 0, "others": []})
    assert found["proven"] is False
    assert notes == ("sparse kernels: none; no weight holds 2 of 4",)
    assert record(False, Log(), None, WEIGHTS)[1] == ()


# Shapes and rules

INPUTS = {
    "input_ids": (-1, -1),
    "attention_mask": (-1, -1),
    "position_ids": (-1, -1),
    "past_key_values.0.key": (-1, 2, -1, 8),
}


def test_profiles_hold_together_at_every_corner() -> None:
    sizes = Sizes(batch=Span(2, 4), prompt=Span(100, 512), context=Span(300, 1024))
    prefill, decode = sizes.profiles(INPUTS)
    for profile in (prefill, decode):
        for at in range(3):
            new, past = profile["input_ids"][at][1], profile["past_key_values.0.key"][at][2]
            assert profile["attention_mask"][at][1] == new + past
            assert profile["position_ids"][at] == profile["input_ids"][at]
            assert {shape[at][0] for shape in profile.values()} == {(1, 2, 4)[at]}
    assert prefill["input_ids"] == ((1, 1), (2, 100), (4, 512))
    assert [shape[2] for shape in prefill["past_key_values.0.key"]] == [0, 0, 1023]
    assert decode["input_ids"] == ((1, 1), (2, 1), (4, 1))
    assert decode["past_key_values.0.key"] == ((1, 2, 1, 8), (2, 2, 300, 8), (4, 2, 1023, 8))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"compute_capability": "sm89"}, "by timing them on the GPU itself"),
        ({"flavor": "rtx", "compute_capability": "sm90"}, "data-centre GPU"),
        ({"flavor": "rtx", "compute_capability": "sm100"}, "flavor: tensorrt"),
        ({"flavor": "rtx", "compute_capability": "8.9"}, "without its dot: `sm89`"),
        ({"flavor": "rtx", "compute_capability": "sm75", "sparse": True}, "older than Ampere"),
        ({"flavor": "rtx", "compute_capability": "sm75", "precision": "bf16"}, "precision: fp16"),
        ({"flavor": "rtx", "compute_capability": "sm86", "precision": "fp8"}, "or `int8`"),
        ({"flavor": "rtx", "version_compatible": True}, "no lean runtime"),
        ({"context": Span(8, 16)}, "got prompts of 2048 tokens in a context of 16"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_written(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        Tensorrt(**settings)


def test_a_span_is_ordered() -> None:
    with pytest.raises(PlanError, match="got best 9 and most 8"):
        Span(9, 8)


def test_the_plan_refuses_a_machine_without_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = Arch.from_config(AutoConfig.for_model("llama", num_hidden_layers=2).to_dict())
    monkeypatch.setattr("prune_export.exporters.tensorrt.exporter.installed", lambda flavor: True)
    with pytest.raises(PlanError, match="builds for the GPU of this machine, and there is none"):
        Tensorrt().check(arch, MACHINE)
    AHEAD.check(arch, MACHINE)
    hopper = replace(MACHINE, device="cuda", capability=90)
    with pytest.raises(PlanError, match=r"compute capability 9\) is a data-centre GPU"):
        Tensorrt(flavor="rtx").check(arch, hopper)
    Tensorrt(sparse=True).check(arch, hopper)
    with pytest.raises(PlanError, match="older than Ampere"):
        Tensorrt(sparse=True).check(arch, replace(hopper, capability=75))
    monkeypatch.setattr("prune_export.exporters.tensorrt.exporter.installed", lambda flavor: False)
    with pytest.raises(MissingExtra, match=r"prune-export\[tensorrt-rtx\]"):
        AHEAD.check(arch, MACHINE)


# The graph


def test_attention_without_a_cache_computes_the_same(tiny_graph: Path, split_graph: Path) -> None:
    attention = [n for n in onnx.load(split_graph, load_external_data=False).graph.node
                 if n.op_type == "Attention"]  # fmt: skip
    assert {(len(node.input), len(node.output)) for node in attention} == {(4, 1)}
    ids = np.random.default_rng(0).integers(0, 250, (2, 9))
    mask = np.ones_like(ids)
    mask[0, :3] = 0
    with OrtRunner(tiny_graph, MACHINE) as one, OrtRunner(split_graph, MACHINE) as other:
        for start, end in ((0, 5), (5, 6), (6, 9)):
            wanted, _ = one.step(ids[:, start:end], mask[:, :end])
            got, _ = other.step(ids[:, start:end], mask[:, :end])
            np.testing.assert_allclose(got, wanted, atol=1e-5)


# Real builds ahead of time


@rtx
@pytest.mark.parametrize(
    ("precision", "target"),
    [
        ("fp16", "sm89"),
        pytest.param("int8", "sm120", marks=pytest.mark.slow),
        pytest.param("bf16", "sm120", marks=pytest.mark.slow),
        pytest.param("fp32", "sm89", marks=pytest.mark.slow),
        pytest.param("fp8", "sm120", marks=pytest.mark.slow),
    ],
)
def test_rtx_builds_ahead_of_time(
    precision: Any, target: str, tiny_llama: Path, tmp_path: Path
) -> None:
    entry = replace(AHEAD, precision=precision, compute_capability=target, sparse=True)
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    scratch.mkdir()
    made = entry.export(tiny_llama, out, Work(MACHINE, Silent(), scratch))
    assert (out / ENGINE).stat().st_size > made.weight_bytes
    assert made.graph == ENGINE
    assert made.toolchain["tensorrt-rtx"].startswith("1.")
    assert made.sparsity["weights"]["two_of_four"] == 0
    assert made.sparsity["proven"] is False
    assert "sparse kernels: none; no weight holds 2 of 4" in made.notes
    assert any("24 products in" in note for note in made.notes) == entry.calibrates
    assert (out / "tokenizer.json").is_file()
    assert not list(out.glob("model.onnx*"))
    assert not (scratch / "graph").exists()
    told = (out / "build.log").read_text()
    assert "Engine generation completed" in told
    assert str(tmp_path) not in told


@rtx
def test_a_refusal_says_why_and_keeps_the_log(tiny_graph: Path, tmp_path: Path) -> None:
    from prune_export.exporters.tensorrt import build

    loaded, log = binding.Binding.load("rtx"), Log()
    settings = AHEAD._settings()
    with pytest.raises(StageError, match="only supports Attention nodes with one output"):
        build.build(loaded, tiny_graph, settings, tmp_path / "e", tmp_path / "cache", log)
    assert log.faults
    assert not (tmp_path / "e").exists()


# Opening


def test_nothing_is_opened_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="is for an NVIDIA GPU, and there is none"):
        AHEAD.open(tmp_path, MACHINE)


def test_a_strangers_engine_is_not_opened(tmp_path: Path) -> None:
    made = BuildRecord("tensorrt", "1", {"flavor": "rtx"}, ENGINE, 0, 0.0, {})
    engine = Engine.of(made, tmp_path)
    with pytest.raises(CheckpointError, match="--trust-engine"):
        engine.open(MACHINE)
    vouched = Engine.of(made, tmp_path, trusted=True)
    with pytest.raises(StageError, match="there is none"):
        vouched.open(MACHINE)
    assert Engine.from_json(json.loads(json.dumps(vouched.to_json()))).trusted
    assert not engine.runs_on(MACHINE)
    assert not Engine("onnx", tmp_path).runs_code
