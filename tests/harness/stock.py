"""Plain causal checkpoints and tasks for comparing ``--model s2d2`` with the harness' own ``--model hf``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from .conftest import BYTES, SPECIAL, write_tokenizer

CONTEXT = 320
SIZES = {
    "vocab_size": BYTES + len(SPECIAL),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "eos_token_id": BYTES + 2,
    "bos_token_id": BYTES + 0,
    "pad_token_id": BYTES + 0,
}


def write_plain(folder: Path, kind: str) -> Path:
    """A random causal checkpoint as transformers saves it. The llama one's tokenizer puts a BOS before every text."""
    folder.mkdir(parents=True)
    write_tokenizer(folder)
    if kind == "llama":
        _add_bos(folder)
    torch.manual_seed(len(kind))
    model = (
        LlamaForCausalLM(LlamaConfig(**SIZES))
        if kind == "llama"
        else Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    model.float().save_pretrained(folder)
    return folder


def _add_bos(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["bos_token"] = SPECIAL[0]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    start = {"SpecialToken": {"id": SPECIAL[0], "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {SPECIAL[0]: {"id": SPECIAL[0], "ids": [BYTES], "tokens": [SPECIAL[0]]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


DATA = """
from datasets import Dataset, DatasetDict

TEXT = "the quick brown fox jumps over the lazy dog, again and again; "


def load(**kwargs):
    rows = [
        {"q": "one and one?", "a": "two", "pick": 1, "text": TEXT},
        {"q": "zwei?", "a": " zwo", "pick": 0, "text": TEXT * 8},
        {"q": "three plus 4 =" + " and" * 120, "a": "7", "pick": 2, "text": "a"},
        {"q": "<|endoftext|>five", "a": "x\\n\\ny", "pick": 3, "text": "b" * 321},
        {"q": "  spaces  ", "a": "<|im_end|>", "pick": 0, "text": "c" * 320},
        {"q": "ünïcödé 漢字", "a": "字", "pick": 1, "text": "d" * 640 + TEXT},
    ]
    shots = [{"q": f"shot {n}?", "a": f"s{n}", "pick": n, "text": ""} for n in range(3)]
    return DatasetDict({"test": Dataset.from_list(rows), "dev": Dataset.from_list(shots)})
"""

HEAD = """
task: {name}
custom_dataset: !function data.load
test_split: test
fewshot_split: dev
fewshot_config: {{sampler: first_n}}
metadata: {{version: 1.0}}
"""

GENERATE = """
output_type: generate_until
doc_to_text: "Q: {{q}}\\nA:"
doc_to_target: "{{a}}"
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSE = """
output_type: multiple_choice
doc_to_text: "Q: {{q}}\\nA:"
doc_to_target: pick
doc_to_choice: CHOICES
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
SCORE = """
output_type: loglikelihood
doc_to_text: CONTEXT
doc_to_target: "{{a}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
ROLL = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
"""
TASKS = {
    "gen": GENERATE + 'generation_kwargs: {until: ["\\n\\n", "e"], max_gen_toks: 24}\n',
    "gen_many_stops": GENERATE + 'generation_kwargs: {until: ["a", "b", "the", "<|endoftext|>"], max_gen_toks: 24}\n',
    "gen_no_stop": GENERATE + "generation_kwargs: {until: [], max_gen_toks: 40}\n",
    "gen_one": GENERATE + "generation_kwargs: {max_gen_toks: 1}\n",
    "gen_described": GENERATE + "description: 'Answer in a word.\\n'\ngeneration_kwargs: {max_gen_toks: 16}\n",
    "gen_prefixed": GENERATE + "gen_prefix: 'It is'\ngeneration_kwargs: {max_gen_toks: 16}\n",
    "gen_think": GENERATE + "generation_kwargs: {until: ['\\n\\n'], max_gen_toks: 60}\n",
    "gen_greedy": GENERATE + "generation_kwargs: {do_sample: false, temperature: 0.0, max_gen_toks: 16}\n",
    "gen_repeated": GENERATE + "repeats: 2\ngeneration_kwargs: {max_gen_toks: 8}\n",
    "choose_letters": CHOOSE.replace("CHOICES", "['A', 'B', 'C', 'D']"),
    "choose_words": CHOOSE.replace("CHOICES", "[' yes', ' no way', ' perhaps tomorrow', ' yes or no']"),
    "choose_same_start": CHOOSE.replace("CHOICES", "['aaaa', 'aaab', 'aa', 'b']"),
    "score": SCORE.replace("CONTEXT", '"Q: {{q}}\\nA:"'),
    "score_trailing_space": SCORE.replace("CONTEXT", '"Q: {{q}}  "'),
    "score_no_context": SCORE.replace("CONTEXT", '""'),
    "roll": ROLL,
}


def write_tasks(folder: Path) -> Path:
    """Every task of :data:`TASKS`, named ``stock_…``."""
    folder.mkdir(parents=True)
    (folder / "data.py").write_text(DATA)
    for name, body in TASKS.items():
        (folder / f"{name}.yaml").write_text(HEAD.format(name=f"stock_{name}") + body)
    return folder


def evaluated(
    model: str, arguments: Mapping[str, Any], tasks: Sequence[str], folder: Path, **options: Any
) -> dict[str, dict[str, Any]]:
    """Of each task the ``texts`` and the ``numbers`` that it came to, by name: responses of every document, metrics."""
    results = simple_evaluate(
        model=model,
        model_args=dict(arguments),
        tasks=[f"stock_{task}" for task in tasks],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
        **options,
    )
    assert results is not None
    found = {}
    for task in tasks:
        everything: dict[str, Any] = dict(results["results"][f"stock_{task}"])
        for sample in results["samples"][f"stock_{task}"]:
            everything |= _leaves(sample["resps"], f"document {sample['doc_id']}")
        numbers = {name: float(value) for name, value in everything.items() if isinstance(value, (int, float))}
        texts = {name: value for name, value in everything.items() if isinstance(value, str) and name != "alias"}
        found[task] = {"texts": texts, "numbers": {k: v for k, v in numbers.items() if "stderr" not in k}}
    return found


def _leaves(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, (list, tuple)):
        return {name: value}
    return {key: leaf for place, one in enumerate(value) for key, leaf in _leaves(one, f"{name}.{place}").items()}
