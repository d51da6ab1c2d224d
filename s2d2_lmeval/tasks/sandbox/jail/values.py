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
    from collections.abc import Callable, Iterator
    from typing import Any

DEEPEST = 200
_SEQUENCES: dict[bytes, Callable[[list[Any]], Any]] = {b"l": list, b"u": tuple, b"e": set, b"z": frozenset}


class Malformed(Exception):
    """Bytes that are no value, or a value that is too large or too deep."""


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


def unframed(data: bytes) -> Any:
    """The one value in ``data``."""
    return decode(data[8:])


def receive(descriptor: int, limit: int) -> Any:
    """Read one value; :class:`EOFError` where the other side has left."""
    (size,) = struct.unpack("<Q", _read(descriptor, 8))
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
    """The bytes of ``value``."""
    out = bytearray()
    _encode(value, out, limit, DEEPEST)
    if len(out) > limit:
        raise Malformed(f"a value of more than {limit} bytes")
    return bytes(out)


def _encode(value: Any, out: bytearray, limit: int, depth: int) -> None:
    if len(out) > limit or depth < 0:
        raise Malformed(f"a value of more than {limit} bytes or {DEEPEST} levels")
    if value is None or value is True or value is False:
        out += b"n" if value is None else b"t" if value else b"f"
    elif isinstance(value, int):
        out += b"i%x;" % value if value >= 0 else b"i-%x;" % -value
    elif isinstance(value, float):
        out += b"d" + struct.pack("<d", value)
    elif isinstance(value, complex):
        out += b"c" + struct.pack("<dd", value.real, value.imag)
    elif isinstance(value, str):
        data = str.encode(value, "utf-8", "surrogatepass")
        out += b"s%x;" % len(data) + data
    elif isinstance(value, (bytes, bytearray)):
        out += b"b%x;" % len(value) + value
    elif isinstance(value, (list, tuple, set, frozenset, dict)):
        _encode_items(value, out, limit, depth)
    elif isinstance(value, range):
        out += b"r"
        _encode((value.start, value.stop, value.step), out, limit, depth)
    else:
        _encode_other(value, out, limit, depth)


def _encode_items(value: Any, out: bytearray, limit: int, depth: int) -> None:
    tags = ((list, b"l"), (tuple, b"u"), (set, b"e"), (frozenset, b"z"), (dict, b"m"))
    out += next(tag for kind, tag in tags if isinstance(value, kind)) + b"%x;" % len(value)
    for item in value:
        _encode(item, out, limit, depth - 1)
        if isinstance(value, dict):
            _encode(value[item], out, limit, depth - 1)


def _encode_other(value: Any, out: bytearray, limit: int, depth: int) -> None:
    """Numbers of other types by value (``numpy.int64``, ``sympy.Rational``, …); else what can be listed."""
    import decimal
    import numbers

    kind = type(value)
    if isinstance(value, decimal.Decimal):
        out += b"D"
        _encode(str(value), out, limit, depth)
    elif isinstance(value, numbers.Integral):
        _encode(int(value), out, limit, depth)
    elif isinstance(value, numbers.Rational):
        out += b"q"
        _encode((int(value.numerator), int(value.denominator)), out, limit, depth)
    elif isinstance(value, numbers.Real):
        _encode(float(value), out, limit, depth)
    elif isinstance(value, numbers.Complex):
        _encode(complex(value), out, limit, depth)
    elif kind.__module__ == "numpy" and kind.__name__ in ("bool_", "bool"):
        _encode(bool(value), out, limit, depth)
    else:
        out += b"o"
        _encode(kind.__name__, out, limit, depth)
        _encode(_items(value, limit), out, limit, depth)


def _items(value: Any, limit: int) -> list[Any] | None:
    if isinstance(value, Foreign):
        return value.items
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


def decode(data: bytes) -> Any:
    """The value of ``data``.

    :raises Malformed: for bytes that :func:`encode` does not write.
    """
    try:
        value, end = _decode(data, 0, DEEPEST)
    except Malformed:
        raise
    except Exception as error:
        raise Malformed(f"no value: {type(error).__name__}") from None
    if end != len(data):
        raise Malformed("bytes after a value")
    return value


def _decode(data: bytes, at: int, depth: int) -> tuple[Any, int]:
    tag, at = data[at : at + 1], at + 1
    if depth < 0:
        raise Malformed(f"more than {DEEPEST} levels")
    if tag in (b"n", b"t", b"f"):
        return {b"n": None, b"t": True, b"f": False}[tag], at
    if tag in (b"d", b"c"):
        parts = struct.unpack_from("<d" if tag == b"d" else "<dd", data, at)
        return (parts[0] if tag == b"d" else complex(*parts)), at + 8 * len(parts)
    if tag in (b"r", b"q", b"D"):
        return _decode_made_of(tag, data, at, depth)
    if tag == b"o":
        name, at = _decode(data, at, depth)
        items, at = _decode(data, at, depth - 1)
        return Foreign(str(name), items if items is None else list(items)), at
    end = data.index(b";", at)
    number, at = int(data[at:end], 16), end + 1
    if tag == b"i":
        return number, at
    if not 0 <= number <= len(data):  # every byte and every item takes a byte
        raise Malformed("a value that ends early")
    if tag in (b"s", b"b"):
        part = data[at : at + number]
        if len(part) != number:
            raise Malformed("a text that ends early")
        return (part.decode("utf-8", "surrogatepass") if tag == b"s" else part), at + number
    return _decode_items(tag, number, data, at, depth - 1)


def _decode_made_of(tag: bytes, data: bytes, at: int, depth: int) -> tuple[Any, int]:
    parts, at = _decode(data, at, depth)
    if tag == b"r":
        return range(*parts), at
    if tag == b"q":
        from fractions import Fraction

        return Fraction(*parts), at
    from decimal import Decimal

    return Decimal(parts), at


def _decode_items(tag: bytes, number: int, data: bytes, at: int, depth: int) -> tuple[Any, int]:
    items = []
    for _ in range(2 * number if tag == b"m" else number):
        item, at = _decode(data, at, depth)
        items.append(item)
    if tag == b"m":
        return dict(zip(items[::2], items[1::2], strict=True)), at
    return _SEQUENCES[tag](items), at
