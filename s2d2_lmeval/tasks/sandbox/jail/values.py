"""Plain data between processes that do not trust each other: kept exactly, bounded in size, and nothing but data.

``None``, booleans, numbers (also fractions and decimals), strings, bytes, lists, tuples, sets, dictionaries and ranges
arrive as what they were; of their subclasses, and of numbers of other libraries, the value arrives. Anything else
arrives as a :class:`Foreign`: its type's name, and its items where it has any. Decoding makes no other objects and
calls nothing that a sender could choose. (JSON would lose tuples, sets and bytes, and its import costs half a start.)
"""

from __future__ import annotations

import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

DEEPEST = 200
HEADER = 8
"""Bytes ahead of a value that say its length."""


class Malformed(Exception):
    """Bytes that are not a value, or a value that is too large or too deep."""


class Foreign:
    """What is not plain data: equal to nothing but itself, and iterable where the original was."""

    def __init__(self, name: str, items: list[Any] | None) -> None:
        self.name, self.items = name, items

    def __repr__(self) -> str:
        return f"<{self.name} of the program>"

    def __iter__(self) -> Iterator[Any]:
        if self.items is None:
            raise TypeError(f"{self.name!r} object is not iterable")
        return iter(self.items)


def send(descriptor: int, value: Any, limit: int) -> None:
    """Write ``value``, of at most ``limit`` bytes."""
    write(descriptor, framed(value, limit))


def write(descriptor: int, data: bytes) -> None:
    """Write all of ``data``."""
    while data:
        data = data[os.write(descriptor, data) :]


def framed(value: Any, limit: int) -> bytes:
    """``value`` with its length ahead of it."""
    data = encode(value, limit)
    return struct.pack("<Q", len(data)) + data


def receive(descriptor: int, limit: int) -> Any:
    """Read one value; :class:`EOFError` where the other side has left."""
    (size,) = struct.unpack("<Q", _read(descriptor, HEADER))
    if size > limit:
        raise Malformed(f"a value of more than {limit} bytes")
    return decode(_read(descriptor, size))


def _read(descriptor: int, size: int) -> bytes:
    """Exactly ``size`` bytes: what follows them may be for another reader."""
    data = b""
    while len(data) < size:
        part = os.read(descriptor, size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def encode(value: Any, limit: int) -> bytes:
    """The bytes of ``value``: a tag, how many bytes or values follow (in hexadecimal, then ``;``), and these."""
    out = bytearray()
    _encode(value, out, limit, DEEPEST)
    if len(out) > limit:
        raise Malformed(f"a value of more than {limit} bytes")
    return bytes(out)


def decode(data: bytes) -> Any:
    """The value of ``data``; Malformed for bytes that :func:`encode` does not write."""
    try:
        value, end = _decode(data, 0, DEEPEST)
    except Malformed:
        raise
    except Exception as error:
        raise Malformed(f"no value: {type(error).__name__}") from None
    if end != len(data):
        raise Malformed("bytes after a value")
    return value


# kind: tag, a value's bytes, and back
_OF_BYTES: dict[type, tuple[bytes, Any, Any]] = {
    type(None): (b"n", lambda value: b"", lambda data: None),
    bool: (b"t", lambda value: b"1" if value else b"", bool),
    int: (b"i", lambda value: b"%x" % value, lambda data: int(data, 16)),
    float: (b"d", lambda value: struct.pack("<d", value), lambda data: struct.unpack("<d", data)[0]),
    complex: (b"c", lambda z: struct.pack("<dd", z.real, z.imag), lambda data: complex(*struct.unpack("<dd", data))),
    str: (b"s", lambda text: str.encode(text, "utf-8", "surrogatepass"), lambda b: b.decode("utf-8", "surrogatepass")),
    bytes: (b"b", bytes, bytes),
    bytearray: (b"b", bytes, bytes),
}
# kind: tag, the values that it is made of, and back
_OF_VALUES: dict[type, tuple[bytes, Any, Any]] = {
    list: (b"l", list, list),
    tuple: (b"u", list, tuple),
    set: (b"e", list, set),
    frozenset: (b"z", list, frozenset),
    dict: (b"m", lambda value: [one for pair in value.items() for one in pair], lambda items: dict(_pairs(items))),
    range: (b"r", lambda value: [value.start, value.stop, value.step], lambda v: range(*v)),
    Foreign: (b"o", lambda value: [value.name, value.items], lambda v: Foreign(str(v[0]), v[1])),
}
_KINDS = {**_OF_BYTES, **_OF_VALUES}
_FROM_BYTES = {tag: back for tag, _, back in _OF_BYTES.values()}
_FROM_BYTES[b"D"] = lambda data: __import__("decimal").Decimal(data.decode())
_FROM_VALUES = {tag: back for tag, _, back in _OF_VALUES.values()}
_FROM_VALUES[b"q"] = lambda parts: __import__("fractions").Fraction(parts[0], parts[1])


def _pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(items[::2], items[1::2], strict=True)


def _encode(value: Any, out: bytearray, limit: int, depth: int) -> None:
    if len(out) > limit or depth < 0:
        raise Malformed(f"a value of more than {limit} bytes or {DEEPEST} levels")
    tag, parts = _parts(value, limit)
    out += tag + b"%x;" % len(parts)
    if isinstance(parts, bytes):
        out += parts
        return
    for part in parts:
        _encode(part, out, limit, depth - 1)


def _parts(value: Any, limit: int) -> tuple[bytes, bytes | list[Any]]:
    """The tag of a value, and its bytes or the values that it is made of."""
    kind = type(value)
    known = kind if kind in _KINDS else next((one for one in _KINDS if isinstance(value, one)), None)
    if known is not None:
        tag, parts, _ = _KINDS[known]
        return tag, parts(value)
    import decimal
    import numbers

    if isinstance(value, decimal.Decimal):
        return b"D", str(value).encode()
    if isinstance(value, numbers.Rational) and not isinstance(value, numbers.Integral):
        return b"q", [int(value.numerator), int(value.denominator)]
    # Numbers of other types by value (numpy.int64, …)
    simpler: list[tuple[Any, Any]] = [(numbers.Integral, int), (numbers.Real, float), (numbers.Complex, complex)]
    for number, plain in simpler:
        if isinstance(value, number):
            return _parts(plain(value), limit)
    if kind.__module__ == "numpy" and kind.__name__ in ("bool_", "bool"):
        return _parts(bool(value), limit)
    return b"o", [kind.__name__, _items(value, limit)]


def _items(value: Any, limit: int) -> list[Any] | None:
    """What a foreign object can be listed as."""
    try:
        iterator = iter(value)
    except Exception:
        return None
    items: list[Any] = []
    for item in iterator:
        items.append(item)
        if len(items) > limit:
            raise Malformed(f"more than {limit} items")
    return items


def _decode(data: bytes, at: int, depth: int) -> tuple[Any, int]:
    tag, end = data[at : at + 1], data.index(b";", at)
    size, at = int(data[at + 1 : end], 16), end + 1
    if depth < 0 or not 0 <= size <= len(data):  # every byte and every value takes a byte
        raise Malformed("a value that ends early, or is too deep")
    if tag in _FROM_BYTES:
        part = data[at : at + size]
        if len(part) != size:
            raise Malformed("a value that ends early")
        return _FROM_BYTES[tag](part), at + size
    items = []
    for _ in range(size):
        item, at = _decode(data, at, depth - 1)
        items.append(item)
    return _FROM_VALUES[tag](items), at
