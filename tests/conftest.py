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

torch.set_num_threads(1)  # models this small, and several workers, spend more time waiting for threads than computing
