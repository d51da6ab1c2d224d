"""Presets: published settings by name, under the options that are given beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2d2_lmeval import DecodingConfig, load
from s2d2_lmeval.decoding.options.reading import names_of
from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.families import FAMILIES, Facts, Family

from .tiny import DATA, engine

CHECKPOINTS = Path(__file__).parents[1] / "families" / "data"
PRESETS = [(family, name) for family in FAMILIES.values() for name in family.presets]


def facts_of(family: Family) -> Facts:
    """Of a made-up checkpoint of the published vocabulary."""
    vocabulary = next(iter(family.published_mask_ids), 1000)
    records = {"generation_config.json": {"eos_token_id": 7}}
    native = family.config_class(vocab_size=vocabulary)
    return family.facts({"mask_token_id": 5}, native, records, source="published")


@pytest.mark.parametrize(("family", "name"), PRESETS, ids=lambda value: getattr(value, "name", value))
def test_a_preset_is_its_table_and_what_is_given_beside_it(family: Family, name: str) -> None:
    facts = facts_of(family)
    config = DecodingConfig.from_options({"preset": name}, facts)
    assert config.preset == name
    # A family's options serve all of its decoders; those of others fall away.
    of_decoder = {key: value for key, value in family.presets[name].items() if key in config.to_dict()}
    assert {key: getattr(config, key) for key in of_decoder} == of_decoder
    assert len(of_decoder) > 1
    assert config.stop_token_ids == (7,)
    changed = DecodingConfig.from_options({"preset": name, "top_p": 0.123, "max_new_tokens": 9}, facts)
    assert (changed.preset, changed.top_p, changed.max_new_tokens) == (name, 0.123, 9)
    assert changed == config.replace(top_p=0.123, max_new_tokens=9)


def test_the_default_setting_is_a_preset_of_each_family() -> None:
    for family in dict.fromkeys(family for family, _ in PRESETS):
        facts = facts_of(family)
        length = {"block_length": 32} if "block_length" in names_of(facts.decoders[0]) else {}
        plain = DecodingConfig.from_options(length, facts)
        same = [DecodingConfig.from_options({"preset": name, **length}, facts) for name in family.presets]
        assert plain.to_dict() in [{**config.to_dict(), "preset": None} for config in same]


def test_another_block_length_beside_a_preset_brings_as_many_steps() -> None:
    config = DecodingConfig.from_options({"preset": "sdar-b", "block_length": 8}, engine().facts)
    assert (config.block_length, config.steps, config.score_penalty_coef) == (8, 8, 0.0)


def test_options_of_a_preset_that_are_another_decoder_s_fall_away() -> None:
    config = engine().config({"preset": "sdar-b", "decoder": "dynamic"})
    assert (config.decoder, config.block_length, config.confidence_threshold) == ("dynamic", 16, 0.85)
    assert "do_verify_policy" not in config.to_dict()


def test_what_is_given_for_a_whole_run_stays_above_the_preset_of_a_task() -> None:
    facts = engine().facts
    run = {"preset": "sdar-a", "temperature": 0.5, "min_ssd_span_length": 3}
    config = DecodingConfig.from_options({"preset": "sdar-b"}, facts, of_run=run)
    assert (config.preset, config.block_length, config.temperature) == ("sdar-b", 16, 0.5)
    assert config.min_ssd_span_length == 3
    other = DecodingConfig.from_options({"decoder": "ar"}, facts, of_run=run)
    assert (other.decoder, other.preset, other.temperature) == ("ar", "sdar-a", 0.5)


def test_a_configuration_remembers_its_preset_and_can_be_given_again() -> None:
    config = engine().config({"preset": "sdar-b", "temperature": 0.5})
    assert config.replace(max_new_tokens=3).preset == "sdar-b"
    assert config.to_dict()["preset"] == "sdar-b"
    assert engine().config(config.to_dict()) == config


def test_a_preset_decodes_as_its_options_do() -> None:
    prompt = [3, 1, 4, 1, 5]
    options = {**FAMILIES["sdar"].presets["sdar-b"], "max_new_tokens": 20}
    named = engine().generate([prompt], {"preset": "sdar-b", "max_new_tokens": 20})[0]
    assert named.steps == engine().generate([prompt], options)[0].steps


@pytest.mark.parametrize(
    ("checkpoint", "name", "message"),
    [
        ("sdar", "fast-a", "a setting of fast_dllm_v2, and this is a sdar checkpoint: sdar has sdar-a, sdar-b"),
        ("llada2", "sdar-a", "sdar and sdar_moe, .*llada2 has llada2-conservative, llada2-quality"),
        ("llada", "d2f-dream", "a setting of dream, and this is a llada checkpoint: llada has d2f-llada"),
        ("llada2", "llada2-qualty", r"there is no preset llada2-qualty; .*Did you mean llada2-quality\?"),
        ("dream", "x", r"there is no preset x; dream has d2f-dream\.$"),
        ("dream", ["d2f-dream"], r"preset=\['d2f-dream'\] is not of the right type; it takes a name"),
    ],
)
def test_a_preset_of_another_family_or_none_is_refused_with_those_that_fit(
    checkpoint: str, name: object, message: str
) -> None:
    folder = DATA / "sdar_checkpoint" if checkpoint == "sdar" else CHECKPOINTS / checkpoint / "checkpoint"
    with pytest.raises(ConfigError, match=message):
        load(folder, device="cpu").generate([[1, 2, 3]], {"preset": name})


def test_without_a_checkpoint_a_preset_is_looked_up_among_all() -> None:
    config = DecodingConfig.from_options({"preset": "sdar-b"})
    assert engine().config(config) is config
    with pytest.raises(ConfigError, match=r"known are sdar-a, sdar-b, fast-a.* Did you mean fast-c\?"):
        DecodingConfig.from_options({"preset": "fast_c"})
    with pytest.raises(ConfigError, match="llada2-quality is a setting of llada2"):
        engine().generate([[1]], DecodingConfig.from_options({"preset": "llada2-quality", "max_new_tokens": 4}))


def test_a_complete_configuration_takes_no_preset() -> None:
    with pytest.raises(ConfigError, match="from_options"):
        DecodingConfig().replace(preset="sdar-a")
    with pytest.raises(TypeError, match="preset"):
        DecodingConfig(preset="sdar-a")  # type: ignore[call-arg]
