"""Providers: their options, who runs which node, and that none is replaced in silence."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from prune_export.errors import PlanError, StageError
from prune_export.exporters._shared.ort_providers import (
    NAMES,
    Profile,
    Provider,
    cache_device,
    open_session,
    placement,
)
from prune_export.exporters._shared.ort_runner import OrtRunner
from prune_export.exporters.onnx import Onnx
from prune_export.machine import Machine

CPU = Machine("cpu", 4 << 30, 0, 1)
GPU = Machine("cuda", 4 << 30, 8 << 30, 1, 89)


@pytest.fixture
def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ids and a cache as our graphs have them; a product, an addition and an output each."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("MatMul", ["past", "w"], ["present"], "the product"),
        helper.make_node("Add", ["ids", "ids"], ["twice"], "the sum"),
    ]
    inputs = [
        info("ids", TensorProto.INT64, ["batch", "sequence"]),
        info("past", TensorProto.FLOAT, ["batch", 2, "past_sequence", 4]),
    ]
    outputs = [
        info("present", TensorProto.FLOAT, ["batch", 2, "past_sequence", 4]),
        info("twice", TensorProto.INT64, ["batch", "sequence"]),
    ]
    weight = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, [weight]),
        opset_imports=[helper.make_opsetid("", 23)], ir_version=10,
    )  # fmt: skip
    onnx.save(model, str(tmp_path / "model.onnx"))
    return tmp_path / "model.onnx"


def session(graph: Path, provider: Provider, machine: Machine = CPU) -> Any:
    import onnxruntime

    return open_session(graph, provider, machine, onnxruntime.SessionOptions())


def test_every_node_of_a_session_has_its_provider(graph: Path) -> None:
    found = placement(session(graph, Provider()), NAMES["cpu"])
    assert found.providers == {"CPUExecutionProvider": 2}
    assert found.strayed == ()


def test_a_product_that_ran_elsewhere_is_named(graph: Path) -> None:
    found = placement(session(graph, Provider()), NAMES["tensorrt"])
    assert found.strayed == ("the product",)


def test_profiling_confirms_who_ran_what(graph: Path, tmp_path: Path) -> None:
    """What the runtime says when it hands out the nodes is what its profile shows of a run."""
    import json

    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    opened = open_session(graph, Provider(), CPU, options)
    feed = {"ids": np.ones((1, 3), np.int64), "past": np.ones((1, 2, 5, 4), np.float32)}
    opened.run(None, feed)
    events = json.loads(Path(opened.end_profiling()).read_text())
    ran = {
        event["name"].removesuffix("_kernel_time"): event["args"]["provider"]
        for event in events
        if event["name"].endswith("_kernel_time")
    }
    assert ran == {"the product": "CPUExecutionProvider", "the sum": "CPUExecutionProvider"}
    assert sum(placement(opened, NAMES["cpu"]).providers.values()) == len(ran)


def test_tensorrt_gets_sparsity_caches_types_and_shapes(graph: Path, tmp_path: Path) -> None:
    profile = Profile(batch=4, prompt=128, length=1000)
    wanted = Provider("tensorrt", "fp16", True, profile, {"trt_builder_optimization_level": 5})
    names, options = zip(*wanted.chain(graph, GPU), strict=True)
    assert names == tuple(NAMES[key] for key in ("tensorrt", "cuda", "cpu"))
    assert options[1:] == ({}, {})
    assert options[0]["trt_sparsity_enable"] == "True"
    assert (options[0]["trt_fp16_enable"], options[0]["trt_bf16_enable"]) == ("True", "False")
    assert options[0]["trt_builder_optimization_level"] == "5"
    assert options[0]["trt_profile_min_shapes"] == "ids:1x1,past:1x2x0x4"
    assert options[0]["trt_profile_opt_shapes"] == "ids:1x128,past:1x2x0x4"
    assert options[0]["trt_profile_max_shapes"] == "ids:4x1000,past:4x2x999x4"
    cache = Path(options[0]["trt_engine_cache_path"])
    assert cache.is_dir()
    assert cache.is_relative_to(tmp_path / "cache")
    assert all(isinstance(value, str) for value in options[0].values())


def test_an_engine_is_cached_for_its_weights_and_settings(graph: Path) -> None:
    def cache(provider: Provider) -> str:
        return provider.chain(graph, GPU)[0][1]["trt_engine_cache_path"]

    dense = cache(Provider("tensorrt"))
    assert cache(Provider("tensorrt")) == dense
    assert cache(Provider("tensorrt", sparse=True)) != dense
    (graph.parent / "model.onnx_data").write_bytes(b"other weights")
    assert cache(Provider("tensorrt")) != dense


def test_the_other_providers_chains(graph: Path) -> None:
    def names(provider: Provider, machine: Machine) -> list[str]:
        return [name for name, _ in provider.chain(graph, machine)]

    assert names(Provider(), CPU) == [NAMES["cpu"]]
    assert names(Provider("cuda"), GPU) == [NAMES["cuda"], NAMES["cpu"]]
    assert names(Provider("cpu"), GPU) == [NAMES["cpu"]]
    rtx = Provider("tensorrt_rtx").chain(graph, GPU)
    assert [name for name, _ in rtx] == [NAMES["tensorrt_rtx"], NAMES["cpu"]]
    assert rtx[0][1]["nv_profile_max_shapes"] == "ids:1x4096,past:1x2x4095x4"
    assert not any("sparsity" in key for key in rtx[0][1])


@pytest.mark.parametrize("name", ["cuda", "tensorrt", "tensorrt_rtx"])
def test_an_absent_provider_is_refused_in_the_plan_and_at_the_session(
    name: Any, graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    offered = ["CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offered)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PlanError, match=r"offers CPUExecutionProvider\n  install onnxruntime-"):
        Provider(name).check(GPU)
    with pytest.raises(StageError, match="offers CPUExecutionProvider"):
        session(graph, Provider(name), GPU)
    offered.append(NAMES[name])
    with pytest.raises(PlanError, match="needs an NVIDIA GPU"):
        Provider(name).check(CPU)


def test_auto_leaves_a_gpu_alone_that_the_runtime_does_not_know_and_says_so(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pip install prune-export[onnx]` on a machine with a GPU brings onnxruntime for CPUs."""
    import onnxruntime

    offered = [NAMES["cpu"]]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offered)
    auto = Provider()
    auto.check(GPU)
    assert (auto.resolved(CPU), auto.note(CPU)) == ("cpu", "")
    assert auto.resolved(GPU) == "cpu"
    assert "the GPU needs onnxruntime-gpu" in auto.note(GPU)
    assert Provider("cpu").note(GPU) == ""
    assert session(graph, auto, GPU).get_providers() == [NAMES["cpu"]]
    with pytest.raises(PlanError, match="install onnxruntime-gpu, or write `precision: fp16`"):
        Provider(precision="bf16").check(GPU)
    for name in ("auto", "cpu"):
        with pytest.raises(PlanError, match="no bfloat16 kernels for the CPU") as refused:
            Provider(name, precision="bf16").check(CPU)
        assert "`aoti`" in refused.value.fix
    offered.append(NAMES["cuda"])
    assert (auto.resolved(GPU), auto.note(GPU)) == ("cuda", "")


