"""Folders of runs under out/: the newest, a new one, its lock, metrics.jsonl and loss.svg."""
import contextlib
import itertools
import json
import sys
import time
from pathlib import Path

from data.cli import UserError, quoted
from data.files import read_json, try_lock, write_json, write_whole
from data.plot import line_svg

OUT = Path("out")


def newest_run():
    """The folder under out/ whose checkpoint was written last; UserError if there is none."""
    paths = [p for name in ("last.pt", "best.pt") for p in OUT.glob(f"*/{name}")]
    if not paths:
        raise UserError(f"no run in {OUT}/: train one (python train.py), or name it with --ckpt")
    return max(paths, key=lambda p: p.stat().st_mtime).parent


def run_settings(path):
    """The settings of the run whose folder or checkpoint is `path`; {} if it is not a run's."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    with contextlib.suppress(OSError, ValueError):
        return read_json(folder / "settings.json")
    return {}


def new_run(name):
    """out/NAME, or out/NAME-2, -3 ..., created at once so that no run writes into another's."""
    for n in itertools.count(1):
        out = OUT / (name if n == 1 else f"{name}-{n}")
        with contextlib.suppress(FileExistsError):
            out.mkdir(parents=True)
            return out


def run_folder(out, name, runtime):
    """The folder of a new run: `out`, or a new one called `name`. UserError if it holds a run."""
    if out is None:  # rank 0 decides and tells the others
        return runtime.of_first(new_run(name) if runtime.rank == 0 else None)
    if Path(out).is_file():
        raise UserError(f"--out {out} is not a folder: name one that does not exist")
    if any(Path(out).glob("*.pt")):
        remedy = f"--resume {quoted(out)}, delete the folder, or name another --out"
        raise UserError(f"{out} holds a run already: {remedy}")
    return Path(out)


def lock_folder(folder):
    """Lock a run's folder until the returned file is closed or the process ends."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = open(Path(folder, ".lock"), "ab")  # noqa: SIM115 (open as long as the run)
    # `is_locked` may hold the lock for a moment
    if not any(try_lock(file) or time.sleep(0.1) for _ in range(5)):
        raise UserError(f"{folder} is being written by another process: wait for its end")
    return file


def is_locked(folder):
    """Whether a process has locked a run's folder."""
    with contextlib.suppress(FileNotFoundError), open(Path(folder, ".lock"), "rb+") as file:
        return not try_lock(file, shared=True)
    return False


def json_lines(text):
    """The objects in JSON lines. NaN and infinity become None; a line cut by a crash is skipped."""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line, parse_constant=lambda name: None)
            if isinstance(row, dict):
                yield row


def run_list():
    """[{"name", "step", "bytes", "age", "live"}] of the runs under out/, the newest first: bytes of
    metrics.jsonl, seconds since it grew, whether a process writes it."""
    runs = []
    for path in OUT.glob("*/metrics.jsonl"):
        with contextlib.suppress(OSError), open(path, "rb") as f:
            stat = path.stat()
            f.seek(max(0, stat.st_size - 4096))
            rows = json_lines(f.read().decode("utf-8", "replace"))
            step = max((row.get("step", 0) for row in rows), default=0)
            run = dict(name=path.parent.name, step=step, bytes=stat.st_size)
            runs.append(run | dict(age=time.time() - stat.st_mtime, live=is_locked(path.parent)))
    return sorted(runs, key=lambda run: run["age"])


