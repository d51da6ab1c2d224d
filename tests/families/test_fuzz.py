"""Damaged checkpoints by the hundred: each is loaded or refused in a sentence, and nothing hangs.

Seeded, so that a failure comes again. The long version is marked slow.
"""

from __future__ import annotations

import json
import os
import random
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from s2d2_lmeval.decoding.spiffy.graph import DraftGraph, load_graph
from s2d2_lmeval.errors import CheckpointError
from s2d2_lmeval.families import checkpoint_facts, load_checkpoint
from s2d2_lmeval.model import BlockDiffusionModel
from s2d2_lmeval.runtime.drafting.loading import load_drafter
from s2d2_lmeval.runtime.runner import Runner

from ..fuzzing import Tries
from .conftest import LAYOUTS

DEEP = "[" * 100_000 + "]" * 100_000
DIGITS = "9" * 5000
VALUES = [
    *("null", "true", "false", "0", "-1", "1", "2", "7", "60", "61", "1000000", "1000000000000", str(2**63), "1" * 400),
    *("1.5", "-0.0", "1e400", "-1e400", "NaN", "1e-300", '""', '"x"', '"60"', '"cpu"', "[]", "[1]", "[[1]]", '["a"]'),
    *(
        "{}",
        '{"a": 1}',
        '{"0": null}',
        "[null]",
        '"' + "y" * 5000 + '"',
        DIGITS,
        DEEP,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
    ),
]
# Fields that mean something somewhere, whether or not the layout has them.
FIELDS = [
    *("model_type", "architectures", "auto_map", "block_diffusion_family", "_name_or_path", "use_regular_causal"),
    *(
        "block_size",
        "block_length",
        "bd_size",
        "mask_token_id",
        "mask_id",
        "eos_token_id",
        "bos_token_id",
        "pad_token_id",
    ),
    *("rope_scaling", "rope_parameters", "rope_theta", "partial_rotary_factor", "sliding_window", "use_sliding_window"),
    *("layer_types", "attention_chunk_size", "max_window_layers", "quantization_config", "torch_dtype", "dtype"),
    *("hidden_act", "attention_bias", "attention_dropout", "mlp_only_layers", "norm_topk_prob", "expert_capacity"),
    *("tie_word_embeddings", "initializer_range", "attn_implementation", "_attn_implementation", "output_attentions"),
    *("num_labels", "id2label", "is_decoder", "use_cache", "pretraining_tp", "transformers_version", "torchscript"),
]
NESTED = [
    *(
        '{"type": "%s"}',
        '{"rope_type": "%s", "factor": 1e400}',
        '{"type": "%s", "factor": "4"}',
        '{"type": "%s", "factor": -2}',
    ),
    *('{"type": "%s", "factor": 4.0, "original_max_position_embeddings": "x", "rope_theta": 5}',),
    *('{"type": "%s", "factor": 0, "low_freq_factor": 0, "high_freq_factor": 0}',),
]
ROPES = [
    form % kind for form in NESTED for kind in ("yarn", "longrope", "dynamic", "linear", "llama3", "default", "su")
]
QUANTIZERS = [
    json.dumps({"quant_method": method, **more})
    for method in (
        "fp8",
        "gptq",
        "awq",
        "bitsandbytes",
        "hqq",
        "compressed-tensors",
        "mxfp4",
        "torchao",
        "quanto",
        "none",
        3,
    )
    for more in ({}, {"bits": 4}, {"load_in_4bit": True}, {"bits": "x", "group_size": -1})
]
LENGTHS = {"quick": 1, "long": 25}


@pytest.fixture(params=["quick", pytest.param("long", marks=pytest.mark.slow)])
def times(request: pytest.FixtureRequest) -> int:
    """How many times the quick number of tries."""
    return LENGTHS[request.param]


