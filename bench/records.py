"""What the benchmarks share: records with provenance, which several short runs can add up to."""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.metadata
import json
import math
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import provenance

RESULTS = Path(__file__).resolve().parent / "results"  # by GPU

# What the sweep's records call them, and what README and plots do.
IMPLEMENTATIONS = {
    "gdn2_ext": "gdn2_ext",
    "fla": "chunk_gdn2, Triton",
    "kda": "chunk_kda, Triton",
    "attention": "causal attention, PyTorch",
}

# Rows are kept from one run to the next where these are the same.
_SAME = ("digest", "gpu", "torch", "triton", "cuda", "fla")


def number(value: float | None, form: str) -> str:
    """For a table; "-" where nothing was measured."""
    return "-" if value is None else format(value, form)


@functools.cache
def header() -> dict:
    """Of this process: the sources' digest, GPU, versions and when it began; None for what is not there."""
    try:
        fla = importlib.metadata.version("fla-core")  # has flash-linear-attention's kernels
    except importlib.metadata.PackageNotFoundError:
        fla = None
    return {"digest": provenance.digest(), **provenance.environment(), "fla": fla}


def gpu_folder() -> Path:
    """The committed results of this GPU: "NVIDIA H100 80GB HBM3" has h100, no GPU cpu."""
    words = re.findall("[a-z0-9]+", (header()["gpu"] or "cpu").lower().replace("nvidia", ""))
    is_model = re.fullmatch(r"[a-z]+\d+[a-z]*", words[0])  # what follows is memory and form
    return RESULTS / (words[0] if is_model else "-".join(words))


def save(folder: Path, name: str, rows: list[dict], **measured: object) -> None:
    """NAME.json, with the sources' digest, GPU, versions and whatever else was measured, and NAME.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {**header(), **measured, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def load(folder: Path, name: str) -> dict | None:
    """The record NAME.json of a folder; None where there is none."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


# -- runs that add up ----------------------------------------------------------------------------------------


def add_out(parser: argparse.ArgumentParser) -> None:
    """--out: where results are read and written, by default this GPU's."""
    parser.add_argument("--out", type=Path, default=gpu_folder(), help="folder of the results")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--budget, --again and --out, of a benchmark whose runs add up."""
    parser.add_argument("--budget", type=float, help="seconds after which nothing new is begun")
    parser.add_argument("--again", action="store_true", help="also what is recorded for these sources")
    add_out(parser)


class Budget:
    """Seconds after which nothing new is begun; None: no end."""

    def __init__(self, seconds: float | None):
        self._end = math.inf if seconds is None else time.monotonic() + seconds
        self._said = False

    def spent(self) -> bool:
        spent = time.monotonic() >= self._end
        if spent and not self._said:
            print("the budget is spent: the next run goes on from here", file=sys.stderr)
            self._said = True
        return spent


class Rows:
    """The rows of NAME.json, each identified by its columns `about`.

    Begins with those that the same sources measured on the same kind of GPU with the same versions, of the
    folder or else of the committed results. They stay in the record, and count as measured unless `again`.
    """

    def __init__(self, folder: Path, name: str, about: tuple[str, ...], again: bool = False):
        self._folder, self._name, self._about = folder, name, about
        self._rows = {self._key(row): row for row in self._recorded()}
        self._measured = set() if again else set(self._rows)
        if self._measured:
            print(f"{len(self._measured)} rows of {name}.json are these sources': kept", file=sys.stderr)

    def _recorded(self) -> list[dict]:
        for folder in (self._folder, gpu_folder()):
            record = load(folder, self._name)
            if record is not None and all(record.get(key) == header()[key] for key in _SAME):
                return record["rows"]
        return []

    def _key(self, row: dict) -> tuple:
        return tuple(row[column] for column in self._about)

    def has(self, *about: object) -> bool:
        """Whether there are rows of these values of the first columns of `about`."""
        return any(key[: len(about)] == about for key in self._measured)

    def add(self, rows: Iterable[dict], **measured: object) -> None:
        """Replaces the rows about the same, and saves."""
        new = {self._key(row): row for row in rows}
        self._rows |= new
        self._measured |= set(new)
        if self._rows:
            save(self._folder, self._name, list(self._rows.values()), **measured)
