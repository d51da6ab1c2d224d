"""A response that remembers how it was decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from s2d2_lmeval.decoding.generation import Step
    from s2d2_lmeval.harness.prompts import Prompt


class TracedResponse(str):
    """The text of a response, with the statistics of its decoding in ``stats``.

    It is equal to its text and survives pickling, copying and the harness's response cache. String methods (``split``,
    ``strip``) and the harness's filters return plain strings, so only a filter that comes first sees the statistics.
    """

    stats: dict[str, Any]

    def __new__(cls, text: str = "", stats: Mapping[str, Any] | None = None) -> TracedResponse:
        response = super().__new__(cls, text)
        response.stats = dict(stats or {})
        return response

    def __reduce__(self) -> tuple[type[TracedResponse], tuple[str, dict[str, Any]]]:
        return type(self), (str(self), self.stats)


class ResponseStore(Protocol):
    """Keeps the responses of a run that may be interrupted (``S2D2LM.store``).

    Requests that it knows are not decoded again, and the others keep the randomness that they have without it.
    ``shows_progress``: whoever keeps the responses shows how far they are.
    """

    shows_progress: bool

    def find(self, prompt: Prompt) -> TracedResponse | None:
        """The response to this very request, if it is kept."""

    def decoding_begins(self) -> None:
        """What follows until the last :meth:`add` is decoding."""

    def add(self, prompt: Prompt, response: TracedResponse, steps: Sequence[Step]) -> None:
        """Keep a response as soon as it is complete; ``steps`` are empty where a function of the user's decoded."""
