"""Log-probabilities of decided tokens: those of full recomputes, without a cache, of the forwards that decided them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import s2d2_lmeval
from s2d2_lmeval import DecodingConfig, Generation
from s2d2_lmeval.decoding.generation import ACCEPTED, AUTOREGRESSIVE, RESAMPLED
from s2d2_lmeval.decoding.sampling.filters import filtered
from s2d2_lmeval.errors import ConfigError, RequestError
from s2d2_lmeval.streaming import Stream
from s2d2_lmeval.studies.bench.launches import count_launches

from . import drafting_tiny, editing_tiny, pipelined_cases, subblocks_drawn
from .test_device_reads import MODELS, OPTIONS
from .test_launches import PROMPTS as MANY
from .test_launches import check_one_launch, toy
from .tiny import VOCABULARY, engine, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:The draft graph")

PROMPTS = [[(3 * i + j) % 19 for j in range(length)] for i, length in enumerate((3, 8, 11, 5, 14, 6, 9, 4))]
MASK = VOCABULARY - 1
CHECKPOINTS = Path(__file__).parents[1] / "families" / "data"
BLOCK = 4
TOP = 3
CAUSAL = {"cache_ver": True, "draft_ver": True}


class Recompute:
    """Forwards over whole texts in blocks of ``block``; logits of ``shift`` 1 predict the next token."""

    def __init__(self, plain: Any, config: DecodingConfig, shift: int, block: int) -> None:
        self.plain, self.config, self.shift, self.block = plain, config, shift, block

    @torch.no_grad()
    def law(self, text: list[int], place: int, causal: bool = False, filters: bool = True) -> torch.Tensor:
        """(V,) log-probabilities at ``place`` of ``text``, whose last block is ``causal``, or as far as options say."""
        at = torch.arange(len(text))
        block = at // self.block
        first_mask = text.index(MASK) if self.config.draft_ver and MASK in text else 0
        last = block == block[-1]
        causally = (at < first_mask) | torch.where(last, causal, self.config.token_causal)
        visible = torch.where(causally[:, None], at[:, None] >= at, block[:, None] >= block)
        logits = self.plain(input_ids=torch.tensor([text]), attention_mask=visible[None, None]).logits[0]
        row = logits[place - self.shift].clone()
        row[MASK] = -torch.inf
        sampled = filters and self.config.sampled
        return (filtered(row[None], self.config)[0] if sampled else row).log_softmax(-1)

    def decided(self, answer: Generation) -> list[torch.Tensor]:
        """Of all new tokens, the law of the last step that decided it."""
        found: dict[int, torch.Tensor] = {}
        for step in answer.steps:
            for place, mark in enumerate(step.marks):
                at = step.start + place
                before = answer.canvas[: step.start]
                if not mark:
                    continue
                if mark == AUTOREGRESSIVE:  # of shifted models: a block's first token, by the text before
                    found[at] = self.law(before[:at], at, filters=False)
                elif step.kind == "verify" and mark in (ACCEPTED, RESAMPLED):
                    text = [*before, *step.draft[:place], *([] if self.shift else [MASK])]
                    found[at] = self.law(text, at, causal=True)
                else:
                    rest = -(len(before) + len(step.before)) % self.block
                    text = [*before, *step.before, *[MASK] * rest]
                    found[at] = self.law(text, at)
        return [found[answer.prompt_length + place] for place in range(len(answer.token_ids))]

    def autoregressive(self, answer: Generation) -> list[torch.Tensor]:
        """Of all new tokens after those before them."""
        canvas, prompt = answer.canvas, answer.prompt_length
        return [self.law([*canvas[:at], MASK], at, causal=True) for at in range(prompt, prompt + len(answer.token_ids))]


def check(answer: Generation, laws: list[torch.Tensor]) -> None:
    """The log-probabilities of an ``answer`` that keeps ``TOP`` of the likeliest tokens."""
    close(answer.logprobs, [float(law[token]) for law, token in zip(laws, answer.token_ids, strict=True)])
    assert answer.top_logprobs is not None
    for law, best in zip(laws, answer.top_logprobs, strict=True):
        assert len(best) == min(TOP, int(law.isfinite().sum()))
        close([value for _, value in best], law.topk(len(best)).values.tolist())
        close([float(law[token]) for token, _ in best], [value for _, value in best])
        assert len(dict(best)) == len(best)


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
    answers = model.generate(PROMPTS, options, logprobs=("decided", "ar"), top_logprobs=TOP)
    drawn_by = Recompute(tiny_model(), model.config(options), 0, 1)
    plain = Recompute(tiny_model(), model.config({"decoder": "ar"}), 0, 1)
    for answer in answers:
        check(answer, drawn_by.autoregressive(answer))
        laws = plain.autoregressive(answer)
        close(answer.ar_logprobs, [float(law[token]) for law, token in zip(laws, answer.token_ids, strict=True)])
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
    answers = model.generate(PROMPTS, options, logprobs="decided", top_logprobs=TOP)
    for answer in answers:
        check(answer, Recompute(tiny_model(), config, 0, BLOCK).decided(answer))
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
    for answer in model.generate(PROMPTS, options, logprobs="decided", top_logprobs=TOP):
        check(answer, Recompute(editing_tiny.tiny_model(), model.config(options), 0, BLOCK).decided(answer))


@pytest.mark.parametrize("decoder", ["dynamic", "s2d2"])
def test_sub_blocks_have_the_law_of_shifted_logits(decoder: str) -> None:
    model = subblocks_drawn.engine()
    options = {"decoder": decoder, "block_length": 8, "small_block_size": 4, "max_new_tokens": 20}
    for answer in model.generate(PROMPTS, options, logprobs="decided", top_logprobs=TOP):
        check(answer, Recompute(subblocks_drawn.shifted_model(), model.config(options), 1, 8).decided(answer))


@pytest.mark.parametrize("decoder", ["pipelined", "s2d2"])
def test_pipelined_tokens_pass_the_threshold_that_they_passed(decoder: str) -> None:
    model = pipelined_cases.engine("dream")
    options = {"decoder": decoder, "block_length": BLOCK, "max_new_tokens": 16, "confidence_threshold": 0.4}
    for answer in model.generate(PROMPTS, options, logprobs="decided", top_logprobs=TOP):
        assert answer.logprobs is not None
        assert answer.top_logprobs is not None
        assert len(answer.logprobs) == len(answer.token_ids)
        assert all(value is not None and math.log(1e-9) < value <= 0 for value in answer.logprobs)
        for step in answer.steps:
            for mark, token, law in zip(step.marks, step.tokens, step.laws, strict=True):
                assert mark != 4 or law.logprob > math.log(0.4)  # 4: high confidence
                assert not mark or dict(law.best).get(token, law.logprob) == law.logprob
                assert mark != 4 or law.best[0] == (token, law.logprob)


@pytest.mark.parametrize("decoder", ["dflash", "ddtree"])
def test_a_target_s_law(decoder: str) -> None:
    model = drafting_tiny.pair()
    options = {"decoder": decoder, "max_new_tokens": 16}
    for answer in model.generate(PROMPTS, options, logprobs=["decided", "ar"], top_logprobs=TOP):
        close(answer.logprobs, answer.ar_logprobs)
        assert [best[0][0] for best in answer.top_logprobs or []] == answer.token_ids


WINDOWS = {
    "linear_spec": ("nemotron_labs_diffusion", {"block_length": 8}),
    "strided": ("idlm", {"block_length": 4}),
    "reordered": ("wedlm", {"block_length": 8}),
}


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("decoder", WINDOWS)
def test_windows_have_the_law_of_ar_or_of_their_forward(decoder: str, sampling: dict[str, Any]) -> None:
    family, more = WINDOWS[decoder]
    model = s2d2_lmeval.load(CHECKPOINTS / family / "checkpoint", device="cpu", dtype="float64", max_batch=3)
    options = {"decoder": decoder, "max_new_tokens": 20, "stop_token_ids": (), **more, **sampling}
    plain = model.generate(PROMPTS, options)
    answers = model.generate(PROMPTS, options, logprobs=("decided", "ar"), top_logprobs=TOP)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in plain]
    for answer in answers:
        assert answer.logprobs is not None
        assert answer.top_logprobs is not None
        assert None not in answer.logprobs
        for token, logprob, best in zip(answer.token_ids, answer.logprobs, answer.top_logprobs, strict=True):
            assert dict(best).get(token, logprob) == logprob
            assert token == best[0][0] or sampling == SAMPLED or decoder == "reordered"
            assert logprob is not None
            assert best[0][1] >= logprob > -math.inf
        if decoder != "reordered" and sampling != SAMPLED:
            close(answer.logprobs, answer.ar_logprobs)
    if decoder == "linear_spec":  # samples of the same law by the same draws
        of_ar = model.generate(PROMPTS, {**options, "decoder": "ar", "block_length": None}, logprobs="decided")
        for answer, other in zip(answers, of_ar, strict=True):
            close(answer.logprobs, other.logprobs)
    parts: dict[int, list[Any]] = {index: [] for index in range(len(PROMPTS))}
    streams = [
        Stream(lambda *new, index=index: parts[index].append(new), model.config({**options, "logprobs": True}), 20)
        for index in parts
    ]
    model.generate(
        PROMPTS,
        {**options, "logprobs": True},
        stop=lambda index, new: streams[index].stop(index, new),
        on_begun=lambda index, progress: streams[index].begun(index, progress),
    )
    for index, answer in enumerate(answers):
        streams[index].finish(answer.token_ids)
        told = [law for _, laws in parts[index] for law in laws]
        close([law and law.logprob for law in told], answer.logprobs)


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
    row = count_launches(
        toy(draft=False), {**options, "max_new_tokens": 8, "logprobs": True, "top_logprobs": 4}, 2, MANY[:3]
    )
    check_one_launch(row)


def test_what_cannot_be_said_is_refused() -> None:
    with pytest.raises(RequestError, match="logprobs='all': give decided, ar, or both"):
        engine().generate(PROMPTS[:1], logprobs="all")
    with pytest.raises(ConfigError, match="top_logprobs=3 needs the laws that logprobs=true keeps"):
        engine().generate(PROMPTS[:1], top_logprobs=3)
    with pytest.raises(ConfigError, match="top_logprobs"):
        engine().generate(PROMPTS[:1], logprobs="decided", top_logprobs=21)


def test_an_answer_without_tokens_has_none() -> None:
    (answer,) = engine().generate([[1, 2]], max_new_tokens=0, logprobs=("decided", "ar"))
    assert answer.ar_logprobs == answer.token_ids == []
