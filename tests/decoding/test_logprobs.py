"""Log-probabilities of decided tokens: those of full recomputes, without a cache, of the forwards that decided them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from s2d2_lmeval import DecodingConfig, Generation
from s2d2_lmeval.decoding.generation import ACCEPTED, AUTOREGRESSIVE, RESAMPLED
from s2d2_lmeval.decoding.sampling.filters import filtered
from s2d2_lmeval.errors import ConfigError, RequestError
from s2d2_lmeval.studies.bench.launches import count_launches

from . import drafting_tiny, editing_tiny, pipelined_cases, subblocks_drawn
from .test_device_reads import MODELS, OPTIONS
from .test_launches import PROMPTS as MANY
from .test_launches import check_one_launch, toy
from .tiny import VOCABULARY, engine, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:The draft graph")

PROMPTS = [[(3 * i + j) % 19 for j in range(length)] for i, length in enumerate((3, 8, 11, 5, 14, 6, 9, 4))]
MASK = VOCABULARY - 1
BLOCK = 4
CAUSAL = {"cache_ver": True, "draft_ver": True}


class Recompute:
    """Forwards over whole texts in blocks of ``block``; logits of ``shift`` 1 predict the next token."""

    def __init__(self, plain: Any, config: DecodingConfig, shift: int, block: int) -> None:
        self.plain, self.config, self.shift, self.block = plain, config, shift, block

    @torch.no_grad()
    def logprob(self, text: list[int], place: int, token: int, causal: bool = False, law: bool = True) -> float:
        """Of ``token`` at ``place`` of ``text``, whose last block is ``causal``, or as far as the options say."""
        at = torch.arange(len(text))
        block = at // self.block
        first_mask = text.index(MASK) if self.config.draft_ver and MASK in text else 0
        last = block == block[-1]
        causally = (at < first_mask) | torch.where(last, causal, self.config.token_causal)
        visible = torch.where(causally[:, None], at[:, None] >= at, block[:, None] >= block)
        logits = self.plain(input_ids=torch.tensor([text]), attention_mask=visible[None, None]).logits[0]
        row = logits[place - self.shift].clone()
        row[MASK] = -torch.inf
        sampled = law and self.config.sampled
        return float((filtered(row[None], self.config)[0] if sampled else row).log_softmax(-1)[token])

    def decided(self, answer: Generation) -> list[float | None]:
        """Of all new tokens, each under the law of the last step that decided it."""
        found: dict[int, float] = {}
        for step in answer.steps:
            for place, mark in enumerate(step.marks):
                at, token = step.start + place, step.tokens[place]
                before = answer.canvas[: step.start]
                if not mark:
                    continue
                if mark == AUTOREGRESSIVE:  # of shifted models: a block's first token, by the text before
                    found[at] = self.logprob(before[:at], at, token, law=False)
                elif step.kind == "verify" and mark in (ACCEPTED, RESAMPLED):
                    text = [*before, *step.draft[:place], *([] if self.shift else [MASK])]
                    found[at] = self.logprob(text, at, token, causal=True)
                else:
                    rest = -(len(before) + len(step.before)) % self.block
                    text = [*before, *step.before, *[MASK] * rest]
                    found[at] = self.logprob(text, at, token)
        return [found[answer.prompt_length + place] for place in range(len(answer.token_ids))]

    def autoregressive(self, answer: Generation) -> list[float]:
        """Of all new tokens after those before them."""
        canvas, prompt = answer.canvas, answer.prompt_length
        return [
            self.logprob([*canvas[:at], MASK], at, canvas[at], causal=True)
            for at in range(prompt, prompt + len(answer.token_ids))
        ]


def close(found: Any, expected: Any) -> None:
    assert found == [pytest.approx(value, abs=1e-9) for value in expected]


SAMPLED = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("decoder", ["ar", "sliding"])
def test_rounds_have_the_model_s_own_law(decoder: str, sampling: dict[str, Any]) -> None:
    options = {"decoder": decoder, "max_new_tokens": 20, **sampling}
    if decoder == "sliding":
        options["row_budget"] = 48
    model = engine()
    answers = model.generate(PROMPTS, options, logprobs=("decided", "ar"))
    drawn_by = Recompute(tiny_model(), model.config(options), 0, 1)
    plain = Recompute(tiny_model(), model.config({"decoder": "ar"}), 0, 1)
    for answer in answers:
        close(answer.logprobs, drawn_by.autoregressive(answer))
        close(answer.ar_logprobs, plain.autoregressive(answer))
        if not sampling:
            close(answer.logprobs, answer.ar_logprobs)


@pytest.mark.parametrize("sampling", [{}, SAMPLED, {**SAMPLED, "untempered_confidence": True}], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"decoder": "dynamic", "cache_ver": False, "draft_ver": False},
        {"decoder": "static", "denoising_steps": 2},
        {"decoder": "spiffy", "draft_nodes": 2},
        {"decoder": "s2d2", **CAUSAL, "schedule": "fused"},
        {"decoder": "s2d2", **CAUSAL, "schedule": "lookahead"},
        {"decoder": "s2d2", **CAUSAL, "schedule": "reference", "ssd_ratio_threshold": 0.5},
        {"decoder": "s2d2", **CAUSAL, "acceptance": "greedy", "always_check_high_confidence": True},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_blocks_have_the_law_of_the_forward_that_decided(options: dict[str, Any], sampling: dict[str, Any]) -> None:
    options = {**options, "block_length": BLOCK, "max_new_tokens": 20, **sampling}
    model = engine()
    config = model.config(options)
    answers = model.generate(PROMPTS, options, logprobs="decided")
    for answer in answers:
        close(answer.logprobs, Recompute(tiny_model(), config, 0, BLOCK).decided(answer))
    alone = [
        engine(max_batch=1).generate([prompt], options, seeds=[seed], logprobs="decided")[0]
        for seed, prompt in enumerate(PROMPTS[:3])
    ]
    assert [answer.token_ids for answer in alone] == [answer.token_ids for answer in answers[:3]]
    for one, answer in zip(alone, answers, strict=False):
        close(one.logprobs, answer.logprobs)


def test_editing_has_the_law_of_the_last_edit() -> None:
    model = editing_tiny.engine()
    options = {"decoder": "editing", "block_length": BLOCK, "max_new_tokens": 16, "max_post_steps": 2}
    options |= {"editing_threshold": 0.3, "confidence_threshold": 0.3}
    for answer in model.generate(PROMPTS, options, logprobs="decided"):
        close(answer.logprobs, Recompute(editing_tiny.tiny_model(), model.config(options), 0, BLOCK).decided(answer))


@pytest.mark.parametrize("decoder", ["dynamic", "s2d2"])
def test_sub_blocks_have_the_law_of_shifted_logits(decoder: str) -> None:
    model = subblocks_drawn.engine()
    options = {"decoder": decoder, "block_length": 8, "small_block_size": 4, "max_new_tokens": 20}
    for answer in model.generate(PROMPTS, options, logprobs="decided"):
        close(answer.logprobs, Recompute(subblocks_drawn.shifted_model(), model.config(options), 1, 8).decided(answer))


@pytest.mark.parametrize("decoder", ["pipelined", "s2d2"])
def test_pipelined_tokens_pass_the_threshold_that_they_passed(decoder: str) -> None:
    model = pipelined_cases.engine("dream")
    options = {"decoder": decoder, "block_length": BLOCK, "max_new_tokens": 16, "confidence_threshold": 0.4}
    for answer in model.generate(PROMPTS, options, logprobs="decided"):
        assert answer.logprobs is not None
        assert len(answer.logprobs) == len(answer.token_ids)
        assert all(value is not None and math.log(1e-9) < value <= 0 for value in answer.logprobs)
        for step in answer.steps:
            for mark, logprob in zip(step.marks, step.logprobs, strict=True):
                assert mark != 4 or logprob > math.log(0.4)  # 4: high confidence


@pytest.mark.parametrize("decoder", ["dflash", "ddtree"])
def test_a_target_s_law(decoder: str) -> None:
    model = drafting_tiny.pair()
    options = {"decoder": decoder, "max_new_tokens": 16}
    for answer in model.generate(PROMPTS, options, logprobs=["decided", "ar"]):
        close(answer.logprobs, answer.ar_logprobs)


@pytest.mark.parametrize("scheme", MODELS)
def test_whoever_does_not_ask_gets_the_same_tokens_and_nothing_else(scheme: str) -> None:
    model = MODELS[scheme]()
    for decoder in model.facts.decoders:
        if decoder not in OPTIONS:
            continue
        options = {"decoder": decoder, "max_new_tokens": 12, **OPTIONS[decoder][0]}
        plain, asked = model.generate(PROMPTS, options), model.generate(PROMPTS, options, logprobs=["decided", "ar"])
        assert [answer.token_ids for answer in plain] == [answer.token_ids for answer in asked]
        assert all(answer.logprobs is None and answer.ar_logprobs is None for answer in plain)
        assert all(len(answer.logprobs or []) == len(answer.ar_logprobs or []) > 0 for answer in asked)


@pytest.mark.parametrize(
    "options",
    [{"decoder": "ar"}, {"decoder": "dynamic"}, {"decoder": "s2d2", "schedule": "lookahead"}, {"decoder": "sliding"}],
    ids=lambda options: str(options["decoder"]),
)
def test_a_step_that_keeps_them_is_still_one_launch(options: dict[str, Any]) -> None:
    row = count_launches(toy(draft=False), {**options, "max_new_tokens": 8, "logprobs": True}, 2, MANY[:3])
    check_one_launch(row)


def test_what_cannot_be_said_is_refused() -> None:
    with pytest.raises(RequestError, match="logprobs='all': give decided, ar, or both"):
        engine().generate(PROMPTS[:1], logprobs="all")
    for decoder in ("linear_spec", "strided", "reordered"):
        with pytest.raises(ConfigError, match="logprobs is an option of decoder s2d2"):
            DecodingConfig(decoder=decoder, block_length=4).replace(logprobs=True)


def test_an_answer_without_tokens_has_none() -> None:
    (answer,) = engine().generate([[1, 2]], max_new_tokens=0, logprobs=("decided", "ar"))
    assert answer.ar_logprobs == answer.token_ids == []
