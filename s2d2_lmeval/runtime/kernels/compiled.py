"""Regional compilation: what no kernel of ours covers, a layer's experts, through ``torch.compile``.

One region is compiled, for any number of queries, and all layers share it: the router, the choice of experts and their
products become a few fused loops. It takes seconds to minutes, once per process, which long runs get back.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from s2d2_lmeval.errors import ConfigError


def compile_experts(model: PreTrainedModel) -> int:
    """Compile the experts of every layer of ``model`` when they first run. Returns how many layers have some.

    Raises:
        ConfigError: no layer has.
    """
    layers: Any = model.get_decoder().layers
    blocks = [layer.mlp for layer in layers if hasattr(getattr(layer, "mlp", None), "experts")]
    if not blocks:
        raise ConfigError("compile=true is for models with experts, which this is not; leave it out.")
    for block in blocks:
        block.compile(dynamic=True)
    return len(blocks)
