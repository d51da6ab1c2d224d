"""What is tested of every family and decoder, as a table for docs/models.md, counted from the tests themselves.

python -m tests.families.table   writes it into the page
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from s2d2_lmeval.families import FAMILIES
from s2d2_lmeval.families.facts import AUTOREGRESSIVE

from ..custom_generate.test_windows import RUNS
from ..decoding import (
    test_editing_against_oracle,
    test_engine_against_oracle,
    test_pipelined,
    test_sliding,
    test_spiffy,
    test_subblocks_against_oracle,
)
from .test_decoding import DECODERS
from .test_random_cases import TESTED
from .test_windows import GREEDY

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- what follows is written by `make docs` -->\n", "<!-- up to here -->\n"
RECORDED = Path(__file__).parents[1] / "decoding" / "data"
HEAD = ["family", "decoder", "published runs", "random cases", "equal to", "real checkpoint"]
MET: dict[str, str] = {}
"""Checkpoints from the hub that a family has decoded, and what came out."""
DEFINITION = "its definition, without a cache"

DECODER_OF = {
    "generate_ssd_policy": "s2d2",
    "generate_cached": "editing",
    "generate_block_single": "pipelined",
    "generate_block_speculative": "s2d2",
    "linear_spec_generate": "linear_spec",
    "BD3LMSampler.sample": "static",
    "IDLMPipeline.__call__": "strided",
    "isd_greedy_verify (ours)": "strided",
    "LLM.generate": "reordered",
    "generate_wedlm": "reordered",
}
"""By published function; the others depend on the family and on arguments."""
STRATEGIES = {"low_confidence_static": "static", "sequential": "sequential", "entropy_bounded": "entropy_bounded"}


def decoder_of(family: str, run: dict[str, Any]) -> str:
    """Which decoder a recorded run of ``family`` is of."""
    name, call = run["fn"], run["kwargs"]
    if name in DECODER_OF:
        return DECODER_OF[name]
    if name == "generate_block" or (name == "generate" and family == "nemotron_labs_diffusion"):
        return "static" if call.get("threshold", 0.95 if name == "generate_block" else None) is None else "dynamic"
    if name == "generate":
        return "editing" if family == "llada2" else STRATEGIES.get(call.get("remasking_strategy"), "dynamic")
    return "ar"


def recorded() -> Counter[tuple[str, str]]:
    """Published runs that are reproduced, by family and decoder."""
    found: Counter[tuple[str, str]] = Counter()
    for family in ("sdar", "fast_dllm_v2", "llada2", "llada", "dream"):
        file = RECORDED / f"{'d2f_' * (family in ('llada', 'dream'))}{family}_goldens.jsonl"
        found.update((family, decoder_of(family, json.loads(line))) for line in file.read_text().splitlines())
    found.update((family, decoder_of(family, run)) for family, run in RUNS)
    found.update((family, "sliding") for family, _ in GREEDY)
    found.update((family, "ar") for family, run in GREEDY if run["fn"] == "ar")
    return found


def examples(test: Any) -> int:
    """How many inputs a test draws."""
    count: int = test._hypothesis_internal_use_settings.max_examples
    return count


def cases() -> dict[tuple[str, str], tuple[int, str]]:
    """Random cases of the long tests, and what their output is compared with, by family and decoder."""
    pipelined = test_pipelined.FAMILIES
    against = (
        (test_engine_against_oracle, "test_engine_decodes_what_the_definition_says_at_length", ("sdar",)),
        (test_editing_against_oracle, "test_engine_and_schedules_at_length", ("llada2",)),
        (test_subblocks_against_oracle, "test_engine_decodes_what_the_definition_says_at_length", ("fast_dllm_v2",)),
        (test_pipelined, "test_engine_decodes_what_the_oracle_decodes_at_length", pipelined),
    )
    found = {
        (family, decoder): (examples(getattr(module, test)) * times, DEFINITION)
        for module, test, families in against
        for decoder, times in Counter(decoder for decoder, _ in module.TARGETS).items()
        for family in families
    }
    for family in test_sliding.FAMILIES:
        found[family, "sliding"] = (200, "`ar`")
    states = test_spiffy.test_states_and_output_are_those_of_the_base_decoder_at_length
    found |= {
        (family, "spiffy"): (examples(states), "its base decoder") for family in ("sdar", "llada2", "fast_dllm_v2")
    }
    return found | TESTED


def table() -> str:
    """The table in Markdown."""
    runs, drawn = recorded(), cases()
    lines = [HEAD, [":--", ":--", "--:", "--:", ":--", ":--"]]
    for family in FAMILIES.values():
        if family.scheme == AUTOREGRESSIVE:
            continue
        met, others = MET.get(family.name, "no"), []
        for decoder in family.decoders:
            key = family.name, decoder
            count, equal = drawn.get(key, (0, ""))
            equal = equal or ("published" if runs[key] else "itself, alone and in a batch" * (key in DECODERS))
            if not equal:
                others.append(f"`{decoder}`")
                continue
            counts = [str(runs[key] or ""), f"{count:,}" if count else ""]
            lines.append([f"`{family.name}`", f"`{decoder}`", *counts, equal, met])
        if others:
            lines.append([f"`{family.name}`", ", ".join(others), "", "", "nothing of its own", met])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def page() -> str:
    """docs/models.md with the table as it should be."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
