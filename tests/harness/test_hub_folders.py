"""A folder of every family as the hub lays it out, evaluated by ``--model s2d2``.

Weights in shards with an index, in bfloat16 and under published names; stop tokens in generation_config.json; a
tokenizer with a chat template; model code of its own, which must not run. For D2F a base and its adapter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

import s2d2_lmeval
from s2d2_lmeval.errors import CheckpointError
from s2d2_lmeval.harness import report
from s2d2_lmeval.harness.prompts import request_key

from ..families.conftest import LAYOUTS, random_native, write_weights
from ..families.lora import MODULES, factors, write_adapter
from .conftest import BYTES, SPECIAL, write_tokenizer

END, MASK = BYTES + SPECIAL.index("<|im_end|>"), BYTES + SPECIAL.index("<|MASK|>")
STOPS = [END, BYTES]
SHARDS = 3
NEW = 12
COMMON = {"vocab_size": BYTES + len(SPECIAL), "mask_token_id": MASK, "eos_token_id": END, "torch_dtype": "bfloat16"}
COMMON |= {"max_position_embeddings": 512}
COMMON |= {"embedding_size": COMMON["vocab_size"], "max_sequence_length": 512}  # as LLaDA calls them
LARGER = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6}
LARGER_BY_FAMILY = {
    "llada": {"d_model": 512, "mlp_hidden_size": 1536, "n_layers": 6},
    "sdar_moe": {**LARGER, "moe_intermediate_size": 512},
    "llada2": {**LARGER, "moe_intermediate_size": 256},
}


def write_folder(folder: Path, name: str, **changes: Any) -> tuple[Path, Path | None]:
    """The checkpoint and, for a base of D2F, an adapter."""
    layout, checkpoint = LAYOUTS[name], folder / "checkpoint"
    config = {**layout.published, **COMMON, **changes, "auto_map": {"AutoModel": "modeling_own.Own"}}
    checkpoint.mkdir(parents=True)
    native = random_native(layout, config)
    weights = native.state_dict()
    if native.config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    write_weights(checkpoint, {key: value.bfloat16() for key, value in layout.names(weights).items()}, SHARDS)
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": STOPS}))
    (checkpoint / "modeling_own.py").write_text("raise SystemExit('ran')")
    write_tokenizer(checkpoint)
    if name not in MODULES:
        return checkpoint, None
    modules = {published: module for published, module in MODULES[name].items() if module != "lm_head"}
    return checkpoint, write_adapter(folder / "adapter", factors(native, modules))


def model_arguments(checkpoint: Path, adapter: Path | None) -> dict[str, Any]:
    peft = {"peft": str(adapter)} if adapter else {}
    return {"pretrained": str(checkpoint), "dtype": "bfloat16", **peft}


OWN = {
    "tiny_a2d": "static",
    "stable_diffcoder": "dynamic",
    **dict.fromkeys(("nemotron_labs_diffusion", "idlm", "wedlm", "wedlm_qwen2"), "sliding"),
}
"""Families whose own setting is not ``s2d2``."""


def check_results(results: dict[str, Any], name: str) -> None:
    about = results["config"]["s2d2"]
    assert (about["family"], about["decoder"]) == (name, OWN.get(name, "s2d2"))
    assert about["environment"]["dtype"] == "bfloat16"
    (configuration,) = about["configurations"]
    assert configuration["stop_token_ids"] == STOPS
    assert 0 < about["tasks"]["tiny_free"]["new_tokens"] <= 2 * NEW
    assert results["results"]["tiny_free"]["nfe,decode"] > 0


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_a_folder_as_the_hub_has_it(name: str, tmp_path: Path, task_folder: Path) -> None:
    """With the head tied to the embedding, as the small checkpoints have it."""
    tied = {"weight_tying" if name == "llada" else "tie_word_embeddings": True}
    checkpoint, adapter = write_folder(tmp_path, name, **tied)
    results = simple_evaluate(
        model="s2d2",
        model_args=model_arguments(checkpoint, adapter),
        tasks=["tiny_free"],
        task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
        device="cpu",
        limit=2,
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    assert results is not None
    check_results(results, name)
    model = s2d2_lmeval.load(checkpoint, dtype="bfloat16", device="cpu", adapter=adapter, max_batch=1)
    assert model.hf_model.lm_head.weight is model.hf_model.model.embed_tokens.weight
    assert model.dtype == torch.bfloat16
    tokenizer = tokenizer_of(checkpoint)
    for sample in results["samples"]["tiny_free"]:
        prompt = sample["arguments"][0][0]
        assert prompt.startswith("<|im_start|>user\nQ: ")
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        options = {"stop_token_ids": STOPS, "seed": 1234}  # the harness seeds with 1234 where nobody says
        (answer,) = model.generate([ids], options, max_new_tokens=NEW, seeds=[request_key(ids, 0)])
        assert tokenizer.decode(answer.token_ids, skip_special_tokens=True).split("\n\n")[0] == sample["resps"][0][0]


def tokenizer_of(checkpoint: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint)


def test_an_adapter_of_another_base(tmp_path: Path, task_folder: Path) -> None:
    base, _ = write_folder(tmp_path / "dream", "dream")
    _, adapter = write_folder(tmp_path / "llada", "llada")
    with pytest.raises(CheckpointError, match=r"changes model\.transformer\.blocks.*Load the base model"):
        simple_evaluate(model="s2d2", model_args=model_arguments(base, adapter), tasks=["tiny_free"], device="cpu")


def test_the_header_of_a_run_says_that_a_base_lacks_its_adapter(tmp_path: Path) -> None:
    base, adapter = write_folder(tmp_path, "llada")
    for given in (None, adapter):
        model = s2d2_lmeval.load(base, adapter=given, device="cpu")
        told = report.header("here", model, model.config({}), None, 1)
        assert ("by a LoRA adapter: give it as" in told) == (given is None)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_tens_of_megabytes_by_the_command_line(name: str, tmp_path: Path, task_folder: Path) -> None:
    checkpoint, adapter = write_folder(tmp_path, name, **LARGER_BY_FAMILY.get(name, LARGER))
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert 2e7 < size < 2e8
    arguments = ",".join(f"{key}={value}" for key, value in model_arguments(checkpoint, adapter).items())
    command = [str(Path(sys.executable).with_name("lm_eval")), "--model", "s2d2", "--model_args", arguments]
    command += ["--tasks", "tiny_free", "--include_path", str(task_folder), "--limit", "2", "--apply_chat_template"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--device", "cpu", "--output_path", str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = (tmp_path / "out").rglob("results_*.json")
    check_results(json.loads(written.read_text()), name)
