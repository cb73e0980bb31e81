"""Times products of packed weights, and engines made of them, beside what a runtime has.

    python benchmarks/packed.py products [--threads 1]
    python benchmarks/packed.py engines --int8 DIR --int4 DIR [--threads 1]

`products` are of a random 4096 x 4096 matrix with one token. `engines` are onnxruntime-genai's of
one model, exported by `ort_genai` with `block_size: 128`; their blocks' smallest codes are made
zero here, as speed depends on how many are, so that nothing is said of quality. Contenders take
turns in one run. A call counts if no other process took its processor (no involuntary switch);
its time is then its wall time. The floor is the time in which its bytes can be read, at the rate at
which this machine reads in the same rounds.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _result import save

from prune_export.kernels import LIBRARY, Library, compile_library, pack_codes, pack_floats

SIZE = 4096
SHARES = (0.0, 0.5, 0.7, 0.9)


def undisturbed(call: Callable[[], Any]) -> float | None:
    """Seconds of a call; None where another process came between."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return seconds if resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw == before else None


def in_turns(contenders: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Calls all contenders round after round; the undisturbed times of each."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    end = time.process_time() + seconds
    while time.process_time() < end:
        for name, call in contenders.items():
            taken = undisturbed(call)
            if taken is not None:
                found[name].append(taken)
    return found


def random_matrices(block: int) -> Iterator[tuple[str, Any]]:
    random = np.random.default_rng(0)
    scales = random.random((SIZE, SIZE // block)).astype(np.float32)
    kept = {f"{share:.0%} zeros": random.random((SIZE, SIZE)) >= share for share in SHARES}
    two = (random.random((SIZE, SIZE // 4, 4)).argsort(axis=2) < 2).reshape(SIZE, SIZE)
    for name, mask in (kept | {"2 of 4": two}).items():
        for values, most in (("int8", 127), ("int4", 7)):
            codes = random.integers(1, most, (SIZE, SIZE)) * mask
            yield f"{values} {name}", pack_codes(codes, scales, block, values)
        bits = (
            random.standard_normal((SIZE, SIZE)).astype(np.float32).view(np.uint32) >> 16
        ) * mask
        yield f"bf16 {name}", pack_floats(bits.astype(np.uint16))


def runtimes(block: int, threads: int) -> Iterator[tuple[str, Callable[[], Any], float]]:
    """ONNX Runtime's and PyTorch's products, with the bytes of a weight."""
    import onnx
    import onnxruntime
    import torch
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    x = random.standard_normal((1, SIZE)).astype(np.float32)
    for bits in (8, 4):
        codes = random.integers(0, 256, (SIZE, SIZE // block, block * bits // 8), np.uint8)
        scales = random.random(SIZE * SIZE // block).astype(np.float32)
        node = helper.make_node(
            "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=SIZE, N=SIZE,
            bits=bits, block_size=block, accuracy_level=4,
        )  # fmt: skip
        ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, SIZE]) for n in "xy"]
        held = [numpy_helper.from_array(codes, "w"), numpy_helper.from_array(scales, "s")]
        graph = helper.make_graph([node], "product", ends[:1], ends[1:], held)
        versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=versions, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        yield (
            f"ONNX Runtime int{bits}",
            lambda s=session: s.run(None, {"x": x}),
            bits / 8 + 4 / block,
        )
    torch.set_num_threads(threads)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        weight = torch.randn(SIZE, SIZE).to(dtype)
        token = torch.from_numpy(x).to(dtype)
        yield f"PyTorch {name}", lambda w=weight, t=token: t @ w.T, float(dtype.itemsize)


def products(given: argparse.Namespace) -> None:
    threads, block = 1, 128
    x = np.random.default_rng(1).standard_normal((1, SIZE)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        compile_library(Path(folder) / LIBRARY)
        library = Library(Path(folder) / LIBRARY)
    instructions = library.use(given.instructions)
    calls: dict[str, Callable[[], Any]] = {}
    sizes: dict[str, float] = {}
    memory = np.zeros(1 << 26, np.uint8)
    calls["read"], sizes["read"] = lambda: library.read(memory), memory.size / SIZE**2
    for name, packed in random_matrices(block):
        held = library.hold(packed)
        calls[f"packed {name}"] = lambda h=held: h.multiply(x)
        sizes[f"packed {name}"] = packed.bytes_a_weight
    for name, call, size in runtimes(block, threads):
        calls[name], sizes[name] = call, size
    times = in_turns(calls, given.seconds)
    rate = memory.size / float(np.median(times["read"]))
    rows = {}
    for name, taken in times.items():
        middle = float(np.median(taken))
        floor = sizes[name] * SIZE**2 / rate
        rows[name] = {
            "bytes_a_weight": sizes[name], "seconds": middle, "calls": len(taken),
            "quartiles": [float(q) for q in np.quantile(taken, [0.25, 0.75])],
            "share_of_floor": floor / middle,
        }  # fmt: skip
        print(f"{name:24} {sizes[name]:6.3f} B {middle * 1e6:8.0f} us  {floor / middle:5.2f} of "
              f"the floor  ({len(taken)} calls)", flush=True)  # fmt: skip
    payload = {"size": SIZE, "block": block, "threads": threads, "instructions": instructions,
               "read_bytes_a_second": rate, "products": rows}  # fmt: skip
    if not given.dry:
        print(save(f"packed-products-{instructions}", payload))


def thinned(source: Path, out: Path, share: float) -> None:
    """Copies an engine of `ort_genai` with a share of its blocks' codes made zero, the smallest."""
    import onnx
    from onnx import numpy_helper

    shutil.copytree(source, out)
    model = onnx.load(out / "model.onnx")
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits" or "layers" not in node.name:
            continue
        bits = next(entry.i for entry in node.attribute if entry.name == "bits")
        tensor = held[node.input[1]]
        codes, middle = numpy_helper.to_array(tensor), 1 << bits - 1
        parts = codes[..., None] >> np.array([0, 4] if bits == 4 else [0]) & (1 << bits) - 1
        size = abs(parts.astype(np.int16) - middle) + np.random.default_rng(0).random(parts.shape)
        parts[size < np.quantile(size, share)] = middle
        if bits == 4:
            parts = parts[..., :1] | parts[..., 1:] << 4
        tensor.CopyFrom(numpy_helper.from_array(parts[..., 0].astype(np.uint8), tensor.name))
    (out / "model.onnx_data").unlink(missing_ok=True)
    (out / "model.onnx.data").unlink(missing_ok=True)
    onnx.save(model, out / "model.onnx", save_as_external_data=True, location="model.onnx.data")


def engines(given: argparse.Namespace) -> None:
    from prune_export.exporters._shared.packed_graph import pack_graph
    from prune_export.exporters.ort_genai.graph import decode_bytes
    from prune_export.exporters.ort_genai.runner import open_runner
    from prune_export.machine import Machine

    machine = Machine.detect(device="cpu", threads=given.threads)
    calls: dict[str, Callable[[], Any]] = {}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
        for precision in ("int8", "int4"):
            source = Path(getattr(given, precision))
            for share in (None, *given.shares):
                name = f"ort_genai {precision}"
                path, library = source, None
                if share is not None:
                    name = f"packed {precision}, {share:.0%} zeros"
                    path = Path(folder) / name.replace(" ", "-").replace("%", "")
                    thinned(source, path, share)
                    print(name, pack_graph(path / "model.onnx", "sparse").note(), flush=True)
                    library = path / LIBRARY
                    library.with_name(LIBRARY).chmod(0o755)
                sizes[name] = decode_bytes(path / "model.onnx")
                runner = open_runner(path, machine, library)
                token = np.ones((1, 1), np.int64)

                def steps(runner: Any = runner, token: np.ndarray = token) -> None:
                    runner.step(token)

                calls[name] = steps
        times = in_turns(calls, given.seconds)
    base = float(np.median(times["ort_genai int4"]))
    rows = {}
    for name, taken in times.items():
        middle = float(np.median(taken))
        rows[name] = {
            "weight_bytes": sizes[name], "seconds_a_token": middle, "steps": len(taken),
            "quartiles": [float(q) for q in np.quantile(taken, [0.25, 0.75])],
        }  # fmt: skip
        print(f"{name:24} {sizes[name] / 1e6:6.0f} MB {1 / middle:7.1f} tokens/s "
              f"{base / middle:5.2f} of ort_genai int4 ({len(taken)})", flush=True)  # fmt: skip
    payload = {"threads": given.threads, "block": 128, "engines": rows}
    if not given.dry:
        print(save(f"packed-engines-{given.threads}threads", payload))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["products", "engines"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60, help="of processor time")
    parser.add_argument("--instructions", default="avx512", help="no better ones than these")
    parser.add_argument("--shares", type=float, nargs="*", default=SHARES)
    parser.add_argument("--int8", help="an int8 engine of ort_genai")
    parser.add_argument("--int4", help="an int4 engine of ort_genai")
    parser.add_argument("--scratch", help="where engines are made")
    parser.add_argument("--dry", action="store_true", help="write no result")
    given = parser.parse_args()
    {"products": products, "engines": engines}[given.what](given)


if __name__ == "__main__":
    main()
