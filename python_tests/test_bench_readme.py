"""README's tables are those of the recorded results."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from bench import readme  # noqa: E402


def test_readme_matches_the_recorded_results(capsys):
    assert readme.main(["--check"]) == 0, capsys.readouterr().err


@pytest.fixture
def results(tmp_path):
    """A folder of results, and a README with markers and nothing between them."""
    blocks = "\n".join(f"<!-- bench.{name} -->\n<!-- /bench.{name} -->" for name in readme.BLOCKS)
    (tmp_path / "README.md").write_text(f"before\n{blocks}\nafter\n")
    return tmp_path


def run(folder, *arguments):
    return readme.main(["--out", str(folder), "--readme", str(folder / "README.md"), *arguments])


def record(folder, name, **content):
    (folder / f"{name}.json").write_text(json.dumps(content))


def row(implementation, which, ms, graph_ms):
    return {
        "shape": "B1 T64 H4", "pass": which, "l2norm": False, "implementation": implementation, "ms": ms,
        "graph_ms": graph_ms, "peak_mib": 100 * ms, "floor_ms": 0.0625,
    }  # fmt: skip


def test_nothing_was_measured(results):
    before = (results / "README.md").read_text()
    assert run(results) == run(results, "--check") == 0
    assert (results / "README.md").read_text() == before


def test_the_op_beside_triton_and_what_could_not_be_captured(results):
    rows = [row("gdn2_ext", "forward", 0.5, 0.25), row("fla", "forward", 1.0, None)]
    rows += [row("gdn2_ext", "forward+backward", 1.0, 0.8), row("fla", "forward+backward", 5.0, 4.0)]
    record(results, "op", rows=rows)
    assert run(results, "--check") == 1
    assert run(results) == run(results, "--check") == 0
    text = (results / "README.md").read_text()
    assert text.startswith("before\n<!-- bench.op -->\n") and text.endswith("\nafter\n")
    cells = "0.50 / 0.25 | 1.00 / - | 2.0 / - | 1.00 / 0.80 | 5.00 / 4.00 | 5.0 / 5.0 | 100 against 500"
    assert f"| B1 T64 H4 | {cells} |" in text
    assert "0.062 ms forward" in text


def test_the_op_alone(results):
    record(results, "op", rows=[row("gdn2_ext", which, 0.5, 0.25) for which in readme.PASSES])
    run(results)
    assert "| B1 T64 H4 | 0.50 / 0.25 | - / - | - / - |" in (results / "README.md").read_text()


def test_training_steps(results):
    step = {"what": "layer", "shape": "B4xT4096", "tokens_per_second": 12345.6, "peak_mib": 2048}
    rows = [step | {"implementation": "gdn2_ext", "ms": 10}, step | {"implementation": "fla", "ms": 25}]
    record(results, "model", rows=rows)
    run(results)
    line = "| layer | B4 T4096 | 10.0 | 25.0 | 2.50 | 12,346 against 12,346 | 2.0 against 2.0 |"
    assert line in (results / "README.md").read_text()


def test_variants_splits_and_the_plot(results):
    variant = {"topic": "linear", "pass": "forward+backward", "call": "H32", "ms": 3.0, "graph_ms": 2.0}
    record(results, "variants", rows=[variant | {"relative_to_first": 1.5, "ns_a_token_and_head": None}])
    record(
        results, "split", rows=[{"shape": "B1", "times_faster": 1.0}, {"shape": "B1", "times_faster": 2.5}]
    )
    record(results, "sweep", rows=[])
    run(results)
    text = (results / "README.md").read_text()
    assert "| linear | forward + backward | H32 | 3.000 / 2.000 | 1.50 | - |" in text
    assert "1.00 to 2.50 times faster" in text and "over 1 shapes" in text
    assert "(bench/results/sweep.png)" in text


def test_recall_is_mean_and_deviation_over_seeds(results):
    runs = [
        {"task": "mqar", "variant": variant, "accuracy": {"16": score, "128": 1.0}}
        for variant, score in (("kda", 0.5), ("gdn2", 0.9), ("gdn2", 0.7))
    ]
    record(results, "recall", runs=runs, device="some GPU")
    run(results)
    text = (results / "README.md").read_text()
    assert "some GPU" in text and "| task | n | gdn2 | kda |" in text
    assert text.index("| mqar | 16 | 80.0 ± 14.1 | 50.0 ± 0.0 |") < text.index("| mqar | 128 | 100.0 ± 0.0 |")


@pytest.mark.parametrize("missing", ["<!-- bench.op -->", "<!-- /bench.decode -->"])
def test_a_marker_is_missing(results, missing):
    path = results / "README.md"
    path.write_text(path.read_text().replace(missing, ""))
    with pytest.raises(ValueError, match="README: expected one"):
        run(results)
