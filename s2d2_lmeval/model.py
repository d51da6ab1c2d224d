"""The Python interface: load a checkpoint, decode prompts, score text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from s2d2_lmeval.decoding.engine import Engine
from s2d2_lmeval.decoding.generation import Generation, Progress, Request
from s2d2_lmeval.decoding.open_run import Arrivals, OpenRun
from s2d2_lmeval.decoding.options.config import DecodingConfig
from s2d2_lmeval.decoding.options.option import converted
from s2d2_lmeval.decoding.options.reading import queries_of
from s2d2_lmeval.decoding.scoring import Pair, Scorer, Tokenwise
from s2d2_lmeval.errors import ConfigError, RequestError, shown
from s2d2_lmeval.families import Facts, adopt, load_checkpoint
from s2d2_lmeval.families.files import HUB_OPTIONS
from s2d2_lmeval.prompts import (
    encode,
    is_text,
    keeping,
    laws_of,
    pairs_of,
    requests_of,
    several,
    tokenizer_of,
    tokens,
    with_stops,
)
from s2d2_lmeval.ranks import Ranks
from s2d2_lmeval.runtime.drafting.dflash import DraftingRunner
from s2d2_lmeval.runtime.drafting.loading import load_drafter
from s2d2_lmeval.runtime.kernels.compiled import compile_experts
from s2d2_lmeval.runtime.memory import RowLimit
from s2d2_lmeval.runtime.probe import ShiftProbe, probe_shift
from s2d2_lmeval.runtime.runner import Runner
from s2d2_lmeval.runtime.trace import Trace
from s2d2_lmeval.streaming import Piece, Stream, decoded, pieces

if TYPE_CHECKING:
    from s2d2_lmeval.picture import Picture


def load(
    source: str | Path | PreTrainedModel,
    *,
    attention: str = "auto",
    max_batch: int | str | RowLimit = 8,
    max_context: int | None = None,
    draft: str | Path | None = None,
    static_shapes: bool | None = None,
    fused: str | bool = "auto",
    exact: bool | int = False,
    compile: bool = False,
    **options: Any,
) -> BlockDiffusionModel:
    """Load a block-diffusion checkpoint, or an autoregressive one as target of a drafter, into native transformers
    classes.

    Args:
        source: a folder, a hub id, ``"toy"`` (the embedded model), or a loaded transformers model of a known family,
            whose weights are then shared.
        attention: ``auto`` or an attention back end.
        max_batch: maximum number of rows in flight; ``auto``: as many as fit in free memory. Fewer on out-of-memory.
        max_context: positions for prompt and answer together; the checkpoint's by default. Can be larger with YaRN;
            required, and at most the window, if layers use sliding-window attention.
        draft: folder or hub id of a DFlash drafter made for this checkpoint, or ``"toy"``; for the decoders ``dflash``
            and ``ddtree``.
        static_shapes: pad narrow forwards to a few shapes, captured as graphs on CUDA; by default if the model is on a
            single CUDA device.
        fused: ``auto``, ``on`` or ``off``: layers as few kernels (:mod:`~s2d2_lmeval.runtime.kernels.fused`), on a CPU
            in few calls (:mod:`~s2d2_lmeval.runtime.kernels.lean`), with the numbers of the modules.
        exact: run every forward in one shape, of 64 queries or so many: then, in bfloat16 and float16 too, an answer
            does not depend on its batch, and ``sliding`` is ``ar``. Slower where fewer queries would do.
        compile: compile the experts of a mixture-of-experts model with ``torch.compile``: seconds to minutes, once.
        options: ``dtype``, ``device``, ``revision``, ``device_map``, ``quantization_config``, ``family``,
            ``draft_adapter`` (a LoRA that only drafts go through, which lets an autoregressive model draft for itself),
            and all others of :func:`s2d2_lmeval.families.load_checkpoint`.

    Raises:
        CheckpointError: if the checkpoint is not what it claims to be.
    """
    if static_shapes is not None:
        static_shapes = converted("static_shapes", "bool", static_shapes)
    part, compiles = queries_of(exact), converted("compile", "bool", compile)
    if isinstance(source, torch.nn.Module):
        if options.pop("draft_adapter", None) is not None:
            raise ConfigError("draft_adapter=… is for a checkpoint that is loaded here; give the model by its path.")
        model, facts = adopt(source, autoregressive=draft is not None, **options)
    else:
        model, facts = load_checkpoint(source, **options)
    if compiles:
        compile_experts(model)
    hub = {name: options[name] for name in HUB_OPTIONS if options.get(name) is not None}
    if draft is None:
        runner = Runner(model, attention, static_shapes, fused, part)
    else:
        kept = {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}
        drafter = load_drafter(draft, model, **kept)
        facts = facts.with_drafter(drafter.shape.facts)
        runner = DraftingRunner(model, drafter, attention, static_shapes, fused, part)
    limits: dict[str, Any] = {"max_batch": max_batch, "max_context": max_context}
    return BlockDiffusionModel(model, facts, attention=attention, runner=runner, hub=hub, **limits)


class BlockDiffusionModel:
    """A loaded checkpoint with its cache, as returned by :func:`load`."""

    engine_class = Engine

    def __init__(
        self,
        hf_model: PreTrainedModel,
        facts: Facts,
        *,
        attention: str = "auto",
        fused: str | bool = "auto",
        max_batch: int | str | RowLimit = 8,
        max_context: int | None = None,
        runner: Runner | None = None,
        hub: Mapping[str, Any] | None = None,
    ) -> None:
        limit = facts.max_context if facts.context_limit is None else facts.context_limit
        if max_context is None and facts.max_context > limit:
            raise ConfigError(
                f"layers of this checkpoint see a window of {limit} positions, and its context has "
                f"{facts.max_context}: decoding here is full attention. Give max_context={limit} or less, "
                "within which that is the same."
            )
        if max_context is not None and (type(max_context) is not int or not 1 <= max_context <= limit):
            raise ConfigError(f"max_context={shown(max_context)}: this checkpoint takes 1 to {limit} positions.")
        self.hf_model = hf_model
        self.facts = facts
        self.max_context = max_context or facts.max_context
        self.trace = Trace()
        self._runner = runner or Runner(hf_model, attention, fused=fused)
        self._hub = dict(hub or {})
        self._tokenizer: Any = None
        self.rows = max_batch if isinstance(max_batch, RowLimit) else RowLimit(max_batch)

    @property
    def max_batch(self) -> int:
        """Maximum number of rows in flight; with ``auto`` memory may allow fewer. Can be set, also to ``auto``."""
        return self.rows.most(self.device)

    @max_batch.setter
    def max_batch(self, rows: int | str) -> None:
        self.rows = RowLimit(rows)

    @property
    def device(self) -> torch.device:
        """Where tokens go in."""
        return self._runner.device

    @property
    def ranks(self) -> Ranks:
        """The processes that hold the model together."""
        return self._runner.ranks

    @property
    def networks(self) -> list[torch.nn.Module]:
        """Everything with weights: the model, and its drafter if there is one."""
        drafter = getattr(self._runner, "drafter", None)
        return [self.hf_model] if drafter is None else [self.hf_model, drafter.model]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.hf_model.dtype

    @property
    def attention(self) -> str:
        """The attention back end in use."""
        return self._runner.attention

    @property
    def fused(self) -> bool:
        """Whether layers run as few kernels."""
        return self._runner.fused

    def config(self, options: DecodingConfig | Mapping[str, Any] | None = None) -> DecodingConfig:
        """``options`` merged over the family's paper setting; a complete configuration is returned unchanged."""
        if isinstance(options, DecodingConfig):
            return options
        return DecodingConfig.from_options({} if options is None else options, self.facts)

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, for prompts that are text; read at the first use. Can be set."""
        if self._tokenizer is None:
            self._tokenizer = tokenizer_of(self.hf_model.name_or_path, self._hub)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __repr__(self) -> str:
        facts = self.facts
        return (
            f"<{type(self).__name__} {self.hf_model.name_or_path or facts.native_class}: {facts.family}, blocks of "
            f"{facts.block_length}, {str(self.dtype).removeprefix('torch.')} on {self.device}>"
        )

    def generate(
        self,
        prompts: Sequence[Any],
        config: DecodingConfig | Mapping[str, Any] | None = None,
        *,
        max_new_tokens: int | Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        stop: Callable[[int, list[int]], int | None] | None = None,
        on_begun: Callable[[int, Progress], None] | None = None,
        on_finished: Callable[[int, Generation], None] | None = None,
        logprobs: str | Sequence[str] = (),
        top_logprobs: int = 0,
    ) -> list[Generation]:
        """Continue every prompt. All are queued at once; ``max_batch`` rows are in flight.

        Args:
            prompts: token ids, text, or chat messages (dictionaries with ``role`` and ``content``), which the chat
                template turns into text. To text and messages :attr:`Generation.text` is the answer, and the
                tokenizer's end-of-text token ends it too. A single list of messages is one prompt.
            max_new_tokens: for all or for each; the configuration's if not given.
            seeds: the key of each request's randomness (int64); its index by default. A request's samples do not depend
                on its batch.
            stop: ``stop(i, new_token_ids)`` is called after each finished block of request i, and returns how many of
                its new tokens to keep, or None to continue.
            on_begun: called for each request as it takes a row, with what will be known of it.
            on_finished: called for each request as it completes.
            logprobs: ``"decided"`` keeps those at the moment of decision (:attr:`Generation.logprobs`); ``"ar"`` scores
                finished answers in the model's autoregressive mode, without sampling options
                (:attr:`Generation.ar_logprobs`); or both.
            top_logprobs: with ``"decided"``, also so many of the likeliest tokens (:attr:`Generation.top_logprobs`).

        Raises:
            RequestError: a prompt that cannot be decoded.
        """
        laws = laws_of(logprobs)
        resolved = keeping(self.config(config), laws, top_logprobs)
        prompts = [prompts] if not isinstance(prompts, str) and is_text(prompts) else several("prompts", prompts)
        texts = [is_text(prompt) for prompt in prompts]
        if any(texts):
            resolved = with_stops(resolved, config, self.tokenizer)
            prompts = [encode(self.tokenizer, one) if text else one for one, text in zip(prompts, texts, strict=True)]
        budget = resolved.max_new_tokens if max_new_tokens is None else max_new_tokens
        if not self.ranks.alone and resolved.random_source not in ("keyed", "fixed"):
            raise ConfigError("random_source: several ranks draw alike from keyed or fixed only; leave it out.")
        stop = None if stop is None else self.ranks.ask_first(stop)
        requests = requests_of(prompts, budget, seeds, stop, on_begun, self.max_context, self.facts)
        engine = self.engine_class(self._runner, self.facts, resolved, self.trace, self.rows)

        def finished(index: int, answer: Generation) -> None:
            answers[index] = replace(answer, text=decoded(self.tokenizer, answer.token_ids)) if texts[index] else answer
            if on_finished is not None:
                on_finished(index, answers[index])

        answers: dict[int, Generation] = {}
        with self._runner.as_current_device():
            engine.run(requests, finished)
        found = [answers[index] for index in range(len(requests))]
        return self._with_ar_logprobs(requests, found) if "ar" in laws else found

    def _with_ar_logprobs(self, requests: Sequence[Request], answers: Sequence[Generation]) -> list[Generation]:
        pairs = [(request.prompt, answer.token_ids) for request, answer in zip(requests, answers, strict=True)]
        scores = iter(self._scores([pair for pair in pairs if pair[1]]))
        return [replace(answer, ar_logprobs=next(scores)[0] if answer.token_ids else []) for answer in answers]

    def stream(
        self,
        prompt: Any,
        config: DecodingConfig | Mapping[str, Any] | None = None,
        *,
        max_new_tokens: int | None = None,
        seed: int = 0,
        logprobs: str | Sequence[str] = (),
        top_logprobs: int = 0,
    ) -> Iterator[Piece]:
        """The answer to one prompt as :meth:`generate` takes it, as pieces of text: one per finished block, of which
        nothing is taken back. Closing the iterator ends the decoding after the current block. With
        ``logprobs="decided"`` every piece has those of its tokens; the last may then be tokens without text.

        Raises:
            RequestError: a prompt that cannot be decoded.
        """
        if "ar" in (laws := laws_of(logprobs)):
            raise RequestError("logprobs='ar' is of whole answers, not of a stream: give it to generate.")
        resolved = keeping(with_stops(self.config(config), config, self.tokenizer), laws, top_logprobs)
        ids = encode(self.tokenizer, prompt) if is_text(prompt) else tokens("The prompt", prompt)
        budget = resolved.max_new_tokens if max_new_tokens is None else max_new_tokens

        def run(stream: Stream) -> Generation:
            rules: dict[str, Any] = {"stop": stream.stop, "on_begun": stream.begun}
            return self.generate([ids], resolved, max_new_tokens=budget, seeds=[seed], **rules)[0]

        return pieces(self.tokenizer, resolved, budget, run)

    def request(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        seed: int = 0,
        stop: Callable[[int, list[int]], int | None] | None = None,
        on_begun: Callable[[int, Progress], None] | None = None,
    ) -> Request:
        """A request for :meth:`serve`; the arguments are those of :meth:`generate`.

        Raises:
            RequestError: a prompt that cannot be decoded.
        """
        return requests_of([prompt], [max_new_tokens], [seed], stop, on_begun, self.max_context, self.facts)[0]

    def serve(self, arrivals: Arrivals, config: DecodingConfig, on_finished: Callable[[int, Generation], None]) -> None:
        """Decode requests as they arrive, until there are no more. An answer is the one of :meth:`generate`.

        Raises:
            CapacityError: memory does not hold a single row of ``max_context`` positions.
        """
        if not self.ranks.alone:
            raise ConfigError("a model that is split over processes cannot be served yet: load it on one.")
        state = self._runner, self.facts, config, self.trace, self.rows
        with self._runner.as_current_device():
            OpenRun(*state, longest=self.max_context, arrivals=arrivals).serve(on_finished)

    def draw(self, answer: Generation, width: int = 100, color: bool = True) -> Picture:
        """The order in which an answer of :meth:`generate` was decided, a line per step; notebooks show it in colours.

        Args:
            color: mark how a token was decided by colours; otherwise by a symbol before it.
        """
        from s2d2_lmeval.picture import Picture, picture, token_text  # draws with rich, which decoding does not need

        stops = (*self.facts.stop_token_ids, self.tokenizer.eos_token_id)
        text, mask, given = partial(token_text, self.tokenizer), self.facts.mask_token_id, answer.prompt_length
        how: dict[str, Any] = {"stop_token_ids": stops, "width": width, "color": color}
        return Picture(picture(answer.steps, text, mask_token_id=mask, prompt_length=given, **how))

    def score(
        self,
        requests: Sequence[tuple[Sequence[int], Sequence[int]]],
        on_scored: Callable[[int, tuple[float, bool]], None] | None = None,
    ) -> list[tuple[float, bool]]:
        """log p(continuation | context) in the model's autoregressive mode, and whether the continuation is the greedy
        one. Requests with the same context share its forwards.

        Args:
            requests: (context, continuation) pairs of token ids; the context may be empty, unless the model's logits
                are shifted by one token, so that nothing predicts the first. Both together have at most
                :attr:`max_score_length` tokens.
            on_scored: called for each request as it is scored.

        Raises:
            RequestError: a pair that does not fit the context, holds the mask token or cannot be predicted.
        """
        pairs = pairs_of(requests, self.max_context, self.facts)

        def scored(index: int, score: Tokenwise) -> None:
            if on_scored is not None:
                on_scored(index, (sum(score[0]), score[1]))

        return [(sum(logprobs), greedy) for logprobs, greedy in self._scores(pairs, scored)]

    def _scores(
        self, pairs: Sequence[Pair], on_scored: Callable[[int, Tokenwise], None] | None = None
    ) -> list[Tokenwise]:
        scorer = Scorer(self._runner, self.facts.mask_token_id, self.facts.token_shift, self.trace, self.rows)
        with self._runner.as_current_device():
            return scorer.run(pairs, on_scored)

    @property
    def max_score_length(self) -> int:
        """Maximum number of tokens of a context and its continuation together in :meth:`score`."""
        return self.max_context + int(self.facts.token_shift)

    def probe(self, texts: Sequence[Sequence[int]]) -> ShiftProbe | None:
        """How the model's masks and text predict, by one forward on ``texts`` of token ids that anybody can continue
        (:mod:`~s2d2_lmeval.runtime.probe`); None where nothing can be said.
        """
        if not self._runner.ranks.alone:
            return None
        with self._runner.as_current_device():
            return probe_shift(self._runner, self.facts, texts)

    def release(self) -> None:
        """Free the cache's memory; the next call allocates what it needs."""
        self._runner.release()
