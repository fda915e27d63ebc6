"""`python -m bench.readme`: README's tables, from bench/results.

Between `<!-- bench.NAME -->` and `<!-- /bench.NAME -->` stands what is made of the newest of
bench/results/*/NAME.json, which are one a GPU, and nothing where there is none; for the op also what is made
of the others. What was measured with other sources than the newest record of all is called so. `--check`
changes nothing and exits with 1 where README differs.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

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


def paragraph(text: str) -> str:
    """In lines, none of which ends within backticks."""
    whole = re.sub("`.*?`", lambda code: code[0].replace(" ", "\0"), text)
    return textwrap.fill(whole, 120, break_long_words=False, break_on_hyphens=False).replace("\0", " ")


class Result(NamedTuple):
    """A record, the GPU's folder that it lies in, whether it was measured with other sources than the newest
    record of all, and the records of other GPUs, the newest first.
    """

    name: str
    folder: str
    record: dict
    is_older: bool
    others: list[Result]

    def path(self, ending: str) -> str:
        return f"bench/results/{self.folder}/{self.name}.{ending}"

    @property
    def link(self) -> str:
        return f"[{self.path('json')}]({self.path('json')})"

    @property
    def measured(self) -> str:
        """When, and with older sources if so."""
        older = "with older sources" if self.is_older else ""
        return " ".join(x for x in ("measured", date(self.record)[:10], older) if x)

    @property
    def source(self) -> str:
        return f"{self.link}, {self.measured}" if self.is_older else self.link

    @property
    def gpu(self) -> str:
        return f"one {self.record['gpu']}"


def newest(folder: Path) -> dict[str, Result]:
    """Of every benchmark that was run, by the date in the record."""
    paths = [path for name in BLOCKS for path in sorted(folder.glob(f"*/{name}.json"))]
    found = [(path, records.load(path.parent, path.stem)) for path in paths]
    found.sort(key=lambda x: date(x[1]), reverse=True)
    results: dict[str, list[Result]] = {}
    for path, record in found:
        is_older = record.get("digest") != found[0][1].get("digest")
        result = Result(path.stem, path.parent.name, record, is_older, [])
        results.setdefault(path.stem, []).append(result)
    return {name: first._replace(others=others) for name, (first, *others) in results.items()}


def date(record: dict) -> str:
    return record.get("date", "")


def by_shape(rows: Iterable[dict], *about: str) -> dict[tuple, dict[str, dict]]:
    """For every value of the columns `about`, in order: the rows by implementation."""
    shapes: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        shapes.setdefault(tuple(row[x] for x in about), {})[row["implementation"]] = row
    return shapes


def ratio(rows: dict[str, dict], column: str, other: str = "fla") -> float | None:
    """How many times faster than another implementation."""
    ours, theirs = (rows.get(name, {}).get(column) for name in ("gdn2_ext", other))
    return ours and theirs and theirs / ours


def op(result: Result) -> str:
    record = result.record
    against = f", against flash-linear-attention {record['fla']} (Triton)" if record["fla"] else ""
    parts = [
        paragraph(
            f"On {result.gpu}, bfloat16, float32 g, K = V = 128, milliseconds, eager / CUDA graph; medians, "
            f"both in one process on the same inputs (`python -m bench.op`, {result.source}){against}:"
        ),
        *op_tables(record),
    ]
    for other in result.others:
        parts += [f"On {other.gpu}, {other.measured} ({other.link}):", *op_tables(other.record)]
    return "\n\n".join(parts)


def op_tables(record: dict) -> list[str]:
    """Times and memory, the byte floor, and times faster with the L2 norm inside where that was measured."""
    order = {shape.label: n for n, shape in enumerate(OP_SHAPES)}  # whichever was measured first
    rows = sorted(record["rows"], key=lambda row: order.get(row["shape"], len(order)))
    shapes = by_shape((row for row in rows if not row["l2norm"]), "shape", "pass")
    normed = by_shape((row for row in rows if row["l2norm"]), "shape", "pass")

    def labels(shapes: dict) -> list[str]:
        return list(dict.fromkeys(shape for shape, _ in shapes))

    def faster(rows: dict[str, dict]) -> str:
        return f"{number(ratio(rows, 'ms'), '.1f')} / {number(ratio(rows, 'graph_ms'), '.1f')}"

    def cells(rows: dict[str, dict]) -> list[str]:
        """Ours, Triton's and times faster, eager / CUDA graph."""
        times = [
            f"{number(row.get('ms'), '.2f')} / {number(row.get('graph_ms'), '.2f')}"
            for row in (rows["gdn2_ext"], rows.get("fla", {}))
        ]
        return [*times, faster(rows)]

    lines = []
    for shape in labels(shapes):
        forward, training = (shapes[shape, which] for which in PASSES)
        memory = [number(training.get(who, {}).get("peak_mib"), ".0f") for who in ("gdn2_ext", "fla")]
        lines.append([shape, *cells(forward), *cells(training), " against ".join(memory)])
    columns = ("Triton", "times faster")
    header = ["shape", "forward", *columns, "forward + backward", *columns, "peak memory, MiB"]
    floors = [shapes[labels(shapes)[0], which]["gdn2_ext"]["floor_ms"] for which in PASSES]
    parts = [
        table(header, lines),
        f"The byte floor of the first shape is {floors[0]:.3f} ms forward, "
        f"{floors[1]:.3f} ms with the backward.",
    ]
    if normed:
        lines = [[x, *(faster(normed.get((x, which), {})) for which in PASSES)] for x in labels(normed)]
        parts += [
            "Times faster with the L2 norm of q and k inside the call, eager / CUDA graph:",
            table(("shape", "forward", "forward + backward"), lines),
        ]
    return parts


