"""llmq fit of what a repository or an address has: by its listing and one header, and nothing more."""

import json
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from cli_runs import llmq
from hub import Hub
from pull_fake import INSTEAD
from tiny import tiny_gguf

from llmq.formats import Q4_K, Q8_0

FILES, WEIGHTS = "org/Tiny-7B-GGUF", "org/Tiny-7B"


@pytest.fixture(autouse=True)
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub) -> dict[str, int]:
    """A model in two types and one that llmq does not make, and its weights; bytes by type."""
    monkeypatch.setenv("LLMQ_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    for name in ("LLMQ_OFFLINE", "HF_HUB_OFFLINE", "LLMQ_DEBUG", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in INSTEAD.items():
        monkeypatch.setattr(name, value)
    sizes = {}
    for kind, fmt in (("Q4_K_M", Q4_K), ("Q8_0", Q8_0), ("IQ3_XXS", Q4_K)):
        tiny_gguf(tmp_path / f"{kind}.gguf", n_layers=1, format=fmt)
        content = (tmp_path / f"{kind}.gguf").read_bytes()
        hub.add(FILES, f"Tiny-7B-{kind}.gguf", content)
        sizes[kind.lower()] = len(content)
    write_checkpoint(tmp_path / "weights")
    for file in (tmp_path / "weights").iterdir():
        hub.add(WEIGHTS, file.name, file.read_bytes())
        if not file.name.endswith(".safetensors"):
            hub.small.add(file.name)
    return sizes


def told(capsys: pytest.CaptureFixture[str], what: str) -> tuple[dict[str, int], str]:
    """File sizes by type, and the command."""
    code, out, err = llmq(capsys, "fit", what, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    return {each["type"]: each["file_bytes"] for each in found["types"]}, found["command"]


def test_a_repository_has_the_types_that_it_has(hub, capsys, published) -> None:
    sizes, command = told(capsys, FILES)
    assert sizes == {kind: published[kind] for kind in ("q4_k_m", "q8_0")}
    assert command == f"llmq pull {FILES}:q4_k_m"
    assert hub.n_sent() <= 1 << 20  # the beginning of one file
    assert "q8_0" in llmq(capsys, "fit", f"hf:{FILES}@v1")[1]
    assert told(capsys, f"{FILES}@v1")[1] == f"llmq pull {FILES}@v1:q4_k_m"


def test_the_type_behind_a_colon_may_be_any_that_there_is(capsys, published) -> None:
    assert told(capsys, f"{FILES}:q8_0")[0] == {"q8_0": published["q8_0"]}
    assert told(capsys, f"{FILES}:iq3_xxs")[0] == {"iq3_xxs": published["iq3_xxs"]}
    code, out, err = llmq(capsys, "fit", f"{FILES}:q6_k")
    assert (code, out) == (2, "")
    assert "has no q6_k; it has iq3_xxs, q4_k_m, q8_0" in err


def test_a_file_that_is_there_comes_before_a_repository(hub, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "model").write_bytes((tmp_path / "Q8_0.gguf").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert told(capsys, "org/model")[1] == "llmq chat org/model"
    assert not hub.seen


def test_float_types_have_two_names(capsys) -> None:
    assert list(told(capsys, f"{WEIGHTS}:fp16")[0]) == ["f16"]
    assert list(told(capsys, "1B:FP16")[0]) == ["f16"]


def test_advice_is_of_the_types_that_there_are(capsys, monkeypatch) -> None:
    monkeypatch.setattr("quant.fit.disk_free", lambda *_: 10**5)
    code, _, err = llmq(capsys, "fit", FILES)
    assert code == 3
    assert err.endswith("free some disk space\n")


def test_an_address_is_one_file(hub, capsys, published) -> None:
    address = f"https://huggingface.co/{FILES}/blob/main/Tiny-7B-Q8_0.gguf"
    assert told(capsys, address) == ({"q8_0": published["q8_0"]}, f"llmq pull {address}")
    url = f"{hub.url}/{FILES}/resolve/main/Tiny-7B-Q4_K_M.gguf"
    assert told(capsys, url) == ({"q4_k_m": published["q4_k_m"]}, f"llmq pull {url}")


def test_weights_are_judged_as_what_they_can_be_made_into(hub, capsys) -> None:
    sizes, command = told(capsys, WEIGHTS)
    assert {"q2_k", "q4_k_m", "bf16"} <= set(sizes)
    assert command == f"llmq pull --from-source {WEIGHTS}:q6_k"
    assert list(told(capsys, f"{WEIGHTS}:q5_k_m")[0]) == ["q5_k_m"]
    assert not [seen for seen in hub.answers() if seen.path.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        (f"{WEIGHTS}:q9", 2, "there is no type 'q9'"),
        ("org/nothing", 5, "no such repository"),
        (f"{FILES}@no/../way", 2, "no revision"),
        ("org/empty", 2, "neither GGUF files nor safetensors"),
        (f"hf.co/{FILES}/blob/main/other.gguf", 5, "has no file"),
        ("here/is/nothing", 2, "is no name, no repository and no file"),
        ("./org/Tiny-7B.gguf", 2, "there is no file"),
        ("org/no-words", 1, "tokenizer.model"),
        ("org/other-words", 1, "tokenizer is 'gpt-2'"),
    ],
)
def test_what_cannot_be_is_a_line(hub, capsys, what: str, code: int, said: str) -> None:
    hub.add("org/empty", "README.md", b"nothing")
    for name in ("config.json", "model.safetensors"):
        hub.add("org/no-words", name, hub.repos[WEIGHTS][name])
    file = hub.repos[FILES]["Tiny-7B-Q8_0.gguf"]
    before, key, after = file.partition(b"tokenizer.ggml.model")
    hub.add("org/other-words", "x-Q8_0.gguf", before + key + after.replace(b"llama", b"gpt-2", 1))
    found, out, err = llmq(capsys, "fit", what)
    assert (found, out) == (code, "")
    assert said in err
    assert len(err.splitlines()) == 1


def test_offline_nobody_is_asked(hub, capsys, monkeypatch) -> None:
    monkeypatch.setenv("LLMQ_OFFLINE", "1")
    code, _, err = llmq(capsys, "fit", FILES)
    assert code == 5
    assert "LLMQ_OFFLINE" in err
    assert not hub.seen
