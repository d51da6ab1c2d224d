"""Train the toy model: ``python -m recipes.toy.train --minutes 80 --out build/toy``.

Every step draws new problems of the three corpora, renders half of them raw and half in the chat format, and trains on
one block size of 1, 4, 8 and 16. The learning rate decays until the end of the given time, so the recipe fits any
machine and time budget.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from recipes.toy.decoding import Setting, evaluate
from recipes.toy.export import load_network, save_model
from recipes.toy.muon import Muon
from recipes.toy.network import Network, Shape
from recipes.toy.objective import Example, make_batch
from recipes.toy.problems import training_stream
from recipes.toy.tokenization import MASK, TURN_END, render, save_tokenizer, token_id, train_tokenizer
from s2d2_lmeval.toy import CORPORA, held_out

BLOCK_SHARES = {1: 0.4, 4: 0.12, 8: 0.24, 16: 0.24}
CORPUS_SHARES = {"arithmetic": 0.5, "programs": 0.25, "instructions": 0.25}
BATCH_SIZE = 32
BATCHES_PER_POOL = 32
"""Examples are sorted by length within a pool, so that batches hold little padding."""

WARM_UP_STEPS = 60
CONSTANT_SHARE = 0.35
"""Share of the time at full learning rate; then it falls linearly to :data:`FINAL_RATE`."""
FINAL_RATE = 0.01
LOG_SECONDS, SAVE_SECONDS = 30.0, 420.0
FOLLOWED = (Setting(1), Setting(8, 0.9), Setting(16, 0.9))
FINAL = (Setting(1), *(Setting(block, threshold) for block in (4, 8, 16) for threshold in (0.9, 0.7, 0.5)), Setting(16))


@dataclass(frozen=True)
class Options:
    """The command line."""

    minutes: float
    out: Path
    threads: int
    seed: int
    rate: float
    compile: bool
    corpora: dict[str, float]
    start: Path | None = None
    average: bool = False


class Optimizers:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms, under one schedule."""

    def __init__(self, network: nn.Module, rate: float) -> None:
        matrices = [w for name, w in network.named_parameters() if w.dim() == 2 and "embed" not in name]
        others = [w for name, w in network.named_parameters() if w.dim() != 2 or "embed" in name]
        self.rate = rate
        self.parts: list[torch.optim.Optimizer] = [
            Muon(matrices, rate),
            torch.optim.AdamW(others, rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]

    def step(self, scale: float) -> None:
        """Update at ``scale`` times the base rate and clear the gradients."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.rate * scale
            part.step()
            part.zero_grad(set_to_none=True)


def rate_scale(step: int, elapsed_share: float) -> float:
    """Learning rate relative to the base: warm-up by steps, then constant, then linear decay by time."""
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    left = (1.0 - elapsed_share) / (1.0 - CONSTANT_SHARE)
    return warm * max(FINAL_RATE, min(1.0, left))


def example_batches(tokenizer: Tokenizer, seed: int, shares: dict[str, float]) -> Iterator[list[Example]]:
    """Endless batches of new examples, corpora (by ``shares``) and prompt formats mixed, similar lengths together."""
    rng = random.Random(seed)
    streams = {name: training_stream(name, seed) for name in CORPORA}
    end_id = token_id(tokenizer, TURN_END)
    while True:
        drawn = rng.choices(tuple(shares), tuple(shares.values()), k=BATCH_SIZE * BATCHES_PER_POOL)
        texts = [render(next(streams[name]), chat=rng.random() < 0.5) for name in drawn]
        prompts = tokenizer.encode_batch([prompt for prompt, _ in texts], add_special_tokens=False)
        answers = tokenizer.encode_batch([answer for _, answer in texts], add_special_tokens=False)
        pool = [(p.ids, [*a.ids, end_id]) for p, a in zip(prompts, answers, strict=True)]
        pool.sort(key=lambda example: len(example[0]) + 2 * len(example[1]))
        batches = [pool[i : i + BATCH_SIZE] for i in range(0, len(pool), BATCH_SIZE)]
        rng.shuffle(batches)
        yield from batches


Report = dict[str, dict[str, list[float]]]
"""Corpus -> decoder setting -> [accuracy, tokens per forward]."""


class Progress:
    """Running losses and the log: one line of JSON per event, also printed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = time.monotonic()
        self.losses: dict[int, float] = {}
        self.examples = self.tokens = 0
        path.write_text("", encoding="utf-8")

    @property
    def seconds(self) -> float:
        """Seconds since the start, evaluations included."""
        return time.monotonic() - self.started

    def add(self, block: int, loss: float, examples: int, tokens: int) -> None:
        self.losses[block] = 0.97 * self.losses.get(block, loss) + 0.03 * loss
        self.examples += examples
        self.tokens += tokens

    def log(self, **fields: object) -> None:
        record = {"seconds": round(self.seconds), "examples": self.examples, **fields}
        line = json.dumps(record)
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def log_losses(self, step: int, rate: float) -> None:
        losses = {str(block): round(loss, 4) for block, loss in sorted(self.losses.items())}
        speed = round(self.tokens / max(self.seconds, 1e-9))
        self.log(step=step, rate=float(f"{rate:.3g}"), tokens_per_second=speed, loss_per_block_size=losses)


def measure(network: Network, tokenizer: Tokenizer, settings: tuple[Setting, ...], count: int) -> Report:
    """Accuracy and tokens per forward on the first ``count`` held-out problems of every corpus."""
    report: Report = {}
    for name in CORPORA:
        outcomes = {str(setting): evaluate(network, tokenizer, held_out(name)[:count], setting) for setting in settings}
        report[name] = {key: [round(x.accuracy, 3), round(x.tokens_per_forward, 2)] for key, x in outcomes.items()}
    return report


def train(options: Options) -> None:
    """Run the recipe; the checkpoint in ``options.out`` is renewed every few minutes."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.start:
        tokenizer = Tokenizer.from_file(str(options.start / "tokenizer.json"))
        network = load_network(options.start).train()
    else:
        tokenizer = train_tokenizer(options.seed)
        network = Network(Shape(vocabulary=tokenizer.get_vocab_size()))
    save_tokenizer(tokenizer, options.out)
    progress = Progress(options.out / "training_log.jsonl")
    parameters = sum(weight.numel() for weight in network.parameters())
    recipe = {"minutes": options.minutes, "seed": options.seed, "rate": options.rate, "corpora": options.corpora}
    progress.log(parameters=parameters, continued=bool(options.start), **recipe, shape=asdict(network.shape))
    _loop(network, tokenizer, options, progress)
    if options.start and options.average:
        save_model(network, tokenizer, options.out)
        progress.log(held_out=measure(load_network(options.out), tokenizer, FINAL, 200), weights="before averaging")
        average_with(network, options.start)
    save_model(network, tokenizer, options.out)
    progress.log(held_out=measure(load_network(options.out), tokenizer, FINAL, 200), weights="as stored")


@torch.no_grad()
def average_with(network: Network, start: Path) -> None:
    """Move the weights to the middle between themselves and those they started from.

    Runs that share their beginning lie in one basin, and the mean of their weights keeps what each learned (Wortsman et
    al., 2022, "Model soups").
    """
    for weight, first in zip(network.parameters(), load_network(start).parameters(), strict=True):
        weight.lerp_(first.to(weight.dtype), 0.5)


def _loop(network: Network, tokenizer: Tokenizer, options: Options, progress: Progress) -> None:
    forward: nn.Module = torch.compile(network, dynamic=True) if options.compile else network  # type: ignore[assignment]
    optimizers = Optimizers(network, options.rate)
    rng, generator = random.Random(options.seed), torch.Generator().manual_seed(options.seed)
    mask_id, end_id = token_id(tokenizer, MASK), token_id(tokenizer, TURN_END)
    next_log, next_save = LOG_SECONDS, SAVE_SECONDS
    batches = example_batches(tokenizer, options.seed, options.corpora)
    for step in itertools.count():
        share = progress.seconds / (60.0 * options.minutes)
        if share >= 1.0:
            return
        block = rng.choices(tuple(BLOCK_SHARES), tuple(BLOCK_SHARES.values()))[0]
        batch = make_batch(next(batches), block, mask_id, end_id, generator)
        logits: Tensor = forward(batch.tokens, batch.positions, batch.visible, batch.wanted)
        loss = F.cross_entropy(logits.float(), batch.targets)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        scale = rate_scale(step, share)
        optimizers.step(scale)
        progress.add(block, loss.item(), BATCH_SIZE, batch.tokens.numel())
        if progress.seconds >= next_log:
            next_log = progress.seconds + LOG_SECONDS
            progress.log_losses(step + 1, options.rate * scale)
        if progress.seconds >= next_save:
            next_save = progress.seconds + SAVE_SECONDS
            save_model(network, tokenizer, options.out)
            progress.log(held_out=measure(network, tokenizer, FOLLOWED, 40))


def read_shares(text: str) -> dict[str, float]:
    """``arithmetic=0.5,programs=0.25,instructions=0.25`` as numbers.

    Raises:
        argparse.ArgumentTypeError: for a corpus that does not exist, or a share that is not a positive number.
    """
    try:
        shares = {name: float(share) for name, share in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: write corpus=share, ...") from error
    if not shares.keys() <= set(CORPORA) or min(shares.values()) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: positive shares of {', '.join(CORPORA)}")
    return shares


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m recipes.toy.train", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=80.0, help="training time")
    parser.add_argument("--out", type=Path, default=Path("build/toy"), help="folder of the checkpoint")
    parser.add_argument("--threads", type=int, default=1, help="of torch; a model this small gains little from more")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=3e-3, help="largest learning rate")
    parser.add_argument("--corpora", type=read_shares, default=CORPUS_SHARES, help="corpus=share,... of the examples")
    parser.add_argument("--start", type=Path, help="continue from the weights of this checkpoint (use another seed)")
    parser.add_argument("--average", action="store_true", help="keep the mean of the weights before and after")
    parser.add_argument("--compile", action="store_true", help="compile the network (needs a C++ compiler)")
    train(Options(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
