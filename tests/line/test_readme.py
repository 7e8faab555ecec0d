"""The README runs as it stands, commands and code; .ci/run runs its setup commands too."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

import pwopt
from pwopt import models
from pwopt.cli import main

README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    onnx.save(models.build("nin_cifar10"), str(tmp_path / "model.onnx"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_five_commands_run(folder: Path) -> None:
    lines = [line for line in blocks("sh")[2].splitlines() if line]
    assert len(lines) == 5
    for line in lines:
        words = shlex.split(line, comments=True)
        assert words[0] == "pwopt"
        result = CliRunner().invoke(main, words[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}"
    assert (folder / "model.opt.onnx").exists()
    assert (folder / "report.json").exists()


def test_the_python_lines_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(blocks("python")[0], "README.md", "exec"), {})
    assert "LatencyFigures" in capsys.readouterr().out or (folder / "model.opt.onnx").exists()


def test_every_public_name_exists_and_is_documented() -> None:
    for name in pwopt.__all__:
        assert getattr(pwopt, name).__doc__, name


def test_links_lead_to_files() -> None:
    root = Path(__file__).parents[2]
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (root / target).exists(), target
