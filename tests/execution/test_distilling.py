"""Recipes that distil: from plan to artifacts, with the teacher and its answers in the store."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prune_export.checkpoint import Checkpoint
from prune_export.errors import PlanError, RecipeError
from prune_export.execution import Options, plan, run
from prune_export.execution.context import RunContext
from prune_export.execution.inputs import base_from_directory
from prune_export.execution.stages import run_heal, run_stage, survivors
from prune_export.heal.full import Full
from prune_export.machine import Machine
from prune_export.methods.depth.deepest import Deepest
from prune_export.methods.depth.every_other import EveryOther
from prune_export.progress import Silent
from prune_export.recipe import Recipe, Stage
from prune_export.recipe.stages import checker
from prune_export.store import Store
from prune_export.surgery import Drop, rewrite
from prune_export.training.losses.objective import Distill, Distilled, Hidden
from tests.execution.test_run import hashes
from tests.heal.conftest import windows

pytestmark = pytest.mark.usefixtures("measured_here")

RECIPE = """\
recipe: 1
data:
  healing: {files: [healing.jsonl], samples: 16, length: 32}
stages:
  - prune: {method: deepest, remove: 2}
  - heal: {method: METHOD, steps: 3, batch: 2, learning_rate: 1.0e-3, objective: OBJECTIVE}
verify: {generation: false}
"""
SEARCH = """\
recipe: 1
data:
  healing: {files: [healing.jsonl], samples: 16, length: 32}
  evaluation: {files: [evaluation.txt], samples: 2, length: 32}
stages:
  - search:
      target: {parameters: 0.7, tolerance: 0.2}
      candidates:
        - prune: {method: deepest, sparsity: to_target}
        - prune: {method: every_other, sparsity: to_target}
      validation: evaluation
      rungs: 2
      heal: {method: full, steps: 2, batch: 2, objective: {distill: {cache: 8}}}
