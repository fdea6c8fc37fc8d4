"""Commands run in the test's own process."""

from pathlib import Path

import pytest

from cli.main import execute


def llmq(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    code = execute([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def made(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Path:
    """The file that llmq quantize names."""
    code, out, err = llmq(capsys, "quantize", *arguments)
    assert code == 0, err
    return Path(out.rstrip("\n"))
