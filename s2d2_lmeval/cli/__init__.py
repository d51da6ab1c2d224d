"""The command ``s2d2-lmeval``.

A subcommand is a module with ``SUMMARY``, ``add_arguments(parser)`` and ``run(args) -> exit code``, named in
:data:`COMMANDS`. Heavy imports are inside ``run``, so that ``--help`` is fast.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from s2d2_lmeval import __version__
from s2d2_lmeval.cli.values import Parser, Print, as_in_the_harness
from s2d2_lmeval.errors import S2D2Error

COMMANDS = {
    "eval": "s2d2_lmeval.cli.evaluate",
    "generate": "s2d2_lmeval.cli.generate",
    "doctor": "s2d2_lmeval.cli.doctor",
    "options": "s2d2_lmeval.cli.options",
    "demo": "s2d2_lmeval.cli.demo",
    "demo-ddtree": "s2d2_lmeval.cli.demo_ddtree",
    "bench": "s2d2_lmeval.cli.bench",
    "sweep": "s2d2_lmeval.cli.sweep",
    "report": "s2d2_lmeval.cli.report",
    "serve": "s2d2_lmeval.cli.serve",
    "compare": "s2d2_lmeval.cli.compare",
    "calibrate": "s2d2_lmeval.cli.calibrate",
    "adapt": "s2d2_lmeval.cli.training.adapt",
    "train-drafter": "s2d2_lmeval.cli.training.drafter",
}
"""Subcommand -> its module."""

REFUSED = 2
"""Exit code of a run that was refused with a message, the same as for a wrong command line."""

_EPILOG = """\
examples:
  s2d2-lmeval doctor JetLM/SDAR-1.7B-Chat
  s2d2-lmeval generate --model toy --prompt "What is 17 + 25?" --trace
  s2d2-lmeval eval --model_args pretrained=JetLM/SDAR-1.7B-Chat --tasks gsm8k_cot_zeroshot --apply_chat_template
  lm_eval --model s2d2 --model_args pretrained=toy --tasks s2d2_toy_arithmetic
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (``sys.argv`` if not given); returns the exit code.

    An :class:`~s2d2_lmeval.errors.S2D2Error` becomes one message and exit code 2. Anything else is a bug and
    keeps its traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["eval"]:
            # Everything after it belongs to the harness's own parser, `--help` included.
            return int(import_module(COMMANDS["eval"]).run_harness([*map(as_in_the_harness, arguments[1:])]))
        parser = build_parser()
        if "_ARGCOMPLETE" in os.environ:  # a shell asks what could come next
            import_module("argcomplete").autocomplete(parser)
        args = parser.parse_args(arguments)
        return int(args.run(args))
    except S2D2Error as error:
        print(f"s2d2-lmeval: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("s2d2-lmeval: interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = Parser(
        prog="s2d2-lmeval",
        description="Decode and evaluate block-diffusion language models under lm-evaluation-harness.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"s2d2-lmeval {__version__}")
    parser.add_argument(
        "--print_include_path",
        action=Print,
        const=_include_path,
        help="print the folder of the packaged tasks, for lm_eval's --include_path",
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module_name in COMMANDS.items():
        module = import_module(module_name)
        command = subparsers.add_parser(
            name, help=module.SUMMARY, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _include_path() -> str:
    from s2d2_lmeval.harness.upstream import include_path

    return str(include_path())
