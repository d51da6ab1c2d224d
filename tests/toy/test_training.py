"""The training objective, the optimizer and the evaluator of the toy recipe."""

from __future__ import annotations

import argparse

import pytest
import torch

from recipes.toy.decoding import Setting, decode
from recipes.toy.export import load_network
from recipes.toy.muon import Muon, orthogonalize
from recipes.toy.network import Network, Shape
from recipes.toy.objective import make_batch
from recipes.toy.train import FINAL_RATE, average_with, rate_scale, read_shares
from s2d2_lmeval.toy import checkpoint_path

MASK, END = 30, 31
SMALL = Shape(vocabulary=32, hidden=16, layers=2, heads=2, key_value_heads=1, head_size=8, intermediate=24)
EXAMPLES = [([1, 2, 3, 4, 5], [6, 7, 8, END]), ([9, 10], [11, 12, 13, 14, 15, 16, 17, 18, END])]


def batch(block: int, seed: int = 0):
    return make_batch(EXAMPLES, block, MASK, END, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", [1, 4, 8, 16])
def test_targets_are_the_masked_answer_positions(block: int) -> None:
    data = batch(block)
    assert (data.tokens[data.wanted] == MASK).all()
    assert (data.tokens == MASK).sum() == data.wanted.sum()
    for row, (prompt, answer) in enumerate(EXAMPLES):
        truth = dict(enumerate(prompt + answer))
        positions = data.positions[row][data.wanted[row]].tolist()
        end = -(-len(truth) // block) * block
        assert min(positions) == len(prompt)
        assert set(positions) == set(range(len(prompt), end))  # both views together cover every answer position
        targets = data.targets[: len(positions)] if row == 0 else data.targets[-len(positions) :]
        assert targets.tolist() == [truth.get(position, END) for position in positions]


@pytest.mark.parametrize("block", [1, 4, 8])
def test_a_noised_view_equals_a_forward_of_its_own_text(block: int) -> None:
    """Logits in the packed row are those of a plain block-causal forward of: clean blocks, then the noised block."""
    torch.manual_seed(0)
    network = Network(SMALL).eval()
    data = batch(block)
    with torch.no_grad():
        packed = network(data.tokens, data.positions, data.visible, data.wanted)
    row = 0
    prompt, answer = EXAMPLES[row]
    clean = prompt + answer
    window = data.positions.shape[1] - (-(-max(len(p) + len(a) for p, a in EXAMPLES) // block) * block)
    first = data.positions.shape[1] - window
    places = data.wanted[row].nonzero()[:, 0].tolist()
    views = 1 if block == 1 else 2
    for index, place in enumerate(places):
        view = (place - first) // (window // views)
        number = int(data.positions[row, place]) // block
        begin = first + view * (window // views)
        inside = [i for i in range(begin, begin + window // views) if int(data.positions[row, i]) // block == number]
        inside = inside[:block]
        text = torch.tensor([clean[: number * block] + data.tokens[row, inside].tolist()])
        position = torch.arange(text.shape[1])
        visible = (position[None] // block <= position[:, None] // block)[None, None]
        wanted = (position == int(data.positions[row, place]))[None]
        with torch.no_grad():
            alone = network(text, position[None], visible, wanted)
        torch.testing.assert_close(packed[index], alone[0], atol=1e-5, rtol=1e-4)


def test_static_and_left_to_right_decoding_take_one_forward_per_token() -> None:
    torch.manual_seed(1)
    network = Network(SMALL).eval()
    for setting in (Setting(1), Setting(4)):
        responses, forwards = decode(network, [[1, 2, 3], [4]], setting, MASK, END)
        for prompt, response, count in zip([[1, 2, 3], [4]], responses, forwards, strict=True):
            assert MASK not in response
            assert len(response) <= count <= 144 - len(prompt)
    _, eager = decode(network, [[1, 2, 3]], Setting(4, 0.0), MASK, END)
    assert eager[0] <= 36


def test_orthogonalize_evens_out_singular_values() -> None:
    for shape in ((2, 12, 20), (1, 20, 12)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(2))))
        assert values.min() > 0.4
        assert values.max() < 1.4


def test_muon_descends() -> None:
    torch.manual_seed(3)
    weight, goal = torch.nn.Parameter(torch.zeros(8, 6)), torch.randn(8, 6)
    optimizer = Muon([weight], 0.05)
    losses = []
    for _ in range(100):
        loss = (weight - goal).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_rate_warms_up_and_decays_to_the_end() -> None:
    assert rate_scale(0, 0.0) < 0.05
    assert rate_scale(1000, 0.1) == 1.0
    assert rate_scale(1000, 0.5) < 1.0
    assert rate_scale(1000, 1.0) == FINAL_RATE


def test_the_mean_of_two_runs_lies_between_them() -> None:
    start, network = load_network(checkpoint_path()), load_network(checkpoint_path())
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.5
    average_with(network, checkpoint_path())
    for mean, first in zip(network.parameters(), start.parameters(), strict=True):
        assert torch.allclose(mean, first + 0.25)


@pytest.mark.parametrize("text", ["arithmetic", "poems=1", "arithmetic=0", "arithmetic=much"])
def test_shares_of_corpora_are_checked(text: str) -> None:
    assert read_shares("arithmetic=0.3,programs=2") == {"arithmetic": 0.3, "programs": 2.0}
    with pytest.raises(argparse.ArgumentTypeError, match="share"):
        read_shares(text)
