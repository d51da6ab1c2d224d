"""What decoders answer on the toy's corpora: accuracy, tokens per forward, and whether the answers are the same.

Counts, not times: they come out the same on any machine, however busy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from s2d2_lmeval.model import BlockDiffusionModel
from s2d2_lmeval.toy import checkpoint_path
from s2d2_lmeval.toy.corpora import CORPORA, held_out, score
from s2d2_lmeval.toy.problem import Problem
from s2d2_lmeval.toy.tokenization import render

NEW_TOKENS = 128


@dataclass(frozen=True)
class Answers:
    """One decoder on one corpus.

    ``accuracy`` of ``problems``; ``tokens_per_forward`` tokens up to and including the stop over all forwards;
    ``queries`` per forward, of one problem; ``texts`` the token ids of every answer.
    """

    name: str
    corpus: str
    problems: int
    accuracy: float
    tokens_per_forward: float
    queries: float
    texts: tuple[tuple[int, ...], ...]

    def equal(self, other: Answers) -> int:
        """Problems answered with the same tokens."""
        return sum(one == two for one, two in zip(self.texts, other.texts, strict=True))


def answer(
    model: BlockDiffusionModel, name: str, options: Mapping[str, Any], batch: int, problems: int
) -> list[Answers]:
    """Answer the first ``problems`` held-out problems of every corpus, half of them raw, half as chats."""
    tokenizer = Tokenizer.from_file(str(checkpoint_path() / "tokenizer.json"))
    model.max_batch = batch
    config = model.config({**options, "max_new_tokens": NEW_TOKENS})
    found = []
    for corpus in CORPORA:
        chosen = held_out(corpus)[:problems]
        model.trace.reset()
        generations = model.generate(
            [_prompt(tokenizer, index, problem) for index, problem in enumerate(chosen)], config
        )
        totals = model.trace.totals()
        texts = [tokenizer.decode(one.token_ids, skip_special_tokens=True) for one in generations]
        found.append(
            Answers(
                name=name,
                corpus=corpus,
                problems=len(chosen),
                accuracy=sum(map(score, chosen, texts)) / len(chosen),
                tokens_per_forward=totals.get("tokens_per_forward", float("nan")),
                queries=totals["queries_per_forward"],
                texts=tuple(tuple(one.token_ids) for one in generations),
            )
        )
    return found


def _prompt(tokenizer: Tokenizer, index: int, problem: Problem) -> list[int]:
    text, _ = render(problem, chat=index % 2 == 1)
    return list(tokenizer.encode(text, add_special_tokens=False).ids)
