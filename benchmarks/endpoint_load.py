"""Many clients at an endpoint for a while: lost answers, answers that differ, requests per second, the server's memory.

python -m benchmarks.endpoint_load --clients 64 --minutes 10
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

PROMPTS = [
    f"Question: {name} has {have} pens. {name} buys {more} more. How many pens?\nAnswer:"
    for name in ("Ann", "Bob", "Eve", "Jon")
    for have in range(2, 30, 3)
    for more in (4, 9, 16)
]
ASKED = {"max_tokens": 40, "temperature": 0, "stop": ["\nQuestion:"]}
REPORTS = 10
"""Times that the memory is read."""


class Load:
    """Clients that ask again and again; ``first`` is the first answer to each prompt."""

    def __init__(self, port: int) -> None:
        self.port, self.lock = port, threading.Lock()
        self.first: dict[str, str] = {}
        self.answered = self.lost = self.different = self.left = 0
        self.over = threading.Event()

    def client(self, number: int) -> None:
        """Ask until it is over; one in twenty leaves before its answer."""
        chance = random.Random(number)
        while not self.over.is_set():
            prompt, leaves = chance.choice(PROMPTS), chance.random() < 0.05
            try:
                text = self.ask(prompt, leaves)
            except (OSError, ValueError, KeyError, http.client.HTTPException):
                with self.lock:
                    self.lost += 1
                continue
            with self.lock:
                self.left += text is None
                self.answered += text is not None
                self.different += text is not None and self.first.setdefault(prompt, text) != text

    def ask(self, prompt: str, leaves: bool) -> str | None:
        """The answer; None after leaving."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            connection.request("POST", "/v1/completions", json.dumps({**ASKED, "prompt": prompt, "stream": leaves}))
            if leaves:
                connection.getresponse().read(10)
                return None
            return str(json.loads(connection.getresponse().read())["choices"][0]["text"])
        finally:
            connection.close()


def memory(process: int) -> float:
    """Resident memory, in MB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10.0)
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "s2d2_lmeval", "serve", "--model", "toy", "--port", str(port), "--threads", "1"]
    server = subprocess.Popen([*command, "--option", "decoder=sliding"], stdout=subprocess.DEVNULL)
    load = Load(port)
    try:
        while True:
            try:
                load.ask(PROMPTS[0], leaves=False)
                break
            except OSError:
                time.sleep(0.5)
        clients = [threading.Thread(target=load.client, args=(number,)) for number in range(args.clients)]
        for client in clients:
            client.start()
        for part in range(REPORTS):
            time.sleep(60 * args.minutes / REPORTS)
            print(f"{part + 1}/{REPORTS}: {load.answered} answered, {memory(server.pid):.0f} MB", flush=True)
        load.over.set()
        for client in clients:
            client.join()
    finally:
        server.terminate()
        server.wait()
    rate = load.answered / 60 / args.minutes
    print(
        f"{load.answered} answered ({rate:.1f}/s), {load.left} left early, {load.lost} lost, {load.different} different"
    )
    sys.exit(load.lost + load.different > 0)


if __name__ == "__main__":
    main()
