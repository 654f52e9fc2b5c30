"""MNIST's four files, in its own format IDX: downloaded, or from the user's own folder."""
import gzip
import hashlib
import math
import struct
import sys
import zlib
from pathlib import Path

import numpy as np

from data.cli import UserError
from data.download import fetch

MIRRORS = (  # the site of their authors has stopped giving them out
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
FILES = {  # sha256 of what is inside the .gz: the mirrors compressed it differently
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def parse_idx(content, dims, name):
    """The uint8 array in the bytes of an IDX file: two zero bytes, the type (8: unsigned bytes),
    the number of dimensions, each size as a big-endian uint32, the values. UserError otherwise."""
    if content[:4] != bytes([0, 0, 8, dims]):
        found = content[:4].hex(" ") or "nothing"
        raise UserError(f"{name} begins with {found}, not with 00 00 08 0{dims} as it should")
    if len(content) < 4 + 4 * dims:
        raise UserError(f"{name} ends in the middle of its header: cut short?")
    sizes = struct.unpack(f">{dims}I", content[4 : 4 + 4 * dims])
    values = content[4 + 4 * dims :]
    if len(values) != math.prod(sizes):
        shape = " x ".join(map(str, sizes))
        raise UserError(f"{name} has {len(values):,} values, its header says {shape}: cut short?")
    return np.frombuffer(values, np.uint8).reshape(sizes)


def read_idx(path, name):
    """(array, whether it is MNIST's own) of the file `path`, in a .gz or not."""
    content = Path(path).read_bytes()
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as e:
        raise UserError(f"{path} is no whole .gz file ({e})") from e
    array = parse_idx(content, 3 if "idx3" in name else 1, str(path))
    return array, hashlib.sha256(content).hexdigest() == FILES[name]


def download_idx(name):
    """The array of one of FILES, from the first mirror whose file is what it should be."""
    problems = []
    for mirror in MIRRORS:
        try:
            path = fetch(f"{mirror}{name}.gz")
            array, genuine = read_idx(path, name)
            if genuine:
                return array
            problems.append(f"{path} has other contents than MNIST's")
        except UserError as e:
            problems.append(str(e))
    raise UserError("; ".join(problems) + ". Delete a damaged file to download it anew")


def read_folder_idx(folder, name):
    """The array of one of FILES in the user's own folder, where it may be another data set's."""
    for path in (Path(folder, name), Path(folder, f"{name}.gz")):
        if path.exists():
            array, genuine = read_idx(path, name)
            if not genuine:
                print(f"{path} is not MNIST's own: damaged, or another data set", file=sys.stderr)
            return array
    if not Path(folder).is_dir():
        raise UserError(f"--data {folder} is no folder")
    raise UserError(f"{folder} has no {name} or {name}.gz")
