"""Keyed randomness, filters, row statistics and the acceptance rule."""
