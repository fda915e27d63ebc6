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
    tokens, answers = recall.mqar(8, 16, 0, generator(seed))
    assert tokens.shape == (8, 48) and answers.shape == (8, 16)
    for row, said in zip(tokens.tolist(), answers.tolist(), strict=True):
        values = dict(zip(row[0:32:2], row[1:32:2], strict=True))
        assert len(values) == 16
        assert said == [values[key] for key in row[32:]]


@pytest.mark.parametrize("number", [1, 5, 13])
def test_needles_are_whole_and_one_is_asked_for(recall, seed, number):
    tokens, answers = recall.needles(8, number, 40, generator(seed))
    assert tokens.shape == (8, 42) and answers.shape == (8, 1)
    for row, said in zip(tokens.tolist(), answers.tolist(), strict=True):
        places = [place for place, token in enumerate(row[:40]) if token == recall.MARKER]
        values = {row[place + 1]: row[place + 2] for place in places}
        assert len(values) == number and row[40] == recall.MARKER
        assert said == [values[row[41]]]


def test_models_have_the_same_state_and_as_many_parameters(recall):
    options = recall.parse_arguments([])
    configs = [recall.make_config(variant, options) for variant in recall.VARIANTS]
    parameters = [recall.num_parameters(config) for config in configs]
    assert max(parameters) - min(parameters) <= 3 * options.width * options.layers
    assert len({(c.num_hidden_layers, c.num_heads, c.head_dim, c.hidden_size) for c in configs}) == 1


def test_the_learning_rate_rises_and_falls(recall):
    rates = [recall.learning_rate(step, 100, 2.0) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2.0 and rates[55] == pytest.approx(1.0) and 0 < rates[99] < 2e-3
    assert sorted(rates[9:], reverse=True) == rates[9:]
    assert recall.learning_rate(0, 1, 2.0) == 2.0


def test_exercises_begin_easy_and_end_with_all_of_them(recall):
    options = recall.parse_arguments(["--length", "256", "--pairs", "30", "2"])
    assert recall.exercises("mqar", options) == [(2, 256), (30, 256)]
    order = [(2, 64), (2, 128), (30, 128), (2, 256), (30, 256)]
    assert recall.exercises("multi_needle", options) == order
    seen = [recall.exercise_at(step, 100, order) for step in range(100)]
    assert seen[:10] == order[:1] * 10 and set(seen[:20]) == set(order[:2])
    assert sorted(seen[-10:]) == sorted(2 * order)
    for exercise in order:
        batch = recall.training_batch("multi_needle", exercise, options, generator(1))
        assert batch.tokens.shape == (32 * 256 // exercise[1], exercise[1] + 2)


def training(recall, seed: int, *arguments: str, variant: str = "gdn2", task: str = "mqar") -> tuple:
    """A run and its options: associative recall with a few pairs, unless the arguments say otherwise."""
    arguments = ["--pairs", "2", "4", "--steps", "60", "--lr", "3e-3", *arguments]
    return recall.Run(task, variant, seed), recall.parse_arguments([*SMALL, *arguments])


def test_training_lowers_the_loss(recall, seed):
    _, losses = recall.train(*training(recall, seed, "--lr", "1e-2", "--device", "cpu"), graphs=False)
    assert losses.shape == (60,) and losses[-8:].mean() < 0.9 * losses[:8].mean()


def needs_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is False")


@pytest.mark.caching_allocator
@pytest.mark.gpu
@pytest.mark.parametrize("variant, task", [("gdn2", "mqar"), ("kda", "multi_needle"), ("deltanet", "mqar")])
def test_steps_as_graphs_train_as_without(recall, variant, task, seed):
    """Heads as the kernels take them; more shapes than one; the learning rate changes at every step."""
    needs_gpu()
    sizes = "--width 128 --head-dim 64 --batch 8 --length 200 --pairs 8 16 24".split()
    run, options = training(recall, seed, *sizes, "--device", "cuda", variant=variant, task=task)
    _, expected = recall.train(run, options, graphs=False)
    _, losses = recall.train(run, options, graphs=True)
    assert expected[-6:].mean() < 0.9 * expected[:6].mean()
    # The last bits may differ: what torch.compile runs depends on the shapes that it has seen. With a
    # learning rate one step late, losses would differ by 7e-3.
    torch.testing.assert_close(losses, expected, rtol=2e-3, atol=0)


@pytest.mark.caching_allocator
@pytest.mark.gpu
def test_steps_do_not_wait_for_the_gpu(recall, seed):
    needs_gpu()
    run, options = training(recall, seed, "--device", "cuda")
    model = recall.GatedDeltaNet2ForCausalLM(recall.make_config(run.variant, options)).cuda().train()
    generator = torch.Generator("cuda").manual_seed(seed)
    easy, hard = recall.exercises("mqar", options)
    examples = [recall.training_batch("mqar", x, options, generator) for x in (easy, hard)]
    trainer = recall.Trainer(model, examples, options.steps, options.lr, graphs=True)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for exercise in (easy, hard, hard, easy):
            trainer.step(recall.training_batch("mqar", exercise, options, generator))
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert trainer.loss.isfinite()


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


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    """A budget of nothing begins nothing; what is recorded is kept; other options are refused."""
    small = "--tasks mqar --pairs 2 --variants gdn2 --steps 2".split()
    done = run(*small, "--seeds", "1", out=tmp_path)
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "recall.json").read_text())
    done = run(*small, "--seeds", "1", "2", "--budget", "0", out=tmp_path)
    assert done.returncode == 0 and "1 models are left" in done.stderr
    assert json.loads((tmp_path / "recall.json").read_text()) == first
    done = run(*small, "--seeds", "1", "2", "--jobs", "2", out=tmp_path)
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "recall.json").read_text())["runs"]
    assert runs[0] == first["runs"][0] and [x["seed"] for x in runs] == [1, 2]
    done = run(*small, "--lr", "0.5", out=tmp_path)
    assert done.returncode == 1 and "another --out?" in done.stderr
    assert json.loads((tmp_path / "recall.json").read_text())["runs"] == runs


def test_impossible_numbers_are_refused(tmp_path):
    done = run("--pairs", "20", out=tmp_path)
    assert done.returncode == 2 and "needles 3 tokens of --length each" in done.stderr
    done = run("--tasks", "mqar", "--steps", "0", out=tmp_path)
    assert done.returncode == 2 and "expected at least 1" in done.stderr
