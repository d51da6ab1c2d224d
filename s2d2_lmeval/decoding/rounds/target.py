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

Trees are grown on the device and stay there; the host knows how many nodes and windows each row has. Trees that the
host drafts (:mod:`~s2d2_lmeval.decoding.rounds.lookup`) go up with the plan.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch

from s2d2_lmeval.decoding.decoder import AUTOREGRESSIVE, Decided, Decoder, DecoderSetup
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.options.option import SCHEMES
from s2d2_lmeval.decoding.passes import Cells, PassBuilder, Plan, Segment, Sent
from s2d2_lmeval.decoding.rounds import trees
from s2d2_lmeval.decoding.rounds.acceptance import Keyed
from s2d2_lmeval.decoding.rounds.hints import Hints
from s2d2_lmeval.decoding.rounds.rows import RoundRows
from s2d2_lmeval.decoding.sampling import laws, random
from s2d2_lmeval.decoding.sampling.filters import filtered
from s2d2_lmeval.decoding.state import DRAFT, KIND_OF_PHASE, PREFILL, VERIFY
from s2d2_lmeval.decoding.steps import cut, pack
from s2d2_lmeval.errors import NumericalError
from s2d2_lmeval.families.facts import NO_MASK
from s2d2_lmeval.registry import DECODERS
from s2d2_lmeval.runtime.costs import MeasureCosts
from s2d2_lmeval.runtime.graphs import numbers
from s2d2_lmeval.runtime.passes import ragged
from s2d2_lmeval.runtime.visibility import NOBODY as UNSEEN

if TYPE_CHECKING:
    from s2d2_lmeval.families import Facts
    from s2d2_lmeval.families.facts import DraftAdapter


def plan_round(
    rows: RoundRows, facts: Facts, depths: int, prefill_chunk: int, window: int, seeds: bool, feeds_drafter: bool
) -> Plan:
    """Lay out the target's next forward of all active rows. A row's segments, in this order:

    text       the tokens without keys: a chunk of the prompt, later the last round's bonus token
    nodes      the drafted tokens, a tree at most ``depths`` deep; siblings share a position
    verifiers  un-shifted targets only: for the root and every node a mask at the position after it, which sees the path
               down to it; in shifted targets the node itself (for the root the last text token) predicts what follows
    windows    per node with a window, masks that see its path and each other (earlier ones only, if the facts say so),
               whose ``window`` logits are a draft of the tokens after the target's choice there. Where shifted targets
               have masks that predict their own token, one more comes first, in the place of that choice, unread; and
               before all, with ``seeds``, a copy of the node among them, which they see in its place

    Reads ``verify`` (the root, then the nodes) and ``window``. Tells of every row (count,) ``length``, ``limit``,
    ``key``, ``round``, and ``per_row`` (4, count) the nodes and windows it runs, the first of its window logits, and
    whether it runs a round.
    """
    slots, lengths, shifted = rows.active(), rows.lengths(), facts.token_shift
    phases, cached, length = rows.phase[slots], rows.cached[slots], lengths[slots]
    begun = phases != PREFILL
    texts = np.where(begun, length - cached, np.minimum(length - cached, prefill_chunk))
    nodes, windows = rows.nodes[slots] * begun, rows.windows[slots] * begun * (window > 0)

    builder = PassBuilder(slots)
    spans = zip(slots.tolist(), cached.tolist(), (cached + texts).tolist(), strict=True)
    pieces = [rows.tokens[slot][begin:end] for slot, begin, end in spans]
    text = builder.span(cached, texts)
    text.set(text=np.concatenate(pieces), kind=trees.TEXT, rank=text.local)
    drafted = builder.add(nodes)
    drafted.set(position=length[drafted.row] - 1, kind=trees.NODE, owner=drafted.local + 1)
    read_row, read_node, _ = ragged((nodes + 1) * begun)
    if not shifted:
        builder.add((nodes + 1) * begun).set(position=length[read_row], kind=trees.VERIFIER, owner=read_node)
    masks, ahead = add_windows(builder, rows, facts, windows, window, seeds)
    masks.set(position=length[masks.row] + ahead + (not shifted))
    first = builder.lay_out().offsets + texts + (-1 if shifted else nodes)
    builder.read("verify", read_row, read_node, first[read_row] + read_node)
    drafting = ahead >= unread_masks(facts)
    builder.read("window", masks.row[drafting], np.zeros_like(masks.row[drafting]), masks.query[drafting])
    per_row = np.zeros((4, rows.count), dtype=np.int64)
    base = builder.groups["window"].start + (windows.cumsum() - windows) * window
    per_row[:, slots] = nodes, windows, base, begun
    told = rows.told()
    queries = {"slot": slots[builder.layout.row_of], "text": builder.column("text", facts.mask_token_id)}
    if facts.draft_adapter is not None and len(masks.row):
        queries["gated"] = builder.column("gated")
    return builder.plan(
        phases,
        texts,
        rows.most_nodes + 1,
        queries=queries,
        tables={"kind": (0, trees.NOBODY), "owner": (0, 0), "rank": (UNSEEN, UNSEEN)},
        rows={"length": lengths, "per_row": per_row, **told},
        moves=feeds_drafter or bool(depths),
        feeds_drafter=feeds_drafter,
        fixed=(rows.room_for(int(nodes.max(initial=0)) + 1), told["written"].shape[2]),
    )


