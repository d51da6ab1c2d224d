"""``--model s2d2`` through the harness's own ``simple_evaluate``, on a tiny random checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from s2d2_lmeval.decoding.generation import Generation, Progress
from s2d2_lmeval.errors import ConfigError, RequestError
from s2d2_lmeval.harness.model import S2D2LM
from s2d2_lmeval.harness.prompts import request_key

from .conftest import write_task

PROMPTS = ["Q: one? A:", "Q: a much longer question, is it not? A:", "x", "é€😀", "Q: one? A:"]


@pytest.fixture
def evaluate(checkpoint: Path, task_folder: Path) -> Callable[..., Any]:
    def run(task: str | list[str], model_args: dict[str, Any] | None = None, **options: Any) -> Any:
        return simple_evaluate(
            model="s2d2",
            model_args={"pretrained": str(checkpoint), **(model_args or {})},
            tasks=[task] if isinstance(task, str) else task,
            task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
            device="cpu",
            bootstrap_iters=0,
            **options,
        )

    return run


# Results


def test_accuracy_and_statistics_in_one_table(evaluate: Callable[..., Any]) -> None:
    results = evaluate("tiny_free", batch_size=4)
    row = results["results"]["tiny_free"]
    assert row["exact_match,text"] == 0.0
    assert row["nfe,decode"] > 0
    assert row["new_tokens,decode"] <= 12
    about = results["config"]["s2d2"]
    assert about["totals"]["requests"] == 6
    assert about["totals"]["new_tokens"] == about["tasks"]["tiny_free"]["new_tokens"] == 6 * row["new_tokens,decode"]
    assert about["totals"]["nfe"] == about["tasks"]["tiny_free"]["nfe"] == 6 * row["nfe,decode"]
    assert about["rows_in_flight"] == 4
    assert about["configurations"][0]["decoding"]["decoder"] == about["decoder"] == "s2d2"
    assert about["environment"]["attention"] == "sdpa"
    json.dumps(about)
    assert json.dumps(results["samples"]["tiny_free"])
    assert all(sample["s2d2"][0]["nfe"] > 0 for sample in results["samples"]["tiny_free"])


def test_task_arguments_override_model_arguments(evaluate: Callable[..., Any]) -> None:
    results = evaluate("tiny_ar", {"max_new_tokens": 99})
    assert results["results"]["tiny_ar"]["nfe,decode"] == results["results"]["tiny_ar"]["new_tokens,decode"] == 8
    about = results["config"]["s2d2"]
    assert about["configurations"][0]["decoding"]["decoder"] == about["decoder"] == "ar"
    assert about["promise"] == about["configurations"][0]["promise"]


def test_what_decoded_is_recorded_not_what_would_have(
    evaluate: Callable[..., Any], task_folder: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"gen_kwargs": {"decoder": "dynamic", "seed": 7}, "use_cache": str(tmp_path / "answers")}
    for cached in (0, 6):  # the second run finds every answer in the cache
        about = evaluate("tiny_free", {"decoder": "ar"}, **options)["config"]["s2d2"]
        assert (about["decoder"], about["seed"], about["cached_responses"]) == ("dynamic", 7, cached)
        assert about["promise"] == about["configurations"][0]["promise"]
    about = evaluate(["tiny_free", "tiny_ar"])["config"]["s2d2"]
    assert (about["decoder"], about["promise"], about["seed"]) == (None, None, 1234)
    assert {one["decoding"]["decoder"] for one in about["configurations"]} == {"s2d2", "ar"}


@pytest.mark.parametrize("given", ["do_sample=True", "temperature=0.7"])
def test_overridden_options_are_told(requests: Any, make: Callable[..., S2D2LM], given: str) -> None:
    name, _, value = given.partition("=")
    model = make(**{name: value}, seed=3, gen_length=2)
    told: list[logging.LogRecord] = []
    logger = logging.getLogger("lm_eval.s2d2")  # which propagates or not, by what ran before
    logger.addFilter(told.append)  # type: ignore[arg-type]  # it answers None, so nothing is logged
    try:
        model.generate_until(requests(["x"], do_sample=False, seed=3, max_gen_toks=1), disable_tqdm=True)
    finally:
        logger.removeFilter(told.append)  # type: ignore[arg-type]
    assert {record.getMessage() for record in told if record.levelno == logging.WARNING} == {
        f"a task's generation_kwargs set {name}={value}, which overrides {given} of --model_args; "
        f"--gen_kwargs {name}=… overrides both."
        for name, value, given in (("do_sample", False, "do_sample=True"), ("max_new_tokens", 1, "gen_length=2"))
    }
    assert "drawing" in model.told  # only drafts are the argmax then


@pytest.mark.parametrize("own", [True, False])
def test_figures_that_the_harness_would_score_as_text_are_refused_at_once(
    evaluate: Callable[..., Any], task_folder: Path, tmp_path: Path, own: bool
) -> None:
    text = (task_folder / "tiny_free.yaml").read_text().replace("!function code", f"!function {task_folder}/code")
    kept = [line for line in text.splitlines() if own or not line.startswith("process_results")]
    task = tmp_path / "figures.yaml"
    task.write_text("\n".join(line for line in kept if own or "metric:" not in line or "exact_match" in line))
    if own:
        assert evaluate(str(task), limit=1)["results"]
    else:
        with pytest.raises(ConfigError, match=r"task tiny_free: the harness cannot score .*with_decoding_metrics"):
            evaluate(str(task), limit=1)


# Answers


def test_answers_do_not_depend_on_what_else_is_asked(requests: Any, make: Callable[..., S2D2LM], lm: S2D2LM) -> None:
    """Rows in flight, order, --limit: the same prompt of a document always gets the same answer."""
    options = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 5}
    answers = lm.generate_until(requests(PROMPTS, **options), disable_tqdm=True)
    assert len(set(answers)) > 2
    backwards = lm.generate_until(requests(PROMPTS[::-1], **options), disable_tqdm=True)[::-1]
    one_by_one = make(batch_size=1)
    alone = [one_by_one.generate_until(requests([prompt], **options), disable_tqdm=True)[0] for prompt in PROMPTS]
    assert answers == backwards == alone


def test_repeats_differ(requests: Any, lm: S2D2LM) -> None:
    one = requests(["Q: one? A:"], do_sample=True, temperature=1.0, max_gen_toks=8)
    answers = lm.generate_until(one * 4, disable_tqdm=True)
    assert len(set(answers)) == 4
    assert lm.generate_until(one * 4, disable_tqdm=True) == answers


def test_stop_strings_end_decoding_inside_a_block(requests: Any, lm: S2D2LM) -> None:
    """The text is the prefix that the harness would cut; the statistics count no token after the stop."""
    prompt = PROMPTS[1]
    (free,) = lm.generate_until(requests([prompt], max_gen_toks=16), disable_tqdm=True)
    letters = [letter for letter in free if letter.isascii()]
    stop = next(letter for letter in letters if free.index(letter) > 3)
    (answer,) = lm.generate_until(requests([prompt], max_gen_toks=16, until=[stop]), disable_tqdm=True)
    assert answer == free.split(stop)[0]
    assert answer.stats["finish_reason"] == "stop_string"
    tokens = lm.tok_encode(prompt)
    (generation,) = lm.engine.generate([tokens], lm.decoding, max_new_tokens=16, seeds=[request_key(tokens, 0)])
    text_of = [lm.tok_decode(generation.token_ids[:count], skip_special_tokens=False) for count in range(17)]
    assert answer.stats["new_tokens"] == next(count for count, text in enumerate(text_of) if stop in text)


def test_special_stop_strings_are_stop_tokens(requests: Any, lm: S2D2LM) -> None:
    lm.generate_until(requests(["x"], max_gen_toks=1, until=["<|im_start|>", "\n"]), disable_tqdm=True)
    im_end, im_start = (lm.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|im_start|>"))
    assert list(lm.configurations.values())[-1]["stop_token_ids"] == [im_end, im_start]


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens"])
@pytest.mark.parametrize("budget", [0, 1, 5])
def test_budgets(requests: Any, lm: S2D2LM, name: str, budget: int) -> None:
    for answer in lm.generate_until(requests(PROMPTS[:3], **{name: budget}), disable_tqdm=True):
        assert answer.stats["new_tokens"] <= budget
        assert (answer == "") >= (budget == 0)


def test_the_default_budget(make: Callable[..., S2D2LM], lm: S2D2LM) -> None:
    assert lm.max_gen_toks == 256
    assert make(gen_length=7).max_gen_toks == 7


def test_a_loaded_model_is_taken_too(requests: Any, make: Callable[..., S2D2LM], lm: S2D2LM) -> None:
    ready = S2D2LM(pretrained=lm.engine.hf_model, tokenizer=lm.tokenizer, batch_size=2)
    asked = requests(PROMPTS[:2], max_gen_toks=4)
    assert ready.generate_until(asked, disable_tqdm=True) == lm.generate_until(asked, disable_tqdm=True)
    assert ready.get_model_info()["s2d2"]["totals"]["requests"] == 2
    ready.reset_totals()
    assert "totals" not in ready.get_model_info()["s2d2"]


def test_decoding_order_on_demand(requests: Any, make: Callable[..., S2D2LM], lm: S2D2LM) -> None:
    (plain,) = lm.generate_until(requests(["x"], max_gen_toks=4), disable_tqdm=True)
    (traced,) = make(log_decoding_order=True).generate_until(requests(["x"], max_gen_toks=4), disable_tqdm=True)
    assert "decoding_order" not in plain.stats
    assert traced == plain
    assert traced.stats["decoding_order"][0][0] == "|"


def test_log_probabilities_on_demand(evaluate: Callable[..., Any]) -> None:
    kept = evaluate("tiny_free", model_args={"logprobs": True, "top_logprobs": 2})
    for sample in kept["samples"]["tiny_free"]:
        (stats,) = sample["s2d2"]
        assert len(stats["logprobs"]) == len(stats["top_logprobs"]) > 0
        assert all(len(best) == 2 for best in stats["top_logprobs"])
    json.dumps(kept["samples"]["tiny_free"])


def test_thinking_is_cut_off(requests: Any, make: Callable[..., S2D2LM], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the harness' ``hf`` does it: the answer begins after the last end token, stop strings count everywhere."""
    model = make(think_end_token=260)
    written, kept = "a</think>b</think>\nc\n\nd", []

    def generate(prompts: Any, config: Any, *, stop: Any, on_finished: Any, **rest: Any) -> None:
        encoded = model.tokenizer(written, add_special_tokens=False)["input_ids"]
        kept.append(stop(0, encoded))
        on_finished(0, Generation(encoded[: kept[-1]], "stop_string", {}, [], Progress()))

    monkeypatch.setattr(model.engine, "generate", generate)
    asked = requests(["x"], until=["\n\n"], max_gen_toks=50)
    assert model.generate_until(asked, disable_tqdm=True) == ["c"]
    written = "a\n\nb</think>c"
    assert model.generate_until(asked, disable_tqdm=True) == ["a"]
    assert kept == [8, 3]
    with pytest.raises(ConfigError, match="think_end_token=260"):
        make(think_end_token="</think>")


