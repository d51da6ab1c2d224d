"""Pipelined block denoising (D2F, arXiv 2508.09192): several blocks of a sequence are decoded at once.

An iteration of a row:

1. open    the next block, once the last one is decided far enough
2. draft   tokens and their confidence at every mask of every open block; decided blocks in front of them are committed
           by the same forward
3. decide  every confident token; where there is none in a block that may be forced on, the best one

A block sees the prompt and every block up to itself. Once a stop token is decided no further block opens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from s2d2_lmeval.decoding import reference
from s2d2_lmeval.decoding.blocks.remasking import ranks
from s2d2_lmeval.decoding.decoder import Decided, Decoder, DecoderSetup
from s2d2_lmeval.decoding.generation import DENOISED, HIGH_CONFIDENCE, NOTHING
from s2d2_lmeval.decoding.options.blocks import BlockOption, ConfidenceOption, ScheduleOption
from s2d2_lmeval.decoding.options.general import LogprobsOption
from s2d2_lmeval.decoding.options.pipelined import PipelinedOptions
from s2d2_lmeval.decoding.passes import Cells, Plan, Sent
from s2d2_lmeval.decoding.pipelined.planning import plan_pipeline
from s2d2_lmeval.decoding.pipelined.rows import PipelineRows
from s2d2_lmeval.decoding.sampling import laws, random
from s2d2_lmeval.decoding.sampling.filters import filtered
from s2d2_lmeval.decoding.state import KIND_OF_PHASE, VERIFY
from s2d2_lmeval.decoding.steps import Decisions, as_step, cut, narrow, pack, steps_of
from s2d2_lmeval.errors import ConfigError, NumericalError
from s2d2_lmeval.registry import DECODERS
from s2d2_lmeval.runtime.graphs import numbers
from s2d2_lmeval.runtime.visibility import by_reach, with_group


@dataclass(frozen=True)
class Reads:
    """Where logits (M,) belong: ``slots`` and ``places`` of the window, ``generated`` in a table (count, G + 1) and
    ``cells`` in one of the window (count, W).
    """

    slots: torch.Tensor
    places: torch.Tensor
    generated: torch.Tensor
    cells: torch.Tensor

    @property
    def index(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As an index into the window."""
        return self.slots, self.places


OPEN_BLOCKS = 4
"""Blocks of a row that memory is planned for; more are seldom open at once."""


