"""Every decoding option: its published name, its default, its range and the decoders it belongs to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.decoding.options.editing import EditingOptions
from s2d2_lmeval.decoding.options.option import (
    DECODERS,
    DENOISERS,
    DRAFTED,
    FIXED_STRATEGIES,
    PROMISES,
    STRATEGY_OF_DECODER,
    SYNONYMS,
    checked,
    option,
)
from s2d2_lmeval.decoding.options.pipelined import PipelinedOptions
from s2d2_lmeval.decoding.options.presets import PresetOption, preset_options, published_setting
from s2d2_lmeval.decoding.options.reading import fields_of, layer, normalised, own, refuse_foreign, refuse_other_schemes
from s2d2_lmeval.decoding.options.routing import RoutingOptions
from s2d2_lmeval.decoding.options.sampling import GREEDY, SamplingOptions
from s2d2_lmeval.decoding.options.sliding import SlidingOptions
from s2d2_lmeval.decoding.options.spiffy import SpiffyOptions, accelerated, default_base, misfit
from s2d2_lmeval.decoding.options.trees import TreeOptions
from s2d2_lmeval.errors import ConfigError

if TYPE_CHECKING:
    from s2d2_lmeval.families import Facts

__all__ = ["DECODERS", "STRATEGY_OF_DECODER", "SYNONYMS", "DecodingConfig"]

_S2D2 = ("s2d2",)
_UNDIVIDED = ("block",)
_UNEDITED = ("block", "subblock", "pipelined")
_IN_TURN = ("block", "subblock")
_ACCEPTANCES = {"s2d2": ("stochastic", "greedy"), "sliding": ("keyed", "rejection")}


@dataclass(frozen=True)
class DecodingConfig(
    PresetOption,
    EditingOptions,
    PipelinedOptions,
    RoutingOptions,
    SlidingOptions,
    SpiffyOptions,
    TreeOptions,
    SamplingOptions,
):
    """How to decode. Defaults are those of the published functions; :meth:`from_options` lays a family's paper setting
    under them.

    Raises :class:`~s2d2_lmeval.errors.ConfigError` for a value out of range or a contradiction.
    """

    decoder: str = option("s2d2", "which decoder", choices=DECODERS)
    schedule: str = option(
        "fused",
        "reference: a forward per draft, verification and commit, as published; fused: commits ride in the next draft; "
        "lookahead: verifications also commit what they accept and draft the next block (AR-like caching only)",
        decoders=tuple(name for name in DECODERS if name != "sliding"),
        choices=("reference", "fused", "lookahead"),
    )
    max_new_tokens: int = option(256, "maximum number of new tokens", low=0)
    block_length: int = option(4, "tokens per block", decoders=(*DENOISERS, "pipelined"), low=1)
    denoising_steps: int | None = option(
        None,
        "steps in which a block must be finished; none: as many as the block is long",
        decoders=DENOISERS,
        schemes=_UNDIVIDED,
        low=1,
    )
    small_block_size: int | None = option(
        None,
        "tokens per sub-block, which are decided before the next one's; none: a block is one sub-block",
        decoders=("dynamic", "s2d2"),
        schemes=("subblock",),
        low=1,
    )
    use_block_cache: bool = option(
        False,
        "inside a sub-block, draft against the rest of the block as it was in the last whole forward: cheaper, and "
        "other tokens",
        decoders=("dynamic", "s2d2"),
        schemes=("subblock",),
    )

    stop_token_ids: tuple[int, ...] = option((), "token ids that end the answer")
    trim_stop_tokens: bool = option(True, "cut the answer before the first stop token")

    remasking_strategy: str = option(
        "low_confidence_dynamic",
        "which masks a step without (or after a short) verification decides",
        decoders=_S2D2,
        schemes=_UNDIVIDED,
        choices=tuple(STRATEGY_OF_DECODER.values()),
    )
    confidence_threshold: float = option(
        0.85,
        "dynamic, editing, pipelined: decide every mask above this probability",
        decoders=("dynamic", "editing", "s2d2", "pipelined"),
        low=0.0,
    )
    eb_threshold: float | None = option(
        None,
        "entropy_bounded: sum of entropies (nats, of the unfiltered softmax) that a step may decide",
        decoders=("entropy_bounded", "s2d2"),
        schemes=_UNDIVIDED,
        low=0.0,
    )
    collapse_entropy: bool = option(
        False,
        "entropy_bounded with one entropy for the whole block, as published",
        decoders=("entropy_bounded", "s2d2"),
        schemes=_UNDIVIDED,
    )

    cache_ver: bool = option(
        False, "commit with token-causal attention (AR-like caching)", decoders=DENOISERS, schemes=_IN_TURN
    )
    draft_ver: bool = option(
        False,
        "decided prefix of the block drafts with token-causal attention",
        decoders=DENOISERS,
        schemes=_IN_TURN,
    )

    acceptance: str | None = option(
        None,
        "s2d2: stochastic (speculative sampling as published; the default) or greedy (accept while the verifier's "
        "arg-max agrees); sliding: keyed (what ar would draw with the same seed; the default) or rejection (the same "
        "law, other draws)",
        decoders=(*_S2D2, "sliding"),
        choices=("stochastic", "greedy", "keyed", "rejection"),
    )
    allow_resample: bool = option(
        True,
        "resample a rejected token from the residual; otherwise the draft stays (sub-blocks, pipelines: the mask)",
        decoders=_S2D2,
        schemes=_UNEDITED,
    )
    ssd_ratio_tempering_factor: float = option(1.0, "exponent of the acceptance ratio", decoders=_S2D2, low=0.0)
    ssd_ratio_threshold: float = option(
        -1.0,
        "also accept behind a rejection where the ratio reaches this; negative: off",
        decoders=_S2D2,
        schemes=_UNDIVIDED,
    )
    ssd_threshold_all_spans: bool = option(
        False, "ssd_ratio_threshold looks at every mask of the block", decoders=_S2D2, schemes=_UNDIVIDED
    )
    always_check_high_confidence: bool = option(
        False,
        "also decide every mask above confidence_threshold in each step",
        decoders=_S2D2,
        schemes=_UNDIVIDED,
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, checked(field, getattr(self, field.name)))
        if self.decoder == "ar":
            # At block size one there is nothing but token-causal attention.
            for name, value in {"block_length": 1, "denoising_steps": 1, "cache_ver": True, "draft_ver": True}.items():
                object.__setattr__(self, name, value)
        kinds = _ACCEPTANCES.get(self.decoder, ("stochastic",))
        if self.acceptance is None:
            object.__setattr__(self, "acceptance", kinds[0])
        if self.denoising_steps is None:
            object.__setattr__(self, "denoising_steps", self.block_length)
        sliding = self._sliding_faults(self.decoder, self.acceptance, self.random_source)
        spiffy = self._spiffy_faults(self.decoder, self.schedule, self.keyed, self.sampled, self.use_block_cache)
        own = (*self._contradictions(), *self._unmet_needs(), *self._sampling_faults(), *self._routing_faults())
        for message in (*own, *sliding, *spiffy):
            raise ConfigError(message)

    def _contradictions(self) -> Iterator[str]:
        """What is wrong between options: numbers that do not go together."""
        if self.steps > self.block_length:
            yield (
                f"denoising_steps={self.steps} exceeds block_length={self.block_length}: a step decides at least one "
                f"token. Use denoising_steps={self.block_length} or less."
            )
        for name in ("small_block_size", "target_block_size"):
            part = getattr(self, name)
            if part is not None and self.block_length % part:
                yield f"{name}={part} does not divide block_length={self.block_length}; use one that does."
        kinds = _ACCEPTANCES.get(self.decoder)
        if kinds and self.acceptance not in kinds:
            yield f"acceptance={self.acceptance} is not for decoder={self.decoder}, which takes {' or '.join(kinds)}."

    def _unmet_needs(self) -> Iterator[str]:
        """What is wrong between options: one that needs another."""
        if self.strategy == "entropy_bounded" and self.eb_threshold is None:
            yield "entropy_bounded needs eb_threshold, the entropy in nats that a step may decide, e.g. 0.35."
        if self.use_block_cache and self.draft_ver:
            yield "use_block_cache keeps keys that draft_ver would have changed meanwhile; switch one of them off."
        if self.schedule == "lookahead" and not (self.cache_ver and self.draft_ver):
            yield (
                "schedule=lookahead keeps what the verifier computed, which is right only under AR-like caching: "
                "set cache_ver=true and draft_ver=true, or use schedule=fused."
            )
        if self.schedule == "lookahead" and not self.keyed:
            yield (
                "schedule=lookahead drafts before it is known whether the draft is needed, so draws in the order of "
                "calls would differ: use random_source=keyed, or schedule=fused."
            )

    @property
    def steps(self) -> int:
        """Steps in which a block must be finished."""
        return self.denoising_steps or self.block_length

    @property
    def strategy(self) -> str:
        """The remasking strategy in force."""
        return FIXED_STRATEGIES.get(self.steps_of, self.remasking_strategy)

    @property
    def steps_of(self) -> str:
        """The decoder whose denoising steps are made: another one's where it is accelerated."""
        return accelerated(self.decoder, self.base)

    @property
    def token_causal(self) -> bool:
        """Whether finished blocks are committed with token-causal attention."""
        return self.cache_ver or self.block_length == 1

    @property
    def layout(self) -> str:
        """How much is decoded at a time, and in which schedule, in a few words."""
        if self.decoder == "sliding":
            return f"{self.draft_shape} of {self.row_budget} queries, window of {self.window}"
        if self.decoder in DRAFTED:
            return "chain of a block" if self.decoder == "dflash" else f"tree of {self.tree_budget} nodes"
        base = f"{self.base}, " if self.decoder == "spiffy" else ""
        return f"{base}schedule {self.schedule}, blocks of {self.block_length}"

    @property
    def promise(self) -> str:
        """What the decoder's output is, in a sentence."""
        return PROMISES[self.decoder]

    @property
    def shares_budget(self) -> bool:
        """Whether rows may spend of each other's budgets of queries. Under rejection other drafts lead to other tokens,
        so what is drafted for a row may depend on that row alone.
        """
        return self.share_budget and self.acceptance != "rejection"

    @property
    def caution(self) -> str | None:
        """What to know of the counts of a run, in a sentence; None where they speak for themselves."""
        if self.decoder == "sliding" and self.shares_budget:
            return (
                "the rows in flight share their budgets, so how many forwards an answer takes depends on the others "
                "(its tokens do not); share_budget=false keeps budgets apart"
            )
        return None

    @classmethod
    def option_names(cls) -> frozenset[str]:
        """Every accepted option name, synonyms included."""
        return frozenset(field.name for field in dataclasses.fields(cls)) | SYNONYMS.keys()

    @classmethod
    def from_options(
        cls, options: Mapping[str, Any], facts: Facts | None = None, *, of_run: Mapping[str, Any] | None = None
    ) -> DecodingConfig:
        """Check ``options`` and lay them over the family's paper setting (``facts.defaults``) and the preset they name.

        :param of_run: options of a whole run, which ``options`` override by name. Where ``options`` choose another
            decoder, those that are not its own are left out.
        :raises ConfigError: for a name that is no option (names the nearest), a value of the wrong type or out of
            range, an option of another decoder, or a contradiction.
        """
        fields = dataclasses.fields(cls)
        given, beneath = layer(fields, options), layer(fields, of_run or {})
        base = given.get("base", beneath.get("base", default_base(facts)))
        given = {**(own(fields, given["decoder"], base, beneath) if "decoder" in given else beneath), **given}
        decoder = given.get("decoder", "s2d2" if facts is None else facts.decoders[0])
        preset = given.pop("preset", None)
        refuse_foreign(fields, decoder, base, given)
        below: dict[str, Any] = {}
        if facts is not None:
            refuse_other_schemes(fields, given, facts)
            if "decoder" in given and decoder not in facts.decoders:
                raise ConfigError(misfit(decoder, facts))
            below = published_setting(facts, given.get("block_length"))
        if preset is not None:
            below |= preset_options(preset, facts)
        if given.get("do_sample") and below.get("temperature", 1.0) < GREEDY:
            below.pop("temperature")  # asked for samples, not for the family's greedy setting
        return _made_from(
            preset, cls(**{**own(fields, decoder, base, {**below, "base": base}), "decoder": decoder, **given})
        )

    def replace(self, **options: Any) -> DecodingConfig:
        """The same configuration with ``options`` in place of its own, checked as in :meth:`from_options`."""
        fields = dataclasses.fields(self)
        given = normalised(fields, options)
        if "preset" in given:
            raise ConfigError(
                "preset lies under the options that are given beside it, and this configuration is complete: start "
                "from DecodingConfig.from_options, or give the preset to model.generate."
            )
        decoder = given.get("decoder", self.decoder)
        base = given.get("base", self.base)
        refuse_foreign(fields, decoder, base, given)
        held = {field.name: getattr(self, field.name) for field in fields if field.init}
        if held["denoising_steps"] == held["block_length"]:
            held["denoising_steps"] = None
        return _made_from(self.preset, type(self)(**{**own(fields, decoder, base, held), **given}))

    def check_fits(self, facts: Facts) -> None:
        """Refuse options that mean nothing to checkpoints of ``facts``, where they differ from their default.

        :raises ConfigError: naming the option.
        """
        if self.preset is not None:
            preset_options(self.preset, facts)
        if self.steps_of != self.decoder and self.base not in facts.decoders:
            raise ConfigError(misfit(self.base, facts, option="base"))
        for name in ("block_length", "window", "draft_block_size"):
            if (getattr(self, name) or 0) > facts.max_context:
                raise ConfigError(
                    f"{name}={getattr(self, name)} exceeds the {facts.max_context} positions of this checkpoint."
                )
        barred = {*self.suppress_tokens, facts.mask_token_id}
        unknown = [token for token in (*self.suppress_tokens, *dict(self.logit_bias)) if token >= facts.vocab_size]
        if unknown or len(barred) >= facts.vocab_size:
            what = f"token id {unknown[0]} is outside" if unknown else "suppress_tokens leaves nothing of"
            raise ConfigError(f"suppress_tokens, logit_bias: {what} the vocabulary of {facts.vocab_size}.")
        fields = dataclasses.fields(self)
        in_force = {name: getattr(self, name) for name in fields_of(fields, self.decoder, self.base)}
        refuse_other_schemes(fields, in_force, facts)

    def to_dict(self) -> dict[str, Any]:
        """The options that the decoder in force knows, as plain values."""
        values = {name: getattr(self, name) for name in fields_of(dataclasses.fields(self), self.decoder, self.base)}
        if not isinstance(values["random_source"], str):
            values["random_source"] = type(values["random_source"]).__name__
        values |= {name: list(values[name]) for name in ("stop_token_ids", "suppress_tokens")}
        return {**values, "logit_bias": dict(self.logit_bias)}


def _made_from(preset: str | None, config: DecodingConfig) -> DecodingConfig:
    object.__setattr__(config, "preset", preset)
    return config
