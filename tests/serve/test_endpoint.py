"""The endpoint over HTTP: answers are the model's own, whoever else is served, and what cannot be served is said."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import uvicorn

import s2d2_lmeval
from s2d2_lmeval.decoding.engine import Engine
from s2d2_lmeval.errors import NumericalError
from s2d2_lmeval.prompts import encode
from s2d2_lmeval.serve.app import Endpoint
from s2d2_lmeval.serve.service import Service

QUESTION = "Question: {} has {} pens. {} buys {} more. How many pens?\nAnswer:"
PROMPTS = [QUESTION.format(name, one, name, one + 3) for name in ("Ann", "Bob", "Eve", "Jon") for one in range(2, 18)]
OPTIONS = {"decoder": "sliding"}
STOP = "\nQuestion:"


class Client:
    """Talks to a served endpoint."""

    def __init__(self, port: int, service: Service) -> None:
        self.port, self.service = port, service

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        given = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("GET" if body is None else "POST", path, given, headers or {})
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, json.loads(text) if answer.headers["content-type"] == "application/json" else text

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        status, text = self.ask(path, {**body, "stream": True})
        assert status == 200
        events = [line.removeprefix("data: ") for line in text.splitlines() if line]
        assert events[-1] == "[DONE]"
        return [json.loads(event) for event in events[:-1]]


def serve(service: Service, **more: Any) -> Iterator[Client]:
    config = uvicorn.Config(Endpoint(service, "toy", OPTIONS, **more).app(), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Client(server.servers[0].sockets[0].getsockname()[1], service)
    server.should_exit = True
    thread.join()
    assert not service.alive


@pytest.fixture(scope="module")
def model() -> s2d2_lmeval.BlockDiffusionModel:
    return s2d2_lmeval.load("toy", device="cpu", max_batch=8)


@pytest.fixture(scope="module")
def alone(model: s2d2_lmeval.BlockDiffusionModel) -> list[str]:
    """What the model answers to each prompt."""
    return [str(answer.text).split(STOP)[0] for answer in model.generate(PROMPTS, OPTIONS, max_new_tokens=40)]


@pytest.fixture(scope="module")
def client(model: s2d2_lmeval.BlockDiffusionModel, alone: list[str]) -> Iterator[Client]:
    yield from serve(Service(model))


def completion(prompt: Any, **more: Any) -> dict[str, Any]:
    return {"model": "toy", "prompt": prompt, "max_tokens": 40, "temperature": 0, "stop": [STOP], **more}


def test_many_clients_at_once_get_the_answers_of_one(client: Client, alone: list[str]) -> None:
    before = client.service.outcomes["answered"]
    with ThreadPoolExecutor(64) as clients:
        answers = list(clients.map(lambda prompt: client.ask("/v1/completions", completion(prompt)), PROMPTS))
    assert {status for status, _ in answers} == {200}
    assert [answer["choices"][0]["text"] for _, answer in answers] == alone
    assert len(set(alone)) > 10
    assert client.service.outcomes["answered"] == before + len(PROMPTS)
    assert (client.service.waiting, client.service.in_flight) == (0, 0)


def test_several_prompts_and_answers(client: Client, alone: list[str]) -> None:
    status, answer = client.ask("/v1/completions", completion(PROMPTS[:3], n=2))
    assert status == 200
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert [choice["text"] for choice in answer["choices"]] == [text for text in alone[:3] for _ in range(2)]
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert len(usage["s2d2"]) == 6
    assert usage["s2d2"][0]["tokens_per_forward"] > 1


def test_samples_repeat_by_their_seed(client: Client) -> None:
    asked = {**completion("total"), "temperature": 2.0, "max_tokens": 16}
    texts = [
        client.ask("/v1/completions", {**asked, "seed": seed})[1]["choices"][0]["text"] for seed in (1, 2, 1, 3, 4)
    ]
    assert texts[0] == texts[2]
    assert len(set(texts)) > 1


def test_a_stream_is_the_answer_in_pieces(client: Client, alone: list[str]) -> None:
    events = client.events("/v1/completions", completion(PROMPTS[0], stream_options={"include_usage": True}))
    pieces = [event["choices"][0]["text"] for event in events[:-1]]
    assert "".join(pieces) == alone[0]
    assert len([piece for piece in pieces if piece]) > 1
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 2) + ["stop"]
    assert events[-1]["usage"]["completion_tokens"] > 1


def test_chat_goes_through_the_template(client: Client, model: s2d2_lmeval.BlockDiffusionModel) -> None:
    messages = [{"role": "user", "content": PROMPTS[0]}]
    ids = encode(model.tokenizer, messages)
    parts = [{"role": "user", "content": [{"type": "text", "text": PROMPTS[0]}]}]
    of_chat = {"messages": parts, "max_completion_tokens": 24, "temperature": 0}
    status, answer = client.ask("/v1/chat/completions", of_chat)
    _, plain = client.ask("/v1/completions", {"prompt": ids, "max_tokens": 24, "temperature": 0})
    assert status == 200
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": plain["choices"][0]["text"]}
    events = client.events("/v1/chat/completions", of_chat)
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == plain["choices"][0]["text"]


def test_log_probabilities_are_those_of_the_model(client: Client, model: s2d2_lmeval.BlockDiffusionModel) -> None:
    (expected,) = model.generate([PROMPTS[0]], {**OPTIONS, "max_new_tokens": 12}, seeds=[0], logprobs="decided")
    body = {"prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0, "logprobs": 0}
    status, answer = client.ask("/v1/completions", body)
    assert status == 200
    told = answer["choices"][0]["logprobs"]
    assert told["token_logprobs"] == pytest.approx(expected.logprobs, abs=1e-4)
    assert "".join(told["tokens"]) == expected.text
    assert told["text_offset"] == [len("".join(told["tokens"][:place])) for place in range(len(told["tokens"]))]

    message = {"role": "user", "content": PROMPTS[0]}
    status, answer = client.ask("/v1/chat/completions", {"messages": [message], "max_tokens": 12, "logprobs": True})
    assert status == 200
    choice = answer["choices"][0]
    content = choice["logprobs"]["content"]
    assert b"".join(bytes(one["bytes"]) for one in content).decode().startswith(choice["message"]["content"])
    assert all(one["logprob"] <= 0 and one["top_logprobs"] == [] for one in content)


def test_the_likeliest_tokens_whole_and_streamed(client: Client, model: s2d2_lmeval.BlockDiffusionModel) -> None:
    options = {**OPTIONS, "max_new_tokens": 12, "logprobs": True, "top_logprobs": 3}
    (expected,) = model.generate([PROMPTS[0]], options, seeds=[0])
    assert expected.top_logprobs is not None
    body = {"prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0, "logprobs": 3}
    told = client.ask("/v1/completions", body)[1]["choices"][0]["logprobs"]
    for token, logprob, found, best in zip(
        told["tokens"], told["token_logprobs"], told["top_logprobs"], expected.top_logprobs, strict=True
    ):
        assert {*found} == {token, *(model.tokenizer.decode([one]) for one, _ in best)}
        assert found[token] == logprob
        assert max(found.values()) == pytest.approx(best[0][1], abs=1e-4)
    choices = [event["choices"][0] for event in client.events("/v1/completions", {**body, "stream": True})]
    pieces = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    assert len(pieces) > 1
    for name in ("tokens", "text_offset"):
        assert [value for piece in pieces for value in piece[name]] == told[name]
    streamed = [value for piece in pieces for value in piece["top_logprobs"]]
    assert [pytest.approx(values, abs=1e-4) for values in told["top_logprobs"]] == streamed
    assert choices[0]["text"] == "".join(pieces[0]["tokens"])

    chat = {"messages": [{"role": "user", "content": PROMPTS[0]}], "max_tokens": 12, "temperature": 0}
    chat |= {"logprobs": True, "top_logprobs": 2}
    content = client.ask("/v1/chat/completions", chat)[1]["choices"][0]["logprobs"]["content"]
    assert all(len(one["top_logprobs"]) == 2 and one["top_logprobs"][0]["token"] == one["token"] for one in content)
    events = client.events("/v1/chat/completions", {**chat, "stream": True})
    kept = [event["choices"][0]["logprobs"] for event in events]
    again = [one for piece in kept if piece for one in piece["content"]]
    assert [one["bytes"] for one in again] == [one["bytes"] for one in content]
    assert [one["logprob"] for one in again] == pytest.approx([one["logprob"] for one in content], abs=1e-4)


def test_other_options_are_served_in_turn(client: Client, alone: list[str]) -> None:
    bodies = [
        completion(prompt, s2d2={"decoder": ("ar", "sliding")[place % 2]}) for place, prompt in enumerate(PROMPTS)
    ]
    with ThreadPoolExecutor(12) as clients:
        answers = list(clients.map(lambda body: client.ask("/v1/completions", body)[1], bodies[:12]))
    assert [answer["choices"][0]["text"] for answer in answers] == alone[:12]
    assert answers[0]["usage"]["s2d2"]["tokens_per_forward"] <= 1 < answers[1]["usage"]["s2d2"]["tokens_per_forward"]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("completions", b"{", "the body is not JSON"),
        ("completions", [1], "not a JSON object"),
        ("completions", b" " * (17 << 20), "the body is larger than 16 MB"),
        ("completions", {"prompt": "a", "model": "gpt"}, "'gpt' is not served here: this is toy"),
        ("completions", {"prompt": "a", "logprobs": 6}, "logprobs=6 is not a whole number from 0 to 5"),
        ("completions", {"prompt": "a", "logprobs": True}, "logprobs=True is not a whole number from 0 to 5"),
        ("completions", {"prompt": "a", "top_logprobs": 2}, "'top_logprobs' is not a field"),
        ("chat/completions", {"messages": [], "logprobs": 2}, "logprobs=2 is neither true nor false"),
        ("chat/completions", {"messages": [], "top_logprobs": 2}, "top_logprobs=2 needs logprobs=true"),
        ("chat/completions", {"messages": [], "logprobs": True, "top_logprobs": 21}, "number from 0 to 20"),
        ("completions", {"prompt": "a", "tempratur": 1}, "'tempratur' is not a field"),
        ("completions", {"prompt": "a", "temperature": "hot"}, "temperature"),
        ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens=0 is not a whole number from 1"),
        ("completions", {"prompt": "a", "max_tokens": 100_000}, "the context holds"),
        ("completions", {"prompt": ""}, "is empty"),
        ("completions", {"prompt": {}}, "prompt: give a text"),
        ("completions", {"prompt": "a", "n": 500}, "n=500 is not"),
        ("completions", {"prompt": "a", "s2d2": {"decoder": "none"}}, "decoder"),
        ("completions", {"prompt": "a", "stream": "yes"}, "stream='yes'"),
        ("chat/completions", {"messages": "hello"}, "messages: give a list"),
        ("chat/completions", {"messages": [{"role": "user", "content": 3}]}, "content 3 is not text"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "tools="),
    ],
)
def test_what_cannot_be_served_is_said(client: Client, path: str, body: Any, said: str) -> None:
    status, answer = client.ask(f"/v1/{path}", body)
    assert status == 400
    assert said in answer["error"]["message"]


def test_models_health_metrics(client: Client) -> None:
    assert client.ask("/v1/models")[1]["data"][0]["id"] == "toy"
    assert client.ask("/health") == (200, {"status": "ok"})
    assert client.ask("/v1/completions", completion(PROMPTS[0]))[0] == 200
    status, page = client.ask("/metrics")
    assert status == 200
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert float(values["s2d2_new_tokens_total"]) == client.service.sums["new_tokens"] > 0
    assert float(values['s2d2_requests_total{outcome="answered"}']) == client.service.outcomes["answered"]


def test_a_client_that_leaves_frees_its_row(client: Client) -> None:
    before = client.service.outcomes["cancelled"]
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
    body = {**completion(PROMPTS[0]), "max_tokens": 400, "stop": None, "stream": True, "s2d2": {"stop_token_ids": []}}
    connection.request("POST", "/v1/completions", json.dumps(body))
    connection.getresponse().read(10)
    connection.close()
    ends = time.monotonic() + 60
    while client.service.outcomes["cancelled"] == before and time.monotonic() < ends:
        time.sleep(0.05)
    assert client.service.outcomes["cancelled"] == before + 1
    assert client.service.in_flight == 0


def test_a_full_queue_a_key_and_a_failure(
    model: s2d2_lmeval.BlockDiffusionModel, alone: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = serve(Service(model, most_waiting=4), key="secret")
    client = next(serving)
    known = {"Authorization": "Bearer secret"}
    assert client.ask("/v1/completions", completion(PROMPTS[0]))[0] == 401
    assert client.ask("/v1/models", headers={"Authorization": "Bearer no"})[0] == 401
    assert client.ask("/health")[0] == 200
    status, answer = client.ask("/v1/completions", completion(PROMPTS[:5]), known)
    assert (status, answer["error"]["type"]) == (429, "overloaded")

    def broken(self: Engine) -> None:
        monkeypatch.undo()
        raise NumericalError

    monkeypatch.setattr(Engine, "_step", broken)
    status, answer = client.ask("/v1/completions", completion(PROMPTS[0]), known)
    assert (status, "decoding failed" in answer["error"]["message"]) == (500, True)
    status, answer = client.ask("/v1/completions", completion(PROMPTS[0]), known)
    assert (status, answer["choices"][0]["text"]) == (200, alone[0])
    assert list(serving) == []
