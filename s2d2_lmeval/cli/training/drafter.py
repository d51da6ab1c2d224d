"""Train a DFlash drafter: a small block-diffusion model that drafts for a checkpoint from its hidden states.

The checkpoint answers prompts, and a few layers beside it, which begin as copies of its own, learn to guess several
tokens of these answers at once. With them the decoders `dflash` and `ddtree` give the checkpoint's own answers in fewer
forwards. The same command goes on with a run that was stopped.

examples:
  s2d2-lmeval train-drafter Qwen/Qwen2.5-1.5B-Instruct --prompts gsm8k --minutes 60 --out qwen-drafter
  s2d2-lmeval train-drafter ./model --prompts prompts.jsonl --block 16 --layers 5 --steps 5000 --out drafter
  s2d2-lmeval train-drafter ./model --prompts prompts.jsonl --drafter drafter --minutes 1 --out with-head
  lm_eval --model s2d2 --model_args pretrained=./model,draft=drafter,decoder=ddtree --tasks gsm8k
"""

from __future__ import annotations

import argparse

from s2d2_lmeval.cli.training import add_training, trained
from s2d2_lmeval.cli.values import nonempty, whole

SUMMARY = "train a DFlash drafter for a checkpoint, or a head for one"
HEAD_RANK = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_training(parser, rate=6e-4)
    parser.add_argument("--block", type=whole(2, 64), default=8, help="tokens, the known one included (%(default)s)")
    parser.add_argument("--layers", type=whole(1, 64), default=4, help="of the drafter (%(default)s)")
    markov = "rank of a head that knows the token before (DSpark); none, and 32 with --drafter"
    parser.add_argument("--markov", type=whole(1, 4096), metavar="RANK", help=markov)
    kind = "of that head: rnn knows all tokens of the draft before it (%(default)s)"
    parser.add_argument("--markov_kind", choices=("vanilla", "gated", "rnn"), default="vanilla", help=kind)
    drafter = "keep this drafter as it is, and train a Markov head for it alone"
    parser.add_argument("--drafter", type=nonempty, metavar="FOLDER", help=drafter)


def run(args: argparse.Namespace) -> int:
    """Answer, train, write."""
    from s2d2_lmeval.training.drafter import DrafterForm

    if args.drafter:
        form = DrafterForm.beside(args.drafter, args.markov or HEAD_RANK, args.markov_kind)
    else:
        form = DrafterForm(args.block, args.layers, args.markov or 0, kind=args.markov_kind)
    return trained(args, lambda vocabulary: form, f"draft={args.out},decoder=ddtree")
