"""What of a repository is offered in which type, what it is called in the store, and what a header says beforehand."""

import hashlib
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub import COMMIT, Hub
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_gguf, vocabulary

from llmq import offer
from llmq.errors import FileFormatError, LlmqError, NetworkError, UnsupportedError, UsageError
from llmq.fetcher import Limits, Remote
from llmq.gguf_header import HEADER_LIMIT
from llmq.gguf_writer import GGUFWriter
from llmq.hub import HubFile, Snapshot, snapshot
from llmq.offer import choose, offer_at, offers_of, peek, store_name, type_of
from llmq.reference import Url
from llmq.store import NAME

QUICK = Limits(idle_seconds=5.0, tries=2, first_wait=0.01, longest_wait=0.02)
K_TYPES = ("Q2_K", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q4_K_M", "Q4_K_S", "Q5_K_M", "Q5_K_S", "Q6_K", "Q8_0")

# Names as they are in repositories that people take models from.
BARTOWSKI = [
    ".gitattributes", "README.md", "Mistral-7B-Instruct-v0.3.imatrix", "Mistral-7B-Instruct-v0.3-f32.gguf",
    *(f"Mistral-7B-Instruct-v0.3-{kind}.gguf" for kind in K_TYPES),
    *(f"Mistral-7B-Instruct-v0.3-{kind}.gguf" for kind in ("Q4_K_L", "IQ3_XXS", "IQ4_XS", "IQ4_NL", "Q4_0_4_4")),
]  # fmt: skip
BARTOWSKI_LARGE = [
    "README.md", "Mistral-Large-Instruct-2407.imatrix", "Mistral-Large-Instruct-2407-IQ1_M.gguf",
    *(f"Mistral-Large-Instruct-2407-Q4_K_M/Mistral-Large-Instruct-2407-Q4_K_M-0000{n}-of-00002.gguf" for n in (1, 2)),
]  # fmt: skip
THEBLOKE = [
    ".gitattributes", "LICENSE", "README.md", "config.json",
    *(f"mixtral-8x7b-instruct-v0.1.{kind}.gguf" for kind in ("Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M", "Q5_0", "Q5_K_M")),
]  # fmt: skip
QUANTFACTORY = ["README.md", *(f"Mistral-Nemo-Base-2407.{kind}.gguf" for kind in (*K_TYPES, "Q4_0", "Q4_1", "Q5_1"))]
MISTRALAI = ["README.md", "devstralQ4_K_M.gguf", "devstralQ8_0.gguf", "devstralBF16.gguf", "params.json"]
WITH_EYES = [
    "Pixtral-12B-Q4_K_M.gguf", "mmproj-Pixtral-12B-Q8_0.gguf", "mmproj-model-f16.gguf", "Pixtral-12B-imatrix.gguf",
    "Pixtral-12B-lora-F16.gguf", "ggml-vocab-mistral.gguf",
]  # fmt: skip


def listing(names: Iterable[str]) -> Snapshot:
    files = [HubFile(name, 1000, hashlib.sha256(name.encode()).hexdigest(), "") for name in names]
    return Snapshot("org/model", COMMIT, {file.name: file for file in files})


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        (BARTOWSKI, {*map(str.lower, K_TYPES), "q4_k_l", "iq3_xxs", "iq4_xs", "iq4_nl", "q4_0_4_4", "f32"}),
        (BARTOWSKI_LARGE, {"iq1_m"}),
        (THEBLOKE, {"q2_k", "q3_k_m", "q4_0", "q4_k_m", "q5_0", "q5_k_m"}),
        (QUANTFACTORY, {*map(str.lower, K_TYPES), "q4_0", "q4_1", "q5_1"}),
        (MISTRALAI, {"q4_k_m", "q8_0", "bf16"}),
        (WITH_EYES, {"q4_k_m"}),
    ],
)
def test_files_of_a_repository_by_type(names: list[str], kinds: set[str]) -> None:
    found = offers_of(listing(names))
    assert set(found) == kinds
    for kind, file in found.items():
        assert kind.upper() in file.name.upper()


def test_a_type_is_the_last_word_of_a_name() -> None:
    for name, kind in {
        "Model-F16.gguf": "f16", "model.fp16.gguf": "f16", "model_fp32.gguf": "f32", "modelFP16.gguf": "f16",
        "model-bf16.gguf": "bf16", "folder/Q8_0.gguf": "q8_0", "Q4_K_M/model.gguf": "", "model.gguf": "",
        "mistral-nemo-2407.gguf": "", "model-16.gguf": "", "Q4_K_M-model.gguf": "", "seq8.gguf": "",
        "model-Q4_K_M-imat.gguf": "", "modelIQ4_XS.gguf": "iq4_xs",
    }.items():  # fmt: skip
        assert type_of(name) == kind, name


