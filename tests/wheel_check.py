"""The built wheel in an empty environment, with the dependencies that pip finds for it.

    python tests/wheel_check.py            # make wheel-check; minutes, of which most are downloads

Not collected by pytest: it needs a package index. What it shows: the command's version, README's
library example on a tiny random model, and that mypy sees the types in a user's script.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]

TINY = """\
from pathlib import Path
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
raw = Tokenizer(models.BPE(vocab={word: at for at, word in enumerate(words)}, merges=[]))
raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
raw.decoder = decoders.ByteLevel()
config = LlamaConfig(
    vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
)
LlamaForCausalLM(config).save_pretrained(".demo/tiny")
PreTrainedTokenizerFast(
    tokenizer_object=raw, bos_token="<s>", eos_token="</s>"
).save_pretrained(".demo/tiny")
"""
RECIPE = "recipe: 1\nmodel: tiny\nstages:\n  - prune: {method: deepest, remove: 1}\n"
USER = """\
from pathlib import Path
from prune_export import Machine, Options, Recipe, plan
options = Options(out=Path("out"), store=Path("store"), machine=Machine.detect())
reveal_type(plan(Recipe.load("recipe.yaml"), None, options).peak_ram_bytes)
Options(out=1)
"""


def told(folder: Path, *command: str) -> str:
    """What a command says in `folder`, with the time it took; it must succeed."""
    start = time.monotonic()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    print(f"{time.monotonic() - start:6.1f} s  {' '.join(command)[:120]}", flush=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return done.stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        told(ROOT, sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", name)
        (wheel,) = folder.glob("*.whl")
        told(folder, sys.executable, "-m", "venv", "own")
        python, pip = str(folder / "own/bin/python"), (str(folder / "own/bin/pip"), "install", "-q")
        # Constraints as in `make`: a build of torch for the CPU, from whatever index pip knows.
        told(folder, *pip, "-c", str(ROOT / "constraints.txt"), str(wheel))
        held = json.loads(told(folder, python, "-m", "pip", "list", "--format", "json"))
        print(f"{len(held)} distributions; none of them is an editable install")
        assert not any("editable_project_location" in one for one in held)

        print(told(folder, str(folder / "own/bin/prune-export"), "--version").strip())
        (folder / "recipes").mkdir()
        (folder / "recipes/demo.yaml").write_text(RECIPE, encoding="utf-8")
        told(folder, python, "-c", TINY)
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        (example,) = (
            code for code in re.findall(r"```python\n(.*?)```", readme, re.S) if "load(" in code
        )
        print(told(folder, python, "-c", example).strip())

        told(folder, *pip, "mypy")
        (folder / "user.py").write_text(USER, encoding="utf-8")
        mypy = subprocess.run(
            [python, "-m", "mypy", "user.py"], cwd=folder, capture_output=True, text=True,
            check=False,
        ).stdout  # fmt: skip
        print(mypy.strip())
        assert 'Revealed type is "int"' in mypy or 'Revealed type is "builtins.int"' in mypy
        assert 'incompatible type "int"; expected "Path"' in mypy
        assert "missing library stubs or py.typed" not in mypy.split("prune_export", 1)[0]


if __name__ == "__main__":
    main()
