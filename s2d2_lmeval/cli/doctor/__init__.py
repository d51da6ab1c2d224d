"""Check what works here: versions, devices, attention back ends, the harness, and a checkpoint.

The exit code is 1 if something will not work.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from s2d2_lmeval.cli.values import add_shared, parse_options

if TYPE_CHECKING:
    from s2d2_lmeval.cli.doctor.installation import Finding

SUMMARY = "check this installation, this machine and a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("path", nargs="?", metavar="PATH", help='a checkpoint: folder, hub id, or "toy"')
    add_shared(parser, "--revision", "--option")
    parser.add_argument("--load", action="store_true", help="also load it and decode two blocks with every decoder")
    parser.add_argument(
        "--ar_quality",
        action="store_true",
        help="also answer --tasks in the autoregressive mode and by block decoding, and compare: how good is the "
        "mode that lossless decoders reproduce",
    )
    parser.add_argument("--tasks", metavar="A,B", help="tasks of --ar_quality (default for toy: its own)")
    add_shared(parser, "--limit", "--rows")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 if any is a problem."""
    findings = list(examine(args))
    if args.json:
        print(json.dumps([vars(finding) for finding in findings], ensure_ascii=False, indent=1))
    else:
        _show(findings)
    return int(any(finding.state == "problem" for finding in findings))


def examine(args: argparse.Namespace) -> Iterator[Finding]:
    """All findings on the installation, and on the checkpoint if one is given."""
    from s2d2_lmeval.cli.doctor import installation

    options = parse_options(args.option)
    yield from installation.versions()
    yield from installation.devices()
    yield from installation.attention()
    yield from installation.registration()
    if args.path is not None:
        from s2d2_lmeval.cli.doctor.checkpoint import checkpoint

        yield from checkpoint(args.path, args.revision, options, load=args.load)
    if args.ar_quality:
        from s2d2_lmeval.cli.doctor.ar_quality import ar_quality

        yield from ar_quality(args.path, args.tasks, limit=args.limit, rows=args.rows)


_SIGNS = {"ok": (" ", ""), "note": ("!", "yellow"), "problem": ("✗", "bold red")}


def _show(findings: list[Finding]) -> None:
    from rich.text import Text

    from s2d2_lmeval.cli.console import make_console, pairs

    console = make_console()
    width = max(len(finding.name) for finding in findings)
    for section in dict.fromkeys(finding.section for finding in findings):
        console.print(Text(section, "bold"))
        lines = []
        for finding in findings:
            if finding.section == section:
                sign, style = _SIGNS[finding.state]
                lines.append((Text(sign, style), finding.name, Text(finding.value, style)))
        console.print(pairs(lines, {"width": 1}, {"min_width": width, "no_wrap": True}))
    problems = sum(finding.state == "problem" for finding in findings)
    console.print()
    if problems:
        console.print(Text(f"{problems} thing{'s' if problems > 1 else ''} will not work (✗).", "bold red"))
    else:
        console.print(Text("Everything that was checked works.", "bold green"))
