import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmq import catalog as module
from llmq.catalog import CatalogEntry, catalog, find_entry, is_repository, user_catalog
from llmq.config import MAX_EXPERTS, MAX_EXPERTS_USED, MAX_LAYERS, MAX_SIZE
from llmq.errors import UsageError
from llmq.store import NAME

ROOT = Path(__file__).parents[1]

# Billions of weights and GB as Q4_K_M of the models that chat here, from their cards and from llama.cpp's files.
PUBLISHED = {
    "mistral-7b": (7.248, 4.37),
    "mistral-7b-v0.2": (7.242, 4.37),
    "mistral-7b-v0.1": (7.242, 4.37),
    "mathstral-7b": (7.248, 4.37),
    "mixtral-8x7b": (46.703, 28.45),
    "mixtral-8x22b": (140.630, 85.60),
    "codestral-22b": (22.247, 13.34),
    "mistral-small-2409": (22.247, 13.34),
    "mistral-large-2407": (122.610, 73.22),
}
# Billions of weights of all others as their cards have them, of the text model alone, by the beginnings of names.
CARDS = {
    "mistral-7b": "7.24",
    "mixtral-8x7b": "46.7",
    "mixtral-8x22b": "140.6",
    "mistral-large": "123",
    "mistral-nemo": "12.2",
    "ministral-8b": "8.02",
    "mistral-small-2501": "23.6",
    "mistral-small-3": "23.6",
    "devstral": "23.6",
    "magistral": "23.6",
    "ministral-3-3b": "3.4",
    "ministral-3-8b": "8.4",
    "ministral-3-14b": "13.5",
}
NEW = """
[mine]
repo = "me/mine-7b"
licence = "MIT"
tokenizer = "v1"
context_length = 4096
shape = { n_layers = 2, dim = 64, n_heads = 4, n_kv_heads = 2, head_dim = 16, ffn_dim = 128, vocab_size = 256 }
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMQ_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def write(home: Path):
    return lambda text: (home / "models.toml").write_bytes(text if isinstance(text, bytes) else text.encode())


def by_name() -> dict[str, CatalogEntry]:
    return {entry.name: entry for entry in catalog()}


def refusal() -> str:
    with pytest.raises(UsageError) as caught:
        catalog()
    line = str(caught.value)
    assert line.isprintable()
    assert "models.toml" in line
    return line


# ---- the packaged file


def test_names_are_unique_and_usable_in_the_store() -> None:
    names = [name for entry in catalog() for name in (entry.name, *entry.aliases)]
    assert len({name.lower() for name in names}) == len(names)
    assert all(NAME.fullmatch(name) for name in names)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_shape_gives_the_published_size(name) -> None:
    weights, file_size = PUBLISHED[name]
    entry = by_name()[name]
    assert entry.n_weights / 1e9 == pytest.approx(weights, abs=0.0006)
    assert entry.q4_k_m_bytes / 1e9 == pytest.approx(file_size, rel=0.02)


def test_every_shape_gives_what_the_card_says() -> None:
    """Within 1 %, or within what the card's last digit leaves open."""
    for entry in catalog():
        if entry.name in PUBLISHED:
            continue
        card = max((prefix for prefix in CARDS if entry.name.startswith(prefix)), key=len)
        digits = len(CARDS[card].partition(".")[2])
        weights = float(CARDS[card])
        assert abs(entry.n_weights / 1e9 - weights) <= max(0.01 * weights, 10.0**-digits), entry.name


def test_what_runs_here_is_what_chats_here() -> None:
    runs = [entry for entry in catalog() if not entry.unsupported]
    assert {entry.name for entry in runs if entry.instruct} == set(PUBLISHED)
    assert all(entry.tokenizer in ("v1", "v3") for entry in runs)


def test_windows_experts_and_tied_embeddings() -> None:
    entries = by_name()
    assert [name for name, entry in entries.items() if entry.window] == [
        "mistral-7b-v0.1", "mistral-7b-v0.1-base", "ministral-8b",
    ]  # fmt: skip
    assert all((entry.n_experts == 8) == name.startswith("mixtral") for name, entry in entries.items())
    assert all(entry.n_experts_used == (2 if entry.n_experts else 0) for entry in entries.values())
    assert all(entry.tied_embeddings == name.startswith("ministral-3-3b") for name, entry in entries.items())


def test_a_tekken_vocabulary_is_not_run_yet() -> None:
    """Tekken has 2^17 tokens, the vocabularies that run here 2^15 or fewer."""
    for entry in catalog():
        assert ("Tekken" in entry.unsupported) == (entry.vocab_size == 2**17), entry.name


def test_texts_are_what_the_users_would_have_to_be(write) -> None:
    """The packaged file passes the checks that are made of the user's."""
    packaged = catalog()
    write((ROOT / "models.toml").read_bytes())
    assert catalog() == packaged


