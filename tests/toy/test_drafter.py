"""The toy model's drafter: its recipe, and that what is trained is what decodes."""

from __future__ import annotations

import json

import numpy as np
import torch
from tokenizers import Tokenizer

from recipes.toy.drafter import BLOCK_SIZE, FIRST_WEIGHTS, TARGET_LAYER_IDS, draw_blocks, save
from recipes.toy.drafter_network import DrafterNetwork, hidden_states
from recipes.toy.export import load_network
from recipes.toy.network import Network, Shape
from s2d2_lmeval.families import load_checkpoint
from s2d2_lmeval.runtime.cache import SlotCache
from s2d2_lmeval.runtime.drafting.loading import load_drafter
from s2d2_lmeval.runtime.passes import Layout, Pass
from s2d2_lmeval.runtime.runner import Runner
from s2d2_lmeval.toy import checkpoint_path, drafter_path

MASK, END = 30, 31
SMALL = Shape(vocabulary=32, hidden=16, layers=2, heads=2, key_value_heads=1, head_size=8, intermediate=24)
EXAMPLES = [([1, 2, 3, 4, 5], [6, 7, 8, END]), ([9, 10], [11, 12, 13, 14, 15, 16, 17, 18, END])]


def test_blocks_begin_in_the_answer_and_are_masks_behind_a_token() -> None:
    drawn = draw_blocks(EXAMPLES, MASK, torch.Generator().manual_seed(0))
    truth, place = drawn.truth.tolist(), drawn.place.tolist()
    for row, (prompt, answer) in enumerate(EXAMPLES):
        text = prompt + answer
        for block, start, wanted in zip(drawn.blocks[row], drawn.starts[row].tolist(), drawn.wanted[row], strict=True):
            assert len(prompt) <= start < len(text) - 1
            assert block.tolist() == [text[start]] + [MASK] * (BLOCK_SIZE - 1)
            ahead = text[start + 1 : start + BLOCK_SIZE]
            assert wanted.tolist() == [False] + [True] * len(ahead) + [False] * (BLOCK_SIZE - 1 - len(ahead))
            assert [truth.pop(0) for _ in ahead] == ahead
            assert [place.pop(0) for _ in ahead] == list(range(1, len(ahead) + 1))
    assert not truth


@torch.no_grad()
def test_blocks_of_a_text_do_not_see_each_other_nor_what_they_are_to_guess() -> None:
    torch.manual_seed(0)
    target, drafter = Network(SMALL), DrafterNetwork(SMALL, (0, 1))
    drawn = draw_blocks(EXAMPLES, MASK, torch.Generator().manual_seed(1))

    def logits(tokens: torch.Tensor, blocks: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        return drafter(target, tokens, blocks, starts, torch.ones_like(blocks, dtype=torch.bool))

    together = logits(drawn.tokens, drawn.blocks, drawn.starts).view(*drawn.blocks.shape, -1)
    for row in range(len(EXAMPLES)):
        for number in range(drawn.starts.shape[1]):
            start = int(drawn.starts[row, number])
            # Of the text only what comes before the block; at least one token, for the shapes.
            before = drawn.tokens[row : row + 1, :start]
            alone = logits(
                before,
                drawn.blocks[row : row + 1, number : number + 1],
                drawn.starts[row : row + 1, number : number + 1],
            )
            torch.testing.assert_close(alone, together[row, number])


@torch.no_grad()
def test_what_is_trained_is_what_decodes(tmp_path) -> None:
    """Logits of the training network and of the drafter in the runtime, on the weights as stored."""
    tokenizer = Tokenizer.from_file(str(checkpoint_path() / "tokenizer.json"))
    target = load_network(checkpoint_path())
    trained = DrafterNetwork(Shape(**{**vars(target.shape), "layers": len(FIRST_WEIGHTS)}), TARGET_LAYER_IDS)
    trained.start_from(target, FIRST_WEIGHTS)
    save(trained, tokenizer, tmp_path, len(target.model.layers))
    trained.load_state_dict({name: weight.bfloat16().float() for name, weight in trained.state_dict().items()})
    native, facts = load_checkpoint("toy")
    drafter = load_drafter(tmp_path, native)
    text, start = torch.arange(20).view(1, -1) * 7 % 600, 20
    block = torch.tensor([[11] + [facts.mask_token_id] * (BLOCK_SIZE - 1)])
    everything = torch.ones_like(block, dtype=torch.bool)[:, None]
    expected = trained(target, text, block[:, None], torch.tensor([[start]]), everything)

    runner = Runner(drafter, "sdpa")  # type: ignore[arg-type]
    runner.reserve(1, 64)
    runner.cache.write_to(torch.arange(start))
    drafter.absorb(hidden_states(target, text, TARGET_LAYER_IDS)[0], torch.arange(start).view(1, -1), runner.cache)
    runner.cache.lengths[0] = start
    layout = Layout(np.zeros(1, dtype=np.int64), np.array([BLOCK_SIZE]))
    sees = torch.ones(1, BLOCK_SIZE, BLOCK_SIZE, dtype=torch.bool)
    place = torch.arange(BLOCK_SIZE)
    logits = runner.forward(Pass(layout, block[0], start + place, sees, place, np.zeros(1, dtype=np.int64)))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert isinstance(runner.cache, SlotCache)


def test_the_drafter_that_ships() -> None:
    folder = drafter_path()
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert set(files) == {"config.json", "model.safetensors", "training_log.jsonl", "README.md", "LICENSE.txt"}
    assert sum(files.values()) < 3_000_000
    assert all(json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines())


def test_what_it_drafts_is_accepted() -> None:
    from recipes.toy.tokenization import render
    from s2d2_lmeval import load
    from s2d2_lmeval.toy import CORPORA, held_out

    tokenizer = Tokenizer.from_file(str(checkpoint_path() / "tokenizer.json"))
    prompts = [tokenizer.encode(render(held_out(name)[0], chat=False)[0]).ids for name in CORPORA]
    model = load("toy", draft="toy")
    alone = model.generate(prompts, {"decoder": "ar"}, max_new_tokens=48)
    drafted = model.generate(prompts, {"decoder": "dflash"}, max_new_tokens=48)
    assert [one.token_ids for one in drafted] == [one.token_ids for one in alone]
    tokens, rounds = (sum(one.stats[name] for one in drafted) for name in ("round_tokens", "rounds"))
    assert tokens > 3 * rounds
