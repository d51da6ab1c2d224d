"""Families whose text is token-causal: `ar` and `sliding` give the recorded next-token decoding, and that of the plain
causal model.
"""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import s2d2_lmeval
from s2d2_lmeval.decoding.rounds.sliding import Sliding
from s2d2_lmeval.errors import CheckpointError, ConfigError, RequestError
from s2d2_lmeval.families.adapters import draft_weights

DATA = Path(__file__).parent / "data"
CAUSAL = ("nemotron_labs_diffusion", "idlm", "wedlm")
PROMPTS = [[3, 1, 4, 1, 5, 9], [2, 7, 1], [61, 60, 59, 58, 57, 56, 55, 54, 53], [18, 81] * 20]


@cache
def model(family: str) -> s2d2_lmeval.BlockDiffusionModel:
    return s2d2_lmeval.load(DATA / family / "checkpoint", device="cpu")


def runs(family: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / family / "runs.jsonl").read_text().splitlines()]


GREEDY = [
    (family, run)
    for family in CAUSAL
    for run in runs(family)
    if run["fn"] in ("ar", "ar_generate") and not {"temperature", "end_think_token_id"} & run["kwargs"].keys()
]
SHAPES = [
    {"decoder": "ar"},
    {"decoder": "sliding", "draft_shape": "chain", "window": 8},
    {"decoder": "sliding", "draft_shape": "tree", "window": 8, "row_budget": 24},
]


@pytest.mark.parametrize("family", ["nemotron_labs_diffusion", "stable_diffcoder", "idlm", "wedlm"])
def test_recorded_prefills(family: str) -> None:
    """Names and configuration: the text of every recorded run through the native class."""
    checked = 0
    for run in runs(family):
        recorded = run["prefill"]
        if (
            recorded is None
            or run["kwargs"].get("causal_context") is False
            or (family == "stable_diffcoder" and 96 in recorded["ids"])
        ):
            continue
        ids = torch.tensor([recorded["ids"]])
        mask = None
        if family == "stable_diffcoder":  # blocks see themselves
            block = torch.arange(ids.shape[1]) // run["kwargs"]["block_length"]
            mask = (block[:, None] >= block[None])[None, None]
        with torch.no_grad():
            stock = model(family).hf_model
            stock.config._attn_implementation = "sdpa"
            try:
                logits = stock(input_ids=ids, attention_mask=mask).logits[0]
            finally:
                stock.config._attn_implementation = "s2d2"
        top = logits.softmax(-1).max(-1)
        assert top.indices.tolist() == recorded["argmax"]
        assert top.values.tolist() == pytest.approx(recorded["maxp"], abs=1e-5)
        checked += 1
    assert checked > 10


@pytest.mark.parametrize(
    ("family", "run"), GREEDY, ids=lambda value: value if isinstance(value, str) else value["name"]
)
def test_recorded_next_token_decoding(family: str, run: dict[str, Any]) -> None:
    call = run["kwargs"]
    stops = [call["eos_token_id"]] if "eos_token_id" in call else call.get("stop_token_ids", [1])
    expected = run["output"][len(run["prompt"]) :] if run.get("output_has_prompt", True) else run["output"]
    options = {"max_new_tokens": call["max_new_tokens"], "temperature": 0.0, "stop_token_ids": stops}
    for shape in SHAPES:
        answer = model(family).generate([run["prompt"]], {**options, **shape, "trim_stop_tokens": False})[0]
        assert answer.token_ids == expected
        assert answer.stats["nfe"] == (run["nfe"] if shape["decoder"] == "ar" else answer.stats["nfe"])


@pytest.mark.parametrize("family", CAUSAL)
def test_sliding_is_ar_is_the_plain_model_and_drafts_are_worth_something(family: str) -> None:
    stock = model(family).hf_model
    options = {"max_new_tokens": 20, "stop_token_ids": ()}
    for sampling in ({"temperature": 0.0}, {"temperature": 1.0, "top_k": 0, "top_p": 1.0}):
        answers = [
            [
                one.token_ids
                for one in model(family).generate(PROMPTS, {**options, **sampling, **shape}, seeds=[1, 2, 3, 4])
            ]
            for shape in SHAPES
        ]
        assert answers[0] == answers[1] == answers[2]
        if sampling["temperature"]:
            continue
        stock.config._attn_implementation = "sdpa"
        try:
            for prompt, answer in zip(PROMPTS, answers[0], strict=True):
                ids = stock.generate(
                    torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, suppress_tokens=[96]
                )
                assert ids[0, len(prompt) :].tolist() == answer
        finally:
            stock.config._attn_implementation = "s2d2"
    forwards = sum(
        one.stats["nfe"] for one in model(family).generate(PROMPTS, {**options, **SHAPES[1], "temperature": 0.0})
    )
    assert forwards < 60  # of 80 tokens


def test_an_option_of_another_decoder_names_one_that_this_checkpoint_has() -> None:
    with pytest.raises(ConfigError, match=r"decoder dynamic or static or linear_spec, .*choose decoder=dynamic"):
        model("nemotron_labs_diffusion").generate([[3]], {"block_length": 4})


