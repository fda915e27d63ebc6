"""`python -m bench.readme`: README's tables, from bench/results.

Between `<!-- bench.NAME -->` and `<!-- /bench.NAME -->` stands what is made of bench/results/NAME.json, and
nothing where there is no such file. `--check` changes nothing and exits with 1 where README differs.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

from . import records
from .records import number
from .shapes import OP_SHAPES

README = Path(__file__).resolve().parents[1] / "README.md"
PASSES = ("forward", "forward+backward")


def table(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Markdown."""

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    header = list(header)
    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, lines)])


def link(name: str) -> str:
    return f"[bench/results/{name}.json](bench/results/{name}.json)"


def by_shape(rows: Iterable[dict], *about: str) -> dict[tuple, dict[str, dict]]:
    """For every value of the columns `about`, in order: the rows by implementation."""
    shapes: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        shapes.setdefault(tuple(row[x] for x in about), {})[row["implementation"]] = row
    return shapes


def ratio(rows: dict[str, dict], column: str) -> float | None:
    """How many times faster than FLA."""
    theirs = rows.get("fla", {}).get(column)
    return theirs and rows["gdn2_ext"][column] and theirs / rows["gdn2_ext"][column]


def op(record: dict) -> str:
    order = {shape.label: n for n, shape in enumerate(OP_SHAPES)}  # whichever was measured first
    rows = [row for row in record["rows"] if not row["l2norm"]]
    rows.sort(key=lambda row: order.get(row["shape"], len(order)))
    shapes = by_shape(rows, "shape", "pass")

    def cells(rows: dict[str, dict]) -> list[str]:
        """Ours, Triton's and times faster, eager / CUDA graph."""
        times = [
            f"{number(row.get('ms'), '.2f')} / {number(row.get('graph_ms'), '.2f')}"
            for row in (rows["gdn2_ext"], rows.get("fla", {}))
        ]
        return [*times, f"{number(ratio(rows, 'ms'), '.1f')} / {number(ratio(rows, 'graph_ms'), '.1f')}"]

    lines = []
    for shape in dict.fromkeys(shape for shape, _ in shapes):
        forward, training = (shapes[shape, which] for which in PASSES)
        memory = [number(training.get(who, {}).get("peak_mib"), ".0f") for who in ("gdn2_ext", "fla")]
        lines.append([shape, *cells(forward), *cells(training), " against ".join(memory)])
    columns = ("Triton", "times faster")
    header = ["shape", "forward", *columns, "forward + backward", *columns, "peak memory, MiB"]
    floors = [shapes[rows[0]["shape"], which]["gdn2_ext"]["floor_ms"] for which in PASSES]
    return (
        f"{table(header, lines)}\n\nThe byte floor of the first shape is {floors[0]:.3f} ms forward, "
        f"{floors[1]:.3f} ms with the backward."
    )


def decode(record: dict) -> str:
    rows = [row for row in record["rows"] if row["states"] == "float32"]
    lines = []
    for (shape,), who in by_shape(rows, "shape").items():
        new, pool, fla = (who.get(name, {}) for name in ("gdn2_ext", "gdn2_ext pool", "fla"))
        graphs = [number(x.get("graph_us"), ".1f") for x in (new, pool, fla)]
        eager = [number(x.get("eager_us"), ".0f") for x in (pool, fla)]
        lines.append([shape.split()[0][1:], f"{graphs[0]} / {graphs[1]}", graphs[2], *eager])
    header = ("batch", "graph: new states / pool in place", "Triton", "eager, pool in place", "Triton")
    return table(header, lines)


def model(record: dict) -> str:
    lines = []
    for (what, shape), who in by_shape(record["rows"], "what", "shape").items():
        ours, fla = who["gdn2_ext"], who.get("fla", {})
        times = [number(x.get("ms"), ".1f") for x in (ours, fla)]
        tokens = [number(x.get("tokens_per_second"), ",.0f") for x in (ours, fla)]
        memory = [number(x and x["peak_mib"] / 1024, ".1f") for x in (ours, fla or None)]
        both = [" against ".join(x) for x in (tokens, memory)]
        lines.append([what, shape.replace("x", " "), *times, number(ratio(who, "ms"), ".2f"), *both])
    header = ("what", "shape", "ms a step", "Triton", "times faster", "tokens a second", "peak memory, GiB")
    return (
        "Training steps, eager: the layer alone (hidden size 2048, 16 heads, bfloat16, forward and\n"
        "backward), and the paper's models with AdamW under bfloat16 autocast, with this op and with\n"
        f"Triton's in the same model (`python -m bench.model`, {link('model')}):\n\n{table(header, lines)}"
    )


