"""Batched sampling of completions, through transformers or vLLM.

`requests.py` is read first: it defines the requests, the completions and the `Sampler` that both engines implement.
"""
