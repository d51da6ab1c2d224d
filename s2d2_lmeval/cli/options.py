"""List the decoding options with meaning, default and range, for all decoders or for one."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

SUMMARY = "list the decoding options"

_INTRODUCTION = """\
# Decoding options

<!-- Written by `make docs` from the options of every decoder; a test compares the two. -->

The names are those of the published functions; `decoder`, `schedule`, `acceptance`, `random_source` and the options of
`sliding` are new. They mean the same everywhere:

- in `--model_args` (defaults of a run) and in a task's `generation_kwargs` or `--gen_kwargs` (which override them);
- as `--option name=value` of `s2d2-lmeval generate`;
- in Python, `model.generate(prompts, {"decoder": "s2d2", "block_length": 16})`.

`preset=NAME` chooses one of the [published settings](#published-settings). All other options override it, wherever they
are given: with `--model_args pretrained=…,temperature=0.5` and a task's `preset: sdar-b`, the temperature is 0.5.

`do_sample=true` without a temperature samples at temperature 1; a temperature without `do_sample` decides by itself
whether to sample; contradictions (`do_sample=true,temperature=0`) are refused. Filters (`top_k` to `typical_p`) work as
in transformers, in that order. `suppress_tokens` and `logit_bias` also apply to the argmax, in drafts and in
verification; `bad_words_ids` and `sequence_bias` are accepted if they name single tokens.

Options that you do not set have the published setting of the checkpoint's family (`s2d2-lmeval doctor PATH` shows it),
or else the defaults below. Unknown options, and those of another decoder or family, are refused; `spiffy` also takes
the options of the decoder that it accelerates (`base`). [Other model arguments](model-args.md) lists what else
`--model_args` accepts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("name", nargs="*", metavar="NAME", help="show only these options; synonyms work too")
    parser.add_argument("--decoder", "-d", metavar="NAME", help="show only the options of this decoder")
    parser.add_argument("--markdown", action="store_true", help="print the tables of docs/options.md")


def run(args: argparse.Namespace) -> int:
    """Print the options."""
    from s2d2_lmeval.decoding.options.option import SYNONYMS
    from s2d2_lmeval.errors import ConfigError
    from s2d2_lmeval.registry import DECODERS

    if args.decoder is not None and args.decoder not in DECODERS:
        raise ConfigError(f"decoder={args.decoder} is not one of: {', '.join(DECODERS)}.")
    wanted = {SYNONYMS.get(name, name) for name in args.name}
    known = {option["name"] for option in describe()}
    if wanted - known:
        raise ConfigError(f"{sorted(wanted - known)[0]} is not a decoding option; omit the name to list all of them.")
    chosen = [
        option
        for option in describe()
        if (not wanted or option["name"] in wanted) and (args.decoder is None or args.decoder in option["decoders"])
    ]
    if args.markdown:
        print(markdown(chosen))
    else:
        _show(chosen)
    return 0


def describe() -> list[dict[str, Any]]:
    """Every option: ``name``, ``synonyms``, ``default``, ``values`` (as texts), ``meaning``, ``decoders``,
    ``schemes``.
    """
    from s2d2_lmeval.decoding.options.config import SYNONYMS, DecodingConfig
    from s2d2_lmeval.decoding.options.option import kind_of
    from s2d2_lmeval.decoding.options.reading import owners

    described = []
    for field in DecodingConfig.fields():
        meta = field.metadata
        described.append(
            {
                "name": field.name,
                "synonyms": [name for name, target in SYNONYMS.items() if target == field.name],
                "default": as_written(field.default),
                "values": _values(kind_of(field), meta),
                "meaning": meta["meaning"],
                "decoders": owners(field.name),
                "schemes": meta["schemes"],
            }
        )
    return described


def markdown(options: Iterable[dict[str, Any]]) -> str:
    """The page docs/options.md: a table per set of decoders that share options, and the published settings."""
    parts = [_INTRODUCTION]
    for heading, members in _groups(options).items():
        lines = [f"## {heading}", "", "| option | default | values | meaning |", "| :-- | :-- | :-- | :-- |"]
        for option in members:
            names = ", ".join(f"`{name}`" for name in (option["name"], *option["synonyms"]))
            lines.append(f"| {names} | {option['default']} | {option['values']} | {option['meaning']} |")
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, _published_settings()])


