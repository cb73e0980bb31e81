"""Configs of real models, one of most families: understood, with the parameters of their cards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from prune_export.arch import Arch

CARDS = yaml.safe_load((Path(__file__).parent / "cards.yaml").read_text(encoding="utf-8"))


LARGE = ("deepseek-ai/DeepSeek-V3", "MiniMaxAI/MiniMax-M2", "Qwen/Qwen3-Next-80B-A3B-Instruct")
"""Mixtures of more than ten thousand experts: two seconds each."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in CARDS],
)
def test_a_real_model_has_the_parameters_that_its_card_says(name: str) -> None:
    config: dict[str, Any] = CARDS[name]["config"]
    arch = Arch.from_config(AutoConfig.for_model(**config).to_dict())
    assert arch.parameters() == pytest.approx(CARDS[name]["billions"] * 1e9, rel=0.01)
