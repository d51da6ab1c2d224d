"""A response that remembers how it was decoded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
