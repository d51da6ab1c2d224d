"""Block denoising: draft every mask of the block, decide some of them, repeat (SDAR and its remasking strategies).

One object decodes all rows in flight. :meth:`BlockDenoiser.plan` says what to forward, :meth:`BlockDenoiser.advance`
takes the logits. A step of a row:

1. draft   tokens and their confidence at every mask of the block
2. choose  by the remasking strategy which masks to decide
3. decide  write them into the block; a finished block is committed and the next begins
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from s2d2_lmeval.decoding import random
from s2d2_lmeval.decoding.config import DecodingConfig
from s2d2_lmeval.decoding.generation import DENOISED, NOTHING
from s2d2_lmeval.decoding.planning import BlockPlan, plan_blocks
from s2d2_lmeval.decoding.readback import Outcome, Readback
from s2d2_lmeval.decoding.remasking import choose
from s2d2_lmeval.decoding.rows import COMMIT, DRAFT, KIND_OF_PHASE, PREFILL, VERIFY, Rows
from s2d2_lmeval.decoding.sampling import draft_tokens
from s2d2_lmeval.errors import NumericalError


@dataclass
class Draft:
    """The latest draft of every row (rows, B): tokens, their confidence, and the entropy (nats) of their distribution
    if it is needed.

    ``sound`` is false once logits were no numbers.
    """

    tokens: torch.Tensor
    confidence: torch.Tensor
    entropy: torch.Tensor
    sound: torch.Tensor

    @classmethod
    def empty(cls, shape: tuple[int, int], device: torch.device) -> Draft:
        """Before the first draft."""
        zeros = torch.zeros(shape, device=device)
        return cls(zeros.long(), zeros, zeros, torch.ones((), dtype=torch.bool, device=device))


@dataclass
class Decisions:
    """What one step decides, (rows, B): ``block`` and ``masks`` after it, ``marks`` and the ``order`` within equal
    marks.

    ``finished`` (rows,) rows whose step is complete; ``verify`` (rows, B) the span that goes on to the verifier
    instead.
    """

    block: torch.Tensor
    masks: torch.Tensor
    marks: torch.Tensor
    order: torch.Tensor
    verify: torch.Tensor
    finished: torch.Tensor

    @classmethod
    def begin(cls, block: torch.Tensor, mask_token_id: int, finished: torch.Tensor) -> Decisions:
        """Nothing decided yet in ``block``."""
        masks = block == mask_token_id
        nothing = torch.full_like(block, NOTHING)
        return cls(block, masks, nothing, nothing, torch.zeros_like(masks), finished)

    def decide(self, places: torch.Tensor, tokens: torch.Tensor, mark: int, order: torch.Tensor | None = None) -> None:
        """Write ``tokens`` at ``places``."""
        self.block = torch.where(places, tokens, self.block)
        self.masks = self.masks & ~places
        self.marks = self.marks.masked_fill(places, mark)
        if order is not None:
            self.order = torch.where(places, order, self.order)


class BlockDenoiser:
    """The decoders ``sequential``, ``static``, ``dynamic``, ``entropy_bounded`` and, at block length one, ``ar``."""

    verifies = False
    """Whether a verifier may look at a draft before it is decided."""

    def __init__(self, config: DecodingConfig, rows: Rows, prefill_chunk: int) -> None:
        self.config = config
        self.rows = rows
        self.prefill_chunk = prefill_chunk
        self.source = random.source_of(config.random_source, config.seed)
        self.draft = Draft.empty((rows.count, rows.block_length), rows.device)
        # The published code draws for every place of the block, decided ones too; its collapsed entropy sums over all
        # of them.
        self.read_whole_block = (self.source.sequential and config.sampled) or config.collapse_entropy
        self.verify_all_masks = False

    @staticmethod
    def margin(block_length: int) -> int:
        """How far a pass may write behind the last block."""
        return block_length

    def admitted(self, slot: int) -> None:
        """A request has been seated in ``slot``."""
        self._enter_draft(slot)

    def plan(self) -> BlockPlan:
        """Lay out the next forward of all active rows."""
        self._plan = plan_blocks(self.rows, self.config, self.prefill_chunk)
        return self._plan

    def advance(self, logits: torch.Tensor) -> Outcome:
        """Take the wanted logits (M, V) of the planned forward; move every row to its next phase. Reads the device
        once.

        :raises NumericalError: when the logits are not numbers.
        """
        plan, rows = self._plan, self.rows
        if self.config.suppress_mask_token:
            logits[:, rows.mask_token_id] = -torch.inf
        before = rows.store.view(-1)[plan.facts["block"]]
        if plan.drafts:
            self._observe(logits[: plan.drafts], plan)
        step = Decisions.begin(before, rows.mask_token_id, finished=plan.draft_rows | plan.verify_rows)
        self._step(step, logits, plan)
        filled = torch.where(step.masks, self.draft.tokens, step.block)
        drafted = torch.where(before == rows.mask_token_id, self.draft.tokens, before)
        rows.store.view(-1)[plan.facts["block"]] = step.block
        rows.store[:, rows.length : -1] = filled
        tables = [before, drafted, step.block, step.marks, step.order, step.verify]
        return self._settle(Readback.read(tables, self.draft.sound))

    def _observe(self, logits: torch.Tensor, plan: BlockPlan) -> None:
        """Draft a token at every wanted place."""
        draft = self.draft
        key = self._key(random.DRAFT, plan).take(plan.draft_at)
        tokens, confidence = draft_tokens(logits, self.config, self.source, key)
        draft.tokens = draft.tokens.index_put(plan.draft_at, tokens)
        draft.confidence = draft.confidence.to(confidence.dtype).index_put(plan.draft_at, confidence)
        draft.sound = ~confidence.isnan().any()
        if self.config.strategy == "entropy_bounded" and not self.config.collapse_entropy:
            log_p = logits.log_softmax(-1)
            entropy = -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(-1)
            draft.entropy = draft.entropy.to(entropy.dtype).index_put(plan.draft_at, entropy)

    def _step(self, step: Decisions, logits: torch.Tensor, plan: BlockPlan) -> None:
        """Decide tokens in every drafting row."""
        self._denoise(step, plan.facts["count"], plan)

    def _denoise(self, step: Decisions, count: torch.Tensor, plan: BlockPlan) -> None:
        """Decide by the remasking strategy ``count`` (rows,) tokens or more."""
        config = self.config
        chosen, order = choose(
            config.strategy,
            step.masks,
            count * step.finished,
            self.draft.confidence,
            self.draft.entropy,
            config.confidence_threshold,
            config.eb_threshold,
            collapse_entropy=config.collapse_entropy,
            at_most_count=self.verifies,
        )
        step.decide(chosen, self.draft.tokens, DENOISED, order)

    def _key(self, purpose: int, plan: BlockPlan) -> random.Key:
        """Names draws at every place (rows, B): a place is drawn at most once per purpose and step."""
        return random.Key(purpose, plan.facts["key"], plan.facts["position"], plan.facts["step"])

    def _settle(self, read: Readback) -> Outcome:
        """Bring the host's mirror up to date and move every active row to its next phase."""
        rows, slots = self.rows, self._plan.request.layout.slots
        if not read.sound:
            raise NumericalError(
                "The model answered with logits that are not numbers (NaN or infinite). "
                "Check the checkpoint, or load it with dtype=float32."
            )
        outcome = read.outcome(rows, slots)
        rows.cached[slots] += self._plan.request.keep
        for slot in slots.tolist():
            phase = rows.phase[slot]
            rows.progress[slot].forwards[KIND_OF_PHASE[phase]] += 1
            if phase == PREFILL:
                self._enter_draft(slot)
            elif phase == COMMIT:
                self._next_block(slot)
            else:
                read.record(rows, slot, negate_denoised=self.verifies)
                rows.block[slot] = read.after[slot]
                self._after_step(slot, read)
        return outcome

    def _after_step(self, slot: int, read: Readback) -> None:
        """A draft or a verification of row ``slot`` is over."""
        rows = self.rows
        if read.span[slot].any():
            rows.phase[slot] = VERIFY
            rows.span[slot] = read.span[slot]
            rows.wanted[slot] = rows.masks[slot] if self.verify_all_masks else read.span[slot]
            return
        rows.step[slot] += 1
        if rows.masks[slot].any():
            self._enter_draft(slot)
            return
        rows.end_block(slot, self.config.stop_token_ids)
        if self.config.schedule == "reference":
            rows.phase[slot] = COMMIT
        else:
            self._next_block(slot)

    def _next_block(self, slot: int) -> None:
        """Turn to the next block, or be complete."""
        rows = self.rows
        if rows.ended[slot]:
            rows.complete[slot] = True
            return
        rows.begin_block(slot, int(rows.start[slot]) + rows.block_length)
        self._enter_draft(slot)

    def _enter_draft(self, slot: int) -> None:
        """Draft next, or first run what has to be in the cache and cannot ride along."""
        rows = self.rows
        waiting = rows.start[slot] - rows.cached[slot]
        rides = waiting == 0 or (
            self.config.schedule == "fused" and waiting <= max(self.prefill_chunk, rows.block_length)
        )
        rows.phase[slot] = DRAFT if rides else PREFILL
        rows.wanted[slot] = True if self.read_whole_block else rows.masks[slot]
