"""The names of the backends stand in one place, which needs no torch."""

from __future__ import annotations

import subprocess
import sys
from typing import get_type_hints

from quietstar.config.loops import GeneratorOptions
from quietstar.config.training import ModelOptions
from quietstar_kernels.backends import IMPLEMENTED, Backend
from quietstar_kernels.mixed_cross_entropy.chunks import ROW_OPERATIONS
from quietstar_kernels.thought_attention import IMPLEMENTATIONS as ATTENTION
from quietstar_kernels.token_sampling.op import IMPLEMENTATIONS as SAMPLING


def test_the_names_need_no_torch() -> None:
    code = "import sys; from quietstar_kernels.backends import BACKENDS; print(*BACKENDS, 'torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["auto", "triton", "torch", "reference", "False"]


def test_every_operation_has_every_backend_and_every_configuration_its_name() -> None:
    """The whole-logits references of the losses and the sampler are called before their operators."""
    assert set(ATTENTION) == set(IMPLEMENTED)
    assert set(ROW_OPERATIONS) == set(SAMPLING) == set(IMPLEMENTED) - {"reference"}
    for options in (ModelOptions, GeneratorOptions):
        assert get_type_hints(options)["backend"] == Backend


def test_a_function_is_found_whatever_of_the_package_was_imported_before() -> None:
    """A package of an operation's name took the place of the function that bears it."""
    code = (
        "import quietstar_kernels.mixed_cross_entropy.op, quietstar_kernels.thought_attention.op\n"
        "import quietstar_kernels as kernels\n"
        "print(all(callable(getattr(kernels, name)) for name in kernels.__all__))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "True"
