"""Files: written whole or not at all, locks between processes, JSON, hashes."""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

from data.cli import UserError, explained


def write_whole(path, write):
    """Let write(file) fill a temporary file, then give it the name `path`."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, KeyboardInterrupt) as e:
        reason = str(e).strip().split("\n")[0]
        with contextlib.suppress(OSError):  # torch's zip writer is silent about a full disk
            free = shutil.disk_usage(path.parent).free
            reason = "the disk is full" if free < 1 << 20 else reason
            temporary.unlink()
        if KeyboardInterrupt in (type(e), type(e.__context__)):  # torch's zip writer fails after it
            raise KeyboardInterrupt from e
        raise UserError(f"cannot write {path}: {reason}; what was there before is kept") from e


LOCKS = Path("data/locks")


@contextlib.contextmanager
def locked(path):
    """Hold the lock of a file or folder that is to be written, while other processes wait."""
    LOCKS.mkdir(parents=True, exist_ok=True)
    lock = LOCKS / hashlib.sha1(os.fsencode(os.path.realpath(path))).hexdigest()
    with open(lock, "ab") as file:
        if not (held := try_lock(file)):
            print(f"waiting for another process that writes {path}", file=sys.stderr)
        while not held:
            time.sleep(0.1)
            held = try_lock(file)
        yield


def try_lock(file, shared=False):
    """Lock an open file until it is closed. False if another process holds it. Several processes
    can hold a `shared` lock (not on Windows)."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def write_once(path, is_written, write):
    """Call write() unless is_written() is true. Only one of several processes writes."""
    if is_written():
        return
    with locked(path):
        if not is_written():
            write()


def write_json(path, values):
    """Write an object as a JSON file, whole or not at all."""
    write_whole(path, lambda f: f.write(json.dumps(values, indent=2, ensure_ascii=False).encode()))


def dump_lines(rows):
    """The text of a .jsonl file: each row as JSON on a line of its own."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_json(path):
    """The object in a JSON file; UserError if there is none."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    with explained(f"{path} is not JSON"):
        values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object")
    return values


def file_sha256(path):
    """The sha256 of a file's bytes, as hex digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
