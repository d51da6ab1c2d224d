"""Decoders of models whose text is token-causal, with a window of masks after it: the published ones."""
