"""The machine: versions, bandwidth, what a launch and a graph node cost, and what cuDNN's attention costs per shape."""

from __future__ import annotations

import platform
import subprocess
import time
from typing import Any

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.setting import Setting
from s2d2_lmeval.studies.bench.measuring import copy_bandwidth


def run(setting: Setting) -> None:
    """Measure the machine."""
    with setting.part("versions"):
        setting.note(versions=versions(setting))
    with setting.part("bandwidth"):
        setting.note(terabytes_per_second=copy_bandwidth(setting.device) / 1e12)
    with setting.part("launches"):
        setting.note(microseconds=launch_costs(setting))
    with setting.part("plans"):
        setting.note(attention_milliseconds=plan_costs(setting))
    found = setting.found
    costs = ", ".join(f"{name} {cost:.1f}" for name, cost in found.get("microseconds", {}).items())
    plans = {name: one for name, one in found.get("attention_milliseconds", {}).items() if "unseen" in one}
    unseen = ", ".join(f"{name} {one['unseen']:.2f} ({one['again']:.2f} again)" for name, one in plans.items())
    device, bandwidth = found.get("versions", {}).get("device"), found.get("terabytes_per_second", 0)
    setting.say(f"{device}, {bandwidth:.2f} TB/s; µs: {costs}; ms of attention at an unseen shape: {unseen}")


def versions(setting: Setting) -> dict[str, Any]:
    """Of everything that matters."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    if setting.rehearse:
        return {**found, "device": "cpu"}
    properties = torch.cuda.get_device_properties(0)
    asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    smi = subprocess.run(asked, capture_output=True, text=True, check=False)
    return {
        **found,
        "device": properties.name,
        "memory": properties.total_memory,
        "processors": properties.multi_processor_count,
        "capability": [properties.major, properties.minor],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver, clock, power": smi.stdout.strip(),
    }


def launch_costs(setting: Setting) -> dict[str, float]:
    """Microseconds of a small kernel: launched by itself, and as a node of a graph."""
    count = 50 if setting.rehearse else 2000
    x = torch.ones(64, device=setting.device)

    def work() -> None:
        for _ in range(count):
            x.add_(1)

    found = {"launch": setting.median_us(work, 5) / count}
    if not setting.rehearse:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        found["node"] = setting.median_us(graph.replay, 5) / count
        found["replay of a node"] = _replay_of_one(setting, x)
    return found


def _replay_of_one(setting: Setting, x: torch.Tensor) -> float:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(1)
    return setting.median_us(graph.replay)


def plan_costs(setting: Setting) -> dict[str, dict[str, Any]]:
    """Milliseconds of masked attention at shapes that were not seen before, and when they are seen again."""
    heads, dim, spans = (4, 16, (21, 22)) if setting.rehearse else (32, 128, (301, 302, 303, 384))
    found = {}
    backends = {
        "cudnn": [SDPBackend.CUDNN_ATTENTION],
        "efficient": [SDPBackend.EFFICIENT_ATTENTION],
        "math": [SDPBackend.MATH],
    }
    for name, chosen in backends.items():
        unseen, again, said = [], [], ""
        for span in spans:
            query = torch.randn(2, heads, 4, dim, device=setting.device, dtype=setting.half)
            key = torch.randn(2, heads, span, dim, device=setting.device, dtype=setting.half)
            mask = torch.zeros(2, 1, 4, -(-span // 8) * 8, device=setting.device, dtype=setting.half)[..., :span]
            try:
                with sdpa_kernel(chosen):
                    unseen.append(_milliseconds(setting, query, key, mask))
                    again.append(_milliseconds(setting, query, key, mask))
            except RuntimeError as error:
                said = str(error).splitlines()[0]
        worst = {"unseen": max(unseen), "again": max(again)} if unseen else {}
        found[name] = {**worst, **({"refused": said} if said else {})}
    return found


def _milliseconds(setting: Setting, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor) -> float:
    setting.wait()
    started = time.perf_counter()
    scaled_dot_product_attention(query, key, key, attn_mask=mask)
    setting.wait()
    return 1000 * (time.perf_counter() - started)
