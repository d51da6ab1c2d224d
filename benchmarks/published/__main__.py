"""Processor time of ``schedule=reference`` beside the published loops: at batch one, on tiny weights, where nearly all
of it is the host's, in pairs that alternate. Both must give the same tokens.

    python -m benchmarks.published --pairs 15
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from benchmarks.published.drafting import DFlashLoop
from benchmarks.published.loops import D2f, FastDllm, Llada2, Loop, Sdar
from s2d2_lmeval.custom_generate import d2f, ddtree, fast_dllm_v2, llada2, sdar
from s2d2_lmeval.families import adopt
from s2d2_lmeval.families.facts import DrafterFacts
from s2d2_lmeval.model import BlockDiffusionModel
from s2d2_lmeval.runtime.drafting.dflash import DFlash, DrafterShape, DraftingRunner

VOCABULARY = 97
MASK, STOP = VOCABULARY - 1, VOCABULARY - 2
NEW_TOKENS = 256

Decode = Callable[[list[int], int], list[int]]
"""(prompt, new tokens) -> new ids."""


@dataclass(frozen=True)
class Pair:
    """A published loop and this package's function of the same name, on the same weights."""

    name: str
    published: Decode
    ours: Decode


def tiny(native: Any, config: Any, seed: int = 0, **more: Any) -> PreTrainedModel:
    """Two layers whose probabilities spread over 0.1 to 0.99, so that thresholds are met from both sides."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024}
    rope = {"rope_type": "default", "rope_theta": 10000.0, **more.pop("rope", {})}
    made = config(**sizes, **heads, **more, tie_word_embeddings=False, rope_parameters=rope, attn_implementation="sdpa")
    model = native._from_config(made, dtype=torch.float32)
    spread(model, seed)
    model.get_output_embeddings().weight.data[[MASK, STOP]] = 0
    return model.eval().requires_grad_(False)


def spread(model: torch.nn.Module, seed: int) -> None:
    """Random weights for ``model``."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        scale = 1.0 if "embed" in name else 0.45 if "lm_head" in name else 0.12
        weight.data = 1 + 0.1 * noise if "norm" in name else scale * noise


def pairs() -> Iterator[Pair]:
    """One for each family and way of decoding."""
    qwen3 = tiny(Qwen3ForCausalLM, Qwen3Config)
    greedy = {"stopping_criteria_idx": [STOP], "do_sample": False, "temperature": 1.0, "mask_id": MASK}
    for size in (4, 16):
        sdar_like = {"block_length": size, "denoising_steps": size, **greedy}
        for name, threshold in (("dynamic", 0.85), ("static", None)):
            strategy = {"remasking_strategy": f"low_confidence_{name}", "confidence_threshold": 0.85}
            function = sdar.block_diffusion_generate_baseline
            own = {**sdar_like, **strategy}
            yield pair(f"SDAR {name}, blocks of {size}", qwen3, function, own, Sdar, block=size, threshold=threshold)
        own = {**sdar_like, "confidence_threshold": 0.85, "cache_ver": True, "draft_ver": True}
        loop: dict[str, Any] = {"block": size, "causal": True, "verifies": True}
        yield pair(f"S2D2 on SDAR, blocks of {size}", qwen3, sdar.block_diffusion_generate, own, Sdar, **loop)
    qwen2 = tiny(Qwen2ForCausalLM, Qwen2Config, attention_bias=True)
    own = {"block_size": 32, "small_block_size": 8, "threshold": 0.9, "stop_token": STOP, "mask_id": MASK}
    yield pair("Fast-dLLM v2", qwen2, fast_dllm_v2.generate, own, FastDllm, block=32, part=8, threshold=0.9)
    half = {"partial_rotary_factor": 0.5}
    glm = tiny(Glm4MoeForCausalLM, Glm4MoeConfig, first_k_dense_replace=2, use_qk_norm=True, rope=half)
    own = {"block_length": 32, "threshold": 0.7, "editing_threshold": 0.5, "max_post_steps": 0, "mask_id": MASK}
    own |= {"eos_id": STOP, "return_stats": False}
    loop = {"block": 32, "threshold": 0.7, "editing": 0.5, "posts": 0}
    yield pair("LLaDA2", glm, llada2.generate_cached, own, Llada2, **loop)
    llama = tiny(LlamaForCausalLM, LlamaConfig)
    own = {"block_size": 32, "block_add_threshold": 0.1, "decoded_token_threshold": 0.5, "skip_threshold": 0.9}
    own |= {
        "mask_token_id": MASK,
        "max_length": 1024,
        "include_prompt": True,
        "eos_token_id": STOP,
        "model_type": "llada",
    }
    yield pair("D2F", llama, d2f.generate_block_single, own, D2f, block=32, threshold=0.9, add=0.1, decoded=0.5)
    yield dflash_pair()


