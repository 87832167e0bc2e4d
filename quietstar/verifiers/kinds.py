"""The kinds of verifiers in one table. A new kind is a module with a `Kind` and a line here."""

from __future__ import annotations

from quietstar.verifiers.dpo import DPO, LIKELIHOOD
from quietstar.verifiers.outcome_reward import ORM
from quietstar.verifiers.training import Kind

KINDS: dict[str, Kind] = {"dpo": DPO, "likelihood": LIKELIHOOD, "orm": ORM}
"""By the name that `verifier.json` and a run's directories know a kind by. V-STaR's verifier is the first one, and the
others are what it is compared with."""

PLAIN = "likelihood"
"""What a model directory without `verifier.json` is."""
