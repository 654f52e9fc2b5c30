"""Files of tensors, mapped from disk: those of torch.save, and safetensors."""

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
    """What torch.save wrote: plain values and tensors, never code. The tensors are mapped from disk
    or, without `mapped`, in memory. UserError if it is another file or damaged: the checksums in
    its zip are compared, which takes 0.3 s for GPT-2's weights."""
    try:
        with zipfile.ZipFile(path) as records:
            damaged = records.testzip()
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as e:
        # torch and zipfile report a foreign or truncated file in a dozen ways; one is enough
        raise UserError(f"{path} is not a checkpoint of ours, or is cut short") from e
    if damaged:
        raise UserError(f"{path} is damaged: the checksum of {damaged} is wrong")
    return content


def fit_error(expected, state):
    """One line on how a state dict misfits `expected`, or None. Both are name -> tensor."""
    if expected and not state:
        return "its weights lie in parts: --resume the run; each better evaluation writes best.pt"
    for name, tensor in expected.items():
        if name not in state:
            return f"{name} {tuple(tensor.shape)} is missing"
        if state[name].shape != tensor.shape:
            return f"{name} is {tuple(state[name].shape)}, the model has {tuple(tensor.shape)}"
    extra = [name for name in state if name not in expected]
    return f"{extra[0]} {tuple(state[extra[0]].shape)} is unknown to the model" if extra else None


SAFE_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
HEADER_LIMIT = 100_000_000  # the format's own


class Safetensors:
    """The tensors of a .safetensors file, mapped from disk: nothing is read until it is touched.

    8 bytes          header: {name: {"dtype", "shape", "data_offsets"}, ...}     data
    header's length  JSON, UTF-8, perhaps with spaces behind                     without gaps

    UserError names the file and what is wrong with it.
    """

    def __init__(self, path):
        self.path, self.entries, end = Path(path), {}, 0
        try:
            with open(path, "rb") as f:
                size = os.fstat(f.fileno()).st_size
                length = int.from_bytes(f.read(8), "little")
                if not 2 <= length <= min(size - 8, HEADER_LIMIT):
                    raise ValueError("its header does not fit")
                header = json.loads(f.read(length).decode())
                self.map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
            self.start = 8 + length
            header.pop("__metadata__", None)
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                dtype, shape = SAFE_DTYPES[entry["dtype"]], tuple(entry["shape"])
                begin, stop = entry["data_offsets"]
                counts = all(type(n) is int and n >= 0 for n in (*shape, begin, stop))
                size_fits = counts and stop - begin == math.prod(shape) * dtype.itemsize
                if not size_fits or begin != end:
                    raise ValueError(f"tensor {name!r} {shape} does not match its bytes")
                self.entries[name], end = (dtype, shape, begin, stop), stop
            if end != size - self.start:
                raise ValueError(f"its header describes {end} of {size - self.start} bytes")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise UserError(f"{path} is not a safetensors file, or is damaged: {e}") from e

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


def write_safetensors(path, tensors):
    """Write {name: tensor} as a .safetensors file, whole or not at all."""
    names = {dtype: name for name, dtype in SAFE_DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        entry = dict(dtype=names[tensor.dtype], shape=list(tensor.shape), data_offsets=[begin, end])
        header[name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8

    def write(f):
        f.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            f.write(memoryview(flat.view(torch.uint8).numpy()))

    write_whole(path, write)
