"""What runs of requests need of the model class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.harness.arguments import Arguments
from s2d2_lmeval.harness.custom import CustomFunction
from s2d2_lmeval.harness.report import Totals
from s2d2_lmeval.harness.responses import ResponseStore
from s2d2_lmeval.model import BlockDiffusionModel


class HarnessModel(Protocol):
    """:class:`~s2d2_lmeval.harness.model.S2D2LM`, as far as its runs look at it; names as there and in ``HFLM``."""

    arguments: Arguments
    engine: BlockDiffusionModel | None
    custom: CustomFunction | None
    store: ResponseStore | None
    totals: Totals
    configurations: dict[str, dict[str, Any]]
    told: set[Any]
    truncates: bool
    seed: int | None
    tokenizer: Any
    cache_hook: Any
    add_bos_token: bool | None
    think_end_token: str | int | None

    @property
    def model(self) -> Any:
        """The transformers model."""

    @property
    def device(self) -> Any:
        """Where it is."""

    @property
    def world_size(self) -> int:
        """Processes that share the evaluation."""

    @property
    def max_length(self) -> int:
        """Positions that a request may take."""

    @property
    def max_gen_toks(self) -> int:
        """New tokens at most, for requests that do not say."""

    @property
    def eot_token_id(self) -> int | None:
        """The end-of-text token."""

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by."""

    @property
    def end_of_text_ids(self) -> tuple[int, ...]:
        """Stop tokens of the tokenizer."""

    def configuration(self, asked: Mapping[str, Any]) -> DecodingConfig | None:
        """A task's decoding options over those of the run."""

    def as_text(self, ids: list[int]) -> list[int]:
        """Ids in which the mask token's string is text."""

    def tok_encode(self, string: str) -> list[int]:
        """Token ids of a text."""

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
