"""data/cli.py: errors as one line, exit codes."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.cli import Parser, UserError, at_least, between, positive, run_cli

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


@pytest.mark.parametrize(
    "kind, text, line",
    [
        (at_least(1), "0", "--n 0 must be at least 1"),
        (at_least(0, float), "inf", "--n inf must be at least 0"),
        (positive, "nan", "--n nan must be above 0 and finite"),
        (between(0, 1), "1.5", "--n 1.5 must be from 0 to 1"),
        (at_least(1), "x", "argument --n: invalid int value: 'x'"),
    ],
)
def test_a_number_outside_of_its_limits_is_one_line(kind, text, line, capsys):
    parser = Parser(prog="x.py")
    parser.add_argument("--n", type=kind)
    assert parser.parse_args(["--n", "1"]).n == 1
    with pytest.raises(SystemExit):
        parser.parse_args(["--n", text])
    assert capsys.readouterr().err == f"x.py: {line}\n"
