"""Which files a process may reach: Landlock, which the kernel offers to everyone and which no process can take off."""

from __future__ import annotations

import ctypes
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # on every architecture
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_TRUNCATE, _DEVICE_CONTROL = 1 << 14, 1 << 15
_ALL_BY_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
_ALL = (1 << 16) - 1
_TCP, _SIGNALS_AND_ABSTRACT_SOCKETS = 3, 3


def restrict(libc: ctypes.CDLL, readable: Sequence[str], writable: Sequence[str]) -> int:
    """Leave this process only the folders and files in ``readable`` and ``writable``, no TCP, and (from version 6) no
    signals or abstract sockets to processes outside.

    :returns: the kernel's version of Landlock; 0 where there is none.
    """
    version = _call(libc, _CREATE, None, 0, 1)
    if version < 1:
        return 0
    everything = _ALL_BY_VERSION.get(version, _ALL)
    parts = [everything, _TCP, _SIGNALS_AND_ABSTRACT_SOCKETS][: 1 if version < 4 else 2 if version < 6 else 3]
    attributes = struct.pack(f"<{len(parts)}Q", *parts)
    ruleset = _call(libc, _CREATE, attributes, len(attributes), 0)
    if ruleset < 0:
        return 0
    try:
        for paths, rights in (
            (readable, _READ_FILE | _READ_DIR),
            (writable, everything & ~_EXECUTE & ~_DEVICE_CONTROL),
        ):
            for path in paths:
                _allow(libc, ruleset, path, rights)
        return version if _call(libc, _RESTRICT, ruleset, 0) == 0 else 0
    finally:
        os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # a library folder that this system does not have
        return
    try:
        if not os.path.isdir(path):
            rights &= _READ_FILE | _WRITE_FILE | _TRUNCATE
        _call(libc, _ADD, ruleset, 1, struct.pack("<Qi", rights, descriptor), 0)
    finally:
        os.close(descriptor)


def _call(libc: ctypes.CDLL, number: int, *arguments: int | bytes | None) -> int:
    longs = [argument if isinstance(argument, bytes) else ctypes.c_long(argument or 0) for argument in arguments]
    return libc.syscall(ctypes.c_long(number), *longs)
