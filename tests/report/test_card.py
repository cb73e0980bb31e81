"""The card: metadata that huggingface_hub reads back, snippets that run, nothing unmeasured."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from onnx import TensorProto, helper

from prune_export import registry
from prune_export.report import write_report
from prune_export.report.benchmarks import eval_result_files
from prune_export.report.card import card_data, fenced, model_card, papers, sources, spanned
from prune_export.report.reading import Report
from prune_export.report.table import summary_rows
from tests.report.variants import made


def front(text: str) -> dict[str, Any]:
    """The front matter, as a YAML reader that is not huggingface_hub sees it."""
    _, head, _ = text.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(head)
    return found


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_metadata_survives_the_hub_library(written: Path) -> None:
    text = (written / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert card.data.to_dict() == front(text)
    assert front(text)["library_name"] == "transformers"
    assert front(text)["pipeline_tag"] == "text-generation"
    if index := front(text).get("model-index"):
        name, results = model_index_to_eval_results(index)
        assert name
        assert all(np.isfinite(result.metric_value) for result in results)
        # What the library makes of it is what was measured, no score lost or joined.
        measured = card_data(Report.of(made(written.name))).eval_results
        assert sorted(map(repr, results)) == sorted(map(repr, measured or []))


def test_front_matter_of_a_hub_model() -> None:
    report = made("large")
    found = front(model_card(report, repo_id="me/small"))
    index = found.pop("model-index")
    assert found == {
        "base_model": "meta-llama/Llama-3.1-405B",
        "base_model_relation": "finetune",
        "datasets": ["allenai/c4", "HuggingFaceFW/fineweb"],
        "library_name": "transformers",
        "license": "llama3.1",
        "pipeline_tag": "text-generation",
        "tags": ["pruning", "compression", "perplexity", "qlora", "onnx", "prune-export"],
    }
    (entry,) = index
    assert entry["name"] == "small"
    by_dataset = {one["dataset"]["type"]: one for one in entry["results"]}
    assert set(by_dataset) == {"Salesforce/wikitext", "mmlu", "arc_easy"}
    assert by_dataset["Salesforce/wikitext"]["dataset"]["config"] == "wikitext-2-raw-v1"
    assert by_dataset["Salesforce/wikitext"]["metrics"] == [
        {"type": "perplexity", "value": 32.46, "name": "Perplexity, 48 windows of 512 tokens"}
    ]


def test_blocks_are_named_only_where_some_are_gone() -> None:
    report = made("no_heal")
    assert f", pruned to {report['result']['layers']} blocks\n" in model_card(report)
    report["result"]["layers"] = report["base"]["layers"]
    assert "pruned to" not in model_card(report)


def test_a_relation_is_claimed_only_where_one_is_true() -> None:
    report = made("no_heal")
    report["base"] |= {"model": "org/base", "revision": "a" * 40}
    found = front(model_card(report))
    assert found["base_model"] == "org/base"
    assert "base_model_relation" not in found


@pytest.mark.parametrize("model", ["./models/base", "org/base", "model.gguf", "/data/base"])
def test_a_local_model_is_nobodys_base_model(model: str) -> None:
    report = made("full")
    report["base"] |= {"model": model, "revision": None}
    found = front(model_card(report))
    assert "base_model" not in found
    assert "base_model_relation" not in found


@pytest.mark.parametrize(
    ("licence", "expected"),
    [("apache-2.0", "apache-2.0"), ("MIT", "mit"), (None, None), ("other", None), ("see x", None)],
)
def test_licences_pass_through_or_are_left_out(licence: str | None, expected: str | None) -> None:
    report = made("full")
    report["base"]["license"] = licence
    assert front(model_card(report)).get("license") == expected


def test_what_is_not_a_number_is_no_result() -> None:
    data = card_data(Report.of(made("not_numbers")))
    assert data.eval_results is None
    assert "model-index" not in front(model_card(made("not_numbers")))


def test_every_number_in_the_table_is_the_summarys() -> None:
    text = model_card(made("full"))
    for cell in (
        "| 134.5M | 113.3M |",
        "| 21.93 | 32.46 | 1.48× (1.47–1.49) |",
        "no speedup: 1.01×",
    ):
        assert cell in text
    nothing = model_card(made("least"))
    body = nothing.split("---\n", 2)[2]
    # Beside sizes and the usage example, a report without measurements gives no numbers.
    body = re.sub(r"```.*?```", "", body, flags=re.DOTALL)
    assert set(re.findall(r"\d[\d.,]*", body)) <= {"10", "40", "0", "2"}


def test_failures_open_the_card() -> None:
    text = model_card(made("failures"))
    assert text.index("**Failed checks**") < text.index("## Use")
    assert "> - The checkpoint does not reload in stock transformers" in text
    assert "No remote code is needed" not in text
    assert "No remote code is needed" in model_card(made("full"))
    assert "Failed checks" not in model_card(made("full"))


def test_what_it_cannot_do_comes_before_what_it_can() -> None:
    for name in ("full", "failures", "least"):
        text = model_card(made(name))
        assert text.count("## Limits") == 1
        assert text.index("## Limits") < text.index("## Measured") < text.index("## Use")
    failing = model_card(made("failures"))
    assert failing.index("**Failed checks**") < failing.index("## Limits")


def test_each_engine_has_a_runtime_and_a_command() -> None:
    report = made("full")
    rows = [line for line in model_card(report).splitlines() if "prune-export serve . --" in line]
    assert [row.split(" | ")[2:4] for row in rows] == [
        ["ONNX Runtime", "`prune-export serve . --engine onnx`"],
        ["onnxruntime-genai", "`prune-export serve . --engine ort_genai`"],
    ]
    # Of an exporter that is not installed here no command is made up.
    report["exports"][0]["exporter"] = "other | `x`"
    assert "--engine other" not in model_card(report)


def with_tasks(*tasks: dict[str, Any]) -> dict[str, Any]:
    report = made("large")
    report["verification"]["tasks"] = list(tasks)
    return report


PRO = {"name": "mmlu_pro", "metric": "exact_match (custom-extract)", "dense": 0.5, "pruned": 0.4321,
       "samples": 12032}  # fmt: skip


def test_a_benchmark_of_the_hub_has_its_own_file(tmp_path: Path) -> None:
    report = with_tasks(PRO, PRO | {"name": "arc_easy", "metric": "acc"})
    (name, text), *others = eval_result_files(Report.of(report)).items()
    assert not others
    assert name == ".eval_results/mmlu_pro.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load(text))
    assert (entry.dataset_id, entry.task_id, entry.value) == (
        "TIGER-Lab/MMLU-Pro", "mmlu_pro", 43.21,
    )  # fmt: skip
    # There and not in the card as well.
    index = front(model_card(report))["model-index"]
    assert "mmlu_pro" not in {one["dataset"]["type"] for one in index[0]["results"]}
    written = write_report(report, tmp_path)
    assert (tmp_path / name).read_text(encoding="utf-8") == text
    assert tmp_path / name in written


@pytest.mark.parametrize(
    "change",
    [
        {"samples": 100},
        {"metric": "acc"},
        {"name": "mmlu"},
        {"pruned": math.nan},
        {"engine": "onnx"},
    ],
)
def test_a_part_of_a_benchmark_is_no_result_of_it(change: dict[str, Any]) -> None:
    report = with_tasks(PRO | change)
    assert eval_result_files(Report.of(report)) == {}
    if "pruned" not in change:
        results = front(model_card(report))["model-index"][0]["results"]
        assert PRO["pruned"] in {one["metrics"][0]["value"] for one in results}


def test_an_engines_score_has_a_row_and_a_name_of_its_own() -> None:
    report = with_tasks(PRO, PRO | {"engine": "onnx", "pruned": 0.4311})
    labels = [row.label for row in summary_rows(Report.of(report))]
    label = "mmlu_pro, exact_match (custom-extract)"
    assert [one for one in labels if one.startswith("mmlu_pro")] == [label, f"{label}, onnx"]
    results = front(model_card(report))["model-index"][0]["results"]
    (ours,) = [one for one in results if one["dataset"]["type"] == "mmlu_pro"]
    assert ours["metrics"][0]["name"].endswith("12032 samples, engine onnx")


def test_hostile_text_cannot_open_anything() -> None:
    text = model_card(made("hostile"))
    body = text.split("\n---\n", 1)[1]
    # Code blocks are taken as a Markdown reader would: the fence that opened closes.
    outside = re.sub(r"^(`{3,})[a-z]*\n.*?^\1$", "", body, flags=re.MULTILINE | re.DOTALL)
    spans = re.sub(r"(?<![`\\])(`+)(?!`).*?(?<!`)\1(?!`)", "", outside)
    assert "<script" not in spans
    assert "<img" not in spans
    assert not re.search(r"^(---|```)", spans, re.MULTILINE)
    assert yaml.safe_load(text.split("---\n", 2)[1])["tags"]


def test_fences_and_spans_outrun_backticks() -> None:
    assert fenced("a\n````\nb", "yaml") == "`````yaml\na\n````\nb\n`````"
    assert spanned("a`b``c") == "```a`b``c```"
    assert spanned("`a\nb") == "`` `a b ``"


def test_recipe_and_command_are_exact() -> None:
    report = made("full")
    text = model_card(report)
    assert report["recipe"]["text"].rstrip() in text
    assert blocks(text, "yaml") == [report["recipe"]["text"]]
    assert blocks(text, "sh") == [report["command"] + "\n"]


def test_papers_are_those_of_the_methods_used() -> None:
    text = model_card(made("full"))
    assert "https://arxiv.org/abs/2403.17887" in text
    assert "https://arxiv.org/abs/2305.14314" in text
    assert "2403.03853" not in text
    for arxiv, paper in papers().items():
        assert re.fullmatch(r"\d{4}\.\d{5}", arxiv)
        assert paper.bibtex.count("{") == paper.bibtex.count("}")


@pytest.mark.parametrize("name", [*registry.names("methods"), *registry.names("heal")])
def test_every_method_and_healer_names_its_source(name: str) -> None:
    """A number that is not among the papers is cited as a link alone: ours are all there."""
    kind = "methods" if name in registry.names("methods") else "heal"
    assert "Source:" in registry.find(kind, name).__doc__
    assert set(sources(name)) <= set(papers())


def test_a_paper_that_is_not_known_is_a_link() -> None:
    """A plug-in's docstring names its paper; nobody edits a list for it."""
    report = made("full")
    report["stages"] = [report["stages"][0] | {"name": "angular_distance"}]
    known = dict(papers())
    gone = known.pop("2403.17887")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prune_export.report.card.papers", lambda: known)
        text = model_card(report)
    assert gone.link in text
    assert gone.title not in text


