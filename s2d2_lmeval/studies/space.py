"""The space of a search, as optuna has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from s2d2_lmeval.errors import StudyError
from s2d2_lmeval.studies.points import Search


def check_search(wanted: Search) -> None:
    """Find out before anything runs whether a search can.

    :raises StudyError: when optuna is missing, or would not take an axis.
    """
    try:
        import optuna
    except ImportError:
        raise StudyError("search needs the package optuna: pip install 's2d2-lmeval[sweep]'.") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions(wanted)


def distributions(wanted: Search) -> dict[str, Any]:
    """The axes of the space as optuna has them."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    def distribution(axis: Mapping[str, Any]) -> Any:
        if "choices" in axis:
            return CategoricalDistribution(axis["choices"])
        if all(isinstance(axis[key], int) for key in ("low", "high")):
            return IntDistribution(**{"step": 1, **axis})
        return FloatDistribution(**axis)

    try:
        return {name: distribution(axis) for name, axis in wanted.space.items()}
    except (ValueError, TypeError, ArithmeticError) as error:
        raise StudyError(f"search: optuna does not take an axis of the space: {str(error)[:300]}") from None
