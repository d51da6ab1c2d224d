"""Sweeps, searches, benches and reports over many runs."""
