"""The harness's model class ``s2d2``: ``lm_eval --model s2d2 --model_args pretrained=…,decoder=…``.

Chat templates, few-shot examples, ``--limit``, filters and result files are the harness's own (the class extends its
``hf`` model). New here: requests go to the decoding engine all at once instead of in padded batches, stop strings end
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

from s2d2_lmeval.decoding.options.config import SYNONYMS, DecodingConfig
from s2d2_lmeval.errors import ConfigError
from s2d2_lmeval.families.facts import NO_MASK
from s2d2_lmeval.harness import caching, caller, identity, loading, report, saving, secrets, templates
from s2d2_lmeval.harness import filters as _filters  # noqa: F401  (importing it registers s2d2_stats)
from s2d2_lmeval.harness.arguments import check_text, rows_in_flight, sort_arguments
from s2d2_lmeval.harness.custom import CustomFunction
from s2d2_lmeval.harness.generation_arguments import BUDGET_NAMES, token_budget
from s2d2_lmeval.harness.prompts import logger, spelled_out
from s2d2_lmeval.harness.responses import ResponseStore
from s2d2_lmeval.harness.run import GenerationRun
from s2d2_lmeval.harness.scoring import ScoringRun, rolling


@register_model("s2d2")
class S2D2LM(HFLM):
    """Block-diffusion language models in the harness.

    ``--model_args`` may hold decoding options (defaults for every task; a task's ``generation_kwargs`` and
    ``--gen_kwargs`` override them), options of :func:`s2d2_lmeval.load`, and the options of the harness's ``hf``
    model. ``--batch_size`` is the number of requests in flight; ``max_batch`` in ``--model_args`` wins over it.

    Attributes:
        engine: the :class:`~s2d2_lmeval.model.BlockDiffusionModel`; None for a class of the user's own of no known
        family. decoding: the configuration in force where a task says nothing; None where a function of the user's
        decodes. custom: that function. totals: what this process has decoded and scored. configurations: what each set
        of generation arguments came to.

    Raises:
        ConfigError: an option that is unknown, ill-typed or contradictory.
        CheckpointError: a checkpoint or tokenizer that cannot be used.
    """

    think_end_token: str | int | None
    cache_hook: Any

    def __init__(
        self,
        pretrained: Any = None,
        *,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: Any = None,
        dtype: Any = "auto",
        revision: str | None = None,
        **options: Any,
    ) -> None:
        saving.refuse_to_lose_results()
        check_text("dtype", dtype)
        check_text("revision", revision)
        self.arguments = arguments = sort_arguments(pretrained, options)
        accelerator = loading.join_processes()
        where = loading.choose_device(device, accelerator)
        rows = arguments.rows or rows_in_flight(batch_size, max_batch_size)
        loaded = loading.load_model(arguments, rows=rows, dtype=dtype, device=where, revision=revision)
        tokenizer = loading.load_tokenizer(arguments, loaded.source, revision)
        if loaded.engine is not None:
            loading.check_mask(tokenizer, loaded.engine.facts, arguments.loading.get("mask_token_id"))
        harness = {name: arguments.harness[name] for name in arguments.harness.keys() - {"tokenizer", "special_tokens"}}
        self.special_tokens = arguments.harness.get("special_tokens") or "parse"
        # The harness warns that it will not arrange processes for a model it did not load; that is done here.
        silent = ("model kwarg is not of type `str`", "already-initialized model")
        with loading.without_messages("lm_eval.models.huggingface", *silent):
            super().__init__(
                pretrained=loaded.hf_model,
                tokenizer=tokenizer,
                batch_size=1 if loaded.engine is None else loaded.engine.max_batch,
                **harness,
            )
        # The harness's class takes a ready model for a nameless one in a single process.
        self.pretrained, self.revision, self.peft = loaded.source, revision or "main", arguments.peft
        if accelerator is not None:
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        own = self.tokenizer.get_added_vocab().get(self.think_end_token)
        if own is not None and self.think_end_token not in self.tok_decode([own]):
            raise ConfigError(
                f"think_end_token={self.think_end_token} is a special token here, which leaves no trace in an answer's "
                f"text: give its id, think_end_token={own}."
            )
        self.engine = loaded.engine
        self.custom: CustomFunction | None = arguments.custom
        self.truncates = arguments.harness.get("truncation") is not False
        self._mask_text = self._spell_mask()
        self.store: ResponseStore | None = None
        self.seed = caller.seed()
        self.decoding = self.configuration({})
        self._check_max_length()
        self.told: set[Any] = set()
        self._evaluations = caller.Evaluations()
        self.reset_totals()
        if self.rank == 0:
            if secrets.holds_token(options):
                logger.warning("%s", secrets.ADVICE)
            name = self.custom.name if self.custom else None
            logger.info("%s", report.header(loaded.source, self.engine, self.decoding, name, rows))

    def decode_with(self, options: Mapping[str, Any]) -> None:
        """Take ``options`` in place of the decoding options of ``--model_args``, and start counting anew.

        :raises ConfigError: for options that are wrong, or do not fit this checkpoint; nothing is changed then.
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

    def configuration(self, asked: Mapping[str, Any]) -> DecodingConfig | None:
        """The options ``asked`` for by a task, over those of ``--model_args``, over what is published for the model.

        None where no decoder of this package decodes.
        """
        if self.custom is not None or self.engine is None:
            return None
        given = dict(self.arguments.decoding)
        if self.seed is not None and given.get("seed") is None:
            given["seed"] = self.seed
        config = DecodingConfig.from_options(asked, self.engine.facts, of_run=given)
        if any(SYNONYMS.get(name, name) == "stop_token_ids" for name in (*given, *asked)):
            return config
        return config.replace(stop_token_ids=tuple(dict.fromkeys((*config.stop_token_ids, *self.end_of_text_ids))))

    def _join_evaluation(self) -> None:
        """Take what belongs to the evaluation that we are in: its seed, no other one's response cache or counts."""
        if self._evaluations.entered():
            self.reset_totals()
        if self.seed != caller.seed():
            self.seed = caller.seed()
            self.decoding = self.configuration({})
        if caller.uses_no_cache() and self.cache_hook.dbdict is not None:
            self.cache_hook, self.store = CacheHook(None), None

    def _spell_mask(self) -> list[int]:
        """How the mask token's string is written in prompts: as text, or as the token, which is refused."""
        if self.engine is None or self.engine.facts.mask_token_id == NO_MASK:
            return []
        mask = self.engine.facts.mask_token_id
        return [mask] if self.special_tokens == "refuse" else spelled_out(self.tokenizer, mask)

    def as_text(self, ids: list[int]) -> list[int]:
        """``ids`` of a text in which the string of the mask token is text like any other."""
        if not self._mask_text:
            return ids
        assert self.engine is not None
        mask = self.engine.facts.mask_token_id
        return (
            [one for token in ids for one in (self._mask_text if token == mask else (token,))] if mask in ids else ids
        )

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """As the harness's, see :meth:`as_text`."""
        ids = self.as_text(super().tok_encode(string, add_special_tokens, **kwargs))
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As the harness's, under limits of time and memory.

        Raises:
            CheckpointError: a template that fails, or has no end.
            ConfigError: special strings are to be text, and a template is made of them.
        """
        if self.special_tokens == "text":
            raise ConfigError(
                "special_tokens=text would take the chat template's own special tokens for text: leave one of them out."
            )
        with templates.limited():
            return str(super().apply_chat_template(chat_history, add_generation_prompt))

    def _check_max_length(self) -> None:
        limit = self.engine.max_context if self.engine is not None else None
        if self._max_length is not None and limit is not None and not 1 < self._max_length <= limit:
            raise ConfigError(f"max_length={self._max_length}: this model takes 2 to {limit} positions.")

    @property
    def end_of_text_ids(self) -> tuple[int, ...]:
        """The tokenizer's end-of-text token, if it has one."""
        return () if self.eot_token_id is None else (self.eot_token_id,)

    @property
    def max_length(self) -> int:
        """Positions that a request may take, prompt and answer together."""
        if self._max_length or self.engine is None:
            return super().max_length
        return self.engine.max_context

    @property
    def max_gen_toks(self) -> int:
        """New tokens at most, for requests that do not say."""
        if self.decoding is not None:
            return self.decoding.max_new_tokens
        given = [self.arguments.decoding[name] for name in BUDGET_NAMES if name in self.arguments.decoding]
        return token_budget(given[0]) if given else 256

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer every request (an Instance whose ``args`` are the prompt and its generation arguments), in order.

        Returns:
            A :class:`~s2d2_lmeval.harness.responses.TracedResponse` for each.

        Raises:
            ConfigError: generation arguments that have no meaning here.
            RequestError: a prompt that cannot be decoded; found out before anything is decoded.
        """
        self._join_evaluation()
        caching.refuse_stale(requests)
        answers = GenerationRun(self, requests, quiet=disable_tqdm or self.rank != 0).answer()
        self._exchange_totals()
        return answers

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score (text, context ids, continuation ids) triples exactly, in the model's autoregressive mode."""
        self._join_evaluation()
        scores = ScoringRun(self, requests, quiet=disable_tqdm or self.rank != 0).answer()
        self._exchange_totals()
        return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text (an Instance whose only argument it is), in windows of the whole
        context.
        """
        windows = rolling(self, [request.args[0] for request in requests])
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens([(None, *pair) for _, pair in windows], disable_tqdm)
        for (owner, _), (score, _) in zip(windows, scores, strict=True):
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
            self.store = caching.separate(cache_hook, identity.of_plain(self._facts_of_run()))

    def _facts_of_run(self) -> dict[str, Any]:
        """Everything that a response depends on besides its request. How many rows are in flight is not part of it."""
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

    def reset_totals(self) -> None:
        """Start counting anew, as every evaluation does."""
        self.totals = report.Totals()
        self._totals_of_all: list[report.Totals] | None = None
        self.configurations: dict[str, dict[str, Any]] = {}

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
        """The harness's information on the model, and under ``s2d2`` what was run, how, on what, and what it cost."""
        several = self._totals_of_all or [self.totals]
        engine, decoding = self.engine, self.decoding
        about = {
            **report.merge(several).summary(),
            "processes": self.world_size,
            "processes_counted": len(several),
            "cached_responses": caching.hits(self.cache_hook),
            "rows_in_flight": 1 if self.custom is not None or engine is None else engine.max_batch,
            "decoder": self.custom.name if self.custom is not None else decoding.decoder if decoding else None,
            "preset": decoding.preset if decoding is not None else None,
            "seed": decoding.seed if decoding is not None else self.seed or 0,
            "promise": decoding.promise if decoding is not None else None,
            "caution": decoding.caution if decoding is not None else None,
            "family": engine.facts.family if engine is not None else None,
            "configurations": list(self.configurations.values()),
            "environment": report.environment(
                self.device, getattr(self._model, "dtype", None), engine.attention if engine is not None else None
            ),
        }
        # The harness has written the arguments down by now, once for the model and once for every task.
        if (results := caller.results()) is not None:
            results["configs"] = secrets.redacted(results.get("configs", {}))
        given = {"model_args": secrets.redacted(caller.model_args())} if caller.model_args() else {}
        return {**super().get_model_info(), **given, "s2d2": about}
