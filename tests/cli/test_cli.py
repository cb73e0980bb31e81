"""The command line: exit statuses, JSON, errors of three lines, nothing written by mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from prune_export import __version__

DEEPEST = """\
recipe: 1
description: Drop two blocks.
stages:
  - prune: {method: deepest, remove: 2}
verify: {parity: false, generation: false}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "deepest.yaml"
    file.write_text(DEEPEST, encoding="utf-8")
    return file


def test_version_and_help(cli: Any) -> None:
    assert cli("--version")[:2] == (0, f"{__version__}\n")
    status, shown, _ = cli("run", "--help")
    assert status == 0
    assert "prune-export run my.yaml" in shown


def test_listings(cli: Any) -> None:
    for command in ("recipes", "methods"):
        status, shown, _ = cli(command)
        assert status == 0
        assert {"recipes": "demo", "methods": "angular_distance"}[command] in shown
        assert json.loads(cli(command, "--json")[1])
    assert "recipe: 1" in cli("recipes", "demo")[1]
    assert "remove" in cli("methods", "deepest")[1]
    assert json.loads(cli("methods", "deepest", "--json")[1])["name"] == "deepest"
    assert json.loads(cli("schema")[1])["type"] == "object"


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("run", "no-such-recipe", "-o", "x"), 2, "neither a file nor a bundled recipe"),
        (("methods", "angular"), 2, "nothing is registered"),
        (("recipes", "dem"), 2, "did you mean `demo`"),
        (("plan", "demo", "--ram", "lots"), 2, "not a size"),
        (("plan", "demo", "--device", "tpu"), 2, "write `cpu` or `cuda`"),
        (("plan", "demo"), 2, ""),
        (("publish", "no-such-directory", "--repo", "a/b"), 1, ""),
        (("inspect", "no-such-model", "--data", "x.txt", "-o", "x.jpg"), 2, ".png"),
        (("export", "no-such-model", "--to", "onx", "-o", "x"), 2, "did you mean `onnx`"),
        (("verify", "no-such-directory"), 2, "no-such-directory"),
        (("compare", "no-such-directory", "other"), 2, "no-such-directory"),
    ],
)
def test_errors_say_where_and_what_to_do(
    cli: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: Any,
    status: int,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRUNE_EXPORT_STORE", str(tmp_path / "store"))
    got, _, shown = cli(*arguments)
    assert got == status, shown
    assert "error" in shown
    assert says in " ".join(shown.split())
    assert len(shown.strip().splitlines()) >= 2
    assert "Traceback" not in shown
    assert not [path for path in tmp_path.iterdir() if path.name != "store"]
    assert not list((tmp_path / "store").glob("*-*"))


def test_errors_as_json(cli: Any) -> None:
    status, shown, _ = cli("recipes", "dem", "--json")
    assert status == 2
    assert json.loads(shown)["error"]["kind"] == "RecipeError"


@pytest.mark.usefixtures("measured_here")
def test_plan_run_and_store(cli: Any, tiny_llama: Path, recipe: Path, tmp_path: Path) -> None:
    out, store = tmp_path / "out", tmp_path / "store"
    where = ("--model", tiny_llama, "--store", store, "--threads", 1)
    status, shown, _ = cli("plan", recipe, *where)
    assert status == 0
    assert "6 → 4" in shown
    planned = json.loads(cli("plan", recipe, *where, "--json")[1])
    assert planned["stages"][0]["after"]["layers"] == 4
    assert cli("run", recipe, *where, "--out", out, "--dry-run")[0] == 0
    assert not store.exists()
    status, shown, told = cli("run", recipe, *where, "--out", out)
    assert status == 0, told
    assert "parameters" in shown
    assert "prune: deepest" in told
    report = json.loads(cli("run", recipe, *where, "--out", out, "--json")[1])
    assert report["result"]["layers"] == 4
    assert str(tmp_path) not in (out / "report.json").read_text()
    assert str(tmp_path) not in (out / "README.md").read_text()
    told = cli("run", recipe, *where, "--out", out, "--force", "prune")[2]
    assert "prune: deepest: already there" not in told
    assert "reload in a fresh process: already there" in told
    kept = json.loads(cli("store", "ls", "--store", store, "--json")[1])
    assert any(entry["id"].startswith("prune-deepest-") for entry in kept)
    assert "prune-deepest" in cli("store", "ls", "--store", store)[1]
    assert json.loads(cli("store", "gc", "--store", store, "--dry-run", "--json")[1])["dry_run"]
    assert json.loads(cli("publish", out, "--repo", "a/b", "--dry-run", "--json")[1])


@pytest.mark.slow
@pytest.mark.usefixtures("measured_here")
def test_a_recipe_alone_never_publishes(
    cli: Any, tiny_llama: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bool]] = []

    def upload(directory: Path, repo: str, *, private: bool, **_: object) -> str:
        asked.append((repo, private))
        return f"published {repo}"

    monkeypatch.setattr("prune_export.hub.publishing.publish", upload)  # the Hub is another machine
    proposing = DEEPEST + "publish: {repo: stranger/model, private: false}\n"
    recipe.write_text(proposing, encoding="utf-8")
    run = ("run", recipe, "-m", tiny_llama, "-o", tmp_path / "out", "--store", tmp_path / "store")
    status, shown, said = cli(*run)
    assert status == 0, said
    assert not asked and "not published: the recipe proposes stranger/model" in shown
    assert cli(*run, "--push-to", "me/model", "-q")[0] == 0
    assert cli(*run, "--push-to", "me/model", "--public", "-q")[0] == 0
    assert cli(*run, "--publish", "-q")[0] == 0
    assert asked == [("me/model", True), ("me/model", False), ("stranger/model", False)]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--publish",), "the recipe proposes no repository"),
        (("--push-to", "model"), "is not a repository id"),
    ],
)
def test_a_wrong_destination_is_refused_before_any_work(
    cli: Any, recipe: Path, tiny_llama: Path, tmp_path: Path, flags: tuple[str, ...], says: str
) -> None:
    status, _, said = cli("run", recipe, "-m", tiny_llama, "-o", tmp_path / "out", *flags,
                          "--store", tmp_path / "store")  # fmt: skip
    assert status != 0 and says in said
    assert not (tmp_path / "out").exists() and not (tmp_path / "store").exists()


