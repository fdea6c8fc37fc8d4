"""Other processors: the same tests and the same logits with the code compiled for narrower instruction sets."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from foreign import innermost_loops

HERE = Path(__file__).parent
# What Numba is told to compile for, and the instruction set that llmq then chooses.
TARGETS = {
    "avx2": ("haswell", "+avx2,+fma,+f16c"),
    "generic": ("x86-64", ""),
    "avxvnni": ("alderlake", "+avx2,+fma,+f16c,+avxvnni"),
}
# One of each kind: 6-bit scales, signed scales, all eight bits, and half floats.
FORMATS = ("Q4_K", "Q6_K", "Q8_0", "F16")
LEFT_OUT = ("F32", "BF16", "Q4_1", "Q5_0", "Q2_K", "IQ4_NL")
SELECTED = "extremes or dot_and_panel or neighbours or attention or parts_of_a_context or silu or router or number"


def logits_of_all(folder: Path) -> dict[str, np.ndarray]:
    """Logits [40, vocab] of each model in a folder: a prompt of 30, then ten tokens one at a time."""
    from llmq import load

    found = {}
    for path in sorted(folder.glob("*.gguf")):
        with load(path, threads=2) as model:
            ids = np.random.default_rng(0).integers(3, 512, 40).tolist()
            rows = [model.logits(ids[:30]), *(model.logits(ids[:n], all_positions=False) for n in (31, 35, 40))]
            found[path.stem] = np.concatenate([*rows, model.read(ids[:1])])
    return found


def environment(isa: str, cache: Path) -> dict[str, str]:
    name, features = TARGETS[isa]
    return {
        **os.environ,
        "NUMBA_CPU_NAME": name,
        "NUMBA_CPU_FEATURES": features,
        "LLMQ_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import tiny_gguf

    from llmq import formats

    folder = tmp_path_factory.mktemp("isa")
    for name in FORMATS:
        tiny_gguf(folder / f"{name}.gguf", n_layers=1, n_experts=2, format=getattr(formats, name), window=20)
    return folder


def host_flags() -> set[str]:
    """Names of the host's features as LLVM spells them."""
    import llvmlite.binding

    return {name for name, there in llvmlite.binding.get_host_cpu_features().items() if there}


needs_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 instruction sets")


@needs_x86
@pytest.mark.slow
@pytest.mark.parametrize("isa", TARGETS)
def test_a_narrower_instruction_set(isa: str, models: Path, tmp_path: Path) -> None:
    """Vector operations and kernels pass their own tests; logits equal the host's up to float rounding.

    Integer sums are exact on every path and the float sums have one order, so hardly a bit differs; should an
    activation's rounding flip all the same, it moves by 1/127 of the largest in its group: 2e-3 at most in all.
    """
    wanted = {flag.removeprefix("+") for flag in TARGETS[isa][1].split(",") if flag}
    if missing := wanted - host_flags():
        pytest.skip(f"this processor has no {', '.join(sorted(missing))}")
    command = [sys.executable, "-W", "error", __file__, isa, str(models), str(tmp_path / "out.npz")]
    done = subprocess.run(
        command, env=environment(isa, tmp_path), capture_output=True, text=True, timeout=400, cwd=HERE.parent
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    here, there = logits_of_all(models), np.load(tmp_path / "out.npz")
    assert set(there) == set(here) == set(FORMATS)
    for name, expected in here.items():
        distance = np.linalg.norm(there[name] - expected) / np.linalg.norm(expected)
        assert distance < (1e-4 if name == "F16" else 2e-3), name


@pytest.mark.parametrize(
    ("isa", "product", "elsewhere", "macs", "reached"),
    [
        ("avx2", "vpmaddubsw", ("vpdpbusd", "zmm"), 32, (140, 90)),
        ("avxvnni", "{vex}\tvpdpbusd", ("zmm",), 32, (75, 8)),
        ("generic", "pmaddwd", ("vpdpbusd", "ymm", "zmm"), 0, (0, 0)),
    ],
)
def test_the_instructions_are_those_of_the_target(
    isa: str, product: str, elsewhere: tuple[str, ...], macs: int, reached: tuple[int, int], tmp_path: Path
) -> None:
    """Code for a processor can be made on any other, so this one runs even where its code cannot.

    `reached`: in a panel's best tile, instructions for 1,000 multiply-adds; registers put aside and fetched back.
    """
    command = [sys.executable, str(HERE / "foreign.py"), "x86_64-unknown-linux-gnu", *TARGETS[isa], str(tmp_path)]
    command += ["dot_q4_k", "dot_q8_0", "panel_q4_k"]
    done = subprocess.run(command, env=environment(isa, tmp_path), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == isa
    code = {path.stem: path.read_text() for path in tmp_path.glob("*.s")}
    assert product in code["dot_q8_0"]
    assert not [word for word in elsewhere if word in "".join(code.values())]
    if macs:
        product = product.split("\t")[-1]
        loops = [loop for loop in innermost_loops(code["panel_q4_k"]) if loop.counts[product]]
        assert max(loop.spills + loop.counts["callq"] for loop in loops) <= reached[1]
        assert 1000 * min(loop.counts.total() / loop.counts[product] for loop in loops) / macs <= reached[0]


def main() -> int:
    """In the subprocess: the tests named above, then logits to a file."""
    from llmq import simd

    isa, models, out = sys.argv[1:]
    assert isa == simd.ISA, simd.ISA
    options = ["-q", "-x", "-p", "no:cacheprovider", f"--rootdir={HERE.parent}"]
    code = pytest.main([*options, str(HERE / "test_simd.py")]) or pytest.main(
        [*options, str(HERE / "test_kernels.py"), "-k", f"({SELECTED}) and not ({' or '.join(LEFT_OUT)})"]
    )
    np.savez(out, **logits_of_all(Path(models)))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