def add_windows(
    builder: PassBuilder, rows: RoundRows, facts: Facts, count: np.ndarray, window: int, seeds: bool
) -> tuple[Segment, np.ndarray]:
    """The windows of :func:`plan_round`, ``count`` (R,) of each row, without positions; and how many places each query
    (K,) is after the first mask.
    """
    slots, width = builder.slots, window + unread_masks(facts) + seeds
    queries = builder.add(count * width)
    row, (of_window, ahead) = queries.row, np.divmod(queries.local, max(width, 1))
    queries.set(kind=trees.WINDOW, owner=of_window)
    if facts.draft_adapter is not None:
        drawn = (rows.key[slots][row], rows.round[slots][row], of_window, ahead)
        queries.set(gated=1 + ahead, text=masks_of(facts.draft_adapter, facts.mask_token_id, drawn))
    if seeds:
        copies, last = ahead == 0, np.array([rows.tokens[slot][-1] for slot in slots])  # the device knows other nodes
        queries.set(kind=np.where(copies, trees.SEED, trees.WINDOW))
        queries.set(text=np.where(copies, last[row], facts.mask_token_id))
        ahead = ahead - 1 - copies * (not facts.token_shift)
    return queries, ahead


def masks_of(adapter: DraftAdapter, mask_token_id: int, drawn: tuple[np.ndarray, ...]) -> np.ndarray | int:
    """What stands for masks, each (K,) of a key, round, window and place: tokens of the adapter's noise, or the mask
    token; any token where the adapter has vectors.
    """
    return max(mask_token_id, 0) if adapter.noise is None else random.noise_tokens(drawn, *adapter.noise)


def unread_masks(facts: Facts) -> int:
    """Masks of a window whose logits are not read (:func:`plan_round`)."""
    return int(facts.token_shift and not facts.draft_shift)


