"""SHA-256 whose state can be kept and taken up again, which hashlib's cannot: FIPS 180-4, section 6.2.

A download that is stopped and continued is checked as if it had been read in one go.
"""

import numpy as np
from numba import types

from llmq.simd import load_u32, stack, store_i32
from quant.lanes import strict, strict_kernel

BLOCK = 64


def _primes(count: int) -> list[int]:
    found: list[int] = []
    number = 2
    while len(found) < count:
        if all(number % prime for prime in found):
            found.append(number)
        number += 1
    return found


def _root_bits(number: int, degree: int) -> int:
    """The first 32 bits behind the point of the square (2) or cube (3) root, in whole numbers."""
    scaled, low, high = number << (32 * degree), 0, 1 << 40
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**degree <= scaled else (low, middle)
    return low & 0xFFFFFFFF


# Section 5.3.3 and 4.2.2: of the square roots of 8 primes and the cube roots of 64.
START = tuple(_root_bits(prime, 2) for prime in _primes(8))
ROUNDS = np.array([_root_bits(prime, 3) for prime in _primes(64)], np.uint32)


@strict
def add_word(address, x):  # type: ignore[no-untyped-def]
    store_i32(address, np.int32(np.uint32(load_u32(address) + x)))


@strict
def turned(x, n):  # type: ignore[no-untyped-def]
    """uint32 x, its bits turned right by n."""
    return np.uint32((x >> np.uint32(n)) | (x << np.uint32(32 - n)))


@strict
def big_endian(address):  # type: ignore[no-untyped-def]
    x = load_u32(address)
    even = np.uint32(0x00FF00FF)
    return np.uint32((turned(x, 8) & np.uint32(~even)) | (turned(x, 24) & even))


@strict_kernel(*[types.int64] * 4)
def compress(state, data, n_blocks, rounds):  # type: ignore[no-untyped-def]
    """Takes `n_blocks` of 64 bytes at `data` into the 8 words at `state`; `rounds` is the address of ROUNDS."""
    words = stack(256)
    for block in range(n_blocks):
        for i in range(16):
            store_i32(words + 4 * i, np.int32(big_endian(data + 64 * block + 4 * i)))
        for i in range(16, 64):
            early, late = load_u32(words + 4 * (i - 15)), load_u32(words + 4 * (i - 2))
            low = turned(early, 7) ^ turned(early, 18) ^ (early >> np.uint32(3))
            high = turned(late, 17) ^ turned(late, 19) ^ (late >> np.uint32(10))
            total = load_u32(words + 4 * (i - 16)) + low + load_u32(words + 4 * (i - 7)) + high
            store_i32(words + 4 * i, np.int32(np.uint32(total)))
        a, b, c, d = load_u32(state), load_u32(state + 4), load_u32(state + 8), load_u32(state + 12)
        e, f, g, h = load_u32(state + 16), load_u32(state + 20), load_u32(state + 24), load_u32(state + 28)
        for i in range(64):
            choice = (e & f) ^ (~e & g)
            mixed = turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)
            first = np.uint32(h + mixed + choice + load_u32(rounds + 4 * i) + load_u32(words + 4 * i))
            majority = (a & b) ^ (a & c) ^ (b & c)
            second = np.uint32((turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) + majority)
            h, g, f, e = g, f, e, np.uint32(d + first)
            d, c, b, a = c, b, a, np.uint32(first + second)
        add_word(state, a)
        add_word(state + 4, b)
        add_word(state + 8, c)
        add_word(state + 12, d)
        add_word(state + 16, e)
        add_word(state + 20, f)
        add_word(state + 24, g)
        add_word(state + 28, h)


class Sha256:
    """Of the `n_bytes` that update() was given, as `hashlib.sha256` has it; from `kept` another one can go on."""

    def __init__(self, kept: str = "") -> None:
        if not kept:
            self._state, self._rest, self.n_bytes = np.array(START, np.uint32), b"", 0
            return
        state, rest, n_bytes = kept.split(":")
        self._state, self._rest = np.array([int(word, 16) for word in state.split(",")], np.uint32), bytes.fromhex(rest)
        self.n_bytes = int(n_bytes)

    @property
    def kept(self) -> str:
        words = ",".join(f"{word:x}" for word in self._state)
        return f"{words}:{self._rest.hex()}:{self.n_bytes}"

    def update(self, data: bytes | bytearray | memoryview) -> None:
        self.n_bytes += len(data)
        view = memoryview(data)
        if self._rest:
            missing = BLOCK - len(self._rest)
            self._rest, view = self._rest + bytes(view[:missing]), view[missing:]
            if len(self._rest) < BLOCK:
                return
            self._take(np.frombuffer(self._rest, np.uint8))
        whole = len(view) // BLOCK * BLOCK
        self._take(np.frombuffer(view[:whole], np.uint8))
        self._rest = bytes(view[whole:])

    def hexdigest(self) -> str:
        """The same until more comes."""
        last = Sha256(self.kept)
        n_bits = 8 * self.n_bytes
        last.update(b"\x80" + bytes(-(self.n_bytes + 9) % BLOCK) + n_bits.to_bytes(8, "big"))
        return "".join(f"{word:08x}" for word in last._state)

    def _take(self, blocks: np.ndarray) -> None:
        compress(self._state.ctypes.data, blocks.ctypes.data, len(blocks) // BLOCK, ROUNDS.ctypes.data)
