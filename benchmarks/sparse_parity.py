"""Whether the sparse methods, in the order of published figures, are llm-compressor's to the mask.

    python benchmarks/sparse_parity.py --work DIR --peer-python PYTHON --tokenizer DIR

A small random llama is pruned by both from the same tokens, each in its own environment, and the
matrices are compared weight by weight. It takes seconds, and tells parity of method where
`sparse_quality.py` tells what the methods are worth.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

CASES = [(m, p) for m in ("wanda", "sparsegpt") for p in ("50%", "4:8", "6:8", "2:4")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="where all is written")
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="any; llm-compressor asks")
    options = parser.parse_args()
    model = _model(options.work)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(options.tokenizer / name, model / name)
    rows = []
    for method, pattern in CASES:
        versions = {}
        for who, python in (("ours", sys.executable), ("peer", str(options.peer_python))):
            shutil.rmtree(options.work / "out", ignore_errors=True)
            shutil.rmtree(options.work / who, ignore_errors=True)
            versions[who] = _pruned(who, python, model, options.work, method, pattern)
            (options.work / "out").rename(options.work / who)
        row = {"method": method, "pattern": pattern, **_compared(options.work)}
        rows.append(row | {"peer_version": versions["peer"]["version"]})
        print(rows[-1], flush=True)
    from _result import save

    print(save("sparse-parity", {"rows": rows}))


def _model(work: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    model.save_pretrained(work / "model")
    torch.save(torch.randint(0, 1000, (16, 64)), work / "calibration.pt")
    return work / "model"


def _pruned(
    who: str, python: str, model: Path, work: Path, method: str, pattern: str
) -> dict[str, Any]:
    script = str(Path(__file__).with_name("sparse_quality.py"))
    command = [python, script, "--model", str(model), "--data", str(work), "--work", str(work)]
    command += ["--threads", "1", "--job", who, "--method", method, "--pattern", pattern]
    environment = dict(os.environ)
    if who == "peer":
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [*command, "--order", "block"], capture_output=True, text=True, check=True, env=environment
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return found


def _compared(work: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    ours, peer = (load_file(work / who / "model.safetensors") for who in ("ours", "peer"))
    names = [name for name in ours if name.endswith("proj.weight")]
    differ = sum(int(((ours[name] == 0) != (peer[name] == 0)).sum()) for name in names)
    error = sum(float((ours[name] - peer[name]).square().sum()) for name in names)
    whole = sum(float(peer[name].square().sum()) for name in names)
    return {
        "weights": sum(ours[name].numel() for name in names),
        "zeros_ours": sum(int((ours[name] == 0).sum()) for name in names),
        "zeros_peer": sum(int((peer[name] == 0).sum()) for name in names),
        "masks_differ_at": differ,
        "relative_difference": (error / whole) ** 0.5,
    }


if __name__ == "__main__":
    main()