verify: {generation: false}
"""


def recipe(root: Path, objective: str, method: str = "full") -> Recipe:
    text = RECIPE.replace("OBJECTIVE", objective).replace("METHOD", method)
    return Recipe.parse(text, root=root)


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(tmp_path / "out", tmp_path / "store", Machine.detect(device="cpu", threads=1))


def made(options: Options, kind: str) -> list[str]:
    folders = (
        (options.store / "artifacts").iterdir() if (options.store / "artifacts").exists() else ()
    )
    found = [*folders, *options.store.iterdir()]
    return sorted(one.name for one in found if one.name.startswith(f"{kind}-"))


@pytest.mark.slow
def test_a_recipe_learns_from_the_model_that_it_starts_from(
    tiny_llama: Path, corpus: Path, options: Options
) -> None:
    one = recipe(corpus, "{distill: {cache: 8}}")
    notes = {stage.kind: stage.note for stage in plan(one, str(tiny_llama), options).stages}
    assert "teacher's answers kept: 8 tokens" in notes["heal"]
    result = run(one, str(tiny_llama), options)
    report = json.loads((result.out / "report.json").read_text())
    training = report["stages"][1]["log"]["training"]
    assert training["kept"] == 8
    assert report["stages"][1]["log"]["teacher"]["id"] == report["base"]["id"]
    assert training["objective"]["distill"]["divergence"] == "forward_kl"
    assert len(made(options, "answers")) == 1
    before = hashes(result.out, "*.safetensors")
    run(replace(one), str(tiny_llama), replace(options, force=frozenset({"heal"})))
    assert hashes(result.out, "*.safetensors") == before


def test_the_plan_says_which_and_what_it_costs(
    tiny_llama: Path, corpus: Path, options: Options
) -> None:
    def note(objective: str) -> str:
        planned = plan(recipe(corpus, objective), str(tiny_llama), options)
        return next(stage.note for stage in planned.stages if stage.kind == "heal")

    assert note("next_token") == "up to 16 x 32 tokens"
    assert "teacher beside it" in note("distill")  # 6 of 16 windows are seen
    assert "bytes a position" in note("{distill: {cache: 8}}")
    assert not options.store.exists()


def another(tiny_llama: Path, root: Path, name: str) -> Path:
    """A teacher below the data root: the first four blocks."""
    opened = Checkpoint.open(tiny_llama)
    rewrite(opened, opened.arch(), [Drop((4, 5))], root / name, ram_bytes=1 << 30)
    return root / name


def test_a_named_teacher_must_have_the_same_tokens(
    tiny_llama: Path, corpus: Path, tmp_path: Path, options: Options
) -> None:
    root = tmp_path / "root"
    shutil.copytree(corpus, root)
    teacher = another(tiny_llama, root, "teacher")
    named = recipe(root, "{distill: {teacher: teacher, cache: live}}")
    plan(named, str(tiny_llama), options).check()
    # The same tokens in a file of other bytes.
    file = teacher / "tokenizer.json"
    known = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(known, indent=4), encoding="utf-8")
    plan(named, str(tiny_llama), options).check()
    vocabulary = known["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(known), encoding="utf-8")
    with pytest.raises(PlanError, match="another tokenizer than the student: 4 tokens or numbers"):
        plan(named, str(tiny_llama), options)
    config = json.loads((teacher / "config.json").read_text())
    other = recipe(root, "{distill: {teacher: small}}")
    tiny = another(tiny_llama, root, "small")
    (tiny / "config.json").write_text(
        json.dumps(config | {"vocab_size": config["vocab_size"] - 1}), encoding="utf-8"
    )
    for weights in tiny.glob("*.safetensors"):
        _shorten(weights)
    with pytest.raises(PlanError, match="tokens and the student"):
        plan(other, str(tiny_llama), options)


def _shorten(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("where", ["../elsewhere", "/etc", "nothing"])
def test_a_named_teacher_lies_below_the_data_root(
    where: str, tiny_llama: Path, corpus: Path, options: Options
) -> None:
    with pytest.raises(PlanError):
        plan(recipe(corpus, f"{{distill: {{teacher: {where}}}}}"), str(tiny_llama), options)


def test_bad_keys_are_shown_with_their_line(corpus: Path) -> None:
    for objective, says in (
        ("kl", "'next_token' or 'distill'"),
        ("{distill: {temprature: 2}}", "`temprature` is not a key here"),
        ("{distil: {}}", "`distil` is not a key here"),
    ):
        with pytest.raises(RecipeError, match=says) as raised:
            recipe(corpus, objective)
        assert ":6" in raised.value.where


def test_the_teacher_is_part_of_what_an_artifact_is(tiny_llama: Path, tmp_path: Path) -> None:
    """Its answers are kept once for all that learn from them."""
    context = RunContext(Store(tmp_path / "store"), Machine("cpu", 4 << 30, 0, 1), Silent())
    base = base_from_directory(context, "base", tiny_llama, None)
    vocabulary = Checkpoint.open(tiny_llama).arch().sizes["vocab"]
    tokens = windows(samples=4, vocab=min(64, vocabulary))
    kept, options = (
        {"distill": {"cache": 8}},
        Options(tmp_path, tmp_path / "store", context.machine),
    )
    ids = set()
    for teacher, seed in ((None, 0), (base, 0), (base, 1), (replace(base, id="model-other"), 0)):
        stage = _stage(steps=1, batch=1, seed=seed, objective=kept if teacher else "next_token")
        found = run_heal(context, stage, base.path, base.id, (None, tokens), teacher)  # type: ignore[arg-type]
        ids.add(found.id)
        assert len(made(options, "answers")) == (0 if len(ids) == 1 else 1 + (len(ids) == 4))
    assert len(ids) == 4


def _stage(**keys: Any) -> Stage:
    return Stage("heal", "full", checker(Full).validate_python(keys), "healing")


@pytest.mark.slow
def test_candidates_of_a_search_share_a_teachers_answers(
    tiny_llama: Path, corpus: Path, options: Options
) -> None:
    result = run(Recipe.parse(SEARCH, root=corpus), str(tiny_llama), options)
    report = json.loads((result.out / "report.json").read_text())
    assert len(report["searches"][0]["candidates"]) == 2
    assert len(made(options, "heal")) >= 2
    assert len(made(options, "answers")) == 1
    assert (
        torch.tensor([one["healed"] for one in report["searches"][0]["candidates"]])
        .isfinite()
        .all()
    )


def test_the_blocks_that_survived_are_known_through_several_stages(
    tiny_llama: Path, options: Options
) -> None:
    context = RunContext(Store(options.store), options.machine, Silent())
    base = base_from_directory(context, str(tiny_llama), tiny_llama, None)
    first = run_stage(
        context, Stage("prune", "deepest", Deepest(remove=1), ""), base.path, base.id, None
    )
    second = run_stage(
        context, Stage("prune", "every_other", EveryOther(remove=2), ""), first.path, first.id, None
    )
    kept = [block for block in range(6) if block not in first.record["log"]["dropped"]]
    kept = [kept[place] for place in second.record["log"]["kept"]]
    assert len(kept) == 3
    assert survivors(context, second.id, base) == tuple(kept)
    assert survivors(context, base.id, base) == (0, 1, 2, 3, 4, 5)
    other = replace(base, id="model-other")
    assert survivors(context, second.id, other) is None
    healer = Full(
        steps=2, batch=2, compute_dtype="float32",
        objective=Distilled(distill=Distill(hidden=Hidden())),
    )  # fmt: skip
    tokens = windows(samples=8, length=16)
    data = replace(first, id="data"), tokens
    healed = run_stage(context, Stage("heal", "full", healer, "healing"), second.path, second.id,
                       data, base)  # fmt: skip
    losses = healed.record["log"]["held_out"]["loss"]
    assert losses.keys() == {"before", "trained", "merged", "teacher"}
    assert survivors(context, healed.id, base) == tuple(kept)
