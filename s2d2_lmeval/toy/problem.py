"""What the three toy corpora have in common: the shape of one problem."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One question with its reference answer and what is needed to score another answer.

    Attributes:
        corpus: name of the corpus, a key of :data:`s2d2_lmeval.toy.corpora.CORPORA`.
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
