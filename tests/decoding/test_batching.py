"""A request's answer does not depend on what it was batched with, on its slot, or on when it was admitted."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ..answers import told
from .drawn import MASK, options, prompts
from .test_engine_against_oracle import TARGETS
from .tiny import engine, engine_config


def check_batches(data: st.DataObject, decoder: str, policy: str | None) -> None:
    config = engine_config(
        data.draw(options(decoder, policy)),
        random_source=data.draw(st.sampled_from(["keyed", "keyed", "fixed"])),
        seed=data.draw(st.integers(0, 99)),
    )
    schedules = ["reference", "fused"]
    if decoder == "s2d2" and config.cache_ver and config.draft_ver:
        schedules.append("lookahead")
    config = config.replace(schedule=data.draw(st.sampled_from(schedules)))
    texts = data.draw(st.lists(prompts(), min_size=2, max_size=8))
    budgets = data.draw(st.lists(st.integers(0, 14), min_size=len(texts), max_size=len(texts)))
    seeds = data.draw(st.lists(st.integers(-5, 50), min_size=len(texts), max_size=len(texts)))
    alone = [
        told(engine().generate([text], config, max_new_tokens=budget, seeds=[seed])[0])
        for text, budget, seed in zip(texts, budgets, seeds, strict=True)
    ]
    order = data.draw(st.permutations(range(len(texts))))
    rows = data.draw(st.integers(2, 8))
    together = engine(max_batch=rows).generate(
        [texts[i] for i in order],
        config,
        max_new_tokens=[budgets[i] for i in order],
        seeds=[seeds[i] for i in order],
    )
    for seat, i in enumerate(order):
        assert told(together[seat]) == alone[i]


@pytest.mark.parametrize(("decoder", "policy"), TARGETS)
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_request_decodes_the_same_alone_and_in_any_batch(
    decoder: str, policy: str | None, data: st.DataObject
) -> None:
    check_batches(data, decoder, policy)


@pytest.mark.slow
@pytest.mark.parametrize(("decoder", "policy"), TARGETS)
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_request_decodes_the_same_alone_and_in_any_batch_at_length(
    decoder: str, policy: str | None, data: st.DataObject
) -> None:
    check_batches(data, decoder, policy)


@pytest.mark.parametrize("size", range(2, 9))
@pytest.mark.parametrize("seat", ["first", "middle", "last"])
def test_every_seat_of_every_batch_size(size: int, seat: str) -> None:
    config = {"block_length": 4, "max_new_tokens": 9, "confidence_threshold": 0.5}
    request, others = [3, 1, 4, 1, 5], [[(i * k + k) % MASK for i in range(2 * k + 1)] for k in range(1, size)]
    place = {"first": 0, "middle": size // 2, "last": size - 1}[seat]
    batch = [*others[:place], request, *others[place:]]
    seeds = [100 + i for i in range(size)]
    seeds[place] = 7
    alone = engine().generate([request], config, seeds=[7])[0]
    assert told(engine(max_batch=size).generate(batch, config, seeds=seeds)[place]) == told(alone)


@pytest.mark.parametrize("schedule", ["reference", "fused"])
def test_waiting_prompts_take_freed_rows_at_once(schedule: str) -> None:
    model, count, rows = engine(max_batch=3, seed=1), 11, 3
    texts = [[(3 * i + j) % MASK for j in range(1 + i % 6)] for i in range(count)]
    budgets = [1 + 5 * (i % 4) for i in range(count)]
    model.trace.reset(keep_records=True)
    finished_after: list[int] = []
    config = {"block_length": 4, "schedule": schedule}
    answers = model.generate(
        texts,
        config,
        max_new_tokens=budgets,
        on_finished=lambda i, answer: finished_after.append(len(model.trace.records)),
    )
    assert len(finished_after) == count
    for index, record in enumerate(model.trace.records):
        done = sum(end <= index for end in finished_after)
        assert len(record.kinds) == min(rows, count - done)
    assert model.trace.totals()["nfe"] == sum(answer.stats["nfe"] for answer in answers)
    assert model.trace.totals()["new_tokens"] == sum(len(answer.token_ids) for answer in answers)


def test_equal_prompts_with_other_seeds_sample_otherwise_and_with_the_same_seed_alike() -> None:
    config = {"block_length": 4, "max_new_tokens": 16, "do_sample": True}
    answers = engine().generate([[1, 2, 3]] * 5, config, seeds=[0, 1, 2, 3, 0])
    assert answers[0].token_ids == answers[4].token_ids
    assert len({tuple(answer.token_ids) for answer in answers}) == 4


@pytest.mark.parametrize("decoder", ["ar", "dynamic", "sliding"])
def test_the_prompts_of_a_forward_are_bounded(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[(i + j) % MASK for j in range(60)] for i in range(4)]
    model = engine(max_batch=4)
    options = {"decoder": decoder, "max_new_tokens": 6}
    expected = [answer.token_ids for answer in model.generate(prompts, options)]
    monkeypatch.setattr("s2d2_lmeval.decoding.engine.PREFILL_TOKENS", 64)
    model.trace.reset(keep_records=True)
    assert [answer.token_ids for answer in model.generate(prompts, options)] == expected
    prefills = [record for record in model.trace.records if set(record.kinds) == {"prefill"}]
    assert len(prefills) >= 3
    assert max(int(record.widths.sum()) for record in prefills) <= 64
