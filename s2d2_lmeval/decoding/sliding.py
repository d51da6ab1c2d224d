"""Sliding self-speculation: verification, bonus token and the next draft in one forward, with exactly the AR output.

The model drafts by diffusion and verifies itself at block size one, as in S2D2, but every forward does both, and the
draft window slides: it begins at the first undecided position, not at a block boundary. One round of a row:

1. plan    a chain or tree of drafted tokens (nodes), and the places where its walk may end that get a draft window
2. forward the token that has no keys yet; the nodes; per node a verifier mask that sees the path up to it; per window
           ``window - 1`` masks that see that path, its verifier and each other
3. walk    from the root, as long as the token the verifier chooses is a child; that token itself is the bonus
4. commit  the path's keys and values (compacted where the path was not contiguous)
5. draft   the window at the walk's end, if it had one, gives the marginals for the next plan

The verifier chooses as the ``ar`` decoder does: the arg-max, or a draw from randomness keyed by position. So the tokens
are those of ``ar`` with the same seed, whatever was drafted, and a round without a usable draft still yields one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from s2d2_lmeval.decoding import random, trees
from s2d2_lmeval.decoding.config import DecodingConfig
from s2d2_lmeval.decoding.generation import ACCEPTED, AUTOREGRESSIVE, Request, Step
from s2d2_lmeval.decoding.planning import Upload
from s2d2_lmeval.decoding.readback import Outcome
from s2d2_lmeval.decoding.sampling import probabilities
from s2d2_lmeval.decoding.seats import DRAFT, KIND_OF_PHASE, PREFILL, VERIFY, Seats
from s2d2_lmeval.errors import NumericalError
from s2d2_lmeval.runtime.costs import MeasureCosts
from s2d2_lmeval.runtime.passes import Layout, Pass

if TYPE_CHECKING:
    from typing_extensions import Self

    from s2d2_lmeval.families import Facts

CHOICES = 16
"""Tokens per future position that a tree may branch over."""

TEXT, NODE, VERIFIER, WINDOW, NOBODY = range(5)
"""What a query is; NOBODY pads."""


class SlidingRows(Seats):
    """Sequences in flight and the tree each is about to run: N nodes, root at index 0 of tables (count, N + 1)."""

    def __init__(self, count: int, length: int, nodes: int) -> None:
        super().__init__(count)
        self.length = length
        self.limit = np.zeros(count, dtype=np.int64)
        """Length at which the sequence is full."""
        self.nodes = np.zeros(count, dtype=np.int64)
        self.token = np.zeros((count, nodes + 1), dtype=np.int64)
        self.parent = np.zeros((count, nodes + 1), dtype=np.int64)
        self.depth = np.zeros((count, nodes + 1), dtype=np.int64)
        self.windows = np.zeros((count, nodes + 1), dtype=bool)

    def admit(self, slot: int, request: Request) -> None:
        super().admit(slot, request)
        self.tokens[slot] = list(request.prompt)
        self.limit[slot] = len(request.prompt) + request.max_new_tokens
        self.plant(slot)

    def plant(self, slot: int) -> None:
        """No draft: only the root, with a window."""
        self.nodes[slot] = 0
        self.windows[slot] = False
        self.windows[slot, 0] = True


@dataclass(frozen=True)
class RoundPlan:
    """A pass and how to read its logits: first of verifiers, then of windows, each in row-major order.

    ``verify_at`` (rows, nodes) of the verifier logits, root 0; ``window_base`` (count, N + 1) index of each node's
    first window logit, -1 where it has none; ``facts`` the tree and the lengths on the device.
    """

    request: Pass
    phases: np.ndarray
    wanted_counts: np.ndarray
    drafted: np.ndarray
    deepest: int
    verifies: int
    verify_at: tuple[torch.Tensor, torch.Tensor]
    facts: dict[str, torch.Tensor]


class Sliding:
    """The decoder ``sliding``."""

    def __init__(
        self, config: DecodingConfig, facts: Facts, rows: SlidingRows, device: torch.device, chunk: int
    ) -> None:
        self.config = config
        self.mask_token_id = facts.mask_token_id
        self.rows = rows
        self.device = device
        self.prefill_chunk = chunk
        self.source = cast("random.KeyedNoise", random.source_of(config.random_source, config.seed))
        self.window = config.window - 1
        # What a window is worth: the tokens that a draft gains. Learned from the rounds of this run; it never touches
        # what is decoded, only how fast.
        self.gained, self.drafts = 4.0 * 8, 8

    @classmethod
    def seat(
        cls,
        config: DecodingConfig,
        facts: Facts,
        requests: Sequence[Request],
        slots: int,
        device: torch.device,
        prefill_chunk: int,
    ) -> Self:
        """A decoder with ``slots`` rows, each with room for any of ``requests``."""
        longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
        return cls(config, facts, SlidingRows(slots, longest, cls.most_nodes(config)), device, prefill_chunk)

    @staticmethod
    def most_nodes(config: DecodingConfig) -> int:
        """Nodes that a row's tree may have: each takes two rows, and the root two more with its verifier."""
        most = (config.row_budget - 2) // 2
        return max(min(most, config.window - 1) if config.draft == "chain" else most, 1)

    @property
    def capacity(self) -> int:
        """Positions that a row may write to in the cache."""
        return self.rows.length + self.config.row_budget + 1

    def weigh(self, measure_costs: MeasureCosts) -> None:
        """Nothing here depends on what forwards cost."""

    def admitted(self, slot: int) -> None:
        """A request has been seated in ``slot``."""
        self._enter_round(slot)

    # ---- plan ----

    def plan(self) -> RoundPlan:
        """Lay out the next forward of all active rows: text, nodes, verifiers, windows."""
        rows, slots = self.rows, self.rows.active()
        phases, cached = rows.phase[slots], rows.cached[slots]
        lengths = np.array([len(rows.tokens[slot]) for slot in slots])
        prefilling = phases == PREFILL
        text = np.where(prefilling, np.minimum(lengths - cached, self.prefill_chunk), lengths - cached)
        nodes = np.where(prefilling, 0, rows.nodes[slots])
        verifiers = np.where(prefilling, 0, nodes + 1)
        windows = rows.windows[slots] & ~prefilling[:, None]
        layout = Layout(slots, text + nodes + verifiers + windows.sum(1) * self.window)

        r, local = layout.row_of, layout.local
        edges = np.cumsum(np.stack([text, nodes, verifiers]), axis=0)
        kind = (local >= edges[:, r]).sum(0)  # TEXT, NODE, VERIFIER or WINDOW
        within = local - np.concatenate([np.zeros_like(text)[None], edges])[kind, r]
        window_row, window_node = np.nonzero(windows)
        owner = np.select([kind == NODE, kind == VERIFIER], [within + 1, within], 0)
        owner[kind == WINDOW] = np.repeat(window_node, self.window)
        depth = rows.depth[slots][r, owner]
        step = np.select([kind == NODE, kind == WINDOW], [-1, 1 + within % max(self.window, 1)], 0)
        positions = np.where(kind == TEXT, cached[r] + local, lengths[r] + depth + step)
        tokens = np.where(kind == NODE, rows.token[slots][r, owner], self.mask_token_id)
        tokens[kind == TEXT] = np.concatenate(
            [rows.tokens[slot][start : start + n] for slot, start, n in zip(slots, cached, text, strict=True)]
        )
        window_base = np.full((rows.count, rows.windows.shape[1]), -1)
        window_base[slots[window_row], window_node] = np.arange(len(window_row)) * self.window
        sent = self._send(
            tokens=tokens,
            positions=positions,
            kind=layout.padded(kind, NOBODY),
            owner=layout.padded(owner, 0),
            ancestors=ancestors(rows.parent[slots], int(nodes.max(initial=0))),
            read=np.concatenate([np.flatnonzero(kind == VERIFIER), np.flatnonzero(kind == WINDOW)]),
            verify_row=slots[r[kind == VERIFIER]],
            verify_node=owner[kind == VERIFIER],
            window_base=window_base,
            running=np.isin(np.arange(rows.count), slots[~prefilling]),
        )
        visible = tree_visibility(sent["kind"], sent["owner"], sent["ancestors"].bool())
        wanted = verifiers + windows.sum(1) * self.window
        self._plan = RoundPlan(
            request=Pass(layout, sent["tokens"], sent["positions"], visible, sent["read"], keep=text),
            phases=phases,
            wanted_counts=wanted,
            drafted=nodes,
            deepest=int((rows.depth[slots] * (np.arange(rows.depth.shape[1]) <= nodes[:, None])).max(initial=0)),
            verifies=int(verifiers.sum()),
            verify_at=(sent["verify_row"], sent["verify_node"]),
            facts=sent,
        )
        return self._plan

    def _send(self, **arrays: np.ndarray) -> dict[str, torch.Tensor]:
        """Upload ``arrays`` and the trees and lengths of every row."""
        rows, upload = self.rows, Upload()
        for name, values in arrays.items():
            upload.add(name, values)
        upload.add("token", rows.token)
        upload.add("parent", rows.parent)
        upload.add("depth", np.where(np.arange(rows.depth.shape[1]) <= rows.nodes[:, None], rows.depth, -1))
        upload.add("length", np.array([len(tokens) for tokens in rows.tokens]))
        upload.add("limit", rows.limit)
        upload.add("key", rows.key)
        return upload.send(self.device)

    # ---- advance, on the device ----

    def advance(self, logits: torch.Tensor) -> Outcome:
        """Take the wanted logits (M, V) of the planned forward; walk, commit, draft and grow the next trees.

        Reads the device once.

        :raises NumericalError: when the logits are not numbers.
        """
        plan, facts = self._plan, self._plan.facts
        if not plan.verifies:  # prefill chunks only
            return self._settle(None)
        logits[:, self.mask_token_id] = -torch.inf
        chosen = self._choose(logits[: plan.verifies])
        walked = self._walk(chosen)
        end = (walked * facts["depth"].clamp_min(0)).argmax(1, keepdim=True)
        bonus = chosen.gather(1, end)
        begins = facts["length"].unsqueeze(1) + facts["depth"].gather(1, end).clamp_min(0) + 1
        base = facts["window_base"].gather(1, end)
        tree = self._draft(logits[plan.verifies :], base, begins)
        shape = trees.shape(tree, self.config.row_budget, self.window, self.gained / self.drafts)
        nodes = shape.nodes.unsqueeze(1) * (base >= 0)
        sound = logits[: plan.verifies].isnan().any().logical_not().expand_as(bonus)
        columns = [sound, bonus, walked[:, 1:], nodes, tree.token, tree.parent, tree.depth, shape.windows]
        packed = torch.cat([column.long() for column in columns], dim=1).cpu().numpy()
        return self._settle(np.split(packed, np.cumsum([column.shape[1] for column in columns])[:-1], axis=1))

    def _choose(self, logits: torch.Tensor) -> torch.Tensor:
        """The token after every node, in a table (count, N + 1): what ``ar`` would choose there."""
        plan, config = self._plan, self.config
        row, node = plan.verify_at
        if config.sampled:
            position = plan.facts["length"][row] + plan.facts["depth"][row, node]
            key = random.Key(random.DRAFT, plan.facts["key"][row], position, torch.zeros_like(position))
            p = probabilities(logits, config.temperature, config.top_k, config.top_p)
            tokens = self.source.categorical(p, key)
        else:
            tokens = logits.argmax(-1)
        return torch.full_like(plan.facts["parent"], -1).index_put(plan.verify_at, tokens)

    def _walk(self, chosen: torch.Tensor) -> torch.Tensor:
        """Which nodes (count, N + 1) lie on the path that the verifier's tokens take; the root always does."""
        facts = self._plan.facts
        follows = chosen.gather(1, facts["parent"]) == facts["token"]
        walked = facts["depth"] == 0
        walked[:, 1:] = False
        for depth in range(1, self._plan.deepest + 1):
            walked = walked | (follows & (facts["depth"] == depth) & walked.gather(1, facts["parent"]))
        return walked

    def _draft(self, logits: torch.Tensor, base: torch.Tensor, begins: torch.Tensor) -> trees.Tree:
        """Grow each row's next tree from the window at ``base`` (count, 1) of the window ``logits``.

        ``begins`` (count, 1) is the window's first position. At a temperature the draft is coupled to the verifier: the
        same keyed noise is added to both, so where their distributions agree, so do their samples.
        """
        config, facts, count = self.config, self._plan.facts, len(base)
        budget = self.rows.token.shape[1] - 1
        if not len(logits):
            return trees.empty(count, budget, base.device, logits.dtype)
        offsets = torch.arange(self.window, device=base.device)
        position = begins + offsets
        log_p = logits[(base.clamp_min(0) + offsets).flatten()].log_softmax(-1)
        if config.sampled:
            p = probabilities(log_p, config.temperature, config.top_k, config.top_p)
            flat = position.flatten()
            key = random.Key(random.DRAFT, facts["key"].repeat_interleave(self.window), flat, torch.zeros_like(flat))
            log_p = (p.log() + self.source.gumbel(p, key)).log_softmax(-1)
        choices = 1 if config.draft == "chain" else CHOICES
        best, token = log_p.topk(min(choices, log_p.shape[-1]), dim=-1)
        # A node at position p needs a token behind it: the walk's bonus.
        room = (position < facts["limit"].unsqueeze(1) - 1).view(-1, 1)
        best = best.masked_fill(~room, -torch.inf).view(count, self.window, -1)
        return trees.grow(best, token.view(count, self.window, -1), budget)

    # ---- host ----

    def _settle(self, read: list[np.ndarray] | None) -> Outcome:
        """Take accepted paths and new trees over; move every row to its next round."""
        rows, plan = self.rows, self._plan
        slots = plan.request.layout.slots
        outcome = Outcome.zeros(len(slots))
        rows.cached[slots] += plan.request.keep
        for row, slot in enumerate(slots.tolist()):
            rows.progress[slot].forwards[KIND_OF_PHASE[rows.phase[slot]]] += 1
            if rows.phase[slot] != PREFILL:
                assert read is not None
                self._after_round(row, slot, [table[slot] for table in read], outcome)
            if not rows.complete[slot]:
                self._enter_round(slot)
        return outcome

    def _after_round(self, row: int, slot: int, read: list[np.ndarray], outcome: Outcome) -> None:
        sound, bonus, walked, nodes, token, parent, depth, windows = read
        if not sound[0]:
            raise NumericalError(
                "The model answered with logits that are not numbers (NaN or infinite). "
                "Check the checkpoint, or load it with dtype=float32."
            )
        rows = self.rows
        path = np.flatnonzero(walked)
        path = path[np.argsort(rows.depth[slot, path + 1], kind="stable")]
        fresh = [*rows.token[slot, path + 1].tolist(), int(bonus[0])]
        drafted = int(rows.nodes[slot])
        if drafted:
            self.gained += len(path)
            self.drafts += 1
        outcome.path[row] = path
        outcome.kept[row] = len(path)
        outcome.committed[row] = len(fresh)
        outcome.drafted[row] = drafted
        outcome.accepted[row] = len(path)
        rows.cached[slot] += len(path)
        progress, start = rows.progress[slot], len(rows.tokens[slot])
        marks = [ACCEPTED] * len(path) + [AUTOREGRESSIVE]
        kind = KIND_OF_PHASE[rows.phase[slot]]
        progress.steps.append(Step(kind, start, [self.mask_token_id] * len(fresh), fresh, fresh, marks))
        progress.decoding_order.append(list(range(start, start + len(fresh))))
        progress.drafted += drafted
        progress.accepted += len(path)
        struck = rows.extend(slot, fresh, self.config.stop_token_ids)
        rows.complete[slot] = struck or len(rows.tokens[slot]) >= rows.limit[slot]
        rows.nodes[slot] = nodes[0]
        if nodes[0]:
            rows.token[slot, 1:], rows.parent[slot, 1:], rows.depth[slot, 1:] = token, parent, depth
            rows.windows[slot] = windows
        else:
            rows.plant(slot)

    def _enter_round(self, slot: int) -> None:
        """Run a round next, or first a chunk of a long prompt."""
        rows = self.rows
        waiting = len(rows.tokens[slot]) - rows.cached[slot]
        if waiting > self.prefill_chunk:
            rows.phase[slot] = PREFILL
        else:
            rows.phase[slot] = VERIFY if rows.nodes[slot] else DRAFT


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
