"""Blocks that keep states: what is traced for them computes what transformers computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnxruntime import InferenceSession
from transformers import PreTrainedModel
from transformers.models.bamba import modeling_bamba
from transformers.models.jamba import modeling_jamba
from transformers.models.qwen3_5 import modeling_qwen3_5

from prune_export.errors import MissingExtra, PlanError
from prune_export.exporters.aoti import Aoti
from prune_export.exporters.onnx import Onnx, recurrent
from prune_export.exporters.onnx.caches import _step
from prune_export.exporters.ort_genai import OrtGenai
from prune_export.exporters.tensorrt import Tensorrt
from tests.arch.tiny_models import arch_of
from tests.exporters.onnx.graphs import (
    MACHINE,
    error,
    expected_logits,
    exported,
    padded,
    saved,
    stepped,
)

BATCH, NEW, HEADS, KEYS, VALUES = 2, 11, 4, 6, 8


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def token_by_token(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor | None = None,
) -> torch.Tensor:
    """The recurrence of the module's docstring, in the order in which it is written there."""
    state = torch.zeros(value.shape[0], value.shape[2], query.shape[-1], value.shape[-1])
    outs = []
    for at in range(value.shape[1]):
        state = decay[:, at] * state
        update = value[:, at]
        if beta is not None:
            known = torch.einsum("bhnp,bhn->bhp", state, key[:, at])
            update = beta[:, at, :, None] * (update - known)
        state = state + torch.einsum("bhn,bhp->bhnp", key[:, at], update)
        outs.append(torch.einsum("bhnp,bhn->bhp", state, query[:, at]))
    return torch.stack(outs, 1)


def delta_rule(code: Any) -> torch.Tensor:
    found: torch.Tensor = code.torch_chunk_gated_delta_rule(
        drawn(BATCH, NEW, 2, KEYS), drawn(BATCH, NEW, 2, KEYS), drawn(BATCH, NEW, HEADS, VALUES),
        g=-drawn(BATCH, NEW, HEADS).abs(), beta=drawn(BATCH, NEW, HEADS).sigmoid(),
        use_qk_l2norm_in_kernel=True,
    )[0]  # fmt: skip
    return found


def mamba2(code: Any) -> torch.Tensor:
    found: torch.Tensor = code.mamba2_chunk_scan(
        drawn(BATCH, NEW, HEADS, VALUES), drawn(BATCH, NEW, HEADS), -drawn(HEADS).exp(),
        drawn(BATCH, NEW, 2, KEYS), drawn(BATCH, NEW, 2, KEYS), chunk_size=4, D=drawn(HEADS),
        dt_bias=drawn(HEADS), dt_softplus=True, dt_limit=(0.1, 1.5), return_final_states=True,
    )[0]  # fmt: skip
    return found


def mamba(code: Any) -> torch.Tensor:
    found: torch.Tensor = code.mamba_selective_scan(
        drawn(BATCH, VALUES, NEW), drawn(BATCH, VALUES, NEW), -drawn(VALUES, KEYS).exp(),
        drawn(BATCH, KEYS, NEW), drawn(BATCH, KEYS, NEW), D=drawn(VALUES),
        z=drawn(BATCH, VALUES, NEW), delta_bias=drawn(VALUES), delta_softplus=True,
        return_last_state=True,
    )[0]  # fmt: skip
    return found


