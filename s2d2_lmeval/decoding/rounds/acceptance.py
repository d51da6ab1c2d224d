"""Acceptance rules for draft trees, and the matching draws of drafts; both give exactly the AR distribution.

``Keyed``      The target chooses a token after every node as ``ar`` would with the same seed: the argmax, or a draw
               whose noise is a function of the position. A node is accepted if it equals that choice. Drafts use the
               same noise, so where drafter and target have the same distribution they choose the same token. For trees.
``Rejection``  Speculative sampling (Leviathan et al., 2023): a drafted token is accepted with probability
               min(1, p / q), p the target's and q the draft's probability; the first rejected one is replaced by a
               draw from (p - q)+ normalised. For chains.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from s2d2_lmeval.decoding.passes import Cells, Sent
from s2d2_lmeval.decoding.sampling import random
from s2d2_lmeval.decoding.sampling.acceptance import acceptance_ratio, residual
from s2d2_lmeval.decoding.sampling.filters import drawn_tokens, filtered, probabilities
from s2d2_lmeval.runtime.graphs import numbers

if TYPE_CHECKING:
    from s2d2_lmeval.decoding.options.config import DecodingConfig

PRIOR_ACCEPTANCE = 0.8
"""Assumed acceptance probability of a sampled draft token, when nodes are weighed against windows."""


class Keyed:
    """Accepts a drafted token if it equals the target's own choice; drafts the ``choices`` likeliest tokens, with the
    noise of that choice if ``coupled``. Trees are at most ``depths`` deep.
    """

    def __init__(
        self, config: DecodingConfig, source: random.RandomSource, depths: int, choices: int = 1, coupled: bool = False
    ) -> None:
        self.config = config
        self.source = source
        self.depths = depths
        self.choices = choices
        self.coupled = coupled

    def judge(self, logits: torch.Tensor, sent: Sent) -> tuple[torch.Tensor, torch.Tensor]:
        """Judge every row's tree by the target's ``logits`` (M, V) after root and nodes.

        Returns:
            ``path`` (count, 1 + D), the accepted nodes from the root down, 0 after the last, and ``bonus`` (count, 1),
            the target's token after it.
        """
        if self.config.sampled:
            at = sent.at("verify")
            position = sent["length"][at[0]] + sent["depth"][at]
            key = random.Key(random.DRAFT, sent["key"][at[0]], position, torch.zeros_like(position))
            tokens, _ = drawn_tokens(logits, self.config, self.source, key)
        else:
            tokens = logits.argmax(-1)
        chosen = Cells.like(sent["token"], -1).put(sent.cells("verify"), tokens)
        path = walk(chosen, sent, self.depths)
        return path, chosen.gather(1, path.amax(1, keepdim=True))

    def candidates(self, logits: torch.Tensor, position: torch.Tensor, sent: Sent) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-values and tokens (R, S, K), best first, for S future positions (R, S) from draft ``logits`` (R * S, V);
        ``key`` and ``round`` (R,) of ``sent`` name the rows' draws.
        """
        if self.coupled:
            where = position.flatten()
            owner = sent["key"].repeat_interleave(position.shape[1])
            key = random.Key(random.DRAFT, owner, where, torch.zeros_like(where))
            logits = filtered(logits, self.config)
            logits = logits + self.source.gumbel(logits, key)
        log_p = logits.log_softmax(-1)
        best, token = log_p.topk(min(self.choices, log_p.shape[-1]), dim=-1)
        return best.view(*position.shape, -1), token.view(*position.shape, -1)


def walk(chosen: torch.Tensor, sent: Sent, depths: int) -> torch.Tensor:
    """The nodes (count, 1 + D) on the way down, the root first and 0 after the last, where ``chosen`` (count, N + 1) is
    the token that follows each: those which, with all above them, are what was chosen after their parent.

    Children of a node have different tokens, so there is at most one way; D is at most ``depths``.
    """
    above = sent["above"]
    nodes = above.shape[1]
    if nodes == 1:
        return torch.zeros_like(chosen[:, :1])
    token, parent, depth = (sent[name][:, :nodes] for name in ("token", "parent", "depth"))
    chosen_after_parent = (token == chosen.gather(1, parent)) & (depth > 0) | (depth == 0)
    accepted = (above <= chosen_after_parent.unsqueeze(1)).all(2)
    path = torch.zeros_like(depth[:, : min(depths, nodes - 1) + 1])
    return path.scatter(1, depth * accepted, numbers(nodes, depth.device) * accepted)


class Rejection(Keyed):
    """Speculative sampling of chains. Draws are keyed by position and round, so a new draft makes new draws."""

    def __init__(self, config: DecodingConfig, source: random.RandomSource, depths: int, law: torch.Tensor) -> None:
        super().__init__(config, source, depths)
        self.law = law
        """(count, S, V) distributions that the current drafts were drawn from."""

    def judge(self, logits: torch.Tensor, sent: Sent) -> tuple[torch.Tensor, torch.Tensor]:
        p = probabilities(logits, self.config)
        order = numbers(len(p), p.device)
        row_of = Cells.like(sent["token"]).put(sent.cells("verify"), order)
        drafted, token = sent["depth"][:, 1:] > 0, sent["token"][:, 1:, None]
        place = numbers(drafted.shape[1], p.device)
        # 1. Accept a drafted token x with probability min(1, p(x) / q(x)), up to the first that is not.
        of_target = p[row_of[:, :-1]].gather(2, token).squeeze(2)
        of_draft = self.law[:, : len(place)].gather(2, token).squeeze(2)
        position = sent["length"].unsqueeze(1) + place
        key = random.Key(random.ACCEPT, sent["key"].unsqueeze(1), position, sent["round"].unsqueeze(1))
        ratio = acceptance_ratio(of_target, of_draft, 1.0)
        path = ((self.source.uniform(key, drafted) < ratio) & drafted).long().cumprod(1) * (place + 1)
        path = torch.cat([torch.zeros_like(path[:, :1]), path], dim=1)[
            :, : min(self.depths + 1, sent["above"].shape[1])
        ]
        end = path.amax(1, keepdim=True)
        # 2. Draw the next one from (p - q)+ where a token was rejected, from p after the last.
        after = p[row_of.gather(1, end).squeeze(1)]
        rejected = torch.nn.functional.pad(drafted, (0, 1)).gather(1, end)
        at = end.clamp_max(self.law.shape[1] - 1).unsqueeze(2).expand(-1, -1, self.law.shape[2])
        after = torch.where(rejected, residual(after, self.law.gather(1, at).squeeze(1)), after)
        key = random.Key(random.RESAMPLE, sent["key"], sent["length"] + end.squeeze(1), sent["round"])
        return path, self.source.categorical(after, key).unsqueeze(1)

    def candidates(self, logits: torch.Tensor, position: torch.Tensor, sent: Sent) -> tuple[torch.Tensor, torch.Tensor]:
        law = probabilities(logits, self.config)
        self.law.copy_(law.view(*position.shape, -1))
        owner, when = (sent[name].repeat_interleave(position.shape[1]) for name in ("key", "round"))
        token = self.source.categorical(law, random.Key(random.DRAFT, owner, position.flatten(), when))
        worth = torch.full((*position.shape, 1), math.log(PRIOR_ACCEPTANCE), device=law.device)
        return worth, token.view(*position.shape, 1)
