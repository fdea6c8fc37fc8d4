"""Arm: kernels generated for processors that are not here, read as assembly and, where there is QEMU, run by it."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import naive
import numpy as np
import pytest
from foreign import Loop, innermost_loops, undefined
from test_kernels import EPS, activations, as_stored, kind_of, prepared, rows_and_ring, split
from tiny import random_rows

from llmq import formats
from llmq.kernels.attention import SCRATCH_BYTES
from llmq.kernels.kv import F16_KV, Q8_0_KV, KVFormat

HERE = Path(__file__).parent
FORMATS = ("q4_k", "q6_k", "q8_0")
PANELS = tuple(f"panel_{name}" for name in FORMATS)
KERNELS = (*PANELS, *(f"dot_{name}" for name in FORMATS), "attend4_f16", "attend4_q8_0")
# A format with an offset for each block, which the panel adds by itself.
WITH_OFFSETS = ("panel_q4_1", "dot_q4_1")

ROWS_ON_ARM = 16

# Registers put aside and fetched back in the loop over a row: with one token, and with four, whose sums are too many.
ONE_SPILLS, FEW_SPILLS = 2, 80


class Target(NamedTuple):
    triple: str
    cpu: str
    isa: str  # what llmq has to make of it
    kernels: tuple[str, ...]
    product: str  # the instruction that multiplies bytes
    macs: int  # multiply-adds in one of them
    # What tiles have reached: instructions for 1,000 multiply-adds in the best; registers put aside and fetched back.
    reached: dict[str, tuple[int, int]]


TARGETS = {
    "linux": Target(
        "aarch64-unknown-linux-gnu", "neoverse-n1", "dotprod", (*KERNELS, *WITH_OFFSETS), "sdot", 16,
        {"panel_q4_k": (101, 4), "panel_q6_k": (121, 0), "panel_q8_0": (124, 22)},
    ),
    "linux i8mm": Target(
        "aarch64-unknown-linux-gnu", "neoverse-v1", "i8mm", PANELS, "smmla", 32,
        {"panel_q4_k": (81, 10), "panel_q6_k": (102, 0), "panel_q8_0": (106, 27)},
    ),
    "macos": Target("arm64-apple-darwin", "apple-m1", "dotprod", PANELS[:1], "sdot", 16, {"panel_q4_k": (99, 0)}),
    "macos i8mm": Target("arm64-apple-darwin", "apple-m2", "i8mm", PANELS[:1], "smmla", 32, {"panel_q4_k": (76, 0)}),
    "linux without dotprod": Target(
        "aarch64-unknown-linux-gnu", "cortex-a72", "neon", ("panel_q4_k", "dot_q4_k"), "sadalp", 16,
        {"panel_q4_k": (400, 100)},
    ),
}  # fmt: skip
RUN = [name for name, target in TARGETS.items() if "linux" in target.triple]
each_target = pytest.mark.parametrize("name", TARGETS)


@pytest.fixture(scope="session")
def generated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each target with NAME.s and NAME.o of its kernels."""
    folders = {name: tmp_path_factory.mktemp("arm") for name in TARGETS}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}

    def generate(name: str) -> None:
        target = TARGETS[name]
        arguments = [target.triple, target.cpu, "", str(folders[name]), *target.kernels]
        command = [sys.executable, str(HERE / "foreign.py"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout == target.isa

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(generate, TARGETS))
    return folders


def loops_of(folder: Path, kernel: str, *instructions: str) -> list[Loop]:
    """The innermost loops that have these instructions; none of them calls anything but to copy a row's end."""
    loops = innermost_loops((folder / f"{kernel}.s").read_text())
    found = [loop for loop in loops if all(loop.counts[word] for word in instructions)]
    assert {called for loop in found for called in re.findall(r"^blr?\s+(\S+)", loop.text, re.MULTILINE)} <= {"memcpy"}
    return found


@each_target
def test_tiles_do_little_besides_products(generated: dict[str, Path], name: str) -> None:
    target = TARGETS[name]
    for kernel, (instructions, spills) in target.reached.items():
        loops = loops_of(generated[name], kernel, target.product)
        assert loops, kernel
        shares = [loop.counts.total() / (loop.counts[target.product] * target.macs) for loop in loops]
        assert 1000 * min(shares) <= instructions, kernel
        assert max(loop.spills for loop in loops) <= spills, kernel


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if kernel.startswith("dot")])
def test_rows_are_multiplied_in_registers(generated: dict[str, Path], kernel: str) -> None:
    loops = loops_of(generated["linux"], kernel, "sdot")
    assert {loop.counts["sdot"] for loop in loops} == {16, 64}, "256 weights with one token, and with four"
    for loop in loops:
        assert loop.spills <= (ONE_SPILLS if loop.counts["sdot"] == 16 else FEW_SPILLS)


