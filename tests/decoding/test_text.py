"""Text and chat messages as prompts; answers as text, whole and in pieces."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

import s2d2_lmeval
from s2d2_lmeval.errors import RequestError
from s2d2_lmeval.streaming import Stream, pieces
from s2d2_lmeval.toy import held_out

PROMPT = held_out("instructions")[0].prompt
MESSAGES = [{"role": "user", "content": PROMPT}]
OPTIONS = {"max_new_tokens": 40, "block_length": 2}


@cache
def model() -> s2d2_lmeval.BlockDiffusionModel:
    return s2d2_lmeval.load("toy", device="cpu")


def test_text_is_answered_with_text() -> None:
    ids = model().tokenizer(PROMPT)["input_ids"]
    text, same, given_ids = model().generate([PROMPT, PROMPT, ids], OPTIONS, seeds=[0, 0, 0])
    assert text.token_ids == same.token_ids == given_ids.token_ids
    assert text.text == model().tokenizer.decode(text.token_ids, skip_special_tokens=True)
    assert given_ids.text is None


def test_chat_messages_go_through_the_template() -> None:
    templated = model().tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    ids = model().tokenizer(templated, add_special_tokens=False)["input_ids"]
    expected = model().generate([ids], OPTIONS)[0].token_ids
    assert [answer.token_ids for answer in model().generate(MESSAGES, OPTIONS)] == [expected]
    assert model().generate([MESSAGES], OPTIONS)[0].token_ids == expected


@pytest.mark.parametrize("prompt", [PROMPT, MESSAGES], ids=["text", "messages"])
def test_a_stream_adds_up_to_the_answer(prompt: object) -> None:
    whole = model().generate([prompt], OPTIONS)[0]
    parts = list(model().stream(prompt, OPTIONS))
    assert "".join(parts) == whole.text
    assert len(parts) > 1


@pytest.mark.parametrize("options", [OPTIONS, {**OPTIONS, "decoder": "dynamic"}, {"decoder": "ar"}], ids=str)
def test_pieces_have_the_log_probabilities_of_their_tokens(options: dict[str, Any]) -> None:
    options = {**options, "stop_token_ids": (), "max_new_tokens": 21}
    whole = model().generate([PROMPT], options, logprobs="decided", top_logprobs=2)[0]
    parts = list(model().stream(PROMPT, options, logprobs="decided", top_logprobs=2))
    assert "".join(parts) == whole.text
    assert len(parts) > 1
    assert [token for part in parts for token in part.token_ids] == whole.token_ids
    assert [one for part in parts for one in part.logprobs] == whole.logprobs
    assert [one for part in parts for one in part.top_logprobs] == whole.top_logprobs
    with pytest.raises(RequestError, match="of whole answers"):
        model().stream(PROMPT, options, logprobs="ar")


def test_closing_a_stream_ends_the_decoding() -> None:
    config = model().config({**OPTIONS, "stop_token_ids": ()})
    lengths = []

    def run(stream: Stream) -> Any:
        ids = model().tokenizer(PROMPT)["input_ids"]
        answer = model().generate([ids], config, max_new_tokens=400, stop=stream.stop)[0]
        lengths.append(len(answer.token_ids))
        return answer

    stream = pieces(model().tokenizer, config, 400, run)
    next(stream)
    stream.close()
    assert lengths[0] < 400


def test_errors_come_out_of_a_stream() -> None:
    with pytest.raises(RequestError, match="context holds"):
        list(model().stream(PROMPT, OPTIONS, max_new_tokens=10**6))


WRONG: list[Any] = ["text", 5, [5], [{"role": "user"}], [[{"role": "user", "content": "a"}, 7]], {"input_ids": [[5]]}]


@pytest.mark.parametrize("prompts", WRONG)
def test_a_wrong_type_gets_a_sentence(prompts: object) -> None:
    with pytest.raises(RequestError, match=r"is not|mixes"):
        model().generate(prompts, OPTIONS)


def test_representations_are_short() -> None:
    assert len(repr(model())) < 200
    assert len(repr(model().generate([[1, 2, 3]], {"max_new_tokens": 4}))) < 200


def test_nothing_after_a_stop_or_the_limit_is_passed_on() -> None:
    passed: list[list[int]] = []
    config = model().config({"stop_token_ids": (9,)})
    stream = Stream(lambda tokens, _: passed.append(tokens), config, 7, lambda index, new: 6 if len(new) > 6 else None)
    assert stream.stop(0, [1, 2, 3]) is None
    assert stream.stop(0, [1, 2, 3, 4]) is None
    assert stream.stop(0, [1, 2, 3, 4, 5, 6, 7, 8]) == 6
    assert passed == [[1, 2, 3], [4], [5, 6]]
    Stream(lambda tokens, _: passed.append(tokens), config, 7).stop(0, [1, 9, 3])
    assert passed[-1] == [1]
