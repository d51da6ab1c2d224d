"""What one pass over the vocabulary tells of a row of logits, from torch and from the kernel."""

from __future__ import annotations

import pytest
import torch

from s2d2_lmeval.decoding.sampling import row_statistics as module
from s2d2_lmeval.decoding.sampling.row_statistics import arg_max, in_torch, likeliest, probability_of, row_statistics

SHAPES = [(1, 1), (3, 5), (7, 64), (4, 65), (9, 640), (33, 5000), (6, 4160)]


def drawn(rows: int, vocabulary: int) -> torch.Tensor:
    """Logits with ties, tokens that are ruled out, a first part without any weight, and a far outlier."""
    logits = 4 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(rows + vocabulary))
    if vocabulary > 4:
        logits[:, vocabulary // 2] = -torch.inf
        logits[1:2] = 2.0
        logits[2:3, [0, -1]] = 30.0
        logits[0, -1] = 90.0
    if vocabulary > 70:
        logits[3:4, :64] = -torch.inf
    return logits


def check(logits: torch.Tensor, tolerance: float) -> None:
    got = row_statistics(logits)
    exact = logits.double()
    p = exact.softmax(-1)
    expected = {
        "first": p.max(-1).values,
        "second": p.topk(2, -1).values[:, 1] if p.shape[1] > 1 else torch.zeros(len(p)),
        "normaliser": exact.logsumexp(-1),
        "entropy": torch.special.entr(p).sum(-1),
        "collision": p.square().sum(-1),
    }
    assert torch.equal(got.token.cpu(), logits.argmax(-1).cpu())
    for name, value in expected.items():
        torch.testing.assert_close(
            getattr(got, name).double().cpu(), value.double().cpu(), rtol=tolerance, atol=tolerance, msg=name
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_statistics_are_those_of_the_softmax(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check(drawn(*shape).to(dtype), 2e-5 if dtype == torch.float32 else 1e-10)


def test_rows_are_treated_a_few_at_a_time_to_the_same_end(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = drawn(33, 640)
    whole = in_torch(logits)
    monkeypatch.setattr(module, "ELEMENTS_AT_ONCE", 1000)
    for one, other in zip(whole, in_torch(logits), strict=True):
        assert torch.equal(one, other)


def test_no_rows() -> None:
    assert all(len(column) == 0 for column in row_statistics(torch.empty(0, 7)))
    assert len(arg_max(torch.empty(0, 64))) == 0


def test_what_is_no_number_stays_none() -> None:
    logits = drawn(9, 640)
    logits[4, 100] = torch.nan
    found = row_statistics(logits)
    for name in ("first", "normaliser", "entropy", "collision"):
        assert getattr(found, name).isnan().tolist() == [row == 4 for row in range(9)]


def test_logits_are_left_alone() -> None:
    logits = drawn(9, 640)
    before = logits.clone()
    row_statistics(logits)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_of_equals_wins(shape: tuple[int, int]) -> None:
    logits = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(1)).float()
    assert torch.equal(arg_max(logits), logits.argmax(-1))


def test_tokens_and_their_probabilities() -> None:
    logits = drawn(9, 640)
    p = logits.softmax(-1)
    tokens, confidence = likeliest(logits)
    torch.testing.assert_close(confidence, p.max(-1).values)
    assert torch.equal(tokens, logits.argmax(-1))
    others = torch.arange(9)
    torch.testing.assert_close(probability_of(logits, others), p[torch.arange(9), others])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("shape", [*SHAPES, (64, 151936)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_on_the_device(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check(drawn(*shape).to("cuda", dtype), 2e-5)
