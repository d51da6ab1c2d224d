"""Tasks and sweeps for ``lm_eval --include_path``; installed as ``s2d2_lmeval.task_configs``."""
