"""Evaluate under lm-evaluation-harness: every argument of `lm_eval` is passed on.

Differences from `lm_eval`:
  - the model s2d2 is registered directly, in every environment, and is the default of --model;
  - the packaged tasks are found, in addition to those of your own --include_path (which wins if names collide);
  - --sandbox process|bwrap|docker|docker:IMAGE says where model-written code runs (docs/sandbox.md);
  - errors of s2d2, arguments that the harness refuses (a task that is not there), and results that cannot be written
    are one message and exit code 2.

`ls` and `validate` work too: s2d2-lmeval eval ls tasks
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2d2_lmeval.errors import ConfigError, first_line

SUMMARY = "evaluate under lm-evaluation-harness; takes the arguments of lm_eval"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Only for the list of commands: the harness parses the arguments."""
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="as for lm_eval")


def run(args: argparse.Namespace) -> int:
    """As :func:`run_harness`."""
    return run_harness(args.arguments)


_READS_ARGUMENTS = ("lm_eval._cli", "lm_eval.config", "lm_eval.evaluator", "lm_eval.api.model")
"""Modules of the harness that raise what is wrong with arguments themselves."""


def run_harness(arguments: Sequence[str]) -> int:
    """Run the harness's command line with ``arguments``.

    Raises:
        ConfigError: the harness refused an argument. Its other errors pass through unchanged.
    """
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    from s2d2_lmeval.harness.upstream import include_path, refuse_to_lose_results, register
    from s2d2_lmeval.tasks.sandbox import modes

    own = argparse.ArgumentParser(prog="s2d2-lmeval eval", add_help=False, allow_abbrev=False)
    own.add_argument("--sandbox")
    ours, asked = own.parse_known_args(list(arguments))
    modes.choose(ours.sandbox)
    if not asked or asked[0] in ("-h", "--help"):
        print(f"{__doc__}\nArguments of lm_eval:\n")
        asked = ["run", "--help"]
    elif asked[0].startswith("-"):
        asked.insert(0, "run")
    setup_logging()
    register()
    harness = HarnessCLI()
    namespace = _parse(harness, asked)
    settings = _settings(getattr(namespace, "config", None))
    if hasattr(namespace, "include_path"):
        # The harness's option takes one folder, but what it hands to its TaskManager may be a list of them.
        given = namespace.include_path or settings.get("include_path")
        namespace.include_path = [str(include_path()), *folders(given, without=include_path())]
    if getattr(namespace, "model", "") is None and not settings.get("model"):
        namespace.model = "s2d2"
    _take_token(namespace)
    refuse_to_lose_results()
    try:
        harness.execute(namespace)
    except (ValueError, TypeError, FileNotFoundError) as error:
        *_, (raised_in, _) = traceback.walk_tb(error.__traceback__)
        if not str(raised_in.f_globals.get("__name__")).startswith(_READS_ARGUMENTS):
            raise
        raise ConfigError(f"lm_eval: {first_line(error)}") from None
    return 0


def _take_token(namespace: argparse.Namespace) -> None:
    """Move a hub token to where the libraries look for it, because the harness prints and records its arguments."""
    from s2d2_lmeval.harness.upstream import ADVICE, holds_token

    given = getattr(namespace, "model_args", None)
    if isinstance(given, dict) and holds_token(given) and isinstance(given.get("token"), str):
        print(f"s2d2-lmeval: {ADVICE}", file=sys.stderr)
        os.environ["HF_TOKEN"] = given.pop("token")


def _parse(harness: Any, arguments: Sequence[str]) -> argparse.Namespace:
    """The harness only reads ``sys.argv``."""
    before = sys.argv
    sys.argv = ["lm_eval", *arguments]
    try:
        return harness.parse_args()
    finally:
        sys.argv = before


def _settings(config: str | None) -> Mapping[str, Any]:
    """The content of a ``--config`` file. The harness itself reports a file that cannot be read."""
    if config is None:
        return {}
    import yaml

    try:
        settings = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return settings if isinstance(settings, dict) else {}


def folders(given: str | Sequence[str] | None, without: Path) -> list[str]:
    """The folders of an ``include_path``: one, a list, or several joined by colons as in the harness's help."""
    if not given:
        return []
    several = [given] if isinstance(given, (str, Path)) else list(given)
    found: list[str] = []
    for one in map(str, several):
        found += [one] if Path(one).exists() else one.split(os.pathsep)
    return [one for one in dict.fromkeys(found) if one and Path(one).resolve() != without]
