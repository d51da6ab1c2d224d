"""Decoding functions under their published names, one file per family; installed as ``s2d2_lmeval.custom_generate``."""
