"""Knows which models onnxruntime-genai's model builder supports, and corrects or refuses others.

The list of architectures is read from the installed builder. What the builder gets wrong, though
it builds, was measured with version 0.18.0 on tiny random models of every family against PyTorch
(tests/exporters/ort_genai/test_ort_genai.py); each such case is either put right by a correction
of the config that the builder reads, or refused here with its reason.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from prune_export.arch import Arch
from prune_export.errors import MissingExtra, PlanError
from prune_export.exporters._shared.rope import refuse_rope, rope_kinds
from prune_export.exporters._shared.states import refuse_states

_ACTIVATIONS: Final = frozenset(
    {"silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "relu2"}
)
_ROPES: Final[Mapping[str, frozenset[str]]] = {
    "llama": frozenset({"default", "llama3"}),  # its `linear` and `yarn` build, and are wrong
    "phi3": frozenset({"default", "longrope"}),
    "gemma3_text": frozenset({"default"}),
}
_CLASSES: Final = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
_OTHER_ROPES: Final = frozenset({"default", "linear"})
_LANES: Final = 16  # GroupQueryAttention with fused rotary embedding: heads in units of 16


@cache
def architectures() -> frozenset[str]:
    """Lists the class names, such as `LlamaForCausalLM`, that the installed builder knows.

    Raises:
        MissingExtra: onnxruntime-genai is not installed.
    """
    spec = find_spec("onnxruntime_genai")
    if spec is None or spec.origin is None:
        raise MissingExtra.of("exporter ort_genai", "onnxruntime-genai", "onnx")
    source = Path(spec.origin).parent / "models" / "builder.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    return frozenset(
        node.comparators[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        and ast.unparse(node.left) == "config.architectures[0]"
        and isinstance(node.ops[0], ast.Eq)
        and isinstance(node.comparators[0], ast.Constant)
        and isinstance(node.comparators[0].value, str)
    )


def architecture(config: Mapping[str, Any]) -> str:
    """The causal language model's class name of a full config, or an empty string."""
    return _class_names().get(str(config.get("model_type")), "")


@cache
def _class_names() -> Mapping[str, str]:
    """Lists transformers' causal language models, class name by model type.

    Read from its source, as the builder's are: to import that module takes a second, in each plan.
    """
    spec = find_spec("transformers")
    if spec is not None and spec.origin is not None:
        source = Path(spec.origin).parent / "models" / "auto" / "modeling_auto.py"
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == _CLASSES:
                value = node.value.args[0] if isinstance(node.value, ast.Call) else node.value
                return dict(ast.literal_eval(value))
    from transformers.models.auto import modeling_auto

    return dict(getattr(modeling_auto, _CLASSES))


def refuse(arch: Arch) -> None:
    """Refuses a model that the builder does not know or gets wrong.

    Raises:
        PlanError: naming the reason and the exporter that does take the model.
    """
    name = architecture(arch.config)
    if name not in architectures():
        raise _refusal(
            f"onnxruntime-genai's model builder does not know {name or arch.config['model_type']}"
        )
    refuse_rope("exporter ort_genai", arch.config)
    refuse_states("exporter ort_genai", arch)
    for problem in _problems(arch):
        raise _refusal(problem)


def _refusal(problem: str) -> PlanError:
    return PlanError("exporter ort_genai", problem, "use the exporter `onnx`, which takes it")


def _problems(arch: Arch) -> Iterator[str]:
    config = arch.config
    uneven = {
        key.split(".")[0]
        for key, size in arch.sizes.items()
        if "." in key and size != arch.sizes[key.split(".")[0] + ".0"]
    }
    if uneven:
        yield f"the builder gives every block the same size, and {sorted(uneven)} differ by block"
    head = head_size(config)
    rotary = int(head * _fraction(config))
    if head % _LANES:
        yield f"ONNX Runtime's attention needs heads in units of {_LANES}, got head size {head}"
    if rotary % _LANES:
        yield (
            f"ONNX Runtime's attention rotates in units of {_LANES} dimensions, "
            f"got {rotary} of the {head} of a head"
        )
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        yield f"the builder does not know the activation {activation!r:.60}"
    kinds = rope_kinds(config)
    if unknown := kinds - _ROPES.get(str(config["model_type"]), _OTHER_ROPES):
        yield f"the builder's graph is wrong for rotary scaling {sorted(unknown)} of this family"
    yield from _family_problems(config)