def _groups(options: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Options by heading; those of the most decoders come first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for option in sorted(options, key=lambda one: -len(one["decoders"]) * len(one["schemes"])):
        groups.setdefault(_heading(option), []).append(option)
    return groups


def _published_settings() -> str:
    """One list per family: its default in full, its other settings as differences."""
    from s2d2_lmeval.families import FAMILIES

    families: dict[str, list[str]] = {}
    for family in (family for family in FAMILIES.values() if family.presets):
        length = family.published_block_length
        default = dict(family.defaults(length))
        lines = [f"- default, for blocks of {length}: {_written(default)}"]
        for name, options in family.presets.items():
            changes, gone = compared(options, default)
            more = ", ".join([*([_written(changes)] if changes else []), *(f"without `{key}`" for key in gone)])
            lines.append(f"- `{name}`: the default{' with ' + more if more else ''}")
        families.setdefault("\n".join(lines), []).append(family.name)
    parts = ["## Published settings", *(f"**{_listed(names)}**\n\n{lines}" for lines, names in families.items())]
    return "\n\n".join(parts)


def compared(options: Mapping[str, Any], default: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Options that differ from ``default``, and those that the setting leaves unset."""
    changes = {name: value for name, value in options.items() if (name, value) not in default.items()}
    return changes, [name for name in default if name not in options]


def _written(options: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}={as_written(value)}`" for name, value in options.items())


def _heading(option: dict[str, Any]) -> str:
    """The decoders and families that an option belongs to."""
    from s2d2_lmeval.decoding.options.option import SCHEMES
    from s2d2_lmeval.registry import DECODERS

    decoders, schemes = option["decoders"], option["schemes"]
    if set(decoders) == set(DECODERS):
        who = "Every decoder"
    elif len(decoders) > len(DECODERS) / 2:
        who = "Every decoder but " + _listed([name for name in DECODERS if name not in decoders])
    else:
        who = _listed([f"`{name}`" for name in decoders])
    families = sorted(family for scheme in schemes for family in _families_of(scheme))
    return who if set(schemes) == set(SCHEMES) or not families else f"{who}, on {_listed(families)}"


def _families_of(scheme: str) -> list[str]:
    from s2d2_lmeval.families import FAMILIES

    return [family.name for family in FAMILIES.values() if family.scheme == scheme]


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def as_written(value: Any) -> str:
    """A value as it would be written in ``--model_args``."""
    if value is None or value == ():
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _values(kind: str, meta: Any) -> str:
    if meta["choices"] is not None:
        return ", ".join(map(str, meta["choices"]))
    named = {
        "bool": "true, false",
        "int": "integer",
        "int | str": "integer or auto",
        "float": "number",
        "str": "a name",
        "tuple[int, ...]": "token ids",
        "object": "keyed, fixed, torch, an object",
        "tuple[tuple[int, float], ...]": "token ids to numbers",
    }.get(kind, kind)
    low, high = meta["low"], meta["high"]
    if low is not None and high is not None:
        return f"{named}, {low:g} to {high:g}"
    return f"{named}, from {low:g}" if low is not None else named


def _show(options: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.table import Table

    from s2d2_lmeval.cli.console import make_console

    console = make_console()
    for heading, members in _groups(options).items():
        table = Table(title=heading.replace("`", ""), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        table.add_column("option", no_wrap=True, min_width=max(len(option["name"]) for option in options))
        table.add_column("default", no_wrap=True)
        table.add_column("values", max_width=32)
        table.add_column("meaning")
        for option in members:
            also = f" (also: {', '.join(option['synonyms'])})" if option["synonyms"] else ""
            table.add_row(option["name"], option["default"], option["values"], option["meaning"] + also)
        console.print(table)
