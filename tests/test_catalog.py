import pytest

from llmq.catalog import catalog
from llmq.store import NAME

# Billions of weights and GB as Q4_K_M, from the models' cards and from llama.cpp's files of them.
PUBLISHED = {
    "mistral-7b": (7.248, 4.37),
    "mistral-7b-v0.2": (7.242, 4.37),
    "mistral-7b-v0.1": (7.242, 4.37),
    "mathstral-7b": (7.248, 4.37),
    "mixtral-8x7b": (46.703, 28.45),
    "mixtral-8x22b": (140.630, 85.60),
    "codestral-22b": (22.247, 13.34),
    "mistral-large-2407": (122.610, 73.22),
}


def test_names_are_unique_and_usable_in_the_store() -> None:
    names = [entry.name for entry in catalog()]
    assert sorted(names) == sorted(PUBLISHED)
    assert all(NAME.fullmatch(name) for name in names)


@pytest.mark.parametrize("entry", catalog(), ids=lambda entry: entry.name)
def test_the_shape_gives_the_published_size(entry) -> None:
    weights, file_size = PUBLISHED[entry.name]
    assert entry.n_weights / 1e9 == pytest.approx(weights, abs=0.0006)
    assert entry.q4_k_m_bytes / 1e9 == pytest.approx(file_size, rel=0.02)


def test_windows_and_experts() -> None:
    by_name = {entry.name: entry for entry in catalog()}
    assert [name for name, entry in by_name.items() if entry.window] == ["mistral-7b-v0.1"]
    assert [name for name, entry in by_name.items() if entry.n_experts == 8] == ["mixtral-8x7b", "mixtral-8x22b"]
    assert all(entry.n_experts_used == (2 if entry.n_experts else 0) for entry in by_name.values())
