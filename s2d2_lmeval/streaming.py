"""Answers while they are decoded: decided tokens block by block, and their text, of which nothing is taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

from s2d2_lmeval.decoding.generation import Generation
from s2d2_lmeval.decoding.options.config import DecodingConfig


class Stream:
    """Passes on the new tokens of one request as its blocks are finished.

    :attr:`stop` is the request's stop rule, around another one; :meth:`finish` passes on the rest. Tokens after a stop
    or past the budget are never passed on, so that those together are the answer.
    """

    def __init__(
        self,
        put: Callable[[list[int]], Any],
        config: DecodingConfig,
        budget: int,
        stop: Callable[[int, list[int]], int | None] | None = None,
    ) -> None:
        self._put, self._config, self._budget, self._rule = put, config, budget, stop
        self._passed = 0

    def stop(self, index: int, new: list[int]) -> int | None:
        """The rule's answer; passes on what is certain."""
        kept = None if self._rule is None else self._rule(index, new)
        certain = new[: min(self._budget, len(new) if kept is None else kept)]
        ends = next((place for place, token in enumerate(certain) if token in self._config.stop_token_ids), None)
        if ends is not None:
            certain = certain[: ends + (not self._config.trim_stop_tokens)]
        self.finish(certain)
        return kept

    def finish(self, token_ids: list[int]) -> None:
        """Pass on what is left of the answer."""
        if len(token_ids) > self._passed:
            self._put(token_ids[self._passed :])
            self._passed = len(token_ids)


def decoded(tokenizer: Any, token_ids: list[int]) -> str:
    """The text of an answer, without special tokens."""
    return str(tokenizer.decode(token_ids, skip_special_tokens=True))


def pieces(
    tokenizer: Any,
    config: DecodingConfig,
    budget: int,
    run: Callable[[Callable[[int, list[int]], int | None]], Generation],
) -> Iterator[str]:
    """The text of one answer in pieces, one for each finished block that completes a character.

    Args:
        run: decodes the answer under the stop rule that it is given, in a thread of its own. Closing the iterator stops
            it after the current block.
    """
    passed: SimpleQueue[list[int] | BaseException | None] = SimpleQueue()
    closed = Event()
    stream = Stream(passed.put, config, budget, lambda _, new: len(new) if closed.is_set() else None)

    def work() -> None:
        try:
            stream.finish(run(stream.stop).token_ids)
            passed.put(None)
        except BaseException as error:
            passed.put(error)

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from _text(tokenizer, iter(passed.get, None))
    finally:
        closed.set()
        thread.join()


def _text(tokenizer: Any, passed: Iterator[Any]) -> Iterator[str]:
    text = Text(tokenizer)
    for tokens in passed:
        if isinstance(tokens, BaseException):
            raise tokens
        if piece := text.more(tokens):
            yield piece
    if rest := text.rest():
        yield rest


class Text:
    """The text of an answer, as pieces that are certain: nothing is taken back, ``until`` strings end it unseen."""

    def __init__(self, tokenizer: Any, until: Sequence[str] = ()) -> None:
        self._tokenizer, self._until = tokenizer, [string for string in until if string]
        self._token_ids: list[int] = []
        self._shown = ""

    @property
    def whole(self) -> str:
        """All of it, up to the first of the ``until`` strings."""
        text = decoded(self._tokenizer, self._token_ids)
        return text[: min((place for string in self._until if (place := text.find(string)) >= 0), default=len(text))]

    def take(self, token_ids: list[int]) -> None:
        """These tokens come next."""
        self._token_ids += token_ids

    def more(self, token_ids: list[int]) -> str:
        """What can be said after these tokens too."""
        self.take(token_ids)
        certain = self.whole.rstrip("\ufffd")  # the last character may still lack bytes
        ends = [size for string in self._until for size in range(1, len(string)) if certain.endswith(string[:size])]
        return self._said(certain[: len(certain) - max(ends, default=0)])

    def rest(self) -> str:
        """What is left, once there are no more tokens."""
        return self._said(self.whole)

    def _said(self, text: str) -> str:
        if len(text) <= len(self._shown) or not text.startswith(self._shown):
            return ""
        piece, self._shown = text[len(self._shown) :], text
        return piece
