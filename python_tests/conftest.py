"""What all tests share: the backend as a parameter, the float64 oracle, seeds, and a record of what ran.

    pytest                          the torch backend on the CPU; tests of the CUDA backend say why they skip
    pytest --torch-device=cuda      the torch backend on the GPU instead
    pytest --seed=7                 other random numbers
    pytest --record=PATH            also write what passed, failed and skipped, and on what, as JSON
    pytest --numpy-reference        the reference in NumPy although CuPy is there

A test that takes the fixture `backend` runs once per backend, with q of that backend's usual dtype; with the
marker `every_dtype` in every dtype that has an accuracy bar, with `most_exact_dtype` in the one whose bar is
the lowest. The fixture `hopper` is the CUDA backend alone. Tests with the marker `recurrent` ask the CUDA
backend for fused_recurrent_gdn2, the others for chunk_gdn2.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import cases
import compare
import provenance

import gdn2_ext
from gdn2_ext import ops, reference

USUAL_DTYPE = {"torch": torch.float32, "cuda": torch.bfloat16}
MOST_EXACT_DTYPE = {"torch": torch.float64, "cuda": torch.float16}
EVERY_DTYPE = {
    "torch": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "cuda": (torch.bfloat16, torch.float16),
}

# Which column of the table of bars holds for a tensor that the table does not have.
BAR_OF = {"h": "S", "d_initial_state": "dg", "dA_log": "dg", "d_dt_bias": "dg"}

# Below this an exact value is out of reach of the arithmetic (float32, but float16 for what is stored in it),
# and all that can be asked is that the result is as small.
UNDERFLOW = {torch.float64: 0.0, torch.float32: 1e-37, torch.bfloat16: 1e-37, torch.float16: 6e-5}

REFERENCE_OPTIONS = frozenset(inspect.signature(reference.chunk_gdn2).parameters)

# Derandomised, so that a run depends on the code alone; a failing example is printed with what reproduces it.
hypothesis.settings.register_profile(
    "gdn2_ext",
    derandomize=True,
    deadline=None,
    max_examples=20,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gdn2_ext"))


@dataclass(frozen=True)
class Backend:
    """One backend, with the device and the dtype of q that a test runs it in."""

    name: str
    device: torch.device
    dtype: torch.dtype

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def inputs(self, regime: str = "uniform5", **shape) -> cases.Inputs:
        """Activated inputs, `cases.make_inputs` in this backend's dtypes."""
        return cases.make_inputs(regime, **self._dtypes(), **shape)

    def raw_inputs(self, **shape) -> cases.Inputs:
        """Inputs without activations, `cases.raw_inputs` in this backend's dtypes."""
        inputs = cases.raw_inputs(**self._dtypes(), **shape)
        inputs.A_log, inputs.dt_bias = inputs.A_log.to(self.state_dtype), inputs.dt_bias.to(self.state_dtype)
        return inputs

    def _dtypes(self) -> dict:
        return {"dtype": self.dtype, "gate_dtype": self.state_dtype, "device": self.device}

    def normal(self, *shape: int, seed: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """N(0, 1) of the state's dtype unless another is given."""
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(self.device, dtype or self.state_dtype)

    def states(self, inputs: cases.Inputs, *, seed: int, number: int | None = None, v_first: bool = False):
        """An initial state for `inputs` and a gradient for the final state."""
        matrix = (inputs.q.shape[3], inputs.v.shape[3])
        shape = (
            inputs.q.shape[0] if number is None else number,
            inputs.v.shape[2],
            *(matrix[::-1] if v_first else matrix),
        )
        return self.normal(*shape, seed=seed + 1), self.normal(*shape, seed=seed + 2)

    def bar(self, tensor: str, regime: str | None = None) -> float:
        """The bar of a tensor in a regime. Without one the largest of all, which is for all other calls."""
        if regime is None:
            return max(
                cases.bar(*entry, self.dtype) for entry in itertools.product(cases.REGIMES, cases.TENSORS)
            )
        return cases.bar(regime, BAR_OF.get(tensor, tensor), self.dtype)

    # -- the op and the oracle -------------------------------------------------------------------------------

    def forward(self, inputs: cases.Inputs, **options):
        """chunk_gdn2 on this backend, without gradients, with whatever it returns.

        The memory that tensors are made in is NaN beforehand.
        """
        with torch.no_grad(), _poisoned_memory():
            return gdn2_ext.chunk_gdn2(*inputs.tensors, **_parameters(inputs, options), backend=self.name)

    def run(
        self,
        inputs: cases.Inputs,
        *,
        d_final_state: torch.Tensor | None = None,
        do: torch.Tensor | None = None,
        poisoned: bool = True,
        **options,
    ) -> dict[str, torch.Tensor]:
        """o, S and every gradient, by name. The memory that tensors are made in is NaN beforehand.

        Not so without `poisoned`, but then PyTorch's own operations are not made deterministic along with it.
        """
        options = _parameters(inputs, options)
        leaves = {
            "dq": inputs.q, "dk": inputs.k, "dv": inputs.v, "dg": inputs.g, "db": inputs.b, "dw": inputs.w,
            "dA_log": options.pop("A_log", None), "d_dt_bias": options.pop("dt_bias", None),
            "d_initial_state": options.pop("initial_state", None),
        }  # fmt: skip
        leaves = {name: x.detach().requires_grad_() for name, x in leaves.items() if x is not None}
        tokens = [leaves[name] for name in ("dq", "dk", "dv", "dg", "db", "dw")]
        parameters = {
            name: leaves.get(f"d{name}", leaves.get(f"d_{name}"))
            for name in ("A_log", "dt_bias", "initial_state")
        }
        with _poisoned_memory() if poisoned else contextlib.nullcontext():
            o, S = gdn2_ext.chunk_gdn2(
                *tokens, output_final_state=True, **parameters, **options, backend=self.name
            )
            outputs, gradients = [o], [inputs.do if do is None else do]
            if d_final_state is not None:
                outputs, gradients = [o, S], [*gradients, d_final_state]
            results = torch.autograd.grad(outputs, list(leaves.values()), gradients)
        return {"o": o.detach(), "S": S.detach(), **dict(zip(leaves, results, strict=True))}

    def expected(
        self, inputs: cases.Inputs, *, d_final_state: torch.Tensor | None = None, **options
    ) -> dict[str, np.ndarray]:
        """What `run` should give: o, h, S and every gradient, from the reference on the same inputs."""
        options = {name: x for name, x in _parameters(inputs, options).items() if name in REFERENCE_OPTIONS}
        options = {name: oracle_array(x) for name, x in options.items()}
        tokens = [oracle_array(x) for x in inputs.tensors]
        o, S, h = reference.chunk_gdn2(*tokens, **options)
        gradients = reference.chunk_gdn2_backward(
            *tokens, oracle_array(inputs.do), oracle_array(d_final_state), **options
        )._asdict()
        results = {"o": o, "S": S, "h": h, **{name: x for name, x in gradients.items() if x is not None}}
        results = {name: compare.to_float64(x) for name, x in results.items()}
        if options.get("use_gate_in_kernel"):
            results["norms"] = _norms_of_summands(inputs, results["dg"], options)
        return results

    def check(
        self,
        actual: dict,
        expected: dict,
        regime: str | None = None,
        where: str = "",
        parallel_keys: bool = False,
    ) -> None:
        """Every tensor of `actual` within this dtype's bar of `expected`: that of the regime, or the one for
        parallel keys.
        """
        for name, x in actual.items():
            exact, label = compare.to_float64(expected[name]), f"{name}{where} ({self.name}, {self.dtype})"
            finite = np.abs(exact[np.isfinite(exact)])
            if finite.size == exact.size and finite.max(initial=0.0) < UNDERFLOW[self.dtype]:
                largest = np.abs(compare.to_float64(x)).max(initial=0.0)
                assert tuple(x.shape) == exact.shape, f"{label}: shape {tuple(x.shape)}, not {exact.shape}"
                assert largest <= UNDERFLOW[self.dtype], f"{label}: {largest:.1e} instead of next to nothing"
                continue
            bar = self.bar(name, regime)
            if parallel_keys:
                bar = max(bar, cases.parallel_keys_bar(self.dtype))
            if self.dtype != torch.float64 and name in expected.get("norms", {}):
                bar *= 1.0 + expected["norms"][name] / np.linalg.norm(exact)
            compare.assert_close(x, exact, bar, label)

    def check_against_reference(self, inputs: cases.Inputs, regime: str | None = None, **options) -> dict:
        """Run the op forward and backward, and compare o, S and every gradient with the float64 reference."""
        results = self.run(inputs, **options)
        self.check(results, self.expected(inputs, **options), regime)
        return results


def _parameters(inputs: cases.Inputs, options: dict) -> dict:
    """options, with A_log and dt_bias of the inputs where the decay gate is in the kernel."""
    if not options.get("use_gate_in_kernel"):
        return dict(options)
    return {"A_log": inputs.A_log, "dt_bias": inputs.dt_bias, **options}


def _norms_of_summands(inputs: cases.Inputs, dg: np.ndarray, options: dict) -> dict[str, float]:
    """How large what is summed up to dA_log and d_dt_bias is, given the gradient of the raw gate.

    The summands mostly cancel, their errors do not. Where an error is more than the rounding of float64, the
    bar of a sum is for the sum and its summands together.
    """
    norms = {"d_dt_bias": _norm_over_chunks(dg)}
    if inputs.A_log is not None:
        u = compare.to_float64(inputs.g)
        if inputs.dt_bias is not None:
            bias = compare.to_float64(inputs.dt_bias).reshape(inputs.A_log.shape[0], -1)
            u = u + np.repeat(bias, u.shape[2] // bias.shape[0], axis=0)
        # The gradient of log a over that of u: u for L sigmoid(a u), softplus(u) / sigmoid(u) otherwise.
        ratio = u
        if options.get("lower_bound") is None:
            ratio = np.logaddexp(0.0, u) * (1.0 + np.exp(-np.maximum(u, -30.0)))
        norms["dA_log"] = _norm_over_chunks(dg * ratio)
    return norms


def _norm_over_chunks(x: np.ndarray) -> float:
    """The L2 norm of x [B, T, H, K] as if signs were equal within 64 tokens, which share errors of dg."""
    chunks = [np.abs(x[:, t : t + 64]).sum(1) for t in range(0, x.shape[1], 64)]
    return float(np.sqrt(sum((chunk**2).sum() for chunk in chunks)))


_numpy_reference = False  # whether it was asked for on the command line


def oracle_array(x):
    """A tensor as a float64 array for the reference: CuPy on a GPU where it is installed, else NumPy."""
    if not isinstance(x, torch.Tensor):
        return x
    x = x.detach()
    x = x.double() if x.is_floating_point() else x
    if x.is_cuda and x.numel() > 0 and not _numpy_reference:
        try:
            import cupy
        except ImportError:
            pass
        else:
            return cupy.asarray(x.contiguous())
    return x.cpu().numpy()


class _poisoned_memory:
    """Fills the memory of new tensors with NaN, so that an element nobody wrote shows."""

    def __enter__(self):
        self.before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        )
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True

    def __exit__(self, *_):
        enabled, warn_only, fill = self.before
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


# ------------------------------------------------------------------------------------------------------------
# Fixtures
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def backend(request) -> Backend:
    name, dtype = request.param
    if name == "cuda":
        return _cuda_backend(dtype, recurrent=request.node.get_closest_marker("recurrent") is not None)
    where = request.config.getoption("--torch-device")
    return Backend(name, _current_gpu() if where == "cuda" else torch.device(where), dtype)


@pytest.fixture
def hopper(request) -> Backend:
    """The CUDA backend, for tests that have nothing to ask of another.

    In its usual dtype, with the marker `every_dtype` in every one.
    """
    return _cuda_backend(getattr(request, "param", USUAL_DTYPE["cuda"]))


def _current_gpu() -> torch.device:
    """Skips, with the reason, where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is False")
    return torch.device("cuda", torch.cuda.current_device())


def _cuda_backend(dtype: torch.dtype, recurrent: bool = False) -> Backend:
    """Skips, with the reason, where the kernels do not run."""
    backend = Backend("cuda", _current_gpu(), dtype)
    tokens = backend.inputs(seqlen=1, heads=1, dim_k=64, dim_v=64).tensors
    reason = _why_no_recurrent_kernel(tokens) if recurrent else gdn2_ext.supports(*tokens)[1]
    if reason:
        pytest.skip(reason)
    return backend


def _why_no_recurrent_kernel(tokens) -> str:
    try:
        gdn2_ext.fused_recurrent_gdn2(*tokens, backend="cuda")
    except ValueError as error:
        return str(error).partition("cannot take this call: ")[2] or str(error)
    return ""


@pytest.fixture
def device(backend) -> torch.device:
    """The device of the test's backend."""
    return backend.device


@pytest.fixture
def seed(request) -> int:
    """A number of this test's own, the same in every run unless --seed is given; printed on failure."""
    given = request.config.getoption("--seed")
    value = zlib.crc32(request.node.nodeid.encode()) % 100_000 if given is None else given
    print(f"seed = {value}")
    return value


@pytest.fixture
def needs_gpu_memory() -> Callable[[int], None]:
    """Called with GiB: skips, with the reason, where fewer are free."""

    def skip_below(gib: int) -> None:
        free, _ = torch.cuda.mem_get_info()
        if free < gib * 2**30:
            pytest.skip(f"needs {gib} GiB of GPU memory, {free / 2**30:.0f} GiB are free")

    return skip_below


@pytest.fixture
def quick_triton(monkeypatch) -> None:
    """Triton tries two configurations of a kernel: all of them take minutes, for the same results."""
    autotuner = pytest.importorskip("triton.runtime.autotuner").Autotuner
    prune_configs = autotuner.prune_configs
    monkeypatch.setattr(autotuner, "prune_configs", lambda *args: prune_configs(*args)[:2])


@pytest.fixture
def offsets_on_device_only(monkeypatch) -> None:
    """Both functions as with offsets on a GPU: on the host, nothing is known of their values.

    Offsets on the CPU are checked on the host: without this nothing would reach the code for the other case.
    """
    monkeypatch.setattr(ops, "_check_host_offsets", lambda *_: None)
    check_offsets = ops.check_offsets
    monkeypatch.setattr(ops, "check_offsets", lambda *args: (check_offsets(*args)[0], None))


# ------------------------------------------------------------------------------------------------------------
# Hooks
# ------------------------------------------------------------------------------------------------------------


def pytest_addoption(parser) -> None:
    group = parser.getgroup("gdn2_ext")
    group.addoption(
        "--torch-device", default="cpu", help="where the torch backend runs: cpu (default) or cuda"
    )
    group.addoption(
        "--seed", type=int, default=None, help="seed of the random inputs; by default one per test"
    )
    group.addoption(
        "--record", metavar="PATH", default=None, help="write the outcome and its provenance as JSON"
    )
    group.addoption(
        "--numpy-reference",
        action="store_true",
        help="the reference in NumPy: under compute-sanitizer CuPy frees no memory",
    )


def pytest_configure(config) -> None:
    global _numpy_reference
    _numpy_reference = config.getoption("--numpy-reference")
    config.addinivalue_line(
        "markers", "every_dtype: runs in every dtype of the backend, not in its usual one only"
    )
    config.addinivalue_line(
        "markers", "most_exact_dtype: runs in the dtype of the backend that has the lowest bars"
    )
    config.addinivalue_line("markers", "recurrent: of fused_recurrent_gdn2; skips where that has no kernel")
    config.addinivalue_line(
        "markers", "caching_allocator: skips where PyTorch allocates every tensor by itself"
    )
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    if "PYTEST_XDIST_WORKER" in os.environ:  # one thread per worker: they share the cores
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))


