"""One realistic report, and what else a report can be. Numbers but the distance map are invented.

The map and the block scores of full.json are SmolLM2-135M's own, on 24 windows of Wikipedia text.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prune_export.exporters.ort_genai.tokens import DIFFERENT

FULL = json.loads(Path(__file__).with_name("full.json").read_text(encoding="utf-8"))
HOSTILE = (
    '<script>alert("1")</script> "><img src=x onerror=alert(1)> ```\n---\n| a | $x^2$ {{7*7}} ]( '
    "模型🦙"
)

Report = dict[str, Any]


def no_heal(report: Report) -> None:
    report["stages"] = report["stages"][:1]
    checks = report["verification"]
    checks["perplexity"] = [one for one in checks["perplexity"] if one["name"] != "healed"]


def no_export(report: Report) -> None:
    report["exports"] = []
    checks = report["verification"]
    checks |= {"parity": [], "speed": [], "gates": []}
    checks["perplexity"] = checks["perplexity"][:3]


def no_verification(report: Report) -> None:
    report["verification"] = None


def nothing_measured(report: Report) -> None:
    checks = report["verification"]
    report["verification"] = {"reload": checks["reload"]}


def failures(report: Report) -> None:
    checks = report["verification"]
    checks["reload"] |= {"ok": False, "missing": ["a.weight", "b", "c", "d"], "unexpected": ["z"]}
    checks["parity"][0] |= {"ok": False, "max_logit_error": 3.5, "greedy_equal": 2}
    checks["gates"][0] |= {"ok": False, "claimed": 1.4}


def no_speedup(report: Report) -> None:
    for one in report["verification"]["speed"]:
        one |= {"verdict": "no speedup", "ratio": 0.997, "low": 0.98, "high": 1.013}


def slower(report: Report) -> None:
    for one in report["verification"]["speed"]:
        one |= {"verdict": "slower", "ratio": 0.72, "low": 0.7, "high": 0.75}


def not_numbers(report: Report) -> None:
    checks = report["verification"]
    for one in checks["perplexity"][1:]:
        one |= {"value": None, "losses": [None, *one["losses"][1:]]}
    checks["perplexity"][2]["value"] = float("inf")
    checks["speed"][0] |= {"ratio": None, "low": None, "high": None, "verdict": "no speedup"}
    checks["parity"][1] |= {"max_logit_error": None, "mean_kl": None}
    checks["gates"][0] |= {"measured": None, "ok": False}
    report["stages"][1]["log"]["loss"][3:9] = [[step, None, 0.1] for step in range(4, 10)]
    report["stages"][0]["log"]["block_scores"][4] = None


def exploded(report: Report) -> None:
    values = {"pruned": 4.1e7, "healed": 1234.5}
    for one in report["verification"]["perplexity"]:
        one["value"] = values.get(one["name"], one["value"])


def one_block(report: Report) -> None:
    report["base"]["layers"] = report["result"]["layers"] = 1
    log = report["stages"][0]["log"]
    log |= {"dropped": [], "kept": [0], "distance_map": [[None, 0.4], [None, None]]}
    log["block_scores"] = [0.4]


def one_sample(report: Report) -> None:
    checks = report["verification"]
    for one in checks["speed"]:
        one |= {
            "dense_seconds": [0.5],
            "pruned_seconds": [0.4],
            "floor_low": 0.8,
            "floor_high": 1.3,
        }
    for one in checks["perplexity"]:
        one |= {"windows": 1, "losses": one["losses"][:1]}
    log = report["stages"][1]["log"]
    log["loss"] = log["loss"][:1]


def long_names(report: Report) -> None:
    name = "some-organisation/" + "an-extremely-long-model-name-" * 8
    report["base"] |= {"model": name, "revision": "d" * 40}
    report["recipe"]["name"] = "recipe-" * 20
    checks = report["verification"]
    for part in ("speed", "parity"):
        for one in checks[part]:
            one["engine"] += "-with-a-very-long-directory-name" * 3
    for one in checks["perplexity"][3:]:
        one["name"] += "-with-a-very-long-directory-name" * 3
    checks["gates"][0]["what"] = "speedup of something " * 12


def hostile(report: Report) -> None:
    report["base"] |= {"model": HOSTILE, "id": HOSTILE, "dtype": HOSTILE, "license": HOSTILE}
    report["recipe"] = {"name": HOSTILE, "description": HOSTILE, "text": f"```\n{HOSTILE}\n````\n"}
    report["command"] = HOSTILE
    for stage in report["stages"]:
        stage |= {"name": HOSTILE, "parameters": {HOSTILE: HOSTILE}, "id": HOSTILE}
        stage["log"] |= {"block_score_name": HOSTILE, HOSTILE: HOSTILE}
    for export in report["exports"]:
        export |= {"directory": HOSTILE, "graph": HOSTILE, "version": HOSTILE}
        export |= {"notes": [HOSTILE, f"{DIFFERENT} {HOSTILE}"]}
        export |= {"toolchain": {HOSTILE: HOSTILE}, "parameters": {"precision": HOSTILE}}
    report["data"] = {HOSTILE: {"dataset": HOSTILE, HOSTILE: [HOSTILE, {HOSTILE: HOSTILE}]}}
    checks = report["verification"]
    checks["reload"] |= {"ok": False, "model_type": HOSTILE, "missing": [HOSTILE]}
    checks["machine"] = {"processor": HOSTILE, HOSTILE: HOSTILE}
    for one in [*checks["speed"], *checks["parity"]]:
        one["engine"] = HOSTILE
    for one in checks["perplexity"][3:]:
        one["name"] = HOSTILE
    for one in checks["generation"]:
        one |= {"examples": [{"prompt": HOSTILE, "text": HOSTILE}], "broken": 3}
    checks["gates"][0]["what"] = HOSTILE
    checks["tasks"] = [
        {"name": HOSTILE, "metric": HOSTILE, "dense": 0.5, "pruned": 0.4, "samples": 10}
    ]


def large(report: Report) -> None:
    """126 blocks, scattered cuts, two workloads, lm-eval tasks, data from the Hub."""
    layers = 126
    gone = [20, 33, 34, 35, *range(60, 90), 101]
    report["base"] |= {"model": "meta-llama/Llama-3.1-405B", "revision": "e" * 40, "layers": layers}
    report["base"] |= {
        "parameters": 405_853_388_800,
        "bytes": 811_706_777_600,
        "license": "llama3.1",
    }
    report["result"] = {"parameters": 290_000_000_000, "bytes": 580_000_000_000, "layers": 91}
    stage = report["stages"][0]
    stage |= {"name": "perplexity", "parameters_after": 290_000_000_000}
    scores = [6.0 + 900 / (1 + block) ** 2 + block % 7 * 0.1 for block in range(layers)]
    stage["log"] = {"dropped": gone, "block_scores": scores, "block_score_name": "perplexity"}
    source = {"dataset": "allenai/c4", "config": "en", "split": "train", "revision": "f" * 40}
    report["data"] = {
        "calibration": source | report["data"]["calibration"],
        "healing": source | {"dataset": "HuggingFaceFW/fineweb"},
        "evaluation": {"dataset": "Salesforce/wikitext", "config": "wikitext-2-raw-v1"},
    }
    checks = report["verification"]
    again = copy.deepcopy(checks["speed"][:2])
    for one in again:
        one["workload"] = {"batch": 8, "prompt": 2048, "new": 256}
    checks["speed"] += again
    checks["tasks"] = [
        {"name": "mmlu", "metric": "acc", "dense": 0.8732, "pruned": 0.8011, "samples": 14042},
        {"name": "arc_easy", "metric": "acc_norm", "dense": None, "pruned": 0.71, "samples": 2376},
    ]


def two_of_each(report: Report) -> None:
    prune, heal = report["stages"]
    second = copy.deepcopy(prune) | {"index": 2}
    second["log"] |= {"dropped": [12, 13], "block_scores": prune["log"]["block_scores"][:24]}
    second["log"]["distance_map"] = [row[:25] for row in prune["log"]["distance_map"][:25]]
    report["stages"] = [prune, heal, second, copy.deepcopy(heal) | {"index": 3}]
    report["result"]["layers"] = 22


def sparse(report: Report) -> None:
    """Half of the weights zero, without a pattern."""
    stage = report["stages"][0]
    stage |= {"name": "wanda", "parameters": {"sparsity": 0.5}}
    log = {"pattern": "0.5 unstructured", "zeros": 53_000_000, "weights": 106_000_000}
    stage["log"] = log | {"sparsity": 0.5, "notes": ["zeros without a pattern are no faster"]}
    report["result"]["layers"] = report["base"]["layers"]


def sparse_engines(report: Report) -> None:
    """Three engines: proven, eligible but not picked, dense; a grid; a node that strayed."""
    checks = report["verification"]
    checks["sweep"] = grid("onnx", {1: 0.98, 64: 1.0, 1024: 1.01})
    names = [f"layers.{layer}.{part}" for layer in range(3) for part in ("qkv", "down")]
    weights = [
        {"name": name, "inputs": 96, "outputs": 64, "zeros": 0.5, "pattern": "2 of 4"}
        for name in names
    ]
    weights.append({"name": "head", "inputs": 64, "outputs": 999, "zeros": 0.0, "pattern": ""})
    proven = {
        "engine": "tensorrt", "weights": weights, "asked": True, "proven": True, "eligible": 6,
        "chosen": 4, "eligible_layers": names, "chosen_layers": names[:4],
        "tactics": dict.fromkeys(names[:4], "sm80_xmma_sparse_gemm"), "note": "",
        "sweep": grid("tensorrt", {1: 0.9, 64: 1.0, 256: 1.1, 1024: 1.3}),
        "gain": [one | {"engine": "tensorrt"} for one in copy.deepcopy(checks["speed"][:2])],
    }  # fmt: skip
    refused = copy.deepcopy(proven) | {
        "engine": "other", "proven": False, "chosen": 0, "chosen_layers": [], "tactics": {},
        "gain": [], "sweep": [],
    }  # fmt: skip
    unasked = copy.deepcopy(refused) | {
        "engine": "onnx", "asked": False, "eligible": None, "chosen": None, "eligible_layers": [],
        "note": "ONNX Runtime multiplies dense",
    }  # fmt: skip
    for weight in unasked["weights"][:3]:
        weight |= {"pattern": ""}
    checks["sparsity"] = [proven, refused, unasked]
    checks["placement"] = [
        {"engine": "onnx", "asked": "CPUExecutionProvider",
         "providers": {"CPUExecutionProvider": 300}, "strayed": []},
        {"engine": "gpu", "asked": "TensorrtExecutionProvider",
         "providers": {"TensorrtExecutionProvider": 100, "CPUExecutionProvider": 4},
         "strayed": ["a", "b", "c", "d"]},
    ]  # fmt: skip


def grid(engine: str, ratios: dict[int, float]) -> list[dict[str, Any]]:
    """Prefill as fast as said at each prompt length, decode with no speedup anywhere."""
    found = []
    for prompt, ratio in ratios.items():
        for phase, value in (("prefill", ratio), ("decode", 1.0)):
            low, high = value - 0.01, value + 0.01
            verdict = "faster" if low > 1.02 else "slower" if high < 0.98 else "no speedup"
            found.append({
                "engine": engine, "workload": {"batch": 1, "prompt": prompt, "new": 4},
                "phase": phase, "dense_seconds": [value] * 6, "pruned_seconds": [1.0] * 6,
                "again_seconds": [value] * 6, "rounds": [2, 2, 2], "ratio": value, "low": low,
                "high": high, "floor_low": 0.98, "floor_high": 1.02, "bound": 0.0,
                "verdict": verdict, "dense_tokens_per_second": prompt / value,
                "pruned_tokens_per_second": float(prompt),
            })  # fmt: skip
    return found


def least(report: Report) -> None:
    kept = ("version", "recipe", "base", "result")
    for key in [key for key in report if key not in kept]:
        del report[key]
    report["recipe"] = {"name": "none", "text": ""}
    report["base"] = {"model": "m", "parameters": 10, "bytes": 40, "layers": 2}
    report["result"] = {"parameters": 10, "bytes": 40, "layers": 2}


def full(report: Report) -> None:
    """As it is."""


VARIANTS: dict[str, Callable[[Report], None]] = {
    change.__name__: change
    for change in (
        full, no_heal, no_export, no_verification, nothing_measured, failures, no_speedup, slower,
        not_numbers, exploded, one_block, one_sample, long_names, hostile, large, two_of_each,
        sparse, sparse_engines, least,
    )
}  # fmt: skip


def made(name: str) -> Report:
    """The variant's report, free to change."""
    report = copy.deepcopy(FULL)
    VARIANTS[name](report)
    # As it comes back from the file: NaN and infinity included.
    return json.loads(json.dumps(report))
