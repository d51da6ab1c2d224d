"""What a tree goes by beside a draft's own law: counted pairs, what followed the same words before, and a drafter's
head that knows the tokens before (:mod:`~s2d2_lmeval.runtime.drafting.heads`).

All are terms of a token's worth in a draft tree and change no decided token. The first two are learned on the device
from prompts and answers; the host tells the device the text of every row as it grows.
"""

from __future__ import annotations

from functools import reduce

import numpy as np
import torch

from s2d2_lmeval.decoding.decoder import DecoderSetup
from s2d2_lmeval.decoding.passes import Sent
from s2d2_lmeval.decoding.rounds.pairs import Pairs
from s2d2_lmeval.decoding.rounds.recall import GRAM, LONGEST, NOTHING, Recall
from s2d2_lmeval.decoding.rounds.trees import Branches, PairBranches
from s2d2_lmeval.decoding.state import SequenceState
from s2d2_lmeval.runtime.drafting.heads import AfterToken
from s2d2_lmeval.runtime.graphs import numbers

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
        self.captured = setup.tables.keep
        self.known = np.zeros(setup.slots, dtype=np.int64)
        """How many tokens of each row have been told."""
        self._grown = (torch.empty(0),) * 3

    def told(self, rows: SequenceState) -> dict[str, np.ndarray]:
        """``fresh`` (count, GRAM + any), the tokens of every row that have not been told, after those before them, and
        ``tail`` (count, LONGEST), its last ones; -1 or NOTHING for none.
        """
        active = rows.active().tolist()
        width = self.width
        if not self.captured:  # no more than there are
            width = min(max((len(rows.tokens[slot]) - int(self.known[slot]) for slot in active), default=0), width)
        fresh = np.full((rows.count, GRAM + width), -1, dtype=np.int64)
        tail = np.full((rows.count, LONGEST), NOTHING, dtype=np.int64)
        for slot in active:
            tokens, known = rows.tokens[slot], int(self.known[slot])
            before = min(known, GRAM)
            part = tokens[known - before : known + width]
            fresh[slot, GRAM - before : GRAM - before + len(part)] = part
            self.known[slot] = known + len(part) - before
            end = tokens[-LONGEST:]
            tail[slot, LONGEST - len(end) :] = end
        return {"fresh": fresh, "tail": tail}

    def read(self, fresh: torch.Tensor) -> None:
        """Learn what :meth:`told` told."""
        if fresh.shape[1] == GRAM:
            return
        if self.pairs is not None:
            self.pairs.read(fresh[:, GRAM - 1 :])
        if self.recall is not None:
            self.recall.read(fresh)

    def decided(self, sent: Sent, path: torch.Tensor, tokens: torch.Tensor) -> None:
        """A round of the rows that run one decided the ``tokens`` (count, D + 2) of the ``path`` (count, D + 1), the
        root's first, and one more.
        """
        accepted = (path > 0).sum(1, keepdim=True)
        fresh = tokens[:, 1:].scatter(1, accepted, tokens[:, -1:])
        if self.recall is not None:
            self.recall.learn(fresh, accepted + 1, sent["running"].bool())
        self._grown = sent["tail"], fresh, accepted

    def tail(self) -> torch.Tensor:
        """The last tokens (count, LONGEST) of every row, those that a round has just :meth:`decided` included."""
        before, fresh, accepted = self._grown
        last = accepted + 1 + numbers(LONGEST, fresh.device)
        return torch.cat([before, fresh], dim=1).gather(1, last)

    def branches(
        self,
        log_p: torch.Tensor,
        token: torch.Tensor,
        tail: torch.Tensor,
        room: torch.Tensor | None,
        slots: torch.Tensor,
        read: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Branches]:
        """The choices ``token`` (R, S, K), with what is known to follow, and what each is worth after each choice of
        the position before, from their log-values without any hint; ``tail`` (R, LONGEST) is the text before of the
        rows ``slots`` (R,), ``room`` (R, S) says where there may be a node (None: everywhere), and ``read`` (R, S)
        which of the drafter's logits they are.
        """
        if self.recall is not None:
            said, length = self.recall.follow(tail, slots, log_p.shape[1])
            said = said if room is None else said.where(room, -1)
            log_p, token, which = self.recall.choose(log_p, token, said)
        given = log_p.unsqueeze(2).expand(-1, -1, log_p.shape[2], -1)
        above = torch.cat([tail[:, -1:, None].expand(-1, 1, token.shape[2]), token[:, :-1]], dim=1)
        terms = [] if self.pairs is None else [self.pairs.term(above, token)]
        carried = self.after_token is not None and self.after_token.carries
        if self.after_token is not None and read is not None and not carried:
            terms.append(self.after_token(above, token, read)[0])
        if terms:
            given = conserved(given + reduce(torch.add, terms), log_p.logsumexp(2)[:, :, None, None])
        if self.recall is not None:
            given = self.recall.mix(given, said, which, length, slots)
        if self.after_token is not None and read is not None and carried:
            return token, PathBranches(given, token, tail[:, -1:], self.after_token, read)
        return token, PairBranches(given.clamp_max(0))


class PathBranches:
    """Branches by a head that carries a state along every path: what it adds to the log-values ``given`` (R, S, K
    above, K) of choices ``token`` (R, S, K) after the text's last token ``root`` (R, 1). All nodes of a depth are asked
    about together, as DARTree does (arXiv 2608.13524).
    """

    def __init__(
        self, given: torch.Tensor, token: torch.Tensor, root: torch.Tensor, head: AfterToken, read: torch.Tensor
    ) -> None:
        self.given, self.token, self.root, self.head, self.read = given, token, root, head, read
        self.state: torch.Tensor | None = None

    def after(self, depth: int, child: torch.Tensor) -> torch.Tensor:
        """As :class:`~s2d2_lmeval.decoding.rounds.trees.Branches` says."""
        choices, here = self.token.shape[2], slice(depth, depth + 1)
        own = child % choices
        last = self.token[:, depth - 1].gather(1, own) if depth else self.root
        if self.state is not None:
            of_parent = (
                (child // choices).to(self.state.device)[:, None, :, None].expand(-1, -1, -1, self.state.shape[3])
            )
            self.state = self.state.gather(2, of_parent)
        bias, self.state = self.head(last.unsqueeze(1), self.token[:, here], self.read[:, here], self.state, depth)
        given = self.given[:, depth].gather(1, own.unsqueeze(2).expand(-1, -1, choices))
        return conserved(given + bias[:, 0], given.logsumexp(2, keepdim=True)).clamp_max(0)


def conserved(given: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Log-values ``given`` (..., K) so that all choices of a position together keep their log-``mass`` (..., 1)."""
    given = given + (mass - given.logsumexp(-1, keepdim=True))
    return given.nan_to_num(nan=-torch.inf, neginf=-torch.inf)  # where nothing was drafted
