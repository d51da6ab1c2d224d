"""Nemotron-Labs-Diffusion's published self-speculation and ``sliding``, side by side: forwards and tokens per forward.

On a tiny checkpoint that this trains first, in about a minute: two layers that learn to count, with the joint loss of
these models (the next token on token-causal text, and a mask's own token given the text before its block). It says how
many forwards each loop takes for the same drafts, not how often a real model's drafts are right.

    python -m benchmarks.nemotron
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import Ministral3Config, Ministral3ForCausalLM

from s2d2_lmeval.model import BlockDiffusionModel, load

BLOCK, MASK, STOP, LENGTH = 8, 96, 1, 48
CONFIG: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "eos_token_id": STOP,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
}
PUBLISHED = {"model_type": "nemotron_labs_diffusion", "mask_token_id": MASK, "block_size": BLOCK}
SLIDING: dict[str, Any] = {"decoder": "sliding", "window": BLOCK, "lookup": False}
LOOPS: dict[str, dict[str, Any]] = {
    "`ar`": {"decoder": "ar"},
    "published: `linear_spec`, a draft and a verification per round": {"decoder": "linear_spec"},
    "`sliding`, chain": {**SLIDING, "draft_shape": "chain"},
    "`sliding`, tree": {**SLIDING, "draft_shape": "tree"},
    "`sliding`, chain, `draft_context=published`": {**SLIDING, "draft_shape": "chain", "draft_context": "published"},
    "`sliding`, tree, `draft_context=published`": {**SLIDING, "draft_shape": "tree", "draft_context": "published"},
}


def counted(rng: random.Random, length: int) -> list[int]:
    """Tokens that count by 1 to 3, and start anew now and then."""
    tokens: list[int] = []
    while len(tokens) < length:
        first, step = rng.randrange(2, MASK), rng.choice((1, 1, 2, 3))
        tokens += [2 + (first + step * place) % (MASK - 2) for place in range(rng.randint(6, 20))]
    return tokens[:length]


def sight() -> torch.Tensor:
    """Who sees whom (2 T, 2 T) in a text of T tokens that follows itself with masks: text sees what precedes it; a
    masked block sees itself and the text before it.
    """
    place = torch.arange(LENGTH)
    block = place // BLOCK
    causal, own, before = (
        place[:, None] >= place,
        block[:, None] == block,
        block[:, None] > block,
    )
    return torch.cat([torch.cat([causal, torch.zeros_like(causal)], 1), torch.cat([before, own], 1)])


def train(steps: int, seed: int = 0) -> Ministral3ForCausalLM:
    """A model of the shape of :data:`CONFIG`, after so many steps."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = Ministral3ForCausalLM._from_config(Ministral3Config(**CONFIG), attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    visible, position = sight()[None, None], torch.arange(LENGTH).repeat(2)[None]
    for _ in range(steps):
        text = torch.tensor([counted(rng, LENGTH) for _ in range(16)])
        masked = torch.rand(text.shape) < torch.rand(16, 1)
        both = torch.cat([text, text.masked_fill(masked, MASK)], 1)
        logits = model(
            input_ids=both, attention_mask=visible.expand(16, -1, -1, -1), position_ids=position.expand(16, -1)
        ).logits
        of_text, of_masks = logits.chunk(2, dim=1)
        loss = cross_entropy(of_text[:, :-1].flatten(0, 1), text[:, 1:].flatten())
        loss = loss + cross_entropy(of_masks[masked], text[masked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def publish(model: Ministral3ForCausalLM, folder: Path) -> None:
    """Write ``model`` as these checkpoints are published."""
    (folder / "config.json").write_text(json.dumps({**CONFIG, **PUBLISHED}))
    published = {
        name.replace("lm_head.", "diffusion_head.").replace("model.", "encoder.", 1): value.contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(published, folder / "model.safetensors")


def compare(model: BlockDiffusionModel, prompts: Sequence[Sequence[int]], new: int) -> list[str]:
    """The rows of the table; every loop must give the tokens of ``ar``."""
    rows, expected = [], None
    for name, options in LOOPS.items():
        cells = []
        for batch in (1, 8):
            model.max_batch, before = batch, model.trace.totals()["forwards"]
            answers = model.generate(prompts, {"max_new_tokens": new, "temperature": 0.0, **options})
            forwards = model.trace.totals()["forwards"] - before
            tokens = sum(len(answer.token_ids) for answer in answers)
            cells += [f"{forwards}", f"{tokens / forwards:.2f}"]
            found = [answer.token_ids for answer in answers]
            expected = expected or found
            assert found == expected, f"{name} gives other tokens than ar"
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def main(given: Sequence[str] | None = None) -> None:
    """Train, decode, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1500, help="of training (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=32, help="how many (default: %(default)s)")
    parser.add_argument("--new_tokens", type=int, default=48, help="per prompt (default: %(default)s)")
    parser.add_argument("--model", help="a folder with a checkpoint of this vocabulary, which is not trained")
    parser.add_argument("--adapter", help="a folder with its draft adapter")
    args = parser.parse_args(given)
    rng = random.Random(1)
    prompts = [counted(rng, rng.randint(4, 24)) for _ in range(args.prompts)]
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            publish(train(args.steps), Path(folder))
        more = {} if args.adapter is None else {"adapter": args.adapter}
        model = load(args.model or folder, device="cpu", dtype="float32", **more)
    print("| | forwards, batch 1 | tokens per forward | forwards, batch 8 | tokens per forward |")
    print("| :-- | --: | --: | --: | --: |")
    print("\n".join(compare(model, prompts, args.new_tokens)))


if __name__ == "__main__":
    main()
