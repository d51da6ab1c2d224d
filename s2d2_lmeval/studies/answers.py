"""What decoders answer on the toy's corpora: accuracy, tokens per forward, and whether the answers are the same.

Counts, not times: they come out the same on any machine, however busy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from s2d2_lmeval.model import BlockDiffusionModel
from s2d2_lmeval.toy import CORPORA, Problem, checkpoint_path, held_out, score

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
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint_path())
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


def _prompt(tokenizer: PreTrainedTokenizerFast, index: int, problem: Problem) -> list[int]:
    text = problem.prompt
    if index % 2:
        chat = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
