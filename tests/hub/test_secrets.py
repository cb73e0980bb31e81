"""Secrets stop an upload, in whatever file and form they stand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from prune_export.errors import PublishError
from prune_export.hub import credentials
from prune_export.hub.publishing import publish
from tests.hub.made import SECRET


@pytest.mark.parametrize(
    ("name", "secret", "what"),
    [
        ("README.md", SECRET, "a Hugging Face token"),
        ("prune_recipe.yaml", "token: " + SECRET, "a Hugging Face token"),
        ("tokenizer.json", '{"a": "ghp_' + "a1B2" * 9 + '"}', "a GitHub token"),
        ("LICENSE", "AKIA" + "ABCDEFGH12345678", "an AWS access key"),
        (
            "onnx/config.json",
            '{"model_type": "llama", "key": "sk-' + "x9Yz" * 8 + '"}',
            "an API key",
        ),
        ("report.json", "-----BEGIN RSA PRIVATE " + "KEY-----", "a private key"),
    ],
)
def test_secrets_stop_the_upload(result: Path, name: str, secret: str, what: str) -> None:
    path = result / name
    text = path.read_text(encoding="utf-8") if name == "README.md" else ""
    path.write_text(f"{text}\n\n{secret}\n", encoding="utf-8")
    with pytest.raises(PublishError) as caught:
        publish(result, "me/model", dry_run=True)
    line = text.count("\n") + 3
    assert caught.value.where == f"{path}:{line}"
    assert what in caught.value.problem
    assert secret not in str(caught.value)
    assert secret.rpartition(" ")[2][4:] not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("tokenizer.model", b"\x0a\x2b\x0a" + bytes([len(SECRET)]) + SECRET.encode() + b"\x15\0\0"),
        ("vocab.txt", b"\xff\xfe" + SECRET.encode("utf-16-le")),
        ("onnx/model.onnx", b"\x08\x0a\x12\x07" + SECRET.encode() + b"\x00\xff"),
        ("figures/summary.png", b"\x89PNG\r\n\x1a\ntEXtComment\0" + SECRET.encode() + b"\0"),
        ("genai/layers.json", b'{"a": "' + SECRET.encode() + b'"}'),
    ],
)
def test_secrets_in_files_that_are_not_called_text(result: Path, name: str, data: bytes) -> None:
    (result / name).write_bytes(data)
    with pytest.raises(PublishError, match="a Hugging Face token"):
        publish(result, "me/model", dry_run=True)


def test_secrets_in_the_metadata_of_weights(result: Path) -> None:
    file = result / "model-00001-of-00002.safetensors"
    weight = np.arange(4000, dtype=np.float32)
    save_file({"a": weight}, file, metadata={"by": SECRET})
    with pytest.raises(PublishError, match="a Hugging Face token"):
        publish(result, "me/model", dry_run=True)
    # Weights themselves are numbers, whatever they spell.
    spelt = np.frombuffer((SECRET + "0" * 3).encode()[:36], np.float32)
    save_file({"a": np.resize(spelt, 4000)}, file)
    assert publish(result, "me/model", dry_run=True).files


def test_a_secret_across_two_pieces_is_found(result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "_CHUNK", 1000)
    monkeypatch.setattr(credentials, "_OVERLAP", 64)
    for shift in (0, 10, 30):
        text = "x\n" * 490 + " " * shift + SECRET + "\n" * 3000
        (result / "tokenizer.json").write_text(text, encoding="utf-8")
        with pytest.raises(PublishError) as caught:
            publish(result, "me/model", dry_run=True)
        assert caught.value.where.endswith("tokenizer.json:491")


def test_the_token_of_the_upload_itself_is_a_secret(result: Path) -> None:
    odd = "not-a-usual-token-3141"
    (result / "README.md").write_text(f"---\na: b\n---\n{odd}\n", encoding="utf-8")
    with pytest.raises(PublishError, match="the token of this upload") as caught:
        publish(result, "me/model", token=odd, dry_run=True)
    assert odd not in str(caught.value)
