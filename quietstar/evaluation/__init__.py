"""Measures of the `evaluate` command: a model with its thoughts and without them, on the same items."""