def test_numbers_go_as_far_as_the_runtime() -> None:
    assert {key: module.MOST[key] for key in ("n_layers", "n_experts", "n_experts_used")} == {
        "n_layers": MAX_LAYERS, "n_experts": MAX_EXPERTS, "n_experts_used": MAX_EXPERTS_USED,
    }  # fmt: skip
    assert MAX_SIZE == 2**24


def test_reading_it_needs_no_arrays_and_no_compiler() -> None:
    code = "import sys, llmq.reference; llmq.reference.parse_reference('mistral'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"numpy", "numba", "llvmlite"} & set(loaded.split())


# ---- finding


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("mistral-7b", "mistral-7b"),
        ("mistral", "mistral-7b"),
        ("MIXTRAL", "mixtral-8x7b"),
        ("Nemo", "mistral-nemo"),
        ("mathstral", "mathstral-7b"),
        ("codestral", "codestral-22b"),
        ("mistral-small", "mistral-small-2501"),
        ("mistral-large", "mistral-large-2411"),
    ],
)
def test_a_name_or_an_alias_in_any_case(name, found) -> None:
    entry = find_entry(name)
    assert entry is not None
    assert entry.name == found


@pytest.mark.parametrize(
    "name", ["", "mistra", "mistral ", "mistral:7b", "mistralai/Mistral-7B-v0.3", "\u212a", "ｍistral"]
)
def test_nothing_else_is_found(name) -> None:
    assert find_entry(name) is None


def test_letters_that_only_fold_to_others_are_not_taken_for_them(write) -> None:
    """The Kelvin sign's lower case is k."""
    write("[mistral-7b]\naliases = ['kk']\n")
    assert find_entry("KK")
    assert find_entry("\u212ak") is None


# ---- the user's file


def test_where_the_users_file_is(home, monkeypatch) -> None:
    assert user_catalog() == home / "models.toml"
    monkeypatch.delenv("LLMQ_HOME")
    assert user_catalog().name == "models.toml"
    assert user_catalog().parent.name.startswith("llmq")


def test_a_new_name_adds_a_model(write) -> None:
    packaged = catalog()
    write(NEW + 'aliases = ["My-Own"]\ninstruct = false\n')
    *before, mine = catalog()
    assert before == packaged
    assert (mine.name, mine.repo, mine.instruct, mine.gguf, mine.window) == ("mine", "me/mine-7b", False, "", 0)
    # 2 (2 64 16 (4 + 2) + 3 64 128 + 2 64) + 64 (2 256 + 1), by hand.
    assert mine.n_weights == 106_816
    assert find_entry("MY-own") == mine


def test_the_same_name_changes_what_it_says_and_nothing_else(write) -> None:
    before = by_name()
    write('[mistral-7b]\ngguf = "me/my-GGUF"\nshape = { n_layers = 31 }\n["mistral-7b-v0.2"]\naliases = []\n')
    after = by_name()
    assert list(after) == list(before)
    changed = after["mistral-7b"]
    assert (changed.gguf, changed.n_layers) == ("me/my-GGUF", 31)
    assert (changed.repo, changed.dim, changed.aliases) == tuple(
        getattr(before["mistral-7b"], key) for key in ("repo", "dim", "aliases")
    )
    assert after["mistral-7b-v0.2"].aliases == ()
    assert all(after[name] == before[name] for name in before if name not in ("mistral-7b", "mistral-7b-v0.2"))


