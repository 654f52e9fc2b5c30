"""Files of tensors, mapped from disk: those of torch.save, and safetensors."""

import json
import math
import mmap
import zipfile

import numpy as np
import torch

from data.cli import UserError, explained
from data.files import write_whole


def load_pt(path, mapped=True):
    """What torch.save wrote: plain values and tensors, never code. The tensors are mapped from disk
    or, without `mapped`, in memory. UserError if it is another file or damaged: the checksums in
    its zip are compared, which takes 0.3 s for GPT-2's weights."""
    try:
        with zipfile.ZipFile(path) as records:
            if records.testzip():
                raise zipfile.BadZipFile("a checksum is wrong")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as e:  # torch and zipfile report a foreign or damaged file in a dozen ways
        raise UserError(f"{path} is not a zip file of torch.save, or is damaged") from e


def fit_error(expected, state):
    """One line on how a state dict misfits `expected`, or None. Both are name -> tensor."""
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


class Safetensors:
    """The tensors of a .safetensors file, mapped from disk: nothing is read until it is touched.

    8 bytes          header: {name: {"dtype", "shape", "data_offsets"}, ...}     data
    header's length  JSON, UTF-8, may be padded with spaces                     without gaps

    UserError names the file and what is wrong with it.
    """

    def __init__(self, path):
        self.entries, end = {}, 0
        with explained(f"{path} is not a safetensors file, or is damaged"):
            with open(path, "rb") as f:
                self.map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
            length = int.from_bytes(self.map[:8], "little")
            header = json.loads(self.map[8 : 8 + length].decode())
            self.data = np.frombuffer(self.map, np.uint8)[8 + length :]
            header.pop("__metadata__", None)
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                if (dtype := entry["dtype"]) not in SAFE_DTYPES:
                    raise UserError(f"{path}: {name!r} is {dtype!r}, not {', '.join(SAFE_DTYPES)}")
                dtype, shape = SAFE_DTYPES[dtype], tuple(entry["shape"])
                begin, stop = entry["data_offsets"]
                counts = all(type(n) is int and n >= 0 for n in shape)
                if not counts or begin != end or stop - begin != math.prod(shape) * dtype.itemsize:
                    raise ValueError(f"tensor {name!r} {shape} does not match its bytes")
                self.entries[name], end = (dtype, shape, begin, stop), stop
            if end != len(self.data):
                raise ValueError(f"its header describes {end} of {len(self.data)} bytes")

    def __getitem__(self, name):
        dtype, shape, begin, end = self.entries[name]
        return torch.from_numpy(self.data[begin:end]).view(dtype).view(shape)

    def release(self):
        """Let the kernel take back the memory in which tensors were read: they are on disk."""
        if hasattr(self.map, "madvise"):  # not on Windows
            self.map.madvise(mmap.MADV_DONTNEED)


def write_safetensors(path, tensors):
    """Write {name: tensor} as a .safetensors file, whole or not at all."""
    dtypes = {dtype: name for name, dtype in SAFE_DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        begin, end = end, end + t.nbytes
        header[name] = dict(dtype=dtypes[t.dtype], shape=list(t.shape), data_offsets=[begin, end])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8

    def write(f):
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            flat = t.detach().cpu().contiguous().reshape(-1)
            f.write(memoryview(flat.view(torch.uint8).numpy()))

    write_whole(path, write)