@pytest.mark.parametrize("family", [*CAUSAL, "tiny_a2d", "stable_diffcoder"])
def test_what_does_not_belong_to_a_checkpoint_is_refused_in_a_sentence(family: str) -> None:
    folder = DATA / family / "checkpoint"
    own: dict[str, Any] = {"family": family, "mask_token_id": 96}
    other = "wedlm" if family == "nemotron_labs_diffusion" else "nemotron_labs_diffusion"
    lora = DATA / "nemotron_labs_diffusion" / "checkpoint" / "linear_spec_lora"
    for given, said in (
        ({**own, "adapter": folder / "nowhere"}, "there is no folder"),
        ({**own, "adapter": folder}, "holds no adapter_config.json"),
        ({**own, "block_length": 0}, "block length 0 is not a positive integer"),
        ({**own, "block_length": 5000}, "does not fit its 512 positions"),
        ({**own, "mask_token_id": 97}, "mask token id 97 is not in the vocabulary"),
        ({"family": "llada2"}, "config.json lacks"),
        *([] if family == "nemotron_labs_diffusion" else [({**own, "adapter": lora}, "does not have under that name")]),
    ):
        with pytest.raises(CheckpointError, match=said) as caught:
            s2d2_lmeval.load(folder, device="cpu", **given)
        assert "\n" not in str(caught.value)
    engine = s2d2_lmeval.load(folder, device="cpu", **own)
    with pytest.raises(RequestError, match="contains the mask token"):
        engine.generate([[3, 96]], max_new_tokens=2)
    with pytest.raises(RequestError, match=r"outside the vocabulary of 97: encode it with the checkpoint's own"):
        engine.generate([[3, 97]], max_new_tokens=2)
    preset = "wedlm" if other == "wedlm" else "nemotron"
    with pytest.raises(ConfigError, match=f"preset={preset} is a setting of {other}"):
        engine.generate([[3]], {"preset": preset})


@pytest.mark.parametrize("context", ["clean", "published"])
@pytest.mark.parametrize("family", ["nemotron_labs_diffusion", "stable_diffcoder"])
def test_every_window_is_a_draft_after_its_path(family: str, context: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits are those of two forwards of the plain model, as published drafts are made: the text and the path down
    to the node; then the masks, through the draft adapter, which see the path and each other. In the published context
    a copy of the node is among them, and they don't see the node itself.
    """
    lora = {"adapter": DATA / family / "checkpoint" / "linear_spec_lora"} if family.startswith("nemotron") else {}
    engine = s2d2_lmeval.load(DATA / family / "checkpoint", device="cpu", mask_token_id=96, **lora)
    facts, window, drafts, propose = engine.facts, 5, [], Sliding._propose

    def noted(self: Sliding, logits: torch.Tensor, end: torch.Tensor) -> list[torch.Tensor]:
        sent, first = self._sent, self._sent.part("window").start
        for slot in sent["running"].flatten().nonzero().flatten().tolist():
            for number in range(int(sent["windows"][slot])):
                path, node = [], int(sent["holder"][slot, number])
                while node:
                    path, node = [int(sent["token"][slot, node]), *path], int(sent["parent"][slot, node])
                at = int(sent["base"][slot]) - first + number * (window - 1)
                drafts.append((self.rows.tokens[slot] + path, len(path), logits[at : at + window - 1].clone()))
        return propose(self, logits, end)

    monkeypatch.setattr(Sliding, "_propose", noted)
    size = {"window": window, "row_budget": 32, "draft_context": context}
    engine.generate(PROMPTS[:2], {"decoder": "sliding", "max_new_tokens": 9, "stop_token_ids": (), **size})
    assert {depth for _, depth, _ in drafts} >= {0, 1, 2}

    plain = engine.hf_model
    plain.config._attn_implementation = "sdpa"
    adapted = deepcopy(plain)
    for name, factors in draft_weights(plain).factors.items() if lora else ():
        weight = adapted.get_submodule(name).weight
        weight.data += factors.scale * (factors.high @ factors.low).to(weight.dtype)
    verifiers, copies = int(not facts.token_shift), int(context == "published")
    masks = window - 1 + (facts.token_shift and not facts.draft_shift)
    for text, _, found in drafts:
        cache, before = DynamicCache(), torch.tensor([text + [96] * verifiers])
        draft = torch.tensor([[text[-1]] * copies + [96] * masks])
        places = torch.tensor([[len(text) - 1] * copies + [len(text) + verifiers + ahead for ahead in range(masks)]])
        seen = torch.ones(1, 1, draft.shape[1], before.shape[1] + draft.shape[1], dtype=torch.bool)
        seen[..., len(text) - 1] = not copies
        with torch.no_grad():
            plain(input_ids=before, past_key_values=cache)
            logits = adapted(input_ids=draft, past_key_values=cache, position_ids=places, attention_mask=seen).logits[0]
        assert torch.allclose(found[:, :96], logits[1 - window :, :96], atol=2e-4)


@pytest.mark.parametrize("family", ["idlm", "wedlm"])
def test_masks_that_see_what_precedes_them_only_have_one_context(family: str) -> None:
    with pytest.raises(ConfigError, match=f"masks of {family} checkpoints see what precedes them only"):
        model(family).generate([[3]], {"decoder": "sliding", "draft_context": "published"})
