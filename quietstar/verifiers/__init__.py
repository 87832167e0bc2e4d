"""Verifiers, which tell right completions from wrong ones (V-STaR, arXiv 2402.06457), and rankings by their scores."""
