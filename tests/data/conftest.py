"""Where real data lies, and small images to write to files."""

import os
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def pytest_configure(config):
    config.addinivalue_line("markers", "data: needs the real data sets under $NCPRIOR_DATA")


@pytest.fixture
def real_data():
    """path -> that file or directory of the real data; skips the test if it is not there."""
    base = Path(os.environ.get("NCPRIOR_DATA") or REPOSITORY.parent / "shared" / "data")

    def find(name: str) -> Path:
        if not (base / name).exists():
            pytest.skip(f"no real data at {base / name}; set NCPRIOR_DATA to where they are")
        return base / name

    return find


@pytest.fixture
def pixels():
    """Ten grey images (10, 6, 5), uint8, all different."""
    return np.random.default_rng(0).integers(0, 256, (10, 6, 5), dtype=np.uint8)


@pytest.fixture(autouse=True)
def no_data_directory(monkeypatch, request):
    """Keep the user's own data directory out of the tests that do not ask for it."""
    if "real_data" not in request.fixturenames:
        monkeypatch.delenv("NCPRIOR_DATA", raising=False)
