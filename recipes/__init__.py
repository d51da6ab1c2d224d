"""How what comes with the package was made; in the repository, not in the wheel."""
