#!/usr/bin/env bash
# Every check and measurement that needs one NVIDIA GPU, in one command; the results are written to
# benchmarks/results/<date>-<gpu>-*.json, and all that was said to <date>-gpu-run.log there.
#   benchmarks/gpu/run.sh MODEL_DIR TEXT_DIR     a checkpoint, and calibration/healing/evaluation.jsonl
#
# Each step stands alone: one that fails is named at the end, and the others run. No network is used.
# What must be installed before:
#   a CUDA build of torch (which decides the CUDA version of the rest), and `pip install -e ".[all,dev]"`
#   onnxruntime-gpu in the place of onnxruntime, which onnxruntime-genai has brought along:
#     pip uninstall -y onnxruntime; pip install --force-reinstall --no-deps onnxruntime-gpu
#   `pip install "tensorrt>=10.15,<12"` (any GPU; fetches its libraries from NVIDIA)
#   for `aoti`: g++ and CUDA's headers (CUDA_HOME, or /usr/local/cuda)
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 2
model=${1:?a checkpoint directory} text=${2:?a directory with calibration, healing, evaluation.jsonl}
model=$(realpath "$model") text=$(realpath "$text")
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
results=${RESULTS:-benchmarks/results} day=$(date -u +%F)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$results"
exec > >(tee "$results/$day-gpu-run.log") 2>&1

"$python" -c "import torch; assert torch.cuda.is_available(), 'no CUDA device'; print(torch.cuda.get_device_name(0))" || exit 2
failed=()
step() { # NAME COMMAND…
  local name=$1
  shift
  echo "== $name"
  "$@" || { echo "== $name FAILED: exit code $?"; failed+=("$name"); return 1; }
}

step "tests" "$python" -m pytest -m gpu -q tests/gpu
# A report is written also where a gate fails.
step "demo" "$python" -m prune_export run recipes/demo.yaml --model "$model" --data-root "$text" \
  --store "$work/store" --out "$work/out" --device cuda --set 'export=[{onnx: {precision: fp16}}]'
step "demo report" cp "$work/out/report.json" "$results/$day-gpu-demo-report.json"

# Sparse weights in TensorRT: dense against sparse, and sparse kernels against none.
for pattern in "2 4" "6 8"; do
  read -r keep of <<<"$pattern"
  cat >"$work/sparse.yaml" <<END
recipe: 1
stages:
  - prune: {method: magnitude, nm: {keep: $keep, of: $of}}
verify: {parity: false, generation: false}
END
  step "prune to $keep of $of" "$python" -m prune_export run "$work/sparse.yaml" --model "$model" \
    --store "$work/store" --out "$work/sparse-$keep-$of"
done
for engine in tensorrt rtx; do
  "$python" -c "
import sys
from prune_export.errors import PruneExportError
from prune_export.exporters.tensorrt import Tensorrt
from prune_export.machine import Machine
try:
    Tensorrt(flavor='$engine').check(None, Machine.detect())
except PruneExportError as error:
    sys.exit(str(error))" || { echo "== $engine: skipped"; continue; }
  step "$engine, 2 of 4" "$python" benchmarks/gpu/sparse_engines.py --dense "$model" \
    --sparse "$work/sparse-2-4" --engine "$engine" --precision fp16 bf16 fp8 int8 \
    --work "$work/$engine-2-4" --name "$engine-2of4"
  step "$engine, 6 of 8" "$python" benchmarks/gpu/sparse_engines.py --dense "$model" \
    --sparse "$work/sparse-6-8" --sliding --engine "$engine" --precision fp16 fp8 \
    --work "$work/$engine-6-8" --name "$engine-6of8"
done

# PyTorch's own sparse kernels, by shape, type and tokens; then in a compiled model against itself.
step "sparse kernels" "$python" benchmarks/gpu/sparse_kernels.py
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
step "aoti" "$python" -m prune_export run "$work/aoti.yaml" --model "$model" --store "$work/store" \
  --out "$work/aoti" --device cuda
step "aoti report" cp "$work/aoti/report.json" "$results/$day-gpu-aoti-report.json"

if ((${#failed[@]})); then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
