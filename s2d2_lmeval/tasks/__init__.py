"""Support for tasks: data, answer extraction, and a sandbox for model-written code."""
