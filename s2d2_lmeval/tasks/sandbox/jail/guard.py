"""Python's own layer, for systems whose kernel offers none: an audit hook that refuses what harms by accident.

It lives beside the program, in the same interpreter, and so stops no attacker.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_REFUSED = frozenset(
    {f"os.{name}" for name in (
        "fork", "forkpty", "posix_spawn", "spawn", "startfile", "system", "exec", "kill", "killpg", "chmod", "chown",
        "chflags", "lockf", "utime", "setxattr", "removexattr")}
    | {f"gc.get_{name}" for name in ("objects", "referrers", "referents")}
    | {f"socket.{name}" for name in (
        "connect", "bind", "sendto", "sendmsg", "getaddrinfo", "gethostbyname", "gethostbyaddr", "getnameinfo",
        "getservbyname", "getservbyport", "gethostname", "sethostname")}
    | {"subprocess.Popen", "signal.pthread_kill", "sys.addaudithook", "fcntl.ioctl", "resource.prlimit",
       "cpython.PyInterpreterState_New", "syslog.openlog", "syslog.syslog", "pty.spawn", "ctypes.dlsym"}
)  # fmt: skip
# event -> which of its arguments are paths that change, and which are folders (-1: none) that these are relative to
_CHANGING = {
    "os.remove": ((0,), (1,)), "os.rename": ((0, 1), (2, 3)), "os.rmdir": ((0,), (1,)), "os.mkdir": ((0,), (2,)),
    "os.link": ((0, 1), (2, 3)), "os.symlink": ((1,), (2,)), "os.truncate": ((0,), ()),
}  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def install(folder: str) -> None:
    """Let the program change files below ``folder`` only, and start, signal and reach nothing."""
    import _posixsubprocess
    import shutil
    import subprocess  # noqa: F401 (imports _posixsubprocess, which a program may then not import again)

    _posixsubprocess.fork_exec = None  # type: ignore[assignment]  # the only way to a process that raises no event
    shutil._use_fd_functions = False  # type: ignore[attr-defined]  # paths, not descriptors, reach the hook
    inside, realpath, fspath = os.path.realpath(folder) + os.sep, os.path.realpath, os.fsdecode
    refused, changing, writing, number, kind = _REFUSED, _CHANGING, _WRITING, int, type  # not what builtins become

    def outside(path: Any) -> bool:
        return kind(path) is number or not (realpath(fspath(path)) + os.sep).startswith(inside)

    def changes_outside(event: str, arguments: tuple[Any, ...]) -> bool:
        paths, folders = changing[event]
        for place in folders:
            if arguments[place] != -1:
                return True
        for place in paths:
            if outside(arguments[place]):
                return True
        return False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if (
            event in refused
            or (event == "open" and kind(arguments[2]) is number and arguments[2] & writing and outside(arguments[0]))
            or (event in changing and changes_outside(event, arguments))
            or (event == "socket.__new__" and arguments[1] != 1)  # socket pairs, which asyncio needs, are AF_UNIX
            or (event == "ctypes.dlopen" and arguments[0] is not None)  # None: what importing ctypes itself asks for
            or (event == "import" and arguments[0] == "_posixsubprocess")
        ):
            raise PermissionError("the sandbox refuses " + event)

    sys.addaudithook(hook)