def test_of_several_files_of_a_type_the_shortest_name_is_taken() -> None:
    names = ["model-uncensored-Q4_K_M.gguf", "model-Q4_K_M.gguf", "old/model-Q4_K_M.gguf"]
    for order in (names, names[::-1]):
        assert choose(listing(order), ["q4_k_m"], exact=True).file == "model-Q4_K_M.gguf"


def test_types_are_taken_in_the_order_asked_for() -> None:
    found = listing(THEBLOKE)
    assert choose(found, ["q4_k_m"], exact=False).type == "q4_k_m"
    assert choose(found, ["q6_k", "q5_0"], exact=True).type == "q5_0"
    chosen = choose(found, ["q2_k"], exact=True)
    assert chosen.file == "mixtral-8x7b-instruct-v0.1.Q2_K.gguf"
    assert chosen.origin == f"org/model@{COMMIT}/{chosen.file}"
    assert chosen.remote.sha256 == hashlib.sha256(chosen.file.encode()).hexdigest()
    assert chosen.remote.request.url.endswith(f"/org/model/resolve/{COMMIT}/{chosen.file}")
    assert choose(listing(["model.gguf"]), ["q4_k_m"], exact=False).file == "model.gguf"
    with pytest.raises(UsageError, match="has no q6_k; it has q2_k, q3_k_m, q4_0, q4_k_m, q5_0, q5_k_m"):
        choose(found, ["q6_k"], exact=True)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (BARTOWSKI_LARGE[:2] + BARTOWSKI_LARGE[3:], "in parts"),
        (["config.json", "model-00001-of-00002.safetensors"], "--from-source makes one"),
        (["README.md"], "is it a model's repository"),
        ([], "is it a model's repository"),
    ],
)
def test_where_there_is_no_file_it_says_what_there_is(names: list[str], said: str) -> None:
    for exact in (True, False):
        with pytest.raises(UsageError, match=said):
            choose(listing(names), ["q4_k_m"], exact=exact)


@given(st.text(max_size=200) | st.from_regex(r"[A-Za-z0-9._-]{1,200}", fullmatch=True), st.sampled_from(["", "q4_k_m"]))
def test_any_name_becomes_one_for_the_store_or_is_refused(label: str, kind: str) -> None:
    try:
        name = store_name(label, kind)
    except UsageError:
        assert not re.search("[A-Za-z0-9]", label + kind)
        return
    assert NAME.fullmatch(name)
    if NAME.fullmatch(label) and not kind and label[-1].isalnum():
        assert name == label
    if kind:
        assert name.endswith(kind)


def test_long_names_that_differ_at_their_ends_stay_apart() -> None:
    label = "An-Extraordinarily-Long-Name-" * 4
    names = {store_name(f"{label}{kind}") for kind in ("Q4_K_M", "Q5_K_M", "Q8_0")}
    assert len(names) == 3
    assert all(len(name) == 64 for name in names)


# ---- the header beforehand
def published(hub: Hub, data: bytes, name: str = "model-F32.gguf") -> offer.Offer:
    hub.add("org/model", name, data)
    hub.small.add(name)
    remote = Remote(offer.offer_at(Url(f"{hub.url}/org/model/resolve/main/{name}"), QUICK).remote.request, len(data))
    hub.reset()
    return offer.Offer(name, type_of(name), remote, "here")


def bytes_sent(hub: Hub) -> int:
    return sum(seen.sent for seen in hub.seen)


def large_header(path: Path, n_bytes: int) -> bytes:
    """A file whose header alone has more than `n_bytes`."""
    metadata: dict[str, Any] = {"general.architecture": "llama", "filler": np.zeros(n_bytes, np.uint8)}
    with GGUFWriter(path, metadata | vocabulary(512), []):
        pass
    return path.read_bytes() + random.Random(1).randbytes(1 << 20)


def test_a_header_in_the_first_piece_takes_one_request(hub: Hub, tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "a.gguf")
    data = (tmp_path / "a.gguf").read_bytes()
    metadata, tensors = peek(published(hub, data), QUICK)
    assert metadata["general.name"] == "tiny"
    assert tensors["token_embd.weight"].shape == (512, 256)
    assert [seen.headers["range"] for seen in hub.seen] == ["bytes=0-1048575"]


@pytest.mark.parametrize("mebibytes", [1, 3, 9])
def test_a_longer_header_is_read_on_and_nothing_twice(hub: Hub, tmp_path: Path, mebibytes: int) -> None:
    data = large_header(tmp_path / "a.gguf", mebibytes << 20)
    metadata, tensors = peek(published(hub, data), QUICK)
    assert len(metadata["filler"]) == mebibytes << 20
    assert tensors == {}
    assert len(hub.seen) > 1
    assert bytes_sent(hub) <= len(data)


