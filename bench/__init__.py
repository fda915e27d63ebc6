"""Benchmarks: python -m bench.op, from the repository's root, with gdn2_ext installed."""

import sys
from pathlib import Path

# Inputs, error measures and provenance are those of the tests.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python_tests"))
