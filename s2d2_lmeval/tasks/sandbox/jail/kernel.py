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
    if _call(_MOUNT_SETATTR, _HERE, b"/", _RECURSIVE, attributes, len(attributes)):
        return False
    options = f"size={size},nr_inodes=4096,mode=700"
    return _mount_memory(folder, 0, options) and _mount_memory("/proc", _READ_ONLY, "size=4k,mode=555")


def _mount_memory(path: str, flags: int, options: str) -> bool:
    flags |= _NO_SUID_DEVICES_OR_PROGRAMS
    return _LIBC.mount(b"tmpfs", path.encode(), b"tmpfs", ctypes.c_ulong(flags), options.encode()) == 0


def lock(
    limits: Mapping[str, Any], readable: Sequence[str], writable: Sequence[str], without: Collection[str]
) -> list[str]:
    """Give up for good what a program does not need: ``limits`` are the fields of ``Limits``, and layers ``without``
    which it runs are for tests.
    """
    layers = []
    if LINUX:
        if _LIBC.capset(struct.pack("<Ii", 0x20080522, 0), bytes(24)) == 0:
            layers.append("no capabilities")
        if _prctl(_NO_NEW_PRIVILEGES, 1) == 0:
            layers.append("no new privileges")
        version = 0 if "landlock" in without else _restrict_files(readable, writable)
        layers += [f"landlock {version}"] if version else []
    filtered = LINUX and "seccomp" not in without
    _limit(limits, processes=not filtered)
    if filtered and _filter_calls():
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


# Which files a process may reach. Landlock is offered to everyone, and no process can take it off.
_CREATE, _ADD, _RESTRICT = 444, 445, 446  # on every architecture
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_TRUNCATE, _DEVICE_CONTROL = 1 << 14, 1 << 15
_ALL_BY_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
_ALL = (1 << 16) - 1
_TCP, _SIGNALS_AND_ABSTRACT_SOCKETS = 3, 3


def _restrict_files(readable: Sequence[str], writable: Sequence[str]) -> int:
    """By Landlock, leave this process only the folders and files in ``readable`` and ``writable``, no TCP, and (from
    version 6) no signals or abstract sockets to processes outside; its version, 0 where there is none.
    """
    version = _call(_CREATE, None, 0, 1)
    if version < 1:
        return 0
    everything = _ALL_BY_VERSION.get(version, _ALL)
    parts = [everything, _TCP, _SIGNALS_AND_ABSTRACT_SOCKETS][: 1 if version < 4 else 2 if version < 6 else 3]
    attributes = struct.pack(f"<{len(parts)}Q", *parts)
    ruleset = _call(_CREATE, attributes, len(attributes), 0)
    if ruleset < 0:
        return 0
    try:
        for paths, rights in (
            (readable, _READ_FILE | _READ_DIR),
            (writable, everything & ~_EXECUTE & ~_DEVICE_CONTROL),
        ):
            for path in paths:
                _allow(ruleset, path, rights)
        return version if _call(_RESTRICT, ruleset, 0) == 0 else 0
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # a library folder that this system does not have
        return
    try:
        if not os.path.isdir(path):
            rights &= _READ_FILE | _WRITE_FILE | _TRUNCATE
        _call(_ADD, ruleset, 1, struct.pack("<Qi", rights, descriptor), 0)
    finally:
        os.close(descriptor)


def _call(number: int, *arguments: int | bytes | None) -> int:
    longs = [argument if isinstance(argument, bytes) else ctypes.c_long(argument or 0) for argument in arguments]
    return _LIBC.syscall(ctypes.c_long(number), *longs)


