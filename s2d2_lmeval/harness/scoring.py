"""Log-likelihood requests of the harness: truncation to the model's window, scoring, and rolling windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from s2d2_lmeval.errors import RequestError
from s2d2_lmeval.harness.base import HarnessModel
from s2d2_lmeval.harness.prompts import logger
from s2d2_lmeval.model import BlockDiffusionModel
from s2d2_lmeval.runtime import clock
from s2d2_lmeval.runtime.statistics import add

Score = tuple[float, bool]
Pair = tuple[list[int], list[int]]


def scores(lm: HarnessModel, triples: Sequence[tuple[Any, list[int], list[int]]], *, quiet: bool) -> list[Score]:
    """log p(continuation | context) in the model's autoregressive mode, and whether it is the greedy continuation, for
    every triple (text, context ids, continuation ids).

    Raises:
        RequestError: a model that cannot score, and triples that do not fit it.
    """
    engine = _scorer(lm)
    pairs = [_fitting(lm, context, continuation) for _, context, continuation in triples]
    cut = sum(len(pair[0]) < len(context) for pair, (_, context, _) in zip(pairs, triples, strict=True))
    if cut:
        logger.warning(
            "%d of %d contexts do not fit before their continuations: their oldest tokens are left out. "
            "truncation=False refuses such contexts.",
            *(cut, len(triples)),
        )
        add(lm.totals.scoring, {"truncated_prompts": cut})
    # An empty continuation is certain. The harness makes them of texts that are its prefix token alone.
    found: list[Score] = [(0.0, True)] * len(triples)
    bar = tqdm(total=len(triples), disable=quiet, desc="Scoring", unit="req")

    def scored(place: int, score: Score) -> None:
        found[place] = score
        if triples[place][0] is not None:
            lm.cache_hook.add_partial("loglikelihood", triples[place][0], score)
        bar.update(1)

    before, started = engine.trace.totals(), clock.now()
    places = [place for place, (_, continuation) in enumerate(pairs) if continuation]
    try:
        with bar:
            for place in sorted(set(range(len(pairs))) - set(places)):
                scored(place, found[place])
            engine.score([pairs[place] for place in places], lambda index, score: scored(places[index], score))
    finally:
        lm.totals.add_scoring(before, engine.trace.totals(), len(pairs), clock.since(started))
    return found


def _fitting(lm: HarnessModel, context: list[int], continuation: list[int]) -> Pair:
    spare = window(lm) - len(continuation)
    if len(context) <= spare:
        return context, continuation
    if not lm.truncates or spare < 1:
        raise RequestError(
            f"a context of {len(context)} tokens and a continuation of {len(continuation)} do not fit the "
            f"{lm.max_length} positions of this model. Shorten them"
            + (", or leave truncation=False out." if spare >= 1 else ".")
        )
    return context[-spare:], continuation


def window(lm: HarnessModel) -> int:
    """Maximum number of tokens of a context and its continuation together."""
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
