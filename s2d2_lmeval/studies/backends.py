"""Where points are evaluated: in this process, or as tasks of a Ray cluster. The files are the same."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from s2d2_lmeval.errors import StudyError
from s2d2_lmeval.harness.identity import code_version
from s2d2_lmeval.studies.evaluation import Evaluator, Outcome
from s2d2_lmeval.studies.planning import Job
from s2d2_lmeval.studies.store import Line, PointStore

ATTEMPTS = 2
"""How often a point is given to a Ray worker before its death counts as the point's failure."""


class Observer(Protocol):
    """What a run tells while it goes on."""

    def started(self, job: Job) -> None:
        """A point is being worked on."""

    def sample(self, job: Job, line: Line, done: int) -> None:
        """A sample is on disk, the point's ``done``-th (not told by workers on other machines)."""

    def ended(self, job: Job, outcome: Outcome) -> None:
        """A point is complete, or has failed."""


class Backend(Protocol):
    """Evaluates jobs; a failed one does not stop the others."""

    def run(self, jobs: Sequence[Job], observer: Observer) -> None:
        """Evaluate ``jobs``.

        :raises StorageError: when results cannot be written.
        """

    def close(self) -> None:
        """Let go of models and workers."""


class LocalBackend:
    """One after the other in this process; each model is loaded once for all its points."""

    def __init__(self) -> None:
        self._evaluator: Evaluator | None = None

    def run(self, jobs: Sequence[Job], observer: Observer) -> None:
        """See :class:`Backend`."""
        evaluator = self._evaluator or Evaluator()
        self._evaluator = evaluator
        evaluator.on_sample = observer.sample
        for job in jobs:
            observer.started(job)
            observer.ended(job, evaluator.run(job))

    def close(self) -> None:
        """See :class:`Backend`."""
        if self._evaluator is not None:
            self._evaluator.close()


class RayBackend:
    """A task per point, on as many workers as the cluster has room for. A worker keeps its model between points.

    The folder of results must be the same on all machines (a shared file system).
    """

    def __init__(self, *, address: str | None = None, num_gpus: float = 0, num_cpus: float = 1) -> None:
        try:
            import ray
        except ImportError:
            raise StudyError("--backend ray needs the package ray: pip install 's2d2-lmeval[ray]'.") from None
        self._ray: Any = ray
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, include_dashboard=False, configure_logging=False)
        # Workers die with what a point does to them; whether to try again is decided here.
        self._task = ray.remote(num_gpus=num_gpus, num_cpus=num_cpus, max_retries=0)(_work)

    def run(self, jobs: Sequence[Job], observer: Observer) -> None:
        """See :class:`Backend`."""
        ray = self._ray
        if not jobs:
            return
        token = _leave_token(jobs[0].path.parent)
        attempts = dict.fromkeys((job.digest for job in jobs), 0)
        running: dict[Any, Job] = {}

        def submit(job: Job) -> None:
            attempts[job.digest] += 1
            running[self._task.remote(job, token)] = job
            observer.started(job)

        try:
            for job in jobs:
                submit(job)
            while running:
                done, _ = ray.wait(list(running), num_returns=1)
                job = running.pop(done[0])
                try:
                    outcome = ray.get(done[0])
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except ray.exceptions.RayError as error:
                    if attempts[job.digest] < ATTEMPTS:
                        submit(job)  # what it had finished is on disk
                        continue
                    outcome = _died(job, error)
                observer.ended(job, outcome)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)
            token.unlink(missing_ok=True)

    def close(self) -> None:
        """See :class:`Backend`."""
        self._ray.shutdown()


_of_this_worker: Evaluator | None = None


def _work(job: Job, token: Path) -> Outcome:
    """In a Ray worker."""
    global _of_this_worker
    if not token.exists():
        raise StudyError(
            f"a Ray worker does not see {token.parent}: put the folder of results on a file system that all machines "
            "share, under the same path."
        )
    if job.code != code_version():
        raise StudyError(
            f"a Ray worker has code version {code_version()}, and this study is of {job.code}: install the same "
            "package on all machines."
        )
    _of_this_worker = _of_this_worker or Evaluator()
    return _of_this_worker.run(job)


def _leave_token(folder: Path) -> Path:
    """A file by which a worker knows that it sees this very folder."""
    folder.mkdir(parents=True, exist_ok=True)
    token = folder / f".seen-{secrets.token_hex(8)}"
    token.touch()
    return token


def _died(job: Job, error: Exception) -> Outcome:
    """Record that a point takes its worker with it."""
    lines = str(error).strip().splitlines()
    text = f"its Ray worker died {ATTEMPTS} times ({type(error).__name__}: {lines[0] if lines else 'no reason given'})"
    with PointStore(job.path) as store:
        store.begin(job.definition, job.point.label)
        store.append("failure", error=text, traceback="")
    return Outcome(0, 0.0, text)