# Which system calls a program may make: those of a calculation that reads its libraries and writes temporary files.
# Everything else is refused by the kernel, whatever the program does to its interpreter: other processes (fork, exec,
# ptrace, signals), sockets, mounts, permissions and times of files, keys, tracing, and calls that are younger than this
# list. A number of calls are allowed for some arguments only: _partly_allowed.
# name: number on x86_64, on aarch64 ("-": there is none)
_ALLOWED = """
read 0 63, write 1 64, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, poll 7 -, lseek 8 62, mmap 9 222, mprotect 10 226,
munmap 11 215, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, pread64 17 67,
pwrite64 18 68, readv 19 65, writev 20 66, access 21 -, pipe 22 -, select 23 -, sched_yield 24 124, mremap 25 216,
msync 26 227, mincore 27 232, madvise 28 233, dup 32 23, dup2 33 -, pause 34 -, nanosleep 35 101, getitimer 36 102,
alarm 37 -, setitimer 38 103, getpid 39 172, sendfile 40 71, recvfrom 45 207, shutdown 48 210, getsockname 51 204,
getsockopt 55 209, exit 60 93, uname 63 160, fsync 74 82, fdatasync 75 83, ftruncate 77 46, getdents 78 -, getcwd 79 17,
chdir 80 49, fchdir 81 50, rename 82 -, mkdir 83 -, rmdir 84 -, creat 85 -, unlink 87 -, symlink 88 -, readlink 89 -,
umask 95 166, gettimeofday 96 169, getrlimit 97 163, getrusage 98 165, sysinfo 99 179, times 100 153, getuid 102 174,
getgid 104 176, geteuid 107 175, getegid 108 177, getppid 110 173, getpgrp 111 -, getgroups 115 158, getresuid 118 148,
getresgid 120 150, getpgid 121 155, getsid 124 156, rt_sigpending 127 136, rt_sigtimedwait 128 137,
rt_sigsuspend 130 133, sigaltstack 131 132, statfs 137 43, fstatfs 138 44, getpriority 140 141, sched_getparam 143 121,
sched_getscheduler 145 120, sched_get_priority_max 146 125, sched_get_priority_min 147 126, arch_prctl 158 -,
setrlimit 160 164, gettid 186 178, time 201 -, futex 202 98, sched_getaffinity 204 123, epoll_create 213 -,
getdents64 217 61, set_tid_address 218 96, restart_syscall 219 128, fadvise64 221 223, clock_gettime 228 113,
clock_getres 229 114, clock_nanosleep 230 115, exit_group 231 94, epoll_wait 232 -, epoll_ctl 233 21, mkdirat 258 34,
newfstatat 262 79, unlinkat 263 35, renameat 264 38, symlinkat 266 36, readlinkat 267 78, faccessat 269 48,
pselect6 270 72, ppoll 271 73, set_robust_list 273 99, splice 275 76, epoll_pwait 281 22, fallocate 285 47,
timerfd_create 283 85, timerfd_settime 286 86, timerfd_gettime 287 87, eventfd2 290 19, epoll_create1 291 20,
dup3 292 24, pipe2 293 59, preadv 295 69, pwritev 296 70, getcpu 309 168, renameat2 316 276, getrandom 318 278,
membarrier 324 283, copy_file_range 326 285, preadv2 327 286, pwritev2 328 287, statx 332 291, rseq 334 293,
close_range 436 436, faccessat2 439 439, epoll_pwait2 441 441
"""
_PARTLY = """
open 2 -, openat 257 56, ioctl 16 29, fcntl 72 25, socketpair 53 199, sendto 44 206, clone 56 220, kill 62 129,
tkill 200 130, tgkill 234 131, prlimit64 302 261
"""
_CLONE3, _YOUNGEST = 435, 450
_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1), "arm64": (0xC00000B7, 1)}
_EPERM, _ENOTTY, _ENOSYS = 1, 25, 38
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_PR_SET_SECCOMP, _FILTER = 22, 2

Instructions = list[tuple[int, int, int, int]]


