"""Log-likelihood requests of the harness: into the model's window, through the scorer, and rolling texts in windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from s2d2_lmeval.errors import RequestError
from s2d2_lmeval.harness.prompts import logger
from s2d2_lmeval.runtime import clock

if TYPE_CHECKING:
    from s2d2_lmeval.harness.interface import HarnessModel
    from s2d2_lmeval.model import BlockDiffusionModel

Score = tuple[float, bool]
Pair = tuple[list[int], list[int]]


class ScoringRun:
    """Scores (text, context ids, continuation ids) triples exactly, in the model's autoregressive mode.

    :raises RequestError: for a model that cannot score, and for triples that do not fit it.
    """

    def __init__(self, lm: HarnessModel, triples: Sequence[tuple[Any, list[int], list[int]]], *, quiet: bool) -> None:
        self.lm = lm
        self.engine = _scorer(lm)
        self.texts = [text for text, _, _ in triples]
        self.pairs = [self._fitting(context, continuation) for _, context, continuation in triples]
        cut = sum(len(pair[0]) < len(context) for pair, (_, context, _) in zip(self.pairs, triples, strict=True))
        if cut:
            logger.warning(
                "%d of %d contexts do not fit before their continuations: their oldest tokens are left out. "
                "truncation=False refuses such contexts.",
                *(cut, len(triples)),
            )
            lm.totals.scoring["truncated_prompts"] = lm.totals.scoring.get("truncated_prompts", 0) + cut
        # An empty continuation is certain. The harness makes them of texts that are its prefix token alone.
        self.scores: list[Score] = [(0.0, True)] * len(triples)
        self.bar = tqdm(total=len(triples), disable=quiet, desc="Scoring", unit="req")

    def answer(self) -> list[Score]:
        """log p(continuation | context), and whether greedy decoding would write it, in the order of the triples."""
        before, started = self.engine.trace.totals(), clock.now()
        places = [place for place, (_, continuation) in enumerate(self.pairs) if continuation]
        try:
            with self.bar:
                for place in sorted(set(range(len(self.pairs))) - set(places)):
                    self._scored(place, self.scores[place])
                pairs = [self.pairs[place] for place in places]
                self.engine.score(pairs, lambda index, score: self._scored(places[index], score))
        finally:
            self.lm.totals.add_scoring(before, self.engine.trace.totals(), len(self.pairs), clock.since(started))
        return self.scores

    def _scored(self, place: int, score: Score) -> None:
        self.scores[place] = score
        if self.texts[place] is not None:
            self.lm.cache_hook.add_partial("loglikelihood", self.texts[place], score)
        self.bar.update(1)

    def _fitting(self, context: list[int], continuation: list[int]) -> Pair:
        spare = window(self.lm) - len(continuation)
        if len(context) <= spare:
            return context, continuation
        if not self.lm.truncates or spare < 1:
            raise RequestError(
                f"a context of {len(context)} tokens and a continuation of {len(continuation)} do not fit the "
                f"{self.lm.max_length} positions of this model. Shorten them"
                + (", or leave truncation=False out." if spare >= 1 else ".")
            )
        return context[-spare:], continuation


def window(lm: HarnessModel) -> int:
    """Tokens that a context and its continuation may take together."""
    engine = _scorer(lm)
    return lm.max_length + engine.max_score_length - engine.max_context


def rolling(lm: HarnessModel, texts: Sequence[str]) -> list[tuple[int, Pair]]:
    """Every text in windows of the whole context, each after one token of what is before it: (text, window)."""
    windows: list[tuple[int, Pair]] = []
    for owner, text in enumerate(texts):
        # A window holds one token more than its length: the prefix.
        several = get_rolling_token_windows(lm.tok_encode(text), lm.prefix_token_id, window(lm) - 1, 1)
        windows += [(owner, make_disjoint_window(one)) for one in several]
    return windows


def _scorer(lm: HarnessModel) -> BlockDiffusionModel:
    if lm.engine is None:
        raise RequestError("this model is of no known family, so it cannot score; use generate_until tasks only.")
    if "scoring" not in lm.told:
        lm.told.add("scoring")
        logger.info(
            "log-likelihoods are those of the model's autoregressive mode (block size one): exact for that mode, "
            "and no bound on the likelihood of its diffusion mode. Decoding options do not change them."
        )
    return lm.engine
