"""The first process of a run, and the parent of the other two: starts them, waits, and ends every descendant.

Its standard input holds two values: the job (the program and its limits), which it reads, and the tests, which only the
judge reads: the program's process is started by one that has never seen them. Supervisors are forked from a warm
interpreter (:func:`serve`), which spares each program the start of one: it holds nothing of what is judged, which goes
through descriptors that it is sent.
"""

from __future__ import annotations

import _socket
import itertools
import os
import select
import struct
import sys
import time

from . import judge, kernel, program, values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

_FROM_THE_EVALUATOR = 2**30
_SIGKILL = 9
_HIGHEST_DESCRIPTOR = 1 << 16  # of a starter, which opens a dozen
_READABLE = (
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/localtime",
    "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom", "/sys/devices/system/cpu",
    "/nix/store", "/gnu/store",
)  # fmt: skip


def serve(channel: int) -> None:
    """Fork a supervisor for every pair of descriptors that comes through the socket ``channel``, one at a time, until
    the evaluator closes its end.
    """
    kernel.die_with_parent()
    socket = _socket.socket(fileno=channel)
    while True:
        message, ancillary, _, _ = socket.recvmsg(1, _socket.CMSG_SPACE(8))
        if not message:
            return
        source, sink = struct.unpack("2i", ancillary[0][2])
        try:
            child = os.fork()
            if child == 0:
                _begin(channel, source, sink)
        except OSError as error:
            complaint = str(error)
        else:
            os.waitpid(child, 0)
            complaint = "no answer"
        os.close(source)
        os.close(sink)
        socket.send(complaint.encode())


def _begin(channel: int, source: int, sink: int) -> None:
    try:
        os.setsid()
        os.dup2(source, 0)
        os.dup2(sink, 1)
        for descriptor in (channel, source, sink):
            os.close(descriptor)
        main()
    finally:
        os._exit(0)


def main() -> None:
    """Run one job."""
    kernel.die_with_parent()
    try:
        verdict = _supervise(_completed(values.receive(0, _FROM_THE_EVALUATOR)))
    except BaseException as error:
        verdict = {"sandbox": f"{type(error).__name__}: {error}"}
    values.send(1, verdict, _FROM_THE_EVALUATOR)


def _completed(job: dict[str, Any]) -> dict[str, Any]:
    """A job with the paths of the Python that runs here."""
    packages = job["packages"]
    if packages is None:  # a container has packages of its own
        import site

        packages = site.getsitepackages()
    sys.path += packages
    libraries = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    own = [os.path.dirname(os.__file__), os.path.join(sys.base_prefix, "lib"), *packages, *filter(None, libraries)]
    folder = job["folder"]
    os.environ.update(HOME=folder, TMPDIR=folder, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    return {**job, "readable": [*_READABLE, *own]}


def _supervise(job: Mapping[str, Any]) -> dict[str, Any]:
    """The judge's verdict, or why there is none."""
    kernel.adopt_orphans()
    layers = []
    if kernel.LINUX and "namespaces" not in job["without"]:
        layers = kernel.leave_for_namespaces(job["folder"], job["limits"]["folder_bytes"])
    kernel.dumpable(0)  # inherited, so the judge's memory is closed as well
    for_program, questions = os.pipe()
    answers, for_judge = os.pipe()
    verdicts, for_verdict = os.pipe()
    children: list[int] = []
    try:
        # The judge first: in a PID namespace the first process is the one that no other can end, and that ends all.
        judging = (questions, answers, for_verdict)
        children.append(_fork(lambda: judge.judge(job, *judging), (0, 1, 2, *judging)))
        serving = (for_program, for_judge)
        children.append(_fork(lambda: program.serve(job, *serving, layers), serving))
        for descriptor in (*judging, *serving):
            os.close(descriptor)
        stopped = _wait(verdicts, job, watch="mount namespace" not in layers)
        if stopped:
            return {"error": stopped}
        try:
            return values.receive(verdicts, _FROM_THE_EVALUATOR)
        except EOFError:
            status = _reap(children)
        if os.WIFSIGNALED(status):
            return {"error": f"the tests were ended by signal {os.WTERMSIG(status)}"}
        return {"sandbox": "the judge failed"}
    finally:
        _end_descendants(children)


def _reap(children: list[int]) -> int:
    """The judge's exit status. In a PID namespace the program has ended, too, and must be waited for before."""
    judging, ended, status = children[0], 0, 0
    while ended != judging:
        ended, status = os.waitpid(-1, 0)
        if ended in children:
            children.remove(ended)
    return status


def _fork(run: Callable[[], None], keep: tuple[int, ...]) -> int:
    """A child that does ``run`` and nothing after it."""
    child = os.fork()
    if child:
        return child
    try:
        kernel.die_with_parent()
        edges = [-1, *sorted(keep), _HIGHEST_DESCRIPTOR]
        for before, after in itertools.pairwise(edges):
            if before + 1 < after:  # closerange(0, 0) closes everything
                os.closerange(before + 1, after)
        run()
        os._exit(0)
    finally:
        os._exit(1)


def _wait(verdicts: int, job: Mapping[str, Any], watch: bool) -> str:
    """Until there is a verdict, or can be none; why it is not waited for any longer, or ""."""
    limits = job["limits"]
    deadline = time.monotonic() + limits["wall_seconds"]
    while (left := deadline - time.monotonic()) > 0:
        if select.select([verdicts], [], [], min(left, 0.1) if watch else left)[0]:
            return ""
        if watch and not _is_small(job["folder"], limits["folder_bytes"]):
            return f"wrote more than {limits['folder_bytes']} bytes or very many files"
    return f"ran longer than {limits['wall_seconds']:g} s"


def _is_small(folder: str, size: int) -> bool:
    """Whether a folder holds at most ``size`` bytes and a few thousand files, none of them out of sight."""
    count, total, folders = 0, 0, [folder]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    count, total = count + 1, total + entry.stat(follow_symlinks=False).st_blocks * 512
                    if count > 4096 or total > size:
                        return False
                    folders += [entry.path] if entry.is_dir(follow_symlinks=False) else []
        except FileNotFoundError:
            continue  # the program removed it meanwhile
        except OSError:
            return False
    return True


def _end_descendants(children: list[int]) -> None:
    """Also those that left the session: orphans become children of this process, and end in turn."""
    while True:
        for child in {*children, *_children()}:
            try:
                os.kill(child, _SIGKILL)
            except ProcessLookupError:
                pass
        try:
            ended, _ = os.waitpid(-1, 0)
        except ChildProcessError:
            return
        if ended in children:
            children.remove(ended)


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(child) for child in file.read().split()]
    except OSError:  # hidden together with everyone in the PID namespace, which ends with its first process; or macOS
        return []
