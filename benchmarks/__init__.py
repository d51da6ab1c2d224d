"""How numbers in the docs were measured; in the repository, not in the wheel."""
