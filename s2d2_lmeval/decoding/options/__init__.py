"""Every decoding option: how it is described, checked and laid over published settings."""
