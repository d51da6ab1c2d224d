"""A small trained block-diffusion model and the corpora it was trained on; the repository has the recipe.

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path

from s2d2_lmeval.toy.corpora import CORPORA, Corpus, held_out, score
from s2d2_lmeval.toy.problem import Problem

__all__ = ["CORPORA", "Corpus", "Problem", "checkpoint_path", "drafter_path", "held_out", "score"]


def checkpoint_path() -> Path:
    """Folder of the checkpoint that ships with the package, in the format of SDAR checkpoints."""
    return Path(__file__).parent / "checkpoint"


def drafter_path() -> Path:
    """Folder of the DFlash drafter for that checkpoint's autoregressive mode."""
    return Path(__file__).parent / "drafter_checkpoint"
