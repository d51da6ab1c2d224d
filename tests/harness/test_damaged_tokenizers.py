"""Damaged tokenizer files: loaded or refused in a sentence, seeded."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from s2d2_lmeval.families import FAMILIES
from s2d2_lmeval.harness.arguments import sort_arguments
from s2d2_lmeval.harness.loading import check_mask, load_tokenizer
from s2d2_lmeval.harness.prompts import encode

from ..families.test_fuzz import VALUES
from ..fuzzing import Tries
from .conftest import write_tokenizer

SETTINGS = ("auto_map", "additional_special_tokens", "extra_special_tokens", "model_max_length", "added_tokens_decoder")
SETTINGS += ("tokenizer_class", "bos_token", "unk_token", "vocab_file", "add_bos_token", "padding_side", "mask_token")


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a JSON value."""
    if place:
        yield place
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(inner)[:30]:
        yield from places(child, (*place, key))


@pytest.mark.parametrize("count", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_damaged_tokenizers(tmp_path: Path, count: int) -> None:
    rng, tries = random.Random(19), Tries()
    write_tokenizer(tmp_path)
    files = ("tokenizer.json", "tokenizer_config.json")
    good = {name: json.loads((tmp_path / name).read_text()) for name in files}
    known = replace(FAMILIES["sdar"], published_mask_ids={261: 259})
    facts = known.facts({"block_size": 4}, known.config_class(vocab_size=261), {}, source="x")
    arguments = sort_arguments(str(tmp_path), {})

    def use() -> None:
        tokenizer = load_tokenizer(arguments, str(tmp_path), None)
        check_mask(tokenizer, facts, None)
        encode(tokenizer, ["a text with <|MASK|>"], None)

    for number in range(count):
        changed = json.loads(json.dumps(good))
        if number % 3:
            place = rng.choice(list(places(changed["tokenizer.json"])))
            target = changed["tokenizer.json"]
            for key in place[:-1]:
                target = target[key]
            target[place[-1]] = "HERE"
        else:
            place = (rng.choice(SETTINGS),)
            changed["tokenizer_config.json"][place[0]] = "HERE"
        value = rng.choice(VALUES)
        for name in files:
            (tmp_path / name).write_text(json.dumps(changed[name]).replace('"HERE"', value))
        tries.attempt(f"{number} {place} {value[:60]}", use, 30)
    tries.check(refused_at_least=count // 4)
