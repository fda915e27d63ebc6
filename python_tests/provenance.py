"""What a test run was made with: a digest of the sources, the machine, and the versions of what it ran on."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCE_FOLDERS = ("csrc", "gdn2_ext")
SOURCE_SUFFIXES = (".py", ".cu", ".cuh", ".h", ".cpp")
SOURCE_FILES = ("CMakeLists.txt",)


def source_files(root: Path = REPOSITORY) -> list[Path]:
    """The files that decide what the op computes, sorted by their path inside the repository."""
    found = [root / name for name in SOURCE_FILES if (root / name).is_file()]
    for folder in SOURCE_FOLDERS:
        found += [
            path for path in (root / folder).rglob("*") if path.suffix in SOURCE_SUFFIXES and path.is_file()
        ]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def digest(root: Path = REPOSITORY) -> str:
    """SHA-256 over the names and contents of `source_files`, in hexadecimal."""
    sha = hashlib.sha256()
    for path in source_files(root):
        content = path.read_bytes()
        sha.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        sha.update(content)
    return sha.hexdigest()


def environment() -> dict[str, str | None]:
    """GPU, driver and versions; None where there is no such thing."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": _driver_version(),
        "torch": torch.__version__,
        "triton": _package_version("triton"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver_version() -> str | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
    lines = answer.stdout.split()
    return lines[0] if answer.returncode == 0 and lines else None
