"""Requests with equal generation arguments: decoded together, under one configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.errors import ConfigError, shown
from s2d2_lmeval.harness.prompts import Prompt


@dataclass
class Group:
    """Requests of the same generation arguments, and what these come to.

    ``config`` is the decoder's configuration; where a function of the user's decodes it is None and ``options`` are
    what the function gets. ``until`` are the stop strings with the end-of-text string, ``stop_token_ids`` the ids that
    end an answer, ``budget`` the new tokens at most.
    """

    until: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    budget: int
    config: DecodingConfig | None
    options: Mapping[str, Any] = field(default_factory=dict)
    prompts: list[Prompt] = field(default_factory=list)

    def in_order(self) -> list[Prompt]:
        """Longest prompts first, as the harness has it: what does not fit in memory fails at once, and estimates err
        on the safe side.
        """
        return sorted(self.prompts, key=lambda prompt: (-len(prompt.ids), prompt.text))

    def describe(self, gen_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """For the results file: the tasks that asked for it, and what was in force."""
        return {
            "tasks": sorted({prompt.task for prompt in self.prompts}),
            "generation_kwargs": dict(gen_kwargs),
            "max_new_tokens": self.budget,
            "stop_token_ids": list(self.stop_token_ids),
            **(
                {"decoding": self.config.to_dict(), "promise": self.config.promise}
                if self.config is not None
                else {"options": {name: _plain(value) for name, value in self.options.items()}}
            ),
        }


def canonical(gen_kwargs: Any) -> str:
    """A key under which equal generation arguments meet."""
    try:
        return json.dumps(gen_kwargs, sort_keys=True, default=repr)
    except (TypeError, ValueError, RecursionError):
        raise ConfigError(f"generation_kwargs hold what JSON cannot write: {shown(gen_kwargs)}.") from None


def ids_of_special_strings(strings: Sequence[str], vocabulary: Mapping[str, int]) -> tuple[int, ...]:
    """Ids of the stop strings that are one token of their own (``<|im_end|>``); ``vocabulary`` holds the tokenizer's
    added tokens.
    """
    return tuple(vocabulary[string] for string in strings if string in vocabulary)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, list, tuple, dict, type(None))) else type(value).__name__
