"""A drafter beside the target: the model, its checkpoint, and the runner of both."""
