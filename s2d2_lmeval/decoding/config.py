"""Every decoding option: its published name, its default, its range and the decoders it belongs to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.families import family_named

if TYPE_CHECKING:
    from s2d2_lmeval.families import Facts

STRATEGY_OF_DECODER = {
    "sequential": "sequential",
    "static": "low_confidence_static",
    "dynamic": "low_confidence_dynamic",
    "entropy_bounded": "entropy_bounded",
}
DENOISERS = (*STRATEGY_OF_DECODER, "s2d2")
DECODERS = ("ar", *DENOISERS)

PROMISES = {
    "ar": "the model's own autoregressive law: one token at a time at block size one",
    "sequential": "the definition of sequential block denoising",
    "static": "the definition of static low-confidence remasking",
    "dynamic": "the definition of dynamic (confidence-threshold) remasking",
    "entropy_bounded": "the definition of entropy-bounded remasking",
    "s2d2": "the published S2D2 algorithm; the AR law exactly when every draft is sampled and verified under "
    "AR-like caching, otherwise neither the AR nor the diffusion law",
}

SYNONYMS = {
    "block_size": "block_length",
    "threshold": "confidence_threshold",
    "gen_length": "max_new_tokens",
    "max_gen_toks": "max_new_tokens",
    "stopping_criteria_idx": "stop_token_ids",
    "stop_token": "stop_token_ids",
    "eos_id": "stop_token_ids",
}


def option(
    default: Any,
    meaning: str,
    *,
    decoders: tuple[str, ...] = DECODERS,
    choices: tuple[Any, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A field of :class:`DecodingConfig` with what is needed to check and to explain it."""
    metadata = {"meaning": meaning, "decoders": decoders, "choices": choices, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=metadata)


_S2D2 = ("s2d2",)
_POLICIES = ("mask_span_length", "score_threshold", "score_hysteresis", "contextual_bandit_ucb")
_ESTIMATORS = (
    "hard_margin_threshold",
    "hard_entropy_threshold",
    "soft_confidence_power",
    "soft_clipped_linear_margin",
    "soft_entropy_negexp",
    "soft_renyi_2_entropy",
)


