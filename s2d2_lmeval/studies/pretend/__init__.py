"""A pretend CUDA device: a model decodes on it as on a GPU, and what a GPU would have had to do is counted.

Tensors say ``cuda:N`` and compute on the CPU, so answers can be compared. Launches, transfers, waits, captures and
replays are counted, and whatever a real device would refuse, or silently do wrong, is a fault::

    model = s2d2_lmeval.load("toy")
    with pretend_cuda(devices=2) as counts:
        on_gpu = move(model)
        on_gpu.generate(prompts, {"decoder": "s2d2"})
    print(counts.totals())

It counts a launch for every tensor operation that is not a view, which is the least that a device can do: some
operations are several kernels. Time on it means nothing. Streams run in the order of the host's calls.
"""

from s2d2_lmeval.studies.pretend.counts import Counts
from s2d2_lmeval.studies.pretend.installed import pretend_cuda
from s2d2_lmeval.studies.pretend.moving import move, move_module

__all__ = ["Counts", "move", "move_module", "pretend_cuda"]
