"""Global state that no test may leave changed, and data that many tests share."""

import logging
import signal
import warnings

import hypothesis
import pytest
import torch

import ncprior

# The same examples on every machine and in every run; nothing is written.
hypothesis.settings.register_profile(
    "fixed", derandomize=True, database=None, deadline=None, max_examples=30
)
hypothesis.settings.load_profile("fixed")


def global_state():
    """What `import ncprior`, or any function of it, must leave as it was."""
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "root handlers": list(logging.getLogger().handlers),
        "SIGINT": signal.getsignal(signal.SIGINT),
        "SIGTERM": signal.getsignal(signal.SIGTERM),
    }


@pytest.fixture(autouse=True)
def unchanged_global_state():
    before = global_state()
    yield
    assert global_state() == before


@pytest.fixture
def rng():
    """A seeded generator of its own for each test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def digits():
    """The digits of scikit-learn and their splits."""
    with warnings.catch_warnings():
        return ncprior.load_data("digits")


@pytest.fixture(scope="session")
def binary_digits():
    """The same, binarised anew on every pass."""
    with warnings.catch_warnings():
        return ncprior.load_data("digits", binarize="dynamic")
