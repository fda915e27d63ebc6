"""The demo's table says the truth, and the README's example runs."""

import pathlib
import re
import subprocess
import sys

import pytest
import torch

import gdn2_ext
from gdn2_ext import demo

TINY = ["--batch", "1", "--seqlen", "100", "--heads", "2", "--dim", "32", "--device", "cpu"]
TENSORS = ("o", "final_state", *demo.GRADIENTS)


def errors_in(output: str) -> dict[str, float]:
    return {
        name: float(value) for name, value in re.findall(r"^(\w+) +(\d\.\de[-+]\d+) ", output, re.MULTILINE)
    }


def test_the_command_prints_every_tensor_within_its_bound():
    run = subprocess.run(
        [sys.executable, "-m", "gdn2_ext", *TINY], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    errors = errors_in(run.stdout)
    assert set(errors) == set(TENSORS)
    assert all(0 < error <= demo.BOUNDS[torch.float32] for error in errors.values()), run.stdout
    assert "backend: torch" in run.stdout
    assert re.search(r"token by token, PyTorch \(64 tokens, scaled\) +\d", run.stdout)
    assert re.search(r"chunk_gdn2, torch backend +\d", run.stdout)
    assert "... timing the torch backend" in run.stderr  # progress


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_another_dtype_is_held_to_its_own_bound(capsys, dtype):
    assert demo.main([*TINY, "--dtype", dtype]) == 0
    errors = errors_in(capsys.readouterr().out)
    assert max(errors.values()) <= demo.BOUNDS[getattr(torch, dtype)]
    # float64 agrees far beyond float32, and rounding to bfloat16 shows
    assert max(errors.values()) < 1e-12 if dtype == "float64" else errors["o"] > 1e-4


def test_an_error_above_its_bound_fails(monkeypatch, capsys):
    exact = demo.forward_backward

    def wrong(x, **options):
        results = exact(x, **options)
        return {**results, "dg": results["dg"] * 1.001}

    monkeypatch.setattr(demo, "forward_backward", wrong)
    assert demo.main(TINY) == 1
    output = capsys.readouterr().out
    assert re.search(r"^dg .*TOO LARGE$", output, re.MULTILINE)
    assert output.count("TOO LARGE") == 1


def test_the_recurrence_of_the_timing_is_the_op():
    x = demo.make_layer_input(2, 50, 3, 16, torch.float64, torch.device("cpu"), seed=3)
    o, state = demo.recurrence(x, 50)
    expected = demo.forward_backward(x)
    assert demo.relative_error(o, expected["o"]) < 1e-12
    assert demo.relative_error(state, expected["final_state"]) < 1e-12


def test_triton_is_left_out_where_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla.ops.gdn2", None)
    x = demo.make_layer_input(1, 10, 1, 16, torch.float32, torch.device("cpu"), seed=0)
    assert demo.triton_call(x) is None


def test_the_example_of_the_readme_runs():
    readme = pathlib.Path(__file__).parents[1] / "README.md"
    example = re.search(r"```python\n(.*?)```", readme.read_text(), re.DOTALL).group(1)
    scope = {}
    exec(example, scope)
    assert scope["o"].shape == (1, 300, 4, 128) and scope["o"].dtype == torch.bfloat16
    assert scope["final_state"].shape == (1, 4, 128, 128) and scope["final_state"].dtype == torch.float32
    assert scope["q"].grad.abs().max() > 0
    assert gdn2_ext.chunk_gdn2 is scope["chunk_gdn2"]
