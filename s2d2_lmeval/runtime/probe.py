"""One forward that tells how a model's masks and text predict: the token after them, or their own.

After a text and the token that follows stand masks. The true token at the second mask is looked up in the mask's own
row and in the row before, which is a mask as well (the row before the first is text, which predicts the next token in
any model that began as an autoregressive one); and the last tokens of the text in the rows before them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from s2d2_lmeval.errors import CheckpointError
from s2d2_lmeval.families import Facts
from s2d2_lmeval.families.facts import AUTOREGRESSIVE
from s2d2_lmeval.runtime.passes import Layout, Pass
from s2d2_lmeval.runtime.runner import Runner

TEXTS, WIDTH, MASKS = 64, 24, 3
"""Texts of a probe, their tokens, and how many of these are masks."""
SENTENCES = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen",
    "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday. January, February, March, April, May, June, July",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z, A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
    "the cat sat on the mat, the cat sat on the mat, the cat sat on the mat, the cat sat on the mat, the cat sat on",
)
"""What anybody can continue."""
CONTRADICTION = 1.0
"""Nats by which one reading must beat the other to say anything."""


@dataclass(frozen=True)
class ShiftProbe:
    """Mean -log p (nats) of the true token: ``clean`` text rows for the next one; the second mask's ``own`` row, and
    the row before it, ``shifted``. ``chance`` is that of the uniform distribution.
    """

    clean: float
    own: float
    shifted: float
    chance: float

    @property
    def drafts_shifted(self) -> bool | None:
        """Whether masks predict the token after them; None if neither reading says more than chance."""
        better = min(self.own, self.shifted)
        if abs(self.own - self.shifted) <= CONTRADICTION or better > self.chance * 0.75:
            return None
        return self.shifted < self.own

    def check(self, facts: Facts) -> None:
        """Refuse ``facts`` that the probe contradicts.

        Raises:
            CheckpointError: with both numbers.
        """
        found = self.drafts_shifted
        if found is None or found == facts.draft_shift:
            return
        says, is_so = ("the token after them", "their own token")[:: 1 if facts.draft_shift else -1]
        raise CheckpointError(
            f"masks of {facts.family} checkpoints predict {says}, but those of this one predict {is_so}: -log p of the "
            f"true token is {self.own:.2f} nats at its own mask and {self.shifted:.2f} at the one before. Give the "
            "right family=…, or probe=false if you know better."
        )

    @property
    def verdict(self) -> str:
        """What it says, in one sentence."""
        said = {True: "masks predict the next token", False: "masks predict their own token", None: "no clear answer"}
        return (
            f"{said[self.drafts_shifted]}: -log p of the true token is {self.own:.2f} nats at its own mask and "
            f"{self.shifted:.2f} at the one before; after plain text it is {self.clean:.2f}"
        )


@torch.inference_mode()
def probe_shift(runner: Runner, facts: Facts, texts: Sequence[Sequence[int]]) -> ShiftProbe | None:
    """Probe with windows of the ``texts``, token ids; None for autoregressive models, or if no text is long enough."""
    width, known = min(WIDTH, facts.max_context), min(WIDTH, facts.max_context) - MASKS
    windows = [list(text[at : at + width]) for text in texts for at in range(len(text) - width + 1)]
    windows = [one for one in windows if facts.mask_token_id not in one][:TEXTS]
    if facts.scheme == AUTOREGRESSIVE or not windows or known < 4:
        return None
    truth = torch.tensor(windows)
    tokens = truth.clone()
    tokens[:, known:] = facts.mask_token_id
    visible = torch.ones(width, width, dtype=torch.bool).tril()
    if not facts.window_causal:
        visible[known - 1 :, known - 1 :] = True
        visible[known - 1, known:] = facts.token_shift is False
    # Text that predicts the next token; and the first two masks, which both might predict that of the second.
    rows = torch.tensor([*range(known // 2, known - 1), known, known + 1])
    predicted = torch.cat([rows[:-2] + 1, torch.full((2,), known + 1)])
    logits = _logits(runner, tokens, visible, rows)
    logits[..., facts.mask_token_id] = -torch.inf
    nats = -logits.log_softmax(-1).gather(2, truth[:, predicted].to(logits.device).unsqueeze(2)).mean((0, 2))
    *clean, shifted, own = nats.tolist()
    return ShiftProbe(sum(clean) / len(clean), own, shifted, chance=math.log(facts.vocab_size))


def _logits(runner: Runner, tokens: torch.Tensor, visible: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Logits (R, M, V) of the places ``wanted`` (M,) of each row of ``tokens`` (R, W)."""
    rows, width = tokens.shape
    runner.reserve(rows, width)
    layout, device = Layout(np.arange(rows), np.full(rows, width)), runner.device
    request = Pass(
        layout=layout,
        tokens=tokens.flatten().to(device),
        positions=torch.arange(width, device=device).repeat(rows),
        visible=visible.to(device).expand(rows, -1, -1),
        wanted=(torch.arange(rows).unsqueeze(1) * width + wanted).flatten().to(device),
        keep=np.zeros(rows, dtype=np.int64),
    )
    logits = runner.forward(request).view(rows, len(wanted), -1)
    runner.release()
    return logits
