"""Thought streams on an unmodified transformers backbone.

`modeling.py` is read first; `passes.py`, `attention.py` and `layers.py` run its passes. `generation.py` is `generate`:
`prediction.py` makes each of its predictions from the state in `cache.py`.

Shapes: B texts of L tokens; A anchors per text with K thoughts each, so P = A*K streams; T sampled tokens in a thought,
J tokens of lookahead, S = T + 1 + J tokens in a stream; N tokens in a pass; E hidden size, V vocabulary; H query heads,
Hkv key and value heads, D head size.
"""
