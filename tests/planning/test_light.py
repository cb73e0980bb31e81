"""A plan of a model and local text imports no library that only running needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from prune_export.calibrate import Wanted, is_plenty, largest_id
from prune_export.checkpoint import Checkpoint, filled
from prune_export.recipe import LocalText

HEAVY = (
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama",
    "torch._dynamo",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "peft",
)

RECIPE = """
recipe: 1
data:
  calibration: {files: [calibration.txt], samples: 2, length: 32}
  healing: {files: [healing.jsonl], length: 32}
  evaluation: {files: [evaluation.txt], samples: 2, length: 32}
stages:
  - prune: {method: angular_distance, remove: 1}
  - heal: {method: lora, rank: 2, steps: 1, batch: 1}
export: [onnx]
verify: {quality: {perplexity: evaluation}, speed: {minutes: 1}}
"""

PLANS = f"""
import sys
from prune_export.cli import main
try:
    main()
finally:
    print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.slow
def test_a_plan_imports_no_transformers_models(
    tiny_llama: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filled, "user_cache", lambda: tmp_path / "cache" / "prune_export")
    Checkpoint.open(tiny_llama).full_config()  # which keeps it
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    command = [sys.executable, "-c", PLANS, "plan", str(tmp_path / "recipe.yaml"), "--model"]
    command += [str(tiny_llama), "--data-root", str(corpus), "--store", str(tmp_path / "store")]
    command += ["--out", str(tmp_path / "out"), "--device", "cpu", "--json"]
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stages"]
    assert done.stderr.strip().endswith("[]")


class TestKeptConfigs:
    def test_the_same_as_made_anew(
        self, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(filled, "user_cache", lambda: tmp_path)
        opened = Checkpoint.open(tiny_llama)
        made = opened.full_config()
        monkeypatch.setattr(filled, "_AUTO", "a module that is not imported")
        (kept,) = (tmp_path / "configs").iterdir()
        assert filled.kept_config(dict(opened.config)) == made
        assert list(made) == list(opened.full_config())
        other = {**opened.config, "hidden_size": 64}
        assert filled.kept_config(other) is None
        for damaged in ("", "[]", '{"model_type": "gpt2"}', '{"id2label": {"x": 1}}'):
            kept.write_text(damaged)
            assert filled.kept_config(dict(opened.config)) is None
        kept.unlink()
        os.mkfifo(kept)
        assert filled.kept_config(dict(opened.config)) is None

    def test_no_home_and_foreign_classes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(filled, "user_cache", lambda: tmp_path)
        filled.keep_config({"model_type": "own"}, {"model_type": "own"}, Wanted)
        assert not list(tmp_path.iterdir())

        def homeless() -> Path:
            raise RuntimeError

        monkeypatch.setattr(filled, "user_cache", homeless)
        monkeypatch.setattr(filled, "_AUTO", "a module that is not imported")
        assert filled.kept_config({"model_type": "llama"}) is None


class TestPlenty:
    def wanted(self, file: str, windows: int, *, judges: bool = False, **keys: Any) -> Wanted:
        source = LocalText(files=(file,), length=32, **{"packing": "packed", **keys})
        return Wanted(source, windows, judges)

    def test_characters_count_twice_what_tokens_may_have(
        self, tiny_llama: Path, corpus: Path
    ) -> None:
        size = len((corpus / "calibration.txt").read_text())
        enough = size // (32 * 2 * 5)
        for windows, known in ((enough, True), (enough + 1, False)):
            one = self.wanted("calibration.txt", windows)
            assert is_plenty([one], tiny_llama, corpus, 10_000) is known

    def test_documents_that_judge_are_counted_once(self, tiny_llama: Path, corpus: Path) -> None:
        heals = self.wanted("healing.jsonl", 1)
        assert is_plenty([heals, heals], tiny_llama, corpus, 10_000)
        judges = self.wanted("healing.jsonl", 1, judges=True)
        assert not is_plenty([judges, heals], tiny_llama, corpus, 10_000)

    def test_windows_need_long_documents(self, tiny_llama: Path, corpus: Path) -> None:
        lines = (corpus / "healing.jsonl").read_text().splitlines()
        long = sum(len(json.loads(line)["text"]) >= 320 for line in lines)
        one = self.wanted("healing.jsonl", long + 1, packing="windows")
        assert not is_plenty([one], tiny_llama, corpus, 10_000)

    def test_tokens_beyond_the_embedding_are_left_to_a_careful_look(
        self, tiny_llama: Path, corpus: Path, tmp_path: Path
    ) -> None:
        last = largest_id(tiny_llama)
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        assert last == max(tokenizer.get_vocab().values())
        one = self.wanted("calibration.txt", 1)
        assert is_plenty([one], tiny_llama, corpus, last + 1)
        assert not is_plenty([one], tiny_llama, corpus, last)
        tokenizer.add_tokens(["<added>"])
        tokenizer.save_pretrained(tmp_path)
        assert largest_id(tmp_path) == last + 1
        (tmp_path / "tokenizer.json").write_text("{}")
        assert largest_id(tmp_path) is None
