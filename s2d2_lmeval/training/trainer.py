"""The loop that trains what drafts: a rate that falls, a look at held-out texts now and then.

Every draw is a function of (seed, step, process), so a run that goes on from what it saved ends as one that was never
interrupted, if its length is given in steps; given in minutes, how many steps that is depends on the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

from s2d2_lmeval.errors import TrainingError
from s2d2_lmeval.training.anchors import Windows, draw
from s2d2_lmeval.training.checkpointing import log, read_log, read_state, save_state
from s2d2_lmeval.training.data import Text
from s2d2_lmeval.training.losses import draft_loss, hits
from s2d2_lmeval.training.processes import Processes
from s2d2_lmeval.training.student import Student, Trainable

WARM_UP_STEPS, LAST_RATE = 20, 0.1
GROWTH = ((0.05, 2), (0.15, 4))
"""Share of the run up to which windows that grow are no larger than this; then they are as large as asked."""
ENTROPY_SHARE = 1 / 3
"""Share of the run before the loss is the distance of laws."""
HELD_OUT_WINDOWS = 12


@dataclass(frozen=True)
class Recipe:
    """How long and how to train: ``steps``, or else ``minutes``; each step ``accumulate`` times ``texts`` texts with up
    to ``windows`` drafts each; ``rate`` is that of AdamW, ``look`` the seconds between looks at held-out texts. Places
    weigh less the later, or by their ``pace`` (:func:`~s2d2_lmeval.training.losses.by_pace`).
    """

    minutes: float | None = None
    steps: int | None = None
    texts: int = 1
    windows: int = 16
    accumulate: int = 1
    rate: float = 1e-3
    seed: int = 0
    look: float = 60.0
    pace: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """All but how long and how often it is looked at."""
        return {name: value for name, value in asdict(self).items() if name not in ("minutes", "look")}


class Trainer:
    """Trains ``student``, a ``form``, on ``texts``; measures on ``held_out``; keeps its state and log in ``folder``;
    ``base`` is the digest of the target's weights.

    ``on_look`` is called with every record of the log, after the state was saved; ``on_step`` with the share of the run
    that is done.
    """

    def __init__(
        self,
        student: Student,
        form: Trainable,
        texts: Sequence[Text],
        held_out: Sequence[Text],
        recipe: Recipe,
        folder: Path,
        base: str,
        processes: Processes,
        on_look: Callable[[dict[str, Any]], None] = lambda record: None,
        on_step: Callable[[float], None] = lambda share: None,
    ) -> None:
        self.student, self.texts, self.recipe, self.folder = student, texts, recipe, folder
        self.processes, self.on_look, self.on_step = processes, on_look, on_step
        kept = {**recipe.identity, **vars(form), "processes": processes.count, "base": base}
        self.kept = {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}
        """What must not change when a run goes on."""
        self.decay = None if recipe.pace else max(form.window / 2, 1.0)
        self.optimizer = torch.optim.AdamW(student.groups(), lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.fixed = [draw([text], student.masks, HELD_OUT_WINDOWS, Random(1), student.device) for text in held_out]
        self.step, self.seconds, self.mask_tokens, self.clean_tokens = 0, 0.0, 0, 0
        self.mean: float | None = None
        self._resume()

    @property
    def share(self) -> float:
        """How much of the run is done, 0 to 1."""
        if self.recipe.steps is not None:
            return min(self.step / self.recipe.steps, 1.0)
        assert self.recipe.minutes is not None
        return min(self.seconds / (60 * self.recipe.minutes), 1.0)

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the last record of the log."""
        looked = self.seconds if self.records else -self.recipe.look
        while self.share < 1:
            if self.seconds - looked >= self.recipe.look and not self._looked:
                self._look()
                looked = self.seconds
            began = time.perf_counter()
            self._train()
            self.seconds = self.processes.of_first(self.seconds + time.perf_counter() - began)
            self.on_step(self.share)
        if not self._looked:
            self._look()
        return self.records[-1]

    @property
    def _looked(self) -> bool:
        """Whether the log has this step."""
        return bool(self.records) and self.records[-1]["step"] == self.step

    def _train(self) -> None:
        """One step."""
        recipe, share = self.recipe, self.share
        growth, masks = GROWTH if self.student.grows else (), self.student.masks
        masks = next((window - 1 for end, window in growth if share < end and window - 1 < masks), masks)
        rng = Random(f"{recipe.seed} {self.step} {self.processes.rank}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        for _ in range(recipe.accumulate):
            chosen = [rng.choice(self.texts) for _ in range(recipe.texts)]
            windows = draw(chosen, masks, recipe.windows, rng, self.student.device)
            loss = self._loss(windows, generator, share >= ENTROPY_SHARE)
            (loss / recipe.accumulate).backward()
            self.mask_tokens += windows.known.numel() * self.processes.count
            self.clean_tokens += len(windows.tokens) * self.processes.count
            self.mean = loss.item() if self.mean is None else 0.95 * self.mean + 0.05 * loss.item()
        rate = recipe.rate * min(1.0, (self.step + 1) / WARM_UP_STEPS) * max(LAST_RATE, 1 - share)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        parameters = self.student.parameters.values()
        self.processes.average(parameter.grad for parameter in parameters if parameter.grad is not None)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def _loss(self, windows: Windows, generator: torch.Generator, by_law: bool) -> torch.Tensor:
        drafted, taught = self.student.forward(windows, generator)
        taught = taught if by_law else None
        return draft_loss(self.student.head, drafted, taught, windows.truth, windows.known, self.decay)

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """Of held-out texts: how often each place of a window is right, and how many tokens a draft gets accepted."""
        generator = torch.Generator().manual_seed(0)
        right = [
            hits(self.student.head, self.student.forward(one, generator)[0], one.truth, one.known) for one in self.fixed
        ]
        found = torch.cat(right).float()
        return {
            "accepted_per_draft": round(found.cumprod(1).sum(1).mean().item(), 4),
            "right": [round(share, 3) for share in found.mean(0).tolist()],
        }

    def _look(self) -> None:
        """Measure, log, save."""
        record = {
            "step": self.step,
            "seconds": round(self.seconds, 1),
            "mask_tokens": self.mask_tokens,
            "clean_tokens": self.clean_tokens,
            "loss": None if self.mean is None else round(self.mean, 4),
            **self.measure(),
        }
        self.records.append(record)
        if self.processes.rank == 0:
            self._save()
            log(self.folder, record)
            self.on_look(record)
        self.processes.wait()

    # ---- going on ----

    def _state(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, parameter in self.student.parameters.items():
            found[name] = parameter
            held = self.optimizer.state.get(parameter, {})
            found |= {f"{field}.{name}": held[field] for field in ("exp_avg", "exp_avg_sq") if field in held}
        return found

    def _save(self) -> None:
        counts = {name: getattr(self, name) for name in ("step", "seconds", "mask_tokens", "clean_tokens", "mean")}
        save_state(self.folder, self._state(), {"counts": counts, "recipe": self.kept})

    def _resume(self) -> None:
        self.records: list[dict[str, Any]] = []
        found = read_state(self.folder)
        if found is None:
            return
        tensors, about = found
        other = sorted(name for name, value in self.kept.items() if value != about["recipe"].get(name))
        if other or not tensors.keys() >= self.student.parameters.keys():
            what = f"with another {other[0]}" if other else "of another model"
            raise TrainingError(
                f"{self.folder} holds a run {what}; give the same options to go on with it, or another folder."
            )
        for name, parameter in self.student.parameters.items():
            parameter.data.copy_(tensors[name])
            if f"exp_avg.{name}" in tensors:
                held = {field: tensors[f"{field}.{name}"].to(parameter.device) for field in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(about["counts"]["step"])), **held}
        for name, value in about["counts"].items():
            setattr(self, name, value)
        self.records = read_log(self.folder, self.step)
