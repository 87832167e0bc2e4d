"""The names of the backends, without torch, so that a configuration can list them.

A new backend is a name here and a line in the table of each operation: `IMPLEMENTATIONS` of `thought_attention` and
`token_sampling`, `ROW_OPERATIONS` of `mixed_cross_entropy`.
"""

from __future__ import annotations

from typing import Literal, get_args

Backend = Literal["auto", "triton", "torch", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)
IMPLEMENTED = BACKENDS[1:]
"""All but "auto", which chooses among them."""
