"""A whole run on a tiny model: what lands in the result, that it is kept, that it resumes."""

from __future__ import annotations

import fcntl
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prune_export.errors import PlanError
from prune_export.execution import Options, plan, run
from prune_export.machine import Machine
from prune_export.recipe import Recipe

RECIPE = """\
recipe: 1
description: Drop two of six blocks, heal a little, export.
data:
  calibration: {files: [calibration.txt], samples: 4, length: 32}
  healing: {files: [healing.jsonl], samples: 16, length: 32}
  evaluation: {files: [evaluation.txt], samples: 4, length: 64}
stages:
  - prune: {method: angular_distance, remove: 2}
  - heal: {method: lora, rank: 2, steps: 3, batch: 2, learning_rate: 1.0e-3}
export:
  - onnx: {precision: fp32}
verify:
  quality: {perplexity: evaluation}
  speed: {workloads: [{batch: 1, prompt: 8, new: 4}], minutes: 0.1}
"""


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(tmp_path / "out", tmp_path / "store", Machine.detect(device="cpu", threads=1))


def hashes(folder: Path, *patterns: str) -> dict[str, str]:
    found = {}
    for pattern in patterns:
        for file in sorted(folder.glob(pattern)):
            found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


STABLE = ("*.safetensors", "config.json", "tokenizer*", "prune_recipe*", "onnx/*")


@pytest.mark.slow
def test_a_whole_run(tiny_llama: Path, corpus: Path, options: Options) -> None:
    recipe = Recipe.parse(RECIPE, root=corpus)
    result = run(recipe, str(tiny_llama), options)
    out = result.out
    for name in ("config.json", "model.safetensors", "tokenizer.json", "prune_recipe.yaml",
                 "prune_recipe.lock.json", "report.json", "report.html", "README.md",
                 "verify.json", "onnx/model.onnx", "onnx/tokenizer.json"):  # fmt: skip
        assert (out / name).is_file(), name
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 4
    report = json.loads((out / "report.json").read_text())
    assert report["result"]["layers"] == 4
    assert len(report["stages"][0]["log"]["dropped"]) == 2
    assert len(report["stages"][1]["log"]["loss"]) == 3
    found = result.verification
    assert found.reload.ok
    assert all(parity.ok for parity in found.parity)
    assert [one.name for one in found.perplexity] == ["dense", "pruned", "healed", "onnx"]
    assert found.perplexity[2].value == pytest.approx(found.perplexity[3].value, rel=1e-3)
    assert {speed.phase for speed in found.speed} == {"prefill", "decode"}
    assert not result.failed
    # The published recipe is enough to do it all again, and everything is already there.
    published = Recipe.load(out / "prune_recipe.yaml", data_root=corpus)
    elsewhere = replace(options, out=options.out.with_name("again"))
    again = run(published, str(tiny_llama), elsewhere)
    assert hashes(again.out, *STABLE) == hashes(out, *STABLE)


@pytest.mark.usefixtures("measured_here")
@pytest.mark.slow
def test_another_store_ends_in_the_same_bytes(
    tiny_llama: Path, corpus: Path, options: Options
) -> None:
    text = RECIPE[: RECIPE.index("verify:")] + "verify: {parity: false, generation: false}\n"
    recipe = Recipe.parse(text, root=corpus)
    first = run(recipe, str(tiny_llama), options)
    fresh = replace(options, out=options.out.with_name("fresh"), store=options.store.with_name("s"))
    assert hashes(run(recipe, str(tiny_llama), fresh).out, *STABLE) == hashes(first.out, *STABLE)


