"""Shared by all tests: no network, quiet libraries, few threads, one tiny model with real text."""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from prune_export.checkpoint import filled
from prune_export.modeling import register
from tests.covers import all_but_few, left_out
from tests.measured_here import install

torch.set_num_threads(1)
# Tracing makes objects by the million, few of them in circles: looking for these was a tenth of it.
gc.set_threshold(100_000, 20, 50)

# The same examples in every run, however slow the machine: a test that fails, fails again.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
register()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps filled configs in a directory of these tests, not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filled, "user_cache", lambda: folder)
        folder = tmp_path_factory.mktemp("cache")
        yield


_module: list[object] = []


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Takes what each new file has imported out of the garbage collector's sight.

    Training collects garbage three times a run. With torch, transformers, peft and all tests in
    sight each time took 0.4 s of processor time, more than half of what healing a tiny model does.
    """
    if item.path not in _module:
        _module[:] = [item.path]
        gc.collect()
        gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves products over all families to `--all-pairs`, but for a cover of each.

    A row that is named on the command line runs.
    """
    named = any("[" in argument for argument in config.args)
    if named or config.getoption("--all-pairs"):
        return
    rest = left_out(items)
    if config.getoption("--few"):
        rest |= all_but_few(item for item in items if item not in rest)
    if rest:
        items[:] = [item for item in items if item not in rest]
        config.hook.pytest_deselected(items=list(rest))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-pairs",
        action="store_true",
        help="run every row of the products over families that are covers by default",
    )
    parser.addoption("--few", action="store_true", help="run one row of every test")


SENTENCES = (
    "The river runs through the old town and past the mill.",
    "Nobody had seen the lighthouse keeper since the storm.",
    "A model that is too large for its machine is of no use to anyone.",
    "She counted the blocks twice and wrote the number down.",
    "Bread, butter and a little salt were all that was left.",
)


def prose(seed: int, paragraphs: int) -> str:
    """Distinct short documents, one a line, made of the sentences in different orders."""
    chosen = torch.Generator().manual_seed(seed)
    lines = []
    for number in range(paragraphs):
        order = torch.randperm(len(SENTENCES), generator=chosen).tolist()
        lines.append(f"{seed}.{number} " + " ".join(SENTENCES[i] for i in order))
    return "\n".join(lines)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 6 blocks with a byte-level tokenizer, saved as users have it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_graph(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's fp32 graph, all logits."""
    from prune_export.contracts import Work
    from prune_export.exporters.onnx import Onnx
    from prune_export.machine import Machine
    from prune_export.progress import Silent

    machine = Machine(device="cpu", ram_bytes=8 << 30, gpu_bytes=0, threads=1)
    out = tmp_path_factory.mktemp("graph")
    Onnx().export(tiny_llama, out, Work(machine, Silent(), out.parent))
    return out / "model.onnx"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with calibration.txt, healing.jsonl and evaluation.txt, none overlapping."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "calibration.txt").write_text(prose(1, 40), encoding="utf-8")
    lines = (json.dumps({"text": line}) for line in prose(2, 60).splitlines())
    (root / "healing.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (root / "evaluation.txt").write_text(prose(3, 30), encoding="utf-8")
    return root


@pytest.fixture
def cli(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process: its exit status, standard output and standard error."""
    from prune_export.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["prune-export", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return run


@pytest.fixture
def measured_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines answer from threads of this process (`tests.measured_here`)."""
    install(monkeypatch)


@pytest.fixture
def genai_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs of `ort_genai` run here and not in two new processes for each export.

    What they compute is the same, and starting them costs four times as much: they import torch,
    transformers and the builder. As processes they run in `test_a_directory_for_onnxruntime_genai`
    and `test_a_failed_build_says_why`. What they change for good is put back here.
    """
    from onnxruntime_genai.models import builder
    from transformers import AutoModelForCausalLM

    def run(program: str, request: Mapping[str, Any], work: Any, follow: Any) -> None:
        del work, follow
        main = importlib.import_module(f"prune_export.exporters.ort_genai.{program}").main
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GIT_DIR", os.devnull)
            for owner, name in (
                (AutoModelForCausalLM, "from_pretrained"),
                (builder.Model, "make_inputs_and_outputs"),
            ):
                patch.setattr(owner, name, getattr(owner, name))
            main(json.loads(json.dumps(request)))

    monkeypatch.setattr("prune_export.exporters.ort_genai.exporter._run", run)
