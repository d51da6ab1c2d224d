"""Answers while they are decoded: decided tokens block by block, and their text, of which nothing is taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

from tokenizers import pre_tokenizers
from tokenizers.decoders import ByteLevel

from s2d2_lmeval.decoding.generation import Generation, Law, Progress
from s2d2_lmeval.decoding.options.config import DecodingConfig


class Stream:
    """Passes on the new tokens of one request as its blocks are finished, and their laws if they are kept.

    :attr:`stop` is the request's stop rule, around another one; :attr:`begun` gets its progress; :meth:`finish` passes
    on the rest. Tokens after a stop or past the budget are never passed on, so that those together are the answer.
    """

    def __init__(
        self,
        put: Callable[[list[int], list[Law | None]], Any],
        config: DecodingConfig,
        budget: int,
        stop: Callable[[int, list[int]], int | None] | None = None,
    ) -> None:
        self._put, self._config, self._budget, self._rule = put, config, budget, stop
        self._passed = 0
        self._progress = Progress()

    def begun(self, index: int, progress: Progress) -> None:
        """The request has a row."""
        self._progress = progress

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
        left = range(self._passed, len(token_ids))
        if left:
            self._put(token_ids[self._passed :], self._progress.laws(left) if self._config.logprobs else [])
            self._passed = len(token_ids)


class Piece(str):
    """A piece of an answer's text; with ``token_ids``, those since the piece before, and their ``laws`` if kept."""

    token_ids: list[int]
    laws: list[Law | None]

    def __new__(cls, text: str = "", token_ids: Sequence[int] = (), laws: Sequence[Law | None] = ()) -> Piece:
        piece = super().__new__(cls, text)
        piece.token_ids, piece.laws = list(token_ids), list(laws)
        return piece

    @property
    def logprobs(self) -> list[float | None]:
        """As :attr:`~s2d2_lmeval.decoding.generation.Generation.logprobs`."""
        return [law and law.logprob for law in self.laws]

    @property
    def top_logprobs(self) -> list[list[tuple[int, float]]]:
        """As :attr:`~s2d2_lmeval.decoding.generation.Generation.top_logprobs`."""
        return [law.best if law else [] for law in self.laws]


def decoded(tokenizer: Any, token_ids: list[int]) -> str:
    """The text of an answer, without special tokens."""
    return str(tokenizer.decode(token_ids, skip_special_tokens=True))


def pieces(
    tokenizer: Any,
    config: DecodingConfig,
    budget: int,
    run: Callable[[Stream], Generation],
) -> Iterator[Piece]:
    """The text of one answer in pieces, one for each finished block that completes a character.

    Args:
        run: decodes the answer into the stream that it is given, in a thread of its own. Closing the iterator stops it
            after the current block.
    """
    passed: SimpleQueue[tuple[list[int], list[Law | None]] | BaseException | None] = SimpleQueue()
    closed = Event()
    stream = Stream(lambda *new: passed.put(new), config, budget, lambda _, new: len(new) if closed.is_set() else None)

    def work() -> None:
        try:
            stream.finish(run(stream).token_ids)
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


def _text(tokenizer: Any, passed: Iterator[Any]) -> Iterator[Piece]:
    text = Text(tokenizer)
    for new in passed:
        if isinstance(new, BaseException):
            raise new
        if piece := text.more(*new):
            yield piece
    rest = text.rest()
    if rest or rest.laws:
        yield rest


class Text:
    """The text of an answer, as pieces that are certain: nothing is taken back, ``until`` strings end it unseen."""

    def __init__(self, tokenizer: Any, until: Sequence[str] = ()) -> None:
        self._tokenizer, self._until = tokenizer, [string for string in until if string]
        self._separable = by_bytes(tokenizer)
        self._final = ""
        self._open: list[int] = []
        """Tokens after those that ``_final`` is the text of."""
        self._shown = ""
        self._untold: tuple[list[int], list[Law | None]] = [], []

    @property
    def whole(self) -> str:
        """All of it, up to the first of the ``until`` strings."""
        text = self._final + decoded(self._tokenizer, self._open)
        if self._separable:
            begun = self._begun() if text.endswith("\ufffd") else 0
            if begun is not None:
                self._final, self._open = text[: len(text) - bool(begun)], self._open[len(self._open) - begun :]
        return text[: min((place for string in self._until if (place := text.find(string)) >= 0), default=len(text))]

    def _begun(self) -> int | None:
        """How many of the open tokens at the end are a character that lacks bytes; None if they are not that alone."""
        firsts, others = bytes_of_characters()
        for count in range(1, min(4, len(self._open))):
            token = str(self._tokenizer.convert_ids_to_tokens(self._open[-count]))
            if not others.issuperset(token):
                alone = token[0] in firsts and others.issuperset(token[1:])
                return count if alone and decoded(self._tokenizer, self._open[-count:]) == "\ufffd" else None
        return None

    def take(self, token_ids: list[int], laws: Sequence[Law | None] = ()) -> None:
        """These tokens come next."""
        self._open += token_ids
        self._untold[0].extend(token_ids)
        self._untold[1].extend(laws)

    def more(self, token_ids: list[int], laws: Sequence[Law | None] = ()) -> Piece:
        """What can be said after these tokens too."""
        self.take(token_ids, laws)
        certain = self.whole.rstrip("\ufffd")
        ends = [size for string in self._until for size in range(1, len(string)) if certain.endswith(string[:size])]
        return self._said(certain[: len(certain) - max(ends, default=0)])

    def rest(self) -> Piece:
        """What is left, once there are no more tokens."""
        return self._said(self.whole, ends=True)

    def _said(self, text: str, ends: bool = False) -> Piece:
        new = text[len(self._shown) :] if text.startswith(self._shown) else ""
        if not new and not ends:
            return Piece()
        self._shown += new
        told, self._untold = self._untold, ([], [])
        return Piece(new, *told)


@cache
def bytes_of_characters() -> tuple[frozenset[str], frozenset[str]]:
    """What stands in byte-level tokens for the first of several bytes of a character, and for the others."""
    as_token = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    # Of two bytes, of three, of four: one character for every first byte.
    codes = (
        *range(0x80, 0x800, 0x40),
        0x800,
        *range(0x1000, 0x10000, 0x1000),
        0x10000,
        *range(0x40000, 0x110000, 0x40000),
    )
    firsts = frozenset(as_token(chr(code))[0][0][0] for code in codes)
    return firsts, frozenset(as_token(chr(code))[0][0][1] for code in range(0x80, 0xC0))


def by_bytes(tokenizer: Any) -> bool:
    """Whether tokens are bytes, whatever is around them: then text up to the end of a character is that of its tokens,
    and needs no second look.
    """
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    return isinstance(decoder, ByteLevel) and not tokenizer.clean_up_tokenization_spaces
