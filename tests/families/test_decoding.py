"""Every family on the runtime: logits against a forward without a cache, batches against single rows, schedules against
each other.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from s2d2_lmeval import load
from s2d2_lmeval.decoding.options.reading import names_of
from s2d2_lmeval.families import FAMILIES
from s2d2_lmeval.runtime.passes import Layout, Pass

from ..answers import told
from .conftest import LAYOUTS

MASK, BLOCK = 60, 4
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8], [9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4]]
# Families with the decoders of others, some of which are tried.
ALREADY = {
    "sdar_moe": ("s2d2",),
    "tiny_a2d": ("static", "s2d2", "dynamic"),
    "stable_diffcoder": ("static", "s2d2"),
    "wedlm_qwen2": ("reordered",),
}
DECODERS = [
    (name, decoder)
    for name in LAYOUTS
    for decoder in FAMILIES[name].decoders
    # spiffy takes a graph that is made for a checkpoint.
    if decoder != "spiffy" and decoder in ALREADY.get(name, FAMILIES[name].decoders)
]
SMALL = {"block_length": 8, "max_new_tokens": 10, "stop_token_ids": (7,)}
NEEDED = {"entropy_bounded": {"eb_threshold": 1.0}}


SCHEDULED = [(name, decoder) for name, decoder in DECODERS if "schedule" in names_of(decoder) and decoder != "strided"]


def options(name: str, decoder: str) -> dict[str, Any]:
    """Small blocks, and thresholds that a model of random weights meets from both sides."""
    if decoder in ("ar", "sliding"):
        return {"decoder": decoder, "max_new_tokens": 10, "stop_token_ids": (7,), "do_sample": True, "temperature": 1.0}
    threshold = {"confidence_threshold": 0.3} if decoder in ("dynamic", "editing", "s2d2", "pipelined") else {}
    return {"decoder": decoder, **SMALL, **threshold, **NEEDED.get(decoder, {})}


# Logits


class Sequence:
    """One row's committed text with who saw whom in it, kept apart from the runtime."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.seen: list[list[bool]] = []

    def asked(self, tokens: list[int], visible: np.ndarray, keep: int) -> tuple[list[int], torch.Tensor]:
        """Everything up to the queries as one text with its mask (T, T); the first ``keep`` queries stay."""
        before = len(self.tokens)
        total = before + len(tokens)
        rows = [row + [False] * (total - len(row)) for row in self.seen]
        rows += [[True] * before + visible[query].tolist() for query in range(len(tokens))]
        whole = [*self.tokens, *tokens]
        self.tokens += tokens[:keep]
        self.seen += [row[: before + keep] for row in rows[before : before + keep]]
        return whole, torch.tensor(rows)


def block_causal(positions: np.ndarray) -> np.ndarray:
    return positions[:, None] // BLOCK >= positions[None] // BLOCK


def two_halves(width: int) -> np.ndarray:
    """The verifier's: a text, token-causal, and a mask beside each place that sees the text before it and itself."""
    place = np.arange(2 * width)
    text = place < width
    before = np.where(text[:, None], place[None] <= place[:, None], place[None] < place[:, None] - width)
    return (before & text[None]) | np.eye(2 * width, dtype=bool)


def script(prompt: list[int]) -> list[tuple[list[int], np.ndarray, np.ndarray, int]]:
    """(tokens, positions, visibility, kept) of a prefill, a draft, a verification and a commit with the next draft."""
    start = len(prompt)
    block, following = start + np.arange(BLOCK), start + np.arange(2 * BLOCK)
    filled = [11, 12, 13, 14]
    return [
        (prompt, np.arange(start), block_causal(np.arange(start)), start),
        ([11, MASK, 13, MASK], block, np.ones((BLOCK, BLOCK), dtype=bool), 0),
        ([*filled, *[MASK] * BLOCK], np.tile(block, 2), two_halves(BLOCK), 0),
        ([*filled, *[MASK] * BLOCK], following, block_causal(following), BLOCK),
        ([21, 22], start + BLOCK + np.arange(2), np.tri(2, dtype=bool), 2),
    ]


