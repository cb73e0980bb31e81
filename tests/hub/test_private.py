"""Twelve secrets and every trace of who and where: found in whatever is published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from prune_export.errors import PublishError
from prune_export.hub.credentials import refuse_secrets
from prune_export.hub.publishing import publish

SECRETS = {
    "README.md": ("a Hugging Face token", "hf_" + "ABCdef123" * 4),
    "LICENSE": ("a GitHub token", "github_pat_" + "a1B2" * 9),
    "prune_recipe.yaml": ("a GitLab token", "glpat-" + "a1B2" * 6),
    "report.json": ("a PyPI token", "pypi-AgEI" + "a1B2" * 12),
    "report.html": ("an AWS access key", "AKIA" + "ABCDEFGH12345678"),
    "tokenizer.json": ("a Google API key", "AIza" + "a1B2c" * 7),
    "config.json": ("an API key", "sk-" + "x9Yz" * 8),
    "genai/genai_config.json": ("an API key", "sk_" + "live_" + "x9Yz" * 8),
    "onnx/build.log": ("a signed web token", "eyJ" + "hbGci1" * 3 + ".eyJ" + "zdWIi1" * 3
                       + "." + "x9Yz" * 5),
    "onnx/config.json": ("a password in an address", "https://me:" + "s3cr3tw0rd@example.org/x"),
    "onnx/layers.json": ("a secret of the environment", "WANDB_API_KEY=" + "0a1b2c3d" * 5),
    "onnx/model.onnx": ("a private key", "-----BEGIN OPENSSH PRIVATE " + "KEY-----"),
}  # fmt: skip


@pytest.mark.parametrize("name", SECRETS)
def test_twelve_planted_secrets(tmp_path: Path, name: str) -> None:
    what, secret = SECRETS[name]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b'\x08\x01 x\n"a": ' + secret.encode() + b" \x00\xff")
    with pytest.raises(PublishError) as caught:
        refuse_secrets(tmp_path, [name], None)
    assert what in caught.value.problem
    assert secret not in str(caught.value)


def test_a_result_as_it_is_passes_and_all_secrets_are_where_publish_looks(result: Path) -> None:
    assert publish(result, "me/model", dry_run=True).files
    (result / "onnx" / "layers.json").write_text("WANDB_API_KEY=" + "0a1b2c3d" * 5)
    with pytest.raises(PublishError, match="a secret of the environment"):
        publish(result, "me/model", dry_run=True)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("README.md", "made in /home/somebody/out", "/home/somebody/out"),
        ("report.html", 'title="/Users/some.body/x"', "/Users/some.body/x"),
        ("verify.json", r'{"a": "C:\\Users\\somebody\\out"}', "somebody"),
        ("prune_recipe.yaml", "files: [/data/corpus/a.txt]", "/data/corpus/a.txt"),
        ("onnx/build.log", "reads /tmp/build-1/model.onnx", "/tmp/build-1/model.onnx"),
        ("genai/genai_config.json", '{"a": "/home/maria/models/x"}', "/home/maria/models/x"),
        ("report.json", r'{"a": "D:\\models\\large"}', "models"),
    ],
)
def test_absolute_paths(result: Path, name: str, text: str, said: str) -> None:
    file = result / name
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    file.write_text(f"{before}\n{text}\n", encoding="utf-8")
    with pytest.raises(PublishError) as caught:
        refuse_secrets(result, [name], None)
    assert caught.value.where == f"{file}:{before.count(chr(10)) + 2}"
    assert said in caught.value.problem
    assert "--allow" in caught.value.fix


def test_paths_in_the_metadata_of_engines_and_weights(tmp_path: Path) -> None:
    import onnx

    graph = onnx.helper.make_graph([], "g", [], [])
    model = onnx.helper.make_model(graph)
    # As PyTorch names nodes: no path of any machine.
    model.graph.doc_string = "/model/layers.0/mlp/down_proj/MatMul"
    onnx.save(model, tmp_path / "model.onnx")
    refuse_secrets(tmp_path, ["model.onnx"], None)
    entry = model.metadata_props.add()
    entry.key, entry.value = "stack", 'File "/home/somebody/x.py", line 3'
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(PublishError, match=r"/home/somebody/x\.py"):
        refuse_secrets(tmp_path, ["model.onnx"], None)
    weight = np.zeros(4, np.float32)
    save_file({"a": weight}, tmp_path / "a.safetensors", metadata={"from": "/mnt/disk/base"})
    with pytest.raises(PublishError, match="/mnt/disk/base"):
        refuse_secrets(tmp_path, ["a.safetensors"], None)


def test_this_users_and_this_machines_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "jsmith42")
    monkeypatch.setenv("HOME", "/export/people/jsmith42")
    monkeypatch.setattr("socket.gethostname", lambda: "gpu-box-7")
    file = tmp_path / "README.md"
    for text, what in {
        "by jsmith42.": "this user's name: jsmith42",
        "on gpu-box-7": "this machine's name: gpu-box-7",
        "in /export/people/jsmith42/out": "this user's",
    }.items():
        file.write_text(text, encoding="utf-8")
        with pytest.raises(PublishError) as caught:
            refuse_secrets(tmp_path, ["README.md"], None, owner="me")
        assert what in caught.value.problem
    # Whose name is the repository's owner has none to hide, and a longer word is another one.
    file.write_text("hf.co/jsmith42/model, jsmith421, gpu-box-77", encoding="utf-8")
    refuse_secrets(tmp_path, ["README.md"], None, owner="jsmith42")
    # A home is looked for in a tokenizer's words as well.
    (tmp_path / "tokenizer.json").write_text('"/export/people/jsmith42/a", "/home/x/y"')
    with pytest.raises(PublishError, match="this user's home"):
        refuse_secrets(tmp_path, ["tokenizer.json"], None)


@pytest.mark.parametrize(
    "text",
    [
        "https://example.org/home/user/x and https://example.org/data/x",
        "hf://me/recipes/small, ./tmp/x, ../data/x, ~/data/x, a/home/b/c",
        "/model/layers.0/self_attn/MatMul, and/or, 1/2, km/h",
        "# !/usr, /data, /home/",
        "the path `--data-root corpus/`",
        "prune-export run hf://me/x --model MODEL; HF_TOKEN, TOKEN= and API_KEY=",
    ],
)
def test_what_is_no_trace(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    refuse_secrets(tmp_path, ["README.md"], None)


def test_words_of_a_tokenizer_are_nobodys(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "vocab.txt", "LICENSE", "onnx/merges.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('"/home/user/x": 3, "/usr/bin/env": 4', encoding="utf-8")
        refuse_secrets(tmp_path, [name], None)


def test_what_the_user_allows_passes_and_nothing_besides(result: Path) -> None:
    card = result / "README.md"
    text = card.read_text(encoding="utf-8")
    card.write_text(f"{text}\n/data/corpus/a.txt\n", encoding="utf-8")
    for allow in ((), ("/data/cor",), ("/",), ("",)):
        with pytest.raises(PublishError, match="/data/corpus"):
            publish(result, "me/model", dry_run=True, allow=allow)
    for allow in (("/data/corpus",), ("/data/corpus/",), ("/data/corpus/a.txt",)):
        assert publish(result, "me/model", dry_run=True, allow=allow).files
    card.write_text(f"{text}\n{'hf_' + 'ABCdef123' * 4}\n", encoding="utf-8")
    with pytest.raises(PublishError, match="a Hugging Face token"):
        publish(result, "me/model", dry_run=True, allow=("hf_" + "ABCdef123" * 4,))
