"""The digest of the sources that goes with every recorded result."""

import provenance
import pytest


@pytest.fixture
def repository(tmp_path):
    for name in ("csrc/sm90/scan.cu", "csrc/params.h", "gdn2_ext/ops.py", "CMakeLists.txt", "README.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


def test_sources_are_listed_in_order_and_nothing_else(repository):
    for name in ("gdn2_ext/_C.so", "gdn2_ext/__pycache__/ops.cpython-311.pyc", "bench/bench_op.py"):
        path = repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    names = [path.relative_to(repository).as_posix() for path in provenance.source_files(repository)]
    assert names == ["CMakeLists.txt", "csrc/params.h", "csrc/sm90/scan.cu", "gdn2_ext/ops.py"]


@pytest.mark.parametrize("name", ["csrc/sm90/scan.cu", "gdn2_ext/ops.py", "CMakeLists.txt"])
def test_the_digest_changes_with_a_source(repository, name):
    before = provenance.digest(repository)
    (repository / name).write_text("changed")
    assert provenance.digest(repository) != before


def test_the_digest_changes_with_a_sources_name(repository):
    before = provenance.digest(repository)
    (repository / "csrc/params.h").rename(repository / "csrc/parameters.h")
    assert provenance.digest(repository) != before


def test_the_digest_does_not_change_with_anything_else(repository):
    before = provenance.digest(repository)
    (repository / "README.md").write_text("changed")
    (repository / "gdn2_ext/_C.so").write_text("changed")
    assert provenance.digest(repository) == before
    assert len(before) == 64


def test_this_repositorys_sources_are_found():
    names = {path.name for path in provenance.source_files()}
    assert {"ops.py", "torch_backend.py", "CMakeLists.txt"} <= names


def test_the_environment_is_described():
    environment = provenance.environment()
    assert {"gpu", "driver", "torch", "triton", "cuda", "python", "date"} == environment.keys()
    assert environment["torch"] and environment["python"] and environment["date"]