@dataclass(frozen=True)
class DecodingConfig:
    """How to decode. Defaults are those of the published functions; :meth:`from_options` lays a family's paper setting
    under them.

    Raises :class:`~s2d2_lmeval.errors.ConfigError` for a value out of range or a contradiction.
    """

    decoder: str = option("s2d2", "which decoder", choices=DECODERS)
    schedule: str = option(
        "fused",
        "reference: a forward per draft, verification and commit, as published; fused: commits ride in the next draft; "
        "lookahead: verifications also commit what they accept and draft the next block (AR-like caching only)",
        choices=("reference", "fused", "lookahead"),
    )
    max_new_tokens: int = option(256, "new tokens at most", low=0)
    block_length: int = option(4, "tokens per block", decoders=DENOISERS, low=1)
    denoising_steps: int | None = option(
        None, "steps in which a block must be finished; none: as many as the block is long", decoders=DENOISERS, low=1
    )

    random_source: object = option("keyed", "keyed (by request and position), fixed, torch, or an object of your own")
    seed: int = option(0, "seed of keyed randomness")
    do_sample: bool = option(False, "sample the draft; otherwise it is the arg-max")
    temperature: float = option(1.0, "softmax temperature of draft and verifier", low=0.0)
    top_k: int = option(0, "keep the k most probable tokens; 0: all", low=0)
    top_p: float = option(1.0, "keep the smallest set of tokens with this probability", low=0.0, high=1.0)
    suppress_mask_token: bool = option(
        True, "never predict the mask token (published code may; then a block's last steps forbid it)"
    )

    stop_token_ids: tuple[int, ...] = option((), "token ids that end the answer")
    trim_stop_tokens: bool = option(True, "cut the answer before the first stop token")

    remasking_strategy: str = option(
        "low_confidence_dynamic",
        "which masks a step without (or after a short) verification decides",
        decoders=_S2D2,
        choices=tuple(STRATEGY_OF_DECODER.values()),
    )
    confidence_threshold: float = option(
        0.85, "dynamic: decide every mask above this probability", decoders=("dynamic", "s2d2"), low=0.0
    )
    eb_threshold: float | None = option(
        None,
        "entropy_bounded: sum of entropies (nats, of the unfiltered softmax) that a step may decide",
        decoders=("entropy_bounded", "s2d2"),
        low=0.0,
    )
    collapse_entropy: bool = option(
        False,
        "entropy_bounded with one entropy for the whole block, as published",
        decoders=("entropy_bounded", "s2d2"),
    )

    cache_ver: bool = option(False, "commit with token-causal attention (AR-like caching)", decoders=DENOISERS)
    draft_ver: bool = option(
        False, "decided prefix of the block drafts with token-causal attention", decoders=DENOISERS
    )

    acceptance: str = option(
        "stochastic",
        "stochastic: speculative sampling as published; greedy: accept while the verifier's arg-max agrees",
        decoders=_S2D2,
        choices=("stochastic", "greedy"),
    )
    allow_resample: bool = option(
        True, "resample a rejected token from the residual; otherwise the draft stays", decoders=_S2D2
    )
    ssd_ratio_tempering_factor: float = option(1.0, "exponent of the acceptance ratio", decoders=_S2D2, low=0.0)
    ssd_ratio_threshold: float = option(
        -1.0, "also accept behind a rejection where the ratio reaches this; negative: off", decoders=_S2D2
    )
    ssd_threshold_all_spans: bool = option(
        False, "ssd_ratio_threshold looks at every mask of the block", decoders=_S2D2
    )
    always_check_high_confidence: bool = option(
        False, "also decide every mask above confidence_threshold in each step", decoders=_S2D2
    )

    do_verify_policy: str = option("mask_span_length", "when to verify", decoders=_S2D2, choices=_POLICIES)
    min_ssd_span_length: int = option(
        1, "mask_span_length: verify spans of at least this many masks", decoders=_S2D2, low=0
    )
    legacy_ssd_span_strategy: bool = option(
        False, "mask_span_length: skip short spans only where enough masks are confident", decoders=_S2D2
    )
    do_verify_score_threshold: float = option(-1.0, "score_threshold: verify from this score on", decoders=_S2D2)
    hysteresis_threshold_on: float = option(0.0, "score_hysteresis: start verifying above", decoders=_S2D2)
    hysteresis_threshold_off: float = option(-1.0, "score_hysteresis: stop verifying below", decoders=_S2D2)
    do_verify_score_type: str = option(
        "difference_dynamic",
        "score: expected accepted tokens minus a cost, fixed or per confident mask",
        decoders=_S2D2,
        choices=("difference_static", "difference_dynamic"),
    )
    score_penalty_coef: float = option(2.0, "the cost in the score, in tokens", decoders=_S2D2)
    token_acceptance_estimator: str = option(
        "hard_margin_threshold", "how likely the verifier accepts a token", decoders=_S2D2, choices=_ESTIMATORS
    )
    ssd_confidence_margin_threshold: float = option(0.05, "of hard_margin_threshold", decoders=_S2D2)
    ssd_entropy_threshold: float = option(0.5, "of hard_entropy_threshold (normalised entropy)", decoders=_S2D2)
    ssd_confidence_power: float = option(1.0, "of soft_confidence_power", decoders=_S2D2, low=0.0)
    ssd_confidence_margin_coef: float = option(1.0, "of soft_clipped_linear_margin", decoders=_S2D2, low=0.0)
    ssd_entropy_temperature: float = option(1.0, "of soft_entropy_negexp", decoders=_S2D2, low=0.0)
    ucb_beta: float = option(1.0, "bandit: weight of the exploration bonus", decoders=_S2D2, low=0.0)
    ucb_span_length_bins: int = option(2, "bandit: buckets of span length", decoders=_S2D2, low=1)
    ucb_block_progress_bins: int = option(2, "bandit: buckets of decoded share of the block", decoders=_S2D2, low=1)
    ucb_entropy_bins: int = option(2, "bandit: buckets of mean normalised entropy", decoders=_S2D2, low=1)
    ucb_entropy_source: str = option(
        "span", "bandit: entropy over the span or over all masks", decoders=_S2D2, choices=("span", "masked")
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        if self.decoder == "ar":
            # At block size one there is nothing but token-causal attention.
            for name, value in {"block_length": 1, "denoising_steps": 1, "cache_ver": True, "draft_ver": True}.items():
                object.__setattr__(self, name, value)
        steps = self.denoising_steps
        if steps is None:
            object.__setattr__(self, "denoising_steps", self.block_length)
        elif steps > self.block_length:
            raise ConfigError(
                f"denoising_steps={steps} exceeds block_length={self.block_length}: a step decides at least one token. "
                f"Use denoising_steps={self.block_length} or less."
            )
        if self.strategy == "entropy_bounded" and self.eb_threshold is None:
            raise ConfigError(
                "entropy_bounded needs eb_threshold, the entropy in nats that a step may decide, e.g. 0.35."
            )
        if (
            self.do_verify_policy == "score_hysteresis"
            and self.hysteresis_threshold_on <= self.hysteresis_threshold_off
        ):
            raise ConfigError(
                f"score_hysteresis needs hysteresis_threshold_on ({self.hysteresis_threshold_on}) above "
                f"hysteresis_threshold_off ({self.hysteresis_threshold_off})."
            )
        if self.schedule == "lookahead" and not (self.cache_ver and self.draft_ver):
            raise ConfigError(
                "schedule=lookahead keeps what the verifier computed, which is right only under AR-like caching: "
                "set cache_ver=true and draft_ver=true, or use schedule=fused."
            )
        if isinstance(self.random_source, str) and self.random_source not in ("keyed", "fixed", "torch"):
            raise ConfigError(
                f"random_source={self.random_source!r}: use keyed, fixed, torch, or an object with uniform(n) and "
                "categorical(probabilities)."
            )

    @property
    def steps(self) -> int:
        """Steps in which a block must be finished."""
        return self.denoising_steps or self.block_length

    @property
    def strategy(self) -> str:
        """The remasking strategy in force."""
        return STRATEGY_OF_DECODER.get(self.decoder, "sequential" if self.decoder == "ar" else self.remasking_strategy)

    @property
    def sampled(self) -> bool:
        """Whether the draft is sampled rather than the arg-max."""
        return self.do_sample and self.temperature >= 1e-6

    @property
    def token_causal(self) -> bool:
        """Whether finished blocks are committed with token-causal attention."""
        return self.cache_ver or self.block_length == 1

    @property
    def promise(self) -> str:
        """What the decoder's output is, in a sentence."""
        return PROMISES[self.decoder]

    @classmethod
    def option_names(cls) -> frozenset[str]:
        """Every accepted option name, synonyms included."""
        return frozenset(field.name for field in dataclasses.fields(cls)) | SYNONYMS.keys()

    @classmethod
    def from_options(cls, options: Mapping[str, Any], facts: Facts | None = None) -> DecodingConfig:
        """Check ``options`` and lay them over the family's paper setting (``facts.defaults``).

        :raises ConfigError: for a name that is no option (names the nearest), a value of the wrong type or out of
            range, an option of another decoder, or a contradiction.
        """
        given = _normalised(options)
        decoder = given.get("decoder", "s2d2")
        _refuse_foreign(decoder, given)
        below: dict[str, Any] = {}
        if facts is not None:
            if "decoder" in given and decoder in DECODERS and decoder not in facts.decoders:
                raise ConfigError(
                    f"decoder={decoder} does not fit {facts.family} checkpoints; use one of: "
                    f"{', '.join(facts.decoders)}."
                )
            # The published setting depends on the block length, which may be another than the checkpoint's own.
            below = {"stop_token_ids": facts.stop_token_ids, **facts.defaults}
            length = given.get("block_length")
            if isinstance(length, int) and length != facts.block_length:
                below |= family_named(facts.family).defaults(length)
        return cls(**{**_own(decoder, below), **given})

    def replace(self, **options: Any) -> DecodingConfig:
        """The same configuration with ``options`` in place of its own, checked as in :meth:`from_options`."""
        given = _normalised(options)
        decoder = given.get("decoder", self.decoder)
        _refuse_foreign(decoder, given)
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if own["denoising_steps"] == own["block_length"]:
            own["denoising_steps"] = None
        return type(self)(**{**_own(decoder, own), **given})

    def to_dict(self) -> dict[str, Any]:
        """The options that the decoder in force knows, as plain values."""
        values = {name: getattr(self, name) for name in _fields_of(self.decoder)}
        if not isinstance(values["random_source"], str):
            values["random_source"] = type(values["random_source"]).__name__
        values["stop_token_ids"] = list(self.stop_token_ids)
        return values


def _fields_of(decoder: str) -> list[str]:
    return [field.name for field in dataclasses.fields(DecodingConfig) if decoder in field.metadata["decoders"]]


def _own(decoder: str, options: Mapping[str, Any]) -> dict[str, Any]:
    names = set(_fields_of(decoder)) if decoder in DECODERS else set()
    return {name: value for name, value in options.items() if name in names}


def _normalised(options: Mapping[str, Any]) -> dict[str, Any]:
    """Published names for synonyms; refuse unknown names and a name given twice."""
    names = {field.name for field in dataclasses.fields(DecodingConfig)}
    given: dict[str, Any] = {}
    for name, value in options.items():
        target = SYNONYMS.get(name, name)
        if target not in names:
            near = get_close_matches(name, DecodingConfig.option_names(), n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{name} is not a decoding option.{hint}")
        if target in given and given[target] != value:
            raise ConfigError(f"{name} and another name of {target} are given with different values; give one of them.")
        given[target] = value
    return given


def _refuse_foreign(decoder: str, given: Mapping[str, Any]) -> None:
    if decoder not in DECODERS:
        return  # refused with its own message when the configuration is built
    for field in dataclasses.fields(DecodingConfig):
        owners = field.metadata["decoders"]
        if field.name in given and decoder not in owners:
            raise ConfigError(
                f"{field.name} is an option of decoder {' or '.join(owners)}, and this run uses decoder={decoder}; "
                f"drop {field.name} or choose decoder={owners[0]}."
            )


def _checked(field: dataclasses.Field[Any], value: Any) -> Any:
    """``value`` in the type of ``field``, within its choices and range."""
    name, meta = field.name, field.metadata
    kind = str(field.type).removesuffix(" | None")
    if value is None and str(field.type).endswith("None"):
        return None
    value = _converted(name, kind, value)
    if meta["choices"] is not None and value not in meta["choices"]:
        near = get_close_matches(str(value), [str(choice) for choice in meta["choices"]], n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{name}={value!r} is not one of: {', '.join(map(str, meta['choices']))}.{hint}")
    if meta["low"] is not None and value < meta["low"]:
        raise ConfigError(f"{name}={value} is too small; it must be at least {meta['low']:g}.")
    if meta["high"] is not None and value > meta["high"]:
        raise ConfigError(f"{name}={value} is too large; it must be at most {meta['high']:g}.")
    return value


def _converted(name: str, kind: str, value: Any) -> Any:
    if kind == "bool":
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if isinstance(value, bool):
            return value
    elif kind == "int":
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)
    elif kind == "float":
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
            return float(value)
    elif kind == "str":
        if isinstance(value, str):
            return value
    elif kind == "tuple[int, ...]":
        values = (value,) if isinstance(value, int) else value
        if isinstance(values, (list, tuple, set, frozenset)) and all(isinstance(item, int) for item in values):
            return tuple(values)
    else:
        return value
    raise ConfigError(f"{name}={value!r} is not of the right type; it takes {_KINDS[kind]}.")


_KINDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a name",
    "tuple[int, ...]": "a list of token ids",
}
