"""Model types of ours are known to transformers in whatever order things are imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

KNOWN = """
config = AutoConfig.for_model(
    "sliced_llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2,
)
model = AutoModelForCausalLM.from_config(config)
assert type(model).__module__ == "prune_export.modeling.modeling_sliced"
assert type(model).__name__ == "SlicedLlamaForCausalLM"
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import prune_export\nfrom transformers import AutoConfig, AutoModelForCausalLM",
        "from transformers import AutoConfig, AutoModelForCausalLM\nimport prune_export",
        # Imports the automatic classes in the middle of importing itself.
        "import prune_export\nfrom transformers import LlamaForCausalLM\n"
        "from transformers import AutoConfig, AutoModelForCausalLM",
        "import prune_export\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        "from transformers import AutoConfig, AutoModelForCausalLM",
        # Looks for it without importing it.
        "import prune_export\nfrom importlib.util import find_spec\n"
        "find_spec('transformers.models.auto.configuration_auto')\n"
        "from transformers import AutoConfig, AutoModelForCausalLM",
        "from transformers import AutoConfig\nimport prune_export\n"
        "from transformers import AutoModelForCausalLM",
    ],
)
def test_types_are_known(imports: str) -> None:
    subprocess.run([sys.executable, "-c", imports + KNOWN], check=True)


def test_importing_us_imports_no_transformers() -> None:
    code = "import sys, prune_export; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
