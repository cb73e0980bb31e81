"""Precision is a candidate: the dense model on coarser engines competes with pruned ones."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prune_export.checkpoint import Checkpoint
from prune_export.checkpoint.grid_file import Grids
from prune_export.checkpoint.loading import load_model
from prune_export.errors import RecipeError, StageError
from prune_export.execution import Options, plan, run
from prune_export.execution.choosing import _best
from prune_export.execution.points import Point, alternative_of, to_prune
from prune_export.exporters.onnx import Onnx
from prune_export.machine import Machine
from prune_export.recipe import EngineOption, Recipe, Search, engines_of
from prune_export.recipe.search import Target

CHOICE = """\
recipe: 1
data:
  calibration: {files: [calibration.txt], samples: 4, length: 32}
  healing: {files: [healing.jsonl], samples: 16, length: 32}
  ranking: {files: [evaluation.txt], samples: 4, length: 32}
stages:
  - search:
      target: {parameters: %s, tolerance: 0.15}
      candidates:
        - prune: {method: deepest, sparsity: to_target}
      engines:
        - onnx: {precision: fp32}
        - onnx: {precision: int8}
        - ort_genai: {precision: int4}
      validation: ranking
      close: 0.1
  - heal: {method: lora, rank: 2, steps: 1, batch: 1}
verify: {generation: false, parity: false}
"""


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(tmp_path / "out", tmp_path / "store", Machine.detect(device="cpu", threads=1))


@pytest.fixture(scope="module")
def wide_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose weights, not its graph, are most of an engine."""
    folder = tmp_path_factory.mktemp("wide")
    config = LlamaConfig.from_pretrained(
        tiny_llama, hidden_size=128, intermediate_size=512, num_attention_heads=16,
        num_key_value_heads=8, head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_llama / name).read_bytes())
    return folder


def point(name: str, perplexity: float, share: float, *, pruned: bool = False) -> Any:
    option: Any = SimpleNamespace(label=name)
    row: Any = SimpleNamespace(candidate=SimpleNamespace(label="cut")) if pruned else None
    return Point(option, None, perplexity, round(1000 / share), share, row)  # type: ignore[arg-type]


def share(one: Point) -> float:
    return one.speedup or 0.0


def reaches(one: Point) -> bool:
    return share(one) >= 0.95


SEARCH = Search(Target(speedup=1.5), "ranking")


class TestWhatIsPruned:
    def test_an_engine_beside_a_faster_one_of_the_same_quality_is_not(self) -> None:
        full, half, quarter = point("32", 17.57, 0.4), point("8", 17.62, 0.8), point("4", 24, 1.3)
        assert to_prune([full, half, quarter], share, reaches, SEARCH) == [half]

    def test_a_faster_one_of_worse_quality_leaves_it(self) -> None:
        full, quarter = point("32", 17.57, 0.7), point("4", 24, 1.3)
        assert to_prune([full, quarter], share, reaches, SEARCH) == [full]

    def test_where_dense_suffices_the_first_is_the_alternative_if_asked(self) -> None:
        full, half = point("32", 17.57, 0.7), point("8", 17.62, 1.4)
        assert to_prune([full, half], share, reaches, SEARCH) == [full]
        lean = Search(Target(speedup=1.5), "ranking", alternative=False)
        assert to_prune([full, half], share, reaches, lean) == []

    def test_the_alternative_is_the_best_of_the_other_kind(self) -> None:
        dense, cut, worse = (
            point("8", 17.62, 1.4), point("32", 51.9, 1.0, pruned=True),
            point("8", 60.0, 1.5, pruned=True),
        )  # fmt: skip
        said = alternative_of([dense, cut, worse], dense, reaches)
        assert said.startswith("The alternative was cut, 32: perplexity 51.90, 1.00x as fast")
        assert "chosen has perplexity 17.62" in said
        assert alternative_of([dense], dense, reaches).startswith("No pruned model")


def test_engines_of_one_label_name_what_differs() -> None:
    engines: Any = [
        {"onnx": {"precision": "fp32"}},
        {"onnx": {"precision": "int4", "block_size": 32}},
        {"onnx": {"precision": "int4", "block_size": 128}},
        {"onnx": {"precision": "int4"}, "quantize": {"method": "gptq"}},
    ]
    found = engines_of(Search(Target(speedup=1.5), "ranking", engines=tuple(engines)))
    assert [one.label for one in found] == [
        "fp32 on onnx", "int4 on onnx (block_size 32)", "int4 on onnx (block_size 128)",
        "int4 by gptq on onnx",
    ]  # fmt: skip


class TestWhatIsChosen:
    def choice(self, *points: Point, notes: tuple[str, ...] = ()) -> Any:
        pace = SimpleNamespace(notes=list(notes))
        said: list[str] = []
        return SimpleNamespace(
            points=list(points), reaches=reaches, share=share, search=SEARCH, said=said,
            context=SimpleNamespace(pace=pace, say_late=said.append),
        )  # fmt: skip

    def test_of_dense_ones_too_close_to_tell_the_fastest(self) -> None:
        slow, fast = point("8 on onnx", 17.60, 1.2), point("8 on genai", 17.62, 1.4)
        coarse = point("4", 18.9, 2.0)
        assert _best(self.choice(slow, fast, coarse), []) is fast

    def test_a_dense_one_before_a_pruned_one_that_is_as_good(self) -> None:
        dense, cut = point("8", 17.62, 1.0), point("8", 17.60, 1.5, pruned=True)
        assert _best(self.choice(dense, cut), []) is dense

    def test_what_is_nearest_where_time_was_short(self) -> None:
        full, half = point("32", 17.57, 0.4), point("8", 17.62, 0.8)
        with pytest.raises(StageError, match="nothing reaches it"):
            _best(self.choice(full, half), [])
        late = self.choice(full, half, notes=("some were left out",))
        assert _best(late, []) is half
        assert "nothing was found in this time" in late.said[0]


