import subprocess
import sys

import pytest


@pytest.mark.parametrize("missing", ["uvicorn", "httptools", "psutil"])
def test_without_the_extra_it_is_named(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from codomyrmex.events.streaming import MissingExtra\n"
        "try: import codomyrmex.events.streaming.server\n"
        "except MissingExtra as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.stdout == (
        "codomyrmex.events.streaming.server needs the extra 'server': "
        "pip install 'codomyrmex-streaming[server]'\n"
    )
