"""What several commands read from their command line."""

from __future__ import annotations

import argparse


def count(text: str) -> int:
    """A number of samples, of threads; a type for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number
