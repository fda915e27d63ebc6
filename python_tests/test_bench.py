"""What the benchmarks keep between runs: rows of the same sources, and Triton's choices for the baseline."""

import argparse
import csv
import json
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from bench import fla_tuning, records, split, sweep  # noqa: E402
from gdn2_ext.sequence_split import Gpu  # noqa: E402

ABOUT = ("what", "who")


@pytest.fixture(autouse=True)
def own_results(monkeypatch, tmp_path):
    """Committed results, and a cache of Triton, of this test alone; sources and machine as it says."""
    header = {"digest": "d", "gpu": "NVIDIA H200", "torch": "2", "triton": "3", "cuda": "13", "fla": "0"}
    monkeypatch.setattr(records, "RESULTS", tmp_path / "committed")
    monkeypatch.setattr(records, "header", lambda: header)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("FLA_CACHE_RESULTS", "0")
    return header


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def row(what, who, ms):
    return {"what": what, "who": who, "ms": ms}


# -- rows ----------------------------------------------------------------------------------------------------


def test_rows_of_several_runs_add_up(out):
    records.Rows(out, "x", ABOUT).add([row("a", "us", 1), row("a", "fla", 2)], copy=4.0)
    rows = records.Rows(out, "x", ABOUT)
    assert rows.has("a") and rows.has("a", "fla") and not rows.has("b") and not rows.has("a", "kda")
    rows.add([row("b", "us", 3), row("a", "us", 4)])
    record = records.load(out, "x")
    assert record["rows"] == [row("a", "us", 4), row("a", "fla", 2), row("b", "us", 3)]
    assert record["digest"] == "d"
    with open(out / "x.csv", newline="") as file:
        assert [line["ms"] for line in csv.DictReader(file)] == ["4", "2", "3"]


def test_committed_rows_go_on_in_another_folder(out):
    committed = records.RESULTS / "h200"
    records.Rows(committed, "x", ABOUT).add([row("a", "us", 1)])
    rows = records.Rows(out, "x", ABOUT)
    assert rows.has("a", "us")
    rows.add([row("b", "us", 2)])
    assert len(records.load(out, "x")["rows"]) == 2 and len(records.load(committed, "x")["rows"]) == 1


@pytest.mark.parametrize(
    ("gpu", "folder"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"),
        (None, "cpu"),
    ],
)
def test_results_lie_by_gpu_unless_out_says_otherwise(own_results, gpu, folder):
    own_results["gpu"] = gpu
    parser = argparse.ArgumentParser()
    records.add_arguments(parser)
    assert parser.parse_args([]).out == records.RESULTS / folder
    assert parser.parse_args(["--out", "x"]).out == Path("x")


@pytest.mark.parametrize("changed", ["digest", "gpu", "torch", "triton", "fla"])
def test_rows_of_other_sources_or_another_machine_do_not_stay(out, own_results, changed):
    records.Rows(out, "x", ABOUT).add([row("a", "us", 1)])
    own_results[changed] = "other"
    rows = records.Rows(out, "x", ABOUT)
    assert not rows.has("a")
    rows.add([row("b", "us", 2)])
    assert records.load(out, "x")["rows"] == [row("b", "us", 2)]


def test_rows_measured_again_replace_and_the_others_stay(out):
    records.Rows(out, "x", ABOUT).add([row("a", "us", 1), row("b", "us", 2)])
    rows = records.Rows(out, "x", ABOUT, again=True)
    assert not rows.has("a")
    rows.add([row("a", "us", 3)])
    assert rows.has("a", "us") and not rows.has("b", "us")
    assert records.load(out, "x")["rows"] == [row("a", "us", 3), row("b", "us", 2)]


def test_a_budget_ends(capsys):
    assert not records.Budget(None).spent() and not records.Budget(60).spent()
    budget = records.Budget(0.001)
    time.sleep(0.002)
    assert budget.spent() and budget.spent()
    assert capsys.readouterr().err.count("budget") == 1


# -- Triton's choices ----------------------------------------------------------------------------------------


