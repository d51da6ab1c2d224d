"""Rounds over draft trees as passes: rows with a tree each, the layout of a round, and who sees whom in it.

One round of a row brings, in this order:

text       the tokens that have no keys yet: a chunk of the prompt, later the last round's bonus token
nodes      the drafted tokens, a tree below the text
verifiers  un-shifted models only: per node and for the root a mask at the position after it, which sees the path down
           to it; in shifted models the node itself (for the root the last text token) predicts what follows it
windows    per node that has one: masks that see its path and each other, and so draft what may follow behind the token
           that the verifier chooses there
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from s2d2_lmeval.decoding.generation import Request
from s2d2_lmeval.decoding.passes import Upload
from s2d2_lmeval.decoding.state import DRAFT, PREFILL, VERIFY, Seats
from s2d2_lmeval.runtime.passes import Layout, Pass

TEXT, NODE, VERIFIER, WINDOW, NOBODY = range(5)
"""What a query is; NOBODY pads."""


class TreeRows(Seats):
    """Sequences in flight and the tree each is about to run: N nodes, root at index 0 of tables (count, N + 1)."""

    def __init__(self, count: int, length: int, nodes: int) -> None:
        super().__init__(count)
        self.prefix_grain = 1
        self.length = length
        self.limit = np.zeros(count, dtype=np.int64)
        """Length at which the sequence is full."""
        self.round = np.zeros(count, dtype=np.int64)
        """Rounds that the sequence has run."""
        self.resize(nodes)

    def resize(self, nodes: int) -> None:
        """Make room for so many nodes per tree and forget all trees."""
        self.nodes = np.zeros(self.count, dtype=np.int64)
        self.price = np.zeros(self.count)
        """What a query of the tree came to, in tokens, when it was bought."""
        self.token = np.zeros((self.count, nodes + 1), dtype=np.int64)
        self.parent = np.zeros((self.count, nodes + 1), dtype=np.int64)
        self.depth = np.zeros((self.count, nodes + 1), dtype=np.int64)
        self.windows = np.zeros((self.count, nodes + 1), dtype=bool)

    def admit(self, slot: int, request: Request) -> None:
        super().admit(slot, request)
        self.tokens[slot] = list(request.prompt)
        self.limit[slot] = len(request.prompt) + request.max_new_tokens
        self.round[slot] = 0

    def lengths(self) -> np.ndarray:
        """(count,) tokens of every sequence, prompt included."""
        return np.array([len(tokens) for tokens in self.tokens])

    def enter_round(self, slot: int, prefill_chunk: int) -> None:
        """Run a round next, or first a chunk of a long prompt."""
        if len(self.tokens[slot]) - self.cached[slot] > prefill_chunk:
            self.phase[slot] = PREFILL
        else:
            self.phase[slot] = VERIFY if self.nodes[slot] else DRAFT


@dataclass(frozen=True)
class RoundPlan:
    """A pass and how to read its logits: first of verifiers, then of windows, each in row-major order.

    ``verify_at`` (rows, nodes) of the verifier logits, root 0; ``facts`` the trees and the lengths of every row on the
    device (:func:`send_trees`), ``window_base`` (count, N + 1) index of each node's first window logit, -1 where it has
    none, and ``running`` (count,) the rows that are in a round; ``windows`` (R,) of the active rows, and the
    depth of the ``deepest`` of their trees.
    """

    request: Pass
    phases: np.ndarray
    wanted_counts: np.ndarray
    windows: np.ndarray
    deepest: int
    verifies: int
    verify_at: tuple[torch.Tensor, torch.Tensor]
    facts: dict[str, torch.Tensor]


def plan_round(
    rows: TreeRows, window: int, mask_token_id: int, shifted: bool, prefill_chunk: int, device: torch.device
) -> RoundPlan:
    """Lay out the next forward of all active rows; a draft window has ``window`` masks."""
    slots = rows.active()
    phases, cached, lengths = rows.phase[slots], rows.cached[slots], rows.lengths()[slots]
    prefilling = phases == PREFILL
    text = np.where(prefilling, np.minimum(lengths - cached, prefill_chunk), lengths - cached)
    nodes = np.where(prefilling, 0, rows.nodes[slots])
    verifiers = np.where(prefilling | shifted, 0, nodes + 1)
    windows = rows.windows[slots] & ~prefilling[:, None]
    layout = Layout(slots, text + nodes + verifiers + windows.sum(1) * window)

    r, local = layout.row_of, layout.local
    edges = np.cumsum(np.stack([text, nodes, verifiers]), axis=0)
    kind = (local >= edges[:, r]).sum(0)  # TEXT, NODE, VERIFIER or WINDOW
    within = local - np.concatenate([np.zeros_like(text)[None], edges])[kind, r]
    window_row, window_node = np.nonzero(windows)
    owner = np.select([kind == NODE, kind == VERIFIER], [within + 1, within], 0)
    owner[kind == WINDOW] = np.repeat(window_node, window)
    depth = rows.depth[slots][r, owner]
    # Behind a node comes the token that the verifier chooses; a window's first mask predicts the one behind that.
    step = np.select([kind == NODE, kind == WINDOW], [-1, (not shifted) + within % max(window, 1)], 0)
    positions = np.where(kind == TEXT, cached[r] + local, lengths[r] + depth + step)
    tokens = np.where(kind == NODE, rows.token[slots][r, owner], mask_token_id)
    tokens[kind == TEXT] = np.concatenate(
        [rows.tokens[slot][start : start + n] for slot, start, n in zip(slots, cached, text, strict=True)]
    )
    if shifted:
        verifying = (kind == NODE) | ((kind == TEXT) & (local == text[r] - 1) & ~prefilling[r])
    else:
        verifying = kind == VERIFIER
    window_base = np.full((rows.count, rows.windows.shape[1]), -1)
    window_base[slots[window_row], window_node] = np.arange(len(window_row)) * window
    sent = send_trees(
        rows,
        device,
        tokens=tokens,
        positions=positions,
        kind=layout.padded(kind, NOBODY),
        owner=layout.padded(owner, 0),
        ancestors=ancestors(rows.parent[slots], int(nodes.max(initial=0))),
        read=np.concatenate([np.flatnonzero(verifying), np.flatnonzero(kind == WINDOW)]),
        verify_row=slots[r[verifying]],
        verify_node=owner[verifying],
        window_base=window_base,
        running=np.isin(np.arange(rows.count), slots[~prefilling]),
    )
    visible = tree_visibility(sent["kind"], sent["owner"], sent["ancestors"].bool())
    return RoundPlan(
        request=Pass(layout, sent["tokens"], sent["positions"], visible, sent["read"], keep=text),
        phases=phases,
        wanted_counts=np.where(prefilling, 0, nodes + 1) + windows.sum(1) * window,
        windows=windows.sum(1),
        deepest=int((rows.depth[slots] * (np.arange(rows.depth.shape[1]) <= nodes[:, None])).max(initial=0)),
        verifies=int(verifying.sum()),
        verify_at=(sent["verify_row"], sent["verify_node"]),
        facts=sent,
    )


def send_trees(rows: TreeRows, device: torch.device, **arrays: np.ndarray) -> dict[str, torch.Tensor]:
    """Upload ``arrays`` and of every row ``token``, ``parent`` and ``depth`` (count, N + 1; depth -1 where there is no
    node), ``length``, ``limit``, ``key`` and ``round`` (count,).
    """
    upload = Upload()
    for name, values in arrays.items():
        upload.add(name, values)
    upload.add("token", rows.token)
    upload.add("parent", rows.parent)
    upload.add("depth", np.where(np.arange(rows.depth.shape[1]) <= rows.nodes[:, None], rows.depth, -1))
    upload.add("length", rows.lengths())
    upload.add("limit", rows.limit)
    upload.add("key", rows.key)
    upload.add("round", rows.round)
    return upload.send(device)


def ancestors(parent: np.ndarray, nodes: int) -> np.ndarray:
    """Whether node j is node i itself or above it (R, nodes + 1, nodes + 1); the root, index 0, is above all."""
    above = np.zeros((len(parent), nodes + 1, nodes + 1), dtype=bool)
    above[:, 0, 0] = True
    row = np.arange(len(parent))
    for node in range(1, nodes + 1):
        above[:, node] = above[row, np.minimum(parent[:, node], node - 1)]
        above[:, node, node] = True
    return above


def tree_visibility(kind: torch.Tensor, owner: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
    """Who sees whom in a round, (R, W, W), from what each query is and which node it belongs to, (R, W).

    Text is token-causal and seen by all. A node is seen by what belongs to itself or to a node below it. A verifier is
    seen by itself and by its node's window, a window by itself.
    """
    row = torch.arange(len(kind), device=kind.device).view(-1, 1, 1)
    query, key = owner.unsqueeze(2), owner.unsqueeze(1)
    of_query, of_key = kind.unsqueeze(2), kind.unsqueeze(1)
    place = torch.arange(kind.shape[1], device=kind.device)
    causal = place.unsqueeze(1) >= place
    text = (of_key == TEXT) & ((of_query != TEXT) | causal)
    path = (of_key == NODE) & (of_query != TEXT) & above[row, query, key]
    window = (of_key >= VERIFIER) & (of_key < NOBODY) & (of_query == WINDOW) & (query == key)
    visible = text | path | window
    visible.diagonal(dim1=1, dim2=2).fill_(True)
    return visible
