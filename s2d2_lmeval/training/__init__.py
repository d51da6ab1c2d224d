"""Training of what drafts: an adapter that makes an autoregressive checkpoint draft for itself."""
