"""What a reader is told before trusting a result: each sentence on its own cause."""

from __future__ import annotations

import pytest

from prune_export.exporters.ort_genai.tokens import DIFFERENT
from prune_export.report.caveats import caveats, failed
from prune_export.report.reading import Report
from tests.report.variants import made


def said(name: str) -> list[str]:
    return [caveat.text for caveat in caveats(made(name))]


def failures(name: str) -> list[str]:
    return [caveat.text for caveat in caveats(made(name)) if caveat.kind == "failure"]


def test_a_good_run_has_limits_only() -> None:
    assert failures("full") == []
    assert not failed(made("full"))
    assert said("full") == [
        "genai differs from PyTorch: 41 of 64 greedy tokens agree, largest logit error 1.834.",
        "genai has a perplexity of 32.71, the checkpoint itself 32.46: the engine's precision "
        "costs that.",
        "Of 12 greedy continuations, healed gave 3 repetitive (dense: 0 empty, 1 repetitive, "
        "0 broken).",
        "genai, prefill (prompt 128, new 32): no speedup: 1.01× (1.01–1.02).",
        "Speed holds for the machine, threads and workloads named here; measure again on yours.",
    ]


def test_failures_come_first() -> None:
    kinds = [caveat.kind for caveat in caveats(made("failures"))]
    assert kinds == sorted(kinds, key=lambda kind: kind != "failure")
    assert failures("failures") == [
        "The checkpoint does not reload in stock transformers: 4 missing (a.weight, b, c, …), "
        "1 unexpected (z).",
        "The recipe's gate is not met: onnx decode speedup (batch 1, prompt 128, new 32), claimed "
        "1.40, measured 1.16.",
        "onnx does not compute what PyTorch does: largest logit error 3.500, allowed 0.001; "
        "2 of 64 greedy tokens agree.",
    ]
    assert failed(made("failures"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no_verification", "Nothing was verified: the run had no verification."),
        ("not_numbers", "The perplexity of pruned is not a number."),
        ("not_numbers", "The perplexity of healed is infinite."),
    ],
)
def test_other_failures(name: str, text: str) -> None:
    assert text in failures(name)
    assert failed(made(name))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no_heal", "The model was not healed (trained) after pruning."),
        ("no_heal", "The result's perplexity is 4.41× that of the dense model: expect visibly "
         "worse text."),
        ("no_export", "No engine was exported."),
        ("no_export", "Speed was not measured."),
        ("nothing_measured", "Perplexity was not measured."),
        ("slower", "onnx, decode (prompt 128, new 32) is slower than dense: 0.72× slower "
         "(0.70–0.75)."),
        ("no_speedup", "onnx, decode (prompt 128, new 32): no speedup: 1.00× (0.98–1.01)."),
        ("one_sample", "Some speeds rest on 1 timed round only."),
        ("one_sample", "Perplexity rests on 1 window only."),
        ("one_sample", "onnx, decode (prompt 128, new 32): dense against dense spread over "
         "0.80–1.30 on this machine, so smaller speedups could not be seen."),
        ("least", "The base model's licence is not known; it applies to this one too."),
    ],
)  # fmt: skip
def test_limits(name: str, text: str) -> None:
    assert text in said(name)


def test_a_known_licence_and_a_healed_model_are_not_limits() -> None:
    text = " ".join(said("full"))
    assert "licence" not in text
    assert "not healed" not in text


def test_the_protocol_of_perplexity_is_named() -> None:
    """What each window begins with, and what of conversations counts."""
    report = made("full")
    assert Report.of(report).protocol == ""
    report["data"]["evaluation"] |= {"prefix": "every window", "loss_on": "assistant"}
    found = Report.of(report)
    assert found.protocol == (
        "each begun as the tokenizer begins a text, only what the assistant says"
    )
    assert len(caveats(report)) == 5
    report["data"]["evaluation"] |= {"prefix": "first window"}
    assert "cut from one stream, of which only the first" in Report.of(report).protocol
    assert any("(the papers' protocol)" in caveat.text for caveat in caveats(report))


def test_an_engines_own_tokenizer_that_differs_is_told() -> None:
    report = made("full")
    told = f"{DIFFERENT} for 2 of 22 texts (' <|x|>'): feed it ids"
    report["exports"][0]["notes"] = ["tried on 9 positions", told]
    assert f"{told}." in [caveat.text for caveat in caveats(report)]
