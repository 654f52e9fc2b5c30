"""What a script is busy with: one line of the terminal that rewrites itself."""
import contextlib
import shutil
import sys
import threading
import time

from data.cli import first_process

RUNNING = []  # the blocks of `shown`: the innermost one has the line


@contextlib.contextmanager
def shown(name, count, total=None):
    """While the block runs, show `name`, count() and, if there is a `total`, it and the time left
    on a line of the terminal, twice a second. Files and ranks other than 0 get nothing."""
    if not sys.stderr.isatty() or not first_process():
        yield
        return
    over, start = threading.Event(), time.monotonic()

    def show():
        line = ""
        while not over.wait(0.5):
            if RUNNING[-1] is over:
                done = count()
                line = f"{name} {done:,}" + (f" of {total:,}" if total else "")
                if total and done:
                    left = (time.monotonic() - start) * (total / done - 1)
                    line += f", {max(0, left):.0f} s left"
                line = line[: shutil.get_terminal_size().columns - 1]
                print(f"\r\033[K{line}", end="", flush=True, file=sys.stderr)
        if line:
            print("\r\033[K", end="", flush=True, file=sys.stderr)

    RUNNING.append(over)
    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        RUNNING.remove(over)


def watched(items, name):
    """Yield the items while `shown` counts those done, of how many there are if that is known."""
    done, total = 0, len(items) if hasattr(items, "__len__") else None
    with shown(name, lambda: done, total):
        for item in items:
            yield item
            done += 1


def waiting(name):
    """A block of `shown` that counts the seconds."""
    start = time.monotonic()
    return shown(f"{name}; seconds:", lambda: int(time.monotonic() - start))