def assemble_round(
    rows: RoundRows, sent: Sent, depths: int, causal_windows: bool | None, seeds: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens (N,) and visibility (R, W, W) of a round, which only the device knows; ``causal_windows`` None: there
    are no windows; ``seeds`` as in :func:`plan_round`. Completes the positions, and adds the trees to ``sent``:
    ``token``, ``parent``, ``depth`` (-1: not run) and ``holder`` (count, N + 1), and ``above`` (count, n, n) of the
    first n nodes, including the root.
    """
    kind, owner, packed = sent["kind"], sent["owner"], sent["packed"]
    sent["nodes"], sent["windows"], sent["base"], sent["running"] = sent["per_row"].unsqueeze(2)
    sent["token"], sent["parent"] = rows.token, rows.parent
    if sent.fixed[1]:
        *trees_written, written = sent["written"]
        for table, told in zip((rows.token, rows.parent, rows.depth), trees_written, strict=True):
            of_nodes = table[:, : sent.fixed[1]]
            of_nodes.copy_(told.where(written > 0, of_nodes))
    index = numbers(rows.depth.shape[1], rows.device)
    depth = sent["depth"] = rows.depth.where(index <= sent["nodes"], -1)
    if causal_windows is not None:
        sent["holder"] = rows.holder * (sent["nodes"] > 0)  # without a node: the root
        owner = sent["holder"][sent["slots"]].gather(1, owner).where(trees.of_windows(kind, seeds), owner)
    if sent.fixed[0] > 1:  # otherwise no row runs a node
        at, of_query = (sent["slot"], owner.flatten()[packed]), kind.flatten()[packed]
        sent["positions"] = sent["positions"] + depth[at].clamp_min(0)
        of_tree = of_query == trees.NODE
        if seeds:
            of_tree |= (of_query == trees.SEED) & (at[1] > 0)
        sent["text"] = rows.token[at].where(of_tree, sent["text"])
    above = sent["above"] = trees.ancestors(rows.parent[:, : sent.fixed[0]], depths)
    return sent["text"], trees.tree_visibility(sent["rank"], kind, owner, above, sent["slots"], causal_windows, seeds)


@DECODERS.register("ar", *SCHEMES, **AUTOREGRESSIVE)
class Target(Decoder[RoundRows]):
    """The decoder ``ar``, a round without drafts, and the common part of all decoders with rounds."""

    feeds_drafter = False
    window = 0
    """Masks of a draft window that are read."""
    seeds = False
    """Whether a window has a copy of its node."""

    def __init__(self, setup: DecoderSetup) -> None:
        config, facts = setup.config, setup.facts
        self.config = config
        self.facts = facts
        self.prefill_chunk = setup.prefill_chunk
        self.source = random.source_of(config.random_source, config.seed)
        self.tables = setup.tables
        self.depths = self.most_depths(config, facts)
        self.rows = RoundRows(setup, self.most_nodes(config, facts, setup.slots))
        self.acceptance = Keyed(config, self.source, self.depths)
        self.law_size = laws.entry_size(config)
        self.hints: Hints | None = None
        """What its trees go by beside drafts, if they do."""
        self.sound = setup.tables.full("sound", (), True, torch.bool)
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
        return self.rows.length + max((self.rows.most_nodes + 1) * self.node_queries, self.depths) + self.depths + 1

    def calibrate_costs(self, measure_costs: MeasureCosts) -> None:
        self.rows.make_room()
        choices = min(self.acceptance.choices, self.facts.vocab_size)
        self.beams = trees.beams_of(self.window or self.depths, choices, self.rows.most_nodes, self.tables.put)

    @property
    def most_logits(self) -> tuple[int, int]:
        return (self.rows.most_nodes + 1,) * 2

    def admitted(self, slot: int) -> None:
        """A request has been admitted to ``slot``."""
        if self.hints is not None:
            self.hints.known[slot] = 0
        self._enter_round(np.array([slot]))

    def plan(self) -> Plan:
        """Lay out the next forward of all active rows."""
        kind = self.window, self.seeds, self.feeds_drafter
        self._plan = self._hinted(plan_round(self.rows, self.facts, self.depths, self.prefill_chunk, *kind))
        return self._plan

    def _hinted(self, plan: Plan) -> Plan:
        """The ``plan``, which also tells the device what its hints learn from."""
        return plan if self.hints is None else plan.tell(**self.hints.told(self.rows))

    # ---- device ----

    def assemble(self, sent: Sent) -> tuple[torch.Tensor, torch.Tensor]:
        causal = self.facts.window_causal if self.window else None
        return assemble_round(self.rows, sent, self.depths, causal, self.seeds)

    def decide(self, sent: Sent, logits: torch.Tensor) -> Decided:
        if self.hints is not None:
            self.hints.read(sent["fresh"])
        if not sent.present:  # prefill chunks only
            return Decided(None)
        self._sent = sent
        if self.facts.mask_token_id != NO_MASK:
            logits[:, self.facts.mask_token_id] = -torch.inf
        verify, window = logits[sent.part("verify")], logits[sent.part("window")]
        path, bonus = self.acceptance.judge(verify, sent)
        tokens = torch.cat([sent["token"].gather(1, path), bonus], dim=1)
        depth = sent["depth"][:, : sent["above"].shape[1]]
        if self.hints is not None:
            self.hints.decided(sent, path, tokens)
        proposed = self._propose(window, path.amax(1, keepdim=True))
        self.sound.logical_and_(~verify.isnan().any())
        kept = [self._laws(verify, path, tokens)] if self.law_size else []
        return Decided(pack([self.sound.expand_as(bonus), path, tokens, depth, *kept, *proposed]), path[:, 1:] - 1)

    def _laws(self, logits: torch.Tensor, path: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The entries (count, (1 + D) * size) of the tokens that a walk down ``path`` decides, in the target's law: of
        the nodes after the root, among its ``tokens`` (count, 2 + D), and of the bonus token, which is the last.
        """
        law, cells = filtered(logits, self.config), self._sent.cells("verify")
        row_of = Cells.like(self._sent["token"]).put(cells, numbers(len(law), law.device)).gather(1, path)
        last = numbers(path.shape[1], path.device) >= (path > 0).sum(1, keepdim=True)
        decided = tokens[:, 1:].where(~last, tokens[:, -1:])
        return laws.as_bits(laws.entries(law, decided, self.law_size, row_of))

    def _propose(self, logits: torch.Tensor, end: torch.Tensor) -> list[torch.Tensor]:
        """Draft the next round from the window ``logits``, given the walks' ``end`` (count, 1); returns columns
        (count, any) for :meth:`_after_round`.
        """
        return []

    # ---- host ----

    def settle(self, table: np.ndarray | None) -> np.ndarray:
        """Take accepted paths over; move every row to its next round."""
        rows, plan = self.rows, self._plan
        slots, running = plan.layout.slots, plan.phases != PREFILL
        kept = np.zeros(len(slots), dtype=np.int64)
        rows.cached[slots] += plan.keep
        for slot, phase in zip(slots.tolist(), plan.phases.tolist(), strict=True):
            rows.progress[slot].forwards[KIND_OF_PHASE[phase]] += 1
        if running.any():
            assert table is not None
            kept[running] = self._end_round(slots[running], table[slots[running]])
        self._enter_round(slots[~rows.complete[slots]])
        return kept

    def _end_round(self, slots: np.ndarray, table: np.ndarray) -> np.ndarray:
        """Take over what the rows ``slots`` (K,) decided, their part (K, C) of the table; how many drafted tokens each
        accepted (K,).
        """
        rows, nodes = self.rows, self._plan.fixed[0]
        long = min(self.depths, nodes - 1) + 1
        ends = accumulate((1, long, long + 1, nodes, long * self.law_size))
        sound, path, tokens, depth, kept, proposed = cut(table, ends)
        if not sound.all():
            raise NumericalError
        accepted, drafted = (path > 0).sum(1), depth > 0
        depths = (one[ran] for one, ran in zip(depth, drafted, strict=True))
        rows.cached[slots] += accepted
        decided = zip(slots.tolist(), accepted.tolist(), tokens.tolist(), depths, kept, strict=True)
        for slot, count, line, offered, bits in decided:
            fresh = [*line[1 : 1 + count], line[-1]]
            of_fresh = laws.as_laws(bits[: len(fresh) * self.law_size], self.law_size)
            rows.record(slot, fresh, offered, self.facts.mask_token_id, of_fresh)
            stops = rows.extend(slot, fresh, self.config.stop_token_ids)
            rows.complete[slot] = stops or len(rows.tokens[slot]) >= rows.limit[slot]
        rows.round[slots] += 1
        self._after_round(slots, accepted, proposed)
        return accepted

    def _after_round(self, slots: np.ndarray, accepted: np.ndarray, proposed: np.ndarray) -> None:
        """The rows ``slots`` (K,) have ended a round, each with so many tokens ``accepted`` (K,); ``proposed`` are
        their entries of the columns.
        """
        self.rows.nodes[slots] = 0

    def _enter_round(self, slots: np.ndarray) -> None:
        """Run a round next in the rows ``slots`` (K,), or first a chunk of a long prompt."""
        rows = self.rows
        left = rows.lengths()[slots] - rows.cached[slots]
        rows.phase[slots] = np.where(left > self.prefill_chunk, PREFILL, np.where(rows.nodes[slots], VERIFY, DRAFT))
