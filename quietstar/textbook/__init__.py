"""The embedded default: a small model reads a textbook of sums, then learns by itself which aside to think."""
