"""Train the toy model's drafter: ``python -m recipes.toy.drafter --out s2d2_lmeval/toy/drafter_checkpoint``.

As published (DFlash, arXiv 2602.06036): the target stays frozen; each answer gives a few blocks that begin at a
random token of it, followed by masks; positions near the block's beginning weigh more. The target reads the text token
by token, as in its autoregressive mode, whose greedy tokens the drafter learns. Not as published: the drafter is
initialised with three of the target's four layers, which can already fill masks, so that minutes on a CPU are enough.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from recipes.toy.drafter_network import DrafterNetwork
from recipes.toy.export import STORED_TYPE, load_network
from recipes.toy.network import Shape
from recipes.toy.objective import Example
from recipes.toy.tokenization import CONTEXT_LENGTH, MASK, token_id
from recipes.toy.train import CORPUS_SHARES, Optimizers, example_batches, rate_scale
from s2d2_lmeval.toy import checkpoint_path

BLOCK_SIZE, TARGET_LAYER_IDS = 16, (0, 1, 2)
FIRST_WEIGHTS = (0, 1, 3)
"""Layers of the target that initialise the drafter."""
BLOCKS_PER_ANSWER = 4
DECAY = 7.0
"""Places from the block's beginning over which the weight in the loss falls by e."""
LOG_SECONDS = 30.0


@dataclass(frozen=True)
class Blocks:
    """Blocks of a batch: arguments of :meth:`DrafterNetwork.forward`, and ``truth`` and ``place`` (number of wanted,)
    of what is to be guessed.
    """

    tokens: Tensor
    blocks: Tensor
    starts: Tensor
    wanted: Tensor
    truth: Tensor
    place: Tensor


def draw_blocks(examples: list[Example], mask_id: int, generator: torch.Generator) -> Blocks:
    """Blocks that begin at random tokens of the answers."""
    prompt = torch.tensor([len(p) for p, _ in examples])
    total = prompt + torch.tensor([len(a) for _, a in examples])
    tokens = torch.zeros(len(examples), int(total.max()), dtype=torch.long)
    for row, (prompt_ids, answer_ids) in enumerate(examples):
        tokens[row, : total[row]] = torch.tensor(prompt_ids + answer_ids)
    spread = torch.rand(len(examples), BLOCKS_PER_ANSWER, generator=generator)
    starts = prompt[:, None] + (spread * (total - prompt - 1).clamp(min=1)[:, None]).long()
    place = starts[:, :, None] + torch.arange(BLOCK_SIZE)
    known = place < total[:, None, None]
    truth = tokens.gather(1, place.clamp(max=tokens.shape[1] - 1).flatten(1)).view(place.shape)
    first = torch.arange(BLOCK_SIZE) == 0
    wanted = known & ~first
    distance = torch.arange(BLOCK_SIZE).expand_as(place)
    return Blocks(tokens, truth.where(first, mask_id), starts, wanted, truth[wanted], distance[wanted])


def train(minutes: float, out: Path, target_folder: Path, threads: int, seed: int, rate: float) -> None:
    """Run the recipe and write the drafter."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    tokenizer = Tokenizer.from_file(str(target_folder / "tokenizer.json"))
    target = load_network(target_folder).requires_grad_(False)
    shape = Shape(**{**vars(target.shape), "layers": len(FIRST_WEIGHTS)})
    drafter = DrafterNetwork(shape, TARGET_LAYER_IDS)
    drafter.start_from(target, FIRST_WEIGHTS)
    optimizers = Optimizers(drafter, rate)
    generator, mask_id = torch.Generator().manual_seed(seed), token_id(tokenizer, MASK)
    batches, started, next_log = example_batches(tokenizer, seed, CORPUS_SHARES), time.monotonic(), LOG_SECONDS
    hits, guesses = torch.zeros(BLOCK_SIZE), torch.zeros(BLOCK_SIZE)
    out.mkdir(parents=True, exist_ok=True)
    for step in itertools.count():
        elapsed = time.monotonic() - started
        if elapsed >= 60 * minutes:
            break
        drawn = draw_blocks(next(batches), mask_id, generator)
        logits = drafter(target, drawn.tokens, drawn.blocks, drawn.starts, drawn.wanted)
        weight = torch.exp(-(drawn.place - 1) / DECAY)
        loss = (F.cross_entropy(logits, drawn.truth, reduction="none") * weight).sum() / weight.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        optimizers.step(rate_scale(step, elapsed / (60 * minutes)))
        guesses += torch.bincount(drawn.place, minlength=BLOCK_SIZE)
        hits += torch.bincount(drawn.place[logits.argmax(-1) == drawn.truth], minlength=BLOCK_SIZE)
        if elapsed >= next_log:
            next_log += LOG_SECONDS
            right = [round(share, 3) for share in (hits / guesses.clamp(min=1))[1:].tolist()]
            record = {"seconds": round(elapsed), "step": step + 1, "loss": round(loss.item(), 4), "right": right}
            with (out / "training_log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")
            hits.zero_(), guesses.zero_()
    save(drafter, tokenizer, out, len(target.model.layers))


def save(drafter: DrafterNetwork, tokenizer: Tokenizer, folder: Path, target_layers: int) -> None:
    """Write ``model.safetensors`` and ``config.json`` in the published format."""
    weights = {name: weight.detach().to(STORED_TYPE).contiguous() for name, weight in drafter.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for the owner only
    shape = drafter.shape
    config = {
        "architectures": ["DFlashDraftModel"],
        "attention_bias": False,
        "block_size": BLOCK_SIZE,
        "dflash_config": {
            "mask_token_id": token_id(tokenizer, MASK),
            "target_layer_ids": list(drafter.target_layer_ids),
        },
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": CONTEXT_LENGTH,
        "model_type": "qwen3",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.key_value_heads,
        "num_target_layers": target_layers,
        "rms_norm_eps": shape.epsilon,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": str(STORED_TYPE).removeprefix("torch."),
        "vocab_size": shape.vocabulary,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m recipes.toy.drafter", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="training time")
    parser.add_argument("--out", type=Path, default=Path("build/toy_drafter"), help="folder of the drafter")
    parser.add_argument("--target", type=Path, default=checkpoint_path(), help="folder of the toy model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="largest learning rate")
    given = parser.parse_args()
    train(given.minutes, given.out, given.target, given.threads, given.seed, given.rate)


if __name__ == "__main__":
    main()
