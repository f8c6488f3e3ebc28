"""Every example in the documentation runs, and prints what the documentation says it prints."""

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# A block of Python, and the block of text that follows it at once, if there is one.
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.M | re.S)


def examples() -> Iterator[ParameterSet]:
    for page in PAGES:
        for number, match in enumerate(EXAMPLE.finditer(page.read_text()), 1):
            code, output = match.groups()
            name = f"{page.relative_to(ROOT)}-{number}"
            yield pytest.param(code, output, id=name)


@pytest.mark.parametrize(("code", "output"), list(examples()))
def test_example_prints_what_is_said(code: str, output: str | None) -> None:
    finished = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    # A stream may log that it lost something; nothing may warn, leak or be left unawaited.
    assert not re.search("Traceback|Warning|Error|never", finished.stderr), finished.stderr
    assert finished.stdout == (output or "")


@pytest.mark.timeout(120)
def test_the_answer_is_whole_though_the_server_was_killed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    finished = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "resumable_answer.py"), "--port", str(port)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "The reader has the whole text." in finished.stdout
    assert "'state': 'interrupted'" in finished.stdout


def test_there_are_examples() -> None:
    assert len(list(examples())) >= 8


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
