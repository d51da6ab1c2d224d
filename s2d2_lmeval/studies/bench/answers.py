"""Answers of decoders on the toy's corpora: counts instead of times, so results are the same on any machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerFast

from s2d2_lmeval.model import BlockDiffusionModel
from s2d2_lmeval.toy import CORPORA, checkpoint_path, held_out, score

NEW_TOKENS = 128


def answer(model: BlockDiffusionModel, options: Mapping[str, Any], batch: int, problems: int) -> list[dict[str, Any]]:
    """Answer the first ``problems`` held-out problems of every corpus, half of them raw, half as chats.

    Returns:
        Per corpus ``accuracy`` of ``problems``, ``tokens_per_forward`` (tokens up to and including the stop over all
        forwards), ``queries`` per forward of one problem, and ``texts``, the token ids of every answer.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint_path())
    model.max_batch = batch
    config = model.config({**options, "max_new_tokens": NEW_TOKENS})
    found = []
    for corpus in CORPORA:
        chosen, prompts = held_out(corpus)[:problems], []
        for index, problem in enumerate(chosen):
            chat = [{"role": "user", "content": problem.prompt}]
            as_chat = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            prompts.append(tokenizer(as_chat if index % 2 else problem.prompt, add_special_tokens=False)["input_ids"])
        model.trace.reset()
        texts = [generation.token_ids for generation in model.generate(prompts, config)]
        totals = model.trace.totals()
        right = sum(map(score, chosen, (tokenizer.decode(text, skip_special_tokens=True) for text in texts)))
        found.append(
            {
                "corpus": corpus,
                "problems": len(chosen),
                "accuracy": right / len(chosen),
                "tokens_per_forward": totals.get("tokens_per_forward", float("nan")),
                "queries": totals["queries_per_forward"],
                "texts": texts,
            }
        )
    return found
