"""What the `evaluate` command measures: a model with its thoughts and without them, on the same items."""
