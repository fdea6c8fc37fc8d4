"""GGUF files in pieces: a table of hostile ones with what the reader must say, a sound one, and mutants of it."""

import random

from llmq.errors import FileFormatError, LlmqError, UnsupportedError


class Number(bytes):
    """A length, count, type, dimension or offset."""


def u32(value: int) -> Number:
    return Number(value.to_bytes(4, "little"))


def u64(value: int) -> Number:
    return Number(value.to_bytes(8, "little"))


Parts = list[bytes]


def head(n_tensors: int, n_pairs: int, version: int = 3) -> Parts:
    return [b"GGUF", u32(version), u64(n_tensors), u64(n_pairs)]


def string(text: bytes) -> Parts:
    return [u64(len(text)), text]


def pair(key: bytes, type_id: int, *value: bytes) -> Parts:
    return [*string(key), u32(type_id), *value]


def entry(name: bytes, dims: list[int], type_id: int = 0, offset: int = 0) -> Parts:
    return [*string(name), u32(len(dims)), *map(u64, dims), u32(type_id), u64(offset)]


def one_pair(type_id: int, *value: bytes) -> Parts:
    return [*head(0, 1), *pair(b"k", type_id, *value)]


def one_tensor(dims: list[int], type_id: int = 0, offset: int = 0, n_data: int = 4096) -> Parts:
    return [*head(1, 0), *entry(b"t", dims, type_id, offset), bytes(n_data)]


def aligned(type_id: int, value: bytes) -> Parts:
    return [*head(1, 1), *pair(b"general.alignment", type_id, value), *entry(b"t", [32]), bytes(512)]


STRING, ARRAY = 8, 9

