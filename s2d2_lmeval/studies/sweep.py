"""Run a study: its incomplete points, then the trials of its search; in this process, or as tasks of a Ray
cluster, with the same files.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from s2d2_lmeval.errors import StudyError, first_line
from s2d2_lmeval.harness.identity import code_version
from s2d2_lmeval.studies.evaluation import Evaluator, Outcome
from s2d2_lmeval.studies.planning import Job, Plan
from s2d2_lmeval.studies.report.results import accuracy_of
from s2d2_lmeval.studies.store import Line, PointRecord, PointStore, read_point

WAITING, RUNNING, COMPLETE, FAILED = "waiting", "running", "complete", "failed"

ATTEMPTS = 2
"""Attempts of a point on Ray workers before a worker's death counts as the point's failure."""


@dataclass
class Progress:
    """Progress of a point: samples on disk, of how many, and their totals."""

    job: Job
    done: int = 0
    new_tokens: float = 0.0
    nfe: float = 0.0
    seconds: float = 0.0
    accuracy: float | None = None
    state: str = WAITING
    error: str = ""
    unreadable: int = 0
    earlier_seconds: float = 0.0
    told: int = 0

    @classmethod
    def of(cls, job: Job) -> Progress:
        """What is on disk."""
        record = read_point(job.path)
        finished = record.is_complete(job.settings)
        record = record.of_the_result() if finished else record
        return cls(
            job,
            done=min(len(record.samples), job.samples),
            new_tokens=record.total("new_tokens"),
            nfe=record.total("nfe"),
            seconds=record.decoding_seconds,
            accuracy=_accuracy(record, job) if finished else None,
            state=COMPLETE if finished else WAITING,
            unreadable=len(record.unreadable),
        )

    @property
    def has_ended(self) -> bool:
        """Whether it is finished for this run."""
        return self.state in (COMPLETE, FAILED)

    @property
    def tokens_per_forward(self) -> float:
        """New tokens over forwards, all samples."""
        return self.new_tokens / self.nfe if self.nfe else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens over seconds of decoding, all samples."""
        return self.new_tokens / self.seconds if self.seconds else 0.0


def _accuracy(record: PointRecord, job: Job) -> float | None:
    """A complete point's accuracy; None where its result lacks the metric, which its report then says."""
    try:
        return accuracy_of(record, job.task.metric)[1]
    except StudyError:
        return None


@dataclass
class Sweep:
    """The points of a study and how far each is; ``watcher`` is told of each that changes. Where the study has a
    search, ``search`` makes its points (:func:`s2d2_lmeval.studies.search.search`).
    """

    plan: Plan
    backend: LocalBackend | RayBackend
    search: Callable[[Sweep], None] | None = None
    watcher: Callable[[Progress], None] = lambda progress: None
    points: dict[str, Progress] = field(default_factory=dict)
    new_samples: int = 0
    _begun: float = 0.0

    def run(self) -> Counter[str]:
        """Run the rest of the study; returns how many points ended in each state.

        Raises:
            StorageError: if results cannot be written.
        """
        self._begun = perf_counter()
        self.evaluate(self.plan.jobs(self.plan.study.points()))
        if self.plan.study.search is not None:
            assert self.search is not None, "a study with a search needs what makes its points"
            self.search(self)
        # Completed results, and the manifest, must still exist at the end.
        for progress in self.points.values():
            if progress.state == COMPLETE and not read_point(progress.job.path).is_complete(progress.job.settings):
                self._fail(progress)
        self.plan.write_manifest()
        return Counter(progress.state for progress in self.points.values())

    def evaluate(self, jobs: Iterable[Job]) -> list[PointRecord]:
        """Complete ``jobs``; returns what is on disk of each afterwards."""
        jobs = list(jobs)
        for job in jobs:
            self.points[job.digest] = Progress.of(job)
        self.backend.run([job for job in jobs if self.points[job.digest].state != COMPLETE], self)
        return [read_point(job.path) for job in jobs]

    @property
    def seconds_left(self) -> float | None:
        """Remaining time of all known points at this run's speed; None before its first sample."""
        if not self.new_samples:
            return None
        left = sum(one.job.samples - one.done for one in self.points.values() if not one.has_ended)
        return left * (perf_counter() - self._begun) / self.new_samples

    def _fail(self, progress: Progress, error: str = "") -> None:
        progress.state, progress.error = FAILED, error or f"its results are no longer in {progress.job.path}"

    # What the back end tells

    def started(self, job: Job) -> None:
        """A point is being worked on."""
        progress = self.points[job.digest]
        progress.state, progress.earlier_seconds, progress.told = RUNNING, progress.seconds, 0
        self.watcher(progress)

    def sample(self, job: Job, line: Line, done: int) -> None:
        """A sample is on disk, the point's ``done``-th (not reported by workers on other machines)."""
        progress = self.points[job.digest]
        self.new_samples += 1
        progress.told += 1
        progress.done = done
        progress.new_tokens += line["stats"].get("new_tokens", 0)
        progress.nfe += line["stats"].get("nfe", 0)
        progress.seconds = progress.earlier_seconds + line["elapsed"]
        self.watcher(progress)

    def ended(self, job: Job, outcome: Outcome) -> None:
        """A point is complete, or has failed."""
        # A worker in another process reports its samples only now.
        self.new_samples += outcome.decoded - self.points[job.digest].told
        progress = self.points[job.digest] = Progress.of(job)
        if outcome.error or progress.state != COMPLETE:
            self._fail(progress, outcome.error)
        self.watcher(progress)


class LocalBackend(Evaluator):
    """One after the other in this process; each model is loaded once for all its points."""

    def run(self, jobs: Sequence[Job], sweep: Sweep) -> None:
        """Evaluate ``jobs``; a failed one does not stop the others.

        Raises:
            StorageError: if results cannot be written.
        """
        for job in jobs:
            sweep.started(job)
            sweep.ended(job, self.complete(job, sweep.sample))


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
        # A point may kill its worker; retries are decided here.
        self._task = ray.remote(num_gpus=num_gpus, num_cpus=num_cpus, max_retries=0)(_work)

    def run(self, jobs: Sequence[Job], sweep: Sweep) -> None:
        """As :meth:`LocalBackend.run`."""
        ray = self._ray
        if not jobs:
            return
        # This file shows a worker that it sees the same folder.
        token = jobs[0].path.parent / f".seen-{secrets.token_hex(8)}"
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()
        attempts: Counter[str] = Counter()
        running: dict[Any, Job] = {}

        def submit(job: Job) -> None:
            attempts[job.digest] += 1
            running[self._task.remote(job, token)] = job
            sweep.started(job)

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
                sweep.ended(job, outcome)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)
            token.unlink(missing_ok=True)

    def close(self) -> None:
        """Release the workers."""
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
    return _of_this_worker.complete(job)


def _died(job: Job, error: Exception) -> Outcome:
    """Record that a point kills its worker."""
    text = f"its Ray worker died {ATTEMPTS} times ({type(error).__name__}: {first_line(error)})"
    with PointStore(job.path) as store:
        store.begin(job.definition, job.label)
        store.append("failure", error=text, traceback="")
    return Outcome(0, text)
