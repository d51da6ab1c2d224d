"""The tables of docs/models.md say what is in the code and in the recorded runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from s2d2_lmeval import families
from s2d2_lmeval.families import FAMILIES
from s2d2_lmeval.families.facts import AUTOREGRESSIVE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
SOURCES = Path(families.__file__).parent / "known"
RECORDED = ROOT / "tests" / "decoding" / "data"
PUBLISHED_TYPES = {"stable_diffcoder": "llama", "idlm": "sdar", "wedlm_qwen2": "wedlm"}
"""Types that are other families'."""
DIFFUSION = [family for family in FAMILIES.values() if family.scheme != AUTOREGRESSIVE]


def rows(heading: str) -> dict[str, list[str]]:
    """First cell (a family) -> the other cells, of the table under ``heading``."""
    section = PAGE.partition(f"# {heading}\n")[2].partition("\n## ")[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:3] == "| `"
    ]
    return {re.fullmatch("`(.+)`", first)[1]: rest for first, *rest in cells}


def lines_of(module: str) -> int:
    """As the page's command counts them."""
    return sum(not re.match(r"\s*(#|$)", line) for line in (SOURCES / f"{module}.py").read_text().splitlines())


@pytest.mark.parametrize("family", DIFFUSION, ids=lambda family: family.name)
def test_facts_of_a_family(family):
    _, model_type, native, _, logits, decoders, presets = rows("Models")[family.name]
    published = PUBLISHED_TYPES.get(family.name) or family.model_types[0]
    assert model_type == f"`{published}`"
    assert native.replace("-", "").lower() + "forcausallm" == family.native_class.lower()
    shift, draft_shift = (("own token", "next token")[bool(one)] for one in (family.token_shift, family.draft_shift))
    told = shift if family.draft_shift in (None, family.token_shift) else f"{shift}; masks: {draft_shift}"
    assert logits == told
    other = re.fullmatch("as `(.+)`", decoders)
    listed = rows("Models")[other[1]][5] if other else decoders
    assert tuple(re.findall("`(.+?)`", listed)) == family.decoders
    names = re.findall("`(.+?)`", presets)
    assert set(names) == set(family.presets)
    assert family.presets[names[0]] == family.defaults(family.published_block_length)


def test_what_is_told_of_every_preset():
    assert {name for cell in rows_of_presets() for name in cell} == {name for one in DIFFUSION for name in one.presets}


def rows_of_presets() -> list[list[str]]:
    section = PAGE.partition("## Presets\n")[2].partition("\n## ")[0]
    return [re.findall("`(.+?)`", line.split("|")[1]) for line in section.splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("name", ["sdar", "fast_dllm_v2", "llada2", "llada", "dream"])
def test_numbers_of_lines_and_recorded_runs(name):
    lines, runs, *_ = rows("What is tested")[name]
    if name != "dream":  # it is counted with llada
        assert int(re.match(r"\d+", lines)[0]) == lines_of("d2f" if name == "llada" else name)
    file = f"d2f_{name}" if name in ("llada", "dream") else name
    recorded = len((RECORDED / f"{file}_goldens.jsonl").read_text().splitlines())
    assert runs == f"{recorded} of {recorded}"


def test_the_table_of_families_and_decoders_is_up_to_date():
    from .table import page

    assert page() == PAGE, "run `make docs`"


def test_number_of_shared_lines():
    assert int(re.search(r"(\d+) more lines merge adapters", PAGE)[1]) == lines_of("../adapters")
