"""Runs of runs: measurements over decoders, schedules and batches."""
