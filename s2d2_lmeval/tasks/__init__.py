"""What tasks need: data, answers in replies, and a sandbox for model-written code."""
