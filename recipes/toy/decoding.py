"""Block-by-block decoding without a cache, batched: enough to follow the training, not meant to be fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from recipes.toy.network import Network
from recipes.toy.tokenization import MASK, TURN_END, render, token_id
from s2d2_lmeval.toy import Problem, score

LONGEST = 144
"""Positions, prompt included."""


@dataclass(frozen=True)
class Setting:
    """A decoder: block size 1 is left to right; a threshold above 1 reveals one token per forward ("static")."""

    block: int
    threshold: float = 2.0

    def __str__(self) -> str:
        if self.block == 1:
            return "ar"
        return f"static{self.block}" if self.threshold > 1 else f"dynamic{self.block}@{self.threshold:g}"


@dataclass(frozen=True)
class Outcome:
    """Accuracy, and new tokens (end token included) per forward over all problems."""

    accuracy: float
    tokens_per_forward: float


@torch.no_grad()
def decode(
    network: Network, prompts: Sequence[list[int]], setting: Setting, mask_id: int, end_id: int
) -> tuple[list[list[int]], list[int]]:
    """Greedy responses (without the end token) and forwards of every prompt."""
    block = setting.block
    length = torch.tensor([len(prompt) for prompt in prompts])
    text = torch.full((len(prompts), LONGEST), mask_id)
    for row, prompt in enumerate(prompts):
        text[row, : len(prompt)] = torch.tensor(prompt)
    current = length // block
    forwards = torch.zeros(len(prompts), dtype=torch.long)
    active = torch.arange(len(prompts))
    while len(active):
        window = current[active, None] * block + torch.arange(block)
        canvas = text[active].gather(1, window)
        masked = canvas == mask_id
        confidence, best = _read(network, text[active, : int(window.max()) + 1], window, block, mask_id)
        confidence = confidence.masked_fill(~masked, -1.0)
        revealed = masked & ((confidence >= setting.threshold) | (confidence == confidence.max(1, keepdim=True).values))
        canvas = torch.where(revealed, best, canvas)
        text[active[:, None], window] = canvas
        forwards[active] += 1
        complete = (canvas != mask_id).all(1)
        ended = ((canvas == end_id) & (window >= length[active, None])).any(1) | (window[:, -1] + block >= LONGEST)
        current[active] += complete.long()
        active = active[~(complete & ended)]
    responses = []
    for row, start in enumerate(length.tolist()):
        tokens = [token for token in text[row, start:].tolist() if token != mask_id]
        responses.append(tokens[: tokens.index(end_id)] if end_id in tokens else tokens)
    return responses, forwards.tolist()


def _read(
    network: Network, text: torch.Tensor, window: torch.Tensor, block: int, mask_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest probability and its token at every position of ``window`` (rows, block)."""
    rows, length = text.shape
    positions = torch.arange(length)
    visible = (positions[None, :] // block <= positions[:, None] // block).expand(rows, 1, length, length)
    wanted = torch.zeros(rows, length, dtype=torch.bool).scatter_(1, window, True)
    logits = network(text, positions.expand(rows, -1), visible, wanted).float().view(rows, block, -1)
    logits[..., mask_id] = -torch.inf
    confidence, best = logits.softmax(-1).max(-1)
    return confidence, best


def evaluate(network: Network, tokenizer: Tokenizer, problems: Sequence[Problem], setting: Setting) -> Outcome:
    """Decode ``problems``, every second one in the chat format, and score the responses."""
    mask_id, end_id = token_id(tokenizer, MASK), token_id(tokenizer, TURN_END)
    prompts = [tokenizer.encode(render(problem, chat=bool(i % 2))[0]).ids for i, problem in enumerate(problems)]
    was_training = network.training
    network.eval()
    responses, forwards = decode(network, prompts, setting, mask_id, end_id)
    network.train(was_training)
    right = sum(score(problem, tokenizer.decode(ids)) for problem, ids in zip(problems, responses, strict=True))
    tokens = sum(len(ids) + 1 for ids in responses)
    return Outcome(right / len(problems), tokens / sum(forwards))
