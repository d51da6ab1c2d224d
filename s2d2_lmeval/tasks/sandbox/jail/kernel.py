"""What the kernel can do for us: each function returns the names of the layers that it put in place.

A process is locked in two steps, both before it has seen anything of a program: its supervisor leaves for namespaces of
its own where it may (:func:`leave_for_namespaces`), each process under it then gives up what it does not need
(:func:`lock`), which needs no permission at all. Outside Linux only the resource limits remain.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys

from . import landlock, seccomp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from typing import Any

LINUX = sys.platform == "linux"
_NEW_USER, _NEW_REST = 0x10000000, 0x20000000 | 0x00020000 | 0x40000000 | 0x08000000
_NAMESPACES = ["pid namespace", "network namespace", "ipc namespace"]
_SET_DEATH_SIGNAL, _GET_DUMPABLE, _SET_DUMPABLE, _SET_SUBREAPER, _NO_NEW_PRIVILEGES = 1, 3, 4, 36, 38
_READ_ONLY, _NO_SUID_DEVICES_OR_PROGRAMS = 1, 2 | 4 | 8
_MOUNT_SETATTR, _HERE, _RECURSIVE, _PRIVATE = 442, -100, 0x8000, 1 << 18
_OPEN_FILES = 64
_LIBC = ctypes.CDLL(None)


def _prctl(option: int, value: int = 0) -> int:
    return _LIBC.prctl(option, *(ctypes.c_ulong(one) for one in (value, 0, 0, 0))) if LINUX else -1


def dumpable(wanted: int | None = None) -> int:
    """Whether other processes of this user may read this one's memory and environment; set it where asked to."""
    before = _prctl(_GET_DUMPABLE)
    if wanted is not None and before >= 0:
        _prctl(_SET_DUMPABLE, wanted)
    return before


def silence() -> None:
    """Connect the standard streams to nothing."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)


def die_with_parent() -> None:
    """End when the parent does."""
    _prctl(_SET_DEATH_SIGNAL, 9)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own has ended."""
    _prctl(_SET_SUBREAPER, 1)


def leave_for_namespaces(folder: str, size: int) -> list[str]:
    """Give the children of this process a world without other processes and network, in which ``folder`` (of at most
    ``size`` bytes, and gone afterwards) is the only place that can be written to.
    """
    user, group = os.getuid(), os.getgid()
    if _LIBC.unshare(_NEW_USER | _NEW_REST) == 0:
        layers = ["user namespace", *_NAMESPACES]
        for file, text in (("setgroups", "deny"), ("gid_map", f"{group} {group} 1"), ("uid_map", f"{user} {user} 1")):
            _write(f"/proc/self/{file}", text)
    elif _LIBC.unshare(_NEW_REST) == 0:  # the super-user, where user namespaces are switched off
        layers = list(_NAMESPACES)
    else:
        return []
    return [*layers, "mount namespace"] if _make_read_only(folder, size) else layers


def _write(path: str, text: str) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY)
        os.write(descriptor, text.encode())
        os.close(descriptor)
    except OSError:
        pass  # without a map nothing can be written at all, which is safe


def _make_read_only(folder: str, size: int) -> bool:
    attributes = struct.pack("<4Q", _READ_ONLY, 0, _PRIVATE, 0)
    arguments = (_HERE, b"/", _RECURSIVE, attributes, len(attributes))
    longs = [one if isinstance(one, bytes) else ctypes.c_long(one) for one in arguments]
    if _LIBC.syscall(ctypes.c_long(_MOUNT_SETATTR), *longs):
        return False
    options = f"size={size},nr_inodes=4096,mode=700"
    return _mount_memory(folder, 0, options) and _mount_memory("/proc", _READ_ONLY, "size=4k,mode=555")


def _mount_memory(path: str, flags: int, options: str) -> bool:
    flags |= _NO_SUID_DEVICES_OR_PROGRAMS
    return _LIBC.mount(b"tmpfs", path.encode(), b"tmpfs", ctypes.c_ulong(flags), options.encode()) == 0


def lock(
    limits: Mapping[str, Any], readable: Sequence[str], writable: Sequence[str], without: Collection[str]
) -> list[str]:
    """Give up for good what a program does not need.

    :param limits: fields of ``Limits``.
    :param without: layers to leave out, for tests.
    """
    layers = []
    if LINUX:
        if _LIBC.capset(struct.pack("<Ii", 0x20080522, 0), bytes(24)) == 0:
            layers.append("no capabilities")
        if _prctl(_NO_NEW_PRIVILEGES, 1) == 0:
            layers.append("no new privileges")
        version = 0 if "landlock" in without else landlock.restrict(_LIBC, readable, writable)
        layers += [f"landlock {version}"] if version else []
    filtered = LINUX and "seccomp" not in without
    _limit(limits, processes=not filtered)
    if filtered and seccomp.install(_LIBC):
        layers.append("seccomp")
    return [*layers, "resource limits"]


def _limit(limits: Mapping[str, Any], processes: bool) -> None:
    """Without the filter of system calls a limit keeps processes away; it would keep threads away, too."""
    wanted = {
        "CPU": limits["cpu_seconds"],
        "AS": limits["memory_bytes"],
        "FSIZE": limits["file_bytes"],
        "NOFILE": _OPEN_FILES,
        "CORE": 0,
        **({"NPROC": 0} if processes else {}),
    }
    for name, value in wanted.items():
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
        except (ValueError, OSError):
            if LINUX:  # macOS does not know every limit
                raise
