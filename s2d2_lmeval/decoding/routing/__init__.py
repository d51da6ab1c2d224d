"""When S2D2 verifies: policies, estimators of acceptance, measured costs."""