def test_a_session_that_fell_back_is_refused(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime opens a session all the same when a provider's libraries are missing."""
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(NAMES.values()))
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession",
        lambda path, options, providers: real(path, options, providers=[NAMES["cpu"]]),
    )  # fmt: skip
    with pytest.raises(StageError, match=r"could not be used; the session fell back to \['CPU"):
        session(graph, Provider("tensorrt"), GPU)


@pytest.mark.parametrize("body", ["", "raise OSError('libnvinfer.so.10: cannot open')"])
def test_tensorrts_module_is_loaded_first_and_may_fail(
    body: str, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It brings the libraries of pip's TensorRT along; where they do not load, that is told."""
    import onnxruntime

    (tmp_path / "tensorrt.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'loaded')!r}).touch()\n{body}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(NAMES.values()))
    with pytest.raises(StageError, match="TensorrtExecutionProvider"):
        session(graph, Provider("tensorrt"), GPU)
    assert (tmp_path / "loaded").exists()
    sys.modules.pop("tensorrt", None)


def test_a_plug_in_without_a_gpu_is_refused(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    registered: list[tuple[str, str]] = []
    plugin = SimpleNamespace(get_library_path=lambda: "plugin.so")
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", plugin)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: plugin)
    monkeypatch.setattr(
        onnxruntime, "register_execution_provider_library",
        lambda *given: registered.append(given),
    )  # fmt: skip
    with pytest.raises(StageError, match="finds no GPU"):
        session(graph, Provider("tensorrt_rtx"), GPU)
    assert registered == [(NAMES["tensorrt_rtx"], "plugin.so")]


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "tensorrt_rtx"])
def test_sparse_kernels_are_tensorrts_alone(name: Any) -> None:
    with pytest.raises(PlanError, match="through TensorRT only\n  write `provider: tensorrt`"):
        Onnx(provider=name, sparse=True)


def test_options_need_their_provider_and_a_profile_must_hold_its_prompt() -> None:
    with pytest.raises(PlanError, match="write which provider they are for"):
        Onnx(provider_options={"device_id": 1})


@pytest.mark.parametrize(
    "key",
    ["trt_extra_plugin_lib_paths", "trt_engine_cache_path", "trt_onnx_model_folder_path",
     "trt_dump_subgraphs", "gpu_external_alloc", "user_compute_stream", "trt_onnx_bytestream",
     "trt_ep_context_file_path", "nv_runtime_cache_path"],
)  # fmt: skip
def test_options_that_reach_out_of_the_runtime_are_refused(key: str) -> None:
    with pytest.raises(PlanError, match="names a file, a library or an address"):
        Onnx(provider="tensorrt", provider_options={key: "x"})


def test_other_options_of_a_provider_pass() -> None:
    options = {"trt_max_workspace_size": 1, "device_id": 0, "cudnn_conv_algo_search": "HEURISTIC"}
    assert Onnx(provider="tensorrt", provider_options=options).provider_options == options
    with pytest.raises(PlanError, match="write `length: 512` or more"):
        Profile(prompt=512, length=100)


def test_the_cache_stays_on_the_gpu_where_the_runtime_can_put_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import onnxruntime

    offered = [NAMES["cpu"]]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offered)
    assert cache_device("tensorrt_rtx") == "cpu", "a plug-in beside a runtime without CUDA"
    offered.append(NAMES["cuda"])
    assert [cache_device(key) for key in ("cpu", "cuda", "tensorrt")] == ["cpu", "cuda", "cuda"]


