"""TensorRT engines: rules, graphs, shapes, what builders say, and real builds ahead of time.

TensorRT-RTX builds ahead of time on any machine, so its builds are real. No engine can run here:
the runner is driven against a stand-in for the library that computes with ONNX Runtime.
"""

from __future__ import annotations

import ast
import ctypes
import json
import shutil
from dataclasses import replace
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import torch

from prune_export.arch import Arch
from prune_export.calibrate import TokenSet
from prune_export.contracts import BuildRecord, Work
from prune_export.errors import CheckpointError, MissingExtra, PlanError, StageError
from prune_export.exporters import _trt_binding as binding
from prune_export.exporters._ort import OrtRunner
from prune_export.exporters._trt_calibration import calibration
from prune_export.exporters._trt_graph import split_caches
from prune_export.exporters._trt_layers import layers_of, sparse_tactics
from prune_export.exporters._trt_log import Layers, Log, sparsity_said
from prune_export.exporters._trt_profiles import Sizes, Span
from prune_export.exporters._trt_proof import record
from prune_export.exporters._trt_quantize import (
    Range,
    kl,
    last_logits,
    observed,
    quantize,
    ranges,
)
from prune_export.exporters._trt_runner import TrtRunner
from prune_export.exporters.onnx import Onnx
from prune_export.exporters.tensorrt import ENGINE, Tensorrt
from prune_export.machine import Machine
from prune_export.matrices import load, matrices
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
    source = Path(binding.__file__).with_name(f"_trt_{part}.py").read_text(encoding="utf-8")
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
    arch = Arch.__new__(Arch)
    monkeypatch.setattr("prune_export.exporters.tensorrt.installed", lambda flavor: True)
    with pytest.raises(PlanError, match="builds for the GPU of this machine, and there is none"):
        Tensorrt().check(arch, MACHINE)
    AHEAD.check(arch, MACHINE)
    hopper = replace(MACHINE, device="cuda", capability=90)
    with pytest.raises(PlanError, match=r"compute capability 9\) is a data-centre GPU"):
        Tensorrt(flavor="rtx").check(arch, hopper)
    Tensorrt(sparse=True).check(arch, hopper)
    with pytest.raises(PlanError, match="older than Ampere"):
        Tensorrt(sparse=True).check(arch, replace(hopper, capability=75))
    monkeypatch.setattr("prune_export.exporters.tensorrt.installed", lambda flavor: False)
    with pytest.raises(MissingExtra, match=r"prune-export\[tensorrt-rtx\]"):
        AHEAD.check(arch, MACHINE)


# The graph


@pytest.fixture(scope="module")
def graph(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's fp32 graph, all logits."""
    out = tmp_path_factory.mktemp("graph")
    Onnx().export(tiny_llama, out, Work(MACHINE, Silent(), out.parent))
    return out / "model.onnx"


@pytest.fixture(scope="module")
def split(graph: Path) -> Path:
    """The same graph, its caches outside of attention, beside it."""
    model = onnx.load(graph, load_external_data=False)
    assert split_caches(model) == 6
    path = graph.with_name("split.onnx")
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)
    return path


def test_attention_without_a_cache_computes_the_same(graph: Path, split: Path) -> None:
    attention = [n for n in onnx.load(split, load_external_data=False).graph.node
                 if n.op_type == "Attention"]  # fmt: skip
    assert {(len(node.input), len(node.output)) for node in attention} == {(4, 1)}
    ids = np.random.default_rng(0).integers(0, 250, (2, 9))
    mask = np.ones_like(ids)
    mask[0, :3] = 0
    with OrtRunner(graph, MACHINE) as one, OrtRunner(split, MACHINE) as other:
        for start, end in ((0, 5), (5, 6), (6, 9)):
            wanted, _ = one.step(ids[:, start:end], mask[:, :end])
            got, _ = other.step(ids[:, start:end], mask[:, :end])
            np.testing.assert_allclose(got, wanted, atol=1e-5)


# 8 bits


def one_product(path: Path, weight: np.ndarray) -> Path:
    """A graph of one product in a block, `x` float32 `[tokens, inputs]`."""
    node = onnx.helper.make_node("MatMul", ["x", "model.layers.0.w"], ["y"], "product")
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node], "g", [info("x", onnx.TensorProto.FLOAT, ["tokens", weight.shape[0]])],
        [info("y", onnx.TensorProto.FLOAT, ["tokens", weight.shape[1]])],
        [onnx.numpy_helper.from_array(weight, "model.layers.0.w")],
    )  # fmt: skip
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10
    )
    onnx.save(model, str(path), save_as_external_data=True, location=f"{path.name}_data",
              size_threshold=0)  # fmt: skip
    return path


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.02), ("fp8", 0.06)])
def test_a_product_in_8_bits_is_close_and_keeps_its_zeros(
    kind: Any, bound: float, tmp_path: Path
) -> None:
    import onnxruntime

    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 48)).astype(np.float32)
    weight[::2] = 0
    x = rng.standard_normal((7, 64)).astype(np.float32)
    graph = one_product(tmp_path / "model.onnx", weight)
    done = quantize(graph, kind, {"x": Range(float(np.abs(x).max()), 1.0)})
    assert (done.products, done.activations, done.left) == (1, 1, 0)
    assert done.saved_bytes == 64 * 48 * 3 - 48 * 4
    onnx.checker.check_model(str(graph), full_check=True)
    (matrix,) = matrices(load(graph), tmp_path)
    assert not matrix.nonzero()[weight == 0].any()
    plain = onnxruntime.SessionOptions()  # its own fusion of 8-bit products rounds otherwise
    plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(graph), plain, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": x})
    wanted = x @ weight
    assert 0 < np.abs(got - wanted).max() / np.abs(wanted).max() < bound


