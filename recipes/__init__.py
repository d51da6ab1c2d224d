"""How the bundled models and problems were made; in the repository, not in the wheel."""