@torch.no_grad()
def test_logits_are_those_of_a_forward_without_a_cache(publish, family):
    """Rows of different lengths and in different phases share each forward; a plain forward recomputes every row."""
    published = publish(family)
    runner = load(published.folder, device="cpu")._runner
    runner.reserve(len(PROMPTS), 40)
    sequences = [Sequence() for _ in PROMPTS]
    scripts = [script(prompt) for prompt in PROMPTS]
    for step in range(len(scripts[0]) + len(PROMPTS) - 1):  # each row is one step behind the one before it
        rows = [row for row in range(len(PROMPTS)) if 0 <= step - row < len(scripts[row])]
        parts = [scripts[row][step - row] for row in rows]
        layout = Layout(np.array(rows), np.array([len(tokens) for tokens, *_ in parts]))
        visible = np.zeros((len(rows), layout.widest, layout.widest), dtype=bool)
        for row, (tokens, _, seen, _) in enumerate(parts):
            visible[row, : len(tokens), : len(tokens)] = seen
        logits = runner.forward(
            Pass(
                layout=layout,
                tokens=torch.tensor([token for tokens, *_ in parts for token in tokens]),
                positions=torch.from_numpy(np.concatenate([positions for _, positions, _, _ in parts])),
                visible=torch.from_numpy(visible),
                wanted=torch.arange(layout.queries),
                keep=np.array([keep for *_, keep in parts]),
            )
        )
        for row, offset, (tokens, positions, seen, keep) in zip(rows, layout.offsets, parts, strict=True):
            before = np.arange(len(sequences[row].tokens))
            whole, mask = sequences[row].asked(tokens, seen, keep)
            plain = published.native(
                input_ids=torch.tensor([whole]),
                position_ids=torch.from_numpy(np.concatenate([before, positions]))[None],
                attention_mask=mask[None, None],
            ).logits[0, len(before) :]
            assert (logits[offset : offset + len(tokens)] - plain).abs().max() < 2e-4


# Batches and schedules


@pytest.mark.parametrize(("name", "decoder"), DECODERS)
def test_an_answer_does_not_depend_on_its_batch(publish, name, decoder):
    folder = publish(name).folder
    prompts = [*PROMPTS, PROMPTS[0][:5]]
    config, order = options(name, decoder), [3, 2, 0, 1]
    one = load(folder, device="cpu", max_batch=1)
    alone = [told(one.generate([prompt], config, seeds=[seed])[0]) for seed, prompt in enumerate(prompts)]
    assert len({tuple(answer["token_ids"]) for answer in alone}) > 2
    together = load(folder, device="cpu", max_batch=3).generate([prompts[i] for i in order], config, seeds=order)
    for answer, i in zip(together, order, strict=True):
        # What sliding drafts in a forward, but not what comes of it, depends on the room that other rows leave.
        same = ["token_ids", "finish_reason"] if decoder == "sliding" else list(alone[i])
        assert {key: told(answer)[key] for key in same} == {key: alone[i][key] for key in same}


@pytest.mark.parametrize(("name", "decoder"), SCHEDULED)
def test_schedules_write_the_same_with_fewer_forwards(publish, name, decoder):
    model = load(publish(name).folder, device="cpu", max_batch=2)
    schedules = ["reference", "fused"]
    ahead = {}
    if decoder == "s2d2" and FAMILIES[name].scheme == "block" and name != "tiny_a2d":
        schedules, ahead = [*schedules, "lookahead"], {"cache_ver": True, "draft_ver": True}
    config = {**options(name, decoder), **ahead}
    runs = [model.generate(PROMPTS, {**config, "schedule": schedule}) for schedule in schedules]
    for slower, faster in pairwise(runs):
        for before, after in zip(slower, faster, strict=True):
            assert after.token_ids == before.token_ids
            # Sub-blocks and pipelines are left as soon as the answer is decided.
            assert after.decoding_order == before.decoding_order[: len(after.decoding_order)]
    counts = [sum(answer.stats["nfe"] for answer in run) for run in runs]
    assert counts == sorted(counts, reverse=True)
    by_nature = decoder == "ar" or FAMILIES[name].scheme in ("subblock", "pipelined")
    assert counts[1] < counts[0] or by_nature
