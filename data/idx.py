"""MNIST's four files, in its own format IDX: downloaded, or from a folder of the user's."""
import gzip
import hashlib
import struct
import sys
import zlib
from pathlib import Path

import numpy as np

from data.cli import MALFORMED, UserError, explained
from data.download import fetch

MIRRORS = (  # the authors' own site no longer has the files
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
FILES = {  # sha256 of what is inside the .gz: the mirrors compressed it differently
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def read_idx(path, name):
    """(uint8 array, whether it is MNIST's own) of an IDX file, maybe in a .gz: two zero bytes, the
    type (8: unsigned bytes), the number of dimensions, their sizes as big-endian uint32, values."""
    content, dims = Path(path).read_bytes(), 3 if "idx3" in name else 1
    problem = f"{path} is not an IDX file, or is cut short"
    with explained(problem, EOFError, OSError, zlib.error, *MALFORMED):
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        if content[:4] != bytes([0, 0, 8, dims]):
            raise ValueError(f"it begins with {content[:4].hex(' ')!r}")
        sizes = struct.unpack_from(f">{dims}I", content, 4)
        array = np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(sizes)
    return array, hashlib.sha256(content).hexdigest() == FILES[name]


def download_idx(name):
    """The array of one of FILES, from the first mirror whose file has the right checksum."""
    problems = []
    for mirror in MIRRORS:
        try:
            path = fetch(f"{mirror}{name}.gz")
            array, genuine = read_idx(path, name)
            if genuine:
                return array
            problems.append(f"{path} does not have MNIST's contents")
        except UserError as e:
            problems.append(str(e))
    raise UserError("; ".join(problems) + ". Delete a damaged file to download it again")


def read_folder_idx(folder, name):
    """The array of one of FILES in the user's own folder, which may be another data set's."""
    for path in (Path(folder, name), Path(folder, f"{name}.gz")):
        if path.exists():
            array, genuine = read_idx(path, name)
            if not genuine:
                print(f"{path} is not MNIST's own: damaged, or another data set", file=sys.stderr)
            return array
    raise UserError(f"--data {folder} has no {name} or {name}.gz")
