"""The command: killed at any moment it starts again with the same answers; OpenAI's own client; the harness's own."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import s2d2_lmeval
from s2d2_lmeval.harness.upstream import include_path

from .test_endpoint import PROMPTS

pytestmark = pytest.mark.slow

Start = Callable[[], subprocess.Popen[bytes]]


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def start(port: int) -> Iterator[Start]:
    """Starts the command, and waits until it answers."""
    begun: list[subprocess.Popen[bytes]] = []

    def started() -> subprocess.Popen[bytes]:
        options = ["--model", "toy", "--option", "decoder=sliding", "--port", str(port)]
        begun.append(subprocess.Popen([sys.executable, "-m", "s2d2_lmeval", "serve", *options]))
        for _ in range(600):
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return begun[-1]
            assert begun[-1].poll() is None
            time.sleep(0.2)
        raise AssertionError("the server does not come up")

    yield started
    for process in begun:
        process.kill()
        process.wait()


def complete(port: int, prompt: str, **more: Any) -> str:
    body = json.dumps({"prompt": prompt, "max_tokens": 24, "temperature": 0, **more}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def test_killed_and_started_again_it_gives_the_same_answers(start: Start, port: int) -> None:
    first = start()
    before = [complete(port, prompt) for prompt in PROMPTS[:3]]
    body = json.dumps({"prompt": PROMPTS[:64], "max_tokens": 200}).encode()
    with socket.create_connection(("127.0.0.1", port)) as client:  # killed with requests in flight
        head = f"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        time.sleep(0.3)
        first.send_signal(signal.SIGKILL)
        first.wait()
        client.settimeout(60)
        with suppress(ConnectionError):
            assert client.recv(1) == b""  # the client is told at once
    start()
    assert [complete(port, prompt) for prompt in PROMPTS[:3]] == before


def test_openai_s_own_client(start: Start, port: int) -> None:
    openai = pytest.importorskip("openai")
    start()
    model = s2d2_lmeval.load("toy")
    (expected,) = model.generate([PROMPTS[0]], {"decoder": "sliding", "max_new_tokens": 24}, logprobs="decided")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    asked = {"model": "toy", "prompt": PROMPTS[0], "max_tokens": 24, "temperature": 0}
    choice = client.completions.create(**asked, logprobs=0).choices[0]
    assert choice.text == expected.text
    assert choice.logprobs.token_logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert "".join(piece.choices[0].text for piece in client.completions.create(**asked, stream=True)) == expected.text
    messages = [{"role": "user", "content": PROMPTS[0]}]
    chat = client.chat.completions.create(model="toy", messages=messages, max_tokens=24, temperature=0, logprobs=True)
    (same,) = model.generate([messages], {"decoder": "sliding", "max_new_tokens": 24})
    assert chat.choices[0].message.content == same.text
    assert len(chat.choices[0].logprobs.content) == len(same.token_ids)
    pieces = client.chat.completions.create(
        model="toy", messages=messages, max_tokens=24, temperature=0, logprobs=True, top_logprobs=3, stream=True
    )
    told = [one for piece in pieces if piece.choices[0].logprobs for one in piece.choices[0].logprobs.content]
    assert [one.token for one in told] == [one.token for one in chat.choices[0].logprobs.content]
    assert all(one.top_logprobs[0].token == one.token for one in told)
    with pytest.raises(openai.BadRequestError, match="top_logprobs=21 is not a whole number from 0 to 20"):
        client.chat.completions.create(model="toy", messages=messages, logprobs=True, top_logprobs=21)


def test_the_harness_gets_the_answers_of_the_model_class(start: Start, port: int, tmp_path: Path) -> None:
    pytest.importorskip("tenacity")
    start()
    url = f"http://127.0.0.1:{port}/v1/completions"
    served = f"model=toy,base_url={url},num_concurrent=4,tokenized_requests=False,tokenizer_backend=None"
    answers = []
    for kind, arguments in (("local-completions", served), ("s2d2", "pretrained=toy,decoder=sliding")):
        output = tmp_path / kind
        command = [sys.executable, "-m", "lm_eval", "--model", kind, "--model_args", arguments, "--limit", "16"]
        command += ["--tasks", "s2d2_toy_arithmetic", "--include_path", str(include_path())]
        subprocess.run([*command, "--output_path", str(output), "--log_samples"], check=True, capture_output=True)
        (samples,) = output.rglob("samples_*.jsonl")
        lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
        answers.append({line["doc_id"]: line["resps"] for line in lines})
    assert len(answers[0]) == 16
    assert answers[0] == answers[1]
