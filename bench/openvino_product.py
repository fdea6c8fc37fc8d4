"""One matrix product of a 7B model, 4096 -> 14336 with 512 tokens, beside OpenVINO's with 4-bit weights.

    python bench/openvino_product.py --openvino-python ENV/bin/python [--threads 2] [--rounds 7]

OpenVINO (pip install openvino, in an environment of its own) gets unsigned 4-bit weights with a scale and a zero point
for each 32 or 128 of them, and quantizes activations in groups of the same size (dynamic quantization). llmq does the
product in Q4_K, which has a scale and a minimum for each 32: Product of products.py, 14 times its 1024 rows, and the
activations from floats. The engines work in turn, each stopped while it waits. OpenVINO's figures come with what its
executed graph says of the product, and with the distance of its results from exact ones: that is 3e-3 or more where
activations were quantized, and hardly anything where the weights were unpacked to floats.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np

ROWS, COLS, TOKENS = 14336, 4096, 512
GROUPS = (32, 128)
CHECKED = 64  # rows that are compared with an exact product


class OpenVino:
    """The product with one group size, compiled for the processor."""

    def __init__(self, group: int, quantized: bool, threads: int) -> None:
        import openvino as ov
        from openvino import opset13 as op

        rng = np.random.default_rng(0)
        self.weights = rng.integers(0, 16, (ROWS, COLS // group, group), np.uint8)
        self.scales = rng.uniform(0.001, 0.003, (ROWS, COLS // group, 1)).astype(np.float16)
        # A Constant does not keep alive the memory that it reads.
        self.packed = self.weights.reshape(-1, 2) @ np.array([1, 16], np.uint8)
        self.zeros = np.full(self.scales.size // 2, 0x88, np.uint8)
        quants, zero = (
            op.convert(ov.op.Constant(ov.Tensor(data, list(dims), ov.Type.u4)), "f16")
            for data, dims in ((self.packed, self.weights.shape), (self.zeros, self.scales.shape))
        )
        scaled = op.multiply(op.subtract(quants, zero), op.constant(self.scales))
        matrix = op.convert(op.reshape(scaled, op.constant(np.array([ROWS, COLS])), False), "f32")
        x = op.parameter([TOKENS, COLS], np.float32)
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": "1",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group if quantized else 0),
        }
        self.compiled = ov.Core().compile_model(ov.Model([op.matmul(x, matrix, False, True)], [x]), "CPU", settings)
        self.request = self.compiled.create_infer_request()
        self.x = rng.standard_normal((TOKENS, COLS)).astype(np.float32)
        self.request.set_input_tensor(ov.Tensor(self.x, shared_memory=True))

    def run(self) -> float:
        start = time.perf_counter()
        self.request.infer()
        return time.perf_counter() - start

    def about(self) -> dict[str, Any]:
        """What the executed graph says of the product, and the relative error of its results."""
        facts: dict[str, Any] = {}
        for node in self.compiled.get_runtime_model().get_ops():
            info = node.get_rt_info()
            if info["layerType"].astype(str) == "FullyConnected":
                facts |= {name: info[name].astype(str) for name in ("primitiveType", "runtimePrecision")}
        weights = (self.weights[:CHECKED].astype(np.float64) - 8) * self.scales[:CHECKED]
        exact = self.x @ weights.reshape(CHECKED, COLS).T
        found = self.request.get_output_tensor().data[:, :CHECKED]
        return facts | {"error": float(np.linalg.norm(found - exact) / np.linalg.norm(exact))}


def serve(threads: int) -> None:
    """In OpenVINO's environment: for each line `GROUP QUANTIZED` the seconds of one product, and what it was."""
    import openvino

    print(json.dumps(openvino.__version__), flush=True)  # noqa: T201
    products: dict[str, OpenVino] = {}
    for line in sys.stdin:
        if line not in products:
            group, quantized = map(int, line.split())
            products[line] = OpenVino(group, bool(quantized), threads)
            products[line].run()
            print(json.dumps(products[line].about()), flush=True)  # noqa: T201
        else:
            print(json.dumps(products[line].run()), flush=True)  # noqa: T201


class Rival:
    """OpenVINO's process, stopped whenever it has nothing to do."""

    def __init__(self, python: str, threads: int) -> None:
        command = [python, __file__, "--serve", "--threads", str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout
        answer = self.process.stdout.readline()
        assert answer, "the process with OpenVINO has ended"
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(answer)

    def ask(self, group: int, quantized: bool) -> Any:
        assert self.process.stdin
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(f"{group} {quantized:d}\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.communicate()


def ours(threads: int) -> Any:
    """A function that does llmq's product once and gives its seconds."""
    import products

    from llmq.formats import Q4_K
    from llmq.kernels.activation import K, prepare

    product = products.Product(Q4_K, TOKENS)
    x = np.random.default_rng(0).standard_normal((TOKENS, COLS)).astype(np.float32)
    repeats = ROWS // len(product.weights)

    def work(thread: int, n_threads: int) -> None:
        for _ in range(repeats):
            product.prefill(thread, n_threads)

    def run() -> float:
        start = time.perf_counter()
        prepare(product.batch.ctypes.data, K, x.ctypes.data, COLS, TOKENS)
        return time.perf_counter() - start + products.seconds(work, threads)

    return run


def compare(python: str, threads: int, rounds: int) -> None:
    run, rival = ours(threads), Rival(python, threads)
    run()
    variants = [(group, quantized) for quantized in (True, False) for group in GROUPS]
    about = {variant: rival.ask(*variant) for variant in variants}
    mine: list[float] = []
    theirs: dict[tuple[int, bool], list[float]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        mine.append(run())
        for variant in variants:
            theirs[variant].append(rival.ask(*variant))
    rival.close()
    work = ROWS * COLS * TOKENS / 1e9
    print(f"{threads} threads; llmq, Q4_K: {work / statistics.median(mine):.0f} GMAC/s")  # noqa: T201
    for (group, quantized), found in theirs.items():
        ratio = statistics.median(b / a for a, b in zip(mine, found, strict=True))
        how, facts = "dynamic quantization" if quantized else "floats", about[group, quantized]
        print(  # noqa: T201
            f"OpenVINO {rival.version.split('-')[0]}, groups of {group}, {how}: {work / statistics.median(found):.0f} "
            f"GMAC/s, llmq {ratio:.2f} times as fast; {facts['primitiveType']}, weights {facts['runtimePrecision']}, "
            f"error {facts['error']:.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openvino-python", default=sys.executable)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.threads)
    else:
        compare(arguments.openvino_python, arguments.threads, arguments.rounds)


if __name__ == "__main__":
    main()