def test_logits_come_back_from_a_gpu_after_the_clock_has_stopped(
    tiny_graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a session on a GPU, which notes where its outputs are to be."""
    wanted: dict[str, str] = {}
    with OrtRunner(tiny_graph, CPU) as runner:
        real = runner._session.io_binding

        def io_binding() -> Any:
            binding = real()
            bind = binding.bind_output
            binding.bind_output = lambda name, device: (wanted.update({name: device}), bind(name))
            return binding

        monkeypatch.setattr(runner._session, "io_binding", io_binding)
        list(runner._pasts(1))  # the cache is made where there is memory
        runner._device = "cuda"
        logits, _ = runner.step(np.arange(4, dtype=np.int64)[None])
    assert set(wanted.values()) == {"cuda"}
    assert "logits" in wanted
    assert logits.shape[:2] == (1, 4)


def test_a_record_names_the_runtime_whatever_its_wheel_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With onnxruntime-gpu there is a module `onnxruntime` and no distribution of that name."""
    from importlib import metadata

    import onnxruntime

    from prune_export.exporters.onnx import exporter

    real = metadata.version

    def version(package: str) -> str:
        if package == "onnxruntime":
            raise metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(metadata, "version", version)
    assert exporter._toolchain()["onnxruntime"] == onnxruntime.__version__


def test_the_twin_without_sparsity() -> None:
    assert Onnx().without_sparsity() is None
    assert Onnx(sliding=True).without_sparsity() == Onnx()
    both = Onnx(sliding=True, sparse=True, provider="tensorrt", precision="fp16")
    assert both.without_sparsity() == Onnx(provider="tensorrt", precision="fp16")