def read_run(name, most=600):
    """{"name", "settings", "rows"} of a run, with fewer than twice `most` of its training steps."""
    text = (OUT / name / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    rows = list(json_lines(text))
    steps = [r for r in rows if "loss" in r]
    every = max(1, len(steps) // most)
    kept = {id(r) for r in steps[every - 1 :: every] + steps[-1:]}
    rows = [r for r in rows if "loss" not in r or id(r) in kept]
    return {"name": name, "settings": run_settings(OUT / name), "rows": rows}


class Log:
    """Writes metrics.jsonl (dropping rows after `resume_step`), loss.svg and the screen's lines."""

    def __init__(self, out, resume_step=0, quiet=False):
        self.out, self.quiet, self.open_line, self.rows = out, quiet, False, []
        if quiet:
            return
        self.lock, path = lock_folder(out), out / "metrics.jsonl"
        if resume_step and path.exists():
            rows = json_lines(path.read_text(encoding="utf-8"))
            self.rows = [r for r in rows if r["step"] <= resume_step]
        text = "".join(json.dumps(r) + "\n" for r in self.rows)
        write_whole(path, lambda f: f.write(text.encode()))
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open to the end)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.open_line:
            print()  # whatever comes next, perhaps an error, begins a line of its own
        self.open_line = False
        if not self.quiet:
            self.lock.close()

    def settings(self, args, shape, **more):
        """Write settings.json: the run's settings, and the model's shape where they are None."""
        if not self.quiet:
            given = {k: v for k, v in args.items() if v is not None}
            write_json(self.out / "settings.json", args | shape | given | more)

    def write(self, **row):
        """Write one row of metrics, flushed at once."""
        self.rows.append(row)
        if not self.quiet:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def line(self, text, rewrite=False):
        """Print a line; with `rewrite` the next one replaces it on a terminal."""
        if not self.quiet:
            start = "\r\033[K" if self.open_line else ""
            self.open_line = rewrite and sys.stdout.isatty()
            print(start + text, end="" if self.open_line else "\n", flush=True)

    def live(self, text):
        """On a terminal only: print a line that the next one replaces."""
        if sys.stdout.isatty():
            self.line(text, rewrite=True)

    def evaluation(self, row, train_loss=None, better=False):
        """Write and print a row about an evaluation."""
        self.write(**row)
        self.line(eval_line(row, train_loss) + ("  best" if better else ""))

    def draw(self, curves, y_label):
        """Write loss.svg, whose `curves` are (name, key of the rows)."""
        rows = [r for r in self.rows if not r.get("final")]
        points = {name: [(r["step"], r[key]) for r in rows if key in r] for name, key in curves}
        if not self.quiet:
            svg = line_svg(self.out.name, points, "steps", y_label)
            (self.out / "loss.svg").write_text(svg, encoding="utf-8")


def clock(seconds):
    """3723 -> 1:02:03, 62 -> 1:02."""
    m, s = divmod(int(seconds), 60)
    return f"{m // 60}:{m % 60:02d}:{s:02d}" if m >= 60 else f"{m}:{s:02d}"


def step_line(row, metrics, args, done):
    """One line about a training step; `done` is the fraction of the run that is over."""
    total = f"/{args.max_steps}" if args.max_steps else ""
    others = (f"  {k.replace('_', ' ')} {v:.3g}" for k, v in metrics.items() if k != "experts")
    why = " (the machine was busier when its peak was measured)" if row["mfu"] > 1 else ""
    return (
        f"step {row['step']}{total}  loss {row['loss']:.3f}  lr {row['lr']:.2e}  "
        f"norm {row['grad_norm']:.2f}  {row['tok_s']:,} tok/s  mfu {row['mfu']:.0%}{why}  "
        f"eta {clock(row['seconds'] * max(0, 1 / done - 1))}{''.join(others)}"
    )


EVAL_FORMATS = {
    "step": "step {}", "train_loss": "train loss {:.4f}", "val_loss": "val loss {:.4f}",
    "val_ppl": "ppl {:,.2f}", "val_bpb": "bits/byte {:.4f}", "val_share": "({:.0%} of val)",
    "overlap_bpb": "overlapping windows {:.4f}", "overlap_share": "({:.0%} of val)",
}  # fmt: skip


def eval_line(row, train_loss=None):
    """One line about an evaluation, {name: number or None}, and the training loss beside it."""
    row = {"step": row.get("step"), "train_loss": train_loss} | row
    other = {n: n.removeprefix("val_").replace("_", " ") + " {:.4g}" for n in row}
    formats = other | EVAL_FORMATS
    return "  ".join(formats[n].format(v) for n, v in row.items() if v is not None)
