"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real corpora: ID_SHARED_DATA names it, or it is a folder shared/data beside the repository.

    A test that asks for it is skipped where there is none.
    """
    given = os.environ.get("ID_SHARED_DATA")
    folder = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real corpora: '{folder}' is not there (ID_SHARED_DATA may name the folder)")
    return folder.resolve()
