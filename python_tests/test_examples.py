"""The examples run, and say what they show."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALL = ["--requests", "6", "--batch", "3", "--prompt", "70", "--new-tokens", "20", "--dim", "16"]


@pytest.fixture
def generate():
    spec = importlib.util.spec_from_file_location("generate", EXAMPLES / "generate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def make_engine(generate, seed: int):
    torch.manual_seed(seed)
    model = generate.Model(vocabulary=64, layers=2, width=32, heads=2, value_heads=4, dim=8).eval()
    return generate.Engine(model, batch=3, slots=5, device=torch.device("cpu"))


def test_requests_that_join_and_leave_generate_what_they_generate_alone():
    run = subprocess.run(
        [sys.executable, EXAMPLES / "generate.py", *SMALL, "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = re.findall(r"^request \d: steps (\d+) to (\d+), (\d+) tokens, the same alone$", run.stdout, re.M)
    assert len(lines) == 6, run.stdout
    spans = [(int(joined), int(left)) for joined, left, _ in lines]
    assert len({joined for joined, _ in spans}) > 3, "they join one after the other"
    together = [(a, b) for a in spans for b in spans if a[0] < b[0] <= a[1]]
    assert len(together) > 4, "most of them run beside others"


@torch.no_grad()
def test_another_states_content_is_noticed(generate, seed):
    """The comparison is worth something: with a state disturbed on the way, other tokens come."""
    requests = generate.make_requests(4, prompt=70, new_tokens=20, vocabulary=64, seed=seed)
    engine = make_engine(generate, seed)
    engine.run(requests)
    again = generate.make_requests(4, prompt=70, new_tokens=20, vocabulary=64, seed=seed)
    disturbed, step = make_engine(generate, seed), generate.Engine.step

    def disturbing_step(number: int) -> None:
        disturbed.cache.mul_(-1.5)
        step(disturbed, number)

    disturbed.step = disturbing_step
    disturbed.run(again)
    assert [x.generated for x in requests] != [x.generated for x in again]
    assert [len(x.generated) for x in requests] == [len(x.generated) for x in again]


@torch.no_grad()
def test_rows_and_slots_are_free_again_at_the_end(generate, seed):
    engine = make_engine(generate, seed)
    engine.run(generate.make_requests(5, prompt=10, new_tokens=8, vocabulary=64, seed=seed))
    assert engine.rows == [None] * 3 and sorted(engine.free_slots) == list(range(5))
    assert engine.slots.tolist() == [-1] * 3


@pytest.mark.caching_allocator
@pytest.mark.gpu
def test_the_same_on_a_gpu_with_the_step_as_a_graph(generate, capsys):
    if not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is False")
    assert generate.main(["--device", "cuda"]) == 0, capsys.readouterr().out
