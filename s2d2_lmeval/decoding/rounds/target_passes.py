"""Rounds of a target with a drafter as passes: what the target verifies, and the block that the drafter fills.

A round of the target brings, per row and in this order:

text       the tokens that have no keys yet: the prompt or a chunk of it, later the last round's bonus token
nodes      the drafted tokens, a tree below the text; siblings share a position, and see only what lies above them
verifiers  un-shifted targets only: per node and for the root a mask at the position after it, which sees the path down
           to it; in shifted targets the node itself (for the root the last text token) predicts what follows it

Trees are grown on the device and stay there; the host knows how many nodes each row has.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from s2d2_lmeval.decoding.generation import Request
from s2d2_lmeval.decoding.passes import Upload
from s2d2_lmeval.decoding.rounds import trees
from s2d2_lmeval.decoding.rounds.passes import NOBODY, NODE, TEXT, VERIFIER, tree_visibility
from s2d2_lmeval.decoding.state import PREFILL, PROPOSE, VERIFY, Seats
from s2d2_lmeval.families.facts import DrafterFacts
from s2d2_lmeval.runtime.passes import DRAFTER, Layout, Pass


class TargetRows(Seats):
    """Sequences in flight, and on the device the tree that each is about to run: ``token``, ``parent`` and ``depth``
    (count, N + 1), the root at index 0; the first ``nodes`` (count,) of it are run.
    """

    def __init__(self, count: int, length: int, nodes: int, device: torch.device) -> None:
        super().__init__(count)
        self.prefix_grain = 1
        self.length = length
        self.device = device
        self.limit = np.zeros(count, dtype=np.int64)
        """Length at which the sequence is full."""
        self.nodes = np.zeros(count, dtype=np.int64)
        self.token, self.parent, self.depth = torch.zeros(3, count, nodes + 1, dtype=torch.long, device=device)

    def admit(self, slot: int, request: Request) -> None:
        super().admit(slot, request)
        self.tokens[slot] = list(request.prompt)
        self.limit[slot] = len(request.prompt) + request.max_new_tokens
        self.nodes[slot] = 0

    def lengths(self) -> np.ndarray:
        """(count,) tokens of every sequence, prompt included."""
        return np.array([len(tokens) for tokens in self.tokens])

    def plant(self, slots: torch.Tensor, tree: trees.Tree) -> None:
        """Run ``tree`` (R, N) in the rows ``slots`` (R,) next. Places without a node are no child of any."""
        self.token[slots, 1:], self.parent[slots, 1:] = tree.token, tree.parent
        self.depth[slots, 1:] = torch.where(tree.value > 0, tree.depth, -1)


@dataclass(frozen=True)
class TargetPlan:
    """A pass of the target and how to read its logits: ``at`` (rows, nodes) of each, row-major, the root first.

    ``depth`` (count, N + 1) of the nodes that are run, -1 elsewhere; ``length`` and ``key`` (count,) on the device.
    """

    request: Pass
    phases: np.ndarray
    wanted_counts: np.ndarray
    at: tuple[torch.Tensor, torch.Tensor]
    depth: torch.Tensor
    length: torch.Tensor
    key: torch.Tensor


@dataclass(frozen=True)
class DraftPlan:
    """A pass of the drafter over one block per row; all but the block's first place are read."""

    request: Pass
    phases: np.ndarray
    wanted_counts: np.ndarray
    slots: torch.Tensor
    length: torch.Tensor
    key: torch.Tensor