# Scoring


def test_scores_are_those_of_the_engine(lm: S2D2LM) -> None:
    pairs = [("Q: one? A:", " yes"), ("Q: one? A:", " no, not at all"), ("", "abc")]
    asked = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    scores = lm.loglikelihood(asked, disable_tqdm=True)
    tokens = [[lm.tok_encode(text) for text in pair] for pair in pairs]
    tokens[2][0] = [lm.prefix_token_id]
    for (score, greedy), (expected, expected_greedy) in zip(
        scores, lm.engine.score([(context, continuation) for context, continuation in tokens]), strict=True
    ):
        assert score == pytest.approx(expected)
        assert score < 0
        assert greedy == expected_greedy


def test_rolling_scores_cover_every_token_once(make: Callable[..., S2D2LM], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(max_length=16)
    text = "a text that is longer than sixteen tokens, by some"
    asked = [Instance("loglikelihood_rolling", {}, (string,), 0) for string in (text, "short")]
    scored: list[tuple[list[int], list[int]]] = []

    def score(pairs: Any, on_scored: Any) -> None:
        scored.extend(pairs)
        for index, (_, continuation) in enumerate(pairs):
            on_scored(index, (-float(len(continuation)), True))

    monkeypatch.setattr(model.engine, "score", score)
    assert model.loglikelihood_rolling(asked, disable_tqdm=True) == [-float(len(text)), -5.0]
    assert all(len(context) + len(continuation) <= 16 for context, continuation in scored)
    assert ([model.prefix_token_id], model.tok_encode("short")) in scored
    tokens = [token for _, continuation in scored for token in continuation]
    assert sorted(tokens) == sorted(model.tok_encode(text + "short"))


@pytest.mark.parametrize("name", ["max_new_tokens", "max_gen_toks", "max_tokens"])
def test_gen_kwargs_win_over_a_task_s_budget_whatever_its_name(evaluate: Callable[..., Any], name: str) -> None:
    results = evaluate("tiny_ar", {"decoder": "ar"}, gen_kwargs=f"{name}=3", limit=2)
    tokens = [configuration["max_new_tokens"] for configuration in results["config"]["s2d2"]["configurations"]]
    assert tokens == [3]
    assert results["config"]["s2d2"]["tasks"]["tiny_ar"]["new_tokens"] <= 6


def test_scoring_tasks(evaluate: Callable[..., Any]) -> None:
    results = evaluate("tiny_choices", batch_size=2, limit=3)
    assert results["results"]["tiny_choices"]["acc,none"] in (0.0, 1 / 3, 2 / 3, 1.0)
    assert results["config"]["s2d2"]["scoring"]["requests"] == 6
    assert evaluate("tiny_rolling", limit=2)["results"]["tiny_rolling"]["word_perplexity,none"] > 1


def test_long_contexts_are_cut_unless_that_is_forbidden(make: Callable[..., S2D2LM]) -> None:
    asked = [Instance("loglikelihood", {}, ("a" * 300, " b"), 0)]
    with pytest.raises(RequestError, match="truncation=False"):
        make(truncation=False).loglikelihood(asked, disable_tqdm=True)
    model = make()
    assert model.loglikelihood(asked, disable_tqdm=True)[0][0] < 0
    assert model.get_model_info()["s2d2"]["scoring"]["truncated_prompts"] == 1


# The harness around it


def test_chat_templates(evaluate: Callable[..., Any]) -> None:
    results = evaluate("tiny_free", limit=1, apply_chat_template=True, system_instruction="Be brief.")
    prompt = results["samples"]["tiny_free"][0]["arguments"][0][0]
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert prompt.endswith("<|im_start|>assistant\n")


def test_limit_does_not_change_answers(evaluate: Callable[..., Any]) -> None:
    few, all_ = (evaluate("tiny_free", batch_size=4, limit=limit)["samples"]["tiny_free"] for limit in (2, None))
    answers = [{sample["doc_id"]: sample["resps"] for sample in samples} for samples in (few, all_)]
    assert answers[0] == {doc: answers[1][doc] for doc in (0, 1)}


# Presets


def test_a_preset_of_the_run_and_of_a_task(evaluate: Callable[..., Any], task_folder: Path) -> None:
    """A task's preset takes the place of the run's, under what the run gave."""
    write_task(task_folder, "tiny_preset", until=[], max_gen_toks=6, preset="sdar-a")
    about = evaluate("tiny_free", {"preset": "sdar-b", "threshold": 0.7}, limit=1)["config"]["s2d2"]
    assert about["preset"] == "sdar-b"
    (group,) = about["configurations"]
    decoding = group["decoding"]
    assert (decoding["preset"], decoding["block_length"], decoding["score_penalty_coef"]) == ("sdar-b", 16, 0.0)
    assert decoding["confidence_threshold"] == 0.7
    about = evaluate("tiny_preset", {"preset": "sdar-b", "threshold": 0.7}, limit=1)["config"]["s2d2"]
    decoding = about["configurations"][0]["decoding"]
    assert (decoding["preset"], decoding["block_length"], decoding["score_penalty_coef"]) == ("sdar-a", 4, 1.0)
    assert decoding["confidence_threshold"] == 0.7


def test_a_block_length_of_a_task_brings_its_published_setting(requests: Any, lm: S2D2LM) -> None:
    lm.generate_until(requests(["x"], max_gen_toks=1, block_length=16), disable_tqdm=True)
    decoding = list(lm.configurations.values())[-1]["decoding"]
    assert (decoding["block_length"], decoding["denoising_steps"], decoding["score_penalty_coef"]) == (16, 16, 0.0)


def test_what_the_run_gave_for_another_decoder_than_the_task_s_falls_away(
    requests: Any, make: Callable[..., S2D2LM]
) -> None:
    model = make(min_ssd_span_length=2, seed=3)
    model.generate_until(requests(["x"], max_gen_toks=1, decoder="ar"), disable_tqdm=True)
    decoding = list(model.configurations.values())[-1]["decoding"]
    assert (decoding["decoder"], decoding["seed"]) == ("ar", 3)


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("fast-a", "sdar has sdar-a, sdar-b"),
        ("sdar-c", r"Did you mean sdar-b\?"),
        (3, "preset=3 is not of the right type"),
    ],
)
def test_a_preset_that_does_not_fit(
    requests: Any, make: Callable[..., S2D2LM], lm: S2D2LM, preset: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(preset=preset)
    with pytest.raises(ConfigError, match=message):
        lm.generate_until(requests(["x"], preset=preset), disable_tqdm=True)