def decode(result: Result) -> str:
    rows = [row for row in result.record["rows"] if row["states"] == "float32"]
    lines = []
    for (shape,), who in by_shape(rows, "shape").items():
        new, pool, fla = (who.get(name, {}) for name in ("gdn2_ext", "gdn2_ext pool", "fla"))
        graphs = [number(x.get("graph_us"), ".1f") for x in (new, pool, fla)]
        eager = [number(x.get("eager_us"), ".0f") for x in (pool, fla)]
        lines.append([shape.split()[0][1:], f"{graphs[0]} / {graphs[1]}", graphs[2], *eager])
    header = ("batch", "graph: new states / pool in place", "Triton", "eager, pool in place", "Triton")
    about = paragraph(
        f"Decoding one token on {result.gpu}, H16, K = V = 128, float32 states, microseconds "
        f"(`python -m bench.decode`, {result.source}): a graph of 100 calls on 100 sets of states, divided "
        "by 100, and an eager call:"
    )
    return f"{about}\n\n{table(header, lines)}"


def model(result: Result) -> str:
    lines = []
    for (what, shape), who in by_shape(result.record["rows"], "what", "shape").items():
        ours, fla = who["gdn2_ext"], who.get("fla", {})
        times = [number(x.get("ms"), ".1f") for x in (ours, fla)]
        tokens = [number(x.get("tokens_per_second"), ",.0f") for x in (ours, fla)]
        memory = [number(x and x["peak_mib"] / 1024, ".1f") for x in (ours, fla or None)]
        both = [" against ".join(x) for x in (tokens, memory)]
        lines.append([what, shape.replace("x", " "), *times, number(ratio(who, "ms"), ".2f"), *both])
    header = ("what", "shape", "ms a step", "Triton", "times faster", "tokens a second", "peak memory, GiB")
    about = paragraph(
        f"Training steps on {result.gpu}, eager: the layer alone (hidden size 2048, 16 heads, bfloat16, "
        "forward and backward), and the paper's models with AdamW under bfloat16 autocast, with this op and "
        f"with Triton's in the same model (`python -m bench.model`, {result.source}):"
    )
    return f"{about}\n\n{table(header, lines)}"


def variants(result: Result) -> str:
    lines = [
        [row["topic"], row["pass"].replace("+", " + "), row["call"],
         f"{row['ms']:.3f} / {number(row['graph_ms'], '.3f')}", f"{row['relative_to_first']:.2f}",
         number(row["ns_a_token_and_head"], ".2f"), number(row["peak_mib"], ",.1f")]
        for row in result.record["rows"]
    ]  # fmt: skip
    header = ("topic", "pass", "call", "ms, eager / graph", "relative to the first", "ns a token and head",
              "peak memory, MiB")  # fmt: skip
    about = paragraph(
        f"What options and sizes cost on {result.gpu} (`python -m bench.variants`, {result.source}), at "
        "B4 T4096 H16, K = V = 128 unless said. small: beside a call of PyTorch's own, between events, or in "
        "a row without them, which tells what the host takes for it; fused: norms, decay gate and gate "
        "sigmoids inside the call, raw g in float32 or in 16 bits, or outside in PyTorch; keep: "
        "disable_recompute; groups: 4 value heads a key head (H4, HV16), or q, k, g and b repeated for them; "
        "linear: B1. Memory is what a call allocates beyond its inputs."
    )
    return f"{about}\n\n{table(header, lines)}"


