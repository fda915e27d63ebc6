"""Benchmarks: python -m bench.op, from the repository's root, with gdn2_ext installed."""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent

# What is measured is the installed package: this folder's gdn2_ext, which has no kernels, must not hide it.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != _ROOT] + [str(_ROOT)]
# Inputs, error measures and provenance are those of the tests.
sys.path.append(str(_ROOT / "python_tests"))