def test_the_loss_to_8_bits_is_measured(graph: Path, tmp_path: Path) -> None:
    for file in graph.parent.glob("model.onnx*"):
        shutil.copyfile(file, tmp_path / file.name)
    ids = np.random.default_rng(0).integers(0, 250, (4, 12))
    before = last_logits(graph, ids, 1)
    observed(graph, graph.with_name("observed.onnx"))
    reached = ranges(graph.with_name("observed.onnx"), ids, 1)
    quantize(tmp_path / "model.onnx", "fp8", reached)
    lost = kl(before, last_logits(tmp_path / "model.onnx", ids, 1))
    assert 0 < lost < 0.1
    assert kl(before, before) == 0
    a, b = np.log([[0.75, 0.25]]), np.log([[0.5, 0.5]])
    assert kl(a + 3, b) == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5))


def test_activations_are_measured_where_products_read_them(graph: Path) -> None:
    names = observed(graph, graph.with_name("observed.onnx"))
    assert len(names) == 4 * 6
    ids = np.random.default_rng(0).integers(0, 250, (3, 8))
    each = [ranges(graph.with_name("observed.onnx"), ids[at : at + 1], 1) for at in range(3)]
    whole = ranges(graph.with_name("observed.onnx"), ids, 1)
    assert whole.keys() == set(names)
    for name, one in whole.items():
        assert one.top == max(window[name].top for window in each) > 0
        squares = [window[name].rms ** 2 for window in each]
        assert one.rms == pytest.approx(np.sqrt(np.mean(squares)))
        assert one.rms < one.top


def test_a_product_with_outliers_is_left_as_it_is(tmp_path: Path) -> None:
    graph = one_product(tmp_path / "model.onnx", np.ones((64, 48), np.float32))
    before = graph.read_bytes()
    done = quantize(graph, "int8", {"x": Range(top=31.0, rms=1.0)})
    assert (done.products, done.left, done.saved_bytes) == (0, 1, 0)
    assert [node.op_type for node in onnx.load(graph).graph.node] == ["MatMul"]
    assert quantize(graph, "fp8", {"x": Range(top=31.0, rms=1.0)}).products == 1
    assert graph.read_bytes() != before


def test_calibration_data_come_before_built_in_text(tiny_llama: Path, tmp_path: Path) -> None:
    tokens = TokenSet.of(torch.arange(40).reshape(2, 20))
    ids, note = calibration(tiny_llama, tokens, 258)
    assert ids.tolist() == tokens.ids.tolist()
    assert note == "2 windows of 20 tokens of the recipe's calibration data"
    ids, note = calibration(tiny_llama, None, 258)
    assert ids.shape[0] == 1
    assert "the recipe has no calibration data" in note
    ids, note = calibration(tmp_path, None, 258)
    assert ids.max() < 258
    assert "no tokenizer" in note


# Real builds ahead of time


