"""What a report says of healing: what was trained, for what, on what, the teacher's own loss."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from prune_export.report import Report, model_card, write_report
from prune_export.report.caveats import caveats
from prune_export.report.healing import distilled, floor, healing_text, held_out, said_text

FULL = json.loads((Path(__file__).parent / "full.json").read_text(encoding="utf-8"))
TRAINING = {
    "targets": ["q", "v"], "rank": 8, "adapter_parameters": 12_000, "steps": 100, "batch": 2,
    "kept": 64, "objective": {"distill": {"divergence": "forward_kl", "cross_entropy": 0.25}},
}  # fmt: skip
SAID = {
    "from": "https://a.example/v1", "model": "big", "prompts": "bundled", "answers": 1200,
    "terms": "a server's answers may be bound by its operator's terms of use",
}  # fmt: skip


def report(**log: Any) -> Report:
    found = copy.deepcopy(FULL)
    heal = next(stage for stage in found["stages"] if stage["kind"] == "heal")
    heal["data"] = "healing"
    heal["log"] |= {
        "training": TRAINING,
        "teacher": {"model": "dense-1", "id": "m"},
        "held_out": {
            "windows": 8,
            "loss": {"before": 3.5, "trained": 3.25, "merged": 3.251, "teacher": 2.875},
        },
    } | log
    found["data"]["healing"] = {"samples": 40, "length": 256, "generated": SAID}
    return Report.of(found)


def test_what_was_trained_and_on_what_is_said_in_a_few_sentences() -> None:
    found = report()
    (stage,) = found.heals
    assert healing_text(stage, found) == (
        "Trained adapters of rank 8, 12.0k numbers (q, v), 100 steps of 2 windows. Learnt to say "
        "what dense-1 says (forward KL, 25% next token, 64 likeliest tokens kept). Data: "
        "`healing`, 40 windows of 256 tokens, 1,200 answers to bundled prompts by big at "
        "https://a.example/v1. Held-out next-token loss: 3.500 before, 3.251 after, 2.875 of the "
        "teacher itself."
    )


def test_the_floor_is_the_teachers_own_share() -> None:
    (stage,) = report().heals
    assert floor(stage) == pytest.approx(0.25 * 2.875)
    pure = TRAINING | {"objective": {"distill": {"divergence": "jsd"}}}
    (stage,) = report(training=pure).heals
    assert floor(stage) == 0
    (stage,) = report(training=TRAINING | {"objective": "next_token"}).heals
    assert (floor(stage), distilled(stage)) == (None, None)


def test_a_strangers_log_is_looked_at_first() -> None:
    bad: list[Any] = [None, 3, "x", [], {"objective": 3}, {"objective": {"distill": []}},
                      {"targets": 3, "trained_parameters": "many", "steps": None}]  # fmt: skip
    for training in bad:
        found = report(training=training, held_out={"loss": {"before": "low", "merged": None}})
        (stage,) = found.heals
        assert isinstance(healing_text(stage, found), str)
        assert floor(stage) in (None, 0)
    (stage,) = report(held_out={"loss": {"before": float("nan"), "teacher": 1}}).heals
    assert held_out(stage) == {"teacher": 1.0}


def test_page_card_and_caveats_have_it(tmp_path: Path) -> None:
    found = report()
    card = model_card(found)
    assert "2.875 of the teacher itself" in card
    assert "1,200 answers to bundled prompts by big" in card.replace("\n", " ")
    texts = [one.text for one in caveats(found)]
    assert sum("terms of use" in text for text in texts) == 1
    write_report(found, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "2.875 of the teacher itself" in page
    assert "distinct tokens, pairs, triples" in page
    assert (tmp_path / "figures" / "loss_curve.png").exists()


def test_what_is_said_of_free_samples() -> None:
    about = {"generated": {"from": "dense", "model": "m", "prompts": "none", "answers": 3}}
    assert said_text(about) == "3 free samples by m"
    assert said_text({"files": ["a.txt"]}) == ""
