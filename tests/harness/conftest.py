"""A tiny random SDAR checkpoint with a byte-level tokenizer, and tasks over local documents."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import Qwen3Config, Qwen3ForCausalLM

from s2d2_lmeval.harness.model import S2D2LM

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>", "</think>")
BYTES = 256
CONTEXT = 256
CHAT_TEMPLATE = (
    "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    """Every byte is a token, so that characters of several bytes fall apart; ids from 256 on are special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|MASK|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_checkpoint(folder: Path, seed: int = 0, prefer: str = "") -> Path:
    """A random SDAR checkpoint whose answers are spread over letters; ``prefer`` names characters it likes."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    sizes = {
        "vocab_size": BYTES + len(SPECIAL),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, rope_theta=10000.0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
        model.lm_head.weight[BYTES:] = 0.0
    save_file(dict(model.state_dict()), str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "block_size": 4,
        "mask_token_id": BYTES + SPECIAL.index("<|MASK|>"),
        "eos_token_id": BYTES + SPECIAL.index("<|im_end|>"),
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
        **sizes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


TASK_CODE = """
from datasets import Dataset, DatasetDict

from s2d2_lmeval.harness.filters import with_decoding_metrics

QUESTIONS = ["one and one?", "zwei?", "three plus 4 =", "name a colour", "five", "one and one?"]


def load(**kwargs):
    rows = [{"question": q, "answer": "x"} for q in QUESTIONS]
    return DatasetDict({"test": Dataset.from_list(rows)})


@with_decoding_metrics
def process_results(doc, results):
    return {"exact_match": float(results[0] == doc["answer"])}
"""

TASK = """
task: {name}
custom_dataset: !function code.load
test_split: test
output_type: generate_until
doc_to_text: "Q: {{{{question}}}} A:"
doc_to_target: "{{{{answer}}}}"
process_results: !function code.process_results
generation_kwargs:
{generation}
filter_list:
  - name: text
    filter: [{{function: take_first}}]
  - name: decode
    filter: [{{function: s2d2_stats}}]
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
  - {{metric: nfe, aggregation: mean, higher_is_better: false}}
  - {{metric: tokens_per_forward, aggregation: mean, higher_is_better: true}}
  - {{metric: acceptance, aggregation: mean, higher_is_better: true}}
  - {{metric: new_tokens, aggregation: mean, higher_is_better: false}}
  - {{metric: seconds, aggregation: mean, higher_is_better: false}}
metadata: {{version: 1.0}}
"""

CHOICES = """
task: tiny_choices
custom_dataset: !function code.load
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{question}} A:"
doc_to_target: 0
doc_to_choice: ["yes", "no"]
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""

ROLLING = """
task: tiny_rolling
custom_dataset: !function code.load
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
metadata: {version: 1.0}
"""


def write_task(folder: Path, name: str, **generation: object) -> None:
    """A task YAML with these generation arguments."""
    lines = "\n".join(f"  {key}: {json.dumps(value)}" for key, value in generation.items())
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, generation=lines))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "code.py").write_text(TASK_CODE)
    write_task(folder, "tiny_free", until=["\n\n"], max_gen_toks=12)
    write_task(folder, "tiny_ar", until=[], max_gen_toks=8, decoder="ar")
    (folder / "tiny_choices.yaml").write_text(CHOICES)
    (folder / "tiny_rolling.yaml").write_text(ROLLING)
    return folder


@pytest.fixture(autouse=True)
def _without_environment_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """``simple_evaluate`` asks the whole system for its versions, which takes longer than a tiny evaluation."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="session")
def make(checkpoint: Path) -> Callable[..., S2D2LM]:
    """The model class on the tiny checkpoint, with these ``--model_args``."""

    def build(**options: Any) -> S2D2LM:
        return S2D2LM(pretrained=str(checkpoint), device="cpu", **options)

    return build


@pytest.fixture(scope="session")
def lm(make: Callable[..., S2D2LM]) -> S2D2LM:
    return make(batch_size=4)


@pytest.fixture(scope="session")
def requests() -> Callable[..., list[Instance]]:
    """One request per prompt, each of a document of its own, with these generation arguments."""

    def build(prompts: list[str], **gen_kwargs: Any) -> list[Instance]:
        return [
            Instance("generate_until", {}, (prompt, gen_kwargs), 0, metadata=("task", place, 1))
            for place, prompt in enumerate(prompts)
        ]

    return build
