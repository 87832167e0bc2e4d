"""Batched sampling of completions, through transformers or vLLM."""