def pytest_runtest_setup(item) -> None:
    if item.get_closest_marker("caching_allocator") and "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ:
        pytest.skip("PYTORCH_NO_CUDA_MEMORY_CACHING is set: no graphs, and other memory than usual")


def pytest_generate_tests(metafunc) -> None:
    every_dtype = metafunc.definition.get_closest_marker("every_dtype")
    if "hopper" in metafunc.fixturenames and every_dtype:
        parameters = [pytest.param(dtype, id=_label("cuda", dtype)) for dtype in EVERY_DTYPE["cuda"]]
        metafunc.parametrize("hopper", parameters, indirect=True)
    if "backend" not in metafunc.fixturenames:
        return
    dtypes = {name: (dtype,) for name, dtype in USUAL_DTYPE.items()}
    if every_dtype:
        dtypes = EVERY_DTYPE
    elif metafunc.definition.get_closest_marker("most_exact_dtype"):
        dtypes = {name: (dtype,) for name, dtype in MOST_EXACT_DTYPE.items()}
    parameters = [
        pytest.param((name, dtype), marks=[pytest.mark.gpu] if name == "cuda" else [], id=_label(name, dtype))
        for name in dtypes
        for dtype in dtypes[name]
    ]
    metafunc.parametrize("backend", parameters, indirect=True)


def _label(name: str, dtype: torch.dtype) -> str:
    return f"{name}-{str(dtype).removeprefix('torch.')}"


def pytest_terminal_summary(terminalreporter, config) -> None:
    path = config.getoption("--record")
    # A worker whose controller has gone comes here too, and has seen no more than its share.
    if path is None or hasattr(config, "workerinput"):
        return
    outcomes = terminalreporter.stats
    skips = [_skip_reason(report) for report in outcomes.get("skipped", [])]
    record = {
        "digest": provenance.digest(),
        **provenance.environment(),
        "torch_device": config.getoption("--torch-device"),
        "passed": len(outcomes.get("passed", [])),
        "failed": len(outcomes.get("failed", [])) + len(outcomes.get("error", [])),
        "skipped": len(skips),
        "skip_reasons": dict(sorted(Counter(skips).items())),
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(record, indent=2) + "\n")
    terminalreporter.write_line(f"wrote {path}")


def _skip_reason(report) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, (tuple, list)) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")
