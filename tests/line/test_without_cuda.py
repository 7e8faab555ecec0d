"""What a user without CUDA gets: one line with the remedy, and exit code 1."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
from click.testing import CliRunner

from pwopt.cli import main
from tests.runtime.fake_runtime import fake_runtime
from tests.runtime.textual import RELU, write

without_cuda = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(),
    reason="this machine has a CUDA provider",
)


@without_cuda
@pytest.mark.parametrize("command", ["optimize", "bench"])
def test_the_cpu_package_is_told_apart(tmp_path: Path, command: str) -> None:
    path = write(tmp_path, RELU)
    done = subprocess.run(
        [sys.executable, "-m", "pwopt", command, str(path), "--provider", "cuda"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "pwopt: CUDAExecutionProvider is not available (available: CPU). Install pwopt[gpu], or"
        " pass --provider cpu.\n"
    )
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_driver_is_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    fake_runtime(monkeypatch, both, ["CPUExecutionProvider"])

    def load(name: str, mode: int = 0) -> object:
        if "cuda" in name:
            raise OSError("libcuda.so.1: cannot open shared object file: No such file or directory")
        return object()

    monkeypatch.setattr(ctypes, "CDLL", load)
    done = CliRunner().invoke(main, ["bench", str(write(tmp_path, RELU)), "--provider", "cuda"])
    assert done.exit_code == 1
    assert done.stderr == (
        "pwopt: CUDAExecutionProvider is installed, but did not start: libcuda.so.1: cannot open"
        " shared object file: No such file or directory. There is no NVIDIA driver: install it, in"
        " a container pass the GPU on (--gpus all), or pass --provider cpu.\n"
    )


def test_a_misspelt_option_is_told_apart(tmp_path: Path) -> None:
    arguments = ["bench", str(write(tmp_path, RELU)), "--provider", "cuda"]
    done = CliRunner().invoke(main, [*arguments, "--provider-option", "prefer_nwhc=1"])
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1
    assert "did you mean prefer_nhwc" in done.stderr
