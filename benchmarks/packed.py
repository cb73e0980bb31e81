"""Times products of packed weights, and engines made of them, beside what a runtime has.

    python benchmarks/packed.py products [--threads 1]
    python benchmarks/packed.py prepare --source DIR --engines DIR
    python benchmarks/packed.py engines --engines DIR [--threads 1]

`products` are of a random 4096 x 4096 matrix with one token. `engines` are those of one model,
made from an int8 engine of `ort_genai`: its blocks are rounded in groups of 128, and their smallest
weights made zero, as speed depends on how many are; so nothing is said of quality. Contenders take
turns in one run. A call counts if no other process took its processor (no involuntary switch);
its time is then its wall time. With `--processor` all calls count, by processor time. The floor is
the time in which its bytes can be read, at the rate at which memory is read in the same rounds.
"""

from __future__ import annotations

import argparse
import os
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


def timed(call: Callable[[], Any], *, processor: bool) -> float | None:
    """Seconds of a call, of wall or processor time; None where another process came between."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    clock = time.process_time if processor else time.perf_counter
    start = clock()
    call()
    seconds = clock() - start
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw == before
    return seconds if whole or processor else None


def in_turns(
    contenders: dict[str, Callable[[], Any]], given: argparse.Namespace
) -> dict[str, list[float]]:
    """Calls all contenders round after round; the times of each."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    end = time.process_time() + given.seconds
    while time.process_time() < end:
        for name, call in contenders.items():
            taken = timed(call, processor=given.processor)
            if taken is not None:
                found[name].append(taken)
    return {name: taken or [float("nan")] for name, taken in found.items()}


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
    times = in_turns(calls, given)
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
    payload = {
        "size": SIZE, "block": block, "clock": _clock(given), "threads": threads,
        "instructions": instructions, "read_bytes_a_second": rate, "products": rows,
    }  # fmt: skip
    if not given.dry:
        print(save(f"packed-products-{instructions}", payload))


def rounded(source: Path, out: Path, bits: int, share: float) -> None:
    """Copies an int8 engine of `ort_genai`, its blocks rounded anew in groups of 128.

    A share of their codes is made zero, the smallest. The head stays as it is in all engines.
    """
    import onnx
    from onnx import numpy_helper

    from prune_export.exporters._shared.nbits import unpacked
    from prune_export.sparsity.onnx_weights import raw_of

    out.mkdir(parents=True)
    for file in source.iterdir():
        if not file.name.startswith("model.onnx"):
            shutil.copy(file, out)
    model = onnx.load(source / "model.onnx", load_external_data=False)
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    most, blocks = (1 << bits - 1) - 1, 128
    for node in model.graph.node:
        if node.op_type != "MatMulNBits" or "layers" not in node.name:
            continue
        given = {entry.name: entry for entry in node.attribute}
        keys = {name: entry.i for name, entry in given.items()}
        codes, scales = (held[name] for name in node.input[1:3])
        weights = unpacked(
            raw_of(codes, source).reshape(codes.dims), raw_of(scales, source).view(np.float32),
            None, keys,
        )  # fmt: skip
        groups = np.pad(weights, ((0, 0), (0, -keys["K"] % blocks))).reshape(keys["N"], -1, blocks)
        scale = abs(groups).max(axis=2, keepdims=True) / most
        size = abs(groups)
        if share:
            sample = size.reshape(-1)[:: max(1, size.size // 100_000)]
            groups[size <= np.quantile(sample, share)] = 0
        fresh = np.rint(groups / np.maximum(scale, 1e-30)).astype(np.int16) + most + 1
        fresh = fresh.astype(np.uint8)
        if bits == 4:
            fresh = fresh[..., 0::2] | fresh[..., 1::2] << 4
        codes.CopyFrom(numpy_helper.from_array(fresh, codes.name))
        scales.CopyFrom(numpy_helper.from_array(scale.astype(np.float32).reshape(-1), scales.name))
        given["block_size"].i, given["bits"].i = blocks, bits
    for tensor in model.graph.initializer:
        if tensor.external_data:
            raw = raw_of(tensor, source).tobytes()
            del tensor.external_data[:]
            tensor.data_location, tensor.raw_data = onnx.TensorProto.DEFAULT, raw
    onnx.save(model, out / "model.onnx", save_as_external_data=True, location="model.onnx.data")


def contenders(shares: list[float]) -> Iterator[tuple[str, int, float, bool]]:
    """Names of engines, with their bits, share of zeros, and whether they are packed."""
    for bits in (8, 4):
        yield f"ort_genai int{bits}", bits, 0.0, False
        for share in shares:
            yield f"packed int{bits}, {share:.0%} zeros", bits, share, True


def prepare(given: argparse.Namespace) -> None:
    """Makes the engines that are not there yet, at most `--most` of them."""
    from prune_export.exporters._shared.packed_graph import pack_graph

    made = 0
    for name, bits, share, packed in contenders(given.shares):
        path = Path(given.engines) / name.replace(" ", "-").replace("%", "").replace(",", "")
        if path.is_dir() or made >= given.most:
            continue
        partial = path.with_name("partial")
        shutil.rmtree(partial, ignore_errors=True)
        rounded(Path(given.source), partial, bits, share)
        if packed:
            print(name, pack_graph(partial / "model.onnx", "sparse").note(), flush=True)
        partial.rename(path)
        made += 1


def engines(given: argparse.Namespace) -> None:
    from prune_export.exporters.ort_genai.graph import decode_bytes
    from prune_export.exporters.ort_genai.runner import open_runner
    from prune_export.machine import Machine

    # Each engine has a library of its own, which reads this once.
    os.environ["PRUNE_EXPORT_INSTRUCTIONS"] = given.instructions
    machine = Machine.detect(device="cpu", threads=given.threads)
    calls: dict[str, Callable[[], Any]] = {}
    sizes: dict[str, int] = {}
    token = np.ones((1, 1), np.int64)
    for name, _, _, packed in contenders(given.shares):
        path = Path(given.engines) / name.replace(" ", "-").replace("%", "").replace(",", "")
        if path.is_dir():
            runner = open_runner(path, machine, path / LIBRARY if packed else None)
            sizes[name] = decode_bytes(path / "model.onnx")
            calls[name] = lambda one=runner: one.step(token)
    times = in_turns(calls, given)
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
    (packed, *_) = Path(given.engines).glob("packed*")
    used = Library(packed / LIBRARY).use(given.instructions)
    payload = {
        "threads": given.threads, "block": 128, "clock": _clock(given), "instructions": used,
        "engines": rows,
    }  # fmt: skip
    if not given.dry:
        print(save(f"packed-engines-{used}-{given.threads}threads", payload))


def _clock(given: argparse.Namespace) -> str:
    return "processor" if given.processor else "wall, undisturbed calls"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["products", "prepare", "engines"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60, help="of processor time")
    parser.add_argument("--instructions", default="avx512", help="no better ones than these")
    parser.add_argument("--shares", type=float, nargs="*", default=SHARES)
    parser.add_argument("--source", help="an int8 engine of ort_genai, to prepare others from")
    parser.add_argument("--engines", help="the directory of prepared engines")
    parser.add_argument("--most", type=int, default=100, help="engines to prepare in this call")
    parser.add_argument(
        "--processor", action="store_true",
        help="processor time of all calls, for a busy machine and one thread",
    )  # fmt: skip
    parser.add_argument("--dry", action="store_true", help="write no result")
    given = parser.parse_args()
    {"products": products, "prepare": prepare, "engines": engines}[given.what](given)


if __name__ == "__main__":
    main()