def test_attention_keeps_its_sums_in_registers(generated: dict[str, Path]) -> None:
    loops = loops_of(generated["linux"], "attend4_f16", "fcvtl", "fmla")
    assert len(loops) >= 2, "scores, and sums of values"
    for loop in loops:
        assert loop.counts["fmla"] == 16, "four queries by sixteen"
        assert not loop.spills
        assert loop.counts.total() <= 32


@each_target
def test_kernels_call_nothing_of_numba(generated: dict[str, Path], name: str) -> None:
    """In the kernel itself; the wrapper after it reports errors, of which there are none."""
    for kernel in TARGETS[name].kernels:
        code = (generated[name] / f"{kernel}.s").read_text()
        body = code[: re.search(r"^_?cfunc\.", code, re.MULTILINE).start()]
        assert {called.removeprefix("_") for called in undefined(body)} <= {"memcpy", "memset", "bzero", "expf"}


# ---- under emulation
MAIN = """
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef int64_t word;
typedef void kernel(word, word, word, word, word, word, word, word, word, word, word, word);
{declared}
static kernel *const kernels[] = {{{names}}};

/* In: sizes; memory; where addresses lie in it; calls: kernel, bits of arguments that are addresses, arguments.
   Out: memory. */
int main(void) {{
    word size[3], at, call[14];
    if (fread(size, 8, 3, stdin) != 3) return 1;
    char *memory = aligned_alloc(64, size[0]);
    if (fread(memory, 1, size[0], stdin) != (size_t)size[0]) return 1;
    while (size[1]--) {{
        if (fread(&at, 8, 1, stdin) != 1) return 1;
        *(word *)(memory + at) += (word)memory;
    }}
    while (size[2]--) {{
        if (fread(call, 8, 14, stdin) != 14) return 1;
        word *a = call + 2;
        for (int i = 0; i < 12; i++) if (call[1] >> i & 1) a[i] += (word)memory;
        kernels[call[0]](a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11]);
    }}
    return fwrite(memory, 1, size[0], stdout) != (size_t)size[0];
}}
"""


