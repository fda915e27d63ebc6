"""examples/recall.py: its tasks ask what they say, and a small run ends with its table and plot."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the models need transformers")
pytest.importorskip("matplotlib", reason="the plot needs matplotlib")

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "recall.py"
SMALL = ["--batch", "4", "--length", "40", "--test-batches", "2", "--width", "32", "--head-dim", "16"]


@pytest.fixture(scope="module")
def recall():
    spec = importlib.util.spec_from_file_location("recall", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_mqar_asks_for_the_value_behind_every_key(recall, seed):
    tokens, targets = recall.mqar(8, 16, 0, generator(seed))
    assert tokens.shape == (8, 48) and (targets[:, :32] == recall.NOTHING).all()
    for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        values = dict(zip(row[0:32:2], row[1:32:2], strict=True))
        assert len(values) == 16
        assert answers[32:] == [values[key] for key in row[32:]]


@pytest.mark.parametrize("number", [1, 5, 13])
def test_needles_are_whole_and_one_is_asked_for(recall, seed, number):
    tokens, targets = recall.needles(8, number, 40, generator(seed))
    assert tokens.shape == (8, 42) and (targets[:, :-1] == recall.NOTHING).all()
    for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        places = [place for place, token in enumerate(row[:40]) if token == recall.MARKER]
        values = {row[place + 1]: row[place + 2] for place in places}
        assert len(values) == number and row[40] == recall.MARKER
        assert answers[-1] == values[row[41]]


def test_models_have_the_same_state_and_as_many_parameters(recall):
    options = recall.parse_arguments([])
    configs = [recall.make_config(variant, options) for variant in recall.VARIANTS]
    parameters = [recall.num_parameters(config) for config in configs]
    assert max(parameters) - min(parameters) <= 3 * options.width * options.layers
    assert len({(c.num_hidden_layers, c.num_heads, c.head_dim, c.hidden_size) for c in configs}) == 1


def run(*arguments: str, out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, *SMALL, *arguments, "--device", "cpu", "--out", out]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_small_run_ends_with_its_table_and_plot(tmp_path):
    """Two seeds, two variants, three tasks."""
    done = run(
        "--pairs",
        "2",
        "4",
        "--steps",
        "4",
        "--variants",
        "gdn2",
        "deltanet",
        "--seeds",
        "1",
        "2",
        out=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "| task | n | gdn2 | deltanet |" in done.stdout and "| multi_needle | 4 |" in done.stdout
    runs = json.loads((tmp_path / "recall.json").read_text())["runs"]
    assert len(runs) == 3 * 2 * 2 and all(0 <= x <= 1 for r in runs for x in r["accuracy"].values())
    assert (tmp_path / "recall.png").stat().st_size > 10_000
    assert (tmp_path / "recall.md").read_text() == done.stdout


def test_impossible_numbers_are_refused(tmp_path):
    done = run("--pairs", "20", out=tmp_path)
    assert done.returncode == 2 and "needles 3 tokens of --length each" in done.stderr
    done = run("--tasks", "mqar", "--steps", "0", out=tmp_path)
    assert done.returncode == 2 and "expected at least 1" in done.stderr