def _filter_calls() -> bool:
    """By seccomp, bind this process and all its threads to the lists above, for good; False where this kernel or
    processor cannot.
    """
    if os.uname().machine not in _ARCHITECTURES:
        return False
    instructions = _program(os.uname().machine, os.getpid())
    code = b"".join(struct.pack("<HBBI", *one) for one in instructions)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HP", len(instructions), ctypes.addressof(buffer))
    return _LIBC.prctl(_PR_SET_SECCOMP, _FILTER, header, 0, 0) == 0


def _program(machine: str, pid: int) -> Instructions:
    """A filter for the process ``pid``: every block either returns or falls through to the next."""
    architecture, column = _ARCHITECTURES[machine]
    program = [_load(4), _if_equal(architecture, 1, 0), _return(_KILL), _load(0)]
    if machine == "x86_64":  # the numbers of its 32-bit relative x32
        program += [(0x35, 0, 1, 0x40000000), _return(_REFUSE | _EPERM)]
    for number in _numbers(_ALLOWED, column).values():
        program += [_if_equal(number, 0, 1), _return(_ALLOW)]
    numbers = _numbers(_PARTLY, column)
    for name, block in _partly_allowed(pid).items():
        if name in numbers:
            program += [_if_equal(numbers[name], 0, len(block)), *block]
    # The C library takes "no such call" as a request to do without, "not permitted" as a failure.
    program += [_if_equal(_CLONE3, 0, 1), _return(_REFUSE | _ENOSYS)]
    program += [(0x25, 0, 1, _YOUNGEST), _return(_REFUSE | _ENOSYS)]
    return [*program, _return(_REFUSE | _EPERM)]


def _partly_allowed(pid: int) -> dict[str, Instructions]:
    own = _if_argument(0, (pid,))
    return {
        # Reading may not truncate: O_TRUNC only together with an access mode for writing, which Landlock sees.
        "open": _truncating(1),
        "openat": _truncating(2),
        # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
        "ioctl": _if_argument(1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451), _ENOTTY),
        # Duplicates, flags, locks, the size of a pipe; not who gets a signal, no leases
        "fcntl": _if_argument(1, (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)),
        "socketpair": [
            _load(24),
            (0x54, 0, 0, 0xF),
            _if_equal(1, 1, 0),
            _return(_REFUSE | _EPERM),
            *_if_argument(0, (1,)),
        ],
        "sendto": [_load(48), _if_equal(0, 1, 0), _return(_REFUSE | _EPERM), *_if_argument(4, (0,), word=1)],
        # Threads, not processes
        "clone": [_load(16), (0x45, 0, 1, 0x00010000), _return(_ALLOW), _return(_REFUSE | _EPERM)],
        "kill": own,
        "tkill": own,
        "tgkill": own,
        "prlimit64": _if_argument(0, (0,)),
    }


def _truncating(argument: int) -> Instructions:
    flags = (0x54, 0, 0, os.O_TRUNC | os.O_ACCMODE)
    return [_load(16 + 8 * argument), flags, _if_equal(os.O_TRUNC, 0, 1), _return(_REFUSE | _EPERM), _return(_ALLOW)]


def _if_argument(argument: int, values: tuple[int, ...], error: int = _EPERM, word: int = 0) -> Instructions:
    """Allow where a half of an argument is one of ``values``; the kernel itself reads 32 bits of these arguments."""
    checks = [_if_equal(value, len(values) - place, 0) for place, value in enumerate(values)]
    return [_load(16 + 8 * argument + 4 * word), *checks, _return(_REFUSE | error), _return(_ALLOW)]


def _load(offset: int) -> tuple[int, int, int, int]:
    return (0x20, 0, 0, offset)


def _if_equal(value: int, jump: int, otherwise: int) -> tuple[int, int, int, int]:
    return (0x15, jump, otherwise, value)


def _return(action: int) -> tuple[int, int, int, int]:
    return (0x06, 0, 0, action)


def _numbers(table: str, column: int) -> dict[str, int]:
    rows = [entry.split() for entry in table.split(",")]
    return {row[0]: int(row[1 + column]) for row in rows if row[1 + column] != "-"}
