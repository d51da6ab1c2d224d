"""Draft graphs of every kind, and requests with options of every base decoder, drawn at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from s2d2_lmeval.decoding.spiffy.graph import DraftGraph

from .drawn import MASK, prompts

SUBBLOCKS = "sub-blocks"
"""``dynamic`` where blocks are decided in parts."""
BLOCK_BASES = ("static", "dynamic", "sequential", "entropy_bounded")


@dataclass(frozen=True)
class Case:
    """Requests, the base decoder with its options, and a draft graph."""

    base: str
    options: dict[str, Any]
    graph: DraftGraph
    nodes: int
    prompts: list[list[int]]
    budgets: list[int]
    model_seed: int
    max_batch: int


@st.composite
def graphs(draw: st.DrawFn, length: int) -> DraftGraph:
    """Empty, the chain of best tokens, adversarial (the worst tokens of the last places), or random."""
    kind = draw(st.sampled_from(["empty", "chain", "adversarial", "random", "random"]))
    if kind == "empty":
        return DraftGraph.of([], length)
    if kind == "chain":
        return DraftGraph.chain(length, draw(st.integers(1, 5)))
    if kind == "adversarial":
        return DraftGraph.of([[(length - 1 - n, 7) for n in range(size)] for size in range(1, length + 1)], length)
    pairs = st.dictionaries(
        st.integers(0, length - 1), st.sampled_from([0, 0, 0, 1, 2]), min_size=1, max_size=min(length, 4)
    )
    sets = draw(st.lists(pairs, min_size=1, max_size=10, unique_by=lambda each: tuple(sorted(each.items()))))
    return DraftGraph.of([list(each.items()) for each in sets], length)


@st.composite
def cases(draw: st.DrawFn, bases: tuple[str, ...]) -> Case:
    """Requests for one of the decoders ``bases``."""
    base, length = draw(st.sampled_from(bases)), draw(st.integers(1, 8))
    subblocks = base == SUBBLOCKS
    options: dict[str, Any] = {
        "block_length": length,
        "temperature": (temperature := draw(st.sampled_from([0.0, 0.3, 1.0]))),
        "do_sample": draw(st.booleans()) and temperature > 0,
        "top_k": draw(st.sampled_from([0, 4])),
        "top_p": draw(st.sampled_from([1.0, 0.8])),
        "min_p": draw(st.sampled_from([0.0, 0.05])),
        "logit_bias": draw(st.sampled_from([(), ((2, 1.5), (4, -1.0))])),
        "suppress_mask_token": draw(st.sampled_from([True, True, False])),
        "stop_token_ids": tuple(draw(st.lists(st.integers(0, MASK - 1), max_size=2))),
        "schedule": draw(st.sampled_from(["fused", "fused", "reference"])),
        "random_source": draw(st.sampled_from(["keyed", "keyed", "fixed"])),
        "seed": draw(st.integers(0, 99)),
    }
    if base == "editing":
        options |= {
            "editing_threshold": draw(st.sampled_from([0.2, 0.5, 0.9])),
            "confidence_threshold": draw(st.sampled_from([0.3, 0.6, 0.9])),
            "max_post_steps": draw(st.sampled_from([0, 0, 1, 3])),
            "num_to_transfer": draw(st.integers(1, length)),
            "eos_early_stop": draw(st.booleans()),
        }
    elif subblocks:
        parts = draw(st.sampled_from([part for part in range(1, length + 1) if length % part == 0]))
        options |= {
            "small_block_size": parts,
            "sample_first_token": draw(st.booleans()),
            "cache_ver": draw(st.booleans()),
            "draft_ver": draw(st.booleans()),
        }
    else:
        options |= {
            "denoising_steps": draw(st.integers(1, length)),
            "cache_ver": draw(st.booleans()),
            "draft_ver": draw(st.booleans()),
        }
    if base in ("dynamic", SUBBLOCKS):
        options["confidence_threshold"] = draw(st.sampled_from([0.2, 0.4, 0.85]))
    if base == "entropy_bounded":
        options |= {"eb_threshold": draw(st.sampled_from([0.2, 1.5, 4.0])), "collapse_entropy": draw(st.booleans())}
    asked = draw(st.lists(prompts(), min_size=1, max_size=5))
    return Case(
        base="dynamic" if subblocks else base,
        options=options,
        graph=draw(graphs(options.get("small_block_size", length))),
        nodes=draw(st.integers(0, 10)),
        prompts=asked,
        budgets=draw(st.lists(st.integers(0, 20), min_size=len(asked), max_size=len(asked))),
        model_seed=draw(st.integers(0, 3)),
        max_batch=draw(st.integers(1, 3)),
    )
