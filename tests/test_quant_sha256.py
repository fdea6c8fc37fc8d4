"""SHA-256 against hashlib's, in any pieces and with its state handed on."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant.sha256 import Sha256


@pytest.mark.parametrize("n_bytes", [0, 1, 55, 56, 63, 64, 65, 119, 120, 128, 1000, 100_003])
def test_of_one_piece(n_bytes: int) -> None:
    data = bytes(i * 37 % 251 for i in range(n_bytes))
    ours = Sha256()
    ours.update(data)
    assert ours.hexdigest() == hashlib.sha256(data).hexdigest()


@given(st.lists(st.binary(max_size=300), max_size=8), st.data())
def test_of_many_pieces_and_several_runs(pieces: list[bytes], data: st.DataObject) -> None:
    ours, theirs = Sha256(), hashlib.sha256()
    for piece in pieces:
        if data.draw(st.booleans()):
            ours = Sha256(ours.kept)
        ours.update(piece)
        theirs.update(piece)
        assert ours.hexdigest() == theirs.hexdigest()
