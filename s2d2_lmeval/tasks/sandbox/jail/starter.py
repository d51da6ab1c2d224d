"""A warm interpreter that forks a supervisor for every pair of descriptors that it is sent.

It spares each program the start of an interpreter. What is judged goes through those descriptors from the evaluator to
the supervisor and the judge, so this process, from whose memory every program's process is copied, never holds any.
"""

from __future__ import annotations

import _socket
import os
import struct

from . import kernel, supervisor


def main(channel: int) -> None:
    """Serve until the evaluator closes its end of the socket ``channel``. One supervisor at a time."""
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
                _supervise(channel, source, sink)
        except OSError as error:
            complaint = str(error)
        else:
            os.waitpid(child, 0)
            complaint = "no answer"
        os.close(source)
        os.close(sink)
        socket.send(complaint.encode())


def _supervise(channel: int, source: int, sink: int) -> None:
    try:
        os.setsid()
        os.dup2(source, 0)
        os.dup2(sink, 1)
        for descriptor in (channel, source, sink):
            os.close(descriptor)
        supervisor.main()
    finally:
        os._exit(0)
