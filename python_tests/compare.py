"""How the tests measure a difference, and what they print when it is too large.

Every function takes torch tensors, on any device and of any floating dtype, NumPy arrays or CuPy arrays.
"""

from __future__ import annotations

import numpy as np
import torch


def to_float64(x) -> np.ndarray:
    """x as a NumPy array in float64."""
    return np.asarray(_to_host(x), dtype=np.float64)


def relative_error(actual, expected) -> float:
    """||actual - expected|| / ||expected|| in float64; ||actual|| where expected is zero or empty.

    Not finite if anything in either is not.
    """
    actual, expected = to_float64(actual), to_float64(expected)
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {actual.shape} and {expected.shape}")
    if not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return float("nan")
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(actual) if norm == 0 else np.linalg.norm(actual - expected) / norm)


def assert_close(actual, expected, bar: float, name: str) -> None:
    """Assert equal shapes, NaNs and infinities at equal places, and elsewhere a relative L2 error <= bar."""
    actual, expected = to_float64(actual), to_float64(expected)
    _assert_equal(f"{name}: shape", actual.shape, expected.shape)
    finite = np.isfinite(expected)
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    misplaced = np.where(finite, ~np.isfinite(actual), ~same)
    if misplaced.any():
        raise AssertionError(
            f"{name}: {misplaced.sum()} of {misplaced.size} elements that are NaN or infinite differ; "
            f"first at {_describe(misplaced, actual, expected)}"
        )
    error = relative_error(np.where(finite, actual, 0.0), np.where(finite, expected, 0.0))
    if not error <= bar:
        with np.errstate(invalid="ignore"):
            difference = np.where(finite, np.abs(actual - expected), 0.0)
        worst = difference == difference.max()
        raise AssertionError(
            f"{name}: relative L2 error {error:.3e} is above the bar {bar:.3e}; "
            f"worst element at {_describe(worst, actual, expected)}"
        )


def assert_bitwise_equal(a, b, name: str, nan: bool = False) -> None:
    """Assert equal shapes, dtypes and bits; 0.0 and -0.0 are not equal.

    Nothing may be NaN, as what nobody wrote is. With `nan` NaNs at equal places are equal.
    """
    _assert_equal(f"{name}: shape", tuple(a.shape), tuple(b.shape))
    _assert_equal(f"{name}: dtype", str(a.dtype), str(b.dtype))
    values_a, values_b = to_float64(a), to_float64(b)
    missing = np.isnan(values_a) & np.isnan(values_b)
    if not nan and missing.any():
        raise AssertionError(
            f"{name}: {missing.sum()} of {missing.size} elements are NaN in both; "
            f"first at {_describe(missing, values_a, values_b)}"
        )
    different = (_bits(a) != _bits(b)) & ~missing
    if different.any():
        raise AssertionError(
            f"{name}: {different.sum()} of {different.size} elements differ in their bits; "
            f"first at {_describe(different, values_a, values_b)}"
        )


def _to_host(x):
    """A NumPy array of x's values. bfloat16, which NumPy lacks, becomes float64."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        return x.double().numpy() if x.dtype == torch.bfloat16 else x.numpy()
    return x.get() if type(x).__module__.partition(".")[0] == "cupy" else np.asarray(x)


def _bits(x) -> np.ndarray:
    """The bits of every element of x, as integers."""
    if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16:
        x = x.detach().view(torch.int16)
    x = np.ascontiguousarray(_to_host(x)).reshape(x.shape)  # ascontiguousarray makes a scalar 1-dimensional
    return x.view(f"u{x.dtype.itemsize}")


def _assert_equal(what: str, actual, expected) -> None:
    if actual != expected:
        raise AssertionError(f"{what} is {actual}, expected {expected}")


def _describe(mask: np.ndarray, actual: np.ndarray, expected: np.ndarray) -> str:
    """Where mask is first true, and both values there."""
    index = tuple(int(i) for i in np.unravel_index(int(mask.argmax()), mask.shape))
    return f"{list(index)}: {actual[index]!r}, expected {expected[index]!r}"