def recall(result: Result) -> str:
    scores: dict[tuple[str, int], dict[str, list[float]]] = {}
    for run in result.record["runs"]:
        for n, accuracy in run["accuracy"].items():
            scores.setdefault((run["task"], int(n)), {}).setdefault(run["variant"], []).append(accuracy)
    names = list(dict.fromkeys(run["variant"] for run in result.record["runs"]))
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
    seeds = len({run["seed"] for run in result.record["runs"]})
    asked = result.record["options"]
    about = paragraph(
        f"Recall, accuracy in percent over {seeds} seeds, by the number of pairs or needles n, of models of "
        f"{asked['layers']} layers, width {asked['width']}, trained on one {result.record['device']} "
        f"(`python examples/recall.py`, {result.source}):"
    )
    plot = f"![accuracy against pairs and needles]({result.path('png')})"
    return f"{about}\n\n{table(('task', 'n', *names), lines)}\n\n{plot}"


def sweep(result: Result) -> str:
    points = by_shape(result.record["rows"], "what", "shape", "pass")

    def line(name: str) -> list[str]:
        ratios = {point: x for point, rows in points.items() if (x := ratio(rows, "ms", name))}
        ranges = []
        for which in PASSES:
            values = [x for point, x in ratios.items() if point[-1] == which]
            ranges.append(f"{min(values):.2f} to {max(values):.2f}" if values else "-")
        slower = [", ".join(point).replace("+", " + ") for point, x in ratios.items() if x < 1]
        return [records.IMPLEMENTATIONS[name], *ranges, "; ".join(slower) or f"nowhere of {len(ratios)}"]

    others = {name for rows in points.values() for name in rows if name != "gdn2_ext"}
    lines = [line(name) for name in records.IMPLEMENTATIONS if name in others]
    header = ("gdn2_ext against", "forward, times faster", "forward + backward", "slower at")
    about = paragraph(
        f"Over lengths and heads on {result.gpu}, beside Kimi Delta Attention (Triton) and PyTorch's causal "
        f"attention, eager (`python -m bench.sweep`, {result.source}):"
    )
    plot = f"![time a token, share of the byte floor, times faster than Triton]({result.path('png')})"
    return "\n\n".join([about, *([table(header, lines)] if lines else []), plot])


def split(result: Result) -> str:
    rows = result.record["rows"]
    times: dict[str, list[float]] = {}
    for row in rows:
        times.setdefault(row["pass"].replace("+", " + "), []).append(row["times_faster"])
    ranges = ", ".join(f"{which} {min(x):.2f} to {max(x):.2f} times" for which, x in times.items())
    shapes = len({row["shape"] for row in rows})
    eager = [row["whole_ms"] / row["chosen_ms"] for row in rows]
    slower = sum(x < 0.995 for x in eager)
    same = [row["whole_ms"] / row["again_ms"] for row in rows if "again_ms" in row]
    itself = f" (whole against whole: {min(same):.2f} to {max(same):.2f})" if same else ""
    about = paragraph(
        f"Sequences cut into segments, where that is chosen, against whole ones on {result.gpu}, "
        f"over {shapes} shapes, in CUDA graphs: {ranges} faster (`python -m bench.split`, {result.source}). "
        f"{slower} of {len(eager)} eager calls {'is' if slower == 1 else 'are'} slower, "
        f"at worst {min(eager):.2f} times as fast{itself}: "
        "with the backward short sequences wait for the host, split or whole; "
        "`sequence_split=1` turns it off."
    )
    return f"{about}\n\n![times faster than whole, over lengths]({result.path('png')})"


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
    results = newest(folder)
    for name, block in BLOCKS.items():
        content = f"\n{block(results[name])}\n\n" if name in results else ""
        begin, end = f"<!-- bench.{name} -->\n", f"<!-- /bench.{name} -->"
        pattern = re.compile(f"({re.escape(begin)}).*?({re.escape(end)})", re.DOTALL)
        text, found = pattern.subn(lambda marks, x=content: f"{marks[1]}{x}{marks[2]}", text)
        if found != 1:
            raise ValueError(f"README: expected one {begin.strip()} ... {end}, found {found}")
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only exit with 1 where README differs")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="results by GPU")
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
