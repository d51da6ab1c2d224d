"""Quantized checkpoints in their published layouts come to the values that they stand for, or are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from s2d2_lmeval import load
from s2d2_lmeval.errors import CheckpointError
from s2d2_lmeval.families import load_checkpoint

from .conftest import LAYOUTS, Published

BLOCK, GROUP = 16, 16
PLAIN = ("embed", "head", "norm", "wte", ".gate.", "transformer.ff_out")
FAMILIES = [name for name in LAYOUTS if name != "llada2"]
Rewrite = Callable[..., None]
Weights = dict[str, torch.Tensor]
How = Callable[[torch.Tensor], Weights]


def is_linear(name: str, weight: torch.Tensor) -> bool:
    return weight.ndim == 2 and not any(part in name for part in PLAIN)


def wide(name: str, **more: Any) -> dict[str, Any]:
    """Sizes that blocks divide."""
    sizes = ("d_model", "mlp_hidden_size") if name == "llada" else ("hidden_size", "intermediate_size")
    experts = {"moe_intermediate_size": 32} if name == "sdar_moe" else {}
    return {**dict.fromkeys(sizes, 64), **experts, **more}


def in_blocks(weight: torch.Tensor) -> Weights:
    """FP8 (e4m3) with a scale for every block, as DeepSeek publishes it."""
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(rows, BLOCK, columns, BLOCK)
    scale = blocks.abs().amax((1, 3)) / 448
    stored = (blocks / scale[:, None, :, None]).view(padded.shape)[: weight.shape[0], : weight.shape[1]]
    return {"": stored.contiguous().to(torch.float8_e4m3fn), "_scale_inv": scale}


def by_row(weight: torch.Tensor) -> Weights:
    """FP8 with a scale for every row (compressed-tensors: float-quantized)."""
    scale = weight.abs().amax(1, keepdim=True) / 448
    return {"": (weight / scale).to(torch.float8_e4m3fn), "_scale": scale}


def in_groups(weight: torch.Tensor) -> Weights:
    """Four bits, eight to a number, with a scale for every group of a row (compressed-tensors: pack-quantized)."""
    grouped = weight.view(len(weight), -1, GROUP)
    scale = grouped.abs().amax(2) / 7
    number = (grouped / scale[:, :, None]).round().clamp(-8, 7).view(len(weight), -1, 8).to(torch.int64) + 8
    packed = (number << torch.arange(0, 32, 4)).sum(2)
    signed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)
    return {"_packed": signed, "_scale": scale, "_shape": torch.tensor(weight.shape)}


def quantize(weights: Weights, how: How) -> Weights:
    found: Weights = {}
    for name, weight in weights.items():
        parts = how(weight.float()) if is_linear(name, weight) else {"": weight}
        found |= {f"{name}{part}": value.contiguous() for part, value in parts.items()}
    return found


def restored(weight: torch.Tensor, how: How) -> torch.Tensor:
    """What the quantized ``weight`` stands for."""
    parts = how(weight)
    if how is in_blocks:
        scale = parts["_scale_inv"].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        return parts[""].float() * scale[: weight.shape[0], : weight.shape[1]]
    if how is by_row:
        return parts[""].float() * parts["_scale"]
    number = (parts["_packed"].long()[:, :, None] >> torch.arange(0, 32, 4)) % 16 - 8
    return (number.view(len(weight), -1, GROUP) * parts["_scale"][:, :, None]).view(weight.shape)


def published_as(
    publish: Callable[..., Published],
    rewrite: Rewrite,
    name: str,
    how: How,
    config: Any,
    **more: Any,
) -> tuple[Published, Published]:
    """A quantized checkpoint, and a plain one of the values that it stands for."""
    quantized = publish(name, **wide(name, **more), quantization_config=config)
    rewrite(quantized.folder, quantize(quantized.weights, how))
    plain = publish(name, **wide(name, **more))
    values = {
        key: restored(weight.float(), how) if is_linear(key, weight) else weight
        for key, weight in plain.weights.items()
    }
    rewrite(plain.folder, values)
    return quantized, plain


def fp8(**more: Any) -> dict[str, Any]:
    shape = [BLOCK, BLOCK]
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": shape, **more}


@pytest.mark.parametrize("name", FAMILIES)
def test_fp8_in_blocks(name: str, publish: Callable[..., Published], rewrite: Rewrite) -> None:
    """On a CPU transformers restores the weights; a GPU with FP8 kernels computes with them."""
    quantized, plain = published_as(publish, rewrite, name, in_blocks, fp8())
    got, expected = (load_checkpoint(one.folder, device="cpu")[0].state_dict() for one in (quantized, plain))
    assert got.keys() == expected.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(got[key], weight, rtol=1e-6, atol=1e-7, msg=key)
    answers = [
        load(one.folder, device="cpu").generate([[5, 6, 8]], {"max_new_tokens": 6})[0].token_ids
        for one in (quantized, plain)
    ]
    assert answers[0] == answers[1]


def test_blocks_that_do_not_divide_the_weights_are_refused(publish: Callable[..., Published], rewrite: Rewrite) -> None:
    quantized, _ = published_as(publish, rewrite, "sdar_moe", in_blocks, fp8(), moe_intermediate_size=24)
    with pytest.raises(CheckpointError, match="24 rows or columns, which blocks of 16 do not divide"):
        load_checkpoint(quantized.folder, device="cpu")


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors", "gptq", "awq", "bitsandbytes"])
def test_a_fused_projection_is_refused(method: str, publish: Callable[..., Published]) -> None:
    with pytest.raises(CheckpointError, match="quantized LLaDA2 checkpoints hold queries, keys and values as one"):
        load_checkpoint(publish("llada2", quantization_config={"quant_method": method}).folder, device="cpu")


def compressed(name: str, how: How) -> dict[str, Any]:
    kind = {"num_bits": 8, "type": "float", "strategy": "channel"}
    if how is in_groups:
        kind = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
    form = "pack-quantized" if how is in_groups else "float-quantized"
    head = "model.transformer.ff_out" if name == "llada" else "lm_head"
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": [head, *(["re:.*mlp.gate$"] if name == "sdar_moe" else [])],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "format": form, "weights": {**kind, "symmetric": True, "dynamic": False}}
        },
    }


@pytest.mark.parametrize("how", [by_row, in_groups])
@pytest.mark.parametrize("name", ["sdar", "sdar_moe", "fast_dllm_v2", "llada"])
def test_compressed_tensors(
    name: str, how: How, publish: Callable[..., Published], rewrite: Rewrite, logits: Any
) -> None:
    pytest.importorskip("compressed_tensors")
    quantized, plain = published_as(publish, rewrite, name, how, compressed(name, how))
    got, expected = (logits(load_checkpoint(one.folder, device="cpu")[0]) for one in (quantized, plain))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["sdar", "sdar_moe", "llada", "llada2"])
def test_bitsandbytes(name: str, bits: int, publish: Callable[..., Published]) -> None:
    """Quantized while loading: the projections of attention and of plain MLPs; experts stay as they are."""
    functional = pytest.importorskip("bitsandbytes").functional
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    folder = publish(name, **wide(name)).folder
    model, _ = load_checkpoint(folder, device="cpu", quantization_config=config)
    plain = dict(load_checkpoint(folder, device="cpu")[0].named_parameters())
    seen = 0
    for key, weight in model.named_parameters():
        if weight.dtype not in (torch.int8, torch.uint8):
            torch.testing.assert_close(weight, plain[key])
            continue
        seen += 1
        if bits == 4:
            value = functional.dequantize_4bit(weight, weight.quant_state)
        else:
            value = functional.int8_vectorwise_dequant(weight, weight.SCB)
        # Four-bit floats are at most a third apart, in parts of the largest of their block; integers one part of 127.
        step = 1 / 6 if bits == 4 else 1 / 127
        assert (value - plain[key]).abs().max() <= 1.01 * step * plain[key].abs().max()
        assert "experts" not in key or "shared" in key
    assert seen >= 2 * 4


@pytest.mark.parametrize(("method", "package"), [("gptq", "optimum"), ("awq", "gptqmodel")])
def test_without_its_package_a_quantizer_is_refused_by_name(
    method: str, package: str, publish: Callable[..., Published], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.quantizers import quantizer_awq, quantizer_gptq

    module = quantizer_awq if method == "awq" else quantizer_gptq
    monkeypatch.setattr(module, f"is_{package}_available", lambda: False)
    folder = publish("sdar", quantization_config={"quant_method": method, "bits": 4, "group_size": 16}).folder
    with pytest.raises(CheckpointError, match=package):
        load_checkpoint(folder, device="cpu")


def test_names_of_what_is_left_out_become_native(publish: Callable[..., Published]) -> None:
    from s2d2_lmeval.families.quantized import with_native_names
    from s2d2_lmeval.families.registry import identify

    family = identify(json.loads((publish("llada").folder / "config.json").read_text()), "here", None)
    given = {"ignore": ["model.transformer.ff_out", "model.transformer.blocks.3.attn_out", "re:.*gate$", 4], "bits": 8}
    expected = {"ignore": ["lm_head", "model.layers.3.self_attn.o_proj", "re:.*gate$", 4], "bits": 8}
    assert with_native_names(given, family) == expected
