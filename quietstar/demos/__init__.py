"""The embedded default of `train`: a textbook of sums in which a model learns to think, and sweeps over its options."""