def test_a_byte_order_mark_is_no_harm(write) -> None:
    write(b"\xef\xbb\xbf" + NEW.encode())
    assert find_entry("mine")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[mistral-7b\n", "no TOML file"),
        ("a = 1\n", "outside any [model]"),
        ("[mistral-7b]\nshape = 1\n", "shape that is no table"),
        ("[mine]\n", "lacks repo, licence, tokenizer"),
        (NEW.replace("dim = 64, ", ""), "[mine] lacks dim"),
        ("[mistral-7b]\nrepository = 'a/b'\n", "unknown key 'repository'"),
        ("[mistral-7b]\ndim = 4096\n", "unknown key 'dim'"),
        ("[mistral-7b]\nshape = { window = 4096 }\n", "unknown key 'window'"),
        ("[mistral-7b]\nname = 'x'\n", "unknown key 'name'"),
        ("[mistral-7b]\nrepo = 'a'\n", "wrong repo"),
        ("[mistral-7b]\nrepo = ''\n", "wrong repo"),
        ("[mistral-7b]\ngguf = '../../etc/passwd'\n", "wrong gguf"),
        ("[mistral-7b]\ngated = 1\n", "wrong gated"),
        ("[mistral-7b]\ncontext_length = true\n", "wrong context_length"),
        ("[mistral-7b]\ncontext_length = 32768.0\n", "wrong context_length"),
        ("[mistral-7b]\nwindow = -1\n", "wrong window"),
        ("[mistral-7b]\nshape = { dim = 0 }\n", "wrong dim"),
        ("[mistral-7b]\nshape = { n_layers = 1025 }\n", "wrong n_layers"),
        ("[mistral-7b]\nshape = { dim = 0x" + "f" * 9999 + " }\n", "wrong dim"),
        ("[mistral-7b]\nlicence = 'a\\u001bb'\n".replace("'", '"'), "wrong licence"),
        ("[mistral-7b]\nlicence = ''\n", "wrong licence"),
        ("[mistral-7b]\naliases = 'x'\n", "wrong aliases"),
        ("[mistral-7b]\naliases = ['a/b']\n", "wrong aliases"),
        ("[mistral-7b]\naliases = [1]\n", "wrong aliases"),
        ("[mistral-7b]\naliases = ['nul']\n", "wrong aliases"),
        ("[mistral-7b]\naliases = ['Nemo']\n", "[mistral-nemo] is called 'nemo', which already means mistral-7b"),
        ("[mistral-7b]\naliases = ['x', 'X']\n", "already means mistral-7b"),
        ("[mistral-7b]\naliases = ['MISTRAL-7B']\n", "already means mistral-7b"),
        (NEW.replace("[mine]", "[Mistral-Nemo]"), "[Mistral-Nemo] is called 'mistral-nemo'"),
        (NEW.replace("[mine]", "[mistral]"), "[mistral] is called 'mistral'"),
        (NEW.replace("[mine]", '["../x"]'), "not a model name"),
        (NEW.replace("[mine]", '["a/b"]'), "not a model name"),
        (NEW.replace("[mine]", '["\\u001b[2J"]'), "not a model name"),
        (NEW.replace("[mine]", "[CON]"), "not a model name"),
        (NEW + "n_experts = 8\n", "0 of 8 experts"),
        (NEW + "n_experts_used = 2\n", "2 of 0 experts"),
        ("a = " + "[" * 100_000, "no TOML file"),
        (b"\xff\xfe", "no TOML file"),
    ],
)
def test_what_is_wrong_gets_one_sentence(write, text, said) -> None:
    write(text)
    assert said in refusal()


def test_a_file_that_is_too_large_is_not_read(write) -> None:
    write("#" * 2**20)
    assert catalog()
    write("#" * (2**20 + 1))
    assert "larger than 1 MiB" in refusal()


def test_only_a_regular_file_is_read(home) -> None:
    (home / "models.toml").mkdir()
    assert "cannot read" in refusal()


@pytest.mark.skipif(os.name == "nt", reason="named pipes and sockets are POSIX's")
@pytest.mark.parametrize("kind", ["fifo", "socket"])
def test_nobody_waits_for_a_pipe(home, kind) -> None:
    path = home / "models.toml"
    if kind == "fifo":
        os.mkfifo(path)
        assert "cannot read" in refusal()
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
            assert "cannot read" in refusal()


@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_anything_is_a_catalog_or_refused(write, content) -> None:
    write(content)
    with contextlib.suppress(UsageError):
        assert catalog()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.just(10**300),
    lambda inner: st.lists(inner, max_size=3),
)


@given(key=st.sampled_from(sorted(module.FIELDS)), value=VALUES)
def test_an_entry_holds_only_what_its_fields_say(key, value) -> None:
    """Whatever passes has the field's type, and makes sizes without error."""
    if module._expected(key).fits(value):
        assert isinstance(value, {"aliases": list}.get(key, module.FIELDS[key]))
        assert len(str(value)) < 200


# ---- names of repositories


@pytest.mark.parametrize(
    "text", ["a/b", "mistralai/Mistral-7B-v0.3", "a" * 96 + "/" + "b" * 96, "a.b/c_d", "01/x.gguf"]
)
def test_repositories(text) -> None:
    assert is_repository(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "a", "/", "a/", "/b", "a/b/c", "a//b", "../b", "a/..", "a/.b", ".a/b", "-a/b", "a/-b", "a--b/c", "a/b--c",
        "a/b..c", "a/b.", "a/b-", "a b/c", "a/b\n", "a\\b", "a:b/c", "a@b/c", "a%2fb/c", "é/b", "\u0430/b", "a/con",
        "NUL/b", "a/com1.x", "a" * 97 + "/b", "a/" + "b" * 97, "a/b\x00", "~/b",
    ],
)  # fmt: skip
def test_what_is_no_repository(text) -> None:
    assert not is_repository(text)


@given(st.from_regex(module.REPOSITORY, fullmatch=True))
def test_a_repository_leads_nowhere_else(text) -> None:
    folder = Path("/root/models")
    inside = Path(os.path.normpath(folder / text))
    assert inside.relative_to(folder).parts == tuple(text.split("/"))
