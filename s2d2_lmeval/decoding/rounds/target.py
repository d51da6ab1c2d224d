"""Decoding in rounds with the autoregressive distribution: the target verifies a tree of drafted tokens in one forward,
and the walk down the tree continues as long as the target's choice after a node is one of its children.

One round of a row:

1. plan     the text without keys, the nodes of its tree, the queries for the target's choices (:func:`plan_round`)
2. judge    the path from the root that the target accepts, and its own token after it, the bonus token
            (:mod:`~s2d2_lmeval.decoding.rounds.acceptance`)
3. propose  the draft for the next round
4. commit   the path's keys and values become prefix (compacted if the path is not contiguous)

Decoders differ in step 3. Without drafts every round is one token: ``ar`` of every family, below. Drafts come from
masks in the same forward (:mod:`~s2d2_lmeval.decoding.rounds.sliding`) or from a drafter in a separate forward
(:mod:`~s2d2_lmeval.decoding.rounds.dflash`, :mod:`~s2d2_lmeval.decoding.rounds.ddtree`). The target's choice is the
argmax, or a draw from randomness keyed by request and position, so the output is the same for every tree.

Trees are grown on the device and stay there; the host knows how many nodes and windows each row has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from s2d2_lmeval.decoding.decoder import AUTOREGRESSIVE, Decoder, DecoderSetup
from s2d2_lmeval.decoding.generation import Request
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.options.option import SCHEMES
from s2d2_lmeval.decoding.passes import PassBuilder, Plan, Sent, ragged
from s2d2_lmeval.decoding.rounds import trees
from s2d2_lmeval.decoding.rounds.acceptance import Keyed
from s2d2_lmeval.decoding.sampling import random
from s2d2_lmeval.decoding.state import DRAFT, KIND_OF_PHASE, PREFILL, VERIFY, SequenceState
from s2d2_lmeval.decoding.steps import Outcome, fetch
from s2d2_lmeval.errors import NumericalError
from s2d2_lmeval.families.facts import NO_MASK
from s2d2_lmeval.registry import DECODERS

if TYPE_CHECKING:
    from s2d2_lmeval.families import Facts


class RoundRows(SequenceState):
    """Sequences in flight and, on the device, the tree that each runs next: ``token``, ``parent`` and ``depth``
    (-1: no node) (count, N + 1), the root at index 0, and ``holder``, the nodes with a draft window, in rising order.
    """

    def __init__(self, setup: DecoderSetup, nodes: int) -> None:
        super().__init__(setup.slots)
        self.prefix_grain = 1
        self.length = setup.longest
        self.device = setup.device
        self.limit = np.zeros(self.count, dtype=np.int64)
        """Maximum length of the sequence."""
        self.round = np.zeros(self.count, dtype=np.int64)
        """Rounds run so far."""
        self.resize(nodes)

    def resize(self, nodes: int) -> None:
        """Make room for so many nodes per tree and forget all trees."""
        self.nodes, self.windows = np.zeros((2, self.count), dtype=np.int64)
        """How many nodes and draft windows run: the first ones of the tables."""
        shape = (4, self.count, nodes + 1)
        self.token, self.parent, self.depth, self.holder = torch.zeros(shape, dtype=torch.long, device=self.device)

    def admit(self, slot: int, request: Request) -> None:
        """Take a request: its first round has no draft, but a window at the root."""
        super().admit(slot, request)
        self.tokens[slot] = list(request.prompt)
        self.limit[slot] = len(request.prompt) + request.max_new_tokens
        self.nodes[slot], self.windows[slot], self.round[slot] = 0, 1, 0

    def lengths(self) -> np.ndarray:
        """(count,) tokens of every sequence, prompt included."""
        return np.array([len(tokens) for tokens in self.tokens])

    def plant(self, slots: torch.Tensor | slice, tree: trees.Tree) -> None:
        """Run ``tree`` (R, N) in the rows ``slots`` (R,) next."""
        self.token[slots, 1:], self.parent[slots, 1:] = tree.token, tree.parent
        self.depth[slots, 1:] = torch.where(tree.value > 0, tree.depth, -1)


def plan_round(
    rows: RoundRows, facts: Facts, depths: int, prefill_chunk: int, window: int = 0, feeds_drafter: bool = False
) -> Plan:
    """Lay out the target's next forward of all active rows. A row's segments, in this order:

    text       the tokens without keys: a chunk of the prompt, later the last round's bonus token
    nodes      the drafted tokens, a tree at most ``depths`` deep; siblings share a position
    verifiers  un-shifted targets only: for the root and every node a mask at the position after it, which sees the path
               down to it; in shifted targets the node itself (for the root the last text token) predicts what follows
    windows    per node with a window, masks that see its path and each other (earlier ones only, if the facts say so),
               whose ``window`` logits are a draft of the tokens after the target's choice there. Where shifted targets
               have masks that predict their own token, one more comes first, in the place of that choice, unread

    Reads ``verify`` (the root, then the nodes) and ``window``. Sends of every row (count,) ``length``, ``limit``,
    ``key``, ``round``, the ``nodes`` and ``windows`` it runs and ``base``, the first of its window logits.
    """
    slots, lengths, shifted = rows.active(), rows.lengths(), facts.token_shift
    phases, cached, length = rows.phase[slots], rows.cached[slots], lengths[slots]
    begun = phases != PREFILL
    texts = np.where(begun, length - cached, np.minimum(length - cached, prefill_chunk))
    nodes, windows = rows.nodes[slots] * begun, rows.windows[slots] * begun * (window > 0)

    builder = PassBuilder(slots)
    pieces = [rows.tokens[slot][start : start + n] for slot, start, n in zip(slots, cached, texts, strict=True)]
    builder.span(cached, texts).set(text=np.concatenate(pieces), kind=trees.TEXT)
    drafted = builder.add(nodes)
    drafted.set(position=length[drafted.row] - 1, kind=trees.NODE, owner=drafted.local + 1)
    read_row, read_node = ragged((nodes + 1) * begun)
    if not shifted:
        builder.add((nodes + 1) * begun).set(position=length[read_row], kind=trees.VERIFIER, owner=read_node)
    unread = unread_masks(facts)
    masks = builder.add(windows * (window + unread))
    of_window, ahead = np.divmod(masks.local, max(window + unread, 1))
    masks.set(position=length[masks.row] + ahead + (not shifted), kind=trees.WINDOW, owner=of_window)
    first = builder.lay_out().offsets + texts + (-1 if shifted else nodes)
    builder.read("verify", read_row, read_node, first[read_row] + read_node)
    drafting = ahead >= unread
    builder.read(
        "window", masks.row[drafting], (masks.local - (of_window + 1) * unread)[drafting], masks.query[drafting]
    )
    per_row = np.zeros((4, rows.count), dtype=np.int64)
    per_row[:, slots] = nodes, windows, (windows.cumsum() - windows) * window, begun
    told = {
        "slot": slots[builder.layout.row_of],
        "packed": builder.layout.row_of * builder.layout.widest + builder.layout.local,
        "text": builder.column("text", facts.mask_token_id),
        "kind": builder.padded("kind", trees.NOBODY),
        "owner": builder.padded("owner", 0),
    }
    of_rows = {"length": lengths, "limit": rows.limit, "key": rows.key, "round": rows.round, "per_row": per_row}
    sent = builder.send(rows.device, slots=slots, **told, **of_rows)
    causal = facts.window_causal if window else None
    tokens, visible = _add_trees(rows, sent, int(nodes.max(initial=0)) + 1, depths, causal)
    return builder.plan(sent, phases, tokens, visible, texts, feeds_drafter=feeds_drafter)


def unread_masks(facts: Facts) -> int:
    """Masks of a window whose logits are not read (:func:`plan_round`)."""
    return int(facts.token_shift and not facts.draft_shift)


def _add_trees(
    rows: RoundRows, sent: Sent, nodes: int, depths: int, causal_windows: bool | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens (N,) and visibility (R, W, W) of a round, which only the device knows; ``causal_windows`` None: there
    are no windows. Completes the positions, and adds the trees to ``sent``: ``token``, ``parent``, ``depth`` (-1: not
    run) and ``holder`` (count, N + 1), and ``above`` (count, n, n) of the first ``nodes`` (n) nodes, root included.
    """
    kind, owner = sent["kind"], sent["owner"]
    sent["nodes"], sent["windows"], sent["base"], sent["running"] = sent["per_row"].unsqueeze(2)
    sent["token"], sent["parent"] = rows.token, rows.parent
    index = torch.arange(rows.depth.shape[1], device=rows.device)
    depth = sent["depth"] = rows.depth.where(index <= sent["nodes"], -1)
    if causal_windows is not None:
        sent["holder"] = rows.holder * (sent["nodes"] > 0)  # without a node: the root
        owner = owner.where(kind != trees.WINDOW, sent["holder"][sent["slots"]].gather(1, owner))
    at = sent["slot"], owner.flatten()[sent["packed"]]
    sent["positions"] = sent["positions"] + depth[at].clamp_min(0)
    tokens = rows.token[at].where(kind.flatten()[sent["packed"]] == trees.NODE, sent["text"])
    above = sent["above"] = trees.ancestors(rows.parent[:, :nodes], depths)
    return tokens, trees.tree_visibility(kind, owner, above, sent["slots"], bool(causal_windows))


