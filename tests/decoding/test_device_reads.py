"""The host waits for the device at most once per engine step, whatever decodes.

On the CPU nothing has to be waited for, so what would have to be on a GPU is counted: copies to the host, and
operations whose result the host must know before it can go on (the value of a tensor, the number of elements that a
mask selects).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from s2d2_lmeval import BlockDiffusionModel
from s2d2_lmeval.decoding.spiffy.graph import DraftGraph
from s2d2_lmeval.registry import DECODERS

from . import drafting_tiny, editing_tiny, pipelined_cases, subblocks_drawn
from .tiny import engine

pytestmark = pytest.mark.filterwarnings("ignore:The draft graph")

PROMPTS = [[(3 * i + j) % 19 for j in range(length)] for i, length in enumerate((3, 8, 11, 5, 70))]

MODELS: dict[str, Callable[..., BlockDiffusionModel]] = {
    "block": lambda: engine(max_batch=3),
    "editing": lambda: editing_tiny.engine(max_batch=3),
    "subblock": lambda: subblocks_drawn.engine(max_batch=3),
    "pipelined": lambda: pipelined_cases.engine("dream", max_batch=3),
    "autoregressive": lambda: drafting_tiny.pair(max_batch=3),
}
ONE = {"block_length": 4}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "ar": [{}, {"do_sample": True}],
    "sequential": [ONE],
    "static": [ONE],
    "dynamic": [{"block_length": 8}],
    "entropy_bounded": [{**ONE, "eb_threshold": 0.5}],
    "s2d2": [{"block_length": 8}, {"block_length": 8, "do_sample": True, "top_p": 0.9}],
    "sliding": [
        {"row_budget": 48},
        {"row_budget": "auto"},
        {"row_budget": 48, "do_sample": True, "draft_shape": "chain"},
    ],
    "spiffy": [{**ONE, "draft_nodes": 2}],
    "dflash": [{}, {"do_sample": True}],
    "ddtree": [{"tree_budget": 8}, {"tree_budget": "auto"}],
    "editing": [{**ONE, "max_post_steps": 2}],
    "pipelined": [ONE],
}
POLICIES = ("mask_span_length", "score_threshold", "score_hysteresis", "contextual_bandit_ucb", "throughput")

WAITS = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "is_nonzero",
    "equal",
    "masked_select",
    "_unique2",
    "unique_consecutive",
}


class Waits(TorchDispatchMode):
    """Records operations that a host has to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, overload = func._schema.name.removeprefix("aten::"), func._overloadname
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            place is not None and place.dtype in (torch.bool, torch.uint8) for place in args[1]
        )
        if name in WAITS or by_mask or (name, overload) == ("repeat_interleave", "Tensor"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the host waits for in here."""
    with Waits() as waits, monkeypatch.context() as patch:
        for name in ("cpu", "tolist", "item", "numpy"):
            patch.setattr(torch.Tensor, name, noting(getattr(torch.Tensor, name), name, waits.seen))
        yield waits.seen


def noting(method: Any, name: str, seen: list[str]) -> Any:
    def noted(tensor: torch.Tensor, *given: Any, **more: Any) -> Any:
        # The transfer is cpu(); what numpy() makes of its result costs nothing.
        if name != "numpy":
            seen.append(name)
        return method(tensor, *given, **more)

    return noted


def check(model: BlockDiffusionModel, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = model.config({**options, "max_new_tokens": 9})
    # The cache is allocated, once, and for options that are auto forwards are timed, once.
    model.generate(PROMPTS if "auto" in options.values() else PROMPTS[:1], config)
    model.trace.reset(keep_records=True)
    with counted(monkeypatch) as seen:
        model.generate(PROMPTS, config)
    assert set(seen) == {"cpu"}
    assert len(seen) <= len(model.trace.records)


EVERY = [(scheme, decoder) for scheme in MODELS for decoder in DECODERS.names(scheme)]


@pytest.mark.parametrize(("scheme", "decoder"), EVERY)
def test_every_decoder(scheme: str, decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[scheme]()
    if decoder in ("dflash", "ddtree"):
        model = drafting_tiny.pair(shifted=scheme == "autoregressive", max_batch=3)
    for given in OPTIONS[decoder]:
        options: dict[str, Any] = {"decoder": decoder, **given}
        if scheme == "subblock" and "block_length" in options:
            options["block_length"] = 8
        if decoder == "spiffy":
            path = tmp_path / "graph.json"
            DraftGraph.chain(options["block_length"], 3).save(path)
            options["draft_graph"] = str(path)
            options["base"] = {"editing": "editing", "subblock": "dynamic"}.get(scheme, "static")
        check(model, options, monkeypatch)


@pytest.mark.parametrize("schedule", ["reference", "fused", "lookahead"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_schedule_and_policy(schedule: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"block_length": 8, "schedule": schedule, "do_verify_policy": policy}
    if policy == "throughput":
        options["verify_cost_ratio"] = 1.0  # what is measured before a run is waited for, of course
    check(engine(max_batch=3), {**options, "cache_ver": True, "draft_ver": True}, monkeypatch)


def test_the_count_sees_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.arange(4)
    with counted(monkeypatch) as seen:
        if table.sum() > 1:
            table[table > 1].cpu()
        table.max().item()
        table[0].tolist()
    assert {"_local_scalar_dense", "index", "cpu", "item", "tolist"} <= set(seen)
