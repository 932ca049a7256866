"""Fixtures that every test may use; tests find the project's tools without installing them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tools"))
# Tests run side by side, one process for each core: threads inside them would only compete.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the clone."""
    return REPOSITORY


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Stored results of the published implementations, part of this repository."""
    return REPOSITORY / "tests" / "golden"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real images and large golden files beside the clone; the test is skipped without it."""
    folder = Path(os.environ.get("JEPA_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist; set JEPA_SHARED to the folder that holds the shared data")
    return folder