@pytest.mark.parametrize(
    ("code", "called"),
    [(modeling_qwen3_5, delta_rule), (modeling_bamba, mamba2), (modeling_jamba, mamba)],
)
def test_around_the_marker_it_is_transformers_recurrence(
    code: ModuleType, called: Callable[[Any], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = called(code)
    monkeypatch.setattr(recurrent, "_recur", token_by_token)
    names = {function: getattr(code, function, None) for function in recurrent._STANDS_FOR}

    class Holder(torch.nn.Module):
        __module__ = code.__name__

    with recurrent.recurrences(Holder()):
        found = called(code)
    assert {name: getattr(code, name, None) for name in names} == names, "all is as it was"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("corrects", [False, True])
def test_what_the_marker_becomes_is_the_recurrence_from_any_state(corrects: bool) -> None:
    """In two pieces, the second from the state that the first left."""
    given = {
        "query": drawn(BATCH, NEW, HEADS, 1, KEYS),
        "key": drawn(BATCH, NEW, HEADS, KEYS, 1),
        "value": drawn(BATCH, NEW, HEADS, 1, VALUES),
        "decay": drawn(BATCH, NEW, HEADS, 1, 1).sigmoid(),
    }
    if corrects:
        given["beta"] = drawn(BATCH, NEW, HEADS, 1, 1).sigmoid()
    scan = onnx.helper.make_node(
        "Scan", ["past", *given], ["present", "out"], body=_step(corrects=corrects),
        num_scan_inputs=len(given),
    )  # fmt: skip
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [scan], "scan",
        [info("past", 1, [*"abcd"]), *(info(name, 1, [*"abcde"]) for name in given)],
        [info("present", 1, None), info("out", 1, None)],
    )  # fmt: skip
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10
    )
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    state, outs = np.zeros((BATCH, HEADS, KEYS, VALUES), np.float32), []
    for piece in (slice(0, 7), slice(7, NEW)):
        fed = {name: value[:, piece].swapaxes(0, 1).numpy() for name, value in given.items()}
        state, out = session.run(["present", "out"], {"past": state, **fed})
        outs.append(out)
    beta = given["beta"][..., 0, 0] if corrects else None
    expected = token_by_token(
        given["query"][..., 0, :], given["key"][..., 0], given["value"][..., 0, :],
        given["decay"], beta,
    )  # fmt: skip
    found = np.concatenate(outs).swapaxes(0, 1)[..., 0, :]
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def short_convolutions(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """A tiny LFM2, and its graph."""
    path = tmp_path_factory.mktemp("lfm2")
    model = saved("lfm2", path / "dense")
    exported(Onnx(), path / "dense", path / "onnx")
    return model, path / "onnx"


@pytest.mark.slow
def test_states_are_caches_of_the_graph(short_convolutions: tuple[PreTrainedModel, Path]) -> None:
    model, path = short_convolutions
    graph = onnx.load(path / "model.onnx", load_external_data=False).graph
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes["past_key_values.0.conv_state"] == shapes["present.0.conv_state"]
    assert shapes["past_key_values.0.conv_state"] == ["batch", 32, 3]
    assert shapes["present.4.key"] == ["batch", 2, "total_sequence", 8]
    caches = [name for name in shapes if name.startswith("past")]
    kinds = model.config.layer_types
    assert len(caches) == 2 * kinds.count("full_attention") + kinds.count("conv")


@pytest.mark.slow
def test_states_go_on_where_a_step_ended_and_are_forgotten_on_reset(
    short_convolutions: tuple[PreTrainedModel, Path],
) -> None:
    model, path = short_convolutions
    ids, mask = padded(model.config.vocab_size)
    wanted = expected_logits(model, ids, mask)
    with Onnx().open(path, MACHINE) as runner:
        first = stepped(runner, ids, mask)
        assert error(first, wanted, mask) < 1e-5
        runner.reset()
        assert np.array_equal(stepped(runner, ids, mask), first)
        runner.reset()
        one_by_one = [runner.step(ids[1:, at : at + 1])[0] for at in range(ids.shape[1])]
    assert error(np.concatenate(one_by_one, 1), wanted[1:], mask[1:]) < 1e-5


@pytest.mark.parametrize("model_type", ["lfm2", "qwen3_5_text", "jamba"])
@pytest.mark.parametrize(
    "other", [Aoti(), OrtGenai(), Tensorrt(), Onnx(provider="tensorrt")], ids=lambda e: str(e)[:20]
)
def test_exporters_whose_caches_hold_keys_and_values_refuse_states(
    other: Any, model_type: str
) -> None:
    try:
        with pytest.raises(PlanError, match=r"keep states of|does not know") as refusal:
            other.check(arch_of(model_type), MACHINE)
    except MissingExtra:  # of a library that is asked for first
        pytest.skip("not installed")
    assert "the exporter `onnx`" in refusal.value.fix
    Onnx().check(arch_of(model_type), MACHINE)
