"""What a checkpoint is: the families, their facts, and how to load or adopt a model of one."""

from __future__ import annotations

from s2d2_lmeval.families.adoption import adopt
from s2d2_lmeval.families.facts import Facts, Family
from s2d2_lmeval.families.files import read_config
from s2d2_lmeval.families.loading import checkpoint_facts, load_checkpoint
from s2d2_lmeval.families.registry import FAMILIES, family_named, identify, register

__all__ = [
    "FAMILIES",
    "Facts",
    "Family",
    "adopt",
    "checkpoint_facts",
    "family_named",
    "identify",
    "load_checkpoint",
    "read_config",
    "register",
]
