"""The kernel cache: damage, other people's files and full disks mean compiling again, and nothing else."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiled import address
from numba import types

from llmq import formats, jit
from llmq.engine.compilers import kernels_of
from llmq.formats import Q4_K, Q8_0
from llmq.jit import Kernel, arm_features, compile_log, kernel, read_cached, write_cached
from llmq.kernels.kv import F16_KV, KV_FORMATS, Q8_0_KV
from llmq.simd import load_f32, store_f32

ROOT = Path(__file__).parents[1]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own that has not been opened yet."""
    monkeypatch.setenv("LLMQ_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(jit, "_folder", [])
    return tmp_path / "cache" / "kernels"


def reopen(monkeypatch: pytest.MonkeyPatch) -> Path | None:
    """What the next process would find."""
    monkeypatch.setattr(jit, "_folder", [])
    return jit.cache_folder()


@pytest.fixture
def compiled_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    monkeypatch.setattr(compile_log, "listener", names.append)
    return names


def scaling(factor: int, name: str = "scale") -> Kernel:
    """A fresh kernel that multiplies a float, as a new process has it."""

    def scale(out: Any, x: Any) -> None:
        store_f32(out, load_f32(x) * np.float32(factor))

    return kernel(types.int64, types.int64, name=name)(scale)


def result(made: Kernel) -> float:
    out, x = np.zeros(1, np.float32), np.array([7], np.float32)
    made(address(out), address(x))
    return float(out[0])


# ---- one file
def test_a_cached_kernel_is_loaded(root: Path, compiled_names: list[str]) -> None:
    assert result(scaling(3)) == 21
    assert compiled_names == ["scale"]
    assert [path.name for path in root.glob("*/*")] == ["scale.o"]
    assert result(scaling(3)) == 21
    assert compiled_names == ["scale"]


def test_no_damage_is_accepted(tmp_path: Path) -> None:
    """500 flipped bits all over the file, and every kind of cut or tail."""
    path, rng = tmp_path / "k.o", random.Random(0)
    content = "symbol", rng.randbytes(3000), rng.randbytes(2000)
    write_cached(path, *content)
    assert read_cached(path) == content
    good = path.read_bytes()
    for bit in [*range(0, 900, 3), *(rng.randrange(8 * len(good)) for _ in range(200))]:
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        assert read_cached(path) is None, bit
    for length in [0, 1, 13, 14, 45, 46, 47, 58, 100, len(good) // 2, len(good) - 1]:
        path.write_bytes(good[:length])
        assert read_cached(path) is None, length
    path.write_bytes(good + b"\0")
    assert read_cached(path) is None
    path.unlink()
    assert read_cached(path) is None
    path.mkdir()
    assert read_cached(path) is None


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink], ids=["cut", "flip", "unlink"])
def test_a_damaged_file_heals(root: Path, compiled_names: list[str], damage: Callable[[Path], None]) -> None:
    result(scaling(3))
    (path,) = root.glob("*/scale.o")
    good = read_cached(path)
    damage(path)
    assert result(scaling(3)) == 21
    assert compiled_names == ["scale", "scale"]
    assert read_cached(path) is not None
    assert good is not None
    assert result(scaling(3)) == 21
    assert compiled_names == ["scale", "scale"]


def test_one_kernels_code_is_not_anothers(root: Path, compiled_names: list[str]) -> None:
    result(scaling(3, "three"))
    (path,) = root.glob("*/three.o")
    shutil.copy(path, path.with_name("five.o"))
    assert result(scaling(5, "five")) == 35
    assert compiled_names == ["three", "five"]


# ---- the folder
def test_a_new_folder_is_private(root: Path) -> None:
    old = os.umask(0o002)
    try:
        folder = jit.cache_folder()
    finally:
        os.umask(old)
    assert folder is not None
    assert folder.parent == root
    assert [path.stat().st_mode & 0o777 for path in (root, folder)] == [0o700, 0o700]


