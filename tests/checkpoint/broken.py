"""Every way a model directory can be broken that we know of, and what the error must say."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prune_export.errors import CheckpointError, PruneExportError, UnsupportedArch
from tests.checkpoint.raw_safetensors import parts, write

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.norm.weight"
Break = Callable[[Path], None]
CASES: list[Any] = []


def case(name: str, *said: str, kind: type[PruneExportError] = CheckpointError) -> Any:
    """A function that breaks a sound directory, and what the error must then say."""

    def register(function: Break) -> Break:
        CASES.append(pytest.param(function, said, kind, id=name))
        return function

    return register


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    header, data = parts(path / ONE)
    change(header)
    write(path / ONE, header, data)


def edit_index(path: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def first_shard(path: Path) -> Path:
    return min(path.glob("model-0*.safetensors"))


# --- the directory and config.json -------------------------------------------------------------


@case("no directory", "does not exist", "give a model directory")
def _(path: Path) -> None:
    shutil.rmtree(path)


@case("a file of safetensors", "is a file, expected a model directory")
def _(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"")


@case("no config.json", "config.json", "is missing", "save_pretrained")
def _(path: Path) -> None:
    (path / "config.json").unlink()


@case("an adapter instead of a model", "PEFT adapter", "merge_and_unload")
def _(path: Path) -> None:
    (path / "config.json").rename(path / "adapter_config.json")


@case("config.json is not JSON", "config.json", "is not JSON")
def _(path: Path) -> None:
    (path / "config.json").write_text("{")


@case("config.json is not text", "config.json", "is not UTF-8")
def _(path: Path) -> None:
    (path / "config.json").write_bytes(b"\xff\xfe\x00")


@case("config.json is nested without end", "config.json", "is nested deeper")
def _(path: Path) -> None:
    (path / "config.json").write_text("[" * 200_000)


@case("config.json is a list", "is a JSON list, expected an object")
def _(path: Path) -> None:
    (path / "config.json").write_text("[]")


@case("config.json is a directory", "is a directory")
def _(path: Path) -> None:
    (path / "config.json").unlink()
    (path / "config.json").mkdir()


@case("no model_type", "model_type", "got None", '"model_type": "llama"')
def _(path: Path) -> None:
    edit_config(path, model_type=None)


@case("quantized", "quantized (gptq)", "start from the unquantized model")
def _(path: Path) -> None:
    edit_config(path, quantization_config={"quant_method": "gptq", "bits": 4})


@case("unknown model type", "got 'lama'", "did you mean `llama`", kind=UnsupportedArch)
def _(path: Path) -> None:
    edit_config(path, model_type="lama")


@case("remote code", "code of its own, which is never run", kind=UnsupportedArch)
def _(path: Path) -> None:
    edit_config(path, model_type="mine", auto_map={"AutoConfig": "evil.Config"})


@case("a known type without a table", "no architecture table", kind=UnsupportedArch)
def _(path: Path) -> None:
    edit_config(path, model_type="mamba")


@case("multimodal, not described", "wraps a language model (llama)", kind=UnsupportedArch)
def _(path: Path) -> None:
    edit_config(path, model_type="video_llava", text_config={"model_type": "llama"})


@case("multimodal, with other weights", "is missing (284 of 341 tensors")
def _(path: Path) -> None:
    edit_config(path, model_type="gemma3", text_config={"model_type": "gemma3_text"})


@case("a config value of the wrong type", "transformers refuses it", "hidden_size")
def _(path: Path) -> None:
    edit_config(path, hidden_size="wide")


# --- the weights' files ------------------------------------------------------------------------


@case("no weights", "has no weights", INDEX)
def _(path: Path) -> None:
    (path / ONE).unlink()


@case("only a pickle", "pytorch_model.bin", "pickles can run code", "save_pretrained")
def _(path: Path) -> None:
    (path / ONE).unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04.")


@case("a sharded pickle", "pickles can run code", "save_pretrained")
def _(path: Path) -> None:
    (path / ONE).unlink()
    (path / "pytorch_model.bin.index.json").write_text("{}")


@case("only GGUF inside", "has no weights", "name the .gguf file itself")
def _(path: Path) -> None:
    (path / ONE).rename(path / "model.Q4_0.gguf")


@case("weights under another name", "got weights.safetensors")
def _(path: Path) -> None:
    (path / ONE).rename(path / "weights.safetensors")


@case("an empty file", "got 0 bytes, expected at least the 8")
def _(path: Path) -> None:
    (path / ONE).write_bytes(b"")


@case("a pipe", "is a pipe")
def _(path: Path) -> None:
    (path / ONE).unlink()
    os.mkfifo(path / ONE)


@case("a broken link", "has no weights")
def _(path: Path) -> None:
    (path / ONE).unlink()
    (path / ONE).symlink_to("../blobs/none")


@case("truncated data", "is truncated: got", "the header describes", "fetch or write it again")
def _(path: Path) -> None:
    os.truncate(path / ONE, (path / ONE).stat().st_size - 1)


@case("truncated header", "is truncated: announces a header of")
def _(path: Path) -> None:
    os.truncate(path / ONE, 100)


@case("bytes after the end", "has bytes after its last tensor")
def _(path: Path) -> None:
    with (path / ONE).open("ab") as file:
        file.write(b"\0")


@case("an absurd header length", "announces a header of 9223372036854775807", "not a safetensors")
def _(path: Path) -> None:
    (path / ONE).write_bytes(struct.pack("<Q", 2**63 - 1) + b"{}")


@case("a pickle named safetensors", "announces a header of", "not a safetensors file")
def _(path: Path) -> None:
    torch.save({"a": torch.ones(2)}, path / ONE)


@case("a header that is not JSON", "its header is not JSON")
def _(path: Path) -> None:
    write(path / ONE, b"{]", b"")


@case("a header that is a list", "its header is a JSON list")
def _(path: Path) -> None:
    write(path / ONE, b"[]", b"")


@case("a tensor named twice", "names a.weight twice")
def _(path: Path) -> None:
    row = b'"a.weight":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    write(path / ONE, b"{" + row + b"," + row + b"}", b"")


@case("metadata that is not strings", "__metadata__", "object of strings")
def _(path: Path) -> None:
    edit_header(path, lambda header: header.update(__metadata__={"format": 1}))


@case("an unknown dtype", NORM, "got dtype 'F31'", "`F32`")
def _(path: Path) -> None:
    edit_header(path, lambda header: header[NORM].update(dtype="F31"))


@case("a negative size", NORM, "expected a list of sizes")
def _(path: Path) -> None:
    edit_header(path, lambda header: header[NORM].update(shape=[-32]))


@case("a size without end", NORM, "expected a list of sizes")
def _(path: Path) -> None:
    edit_header(path, lambda header: header[NORM].update(shape=[10**4000] * 3))


@case("a dtype that is no name", NORM, "got dtype {'F': 32}")
def _(path: Path) -> None:
    edit_header(path, lambda header: header[NORM].update(dtype={"F": 32}))


@case("a name that is no text", "'\\ud800'", "is not a name that can be printed")
def _(path: Path) -> None:
    row = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    edit_header(path, lambda header: header.update({"\ud800": row}))


@case("a size that is no number", NORM, "expected a list of sizes")
def _(path: Path) -> None:
    edit_header(path, lambda header: header[NORM].update(shape=[True]))


@case("a row without offsets", NORM, "expected dtype, shape and data_offsets")
def _(path: Path) -> None:
    edit_header(path, lambda header: header[NORM].pop("data_offsets"))


@case("offsets the wrong way round", NORM, "expected [start, stop]")
def _(path: Path) -> None:
    edit_header(path, lambda header: header[NORM]["data_offsets"].reverse())


@case("more bytes than the shape takes", NORM, "covers 128 bytes, F16 [32] takes 64")
def _(path: Path) -> None:
    edit_header(path, lambda header: header[NORM].update(dtype="F16"))


@case("overlapping tensors", "overlaps")
def _(path: Path) -> None:
    def shift(header: dict[str, Any]) -> None:
        header[NORM]["data_offsets"] = [at - 128 for at in header[NORM]["data_offsets"]]

    edit_header(path, shift)


@case("a gap between tensors", "leaves a gap after")
def _(path: Path) -> None:
    edit_header(path, lambda header: header.pop("model.layers.2.mlp.up_proj.weight"))


# --- the index -----------------------------------------------------------------------------------


@case("an index that is not JSON", INDEX, "is not JSON")
def sharded_1(path: Path) -> None:
    (path / INDEX).write_text("weights")


@case("an index without a map", "weight_map", "expected tensor names and their shards")
def sharded_2(path: Path) -> None:
    (path / INDEX).write_text("{}")


@case("an index that climbs out", "'../model.safetensors'", "points outside the directory")
def sharded_3(path: Path) -> None:
    edit_index(path, lambda names: names.update({NORM: "../model.safetensors"}))


@case("an index with an absolute name", "points outside the directory", "do not use this model")
def sharded_4(path: Path) -> None:
    edit_index(path, lambda names: names.update({NORM: "/etc/passwd"}))


@case("an index with another system's path", "points outside the directory")
def sharded_5(path: Path) -> None:
    edit_index(path, lambda names: names.update({NORM: "..\\model.safetensors"}))


@case("an index naming a pickle", "'model.bin', which is not safetensors")
def sharded_6(path: Path) -> None:
    edit_index(path, lambda names: names.update({NORM: "model.bin"}))


@case("an index naming a number", "got 3, expected a file name")
def sharded_7(path: Path) -> None:
    edit_index(path, lambda names: names.update({NORM: 3}))


@case("a missing shard", "is a shard that does not exist", "fetch model-00001-of-")
def sharded_8(path: Path) -> None:
    first_shard(path).unlink()


@case("a truncated shard", "model-00001-of-", "is truncated: got")
def sharded_9(path: Path) -> None:
    shard = first_shard(path)
    os.truncate(shard, shard.stat().st_size - 7)


@case("a tensor that its shard lacks", "no.such.weight", "should be in", "does not hold it")
def sharded_10(path: Path) -> None:
    edit_index(path, lambda names: names.update({"no.such.weight": first_shard(path).name}))


@case("a tensor in another shard than listed", NORM, "does not hold it")
def sharded_11(path: Path) -> None:
    edit_index(path, lambda names: names.update({NORM: min(names.values())}))


@case("a tensor that the index lacks", NORM, "but not in the index")
def sharded_12(path: Path) -> None:
    edit_index(path, lambda names: names.pop(NORM))


@case("a tensor in two shards", "is also in extra.safetensors", "expected each tensor in one shard")
def sharded_13(path: Path) -> None:
    shutil.copy(first_shard(path), path / "extra.safetensors")
    edit_index(path, lambda names: names.update({NORM: "extra.safetensors"}))


# --- weights that are not of this config --------------------------------------------------------


@case("a missing tensor", NORM, "is missing (1 of 57", "unexpected: model.norm.weights")
def _(path: Path) -> None:
    edit_header(path, lambda header: header.update({f"{NORM}s": header.pop(NORM)}))


@case("an unexpected tensor", "extra.weight", "is not part of a llama model")
def _(path: Path) -> None:
    row = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    edit_header(path, lambda header: header.update({"extra.weight": row}))


@case("a block too many", "model.layers.5.", "is not part of a llama model")
def _(path: Path) -> None:
    edit_config(path, num_hidden_layers=5)


@case("a wrong shape", NORM, "got shape [4, 8], expected [32] (residual)")
def _(path: Path) -> None:
    edit_header(path, lambda header: header[NORM].update(shape=[4, 8]))


@case("a config of another width", "got shape [48, 32], expected [96, 32] (mlp")
def _(path: Path) -> None:
    edit_config(path, intermediate_size=96)


@case("integers for weights", NORM, "got dtype I32, expected plain floats", "unquantized")
def _(path: Path) -> None:
    edit_header(path, lambda header: header[NORM].update(dtype="I32"))
