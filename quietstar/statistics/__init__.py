"""Measures of samples, votes and verifiers, exact where they can be."""
