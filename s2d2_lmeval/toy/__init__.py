"""A small trained block-diffusion model, and problems that it was not trained on; the repository has the recipe.

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

CORPORA = ("arithmetic", "programs", "instructions")


@dataclass(frozen=True)
class Problem:
    """One question with its reference answer and what is needed to score another answer.

    Attributes:
        corpus: one of :data:`CORPORA`.
        kind: the template within the corpus.
        prompt: what the model reads; the same text is the user turn when a chat template is used.
        answer: a reference answer, without the white space that joins it to a raw prompt.
        separator: white space between raw prompt and answer. After a chat template there is none.
        check: what the scorer needs, as JSON, so that every corpus has the same columns in a data set.
    """

    corpus: str
    kind: str
    prompt: str
    answer: str
    separator: str
    check: str

    @property
    def specification(self) -> dict[str, Any]:
        """``check``, decoded."""
        return json.loads(self.check)


@cache
def held_out(name: str) -> tuple[Problem, ...]:
    """The held-out problems of a corpus."""
    lines = (Path(__file__).parent / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(problem for problem in (Problem(**json.loads(line)) for line in lines) if problem.corpus == name)


def score(problem: Problem, response: str) -> float:
    """1.0 where a response is right by the rule of the problem's corpus, else 0.0."""
    from s2d2_lmeval.toy.scoring import SCORERS

    return float(SCORERS[problem.corpus](problem.kind, problem.prompt, problem.specification, response))


def checkpoint_path() -> Path:
    """Folder of the checkpoint that ships with the package, in the format of SDAR checkpoints."""
    return Path(__file__).parent / "checkpoint"


def drafter_path() -> Path:
    """Folder of the DFlash drafter for that checkpoint's autoregressive mode."""
    return Path(__file__).parent / "drafter_checkpoint"


def embedded(source: Any, drafter: bool = False) -> Any:
    """``source``, but the folder of the embedded checkpoint (or its drafter) where it is ``"toy"``."""
    if not isinstance(source, (str, Path)) or str(source) != "toy":
        return source
    return drafter_path() if drafter else checkpoint_path()
