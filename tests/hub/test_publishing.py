"""Publishing with the real huggingface_hub against a Hub on this machine, and every refusal."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from prune_export.errors import PublishError
from prune_export.hub import publishing
from prune_export.hub.publishing import publish
from prune_export.modeling import FOLDER
from tests.hub.fake_hub import GOOD, READ_ONLY, WRONG, FakeHub, Repo
from tests.hub.made import EXPECTED, called, uploading


@pytest.mark.slow
def test_uploads_the_same_bytes_and_only_ours(result: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with FakeHub() as fake:
        outcomes, printed = called(fake, home, [uploading(result, "me/model")])
        (found,) = outcomes
        assert "error" not in found, found
        stored = fake.files("me/model")
        assert fake.repos["me/model"].private
    assert set(stored) == EXPECTED == set(found["files"])
    for name, data in stored.items():
        assert data == (result / name).read_bytes(), name
    assert found["commit"] == fake.repos["me/model"].commits[0]
    assert found["url"] == f"{fake.url}/me/model"
    assert found["bytes"] == sum((result / name).stat().st_size for name in EXPECTED)
    assert {".env", "notes.md", "genai/model.plan", "store/prune-1/manifest.json"} <= {
        *found["left_out"]
    }
    assert found["said"][0].startswith("Uploading 27 files, ")
    assert found["said"][1] == f"Published {fake.url}/me/model"
    # The token is in request headers and nowhere else: not printed, logged or written.
    assert GOOD not in printed
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if GOOD.encode() in path.read_bytes()]


@pytest.mark.slow
def test_second_upload_removes_what_is_ours_and_gone(result: Path, tmp_path: Path) -> None:
    later = Path(shutil.copytree(result, tmp_path / "later"))
    for name in ("model-00001-of-00002", "model-00002-of-00002"):
        (later / f"{name}.safetensors").unlink()
    (later / "model.safetensors.index.json").unlink()
    (later / "onnx" / "model.onnx_data").unlink()
    save_file({"a": np.ones(3, np.float32)}, later / "model.safetensors")
    with FakeHub() as fake:
        fake.repos["me/model"] = Repo(private=True, branches={"main": {"USE.md": b"mine"}})
        calls = [uploading(one, "me/model", revision="v2") for one in (result, later)]
        outcomes, _ = called(fake, tmp_path / "home", calls)
        assert [one.get("error") for one in outcomes] == [None, None]
        gone = {name for name in EXPECTED if name.startswith("model")} | {"onnx/model.onnx_data"}
        assert set(fake.files("me/model", "v2")) == EXPECTED - gone | {
            "model.safetensors",
            "USE.md",
        }
        assert set(fake.files("me/model", "main")) == {"USE.md"}


@pytest.mark.slow
def test_the_hub_refuses_in_words(result: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with FakeHub() as fake:
        fake.repos["me/public"] = Repo(private=False)
        nothing = {"HF_TOKEN": None}
        calls = [
            uploading(result, "me/model", token=WRONG),
            uploading(result, "me/model", token=READ_ONLY),
            uploading(result, "me/busy"),
            uploading(result, "me/nosy"),
            uploading(result, "me/public"),
            uploading(result, "me/public", private=False),
            uploading(result, "me/model", environment=nothing),
            uploading(result, "me/model", endpoint="http://127.0.0.1:9"),
        ]
        outcomes, printed = called(fake, home, calls)
        empty = not fake.files("me/busy") and not fake.files("me/nosy")
    wrong, read_only, busy, nosy, exposed, public, without, unreachable = outcomes
    assert "does not accept the token" in wrong["problem"]
    assert "may not write there" in read_only["problem"]
    assert "write access" in read_only["fix"]
    assert "changed meanwhile" in busy["problem"]
    assert "publish again" in busy["fix"]
    assert "may not write there (no rights for hf_…)" in nosy["problem"]
    assert "exists and is public" in exposed["problem"]
    assert public["commit"]
    assert "no token was given or found" in without["problem"]
    assert "hf auth login" in without["fix"]
    assert "upload failed: " in unreachable["problem"]
    assert empty
    for refused in (wrong, read_only, busy, nosy, exposed, without, unreachable):
        assert refused["error"] == "PublishError"
        assert not refused["chained"]
    for token in (GOOD, WRONG, READ_ONLY):
        assert token not in printed


@pytest.mark.slow
def test_a_saved_login_is_used(result: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "token").write_text(GOOD, encoding="utf-8")
    with FakeHub() as fake:
        saved = uploading(result, "me/model", environment={"HF_TOKEN": None})
        (found,), printed = called(fake, home, [saved])
    assert found["commit"]
    assert GOOD not in printed


def test_a_recipe_is_fetched_and_nothing_else(tmp_path: Path) -> None:
    with FakeHub() as fake:
        files = {"prune_recipe.yaml": b"recipe: 1\n", "model.safetensors": b"large"}
        commit = "c" * 40
        fake.repos["me/model"] = Repo(False, {"main": files, "empty": {}}, [commit])
        fetch = [
            {"function": "fetched", "arguments": {"uri": f"hf://me/model{at}"}}
            for at in ("", "@" + commit, "@empty", "@nowhere", "@../x y")
        ]
        fetch.append({"function": "fetched", "arguments": {"uri": "hf://me/none"}})
        outcomes, _ = called(fake, tmp_path / "home", fetch)
        asked = {line.split()[1] for line in fake.requests}
    latest, pinned, empty, nowhere, malformed, missing = outcomes
    assert latest["text"] == pinned["text"] == "recipe: 1\n"
    assert commit in latest["path"]
    for refused in (empty, nowhere, malformed, missing):
        assert refused["error"] == "RecipeError"
        assert refused["fix"]
    assert not [path for path in asked if "safetensors" in path]


def test_dry_run_lists_without_a_network_or_token(result: Path) -> None:
    found = publish(result, "me/model", dry_run=True)
    assert set(found.files) == EXPECTED
    assert (found.commit, found.url) == ("", "")
    text = str(found)
    assert text.startswith("would publish to me/model: 27 files, ")
    assert "genai/model.plan (left out)" in text


@pytest.mark.slow
def test_a_bill_of_materials_and_a_gguf_file_go_along(result: Path, tmp_path: Path) -> None:
    (result / "genai" / "model.gguf").write_bytes(b"GGUF of a test")
    lock = {"base": {"model": "tiny"}, "versions": {"prune_export": "0.1.0"}}
    (result / "prune_recipe.lock.json").write_text(json.dumps(lock), encoding="utf-8")
    with FakeHub() as fake:
        outcomes, _ = called(fake, tmp_path / "home", [uploading(result, "me/m", bill=True)])
        assert "error" not in outcomes[0], outcomes
        stored = fake.files("me/m")
    assert set(stored) == EXPECTED | {"genai/model.gguf", "bom.cdx.json"}
    names = {one["name"] for one in json.loads(stored["bom.cdx.json"])["components"]}
    assert names >= EXPECTED | {"genai/model.gguf"}


def test_machine_bound_engines_only_when_asked(result: Path) -> None:
    found = publish(result, "me/model", dry_run=True, engines=True)
    assert set(found.files) == EXPECTED | {"genai/model.plan"}


def test_offline_mode_is_named(result: Path) -> None:
    with pytest.raises(PublishError, match="offline mode is on") as caught:
        publish(result, "me/model", token=GOOD)
    assert "unset HF_HUB_OFFLINE" in caught.value.fix


@pytest.mark.parametrize(
    "repo_id", ["model", "me/you/model", "", "me/", "/model", "me/mo del", "me/..", "-me/x--y"]
)
def test_broken_repository_ids(result: Path, repo_id: str) -> None:
    with pytest.raises(PublishError, match="is not a repository id") as caught:
        publish(result, repo_id, dry_run=True)
    assert "owner/name" in caught.value.fix


@pytest.mark.parametrize("revision", ["../main", "a b", "refs/pr/1", "", "-x"])
def test_broken_revisions(result: Path, revision: str) -> None:
    with pytest.raises(PublishError, match="is not a branch name"):
        publish(result, "me/model", revision=revision, dry_run=True)


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("README.md", "has no model card"),
        ("prune_recipe.lock.json", "has no lock"),
        ("config.json", "config.json"),
        ("model-00002-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    ],
)
def test_incomplete_directories(result: Path, gone: str, said: str) -> None:
    (result / gone).unlink()
    with pytest.raises(PublishError, match=said):
        publish(result, "me/model", dry_run=True)


def test_without_weights(result: Path) -> None:
    for path in result.glob("model*"):
        path.unlink()
    with pytest.raises(PublishError, match="safetensors"):
        publish(result, "me/model", dry_run=True)


def test_not_a_directory(tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="is not a directory"):
        publish(tmp_path / "none", "me/model", dry_run=True)


def test_failed_verification_needs_force(result: Path) -> None:
    checks = json.loads((result / "verify.json").read_text(encoding="utf-8"))
    checks["gates"][0] |= {"ok": False, "claimed": 1.4, "measured": 1.16}
    (result / "verify.json").write_text(json.dumps(checks), encoding="utf-8")
    with pytest.raises(PublishError, match=r"claimed 1\.4, measured 1\.16"):
        publish(result, "me/model", dry_run=True)
    assert publish(result, "me/model", dry_run=True, force=True).files


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "was not verified"), ("{}", "cannot be read"), ("[", "cannot be read")],
)
def test_missing_or_broken_verification_needs_force(
    result: Path, text: str | None, said: str
) -> None:
    if text is None:
        (result / "verify.json").unlink()
    else:
        (result / "verify.json").write_text(text, encoding="utf-8")
    with pytest.raises(PublishError, match=said):
        publish(result, "me/model", dry_run=True)
    assert publish(result, "me/model", dry_run=True, force=True).files


@pytest.mark.parametrize("name", ["modeling_sliced.py", "configuration_sliced.py"])
def test_a_strangers_code_under_our_names_is_refused(result: Path, name: str) -> None:
    ours = (FOLDER / name).read_bytes()
    (result / name).write_bytes(ours)
    assert name in publish(result, "me/model", dry_run=True).files
    (result / name).write_bytes(ours + b"\nimport os\n")
    with pytest.raises(PublishError, match=r"is not the code that this version") as caught:
        publish(result, "me/model", dry_run=True, force=True)
    assert caught.value.where.endswith(name)


def test_a_pipe_among_the_files_does_not_hang(result: Path) -> None:
    (result / "report.html").unlink()
    os.mkfifo(result / "report.html")
    with pytest.raises(PublishError, match="is a pipe"):
        publish(result, "me/model", dry_run=True)


def test_large_files_are_refused(result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "FILE_LIMIT_BYTES", 10_000)
    with pytest.raises(PublishError, match=r"bytes, the Hub takes 10,000 a file"):
        publish(result, "me/model", dry_run=True)


def test_links_are_refused(result: Path, tmp_path: Path) -> None:
    (tmp_path / "private.txt").write_text("mine", encoding="utf-8")
    (result / "LICENSE").unlink()
    (result / "LICENSE").symlink_to(tmp_path / "private.txt")
    with pytest.raises(PublishError, match="is a link"):
        publish(result, "me/model", dry_run=True)


def test_an_engine_folder_cannot_name_the_outside(result: Path) -> None:
    report = json.loads((result / "report.json").read_text(encoding="utf-8"))
    report["exports"][0]["directory"] = "../onnx"
    report["exports"][1]["directory"] = "store/*"
    (result / "report.json").write_text(json.dumps(report), encoding="utf-8")
    found = publish(result, "me/model", dry_run=True)
    assert not [name for name in found.files if name.startswith(("onnx", "genai", "store"))]
