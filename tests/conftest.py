"""What every test runs under: no network, one profile for the property tests."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network must fail here, not on the next person's machine
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # silences the fork warning of tests that start subprocesses

import torch

if not torch.cuda.is_available():
    # read when the kernels are first imported: without a GPU, Triton's interpreter runs them
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import HealthCheck, settings

# derandomize: a failure seen once is seen by everyone; no deadline: an operator's first call is far slower
settings.register_profile("quietstar", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("quietstar")

# one thread in each of several workers: two would wait for each other
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))