@DECODERS.register("ar", *SCHEMES, **AUTOREGRESSIVE)
class Target(Decoder[RoundRows]):
    """The decoder ``ar``, a round without drafts, and the common part of all decoders with rounds."""

    feeds_drafter = False
    window = 0
    """Masks of a draft window."""

    def __init__(self, setup: DecoderSetup) -> None:
        config, facts = setup.config, setup.facts
        self.config = config
        self.facts = facts
        self.prefill_chunk = setup.prefill_chunk
        self.source = random.source_of(config.random_source, config.seed)
        self.depths = self.most_depths(config, facts)
        self.rows = RoundRows(setup, self.most_nodes(config, facts, setup.slots))
        self.acceptance = Keyed(config, self.source, self.depths)
        self.sound = torch.tensor(True, device=self.rows.device)
        """Whether all logits were numbers."""

    @classmethod
    def most_nodes(cls, config: DecodingConfig, facts: Facts, slots: int) -> int:
        """Maximum nodes of a row's tree with ``slots`` rows in flight."""
        return 0

    @staticmethod
    def most_depths(config: DecodingConfig, facts: Facts) -> int:
        """Maximum depth of a row's tree."""
        return 0

    @property
    def node_queries(self) -> int:
        """Queries of a node: its own and, in un-shifted targets, its verifier. The last token has as many."""
        return 1 if self.facts.token_shift else 2

    @property
    def capacity(self) -> int:
        """Positions that a row may write to in the cache."""
        return self.rows.length + max(self.rows.depth.shape[1] * self.node_queries, self.depths) + self.depths + 1

    @property
    def most_logits(self) -> tuple[int, int]:
        return (self.rows.depth.shape[1],) * 2

    def admitted(self, slot: int) -> None:
        """A request has been admitted to ``slot``."""
        self._enter_round(slot)

    def plan(self) -> Plan:
        """Lay out the next forward of all active rows."""
        chunk, feeds = self.prefill_chunk, self.feeds_drafter
        self._plan = plan_round(self.rows, self.facts, self.depths, chunk, self.window, feeds)
        return self._plan

    # ---- device ----

    def advance(self, logits: torch.Tensor) -> Outcome:
        """Take the wanted logits (M, V) of the planned forward: judge and propose. Reads the device once.

        Raises:
            NumericalError: the logits are not numbers.
        """
        plan = self._plan
        if not len(logits):  # prefill chunks only
            return self._synchronize(None)
        if self.facts.mask_token_id != NO_MASK:
            logits[:, self.facts.mask_token_id] = -torch.inf
        verify, window = logits.split([plan.count("verify"), plan.count("window")])
        path, bonus = self.acceptance.judge(verify, plan)
        tokens = torch.cat([plan.sent["token"].gather(1, path), bonus], dim=1)
        depth = plan.sent["depth"][:, : plan.sent["above"].shape[1]]
        proposed = self._propose(window, path.amax(1, keepdim=True))
        self.sound = self.sound & ~verify.isnan().any()
        return self._synchronize(fetch([self.sound.expand_as(bonus), path, tokens, depth, *proposed]))

    def _propose(self, logits: torch.Tensor, end: torch.Tensor) -> list[torch.Tensor]:
        """Draft the next round from the window ``logits``, given the walks' ``end`` (count, 1); returns columns
        (count, any) for :meth:`_after_round`.
        """
        return []

    # ---- host ----

    def _synchronize(self, read: list[np.ndarray] | None) -> Outcome:
        """Take accepted paths over; move every row to its next round."""
        rows, slots = self.rows, self._plan.request.layout.slots
        outcome = Outcome.zeros(len(slots))
        rows.cached[slots] += self._plan.request.keep
        for row, slot in enumerate(slots.tolist()):
            rows.progress[slot].forwards[KIND_OF_PHASE[rows.phase[slot]]] += 1
            if rows.phase[slot] != PREFILL:
                assert read is not None
                sound, path, tokens, depth, *proposed = (table[slot] for table in read)
                if not sound[0]:
                    raise NumericalError
                path = path[path > 0] - 1
                outcome.path[row], outcome.kept[row] = path, len(path)
                fresh = [*tokens[1 : 1 + len(path)].tolist(), int(tokens[-1])]
                rows.cached[slot] += len(path)
                rows.record(slot, fresh, depth, self.facts.mask_token_id)
                stops = rows.extend(slot, fresh, self.config.stop_token_ids)
                rows.complete[slot] = stops or len(rows.tokens[slot]) >= rows.limit[slot]
                rows.round[slot] += 1
                self._after_round(slot, len(path), proposed)
            if not rows.complete[slot]:
                self._enter_round(slot)
        return outcome

    def _after_round(self, slot: int, accepted: int, proposed: list[np.ndarray]) -> None:
        """Row ``slot`` has ended a round with so many tokens accepted; ``proposed`` are its entries of the columns."""
        self.rows.nodes[slot] = 0

    def _enter_round(self, slot: int) -> None:
        """Run a round next, or first a chunk of a long prompt."""
        rows = self.rows
        left = len(rows.tokens[slot]) - rows.cached[slot]
        rows.phase[slot] = PREFILL if left > self.prefill_chunk else VERIFY if rows.nodes[slot] else DRAFT
