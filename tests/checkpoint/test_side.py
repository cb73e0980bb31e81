"""Side files: what leaves the model's directory by a link, or is no file, goes no further."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from prune_export.checkpoint import Checkpoint
from prune_export.errors import CheckpointError

HASH = "ab" + "0" * 62


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model"
    shutil.copytree(tiny_llama, path)
    return path


@pytest.fixture
def private(tmp_path: Path) -> Path:
    file = tmp_path / "private"
    file.write_text("mine")
    return file


def cached(model: Path, cache: Path) -> Path:
    """The model as it lies in the Hub's cache: every file a link into `blobs`."""
    repository = cache / "models--an--owner"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.model", "chat_template.jinja"])
def test_a_link_out_of_the_directory_is_refused(model: Path, private: Path, name: str) -> None:
    (model / name).symlink_to(private)
    with pytest.raises(CheckpointError) as refused:
        Checkpoint.open(model, weights=False)
    assert str(model / name) in refused.value.where
    assert str(private) in refused.value.problem


def test_a_link_through_a_directory_or_another_link_is_refused(
    model: Path, private: Path, tmp_path: Path
) -> None:
    (model / "sub").symlink_to(private.parent)
    (model / "NOTICE").symlink_to("sub/private")
    with pytest.raises(CheckpointError, match="outside the model's directory"):
        Checkpoint.open(model)


def test_a_link_within_the_directory_is_followed(model: Path) -> None:
    (model / "original.txt").write_text("text")
    (model / "LICENSE").symlink_to("original.txt")
    assert model / "LICENSE" in Checkpoint.open(model).side_files()


def test_weights_may_be_links(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(tmp_path / "weights")
    (model / "model.safetensors").symlink_to(tmp_path / "weights")
    assert Checkpoint.open(model).entries


def test_the_hubs_cache_is_followed_and_nothing_else(
    model: Path, private: Path, tmp_path: Path
) -> None:
    snapshot = cached(model, tmp_path / "cache")
    assert len(Checkpoint.open(snapshot).side_files()) >= 2
    # Opened by another name, it is the same place.
    (tmp_path / "name").symlink_to(snapshot)
    assert Checkpoint.open(tmp_path / "name").side_files()
    (snapshot / "LICENSE").symlink_to(private)
    with pytest.raises(CheckpointError, match="not in the cache of this model"):
        Checkpoint.open(snapshot)


def test_the_store_that_repositories_share_is_followed(model: Path, tmp_path: Path) -> None:
    snapshot = cached(model, tmp_path / "cache")
    shared = tmp_path / "cache" / "blobs" / HASH[:2] / HASH
    shared.parent.mkdir(parents=True)
    shared.write_text("text")
    blob = snapshot.parent.parent / "blobs" / "licence"
    blob.symlink_to(f"../../blobs/{HASH[:2]}/{HASH}")
    (snapshot / "LICENSE").symlink_to("../../blobs/licence")
    assert snapshot / "LICENSE" in Checkpoint.open(snapshot).side_files()
    blob.unlink()
    blob.symlink_to("../../blobs/ab/other")
    (shared.parent / "other").write_text("text")
    with pytest.raises(CheckpointError, match="not in the cache of this model"):
        Checkpoint.open(snapshot)


def test_a_made_up_cache_whose_blobs_lead_elsewhere_is_refused(
    model: Path, private: Path, tmp_path: Path
) -> None:
    snapshot = cached(model, tmp_path / "cache")
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="not in the cache of this model"):
        Checkpoint.open(snapshot)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda place: place.symlink_to(place.name), "in a circle"),
        (lambda place: place.symlink_to("nothing"), "a link to nothing"),
        (lambda place: place.symlink_to("/dev/zero"), "outside the model's directory"),
        (lambda place: place.symlink_to("/tmp"), "outside the model's directory"),
        (os.mkfifo, "is a pipe"),
        (Path.mkdir, "is a directory"),
        (lambda place: os.truncate(_made(place), 200_000_000), "for a file of the tokenizer"),
    ],
)  # fmt: skip
def test_what_is_no_file_is_refused_at_once(
    model: Path, make: Callable[[Path], None], says: str
) -> None:
    make(model / "added_tokens.json")
    with pytest.raises(CheckpointError, match=says):
        Checkpoint.open(model, weights=False)


def _made(place: Path) -> Path:
    place.write_text("")
    return place


def test_a_folder_of_licences_stays_behind(model: Path) -> None:
    (model / "LICENSES").mkdir()
    assert model / "LICENSES" not in Checkpoint.open(model).side_files()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md"])
def test_pipes_and_devices_in_the_place_of_files(model: Path, name: str) -> None:
    from prune_export.checkpoint import card_license

    for make in (os.mkfifo, lambda place: place.symlink_to("/dev/zero")):
        (model / name).unlink(missing_ok=True)
        make(model / name)
        if name == "README.md":
            assert card_license(model) is None
        else:
            with pytest.raises(CheckpointError, match=r"is a (pipe|device)"):
                Checkpoint.open(model)
