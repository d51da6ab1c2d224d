"""The pretend CUDA device: every counter counts what it should and nothing else, and every fault is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from s2d2_lmeval.decoding.sampling.row_statistics import row_statistics, statistics_of
from s2d2_lmeval.runtime.kernels import dispatch
from s2d2_lmeval.studies.pretend import Counts, pretend_cuda

GPU, OTHER, CPU = torch.device("cuda:0"), torch.device("cuda:1"), torch.device("cpu")
WHOLE, BOOL = torch.long, torch.bool


@pytest.fixture
def counts() -> Iterator[Counts]:
    with torch.inference_mode(), pretend_cuda(devices=2) as counted:
        yield counted


def ones(*shape: int, device: torch.device = GPU, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, device=device, dtype=dtype)


def on_host(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(*shape, dtype=dtype)


def pinned(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, pin_memory=True)


def not_waiting(x: torch.Tensor) -> torch.Tensor:
    return x.to(GPU, non_blocking=True)


def put(x: torch.Tensor, index: Any, value: Any) -> None:
    x[index] = value


def seen(counts: Counts) -> dict[str, int]:
    return {name: number for name, number in counts.totals().items() if number}


LAUNCH = {"launches_outside": 1}
BLOCKED = {"uploads": 1, "blocking": 1}
READ = {"reads": 1, "waits": 1}
WAITED = {"waits": 1, "blocking": 1}

Case = tuple[Callable[[], tuple[Any, ...]], Callable[..., Any], dict[str, int]]
"""What is there before; what is done with it; what that counts."""

CASES: dict[str, Case] = {
    "arithmetic": (lambda: (ones(3),), lambda x: x + 1, LAUNCH),
    "arithmetic on the host": (lambda: (on_host(3),), lambda x: x + 1, {}),
    "views": (lambda: (ones(4, 3),), lambda x: x.view(3, 4).t()[1:, None].expand(3, 2, 3).unbind(), {}),
    "a factory": (tuple, lambda: torch.zeros(3, device="cuda"), LAUNCH),
    "empty memory": (tuple, lambda: torch.empty(3, device=GPU), {}),
    "another type": (lambda: (ones(3),), lambda x: x.long(), LAUNCH),
    "the same type": (lambda: (ones(3),), lambda x: x.float(), {}),
    "a matrix product": (lambda: (ones(2, 3), ones(4, 3)), functional.linear, LAUNCH),
    "a histogram of whole numbers": (lambda: (ones(3, dtype=WHOLE),), lambda x: torch.histc(x, 4, 0, 3), LAUNCH),
    "attention": (lambda: (ones(1, 2, 3, 4),) * 3, functional.scaled_dot_product_attention, LAUNCH),
    "a number of the host": (lambda: (ones(3), torch.tensor(2.0)), torch.mul, LAUNCH),
    # to a device
    "pageable": (lambda: (on_host(3),), lambda x: x.to(GPU), BLOCKED),
    "pageable, not waited for": (lambda: (on_host(3),), not_waiting, {"uploads": 1, "staged": 1}),
    "pinned": (lambda: (pinned(3),), lambda x: x.to(GPU), BLOCKED),
    "pinned, not waited for": (lambda: (pinned(3),), not_waiting, {"uploads": 1}),
    "pinned by a method": (lambda: (on_host(3).pin_memory(),), not_waiting, {"uploads": 1}),
    "pinned, by way of numpy": (lambda: (torch.from_numpy(pinned(4).numpy()[1:]),), not_waiting, {"uploads": 1}),
    "into a buffer": (lambda: (ones(3), pinned(3)), lambda x, y: x.copy_(y, non_blocking=True), {"uploads": 1}),
    "into a buffer, waiting": (lambda: (ones(3), on_host(3)), lambda x, y: x.copy_(y), BLOCKED),
    "a list": (tuple, lambda: torch.tensor([1, 2], device="cuda"), BLOCKED),
    "an array": (lambda: (np.ones(3),), lambda x: torch.as_tensor(x, device=GPU), BLOCKED),
    "a list like another": (lambda: (ones(3),), lambda x: x.new_tensor([1.0]), BLOCKED),
    "cuda()": (lambda: (on_host(3),), lambda x: x.cuda(), BLOCKED),
    # to the host
    "cpu()": (lambda: (ones(3),), lambda x: x.cpu(), READ),
    "into the host's memory": (lambda: (on_host(3), ones(3)), lambda x, y: x.copy_(y), READ),
    "item": (lambda: (ones(),), lambda x: x.item(), READ),
    "tolist": (lambda: (ones(3),), lambda x: x.tolist(), READ),
    "a condition": (lambda: (ones(),), bool, READ),
    "int": (lambda: (ones(),), int, READ),
    "float": (lambda: (ones(),), float, READ),
    "equal": (lambda: (ones(3), ones(3)), torch.equal, READ),
    "into pinned memory": (lambda: (pinned(3), ones(3)), lambda x, y: x.copy_(y, non_blocking=True), {"reads": 1}),
    "to fresh pinned memory": (lambda: (ones(3),), lambda x: x.to(CPU, non_blocking=True), {"reads": 1}),
    # sizes that depend on values
    "nonzero": (lambda: (ones(3),), lambda x: x.nonzero(), LAUNCH | WAITED),
    "masked_select": (lambda: (ones(3), ones(3, dtype=BOOL)), torch.masked_select, LAUNCH | WAITED),
    "unique": (lambda: (ones(3),), torch.unique, LAUNCH | WAITED),
    "repeats": (lambda: (ones(3, dtype=WHOLE),), torch.repeat_interleave, LAUNCH | WAITED),
    "a mask": (lambda: (ones(3), ones(3, dtype=BOOL)), lambda x, y: x[y], LAUNCH | WAITED),
    "put by a mask": (lambda: (ones(3), ones(3, dtype=BOOL), 0), put, LAUNCH | WAITED),
    # indices
    "a table": (lambda: (ones(3), ones(2, dtype=WHOLE)), lambda x, y: x[y], LAUNCH),
    "a list of the host": (lambda: (ones(3),), lambda x: x[[0, 1]], LAUNCH | BLOCKED),
    "a table of the host": (lambda: (ones(3), on_host(2, dtype=WHOLE)), lambda x, y: x[y], LAUNCH | BLOCKED),
    "put by a table": (lambda: (ones(3), (ones(2, dtype=WHOLE),), ones(2)), torch.index_put, LAUNCH),
    "put by a table of the host": (
        lambda: (ones(3), (on_host(2, dtype=WHOLE),), ones(2)),
        torch.index_put,
        LAUNCH | BLOCKED,
    ),
    "put a row": (lambda: (ones(3, 2), 0, ones(2)), put, LAUNCH),
    "put a number": (lambda: (ones(3, 2), 0, 5), put, LAUNCH),
    "put a row of the host": (lambda: (ones(3, 2), 0, on_host(2)), put, LAUNCH | BLOCKED),
    # devices
    "to another device": (lambda: (ones(3),), lambda x: x.to(OTHER), LAUNCH),
    "row statistics": (lambda: (ones(2, 8),), row_statistics, {"launches_outside": 2}),
    "row statistics, elsewhere": (lambda: (ones(2, 8, device=OTHER),), row_statistics, {"launches_outside": 2}),
    "a kernel of another device than the current": (
        lambda: (ones(2, 8, device=OTHER),),
        lambda x: dispatch._launcher.run(statistics_of, x),
        {"launches_outside": 2, "device_mismatches": 2},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_operation(name: str, counts: Counts) -> None:
    make, work, expected = CASES[name]
    given = make()
    counts.reset()
    work(*given)
    assert seen(counts) == expected


@pytest.mark.parametrize(
    "work",
    [
        torch.add,
        lambda x, y: torch.cat([x, y]),
        lambda x, y: torch.where(x > 0, x, y),
        lambda x, y: x.index_add_(0, x.long(), y),
    ],
)
@pytest.mark.parametrize("device", [OTHER, CPU])
def test_what_lies_on_several_devices_is_refused(
    work: Callable[..., Any], device: torch.device, counts: Counts
) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        work(ones(3), ones(3, device=device))
    assert counts.totals()["device_mismatches"] == 1


def test_an_index_on_another_device_is_refused(counts: Counts) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        ones(3)[ones(2, device=OTHER, dtype=WHOLE)]
    assert counts.totals()["device_mismatches"] == 1


def test_the_line_is_named(counts: Counts) -> None:
    x = on_host(3).to(GPU)
    assert (x * 2).tolist() == [2.0] * 3
    for counter, name in ((counts.uploads, "blocking"), (counts.launches, "mul"), (counts.reads, "blocking")):
        ((what, where),) = counter
        assert what == name
        assert where.startswith("tests/studies/test_pretend.py:")


# ---- order ----


def test_waiting_for_what_is_over_is_no_wait(counts: Counts) -> None:
    def wait() -> int:
        before = counts.totals()["blocking"]
        event.synchronize()
        torch.cuda.synchronize()
        torch.cuda.current_stream().synchronize()
        return counts.totals()["blocking"] - before

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    assert wait() == 0
    x = ones(3)
    event.record()
    assert wait() == 1
    assert wait() == 0
    event.record()
    x.cpu()
    event.record()
    assert wait() == 0
    assert not event.query() or wait() == 0


def test_a_read_arrives_when_it_is_waited_for(counts: Counts) -> None:
    there, event = pinned(3), torch.cuda.Event()
    there.copy_(ones(3) * 7, non_blocking=True)
    event.record()
    assert not there.isfinite().any()
    assert there.numpy()[0] != 7
    event.synchronize()
    assert there.tolist() == [7.0] * 3
    totals = counts.totals()
    assert (totals["reads"], totals["waits"], totals["blocking"]) == (1, 1, 0)


@pytest.mark.parametrize("waits", [False, True])
def test_pinned_memory_must_stay_until_it_is_uploaded(waits: bool, counts: Counts) -> None:
    facts = pinned(3)
    facts.to(GPU, non_blocking=True)
    if waits:
        ones(1).item()
    facts.fill_(9)
    torch.cuda.synchronize()
    assert counts.totals()["races"] == (not waits)


# ---- graphs ----


def captured(work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=torch.cuda.graph_pool_handle(), capture_error_mode="thread_local"):
        assert torch.cuda.is_current_stream_capturing()
        made = work()
    assert not torch.cuda.is_current_stream_capturing()
    return graph, made


def test_a_graph_runs_again_on_what_its_buffers_hold(counts: Counts) -> None:
    x, table = ones(3), torch.zeros(4, 3, device=GPU)

    def work() -> torch.Tensor:
        table[1] = x * 2
        table.index_copy_(0, torch.ones(1, dtype=WHOLE, device=GPU) * 2, x[None])
        return torch.cat([x + 1, table.sum(0)[x.long()]])

    counts.reset()
    graph, out = captured(work)
    assert seen(counts) == {"captures": 1, "launches_captured": 10}
    assert table.sum().item() == 0, "a capture runs nothing"
    assert not out.isfinite().any().item()
    for value in (1.0, 2.0):
        x.fill_(value)
        counts.reset()
        graph.replay()
        assert seen(counts) == {"replays": 1, "launches_replayed": 10}
        assert out.tolist() == [value + 1] * 3 + [3 * value] * 3
        assert table.tolist() == [[0.0] * 3, [2 * value] * 3, [value] * 3, [0.0] * 3]
    graph.reset()
    with pytest.raises(RuntimeError, match="without a preceding"):
        graph.replay()


def test_transfers_of_pinned_memory_can_be_captured(counts: Counts) -> None:
    facts, result, on_device = pinned(3), pinned(3), torch.zeros(3, device=GPU)

    def work() -> None:
        on_device.copy_(facts, non_blocking=True)
        result.copy_(on_device * 2, non_blocking=True)

    graph, _ = captured(work)
    assert result.tolist() == [1.0] * 3
    facts.fill_(5)
    counts.reset()
    graph.replay()
    torch.cuda.synchronize()
    assert result.tolist() == [10.0] * 3
    expected = {"replays": 1, "launches_replayed": 1, "uploads": 1, "reads": 1, "waits": 1}
    assert seen(counts) == expected
    graph.replay()
    facts.fill_(6)
    torch.cuda.synchronize()
    assert counts.totals()["races"] == 1


def test_no_value_matters_in_a_capture(counts: Counts) -> None:
    x, out, index = ones(3), torch.zeros(3, device=GPU), 7 * ones(2, dtype=WHOLE)

    def work() -> tuple[torch.Tensor, ...]:
        out.scatter_(0, index, x[:2])
        return x[index], x.gather(0, index), torch.stack([x, x])[:, index].sum(0)

    graph, made = captured(work)
    assert [tuple(one.shape) for one in made] == [(2,)] * 3
    index.fill_(1)
    graph.replay()
    assert [one.tolist() for one in made] == [[1.0, 1.0], [1.0, 1.0], [2.0, 2.0]]
    assert out.tolist() == [0.0, 1.0, 0.0]
    with pytest.raises(RuntimeError, match="size"):
        captured(lambda: x + ones(2))


FAULTS: dict[str, tuple[Callable[[], tuple[Any, ...]], Callable[..., Any]]] = {
    "an upload": (lambda: (on_host(3),), lambda x: x.to(GPU)),
    "an upload of pageable memory": (lambda: (on_host(3),), not_waiting),
    "an upload into a buffer": (lambda: (ones(3), on_host(3)), lambda x, y: x.copy_(y)),
    "a list": (tuple, lambda: torch.tensor([1.0], device=GPU)),
    "indices of the host": (lambda: (ones(3),), lambda x: x[[0]]),
    "a table of the host": (lambda: (ones(3), (on_host(2, dtype=WHOLE),), ones(2)), torch.index_put),
    "a read": (lambda: (ones(3),), lambda x: x.cpu()),
    "item": (lambda: (ones(),), lambda x: x.item()),
    "a condition": (lambda: (ones(),), bool),
    "equal": (lambda: (ones(3), ones(3)), torch.equal),
    "nonzero": (lambda: (ones(3),), lambda x: torch.nonzero(x)),
    "a mask": (lambda: (ones(3), ones(3, dtype=BOOL)), lambda x, y: x[y]),
    "put by a mask": (lambda: (ones(3), ones(3, dtype=BOOL), 0), put),
    "synchronize": (tuple, lambda: torch.cuda.synchronize()),
    "another device": (lambda: (ones(3, device=OTHER),), lambda x: x + 1),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_captured(name: str, counts: Counts) -> None:
    make, work = FAULTS[name]
    given, x = make(), ones(2)
    captured(lambda: x + 1)
    assert counts.totals()["capture_faults"] == 0
    captured(lambda: (x + 1, work(*given)))
    totals = counts.totals()
    assert totals["capture_faults"] == 1
    assert totals["reads"] == totals["waits"] == 0


def test_an_empty_graph_is_a_fault(counts: Counts) -> None:
    captured(lambda: None)
    assert counts.totals()["capture_faults"] == 1


def test_an_event_in_a_capture_is_recorded_but_not_waited_for(counts: Counts) -> None:
    x, event = ones(3), torch.cuda.Event()
    captured(lambda: (event.record(), x + 1))
    assert counts.totals()["capture_faults"] == 0
    captured(lambda: (x + 1, event.synchronize()))
    assert counts.totals()["capture_faults"] == 1


@pytest.mark.parametrize("kept", [True, False])
def test_a_graph_must_not_outlive_its_buffers(kept: bool, counts: Counts) -> None:
    def build() -> tuple[torch.cuda.CUDAGraph, Any, Any]:
        buffer = ones(3)
        graph, out = captured(lambda: buffer + 1)
        return graph, out, buffer if kept else None

    graph, out, _buffer = build()
    graph.replay()
    assert counts.totals()["capture_faults"] == (not kept)
    assert (out.tolist() == [2.0] * 3) == kept


def test_a_graph_belongs_to_the_current_device(counts: Counts) -> None:
    x = ones(3, device=OTHER)
    with torch.cuda.device(1):
        assert torch.cuda.current_device() == 1
        assert torch.ones(1, device="cuda").device == OTHER
        graph, out = captured(lambda: x + 1)
        graph.replay()
    assert torch.cuda.current_device() == 0
    assert out.tolist() == [2.0] * 3
    assert counts.totals()["capture_faults"] == counts.totals()["device_mismatches"] == 0
    graph.replay()
    assert counts.totals()["device_mismatches"] == 1
    with pytest.raises(RuntimeError, match="invalid device"):
        torch.cuda.set_device(2)


# ---- in place, and away again ----


def test_it_leaves_torch_as_it_was() -> None:
    owners = (torch, torch.cuda, torch.Tensor)
    before = [dict(vars(owner)) for owner in owners]
    with pretend_cuda():
        assert torch.cuda.is_available()
        with pytest.raises(RuntimeError, match="in place already"):
            pretend_cuda().__enter__()
    assert [dict(vars(owner)) for owner in owners] == before
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(1, device="cuda:3")


def test_what_an_earlier_machine_left_behind_is_on_the_one_in_place() -> None:
    with torch.inference_mode():
        with pretend_cuda():
            kept = ones(3)
        with pretend_cuda() as counts:
            graph, out = captured(lambda: torch.stack([kept, kept])[:, kept.long()])
            graph.replay()
            assert out.tolist() == [[1.0] * 3] * 2
            assert counts.totals()["capture_faults"] == 0
        with pytest.raises(RuntimeError, match="inside pretend_cuda"):
            kept.add_(1)
