"""A DFlash drafter beside its frozen target: where it begins, its forward over many blocks, its folder.

As published (arXiv 2602.06036), blocks begin at a token of an answer and are followed by masks, which see the target's
features of the text before, and each other. Not as published: it begins as copies of some of the target's layers, with
the mean of the features as their context, so that it need not learn the language anew. A Markov head, as in DSpark, may
be trained with it, or alone beside a drafter that stays as it is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from s2d2_lmeval.errors import TrainingError
from s2d2_lmeval.families import Facts
from s2d2_lmeval.families.facts import AUTOREGRESSIVE
from s2d2_lmeval.families.files import read_config, resolve
from s2d2_lmeval.runtime.drafting.dflash import DFlash, FeatureTap
from s2d2_lmeval.runtime.drafting.heads import MARKOV, MarkovHead
from s2d2_lmeval.runtime.drafting.loading import default_layer_ids, drafter_shape, load_drafter
from s2d2_lmeval.toy import embedded
from s2d2_lmeval.training.anchors import Windows
from s2d2_lmeval.training.checkpointing import replaced
from s2d2_lmeval.training.student import Student, bias

AS_THE_TARGET = (
    *("attention_bias", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings"),
    *("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "vocab_size"),
)
"""What a drafter's config.json takes from its target's."""
STORED_TYPE = torch.bfloat16
HEAD_RATE = 20.0
"""By how much a Markov head learns faster: a step reaches few rows of its tables."""


@dataclass(frozen=True)
class DrafterForm:
    """What a drafter is: tokens of its ``block``, the known one included, its ``layers``, and the rank of its Markov
    head (0: none) with its ``kind``. ``start``: the folder or hub id of a drafter that stays as it is; its head alone
    is trained.
    """

    block: int = 8
    layers: int = 4
    markov: int = 0
    start: str | None = None
    kind: str = MARKOV[0]
    tags: ClassVar[str] = "dflash"

    @classmethod
    def beside(cls, start: str, markov: int, kind: str = MARKOV[0]) -> DrafterForm:
        """That of a head for the drafter ``start``.

        Raises:
            CheckpointError, TrainingError: no drafter there, or one that is not plain.
        """
        source = resolve(embedded(start, drafter=True))
        shape = drafter_shape(read_config(source), source)
        scaled = (shape.embedding_scale, shape.logit_scale, shape.softcap) != (1.0, 1.0, None)
        other = scaled or shape.shifted or shape.convolution is not None or shape.head is not None
        if other or any(shape.causal) or set(shape.windows) != {None}:
            raise TrainingError(
                f"{start} has a head, windows, scales, convolutions or shifted labels; heads are trained for plain "
                "drafters."
            )
        return cls(shape.block_length, shape.config.num_hidden_layers, markov, start, kind)

    @property
    def window(self) -> int:
        """Positions that a draft needs after a text."""
        return self.block

    def check(self, source: str, facts: Facts) -> None:
        """Refuse a target without a decoder for drafters; TrainingError."""
        if facts.scheme not in (AUTOREGRESSIVE, "block"):
            raise TrainingError(
                f"{source} ({facts.family}) is not decoded with a drafter: its scheme is {facts.scheme}."
            )

    def student(self, model: PreTrainedModel, facts: Facts, seed: int) -> DraftingStudent:
        """A drafter that begins as layers of ``model``."""
        layers = model.config.num_hidden_layers
        if self.layers > layers:
            raise TrainingError(f"a drafter of {self.layers} layers has more than its target, {layers}; give --layers.")
        return DraftingStudent(model, facts, self, seed)

    def described(self, source: str) -> str:
        """What it is, in Markdown."""
        began = f"of {self.start}" if self.start else "that began as layers of the target"
        return f"""\
# A DFlash drafter for {source}

It reads the hidden states of {source} and drafts {self.block - 1} tokens at once, which {source} verifies: the answers
stay those of {source} alone.

    lm_eval --model s2d2 --model_args pretrained={source},draft=THIS_FOLDER,decoder=ddtree --tasks …

