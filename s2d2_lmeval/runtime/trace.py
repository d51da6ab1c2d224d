"""One record per forward: the only source of statistics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

KINDS = ("prefill", "draft", "verify", "commit", "score")


@dataclass(frozen=True)
class ForwardRecord:
    """What one forward did, row by row (R rows).

    ``kinds`` (R,) what each row did (:data:`KINDS`); ``widths`` (R,) queries; ``wanted`` (R,) queries whose logits were
    read;
    ``kept`` (R,) queries that became prefix; ``committed`` (R,) tokens decided; ``drafted`` (R,) tokens put before the
    verifier;
    ``accepted`` (R,) of these accepted; ``routed`` (R,) 1 where a draft goes on to the verifier;
    ``carried`` (R,) 1 where a verification brought the next block's draft along and it came to use.
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
    seconds: float
    model_seconds: float


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

    def reset(self) -> None:
        """Forget everything."""
        self.records.clear()
        self.new_tokens = self.requests = 0
        self.prompt_tokens = self.reused_tokens = self.batch_halvings = 0

    def seated(self, prompt: int, reused: int) -> None:
        """Count a prompt of ``prompt`` tokens, ``reused`` of which need not be run."""
        self.prompt_tokens += prompt
        self.reused_tokens += reused

    def finished(self, new_tokens: int) -> None:
        """Count a request that is complete."""
        self.requests += 1
        self.new_tokens += new_tokens

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
            "seconds": seconds,
            "model_seconds": sum(record.model_seconds for record in self.records),
            "tokens_per_second": self.new_tokens / seconds if seconds else 0.0,
        }
