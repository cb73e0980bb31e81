"""A plan refuses what hardware cannot do with sparse weights, and says what would work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from prune_export.arch import Arch
from prune_export.arch.table import table_for
from prune_export.errors import PlanError
from prune_export.execution import Options, plan
from prune_export.machine import Machine
from prune_export.planning.sparsity_notes import packed_note, windows_note
from prune_export.planning.sparsity_rules import Planned, refuse_impossible
from prune_export.recipe import Recipe

CPU = Machine("cpu", 8 << 30, 0, 1)
AMPERE = Machine("cuda", 8 << 30, 8 << 30, 1, 86)
TURING = Machine("cuda", 8 << 30, 8 << 30, 1, 75)
HOPPER = Machine("cuda", 8 << 30, 8 << 30, 1, 90)

SPARSE = {"tensorrt": {"sparse": True}}
WINDOWS = {"tensorrt": {"sparse": True, "sliding": True}}


def recipe(
    *stages: Any, export: Sequence[Any] = (SPARSE,), at_least: float | None = None, **more: Any
) -> Recipe:
    body: dict[str, Any] = {
        "recipe": 1,
        "data": {name: {"files": [f"{name}.txt"], "samples": 2, "length": 16}
                 for name in ("calibration", "healing")},
        "stages": list(stages), "export": list(export),
    }  # fmt: skip
    if at_least is not None:
        body["verify"] = {"speed": {"at_least": at_least}}
    return Recipe.parse(json.dumps(body | more))  # which is YAML, without anchors


def prune(keep: int = 0, of: int = 0, **keys: Any) -> Any:
    pattern = {"nm": {"keep": keep, "of": of}} if keep else {}
    return {"prune": {"method": "magnitude", **pattern, **keys}}


def arch(**changes: Any) -> Arch:
    return Arch.from_config({"model_type": "llama", **table_for("llama").tiny.config, **changes})


def check(asked: Recipe, machine: Machine = AMPERE, *, cut: tuple[Arch, ...] = ()) -> None:
    """`cut` is the model after each stage, where it is not the same throughout."""
    archs = cut or (arch(),) * (len(asked.stages) + 1)
    refuse_impossible(Planned(asked, archs, machine))


def refused(*given: Any, **more: Any) -> str:
    with pytest.raises(PlanError) as error:
        check(*given, **more)
    return str(error.value)


def test_what_the_hardware_knows_passes() -> None:
    for stages, export in (
        ((prune(2, 4),), SPARSE), ((prune(1, 2),), SPARSE), ((prune(1, 8),), SPARSE),
        ((prune(6, 8),), WINDOWS), ((prune(4, 8),), WINDOWS), ((prune(8, 16),), WINDOWS),
        ((prune(4, 8), prune(2, 4)), SPARSE), ((), SPARSE),
        ((prune(4, 8),), {"tensorrt": {}}), ((prune(sparsity=0.5),), {"onnx": {}}),
    ):  # fmt: skip
        check(recipe(*stages, export=[export]))


TRIMMED: list[Any] = [
    {"method": "block_influence", "remove": 1, "unit": "attention"},
    {"method": "greedy_loss", "remove": 1, "unit": "mlp"},
    {"method": "llm_pruner", "ffn": 0.25, "per_layer": True},
]


@pytest.mark.parametrize("keys", TRIMMED, ids=lambda keys: str(keys["method"]))
def test_zeros_that_engines_leave_out_are_no_sparse_weights(keys: Any) -> None:
    trims = {"prune": keys}
    check(recipe(trims, export=["onnx"], at_least=1.2), CPU)
    check(recipe(prune(sparsity=0.5), trims, export=["onnx"], at_least=1.2), CPU)
    check(recipe(prune(2, 4), trims))


def test_only_inputs_of_pruned_matrices_count() -> None:
    odd = arch(intermediate_size=50)
    check(recipe(prune(2, 4, exclude=["down"])), cut=(odd, odd))
    said = refused(recipe(prune(1, 2)), cut=(odd, odd))
    assert "down_proj.weight has 50 inputs" in said


def test_four_of_eight_without_windows_is_refused_and_six_of_eight_offered() -> None:
    said = refused(recipe(prune(4, 8)))
    assert said.startswith("export.tensorrt.sparse\n  the weights keep 4 of 8")
    assert "`sliding: true` (exact, at most 1.33x of dense)" in said
    assert "prune with `nm: {keep: 6, of: 8}`, which is as fast and keeps more" in said
    assert "or prune with `nm: {keep: 2, of: 4}` (at most 2.00x)" in said
    assert "as fast and keeps more" not in refused(recipe(prune(6, 8)))


def test_a_pattern_that_no_windows_take() -> None:
    for export in (SPARSE, WINDOWS):
        said = refused(recipe(prune(15, 16), export=[export]))
        assert "the weights keep 15 of 16, which neither" in said
        assert "`nm: {keep: 6, of: 8}` and write `sliding: true`" in said


@pytest.mark.parametrize("engine", ["onnx", "tensorrt"])
def test_windows_that_have_nothing_to_rewrite(engine: str) -> None:
    windows = [{engine: {"sliding": True}}]
    where = f"export.{engine}.sliding\n  "
    said = refused(recipe(prune(sparsity=0.5), export=windows))
    assert said.startswith(f"{where}magnitude leaves zeros without a pattern")
    assert "`nm: {keep: 6, of: 8}` instead of `sparsity:`, or leave `sliding` out" in said
    for keep, of in ((2, 4), (1, 2), (1, 8), (2, 8)):
        said = refused(recipe(prune(keep, of), export=windows))
        assert said.startswith(f"{where}the weights keep {keep} of {of}, which sparse tensor cores")
        assert said.endswith("leave `sliding` out")
    said = refused(recipe(prune(15, 16), export=windows))
    assert said.startswith(f"{where}the weights keep 15 of 16, and sliding windows rewrite 2N-2")
    for keep, of in ((6, 8), (4, 8), (3, 4), (14, 16)):
        check(recipe(prune(keep, of), export=windows))


def test_zeros_that_windows_would_not_find_any_more() -> None:
    windows = [{"onnx": {"sliding": True}}]
    heal = {"heal": {"method": "lora", "steps": 1, "keep_zeros": False}}
    assert "fills the zeros" in refused(recipe(prune(6, 8), heal, export=windows))
    stages = (prune(6, 8), {"prune": {"method": "minitron", "ffn": 0.25}})
    narrow = arch(intermediate_size=32)
    said = refused(recipe(*stages, export=windows), cut=(arch(), arch(), narrow))
    assert "breaks the groups of its pattern" in said


def test_windows_of_a_model_that_has_the_zeros_itself() -> None:
    """No weight is read for a plan: it says that no stage makes them."""
    asked = recipe({"prune": {"method": "deepest", "remove": 1}}, export=[WINDOWS])
    check(asked)
    said = windows_note(Planned(asked, (arch(), arch()), AMPERE), asked.export[0])
    assert said.endswith("no stage makes a pattern")


ATTENTION = {"include": ["q", "k", "v", "o"]}
MLP = {"include": ["gate", "up", "down"]}


def test_every_sparse_stage_is_judged() -> None:
    """Not the last one alone: each prunes other weights."""
    for first, last in ((prune(4, 8, **MLP), prune(2, 4, **ATTENTION)),
                        (prune(2, 4, **ATTENTION), prune(4, 8, **MLP))):  # fmt: skip
        said = refused(recipe(first, last))
        number = 0 if first["prune"]["nm"]["of"] == 8 else 1
        assert f"the weights that magnitude (stages.{number}) prunes keep 4 of 8" in said
        check(recipe(first, last, export=[WINDOWS]))
        asked = recipe(first, last, export=[WINDOWS])
        note = windows_note(Planned(asked, (arch(),) * 3, AMPERE), asked.export[0])
        assert note == "4 of 8 in windows: at most 1.33x of dense, and 6 of 8 would be as fast"
    said = refused(recipe(prune(sparsity=0.5, **MLP), prune(2, 4, **ATTENTION)))
    assert "magnitude (stages.0) leaves zeros without a pattern" in said
    both = recipe(prune(6, 8, **MLP), prune(4, 6, **ATTENTION), export=[WINDOWS])
    note = windows_note(Planned(both, (arch(),) * 3, AMPERE), both.export[0])
    assert note == ("6 of 8 in windows: at most 1.33x of dense; "
                    "4 of 6 in windows: at most 1.50x of dense")  # fmt: skip
    none = recipe(prune(2, 4, **MLP), prune(15, 16, **ATTENTION), export=[{"onnx": {"sliding": 1}}])
    assert "(stages.0) prunes keep 2 of 4, which sparse tensor cores take" in refused(none)


def test_healing_and_widths_after_the_first_of_two_sparse_stages() -> None:
    heal = {"heal": {"method": "lora", "steps": 1, "keep_zeros": False}}
    said = refused(recipe(prune(2, 4, **MLP), heal, prune(2, 4, **ATTENTION)))
    assert "fills the zeros of magnitude (stages.0)" in said
    cut = (arch(), arch(), arch(intermediate_size=32), arch(intermediate_size=32))
    minitron = {"prune": {"method": "minitron", "ffn": 0.25}}
    said = refused(recipe(prune(2, 4, **MLP), minitron, prune(2, 4, **ATTENTION)), cut=cut)
    assert "put it before magnitude (stages.0)" in said
    odd = arch(intermediate_size=50)
    said = refused(recipe(prune(2, 4, **MLP), prune(2, 4, **ATTENTION)), cut=(odd, odd, odd))
    assert "down_proj.weight has 50 inputs" in said


def test_a_speedup_that_the_better_of_two_patterns_allows() -> None:
    stages = (prune(2, 4, **MLP), prune(6, 8, **ATTENTION))
    check(recipe(*stages, export=[WINDOWS], at_least=1.5))
    said = refused(recipe(*stages, export=[WINDOWS], at_least=2.5))
    assert "is more than 2 of 4 can gain" in said
    said = refused(recipe(*stages, export=["onnx"], at_least=1.2), CPU)
    assert "magnitude (stages.0) and magnitude (stages.1) only put zeros into weights" in said


def test_what_is_pruned_again_is_judged_by_its_last_stage() -> None:
    check(recipe(prune(4, 8), prune(2, 4)))
    check(recipe(prune(4, 8, **MLP), prune(2, 4, **ATTENTION), prune(2, 4, **MLP)))
    assert "(stages.0) prunes keep 4 of 8" in refused(recipe(prune(4, 8), prune(2, 4, **MLP)))
    said = refused(recipe(prune(4, 8), prune(2, 4, layers=[0])))
    assert "(stages.0) prunes keep 4 of 8" in said
    shallow = arch(num_hidden_layers=1)
    drop = {"prune": {"method": "deepest", "remove": 1}}
    cut = (arch(), arch(), shallow, shallow)
    check(recipe(prune(4, 8), drop, prune(2, 4)), cut=cut)
    said = refused(recipe(prune(4, 8), drop, prune(2, 4, layers=[0])), cut=cut)
    assert "(stages.0) prunes keep 4 of 8" in said


def test_zeros_without_a_pattern() -> None:
    ticket = {"prune": {"method": "iterative_magnitude", "sparsity": 0.5}}
    assert "iterative_magnitude leaves zeros" in refused(recipe(ticket))
    said = refused(recipe(prune(sparsity=0.5)))
    assert "magnitude leaves zeros without a pattern" in said
    assert "write `nm: {keep: 2, of: 4}` instead of `sparsity:`" in said


def test_healing_that_fills_zeros() -> None:
    heal = {"heal": {"method": "lora", "steps": 1, "keep_zeros": False}}
    said = refused(recipe(prune(2, 4), heal))
    assert said.startswith("stages.1.heal.keep_zeros\n  is false, so that healing fills the zeros")
    check(recipe(prune(2, 4), {"heal": {"method": "lora", "steps": 1}}))
    check(recipe(heal, prune(2, 4)))


def test_widths_that_are_cut_after_the_zeros() -> None:
    stages = (prune(2, 4), {"prune": {"method": "minitron", "ffn": 0.25}})
    narrow = arch(intermediate_size=32)
    said = refused(recipe(*stages), cut=(arch(), arch(), narrow))
    assert "stages.1.prune: minitron" in said
    assert "put it before magnitude" in said
    check(recipe(*stages, export=[{"onnx": {}}]), cut=(arch(), arch(), narrow))
    shallow = arch(num_hidden_layers=1)
    check(recipe(prune(2, 4), {"prune": {"method": "deepest", "remove": 1}}),
          cut=(arch(), arch(), shallow))  # fmt: skip


def test_inputs_that_are_no_whole_groups() -> None:
    odd = arch(intermediate_size=50)
    said = refused(recipe(prune(2, 4)), cut=(odd, odd))
    assert "model.layers.0.mlp.down_proj.weight has 50 inputs, not a multiple of 4" in said
    assert "cut that width to 32 (a multiple of 32)" in said
    check(recipe(prune(6, 8), export=[WINDOWS]), cut=(odd, odd))


def test_the_note_says_what_windows_gain() -> None:
    def note(keep: int, of: int) -> str:
        asked = recipe(prune(keep, of), export=[WINDOWS])
        return windows_note(Planned(asked, (arch(), arch()), AMPERE), asked.export[0])

    assert note(6, 8) == "6 of 8 in windows: at most 1.33x of dense"
    assert note(4, 6) == "4 of 6 in windows: at most 1.50x of dense"


@pytest.mark.parametrize("machine", [TURING, CPU])
def test_a_gpu_older_than_ampere(machine: Machine) -> None:
    if machine.capability:
        said = refused(recipe(prune(2, 4)), machine)
        assert "compute capability 7.5, and tensor cores skip zeros from 8.0 (Ampere) on" in said
    else:  # what no GPU is there for is the exporter's to say
        check(recipe(prune(2, 4)), machine)
    check(recipe(prune(2, 4), export=[{"tensorrt": {}}]), TURING)


def test_tensorrt_rtx_on_hopper() -> None:
    for export in ({"tensorrt": {"flavor": "rtx"}}, {"onnx": {"provider": "tensorrt_rtx"}}):
        said = refused(recipe(export=[export]), HOPPER)
        assert "compute capability 9, and TensorRT-RTX has no kernels for data-centre GPUs" in said
        check(recipe(export=[export]), AMPERE)
    ahead = {"tensorrt": {"flavor": "rtx", "compute_capability": "sm89"}}
    check(recipe(export=[ahead]), HOPPER)


def test_a_speedup_of_zeros_on_a_cpu() -> None:
    asked = recipe(prune(sparsity=0.5), export=["onnx"], at_least=1.2)
    said = refused(asked, CPU)
    assert said.startswith("verify.speed.at_least: 1.2\n  magnitude only puts zeros into weights")
    assert "0.26 to 0.94 times dense" in said
    assert "remove blocks or widths as well" in said
    drop = {"prune": {"method": "deepest", "remove": 1}}
    both = recipe(drop, prune(sparsity=0.5), export=["onnx"], at_least=1.2)
    less = arch().without((1,))
    check(both, CPU, cut=(arch(), less, less))
    check(recipe(prune(sparsity=0.5), export=["onnx"], at_least=0.9), CPU)
    check(recipe(prune(sparsity=0.5), export=["onnx"]), CPU)


def test_a_speedup_of_zeros_that_the_engine_multiplies_with() -> None:
    said = refused(recipe(prune(2, 4), export=["onnx"], at_least=1.2))
    assert "onnx as written here multiplies with them" in said


def test_a_speedup_above_what_the_pattern_allows() -> None:
    said = refused(recipe(prune(6, 8), export=[WINDOWS], at_least=1.5))
    assert "is more than 6 of 8 can gain: sparse tensor cores allow 1.33x" in said
    check(recipe(prune(6, 8), export=[WINDOWS], at_least=1.2))
    check(recipe(prune(2, 4), at_least=1.5))
    assert "allow 2.00x" in refused(recipe(prune(2, 4), at_least=2.5))


def test_the_plan_applies_the_rules(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    text = yaml.safe_dump({
        "recipe": 1, "stages": [prune(sparsity=0.5)], "export": ["onnx"],
        "verify": {"speed": {"at_least": 1.3}},
    })  # fmt: skip
    options = Options(tmp_path / "out", tmp_path / "store", CPU)
    with pytest.raises(PlanError, match="no runtime is faster for them on a CPU"):
        plan(Recipe.parse(text, root=corpus), str(tiny_llama), options)


def test_the_plan_has_the_twin_and_the_grid(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    body: dict[str, Any] = {
        "recipe": 1, "stages": [prune(4, 8)], "export": [{"onnx": {"sliding": True}}],
        "verify": {"speed": {"sweep": {"prompt": [1, 16], "minutes": 60}}},
    }  # fmt: skip
    options = Options(tmp_path / "out", tmp_path / "store", CPU)
    found = plan(Recipe.parse(yaml.safe_dump(body), root=corpus), str(tiny_llama), options)
    exports = [stage for stage in found.stages if stage.kind == "export"]
    assert exports[0].note == "the dense model, to compare with"
    assert (
        exports[1].note == "4 of 8 in windows: at most 1.33x of dense, and 6 of 8 would be as fast"
    )
    assert exports[2].note == "sparsity off, to compare with"
    assert exports[-1].parameters["sliding"] is False
    (speed,) = [stage for stage in found.stages if stage.name == "speed"]
    assert speed.seconds >= 3600
    body["verify"]["speed"]["sweep"]["prompt"] = [100_000]
    with pytest.raises(PlanError, match=r"sweep.prompt\n  is 100004, but the model has"):
        plan(Recipe.parse(yaml.safe_dump(body), root=corpus), str(tiny_llama), options)


PACKED = {"ort_genai": {"precision": "int8", "block_size": 128, "packed": "sparse"}}


def test_packed_weights_on_a_cpu_are_measured_up_to_what_bytes_allow() -> None:
    asked = recipe(prune(sparsity=0.5), export=[PACKED], at_least=1.3)
    for machine in (CPU, AMPERE):
        check(asked, machine)
    said = refused(recipe(prune(sparsity=0.5), export=[PACKED], at_least=1.7), CPU)
    assert "50% zeros can gain in int8: packed, their matrices have 0.64 of the bytes" in said
    assert "allows 1.57x" in said
    check(recipe(prune(sparsity=0.7), export=[PACKED], at_least=1.7), CPU)
    assert "write `packed: sparse`" in refused(
        recipe(prune(sparsity=0.5), export=["ort_genai"], at_least=1.2), CPU
    )


def test_packed_weights_need_the_zeros_but_no_pattern() -> None:
    heal = {"heal": {"method": "lora", "keep_zeros": False}}
    said = refused(recipe(prune(sparsity=0.5), heal, export=[PACKED]), CPU)
    assert "so that healing fills the zeros of magnitude" in said
    less = arch(intermediate_size=32)
    check(recipe(prune(sparsity=0.5), export=[PACKED]), CPU, cut=(arch(), less))


def test_the_plan_says_what_zeros_gain_here() -> None:
    (export,) = recipe(export=[PACKED]).export
    planned = Planned(recipe(prune(3, 4), export=[PACKED]), (arch(),) * 2, CPU)
    note = packed_note(planned, export)
    assert note.startswith("25% zeros of magnitude: at most 1.14x of its zeros stored, by bytes")
    assert "here about" in note
    bare = Planned(recipe(export=[PACKED]), (arch(),), CPU)
    assert "no stage makes zeros" in packed_note(bare, export)
    (other,) = recipe(export=["ort_genai"]).export
    assert packed_note(planned, other) == ""