@rtx
@pytest.mark.parametrize(
    ("precision", "target"),
    [
        ("fp16", "sm89"),
        ("int8", "sm120"),
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
def test_a_refusal_says_why_and_keeps_the_log(graph: Path, tmp_path: Path) -> None:
    from prune_export.exporters import _trt_build

    loaded, log = binding.Binding.load("rtx"), Log()
    settings = AHEAD._settings()
    with pytest.raises(StageError, match="only supports Attention nodes with one output"):
        _trt_build.build(loaded, graph, settings, tmp_path / "e", tmp_path / "cache", log)
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


class Standin:
    """A library of TensorRT's names whose engines compute with ONNX Runtime, at given addresses."""

    TYPES: ClassVar = {"tensor(float)": "FLOAT", "tensor(int64)": "INT64"}
    LIMITS: ClassVar = {"input_ids": (2, 8), "past_key_values.0.key": (2, 2, 15, 8)}

    class ILogger:
        def __init__(self) -> None: ...

    class TensorIOMode(Enum):
        INPUT = 1
        OUTPUT = 2

    class Runtime:
        def __init__(self, logger: Any) -> None: ...
        def deserialize_cuda_engine(self, file: bytes) -> Any:
            return Standin.Engine(file.decode()) if file else None

    class Engine:
        def __init__(self, graph: str) -> None:
            import onnxruntime

            self.session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
            self.inputs = {one.name: one for one in self.session.get_inputs()}
            self.outputs = {one.name: one for one in self.session.get_outputs()}
            self.all = {**self.inputs, **self.outputs}
            self.num_io_tensors = len(self.all)
            self.made: list[Any] = []

        def get_tensor_name(self, at: int) -> str:
            return list(self.all)[at]

        def get_tensor_mode(self, name: str) -> Any:
            return Standin.TensorIOMode(1 if name in self.inputs else 2)

        def get_tensor_dtype(self, name: str) -> Any:
            return SimpleNamespace(name=Standin.TYPES[self.all[name].type])

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(d if isinstance(d, int) else -1 for d in self.all[name].shape)

        def create_execution_context(self) -> Any:
            self.made.append(Standin.Context(self))
            return self.made[-1]

    class Context:
        def __init__(self, engine: Any) -> None:
            self.engine, self.profile, self.steps = engine, -1, 0
            self.shapes: dict[str, tuple[int, ...]] = {}
            self.addresses: dict[str, int] = {}

        def set_optimization_profile_async(self, profile: int, queue: int) -> bool:
            self.profile = profile
            return profile < 2

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            self.shapes[name] = shape
            limits = Standin.LIMITS.get(name, shape)
            return all(size <= most for size, most in zip(shape, limits, strict=True))

        def set_tensor_address(self, name: str, address: int) -> bool:
            self.addresses[name] = address
            return True

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            assert name == "logits"
            return (*self.shapes["input_ids"], self.engine.outputs["logits"].shape[2])

        def execute_async_v3(self, queue: int) -> bool:
            kinds = {"FLOAT": np.float32, "INT64": np.int64}
            fed = {}
            for name, shape in self.shapes.items():
                kind = kinds[self.engine.get_tensor_dtype(name).name]
                size = int(np.prod(shape)) * kind().itemsize
                fed[name] = np.frombuffer(
                    ctypes.string_at(self.addresses[name], size), kind
                ).reshape(shape)
            for name, value in zip(self.engine.outputs, self.engine.session.run(None, fed),
                                   strict=True):  # fmt: skip
                ctypes.memmove(self.addresses[name], value.tobytes(), value.nbytes)
            self.steps += 1
            return True


class Cpu:
    """In place of the GPU."""

    device, queue = "cpu", 0

    def copy(self, value: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(value).to(dtype)

    def wait(self) -> None: ...


@pytest.fixture
def runner(split: Path, tmp_path: Path) -> TrtRunner:
    file = tmp_path / ENGINE
    file.write_text(str(split))
    made = TrtRunner.__new__(TrtRunner)
    library: Any = binding.Binding(Standin, "tensorrt", "11.4", binding.FEATURES["tensorrt", 11])
    gpu: Any = Cpu()
    made._start(library, file, gpu, context=16, host_code=False)
    return made


def test_the_runner_carries_the_cache_from_step_to_step(graph: Path, runner: TrtRunner) -> None:
    ids = np.random.default_rng(0).integers(0, 250, (2, 12))
    with OrtRunner(graph, MACHINE) as reference, runner:
        for _ in range(2):  # once more after a reset
            reference.reset()
            runner.reset()
            for start, end in ((0, 1), (1, 6), (6, 7), (7, 8), (8, 12)):
                wanted, _ = reference.step(ids[:, start:end])
                got, seconds = runner.step(ids[:, start:end])
                np.testing.assert_allclose(got, wanted, atol=1e-5)
                assert seconds > 0
        made = runner._engine.made
        assert [(one.profile, one.steps) for one in made] == [(0, 6), (1, 4)]
        one, other = (set(runner._buffers[name]) for name in list(runner._buffers)[:2])
        assert not one & other


def test_the_runner_refuses_what_the_engine_was_not_built_for(runner: TrtRunner) -> None:
    ids = np.zeros((2, 12), np.int64)
    with pytest.raises(StageError, match=r"shape \[2, 12\], outside of what the engine was built"):
        runner.step(ids)
    runner.step(ids[:, :8])
    runner.step(ids[:, :8])
    with pytest.raises(StageError, match="got 17 tokens, but it was built for 16"):
        runner.step(ids[:, :1])
    runner.reset()
    runner.step(ids[:, :2])
    with pytest.raises(StageError, match="got 1 sequences after 2"):
        runner.step(ids[:1, :1])
    runner.reset()
    assert runner.step(ids[:1, :1])[0].shape == (1, 1, 258)


def test_a_file_that_is_no_engine_is_refused(tmp_path: Path) -> None:
    (tmp_path / ENGINE).write_bytes(b"")
    made = TrtRunner.__new__(TrtRunner)
    library: Any = binding.Binding(Standin, "tensorrt", "11.4", binding.FEATURES["tensorrt", 11])
    gpu: Any = Cpu()
    with pytest.raises(StageError, match=r"TensorRT 11\.4 does not load it"):
        made._start(library, tmp_path / ENGINE, gpu, context=16, host_code=False)