def variants(record: dict) -> str:
    lines = [
        [row["topic"], row["pass"].replace("+", " + "), row["call"],
         f"{row['ms']:.3f} / {number(row['graph_ms'], '.3f')}", f"{row['relative_to_first']:.2f}",
         number(row["ns_a_token_and_head"], ".2f")]
        for row in record["rows"]
    ]  # fmt: skip
    header = ("topic", "pass", "call", "ms, eager / graph", "relative to the first", "ns a token and head")
    return (
        f"What options and sizes cost (`python -m bench.variants`, {link('variants')}):\n\n"
        f"{table(header, lines)}"
    )


def recall(record: dict) -> str:
    scores: dict[tuple[str, int], dict[str, list[float]]] = {}
    for run in record["runs"]:
        for n, accuracy in run["accuracy"].items():
            scores.setdefault((run["task"], int(n)), {}).setdefault(run["variant"], []).append(accuracy)
    names = list(dict.fromkeys(run["variant"] for run in record["runs"]))
    names.sort(key=lambda name: name != "gdn2")

    def cell(values: list[float] | None) -> str:
        if values is None:
            return "-"
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{100 * statistics.mean(values):.1f} ± {100 * deviation:.1f}"

    lines = [
        [task, str(n), *(cell(by_name.get(name)) for name in names)]
        for (task, n), by_name in sorted(scores.items())
    ]
    return (
        "Recall, accuracy in percent over seeds, by the number of pairs or needles n, trained on an "
        f"{record['device']}\n(`python examples/recall.py`, {link('recall')}):\n\n"
        f"{table(('task', 'n', *names), lines)}\n\n"
        "![accuracy against pairs and needles](bench/results/recall.png)"
    )


def sweep(record: dict) -> str:
    return (
        "Over lengths and heads, beside Kimi Delta Attention (Triton) and PyTorch's causal attention\n"
        f"(`python -m bench.sweep`, {link('sweep')}):\n\n"
        "![time a token, share of the byte floor, times faster than Triton](bench/results/sweep.png)"
    )


def split(record: dict) -> str:
    times = [row["times_faster"] for row in record["rows"]]
    shapes = len({row["shape"] for row in record["rows"]})
    return (
        f"Sequences cut into segments, where that is chosen: {min(times):.2f} to {max(times):.2f} times "
        f"faster than whole ones,\nover {shapes} shapes (`python -m bench.split`, {link('split')})."
    )


BLOCKS = {
    "op": op,
    "decode": decode,
    "model": model,
    "variants": variants,
    "recall": recall,
    "sweep": sweep,
    "split": split,
}


def render(text: str, folder: Path = records.RESULTS) -> str:
    """README's text with the blocks of the results in the folder."""
    for name, block in BLOCKS.items():
        record = records.load(folder, name)
        content = "" if record is None else f"\n{block(record)}\n\n"
        begin, end = f"<!-- bench.{name} -->\n", f"<!-- /bench.{name} -->"
        pattern = re.compile(f"({re.escape(begin)}).*?({re.escape(end)})", re.DOTALL)
        text, found = pattern.subn(lambda marks, x=content: f"{marks[1]}{x}{marks[2]}", text)
        if found != 1:
            raise ValueError(f"README: expected one {begin.strip()} ... {end}, found {found}")
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only exit with 1 where README differs")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder of the results")
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args(arguments)
    text = options.readme.read_text()
    made = render(text, options.out)
    if options.check:
        if made != text:
            print(f"{options.readme} is not what `python -m bench.readme` makes", file=sys.stderr)
        return int(made != text)
    options.readme.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
