"""Make an autoregressive checkpoint draft for itself: train an adapter that only its drafts go through.

The checkpoint answers prompts, and a LoRA learns to guess several tokens of these answers at once. With it the decoder
`sliding` gives the checkpoint's own answers in fewer forwards. The same command goes on with a run that was stopped.

examples:
  s2d2-lmeval adapt Qwen/Qwen2.5-1.5B-Instruct --prompts gsm8k --window 8 --minutes 60 --out qwen-drafts
  s2d2-lmeval adapt ./model --prompts prompts.jsonl --steps 5000 --out drafts
  accelerate launch -m s2d2_lmeval adapt ./model --prompts prompts.jsonl --minutes 60 --out drafts
  lm_eval --model s2d2 --model_args pretrained=./model,draft_adapter=drafts --tasks gsm8k
"""

from __future__ import annotations

import argparse

from s2d2_lmeval.cli.training import add_training, trained
from s2d2_lmeval.cli.values import whole

SUMMARY = "train an adapter by which an autoregressive checkpoint drafts for itself"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_training(parser, rate=1e-3)
    parser.add_argument("--window", type=whole(2, 64), default=8, help="how far drafts look ahead (%(default)s)")
    parser.add_argument("--rank", type=whole(1, 1024), default=16, help="of the LoRA (%(default)s)")
    masks = "a trained vector for each place, or random tokens as in Uno (%(default)s)"
    parser.add_argument("--masks", choices=("vectors", "noise"), default="vectors", help=masks)


def run(args: argparse.Namespace) -> int:
    """Answer, train, write."""
    from s2d2_lmeval.training.adapter import Form

    def form(vocabulary: int) -> Form:
        return Form(args.window, args.rank, (0, vocabulary) if args.masks == "noise" else None)

    return trained(args, form, f"draft_adapter={args.out}")
