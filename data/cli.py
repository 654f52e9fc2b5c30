"""What every script's command line does: errors as one line, Ctrl-C, flags.

A user's mistake is a `UserError`: `run_cli` prints its one line and ends with exit code 2.
"""
import argparse
import contextlib
import difflib
import math
import os
import re
import signal
import sys
import time
from pathlib import Path


class UserError(ValueError):
    """A user's mistake: one line that names the thing, the value and the remedy."""


def run_cli(main):
    """Run a script's `main` as a program: a UserError or an OSError becomes one line on stderr and
    exit code 2, Ctrl-C exit code 130."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # printing never fails, whatever the encoding
    if hasattr(sys.stdin, "reconfigure"):  # there may be no stdin, or a stand-in
        sys.stdin.reconfigure(encoding="utf-8")
    script, code = Path(sys.argv[0]).name, 2
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the scripts' imports do without
    try:
        code = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:  # closed by `| head`; keep the interpreter from flushing again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (UserError, OSError) as e:
        name = getattr(e, "filename", None)
        print(f"{script}: {f'{name}: {e.strerror}' if name else e}", file=sys.stderr)
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        advice = "use smaller batches (a larger --grad_accum), --grad_checkpoint or a smaller model"
        print(f"{script}: out of memory: {advice}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted", file=sys.stderr)
        code = 130
    raise SystemExit(code)


def is_out_of_memory(error):
    """Whether torch had too little memory: on a CPU it raises a mere RuntimeError."""
    return any(words in str(error) for words in ("allocate memory", "out of memory"))


# What other projects (nanoGPT, transformers, OpenAI) call our flags.
ALIASES = {
    "max_tokens": "max_new_tokens", "learning_rate": "lr", "n_embd": "d_model", "out_dir": "out",
    "max_iters": "max_steps", "block_size": "context", "eval_interval": "eval_every",
    "log_interval": "log_every", "warmup_iters": "warmup_steps",
    "gradient_accumulation_steps": "grad_accum",
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose flags may be written with dashes or named as in ALIASES, but not
    abbreviated, and whose errors are one line."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def our_name(self, word):
        """`word`, where a flag is replaced by this parser's name for it, if it has one."""
        flag, equals, value = word.partition("=")
        ours = {option[2:].replace("-", "_"): option for option in self._option_string_actions}
        name = flag[2:].replace("-", "_")
        if flag.startswith("--"):
            flag = ours.get(name) or ours.get(ALIASES.get(name), flag)
        return flag + equals + value

    def parse_known_args(self, args=None, namespace=None):
        """argparse's, after the flags are replaced by this parser's names."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self.our_name(word) for word in words], namespace)

    def error(self, message):
        """Print one line, with the flag closest to an unknown one, and exit with code 2."""
        if unknown := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            names = [*self._option_string_actions, *(f"--{alias}" for alias in ALIASES)]
            names = [n for n in names if self.our_name(n) in self._option_string_actions]
            near = difflib.get_close_matches(unknown[1], names, 1)
            message = f"unknown argument {unknown[1]}"
            message += f": did you mean {self.our_name(near[0])}?" if near else " (see --help)"
        message = re.sub(r"^argument (\S+): (\S+ must be)", r"\1 \2", message)
        self.exit(2, f"{self.prog}: {message}\n")


def number(kind, wanted, accepts):
    """An argparse type: a number of class `kind` for which `accepts` is true; the error says that
    the flag must be what `wanted` describes."""

    def parse(text):
        value = kind(text)
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"{text} must be {wanted}")
        return value

    parse.__name__ = kind.__name__  # argparse's own error names it: invalid int value
    return parse


def at_least(low, kind=int):
    """An argparse type: a finite number not below `low`."""
    return number(kind, f"at least {low}", lambda v: low <= v <= 2**62)


def between(low, high, kind=float):
    """An argparse type: a number from `low` to `high`, both included."""
    return number(kind, f"from {low} to {high}", lambda v: low <= v <= high)


positive = number(float, "above 0 and finite", lambda v: 0 < v < math.inf)
share = between(0, 1)


class StopSignal:
    """Ctrl-C and SIGTERM, remembered until the step is done; a second one stops at once."""

    def __enter__(self):
        self.number, self.old = 0, {}
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for s in (signal.SIGINT, signal.SIGTERM):
                self.old[s] = signal.signal(s, self.handle)
        return self

    def handle(self, number, frame):
        """Remember the signal, and give the next one its usual effect."""
        self.number = number
        self.__exit__()

    def __exit__(self, *_):
        for s, handler in self.old.items():
            signal.signal(s, handler)


def printable(text):
    """`text` with control characters other than tab and newline as \\x1b: printed as they are they
    could clear the terminal, or worse."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text)


class Progress:
    """A line on a terminal that rewrites itself, at most twice a second; nothing elsewhere."""

    def __init__(self):
        self.shown = time.monotonic()

    def __call__(self, text):
        if sys.stderr.isatty() and time.monotonic() - self.shown > 0.5:
            self.shown = time.monotonic()
            print(f"\r\033[K{text} ", end="", flush=True, file=sys.stderr)

    def clear(self):
        """Empty the line."""
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)


def watched(items, name):
    """Yield the items, and count them on a line of the terminal that begins with `name`, with how
    many there are if that is known."""
    progress = Progress()
    total = f" of {len(items):,}" if hasattr(items, "__len__") else ""
    for count, item in enumerate(items, start=1):
        progress(f"{name} {count:,}{total}")
        yield item
    progress.clear()