def _family_problems(config: Mapping[str, Any]) -> Iterator[str]:
    rotated = config.get("no_rope_layers")
    if rotated and not (isinstance(rotated, list | tuple) and all(rotated)):
        yield "the builder fails on blocks without rotary embedding (`no_rope_layers`)"
    if config.get("use_bidirectional_attention"):
        yield "the builder's attention is causal only (`use_bidirectional_attention`)"
    if config.get("qk_layernorm"):
        yield "the builder leaves out `qk_layernorm`"


def corrections(config: Mapping[str, Any]) -> dict[str, Any]:
    """Corrects the config that the builder reads: attributes with which its graph is right.

    Only the builder's own reading of the config sees them; the weights' config and what is written
    beside the graph do not.
    """
    found: dict[str, Any] = {"architectures": [architecture(config)]}
    window = config.get("sliding_window")
    if window and not config.get("layer_types") and config.get("use_sliding_window", True):
        # Without it the builder drops the window of mistral and phi3 from every block.
        found["layer_types"] = ["sliding_attention"] * _whole(config, "num_hidden_layers")
    if "rms_norm_eps" not in config and "layer_norm_eps" in config:
        # It reads no other name, and would take 1e-6.
        found["rms_norm_eps"] = config["layer_norm_eps"]
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping) and isinstance(rope.get("full_attention"), Mapping):
        # It expects what transformers 4 called them.
        found["rope_parameters"] = dict(rope["full_attention"])
        found["rope_theta"] = _theta(rope, "full_attention")
        found["rope_local_base_freq"] = _theta(rope, "sliding_attention")
    elif isinstance(rope, Mapping) and rope.get("rope_type") == "longrope":
        found["rope_parameters"] = {**rope, "type": "longrope"}
    return found


def head_size(config: Mapping[str, Any]) -> int:
    """The size of an attention head.

    Raises:
        PlanError: the config says none, or something else than a whole number.
    """
    if config.get("head_dim"):
        return _whole(config, "head_dim")
    return _whole(config, "hidden_size") // _whole(config, "num_attention_heads")


def _whole(config: Mapping[str, Any], key: str) -> int:
    found = config.get(key)
    if type(found) is not int or found < 1:
        raise PlanError(
            f"config.json  {key}",
            f"got {found!r:.60}, expected a whole number of 1 or more",
            "correct the value, or fetch the file again",
        )
    return found


def _fraction(config: Mapping[str, Any]) -> float:
    """The fraction of a head that is rotated; 1 unless the config says otherwise."""
    found = config.get("partial_rotary_factor") or _rope(config, "partial") or 1
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found <= 1:
        raise PlanError(
            "config.json  partial_rotary_factor",
            f"got {found!r:.60}, expected a part in (0, 1]",
            "correct the value, or fetch the file again",
        )
    return float(found)


def _rope(config: Mapping[str, Any], start: str) -> Any:
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping):
        return next((rope[key] for key in rope if str(key).startswith(start)), None)
    return None


def _theta(rope: Mapping[str, Any], kind: str) -> int | float:
    part = rope.get(kind)
    theta = part.get("rope_theta") if isinstance(part, Mapping) else None
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        raise PlanError(
            f"config.json  rope_parameters.{kind}.rope_theta",
            f"got {theta!r:.60}, expected a number",
            "correct the value, or fetch the file again",
        )
    return theta
