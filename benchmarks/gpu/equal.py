"""Answers: those of the GPU in float32 are the CPU's, with and without graphs; what rounding in bfloat16 changes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn.functional import linear

from benchmarks.gpu.setting import Setting
from s2d2_lmeval.model import BlockDiffusionModel, load
from s2d2_lmeval.studies.bench.launches import NEEDED

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "ar": [{}, {"do_sample": True}],
    "dynamic": [{"block_length": 4}],
    "s2d2": [
        {"schedule": "reference"},
        {"schedule": "fused", "block_length": 4},
        {"schedule": "lookahead", "block_length": 4},
        {"schedule": "lookahead", "do_sample": True, "top_p": 0.9},
        *({"do_verify_policy": name} for name in ("score_threshold", "score_hysteresis", "contextual_bandit_ucb")),
    ],
    "sliding": [{}, {"do_sample": True}, {"do_sample": True, "draft_shape": "chain", "acceptance": "rejection"}],
}
"""Decoder -> further options of the runs; others run once."""


def prompts(setting: Setting) -> list[list[int]]:
    """Of several lengths."""
    return [[5 + (7 * i + 3 * j) % 90 for j in range(3 + (11 * i) % 40)] for i in range(2 if setting.rehearse else 12)]


def answers(model: BlockDiffusionModel, setting: Setting, options: dict[str, Any], batch: int = 8) -> list[list[int]]:
    """Canvases."""
    model.max_batch = batch
    length: dict[str, Any] = {"max_new_tokens": 5 if setting.rehearse else 40, "stop_token_ids": []}
    return [one.canvas for one in model.generate(prompts(setting), {**options, **length})]


def run(setting: Setting) -> None:
    """Every decoder in float32: the CPU's answers, with graphs and without."""
    torch.backends.cuda.matmul.allow_tf32 = False
    rows: list[dict[str, Any]] = []
    for draft in (None, "toy"):
        model = load("toy", device="cpu", dtype=torch.float32, draft=draft)
        decoders = ["dflash", "ddtree"] if draft else list(model.facts.decoders)
        decoders = [name for name in decoders if not setting.rehearse or name in ("ddtree", "ar", "sliding")]
        for graphs in (True, False):
            if draft and not graphs:
                continue
            options = {} if draft else {"static_shapes": graphs}
            with setting.part(f"graphs {graphs}"), setting.on_gpu(model, **options) as on_gpu:
                for decoder in decoders:
                    several = OPTIONS.get(decoder, [{}])[: 1 if setting.rehearse else None]
                    for further in several:
                        chosen = {"decoder": decoder, **NEEDED.get(decoder, {}), **further}
                        rows.append(_compared(setting, model, on_gpu, chosen, graphs))
                        setting.note(rows=rows)
    right = sum(row["equal"] == row["prompts"] for row in rows)
    setting.say(f"{right} of {len(rows)} settings give the CPU's answers in float32")
    if right < len(rows):
        setting.failed.append("equality")


def _compared(
    setting: Setting, model: BlockDiffusionModel, on_gpu: BlockDiffusionModel, options: dict[str, Any], graphs: bool
) -> dict[str, Any]:
    row = {**options, "graphs": graphs, "prompts": len(prompts(setting)), "equal": 0}
    with setting.part(" ".join(map(str, options.values()))):
        expected = answers(model, setting, options)
        row["equal"] = sum(map(list.__eq__, answers(on_gpu, setting, options), expected))
    return row


def rounding(setting: Setting) -> None:
    """In bfloat16: how many answers of ``sliding`` are those of ``ar``, and of batch 8 those of batch 1."""
    with setting.part("share"):
        _shares(setting, "without exact", {})
    with setting.part("exact"):
        if "exact" in inspect.signature(load).parameters:
            _shares(setting, "exact", {"exact": True})
        else:
            setting.note(exact="skipped: this version's load takes no exact=True")
    with setting.part("linear"):
        setting.note(linear=linear_bits(setting))
    kinds = [kind for kind in ("without exact", "exact") if isinstance(setting.found.get(kind), dict)]
    shares = "; ".join(
        f"{kind}: " + ", ".join(f"{name} {share}" for name, share in setting.found[kind].items()) for kind in kinds
    )
    bits = setting.found.get("linear", {})
    setting.say(
        f"{shares}; F.linear gives a row the bits that it has among 128: "
        + ", ".join(f"{k} {v}" for k, v in bits.items())
    )


def _shares(setting: Setting, name: str, options: dict[str, Any]) -> None:
    model = load("toy", device=setting.device, dtype=torch.bfloat16, **options)
    ar = {"decoder": "ar"}
    one, eight = (answers(model, setting, ar, batch) for batch in (1, 8))
    found = {"batch 8 = batch 1": _share(one, eight)}
    for batch, expected in ((1, one), (8, eight)):
        sliding = answers(model, setting, {"decoder": "sliding"}, batch)
        found[f"sliding = ar at batch {batch}"] = _share(sliding, expected)
        setting.note(**{name: found})


def _share(found: list[list[int]], expected: list[list[int]]) -> str:
    return f"{sum(map(list.__eq__, found, expected))}/{len(expected)}"


def linear_bits(setting: Setting) -> dict[str, str]:
    """Of the products of an 8B layer: for how many M from 2 to 128 the first row has the bits that it has at M = 128,
    and whether it has them in any place.
    """
    shapes = {"qkv": (4096, 6144), "gate-up": (4096, 24576), "down": (12288, 4096), "head": (4096, 151936)}
    if setting.rehearse:
        shapes = {"qkv": (64, 96)}
    found = {}
    for name, (width, height) in shapes.items():
        weight = torch.randn(height, width, device=setting.device, dtype=torch.bfloat16) / width**0.5
        x = torch.randn(128, width, device=setting.device, dtype=torch.bfloat16)
        whole = linear(x, weight)
        same = [m for m in range(2, 129) if torch.equal(linear(x[:m], weight)[0], whole[0])]
        alone = torch.equal(linear(x[:1], weight)[0], whole[0])
        turned = torch.equal(linear(x.flip(0).contiguous(), weight).flip(0), whole)
        found[name] = f"{len(same)}/127, M = 1 {'yes' if alone else 'no'}, any place {'yes' if turned else 'no'}"
    return found
