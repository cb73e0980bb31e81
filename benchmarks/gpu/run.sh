#!/usr/bin/env bash
# Every check and measurement that needs one NVIDIA GPU, in one command; the results are written to
# benchmarks/results/<date>-<gpu>-*.json.
#   benchmarks/gpu/run.sh MODEL_DIR TEXT_DIR     a checkpoint, and calibration/healing/evaluation.jsonl
set -euo pipefail
cd "$(dirname "$0")/../.."
model=${1:?a checkpoint directory} text=${2:?a directory with calibration, healing, evaluation.jsonl}
python=${PYTHON:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -c "import torch; assert torch.cuda.is_available(), 'no CUDA device'; print(torch.cuda.get_device_name(0))"
"$python" -m pytest -m gpu -q tests/gpu
"$python" -m prune_export run recipes/demo.yaml --model "$model" --data-root "$text" \
  --store "$work/store" --out "$work/out" --device cuda --set 'export=[{onnx: {precision: fp16}}]'
cp "$work/out/report.json" "benchmarks/results/$(date -u +%F)-gpu-demo-report.json"