@DECODERS.register(
    "pipelined",
    "pipelined",
    promise="the definition of pipelined block denoising (D2F)",
    options=(ScheduleOption, BlockOption, ConfidenceOption, PipelinedOptions, LogprobsOption),
    plain=True,
)
class PipelinedDenoiser(Decoder[PipelineRows]):
    """The decoder ``pipelined``. The window of a row is what is undecided of it, tables (count, W)
    (:func:`~s2d2_lmeval.decoding.pipelined.planning.window_tables`).
    """

    verifies = False
    """Whether a verifier may look at a draft before it is decided."""

    def __init__(self, setup: DecoderSetup) -> None:
        config, facts = setup.config, setup.facts
        if config.schedule == "lookahead":
            raise ConfigError("schedule=lookahead commits token-causally, which pipelined blocks are not; use fused.")
        self.config = config
        self.token_shift = facts.token_shift
        self.prefill_chunk = setup.prefill_chunk
        self.source = random.source_of(config.random_source, config.seed)
        self.rows = rows = PipelineRows(setup)
        rows.published_order = partial(
            reference.order_of_pipelines, block_length=rows.block_length, verifies=self.verifies
        )
        # The latest draft at every generated place; the last column takes what belongs nowhere.
        shape, tables = (rows.count, rows.places + 1), setup.tables
        self.tokens = tables.full("tokens", shape)
        self.confidence, self.score = (tables.full(name, shape, 0, setup.dtype) for name in ("confidence", "score"))
        self.law_size = laws.entry_size(config)
        self.law = tables.full("law", (*shape, self.law_size), 0, torch.double)
        self.sound = tables.full("sound", (), True, torch.bool)
        # Token shift: logits of the place after the keys, which the last forward that committed has given.
        kept = (rows.count, facts.vocab_size * facts.token_shift)
        self.kept_logits = tables.full("kept_logits", kept, 0, setup.dtype)
        self.steady = tables.keep

    @property
    def capacity(self) -> int:
        return self.rows.length

    @property
    def most_logits(self) -> tuple[int, int]:
        # A draft's logits wait for its verification.
        places = min(self.rows.places, OPEN_BLOCKS * self.rows.block_length)
        return (1 + self.verifies) * places, places

    def admitted(self, slot: int) -> None:
        self.rows.begin_iteration(np.array([slot]), self.config)

    def plan(self) -> Plan:
        """Lay out the next forward.

        A prompt sees all of itself, so it cannot be split; a long one does not share its forward with other phases,
        which would be padded to its width.
        """
        rows, slots = self.rows, self.rows.active()
        long = (rows.cached[slots] == 0) & (rows.prompt[slots] > self.prefill_chunk)
        if long.any() and not long.all():
            verifying = rows.phase[slots] == VERIFY
            slots = slots[verifying if verifying.any() else long]
        self._plan = plan_pipeline(rows, self.config, self.token_shift, slots, self.steady)
        return self._plan

    # ---- device ----

    def assemble(self, sent: Sent) -> tuple[torch.Tensor, torch.Tensor]:
        visible = by_reach(sent["rank"], sent["reach"])
        visible = with_group(visible, sent["group"]) if self.config.target_block_size > 1 else visible
        return sent["tokens"], visible

    def decide(self, sent: Sent, logits: torch.Tensor) -> Decided:
        mask, self._sent = self.rows.mask_token_id, sent
        sent.update({name: sent[name].bool() for name in ("open", "forced", "stalled", "drafting", "verifying")})
        verify_kept, draft_kept, saves = sent.fixed
        if self.config.suppress_mask_token:
            logits[:, mask] = -torch.inf
        else:
            # Else a model that keeps predicting the mask would loop forever.
            logits[:, mask].masked_fill_(sent["stalled"][sent["read_slot"]], -torch.inf)
        verify, self._verify_at = self._with_kept("verify", logits, verify_kept)
        if saves:
            self.kept_logits[sent["save_slot"]] = logits[sent["save"]]
        draft, self._draft_at = self._with_kept("draft", logits, draft_kept)
        decisions = Decisions(sent["block"], mask)
        if len(draft):
            self._observe(draft)
        span = self._decide(decisions, verify, draft)
        tables = decisions.tables(self._of(self.tokens), self._laws(decisions, verify))
        told = (table for table in tables if table is not None)
        return Decided(pack([span, self.sound.expand_as(sent["key"]), *told]))

    def _with_kept(self, name: str, logits: torch.Tensor, kept: int) -> tuple[torch.Tensor, Reads]:
        """A group's logits, after those that were ``kept`` from an earlier forward if there are any."""
        sent, nowhere = self._sent, self.rows.places
        (slots, places), cells, part = sent.at(name), sent.cells(name), sent.part(name)
        generated = sent["generated"][part].where(cells < sent["column"].numel(), nowhere)
        if not kept:
            return logits[part], Reads(slots, places, generated, cells)
        rows = sent[f"{name}_kept"]
        first = self.kept_logits[rows]
        first[:, self.rows.mask_token_id].masked_fill_(sent["stalled"][rows], -torch.inf)
        reads = (rows, slots), (torch.zeros_like(rows), places), (sent[f"{name}_kept_at"], generated)
        return torch.cat([first, logits[part]]), Reads(*map(torch.cat, (*reads, (rows * sent.places, cells))))

    def _of(self, table: torch.Tensor) -> torch.Tensor:
        """The window (count, W, ...) of a table (count, G + 1, ...)."""
        column = self._sent["column"]
        if table.ndim > 2:
            column = column.unsqueeze(-1).expand(*column.shape, table.shape[2])
        return table.gather(1, column)

    def _window(self, reads: Reads, values: torch.Tensor, fill: int = 0) -> torch.Tensor:
        """A table (count, W) of the ``values`` (M,) that ``reads`` gave."""
        like = self._sent["column"]
        return Cells(values.new_full((like.numel() + 1,), fill), like.shape[1]).put(reads.cells, values)

    def _draws(self, purpose: int) -> random.Key:
        """Names draws at every place of the window: a place is drawn at most once per purpose and iteration."""
        sent = self._sent
        return random.Key(purpose, sent["key"], sent["position"], sent["step"])

    def _observe(self, logits: torch.Tensor) -> None:
        """Draft a token at every mask of the drafting rows: its probability, and the score by which it is ranked."""
        config, at = self.config, self._draft_at
        kept = filtered(logits, config) if config.sampled or config.nucleus_first else logits
        law = kept.softmax(-1)
        tokens = self._drawn(law, self._draws(random.DRAFT).take(at.index)) if config.sampled else logits.argmax(-1)
        confidence = score = law.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        if config.neg_entropy:
            score = (law * (law + 1e-10).log()).sum(-1)
        elif config.margin_confidence:
            first, second = law.topk(2, dim=-1).values.unbind(-1)
            score = first - second
        self.sound.logical_and_(~confidence.isnan().any())
        for table, values in ((self.tokens, tokens), (self.confidence, confidence), (self.score, score)):
            table.view(-1).index_copy_(0, at.generated, values)
        if self.law_size:
            self.law.flatten(0, 1).index_copy_(0, at.generated, laws.entries(kept, tokens, self.law_size))

    def _drawn(self, law: torch.Tensor, key: random.Key) -> torch.Tensor:
        if self.verifies or self.config.keyed:
            return self.source.categorical(law, key)
        # Without a verifier, published code draws block by block.
        parts = numbers(len(law), law.device).split(self._plan.known["groups"].tolist())
        return torch.cat([self.source.categorical(law[part], key.take((part,))) for part in parts])

    def _decide(self, decisions: Decisions, verify: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
        """Decide tokens in the rows whose iteration ends here; the span (count, W) that goes on to the verifier."""
        tokens, masks = self._of(self.tokens), decisions.masks
        high = masks & (self._of(self.confidence) > self.config.confidence_threshold)
        best = self._ranks(self._of(self.score), masks) == 0
        unsure = ~self._per_block(high).any(-1, keepdim=True)
        forced = masks & self._sent["forced"] & (self._per_block(best) & unsure).view(best.shape)
        decisions.decide(high, tokens, HIGH_CONFIDENCE)
        decisions.decide(forced, tokens, DENOISED)
        return torch.zeros_like(masks)

    def _laws(self, decisions: Decisions, verify: torch.Tensor) -> torch.Tensor | None:
        """(count, W, size) entries of the decided tokens under the laws that decided them, if they are kept."""
        return self._of(self.law) if self.law_size else None

    def _per_block(self, table: torch.Tensor) -> torch.Tensor:
        """(count, W) as (count, W / B, B): windows begin with a block."""
        return table.view(table.shape[0], -1, self.rows.block_length)

    def _ranks(self, scores: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
        """Rank (count, W) of each place by descending ``scores`` within its block."""
        return ranks(self._per_block(scores), self._per_block(among)).view(scores.shape)

    # ---- host ----

    def settle(self, table: np.ndarray | None) -> np.ndarray:
        """Bring the host's mirror up to date and move every row of the pass on."""
        assert table is not None
        rows, slots, width = self.rows, self._plan.layout.slots, self._plan.places
        # The steps that are recorded outlive the table, which the next step overwrites.
        spans, sound, tables = cut(table.copy(), (width, width + 1))
        if not sound.all():
            raise NumericalError
        rows.cached[slots] += self._plan.keep
        steps, over, widths = steps_of(tables, width), [], (rows.end - rows.base).tolist()
        for slot in slots.tolist():
            progress, base, kind = rows.progress[slot], int(rows.base[slot]), KIND_OF_PHASE[rows.phase[slot]]
            window, span = slice(base, base + widths[slot]), spans[slot, : widths[slot]].astype(bool)
            step = narrow(steps, widths[slot])
            progress.forwards[kind] += 1
            make = partial(as_step, step, slot, kind, int(rows.prompt[slot]) + base, rows.span[slot, window].copy())
            progress.record(make, verified=kind == "verify")
            after = step.after[slot]
            rows.write(slot, base, after, np.where(after == rows.mask_token_id, step.draft[slot], after))
            rows.span[slot, window] = span
            progress.drafts += self.verifies and kind == "draft"
            if span.any():
                progress.routed_drafts += 1
                rows.phase[slot] = VERIFY
            else:
                over.append(slot)
                rows.end_iteration(slot, step.after[slot][step.marks[slot] != NOTHING], self.config)
        if over:
            rows.begin_iteration(np.array(over), self.config)
        for slot in over:
            rows.complete_if_over(slot, self.config)
        return np.zeros_like(slots)