def test_a_server_without_ranges_gives_a_header_too(hub: Hub, tmp_path: Path) -> None:
    data = large_header(tmp_path / "a.gguf", 3 << 20)
    file = published(hub, data)
    hub.fail("ignore_range", where="")
    assert len(peek(file, QUICK)[0]["filler"]) == 3 << 20


def number(value: int, n_bytes: int = 8) -> bytes:
    return value.to_bytes(n_bytes, "little")


START = b"GGUF" + number(3, 4)
ARRAY = number(1) + b"a" + number(9, 4)  # a key, and that its value is one


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", FileFormatError),
        (b"GGU", FileFormatError),
        (b"GGUF", FileFormatError),
        (b"<html><body>Please log in</body></html>" + bytes(5000), FileFormatError),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 10\n", FileFormatError),
        (START + number(2**63) + number(1) + bytes(2 << 20), FileFormatError),
        (START + number(0) + number(2**40) + bytes(2 << 20), FileFormatError),
        (START + number(0) + number(1) + number(2**62) + bytes(2 << 20), FileFormatError),
        (START + number(0) + number(1) + ARRAY + number(4, 4) + number(2**60), FileFormatError),
        (b"GGUF" + number(9, 4) + bytes(100), UnsupportedError),
        (b"GGUF" + bytes(2) + number(3, 2) + bytes(100), UnsupportedError),
    ],
)  # fmt: skip
def test_what_is_no_model_is_refused_after_its_beginning(hub: Hub, data: bytes, error: type[LlmqError]) -> None:
    if not data:
        with pytest.raises(error, match="empty"):
            peek(offer.Offer("model.gguf", "", Remote(published(hub, b"x").remote.request, 0), "here"), QUICK)
        return
    with pytest.raises(error) as refused:
        peek(published(hub, data), QUICK)
    assert str(refused.value).isprintable()
    assert bytes_sent(hub) <= max(len(data), 1 << 20)


def test_a_header_without_end_is_given_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """It announces an array as large as a header may be, and the file goes on for longer."""
    monkeypatch.setattr(offer, "HEADER_LIMIT", 6 << 20)
    monkeypatch.setattr("llmq.gguf_header.HEADER_LIMIT", 6 << 20)
    head = START + number(0) + number(1) + ARRAY + number(0, 4) + number(HEADER_LIMIT)
    with pytest.raises(FileFormatError):
        peek(published(hub, head + bytes(HEADER_LIMIT + (9 << 20))), QUICK)
    assert bytes_sent(hub) <= 16 << 20


def test_a_web_page_in_the_place_of_a_file_is_told(hub: Hub) -> None:
    file = published(hub, START + bytes(5000))
    hub.fail("html", where="")
    with pytest.raises(NetworkError, match="web page"):
        peek(file, QUICK)


# ---- addresses
def test_an_address_is_offered_without_what_stands_behind_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    url = hub.add("org/model", "my%20model-Q8_0.gguf", b"GGUF" + bytes(100))
    hub.repos["org/model"]["my model-Q8_0.gguf"] = hub.repos["org/model"].pop("my%20model-Q8_0.gguf")
    found = offer_at(Url(f"{url}?token=CANARY"), QUICK)
    assert (found.file, found.type, found.remote.n_bytes) == ("my model-Q8_0.gguf", "q8_0", 104)
    assert "CANARY" not in found.origin
    assert found.remote.etag
    monkeypatch.setenv("LLMQ_OFFLINE", "1")
    with pytest.raises(NetworkError, match="LLMQ_OFFLINE"):
        offer_at(Url(url), QUICK)


def test_a_secret_in_an_address_is_in_no_error(hub: Hub) -> None:
    url = hub.add("org/model", "model.gguf", b"GGUF" + bytes(100))
    untold = {"n": 200, "headers": {"Content-Length": "unknown"}}
    for fault, arguments in (
        ("status", untold),
        ("html", {}),
        ("status", {"n": 403}),
        ("status", {"n": 503}),
        ("onward", {}),
    ):
        hub.reset()
        hub.fail(fault, where="", **arguments)
        with pytest.raises(LlmqError) as refused:
            peek(offer_at(Url(f"{url}?token=CANARY"), QUICK), QUICK)
        assert "CANARY" not in str(refused.value)


def test_a_snapshot_is_offered_as_it_is_listed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    hub.add("org/model", "model-Q8_0.gguf", b"GGUF" + bytes(100))
    found = choose(snapshot("org/model", limits=QUICK), ["q8_0"], exact=True)
    assert found.remote.n_bytes == 104
    assert found.remote.sha256 == hashlib.sha256(b"GGUF" + bytes(100)).hexdigest()
