"""The published loops, written out anew on stock transformers, and how long this package takes for the same tokens."""