def timed(*times, key=(16, 16, 128, 128, 64, False, "torch.bfloat16")):
    """What Triton keeps of a kernel: configurations, told apart by num_warps, and their times."""
    configs = [{"kwargs": {"BV": 32}, "num_warps": 16 * n, "pre_hook": None} for n in range(len(times))]
    return {"key": list(key), "configs_timings": [[c, t] for c, t in zip(configs, times, strict=True)]}


def write(name, content, folder=None):
    path = (folder or fla_tuning.cache_folder()) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


FAILED = [float("inf")] * 3


def test_choices_come_back_on_a_fresh_machine(out, monkeypatch, tmp_path):
    write("HASH/walk.autotune.json", timed([3.0, 2.9, 3.1], [1.0, 0.9, 1.1], FAILED))
    write("OTHER/cumsum.autotune.json", timed([1.0, 1.0, 1.0], key=(1, 4)))
    write("HASH/walk.cubin", "no choice")
    assert fla_tuning.collect(out) == 2
    text = (out / fla_tuning.NAME).read_text()
    assert len(text.splitlines()) == 2 + 2 + 1  # a line a choice
    assert json.loads(text)["versions"] == {"gpu": "NVIDIA H200", "triton": "3", "fla": "0"}

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "fresh"))
    assert fla_tuning.restore(out) == 2
    restored = json.loads((tmp_path / "fresh/HASH/walk.autotune.json").read_text())
    assert restored["key"] == timed()["key"]
    [[config, times]] = restored["configs_timings"]  # what won, as Triton reads it
    assert config["num_warps"] == 16 and times == [1.0, 0.9, 1.1]
    assert not (tmp_path / "fresh/HASH/walk.cubin").exists()
    assert fla_tuning.collect(out) == 2 and (out / fla_tuning.NAME).read_text() == text


def test_restoring_overwrites_nothing_and_lets_fla_keep_choices(out):
    write("HASH/walk.autotune.json", timed([1.0] * 3))
    fla_tuning.collect(out)
    path = write("HASH/walk.autotune.json", "mine")
    assert fla_tuning.restore(out) == 0
    assert path.read_text() == "mine"
    assert fla_tuning.os.environ["FLA_CACHE_RESULTS"] == "1"


def test_choices_add_up_over_the_committed_ones(out):
    write("A/walk.autotune.json", timed([1.0] * 3))
    fla_tuning.collect(records.RESULTS / "h200")
    (fla_tuning.cache_folder() / "A/walk.autotune.json").unlink()
    write("B/walk.autotune.json", timed([1.0] * 3))
    assert fla_tuning.collect(out) == 2
    assert list(json.loads((out / fla_tuning.NAME).read_text())["files"]) == [
        "A/walk.autotune.json",
        "B/walk.autotune.json",
    ]


def test_choices_of_another_gpu_stay_away(out, own_results, capsys):
    path = write("A/walk.autotune.json", timed([1.0] * 3))
    fla_tuning.collect(out)
    path.unlink()
    own_results["gpu"] = "NVIDIA H100"
    assert fla_tuning.restore(out) == 0 and "NVIDIA H100" in capsys.readouterr().err
    assert fla_tuning.collect(out) == 0


def test_a_machine_without_a_gpu_passes_choices_on(out, own_results):
    write("A/walk.autotune.json", timed([1.0] * 3))
    fla_tuning.collect(out)
    own_results.update(gpu=None, triton=None)
    write("B/walk.autotune.json", timed([1.0] * 3))
    assert fla_tuning.collect(out) == 2 and fla_tuning.restore(out) == 0
    assert json.loads((out / fla_tuning.NAME).read_text())["versions"]["gpu"] == "NVIDIA H200"


def test_nothing_is_recorded(out):
    assert fla_tuning.restore(out) == fla_tuning.collect(out) == 0
    assert not (out / fla_tuning.NAME).exists() and fla_tuning.tuned(out) == set()


