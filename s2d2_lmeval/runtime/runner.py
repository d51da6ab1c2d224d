"""Runs passes on a native transformers model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from s2d2_lmeval.errors import CapacityError, ConfigError
from s2d2_lmeval.ranks import ranks_of
from s2d2_lmeval.runtime import clock
from s2d2_lmeval.runtime.attention import NAME, AttentionContext, choose_backend, grain_of, heads_of
from s2d2_lmeval.runtime.cache import SlotCache, cache_argument
from s2d2_lmeval.runtime.costs import CostCurve, in_a_line, usual, widths_to_measure
from s2d2_lmeval.runtime.drafting.heads import AfterToken
from s2d2_lmeval.runtime.gated import Gate
from s2d2_lmeval.runtime.graphs import Graphs, numbers, upload
from s2d2_lmeval.runtime.kernels.fused import fuse
from s2d2_lmeval.runtime.kernels.lean import lean_decoder
from s2d2_lmeval.runtime.memory import RowNeeds, rows_that_fit
from s2d2_lmeval.runtime.passes import TARGET, Layout, Pass
from s2d2_lmeval.runtime.shapes import Frame, Shape

_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


EXACT_GRAIN = 128
"""Under ``exact`` attention reads a multiple of so many cache positions, whatever the device."""


class Runner:
    """A model, its cache and its attention back end.

    The model's config object is taken over (``_attn_implementation`` lives on it): give each runner a model of its own.

    Args:
        static_shapes: pad steps to a few shapes, captured as graphs on CUDA (:mod:`~s2d2_lmeval.runtime.graphs`);
            None: where a single CUDA device holds the model.
        fused: whether layers run as few kernels (:func:`~s2d2_lmeval.runtime.kernels.fused.fuse`); ``auto`` on a CPU:
            in few calls (:mod:`~s2d2_lmeval.runtime.kernels.lean`).
        part: run decoding in forwards of exactly so many queries (:mod:`~s2d2_lmeval.runtime.shapes`); 0: as wide as
            they need to be.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attention: str = "auto",
        static_shapes: bool | None = None,
        fused: str | bool = "auto",
        part: int = 0,
    ) -> None:
        devices = {parameter.device for parameter in model.parameters()}
        self.attention = choose_backend(attention, next(iter(devices)), model.dtype, heads_of(model.config))
        model.config._attn_implementation = NAME
        self.model = model.eval()
        self.backbone = model.get_decoder()
        self.head = model.get_output_embeddings()
        self.ranks = ranks_of(model)
        if static_shapes and not self.ranks.alone:
            raise ConfigError("static_shapes: forwards of several ranks are not captured; leave it out with tp_plan.")
        if not self.ranks.alone:
            clock.share(self.ranks)
        self.device = model.get_input_embeddings().weight.device
        self.part = part
        self.grain = EXACT_GRAIN if part else grain_of(self.device, model.dtype)
        if part and self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        self.gate = Gate.of(model)
        """Of the draft adapter that was loaded with the model."""
        if self.gate is not None and fused is True:
            raise ConfigError("fused layers take no draft adapter; leave fused out.")
        with self.as_current_device():
            self.fused = fuse(model, False if self.gate is not None else fused, self.attention)
        on_cpu = devices == {torch.device("cpu")} and self.ranks.alone and not part
        self.lean = lean_decoder(model, self.attention) if on_cpu and fused == "auto" and self.gate is None else None
        self.cache = SlotCache(0, 0)
        self._cache_argument = cache_argument(self.backbone)
        self.after_token: AfterToken | None = None
        """What a drafter's head adds to the logits of its last draft."""
        self.model_seconds = 0.0
        """Time inside the model; on CUDA as of the last :meth:`synchronize`."""
        self._costs: dict[tuple[int, int], CostCurve] = {}
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._timing = False
        on_cuda = self.device.type == "cuda" and len(devices) == 1 and self.ranks.alone
        self._alike = int(model.config.get_text_config().num_hidden_layers) if len(devices) == 1 else 0
        self.graphs: Graphs | None = None
        if on_cuda if static_shapes is None else static_shapes:
            self.graphs = Graphs(self.device, captures=on_cuda)

    @contextmanager
    def as_current_device(self) -> Iterator[None]:
        """Makes the model's GPU the current one: graphs, Triton kernels and events go to that, whatever device their
        tensors lie on. Leaves out cuDNN's attention, which builds a plan for every shape that it has not seen.
        """
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.device(self.device), sdpa_kernel(_KERNELS):
            yield

    def reserve(self, slots: int, capacity: int) -> None:
        """Make room for ``slots`` sequences of ``capacity`` positions and empty all slots.

        Room already there is used again.
        """
        capacity = -(-capacity // self.grain) * self.grain
        if slots > self.cache.slots or capacity > self.cache.capacity:
            if self.graphs is not None:
                self.graphs.clear()  # they hold the old cache, and both at once may be too much
            self.cache = SlotCache(slots, capacity, self._alike)
        self.cache.lengths[:] = 0

    def release(self) -> None:
        """Give the cache's memory back, and that of captured graphs."""
        self.cache = SlotCache(0, 0)
        if self.graphs is not None:
            self.graphs.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def rows_that_fit(self, needs: RowNeeds) -> int:
        """How many sequences with such ``needs`` free memory holds, that of the present cache included; at least 1."""
        return self.ranks.least(rows_that_fit(self.model, self.device, needs, self.cache.bytes_on))

    def begin(self, slot: int, source: int, length: int) -> None:
        """Empty ``slot`` for another sequence, but for the first ``length`` positions, taken from ``source``."""
        self.cache.begin(slot, source, length)

    def attention_of(self, model: str) -> str:
        """The attention back end of ``model``; of interest to runners of more than one."""
        return self.attention

    def cache_of(self, model: str) -> SlotCache:
        """The cache of ``model``; of interest to runners of more than one."""
        return self.cache

    def ends(self, frame: Frame, keep: np.ndarray, slots: int, feeds_drafter: bool = False) -> dict[str, np.ndarray]:
        """What :meth:`keep` needs to be told of a pass that keeps ``keep`` (R,) leading queries: by slot, the place in
        the cache after those.
        """
        layout, ends = frame.layout, np.zeros(slots, dtype=np.int64)
        ends[layout.slots] = layout.slots * self.cache.capacity + self.cache.lengths[layout.slots] + keep
        return {"end": ends}

    def keep(self, told: Mapping[str, torch.Tensor], path: torch.Tensor | None) -> None:
        """Move the keys and values of ``path`` (slots, D), if any, one after the other to the end of the prefix; each
        is how far a query comes after it, -1 for none.
        """
        if path is None or not path.shape[1]:
            return
        end, scratch = told["end"].unsqueeze(1), self.cache.scratch
        depth = numbers(path.shape[1], path.device)
        self.cache.move(
            torch.where(path >= 0, end + depth, scratch).flatten(),
            torch.where(path >= 0, end + path, scratch).flatten(),
        )

    def commit(self, slots: np.ndarray, keep: np.ndarray, model: str = TARGET) -> None:
        """Let ``keep`` (R,) more positions of each of ``slots`` (R,) become prefix."""
        self.cache_of(model).lengths[slots] += keep

    @torch.inference_mode()
    def measure_costs(self, rows: int, most: int, *, model: str = TARGET) -> CostCurve:
        """Time forwards of ``rows`` rows that bring 1 to ``most`` queries each, every logit read, half of the cache
        filled. To be called between :meth:`reserve` and the first forward: it leaves nothing in the cache. What was
        measured before for such rows is not measured again, nor wider forwards once time grows in a steep line.

        ``model`` is for runners of more than one.
        """
        most = min(most, self.cache.capacity)
        asked = (rows, most)
        if asked not in self._costs:
            widths, seconds = widths_to_measure(most), np.empty(0)
            while len(seconds) < len(widths) and not in_a_line(widths, seconds):
                seconds = np.append(seconds, self._usual_seconds(rows, int(widths[len(seconds)])))
            self._costs[asked] = CostCurve.measured(widths[: len(seconds)] * rows, seconds)
        return self._costs[asked]

    def _usual_seconds(self, rows: int, width: int) -> float:
        """Of a forward as steps run it: captured, where they are."""
        layout, prefix = Layout(np.arange(rows), np.full(rows, width)), (self.cache.capacity - width) // 2
        self.cache.lengths[:rows] = prefix
        bucket = self.graphs and Shape.bucket(layout, layout.queries, self.cache, rows, self.attention == "sdpa")
        frame = Frame(layout, bucket or Shape.tight(layout, layout.queries, self.cache, self.grain))
        positions, read = frame.queries(layout.local + prefix), frame.wanted(np.arange(layout.queries))
        arrays = {**frame.attention(self.cache), "positions": positions, "read": read}
        lower = torch.ones(frame.shape.widest, frame.shape.widest, dtype=torch.bool, device=self.device).tril()
        visible = lower.repeat(frame.shape.rows, 1, 1)

        def program(told: dict[str, torch.Tensor]) -> torch.Tensor:
            tokens = torch.zeros_like(told["positions"])
            logits = self.run(tokens, told["positions"], told["read"], visible, told, frame)
            return logits.flatten()[:1].isnan().long()

        key = ("costs", self, rows, width)

        def once() -> float:
            started = clock.agreed()
            with self.timed():
                if self.graphs is not None and bucket:
                    self.graphs.run(key, arrays, program)
                else:
                    program(upload(self.device, arrays)).cpu()  # the read waits for the device
            return clock.agreed() - started

        seconds = usual(once)
        if self.graphs is not None:
            self.graphs.forget(key)
        self.cache.lengths[:] = 0
        self.synchronize()
        return seconds

    @torch.inference_mode()
    def forward(self, request: Pass) -> torch.Tensor:
        """Run one pass; return the wanted logits (M, V), at least in float32. The kept queries become prefix."""
        layout = request.layout
        frame = Frame(layout, Shape.tight(layout, len(request.wanted), self.cache, self.grain))
        told = upload(self.device, frame.attention(self.cache))
        logits = self.run(request.tokens, request.positions, request.wanted, request.visible, told, frame)
        self.cache.lengths[layout.slots] += request.keep
        return logits

    def run(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        wanted: torch.Tensor,
        visible: torch.Tensor,
        told: Mapping[str, torch.Tensor],
        frame: Frame,
        model: str = TARGET,
    ) -> torch.Tensor:
        """The wanted logits (M, V) of the queries ``tokens`` (N,) at ``positions`` (N,), which see each other as
        ``visible`` (R, W, W) says; ``told`` is what :meth:`Frame.attention` says of ``frame``, on the device;
        ``model`` is for runners of more than one.
        """
        with self.timed():
            if not frame.shape.part:
                context = AttentionContext.of(told, visible, frame, self.attention)
                with self._gated(told, frame):
                    return self._answer(tokens, positions, wanted, context)
            hidden = []
            for at, one in frame.parts(told):
                with self._gated(one, frame):
                    context = AttentionContext.of(one, visible, frame, self.attention)
                    hidden.append(self._hidden(tokens[at], positions[at], context))
            states = torch.cat(hidden)
            return torch.cat([self._logits(states, part) for part in wanted.split(frame.shape.part)])

    def _gated(self, told: Mapping[str, torch.Tensor], frame: Frame) -> AbstractContextManager[None]:
        """Opens the draft adapter, if there is one, for the queries that draft."""
        if self.gate is None or "gated" not in told:
            return nullcontext()
        return self.gate.opened(told["gated"], frame.shape.padded)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Counts what runs inside as the model's time (:attr:`model_seconds`), unless it is inside already."""
        if self._timing:
            yield
            return
        self._timing, started, mark = True, clock.now(), self._mark()
        try:
            yield
        finally:
            self._timing = False
        end = self._mark()
        if mark is None or end is None:
            self.model_seconds += clock.now() - started
        else:
            self._marks.append((mark, end))

    def synchronize(self) -> None:
        """Count the device's time of forwards in :attr:`model_seconds`; to be called when the device is through."""
        for start, end in self._marks:
            end.synchronize()
            self.model_seconds += start.elapsed_time(end) / 1000
        self._marks.clear()

    def _mark(self) -> torch.cuda.Event | None:
        """A point in the device's time; None on the CPU, whose time is the host's."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _answer(
        self, tokens: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        """The model's logits (M, V) of the queries ``wanted`` (M,), as :meth:`run` says."""
        return self._logits(self._hidden(tokens, positions, context), wanted)

    def _hidden(self, tokens: torch.Tensor, positions: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """What the head reads of every query, (N, hidden size)."""
        self.cache.write_to(context.destinations)
        if self.lean is not None:
            return self.lean(tokens, positions, self.cache, context)
        hidden: torch.Tensor = self.backbone(
            input_ids=tokens.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=True,
            pass_context=context,
            **{self._cache_argument: self.cache},
        ).last_hidden_state
        return hidden[0]

    def _logits(self, hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """The head's logits (M, V) of the queries ``wanted`` (M,)."""
        logits: torch.Tensor = self.head(hidden.index_select(0, wanted.to(hidden.device)))
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        return logits.to(self.device, non_blocking=True)  # a head may lie on another device than the decoder's tables


def refuse_to_halve(runner: Runner, rows: int) -> None:
    """CapacityError where memory ran out with ``rows`` in flight on one of several ranks: the others wait for it."""
    if not runner.ranks.alone:
        raise CapacityError(
            f"Memory ran out on rank {runner.ranks.rank} of {runner.ranks.size} with {rows} requests in flight, and "
            f"ranks cannot begin again one by one. Give max_batch={max(rows // 2, 1)} or less."
        )