@pytest.fixture(autouse=True)
def _no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def damaged(rng: random.Random, config: dict[str, Any]) -> str:
    """The configuration as JSON with one to three fields changed."""
    entries = {name: json.dumps(value) for name, value in config.items()}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice([*config, *FIELDS])
        if name in ("rope_scaling", "rope_parameters") and rng.random() < 0.7:
            entries[name] = rng.choice(ROPES)
        elif name == "quantization_config" and rng.random() < 0.7:
            entries[name] = rng.choice(QUANTIZERS)
        elif rng.random() < 0.1:
            entries.pop(name, None)
        else:
            entries[name] = rng.choice(VALUES)
    text = "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in entries.items()) + "}"
    return text if rng.random() < 0.95 else text[: rng.randrange(len(text))]


def use(source: Path, **arguments: Any) -> None:
    """Load, and decode a few tokens."""
    model, facts = load_checkpoint(source, device="cpu", **arguments)
    limit = min(facts.context_limit or 128, 64)
    engine = BlockDiffusionModel(model, facts, max_context=limit, runner=Runner(model))
    engine.generate([[1, 2, 3]], {"max_new_tokens": 2})


def test_configurations(publish: Callable[..., Any], times: int) -> None:
    rng, tries = random.Random(13), Tries()
    layouts = {name: publish(name) for name in LAYOUTS}
    autoregressive = publish("sdar", model_type="qwen3", without=("block_size", "mask_token_id"))
    layouts["qwen3"] = autoregressive
    for number in range(150 * times):
        name = rng.choice(list(layouts))
        folder, _, config, _ = layouts[name]
        text = damaged(rng, config)
        (folder / "config.json").write_text(text)
        tries.attempt(f"{number} {name} {text[:400]}", lambda folder=folder: checkpoint_facts(folder))
        if number % 3 == 0:
            tries.attempt(f"{number} load {name} {text[:400]}", lambda folder=folder: use(folder), 60)
    tries.check(refused_at_least=50)


def test_generation_configurations(publish: Callable[..., Any], times: int) -> None:
    rng, tries = random.Random(14), Tries()
    folder = publish("sdar", without=("block_size",)).folder
    fields = ("eos_token_id", "block_length", "do_sample", "temperature", "top_k", "transformers_version", "max_length")
    for name in ("generation_config.json", "args.json", "training_args.json"):
        for number in range(10 * times):
            (folder / name).write_text(damaged(rng, dict.fromkeys(fields, 3) | {"block_length": 4}))
            tries.attempt(f"{name} {number}", lambda: use(folder), 60)
        (folder / name).unlink()
    tries.check()


def test_weights_and_indexes(publish: Callable[..., Any], times: int) -> None:
    rng, tries = random.Random(15), Tries()
    folder, *_ = publish("sdar", shards=2)
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for value in VALUES:
        index.write_text(f'{{"weight_map": {value}}}')
        tries.attempt(f"weight_map {value[:40]}", lambda: load_checkpoint(folder))
        index.write_text(json.dumps(good)[:-2] + f', "model.norm.weight": {value}}}}}')
        tries.attempt(f"a file called {value[:40]}", lambda: load_checkpoint(folder))
    index.write_text(json.dumps(good))
    file = sorted(folder.glob("*.safetensors"))[0]
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    for number in range(60 * times):
        changed = json.loads(json.dumps(header))
        entry = changed[rng.choice([name for name in changed if name != "__metadata__"])]
        name = rng.choice(("data_offsets", "shape", "dtype"))
        values = [
            [0],
            [],
            [0, 1, 2],
            [-4, 0],
            [0, 10**18],
            [4, 0],
            "F32",
            "I64",
            "X",
            None,
            3,
            [10**12],
            {},
            [1.5],
            True,
        ]
        entry[name] = rng.choice(values)
        if number % 5 == 0:
            text = raw[8 : 8 + length].decode()
            at = rng.randrange(length)
            text = text[:at] + rng.choice(("", "[", "{", DEEP[:5000], DIGITS)) + text[at + 1 :]
        else:
            text = json.dumps(changed)
        file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + raw[8 + length :])
        tries.attempt(f"header {number} {name}={entry[name]}", lambda: load_checkpoint(folder))
    tries.check(refused_at_least=100)


