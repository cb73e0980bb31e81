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
failed=0
"$python" -m pytest -m gpu -q tests/gpu || failed=1
"$python" -m prune_export run recipes/demo.yaml --model "$model" --data-root "$text" \
  --store "$work/store" --out "$work/out" --device cuda --set 'export=[{onnx: {precision: fp16}}]'
cp "$work/out/report.json" "benchmarks/results/$(date -u +%F)-gpu-demo-report.json"

# Sparse weights in TensorRT: dense against sparse, and sparse kernels against none.
for pattern in "2 4" "6 8"; do
  read -r keep of <<<"$pattern"
  cat >"$work/sparse.yaml" <<END
recipe: 1
stages:
  - prune: {method: magnitude, nm: {keep: $keep, of: $of}}
verify: {parity: false, generation: false}
END
  "$python" -m prune_export run "$work/sparse.yaml" --model "$model" --store "$work/store" \
    --out "$work/sparse-$keep-$of"
done
for engine in tensorrt rtx; do
  "$python" -c "
import sys
from prune_export.exporters._trt_binding import installed
sys.exit(not installed('$engine'))" || { echo "no library for $engine: skipped"; continue; }
  "$python" benchmarks/gpu/tensorrt.py --dense "$model" --sparse "$work/sparse-2-4" \
    --engine "$engine" --precision fp16 bf16 fp8 int8 --work "$work/$engine-2-4" \
    --name "$engine-2of4" || failed=1
  "$python" benchmarks/gpu/tensorrt.py --dense "$model" --sparse "$work/sparse-6-8" --sliding \
    --engine "$engine" --precision fp16 fp8 --work "$work/$engine-6-8" \
    --name "$engine-6of8" || failed=1
done

# PyTorch's own sparse kernels, by shape, type and tokens; then in a compiled model against itself.
"$python" benchmarks/gpu/sparse_kernels.py || failed=1
cat >"$work/aoti.yaml" <<END
recipe: 1
stages:
  - prune: {method: magnitude, nm: {keep: 2, of: 4}}
export:
  - aoti: {precision: bf16, sparse: true}
verify:
  parity: false
  generation: false
  speed: {sweep: {prompt: [1, 16, 64, 256, 1024, 4096]}}
END
"$python" -m prune_export run "$work/aoti.yaml" --model "$model" --store "$work/store" \
  --out "$work/aoti" --device cuda || failed=1
cp "$work/aoti/report.json" "benchmarks/results/$(date -u +%F)-gpu-aoti-report.json" || failed=1
exit "$failed"
