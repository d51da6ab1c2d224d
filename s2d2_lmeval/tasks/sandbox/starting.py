"""The evaluator's side of a run: starts supervisors, hands over what is to be judged, reads the verdict."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from typing import IO, Any

from s2d2_lmeval.tasks.sandbox.jail import values
from s2d2_lmeval.tasks.sandbox.modes import Mode

GRACE = 60.0
"""Seconds beyond a program's own limit of wall time, for starting on a busy machine and for ending."""
_LARGEST = 2**30
_KEPT = ("PATH", "LD_LIBRARY_PATH", "DOCKER_HOST", "XDG_RUNTIME_DIR")


class Starter:
    """Starts supervisors in one mode, one at a time: through a warm process, or each by a command of its own."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self._owner = os.getpid()
        self._folder = os.path.realpath(tempfile.mkdtemp(prefix="s2d2-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        atexit.register(self.close)

    @property
    def is_mine(self) -> bool:
        """False in a fork of the process that made this."""
        return self._owner == os.getpid()

    def close(self) -> None:
        """End the warm process, remove the folder."""
        if self.is_mine:
            self._kill()
            _remove(self._folder)

    def run(self, job: dict[str, Any], tests: dict[str, Any]) -> dict[str, Any]:
        """The verdict on a job; OSError where the machine has no room for it."""
        limits = job["limits"]
        with self._program_folder() as folder, _closed_to_others():
            messages = ({**job, "folder": folder if self.mode.is_warm else "/tmp"}, tests)
            text = b"".join(values.framed(message, _LARGEST) for message in messages)
            output, complaint = self._exchange(text, limits["wall_seconds"], limits["memory_bytes"])
        return values.decode(output[values.HEADER :]) if output else {"sandbox": complaint}

    def _exchange(self, text: bytes, seconds: float, memory_bytes: int) -> tuple[bytes, str]:
        """Give ``text`` to a new supervisor; what it answers, and what is known where it does not."""
        with contextlib.ExitStack() as ends:
            source, into, out_of, sink = (ends.enter_context(end) for _ in range(2) for end in _pipe())
            # What hangs is killed, and so ends the reading and writing here.
            watch = threading.Timer(seconds + GRACE, self._kill)
            watch.daemon = True
            ends.callback(watch.cancel)
            try:
                with source, sink:
                    self._start(source.fileno(), sink.fileno(), memory_bytes)
                    watch.start()
                with contextlib.suppress(BrokenPipeError):
                    values.write(into.fileno(), text)
                return out_of.read(), self._finish()
            except BaseException:  # also an interrupt: nothing of this run is left for the next
                self._kill()
                raise

    def _start(self, source: int, sink: int, memory_bytes: int) -> None:
        if not self.mode.is_warm:
            self._process = self._popen(self.mode.command(self._folder, 0, memory_bytes), stdin=source, stdout=sink)
            return
        if self._process is None or self._process.poll() is not None:
            self._channel, theirs = socket.socketpair()
            with theirs:
                command = self.mode.command(self._folder, theirs.fileno(), memory_bytes)
                nothing = subprocess.DEVNULL
                self._process = self._popen(command, stdin=nothing, stdout=nothing, pass_fds=(theirs.fileno(),))
        assert self._channel is not None
        socket.send_fds(self._channel, [b"."], [source, sink])

    def _popen(self, command: list[str], **arguments: Any) -> subprocess.Popen[bytes]:
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        return subprocess.Popen(
            command, stderr=subprocess.PIPE, cwd=self._folder, env=kept, start_new_session=True, **arguments
        )

    def _finish(self) -> str:
        """Wait until the supervisor has ended; its last words."""
        assert self._process is not None
        complaint = self._channel.recv(1 << 16) if self._channel is not None else b""
        if complaint:
            return complaint.decode(errors="replace")
        _, complaint = self._process.communicate()
        code = self._process.returncode
        self._process = None
        return complaint.decode(errors="replace") or f"no answer, exit status {code}"

    def _kill(self) -> None:
        """End the process that supervisors come from, and with it (they follow their parents) all others."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    @contextlib.contextmanager
    def _program_folder(self) -> Iterator[str]:
        """An empty folder that is gone afterwards, whatever a program made of it."""
        folder = tempfile.mkdtemp(dir=self._folder)
        try:
            yield folder
        finally:
            _remove(folder)


def _pipe() -> tuple[IO[bytes], IO[bytes]]:
    source, sink = os.pipe()
    return open(source, "rb", buffering=0), open(sink, "wb", buffering=0)


def _remove(folder: str) -> None:
    try:
        os.rmdir(folder)
    except FileNotFoundError:
        return
    except OSError:  # not empty: of any depth, and perhaps without permissions
        for command in (["rm", "-rf", folder], ["chmod", "-R", "u+rwX", folder], ["rm", "-rf", folder]):
            if os.path.exists(folder):
                subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


@contextlib.contextmanager
def _closed_to_others() -> Iterator[None]:
    """While a program runs, other processes of this user can read neither memory nor environment of this one."""
    from s2d2_lmeval.tasks.sandbox.jail import kernel  # which Windows cannot import

    before = kernel.dumpable(0)
    try:
        yield
    finally:
        kernel.dumpable(before)
