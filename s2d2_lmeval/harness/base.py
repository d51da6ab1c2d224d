"""A loaded model in the form of the harness's ``hf`` class, the basis of all request types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_eval.models.huggingface import HFLM

from s2d2_lmeval import templates
from s2d2_lmeval.decoding.options.config import SYNONYMS, DecodingConfig
from s2d2_lmeval.errors import ConfigError, without_messages
from s2d2_lmeval.families.facts import NO_MASK
from s2d2_lmeval.harness import loading, report, upstream
from s2d2_lmeval.harness.arguments import OF_LOADING, check, rows_in_flight, sort_arguments, token_budget
from s2d2_lmeval.harness.custom import BUDGET_NAMES, CustomFunction
from s2d2_lmeval.harness.prompts import logger, spelled_out
from s2d2_lmeval.harness.responses import ResponseStore


class HarnessModel(HFLM):
    """The model and tokenizer that ``--model_args`` name, and how it decodes; see
    :class:`~s2d2_lmeval.harness.model.S2D2LM`.
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
        upstream.refuse_to_lose_results()
        dtype = check("dtype", "auto" if dtype is None else dtype, OF_LOADING["dtype"])
        check("revision", revision, OF_LOADING["revision"])
        self.arguments = arguments = sort_arguments(pretrained, options)
        accelerator = loading.join_processes(arguments)
        where = loading.choose_device(device, accelerator)
        rows = arguments.rows or rows_in_flight(batch_size, max_batch_size)
        loaded = loading.load_model(arguments, rows=rows, dtype=dtype, device=where, revision=revision)
        tokenizer = loading.load_tokenizer(arguments, loaded.source, revision)
        if loaded.engine is not None:
            loading.check_mask(tokenizer, loaded.engine.facts, arguments.loading.get("mask_token_id"))
            loading.check_shift(tokenizer, loaded.engine, arguments.loading.get("probe"))
        harness = {name: arguments.harness[name] for name in arguments.harness.keys() - {"tokenizer", "special_tokens"}}
        self.special_tokens = arguments.harness.get("special_tokens") or "parse"
        # The harness warns that it does not distribute a model that it did not load; that is done here.
        silent = ("model kwarg is not of type `str`", "already-initialized model")
        with without_messages("lm_eval.models.huggingface", *silent):
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
        self.engine = loaded.engine
        self._check()
        self.custom: CustomFunction | None = arguments.custom
        self.truncates = arguments.harness.get("truncation") is not False
        self._mask_text = self._spell_mask()
        self.store: ResponseStore | None = None
        self.seed = upstream.seed()
        self.decoding = self.configuration({})
        self.told: set[Any] = set()
        self._evaluations = upstream.Evaluations()
        self.reset_totals()
        if self.rank == 0:
            if upstream.holds_token(options):
                logger.warning("%s", upstream.ADVICE)
            name = self.custom.name if self.custom else None
            logger.info("%s", report.header(loaded.source, self.engine, self.decoding, name, rows))

    def _check(self) -> None:
        """Refuse arguments that only the tokenizer and the model show to be wrong."""
        own = self.tokenizer.get_added_vocab().get(self.think_end_token)
        if own is not None and self.think_end_token not in self.tok_decode([own]):
            raise ConfigError(
                f"think_end_token={self.think_end_token} is a special token here, which leaves no trace in an answer's "
                f"text: give its id, think_end_token={own}."
            )
        limit = self.engine.max_context if self.engine is not None else None
        if self._max_length is not None and limit is not None and not 1 < self._max_length <= limit:
            raise ConfigError(f"max_length={self._max_length}: this model takes 2 to {limit} positions.")

    def configuration(self, asked: Mapping[str, Any]) -> DecodingConfig | None:
        """The options ``asked`` for by a task, over those of ``--model_args``, over the model's published setting.

        None if no decoder of this package is used.
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

    def _spell_mask(self) -> list[int]:
        """How the mask token's string is written in prompts: as text, or as the token, which is refused."""
        if self.engine is None or self.engine.facts.mask_token_id == NO_MASK:
            return []
        mask = self.engine.facts.mask_token_id
        return [mask] if self.special_tokens == "refuse" else spelled_out(self.tokenizer, mask)

    def as_text(self, ids: list[int]) -> list[int]:
        """``ids`` of a text in which the mask token's string is ordinary text."""
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
            CheckpointError: a template that fails or does not terminate.
            ConfigError: special strings are to be text, and a template is made of them.
        """
        if self.special_tokens == "text":
            raise ConfigError(
                "special_tokens=text would take the chat template's own special tokens for text: leave one of them out."
            )
        with templates.limited():
            return str(super().apply_chat_template(chat_history, add_generation_prompt))

    @property
    def end_of_text_ids(self) -> tuple[int, ...]:
        """The tokenizer's end-of-text token, if it has one."""
        return () if self.eot_token_id is None else (self.eot_token_id,)

    @property
    def max_length(self) -> int:
        """Maximum positions of a request, prompt and answer together."""
        if self._max_length or self.engine is None:
            return super().max_length
        return self.engine.max_context

    @property
    def max_gen_toks(self) -> int:
        """The default maximum number of new tokens."""
        if self.decoding is not None:
            return self.decoding.max_new_tokens
        given = [self.arguments.decoding[name] for name in BUDGET_NAMES if name in self.arguments.decoding]
        return token_budget(given[0]) if given else 256

    def reset_totals(self) -> None:
        """Reset the counts, as every evaluation does."""
        self.totals = report.Totals()
        self._totals_of_all: list[report.Totals] | None = None
        self.configurations: dict[str, dict[str, Any]] = {}
