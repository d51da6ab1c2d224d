"""transformers' auto classes after ``import s2d2_lmeval``: they know every family, and decode it as the engine does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import s2d2_lmeval
from s2d2_lmeval.errors import CheckpointError
from s2d2_lmeval.toy import checkpoint_path

from .conftest import LAYOUTS, Published

PROMPT = [3, 1, 4, 15, 9]
# Published under the type and the fields of Llama, which transformers knows: only load() sees the class.
OWN_TYPE = [name for name in LAYOUTS if name != "stable_diffcoder"]


@pytest.mark.parametrize("family", OWN_TYPE)
def test_every_family_loads_and_decodes(
    family: str, publish: Callable[..., Published], logits: Callable[[PreTrainedModel], torch.Tensor]
) -> None:
    published = publish(family)
    config = AutoConfig.from_pretrained(published.folder)
    assert config.block_diffusion_family == family
    model = AutoModelForCausalLM.from_pretrained(published.folder)
    assert type(model).__module__.startswith("s2d2_lmeval.")
    assert torch.equal(logits(model), logits(published.native))
    options = {"do_sample": False, "max_new_tokens": 9}
    expected = s2d2_lmeval.load(published.folder, device="cpu").generate(
        [PROMPT], {**options, "trim_stop_tokens": False}
    )
    assert model.generate(torch.tensor([PROMPT]), **options)[0].tolist() == PROMPT + expected[0].token_ids


def test_transformers_own_loop_can_be_asked_for(publish: Callable[..., Published]) -> None:
    published = publish("wedlm")
    model = AutoModelForCausalLM.from_pretrained(published.folder)
    settings = {"max_new_tokens": 5, "do_sample": False}
    ids = torch.tensor([PROMPT])
    plain = published.native.generate(ids, **settings)
    assert torch.equal(model.generate(ids, custom_generate=None, **settings), plain)


def test_a_checkpoint_that_does_not_fit_is_refused(
    publish: Callable[..., Published], rewrite: Callable[[Path, dict[str, torch.Tensor]], None]
) -> None:
    published = publish("sdar")
    rewrite(published.folder, {name: value for name, value in published.weights.items() if "layers.1.mlp" not in name})
    with pytest.raises(CheckpointError, match="missing weights"):
        AutoModelForCausalLM.from_pretrained(published.folder)


def test_what_was_saved_loads_again(publish: Callable[..., Published], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(publish("llada").folder)
    model.save_pretrained(tmp_path / "saved")
    again = s2d2_lmeval.load(tmp_path / "saved", device="cpu")
    assert again.facts.family == "llada"
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=6, do_sample=False)[0].tolist()
    assert again.generate([PROMPT], {"max_new_tokens": 6, "trim_stop_tokens": False})[0].token_ids == expected[5:]


PIPELINE = """
import warnings; warnings.simplefilter("error", UserWarning)
import torch, transformers
assert "sdar" not in transformers.CONFIG_MAPPING
import s2d2_lmeval
answer = transformers.pipeline("text-generation", model=FOLDER, device="cpu")("3 + 4 =", max_new_tokens=4)
model = s2d2_lmeval.load(FOLDER, device="cpu")
tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
new = model.generate([tokenizer("3 + 4 =").input_ids], {"max_new_tokens": 4})[0].token_ids
assert answer[0]["generated_text"] == "3 + 4 =" + tokenizer.decode(new, skip_special_tokens=True), answer
"""


def in_a_process_of_its_own(code: str) -> tuple[str, str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "warning"}
    code = code.replace("FOLDER", repr(str(checkpoint_path())))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_a_pipeline_answers_without_a_warning() -> None:
    _, messages = in_a_process_of_its_own(PIPELINE)
    assert not [line for line in messages.splitlines() if line.strip() and "Loading weights" not in line]


def test_a_program_that_never_names_the_package_keeps_transformers_as_it_is() -> None:
    code = """
import torch, transformers
try:
    transformers.AutoConfig.from_pretrained(FOLDER)
except ValueError as error:
    print(error)
"""
    assert "`sdar`" in in_a_process_of_its_own(code)[0]
