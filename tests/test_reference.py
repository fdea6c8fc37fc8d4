import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from llmq import reference
from llmq.catalog import REPOSITORY, find_entry, is_repository
from llmq.errors import UsageError
from llmq.reference import Local, Published, Repo, Url, parse_reference

HUB = "https://huggingface.co"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder; the user's home and catalog are not looked at."""
    monkeypatch.setenv("LLMQ_HOME", str(tmp_path / "llmq"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def published(name: str, kind: str = "") -> Published:
    entry = find_entry(name)
    assert entry is not None
    return Published(entry, kind)


def refusal(text: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse_reference(text)
    line = str(caught.value)
    assert line.isascii()
    assert line.isprintable()
    assert len(line) <= 235  # with "llmq: " one line of 240
    return line


# ---- what means what


@pytest.mark.parametrize(
    ("text", "name", "kind"),
    [
        ("mistral-7b", "mistral-7b", ""),
        ("mistral", "mistral-7b", ""),
        ("Mixtral-8x7B", "mixtral-8x7b", ""),
        ("mistral-7b:q5_k_m", "mistral-7b", "q5_k_m"),
        ("MISTRAL-7B:Q5_K_M", "mistral-7b", "q5_k_m"),
        ("nemo:whatever", "mistral-nemo", "whatever"),
        ("mistral-small3.1:q8_0", "mistral-small-3.1", "q8_0"),
    ],
)
def test_names(text, name, kind) -> None:
    assert parse_reference(text) == published(name, kind)


@pytest.mark.parametrize(
    "prefix", ["", "hf:", "HF:", "hf://", "hf.co/", "huggingface.co/", "HuggingFace.co/", HUB + "/"]
)
@pytest.mark.parametrize(
    ("text", "repo"),
    [
        ("org/repo", Repo("org/repo")),
        ("Org/Re.po_1-2:Q4_K_M", Repo("Org/Re.po_1-2", "", "q4_k_m")),
        ("org/repo@main", Repo("org/repo", "main")),
        ("org/repo@v1.0:q8_0", Repo("org/repo", "v1.0", "q8_0")),
        ("org/repo@refs/pr/1", Repo("org/repo", "refs/pr/1")),
        (
            "org/repo@0123456789abcdef0123456789abcdef01234567",
            Repo("org/repo", "0123456789abcdef0123456789abcdef01234567"),
        ),
        ("mistral-7b/mistral-7b", Repo("mistral-7b/mistral-7b")),
    ],
)
def test_repositories(prefix, text, repo) -> None:
    assert parse_reference(prefix + text) == repo


@pytest.mark.parametrize("host", ["https://huggingface.co/", "http://huggingface.co/", "https://hf.co/", "hf.co/"])
@pytest.mark.parametrize(
    ("page", "found"),
    [
        ("org/repo/", Repo("org/repo")),
        ("org/repo?library=true", Repo("org/repo")),
        ("org/repo#card", Repo("org/repo")),
        ("org/repo/tree/main", Repo("org/repo", "main")),
        ("org/repo/tree/main/sub/folder", Repo("org/repo", "main")),
        ("org/repo/discussions/1", Repo("org/repo")),
        ("org/repo/blob/main/README.md", Repo("org/repo", "main")),
        ("org/repo/blob/main/a.Q4_K_M.gguf", Repo("org/repo", "main", file="a.Q4_K_M.gguf")),
        ("org/repo/resolve/main/a.gguf?download=true", Repo("org/repo", "main", file="a.gguf")),
        ("org/repo/resolve/v1/sub/a%20b.gguf", Repo("org/repo", "v1", file="sub/a b.gguf")),
    ],
)
def test_pages_of_the_hub(host, page, found) -> None:
    assert parse_reference(host + page) == found


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("https://example.org/a.gguf", None),
        ("http://127.0.0.1:8000/files/a.Q8_0.gguf", None),
        ("https://[::1]:8443/a.gguf", None),
        ("https://[::1]/a.gguf", None),
        ("https://example.org/a.gguf?token=x%2Fy&b=../c", None),
        ("https://example.org/a%20b+(1).gguf", None),
        ("https://xn--bcher-kva.example/a.gguf", None),
        ("https://example.org/a.gguf#part", "https://example.org/a.gguf"),
        ("HTTPS://example.org/a.gguf", "https://example.org/a.gguf"),
        ("https://huggingface.co.example.org/a/b/resolve/main/a.gguf", None),
    ],
)
def test_other_addresses(text, url) -> None:
    assert parse_reference(text) == Url(url or text)


@pytest.mark.parametrize("text", ["./org/repo", "../x", "/srv/x", ".", "a.gguf", "sub/a.gguf", "a/b/c/d.gguf", "./a b"])
def test_paths_by_their_form(text) -> None:
    """Whether anything is there is for those to find out who open it."""
    assert parse_reference(text) == Local(Path(text))


def test_the_home_folder_is_meant_by_a_tilde(here) -> None:
    assert parse_reference("~/models/x") == Local(here / "home" / "models" / "x")


@pytest.mark.parametrize("text", ["checkpoint", "a b", "one/two/three", "m\u00f6del", "x--y/z"])
def test_what_means_nothing_else_may_lie_on_disk(here, text) -> None:
    assert "disk" not in refusal(text)
    (here / text).mkdir(parents=True)
    assert parse_reference(text) == Local(Path(text))


@pytest.mark.parametrize(
    "text", ["mistral-7b", "mistral", "mistral-7b:q4_k_m", "org/repo", "org/repo:q8_0", "org/repo@x"]
)
def test_what_lies_on_disk_does_not_change_a_meaning(here, text) -> None:
    before = parse_reference(text)
    (here / text).mkdir(parents=True)
    assert parse_reference(text) == before
    assert not isinstance(before, Local)
    assert parse_reference(f"./{text}") == Local(Path(text))


def test_a_repository_that_looks_like_a_file_takes_a_prefix() -> None:
    assert parse_reference("org/model.gguf") == Local(Path("org/model.gguf"))
    assert parse_reference("hf:org/model.gguf") == Repo("org/model.gguf")


# ---- what is refused


@pytest.mark.parametrize(
    ("text", "hint"),
    [("mistrl-7b", "mistral-7b"), ("mixtrl", "mixtral"), ("NEMMO", "nemo"), ("mathstrall", "mathstral")],
)
def test_near_misses(text, hint) -> None:
    assert refusal(text).endswith(f"did you mean {hint}?")


def test_what_is_near_nothing() -> None:
    assert "llmq list --available" in refusal("gpt-4")


@pytest.mark.parametrize(
    "text",
    [
        "", " mistral-7b", "mistral-7b ", "mistral-7b:", "mistral-7b:q4-k", "mistral-7b:q4:k", "mistral-7b:../x",
        "org/repo:", "org/repo@", "org/repo@:q4_0", "org/repo:q4_0@main", "org/repo:" + "q" * 33, "hf:",
        "hf:mistral-7b", "hf:org/", "hf:/org/repo", "hf:./x", HUB, f"{HUB}/", f"{HUB}/org", f"{HUB}/datasets/a/b",
        f"{HUB}/api/models", "datasets/wikitext",
        f"{HUB}/org/repo:q4_0/tree/main", f"{HUB}/org/repo/tree/..", f"{HUB}/org//tree/main",
    ],
)  # fmt: skip
def test_what_means_nothing(text) -> None:
    refusal(text)


HOSTILE = [
    # traversal, hidden folders, absolute paths
    "org/..", "hf:../x", "hf:../../etc/passwd", "hf:org/../../x", "org/.ssh", ".git/../x\x00", "hf:/etc/passwd",
    f"{HUB}/../../etc/passwd", f"{HUB}/org/repo/resolve/main/../../../x.gguf", f"{HUB}/org/repo/blob/../x.gguf",
    "org/repo@../main", "org/repo@a/../b", "org/repo@a..b", "org/repo@/etc", "org/repo@.git", "org/repo@a//b",
    "https://example.org/../x.gguf", "https://example.org/a/./x.gguf", "https://example.org//x.gguf",
    # the same, quoted
    "https://example.org/%2e%2e/x.gguf", "https://example.org/a%2Fb.gguf", "https://example.org/a%5cb.gguf",
    "https://example.org/a%00.gguf", "https://example.org/a%0d%0aHost:x.gguf", "https://example.org/a%252fb.gguf",
    f"{HUB}/org/repo/resolve/main/a%2f..%2fb.gguf", f"{HUB}/org%2frepo", "hf:org%2frepo", "org%2frepo/x",
    # what acts on a terminal, or lies about what is written
    "mistral\x00-7b", "org/re\x1b[2Jpo", "org/repo\n", "org/\u202eoper", "mistral\u200b-7b", "a\x7f", "org/\ud800",
    "https://example.org/\x1b]0;x\x07.gguf", "./a\nb.gguf", "a\tb",
    # look-alikes
    "mistr\u0430l-7b", "\u043erg/repo", "org\u2215repo", "org\uff0frepo", "\uff4distral", "https://ex\u0430mple.org/a.gguf",
    "https://\u212a.org/a.gguf",
    # names that Windows keeps for devices
    "hf:con/x", "hf:org/NUL", "hf:org/aux.gguf", "org/com1", "lpt9/x", "org/repo@prn", "con/a",
    # backslashes
    "org\\repo", "..\\x", "hf:org\\..\\x", "https://example.org\\@evil.org/x.gguf", "C:\\x.gguf",
    # sizes
    "a" * 256, "a" * 65, "o" * 97 + "/r", "o/" + "r" * 97, "a/" * 3000, "https://example.org/" + "a" * 256 + ".gguf",
    "x" * 100_000, "org/repo@" + "r" * 129,
    # other places
    "file:///etc/passwd", "ftp://example.org/a.gguf", "data:/,x", "javascript:/x", "https://", "https:///a.gguf",
    "https://example.org", "https://example.org/", "https://example.org/a.bin", "https://example.org/a.gguf/",
    "https://example.org:99999/a.gguf", "https://example.org:x/a.gguf", "https://[::1/a.gguf", "https://a b.org/x.gguf",
    "https://.org/a.gguf", "https://-a/a.gguf", "https://exa_mple/a.gguf", "s3://bucket/a.gguf",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text)[:50])
