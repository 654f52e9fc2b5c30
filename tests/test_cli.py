"""data/cli.py: errors as one line, exit codes."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.cli import UserError, run_cli

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UserError("bad thing"), 2, "x.py: bad thing\n"),
        (FileNotFoundError(2, "No such file", "a.txt"), 2, "x.py: a.txt: No such file\n"),
        (OSError(28, "No space left on device"), 2, "x.py: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "\nx.py: interrupted\n"),
        (None, 0, ""),
    ],
)
def test_run_cli_turns_errors_into_exit_codes(error, code, line, monkeypatch, capsys):
    def main():
        if error:
            raise error

    monkeypatch.setattr(sys, "argv", ["/somewhere/x.py"])
    with pytest.raises(SystemExit) as e:
        run_cli(main)
    assert e.value.code == code
    assert capsys.readouterr().err == line


def test_run_cli_does_not_hide_a_bug():
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda: 1 / 0)
