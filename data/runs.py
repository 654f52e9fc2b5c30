"""Folders of runs under out/: which is the newest, a new one, its lock, its metrics.jsonl."""
import contextlib
import itertools
import json
import os
import sys
import time
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


def is_locked(folder):
    """Whether a process has the lock of a run's folder; False where there are no such locks."""
    with contextlib.suppress(ImportError, FileNotFoundError):
        import fcntl

        with open(Path(folder, ".lock"), "rb") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
    return False


def run_list():
    """[{"name", "step", "bytes", "age", "live"}] of the runs under out/, the newest first: how long
    metrics.jsonl is, how many seconds ago it grew, whether a process writes it."""
    found = []
    for path in OUT.glob("*/metrics.jsonl"):
        with contextlib.suppress(OSError):
            stat = path.stat()
            about = {"name": path.parent.name, "bytes": stat.st_size}
            about |= {"step": max((r.get("step", 0) for r in tail(path)), default=0)}
            about |= {"age": time.time() - stat.st_mtime, "live": is_locked(path.parent)}
            found.append(about)
    return sorted(found, key=lambda run: run["age"])


def tail(path, size=4096):
    """The rows in the last `size` bytes of a file of JSON lines."""
    with open(path, "rb") as f:
        f.seek(max(0, path.stat().st_size - size))
        return list(json_lines(f.read().decode("utf-8", "replace")))


def json_lines(text):
    """The objects in JSON lines; not a number is None, and lines that are cut are left out."""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line, parse_constant=lambda name: None)
            if isinstance(row, dict):
                yield row


def read_run(name, most=600):
    """{"name", "settings", "rows"} of a run: its metrics, of which about `most` are kept."""
    folder, settings = OUT / name, {}
    with contextlib.suppress(OSError, ValueError):
        text = (folder / "settings.json").read_text(encoding="utf-8")
        settings = json.loads(text, parse_constant=lambda name: None)
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    rows = list(json_lines(text))
    steps = [r for r in rows if "loss" in r]
    every = max(1, len(steps) // most)
    kept = {id(r) for r in steps[-1 % every :: every]} | {id(r) for r in steps[-1:]}
    rows = [r for r in rows if "loss" not in r or id(r) in kept]
    return {"name": name, "settings": settings, "rows": rows}


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


def clock(seconds):
    """3723 -> 1:02:03, 62 -> 1:02."""
    m, s = divmod(int(seconds), 60)
    return f"{m // 60}:{m % 60:02d}:{s:02d}" if m >= 60 else f"{m}:{s:02d}"


def eval_line(row):
    """One line about an evaluation row."""
    text = f"step {row['step']}  val loss {row['val_loss']:.4f}"
    if row.get("val_ppl"):
        text += f"  ppl {row['val_ppl']:,.2f}"
    if row.get("val_bpb"):
        text += f"  bits/byte {row['val_bpb']:.4f}"
    if row.get("val_share"):
        text += f"  ({row['val_share']:.0%} of val)"
    known = {"step", "final", "val_loss", "val_ppl", "val_bpb", "val_share"}
    for name, value in row.items():  # whatever else a task measures
        if name not in known:
            text += f"  {name.removeprefix('val_').replace('_', ' ')} {value:.4g}"
    return text


def resumed_settings(args, given, fixed, load):
    """(settings, content of last.pt, read by load(path, resuming=True)) of the run that --resume
    means: its own settings, changed by what was `given` now, as long as that is not among the
    `fixed` ones."""
    run = Path(args.resume) if args.resume else newest_run()
    path = run / "last.pt" if run.is_dir() else run
    if run.is_dir() and not path.exists():
        instead = f"--ckpt {run} starts from its weights" if any(run.glob("*.pt")) else "start anew"
        raise UserError(f"{run} has no last.pt to resume: {instead}")
    content = load(path, resuming=True)
    if "args" not in content:
        raise UserError(f"{path} is for sampling only: resume a last.pt, or --ckpt {path}")
    if ("objective" in content["args"]) != ("objective" in vars(args)):
        script = "finetune.py" if "objective" in content["args"] else "train.py"
        raise UserError(f"{path} was written by {script}: resume it with that, or name another run")
    if "out" in given:
        raise UserError(f"--out cannot be given with --resume, which goes on in {path.parent}")
    inherited = {k: v for k, v in content["args"].items() if v is not None}
    inherited["autocast"] = inherited.pop("plain", inherited.get("autocast"))  # its old name
    if changed := [k for k in given if k in fixed and given[k] != inherited.get(k)]:
        raise UserError(f"--{changed[0]} cannot change when resuming {path}")
    limits = dict.fromkeys(("max_steps", "max_tokens", "max_minutes", "epochs"))
    if set(limits) & set(given):  # a new limit replaces the old ones
        inherited |= limits
    settings = inherited | given | {"out": str(path.parent)}
    new = " and ".join(f"{k} {v}" for k, v in given.items() if k != "resume")
    but = f", but {new}" if new else ""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"resuming {path} at step {content['step']}; settings are the run's own{but}")
    if "dtype" in given:
        content.pop("device", None)  # whose dtype it would keep
    return settings, content
