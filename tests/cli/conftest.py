"""What the tests of the commands share: a way to run one."""

import sys
from typing import Any

import pytest

from cli.extract import extract
from cli.main import wsi
from cli.run import _run
from tests.threads import one_thread

__all__ = ["command", "one_thread"]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run ``wsi …`` or ``wsi-extract …`` in this process; returns exit code, stdout and stderr."""

    def call(name: Any, *words: Any) -> Any:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        code = _run({"wsi": wsi, "wsi-extract": extract}[name], name)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call
