"""GPU kernels, each beside a torch reference that says what it computes.

:mod:`.dispatch` says which of the two runs, and is the one place where that can be replaced. ``<name>_triton.py`` holds
the Triton side of ``<name>.py`` and is imported when something of it first runs: without Triton the package works, with
torch. Those of decisions are in ``decoding/sampling/``.
"""
