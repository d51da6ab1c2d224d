"""Optuna's own figures of a search: its history, which options mattered, and the trials as parallel coordinates."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.studies.files import SEARCH

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST_TRIALS = 4
"""Complete trials from which on figures say something."""

KINDS = {
    "optimization_history": "{} of every trial",
    "param_importances": "Which options {} depended on, by fANOVA",
    "parallel_coordinate": "The trials' options, and {}",
}
"""Optuna's plot -> caption."""


def searches(folder: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[str, str, Callable[[], Figure]]]:
    """Name, caption and drawing of every figure of the latest search for each model in ``folder``."""
    storage = folder / SEARCH
    if not storage.exists():
        return
    try:
        import optuna
    except ImportError:
        return
    wanted = (manifest.get("study") or {}).get("search") or {}
    objectives = wanted.get("objectives", ["accuracy", "tokens_per_second"])
    url = f"sqlite:///{storage.resolve()}"
    latest: dict[str, Any] = {}
    for name in optuna.get_all_study_names(url):
        study = optuna.load_study(study_name=name, storage=url)
        complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
        model = name.rpartition(" ")[0]
        if len(complete) >= LEAST_TRIALS and len(study.directions) == len(objectives):
            latest[model] = max(latest.get(model, study), study, key=lambda one: one.trials[-1].datetime_start)
    for model, study in latest.items():
        for place, objective in enumerate(objectives):
            for kind, caption in KINDS.items():
                words = objective.replace("_", " ")
                draw = partial(_drawn, study, kind, place, words)
                yield f"{model} search {objective} {kind}", f"{model}: {caption.format(words)}.", draw


def _drawn(study: Any, kind: str, place: int, words: str) -> Figure:
    from matplotlib import rc_context
    from optuna.visualization import matplotlib as plots

    with warnings.catch_warnings(), rc_context():  # they set the style of all figures
        warnings.simplefilter("ignore")  # optuna calls these plots experimental
        axes = getattr(plots, f"plot_{kind}")(study, target=lambda trial: trial.values[place], target_name=words)
    figure: Figure = axes.figure
    figure.set_size_inches(8.4, 4.2)
    return figure