def plant(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder in which `scale`, whoever asks, multiplies by 1000."""
    result(scaling(1000))
    folder = jit.cache_folder()
    assert folder is not None
    monkeypatch.setattr(jit, "_folder", [])
    return folder


@pytest.mark.skipif(os.name == "nt", reason="no such permissions")
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o722])
@pytest.mark.parametrize("which", ["root", "stamp"])
def test_a_folder_that_others_can_write_to_is_ignored(
    root: Path, monkeypatch: pytest.MonkeyPatch, mode: int, which: str
) -> None:
    folder = plant(monkeypatch)
    (root if which == "root" else folder).chmod(mode)
    assert result(scaling(3)) == 21
    assert jit.cache_folder() is None


@pytest.mark.skipif(os.name == "nt", reason="no such owners")
@pytest.mark.usefixtures("root")
def test_another_users_folder_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    monkeypatch.setattr(os, "getuid", lambda: 123_456)
    assert result(scaling(3)) == 21


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege")
@pytest.mark.parametrize("which", ["root", "stamp"])
def test_a_linked_folder_is_ignored_and_left_alone(root: Path, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    folder = plant(monkeypatch)
    linked = root if which == "root" else folder
    elsewhere = linked.rename(root.parent / "elsewhere")
    elsewhere.chmod(0o755)
    before = sorted(elsewhere.rglob("*"))
    linked.symlink_to(elsewhere)
    assert result(scaling(3)) == 21
    assert sorted(elsewhere.rglob("*")) == before
    assert elsewhere.stat().st_mode & 0o777 == 0o755


def test_a_file_in_the_folders_place(root: Path) -> None:
    root.parent.mkdir()
    root.write_text("mine")
    assert result(scaling(3)) == 21
    assert root.read_text() == "mine"


def test_old_versions_go_and_other_folders_stay(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    current = plant(monkeypatch)
    for i in range(7):
        old = root / f"{i:020x}"
        old.mkdir(mode=0o700)
        (old / "scale.o").write_bytes(b"x")
        os.utime(old, (1000 + i, 1000 + i))
    theirs = ("photos", "src", "a", "b", "c", "d")
    for name in theirs:
        (root / name).mkdir()
        (root / name / "mine").write_text("kept")
        os.utime(root / name, (1, 1))
    (root / "letter.txt").write_text("kept")
    assert reopen(monkeypatch) == current
    recent = {f"{i:020x}" for i in (3, 4, 5, 6)}
    assert {path.name for path in root.iterdir()} == {current.name, *recent, *theirs, "letter.txt"}
    assert (root / "photos" / "mine").read_text() == "kept"


# ---- disks
def test_a_disk_that_cannot_be_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    assert result(scaling(3)) == 21
    assert not list(root.glob("*/*"))


def test_a_disk_that_is_full(root: Path) -> None:
    """A kernel file is over 2,000 bytes; here files end after 1,000, as on a full disk, and nothing is left behind."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        assert result(scaling(3)) == 21
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(root.glob("*/*"))
    assert not list(root.glob("*/.new-*"))
    assert result(scaling(3)) == 21


def test_a_place_where_no_folder_can_be(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("LLMQ_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert result(scaling(3)) == 21
    assert jit.cache_folder() is None
    assert not root.exists()


# ---- whole processes
RUN = """
import json, sys
from llmq import load
from llmq.sampler import Sampling

names, found = [], []
for path in sys.argv[1:]:
    before = len(names)
    with load(path, threads=2, on_event=names.append) as model:
        loaded = len(names)
        reply = model.generate([1, 40, 41], sampling=Sampling(temperature=0), max_tokens=12)
        text = "".join(reply)
        for n in (1, 2, 3, 5, 8, 17, 100, 600):
            list(model.generate([5] * n, max_tokens=3))
            model.logits([6] * n)
    found.append({"ids": reply.ids, "while loading": names[before:loaded], "later": names[loaded:]})
print(json.dumps(found))
"""

# Two files with matrices of the same formats, and nothing else in common.
FORMATS = {"attn_v.weight": Q8_0, "": Q4_K}
SHAPES: list[dict[str, Any]] = [
    {"n_layers": 1},
    {"n_layers": 2, "dim": 512, "n_heads": 16, "n_kv_heads": 1, "ffn_dim": 768, "n_experts": 4, "window": 48},
]


def run(cache: Path, *models: Path) -> list[dict[str, Any]]:
    environment = {**os.environ, "LLMQ_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *models], capture_output=True, text=True, timeout=250, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


Cold = tuple[Path, list[Path], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Cold:
    """A cache that was empty, two models, and what the first process with them found."""
    from tiny import tiny_gguf

    folder = tmp_path_factory.mktemp("cold")
    models = [folder / "first.gguf", folder / "second.gguf"]
    for path, shape in zip(models, SHAPES, strict=True):
        tiny_gguf(path, **shape, format=FORMATS)
    return folder / "cache", models, run(folder / "cache", *models)


def test_a_cold_start_compiles_while_loading_and_never_again(cold: Cold) -> None:
    """Whatever the length of a prompt, and for every file with the same formats: no timing has compiling in it."""
    _, _, (first, second) = cold
    assert sorted(first["while loading"]) == sorted(made.name for made in kernels_of([Q4_K, Q8_0], Q4_K, F16_KV))
    assert first["later"] == second["while loading"] == second["later"] == []


def test_a_warm_start_compiles_nothing(cold: Cold) -> None:
    cache, models, (first, second) = cold
    assert run(cache, *models) == [{**first, "while loading": []}, second]


def test_a_damaged_cache_heals(cold: Cold) -> None:
    cache, models, (first, _) = cold
    files = {path.stem: path for path in cache.rglob("*.o")}
    cut(files["dot_q8_0"])
    flip(files["floats_q4_k"])
    files["attend1_f16"].write_bytes(files["dot_q8_0"].read_bytes())
    (found,) = run(cache, models[0])
    assert found["ids"] == first["ids"]
    assert sorted(found["while loading"]) == ["attend1_f16", "dot_q8_0", "floats_q4_k"]
    assert run(cache, models[0]) == [{**first, "while loading": []}]


def test_no_kernel_needs_numbas_runtime(cold: Cold) -> None:
    """Its functions (NRT_...) are not there for code from the cache: LLVM would end the process that loads it.

    Of the formats that are not needed here, the kernels that other tests have compiled.
    """
    folder = jit.cache_folder()
    assert folder is not None
    needed = kernels_of([], Q4_K, Q8_0_KV)
    for made in needed:
        if not (folder / f"{made.name}.o").exists():
            made.prepare()
    kernels = [made for kv in KV_FORMATS.values() for made in kernels_of(list(formats.FORMATS.values()), Q4_K, kv)]
    paths = [*cold[0].rglob("*.o"), *(folder / f"{name}.o" for name in {made.name for made in kernels})]
    found = {path: read_cached(path) for path in paths if path.exists()}
    assert {made.name for made in needed} <= {path.stem for path in found}
    assert [path.stem for path, kept in found.items() if kept is None or b"NRT_" in kept[1]] == []


TINY = """
import numpy as np
from numba import types
from llmq.jit import kernel
from llmq.kernels.kv import F16_KV
from llmq.simd import load_f32, store_f32

def scale(out, x):
    store_f32(out, load_f32(x) * np.float32(3))

out, x = np.zeros(1, np.float32), np.array([7], np.float32)
kernel(types.int64, types.int64)(scale)(out.ctypes.data, x.ctypes.data)
print(out[0])
"""


def test_four_cold_starts_at_once(tmp_path: Path) -> None:
    environment = {**os.environ, "LLMQ_CACHE_DIR": str(tmp_path)}
    started = [
        subprocess.Popen([sys.executable, "-c", TINY], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert [process.communicate(timeout=120)[0] for process in started] == ["21.0\n"] * 4
    (path,) = tmp_path.rglob("*.o")
    assert read_cached(path) is not None
    assert not list(tmp_path.rglob(".new-*"))


# ---- Arm
@pytest.mark.parametrize(
    ("known", "capabilities", "capabilities2", "features"),
    [
        ("+neon,+crc", 0, 0, "+neon,+crc"),
        ("+neon,+crc", 1 << 20, 0, "+neon,+crc,+dotprod"),
        ("+neon,+crc", 0xFFF8FFFF & ~(1 << 20), 1 << 13, "+neon,+crc,+i8mm"),
        ("-dotprod,-i8mm", 1 << 20, 1 << 13, "-dotprod,-i8mm,+dotprod,+i8mm"),
        ("+neon", 1 << 13, 1 << 20, "+neon"),
        ("", 1 << 20, 1 << 13, "+dotprod,+i8mm"),
        ("", 0, 0, ""),
    ],
)
def test_byte_products_that_linux_tells_of(known: str, capabilities: int, capabilities2: int, features: str) -> None:
    """Words of the auxiliary vector: AT_HWCAP (16) has dotprod as bit 20, AT_HWCAP2 (26) has i8mm as bit 13."""
    assert arm_features(known, {16: capabilities, 26: capabilities2}) == features
