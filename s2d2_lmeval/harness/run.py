"""One ``generate_until`` call: group requests by generation arguments, decode each group with the engine or a custom
function, turn tokens into text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text
from tqdm import tqdm

from s2d2_lmeval.decoding.generation import Generation, Step
from s2d2_lmeval.decoding.options.config import SYNONYMS, DecodingConfig
from s2d2_lmeval.decoding.options.general import GREEDY
from s2d2_lmeval.decoding.options.option import converted
from s2d2_lmeval.errors import ConfigError, shown
from s2d2_lmeval.harness import prompts, report
from s2d2_lmeval.harness.arguments import GenerationArguments
from s2d2_lmeval.harness.base import HarnessModel
from s2d2_lmeval.harness.custom import BUDGET_NAMES
from s2d2_lmeval.harness.prompts import Prompt, StopStrings, logger
from s2d2_lmeval.harness.responses import TracedResponse
from s2d2_lmeval.runtime import clock
from s2d2_lmeval.runtime.statistics import add, ratios


@dataclass
class Group:
    """Requests with the same generation arguments, and the resulting settings.

    ``config`` is the decoder's configuration; with a custom function it is None, and ``options`` are
    the function's arguments. ``until`` are the stop strings with the EOS string, ``stop_token_ids`` the ids that
    end an answer, ``budget`` the maximum number of new tokens.
    """

    until: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    budget: int
    config: DecodingConfig | None
    options: Mapping[str, Any] = field(default_factory=dict)
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tasks: set[str] = field(default_factory=set)
    prompts: list[Prompt] = field(default_factory=list)

    def in_order(self) -> list[Prompt]:
        """Longest prompts first, as in the harness: out-of-memory shows early, and time estimates are conservative."""
        return sorted(self.prompts, key=lambda prompt: (-len(prompt.ids), prompt.text))

    def describe(self) -> dict[str, Any]:
        """For the results file: the tasks of the group, and its settings."""
        if self.config is not None:
            in_force = report.settings(self.config)
        else:
            in_force = {"options": {name: _plain(value) for name, value in self.options.items()}}
        return {
            "tasks": sorted(self.tasks),
            "generation_kwargs": dict(self.gen_kwargs),
            "max_new_tokens": self.budget,
            "stop_token_ids": list(self.stop_token_ids),
            **in_force,
        }


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, list, tuple, dict, type(None))) else type(value).__name__


class GenerationRun:
    """Answers a list of requests with a model.

    Every group is prepared before the first is decoded, so a request that cannot be answered is refused early.
    """

    def __init__(self, lm: HarnessModel, requests: Sequence[Any], *, quiet: bool) -> None:
        self.lm = lm
        self.answers: dict[int, TracedResponse] = {}
        self.groups: dict[str, Group] = {}
        self.copies: dict[int, int] = {}
        self._prepare(requests)
        lm.configurations.update({name: group.describe() for name, group in self.groups.items()})
        self.size = len(requests)
        left = self.size - len(self.copies) - len(self.answers)
        hidden = quiet or (lm.store is not None and lm.store.shows_progress)
        self.bar = tqdm(total=left, disable=hidden, desc="Decoding", unit="req")
        self.shown, self.started = {"new_tokens": 0.0, "nfe": 0.0}, clock.now()

    def answer(self) -> list[str]:
        """Decode everything; a :class:`TracedResponse` per request, in the order of the requests."""
        if self.lm.store is not None:
            self.lm.store.decoding_begins()
        try:
            for group in self.groups.values():
                if not group.prompts:  # all answers are known
                    continue
                if self.lm.custom is None:
                    self._run_engine(group)
                else:
                    self._run_custom(group)
        finally:
            self.bar.close()
        for place, original in self.copies.items():
            self.answers[place] = self.answers[original]
        return [self.answers[place] for place in range(self.size)]

    # Requests to groups

    def _prepare(self, requests: Sequence[Any]) -> None:
        """Group the requests by generation arguments, without the copies that pad processes to equal length."""
        lm = self.lm
        encoded = map(lm.as_text, prompts.encode(lm.tokenizer, [one.args[0] for one in requests], lm.add_bos_token))
        mask = lm.engine.facts.mask_token_id if lm.engine is not None else None
        room: dict[str, Any] = {"context": lm.max_length, "mask_token_id": mask, "truncate": lm.truncates}
        left_out: list[int] = []
        occurrences = prompts.Occurrences(lm.world_size)
        for place, (request, ids) in enumerate(zip(requests, encoded, strict=True)):
            text, gen_kwargs = request.args[:2]
            occurrence, original = occurrences.next(request, text, place)
            if original is not None:
                self.copies[place] = original
                continue
            try:
                name = json.dumps(gen_kwargs, sort_keys=True, default=repr)
            except (TypeError, ValueError, RecursionError):
                raise ConfigError(f"generation_kwargs hold what JSON cannot write: {shown(gen_kwargs)}.") from None
            if name not in self.groups:
                self.groups[name] = self._group(gen_kwargs)
            group = self.groups[name]
            group.tasks.add(request.task_name or "")
            fitting = prompts.fitting(ids, group.budget, prompts.name_of(request), **room)
            key = prompts.request_key(fitting, occurrence)
            task = request.task_name or ""
            cut = len(ids) - len(fitting)
            left_out += [cut] if cut else []
            prompt = Prompt(place, text, gen_kwargs, fitting, key, task, request.doc_id, occurrence, cut)
            known = lm.store.find(prompt) if lm.store is not None else None
            if known is not None:
                self.answers[place] = known
            else:
                group.prompts.append(prompt)
        if left_out:
            logger.warning(
                "%d of %d prompts do not fit the context beside their answers: their oldest tokens are left out, %d in "
                "all. truncation=False refuses such prompts.",
                *(len(left_out), len(requests), sum(left_out)),
            )

    def _group(self, gen_kwargs: Any) -> Group:
        """The settings of a set of generation arguments, merged over ``--model_args``."""
        lm = self.lm
        asked = GenerationArguments.parse(gen_kwargs, () if lm.custom is None else lm.custom.parameters)
        self._tell_what_is_overridden(asked)
        end = lm.eot_token_id
        end_text = lm.tok_decode([end], skip_special_tokens=False) if end is not None else None
        until = tuple(handle_stop_sequences(list(asked.until), eos=end_text))
        if lm.think_end_token is not None and asked.until and "thinking" not in lm.told:
            lm.told.add("thinking")
            logger.warning(
                "stop strings (%s) end an answer inside its reasoning trace too, as with --model hf; --gen_kwargs "
                "until=… with a string that no trace holds avoids that.",
                ", ".join(map(repr, asked.until)),
            )
        added = lm.tokenizer.get_added_vocab()
        special = tuple(added[string] for string in until if string in added)  # one token each, such as <|im_end|>
        budget = lm.max_gen_toks if asked.max_new_tokens is None else asked.max_new_tokens
        if lm.custom is not None:
            known = lm.engine.facts.stop_token_ids if lm.engine is not None else ()
            stops = tuple(dict.fromkeys((*known, *lm.end_of_text_ids, *special)))
            given = {name: value for name, value in lm.arguments.decoding.items() if name not in BUDGET_NAMES}
            options = lm.custom.options({**given, **asked.options}, stops, lm.tokenizer)
            return Group(until, stops, budget, None, options, gen_kwargs)
        config = lm.configuration({**asked.options, "max_new_tokens": budget})
        if config is None:
            raise ConfigError(
                "this model is of no known family, so only a custom_generate function can decode with it."
            )
        if asked.options.get("do_sample") is False and config.acceptance == "stochastic" and "drawing" not in lm.told:
            lm.told.add("drawing")
            logger.info(
                "do_sample=false or temperature=0: drafts are the argmax, but their verification draws by the seed, as "
                "published; acceptance=greedy draws nothing."
            )
        stops = tuple(dict.fromkeys((*config.stop_token_ids, *special)))
        return Group(until, stops, budget, config.replace(stop_token_ids=stops), {}, gen_kwargs)

    def _tell_what_is_overridden(self, asked: GenerationArguments) -> None:
        """A task's own arguments override ``--model_args``; warn if the user asked for something else."""
        of_run = dict(self.lm.arguments.decoding)
        if of_run.get("temperature") is not None:  # which alone decides whether to sample
            of_run.setdefault("do_sample", converted("temperature", "float", of_run["temperature"]) >= GREEDY)
        of_task = {SYNONYMS.get(name, name): value for name, value in asked.options.items()}
        if asked.max_new_tokens is not None:
            of_task["max_new_tokens"] = asked.max_new_tokens
        for given, wanted in of_run.items():
            name = SYNONYMS.get(given, given)
            value = of_task.get(name, wanted)
            if value != wanted and (name, str(value)) not in self.lm.told:
                self.lm.told.add((name, str(value)))
                logger.warning(
                    "a task's generation_kwargs set %s=%s, which overrides %s=%s of --model_args; "
                    "--gen_kwargs %s=… overrides both.",
                    *(name, value, given, wanted, name),
                )

    # Groups to answers

    def _run_engine(self, group: Group) -> None:
        lm, queue = self.lm, group.in_order()
        assert lm.engine is not None

        def finished(index: int, generation: Generation) -> None:
            stats = {**generation.stats, "finish_reason": generation.finish_reason}
            if lm.arguments.log_decoding_order:
                stats["decoding_order"] = generation.decoding_order
            if generation.logprobs is not None:
                stats |= {"logprobs": generation.logprobs, "top_logprobs": generation.top_logprobs}
            steps = () if lm.store is None else generation.steps
            self._answer(group, queue[index], generation.token_ids, stats, steps)

        before, started = lm.engine.trace.totals(), clock.now()
        try:
            lm.engine.generate(
                [prompt.ids for prompt in queue],
                group.config,
                max_new_tokens=group.budget,
                seeds=[prompt.key for prompt in queue],
                stop=self._stopper(group.until),
                on_finished=finished,
            )
        finally:
            lm.totals.add_run(before, lm.engine.trace.totals(), clock.since(started))

    def _run_custom(self, group: Group) -> None:
        """Decode one request at a time with the custom function.

        Each has its own torch seed, so that neither the order of requests nor ``--limit`` matters.
        """
        lm, stopper, sums = self.lm, self._stopper(group.until), report.Totals()
        devices = [lm.device] if lm.device.type == "cuda" else []
        seed = int(group.options.get("seed") or lm.seed or 0)
        started = clock.now()
        for index, prompt in enumerate(group.in_order()):
            began = clock.now()
            tokens: list[int] = []
            stats: dict[str, Any] = {"nfe": 0}
            if group.budget > 0:
                assert lm.custom is not None
                with torch.random.fork_rng(devices=devices):
                    torch.manual_seed((prompt.key + seed) % (1 << 63))
                    tokens, stats = lm.custom(lm.model, prompt.ids, group.budget, group.options)
            kept, counted, reason = _cut(tokens, group.stop_token_ids, stopper, index)
            stats.update(new_tokens=counted, finish_reason=reason)
            stats.update(ratios(stats), seconds=clock.since(began))
            self._answer(group, prompt, tokens[:kept], stats)
            sums.add_response("all", stats)
        lm.totals.add_run({}, sums.tasks.get("all", {}), clock.since(started))

    def _stopper(self, until: Sequence[str]) -> StopStrings:
        """The stop strings of a group; as with the harness's ``hf`` they count inside a reasoning trace too."""
        return StopStrings(lambda tokens: self.lm.tok_decode(tokens, skip_special_tokens=False), until)

    def _answer(
        self, group: Group, prompt: Prompt, tokens: list[int], stats: dict[str, Any], steps: Sequence[Step] = ()
    ) -> None:
        """Text with statistics; into the answers, the store, the totals and the progress bar."""
        lm = self.lm
        stats["prompt_tokens"] = len(prompt.ids)
        if prompt.left_out:
            stats |= {"truncated_prompts": 1, "prompt_tokens_left_out": prompt.left_out}
        if not lm.arguments.log_decoding_order:
            stats.pop("decoding_order", None)
        response = TracedResponse(self._text(tokens, group.until), stats)
        self.answers[prompt.place] = response
        if lm.store is not None:
            lm.store.add(prompt, response, steps)
        lm.totals.add_response(prompt.task, stats)
        add(self.shown, {name: stats.get(name, 0) for name in self.shown})
        rates = ratios({**self.shown, "seconds": clock.now() - self.started})
        rates = {"tok/s": rates.get("tokens_per_second", 0.0), "tok/fwd": rates.get("tokens_per_forward", 0.0)}
        self.bar.set_postfix({name: f"{rate:.2f}" for name, rate in rates.items()}, refresh=False)
        self.bar.update(1)

    def _text(self, tokens: list[int], until: Sequence[str]) -> str:
        """The text of an answer, cut like the harness's ``hf`` models do."""
        end = self.lm.think_end_token
        if isinstance(end, int):
            start = len(tokens) - tokens[::-1].index(end) if end in tokens else 0
            text, end = self.lm.tok_decode(tokens[start:]).lstrip(), None
        else:
            text = self.lm.tok_decode(tokens)
        return postprocess_generated_text(text, list(until), end)


def _cut(tokens: list[int], stop_ids: Sequence[int], stopper: StopStrings, index: int) -> tuple[int, int, str]:
    """How many tokens of a finished answer to show, how many to count (a stop token counts), and why it ends there."""
    stop = next((place for place, token in enumerate(tokens) if token in stop_ids), None)
    shown = len(tokens) if stop is None else stop
    kept = stopper(index, tokens[:shown])
    if kept is not None:
        return kept, kept, "stop_string"
    return (shown, shown, "length") if stop is None else (shown, shown + 1, "stop")
