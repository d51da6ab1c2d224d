"""The routes of an endpoint: completions, chat completions, models, health, metrics."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from s2d2_lmeval.decoding.generation import Generation, Law
from s2d2_lmeval.errors import RequestError, S2D2Error
from s2d2_lmeval.serve import metrics
from s2d2_lmeval.serve.protocol import (
    Wanted,
    answer_object,
    error_object,
    piece_object,
    reason,
    usage_object,
    wanted,
)
from s2d2_lmeval.serve.service import Ask, Full, Service
from s2d2_lmeval.streaming import Piece, Text

LARGEST_BODY = 16 << 20
SECONDS_BETWEEN_CHECKS = 0.5
"""How often a client that waits for a whole answer is looked after."""


class Endpoint:
    """Serves one model under ``name``; ``options`` are its decoding options, ``key`` what clients must send."""

    def __init__(self, service: Service, name: str, options: Mapping[str, Any], key: str | None = None) -> None:
        self.service, self.name, self.options, self.key = service, name, dict(options), key
        self.refused, self.begun = 0, int(time.time())

    def app(self) -> Starlette:
        """The application for a server such as uvicorn; its end closes the service."""
        routes = [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]

        @contextlib.asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            yield
            await asyncio.to_thread(self.service.close)

        return Starlette(routes=routes, lifespan=lifespan)

    async def models(self, request: Request) -> Response:
        """The model that is served."""
        if denied := self._denied(request):
            return denied
        entry = {"id": self.name, "object": "model", "created": self.begun, "owned_by": "s2d2-lmeval"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def health(self, request: Request) -> Response:
        """Whether requests are answered."""
        alive = self.service.alive
        return JSONResponse({"status": "ok" if alive else "decoding has ended"}, 200 if alive else 503)

    async def metrics(self, request: Request) -> Response:
        """Counts, for Prometheus."""
        return PlainTextResponse(metrics.in_text(self.service, self.refused))

    async def completions(self, request: Request) -> Response:
        """Continue prompts."""
        return await self._answer(request, chat=False)

    async def chat(self, request: Request) -> Response:
        """Answer messages."""
        return await self._answer(request, chat=True)

    def _denied(self, request: Request) -> Response | None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.key is None or hmac.compare_digest(given.encode(), self.key.encode()):
            return None
        return JSONResponse(error_object("this server wants its key: Authorization: Bearer KEY.", "denied"), 401)

    def _refuse(self, error: S2D2Error, status: int) -> Response:
        self.refused += 1
        kind = "overloaded" if status == 429 else "invalid_request_error"
        headers = {"Retry-After": "1"} if status == 429 else None
        return JSONResponse(error_object(error, kind), status, headers)

    async def _answer(self, request: Request, chat: bool) -> Response:
        if denied := self._denied(request):
            return denied
        try:
            body = await _body(request)
            asked = await asyncio.to_thread(wanted, body, chat, self.name, self.service.model, self.options)
            answers = Answers(asked, self.service.model.tokenizer)
            self.service.submit(*answers.asks)
        except Full as error:
            return self._refuse(error, 429)
        except S2D2Error as error:
            return self._refuse(error, 400)
        if asked.stream:
            return StreamingResponse(self._events(answers), media_type="text/event-stream")
        return await self._whole(request, answers)

    async def _whole(self, request: Request, answers: Answers) -> Response:
        try:
            while not await answers.ended(SECONDS_BETWEEN_CHECKS):
                if await request.is_disconnected():
                    raise ClientDisconnect
        finally:
            answers.cancel()
        if answers.failure is not None:
            return JSONResponse(error_object(answers.failure, "server_error"), 500)
        texts = [text.whole for text in answers.texts]
        tokenizer = self.service.model.tokenizer
        return JSONResponse(answer_object(answers.asked, self.name, texts, answers.complete(), tokenizer))

    async def _events(self, answers: Answers) -> AsyncIterator[str]:
        asked, tokenizer, offsets = answers.asked, self.service.model.tokenizer, Counter[int]()
        try:
            async for index, piece, end in answers.pieces():
                told = piece_object(asked, self.name, index, piece, end, tokenizer, offsets[index])
                offsets[index] += sum(map(len, (told["choices"][0]["logprobs"] or {}).get("tokens", ())))
                yield _event(told)
            if answers.failure is not None:
                yield _event(error_object(answers.failure, "server_error"))
            elif asked.counts_usage:
                yield _event(usage_object(asked, self.name, answers.complete()))
            yield "data: [DONE]\n\n"
        finally:
            answers.cancel()  # nobody listens any more


Told = tuple[list[int], list[Law | None]] | Generation | Exception
"""What the decoding thread says of an answer: tokens with their laws, all of it, or what went wrong."""


class Answers:
    """The answers to one request while they are decoded: what the decoding thread says, on the server's loop."""

    def __init__(self, asked: Wanted, tokenizer: Any) -> None:
        self.asked = asked
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[tuple[int, Told]] = asyncio.Queue()
        self.asks = [self._ask(prompt, seed) for prompt in asked.prompts for seed in asked.seeds]
        for index, ask in enumerate(self.asks):
            ask.on_end = partial(self._tell, index)
            if asked.stream:  # otherwise nobody reads a part of it
                ask.on_tokens = lambda *new, index=index: self._tell(index, new)
        self.texts = [Text(tokenizer, asked.until) for _ in self.asks]
        self._generations: dict[int, Generation] = {}
        self.failure: str | None = None

    def _ask(self, prompt: list[int], seed: int) -> Ask:
        asked = self.asked
        return Ask(prompt, asked.max_tokens, asked.config, seed=seed, until=asked.until)

    def _tell(self, index: int, told: Told) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._told.put_nowait, (index, told))

    def complete(self) -> Sequence[Generation]:
        """All answers, in order."""
        return [self._generations[index] for index in range(len(self.asks))]

    def cancel(self) -> None:
        """Let go of what is not answered yet."""
        for index, ask in enumerate(self.asks):
            if index not in self._generations:
                ask.cancelled.set()

    async def ended(self, seconds: float) -> bool:
        """Take in what comes within ``seconds``; whether everything is answered, or something failed."""
        until = self._loop.time() + seconds
        while len(self._generations) < len(self.asks) and self.failure is None:
            try:
                index, told = await asyncio.wait_for(self._told.get(), until - self._loop.time())
            except (TimeoutError, asyncio.TimeoutError):
                return False
            self._take(index, told)
        return True

    async def pieces(self) -> AsyncIterator[tuple[int, Piece | None, str | None]]:
        """(choice, text, None) for every piece, and (choice, None, reason) for every end."""
        while len(self._generations) < len(self.asks) and self.failure is None:
            index, told = await self._told.get()
            piece = self._take(index, told)
            if piece or piece.laws:
                yield index, piece, None
            if index in self._generations:
                yield index, None, reason(self._generations[index])

    def _take(self, index: int, told: Told) -> Piece:
        if isinstance(told, Exception):
            self.failure = str(told)
            return Piece()
        if isinstance(told, Generation):
            self._generations[index] = told
            if not self.asked.stream:
                self.texts[index].take(told.token_ids)
            return self.texts[index].rest()
        return self.texts[index].more(*told)


async def _body(request: Request) -> Any:
    read = bytearray()
    async for part in request.stream():
        read += part
        if len(read) > LARGEST_BODY:
            raise RequestError(f"the body is larger than {LARGEST_BODY >> 20} MB.")
    try:
        return json.loads(read)
    except (ValueError, RecursionError):
        raise RequestError("the body is not JSON.") from None


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
