"""A complete, validated configuration: every decoding option under its published name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.decoding.options import blocks, general, pipelined, rounds, s2d2, spiffy, windows
from s2d2_lmeval.decoding.options.option import SYNONYMS, checked
from s2d2_lmeval.decoding.options.presets import preset_options, published_setting
from s2d2_lmeval.decoding.options.reading import (
    accelerated,
    classes_of,
    layer,
    misfit,
    names_in,
    names_of,
    normalised,
    own,
    refuse_foreign,
    refuse_other_schemes,
)
from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.registry import DECODERS

if TYPE_CHECKING:
    from typing_extensions import Self

    from s2d2_lmeval.families import Facts

__all__ = ["SYNONYMS", "DecodingConfig"]


@dataclass(frozen=True)
class DecodingConfig(
    blocks.EditingOptions,
    pipelined.PipelinedVerifierOptions,
    pipelined.PipelinedOptions,
    s2d2.RoutingOptions,
    rounds.SlidingOptions,
    spiffy.SpiffyOptions,
    windows.LinearOptions,
    windows.ThinkingOptions,
    windows.StridedOptions,
    windows.ReorderedOptions,
    rounds.TreeOptions,
    rounds.HintOptions,
    rounds.DrafterOptions,
    s2d2.VerifierOptions,
    s2d2.RemaskingOption,
    s2d2.AcceptanceOption,
    blocks.EntropyOptions,
    blocks.MultiBlockOption,
    blocks.ConfidenceOption,
    blocks.SubblockOptions,
    blocks.StepOptions,
    blocks.BlockOption,
    blocks.ScheduleOption,
    general.LogprobsOption,
    general.SamplingOptions,
    general.GeneralOptions,
):
    """How to decode: the options of this package's decoders and of all registered ones. Defaults are those of
    the published functions; :meth:`from_options` uses a family's paper setting instead.

    Raises:
        ConfigError: a value out of range, or a contradiction.
    """

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """An instance of :meth:`complete`."""
        return super().__new__(cls.complete())

    @classmethod
    def complete(cls) -> type[Self]:
        """This class with the options of decoders, policies and estimators from outside the package.

        Raises:
            ConfigError: an option's name is already taken.
        """
        added = dict.fromkeys(
            options for name in DECODERS for options in classes_of(name) if not issubclass(cls, options)
        )
        if not added:
            return cls
        known = {field.name for field in dataclasses.fields(cls)} | SYNONYMS.keys()
        for options in added:
            if taken := known.intersection(names_in(options)):
                raise ConfigError(f"{options.__qualname__}: {min(taken)} is an option already; choose another name.")
            known |= {*names_in(options)}
        return dataclasses.make_dataclass(cls.__name__, [], bases=(cls, *added), frozen=True)

    @classmethod
    def fields(cls) -> tuple[dataclasses.Field[Any], ...]:
        """Every option."""
        return dataclasses.fields(cls.complete())

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, checked(field, getattr(self, field.name)))
        part = DECODERS[self.decoder]
        imposed = dict(part.imposes)
        if self.acceptance is None and part.acceptances:
            imposed["acceptance"] = part.acceptances[0]
        if self.denoising_steps is None:
            imposed.setdefault("denoising_steps", self.block_length)
        for name, value in imposed.items():
            object.__setattr__(self, name, value)
        for message in self._faults():
            raise ConfigError(message)

    def _faults(self) -> Iterator[str]:
        """What is wrong between options."""
        part = DECODERS[self.decoder]
        if part.acceptances and self.acceptance not in part.acceptances:
            kinds = " or ".join(part.acceptances)
            yield f"acceptance={self.acceptance} is not for decoder={self.decoder}, which takes {kinds}."
        for options in classes_of(self.decoder, self.base):
            if hasattr(options, "faults"):
                yield from options.faults(self)

    @property
    def steps(self) -> int:
        """The maximum number of steps per block."""
        return self.denoising_steps or self.block_length

    @cached_property
    def strategy(self) -> str:
        """The remasking strategy in force."""
        return DECODERS[self.steps_of].strategy or self.remasking_strategy

    @property
    def steps_of(self) -> str:
        """The decoder whose denoising steps run: the base decoder under acceleration."""
        return accelerated(self.decoder, self.base)

    @property
    def token_causal(self) -> bool:
        """Whether finished blocks are committed with token-causal attention."""
        return self.cache_ver or self.block_length == 1

    @property
    def layout(self) -> str:
        """How much is decoded at once, and in which schedule, in a few words."""
        return str(DECODERS[self.decoder].implementation.layout(self))

    @property
    def promise(self) -> str:
        """The guarantee on the decoder's output, in one sentence."""
        return str(DECODERS[self.decoder].promise)

    @property
    def shares_budget(self) -> bool:
        """Whether rows may use each other's query budgets. With rejection, drafts influence the tokens, so a row's
        drafts must depend on that row alone.
        """
        return self.share_budget and self.acceptance != "rejection"

    @property
    def looks_up(self) -> bool:
        """Whether drafts are looked up in text in place of masks."""
        return self.lookup and self.window == 1

    @property
    def caution(self) -> str | None:
        """A caveat on the counts of a run, in one sentence, or None."""
        caution: str | None = DECODERS[self.decoder].implementation.caution(self)
        return caution

    @classmethod
    def option_names(cls) -> frozenset[str]:
        """Every accepted option name, synonyms included."""
        return frozenset(field.name for field in cls.fields()) | SYNONYMS.keys()

    @classmethod
    def from_options(
        cls, options: Mapping[str, Any], facts: Facts | None = None, *, of_run: Mapping[str, Any] | None = None
    ) -> DecodingConfig:
        """Validate ``options`` and merge them over their preset and the family's paper setting (``facts.defaults``).

        Args:
            of_run: options of a whole run, which ``options`` override by name. If ``options`` choose another
                decoder, those that do not apply to it are left out.

        Raises:
            ConfigError: an unknown name (with the closest valid one), a value of the wrong type or out of range, an
                option of another decoder, or a contradiction.
        """
        fields = cls.fields()
        given, beneath = layer(fields, options), layer(fields, of_run or {})
        base = given.get("base", beneath.get("base", _default_base(facts)))
        given = {**(own(given["decoder"], base, beneath) if "decoder" in given else beneath), **given}
        preset = given.pop("preset", None)
        setting = {} if preset is None else preset_options(preset, facts)
        default = next(iter(DECODERS)) if facts is None else facts.decoders[0]
        decoder = given.get("decoder", setting.pop("decoder", default))
        refuse_foreign(decoder, base, given, facts)
        below: dict[str, Any] = {}
        if facts is not None:
            refuse_other_schemes(fields, given, facts)
            if "decoder" in given and decoder not in facts.decoders:
                raise ConfigError(misfit(decoder, facts))
            below = published_setting(facts, given.get("block_length"))
        below |= setting
        if given.get("do_sample") and below.get("temperature", 1.0) < general.GREEDY:
            below.pop("temperature")  # asked for samples, not for the family's greedy setting
        return _made_from(preset, cls(**{**own(decoder, base, {**below, "base": base}), "decoder": decoder, **given}))

    def replace(self, **options: Any) -> DecodingConfig:
        """The same configuration with ``options`` in place of its own, checked as in :meth:`from_options`."""
        fields = self.fields()
        given = normalised(fields, options)
        if "preset" in given:
            raise ConfigError(
                "options given with a preset override it, and this configuration is complete: start "
                "from DecodingConfig.from_options, or give the preset to model.generate."
            )
        decoder = given.get("decoder", self.decoder)
        base = given.get("base", self.base)
        refuse_foreign(decoder, base, given)
        held = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}
        if held["denoising_steps"] == held["block_length"]:
            held["denoising_steps"] = None
        return _made_from(self.preset, type(self)(**{**own(decoder, base, held), **given}))

    def check_fits(self, facts: Facts) -> None:
        """Refuse options that do not apply to checkpoints of ``facts``, if they differ from their default.

        Raises:
            ConfigError: naming the option.
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
        refuse_other_schemes(dataclasses.fields(self), self._in_force(), facts)

    def to_dict(self) -> dict[str, Any]:
        """The options of the chosen decoder, as plain values."""
        values = self._in_force()
        if not isinstance(values["random_source"], str):
            values["random_source"] = type(values["random_source"]).__name__
        values |= {name: list(values[name]) for name in ("stop_token_ids", "suppress_tokens")}
        return {**values, "logit_bias": dict(self.logit_bias)}

    def _in_force(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names_of(self.decoder, self.base)}


def _default_base(facts: Facts | None) -> str:
    """The default decoder to accelerate on checkpoints of ``facts``."""
    bases = set(spiffy.BASES)
    return next((name for name in (facts.decoders if facts else ()) if name in bases), "dynamic")


def _made_from(preset: str | None, config: DecodingConfig) -> DecodingConfig:
    object.__setattr__(config, "preset", preset)
    return config
