"""Folders of runs under out/: which is the newest, a new one, its lock, its metrics.jsonl."""
import contextlib
import itertools
import json
import os
import sys
from pathlib import Path

from data.cli import UserError

OUT = Path("out")  # runs


def newest_run():
    """The folder under out/ whose checkpoint was written last; UserError if there is none."""
    found = [p for name in ("last.pt", "best.pt") for p in OUT.glob(f"*/{name}")]
    if not found:
        raise UserError(f"no run in {OUT}/: train one (python train.py), or name it with --ckpt")
    return max(found, key=lambda p: p.stat().st_mtime).parent


def new_run(name):
    """out/NAME, or out/NAME-2, -3 ..., made here and now: no run ever writes into another's."""
    for n in itertools.count(1):
        out = OUT / (name if n == 1 else f"{name}-{n}")
        with contextlib.suppress(FileExistsError):
            out.mkdir(parents=True)
            return out


def run_folder(args, content, name, runtime):
    """The folder that the run writes to, --out or a new one called `name`; kept in args.out."""
    if args.out and Path(args.out).is_file():
        raise UserError(f"--out {args.out} is a file: name a folder")
    if args.out and content is None and any(Path(args.out).glob("*.pt")):
        raise UserError(f"{args.out} holds a run already: --resume {args.out}, or another --out")
    if args.out is None:  # the other processes write nothing
        args.out = str(new_run(name) if runtime.rank == 0 else OUT / name)
    return Path(args.out)


def lock_folder(folder):
    """Lock a run's folder for this process, until the returned file is closed or the process ends;
    UserError if another process has it. Windows has no such lock."""
    try:
        import fcntl
    except ImportError:
        return open(os.devnull, "rb")
    file = open(Path(folder, ".lock"), "wb")  # noqa: SIM115 (open as long as the run)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        file.close()
        raise UserError(f"{folder} is being written by another process: wait for its end") from e
    return file


class Log:
    """metrics.jsonl, and lines on the screen. `resume_step` drops what was logged after it."""

    def __init__(self, out, resume_step=0, quiet=False):
        self.path, self.quiet, self.open_line = out / "metrics.jsonl", quiet, False
        self.rows = []
        if quiet:
            return
        out.mkdir(parents=True, exist_ok=True)
        self.lock = lock_folder(out)
        if resume_step and self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # a line that a crash cut short
                    self.rows.append(json.loads(line))
            self.rows = [r for r in self.rows if r["step"] <= resume_step]
        fresh = self.path.with_suffix(".tmp")
        text = "".join(json.dumps(r) + "\n" for r in self.rows)
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, self.path)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open to the end)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.open_line:
            print()  # whatever comes next, an error perhaps, begins a line of its own
        self.open_line = False
        if not self.quiet:
            self.lock.close()

    def write(self, **row):
        """One row of metrics, on disk at once."""
        self.rows.append(row)
        if not self.quiet:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def line(self, text, rewrite=False):
        """Print a line; one that may be rewritten stays open on a terminal."""
        if self.quiet:
            return
        start = "\r\033[K" if self.open_line else ""
        self.open_line = rewrite and sys.stdout.isatty()
        print(start + text, end="" if self.open_line else "\n", flush=True)