def test_integers_under_a_quantizer_that_nobody_knows(publish: Callable[..., Any]) -> None:
    folder, _, _, weights = publish("sdar", quantization_config={"quant_method": "of mine"})
    save_file({name: value.to(torch.int8) for name, value in weights.items()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="quantization_config="):
        load_checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_weights_of_other_kinds(publish: Callable[..., Any], dtype: torch.dtype) -> None:
    folder, _, _, weights = publish("sdar")
    for name in (min(weights), max(weights)):
        save_file({**weights, name: weights[name].to(dtype)}, folder / "model.safetensors")
        tries = Tries()
        tries.attempt(name, lambda: load_checkpoint(folder))
        tries.check()
        assert tries.refused == 1


SIZES = ("vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim")


@pytest.mark.parametrize(
    "size", [10**6, 10**12, 10**18, 10**400], ids=lambda size: f"{size:.0e}" if size < 10**300 else "huge"
)
def test_sizes_that_no_weights_have(publish: Callable[..., Any], size: int) -> None:
    """Found out before anything of that size is built: they would take all memory, or years."""
    tries = Tries()
    for family in ("sdar", "sdar_moe", "llada2", "qwen3"):
        changes = {"model_type": "qwen3", "without": ("block_size", "mask_token_id")} if family == "qwen3" else {}
        folder, _, config, _ = publish("sdar" if family == "qwen3" else family, **changes)
        for name in (*SIZES, *(field for field in config if "experts" in field)):
            if (family, name) == ("sdar_moe", "intermediate_size"):
                continue  # all its layers are mixtures, so nothing is of that size
            (folder / "config.json").write_text(json.dumps({**config, name: size}))
            tries.attempt(f"{family} {name}", lambda folder=folder: load_checkpoint(folder))
    tries.check()
    assert tries.refused == tries.count


@pytest.mark.parametrize("argument", ["device", "dtype", "device_map"])
def test_places_and_types_that_are_not_here(publish: Callable[..., Any], argument: str) -> None:
    folder, tries = publish("sdar").folder, Tries()
    values: dict[str, list[Any]] = {
        "device": ["mps", "cuda:7", "meta", "xpu", "hpu", "", "cpu:x", "CPU", -1, 3.5, [], torch.device("meta")],
        "dtype": [
            "float8_e4m3fn",
            torch.float8_e4m3fn,
            "int8",
            torch.int64,
            "complex64",
            "torch.bool",
            "",
            None,
            7,
            "auto ",
        ],
        "device_map": ["mps", {"": "mps"}, {"": "nowhere"}, {"model": 5}, "everywhere", 3, {}, {"": "meta"}],
    }
    for value in values[argument]:
        tries.attempt(f"{argument}={value}", lambda value=value: load_checkpoint(folder, **{argument: value}), 60)
    tries.check(refused_at_least=4)
    if argument != "device_map":
        assert tries.refused == tries.count


def test_quantizers_that_cannot_run_here(publish: Callable[..., Any]) -> None:
    tries, published = Tries(), publish("sdar")
    for quantizer in QUANTIZERS:
        (published.folder / "config.json").write_text(
            json.dumps(published.config)[:-1] + f', "quantization_config": {quantizer}}}'
        )
        tries.attempt(quantizer, lambda: use(published.folder), 60)
    tries.check(refused_at_least=len(QUANTIZERS) // 2)


def test_adapters(publish: Callable[..., Any], tmp_path: Path, times: int) -> None:
    rng, tries = random.Random(16), Tries()
    base, adapter = publish("sdar"), tmp_path / "adapter"
    adapter.mkdir()
    module = "model.layers.0.self_attn.q_proj"
    out, inner = base.weights[f"{module}.weight"].shape
    factors = {"A": torch.ones(2, inner), "B": torch.ones(out, 2)}
    tensors = {f"base_model.model.{module}.lora_{half}.weight": value for half, value in factors.items()}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {}, "use_rslora": False, "bias": "none"}
    hostile = ["(", "(a+)+$", "(.*)*x", "[", "a{99999999999}", "(?P<a", "\\", "(a|a)*", ".*.*.*.*.*.*.*.*x"]
    for number in range(40 * times):
        text = damaged(rng, config)
        if number % 4 == 0:
            text = json.dumps(config | {"alpha_pattern": {rng.choice(hostile): 1}})
        (adapter / "adapter_config.json").write_text(text)
        raw = save(tensors)
        cut = rng.randrange(len(raw)) if number % 7 == 0 else len(raw)
        (adapter / "adapter_model.safetensors").write_bytes(raw[:cut])
        tries.attempt(f"adapter {number} {text[:300]}", lambda: load_checkpoint(base.folder, adapter=adapter))
    tries.check(refused_at_least=10)


def test_drafters(publish: Callable[..., Any], tmp_path: Path, times: int) -> None:
    from s2d2_lmeval.toy import drafter_path

    rng, tries = random.Random(17), Tries()
    target, _ = load_checkpoint("toy", dtype="float32", device="cpu")
    config = json.loads((Path(drafter_path()) / "config.json").read_text())
    save_file(load_file(Path(drafter_path()) / "model.safetensors"), tmp_path / "model.safetensors")
    inner = config.pop("dflash_config")
    for number in range(50 * times):
        fields = damaged(
            rng, {**inner, "block_size": 16, "use_swa": False, "input_embedding_scale": 1.0, "causal": False}
        )
        text = damaged(rng, config) if number % 2 else json.dumps(config)
        text = text[:-1] + f', "dflash_config": {fields if number % 4 != 1 else json.dumps(inner)}}}'
        (tmp_path / "config.json").write_text(text)
        tries.attempt(f"drafter {number} {text[:200]} … {fields[:300]}", lambda: load_drafter(tmp_path, target))
    tries.check(refused_at_least=10)


def test_draft_graphs(tmp_path: Path, times: int) -> None:
    rng, tries = random.Random(18), Tries()
    file = tmp_path / "graph.json"
    good = DraftGraph.chain(8, 4).to_dict()
    for number in range(60 * times):
        graph = json.loads(json.dumps(good))
        node = rng.choice(graph["nodes"])
        text = damaged(rng, graph) if number % 2 else json.dumps(graph | {"nodes": [*graph["nodes"], "HERE"]})
        text = text.replace('"HERE"', damaged(rng, node))
        file.write_text(text)
        tries.attempt(f"graph {number}", lambda: load_graph(str(file), "dynamic"))
    for source in ("/dev/zero", "/dev/null", str(tmp_path), "", "\0", "/proc/self/mem", "x" * 5000):
        tries.attempt(f"graph {source[:20]!r}", lambda source=source: load_graph(source, "dynamic"))
    os.mkfifo(tmp_path / "pipe")
    tries.attempt("a pipe", lambda: load_graph(str(tmp_path / "pipe"), "dynamic"))
    chain = [{"pairs": [[0, 0], [1, i]], "parents": [0], "count": 1, "chances": 1} for i in range(20_000)]
    file.write_text(json.dumps(good | {"nodes": chain}))
    tries.attempt("many nodes", lambda: load_graph(str(file), "dynamic"))
    tries.check(refused_at_least=40)


def test_names_of_checkpoints(publish: Callable[..., Any], tmp_path: Path) -> None:
    tries = Tries()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    folder = publish("sdar").folder
    for source in (
        "",
        ".",
        "..",
        "/",
        "~",
        "~nobody/x",
        "\0",
        "x" * 5000,
        "a/b/c",
        "a" * 300 + "/b",
        "é",
        "a b",
        "/dev/zero",
    ):
        tries.attempt(repr(source), lambda source=source: load_checkpoint(source, local_files_only=True))
    for source in (3, None, b"x", [], tmp_path / "pipe", tmp_path / "loop", folder / "config.json"):
        tries.attempt(repr(source), lambda source=source: load_checkpoint(source))
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(tmp_path / "kept")
        for other in ("/dev/zero", "/dev/full", str(tmp_path), str(tmp_path / "pipe"), str(tmp_path / "loop")):
            (folder / name).symlink_to(other)
            tries.attempt(f"{name} -> {other}", lambda: load_checkpoint(folder))
            (folder / name).unlink()
        (tmp_path / "kept").rename(folder / name)
    tries.check()
    assert tries.refused == tries.count
