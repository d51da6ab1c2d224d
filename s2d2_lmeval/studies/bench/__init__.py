"""Measure decoders on this machine, together with plain transformers loops."""