def test_the_command_says_what_it_did(out, capsys):
    write("A/walk.autotune.json", timed([1.0] * 3))
    assert fla_tuning.main(["collect", "--out", str(out)]) == 0
    assert fla_tuning.main(["restore", "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"1 choices in {out / fla_tuning.NAME}",
        f"0 files written to {fla_tuning.cache_folder()}",
    ]


def test_the_command_without_a_folder_takes_this_gpus(own_results):
    path = write("A/walk.autotune.json", timed([1.0] * 3))
    assert fla_tuning.main(["collect"]) == 0
    assert (records.RESULTS / "h200" / fla_tuning.NAME).is_file()
    path.unlink()
    own_results["gpu"] = "NVIDIA H100"
    assert fla_tuning.main(["restore"]) == 0 and not path.exists()
    own_results["gpu"] = "NVIDIA H200"
    assert fla_tuning.main(["restore"]) == 0 and path.is_file()


def test_head_counts_without_waiting(out):
    for n, key in enumerate([(8, 8, 64, 64, 64, False), (4, 2, 128, 128, 64), (16, 64), (1, 1, 128, 64, 32)]):
        write(f"{n}/walk.autotune.json", timed([1.0] * 3, key=(*key, "torch.bfloat16")))
    fla_tuning.collect(out)
    assert fla_tuning.tuned(out) == {(8, 64)}


# -- what is swept -------------------------------------------------------------------------------------------


def test_the_sweep_covers_lengths_heads_sizes_groups_and_packed_sequences():
    points = list(sweep.points())
    labels = [(point.what, point.shape.label) for point in points]
    assert len(set(labels)) == len(labels)
    assert {p.shape.seqlen for p in points if p.what == "length"} == {1024 * 2**n for n in range(9)}
    assert {p.shape.heads for p in points if p.what == "heads"} == {2**n for n in range(8)}
    assert {p.shape.dim_k for p in points} == {64, 128} and {p.group for p in points} == {1, 4}
    for point in points:
        assert sum(point.shape.lengths or [point.shape.seqlen]) == point.shape.seqlen


def test_baselines_of_a_point():
    fla = {"fla": None, "kda": None}
    by_what = {point.what: point.contestants(fla) for point in sweep.points()}
    assert by_what["length"] == ["fla", "kda", "attention"]
    assert by_what["length, packed"] == ["fla", "kda"]
    assert by_what["length, groups of 4"] == ["fla"]
    assert {tuple(point.contestants({})) for point in sweep.points()} == {(), ("attention",)}


def test_points_that_need_no_tuning_come_first():
    points = sweep.tuned_first(list(sweep.points()), {(16, 128), (4, 128)})
    waits = [(p.shape.heads, p.shape.dim_k) not in {(16, 128), (4, 128)} for p in points]
    assert waits == sorted(waits) and True in waits and False in waits
    assert points[0].shape.seqlen == 8192


def sweep_row(point, which, who, ms):
    return {
        "what": point.what, "seqlen": point.shape.seqlen, "heads": point.shape.heads, "pass": which,
        "implementation": who, "ms": ms, "ns_a_token": ms, "share_of_floor": None,
    }  # fmt: skip


def test_plots_of_whatever_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    some = [
        sweep_row(p, "forward", who, 1.0) for p in list(sweep.points())[::3] for who in ("gdn2_ext", "fla")
    ]
    for n, rows in enumerate((some, some[::2], [])):
        sweep.plot({"gpu": "NVIDIA H200", "rows": rows}, tmp_path / f"sweep{n}.png")
    cut = {"pass": "forward", "heads": 1, "batch": 1, "seqlen": 4096, "times_faster": 1.5}
    split.plot({"rows": [cut]}, tmp_path / "split.png")
    assert all(path.stat().st_size for path in tmp_path.glob("*.png"))


def test_no_sweep_to_plot(out, capsys):
    assert sweep.main(["--plot", "--out", str(out)]) == 1 and str(out) in capsys.readouterr().err


def test_shapes_that_are_cut_are_few_heads():
    h200 = Gpu(num_sms=132, memory_bandwidth=4916)
    shapes = split.cut_shapes(h200)
    assert len(set(shapes)) == len(shapes) > 10
    assert all(split.segments(shape, h200) > 1 for shape in shapes)
    assert max(shape.batch * shape.heads for shape in shapes) < 132
