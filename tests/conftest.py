"""Tiny models, each written once per run, and a hub on the loopback."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub import Hub, serving
from tiny import tiny_gguf

import quant.sensitivity

# A shell starts jobs in the background with Ctrl-C ignored, and programs that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

Tiny = Callable[..., tuple[Path, dict[str, np.ndarray]]]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """tiny_model(**arguments of tiny_gguf): the file, and its weights as float32 by tensor name."""
    folder = tmp_path_factory.mktemp("tiny")
    made: dict[str, tuple[Path, dict[str, np.ndarray]]] = {}

    def make(**arguments: Any) -> tuple[Path, dict[str, np.ndarray]]:
        key = repr(sorted(arguments.items()))
        if key not in made:
            path = folder / f"{len(made)}.gguf"
            made[key] = path, tiny_gguf(path, **arguments)
        return made[key]

    return make


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as hub:
        yield hub
        assert not hub.told()


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring sensitivity is a failure."""
    monkeypatch.setattr(quant.sensitivity, "sensitivities", lambda *_, **__: pytest.fail("it was measured"))
