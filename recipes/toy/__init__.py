"""How the embedded model and its drafter were trained."""
