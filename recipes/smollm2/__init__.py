"""SmolLM2-135M-Instruct, a real model that PyPI has, made to draft for itself; `adapter/` is what came of it."""
