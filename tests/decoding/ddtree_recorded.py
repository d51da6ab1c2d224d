"""Recorded runs of the published DFlash and DDTree code, and the same runs here, round by round."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from s2d2_lmeval import BlockDiffusionModel
from s2d2_lmeval.decoding.generation import Generation
from s2d2_lmeval.decoding.rounds import acceptance
from s2d2_lmeval.decoding.rounds.rows import RoundRows

DATA = Path(__file__).parent / "data" / "ddtree"
STOP = 62


def recorded_runs(file: Path = DATA / "runs.json.gz") -> list[dict[str, Any]]:
    return json.loads(gzip.decompress(file.read_bytes()))


@contextmanager
def watched() -> Iterator[list[dict[str, list[int]]]]:
    """Rounds of the only row, as they happen: the tree that was planted, and what the target said of it."""
    rounds: list[dict[str, list[int]]] = []
    plant, walk = RoundRows.plant, acceptance.walk

    def planting(self: RoundRows, slots: torch.Tensor, tree: Any) -> None:
        real = int((tree.value[0] > 0).sum())
        found = {"tokens": tree.token, "depths": tree.depth, "parents": tree.parent}
        rounds.append({name: table[0, :real].tolist() for name, table in found.items()})
        plant(self, slots, tree)

    def walking(chosen: torch.Tensor, *arguments: Any) -> torch.Tensor:
        path = walk(chosen, *arguments)
        if rounds:  # the first token comes without a tree
            places = len(rounds[-1]["tokens"]) + 1
            rounds[-1]["posterior"] = chosen[0, :places].tolist()
            rounds[-1]["accepted"] = [0, *(place for place in path[0].tolist() if place)]
        return path

    with patch.object(RoundRows, "plant", planting), patch.object(acceptance, "walk", walking):
        yield rounds


def replay(model: BlockDiffusionModel, run: dict[str, Any], new_tokens: int) -> tuple[Generation, list[Any]]:
    """``new_tokens`` of a recorded run, drawn in the published order."""
    sampled = run["temperature"] > 0
    options = {"decoder": run["method"], "schedule": "reference", "random_source": "torch", "do_sample": sampled}
    options |= {"temperature": run["temperature"] or 1.0, "stop_token_ids": (STOP,)}
    if run["method"] == "ddtree":
        options["tree_budget"] = run["budget"]
    if run["seed"] is not None:
        torch.manual_seed(run["seed"])
    with watched() as rounds:
        return model.generate([run["prompt"]], options, max_new_tokens=new_tokens)[0], rounds


def compare(model: BlockDiffusionModel, run: dict[str, Any], new_tokens: int) -> None:
    """Tokens, acceptance lengths and, where they were recorded, trees, posteriors and paths."""
    answer, rounds = replay(model, run, new_tokens)
    assert answer.token_ids == run["new"][:new_tokens]
    lengths = [len(step.tokens) for step in answer.steps[1:]]
    if run["method"] != "ar":
        assert lengths == run["lengths"][: len(lengths)]
    if run["rounds"]:
        assert len(rounds) == len(lengths)
        for one, other in zip(rounds, run["rounds"], strict=False):
            assert one == other
