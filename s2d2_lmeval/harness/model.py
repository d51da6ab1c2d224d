"""The harness's model class ``s2d2``: ``lm_eval --model s2d2 --model_args pretrained=…,decoder=…``.

Chat templates, few-shot examples, ``--limit``, filters and result files are the harness's own (the class extends its
``hf`` model). New here: all requests go to the decoding engine at once instead of in padded batches, stop strings end
decoding inside a block, and every response carries its statistics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.harness import filters, identity, report, responses, upstream
from s2d2_lmeval.harness.base import HarnessModel
from s2d2_lmeval.harness.prompts import logger
from s2d2_lmeval.harness.run import GenerationRun
from s2d2_lmeval.harness.scoring import rolling, scores


@register_model("s2d2")
class S2D2LM(HarnessModel):
    """Block-diffusion language models in the harness.

    ``--model_args`` may hold decoding options (defaults for every task; a task's ``generation_kwargs`` and
    ``--gen_kwargs`` override them), options of :func:`s2d2_lmeval.load`, and the options of the harness's ``hf``
    model. ``--batch_size`` is the number of requests in flight; ``max_batch`` in ``--model_args`` overrides it.

    Attributes:
        engine: the :class:`~s2d2_lmeval.model.BlockDiffusionModel`; None for a class of the user's own of no known
        family. decoding: the configuration in force where a task says nothing; None where a function of the user's
        decodes. custom: that function. totals: what this process has decoded and scored. configurations: what each set
        of generation arguments came to.

    Raises:
        ConfigError: an option that is unknown, ill-typed or contradictory.
        CheckpointError: a checkpoint or tokenizer that cannot be used.
    """

    def decode_with(self, options: Mapping[str, Any]) -> None:
        """Replace the decoding options of ``--model_args`` by ``options``, and reset the counts.

        Raises:
            ConfigError: options that are wrong, or do not fit this checkpoint; nothing is changed then.
        """
        before = self.arguments
        self.arguments = dataclasses.replace(before, decoding=dict(options))
        try:
            self.decoding = self.configuration({})
        except ConfigError:
            self.arguments = before
            raise
        self.told.clear()
        self.reset_totals()

    def _join_evaluation(self) -> None:
        """Adopt the current evaluation: its seed, and no response cache or counts of another one."""
        if self._evaluations.entered():
            self.reset_totals()
        if self.seed != upstream.seed():
            self.seed = upstream.seed()
            self.decoding = self.configuration({})
        # A model object may keep a response cache from an evaluation before.
        if upstream.variables().get("use_cache", "unknown") is None and self.cache_hook.dbdict is not None:
            self.cache_hook, self.store = CacheHook(None), None

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer every request (an Instance whose ``args`` are the prompt and its generation arguments), in order.

        Returns:
            A :class:`~s2d2_lmeval.harness.responses.TracedResponse` for each.

        Raises:
            ConfigError: generation arguments that do not apply here.
            RequestError: a prompt that cannot be decoded; raised before anything is decoded.
        """
        self._join_evaluation()
        filters.refuse_unscored(upstream.tasks())
        responses.refuse_stale(requests)
        answers = GenerationRun(self, requests, quiet=disable_tqdm or self.rank != 0).answer()
        self._exchange_totals()
        return answers

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score (text, context ids, continuation ids) triples exactly, in the model's autoregressive mode."""
        self._join_evaluation()
        found = scores(self, requests, quiet=disable_tqdm or self.rank != 0)
        self._exchange_totals()
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text (an Instance's only argument), in windows of the full context."""
        windows = rolling(self, [request.args[0] for request in requests])
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens([(None, *pair) for _, pair in windows], disable_tqdm)
        for (owner, _), (score, _) in zip(windows, found, strict=True):
            totals[owner] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take the harness's response cache (``--use_cache``), kept apart from runs with another configuration."""
        # The harness does this at the start of an evaluation, which may find every response in the cache.
        self.reset_totals()
        super().set_cache_hook(cache_hook)
        self._join_evaluation()
        if cache_hook.dbdict is not None:
            self.store = responses.separate(cache_hook, identity.of_plain(self._facts_of_run()))

    def _facts_of_run(self) -> dict[str, Any]:
        """Everything that a response depends on besides its request, but not the number of rows in flight."""
        arguments, decoding = self.arguments, self.decoding
        loading = {name: value for name, value in arguments.loading.items() if name not in identity.HUB_ONLY}
        return {
            "code": identity.code_version(),
            "checkpoint": [self.pretrained, self.revision, self.peft],
            "weights": identity.of_weights([self._model] if self.engine is None else self.engine.networks),
            "tokenizer": [identity.of_tokenizer(self.tokenizer), self.add_bos_token, self.custom_prefix_token_id],
            "dtype": str(self._model.dtype),
            "attention": self.engine.attention if self.engine is not None else None,
            "loading": {name: str(value) for name, value in loading.items()},
            # What was given counts too: it stays above the preset that a task may name.
            "decoding": [
                *(
                    identity.with_files(options)
                    for options in (arguments.decoding, decoding.to_dict() if decoding else {})
                ),
                self.seed,
            ],
            "custom": [self.custom.name, identity.of_function(self.custom.function)] if self.custom else None,
            "context": [self.max_length, self.truncates, self.special_tokens],
            "thinking": [self.think_end_token, self.chat_template_args],
        }

    def gather_object(self, obj: Any, dst: int = 0) -> Any:
        """As the harness's, with every process's totals along.

        ``evaluate`` calls this at the end of a run on all processes equally often; generation itself may be skipped on
        a process whose responses are all cached, so totals cannot be exchanged there.
        """
        gathered = super().gather_object((obj, self.totals), dst)
        if gathered is None:
            return None
        self._totals_of_all = [totals for _, totals in gathered]
        return [theirs for theirs, _ in gathered]

    def _exchange_totals(self) -> None:
        """For releases of the harness before 0.4.12, which gather results without asking the model.

        With a response cache a process may have nothing left to ask and never come here: then its totals stay its own.
        """
        if self.world_size > 1 and not hasattr(HFLM, "gather_object") and self.cache_hook.dbdict is None:
            gathered: list[Any] = [None] * self.world_size
            torch.distributed.all_gather_object(gathered, self.totals)
            self._totals_of_all = gathered

    def get_model_info(self) -> dict[str, Any]:
        """The harness's information on the model, with the run's settings, environment and costs under ``s2d2``."""
        several = self._totals_of_all or [self.totals]
        decoded = report.figures(report.merge(several))
        if decoded and self.rank == 0 and upstream.variables():
            logger.info("%s", decoded)
        engine, decoding = self.engine, self.decoding
        in_force = report.in_common(self.configurations.values() or [report.settings(decoding)] if decoding else [])
        if decoding is None:
            in_force |= {"decoder": self.custom.name if self.custom else None, "seed": self.seed or 0}
        about = {
            **report.merge(several).summary(),
            "processes": self.world_size,
            "processes_counted": len(several),
            "ranks": engine.ranks.size if engine is not None else 1,
            "cached_responses": responses.hits(self.cache_hook),
            "rows_in_flight": 1 if self.custom is not None or engine is None else engine.max_batch,
            **in_force,
            "family": engine.facts.family if engine is not None else None,
            "configurations": list(self.configurations.values()),
            "environment": report.environment(
                self.device, getattr(self._model, "dtype", None), engine.attention if engine is not None else None
            ),
        }
        upstream.redact_results()
        responses.tell_samples(upstream.variables().get("results"))
        model_args = upstream.variables().get("model_args")
        given = {"model_args": upstream.redacted(model_args)} if model_args else {}
        return {**super().get_model_info(), **given, "s2d2": about}