@pytest.mark.usefixtures("measured_here")
def test_a_failed_gate_is_exit_1_and_keeps_the_result(
    cli: Any, tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    file = tmp_path / "gated.yaml"
    file.write_text(
        DEEPEST.replace(
            "generation: false", "generation: false, quality: {perplexity: e, at_most: 0.1}"
        )
        + "data: {e: {files: [evaluation.txt], samples: 2, length: 32}}\n",
        encoding="utf-8",
    )
    status, _, told = cli(
        "run", file, "--model", tiny_llama, "--data-root", corpus, "--store", tmp_path / "store",
        "--out", tmp_path / "out", "-q",
    )  # fmt: skip
    assert status == 1
    assert "claimed 0.1, measured" in told
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
def test_killed_and_resumed_ends_in_the_same_bytes(
    cli: Any, measured_here: None, tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    """One is killed and goes on in processes of their own, and is held against one of this."""
    file = tmp_path / "r.yaml"
    file.write_text(
        "recipe: 1\n"
        "data: {healing: {files: [healing.jsonl], samples: 32, length: 32}}\n"
        "stages:\n"
        "  - prune: {method: deepest, remove: 2}\n"
        "  - heal: {method: lora, rank: 2, steps: 40, batch: 2, save_every: 1}\n"
        "verify: {parity: false, generation: false}\n",
        encoding="utf-8",
    )

    def command(place: str) -> list[str]:
        return [
            sys.executable, "-m", "prune_export", "run", str(file), "--model", str(tiny_llama),
            "--data-root", str(corpus), "--store", str(tmp_path / place / "store"),
            "--out", str(tmp_path / place / "out"), "--threads", "1", "-q",
        ]  # fmt: skip

    assert cli(*command("whole")[3:])[0] == 0
    wanted = (tmp_path / "whole" / "out" / "model.safetensors").read_bytes()
    process = subprocess.Popen(command("killed"), start_new_session=True)
    scratch = tmp_path / "killed" / "store"
    while not list(scratch.glob("heal-*.partial/scratch/training.safetensors")):
        assert process.poll() is None, "it ended before a checkpoint was seen"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "out").exists()
    subprocess.run(command("killed"), check=True, capture_output=True)
    assert (tmp_path / "killed" / "out" / "model.safetensors").read_bytes() == wanted
