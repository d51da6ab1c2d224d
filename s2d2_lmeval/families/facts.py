"""Properties of checkpoints: :class:`Facts` of one checkpoint, :class:`Family` of all that share a layout.

Code outside this package reads the facts and never checks for a family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.errors import CheckpointError, shown
from s2d2_lmeval.families.config_map import configured, is_whole, positions
from s2d2_lmeval.families.records import BLOCK_FIELDS, MASK_FIELDS, block_lengths, first, mask_of_tokenizer
from s2d2_lmeval.registry import DECODERS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

AUTOREGRESSIVE = "autoregressive"
"""Scheme of models without a mask token: one token after the other, and targets of a drafter."""
NO_MASK = -1
"""Mask token id of models that have none."""

# Written into the configurations of models that are loaded here: several families share a native class, and an adapter
# that was merged into the weights leaves no other trace.
FAMILY_FIELD = "block_diffusion_family"
ADAPTER_FIELD = "block_diffusion_adapter"

# Where the decoders of a scheme count blocks from.
_ALIGNMENTS = {
    **dict.fromkeys(("block", "editing", "subblock"), "absolute"),
    **dict.fromkeys(("pipelined", "seeded", "strided", "reordered", AUTOREGRESSIVE), "prompt"),
}


def fitting(scheme: str, drafted: bool = False) -> tuple[str, ...]:
    """Names of the decoders of a scheme; ``drafted``: those that need a drafter."""
    return tuple(name for name in DECODERS.names(scheme) if DECODERS[name].needs_drafter == drafted)


def preferred(decoder: str | None, names: tuple[str, ...]) -> tuple[str, ...]:
    """``names`` with ``decoder`` first, if it is one of them."""
    return tuple(sorted(names, key=lambda name: name != decoder))


@dataclass(frozen=True)
class DrafterFacts:
    """What decoding needs to know about a drafter: positions of a drafted block, including the token it continues, the
    mask token id of the others, and whether each says the next position's token in place of its own.
    """

    block_length: int
    mask_token_id: int
    shifted: bool = False


@dataclass(frozen=True)
class DraftAdapter:
    """A LoRA that only draft queries go through.

    Attributes:
        source: its folder or hub id.
        window: how many positions a draft looks ahead, as the option ``window``; None: as the model's own.
        causal: whether masks see earlier masks only; None: likewise.
        noise: masks are random tokens from the first id up to below the second.
        base: the digest of the weights that it was trained on.
    """

    source: str
    window: int | None = None
    causal: bool | None = None
    noise: tuple[int, int] | None = None
    base: str | None = None


@dataclass(frozen=True)
class Facts:
    """What decoding needs to know about one checkpoint.

    Attributes:
        family: name of the family, such as ``"sdar"``.
        native_class: the transformers class that runs it, such as ``"Qwen3ForCausalLM"``.
        mask_token_id: id of the mask token, inside the vocabulary; :data:`NO_MASK` for autoregressive models.
        block_length: tokens per block that the checkpoint was trained for.
        vocab_size: width of a logits row (the padded vocabulary, not the tokenizer's).
        token_shift: True if the logits of row t-1 of text that is seen token-causally predict token t, False if those
            of row t, a mask, do. It is what ``ar``, verification and scoring read.
        draft_shift: likewise for the masks of a draft, which may differ: True if a mask predicts the token after it,
            False if its own. None: as ``token_shift``.
        window_causal: True if the masks of a draft see earlier masks only.
        prefix_causal: True if the model was trained to see earlier text token-causally, whatever the block length.
        block_alignment: where blocks are counted from: ``"absolute"`` (position 0), ``"prompt"`` (the first one starts
            right after the prompt), ``"prompt_end"`` (likewise, and the prompt's own are counted back from there).
            None: as the scheme has it.
        draft_adapter: the LoRA adapter that only draft queries go through, if one was loaded.
        stop_token_ids: ids that end a generation (of generation_config.json, then of config.json; the published ones
            where neither names any).
        max_context: the checkpoint's number of positions, prompt and answer together.
        scheme: how a generation is laid out: ``"block"`` (one block after the other), ``"editing"`` (blocks whose
            decided tokens may change), ``"subblock"`` (blocks in parts, and a token between them), ``"pipelined"``
            (several blocks at once), ``"seeded"`` (a block begins with the token that the text before it predicts),
            ``"strided"`` (verified tokens and masks after them, no blocks), ``"reordered"`` (a window whose decided
            tokens move to the front, no blocks), ``"autoregressive"`` (no blocks).
        default_decoder: the decoder that is used if none is asked for; None: the first that fits the scheme.
        commits_last_block: whether the published code stores the keys of a block that no other follows: ``"always"``,
            ``"never"``, or ``"unless_stopped"`` (by a stop token).
        defaults: the family's published setting for this block length, as decoding options.
        drafter: what is known about the drafter that was loaded with it, if one was.
        adapter: likewise for a LoRA adapter that was merged into the weights.
        caveat: what to know before trusting its answers, in one sentence; empty if there is nothing.
        context_limit: maximum value of ``max_context``: larger with YaRN, smaller if a layer uses a sliding window
            (None: ``max_context`` itself).
        block_length_from: where the block length was found; ``"assumed"`` if nothing gives it.
    """

    family: str
    native_class: str
    mask_token_id: int
    block_length: int
    vocab_size: int
    token_shift: bool
    stop_token_ids: tuple[int, ...]
    max_context: int
    defaults: Mapping[str, Any] = field(hash=False)
    scheme: str = "block"
    drafter: DrafterFacts | None = None
    adapter: str | None = None
    caveat: str = ""
    context_limit: int | None = None
    block_length_from: str = field(default="as given", compare=False)
    draft_shift: bool | None = None
    window_causal: bool = False
    prefix_causal: bool = False
    block_alignment: str | None = None
    draft_adapter: DraftAdapter | None = None
    default_decoder: str | None = None
    commits_last_block: str = "always"

    def __post_init__(self) -> None:
        if self.draft_shift is None:
            object.__setattr__(self, "draft_shift", self.token_shift)
        if self.block_alignment is None:
            object.__setattr__(self, "block_alignment", _ALIGNMENTS[self.scheme])

    def with_drafter(self, drafter: DrafterFacts) -> Facts:
        """The facts of this model together with a drafter."""
        return replace(self, drafter=drafter)

    def with_draft_adapter(self, adapter: DraftAdapter) -> Facts:
        """The facts of this model together with an adapter for its drafts."""
        defaults = {} if adapter.window is None else {"window": adapter.window}
        return replace(
            self,
            draft_adapter=adapter,
            window_causal=self.window_causal if adapter.causal is None else adapter.causal,
            default_decoder="sliding" if self.scheme == AUTOREGRESSIVE else self.default_decoder,
            defaults={**self.defaults, **defaults},
        )

    @property
    def has_masks(self) -> bool:
        """Whether there is something to put in place of tokens that are to be guessed."""
        return self.mask_token_id != NO_MASK or self.draft_adapter is not None

    @property
    def decoders(self) -> tuple[str, ...]:
        """Names of the decoders that fit, the default one first: with a drafter, those that use it."""
        with_drafter = fitting(self.scheme, drafted=True) * (self.drafter is not None)
        return with_drafter + preferred(self.default_decoder, fitting(self.scheme))


@dataclass(frozen=True)
class Family:
    """The common properties of checkpoints with the same layout.

    Attributes:
        name: the name that facts, presets and messages use.
        model_types: published ``model_type`` values of config.json.
        classes: published names of the model's class; another one in config.json is refused (empty: any is accepted).
        doubt: config.json and its source -> why this is another model under the same names, or None.
        claims: config.json and its source -> whether this is the family, though config.json has another one's type.
        native_class: name of the transformers class with the same arithmetic.
        config_class: that class's configuration.
        config_map: maps a published config.json to it, or refuses it.
        token_shift, draft_shift, window_causal, prefix_causal, block_alignment, scheme, default_decoder,
            commits_last_block: as in :class:`Facts`.
        defaults: block length -> the published setting as decoding options.
        presets: name -> decoding options of a published configuration.
        key_mapping: regular expression of a published weight name -> native name (``from_pretrained(key_mapping=)``).
        published_mask_ids: vocabulary size of a published checkpoint -> its mask id, where config.json may lack it.
        published_stop_ids: likewise its stop token.
        published_block_length: block length where config.json lacks it. Applied to the vocabulary sizes above only,
            unless ``fixed_block_length``: then there never was another one.
        block_fields: fields of config.json that give the block length; empty where they say something else.
        caveat_without_adapter: the checkpoint's caveat unless an adapter was merged into it.
        taken_for_granted: False where a loaded model of the native class, with a mask token and no other sign of its
            family, is taken for one of another.
        shares_weights: False where the published weights are split or stacked to fit the native class, so that a model
            under published names cannot be adopted without a copy.
    """

    name: str
    model_types: tuple[str, ...]
    native_class: str
    config_class: type[PreTrainedConfig]
    config_map: Callable[[Mapping[str, Any]], PreTrainedConfig]
    token_shift: bool
    defaults: Callable[[int], Mapping[str, Any]]
    presets: Mapping[str, Mapping[str, Any]] = field(hash=False)
    published_mask_ids: Mapping[int, int] = field(hash=False)
    published_block_length: int
    scheme: str = "block"
    fixed_block_length: bool = False
    key_mapping: Mapping[str, str] = field(default_factory=dict, hash=False)
    caveat_without_adapter: str = ""
    shares_weights: bool = True
    taken_for_granted: bool = True
    classes: tuple[str, ...] = ()
    doubt: Callable[[Mapping[str, Any], str], str | None] = lambda config, source: None
    claims: Callable[[Mapping[str, Any], str], bool] = lambda config, source: False
    block_fields: tuple[str, ...] = BLOCK_FIELDS
    draft_shift: bool | None = None
    window_causal: bool = False
    prefix_causal: bool = False
    block_alignment: str | None = None
    default_decoder: str | None = None
    commits_last_block: str = "always"
    published_stop_ids: Mapping[int, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.scheme not in _ALIGNMENTS:
            raise CheckpointError(
                f"family {self.name}: no scheme is called {self.scheme!r}; {', '.join(_ALIGNMENTS)} are."
            )

    @property
    def decoders(self) -> tuple[str, ...]:
        """Names of the decoders that fit checkpoints without a drafter, the default one first."""
        return preferred(self.default_decoder, fitting(self.scheme))

    @property
    def has_masks(self) -> bool:
        """Whether checkpoints have a mask token."""
        return self.scheme != AUTOREGRESSIVE

    @property
    def native_types(self) -> tuple[str, ...]:
        """``model_type`` values under which transformers itself knows the native class."""
        types = (getattr(base, "model_type", "") for base in self.config_class.__mro__)
        return tuple(dict.fromkeys(name for name in types if name))

    def native_name(self, name: str) -> str:
        """The native name of a weight, from its published one."""
        for pattern, replacement in self.key_mapping.items():
            name = re.sub(pattern, replacement, name, count=1)
        return name

    def native_config(self, config: Mapping[str, Any]) -> PreTrainedConfig:
        """The configuration of the native class, from a config.json as published or as transformers saves it.

        Raises:
            CheckpointError: a configuration that the native class cannot honour.
        """
        if config.get("model_type") not in self.native_types:
            return self.config_map(config)
        return configured(self.config_class, config)

    def facts(
        self,
        config: Mapping[str, Any],
        native: PreTrainedConfig,
        records: Mapping[str, Mapping[str, Any]],
        *,
        source: str,
        mask_token_id: int | None = None,
        block_length: int | None = None,
    ) -> Facts:
        """Collect the facts of one checkpoint.

        ``config`` is its config.json, ``records`` its other files by name (generation_config.json, and those that may
        name the block length), ``source`` its name in messages; ``mask_token_id`` and ``block_length`` override them.

        Raises:
            CheckpointError: a fact that is missing or out of range.
        """
        vocab = int(native.vocab_size)
        mask, length, found = NO_MASK, 1, ""
        caveats = ["" if config.get(ADAPTER_FIELD) else self.caveat_without_adapter]
        if self.scheme != AUTOREGRESSIVE:
            mask = self._mask_token_id(config, vocab, source, mask_token_id, records)
            length, found, doubt = self._block_length(config, vocab, source, block_length, records)
            caveats.append(doubt)
        context, limit = positions(native)
        if length > min(context, limit):
            raise CheckpointError(f"{source}: a block of {shown(length)} tokens does not fit its {context} positions.")
        stops = self._stop_token_ids([records.get("generation_config.json", {}), config], vocab, mask, source)
        return Facts(
            family=self.name,
            mask_token_id=mask,
            block_length=length,
            block_length_from=found,
            vocab_size=vocab,
            stop_token_ids=stops,
            max_context=context,
            context_limit=limit,
            defaults=dict(self.defaults(length)),
            adapter=config.get(ADAPTER_FIELD),
            caveat="; ".join(filter(None, caveats)),
            native_class=self.native_class,
            token_shift=self.token_shift,
            draft_shift=self.draft_shift,
            window_causal=self.window_causal,
            prefix_causal=self.prefix_causal,
            block_alignment=self.block_alignment,
            scheme=self.scheme,
            default_decoder=self.default_decoder,
            commits_last_block=self.commits_last_block,
        )

    def _stop_token_ids(
        self, files: Iterable[Mapping[str, Any]], vocab: int, mask: int, source: str
    ) -> tuple[int, ...]:
        named = [file.get("eos_token_id") for file in files]
        ids = [one for value in named for one in (value if isinstance(value, (list, tuple)) else [value])]
        for stop in ids:
            if stop is not None and not is_whole(stop, 0, vocab - 1):
                raise CheckpointError(
                    f"{source}: the stop token id {stop!r} (eos_token_id) is not a token of a vocabulary of "
                    f"{vocab}. Correct eos_token_id in generation_config.json or config.json."
                )
        # A mask is never part of an answer, so it cannot end one.
        stops = tuple(dict.fromkeys(stop for stop in ids if stop not in (None, mask)))
        return stops or ((self.published_stop_ids[vocab],) if vocab in self.published_stop_ids else ())

    def _mask_token_id(
        self,
        config: Mapping[str, Any],
        vocab: int,
        source: str,
        given: int | None,
        records: Mapping[str, Mapping[str, Any]],
    ) -> int:
        mask = given if given is not None else first(config, MASK_FIELDS)
        if mask is None:
            mask = mask_of_tokenizer(records)
        if mask is None:
            mask = self.published_mask_ids.get(vocab)
        if mask is None:
            raise CheckpointError(
                f"{source}: config.json names no mask token. Give its id as mask_token_id=…, or add "
                '"mask_token_id" to config.json.'
            )
        if not is_whole(mask, 0, vocab - 1):
            raise CheckpointError(
                f"{source}: mask token id {shown(mask)} is not in the vocabulary (ids 0 to {vocab - 1}). "
                "Give the right one as mask_token_id=…."
            )
        return int(mask)

    def _block_length(
        self,
        config: Mapping[str, Any],
        vocab: int,
        source: str,
        given: int | None,
        records: Mapping[str, Mapping[str, Any]],
    ) -> tuple[int, str, str]:
        """The block length, its source, and a caveat."""
        found = list(block_lengths(config, records, source)) if self.block_fields else []
        if given is not None:
            found = [("as given", given)]
        elif self.fixed_block_length:
            found = [one for one in found if one[0] == "config.json"] or [("as published", self.published_block_length)]
        elif not found and vocab in self.published_mask_ids:
            found = [("assumed", self.published_block_length)]
        if not found:
            raise CheckpointError(
                f"{source}: config.json names no block length. Give it as block_length=…, or add "
                '"block_size" to config.json.'
            )
        origin, length = found[0]
        if not is_whole(length, 1):
            raise CheckpointError(f"{source}: block length {shown(length)} is not a positive integer.")
        others = [f"{where} says {other}" for where, other in found if other != length]
        caveat = ""
        if others:
            caveat = f"blocks of {length} by {origin}, but {' and '.join(others)}; give block_length=… if that is right"
        elif origin == "assumed":
            caveat = (
                f"blocks of {length} are assumed, as in the first checkpoints of {self.name}: neither config.json nor "
                "the name of this one says it; give block_length=… if it was trained for another"
            )
        return int(length), origin, caveat
