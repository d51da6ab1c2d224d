"""What the independent accounts of all schemes share: one sequence, no cache, forwards that recompute all they see.

The engine is tested against these accounts, so nothing is shared with it: the rules are written out once more, in the
plainest way. Two differences to any practical decoder make them easy to trust. They keep no keys and values; a forward
gets the committed tokens and the window together, under one explicit mask in which every committed row sees what it saw
when it was committed. And randomness is an argument (``Draws``), so that a run can be replayed, fixed or enumerated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from s2d2_lmeval import Generation

from .oracle_inputs import Draws, FixedSource, Options, Result, TorchSource
from .oracle_maths import Context, Router, block_causal, by_confidence, causal, drafts, residual, top, transformed

OptionsT = TypeVar("OptionsT", bound=Options)


class Account(Generic[OptionsT]):
    """One call of ``run`` decodes one prompt. ``model`` is a plain causal language model in eval mode."""

    commits_last_block = True

    def __init__(self, model: Any, options: OptionsT, draws: Draws, mask_id: int) -> None:
        self.options, self.draws, self.mask_id = options, draws, mask_id
        self.context = Context(model, mask_id)
        self.router = Router(options)
        self.block = options.block_length
        self.watch: Callable[[str, list[int], Tensor], None] = lambda kind, tokens, logits: None

    def top(self, count: int, left: list[int], confidence: Tensor) -> list[int]:
        """Among equals those that the published code takes, if draws are made in its order; else the leftmost."""
        published = isinstance(getattr(self.draws, "source", None), TorchSource)
        return top(count, left, confidence) if published else by_confidence(left, confidence)[:count]

    def run(self, prompt: Sequence[int]) -> Result:
        """One block after the other; :meth:`decode_block` says how each is decoded."""
        size, options = self.block, self.options
        blocks = math.ceil((len(prompt) + options.max_new_tokens) / size)
        canvas = list(prompt) + [self.mask_id] * (blocks * size - len(prompt))
        self.result = Result(canvas, len(prompt))
        if not options.max_new_tokens:
            canvas[len(prompt) :] = []
            return self.result
        whole = len(prompt) // size * size
        if whole:
            mask = causal(whole) if options.cache_ver else block_causal(whole, size)
            self.forward("prefill", prompt[:whole], range(whole), mask, keep=True)
        for start in range(whole, blocks * size, size):
            self.decode_block(canvas, start)
            self.result.stopped = self.stopped(canvas[len(prompt) : start + size])
            if self.commits_last_block or not (self.result.stopped or start + size == blocks * size):
                block = canvas[start : start + size]
                self.forward("commit", block, range(start, start + size), self.commit_mask(), keep=True)
            if self.result.stopped:
                break
        return self.result

    def decode_block(self, canvas: list[int], start: int) -> None:
        """Fill the block at ``start``."""
        raise NotImplementedError

    def stopped(self, new: list[int]) -> bool:
        """Whether decoding ends after these new tokens."""
        return any(token in self.options.stop_token_ids for token in new)

    def commit_mask(self) -> Tensor:
        """Who sees whom in a finished block."""
        return causal(self.block) if self.options.cache_ver else torch.ones(self.block, self.block).bool()

    def overdue(self, tokens: Sequence[int]) -> bool:
        """Whether the schedule is over: then the mask is never predicted, or some models would never end."""
        return self.draws.step >= self.options.denoising_steps

    def forward(
        self, kind: str, tokens: Sequence[int], positions: Sequence[int], visible: Tensor, *, keep: bool = False
    ) -> Tensor:
        """Logits (W, V) of a window."""
        self.result.forwards[kind] += 1
        logits = self.context.forward(tokens, positions, visible, keep=keep)
        self.watch(kind, list(tokens), logits)
        if self.options.suppress_mask_token or self.overdue(tokens):
            logits = logits.clone()
            logits[:, self.mask_id] = -math.inf
        return logits

    def sample(self, logits: Tensor, positions: Sequence[int]) -> tuple[list[int], Tensor]:
        """A drafted token for every row of ``logits``, and its probability."""
        law, sampled = drafts(logits, self.options)
        drafted = self.draws.draft(positions, law) if sampled else logits.argmax(-1)
        return drafted.tolist(), law.gather(-1, drafted[:, None])[:, 0]

    # verification

    def ratio(self, target: Tensor, token: int, probability: Tensor) -> Tensor:
        """min(1, (p / q)^tempering), p the verifier's and q the draft's probability of the token."""
        plain = target[token] / probability.clamp_min(1e-12)
        return plain.pow(self.options.ssd_ratio_tempering_factor).clamp_max(1.0)

    def passes(
        self, positions: Sequence[int], tokens: Sequence[int], probabilities: Sequence[Tensor], target: Sequence[Tensor]
    ) -> list[bool]:
        """Whether each token of a span passes, as if everything before it had."""
        if self.options.acceptance == "greedy":
            return [int(law.argmax()) == token for law, token in zip(target, tokens, strict=True)]
        ratios = [self.ratio(*each) for each in zip(target, tokens, probabilities, strict=True)]
        return [bool(u < ratio) for u, ratio in zip(self.draws.accept(positions), ratios, strict=True)]

    def replacement(self, position: int, draft: Tensor, target: Tensor) -> int | None:
        """What takes the place of a rejected token; None where nothing does."""
        if self.options.acceptance == "greedy":
            return int(target.argmax())
        return self.draws.resample(position, residual(draft, target)) if self.options.allow_resample else None

    def walk(
        self, start: int, span: Sequence[int], drafted: Sequence[int], confidence: Tensor, draft: Tensor, target: Tensor
    ) -> tuple[list[int], int | None, int | None]:
        """The accepted prefix of ``span`` (places from ``start`` on), the rejected place if there is one, and what
        replaces it; ``draft`` and ``target`` are the laws at every place.
        """
        positions = [start + i for i in span]
        passes = self.passes(
            positions, [drafted[i] for i in span], [confidence[i] for i in span], [target[i] for i in span]
        )
        reject = passes.index(False) if False in passes else len(span)
        if reject == len(span):
            return list(span), None, None
        i = span[reject]
        return list(span[:reject]), i, self.replacement(start + i, draft[i], target[i])

    def law(self, logits: Tensor) -> Tensor:
        """Probabilities under the sampling options."""
        return transformed(logits, self.options)


def first_run(masked: Sequence[int]) -> list[int]:
    """The first run of neighbours among ``masked`` places."""
    return [i for n, i in enumerate(masked) if i == masked[0] + n]


def assert_agrees(answer: Generation, expected: Result, options: Options, mask_id: int) -> None:
    """The engine's answer is the account's: canvas, tokens, forwards of every kind, decoding order."""
    assert answer.canvas == expected.canvas[: len(answer.canvas)]
    assert set(expected.canvas[len(answer.canvas) :]) <= {mask_id}
    assert answer.token_ids == expected.new_tokens(options.stop_token_ids, options.max_new_tokens)
    assert_same_course(answer, expected, options.decoder)


def assert_same_course(answer: Generation, expected: Result, decoder: str) -> None:
    """As many forwards of every kind, and the same decoding order. ``ar``, which nobody published as blocks of one
    token, commits a token with the forward of the next.
    """
    if decoder == "ar":
        assert answer.stats["nfe"] == len(answer.canvas) - expected.prompt_length
        return
    assert answer.stats["nfe"] == expected.nfe
    for kind in ("prefill", "draft", "verify", "commit"):
        assert answer.stats[f"{kind}_forwards"] == expected.forwards[kind]
    assert answer.decoding_order == expected.decoding_order


def draws_of(random_source: str, keyed: Draws) -> Draws:
    """What the options name; ``keyed`` draws come from the caller."""
    return keyed if random_source == "keyed" else Draws({"torch": TorchSource, "fixed": FixedSource}[random_source]())
