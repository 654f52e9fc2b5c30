"""Files of tensors, mapped from disk: what torch.save wrote, and safetensors."""

import json
import math
import mmap
import os
import zipfile
from pathlib import Path

import torch

from data.cli import UserError
from data.files import write_whole


def load_pt(path, mapped=True):
    """What torch.save wrote: plain values and tensors, never code; the tensors are mapped from disk
    or, without `mapped`, in memory. UserError if it is another file or damaged: its zip's checksums
    are compared, 0.3 s for GPT-2's weights."""
    try:
        with zipfile.ZipFile(path) as records:
            damaged = records.testzip()
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as e:
        # torch and zipfile tell of a foreign or cut file in a dozen ways; one is enough
        raise UserError(f"{path} is not a checkpoint of ours, or is cut short") from e
    if damaged:
        raise UserError(f"{path} is damaged: the checksum of {damaged} is another")
    return content


def fit_error(expected, found):
    """One line on how a state dict `found` misfits `expected`, or None. Both name -> tensor."""
    if expected and not found:
        return "its weights lie in parts: --resume the run; each better evaluation writes best.pt"
    for name, tensor in expected.items():
        if name not in found:
            return f"{name} {tuple(tensor.shape)} is missing"
        if found[name].shape != tensor.shape:
            return f"{name} is {tuple(found[name].shape)}, the model has {tuple(tensor.shape)}"
    extra = [name for name in found if name not in expected]
    return f"{extra[0]} {tuple(found[extra[0]].shape)} is unknown to the model" if extra else None


# --------------------------------------------------------------------------------------------
# safetensors: a length, a table of contents in JSON, and the bytes of all tensors
# --------------------------------------------------------------------------------------------

SAFE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
HEADER_LIMIT = 100_000_000  # the format's own


class Safetensors:
    """The tensors of a .safetensors file, mapped from disk: nothing is read until it is touched.

    8 bytes          header: {name: {"dtype", "shape", "data_offsets"}, ...}     data
    header's length  JSON, UTF-8, perhaps with spaces behind                     without gaps

    UserError names the file and what is wrong with it.
    """

    def __init__(self, path):
        self.path = Path(path)
        try:
            with open(path, "rb") as f:
                size = os.fstat(f.fileno()).st_size
                length = int.from_bytes(f.read(8), "little")
                if size < 8 or not 2 <= length <= min(size - 8, HEADER_LIMIT):
                    raise UserError(f"{path} is no safetensors file, or is cut short")
                header = json.loads(f.read(length).decode(), object_pairs_hook=unique_keys)
                self.map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        except (ValueError, RecursionError) as e:
            if isinstance(e, UserError):
                raise
            raise UserError(f"{path} is no safetensors file: its header is no JSON ({e})") from e
        if not isinstance(header, dict):
            raise UserError(f"{path} is no safetensors file: its header is no JSON object")
        header.pop("__metadata__", None)
        self.start, self.entries = 8 + length, {}
        for name, entry in header.items():
            self.entries[name] = self.check(name, entry, size - self.start)
        end = 0
        for name, (_, _, begin, stop) in sorted(self.entries.items(), key=lambda e: e[1][2:]):
            if begin != end:
                raise UserError(f"{path}: tensor {name} begins at {begin}, not at {end}")
            end = stop
        if end != size - self.start:
            raise UserError(f"{path} has {size - self.start} bytes of tensors, its header {end}")

    def check(self, name, entry, size):
        """(dtype, shape, begin, end) of a header's entry, or UserError."""
        try:
            dtype, shape = SAFE_DTYPES[entry["dtype"]], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as e:
            what = entry.get("dtype") if isinstance(entry, dict) else entry
            raise UserError(f"{self.path}: tensor {name} is described badly ({what})") from e
        numbers = (*shape, begin, end)
        if not all(type(n) is int and 0 <= n <= size for n in numbers) or begin > end:
            raise UserError(f"{self.path}: tensor {name} {shape} lies outside of the file")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{self.path}: tensor {name} {shape} takes no {end - begin} bytes")
        return dtype, shape, begin, end

    def __getitem__(self, name):
        dtype, shape, begin, end = self.entries[name]
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        count = (end - begin) // dtype.itemsize
        flat = torch.frombuffer(self.map, dtype=dtype, count=count, offset=self.start + begin)
        return flat.view(shape)

    def release(self, name):
        """Let the kernel take back the memory in which a tensor was read: it is on disk."""
        _, _, begin, end = self.entries[name]
        first = -(-(self.start + begin) // mmap.PAGESIZE) * mmap.PAGESIZE
        length = self.start + end - first
        if length > 0 and hasattr(self.map, "madvise"):
            self.map.madvise(mmap.MADV_DONTNEED, first, length)


def unique_keys(pairs):
    """A dict of a JSON object's pairs; ValueError if a key comes twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name comes twice")
    return found


def write_safetensors(path, tensors, metadata=None):
    """Write {name: tensor} as a .safetensors file, whole or not at all."""
    names = {dtype: name for name, dtype in SAFE_DTYPES.items()}
    header, end = {"__metadata__": metadata or {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.dtype.itemsize
        about = dict(dtype=names[tensor.dtype], shape=list(tensor.shape))
        header[name] = about | dict(data_offsets=[end, end + size])
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8

    def write(f):
        f.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            f.write(memoryview(flat.view(torch.uint8).numpy()))

    write_whole(path, write)
