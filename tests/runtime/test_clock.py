"""What timings are read from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.runtime import clock


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    clock.choose("wall")


@pytest.mark.parametrize("name", clock.CLOCKS)
def test_the_chosen_clock_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(clock.CLOCKS, name, lambda: 17.0)
    clock.choose(name)
    assert clock.now() == 17.0


def test_other_clocks_are_refused() -> None:
    with pytest.raises(ConfigError, match="no clock 'sundial'; use wall or cpu"):
        clock.choose("sundial")
