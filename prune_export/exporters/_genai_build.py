"""Runs onnxruntime-genai's model builder; a program, because the builder prints and never frees.

    python -m prune_export.exporters._genai_build REQUEST.json

The request holds `source`, `out`, `cache`, `precision`, `options` and `corrections`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(request: dict[str, Any]) -> None:
    """Builds the graph that the request describes into its `out`."""
    from onnxruntime_genai.models import builder
    from transformers import AutoModelForCausalLM

    source, out, cache = request["source"], request["out"], request["cache"]
    where = ("", source, out, request["precision"], "cpu", cache)
    options = [f"{key}={value}" for key, value in request["options"].items()]
    prepared = builder.parse_extra_options(*where, options)
    config = prepared["hf_details"]["hf_config"]
    for key, value in request["corrections"].items():
        setattr(config, key, value)
    # The builder folds constants into weights in the checkpoint's dtype; in bfloat16 Gemma's
    # `1 + weight` loses most of its digits.
    load = AutoModelForCausalLM.from_pretrained
    AutoModelForCausalLM.from_pretrained = lambda *args, **kw: load(*args, dtype="float32", **kw)
    builder.create_model(*where, **prepared)
    if request["precision"] == "fp16":
        _forget_shapes(Path(out) / "model.onnx")


def _forget_shapes(graph: Path) -> None:
    """Drops the shapes of inner values; the builder's are wrong in fp16 and ONNX Runtime stops."""
    import onnx

    model = onnx.load(str(graph), load_external_data=False)
    del model.graph.value_info[:]
    onnx.save(model, str(graph))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
