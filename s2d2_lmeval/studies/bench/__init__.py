"""Measure decoders on this machine, beside loops that others would write."""
