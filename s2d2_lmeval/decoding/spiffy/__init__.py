"""Speculation over denoising states."""
