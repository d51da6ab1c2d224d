"""What a decode step asks of a GPU, on a pretend one: the CPU's tokens, nothing that it would refuse, few launches."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from s2d2_lmeval import BlockDiffusionModel, load
from s2d2_lmeval.registry import DECODERS
from s2d2_lmeval.studies.bench.launches import Row, count_launches
from s2d2_lmeval.studies.pretend import move, pretend_cuda
from s2d2_lmeval.toy import checkpoint_path, held_out

from . import drafting_tiny, editing_tiny, pipelined_cases, subblocks_drawn
from .test_device_reads import EVERY, OPTIONS
from .test_heads import SHAPES, drafted
from .tiny import engine

pytestmark = pytest.mark.filterwarnings("ignore:The draft graph")


RUNS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "ar": ((1, 8, 32), {}),
    "dynamic": ((1, 8), {}),
    "s2d2:reference": ((1, 8), {}),
    "s2d2:fused": ((1, 8), {}),
    "s2d2:lookahead": ((1, 8, 32), {}),
    "s2d2:lookahead sampled": ((8,), {"do_sample": True}),
    "sliding": ((1, 8, 32), {}),
    "sliding sampled": ((1,), {"do_sample": True}),
    "sliding after seeds": ((1,), {"draft_context": "published"}),
    "spiffy": ((1,), {}),
    "dflash": ((1,), {}),
    "ddtree": ((1, 8), {}),
    "static": ((1,), {}),
    "sequential": ((1,), {}),
    "entropy_bounded": ((1,), {"eb_threshold": 0.5}),
    "s2d2 by score": ((1,), {"do_verify_policy": "score_threshold"}),
    "s2d2 with hysteresis": ((1,), {"do_verify_policy": "score_hysteresis"}),
    "s2d2 by a bandit": ((1,), {"do_verify_policy": "contextual_bandit_ucb"}),
    "s2d2 by throughput": ((1,), {"do_verify_policy": "throughput", "verify_cost_ratio": 1.2}),
}
"""Decoder and schedule -> batches that run every time (the other of 1, 8 and 32 are slow), and further options."""

PROMPTS = [[5 + (7 * i + 3 * j) % 90 for j in range(6 + i % 9)] for i in range(33)]


@cache
def toy(draft: bool) -> BlockDiffusionModel:
    return load("toy", draft="toy" if draft else None)


def cases() -> list[Any]:
    return [
        pytest.param(name, batch, marks=[] if batch in batches else [pytest.mark.slow])
        for name, (batches, _) in RUNS.items()
        for batch in (1, 8, 32)
    ]


def check(row: Row) -> None:
    """Whatever a step costs, it has to be right."""
    assert row.get("error") is None
    assert row["capture_faults"] == row["device_mismatches"] == row["races"] == 0
    assert row["same_tokens"]


def check_one_launch(row: Row) -> None:
    """A step as :func:`check` says, replayed as one graph: one upload, one read, and no other wait."""
    check(row)
    assert row["launches_outside"] <= 4
    assert row["uploads"] <= 1
    assert row["blocking"] == 0
    assert row["reads"] <= 1
    assert row["replayed_share"] >= 0.98


def of_runs(name: str) -> tuple[BlockDiffusionModel, dict[str, Any]]:
    """The toy, and the options of one of the :data:`RUNS`."""
    decoder, _, schedule = name.partition(" ")[0].partition(":")
    options = {"decoder": decoder, **({"schedule": schedule} if schedule else {}), **RUNS[name][1]}
    return toy(draft=any(part.needs_drafter for part in DECODERS.all(decoder))), options


@pytest.mark.parametrize(("name", "batch"), cases())
def test_a_step_on_the_toy(name: str, batch: int) -> None:
    model, options = of_runs(name)
    check_one_launch(count_launches(model, options | {"max_new_tokens": 8}, batch, PROMPTS[: batch + 1]))


Runs = list[tuple[list[list[int]], dict[str, Any]]]
"""(prompts, options) of one run after the other."""


def check_later_runs(model: BlockDiffusionModel, runs: Runs) -> None:
    """Runs on one pretend device, which begin with graphs of the runs before and then meet shapes that have none."""
    model.max_batch = 1
    runs = [(prompts, options | {"stop_token_ids": []}) for prompts, options in runs]
    expected = [[answer.canvas for answer in model.generate(*run)] for run in runs]
    with pretend_cuda(devices=1):
        moved = move(model, lambda name: "cuda:0")
        assert [[answer.canvas for answer in moved.generate(*run)] for run in runs] == expected


@pytest.mark.parametrize("name", RUNS)
def test_later_runs(name: str) -> None:
    """The graph of the first problem's verification went when its draft took more room."""
    (model, options), tokenizer = of_runs(name), Tokenizer.from_file(str(checkpoint_path() / "tokenizer.json"))
    problems = [tokenizer.encode(one.prompt).ids for one in held_out("arithmetic")[:5]]
    parts = (slice(0, 3), slice(0, 3), slice(3, 5), slice(0, 5))
    check_later_runs(model, [(problems[part], options | {"max_new_tokens": 24}) for part in parts])


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if "head" in shape])
@pytest.mark.parametrize(("decoder", "batch"), [("dflash", 1), ("ddtree", 3)])
def test_a_step_of_a_drafter_with_a_head(decoder: str, name: str, batch: int) -> None:
    model = drafted(name, max_batch=batch, dtype=torch.float32)
    options = {"decoder": decoder, "max_new_tokens": 6, **({"tree_budget": 8} if decoder == "ddtree" else {})}
    check_one_launch(count_launches(model, options, batch, TINY_PROMPTS))


