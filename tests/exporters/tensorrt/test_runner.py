"""The runner, against a stand-in for the library that computes with ONNX Runtime."""

from __future__ import annotations

import ctypes
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from prune_export.errors import StageError
from prune_export.exporters._shared.ort_runner import OrtRunner
from prune_export.exporters.tensorrt import binding
from prune_export.exporters.tensorrt.exporter import ENGINE
from prune_export.exporters.tensorrt.runner import TrtRunner
from prune_export.machine import Machine

MACHINE = Machine(device="cpu", ram_bytes=8 << 30, gpu_bytes=0, threads=1)


class Standin:
    """A library of TensorRT's names whose engines compute with ONNX Runtime, at given addresses."""

    TYPES: ClassVar = {"tensor(float)": "FLOAT", "tensor(int64)": "INT64"}
    LIMITS: ClassVar = {"input_ids": (2, 8), "past_key_values.0.key": (2, 2, 15, 8)}

    class ILogger:
        def __init__(self) -> None: ...

    class TensorIOMode(Enum):
        INPUT = 1
        OUTPUT = 2

    class DynamicShapesKernelSpecializationStrategy(Enum):
        LAZY, EAGER, NONE = range(3)

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

        def create_runtime_config(self) -> Any:
            return SimpleNamespace(dynamic_shapes_kernel_specialization_strategy=None)

        def create_execution_context(self, settings: Any = None) -> Any:
            self.made.append(Standin.Context(self))
            self.made[-1].settings = settings
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
def runner(split_graph: Path, tmp_path: Path) -> TrtRunner:
    return started(split_graph, tmp_path / ENGINE, "tensorrt", 11)


def started(graph: Path, file: Path, flavor: binding.Flavor, major: int) -> TrtRunner:
    file.write_text(str(graph))
    made = TrtRunner.__new__(TrtRunner)
    features = binding.FEATURES[flavor, major]
    library: Any = binding.Binding(Standin, flavor, f"{major}.4", features)
    gpu: Any = Cpu()
    made._start(library, file, gpu, context=16, host_code=False)
    return made


def test_the_runner_carries_the_cache_from_step_to_step(
    tiny_graph: Path, runner: TrtRunner
) -> None:
    ids = np.random.default_rng(0).integers(0, 250, (2, 12))
    with OrtRunner(tiny_graph, MACHINE) as reference, runner:
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


def test_rtx_compiles_for_prompts_and_never_for_the_cache_of_a_decode_step(
    split_graph: Path, tmp_path: Path
) -> None:
    runner = started(split_graph, tmp_path / ENGINE, "rtx", 1)
    ids = np.zeros((2, 3), np.int64)
    with runner:
        runner.step(ids)
        runner.step(ids[:, :1])
        kinds = [
            one.settings.dynamic_shapes_kernel_specialization_strategy.name
            for one in runner._engine.made
        ]
    assert kinds == ["EAGER", "NONE"]


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
