"""A CUDA device that computes on the CPU, and refuses to mix the two as CUDA does.

Tensors on it are wrappers whose device is `cuda:0`. An operation is computed with what they wrap,
after a check that all of its tensors are on one device. Kernels, streams and memory stay unshown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

import torch
import torch.utils._device
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten
BYTES: Final = 8 << 30
_CPU, _CUDA = torch.device("cpu"), torch.device("cuda", 0)
_PUT: Final = {
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
}


class OnGpu(torch.Tensor):
    """Says that it is on the GPU; its numbers are in `inner`."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnGpu:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=_CUDA,
            requires_grad=inner.requires_grad,
        )
        made.inner = inner.detach() if inner.requires_grad else inner
        return made  # type: ignore[no-any-return]

    def __init__(self, inner: torch.Tensor) -> None: ...

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.inner!r})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _computed(func, args, kwargs or {})


class _Everywhere(TorchDispatchMode):
    """Also for what has no tensor of the GPU among its arguments, but puts one there."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    flat, form = tree_flatten((args, dict(kwargs)))
    tensors = [one for one in flat if isinstance(one, torch.Tensor)]
    on_gpu = [one for one in tensors if isinstance(one, OnGpu)]
    if on_gpu:
        if func is aten._fused_sdp_choice.default:
            return 0  # the CPU's choice has no operator for CUDA
        if func is aten.histc.default and not args[0].is_floating_point():
            return _computed(func, (args[0].float(), *args[1:]), kwargs).to(args[0].dtype)
        _check_devices(func, args, tensors)
    asked = next((one for one in flat if isinstance(one, torch.device)), None)
    there = bool(on_gpu) if asked is None else asked.type == "cuda"
    inner = [_inner(one) for one in flat]
    args, kwargs = tree_unflatten(inner, form)
    out = func(*args, **{key: value for key, value in kwargs.items() if key != "pin_memory"})
    wrappers = {id(one.inner): one for one in on_gpu}

    def placed(one: Any) -> Any:
        if not isinstance(one, torch.Tensor) or one.device.type == "meta":
            return one
        if asked is not None and not there:
            return one.clone() if id(one) in wrappers else one
        if id(one) in wrappers:
            return wrappers[id(one)]
        own = func is aten.copy_.default or (asked is None and any(one is own for own in inner))
        return OnGpu(one) if there and not own else one

    return tree_map(placed, out)


def _check_devices(func: Any, args: Any, tensors: list[torch.Tensor]) -> None:
    name = func.name()
    if name.startswith("aten::to.") or func in (aten._to_copy.default, aten.copy_.default):
        return
    if func is aten.index.Tensor and isinstance(args[0], OnGpu):
        return  # indices may be elsewhere
    if func in _PUT and isinstance(args[0], OnGpu):
        tensors = [args[0], args[2]]
    if any(not isinstance(one, OnGpu) and one.dim() and not one.is_meta for one in tensors):
        raise RuntimeError(
            f"{name}: Expected all tensors to be on the same device, but found at least two "
            "devices, cuda:0 and cpu!"
        )


def _inner(one: Any) -> Any:
    if isinstance(one, OnGpu):
        return one.inner
    return _CPU if isinstance(one, torch.device) and one.type == "cuda" else one


def _answers() -> dict[str, Callable[..., Any]]:
    """What `torch.cuda` says."""
    properties = SimpleNamespace(
        total_memory=BYTES, name="pretended", major=9, minor=0, multi_processor_count=8
    )
    return {
        "_lazy_init": lambda: None,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "empty_cache": lambda: None,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "pretended",
        "get_device_properties": lambda *_: properties,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "get_rng_state_all": lambda: [],
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "manual_seed_all": lambda _: None,
        "mem_get_info": lambda *_: (BYTES, BYTES),
        "set_rng_state": lambda *_: None,
        "set_rng_state_all": lambda _: None,
        "synchronize": lambda *_: None,
    }


@contextmanager
def pretended() -> Iterator[None]:
    """There is a CUDA device inside, in this thread; `device.cpp` was loaded before torch."""
    tensor, tolist = torch.tensor, torch.Tensor.tolist

    def made(data: Any, *, device: Any = None, **named: Any) -> torch.Tensor:
        own = tensor(data, **named)
        return own if device is None else own.to(device)

    # What a default device is for is looked up once, by torch's own functions.
    torch.utils._device._device_constructors()
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    with ExitStack() as stack:
        for name, answer in _answers().items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch, "tensor", made))
        for name, method in {
            "pin_memory": lambda self, *_: self,
            "tolist": lambda self: tolist(_inner(self)),
        }.items():
            stack.enter_context(mock.patch.object(torch.Tensor, name, method))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        stack.enter_context(_Everywhere())
        yield
