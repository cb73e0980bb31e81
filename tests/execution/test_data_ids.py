"""What names the artifact of a data source: only what changes its tokens, so that it is found."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from prune_export.execution.context import RunContext
from prune_export.execution.inputs import Base, make_tokens
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.recipe import LocalText
from prune_export.store import Artifact, Key, Store


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    return RunContext(Store(tmp_path / "store"), Machine.detect(device="cpu", threads=1), Silent())


def made(context: RunContext, model: Path, root: Path, **keys: object) -> Artifact:
    source = LocalText.model_validate({"files": ["a.txt"], "length": 16, **keys})
    return make_tokens(context, "evaluation", source, root, Base("m", None, model, "m"))[0]


def first_id(context: RunContext, model: Path, root: Path, packing: str) -> str:
    """The id that version 0.1 gave."""
    parameters = {
        "samples": None, "length": 16, "seed": 0, "column": "text", "packing": packing,
        "files": ["a.txt"],
    }  # fmt: skip
    inputs = [
        f"{name}:{context.store.file_hash(model / name)}"
        for name in ("tokenizer.json", "tokenizer_config.json")
    ]
    inputs.append(f"a.txt:{context.store.file_hash(root / 'a.txt')}")
    inputs.append("exclude:4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945")
    return Key("data", "evaluation", "1", parameters, tuple(inputs)).id


@pytest.fixture
def with_bos(tiny_llama: Path, tmp_path: Path) -> Path:
    model = tmp_path / "with-bos"
    shutil.copytree(tiny_llama, model)
    backend = PreTrainedTokenizerFast.from_pretrained(model)
    backend.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    backend.save_pretrained(model)
    return model


def test_sources_that_mean_what_they_meant_keep_their_ids(
    context: RunContext, tiny_llama: Path, with_bos: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("Some text. " * 40, encoding="utf-8")
    for packing in ("stream", "packed", "windows"):
        found = made(context, tiny_llama, tmp_path, packing=packing)
        assert found.id == first_id(context, tiny_llama, tmp_path, packing)
    found = made(context, with_bos, tmp_path, packing="packed")
    assert found.id == first_id(context, with_bos, tmp_path, "packed")


def test_what_gives_other_tokens_has_another_id(
    context: RunContext, tiny_llama: Path, with_bos: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("Some text. " * 40, encoding="utf-8")
    before = first_id(context, with_bos, tmp_path, "stream")
    each = made(context, with_bos, tmp_path, packing="stream")
    once = made(context, with_bos, tmp_path, packing="stream", prefix="first")
    assert len({before, each.id, once.id}) == 3
    assert each.record["provenance"]["prefix"] == "every window"
    (tmp_path / "a.txt").write_text("Some text. " * 40, encoding="utf-8-sig")
    marked = made(context, tiny_llama, tmp_path, packing="packed")
    assert marked.id != first_id(context, tiny_llama, tmp_path, "packed")


def test_another_chat_template_makes_other_conversations(
    context: RunContext, tiny_llama: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    turns = '[{"role": "user", "content": "Some text of a user."}]'
    (tmp_path / "a.jsonl").write_text(f'{{"messages": {turns}}}', encoding="utf-8")
    ids = set()
    for template in ("{{ messages[0].content }}", "{{ messages[0].content }} Yes."):
        (model / "chat_template.jinja").write_text(template, encoding="utf-8")
        ids.add(made(context, model, tmp_path, files=["a.jsonl"], column="messages").id)
        ids.add(made(context, model, tmp_path, files=["a.jsonl"], column="messages").id)
    assert len(ids) == 2
