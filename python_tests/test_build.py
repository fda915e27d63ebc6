"""The build refuses what would not work, says why, and what it builds is what it says."""

import email
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import gdn2_ext

ROOT = Path(__file__).resolve().parents[1]
TOOLS_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
CMAKE = shutil.which("cmake", path=TOOLS_PATH)
NINJA = shutil.which("ninja", path=TOOLS_PATH)
NVCC = shutil.which(os.environ.get("CUDACXX") or "nvcc")
# Where the Makefile puts CUTLASS; without it, the build asks for the nvidia-cutlass package.
CUTLASS = Path(os.environ.get("GDN2_CUTLASS_DIR") or Path(sys.prefix, "cutlass/cutlass_library/source"))

needs_cmake = pytest.mark.skipif(not (CMAKE and NINJA), reason="needs cmake and ninja")
needs_nvcc = pytest.mark.skipif(not NVCC, reason="needs nvcc")
needs_backend = pytest.mark.skipif(
    not importlib.util.find_spec("scikit_build_core"), reason="needs scikit-build-core in this environment"
)
needs_headers = pytest.mark.skipif(
    not (
        importlib.util.find_spec("pybind11")
        and (CUTLASS.exists() or importlib.util.find_spec("cutlass_library"))
    ),
    reason="needs pybind11 and CUTLASS: run by `make test`, or with GDN2_CUTLASS_DIR",
)
needs_kernels = pytest.mark.skipif(
    importlib.util.find_spec("gdn2_ext._C") is None, reason="needs an install with kernels (GDN2_CUDA=ON)"
)


def plain_environment(path: Path | None = None, **changes: str) -> dict[str, str]:
    """This environment without what steers the build; `path` is then all that is on PATH."""
    steering = {
        "GDN2_CUDA",
        "GDN2_CUTLASS_DIR",
        "CUDAARCHS",
        "CUDACXX",
        "CUDA_HOME",
        "CUDA_PATH",
        "CMAKE_ARGS",
    }
    env = {name: value for name, value in os.environ.items() if name not in steering}
    if path is not None:
        env["PATH"] = str(path)
    return env | changes