@pytest.mark.parametrize("decoder", ["sliding", "ar"])
def test_steps_that_nobody_reads(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a prompt follow each other without a read; what one sends is not overwritten by the next."""
    monkeypatch.setattr("s2d2_lmeval.decoding.engine.PREFILL_CHUNK", 4)
    options = {"decoder": decoder, "max_new_tokens": 4}
    check(count_launches(toy(draft=False), options, 1, [[5 + i % 60 for i in range(41)]]))


# ---- other schemes and devices ----

MODELS: dict[str, Any] = {
    "block": lambda: engine(max_batch=3, dtype=torch.float32),
    "editing": lambda: editing_tiny.engine(max_batch=3),
    "subblock": lambda: subblocks_drawn.engine(max_batch=3),
    "pipelined": lambda: pipelined_cases.engine("dream", max_batch=3),
    "autoregressive": lambda: drafting_tiny.pair(max_batch=3, dtype=torch.float32),
}
TINY_PROMPTS = [[(3 * i + j) % 19 for j in range(length)] for i, length in enumerate((3, 8, 11))]


def of_scheme(scheme: str, decoder: str) -> tuple[BlockDiffusionModel, list[dict[str, Any]]]:
    """A tiny model and the options of the runs."""
    drafts = decoder in ("dflash", "ddtree")
    model = drafting_tiny.pair(shifted=scheme == "autoregressive", max_batch=3) if drafts else MODELS[scheme]()
    several = [{**given, "decoder": decoder, "max_new_tokens": 6} for given in OPTIONS[decoder]]
    several = [options for options in several if "auto" not in options.values()]
    if scheme == "subblock":
        several = [options | ({"block_length": 8} if "block_length" in options else {}) for options in several]
    return model, several if scheme == "block" and not drafts else several[-1:]


@pytest.mark.parametrize(("scheme", "decoder"), [(scheme, one) for scheme, one in EVERY if one != "spiffy"])
def test_every_family_on_the_second_device(scheme: str, decoder: str) -> None:
    model, several = of_scheme(scheme, decoder)
    for options in several:
        check(count_launches(model, options, 2, TINY_PROMPTS, lambda name: "cuda:1", runs=2))


@pytest.mark.parametrize(("scheme", "decoder"), EVERY)
def test_later_runs_of_every_family(scheme: str, decoder: str) -> None:
    """Of other lengths: where a pass is as wide as before, what it tells of its rows can still be wider."""
    model, several = of_scheme(scheme, decoder)
    for options in several:
        one, _, other = TINY_PROMPTS
        work = [([one], 6), ([one], 6), ([other], 19), ([one], 23), (TINY_PROMPTS, 17)]
        check_later_runs(model, [(prompts, options | {"max_new_tokens": new}) for prompts, new in work])


@pytest.mark.parametrize("decoder", ["ar", "dynamic", "s2d2", "sliding"])
def test_a_model_on_two_devices_with_its_head_on_the_second(decoder: str) -> None:
    def place(name: str) -> str:
        return "cuda:1" if name.startswith(("model.layers.1.", "model.norm.", "lm_head.")) else "cuda:0"

    model, several = of_scheme("block", decoder)
    for options in several:
        check(count_launches(model, options, 2, TINY_PROMPTS, place, runs=1))


def test_scores_on_two_devices_are_the_cpus() -> None:
    pairs = [([1, 2, 3], [4, 5]), ([1, 2], [3]), ([6], [7, 8, 9])]
    model = MODELS["block"]()
    expected = model.score(pairs)
    with pretend_cuda(devices=2) as counts:
        found = move(model, lambda name: "cuda:1" if name.startswith("lm_head.") else "cuda:0").score(pairs)
    assert [right for _, right in found] == [right for _, right in expected]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-5)
    assert counts.totals()["device_mismatches"] == 0
