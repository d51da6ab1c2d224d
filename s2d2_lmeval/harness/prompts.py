"""Requests of the harness as prompts: token ids, room in the context, the key of each request's randomness, and where
its stop strings are complete.
"""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from s2d2_lmeval.errors import RequestError
from s2d2_lmeval.harness.identity import of_plain, with_files
from s2d2_lmeval.prompts import undecodable

logger = logging.getLogger("lm_eval.s2d2")


@dataclass(frozen=True)
class Prompt:
    """One request, ready to be decoded.

    ``place`` is its index in the harness's list, ``text`` and ``gen_kwargs`` its arguments there, ``ids`` its tokens,
    ``key`` the name of its randomness (int64), ``task`` the task it comes from (empty if unknown), ``document`` which
    document of it, ``occurrence`` its repeat index within the document, and ``left_out`` how many tokens were cut
    off its beginning.
    """

    place: int
    text: str
    gen_kwargs: dict[str, Any]
    ids: list[int]
    key: int
    task: str
    document: int | None = None
    occurrence: int = 0
    left_out: int = 0

    @property
    def name(self) -> str:
        """The same in every run of the same request: task, document, repetition, tokens and generation arguments."""
        asked = of_plain(with_files(self.gen_kwargs))
        return f"{self.task}/{self.document}/{self.occurrence}/{self.key % (1 << 64):016x}-{asked}"


def request_key(ids: Sequence[int], occurrence: int) -> int:
    """A stable int64 for a prompt and its repeat index within the document.

    It does not depend on other documents, ``--limit``, the order of requests, or the process.
    """
    words = np.asarray([*ids, occurrence], dtype="<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little", signed=True)


class Occurrences:
    """Counts how often each document asked each prompt, so that repeats (self-consistency) get different randomness.

    Where several processes share a task, the harness repeats a whole request (all its ``repeats``) until every process
    has the same number. Such padding is answered by copies: the sample i of it is sample ``i mod repeats``.
    """

    def __init__(self, world_size: int) -> None:
        self._padded = world_size > 1
        self._seen: dict[Any, list[int]] = {}

    def next(self, request: Any, text: str, place: int) -> tuple[int, int | None]:
        """How many requests like ``request`` (an Instance of the harness) came before it, and if it is padding, the
        place of the request that it is a copy of.
        """
        places = self._seen.setdefault((request.task_name, request.doc_id, request.idx, text), [])
        places.append(place)
        occurrence = len(places) - 1
        if self._padded and request.repeats and occurrence >= request.repeats:
            return occurrence, places[occurrence % request.repeats]
        return occurrence, None


def encode(tokenizer: Any, texts: Sequence[str], add_bos_token: bool | None) -> list[list[int]]:
    """Token ids of every text, as the harness's ``hf`` models encode contexts: no second BOS in front of a BOS."""
    bos: str | None = getattr(tokenizer, "bos_token", None)
    ids: list[list[int]] = [[] for _ in texts]
    for has_bos in (True, False):
        places = [place for place, text in enumerate(texts) if (bool(bos) and text.startswith(str(bos))) is has_bos]
        special = False if has_bos else add_bos_token
        options = {} if special is None else {"add_special_tokens": special}
        encoded = tokenizer([texts[place] for place in places], **options)["input_ids"] if places else []
        for place, row in zip(places, encoded, strict=True):
            ids[place] = list(row)
    return ids


def spelled_out(tokenizer: Any, token: int) -> list[int]:
    """The string of a special token as ordinary text; the token itself if there is no other way to write it."""
    string = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(string, str):
        return [token]
    ids = list(tokenizer(string, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    return [token] if token in ids else ids


def fitting(
    ids: list[int], budget: int, where: str, *, context: int, mask_token_id: int | None, truncate: bool
) -> list[int]:
    """``ids`` if they can be decoded with ``budget`` new tokens in a ``context`` of that many positions; where they are
    too long the oldest are left out, if ``truncate``. ``where`` names the request in messages.

    Raises:
        RequestError: they cannot.
    """
    room, masked = context - budget, mask_token_id in ids
    if truncate and 0 < room < len(ids) and not masked:
        return ids[-room:]
    reason = undecodable(ids, budget, context, mask_token_id)
    if not reason:
        return ids
    if masked:
        reason += " special_tokens=parse reads its string as text."
    elif ids and room > 0:
        reason += " Without truncation=False its oldest tokens are left out."
    raise RequestError(f"{where}: the prompt {reason}")


def name_of(request: Any) -> str:
    """A request in a message."""
    if request.task_name is None:
        return "a request"
    return f"task {request.task_name}, document {request.doc_id}"


_MARGIN = 8
"""Tokens re-read beyond what a stop string can span: tokens without text of their own, and a leading space that a
decoder drops.
"""


class StopStrings:
    """Finds stop strings as blocks arrive; the ``stop`` of :meth:`s2d2_lmeval.model.BlockDiffusionModel.generate`.

    ``stopper(request, tokens)`` is given every new token of a request so far and answers how many of them to keep (up
    to and including the one that completes the earliest stop string), or None. Text is decoded only from where a stop
    string could begin that the last call did not see whole, so a request costs time linear in its length. A string
    that a multi-byte character or a token boundary cuts in two is found when its second half arrives.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], strings: Sequence[str]) -> None:
        """
        Args:
            decode: token ids to text, special tokens included.
            strings: the stop strings; empty ones are ignored.
        """
        self._decode = decode
        self._strings = tuple(dict.fromkeys(string for string in strings if string))
        # Every token but those the margin is for carries at least a byte.
        self._overlap = max((len(string.encode()) for string in self._strings), default=0) + _MARGIN
        self._seen: dict[int, int] = {}

    def __call__(self, request: int, tokens: list[int]) -> int | None:
        if not self._strings:
            return None
        seen = self._seen.get(request, 0)
        if len(tokens) <= seen:
            return None
        first = max(0, seen - self._overlap)
        if not self._stopped(tokens[first:]):
            self._seen[request] = len(tokens)
            return None
        # The text of a prefix of tokens is a prefix of the text, so "holds a stop string" is monotone in the number of
        # tokens.
        counts = range(seen + 1, len(tokens) + 1)
        return counts[bisect_left(counts, True, key=lambda count: self._stopped(tokens[first:count]))]

    def _stopped(self, tokens: list[int]) -> bool:
        text = self._decode(tokens)
        return any(string in text for string in self._strings)