@pytest.mark.usefixtures("measured_here")
def test_one_run_at_a_time_puts_a_result_together(
    tiny_llama: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command given twice, with the first one still at work."""
    held = []

    def written(*_: Any) -> None:
        with (options.out.parent / ".out.lock").open("a") as lock:
            with pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held.append(lock.name)

    monkeypatch.setattr("prune_export.report.write_report", written)
    text = "recipe: 1\nstages: [{prune: {method: deepest, remove: 1}}]\n"
    run(Recipe.parse(text + "verify: {generation: false}\n"), str(tiny_llama), options)
    assert held
    assert {path.name for path in options.out.parent.iterdir()} == {"out", "store"}


@pytest.mark.usefixtures("measured_here")
def test_evaluation_text_is_not_trained_on(
    tiny_llama: Path, tmp_path: Path, corpus: Path, options: Options
) -> None:
    root = tmp_path / "shared"
    root.mkdir()
    lines = (corpus / "healing.jsonl").read_text().splitlines()
    (root / "healing.jsonl").write_text("\n".join(lines))
    (root / "evaluation.jsonl").write_text("\n".join(lines[:20]))
    recipe = Recipe.parse(
        "recipe: 1\n"
        "data:\n"
        "  evaluation: {files: [evaluation.jsonl], length: 32}\n"
        "  calibration: {files: [healing.jsonl], length: 32}\n"
        "stages: [{prune: {method: block_influence, remove: 1}}]\n"
        "verify: {quality: {perplexity: evaluation}, generation: false}\n",
        root=root,
    )
    report = run(recipe, str(tiny_llama), options).report
    assert report["data"]["calibration"]["documents_excluded"] == 20


def test_a_foreign_directory_is_not_touched(
    tiny_llama: Path, corpus: Path, options: Options
) -> None:
    options.out.mkdir()
    (options.out / "thesis.tex").write_text("years of work")
    with pytest.raises(PlanError, match="not written by this tool"):
        run(Recipe.parse(RECIPE, root=corpus), str(tiny_llama), options)
    assert (options.out / "thesis.tex").read_text() == "years of work"
    assert not options.store.exists()


def test_a_plan_reads_only_headers_and_writes_nothing(
    tiny_llama: Path, corpus: Path, options: Options
) -> None:
    planned = plan(Recipe.parse(RECIPE, root=corpus), str(tiny_llama), options)
    prune = next(stage for stage in planned.stages if stage.kind == "prune")
    assert (prune.before.layers, prune.after.layers) == (6, 4)
    assert planned.peak_ram_bytes > 0
    assert planned.seconds > 0
    assert not options.out.exists()
    assert not options.store.exists()


def refused(recipe: str, corpus: Path, model: Path, options: Options) -> PlanError:
    with pytest.raises(PlanError) as caught:
        run(Recipe.parse(recipe, root=corpus), str(model), options)
    assert not options.out.exists()
    assert not list(options.store.glob("*-*"))
    return caught.value


def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(
    tiny_llama: Path, corpus: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = options.out.with_name("file")
    file.write_text("no directory")
    below = refused(RECIPE, corpus, tiny_llama, replace(options, out=file / "out"))
    assert "is a file" in below.problem
    assert "--out" in below.fix
    below = refused(RECIPE, corpus, tiny_llama, replace(options, store=file / "store"))
    assert "--store" in below.fix
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "may not be written" in refused(RECIPE, corpus, tiny_llama, options).problem


def test_what_cannot_work_is_refused_before_anything_is_written(
    tiny_llama: Path, corpus: Path, options: Options
) -> None:
    too_long = refused(RECIPE.replace("length: 32", "length: 512"), corpus, tiny_llama, options)
    assert "256 positions" in too_long.problem
    too_many = refused(RECIPE.replace("remove: 2", "remove: 6"), corpus, tiny_llama, options)
    assert "stages.0.prune" in too_many.where
    absent = refused(RECIPE.replace("calibration.txt", "no.txt"), corpus, tiny_llama, options)
    assert "no.txt" in absent.where + absent.problem
    leaving = refused(RECIPE.replace("healing.jsonl", "../x.jsonl"), corpus, tiny_llama, options)
    assert "leaves" in leaving.problem
    small = replace(options, ram_limit=100 << 20)
    assert "memory" in refused(RECIPE, corpus, tiny_llama, small).problem
    nowhere = refused(RECIPE, corpus, corpus / "nothing-here", options)
    assert "nothing-here" in str(nowhere)


def test_a_config_alone_can_be_planned(tmp_path: Path, corpus: Path, options: Options) -> None:
    """Llama-3.1-70B: its shapes are known, and what this machine lacks is said, not hidden."""
    folder = tmp_path / "llama-70b"
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "hidden_act": "silu",
        "hidden_size": 8192, "intermediate_size": 28672, "max_position_embeddings": 131072,
        "mlp_bias": False, "model_type": "llama", "num_attention_heads": 64,
        "num_hidden_layers": 80, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    planned = plan(Recipe.parse(RECIPE, root=corpus), str(folder), options)
    assert planned.stages[0].before.parameters == 70_553_706_496
    assert planned.stages[0].before.bytes == 2 * 70_553_706_496
    assert planned.stages[0].after.layers == 78
    assert planned.lacking
    with pytest.raises(PlanError, match=r"memory|disk"):
        planned.check()
    assert json.dumps(planned.to_json())


SEARCH = """\
recipe: 1
description: Whatever is best at this size.
data:
  calibration: {files: [calibration.txt], samples: 4, length: 32}
  healing: {files: [healing.jsonl], samples: 16, length: 32}
  evaluation: {files: [evaluation.txt], samples: 4, length: 64}
stages:
  - search:
      target: {parameters: 0.7, tolerance: 0.2}
      candidates:
        - prune: {method: angular_distance, sparsity: to_target}
        - - prune: {method: block_influence, remove: 1}
          - prune: {method: deepest, sparsity: to_target}
        - prune: {method: perplexity, sparsity: to_target, protect_first: 3, protect_last: 2}
      validation: evaluation
      heal: {method: lora, rank: 2, steps: 2, batch: 2, learning_rate: 1.0e-3}
  - heal: {method: lora, rank: 2, steps: 3, batch: 2, learning_rate: 1.0e-3}
verify:
  generation: false
  quality: {perplexity: evaluation}
"""


@pytest.mark.usefixtures("measured_here")
@pytest.mark.slow
def test_a_search_takes_the_best_candidate_and_tells_of_all(
    tiny_llama: Path, corpus: Path, options: Options
) -> None:
    recipe = Recipe.parse(SEARCH, root=corpus)
    planned = plan(recipe, str(tiny_llama), options)
    assert planned.stages[0].kind == "search"
    assert planned.stages[0].after.layers == 4
    result = run(recipe, str(tiny_llama), options)
    report = json.loads((result.out / "report.json").read_text())
    (table,) = report["searches"]
    ranked = [one for one in table["candidates"] if one.get("pruned")]
    assert [one["note"] for one in ranked].count("chosen") == 1
    assert ranked[0]["healed"] == min(one["healed"] for one in ranked if one["healed"])
    (refused,) = [one for one in table["candidates"] if not one.get("pruned")]
    assert refused["label"] == "perplexity"
    assert "comes only within +22.1%" in refused["note"]
    chosen = [stage["method"] for stage in ranked[0]["stages"]]
    assert [stage["name"] for stage in report["stages"]] == [*chosen, "lora"]
    assert report["result"]["layers"] == 4
    assert "to_target" in (result.out / "prune_recipe.yaml").read_text()
    html = (result.out / "report.html").read_text()
    assert "Search: the best of 3 ways to 70% of the parameters" in html
    assert (result.out / "figures" / "search.png").is_file()
    again = replace(options, out=options.out.with_name("again"))
    run(Recipe.load(result.out / "prune_recipe.yaml", data_root=corpus), str(tiny_llama), again)
    assert hashes(again.out, *STABLE) == hashes(result.out, *STABLE)


@pytest.mark.usefixtures("measured_here")
@pytest.mark.slow
def test_a_model_type_of_ours_goes_all_the_way(
    tiny_llama: Path, corpus: Path, options: Options
) -> None:
    """Its code comes along, healing and export know it, and the card says what it needs."""
    text = RECIPE.replace(
        "{method: angular_distance, remove: 2}",
        "{method: slicegpt, sparsity: 0.25, rotation: per_junction}",
    )
    text = text[: text.index("verify:")]  # the run above times; here engines are right
    result = run(Recipe.parse(text, root=corpus), str(tiny_llama), options)
    said = json.loads((result.out / "config.json").read_text())
    assert (said["model_type"], said["hidden_size"]) == ("sliced_llama", 24)
    assert (result.out / "modeling_sliced.py").is_file()
    assert result.verification.reload.own_code
    assert all(parity.ok for parity in result.verification.parity)
    assert "trust_remote_code=True" in (result.out / "README.md").read_text()
    assert not result.failed
