"""Kills runs at random moments and resumes them: do they end in the bytes of an unbroken run?

    python benchmarks/kill_and_resume.py [--runs 20] [--model DIR] [--text DIR]

Each run has a store of its own, is killed (SIGKILL, with all of its processes) after a random time
between 0 and that of an unbroken run, and then given again until it ends by itself. Compared are
all files of the result except those that hold measured times (report, card, verify.json, figures).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _result import save

RECIPE = """\
recipe: 1
description: Prune, heal and export.
data:
  calibration: {files: [calibration.jsonl], samples: 8, length: 64}
  healing: {files: [healing.jsonl], samples: 64, length: 64}
stages:
  - prune: {method: angular_distance, remove: 2}
  - heal: {method: qlora, rank: 4, steps: 30, batch: 2, learning_rate: 1.0e-3, save_every: 2}
export:
  - onnx: {precision: fp32}
verify: {parity: false, generation: false}
"""
MEASURED = ("report.json", "report.html", "README.md", "verify.json", "figures/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--model", type=Path, help="a checkpoint; a tiny random one unless given")
    parser.add_argument("--text", type=Path, default=Path(".demo"), help="calibration, healing")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    chance = random.Random(chosen.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
        model = chosen.model or tiny(root / "model", chosen.text)
        command = [
            "prune-export", "run", str(root / "recipe.yaml"), "--model", str(model),
            "--data-root", str(chosen.text), "--threads", "1", "-q",
        ]  # fmt: skip
        whole = root / "whole"
        began = time.monotonic()
        finished(command, whole)
        unbroken = time.monotonic() - began
        wanted = digests(whole / "out")
        rows = []
        for number in range(chosen.runs):
            at = chance.uniform(0.0, unbroken)
            place = root / f"run-{number}"
            died = killed(command, place, at)
            stage = reached(place / "store")
            finished(command, place)
            equal = digests(place / "out") == wanted
            rows.append({"killed_at_s": round(at, 2), "died": died, "at": stage, "equal": equal})
            print(f"{number + 1:3}  killed at {at:6.1f} s in {stage or 'start':<40} equal: {equal}")
            shutil.rmtree(place)
    same = sum(row["equal"] for row in rows)
    print(f"{same} of {len(rows)} equal; files compared: {len(wanted)}")
    save(
        "kill-and-resume",
        {"unbroken_s": unbroken, "files": sorted(wanted), "equal": same, "runs": rows},
    )
    sys.exit(same != len(rows))


def finished(command: list[str], place: Path) -> None:
    done = subprocess.run(started(command, place), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"a run failed:\n{done.stdout}\n{done.stderr}")


def started(command: list[str], place: Path) -> list[str]:
    return [*command, "--store", str(place / "store"), "--out", str(place / "out")]


def killed(command: list[str], place: Path, seconds: float) -> bool:
    """Starts a run and kills its whole process group; False when it had ended before."""
    process = subprocess.Popen(
        started(command, place),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


def reached(store: Path) -> str:
    """The artifact that was being built when the run died."""
    partial = [path.name.removesuffix(".partial") for path in store.glob("*.partial")]
    return partial[0] if partial else ""


def digests(out: Path) -> dict[str, str]:
    found = {}
    for file in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(file.relative_to(out))
        if not name.startswith(MEASURED):
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def tiny(folder: Path, text: Path) -> Path:
    """A random Llama of 6 blocks with a tokenizer trained on the text."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=["<s>", "</s>"])
    raw.train([str(text / "calibration.jsonl")], trainer)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