def test_hostile_names_get_one_sentence_and_nothing_happens(here, text) -> None:
    if os.name == "nt" and "\\" in text:
        pytest.skip("a backslash is a separator here")
    before = sorted(here.rglob("*"))
    refusal(text)
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    "text",
    [
        "https://user:hunter2@example.org/a.gguf",
        "https://user:hunter2@example.org/a.bin",
        "https://hunter2@example.org/a.gguf",
        "https://user:hunt/hunter2@example.org/a.gguf",
        "https://user:hunt?hunter2@example.org/a.gguf",
        "https://user:hunt#hunter2@example.org/a.gguf",
        "https://user:hunter2@huggingface.co/org/repo",
        "https://huggingface.co/user:hunter2@x/y",
        "https://user:hunter2@exa mple.org/a.gguf",
        "https://user:hunter2@[::1/a.gguf",
        "https:/user:hunter2@example.org/a.gguf",
        "https:user:hunter2@example.org/a.gguf",
        "ftp://user:hunter2@example.org/a.gguf",
        "1http://user:hunter2@example.org/a.gguf",
        " https://user:hunter2@example.org/a.gguf",
        "user:hunter2@example.org/a.gguf",
        "mistral-7b:hunter2@example.org/a.gguf",
        "hf:user:hunter2@example.org/a",
        "org/repo@user:hunter2@x",
        "org/repo:hunter2@x",
        "https://example.org/a.bin?token=hunter2",
        "https://example.org/../a.gguf?token=hunter2",
        "https://user:hunter2@example.org/" + "a" * 5000,
        "https://user:hunter2@example.org/\x1b",
    ],
)
def test_passwords_are_refused_and_not_repeated(text) -> None:
    assert "hunter2" not in refusal(text)


