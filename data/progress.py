"""What a script is busy with: one line of the terminal that rewrites itself."""

import contextlib
import os
import shutil
import sys
import threading
import time


class Progress:
    """A line on a terminal that rewrites itself, at most twice a second; nothing elsewhere."""

    def __init__(self):
        self.live = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
        self.start = self.shown = time.monotonic()

    def __call__(self, text, done=0):
        """Show a text and, if the fraction that is `done` is given, how long the rest takes."""
        now = time.monotonic()
        if self.live and now - self.shown > 0.5:
            self.shown = now
            left = f", {(now - self.start) * (1 / done - 1):.0f} s left" if done else ""
            width = shutil.get_terminal_size().columns - len(left) - 1
            print(f"\r\033[K{text[:width]}{left} ", end="", flush=True, file=sys.stderr)

    def clear(self):
        """Empty the line."""
        if self.live:
            print("\r\033[K", end="", flush=True, file=sys.stderr)


def watched(items, name):
    """Yield the items, and count them on a line of the terminal that begins with `name`, with how
    many there are if that is known."""
    progress, total = Progress(), len(items) if hasattr(items, "__len__") else 0
    of = f" of {total:,}" if total else ""
    try:
        for count, item in enumerate(items, start=1):
            progress(f"{name} {count:,}{of}", (count - 1) / total if total else 0)
            yield item
    finally:
        progress.clear()


@contextlib.contextmanager
def waiting(name):
    """Count the seconds of the `with` block on a line of the terminal that begins with `name`."""
    progress, over = Progress(), threading.Event()

    def show():
        while not over.wait(0.5):
            progress(f"{name}: {time.monotonic() - progress.start:.0f} s")

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        progress.clear()
