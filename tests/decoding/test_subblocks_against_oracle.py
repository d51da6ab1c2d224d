"""The engine decodes sub-blocks as the oracle does: ids, forwards and decoding order, on every decoder and option."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .drawn import POLICIES
from .oracle_loop import assert_same_course
from .subblocks_drawn import Case, cases

TARGETS = [("ar", None), ("dynamic", None), *(("s2d2", policy) for policy in POLICIES)]


def check_same(case: Case) -> None:
    (expected, new_tokens), answer = case.by_oracle(), case.by_engine(schedule="reference")
    assert answer.token_ids == new_tokens
    assert_same_course(answer, expected, case.options.decoder)
    fused = case.by_engine(schedule="fused")
    assert fused.token_ids == new_tokens
    assert fused.finish_reason == answer.finish_reason
    assert fused.stats["nfe"] <= expected.nfe


@pytest.mark.parametrize(("decoder", "policy"), TARGETS)
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_engine_decodes_what_the_definition_says(decoder: str, policy: str | None, data: st.DataObject) -> None:
    check_same(data.draw(cases(decoder, policy)))


@pytest.mark.slow
@pytest.mark.parametrize(("decoder", "policy"), TARGETS)
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_engine_decodes_what_the_definition_says_at_length(
    decoder: str, policy: str | None, data: st.DataObject
) -> None:
    check_same(data.draw(cases(decoder, policy)))
