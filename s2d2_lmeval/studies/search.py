"""Search for thresholds: optuna proposes decoding options, the sweep evaluates them, and trials are stored on disk.

Several objectives are maximized at once (accuracy and speed), so the result is a Pareto front, not one best trial. A
trial is one configuration on all tasks and seeds of the study; its points are ordinary points, so an interrupted trial
resumes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from s2d2_lmeval.errors import StudyError
from s2d2_lmeval.harness.identity import HUB_ONLY, of_plain, with_files
from s2d2_lmeval.runtime.statistics import ratios
from s2d2_lmeval.studies.files import SEARCH
from s2d2_lmeval.studies.points import Search
from s2d2_lmeval.studies.report.results import accuracy_of
from s2d2_lmeval.studies.store import PointRecord

if TYPE_CHECKING:
    from s2d2_lmeval.studies.planning import Job
    from s2d2_lmeval.studies.sweep import Sweep


def search(sweep: Sweep) -> None:
    """Run the remaining trials of the study's search, for every model; ``sweep`` evaluates them.

    Raises:
        StudyError: if every trial of a round fails, or optuna's record cannot be read or written.
    """
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    wanted = sweep.plan.study.search
    assert wanted is not None
    try:
        for model in sweep.plan.study.models:
            _search_model(sweep, model, wanted)
    except (OptunaError, SQLAlchemyError) as error:
        raise StudyError(
            f"{sweep.plan.folder / SEARCH}, the search's own record, cannot be used ({str(error)[:300]}). Make room, "
            "or move it away and start again: points that are complete are found by their names."
        ) from error


def _search_model(sweep: Sweep, model: str, wanted: Search) -> None:
    import optuna
    from optuna.trial import TrialState

    study = optuna.create_study(
        storage=f"sqlite:///{(sweep.plan.folder / SEARCH).resolve()}",
        study_name=f"{model} {_what_is_searched(sweep, model, wanted)}",
        directions=["maximize"] * len(wanted.objectives),
        load_if_exists=True,
    )
    space = {option: axis.distribution() for option, axis in wanted.space.items()}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        # Its process is gone. Run the same options again: finished points are found by name.
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params, skip_if_exists=False)
    # Finished trials are evaluated again too, at no cost, so that they become points of this run.
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        sweep.evaluate(_jobs(sweep, model, wanted, trial.number, trial.params))
    while (done := len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))) < wanted.trials:
        # The sampler is stateless, so its seed depends on the number of trials.
        study.sampler = optuna.samplers.TPESampler(seed=wanted.seed + done, multivariate=True, n_startup_trials=8)
        trials = [study.ask(space) for _ in range(min(wanted.parallel, wanted.trials - done))]
        jobs = [_jobs(sweep, model, wanted, trial.number, trial.params) for trial in trials]
        records = iter(sweep.evaluate([job for several in jobs for job in several]))
        found = [_objectives(wanted, several, [next(records) for _ in several]) for several in jobs]
        for trial, values in zip(trials, found, strict=True):
            study.tell(trial, **({"state": TrialState.FAIL} if isinstance(values, str) else {"values": values}))
        if all(isinstance(values, str) for values in found):
            raise StudyError(f"search: every trial of a round failed, the last one with: {found[-1]}")


def _jobs(sweep: Sweep, model: str, wanted: Search, number: int, chosen: Mapping[str, Any]) -> list[Job]:
    study, options = sweep.plan.study, {**wanted.decoding, **chosen}
    known = {progress.job.path: progress.job for progress in sweep.points.values()}
    each = [(task, seed) for task in study.tasks for seed in study.seeds]
    jobs = sweep.plan.jobs(study.point(model, f"trial {number}", options, task, seed) for task, seed in each)
    return [known.get(job.path, job) for job in jobs]


def _objectives(wanted: Search, jobs: Sequence[Job], records: Sequence[PointRecord]) -> list[float] | str:
    """Accuracy (mean over tasks and seeds) and speed (a ratio of sums), or why they are missing."""
    for job, record in zip(jobs, records, strict=True):
        if not record.is_complete(job.settings):
            return record.failure["error"] if record.failure else f"{job.label} did not complete"
    records = [record.of_the_result() for record in records]
    counts = {name: sum(record.total(name) for record in records) for name in ("new_tokens", "nfe")}
    rates = ratios({**counts, "seconds": sum(record.decoding_seconds for record in records)})
    scores = [accuracy_of(record, job.task.metric)[1] for job, record in zip(jobs, records, strict=True)]
    values = {"tokens_per_second": 0.0, "tokens_per_forward": 0.0, **rates, "accuracy": fmean(scores)}
    return [values[name] for name in wanted.objectives]


def _what_is_searched(sweep: Sweep, model: str, wanted: Search) -> str:
    """A digest of what makes trials comparable: another space, or other weights, tasks or code, make another search."""
    plan = sweep.plan
    asked = [(task.model_dump(), plan.settings[task.task]) for task in plan.study.tasks]
    space = {option: axis.given for option, axis in wanted.space.items()}
    sought = [space, with_files(wanted.decoding), wanted.objectives]
    arguments = {key: value for key, value in plan.study.models[model].items() if key not in HUB_ONLY}
    run = [plan.identities[model], arguments, plan.code, plan.study.seeds, plan.study.batch_size]
    return of_plain(run, asked, sought)