def plan_target(rows: TargetRows, mask_token_id: int, shifted: bool, chunk: int, feeds_drafter: bool) -> TargetPlan:
    """Lay out the target's next forward of all active rows."""
    slots, all_lengths = rows.active(), rows.lengths()
    phases, cached, lengths = rows.phase[slots], rows.cached[slots], all_lengths[slots]
    prefilling = phases == PREFILL
    text = np.where(prefilling, np.minimum(lengths - cached, chunk), lengths - cached)
    nodes = np.where(phases == VERIFY, rows.nodes[slots], 0)
    verifiers = np.where(prefilling | shifted, 0, nodes + 1)
    layout = Layout(slots, text + nodes + verifiers)

    r, local = layout.row_of, layout.local
    edges = np.cumsum(np.stack([text, nodes]), axis=0)
    kind = (local >= edges[:, r]).sum(0)  # TEXT, NODE or VERIFIER
    within = local - np.concatenate([np.zeros_like(text)[None], edges])[kind, r]
    owner = np.select([kind == NODE, kind == VERIFIER], [within + 1, within], 0)
    tokens = np.full(layout.queries, mask_token_id)
    tokens[kind == TEXT] = np.concatenate(
        [rows.tokens[slot][start : start + n] for slot, start, n in zip(slots, cached, text, strict=True)]
    )
    last = (kind == TEXT) & (local == text[r] - 1) & ~prefilling[r]
    read = last | (kind == NODE) if shifted else kind == VERIFIER
    running = np.zeros(rows.count, dtype=np.int64)
    running[slots] = nodes
    sent = _send(
        rows.device,
        tokens=tokens,
        # Of text its own position; of what belongs to a node that of the root, less the node's depth.
        positions=np.where(kind == TEXT, cached[r] + local, lengths[r] - (kind == NODE)),
        kind=layout.padded(kind, NOBODY),
        owner=layout.padded(owner, 0),
        slot=slots,
        query_slot=slots[r],
        query_owner=owner,
        is_node=kind == NODE,
        in_tree=kind != TEXT,
        read=np.flatnonzero(read),
        row=slots[r[read]],
        node=owner[read],
        running=running,
        length=all_lengths,
        key=rows.key,
    )
    present = torch.arange(rows.depth.shape[1], device=rows.device) <= sent["running"].unsqueeze(1)
    place = (sent["query_slot"], sent["query_owner"])
    above = trees.paths(rows.parent[sent["slot"]], rows.depth.shape[1] - 1)
    return TargetPlan(
        request=Pass(
            layout=layout,
            tokens=torch.where(sent["is_node"].bool(), rows.token[place], sent["tokens"]),
            positions=sent["positions"] + rows.depth[place].clamp_min(0) * sent["in_tree"],
            visible=tree_visibility(sent["kind"], sent["owner"], above),
            wanted=sent["read"],
            keep=text,
            feeds_drafter=feeds_drafter,
        ),
        phases=phases,
        wanted_counts=np.where(prefilling, 0, nodes + 1),
        at=(sent["row"], sent["node"]),
        depth=rows.depth.where(present, -1),
        length=sent["length"],
        key=sent["key"],
    )


def plan_draft(rows: TargetRows, facts: DrafterFacts, block: int) -> DraftPlan:
    """Lay out the drafter's next forward, of all rows that wait for a draft: the last token and masks behind it."""
    slots, all_lengths = np.flatnonzero(rows.phase == PROPOSE), rows.lengths()
    layout = Layout(slots, np.full(len(slots), block))
    root = np.array([rows.tokens[slot][-1] for slot in slots])
    sent = _send(
        rows.device,
        tokens=np.where(layout.local == 0, root[layout.row_of], facts.mask_token_id),
        positions=all_lengths[slots][layout.row_of] - 1 + layout.local,
        read=np.flatnonzero(layout.local > 0),
        slot=slots,
        length=all_lengths[slots],
        key=rows.key[slots],
    )
    return DraftPlan(
        request=Pass(
            layout=layout,
            tokens=sent["tokens"],
            positions=sent["positions"],
            visible=torch.ones(len(slots), block, block, dtype=torch.bool, device=rows.device),
            wanted=sent["read"],
            keep=np.zeros(len(slots), dtype=np.int64),
            model=DRAFTER,
        ),
        phases=rows.phase[slots],
        wanted_counts=np.full(len(slots), block - 1),
        slots=sent["slot"],
        length=sent["length"],
        key=sent["key"],
    )


def _send(device: torch.device, **arrays: np.ndarray) -> dict[str, torch.Tensor]:
    upload = Upload()
    for name, values in arrays.items():
        upload.add(name, values)
    return upload.send(device)