def test_snippets_are_python_and_load_from_where_they_should() -> None:
    for repo_id, expected in ((None, 'path = "."'), ("me/small", '"me/small"')):
        found = blocks(model_card(made("full"), repo_id=repo_id), "python")
        assert len(found) == 3
        for code in found:
            compile(code, "card", "exec")
            assert expected in code
    assert len(blocks(model_card(made("no_export")), "python")) == 1
    for code in blocks(model_card(made("hostile")), "python"):
        compile(code, "card", "exec")


def counting_graph(path: Path, layers: int = 2, vocabulary: int = 50) -> None:
    """An ONNX file with the exporter's inputs and outputs; each token's successor is its id + 1.

    The caches grow by the tokens fed, and the logits depend on position and mask having the right
    sizes: a wrong feed fails in the runtime.
    """
    integer, real = TensorProto.INT64, TensorProto.FLOAT
    value = helper.make_tensor_value_info
    inputs = [
        value("input_ids", integer, ["batch", "sequence"]),
        value("attention_mask", integer, ["batch", "total_sequence"]),
        value("position_ids", integer, ["batch", "sequence"]),
    ]
    outputs = [value("logits", real, ["batch", "sequence", vocabulary])]
    successor = np.roll(np.eye(vocabulary, dtype=np.float32), 1, axis=1)
    constants = [
        helper.make_tensor("successor", real, successor.shape, successor.tobytes(), raw=True),
        helper.make_tensor("axes", integer, [2], [1, 3]),
        helper.make_tensor("wide", integer, [4], [1, 1, 1, 4]),
        helper.make_tensor("last", integer, [1], [2]),
    ]
    nodes = [
        helper.make_node("Sub", ["position_ids", "position_ids"], ["zeros"]),
        helper.make_node("Add", ["input_ids", "zeros"], ["ids"]),
        helper.make_node("Gather", ["successor", "ids"], ["logits"]),
        helper.make_node("Cast", ["ids"], ["real"], to=real),
        helper.make_node("Unsqueeze", ["real", "axes"], ["column"]),
        helper.make_node("Expand", ["column", "wide"], ["new"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=real),
        helper.make_node("Unsqueeze", ["mask", "axes"], ["masked"]),
    ]
    for layer in range(layers):
        for part in ("key", "value"):
            past, present = f"past_key_values.{layer}.{part}", f"present.{layer}.{part}"
            inputs.append(value(past, real, ["batch", 1, "past_sequence", 4]))
            outputs.append(value(present, real, ["batch", 1, "total_sequence", 4]))
            joined = f"joined.{layer}.{part}"
            nodes += [
                helper.make_node("Concat", [past, "new"], [joined], axis=2),
                # Fails unless the mask covers exactly the past and the new tokens.
                helper.make_node("Mul", [joined, "masked"], [present]),
            ]
    graph = helper.make_graph(nodes, "counting", inputs, outputs, constants[:3])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True)
    onnx.save(model, path)


def tiny_tokenizer(out: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["The", "capital", "of", "France", "is", *(f"w{number}" for number in range(45))]
    tokenizer = Tokenizer(models.WordLevel(dict(zip(words, range(50), strict=True)), "w44"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(out)


def test_the_onnx_snippet_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counting_graph(tmp_path / "onnx" / "model.onnx")
    tiny_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    (code,) = [one for one in blocks(model_card(made("full")), "python") if "onnxruntime as" in one]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "card", "exec"), {})
    counted = " ".join(f"w{number}" for number in range(32))
    assert capsys.readouterr().out.strip() == f"The capital of France is {counted}"


def test_the_transformers_snippet_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, bos_token_id=5, eos_token_id=6,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path)
    (code,) = blocks(model_card(made("no_export")), "python")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.startswith("The capital of France is ")
