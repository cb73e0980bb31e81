"""A plan refuses data that hold too little, and reads no more of them than it takes to see."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerFast

from prune_export.calibrate import TokenSet, refuse_short, token_set
from prune_export.errors import PlanError
from prune_export.execution import Options, plan, run
from prune_export.machine import Machine
from prune_export.planning import sets_of
from prune_export.recipe import LocalText, Recipe
from prune_export.verify import Engine, measure_generation

PRUNE = {"prune": {"method": "block_influence", "remove": 1}}
HEAL = {"heal": {"method": "lora", "rank": 2, "steps": 1, "batch": 1}}


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(tmp_path / "out", tmp_path / "store", Machine.detect(device="cpu", threads=1))


def recipe(root: Path, *stages: Any, judge: Any = None, **sources: Any) -> Recipe:
    body: dict[str, Any] = {"recipe": 1, "data": sources, "stages": list(stages)}
    if judge:
        body["data"]["judge"] = judge
        body["verify"] = {"quality": {"perplexity": "judge"}}
    return Recipe.parse(yaml.safe_dump(body), root=root)


def text(*files: str, samples: int | None = 4, **keys: Any) -> Any:
    return {"files": list(files), "samples": samples, "length": 32, **keys}


def local(*files: str, **keys: Any) -> LocalText:
    return LocalText(files=files, **{"length": 32, "packing": "packed", **keys})


def refused(asked: Recipe, model: Path, options: Options) -> str:
    with pytest.raises(PlanError) as planned:
        plan(asked, str(model), options)
    with pytest.raises(PlanError, match="holds"):
        run(asked, str(model), options)
    assert not options.out.exists()
    assert not options.store.exists()
    return str(planned.value)


@pytest.mark.slow
def test_text_that_is_too_short_for_any_of_its_uses(
    tiny_llama: Path, corpus: Path, options: Options
) -> None:
    there = token_set(local("calibration.txt"), tiny_llama, corpus).samples
    more = recipe(corpus, PRUNE, calibration=text("calibration.txt", samples=there + 1))
    said = refused(more, tiny_llama, options)
    assert said.startswith("recipe  data.calibration\n")
    assert f"holds {there} windows of 32 tokens in 1 documents" in said
    assert f"write `samples: {there}`" in said
    exact = recipe(corpus, PRUNE, calibration=text("calibration.txt", samples=there))
    assert plan(exact, str(tiny_llama), options).stages
    heals = recipe(corpus, HEAL, healing=text("healing.jsonl", samples=4000))
    assert "data.healing" in refused(heals, tiny_llama, options)
    deepest = {"prune": {"method": "deepest", "remove": 1}}
    judged = recipe(corpus, deepest, judge=text("evaluation.txt", samples=4000))
    assert "data.judge" in refused(judged, tiny_llama, options)


@pytest.mark.parametrize("packing", ["packed", "windows", "stream"])
def test_what_is_refused_is_what_the_run_refuses(
    tiny_llama: Path, corpus: Path, packing: str
) -> None:
    whole = token_set(local("healing.jsonl", packing=packing), tiny_llama, corpus)
    for samples in (None, 1, whole.samples):
        source = local("healing.jsonl", packing=packing, samples=samples)
        used = refuse_short(source, tiny_llama, corpus, documents=True)
        assert used == {*token_set(source, tiny_llama, corpus).documents}
        assert not refuse_short(source, tiny_llama, corpus)
    source = local("healing.jsonl", packing=packing, samples=whole.samples + 1)
    with pytest.raises(PlanError) as planned:
        refuse_short(source, tiny_llama, corpus)
    with pytest.raises(PlanError) as ran:
        token_set(source, tiny_llama, corpus)
    assert str(planned.value) == str(ran.value)


def test_text_that_another_set_uses_does_not_count(
    tiny_llama: Path, corpus: Path, options: Options
) -> None:
    """A text file is one document: the same one for both leaves nothing."""
    one = ("evaluation.txt",)
    asked = recipe(corpus, PRUNE, judge=text(*one), calibration=text(*one))
    said = refused(asked, tiny_llama, options)
    assert said.startswith("recipe  data.calibration\n")
    assert "holds 0 windows of 32 tokens in 1 documents (1 left out because another set" in said


@pytest.mark.parametrize("packing", ["packed", "windows", "stream"])
def test_no_more_is_read_than_shows_that_there_is_enough(
    tiny_llama: Path, tmp_path: Path, packing: str
) -> None:
    """What comes after it is not even JSON."""
    lines = [json.dumps({"text": f"{number} " + "A line of text. " * 40}) for number in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{"]), encoding="utf-8")
    source = local("a.jsonl", packing=packing, samples=8)
    refuse_short(source, tiny_llama, tmp_path)
    with pytest.raises(PlanError, match=r"a\.jsonl:401\n  is not JSON"):
        refuse_short(source.model_copy(update={"samples": 9000}), tiny_llama, tmp_path)


def test_what_takes_long_to_read_is_left_to_the_run(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("Some text. " * 100, encoding="utf-8")
    for packing in ("packed", "windows", "stream"):
        source = local("a.txt", packing=packing, samples=500)
        for documents in (False, True):
            with pytest.raises(PlanError, match=f"holds {1 if packing == 'windows' else 3}"):
                refuse_short(source, tiny_llama, tmp_path, documents=documents)
            with monkeypatch.context() as patch:
                patch.setattr("prune_export.calibrate.data.sources.READ", 1000)
                assert not refuse_short(source, tiny_llama, tmp_path, documents=documents)


def test_saved_tokens_that_are_too_few(tiny_llama: Path, tmp_path: Path, options: Options) -> None:
    TokenSet.of(torch.zeros(3, 32, dtype=torch.int64)).save(tmp_path / "a.safetensors")
    for samples, length in ((4, 32), (3, 33)):
        tokens = {"tokens": "a.safetensors", "samples": samples, "length": length}
        said = refused(recipe(tmp_path, PRUNE, calibration=tokens), tiny_llama, options)
        assert "holds 3 windows of 32 tokens" in said


@pytest.mark.slow
def test_healing_needs_a_window_to_measure_with(
    tiny_llama: Path, corpus: Path, tmp_path: Path, options: Options
) -> None:
    (tmp_path / "a.txt").write_text("Some text. " * 4, encoding="utf-8")
    one = text("a.txt", samples=None)
    said = refused(recipe(tmp_path, HEAL, healing=one), tiny_llama, options)
    assert "holds 1 windows of 32 tokens in 1 documents" in said
    assert said.endswith("expected at least 2\n  write a smaller `length`, or add text")
    assert plan(recipe(tmp_path, PRUNE, calibration=one), str(tiny_llama), options).stages
    with pytest.raises(PlanError, match=r"data\.healing\.samples\n  is 1, and healing needs"):
        asked = recipe(corpus, HEAL, healing=text("healing.jsonl", samples=1))
        plan(asked, str(tiny_llama), options)
    TokenSet.of(torch.zeros(1, 32, dtype=torch.int64)).save(tmp_path / "a.safetensors")
    tokens = {"tokens": "a.safetensors", "length": 32}
    said = refused(recipe(tmp_path, HEAL, healing=tokens), tiny_llama, options)
    assert "holds 1 windows of 32 tokens, expected 2 of 32" in said
    assert said.endswith("make the token file of more text")


def test_without_a_tokenizer_a_plan_is_made_all_the_same(
    tiny_llama: Path, corpus: Path, tmp_path: Path, options: Options
) -> None:
    (tmp_path / "bare").mkdir()
    config = (tiny_llama / "config.json").read_bytes()
    (tmp_path / "bare" / "config.json").write_bytes(config)
    few = recipe(corpus, PRUNE, calibration=text("calibration.txt", samples=4000))
    assert plan(few, str(tmp_path / "bare"), options).stages


def test_what_judges_is_made_first(corpus: Path) -> None:
    search = {"search": {
        "target": {"parameters": 0.7}, "validation": "choice",
        "candidates": [{"prune": {"method": "deepest", "sparsity": "to_target"}}],
    }}  # fmt: skip
    sources = {name: text("evaluation.txt") for name in ("calibration", "choice", "unused")}
    asked = recipe(corpus, search, HEAL, judge=text("evaluation.txt"), healing=text("a"), **sources)
    assert sets_of(asked) == (
        ("judge", True), ("choice", True), ("calibration", False), ("healing", False),
    )  # fmt: skip


@pytest.fixture
def grown(tiny_llama: Path, tmp_path: Path) -> Path:
    """A model to whose tokenizer a token was added, and whose embedding was not resized."""
    model = tmp_path / "grown"
    shutil.copytree(tiny_llama, model)
    backend = PreTrainedTokenizerFast.from_pretrained(model)
    backend.add_tokens(["<new>"])
    backend.save_pretrained(model)
    return model


def test_a_token_that_the_embedding_lacks_is_named_before_any_work(
    grown: Path, tmp_path: Path, options: Options
) -> None:
    (tmp_path / "a.txt").write_text("Some <new> text. " * 40, encoding="utf-8")
    (tmp_path / "b.txt").write_text("Some other text. " * 40, encoding="utf-8")
    asked = recipe(tmp_path, PRUNE, calibration=text("a.txt"))
    with pytest.raises(PlanError) as planned:
        plan(asked, str(grown), options)
    assert str(planned.value).startswith("recipe  data.calibration\n  data  a.txt: holds the token")
    assert "'<new>' with id 258, but the model's embedding has only 258 rows" in str(planned.value)
    assert "resize_token_embeddings" in str(planned.value)
    # A token that is never used does no harm.
    assert plan(recipe(tmp_path, PRUNE, calibration=text("b.txt")), str(grown), options).stages
    TokenSet.of(torch.full((4, 32), 258)).save(tmp_path / "a.safetensors")
    tokens = {"tokens": "a.safetensors", "length": 32}
    with pytest.raises(PlanError, match="holds token id 258, but the model's embedding has only"):
        plan(recipe(tmp_path, PRUNE, calibration=tokens), str(grown), options)


@pytest.mark.slow
def test_a_prompt_with_a_token_that_the_embedding_lacks(
    grown: Path, corpus: Path, options: Options
) -> None:
    backend = PreTrainedTokenizerFast.from_pretrained(grown)
    backend.chat_template = "{% for m in messages %}<new>{{ m.content }}{% endfor %}"
    backend.save_pretrained(grown)
    asked = recipe(corpus, PRUNE, calibration=text("calibration.txt"))
    with pytest.raises(PlanError, match="prompts\n  holds the token '<new>' with id 258"):
        plan(asked, str(grown), options)
    with pytest.raises(PlanError, match="prompts\n  holds the token '<new>' with id 258"):
        measure_generation("dense", Engine.pytorch(grown), grown, options.machine)


@pytest.mark.slow
def test_files_that_are_no_text_are_refused_without_a_tokenizer_too(
    tiny_llama: Path, tmp_path: Path, options: Options
) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    (tmp_path / "a.txt").write_text("Some text. " * 40, encoding="utf-8")
    (tmp_path / "b.txt").write_text("Some text. " * 40, encoding="utf-16")
    (tmp_path / "c.jsonl").write_text('{"text": null}', encoding="utf-8")
    for model in (tiny_llama, tmp_path / "bare"):
        for files, said in (
            (("a.txt", "b.txt"), "b.txt: begins with the mark (BOM) of UTF-16"),
            (("c.jsonl",), "c.jsonl:1: `text` is null, expected text"),
            (("a.txt", "none/*"), "none/*: `none/*` names no file"),
        ):
            asked = recipe(tmp_path, PRUNE, calibration=text(*files))
            with pytest.raises(PlanError, match=re.escape(said)):
                plan(asked, str(model), options)
        asked = recipe(tmp_path, PRUNE, calibration=text("b.txt", encoding="utf-16"))
        assert plan(asked, str(model), options).stages
