"""Loads a checkpoint with fresh adapters to train, or without to measure; extracts adapters."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from prune_export.arch import Arch
from prune_export.calibrate import native_dtype
from prune_export.checkpoint import Checkpoint
from prune_export.checkpoint.loading import load_model
from prune_export.errors import MissingExtra, StageError
from prune_export.machine import Machine
from prune_export.training.adapters.low_rank import compute_in_own_dtype
from prune_export.training.adapters.masked import Base, mask
from prune_export.training.settings import Quantization, Settings
from prune_export.training.zeros import Packed

_ADAPTER: Final = "default"
_NOISY: Final = ("transformers", "peft", "accelerate", "bitsandbytes")


def _is_needed(record: logging.LogRecord) -> bool:
    """Whether a log message of bitsandbytes is to be shown.

    Importing it on a CPU with bfloat16 advises to install a kernel for inference. That one computes
    with repacked weights, which training must not (see `_frozen`), so that it would change nothing.
    """
    return "gemm_4bit_forward" not in str(record.msg)


# Whoever imports bitsandbytes first (peft does) comes by here before.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_needed)


@dataclass(frozen=True)
class Trainee:
    """A frozen model with adapters on it.

    `adapted` has, by the stored name of the weight, the module that carries its adapter, and
    `transposed` the weights that are stored `[in, out]` (GPT-2's Conv1D). `stored` has the stored
    names of parameters that have another one in the model.
    """

    model: torch.nn.Module
    adapted: Mapping[str, Any]
    transposed: frozenset[str]
    stored: Mapping[str, str] = field(default_factory=dict)

    @property
    def masks(self) -> Mapping[str, torch.Tensor]:
        """None: an adapter computes with zeros in its forward pass."""
        return {}

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The adapters' parameters by name, in the order of the model."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def blocks(self, arch: Arch) -> list[torch.nn.Module]:
        """The model's blocks."""
        base: Any = self.model
        return list(base.get_base_model().get_submodule(arch.table.blocks))

    def factors(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Copies each weight's adapter, by stored name: A `[rank, in]` and B `[out, rank]`."""
        return {
            name: (
                module.lora_A[_ADAPTER].weight.detach().cpu().clone(),
                module.lora_B[_ADAPTER].weight.detach().cpu().clone(),
            )
            for name, module in self.adapted.items()
        }

    def dequantized(self) -> dict[str, Callable[[], torch.Tensor]]:
        """Functions that dequantize each 4-bit weight, by stored name, to float32 as stored."""
        return {
            self.stored.get(name, name): _Dequantize(module, _is_transposed(module))
            for name, module in _quantized_modules(self.model).items()
        }


@dataclass(frozen=True)
class _Dequantize:
    module: Any
    transposed: bool

    def __call__(self) -> torch.Tensor:
        import bitsandbytes.functional as bnb

        weight = self.module.weight
        value: torch.Tensor = bnb.dequantize_4bit(weight.data, weight.quant_state).float().cpu()
        return value.T.contiguous() if self.transposed else value


def trainee(
    source: Checkpoint,
    targets: Sequence[str],
    settings: Settings,
    quantization: Quantization | None,
    *,
    device: str,
    dtype: torch.dtype,
    gradient_checkpointing: bool,
    keep_zeros: Collection[str] = (),
) -> Trainee:
    """Loads the model of `source` with fresh adapters on the stored weights `targets`.

    Where one of `keep_zeros` is zero, its adapter changes nothing.

    Raises:
        StageError: transformers' model has no linear layer for a target.
    """
    from peft import LoraConfig, get_peft_model

    model = _frozen(source.path, device, dtype, quantization)
    renamed = _renaming(model)
    modules, transposed = _modules(model, targets, renamed)
    stored = {new: name for name in source.entries if (new := renamed(name)) != name}
    torch.manual_seed(settings.seed)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.scaling * settings.rank,
        lora_dropout=settings.dropout,
        target_modules=list(modules.values()),
        fan_in_fan_out=bool(transposed) and quantization is None,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    carriers = {name: model.get_submodule(module) for name, module in modules.items()}
    missed = [name for name, module in carriers.items() if not hasattr(module, "lora_A")]
    if missed:
        raise StageError(
            missed[0],
            f"got no adapter from peft ({len(missed)} of {len(modules)} targets did not)",
            "report this with the model's config.json",
        )
    if dtype != torch.float32:
        for module in carriers.values():
            compute_in_own_dtype(module, _ADAPTER)
    for name in keep_zeros:
        if name in carriers:
            layer = carriers[name].get_base_layer()
            turned = name in transposed
            packed = None
            if quantization is not None:
                # NF4 makes zeros of small weights too, and those are to be trained.
                zero = source.read(name) == 0
                packed = Packed.of(zero.T if turned else zero, device)
            # A 4-bit layer is [out, in] whatever it stands for.
            mask(carriers[name], _ADAPTER, Base(layer, turned and packed is None, packed))
    return Trainee(adapted, carriers, frozenset(transposed), stored)


def _frozen(path: Path, device: str, dtype: torch.dtype, quantization: Quantization | None) -> Any:
    """Loads a directory's model, plain or in 4 bits, frozen and in evaluation mode."""
    options: dict[str, Any] = {"device_map": {"": 0 if device == "cuda" else "cpu"}}
    if quantization is not None:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=quantization.double,
            bnb_4bit_compute_dtype=dtype,
        )
    model = load_model(path, dtype=dtype, **options)
    for module in _quantized_modules(model).values():
        # In evaluation, on a CPU with bfloat16 instructions, bitsandbytes repacks the weights in
        # place and rounds their scales to bfloat16: what is trained on must stay as it is.
        module.support_avx512bf16_for_cpu = False
    return model.requires_grad_(False).eval()


def plain(path: Path, nbytes: int, machine: Machine, scratch: Path) -> torch.nn.Module:
    """Loads a directory's model in its stored dtype, partly on disk if it does not fit.

    This is how anybody would load the result, and so how it is measured.
    """
    room = machine.gpu_bytes if machine.device == "cuda" else machine.ram_bytes
    options: dict[str, Any] = {"device_map": {"": 0 if machine.device == "cuda" else "cpu"}}
    if nbytes > 0.8 * room:
        limits: dict[int | str, int] = {"cpu": int(0.5 * machine.ram_bytes)}
        if machine.device == "cuda":
            limits[0] = int(0.7 * machine.gpu_bytes)
        options = {
            "device_map": "auto",
            "max_memory": limits,
            "offload_folder": str(scratch / "offload"),
        }
    model = load_model(path, **options)
    return model.requires_grad_(False).eval()  # type: ignore[no-any-return]


def compute_dtype(asked: str, machine: Machine) -> torch.dtype:
    """Chooses the dtype to compute in; `auto` is bfloat16 where the hardware multiplies it."""
    if asked != "auto":
        return torch.float32 if asked == "float32" else torch.bfloat16
    return native_dtype(machine)


def require(needed_by: str, *packages: str) -> None:
    """Refuses to go on when an optional package cannot be imported.

    Raises:
        MissingExtra: one is missing.
    """
    from importlib.util import find_spec

    for package in packages:
        if find_spec(package) is None:
            raise MissingExtra.of(needed_by, package, "heal")


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the training libraries' bars, advice and warnings off the terminal."""
    from transformers.utils import logging as transformers_logging

    loggers = {name: logging.getLogger(name) for name in _NOISY}
    levels = {name: logger.level for name, logger in loggers.items()}
    bars = transformers_logging.is_progress_bar_enabled()
    for logger in loggers.values():
        logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
        if bars:
            transformers_logging.enable_progress_bar()


def _renaming(model: torch.nn.Module) -> Callable[[str], str]:
    """Gets transformers' own renaming of stored names to those of its model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    known = frozenset(model.state_dict())
    mapping: Any = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    rules = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    return lambda name: name if name in known else str(rename_source_key(name, rules, [])[0])


def _modules(
    model: torch.nn.Module, targets: Sequence[str], renamed: Callable[[str], str]
) -> tuple[dict[str, str], frozenset[str]]:
    """Maps stored weights to module names, and finds the weights that are stored `[in, out]`."""
    from transformers.pytorch_utils import Conv1D

    found: dict[str, str] = {}
    transposed = set()
    modules = dict(model.named_modules())
    for target in targets:
        name = renamed(target).removesuffix(".weight")
        module = modules.get(name)
        if not isinstance(module, torch.nn.Linear | Conv1D):
            raise StageError(
                target,
                f"is a {type(module).__name__} in transformers' model, expected a linear layer",
                "leave its role out of `targets`",
            )
        if _is_transposed(module):
            transposed.add(target)
        found[target] = name
    return found, frozenset(transposed)


def _is_transposed(module: Any) -> bool:
    """Whether a layer's weight is stored `[in, out]`."""
    from transformers.pytorch_utils import Conv1D

    # A 4-bit layer is a Linear; transformers notes on it what it stands for.
    return issubclass(getattr(module, "source_cls", type(module)), Conv1D)


def _quantized_modules(model: Any) -> dict[str, Any]:
    """Finds the 4-bit linear layers by the name of their weight, also under adapters."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not getattr(base, "is_loaded_in_4bit", False):
        return {}
    from bitsandbytes.nn import Linear4bit

    return {
        f"{name.removesuffix('.base_layer')}.weight": module
        for name, module in base.named_modules()
        if isinstance(module, Linear4bit)
    }