class Program:
    """Calls of kernels on one piece of memory, carried out by another processor."""

    def __init__(self, kernels: Sequence[str], n_bytes: int) -> None:
        self._kernels = kernels
        self.memory = np.zeros(n_bytes, np.uint8)
        self._used = 0
        self._pointers: list[int] = []
        self._calls: list[list[int]] = []

    def place(self, array: np.ndarray) -> np.ndarray:
        """A copy in the program's memory; after `run` it holds what the kernels wrote."""
        at, self._used = self._used, self._used + -(-array.nbytes // 64) * 64
        copy = self.memory[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
        copy[:] = array
        return copy

    def offset(self, array: np.ndarray) -> int:
        return array.ctypes.data - self.memory.ctypes.data

    def pointers(self, arrays: list[np.ndarray]) -> np.ndarray:
        table = self.place(np.array([self.offset(array) for array in arrays], np.int64))
        self._pointers += range(self.offset(table), self.offset(table) + table.nbytes, 8)
        return table

    def call(self, kernel: str, *args: np.ndarray | int) -> None:
        arrays = sum(1 << i for i, arg in enumerate(args) if isinstance(arg, np.ndarray))
        words = [self.offset(arg) if isinstance(arg, np.ndarray) else arg for arg in args]
        self._calls.append([self._kernels.index(kernel), arrays, *words, *[0] * (12 - len(args))])

    def run(self, command: list[str]) -> None:
        head = np.array([len(self.memory), len(self._pointers), len(self._calls)], np.int64)
        tables = [np.array(table, np.int64).tobytes() for table in (self._pointers, self._calls)]
        sent = head.tobytes() + self.memory.tobytes() + b"".join(tables)
        done = subprocess.run(command, input=sent, capture_output=True, timeout=280)
        assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
        self.memory[:] = np.frombuffer(done.stdout, np.uint8)


def linked(folder: Path, kernels: Sequence[str]) -> Path:
    """The program of these kernels. What only the wrappers' error reports need stays missing."""
    symbols = [re.search(r"^(cfunc\.\S+):", (folder / f"{k}.s").read_text(), re.MULTILINE)[1] for k in kernels]
    declared = "\n".join(f'extern kernel k{i} __asm__("{symbol}");' for i, symbol in enumerate(symbols))
    source, program = folder / "main.c", folder / "main"
    source.write_text(MAIN.format(declared=declared, names=", ".join(f"k{i}" for i in range(len(symbols)))))
    objects = [str(folder / f"{kernel}.o") for kernel in kernels]
    options = ["-O1", "-static", "-Wl,--unresolved-symbols=ignore-all", "-o", str(program)]
    subprocess.run([COMPILER, *options, str(source), *objects, "-lm"], check=True, timeout=120)
    return program


COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
emulated = pytest.mark.skipif(not (COMPILER and EMULATOR), reason="needs aarch64-linux-gnu-gcc and qemu-aarch64")
# The processor to emulate: one that traps on what the target does not have.
EMULATED = {"neon": "cortex-a72", "dotprod": "neoverse-n1", "i8mm": "max"}


@emulated
@pytest.mark.parametrize("name", RUN)
def test_products_under_emulation(generated: dict[str, Path], name: str) -> None:
    """Dot and panel against the exact product with the quantized activations, within the bound of test_kernels.py.

    One token alone and the same among others give the same bits.
    """
    kernels = TARGETS[name].kernels
    rng, program, checks, pairs, n_tokens = np.random.default_rng(0), Program(kernels, 2**21), [], [], 6
    panel, room = program.place(np.zeros(256 * 4 * ROWS_ON_ARM, np.uint8)), (n_tokens + 3, ROWS_ON_ARM)
    for fmt in (getattr(formats, f.upper()) for f in (*FORMATS, "q4_1") if f"panel_{f}" in kernels):
        for n_cols, n_rows in ((256, 16), (768, 5), *([(32, 16), (352, 11)] if fmt.block_size == 32 else [])):
            w = random_rows(rng, fmt, (n_rows, n_cols))
            weights, (n_groups, tail) = formats.dequantize(fmt, w).astype(np.float64), split(fmt, n_cols)
            groups = prepared(rng.standard_normal((n_tokens, n_cols)).astype(np.float32), kind_of(fmt))
            exact, step = activations(groups, kind_of(fmt), n_cols), n_tokens * groups.shape[2]
            bound = 4 * (1 + n_cols // 256) * EPS * 2 * np.abs(weights).max() * np.abs(exact).sum(axis=1, keepdims=True)
            w, x, _ = program.place(w), program.place(groups), program.place(np.zeros((3, groups.shape[2])))
            one, few, many = (program.place(np.zeros(room, np.float32)) for _ in range(3))
            sizes = (w, w.shape[1], n_rows, x, step)
            program.call(f"panel_{fmt.name.lower()}", many, *sizes, n_tokens, n_groups, tail, panel)
            checks.append((many, n_tokens, n_rows, exact @ weights.T, bound))
            if f"dot_{fmt.name.lower()}" in kernels:
                program.call(f"dot_{fmt.name.lower()}", one, *sizes, 1, n_groups, tail)
                program.call(f"dot_{fmt.name.lower()}", few, *sizes, n_tokens, n_groups, tail)
                checks += [(got, n, n_rows, exact @ weights.T, bound) for got, n in ((one, 1), (few, n_tokens))]
                pairs.append((one[0, :n_rows], few[0, :n_rows]))
    program.run([EMULATOR, "-cpu", EMULATED[TARGETS[name].isa], str(linked(generated[name], kernels))])
    for got, n, n_rows, expected, bound in checks:
        assert (np.abs(got[:n, :n_rows] - expected[:n]) <= bound[:n]).all()
    for alone, among_others in pairs:
        np.testing.assert_array_equal(alone.view(np.uint32), among_others.view(np.uint32))


@emulated
@pytest.mark.parametrize("kv", [F16_KV, Q8_0_KV], ids=lambda kv: kv.name)
def test_attention_under_emulation(generated: dict[str, Path], kv: KVFormat) -> None:
    n, head_dim, capacity, window, n_positions = 4, 64, 96, 32, 305
    rng, program, positions = np.random.default_rng(0), Program(KERNELS, 2**21), np.arange(n_positions - n, n_positions)
    exact, ring = rows_and_ring(rng, n_positions, head_dim, capacity, kv)
    keys, values = map(program.place, ring)
    q = program.place(rng.standard_normal((n, head_dim)).astype(np.float32))
    out = program.place(np.zeros((n, head_dim + 16), np.float32))
    program.call(
        f"attend4_{kv.name}", program.pointers(list(out)), program.pointers(list(q)), program.place(positions), keys,
        values, capacity, head_dim, window, 0, 2**62, 0, program.place(np.zeros(SCRATCH_BYTES, np.uint8)),
    )  # fmt: skip
    program.run([EMULATOR, "-cpu", EMULATED["dotprod"], str(linked(generated["linux"], KERNELS))])
    q = as_stored(q, kv) if kv is Q8_0_KV else q.astype(np.float64)
    for row, got, position in zip(q, out, positions, strict=True):
        expected, tolerance = naive.attend(row, position, *exact, window), 2e-6 if kv is F16_KV else 3e-2
        np.testing.assert_allclose(got[:head_dim], expected, rtol=0, atol=tolerance * np.abs(exact[1]).max())
