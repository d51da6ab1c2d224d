"""The decoding options: their description, validation and defaults."""