def pair(
    name: str,
    model: PreTrainedModel,
    function: Callable[..., Any],
    own: dict[str, Any],
    loop: type[Loop],
    **of_loop: Any,
) -> Pair:
    """``function`` with its ``own`` arguments beside a ``loop``, each on weights of its own."""
    adopted, length = copy.deepcopy(model), "max_new_tokens" if "block_size" in own else "gen_length"

    def ours(prompt: list[int], new: int) -> list[int]:
        ids = function(adopted, torch.tensor([prompt]), **own, **{length: new})
        return ids[0, len(prompt) :].tolist()

    def published(prompt: list[int], new: int) -> list[int]:
        return loop(model, MASK, STOP, **of_loop).generate(prompt, new)

    return Pair(name, published, ours)


def dflash_pair() -> Pair:
    """An autoregressive target with a random drafter of two layers."""
    target = tiny(Qwen3ForCausalLM, Qwen3Config)
    own = Qwen3Config(**{**target.config.to_dict(), "layer_types": None})
    drafter = DFlash(DrafterShape(own, 16, MASK, (0, 1), (None, None), (False, False)))
    spread(drafter, 1)
    drafter = drafter.eval().requires_grad_(False)
    native, facts = adopt(copy.deepcopy(target), autoregressive=True)
    facts = facts.with_drafter(DrafterFacts(16, MASK))
    engine = BlockDiffusionModel(native, facts, runner=DraftingRunner(native, copy.deepcopy(drafter).attach(native)))

    def ours(prompt: list[int], new: int) -> list[int]:
        answer = ddtree.dflash_generate(engine, torch.tensor([prompt]), max_new_tokens=new, stop_token_ids=[STOP])
        return answer.output_ids[0, len(prompt) :].tolist()

    def published(prompt: list[int], new: int) -> list[int]:
        return DFlashLoop(target, drafter, STOP).generate(prompt, new)

    return Pair("DFlash", published, ours)


def seconds(decode: Decode, prompt: list[int], new: int) -> tuple[list[int], float]:
    """What ``decode`` answers, and the processor time that it took."""
    torch.manual_seed(0)
    started = time.process_time()
    with torch.inference_mode():
        answer = decode(prompt, new)
    return answer, time.process_time() - started


def compare(one: Pair, repeats: int, new: int) -> tuple[float, float, float]:
    """Milliseconds per token of both, medians, and the median of the published loop's time over ours."""
    prompt = [(7 * at + 3) % STOP for at in range(21)]
    taken = []
    for _ in range(repeats + 1):
        (wanted, theirs), (got, mine) = seconds(one.published, prompt, new), seconds(one.ours, prompt, new)
        if wanted != got:
            raise AssertionError(f"{one.name}: {wanted} is not {got}.")
        taken.append((theirs, mine))
    theirs, mine = (1000 * statistics.median(of) / new for of in zip(*taken[1:], strict=True))
    return theirs, mine, statistics.median(a / b for a, b in taken[1:])


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15, help="runs of each (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    table = Table(title=f"schedule=reference, batch 1, {args.new_tokens} tokens, processor time", title_justify="left")
    for column in ("family", "published, ms/token", "ours, ms/token", "speed over published"):
        table.add_column(column, justify="left" if column == "family" else "right")
    for one in pairs():
        theirs, mine, ratio = compare(one, args.pairs, args.new_tokens)
        table.add_row(one.name, f"{theirs:.2f}", f"{mine:.2f}", f"{ratio:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
