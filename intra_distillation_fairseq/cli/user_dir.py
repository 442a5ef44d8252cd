"""`intra-distillation user-dir`: where the plugin is."""

from __future__ import annotations

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(args: argparse.Namespace) -> int:
    """Print the plugin's folder."""
    print(Path(__file__).resolve().parent.parent)
    return 0
