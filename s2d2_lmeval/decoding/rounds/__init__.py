"""Rounds of draft and verification with the autoregressive law: sliding, DFlash, DDTree."""
