"""Signature and help of every published function: what they are called with, and that each argument is explained."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

from s2d2_lmeval.custom_generate import (
    d2f,
    ddtree,
    fast_dllm_v2,
    idlm,
    llada2,
    nemotron,
    sdar,
    sliding,
    spiffy,
    stable_diffcoder,
    tiny_a2d,
    wedlm,
)
from s2d2_lmeval.custom_generate.published import published

PUBLISHED: list[Callable[..., Any]] = [
    *(sdar.block_diffusion_generate, sdar.block_diffusion_generate_baseline),
    *(fast_dllm_v2.generate, fast_dllm_v2.generate_ssd_policy, llada2.generate_cached, llada2.generate_ssd_policy),
    *(d2f.generate_block_single, d2f.generate_block_speculative, ddtree.dflash_generate, ddtree.ddtree_generate),
    *(spiffy.spiffy_generate, sliding.sliding_generate, stable_diffcoder.generate_block, tiny_a2d.sample),
    *(nemotron.ar_generate, nemotron.generate, nemotron.linear_spec_generate, idlm.generate, wedlm.generate),
]


def explained(function: Callable[..., Any]) -> list[str]:
    """Names before the colons of ``Args:``."""
    section = re.search(r"^Args:\n(.*?)\n\nReturns:\n", inspect.getdoc(function) or "", re.MULTILINE | re.DOTALL)
    assert section
    entries = re.findall(r"^ {4}(\w[\w, ]*): (?!None\.)", section[1], re.MULTILINE)
    return ", ".join(entries).split(", ")


@pytest.mark.parametrize("function", PUBLISHED, ids=lambda function: f"{function.__module__}.{function.__name__}")
def test_help_explains_every_argument_once(function: Callable[..., Any]) -> None:
    assert sorted(explained(function)) == sorted(inspect.signature(function).parameters)
    assert max(map(len, (inspect.getdoc(function) or "").splitlines())) <= 120
    assert vars(inspect.getmodule(function))[function.__name__] is function


@published("top_k=0 * stop=... seed=3")
def plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """Plain.

    Args:
        model, stop: these two.

    Returns:
        all of it.
    """
    return arguments


@published("cache_ver min_p temperature=0.5", extends=plain)
def longer(arguments: dict[str, Any]) -> dict[str, Any]:
    """Longer.

    Args:
        temperature: of this one.
    """
    return arguments


def test_what_extends_another_is_called_like_it_and_with_more() -> None:
    given = {"model": 1, "input_ids": 2, "top_k": 4, "stop": 9}
    more = {"cache_ver": False, "min_p": 0.0, "temperature": 0.5, "seed": 3}
    assert longer(1, 2, 4, stop=9) == {**given, **more, "kwargs": {}}
    assert longer(1, 2, 4, True, 0.1, stop=9, other=8) == {
        **given,
        **more,
        "cache_ver": True,
        "min_p": 0.1,
        "kwargs": {"other": 8},
    }
    assert longer(model=1, input_ids=2, top_k=4, stop=9, temperature=0.0)["temperature"] == 0.0
    assert plain(1, 2, 4, stop=9) == {**given, "seed": 3, "kwargs": {}}


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((1, 2), {}), ((1,), {"stop": 9}), ((1, 2, 3, 4, 5, 6, 7), {"stop": 9}), ((1, 2), {"model": 1})],
)
def test_wrong_calls_are_type_errors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for function in (plain, longer):
        with pytest.raises(TypeError):
            function(*args, **kwargs)


def test_help_of_what_extends_another_says_its_own_first() -> None:
    own, _, shared = (longer.__doc__ or "").partition("model, stop: these two.")
    assert own == "Longer.\n\nArgs:\n    temperature: of this one.\n    "
    assert "    cache_ver: commit with token-causal attention (AR-like caching).\n" in shared
    assert shared.partition(
        "\n\nReturns:\n    all of it.\n\nRaises:\n    ConfigError: a name that is not a decoding option"
    )[2]
    names = ["temperature", "model", "stop", "input_ids", "top_k", "seed", "kwargs", "cache_ver", "min_p"]
    assert explained(longer) == names