# ---- anything


PIECES = st.sampled_from(
    ["mistral-7b", "org", "repo", "/", "//", ":", "@", ".", "..", "~", "hf:", "hf.co/", "https://", "huggingface.co",
     "%2f", "main", "q4_k_m", ".gguf", "?", "#", "-", "--", "[", "]", "\\", "con", " ", "\x1b",
     "\u0430", "resolve", "blob"]
)  # fmt: skip


@given(text=st.lists(PIECES, max_size=9).map("".join) | st.text(max_size=40))
@settings(max_examples=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_anything_is_understood_or_refused(text) -> None:
    try:
        found = parse_reference(text)
    except UsageError as error:
        assert str(error).isprintable()  # noqa: PT017
        return
    match found:
        case Repo(repo, revision, kind):
            assert REPOSITORY.fullmatch(repo)
            assert ".." not in revision
            assert kind == kind.lower()
        case Url(url):
            assert url.isascii()
            assert url.startswith(("https://", "http://"))
            path = url.partition("?")[0]
            assert path.endswith(".gguf")
            assert not {"..", ".", ""} & set(path.split("/")[2:])
            assert "@" not in path.split("/")[2]
        case Local(path):
            assert "\x00" not in str(path)
        case Published(entry, _):
            assert text.lower().startswith((entry.name, *(alias.lower() for alias in entry.aliases)))


@given(
    repo=st.from_regex(REPOSITORY, fullmatch=True),
    revision=st.sampled_from(["", "@main", "@refs/pr/12", "@v0.1"]),
    kind=st.sampled_from(["", ":Q4_K_M", ":f16"]),
    prefix=st.sampled_from(["hf:", "hf.co/", "https://huggingface.co/"]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_repository_can_be_named(repo, revision, kind, prefix) -> None:
    assume(is_repository(repo) and repo.partition("/")[0].lower() not in reference._NO_MODELS)
    assert parse_reference(prefix + repo + revision + kind) == Repo(repo, revision[1:], kind[1:].lower())
