"""The lm-evaluation-harness side: the model class ``s2d2``, the ``s2d2_stats`` filter and helpers for task YAML files.

Nothing is imported here: the harness names each class by its module, and importing this package must stay cheap.
"""
