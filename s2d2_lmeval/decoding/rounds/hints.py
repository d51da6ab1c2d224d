"""What a tree goes by beside a draft's own law: counted pairs, what followed the same words before, and a drafter's
head that knows the token before (:mod:`~s2d2_lmeval.runtime.drafting.heads`).

All are terms of a token's worth in a draft tree and change no decided token. The first two are learned on the device
from prompts and answers; the host tells the device the text of every row as it grows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from s2d2_lmeval.decoding.decoder import DecoderSetup
from s2d2_lmeval.decoding.passes import Sent
from s2d2_lmeval.decoding.rounds.pairs import Pairs
from s2d2_lmeval.decoding.rounds.recall import GRAM, LONGEST, Recall
from s2d2_lmeval.decoding.rounds.trees import Branches
from s2d2_lmeval.decoding.state import SequenceState

AfterToken = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

READ = 32
"""Tokens of each row that a step is told, at least as many as a round decides."""


class Hints:
    """Tells trees of drafts at most ``depths`` deep what the text says (``of_text``) and what the drafter's head says
    after each token, if there is one (``after_token`` of :class:`~s2d2_lmeval.decoding.decoder.DecoderSetup`).
    """

    def __init__(
        self, setup: DecoderSetup, depths: int, of_text: bool = True, after_token: AfterToken | None = None
    ) -> None:
        self.pairs = Pairs(setup, setup.config.pairs) if of_text and setup.config.pairs else None
        self.recall = Recall(setup, depths) if of_text and setup.config.lookup else None
        self.after_token = after_token
        self.width = max(READ, depths + 1)
        self.known = np.zeros(setup.slots, dtype=np.int64)
        """How many tokens of each row have been told."""
        self.tail = torch.empty(0)
        """The last tokens (count, LONGEST) of every row, those that a round has just decided included."""

    def told(self, rows: SequenceState) -> dict[str, np.ndarray]:
        """``fresh`` (count, GRAM + width), the tokens of every row that have not been told, after those before them,
        and ``tail`` (count, LONGEST), its last ones; -1 for none.
        """
        fresh = np.full((rows.count, GRAM + self.width), -1, dtype=np.int64)
        tail = np.full((rows.count, LONGEST), -1, dtype=np.int64)
        for slot in rows.active().tolist():
            tokens, known = rows.tokens[slot], int(self.known[slot])
            before = min(known, GRAM)
            part = tokens[known - before : known + self.width]
            fresh[slot, GRAM - before : GRAM - before + len(part)] = part
            self.known[slot] = known + len(part) - before
            end = tokens[-LONGEST:]
            tail[slot, LONGEST - len(end) :] = end
        return {"fresh": fresh, "tail": tail}

    def read(self, fresh: torch.Tensor) -> None:
        """Learn what :meth:`told` told."""
        if self.pairs is not None:
            self.pairs.read(fresh[:, GRAM - 1 :])
        if self.recall is not None:
            self.recall.read(fresh[:, :GRAM], fresh[:, GRAM:])

    def decided(self, sent: Sent, path: torch.Tensor, tokens: torch.Tensor) -> None:
        """A round of the rows that run one decided the ``tokens`` (count, D + 2) of the ``path`` (count, D + 1), the
        root's first, and one more.
        """
        accepted = (path > 0).sum(1, keepdim=True)
        fresh = tokens[:, 1:].scatter(1, accepted, tokens[:, -1:])
        if self.recall is not None:
            self.recall.learn(fresh, accepted + 1, sent["running"].bool())
        last = accepted + 1 + torch.arange(LONGEST, device=path.device)
        self.tail = torch.cat([sent["tail"], fresh], dim=1).gather(1, last)

    def branches(
        self,
        log_p: torch.Tensor,
        token: torch.Tensor,
        tail: torch.Tensor,
        room: torch.Tensor,
        slots: torch.Tensor,
        read: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Branches]:
        """The choices ``token`` (R, S, K), with what is known to follow, and what each is worth after each choice of
        the position before, from their log-values without any hint; ``tail`` (R, LONGEST) is the text before of the
        rows ``slots`` (R,), ``room`` (R, S) says where there may be a node, and ``read`` (R, S) which of the drafter's
        logits they are.
        """
        if self.recall is not None:
            said, length = self.recall.follow(tail, slots, log_p.shape[1])
            said = said.where(room, -1)
            log_p, token, which = self.recall.choose(log_p, token, said)
        given = log_p.unsqueeze(2).expand(-1, -1, log_p.shape[2], -1)
        above = torch.cat([tail[:, -1:, None].expand(-1, 1, token.shape[2]), token[:, :-1]], dim=1)
        terms = [] if self.pairs is None else [self.pairs.term(above, token)]
        if self.after_token is not None and read is not None:
            terms.append(self.after_token(above, token, read))
        if terms:
            # All choices of a position together keep what they have.
            given = given + sum(terms)
            given = given + (log_p.logsumexp(2)[:, :, None, None] - given.logsumexp(3, keepdim=True))
            given = given.nan_to_num(nan=-torch.inf, neginf=-torch.inf)  # where nothing was drafted
        if self.recall is not None:
            given = self.recall.mix(given, said, which, length, slots)
        # Rounded, a mass may exceed 1; but no node is worth more than its parent.
        return token, Branches(*given.clamp_max(0).sort(dim=3, descending=True, stable=True))
