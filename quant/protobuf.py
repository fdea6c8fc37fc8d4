"""Just enough of protobuf's wire format to read a SentencePiece model: tag, then a varint, 4, 8 or counted bytes."""

from collections.abc import Iterator

VARINT, FIXED64, COUNTED, FIXED32 = 0, 1, 2, 5


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) pairs in the order of the message; raises ValueError where it is not one."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == VARINT:
            number, at = _varint(message, at)
            yield key >> 3, number
            continue
        if key & 7 == COUNTED:
            size, at = _varint(message, at)
        elif key & 7 in (FIXED32, FIXED64):
            size = 4 if key & 7 == FIXED32 else 8
        else:
            raise ValueError(f"wire type {key & 7}")
        if size > len(message) - at:
            raise ValueError("a field goes past the end")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    number = 0
    for i in range(10):
        if at + i >= len(message):
            raise ValueError("a number goes past the end")
        byte = message[at + i]
        number |= (byte & 127) << 7 * i
        if byte < 128:
            return number, at + i + 1
    raise ValueError("a number is too long")
