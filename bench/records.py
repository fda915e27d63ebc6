"""What the benchmarks share: the baseline they compare with, and records with provenance."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import provenance

RESULTS = Path(__file__).resolve().parent / "results"


def load_fla(name: str) -> Callable | None:
    """A function of `fla.ops.gdn2`; None, said on stderr, where flash-linear-attention is not installed."""
    try:
        return getattr(importlib.import_module("fla.ops.gdn2"), name)
    except ImportError:
        print("flash-linear-attention is not installed: measuring gdn2_ext alone", file=sys.stderr)
        return None


def number(value: float | None, form: str) -> str:
    """For a table; "-" where nothing was measured."""
    return "-" if value is None else format(value, form)


def save(folder: Path, name: str, rows: list[dict], **measured: object) -> None:
    """NAME.json, with the sources' digest, GPU, versions and whatever else was measured, and NAME.csv."""
    record = {"digest": provenance.digest(), **provenance.environment(), **measured, "rows": rows}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
