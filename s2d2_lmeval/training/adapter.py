"""A draft adapter in its frozen target: its parameters, its forward, its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from s2d2_lmeval.decoding.rounds.target import unread_masks
from s2d2_lmeval.errors import TrainingError
from s2d2_lmeval.families import Facts
from s2d2_lmeval.families.drafts import MASKS, RECORD, VECTORS
from s2d2_lmeval.families.facts import NO_MASK
from s2d2_lmeval.runtime.gated import Gate
from s2d2_lmeval.training.anchors import Windows
from s2d2_lmeval.training.checkpointing import replaced
from s2d2_lmeval.training.student import Student

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HIGH_RATE = 2.0
"""By how much B learns faster than A: it begins at zero."""


@dataclass(frozen=True)
class Form:
    """What an adapter is: its rank, the option ``window`` that it is for, and its masks: vectors, one for each place,
    which see each other unless the checkpoint's own do not, or random tokens of ``noise`` [low, high), each of which
    sees earlier ones (Uno's form).
    """

    window: int = 8
    rank: int = 16
    noise: tuple[int, int] | None = None

    tags: ClassVar[str] = "lora"

    def check(self, source: str, facts: Facts) -> None:
        """Every checkpoint is decoded by ``sliding``, whose drafts an adapter makes."""

    def student(self, model: PreTrainedModel, facts: Facts, seed: int) -> AdaptedModel:
        """``model`` with an adapter that changes nothing yet."""
        return AdaptedModel(model, facts, self, seed)

    def described(self, source: str) -> str:
        """What it is, in Markdown."""
        masks = (
            f"random tokens from {self.noise[0]} to {self.noise[1] - 1}, each of which sees earlier ones"
            if self.noise
            else "a vector for each place"
        )
        return f"""\
# A draft adapter for {source}

A LoRA of rank {self.rank} that only draft queries go through: with it {source} drafts for itself, and its answers stay
those of the plain weights.

    lm_eval --model s2d2 --model_args pretrained={source},draft_adapter=THIS_FOLDER --tasks …

- window {self.window}; masks: {masks}"""


class AdaptedModel(Student):
    """``model``, frozen, and an adapter of ``form`` in float32. Masks stand where the decoder's do
    (:func:`~s2d2_lmeval.decoding.rounds.target.plan_round`): from the place of the token where a draft starts on or, if
    a mask is what says the target's own choice of it, after that.
    """

    def __init__(self, model: PreTrainedModel, facts: Facts, form: Form, seed: int) -> None:
        super().__init__(model, form.window - 1)
        self.form, self.facts, self.unread = form, facts, unread_masks(facts)
        self.causal = form.noise is not None or facts.window_causal
        embedding = model.get_input_embeddings().weight
        generator = torch.Generator().manual_seed(seed)
        factors = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in PROJECTIONS:
                start = torch.randn(form.rank, module.in_features, generator=generator) / module.in_features**0.5
                pair = start, torch.zeros(module.out_features, form.rank)
                low, high = (nn.Parameter(one.to(module.weight.device)) for one in pair)
                self.parameters |= {f"{name}.lora_A.weight": low, f"{name}.lora_B.weight": high}
                factors[name] = low, high
        if not factors:
            raise TrainingError(f"a {type(model).__name__} has no projections named {', '.join(PROJECTIONS)}.")
        vectors = None
        if form.noise is None:
            first = embedding[facts.mask_token_id] if facts.mask_token_id != NO_MASK else embedding.float().mean(0)
            vectors = self.parameters[MASKS] = nn.Parameter(first.float().repeat(self.masks + self.unread, 1))
        self.gate = Gate(model, factors, vectors)

    def groups(self) -> list[dict[str, Any]]:
        """Groups of parameters for an optimizer, with ``scale``, what the learning rate is multiplied by."""
        fast = [one for name, one in self.parameters.items() if name.endswith("lora_B.weight")]
        slow = [one for name, one in self.parameters.items() if not name.endswith("lora_B.weight")]
        return [{"params": slow, "scale": 1.0}, {"params": fast, "scale": HIGH_RATE}]

    def forward(self, windows: Windows, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """As the base class says."""
        cache, width, shifted = DynamicCache(), windows.masks + self.unread, self.facts.token_shift
        clean, seen = self.read(windows, cache), windows.sight(width, self.causal)
        taught = clean[windows.teachers]
        if not shifted:
            # A mask says the target's own choice, and a window after it sees that mask too.
            hidden, of_choices = self._choices(windows, cache), windows.starts.repeat_interleave(width)
            taught = hidden[(windows.teachers + 1).clamp(max=len(hidden) - 1)]
            choice = torch.nn.functional.one_hot(of_choices, len(hidden)).bool()
            seen = torch.cat([seen[:, : len(hidden)], choice, seen[:, len(hidden) :]], dim=1)
        low, high = self.form.noise or (0, 1)
        masks = torch.randint(low, high, (len(windows.starts) * width,), generator=generator).to(self.device)
        with self.gate.opened(1 + windows.places(width), captured=True):
            drafted = self.run(masks, windows.positions_of(width) + (not shifted), seen, cache)
        return drafted.view(-1, width, drafted.shape[1])[:, self.unread :].flatten(0, 1), taught

    @torch.no_grad()
    def _choices(self, windows: Windows, cache: DynamicCache) -> torch.Tensor:
        """Hidden states (L, H) of a mask in the place of every token, which sees the text before it: an unshifted
        target's own choices there. Their keys stay in the ``cache``.
        """
        own = torch.eye(len(windows.tokens), dtype=torch.bool, device=self.device)
        seen = torch.cat([windows.clean_sight() & ~own, own], dim=1)
        return self.run(torch.full_like(windows.tokens, self.facts.mask_token_id), windows.positions, seen, cache)

    def save(self, folder: Path, base: str, source: str) -> None:
        """Write the adapter as the package peft does, and what is said of its drafts, in bfloat16 for size."""
        stored = {
            name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in self.parameters.items()
        }
        vectors = stored.pop(MASKS, None)
        names = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in stored})
        factors = {f"base_model.model.{name}": value for name, value in stored.items()}
        record: dict[str, Any] = {"window": self.form.window, "sight": "causal" if self.causal else "both"}
        if self.form.noise is not None:
            record["noise"] = list(self.form.noise)
        rank = self.form.rank
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": source,
            "r": rank,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": names,
            "inference_mode": True,
        }
        replaced(folder / "adapter_model.safetensors", save(factors, metadata={"format": "pt"}))
        if vectors is not None:
            replaced(folder / VECTORS, save({MASKS: vectors}))
        replaced(folder / RECORD, _json({**record, "base": base}))
        replaced(folder / "adapter_config.json", _json(config))


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
