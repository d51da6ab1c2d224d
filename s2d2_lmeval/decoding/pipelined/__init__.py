"""Several blocks at once (D2F)."""