@pytest.mark.slow
@pytest.mark.usefixtures("measured_here", "genai_in_this_process")
def test_a_dense_int8_model_is_chosen_over_a_pruned_one(
    wide_llama: Path, corpus: Path, options: Options
) -> None:
    recipe = Recipe.parse(CHOICE % 0.75, root=corpus)
    assert plan(recipe, str(wide_llama), options).stages[0].kind == "search"
    result = run(recipe, str(wide_llama), options)
    report = json.loads((result.out / "report.json").read_text())
    (table,) = report["searches"]
    points = {one["label"]: one for one in table["points"]}
    assert table["chosen"] == "the dense model, int8 on onnx"
    assert points["the dense model, fp32 on onnx"]["reaches"] is False
    assert points["deepest, fp32 on onnx"]["reaches"] is True
    assert points["deepest, int8 on onnx"]["bytes"] < points[table["chosen"]]["bytes"]
    (refused,) = [one for one in table["candidates"] if "int4 on ort_genai" in one["label"]][:1]
    assert "heads in units of 16" in refused["note"]
    steps = {one["step"]: one for one in report["estimates"]}
    assert list(steps) == ["import", "data", "search", "export: onnx", "verify"]
    assert all(one["planned_seconds"] > 0 for one in [*steps.values()][2:])
    assert steps["search"]["disk_bytes"] > points[table["chosen"]]["bytes"]
    assert steps["export: onnx"]["reused"] == 1
    assert report["stages"] == []  # nothing is healed, as nothing was pruned
    assert [one["parameters"]["precision"] for one in report["exports"]] == ["int8"]
    for name in ("model.safetensors", "tokenizer.json", "onnx/model.onnx"):
        assert (result.out / name).is_file()
    card = (result.out / "README.md").read_text()
    assert "the dense model, int8 on onnx. The alternative was deepest" in card
    assert "Chosen: the dense model, int8 on onnx" in (result.out / "report.html").read_text()
    # What no coarser precision reaches is pruned on the engine that needs the least of it.
    small = Recipe.parse(CHOICE % 0.2, root=corpus)
    found = run(small, str(wide_llama), options).report
    assert found["searches"][0]["chosen"].startswith("deepest, int8 on onnx")
    assert [stage["name"] for stage in found["stages"]] == ["deepest", "lora"]
    with pytest.raises(StageError, match="nothing reaches it"):
        run(Recipe.parse(CHOICE % 0.01, root=corpus), str(wide_llama), options)


def test_engines_are_checked_as_exports_are(corpus: Path) -> None:
    with pytest.raises(RecipeError, match="precision"):
        Recipe.parse((CHOICE % 0.75).replace("precision: int8", "precision: int3"), root=corpus)
    with pytest.raises(RecipeError, match="is unknown here"):
        Recipe.parse((CHOICE % 0.75).replace("ort_genai", "ort_gen"), root=corpus)
    (stage, _) = Recipe.parse(CHOICE % 0.75, root=corpus).stages
    options = list(engines_of(stage.entry))
    assert all(isinstance(one, EngineOption) for one in options)
    assert [one.label for one in options] == ["fp32 on onnx", "int8 on onnx", "int4 on ort_genai"]


@pytest.mark.slow
@pytest.mark.usefixtures("measured_here")
def test_a_latency_is_reached_by_a_dense_engine(
    tiny_llama: Path, corpus: Path, options: Options
) -> None:
    """A second for a step is enough for any engine of the tiny model: nothing is pruned."""
    text = (CHOICE % 0.5).replace("parameters: 0.5", "latency_ms: 1000")
    text = text.replace("        - ort_genai: {precision: int4}\n", "")
    recipe = Recipe.parse(text, root=corpus)
    result = run(recipe, str(tiny_llama), options)
    (table,) = json.loads((result.out / "report.json").read_text())["searches"]
    assert table["target"]["latency_ms"] == 1000
    assert table["chosen"].startswith("the dense model, ")
    assert all(one["reaches"] for one in table["points"])
    assert len(table["points"]) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("measured_here")
def test_a_quantize_stage_of_an_engine_is_carried_out(
    wide_llama: Path, corpus: Path, options: Options
) -> None:
    """The chosen engine holds the codes of GPTQ, and so does the checkpoint beside it."""
    text = (CHOICE % 0.6).replace("close: 0.1", "close: 0.1\n      alternative: false")
    text = text.replace(
        "onnx: {precision: int8}", "{onnx: {precision: int4}, quantize: {method: gptq}}"
    )
    text = text.replace("        - ort_genai: {precision: int4}\n", "")
    recipe = Recipe.parse(text, root=corpus)
    result = run(recipe, str(wide_llama), options)
    report = json.loads((result.out / "report.json").read_text())
    (table,) = report["searches"]
    assert table["chosen"] == "the dense model, int4 by gptq on onnx"
    assert [stage["kind"] for stage in report["stages"]] == ["quantize"]
    quantized = Checkpoint.open(result.out)
    assert Grids.of(quantized) is not None
    with Onnx(precision="int4").open(result.out / "onnx", options.machine) as runner:
        ids = np.arange(3, 19)[None]
        logits, _ = runner.step(ids)
    reference = load_model(result.out, dtype=torch.float32).eval()
    with torch.inference_mode():
        wanted = reference(torch.from_numpy(ids)).logits.numpy()
    # Activations are rounded to 8 bits in the engine; its weights are the checkpoint's.
    assert np.abs(logits - wanted).max() < 0.05 * wanted.std()
