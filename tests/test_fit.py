"""Whether a model will run here: memory against what is taken, sizes against published files, and the verdict."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import Tiny
from hypothesis import given
from hypothesis import strategies as st
from tiny import vocabulary

from llmq.catalog import catalog
from llmq.config import ModelConfig, tensor_shapes
from llmq.engine.cpu import SPARE as ENGINE_SPARE
from llmq.figures import Machine
from llmq.formats import F32, Q4_K, Q5_K, Q6_K, Q8_0, Format
from llmq.gguf import GGUFWriter, TensorSpec
from llmq.memory import activation_kinds, buffer_bytes, memory_free, most_buffer_bytes
from llmq.model import load
from llmq.work import Work
from quant.fit import (
    NO_DISK,
    NO_MEMORY,
    OK,
    PREFERRED,
    TIGHT,
    Here,
    Memory,
    Verdict,
    best_type,
    disk_free,
    disk_needed,
    here,
    judge,
    judge_with_advice,
    memory_needed,
    rates,
    verdicts,
)
from quant.recipe import PRESETS
from quant.size import config_of, parse_size, planned, scaled, size_of_file

GB = 10**9
PLENTY = Here(10**15, 10**15, 40.0, 800.0, 2)
CONFIGS = {entry.name: config_of(entry) for entry in catalog()}
MISTRAL = CONFIGS["mistral-7b"]
MIXTRAL = CONFIGS["mixtral-8x7b"]


# ---- sizes of files
@pytest.mark.parametrize(
    ("name", "kind", "published"),
    [
        ("mistral-7b", "q4_k_m", 4.37),
        ("mixtral-8x7b", "q4_k_m", 28.448),
        ("mixtral-8x7b", "q3_k_m", 22.546),
        ("mixtral-8x7b", "q2_k", 17.310),
    ],
)
def test_sizes_of_published_files(name: str, kind: str, published: float) -> None:
    assert planned(CONFIGS[name], kind).n_bytes / GB == pytest.approx(published, rel=0.005)


def test_a_file_and_its_plan_are_converted_alike(tiny_model: Tiny) -> None:
    """What differs is the header, which a plan does not have."""
    path, _ = tiny_model(n_layers=3, n_experts=4, format=Q8_0)
    found = size_of_file(path, "x")
    expected = planned(found.config, "q8_0")
    assert (found.name, found.type, found.n_weights) == ("x", "q8_0", expected.n_weights)
    assert found.work == expected.work
    assert found.formats == expected.formats == {Q8_0}
    assert found.n_bytes == path.stat().st_size
    assert 0 < found.n_bytes - expected.n_bytes < 50_000


def test_a_models_depth_follows_from_its_weights() -> None:
    """The layers and key and value heads that published models of such sizes have, within a fifth."""
    for weights, layers in ((7.25e9, 32), (12.2e9, 40), (22.2e9, 56), (122.6e9, 88)):
        config = scaled("x", weights, weights, "q4_k_m").config
        assert config.n_layers == pytest.approx(layers, rel=0.2)
        assert config.n_kv_heads * config.head_dim == 1024


# ---- memory, by hand
def test_keys_and_values_take_128_kib_a_token_in_7b() -> None:
    """32 layers, 8 heads of 128 numbers for keys and as many for values, 2 bytes each."""
    per_token = 32 * 8 * 128 * 2 * 2
    assert per_token == 128 << 10
    assert memory_needed(MISTRAL, 0, 4096).cache == 4096 * per_token
    assert memory_needed(MISTRAL, 0, 32768).cache == 32768 * per_token
    assert memory_needed(MIXTRAL, 0, 4096).cache == 4096 * per_token
    # Bytes with a half float for every 32 of them.
    assert memory_needed(MISTRAL, 0, 4096, "q8_0").cache == 4096 * 32 * 8 * 2 * (128 + 4 * 2)


def test_a_window_bounds_the_cache() -> None:
    windowed = CONFIGS["mistral-7b-v0.1"]
    assert windowed.window == 4096
    assert memory_needed(windowed, 0, 2048).cache == 2048 << 17
    assert memory_needed(windowed, 0, 32768).cache == (4096 + 512) << 17


def test_all_experts_count_for_memory_and_the_used_ones_for_speed() -> None:
    size = planned(MIXTRAL, "q4_k_m")
    verdict = judge(size, 4096, PLENTY)
    assert verdict.memory.weights == verdict.file_bytes == round(size.n_bytes)
    # 12.9 of 46.7 billion weights, of which the embedding's 0.13 are not read.
    assert verdict.decode * size.n_bytes / (0.9 * 40e9) == pytest.approx(46.7 / 12.75, rel=0.03)


# ---- memory, as the engine takes it
@pytest.mark.parametrize(
    ("shape", "formats"),
    [
        ({}, {"": Q8_0}),
        ({"window": 64}, {"": F32}),
        ({"n_experts": 4}, {"attn_v.weight": Q8_0, "": Q6_K}),
        ({"tied": True, "n_heads": 16}, {"": Q5_K}),
        ({}, {"token_embd.weight": F32, "": Q4_K}),
    ],
)
@pytest.mark.parametrize("n_threads", [1, 3])
def test_buffers_are_what_the_engine_allocates(
    tiny_model: Tiny, shape: dict[str, int], formats: dict[str, Format], n_threads: int
) -> None:
    path, _ = tiny_model(**shape, format=formats)
    size = size_of_file(path, "x")
    with load(path, n_ctx=1500, threads=n_threads) as model:
        model.read([5] * 1100)
        for token in 6, 7:
            model.read([token])
        taken = {name: array.nbytes for name, array in model._engine._memory.items()}
        ring, config = model._ring.memory.nbytes, model.config
    kinds = activation_kinds(size.formats)
    expected = buffer_bytes(config, kinds, 512, ENGINE_SPARE)
    assert taken == expected | {name: taken[name] for name in ("parts", "scratch")}
    found = memory_needed(config, 0, 1500, kinds=kinds, n_threads=n_threads)
    assert found.cache == ring
    scratch_of_others = 700_000 * n_threads  # where registers are narrower
    assert 0 <= found.buffers - sum(taken.values()) + taken["parts"] < scratch_of_others + 100_000


PROGRAM = """
import json, re, sys
from pathlib import Path
from llmq import load
from llmq.memory import activation_kinds
from quant.fit import memory_needed
from quant.size import size_of_file
def resident():
    return int(re.search(r"VmRSS:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
small, large, n_ctx = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
def read(path):
    model = load(path, n_ctx=n_ctx, threads=2)
    model.read([5, 6, 7] * 200)
    model.read([5])
    return model
read(small).close()  # the kernels, and what they need once
before = resident()
model = read(large)
model.read([7] * (n_ctx - model.n_ctx + model.room))
size = size_of_file(large, "large")
needed = memory_needed(model.config, round(size.n_bytes), n_ctx, kinds=activation_kinds(size.formats), n_threads=2)
grown = resident() - before
print(json.dumps([grown, needed.total - needed.program, before, needed.program]))
"""


def empty_model(path: Path, config: ModelConfig) -> Path:
    """A Q8_0 file of zeros, which take no room on the disk."""
    metadata = {
        "general.architecture": "llama", "llama.block_count": config.n_layers, "llama.embedding_length": config.dim,
        "llama.context_length": config.context_length, "llama.feed_forward_length": config.ffn_dim,
        "llama.attention.head_count": config.n_heads, "llama.attention.head_count_kv": config.n_kv_heads,
        "llama.attention.key_length": config.head_dim, "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    shapes = tensor_shapes(config).items()
    specs = [TensorSpec(name, shape, F32 if len(shape) == 1 else Q8_0) for name, shape in shapes]
    writer = GGUFWriter(path, metadata | vocabulary(config.vocab_size), specs)
    with path.open("wb") as file:
        file.write(writer._header)
        file.truncate(writer.n_bytes)
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to tell what a process holds")
def test_a_process_grows_by_what_was_predicted(tmp_path: Path) -> None:
    """Of 76 MB of weights, 32 MB of keys and values and 22 MB of buffers."""
    large = dataclasses.replace(
        MISTRAL, n_layers=4, dim=1024, n_heads=16, n_kv_heads=16, head_dim=64, ffn_dim=4096, vocab_size=512
    )
    small = dataclasses.replace(large, n_layers=1, dim=256, n_heads=4, n_kv_heads=4, ffn_dim=256)
    paths = [empty_model(tmp_path / f"{name}.gguf", each) for name, each in (("small", small), ("large", large))]
    command = [sys.executable, "-c", PROGRAM, *map(str, paths), "2048"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, predicted, before, program = json.loads(done.stdout)
    assert predicted > 100e6
    assert 0.95 < predicted / grown < 1.1, (predicted, grown)
    # What compiling leaves behind, and libraries of other versions, make the program itself differ more.
    assert 0.5 < program / before < 1.6, (program, before)


configs = st.builds(
    lambda base, layers, window, experts: dataclasses.replace(
        base, n_layers=layers, window=window, n_experts=experts, n_experts_used=2 if experts else 0
    ),
    st.sampled_from(list(CONFIGS.values())),
    st.integers(1, 90),
    st.sampled_from([0, 1024, 4096]),
    st.sampled_from([0, 4, 8]),
)


@given(configs, st.integers(1, 40_000), st.integers(1, 40_000), st.sampled_from(["f16", "q8_0"]), st.integers(1, 64))
def test_memory_grows_with_the_context(config, n_ctx: int, more: int, kv_type: str, n_threads: int) -> None:
    least = memory_needed(config, 5 * GB, n_ctx, kv_type, n_threads=n_threads)
    most = memory_needed(config, 5 * GB, n_ctx + more, kv_type, n_threads=n_threads)
    assert least.cache <= most.cache
    assert least.buffers <= most.buffers
    assert least.total <= most.total
    assert least.total == least.weights + least.cache + least.buffers + least.program


@given(configs, st.integers(0, 100 * GB), st.integers(1, 100 * GB), st.integers(1, 40_000))
def test_memory_grows_with_the_file_and_the_kinds_of_weights(config, n_bytes: int, more: int, n_ctx: int) -> None:
    least, most = (memory_needed(config, n, n_ctx) for n in (n_bytes, n_bytes + more))
    assert most.total - least.total == more
    assert memory_needed(config, n_bytes, n_ctx, kinds=[1]).total <= least.total
    assert most_buffer_bytes(config, [1], n_ctx, 1) < most_buffer_bytes(config, [1], n_ctx, 2)


# ---- what is free
def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


V2 = {"proc/self/cgroup": "0::/user/job"}
V1 = {"proc/self/cgroup": "5:memory:/docker/abc\n4:cpu:/x"}
JOB, DOCKER = "sys/fs/cgroup/user/job", "sys/fs/cgroup/memory/docker/abc"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8000),
        (V2, 8000),
        (V2 | {f"{JOB}/memory.max": "max", f"{JOB}/memory.current": "100"}, 8000),
        (V2 | {f"{JOB}/memory.max": "5000", f"{JOB}/memory.current": "1500"}, 3500),
        (V2 | {f"{JOB}/memory.max": "50000", f"{JOB}/memory.current": "1500"}, 8000),
        (V2 | {f"{JOB}/memory.max": "5000"}, 8000),
        # A limit above counts too, and in a container only the top is there.
        (V2 | {"sys/fs/cgroup/user/memory.max": "4000", "sys/fs/cgroup/user/memory.current": "3000"}, 1000),
        (V2 | {"sys/fs/cgroup/memory.max": "4000", "sys/fs/cgroup/memory.current": "3900"}, 100),
        # What is kept of files can be dropped.
        (
            V2
            | {f"{JOB}/memory.max": "5000", f"{JOB}/memory.current": "4900"}
            | {f"{JOB}/memory.stat": "anon 2000\nfile 2800\nactive_file 1000\ninactive_file 1500\nshmem 300"},
            2600,
        ),
        (V2 | {f"{JOB}/memory.max": "5000", f"{JOB}/memory.current": "5100"}, 0),
        (V1 | {f"{DOCKER}/memory.limit_in_bytes": "9223372036854771712", f"{DOCKER}/memory.usage_in_bytes": "9"}, 8000),
        (
            V1
            | {f"{DOCKER}/memory.limit_in_bytes": "6000", f"{DOCKER}/memory.usage_in_bytes": "5000"}
            | {f"{DOCKER}/memory.stat": "inactive_file 7\ntotal_inactive_file 800\ntotal_active_file 200"},
            2000,
        ),
    ],
)
def test_free_memory_is_the_least_that_anything_leaves(tmp_path, monkeypatch, files, expected) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8000))
    write(tmp_path, files)
    assert memory_free(tmp_path) == expected


def test_free_disk_is_that_of_the_folder_to_come(tmp_path: Path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr("shutil.disk_usage", lambda path: (asked.append(path), SimpleNamespace(free=77))[1])
    assert disk_free(tmp_path / "a" / "b") == disk_free(tmp_path) == 77
    assert asked == [tmp_path, tmp_path]


def test_here_is_what_was_measured_and_what_is_free(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("quant.fit.memory_free", lambda: 5)
    found = here(Machine(4, {1: 10.0, 2: 30.0, 4: 20.0}, 100.0, 0.0), tmp_path)
    assert (found.memory_free, found.n_threads, found.read_rate, found.product_rate) == (5, 2, 30.0, 200.0)
    assert found.disk_free > 0


@pytest.mark.parametrize(
    ("n_bytes", "already", "needed"),
    [
        (100, 0, 102),
        (100, 99, 3),
        (100, 100, 0),
        (GB, 0, GB + 20_000_000),
        (20 * GB, 0, 20 * GB + (256 << 20)),
        (20 * GB, 5 * GB, 15 * GB + (256 << 20)),
        (20 * GB, 20 * GB, 0),
        (0, 0, 0),
    ],
)
def test_disk_for_what_is_missing_and_a_margin(n_bytes: int, already: int, needed: int) -> None:
    assert disk_needed(n_bytes, already) == needed


# ---- the verdict
def verdict(needed: int, free: int, disk: int = 10, disk_free: int = 10, kind: str = "q4_k_m") -> Verdict:
    return Verdict("x", kind, needed, 4096, Memory(needed, 0, 0, 0), free, disk, disk_free, 1.0, 1.0)


@pytest.mark.parametrize(
    ("needed", "free", "disk", "disk_free", "answer"),
    [
        (900, 1000, 10, 10, OK),
        (901, 1000, 10, 10, TIGHT),
        (1000, 1000, 10, 10, TIGHT),
        (1001, 1000, 10, 10, NO_MEMORY),
        (1001, 1000, 11, 10, NO_MEMORY),
        (900, 1000, 11, 10, NO_DISK),
        (1000, 1000, 11, 10, NO_DISK),
        (1, 0, 0, 0, NO_MEMORY),
    ],
)
def test_edges(needed: int, free: int, disk: int, disk_free: int, answer: str) -> None:
    found = verdict(needed, free, disk, disk_free)
    assert found.answer == answer
    assert found.fits == (answer in (OK, TIGHT))


ORDER = [OK, TIGHT, NO_DISK, NO_MEMORY]


@given(
    st.sampled_from([planned(config, kind) for config in (MISTRAL, MIXTRAL) for kind in ("q2_k", "q4_k_m", "q8_0")]),
    st.lists(st.integers(1, 32768), min_size=2, max_size=2).map(sorted),
    st.lists(st.integers(0, 60 * GB), min_size=2, max_size=2).map(sorted),
    st.integers(0, 60 * GB),
)
def test_more_room_is_never_worse_and_a_longer_context_never_better(size, contexts, rooms, disk) -> None:
    def place(n_ctx: int, memory: int) -> int:
        return ORDER.index(judge(size, n_ctx, Here(memory, disk, 40.0, 800.0, 2)).answer)

    assert place(contexts[0], rooms[1]) <= place(contexts[0], rooms[0])
    assert place(contexts[0], rooms[0]) <= place(contexts[1], rooms[0])


@pytest.mark.parametrize(
    ("free", "best"),
    [
        (100 * GB, "q6_k"),
        (7.5 * GB, "q6_k"),
        (7.0 * GB, "q5_k_m"),
        (6.2 * GB, "q4_k_m"),
        (5.5 * GB, "q4_k_s"),
        (4.5 * GB, "q3_k_s"),
        (4.0 * GB, "q2_k"),
        (3.7 * GB, "q2_k"),
        (3.0 * GB, None),
    ],
)
def test_the_best_type_for_7b(free: float, best: str | None) -> None:
    at = dataclasses.replace(PLENTY, memory_free=int(free))
    found = best_type([row[0] for row in verdicts([planned(MISTRAL, kind) for kind in PRESETS], [4096], at)])
    assert (found.type if found else None) == best


def test_what_fits_tightly_comes_after_all_that_fits_well() -> None:
    tight = [verdict(95, 100, kind=kind) for kind in PREFERRED]
    assert best_type([*tight, verdict(50, 100, kind="q8_0")]) == tight[0]
    assert best_type([*tight, verdict(50, 100, kind="q2_k")]).type == "q2_k"
    assert best_type([verdict(50, 100, kind="f16"), verdict(101, 100, kind="q2_k")]).type == "f16"
    assert best_type([verdict(101, 100, kind=kind) for kind in PREFERRED]) is None
    assert best_type([]) is None


@pytest.mark.parametrize(
    ("free", "n_ctx", "kind", "instead"),
    [
        (100 * GB, 32768, "q4_k_m", None),
        (8 * GB, 32768, "q4_k_m", ("q4_k_m", 16384)),
        (5.5 * GB, 32768, "q4_k_m", ("q4_k_m", 4096)),
        (5.0 * GB, 4096, "q4_k_m", ("q4_k_m", 2048)),
        (4.4 * GB, 4096, "q4_k_m", ("q3_k_m", 4096)),
        (3.3 * GB, 8192, "q4_k_m", ("q2_k", 2048)),
        (3.0 * GB, 512, "q4_k_m", None),
        (2.8 * GB, 4096, "q4_k_m", None),
    ],
)
def test_what_would_work_instead(free: float, n_ctx: int, kind: str, instead: tuple[str, int] | None) -> None:
    at = dataclasses.replace(PLENTY, memory_free=int(free))
    other = judge_with_advice(planned(MISTRAL, kind), n_ctx, at).instead
    assert ((other.type, other.n_ctx) if other else None) == instead
    assert other is None or other.fits


def test_the_same_type_at_the_same_context_is_no_advice() -> None:
    """Although a plan, which has no header, is a little smaller than the file."""
    plan = planned(MISTRAL, "q4_k_m")
    at = dataclasses.replace(PLENTY, memory_free=judge(plan, 512, PLENTY).memory.total)
    found = judge_with_advice(dataclasses.replace(plan, n_bytes=plan.n_bytes + 1e6), 512, at)
    assert found.answer == NO_MEMORY
    assert found.instead is not None
    assert found.instead.type == "q4_k_s"


def test_a_smaller_type_is_what_helps_a_small_disk() -> None:
    at = dataclasses.replace(PLENTY, disk_free=4 * GB)
    found = judge_with_advice(planned(MISTRAL, "q6_k"), 4096, at)
    assert found.answer == NO_DISK
    assert found.instead is not None
    assert (found.instead.type, found.instead.n_ctx) == ("q3_k_l", 4096)
    # All but a gigabyte of it is there.
    assert judge(planned(MISTRAL, "q6_k"), 4096, at, already=5 * GB).answer == OK


# ---- speed
def test_rates_are_what_the_machine_gives_over_the_work() -> None:
    assert rates(Work(n_bytes=4e9, n_products=6e9), read_rate=30.0, product_rate=600.0) == (100.0, 7.5)


def test_a_larger_type_replies_slower_and_floats_read_prompts_slower() -> None:
    found = [judge(parse_size(f"7B:{kind}"), 4096, PLENTY) for kind in ("q2_k", "q4_k_m", "q8_0", "bf16")]
    decode = [each.decode for each in found]
    assert decode == sorted(decode, reverse=True)
    assert found[0].prefill == found[1].prefill == found[2].prefill == pytest.approx(4 * found[3].prefill)
    # Nearly as the bytes: 32 layers take 0.64 ms of their own.
    assert decode[0] / decode[3] == pytest.approx(found[3].file_bytes / found[0].file_bytes, rel=0.01)


def test_a_layer_takes_time_however_small_it_is(tiny_model: Tiny) -> None:
    """Two layers of 20 microseconds, beside which the bytes are nothing."""
    size = size_of_file(tiny_model(format=Q8_0)[0], "x")
    assert judge(size, 4096, dataclasses.replace(PLENTY, read_rate=1e6)).decode == pytest.approx(25_000, rel=0.01)
