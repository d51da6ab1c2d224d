"""GPU kernels, each beside a torch reference that says what it computes.

=================  =====================================================================
:mod:`.dispatch`   which of the two runs, and the one place where that can be replaced
:mod:`.attention`  attention over prefix and fellow queries
:mod:`.layer`      what a decoder layer does between its matrix products
:mod:`.fused`      decoder layers made of these
=================  =====================================================================

Those of decisions are in ``decoding/sampling/``. ``<name>_triton.py`` holds the Triton side of ``<name>.py`` and is
imported when something of it first runs: without Triton the package works, with torch.
"""
