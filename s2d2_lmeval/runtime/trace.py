"""One record per forward: the only source of statistics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

KINDS = ("prefill", "draft", "verify", "commit", "drafter", "score")


@dataclass(frozen=True)
class ForwardRecord:
    """What one forward did, row by row (R rows).

    ``kinds`` (R,) what each row did (:data:`KINDS`); ``widths`` (R,) queries; ``wanted`` (R,) queries whose logits were
    read;
    ``kept`` (R,) queries that became prefix; ``committed`` (R,) tokens decided; ``drafted`` (R,) tokens put before the
    verifier;
    ``accepted`` (R,) of these accepted; ``routed`` (R,) 1 where a draft goes on to the verifier;
    ``carried`` (R,) 1 where a verification brought the next draft along and it came to use; ``deepest`` (R,) depth of
    the draft tree or chain put before the verifier; ``windows`` (R,) draft windows that ran beside it; ``states`` (R,)
    draft states of a block that ran beside its current one, and ``skipped`` (R,) denoising steps that needed no forward
    of their own because of them.
    ``seconds`` is the whole engine step, ``model_seconds`` the part inside the model.
    """

    kinds: tuple[str, ...]
    widths: np.ndarray
    wanted: np.ndarray
    kept: np.ndarray
    committed: np.ndarray
    drafted: np.ndarray
    accepted: np.ndarray
    routed: np.ndarray
    carried: np.ndarray
    deepest: np.ndarray
    windows: np.ndarray
    seconds: float
    model_seconds: float
    states: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    skipped: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


@dataclass
class Trace:
    """Records of everything a model ran since :meth:`reset`, and what they add up to.

    ``new_tokens`` counts tokens handed to the user: up to the stop, without what a block holds behind it.
    ``prompt_tokens`` counts those of seated prompts and ``reused_tokens`` the ones among them whose keys were there
    already; ``batch_halvings`` says how often memory ran out and fewer rows went on.
    """

    records: list[ForwardRecord] = field(default_factory=list)
    new_tokens: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    batch_halvings: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def reset(self) -> None:
        """Forget everything."""
        self.records.clear()
        self.counts.clear()
        self.new_tokens = self.requests = 0
        self.prompt_tokens = self.reused_tokens = self.batch_halvings = 0

    def seated(self, prompt: int, reused: int) -> None:
        """Count a prompt of ``prompt`` tokens, ``reused`` of which need not be run."""
        self.prompt_tokens += prompt
        self.reused_tokens += reused

    def finished(self, new_tokens: int, counts: Mapping[str, int] | None = None) -> None:
        """Count a request that is complete, and what its decoder has counted of it."""
        self.requests += 1
        self.new_tokens += new_tokens
        self.counts.update(counts or {})

    def totals(self) -> dict[str, float]:
        """Sums over all records.

        ``forwards`` counts calls of the model; ``nfe`` counts a call once per row that took part in it, which is what a
        request sees;
        ``tokens_per_forward`` is new tokens over ``nfe``; ``acceptance`` is accepted over drafted tokens under
        verification;
        ``routed`` is the share of drafts that went on to the verifier.
        """
        kinds: Counter[str] = Counter()
        for record in self.records:
            kinds.update(record.kinds)

        def total(name: str) -> int:
            return int(sum(getattr(record, name).sum() for record in self.records))

        seconds = sum(record.seconds for record in self.records)
        nfe = sum(kinds.values())
        drafted, drafts = total("drafted"), kinds["draft"] + total("carried")
        return {
            **self.counts,
            **self._two_models(kinds),
            "requests": self.requests,
            "new_tokens": self.new_tokens,
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "batch_halvings": self.batch_halvings,
            "forwards": len(self.records),
            "nfe": nfe,
            **{f"{kind}_forwards": kinds[kind] for kind in KINDS},
            "tokens_per_forward": self.new_tokens / nfe if nfe else 0.0,
            "drafted": drafted,
            "accepted": total("accepted"),
            "acceptance": total("accepted") / drafted if drafted else 0.0,
            "routed": total("routed") / drafts if drafts else 0.0,
            "rows_per_forward": nfe / len(self.records) if self.records else 0.0,
            "queries": total("widths"),
            **self._drafting(),
            "seconds": seconds,
            "model_seconds": sum(record.model_seconds for record in self.records),
            "tokens_per_second": self.new_tokens / seconds if seconds else 0.0,
        }

    def _two_models(self, kinds: Counter[str]) -> dict[str, float]:
        """Of decoders with a drafter beside the target: the target's forwards, engine steps of each and their time.

        On a GPU a drafter's step does not wait for the device: what it leaves to do there shows in the target's.
        """
        if not kinds["drafter"]:
            return {}
        targets = sum(kinds.values()) - kinds["drafter"]
        drafter = [record.seconds for record in self.records if "drafter" in record.kinds]
        target = [record.seconds for record in self.records if "drafter" not in record.kinds]
        return {
            "target_forwards": targets,
            "tokens_per_target_forward": self.new_tokens / targets if targets else 0.0,
            "drafter_steps": len(drafter),
            "target_steps": len(target),
            "drafter_seconds": sum(drafter),
            "target_seconds": sum(target),
        }

    def _drafting(self) -> dict[str, float]:
        """Of decoders that verify trees or chains and carry drafts along: windows run, used and missed, and how many
        drafts reached a depth and how many of these were accepted there. Of those that draft states of a block: its
        denoising steps, the states drafted, and those accepted, each of which saved a forward.
        """
        depths = [(record.deepest, record.accepted) for record in self.records if record.deepest.any()]
        counts: dict[str, float] = {}
        if any(record.windows.any() for record in self.records):
            rounds = sum(kind != "prefill" for record in self.records for kind in record.kinds)
            used = sum(int(record.carried.sum()) for record in self.records)
            windows = sum(int(record.windows.sum()) for record in self.records)
            counts |= {"windows": windows, "windows_used": used, "windows_missed": rounds - used}
        states = sum(int(record.states.sum()) for record in self.records)
        if states:
            saved = sum(int(record.skipped.sum()) for record in self.records)
            drafts = sum(kind == "draft" for record in self.records for kind in record.kinds)
            counts |= {"steps": drafts + saved, "states_drafted": states, "states_accepted": saved}
        if depths:
            deepest, accepted = (np.concatenate(column) for column in zip(*depths, strict=True))
            for depth in range(1, int(deepest.max()) + 1):
                counts[f"offered_at_{depth}"] = int((deepest >= depth).sum())
                counts[f"accepted_at_{depth}"] = int(((deepest >= depth) & (accepted >= depth)).sum())
        return counts
