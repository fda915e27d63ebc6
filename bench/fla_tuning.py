"""flash-linear-attention, the baseline, with the choices that Triton made for its kernels, by GPU.

    python -m bench.fla_tuning restore    from bench/results/GPU/fla_tuning.json to Triton's cache
    python -m bench.fla_tuning collect    from there to the file

Triton times many configurations of every kernel, for every head count and head size, and takes the
quickest: 20 to 190 seconds a head count on a fresh machine. It keeps the times in its cache
(TRITON_CACHE_DIR, by default ~/.triton/cache) as HASH/KERNEL.autotune.json. fla_tuning.json has the winner of
each, one a line, as Triton reads it, so that every run compares with the same choices and none waits for
them. The benchmarks restore and collect by themselves; files that are in the cache already are left as they
are.

The hash covers Triton, ptxas, compute capability, the kernel's source, its key (heads, sizes and dtypes, but
not T) and the configurations: where one of them differs, Triton does not see the file and tunes. It does not
cover the GPU's name, so nothing is restored on another GPU than the recorded one. To tune anew: delete
fla_tuning.json and Triton's cache.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from . import records

NAME = "fla_tuning.json"
PATTERN = "*/*.autotune.json"


def load_fla(name: str, folder: Path) -> Callable | None:
    """A function of `fla.ops.gdn2`, with recorded choices; None, said on stderr, where there is no FLA."""
    restore(folder)
    try:
        return getattr(importlib.import_module("fla.ops.gdn2"), name)
    except ImportError:
        print("flash-linear-attention is not installed: measuring gdn2_ext alone", file=sys.stderr)
        return None


def cache_folder() -> Path:
    """Where Triton looks."""
    home = os.environ.get("TRITON_HOME") or Path.home()
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path(home, ".triton", "cache"))


def _recorded(folder: Path) -> tuple[dict, dict[str, dict]]:
    """Versions and choices by file name: the committed ones, and those of `folder` over them."""
    versions, files = {}, {}
    for path in dict.fromkeys((records.gpu_folder() / NAME, folder / NAME)):
        if path.is_file():
            record = json.loads(path.read_text())
            if record["versions"] != versions:
                versions, files = record["versions"], {}
            files |= record["files"]
    return versions, files


def restore(folder: Path) -> int:
    """Recorded choices to Triton's cache, before FLA is imported; how many were not there."""
    os.environ["FLA_CACHE_RESULTS"] = "1"  # FLA's kernels keep and read choices
    versions, files = _recorded(folder)
    gpu = records.header()["gpu"]
    if files and gpu is not None and gpu != versions["gpu"]:
        print(f"{NAME} is of an {versions['gpu']}: Triton tunes for this {gpu}", file=sys.stderr)
        return 0
    written = 0
    for name, content in files.items():
        path = cache_folder() / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
            written += 1
    return written


def collect(folder: Path) -> int:
    """Triton's choices from its cache to the file in `folder`, with the recorded ones; how many there are.

    Those of other versions or another GPU are dropped. A machine without a GPU only passes files on: the
    versions stay those recorded.
    """
    versions, files = _recorded(folder)
    now = {key: records.header()[key] for key in ("gpu", "triton", "fla")}
    if now != versions and (now["gpu"] is not None or not versions):
        versions, files = now, {}
    for path in cache_folder().glob(PATTERN):
        files[f"{path.parent.name}/{path.name}"] = _choice(json.loads(path.read_text()))
    if files:
        folder.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(files[name])}" for name in sorted(files))
        text = f'{{"versions": {json.dumps(versions)},\n"files": {{\n{lines}\n}}}}\n'
        (folder / NAME).write_text(text)
    return len(files)


def _choice(content: dict) -> dict:
    """The winner alone: Triton takes the least of the times that it finds."""
    best = min(content["configs_timings"], key=lambda config_and_times: config_and_times[1])
    return {"key": content["key"], "configs_timings": [best]}


def tuned(folder: Path) -> set[tuple[int, int]]:
    """(heads, head size) for which choices are recorded.

    Told by the walk over the chunks, whose keys begin with H, HV, K, V.
    """
    keys = [content["key"] for content in _recorded(folder)[1].values()]
    return {(key[0], key[2]) for key in keys if len(key) > 3 and key[0] == key[1] and key[2] == key[3]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fla_tuning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("restore", "collect"))
    records.add_out(parser)
    options = parser.parse_args(arguments)
    if options.what == "restore":
        print(f"{restore(options.out)} files written to {cache_folder()}")
    else:
        print(f"{collect(options.out)} choices in {options.out / NAME}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