HOSTILE: dict[str, tuple[Parts, type[LlmqError], str]] = {
    # not a GGUF file
    "empty": ([], FileFormatError, "empty"),
    "zeros": ([bytes(100_000)], FileFormatError, "zeros"),
    "noise": ([bytes(range(1, 200))], FileFormatError, "not a GGUF"),
    "other_magic": ([b"FUGG" + bytes(40)], FileFormatError, "not a GGUF"),
    "lfs": ([b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"], FileFormatError, "git-lfs"),
    "html": ([b"\n<!DOCTYPE html><title>Sign in</title>"], FileFormatError, "web page"),
    "safetensors": ([u64(60), b'{"t":{"dtype":"F32"' + b" " * 60], FileFormatError, "safetensors"),
    "torch_zip": ([b"PK\x03\x04" + bytes(60)], FileFormatError, "PyTorch"),
    "pickle": ([b"\x80\x02}q\x00." + bytes(60)], FileFormatError, "pickle"),
    # counts and versions
    "magic_alone": ([b"GGUF"], FileFormatError, "version"),
    "version_alone": ([b"GGUF", u32(3)], FileFormatError, "number of tensors"),
    "version_0": (head(0, 0, 0), UnsupportedError, "version 0"),
    "version_1": (head(0, 0, 1), UnsupportedError, "version 1"),
    "version_4": (head(0, 0, 4), UnsupportedError, "version 4"),
    "big_endian": (head(0, 0, 3 << 24), UnsupportedError, "big-endian"),
    "tensors_2p64": (head(2**64 - 1, 0), FileFormatError, "18446744073709551615 tensors"),
    "tensors_65537": ([*head(65_537, 0), bytes(65_537 * 33)], FileFormatError, "65537 tensors"),
    "tensors_too_many": ([*head(100, 0), bytes(3_299)], FileFormatError, "100 tensors"),
    "pairs_2p64": (head(0, 2**64 - 1), FileFormatError, "18446744073709551615 metadata"),
    "pairs_1e8": ([*head(0, 10**8), bytes(20)], FileFormatError, "100000000 metadata"),
    "pairs_too_many": ([*head(0, 10), bytes(139)], FileFormatError, "10 metadata"),
    # metadata
    "key_empty": ([*head(0, 1), *pair(b"", 4, u32(1))], FileFormatError, "key is 0 bytes"),
    "key_65536": ([*head(0, 1), *pair(b"k" * 65_536, 4, u32(1))], FileFormatError, "key is 65536 bytes"),
    "key_2p64": ([*head(0, 1), u64(2**64 - 1), bytes(64)], FileFormatError, "key is 18446744073709551615"),
    "key_cut": ([*head(0, 1), u64(100), bytes(64)], FileFormatError, "a metadata key at byte"),
    "key_latin_1": ([*head(0, 1), *pair(b"\xe9t\xe9", 4, u32(1))], FileFormatError, "not UTF-8"),
    "key_twice": ([*head(0, 2), *pair(b"k", 4, u32(1)), *pair(b"k", 4, u32(2))], FileFormatError, "'k' occurs twice"),
    "key_escapes": (
        [*head(0, 2), *pair(b"\x1b]0;x\x07", 4, u32(1)) * 2],
        FileFormatError,
        r"'\x1b]0;x\x07' occurs twice",
    ),
    "value_type_13": (one_pair(13, u64(0)), FileFormatError, "unknown type 13"),
    "value_type_2p32": (one_pair(2**32 - 1, u64(0)), FileFormatError, "unknown type 4294967295"),
    "value_cut": (one_pair(10, b"\0\0\0"), FileFormatError, "value of 'k'"),
    "bool_2": (one_pair(7, b"\2", b"\0" * 4), FileFormatError, "boolean"),
    "text_2p63": (one_pair(STRING, u64(2**63)), FileFormatError, "9223372036854775808 bytes"),
    "text_17_mib": (one_pair(STRING, u64(17 << 20), bytes(17 << 20)), FileFormatError, "17825792 bytes"),
    "text_not_utf8": (one_pair(STRING, *string(b"\xff\xfe")), FileFormatError, "not UTF-8"),
    "array_2p63": (one_pair(ARRAY, u32(0), u64(2**63)), FileFormatError, "value of 'k'"),
    "array_wraps": (one_pair(ARRAY, u32(12), u64(2**61 + 1), bytes(64)), FileFormatError, "value of 'k'"),
    "array_of_type_13": (one_pair(ARRAY, u32(13), u64(1), bytes(64)), FileFormatError, "unknown type 13"),
    "array_of_bools_2": (one_pair(ARRAY, u32(7), u64(3), b"\0\1\2"), FileFormatError, "boolean"),
    "strings_2p40": (one_pair(ARRAY, u32(STRING), u64(2**40)), FileFormatError, "value of 'k'"),
    "strings_last_cut": (
        one_pair(ARRAY, u32(STRING), u64(2), *string(b"abcdefgh"), u64(9), b"abcdefgh"),
        FileFormatError,
        "a string of the value of 'k'",
    ),
    "strings_2p63": (
        one_pair(ARRAY, u32(STRING), u64(2), u64(2**63), bytes(64)),
        FileFormatError,
        "9223372036854775808 bytes",
    ),
    "strings_17_mib": (
        one_pair(ARRAY, u32(STRING), u64(2), u64(17 << 20), bytes(18 << 20)),
        FileFormatError,
        "17825792 bytes",
    ),
    "nested": (one_pair(ARRAY, *[u32(ARRAY), u64(1)] * 2000, u32(4), u64(0)), UnsupportedError, "array of arrays"),
    "split": ([*head(0, 1), *pair(b"split.count", 2, b"\3\0")], UnsupportedError, "split model"),
    "split_text": ([*head(0, 1), *pair(b"split.count", STRING, *string(b"3"))], FileFormatError, "split.count"),
    "align_0": (aligned(4, u32(0)), FileFormatError, "alignment"),
    "align_4": (aligned(4, u32(4)), FileFormatError, "alignment"),
    "align_24": (aligned(4, u32(24)), FileFormatError, "alignment"),
    "align_2p31": (aligned(4, u32(2**31)), FileFormatError, "alignment"),
    "align_i32": (aligned(5, u32(32)), FileFormatError, "alignment"),
    "align_bool": (aligned(7, b"\1"), FileFormatError, "alignment"),
    "align_text": ([*head(0, 1), *pair(b"general.alignment", STRING, *string(b"32"))], FileFormatError, "alignment"),
    # tensor directory
    "name_empty": ([*head(1, 0), *entry(b"", [32]), bytes(512)], FileFormatError, "name is 0 bytes"),
    "name_65": ([*head(1, 0), *entry(b"n" * 65, [32]), bytes(512)], FileFormatError, "name is 65 bytes"),
    "name_twice": ([*head(2, 0), *entry(b"t", [32]), *entry(b"t", [32], 0, 128), bytes(512)], FileFormatError, "twice"),
    "dims_0": (one_tensor([]), FileFormatError, "0 dimensions"),
    "dims_5": (one_tensor([1] * 5), FileFormatError, "5 dimensions"),
    "dims_2p32": ([*head(1, 0), *string(b"t"), u32(2**32 - 1), bytes(64)], FileFormatError, "4294967295 dimensions"),
    "dim_0": (one_tensor([32, 0]), FileFormatError, "a dimension"),
    "dim_2p31": (one_tensor([1, 2**31]), FileFormatError, "a dimension"),
    "dims_wrap_to_0": (one_tensor([2**16, 2**16, 2**16, 2**16]), FileFormatError, "cut short"),
    "dims_wrap_to_128": (one_tensor([2**30, 2**30, 2**4 + 1]), FileFormatError, "cut short"),
    "rows_of_255": (one_tensor([255, 2], 12), FileFormatError, "blocks of 256"),
    "type_iq2_xs": (one_tensor([256], 17), UnsupportedError, "IQ2_XS"),
    "type_removed": (one_tensor([256], 31), UnsupportedError, "Q4_0_4_4"),
    "type_99": (one_tensor([32], 99), UnsupportedError, "99"),
    "type_2p32": (one_tensor([32], 2**32 - 1), UnsupportedError, "4294967295"),
    "offset_1": (one_tensor([32], 0, 1), FileFormatError, "multiple of 32"),
    "offset_far": (one_tensor([32], 0, 2**40), FileFormatError, "cut short"),
    "offset_wraps": (one_tensor([32], 0, 2**64 - 32), FileFormatError, "cut short"),
    "data_cut": (one_tensor([1024], n_data=4000), FileFormatError, "cut short"),
    "overlap": ([*head(2, 0), *entry(b"a", [64]), *entry(b"b", [8], 0, 224), bytes(512)], FileFormatError, "overlap"),
    "same_place": (
        [*head(2, 0), *entry(b"b", [8], 0, 32), *entry(b"a", [8], 0, 32), bytes(512)],
        FileFormatError,
        "over",
    ),
}


def sound() -> Parts:
    """A small file with every kind of value and several types of tensor."""
    pairs = [
        pair(b"general.name", STRING, *string(b"sound")),
        pair(b"general.alignment", 4, u32(32)),
        *[pair(b"n%d" % type_id, type_id, bytes(8)[:width]) for type_id, width in WIDTHS.items()],
        *[pair(b"a%d" % type_id, ARRAY, u32(type_id), u64(5), bytes(5 * width)) for type_id, width in WIDTHS.items()],
        pair(b"tokens", ARRAY, u32(STRING), u64(6), *[piece for i in range(6) for piece in string(b"token" * i)]),
    ]
    tensors = [([64, 3], 0, 768), ([256, 2, 2], 12, 576), ([32], 8, 64), ([2, 2, 2, 2], 1, 32)]
    directory, offset = [], 0
    for i, (dims, type_id, n_bytes) in enumerate(tensors):
        directory += entry(b"blk.%d.weight" % i, dims, type_id, offset)
        offset += n_bytes
    parts = [*head(len(tensors), len(pairs)), *[piece for value in pairs for piece in value], *directory]
    return [*parts, bytes(-sum(map(len, parts)) % 32), bytes(range(1, 97)) * (offset // 96)]


WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
EDGES = [0, 1, 5, 9, 31, 127, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**61, 2**62, 2**63 - 1,
         2**63, 2**64 - 32, 2**64 - 1]  # fmt: skip


def mutant(parts: Parts, rng: random.Random) -> bytes:
    """The file with a few things wrong: numbers replaced or shifted, bits flipped, bytes cut, inserted or repeated."""
    parts = list(parts)
    numbers = [i for i, piece in enumerate(parts) if isinstance(piece, Number)]
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        i = rng.choice(numbers)
        near = int.from_bytes(parts[i], "little") + rng.choice((-32, -8, -1, 1, 2, 8, 32, 256))
        value = rng.choice(EDGES) if rng.random() < 0.6 else near
        parts[i] = (value % 256 ** len(parts[i])).to_bytes(len(parts[i]), "little")
    data = bytearray(b"".join(parts))
    damage = rng.random()
    at = rng.randrange(len(data))
    if damage < 0.2:
        data[at] ^= 1 << rng.randrange(8)
    elif damage < 0.3:
        del data[at:]
    elif damage < 0.4:
        data[at:at] = rng.randbytes(rng.randrange(1, 64))
    elif damage < 0.5:
        data[at:at] = data[at : at + rng.randrange(1, 512)]
    return bytes(data)