- blocks of {self.block}, {self.layers} layers {began}
- Markov head: {f"{self.kind}, rank {self.markov}" if self.markov else "none"}"""


def drafter_config(form: DrafterForm, model: PreTrainedModel, facts: Facts) -> dict[str, Any]:
    """The config.json of a drafter for ``model``, as published."""
    head = {"markov_rank": form.markov, "markov_head_type": form.kind} if form.markov else {}
    if form.start is not None:
        return {**read_config(resolve(embedded(form.start, drafter=True))), **head}
    target = model.config
    known = {name: getattr(target, name) for name in AS_THE_TARGET if getattr(target, name, None) is not None}
    heads = {"head_dim": target.hidden_size // target.num_attention_heads, "attention_bias": False}
    # A plain model has no mask: the last token of its vocabulary is padding, reserved or rare.
    mask = facts.mask_token_id if facts.mask_token_id >= 0 else target.vocab_size - 1
    rope = getattr(target, "rope_parameters", None) or {}
    scaled = rope.get("rope_type", "default") != "default"
    count = target.num_hidden_layers
    read = [min(max(index, 0), count - 1) for index in default_layer_ids(form.layers, count)]
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        **heads,
        **known,
        "block_size": form.block,
        "dflash_config": {"mask_token_id": mask, "target_layer_ids": read},
        "num_hidden_layers": form.layers,
        "num_target_layers": count,
        "rope_theta": rope.get("rope_theta", 10000.0),
        **({"rope_scaling": {name: value for name, value in rope.items() if name != "rope_theta"}} if scaled else {}),
        "torch_dtype": str(STORED_TYPE).removeprefix("torch."),
        **head,
    }


class DraftingStudent(Student):
    """A drafter of ``form`` for ``model``, in float32."""

    grows = False

    def __init__(self, model: PreTrainedModel, facts: Facts, form: DrafterForm, seed: int) -> None:
        super().__init__(model, form.block - 1)
        self.config, self.shifted = drafter_config(form, model, facts), facts.token_shift
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.drafter = DFlash(drafter_shape(self.config, "the new drafter")).attach(model)
        self.drafter.config._attn_implementation = "sdpa"
        if form.start is None:
            copy_layers(self.drafter, self.backbone)
        else:
            self.drafter.load_state_dict(load_drafter(form.start, model).state_dict(), strict=False)
            for name, weight in self.drafter.named_parameters():
                weight.requires_grad_(name.startswith("markov_head."))
        self.drafter.to(self.device)
        self.parameters = {name: one for name, one in self.drafter.named_parameters() if one.requires_grad}
        self.tap = FeatureTap(self.backbone, self.drafter.shape.layer_ids)
        self.markov = self.drafter.head
        if self.markov is not None:
            assert isinstance(self.markov, MarkovHead)
            nn.init.normal_(self.markov.markov_w1.weight, std=0.1, generator=torch.Generator().manual_seed(seed))
            nn.init.zeros_(self.markov.markov_w2.weight)
            self.head = self._informed

    def groups(self) -> list[dict[str, Any]]:
        """As the base class says."""
        heads = [one for name, one in self.parameters.items() if name.startswith("markov_head.")]
        rest = [one for name, one in self.parameters.items() if not name.startswith("markov_head.")]
        return [{"params": part, "scale": scale} for part, scale in ((rest, 1.0), (heads, HEAD_RATE)) if part]

    def _informed(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states, each followed by what the token before says (none is before where that is zero)."""
        assert self.markov is not None
        rank = self.markov.shape.rank
        hidden, said = rows.split((rows.shape[1] - rank, rank), dim=1)
        return self.model.get_output_embeddings()(hidden) + said.float() @ self.markov.vectors.t()

    def forward(self, windows: Windows, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the base class says; there is nothing to draw."""
        clean = self.read(windows)
        features = self.tap.features()
        self.tap.clear()
        width, count = windows.masks + 1, len(windows.starts)
        tokens = torch.full((count, width), self.drafter.shape.mask_token_id, device=self.device)
        tokens[:, 0] = windows.tokens[windows.starts]
        half = self.model.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(self.device.type, self.model.dtype, enabled=half):
            cache = DynamicCache()
            self.drafter.absorb(features, windows.positions.unsqueeze(0), cache)
            hidden = self.drafter.fill(
                tokens.view(1, -1),
                windows.positions_of(width).unsqueeze(0),
                cache,
                [{"attention_mask": bias(windows.sight(width), torch.float32)}] * len(self.drafter.layers),
            )
        drafted = hidden.view(count, width, -1)[:, 1:].flatten(0, 1)
        taught = clean[windows.teachers] if self.shifted else None
        if self.markov is not None:
            said = self._said(windows.tokens[windows.teachers].view(count, -1), drafted.view(count, width - 1, -1))
            drafted = torch.cat([drafted, said], dim=1)
            taught = None if taught is None else nn.functional.pad(taught, (0, said.shape[1]))
        return drafted.to(self.model.dtype), taught

    def _said(self, above: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """What the head says (D * S, rank) at the S places of D drafts with states ``hidden`` (D, S, H), each after the
        text's own tokens ``above`` (D, S), in order.
        """
        assert self.markov is not None
        said, state = [], None
        for place in range(above.shape[1]):
            one, state = self.markov.after(above[:, place], hidden[:, place], state, place)
            said.append(one)
        return torch.stack(said, dim=1).flatten(0, 1)

    def save(self, folder: Path, base: str, source: str) -> None:
        """Write the drafter as published."""
        weights = self.drafter.state_dict()
        stored = {name: value.to("cpu", STORED_TYPE).contiguous() for name, value in weights.items()}
        replaced(folder / "model.safetensors", save(stored, metadata={"format": "pt"}))
        replaced(folder / "config.json", (json.dumps(self.config, indent=2) + "\n").encode())


@torch.no_grad()
def copy_layers(drafter: DFlash, backbone: Any) -> None:
    """Let ``drafter`` begin as layers of a target, from the first to the last, where they are of a shape; its context
    as the mean of what it reads.
    """
    count, own = len(backbone.layers), len(drafter.layers)
    chosen = [backbone.layers[round(at * (count - 1) / max(own - 1, 1))] for at in range(own)]
    for layer, of_target in zip(drafter.layers, chosen, strict=True):
        weights = dict(of_target.named_parameters())
        for name, weight in layer.named_parameters():
            if name in weights and weights[name].shape == weight.shape:
                weight.copy_(weights[name])
        attention: Any = layer.self_attn
        for side in ("q", "k"):
            if f"self_attn.{side}_norm.weight" not in weights:
                # Its queries and keys are not normed: keep their size, as it is for inputs that are noise.
                scale = getattr(attention, f"{side}_proj").weight * weights["input_layernorm.weight"]
                getattr(attention, f"{side}_norm").weight.fill_(scale.square().sum(1).mean().sqrt())
    drafter.norm.weight.copy_(backbone.norm.weight)
    drafter.hidden_norm.weight.copy_(torch.stack([one.input_layernorm.weight for one in chosen]).mean(0))
    read = len(drafter.shape.layer_ids)
    drafter.fc.weight.copy_(torch.eye(drafter.fc.out_features).repeat(1, read) / read)
