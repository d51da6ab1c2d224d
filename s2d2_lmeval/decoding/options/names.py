"""Option names of other tools: their meaning here, values without effect, and the closest name of ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from s2d2_lmeval.errors import ConfigError, shown


@dataclass(frozen=True)
class Foreign:
    """An option of another tool without a counterpart: what to do instead, and values (besides None) without effect."""

    advice: str
    neutral: tuple[Any, ...] = ()


_HISTORY = "it depends on previous tokens, and a block's tokens are decided together: leave it out"
_POSITION = "it depends on the position, and blocks are not decided from left to right: leave it out"
_BEAMS = "blocks are not decoded by beam search: leave it out"
_PREQUANTIZED = "give quantization options of transformers, such as load_in_8bit=True"

FOREIGN: Mapping[str, Foreign] = {
    # Generation arguments of transformers, vLLM and others.
    "repetition_penalty": Foreign(_HISTORY, (1,)),
    "presence_penalty": Foreign(_HISTORY, (0,)),
    "frequency_penalty": Foreign(_HISTORY, (0,)),
    "no_repeat_ngram_size": Foreign(_HISTORY, (0,)),
    "guidance_scale": Foreign("every token would need a second forward: leave it out", (1,)),
    "min_new_tokens": Foreign(_POSITION, (0,)),
    "min_length": Foreign(_POSITION, (0,)),
    "begin_suppress_tokens": Foreign(_POSITION + ", or give suppress_tokens", ((), [])),
    "forced_bos_token_id": Foreign(_POSITION),
    "forced_eos_token_id": Foreign(_POSITION),
    "num_beams": Foreign(_BEAMS, (1,)),
    "num_beam_groups": Foreign(_BEAMS, (1,)),
    "length_penalty": Foreign(_BEAMS, (1, 0)),
    "early_stopping": Foreign(_BEAMS, (False,)),
    "num_return_sequences": Foreign("ask for several answers with repeats in the task, or several prompts", (1,)),
    "n": Foreign("ask for several answers with repeats in the task, or several prompts", (1,)),
    "best_of": Foreign("ask for several answers with repeats in the task, or several prompts", (1,)),
    "use_cache": Foreign("decoding always uses a cache: leave it out", (True,)),
    "max_length": Foreign("it would count the prompt; give max_new_tokens, the number of new tokens"),
    "stop": Foreign("stop strings are `until` in a task's generation_kwargs; ids of stop tokens are stop_token_ids"),
    "stop_strings": Foreign("stop strings are `until` in a task's generation_kwargs; ids are stop_token_ids"),
    "epsilon_cutoff": Foreign("use min_p, top_p or typical_p", (0, 1)),
    "eta_cutoff": Foreign("use min_p, top_p or typical_p", (0, 1)),
    "top_h": Foreign("use min_p, top_p or typical_p"),
    "eos_token_id": Foreign("ids of stop tokens are stop_token_ids"),
    "pad_token_id": Foreign("rows are not padded: leave it out"),
    "steps": Foreign("a block's steps are denoising_steps"),
    "diffusion_steps": Foreign("a block's steps are denoising_steps"),
    "alg": Foreign("what decodes is decoder, with remasking_strategy"),
    "mask_id": Foreign("the mask token's id is mask_token_id"),
    "cfg_scale": Foreign("every token would need a second forward: leave it out", (0,)),
    "remasking": Foreign("the strategy is remasking_strategy"),
    # Loading, as other back ends of the harness have it.
    "quantization_config": Foreign(
        "in Python, give it to s2d2_lmeval.load; else load_in_8bit=True or load_in_4bit=True"
    ),
    "quantization": Foreign(_PREQUANTIZED, ("", False)),
    "autogptq": Foreign(_PREQUANTIZED, ("", False)),
    "gptqmodel": Foreign(_PREQUANTIZED, ("", False)),
    "compile": Foreign("forwards are captured as graphs on CUDA with static_shapes=True", (False,)),
    "use_compile": Foreign("forwards are captured as graphs on CUDA with static_shapes=True", (False,)),
    "enforce_eager": Foreign("graphs are disabled with static_shapes=False", ()),
    "lora": Foreign("a LoRA adapter is peft in --model_args and adapter in s2d2_lmeval.load", ("", False)),
    "adapter_path": Foreign("a LoRA adapter is peft in --model_args and adapter in s2d2_lmeval.load", ("",)),
    "max_seq_len": Foreign("positions of prompt and answer together are max_context"),
    "max_model_len": Foreign("positions of prompt and answer together are max_context"),
    "gpu_memory_utilization": Foreign("memory is allocated as needed; max_batch=auto takes as many rows as fit"),
    "tensor_parallel_size": Foreign("start a process for each GPU with torchrun and give tp_plan=auto", (1,)),
    "data_parallel_size": Foreign("start several processes with accelerate launch", (1,)),
    "low_cpu_mem_usage": Foreign("weights are always loaded that way: leave it out", (True,)),
    "use_safetensors": Foreign("only safetensors checkpoints are read", (True,)),
    "use_flash_attention_2": Foreign("say attention=flash", (False,)),
    "subfolder": Foreign("give the path of the folder itself as pretrained", ("",)),
    "delta": Foreign("apply the delta to the weights and save the result", ("", False)),
    "gguf_file": Foreign("only safetensors checkpoints are read", ("", False)),
    "softmax_dtype": Foreign(
        "probabilities are computed in float32, or in the weights' type where that is wider",
        ("float32", "torch.float32"),
    ),
    "mixed_precision_dtype": Foreign("load the weights in the type that you want with dtype", ("", False)),
    "logits_cache": Foreign("requests are scored one by one, with no cache of logits to switch off", (True,)),
}


def changes_nothing(name: str, value: Any) -> bool:
    """Whether ``name`` is an option of another tool with a value that has no effect.

    Raises:
        ConfigError: if it would have an effect.
    """
    foreign = FOREIGN.get(name)
    if foreign is None:
        return False
    if getattr(value, "shape", ()):
        value = "an array"
    written = (
        value.strip().lower() if isinstance(value, str) else str(value) if type(value).__module__ == "torch" else value
    )
    neutral = ("none", "null", *foreign.neutral)
    if value is None or any(_same(written, one) for one in neutral):
        return True
    said = shown(value).strip("'")
    raise ConfigError(f"{name}={said} is not available with --model s2d2: {foreign.advice}.")


def _same(value: Any, neutral: Any) -> bool:
    if isinstance(neutral, bool) or isinstance(value, bool):
        return value is neutral or value == str(neutral).lower()
    if isinstance(neutral, (int, float)) and isinstance(value, str):
        try:
            return float(value) == neutral
        except ValueError:
            return False
    return type(value) in (int, float, str, list, tuple) and bool(value == neutral)


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean …?`` or nothing."""
    close = get_close_matches(name[:100] if isinstance(name, str) else "", sorted(set(known)), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""