def configure(build: Path, *defines: str, env: dict[str, str]) -> tuple[int, str]:
    """Runs CMake on this repository. Returns its exit status and what it said, on one line."""
    command = [CMAKE, "-S", ROOT, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={NINJA}"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", *defines]
    done = subprocess.run(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, " ".join(done.stdout.split())


def fake_nvcc(folder: Path, says: str) -> Path:
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '{says}'\n")
    nvcc.chmod(0o755)
    return nvcc


# ---- architectures -----------------------------------------------------------------------------------------


@needs_cmake
@pytest.mark.parametrize("name", ["80", "90-real", "90a-real", "100a", "90a;100a", "native", "all"])
def test_another_architecture_is_refused_with_the_reason(tmp_path, name):
    status, said = configure(tmp_path, f"-DCMAKE_CUDA_ARCHITECTURES={name}", env=plain_environment())
    assert status != 0
    assert f"CMAKE_CUDA_ARCHITECTURES is '{name}', but gdn2_ext is built for '90a' only" in said
    assert "wgmma, a tensor-core instruction of compute capability 9.0 that no other architecture has" in said
    assert "GDN2_CUDA=OFF" in said


@needs_cmake
@pytest.mark.parametrize("how", ["define", "environment"])
def test_plain_90_is_refused_with_the_reason(tmp_path, how):
    if how == "define":
        status, said = configure(tmp_path, "-DCMAKE_CUDA_ARCHITECTURES=90", env=plain_environment())
    else:
        status, said = configure(tmp_path, env=plain_environment(CUDAARCHS="90"))
    assert status != 0
    assert "CMAKE_CUDA_ARCHITECTURES is '90', but gdn2_ext is built for '90a'" in said
    assert "plain sm_90 has no wgmma" in said


@needs_nvcc
@pytest.mark.parametrize(("architecture", "accepted"), [("90", False), ("80", False), ("90a", True)])
def test_device_code_refuses_an_architecture_without_wgmma(tmp_path, architecture, accepted):
    source = tmp_path / "empty.cu"
    source.write_text('#include "tile/arch.cuh"\n__global__ void empty() {}\n')
    command = [NVCC, f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-std=c++17"]
    command += ["-I", ROOT / "csrc", "-cubin", "-o", tmp_path / "empty.cubin", source]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert (done.returncode == 0) == accepted, done.stdout
    assert ("#error" in done.stdout and "90a" in done.stdout) == (not accepted), done.stdout


# ---- nvcc --------------------------------------------------------------------------------------------------


@needs_cmake
@pytest.mark.parametrize("how", ["nothing on PATH", "define", "environment"])
def test_a_missing_nvcc_is_reported_with_the_way_out(tmp_path, how):
    empty, build = tmp_path / "empty", tmp_path / "build"
    empty.mkdir()
    absent = str(tmp_path / "nowhere" / "nvcc")
    if how == "nothing on PATH":
        status, said = configure(build, env=plain_environment(empty))
        absent = "nvcc"
    elif how == "define":
        status, said = configure(build, f"-DCMAKE_CUDA_COMPILER={absent}", env=plain_environment())
    else:
        status, said = configure(build, env=plain_environment(CUDACXX=absent))
    assert status != 0
    assert f"needs nvcc for its kernels, and '{absent}' was not found" in said
    assert "set GDN2_CUDA=OFF to build without kernels" in said


@needs_cmake
@pytest.mark.parametrize("release", ["11.8", "12.3"])
def test_an_old_nvcc_is_reported_with_the_way_out(tmp_path, release):
    nvcc = fake_nvcc(tmp_path, f"Cuda compilation tools, release {release}, V{release}.107")
    status, said = configure(tmp_path / "build", env=plain_environment(tmp_path))
    assert status != 0
    assert f"needs nvcc 12.4 or newer, and {nvcc} is of CUDA {release}." in said
    assert "set GDN2_CUDA=OFF to build without kernels" in said


@needs_cmake
def test_a_program_that_is_no_nvcc_is_reported_with_the_way_out(tmp_path):
    nvcc = fake_nvcc(tmp_path, "no compiler at all")
    status, said = configure(tmp_path / "build", f"-DCMAKE_CUDA_COMPILER={nvcc}", env=plain_environment())
    assert status != 0
    assert f"'{nvcc} --version' names no CUDA release" in said
    assert "set GDN2_CUDA=OFF to build without kernels" in said


@needs_cmake
@needs_nvcc
@needs_headers
def test_missing_cutlass_headers_are_reported(tmp_path):
    status, said = configure(tmp_path / "build", env=plain_environment(GDN2_CUTLASS_DIR=str(tmp_path)))
    assert status != 0
    assert f"No CUTLASS headers (cutlass/version.h) under '{tmp_path}'" in said
    assert "set GDN2_CUTLASS_DIR to a CUTLASS checkout" in said


# ---- without kernels ---------------------------------------------------------------------------------------


@needs_cmake
@pytest.mark.parametrize("how", ["define", "environment"])
def test_configuring_without_kernels_needs_no_compiler(tmp_path, how):
    empty, build = tmp_path / "empty", tmp_path / "build"
    empty.mkdir()
    if how == "define":
        status, said = configure(build, "-DGDN2_CUDA=OFF", env=plain_environment(empty))
    else:
        status, said = configure(build, env=plain_environment(empty, GDN2_CUDA="OFF"))
    assert status == 0, said
    assert "GDN2_CUDA=OFF: no kernels, the torch backend only" in said
    assert "CMAKE_CUDA_COMPILER" not in (build / "CMakeCache.txt").read_text()


@needs_backend
@pytest.mark.parametrize("value", ["OFF", "off", "0", "False"])
def test_a_wheel_without_kernels_is_pure_python(tmp_path, value):
    names, metadata = build_wheel(tmp_path, env=plain_environment(tmp_path, GDN2_CUDA=value))
    assert [path.name for path in tmp_path.glob("*.whl")] == [
        f"gdn2_ext-{gdn2_ext.__version__}-py3-none-any.whl"
    ]
    assert "gdn2_ext/__init__.py" in names
    assert {name.split("/")[0] for name in names} == {
        "gdn2_ext",
        f"gdn2_ext-{gdn2_ext.__version__}.dist-info",
    }
    assert not [name for name in names if name.endswith((".so", ".cu", ".cuh", ".cpp", ".h"))]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == {
        *("reference", "reference-cuda13", "models", "train", "bench", "test", "dev"),
    }


def build_wheel(folder: Path, env: dict[str, str]) -> tuple[list[str], email.message.Message]:
    """Calls the build backend as pip does. Returns the names in the wheel, and its metadata."""
    code = "import sys; from scikit_build_core.build import build_wheel; build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", code, folder]
    done = subprocess.run(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        return names, email.message_from_bytes(wheel.read(metadata))


@needs_backend
def test_the_source_distribution_holds_what_a_build_and_its_tests_need(tmp_path):
    code = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, env=plain_environment(), check=True)
    with tarfile.open(tmp_path / f"gdn2_ext-{gdn2_ext.__version__}.tar.gz") as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for folder in ("csrc", "gdn2_ext", "python_tests"):
        files = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*.*") if p.is_file()}
        assert {name for name in files if "__pycache__" not in name} <= names
    assert {
        "pyproject.toml",
        "CMakeLists.txt",
        "Makefile",
        "constraints.txt",
        "LICENSE",
        "README.md",
    } <= names
    assert not [name for name in names if name.split("/")[0] in {".venv", ".git", "build", "dist"}]


# ---- what is generated -------------------------------------------------------------------------------------


@needs_cmake
@needs_nvcc
@needs_headers
def test_every_instantiation_of_the_tile_product_uses_wgmma_and_bulk_tensor_copies(tmp_path):
    cutlass = [f"-DGDN2_CUTLASS_DIR={CUTLASS}"] if CUTLASS.exists() else []
    status, said = configure(tmp_path, *cutlass, env=plain_environment())
    assert status == 0, said
    subprocess.run([CMAKE, "--build", tmp_path, "--target", "ptx"], check=True, stdout=subprocess.DEVNULL)
    ptx = next(tmp_path.rglob("tile_product.ptx")).read_text()
    assert re.search(r"^\.target sm_90a$", ptx, re.MULTILINE)
    kernels = ptx.split(".entry ")[1:]
    assert len(kernels) == 2, "B K-major and B MN-major"
    transposes_b = set()
    for kernel in kernels:
        assert re.search(r"\bcp\.async\.bulk\.tensor\.2d\.shared::cluster\.global\S*mbarrier", kernel)
        assert "mbarrier.try_wait" in kernel
        products = re.findall(
            r"\bwgmma\.mma_async\.sync\.aligned\.m64n128k16\.f32\.bf16\.bf16\b[^;]*;", kernel
        )
        assert len(products) >= 4, "a stage is 64 deep, and one product 16"
        # A in registers: the last immediate says whether B is transposed.
        transposes_b.add(tuple({re.search(r"(\S+)\s*;$", product)[1] for product in products}))
    assert len(transposes_b) == 2, transposes_b


# ---- what is installed -------------------------------------------------------------------------------------


def test_the_package_has_one_version():
    assert gdn2_ext.__version__ == importlib.metadata.version("gdn2_ext")


@needs_kernels
def test_the_extension_says_what_it_was_built_for():
    from gdn2_ext import _C

    assert _C.arch == "sm_90a"
    assert _C.cuda_runtime_version >= 12040
    assert re.fullmatch(r"\d+\.\d+\.\d+", _C.cutlass_version)


@needs_kernels
def test_the_extension_loads_without_torch_driver_or_cuda_libraries():
    code = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.arch == "sm_90a" and "torch" not in sys.modules
print(open("/proc/self/maps").read())
"""
    file = importlib.util.find_spec("gdn2_ext._C").origin
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, file], env={}, check=True, text=True, stdout=subprocess.PIPE
    )
    libraries = {Path(name).name for name in re.findall(r"\S+\.so\S*", done.stdout)}
    assert Path(file).name in libraries
    assert not [name for name in libraries if re.match(r"lib(cuda|cudart|torch|c10|nv)", name)]


@needs_kernels
@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm (binutils)")
def test_the_static_cuda_runtime_is_not_exported():
    file = importlib.util.find_spec("gdn2_ext._C").origin
    done = subprocess.run(["nm", "-D", "--defined-only", file], check=True, text=True, stdout=subprocess.PIPE)
    exported = {line.split()[-1] for line in done.stdout.splitlines()}
    assert "PyInit__C" in exported
    assert not [name for name in exported if name.startswith(("cuda", "__cuda", "cu")) or "gdn2" in name]


@needs_kernels
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": 65}, "rows must be a positive multiple of 64, got 65"),
        ({"rows": 0}, "rows must be a positive multiple of 64, got 0"),
        ({"depth": -64}, "depth must be a positive multiple of 64, got -64"),
        ({"a": 0}, "a must be a non-null address aligned to 16 bytes, got 0"),
        ({"b": 40}, "b must be a non-null address aligned to 16 bytes, got 40"),
        ({"c": 8}, "c must be a non-null address aligned to 16 bytes, got 8"),
    ],
)
def test_a_bad_argument_is_named_before_any_launch(changed, message):
    from gdn2_ext import _C

    arguments = {"a": 256, "b": 256, "c": 256, "rows": 64, "depth": 64, "b_is_mn_major": False, "stream": 0}
    with pytest.raises(ValueError, match=re.escape(f"tile_product: {message}")):
        _C.tile_product(**arguments | changed)


@needs_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the launch would go through")
def test_a_launch_that_fails_names_the_cuda_error():
    from gdn2_ext import _C

    with pytest.raises(RuntimeError, match=r"cudaError(InsufficientDriver|NoDevice)"):
        _C.tile_product(a=256, b=256, c=256, rows=64, depth=64, b_is_mn_major=False, stream=0)


# ---- tools -------------------------------------------------------------------------------------------------


def test_pre_commit_and_make_lint_run_the_same_versions():
    pins = dict(
        re.findall(r"^(ruff|clang-format)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    )
    hooks = re.findall(r"\[(ruff|clang-format)==([^\]]+)\]", (ROOT / ".pre-commit-config.yaml").read_text())
    assert {name for name, _ in hooks} == {"ruff", "clang-format"}
    assert all(pins[name] == version for name, version in hooks)
