"""Which system calls a program may make: those of a calculation that reads its libraries and writes temporary files.

Everything else is refused by the kernel, whatever the program does to its interpreter: other processes (fork, exec,
ptrace, signals), sockets, mounts, permissions and times of files, keys, tracing, and calls that are younger than this
list. A number of calls are allowed for some arguments only; see :func:`_partly_allowed`.
"""

from __future__ import annotations

import ctypes
import os
import struct

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


def install(libc: ctypes.CDLL) -> bool:
    """Bind this process and all its threads to the list, for good; False where this kernel or processor cannot."""
    if os.uname().machine not in _ARCHITECTURES:
        return False
    instructions = _program(os.uname().machine, os.getpid())
    code = b"".join(struct.pack("<HBBI", *one) for one in instructions)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HP", len(instructions), ctypes.addressof(buffer))
    return libc.prctl(_PR_SET_SECCOMP, _FILTER, header, 0, 0) == 0


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
