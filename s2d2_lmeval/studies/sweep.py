"""Runs a study: every point that is not complete, then the trials of its search."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from time import perf_counter

from s2d2_lmeval.studies.backends import Backend, Observer
from s2d2_lmeval.studies.evaluation import Outcome
from s2d2_lmeval.studies.planning import Job, Plan
from s2d2_lmeval.studies.store import Line, PointRecord, read_point

WAITING, RUNNING, COMPLETE, FAILED = "waiting", "running", "complete", "failed"


@dataclass
class Progress:
    """How far a point is: samples on disk, of how many, and what they add up to."""

    job: Job
    done: int
    new_tokens: float = 0.0
    nfe: float = 0.0
    seconds: float = 0.0
    state: str = WAITING
    error: str = ""
    unreadable: int = 0

    @classmethod
    def of(cls, job: Job) -> Progress:
        """What is on disk."""
        record = read_point(job.path)
        finished = record.is_complete(job.settings)
        record = record.of_the_result() if finished else record
        return cls(
            job,
            done=min(len(record.samples), job.samples),
            new_tokens=record.new_tokens,
            nfe=sum(sample["stats"].get("nfe", 0) for sample in record.samples.values()),
            seconds=record.decoding_seconds,
            state=COMPLETE if finished else WAITING,
            unreadable=len(record.unreadable),
        )

    @property
    def tokens_per_forward(self) -> float:
        """New tokens over forwards, all samples."""
        return self.new_tokens / self.nfe if self.nfe else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens over seconds of decoding, all samples."""
        return self.new_tokens / self.seconds if self.seconds else 0.0


@dataclass
class Sweep(Observer):
    """The points of a study and how far each is; ``watcher`` is told whenever that changes. Where the study has a
    search, ``search`` makes its points (:func:`s2d2_lmeval.studies.search.search`).
    """

    plan: Plan
    backend: Backend
    search: Callable[[Sweep], None] | None = None
    points: dict[str, Progress] = field(default_factory=dict)
    watcher: Observer | None = None
    new_samples: int = 0
    _begun: float = 0.0
    _seconds_before: dict[str, float] = field(default_factory=dict)
    _told: Counter[str] = field(default_factory=Counter)

    def run(self) -> Counter[str]:
        """Run what is left of the study; how many points ended how.

        :raises StorageError: when results cannot be written.
        """
        self._begun = perf_counter()
        self.evaluate(self.plan.jobs(self.plan.study.points()))
        if self.plan.study.search is not None:
            assert self.search is not None, "a study with a search needs what makes its points"
            self.search(self)
        self._look_again()
        return Counter(progress.state for progress in self.points.values())

    def _look_again(self) -> None:
        """What was complete must still be there at the end, and what says what it is of."""
        for digest, progress in self.points.items():
            if progress.state == COMPLETE and not read_point(progress.job.path).is_complete(progress.job.settings):
                lost = f"its results are no longer in {progress.job.path}"
                self.points[digest] = replace(progress, state=FAILED, error=lost)
        self.plan.write_manifest()

    def evaluate(self, jobs: Iterable[Job]) -> list[PointRecord]:
        """Complete ``jobs``; what is on disk of each afterwards."""
        jobs = list(jobs)
        for job in jobs:
            self.points[job.digest] = Progress.of(job)
        left = [job for job in jobs if self.points[job.digest].state != COMPLETE]
        self.backend.run(left, self)
        return [read_point(job.path) for job in jobs]

    @property
    def seconds_left(self) -> float | None:
        """Of all points that are known, at the pace of this run; None before its first sample."""
        if not self.new_samples:
            return None
        left = sum(one.job.samples - one.done for one in self.points.values() if one.state in (WAITING, RUNNING))
        return left * (perf_counter() - self._begun) / self.new_samples

    # What the back end tells

    def started(self, job: Job) -> None:
        """See :class:`~s2d2_lmeval.studies.backends.Observer`."""
        progress = self.points[job.digest]
        progress.state = RUNNING
        self._seconds_before[job.digest] = progress.seconds
        self._told[job.digest] = 0
        if self.watcher is not None:
            self.watcher.started(job)

    def sample(self, job: Job, line: Line, done: int) -> None:
        """See :class:`~s2d2_lmeval.studies.backends.Observer`."""
        progress = self.points[job.digest]
        self.new_samples += 1
        self._told[job.digest] += 1
        progress.done = done
        progress.new_tokens += line["stats"].get("new_tokens", 0)
        progress.nfe += line["stats"].get("nfe", 0)
        progress.seconds = self._seconds_before[job.digest] + line["elapsed"]
        if self.watcher is not None:
            self.watcher.sample(job, line, done)

    def ended(self, job: Job, outcome: Outcome) -> None:
        """See :class:`~s2d2_lmeval.studies.backends.Observer`."""
        progress = self.points[job.digest] = Progress.of(job)
        # A worker in another process tells of its samples only now.
        self.new_samples += outcome.decoded - self._told[job.digest]
        if outcome.error or progress.state != COMPLETE:
            progress.state, progress.error = FAILED, outcome.error or f"its results are no longer in {job.path}"
        if self.watcher is not None:
            self.watcher.ended(job, outcome)
