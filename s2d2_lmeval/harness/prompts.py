"""Requests of the harness as prompts: token ids, room in the context, and the key of each request's randomness."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from s2d2_lmeval.errors import RequestError
from s2d2_lmeval.harness.identity import of_plain, with_files

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

    It depends on nothing else: not on what else is evaluated, ``--limit``, the order of requests, or which process has
    them.
    """
    words = np.asarray([*ids, occurrence], dtype="<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little", signed=True)


class Occurrences:
    """Counts how often each document asked each prompt: the repeats of self-consistency get randomness of their own.

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
    plain = [bos is not None and bool(bos) and text.startswith(bos) for text in texts]
    ids: list[list[int]] = [[] for _ in texts]
    for has_bos in (True, False):
        places = [place for place, value in enumerate(plain) if value is has_bos]
        if not places:
            continue
        special = False if has_bos else add_bos_token
        options = {} if special is None else {"add_special_tokens": special}
        encoded = tokenizer([texts[place] for place in places], **options)["input_ids"]
        for place, row in zip(places, encoded, strict=True):
            ids[place] = list(row)
    return ids


def spelled_out(tokenizer: Any, token: int) -> list[int]:
    """The string of a special token as ordinary text; the token itself where there is no other way to write it."""
    string = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(string, str):
        return [token]
    ids = list(tokenizer(string, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    return [token] if token in ids else ids


@dataclass(frozen=True)
class Room:
    """What a request may hold: ``context`` positions, no ``mask_token_id``; ``truncate`` drops the oldest tokens of a
    long prompt.
    """

    context: int
    mask_token_id: int | None
    truncate: bool

    def fit(self, ids: list[int], budget: int, where: str) -> list[int]:
        """``ids`` if they can be decoded with ``budget`` new tokens; cut on the left unless that was forbidden.

        :param where: names the request in messages.
        :raises RequestError: where they cannot.
        """
        if not ids:
            raise RequestError(
                f"{where}: the prompt is empty; a block-diffusion model needs at least one token to start from."
            )
        if self.mask_token_id is not None and self.mask_token_id in ids:
            raise RequestError(
                f"{where}: the prompt contains the mask token (id {self.mask_token_id}), which the model would fill "
                "in. Remove it, or leave special_tokens at parse, which reads its string as text."
            )
        room = self.context - budget
        if len(ids) <= room:
            return ids
        if self.truncate and room > 0:
            return ids[-room:]
        advice = "Lower max_gen_toks"
        if room > 0:
            advice += ", or leave truncation=False out, so that the oldest prompt tokens are dropped"
        raise RequestError(
            f"{where}: a prompt of {len(ids)} tokens and {budget} new ones do not fit the context of {self.context}. "
            f"{advice}."
        )


def name_of(request: Any) -> str:
    """A request in a message."""
    if request.task_name is None:
        return "a request"
    return f"task {request.task_name}, document {request.doc_id}"
