"""README's tables are those of the recorded results."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from bench import readme  # noqa: E402


def test_readme_matches_the_recorded_results(capsys):
    assert readme.main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("text", ["README.md", "docs/numerics.md"])
def test_linked_results_are_there(text):
    path = ROOT / text
    links = re.findall(r"\]\(([^)]*bench/results[^)]*)\)", path.read_text())
    assert links and all((path.parent / link).exists() for link in links)


@pytest.fixture
def results(tmp_path):
    """A folder of results, and a README with markers and nothing between them."""
    blocks = "\n".join(f"<!-- bench.{name} -->\n<!-- /bench.{name} -->" for name in readme.BLOCKS)
    (tmp_path / "README.md").write_text(f"before\n{blocks}\nafter\n")
    return tmp_path


def run(folder, *arguments):
    return readme.main(["--out", str(folder), "--readme", str(folder / "README.md"), *arguments])


def record(folder, name, gpu="h100", date="2026-01-02", **content):
    (folder / gpu).mkdir(exist_ok=True)
    about = {"gpu": f"NVIDIA {gpu.upper()}", "date": date, "digest": "d", "fla": "0.6.0"}
    (folder / gpu / f"{name}.json").write_text(json.dumps(about | content))


def block(folder, name):
    """What README has of it, on one line."""
    text = (folder / "README.md").read_text()
    return " ".join(text.split(f"<!-- bench.{name} -->")[1].split(f"<!-- /bench.{name} -->")[0].split())


def row(implementation, which, ms, graph_ms, l2norm=False):
    return {
        "shape": "B1 T64 H4", "pass": which, "l2norm": l2norm, "implementation": implementation, "ms": ms,
        "graph_ms": graph_ms, "peak_mib": 100 * ms, "floor_ms": 0.0625,
    }  # fmt: skip


def op_rows(ms, l2norm=False):
    """Triton takes 1 ms forward, 4 ms with the backward."""
    theirs = zip(readme.PASSES, (1.0, 4.0), strict=True)
    ours = [row("gdn2_ext", which, ms, ms, l2norm) for which in readme.PASSES]
    return [*ours, *(row("fla", which, x, x, l2norm) for which, x in theirs)]


# Of every benchmark, what README needs of a record.
CONTENT = {
    "op": {"rows": op_rows(0.5)},
    "decode": {"rows": [{"shape": "B8 H16", "states": "float32", "implementation": "gdn2_ext"}]},
    "model": {
        "rows": [
            {"what": "layer", "shape": "B4xT4096", "implementation": "gdn2_ext", "ms": 10,
             "tokens_per_second": 1.0, "peak_mib": 2048}
        ]
    },
    "variants": {
        "rows": [
            {"topic": "small", "pass": "forward", "call": "B1", "ms": 3.0, "graph_ms": 2.0,
             "relative_to_first": 1.0, "ns_a_token_and_head": None, "peak_mib": 0.5}
        ]
    },
    "recall": {
        "runs": [{"task": "mqar", "variant": "gdn2", "accuracy": {"16": 0.5}, "seed": 0}],
        "options": {"layers": 2, "width": 128}, "device": "NVIDIA H100",
    },
    "sweep": {"rows": []},
    "split": {
        "rows": [{"shape": "B1", "pass": "forward", "times_faster": 1.5, "whole_ms": 4.0, "chosen_ms": 5.0}]
    },
}  # fmt: skip
PLOTS = ("recall", "sweep", "split")


def test_nothing_was_measured(results):
    before = (results / "README.md").read_text()
    (results / "op.json").write_text("{}")  # of no GPU
    (results / "h100").mkdir()
    assert run(results) == run(results, "--check") == 0
    assert (results / "README.md").read_text() == before


@pytest.mark.parametrize("name", readme.BLOCKS)
def test_a_section_says_on_what_it_was_measured_and_links_there(results, name):
    record(results, name, **CONTENT[name])
    assert run(results) == run(results, "--check") == 0
    text = block(results, name)
    path = f"bench/results/h100/{name}"
    assert "one NVIDIA H100" in text and f"[{path}.json]({path}.json)" in text
    assert (f"({path}.png)" in text) == (name in PLOTS)
    assert not any(block(results, other) for other in readme.BLOCKS if other != name)


@pytest.mark.parametrize("name", [name for name in readme.BLOCKS if name != "op"])
@pytest.mark.parametrize(("new", "old"), [("h100", "h200"), ("h200", "h100")])
def test_the_newest_record_is_shown_alone(results, name, new, old):
    content = CONTENT[name]
    if name == "recall":
        content = content | {"device": f"NVIDIA {new.upper()}"}
    record(results, name, old, "2026-03-01T23:00:00+00:00", **CONTENT[name])
    record(results, name, new, "2026-03-02T01:00:00+00:00", **content)
    run(results)
    text = block(results, name)
    assert f"one NVIDIA {new.upper()}" in text and f"bench/results/{new}/{name}.json" in text
    assert old not in text and old.upper() not in text


def test_a_record_without_a_date_is_the_oldest(results):
    record(results, "recall", "h200", **CONTENT["recall"])
    record(results, "recall", "h100", **CONTENT["recall"])
    path = results / "h100" / "recall.json"
    path.write_text(json.dumps({x: y for x, y in json.loads(path.read_text()).items() if x != "date"}))
    run(results)
    assert "h200/recall.png" in block(results, "recall")


def test_the_op_on_other_gpus_follows(results):
    record(results, "op", "h100", "2026-03-01T12:00:00+00:00", rows=op_rows(0.25), digest="older")
    record(results, "op", "h200", "2026-03-02T12:00:00+00:00", rows=op_rows(0.5))
    record(results, "op", "h20", "2026-02-01T12:00:00+00:00", rows=op_rows(0.125))
    run(results)
    text = block(results, "op")
    newest = text.index("On one NVIDIA H200, bfloat16")
    link = "[bench/results/h100/op.json](bench/results/h100/op.json)"
    second = text.index(f"On one NVIDIA H100, measured 2026-03-01 with older sources ({link}):")
    third = text.index("On one NVIDIA H20, measured 2026-02-01 ([bench/results/h20/op.json]")
    assert newest < second < third and "h200/op.json" in text[newest:second]
    for part, faster in ((text[newest:second], "2.0"), (text[second:third], "4.0"), (text[third:], "8.0")):
        assert f"| 1.00 / 1.00 | {faster} / {faster} |" in part and part.count("| B1 T64 H4 |") == 1
    assert text.count("byte floor of the first shape") == 3 and "L2 norm" not in text


@pytest.mark.parametrize("name", [name for name in readme.BLOCKS if name != "decode"])
def test_what_was_measured_with_other_sources_than_the_newest_says_so(results, name):
    record(results, name, date="2026-03-01T12:00:00+00:00", digest="older", **CONTENT[name])
    run(results)
    assert "older sources" not in block(results, name)
    record(results, "decode", date="2026-03-02T12:00:00+00:00", **CONTENT["decode"])
    run(results)
    assert ", measured 2026-03-01 with older sources" in block(results, name)
    assert "older sources" not in block(results, "decode")


def test_the_op_with_the_l2_norm_inside(results):
    record(results, "op", rows=op_rows(0.25) + op_rows(0.5, l2norm=True))
    run(results)
    plain, normed = block(results, "op").split("Times faster with the L2 norm")
    assert "| 4.0 / 4.0 |" in plain and "| 2.0 / 2.0 |" not in plain
    assert normed.endswith("| B1 T64 H4 | 2.0 / 2.0 | 8.0 / 8.0 |")


def test_the_op_with_the_l2_norm_inside_forward_alone(results):
    rows = [row for row in op_rows(0.5, l2norm=True) if row["pass"] == "forward"]
    record(results, "op", rows=rows + op_rows(0.25))
    run(results)
    assert block(results, "op").endswith("| B1 T64 H4 | 2.0 / 2.0 | - / - |")


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
    assert "flash-linear-attention 0.6.0" in block(results, "op")


def test_the_op_alone(results):
    record(results, "op", rows=[row("gdn2_ext", which, 0.5, 0.25) for which in readme.PASSES], fla=None)
    run(results)
    text = block(results, "op")
    assert "| B1 T64 H4 | 0.50 / 0.25 | - / - | - / - |" in text and "flash-linear-attention" not in text


def test_training_steps(results):
    step = {"what": "layer", "shape": "B4xT4096", "tokens_per_second": 12345.6, "peak_mib": 2048}
    rows = [step | {"implementation": "gdn2_ext", "ms": 10}, step | {"implementation": "fla", "ms": 25}]
    record(results, "model", rows=rows)
    run(results)
    line = "| layer | B4 T4096 | 10.0 | 25.0 | 2.50 | 12,346 against 12,346 | 2.0 against 2.0 |"
    assert line in (results / "README.md").read_text()


def test_variants(results):
    variant = {"topic": "linear", "pass": "forward+backward", "call": "H32", "ms": 3.0, "graph_ms": 2.0}
    variant |= {"relative_to_first": 1.5, "ns_a_token_and_head": None, "peak_mib": 1234.5}
    record(results, "variants", rows=[variant, variant | {"call": "H64", "peak_mib": None}])
    run(results)
    text = block(results, "variants")
    assert "| linear | forward + backward | H32 | 3.000 / 2.000 | 1.50 | - | 1,234.5 |" in text
    assert "| linear | forward + backward | H64 | 3.000 / 2.000 | 1.50 | - | - |" in text


def test_splits_are_summed_up(results):
    times = {"forward": (2.5, 1.0, 6.0), "forward+backward": (3.0, 0.95, 2.0)}
    rows = [
        {"shape": f"B{n}", "pass": which, "times_faster": x, "whole_ms": 4.0, "chosen_ms": 5.0 / x}
        for which, values in times.items()
        for n, x in enumerate(values)
    ]
    record(results, "split", rows=rows)
    run(results)
    text = block(results, "split")
    assert "over 3 shapes, in CUDA graphs: " in text
    assert "graphs: forward 1.00 to 6.00 times, forward + backward 0.95 to 3.00 times faster" in text
    assert "2 of 6 eager calls are slower, at worst 0.76 times as fast: with" in text
    assert "|" not in text

    for n, row in enumerate(rows):
        row["again_ms"] = 4.0 + n / 10
    record(results, "split", rows=rows)
    run(results)
    text = " ".join(block(results, "split").split())
    assert "at worst 0.76 times as fast (whole against whole: 0.89 to 1.00): with" in text


def test_the_sweep_says_where_others_are_quicker(results):
    rows = [
        {"what": "heads", "shape": f"B1 T8192 H{heads}", "pass": which, "implementation": name, "ms": ms}
        for heads, which, name, ms in (
            (1, "forward", "gdn2_ext", 1.0), (1, "forward", "fla", 2.0), (1, "forward", "attention", 0.9),
            (2, "forward", "gdn2_ext", 1.0), (2, "forward", "fla", 5.0), (2, "forward", "attention", 1.5),
            (2, "forward+backward", "gdn2_ext", 2.0), (2, "forward+backward", "fla", 9.0),
            (4, "forward", "fla", 0.1),
        )
    ]  # fmt: skip
    record(results, "sweep", rows=rows)
    run(results)
    text = block(results, "sweep")
    assert "| chunk_gdn2, Triton | 2.00 to 5.00 | 4.50 to 4.50 | nowhere of 3 |" in text
    assert "| causal attention, PyTorch | 0.90 to 1.50 | - | heads, B1 T8192 H1, forward |" in text
    assert "chunk_kda" not in text


def test_lines_are_short_and_commands_whole(results):
    text = readme.paragraph("a " * 54 + "`python -m bench.op` " + "b " * 60)
    assert all(len(line) <= 120 for line in text.splitlines()) and "`python -m bench.op`" in text
    assert text.split() == ["a"] * 54 + ["`python", "-m", "bench.op`"] + ["b"] * 60


def test_recall_is_mean_and_deviation_over_seeds(results):
    runs = [
        {"task": "mqar", "variant": variant, "seed": seed, "accuracy": {"16": score, "128": 1.0}}
        for variant, seed, score in (("kda", 0, 0.5), ("gdn2", 0, 0.9), ("gdn2", 1, 0.7))
    ]
    record(results, "recall", runs=runs, device="some GPU", options={"layers": 2, "width": 128})
    run(results)
    text = (results / "README.md").read_text()
    assert "some GPU" in text and "over 2 seeds" in text and "| task | n | gdn2 | kda |" in text
    assert text.index("| mqar | 16 | 80.0 ± 14.1 | 50.0 ± 0.0 |") < text.index("| mqar | 128 | 100.0 ± 0.0 |")


@pytest.mark.parametrize("missing", ["<!-- bench.op -->", "<!-- /bench.decode -->"])
def test_a_marker_is_missing(results, missing):
    path = results / "README.md"
    path.write_text(path.read_text().replace(missing, ""))
    with pytest.raises(ValueError, match="README: expected one"):
        run(results)
