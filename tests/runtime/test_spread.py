"""A model whose layers lie on two (pretend) GPUs: the same tokens, and what a forward needs there is moved once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from s2d2_lmeval import load
from s2d2_lmeval.runtime import attention
from s2d2_lmeval.runtime.attention import AttentionContext
from s2d2_lmeval.runtime.cache import SlotCache
from s2d2_lmeval.studies.pretend import move, pretend_cuda

PROMPTS = [[5, 6, 7, 8, 9], [11, 12]]


def place(name: str) -> str:
    """As ``device_map=auto``: the first layers with the embedding, the last with norm and head."""
    return "cuda:0" if "embed_tokens" in name or ".layers.0." in name or ".layers.1." in name else "cuda:1"


@pytest.mark.parametrize("options", [{"decoder": "ar"}, {"decoder": "s2d2"}, {"decoder": "sliding", "do_sample": True}])
def test_layers_on_two_devices(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("toy", max_batch=2)
    wanted = {**options, "max_new_tokens": 12, "stop_token_ids": []}
    expected = [answer.token_ids for answer in model.generate(PROMPTS, wanted)]
    built, moved = [], []
    build, replace = AttentionContext.of, attention.replace

    def counted(*given: Any) -> AttentionContext:
        built.append(1)
        return build(*given)

    def noted(context: AttentionContext, **changes: torch.Tensor) -> AttentionContext:
        moved.append(changes["lengths"].device)
        return replace(context, **changes)

    monkeypatch.setattr(AttentionContext, "of", counted)
    monkeypatch.setattr(attention, "replace", noted)
    with pretend_cuda(devices=2) as counts:
        spread = move(model, place)
        built.clear()  # layers were compared with their modules
        moved.clear()
        assert {parameter.device.index for parameter in spread.hf_model.parameters()} == {0, 1}
        assert [answer.token_ids for answer in spread.generate(PROMPTS, wanted)] == expected
        layers = spread._runner.cache._layers
    assert [layers[layer][0].device.index for layer in range(4)] == [0, 0, 1, 1]
    assert counts.totals()["device_mismatches"] == 0
    assert len(moved) == len(built)  # not for each of the layers there


def test_where_keys_go_is_moved_once_for_a_device() -> None:
    cache, elsewhere = SlotCache(2, 8), torch.device("meta")
    cache.write_to(torch.tensor([0, 1]))
    for layer in range(3):
        cache.update(*torch.zeros(2, 1, 1, 2, 4, device=elsewhere), layer)
        if layer == 0:
            first = cache._destinations[elsewhere]
    assert cache._destinations[elsewhere] is first
