"""Acceptance rules for draft trees, and how drafts are drawn so that they are accepted: both exactly the AR law.

``Keyed``      The verifier chooses a token after every node as ``ar`` would with the same seed: the arg-max, or a draw
               whose noise is a function of the position. A node stands if it is what was chosen. Drafts are drawn with
               the same noise, so where drafter and verifier agree in law, they agree in the token. Works on trees.
``Rejection``  Speculative sampling (Leviathan et al., 2023): a drafted token is accepted with probability
               min(1, p / q), p of the target and q of the draft; the first that is not is replaced by a draw from
               (p - q)+ normalised. Works on chains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import torch

from s2d2_lmeval.decoding.rounds import trees
from s2d2_lmeval.decoding.rounds.passes import RoundPlan
from s2d2_lmeval.decoding.sampling import random
from s2d2_lmeval.decoding.sampling.acceptance import acceptance_ratio, residual
from s2d2_lmeval.decoding.sampling.filters import probabilities

if TYPE_CHECKING:
    from s2d2_lmeval.decoding.options.config import DecodingConfig

CHOICES = 16
"""Tokens per future position that a tree may branch over."""

STANDS = 0.8
"""How likely a token drafted by chance is taken to stand, when nodes are weighed against windows."""


@dataclass(frozen=True)
class Verdict:
    """What stands: ``path`` (count, 1 + D) the nodes on the way down, the root first and 0 behind the last; ``end``
    (count, 1) the last of them; ``bonus`` (count, 1) the verifier's token behind it.
    """

    path: torch.Tensor
    end: torch.Tensor
    bonus: torch.Tensor


class Acceptance(Protocol):
    """Both sides of speculation: judging drafts and drawing them."""

    def judge(self, logits: torch.Tensor, plan: RoundPlan) -> Verdict:
        """The verdict on every row's tree from the verifier ``logits`` (M, V)."""

    def candidates(
        self, logits: torch.Tensor, position: torch.Tensor, facts: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-values and tokens (count, S, K), best first, for S future positions (count, S) from draft ``logits``
        (count * S, V).
        """


class Keyed:
    """Accepts a drafted token if it is the verifier's own choice."""

    def __init__(self, config: DecodingConfig, source: random.RandomSource, choices: int) -> None:
        self.config = config
        self.source = cast("random.KeyedNoise", source)
        self.choices = choices

    def judge(self, logits: torch.Tensor, plan: RoundPlan) -> Verdict:
        row, node = plan.verify_at
        facts, config = plan.facts, self.config
        if config.sampled:
            position = facts["length"][row] + facts["depth"][row, node]
            p = probabilities(logits, config)
            tokens = self.source.categorical(p, _key(random.DRAFT, facts["key"][row], position))
        else:
            tokens = logits.argmax(-1)
        chosen = torch.full_like(facts["parent"], -1).index_put(plan.verify_at, tokens)
        depths = plan.deepest
        path = trees.descend(chosen, facts["token"], facts["parent"], facts["depth"], depths)
        end = path.max(1, keepdim=True).values
        return Verdict(path, end, chosen.gather(1, end))

    def candidates(
        self, logits: torch.Tensor, position: torch.Tensor, facts: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        config, log_p = self.config, logits.log_softmax(-1)
        if config.sampled:
            p = probabilities(logits, config)
            owner = facts["key"].repeat_interleave(position.shape[1])
            noise = self.source.gumbel(p, _key(random.DRAFT, owner, position.flatten()))
            log_p = (p.log() + noise).log_softmax(-1)
        best, token = log_p.topk(min(self.choices, log_p.shape[-1]), dim=-1)
        return best.view(*position.shape, -1), token.view(*position.shape, -1)


class Rejection:
    """Speculative sampling of chains. Draws are named by position and round: drafted again, a place is drawn anew."""

    def __init__(self, config: DecodingConfig, source: random.RandomSource) -> None:
        self.config = config
        self.source = source
        self.law = torch.empty(0)
        """(count, S, V) what the present drafts were drawn from."""

    def judge(self, logits: torch.Tensor, plan: RoundPlan) -> Verdict:
        facts = plan.facts
        p = probabilities(logits, self.config)
        count, places = facts["parent"].shape
        order = torch.arange(len(p), device=p.device)
        row_of = torch.zeros(count, places, dtype=torch.long, device=p.device).index_put(plan.verify_at, order)
        drafted = facts["depth"][:, 1:] > 0
        path = torch.zeros_like(facts["parent"][:, :1])
        law = self.law
        if len(law):
            token, steps = facts["token"][:, 1:, None], min(places - 1, law.shape[1])
            verifier = p[row_of[:, :-1]].gather(2, token).squeeze(2)[:, :steps]
            draft = law[:, :steps].gather(2, token[:, :steps]).squeeze(2)
            position = facts["length"].unsqueeze(1) + torch.arange(steps, device=p.device)
            key = random.Key(random.ACCEPT, facts["key"].unsqueeze(1), position, facts["round"].unsqueeze(1))
            ratio = acceptance_ratio(verifier, draft, 1.0)
            agrees = self.source.uniform(key, drafted[:, :steps]) < ratio
            stands = (agrees & drafted[:, :steps]).long().cumprod(1)
            path = torch.cat([path, stands * torch.arange(1, steps + 1, device=p.device)], dim=1)
        end = path.max(1, keepdim=True).values
        behind = p[row_of.gather(1, end).squeeze(1)]
        if len(law):
            rejected = torch.cat([drafted, drafted[:, :1] & False], dim=1).gather(1, end)
            at = end.clamp_max(law.shape[1] - 1).unsqueeze(2).expand(-1, -1, law.shape[2])
            behind = torch.where(rejected, residual(behind, law.gather(1, at).squeeze(1)), behind)
        position = facts["length"] + end.squeeze(1)
        bonus = self.source.categorical(behind, random.Key(random.RESAMPLE, facts["key"], position, facts["round"]))
        return Verdict(path, end, bonus.unsqueeze(1))

    def candidates(
        self, logits: torch.Tensor, position: torch.Tensor, facts: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count, steps = position.shape
        law = probabilities(logits, self.config)
        self.law = law.view(count, steps, -1)
        owner, when = (facts[name].repeat_interleave(steps) for name in ("key", "round"))
        token = self.source.categorical(law, random.Key(random.DRAFT, owner, position.flatten(), when))
        worth = torch.full((count, steps, 1), math.log(STANDS), device=law.device)
        return worth, token.view(count, steps, 1)


def _key(purpose: int, request: torch.Tensor, position: torch.Tensor) -> random.Key:
    return random.Key(purpose, request, position, torch.zeros_like(position))


def acceptance_of(config: DecodingConfig, source: random.RandomSource) -> Acceptance:
    """What the options ``acceptance`` and ``draft_shape`` ask for. A greedy verifier rejects nothing by chance."""
    if config.acceptance == "rejection" and config.sampled:
        return Rejection(config, source)
    return Keyed(config, source, 1 if config.draft_shape == "chain" else CHOICES)
