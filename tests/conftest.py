"""What all tests share: real corpora, --full, and the count of what the long tests went through."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import hypothesis
import pytest

# The same cases in every run, however slow the machine; nothing is written into the repository.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="run in full the tests that otherwise take a sample (docs/reliability.md)"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Sum up what passed tests noted with record_property: kills survived, files truncated, ..."""
    totals: Counter[str] = Counter()
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            totals[name] += value
    for name in sorted(totals):
        terminalreporter.write_line(f"{name}: {totals[name]:,}")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether the long tests are to run in full."""
    return request.config.getoption("--full")


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
