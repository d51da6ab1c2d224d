"""Evaluate one point with the harness: finished samples come from disk, the others from the engine."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from s2d2_lmeval.errors import S2D2Error, StudyError
from s2d2_lmeval.studies.planning import Job, quiet
from s2d2_lmeval.studies.store import Line, PointStore, StorageError, is_number
from s2d2_lmeval.studies.tasks import how_prompts_are_built, load_tasks, prepare, task_manager

if TYPE_CHECKING:
    from s2d2_lmeval.harness.model import S2D2LM


class Outcome(NamedTuple):
    """How a point ended: ``error`` is empty where it is complete. ``decoded`` samples were new in this run."""

    decoded: int
    error: str


class Evaluator:
    """Evaluates points one after the other, and keeps a model loaded as long as points ask for it."""

    def __init__(self) -> None:
        self._loaded: tuple[Any, S2D2LM] | None = None

    def complete(self, job: Job, on_sample: Callable[[Job, Line, int], None] | None = None) -> Outcome:
        """Complete a point, or record why it cannot be.

        Args:
            on_sample: called for every added sample, with the point's number of samples.

        Raises:
            StorageError: if nothing can be recorded.
        """
        try:
            opened = PointStore(job.path, on_sample and partial(on_sample, job))
        except StorageError:
            raise
        except StudyError as refused:  # another process has it, or it is another point's
            return Outcome(0, str(refused))
        with opened as store:
            try:
                if not store.record.is_complete(job.settings):
                    store.begin(job.definition, job.label)
                    self._run(job, store)
            except StorageError:
                raise
            except Exception as failure:
                error = str(failure).strip() or type(failure).__name__
                error = error if isinstance(failure, S2D2Error) else f"{type(failure).__name__}: {error}"
                store.append("failure", error=error, traceback=traceback.format_exc()[-4000:])
                return Outcome(store.added, error)
        return Outcome(store.added, "")

    def _run(self, job: Job, store: PointStore) -> None:
        from s2d2_lmeval.harness.report import environment

        lm = self._model(job)
        engine = lm.engine
        assert engine is not None
        lm.decode_with(job.decoding_options)
        engine.max_batch = job.batch_size
        halvings = engine.trace.batch_halvings
        store.begin_segment(
            environment=environment(lm.device, engine.dtype, engine.attention),
            rows=engine.max_batch,
            batch_size=job.batch_size,
            decoding=lm.decoding.to_dict() if lm.decoding is not None else None,
            begun=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        )
        if len(store.record.samples) < job.samples:
            _warm_up(lm)
        store.token_text = lambda token: str(lm.tok_decode([token], skip_special_tokens=False))
        lm.store = store
        try:
            results = _evaluate(lm, job)
        finally:
            lm.store = None
            if engine.trace.batch_halvings > halvings:
                count = engine.trace.batch_halvings - halvings
                store.append("memory", halvings=count, rows=engine.max_batch)
            engine.trace.reset()
        scores = _scores(results, job.task.task)
        store.append("result", settings=job.settings, samples=list(store.asked), **scores)

    def _model(self, job: Job) -> S2D2LM:
        """The point's model: the loaded one, or a new one in its place."""
        wanted = (job.identity, tuple(sorted((key, str(value)) for key, value in job.model_args.items())))
        if self._loaded is None or self._loaded[0] != wanted:
            self.close()
            with quiet():
                from s2d2_lmeval.harness.model import S2D2LM

                self._loaded = (wanted, S2D2LM(**job.model_args, batch_size=job.batch_size))
        return self._loaded[1]

    def close(self) -> None:
        """Release the model."""
        if self._loaded is None:
            return
        import gc

        import torch

        self._loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _warm_up(lm: S2D2LM) -> None:
    """Decode a little, so that the first sample's time does not include one-time set-up."""
    assert lm.engine is not None
    assert lm.decoding is not None
    length = 2 * max(lm.decoding.block_length, 8)
    prompt = list(lm.tokenizer("Question:")["input_ids"])
    lm.engine.generate([prompt] * lm.engine.max_batch, lm.decoding, max_new_tokens=length)


def _evaluate(lm: S2D2LM, job: Job) -> dict[str, Any]:
    """The harness's own results for the task.

    Like ``simple_evaluate``, but without the report on the system, which takes longer than many a point.
    """
    from lm_eval.evaluator import evaluate

    settings = job.task
    with quiet():
        manager = task_manager(job.data_dir, job.include_path, [settings.task])
        task = load_tasks(manager, settings.task)[settings.task]
        prepare(task, settings)
        results = evaluate(
            lm=lm,
            task_dict={settings.task: task},
            confirm_run_unsafe_code=job.unsafe_code,
            bootstrap_iters=0,
            log_samples=True,
            **how_prompts_are_built(settings),
        )
    assert results is not None
    return dict(results)


def scores_of_documents(results: Mapping[str, Any], task: str) -> dict[str, list[list[Any]]]:
    """``metric,filter`` -> [document, value] of every document."""
    documents: dict[str, list[list[Any]]] = {}
    for sample in results["samples"][task]:
        for metric in sample["metrics"]:
            if is_number(value := sample.get(metric)):
                documents.setdefault(f"{metric},{sample['filter']}", []).append([sample["doc_id"], float(value)])
    return documents


def _scores(results: Mapping[str, Any], task: str) -> dict[str, Any]:
    """The task's metrics, and every document's, by ``metric,filter``."""
    config = results["configs"][task]
    return {
        "metrics": {name: float(value) for name, value in results["results"][task].items() if is_number(value)},
        "documents": scores_of_documents(results, task),
        "metric_list": [entry["metric"] for entry in config.get("metric_list", []) if isinstance(entry["metric"], str)],
        "filters": list(dict.fromkeys(sample["filter"] for sample in results["samples"][task])),
        "task_hash": results.get("task_hashes", {}).get(task),
        "version": results.get("versions", {}).get(task),
        "generation_kwargs": config.get("generation_kwargs"),
    }
