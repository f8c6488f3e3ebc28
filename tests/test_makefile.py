"""What `make` tells a newcomer whose Python lacks something."""

import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parent.parent / "Makefile"


def make(directory: Path, python: str) -> str:
    """What a `make run` that fails with this program for a Python says."""
    shutil.copy(MAKEFILE, directory)
    fake = directory / "fake-python"
    fake.write_text(f"#!/bin/sh\n{python}\n")
    fake.chmod(0o755)
    command = ["make", "run", f"PYTHON={fake}"]
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 2
    return done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on the path")
def test_half_an_environment_is_not_kept(tmp_path: Path) -> None:
    # As Debian's python3 does without the package python3-venv.
    half = (
        '[ "$1" = -c ] && exit 0\nmkdir -p .venv/bin; touch .venv/bin/python\n'
        "echo ensurepip is not available; exit 1"
    )
    for _ in range(2):
        assert "ensurepip is not available" in make(tmp_path, half)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on the path")
def test_an_old_python_is_told_as_such(tmp_path: Path) -> None:
    assert "needs Python 3.11 or newer" in make(tmp_path, "exit 1")
