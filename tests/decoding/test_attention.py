"""Attention without graphs: wide passes with grouped heads, flash-attn in two parts, and which back end is chosen."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.runtime import attention


def prefix_in_torch(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    slots: torch.Tensor | None,
    scale: float,
) -> attention.Part:
    """The twin of the library's kernel: what it computes, in plain torch."""
    span = int(lengths.max())
    rows = torch.arange(len(queries), device=queries.device) if slots is None else slots
    inside = torch.arange(span, device=queries.device) < lengths.unsqueeze(1)
    mask = inside.unsqueeze(1).expand(-1, queries.shape[1], -1)
    return attention.among_fellows(queries, keys[rows, :span], values[rows, :span], mask, scale)


# ---- wide passes with grouped heads ----


def test_grouped_heads_of_a_wide_pass_need_no_kernel_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mask, ``enable_gqa`` leaves many GPUs only the kernel that materialises the scores."""
    width = attention.GROUPED + 1
    queries, keys, values, visible, prefix, _ = case(3, width, 6, 3, [7, 0, 20], None)
    keys, values = keys.repeat(1, 4, 1, 1), values.repeat(1, 4, 1, 1)
    context = attention.AttentionContext(3, width, 100, visible, prefix, prefix, prefix, prefix)
    context.mask = attention.prefix_mask(visible, prefix, 100)
    expected = torch.nn.functional.scaled_dot_product_attention(
        queries.transpose(1, 2),
        *(one[:3, :100].transpose(1, 2).repeat_interleave(3, dim=1) for one in (keys, values)),
        attn_mask=context.mask,
        scale=0.3,
    )
    plain = attention.scaled_dot_product_attention

    def watched(*tensors: torch.Tensor, attn_mask: torch.Tensor, scale: float) -> torch.Tensor:
        assert len({one.shape[1] for one in tensors}) == 1  # as many key heads as heads
        return plain(*tensors, attn_mask=attn_mask, scale=scale)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", watched)
    got = attention._sdpa(context, queries, keys, values, 0.3)
    torch.testing.assert_close(got, expected.transpose(1, 2))


# ---- flash ----


def case(rows: int, width: int, heads: int, groups: int, lengths: list[int], slots: list[int] | None) -> Any:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    queries = drawn(rows, width, heads, 8)
    storage = [drawn(6, 40, heads // groups, 8) for _ in range(2)]
    visible = torch.rand(rows, width, width, generator=generator) < 0.5
    visible |= torch.eye(width, dtype=torch.bool)
    return queries, *storage, visible, torch.tensor(lengths), None if slots is None else torch.tensor(slots)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize(("lengths", "slots"), [([7, 0, 20], [4, 1, 2]), ([0, 0, 0], None), ([33, 1, 2], None)])
def test_both_parts_merged_are_the_attention_over_everything(
    groups: int, width: int, lengths: list[int], slots: list[int] | None
) -> None:
    queries, keys, values, visible, prefix, at = case(3, width, 6, groups, lengths, slots)
    rows = torch.arange(3) if at is None else at
    place = prefix.unsqueeze(1) + torch.arange(width)
    fresh = [storage[rows.unsqueeze(1), place] for storage in (keys, values)]
    part = prefix_in_torch(queries, keys, values, prefix, at, 0.3)
    got = attention.merge(part, attention.among_fellows(queries, *fresh, visible, 0.3), prefix)
    mask = attention.prefix_mask(visible, prefix, 40)
    expected = torch.nn.functional.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys[rows].transpose(1, 2),
        values[rows].transpose(1, 2),
        attn_mask=mask,
        scale=0.3,
        enable_gqa=True,
    )
    torch.testing.assert_close(got, expected.transpose(1, 2))


@pytest.mark.parametrize("log_mass", [torch.inf, -torch.inf, torch.nan])
def test_whatever_a_kernel_makes_of_an_empty_prefix_does_not_matter(log_mass: float) -> None:
    queries, keys, values, visible, prefix, _ = case(2, 3, 4, 2, [0, 5], None)
    out, mass = prefix_in_torch(queries, keys, values, prefix, None, 1.0)
    fresh = [storage[:2, :3] for storage in (keys, values)]
    here = attention.among_fellows(queries, *fresh, visible, 1.0)
    expected = attention.merge((out, mass), here, prefix)
    out[0], mass[0] = torch.nan, log_mass
    torch.testing.assert_close(attention.merge((out, mass), here, prefix), expected)
    torch.testing.assert_close(expected[0], here[0][0])


def test_back_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert attention.choose_backend("sdpa", cuda) == "sdpa"
    with pytest.raises(ConfigError, match="is not a back end"):
        attention.choose_backend("flex")
    monkeypatch.setattr(attention, "prefix_kernel", lambda dtype: None)
    assert attention.choose_backend("auto", cuda) == "sdpa"
    with pytest.raises(ConfigError, match="needs flash-attn"):
        attention.choose_backend("flash", cuda)
    monkeypatch.setattr(attention, "prefix_kernel", lambda dtype: prefix_in_torch)
    assert attention.choose_backend("auto", cuda) == "flash"
    assert attention.choose_backend("auto", cuda, torch.float32) == "sdpa"
    assert attention.choose_backend("auto", cpu) == "sdpa"
    with pytest.raises(ConfigError, match="in bfloat16 or float16 only"):
        attention.choose_backend("flash", cuda, torch.float32)
    with pytest.raises(ConfigError, match=r"attention=triton needs Triton .* this is torch.float64 and 128"):
        attention.choose_backend("triton", cuda, torch.float64)
    assert attention.choose_backend("triton", cpu) == "triton"
    monkeypatch.setattr(attention, "attends", lambda heads, device, dtype: dtype != torch.float64)
    assert attention.choose_backend("auto", cuda) == "triton"
    assert attention.choose_backend("auto", cuda, torch.float64) == "sdpa"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ImportError('undefined symbol: _ZN2at4_ops5zeros')", "undefined symbol"),  # built for another torch
        ("", "has no attribute 'flash_attn_with_kvcache'"),  # flash-attn 4 has no such function
        ("def flash_attn_with_kvcache(): ...", None),
    ],
)
def test_a_library_that_does_not_work_is_not_used(
    code: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "flash_attn.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    kernel = partial(attention.prefix_kernel.__wrapped__, torch.float16)
    assert (kernel() is None) == (said is not None)
    assert said is None or said in caplog.text
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert kernel() is None
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)


@pytest.mark.parametrize(
    ("dtype", "capability", "taken"),
    [
        (torch.bfloat16, (9, 0), "fa3_fwd_interface"),
        (torch.float16, (9, 0), "flash_attn"),  # the wheel of flash-attn 3 is built without
        (torch.bfloat16, (8, 0), "flash_attn"),
        (torch.bfloat16, (10, 0), "flash_attn"),
    ],
)
def test_flash_attn_3_is_taken_where_it_runs(
    dtype: torch.dtype, capability: tuple[int, int], taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for library in ("flash_attn", "fa3_fwd_interface"):
        (tmp_path / f"{library}.py").write_text("def flash_attn_with_kvcache(): ...")
        monkeypatch.delitem(sys.modules, library, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    kernel = attention.prefix_kernel.__wrapped__(dtype)
    assert kernel is not None
    assert kernel.args[0].__module__ == taken
    for library in ("flash_attn", "fa3_fwd_interface"):
        monkeypatch.delitem(sys.modules, library, raising=False)


def test_the_librarys_arguments() -> None:
    """Both releases of flash-attn take a cache, a length and a slot per row, and return the log-sum-exp on request."""
    seen: dict[str, Any] = {}

    def library(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **given: Any) -> Any:
        seen.update(given, keys=keys)
        return "out", "mass", "more of flash-attn 3"

    queries, keys, values, _, prefix, at = case(3, 2, 4, 2, [1, 2, 3], [4, 1, 2])
    assert attention._by_library(library, queries, keys, values, prefix, at, 0.5) == ("out", "mass")
    assert seen["keys"] is keys
    assert seen["cache_seqlens"].dtype == seen["cache_batch_idx"].dtype == torch.int32
    assert seen["cache_batch_idx"].tolist() == [4, 1, 2]
    assert (seen["softmax_scale"], seen["causal"], seen["return_softmax_lse"]) == (0.5, False, True)
    attention._by_library(library, queries, keys, values, prefix, None, 0.5)
    assert (len(seen["keys"]), seen["cache_batch_idx"]) == (3, None)


# ---- on a device ----

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@on_gpu
def test_flash_attn_is_its_twin() -> None:
    kernel = attention.prefix_kernel(torch.bfloat16)
    if kernel is None:
        pytest.skip("flash-attn is not installed")
    generator = torch.Generator("cuda").manual_seed(0)
    half = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    queries, keys, values = (torch.randn(*s, **half) for s in ((3, 5, 8, 64), (6, 300, 2, 64), (6, 300, 2, 64)))
    lengths, slots = torch.tensor([7, 120, 299], device="cuda"), torch.tensor([4, 1, 2], device="cuda")
    out, mass = kernel(queries, keys, values, lengths, slots, 0.125)
    twin, twin_mass = prefix_in_torch(queries.float(), keys.float(), values.float(), lengths, slots, 0.125)
    torch.testing.assert_close(out.float(), twin, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(mass, twin_mass, rtol=1e-3, atol=1e-3)
