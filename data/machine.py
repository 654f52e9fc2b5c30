"""The machine: device, precision, processes."""
import contextlib
import ctypes
import math
import os
import re
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from data.cli import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_name(text):
    """What --dtype means: torch's own names of DTYPES become ours, any other text stays.

    >>> dtype_name("bfloat16"), dtype_name("auto")
    ('bf16', 'auto')
    """
    return next((name for name, dtype in DTYPES.items() if str(dtype) == f"torch.{text}"), text)


def choose_device(name=None):
    """The torch.device of that name; for None or "auto" CUDA, then Apple's MPS, then the CPU. Of
    the GPUs each of torchrun's processes has its own. UserError if this machine cannot use it."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1  # MPS has no way to exchange gradients
    if name in (None, "auto"):
        mps = torch.backends.mps.is_available()
        if mps and several and os.environ.get("RANK", "0") == "0":
            print("MPS is for one process: those of torchrun run on the CPU")
        name = "cuda" if torch.cuda.is_available() else "mps" if mps and not several else "cpu"
    if several and str(name).startswith("mps"):
        raise UserError(f"--device {name} is for one process: torchrun's take cpu or cuda")
    if name == "cuda":
        name += f":{os.environ.get('LOCAL_RANK', 0)}"
    if not re.fullmatch(r"(cpu|mps|cuda)(:\d+)?", str(name)):
        raise UserError(f"--device {name} is unknown: choose auto, cpu, cuda, cuda:1 or mps")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError) as e:
        reason = str(e).split("\n")[0]
        raise UserError(f"--device {name} cannot be used here: {reason}") from e


def native_dtype(device):
    """bf16 on a GPU that has it, fp16 on one that only emulates it (T4, V100), else fp32."""
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def compiles_well(device):
    """Whether torch.compile is worth its minute: on CUDA from compute capability 8.0 (Ampere)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@dataclass
class Runtime:
    """Where and how the arithmetic is done. `world` processes of which this one is `rank`."""

    device: torch.device
    dtype: str = "fp32"
    peak: float = 0.0  # FLOP/s of a large matrix product in `dtype`
    peak_source: str = "measured"
    rank: int = 0
    world: int = 1
    sharded: bool = False  # whether the model is cut over the processes: all must call it alike
    ahead: bool = False  # whether a GPU computes while Python goes on, so that reading is waiting

    def autocast(self):
        """Run matrix products in `dtype`; weights, sums and the loss stay in float32."""
        if self.dtype == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.dtype])

    def upload(self, batch):
        """A batch on the device; from pinned memory, so that no GPU need be waited for."""
        if self.device.type == "cuda":
            batch = [t.pin_memory() for t in batch]
        return [t.to(self.device, non_blocking=True) for t in batch]

    def total(self, *values):
        """Each number summed over all processes, as floats; by gloo, so no GPU is waited for."""
        if self.world == 1:
            return [float(v) for v in values]
        t = torch.tensor([float(v) for v in values], dtype=torch.float64)
        dist.all_reduce(t)
        return t.tolist()

    def share(self, batches):
        """(batch, whether it counts) for each of this process's batches of all. Where the model is
        cut over the processes, those with fewer batches take part with one that does not count."""
        for first in range(0, len(batches), self.world):
            mine = first + self.rank
            if mine < len(batches) or self.sharded:
                yield batches[min(mine, len(batches) - 1)], mine < len(batches)

    def of_first(self, value):
        """The value that rank 0 has, whatever the other ranks have: all must decide alike."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box)
        return box[0]


def keep_freed_memory():
    """Let glibc keep large freed blocks instead of returning them to the kernel at once.

    A training step on the CPU frees and takes the same blocks again and again, and each time the
    kernel would hand them out page by page: it made a norm three times slower here, and a step of
    GPT-2's shape by a sixth.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc: nothing to do
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no block has pages of its own, which would come as zeros each time
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: none


# Dense bf16 (T4, V100: fp16) products with sums in fp32, TFLOP/s by NVIDIA's datasheets; the first
# name that a GPU's contains counts
DATASHEET = {
    "B200": 2250, "H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121,
    "A10G": 70, "A10": 125, "4090": 165, "3090": 71, "V100": 125, "T4": 65,
}  # fmt: skip


def find_peak(device, dtype):
    """(FLOP/s that are the 100 % of MFU, where they come from): the datasheet's of a known GPU, as
    other projects take it, else what the matrix product reaches here."""
    if device.type == "cuda" and dtype != "fp32":
        name = torch.cuda.get_device_name(device)
        for part, tera in DATASHEET.items():
            if part in name:
                return tera * 1e12, f"{name}'s datasheet"
    return measure_peak(device, dtype), "measured"


def measure_peak(device, dtype, size=None):
    """FLOP/s of this machine's matrix product, the best of a few runs."""
    if device.type == "cpu" and size is None:  # smaller where bf16 or fp16 are emulated
        size = 1024 if measure_peak(device, dtype, 128) > 1e10 else 256
    size = size or 8192
    # not ones: on them a GPU, which needs less power, is faster
    a = torch.randn(size, size, device=device).to(DTYPES[dtype])
    best = math.inf
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        _ = a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def synchronize(device):
    """Wait for the GPU, so that a clock read after this is right."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def make_runtime(device=None, dtype=None, wide=False, was=None):
    """Choose device and precision, join the other processes if torchrun started us.

    A `dtype` of None or "auto" is bf16 where a GPU has it, else fp16; on a CPU fp32, or bf16 for a
    `wide` model if that is measurably faster there (CPUs with AMX). So is the dtype of a run that
    `was` on another kind of device. Devices: `choose_device`.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    keep_freed_memory()
    if world > 1 and not dist.is_initialized():
        if device.type == "cuda":
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    if was not in (None, device.type) and rank == 0:
        print(f"the run was on {was}, in {dtype}: on {device.type} the precision is chosen anew")
    if dtype in (None, "auto") or was not in (None, device.type):
        dtype = native_dtype(device)
        if device.type == "cpu" and wide:
            fast = measure_peak(device, "bf16") > 1.5 * measure_peak(device, "fp32")
            dtype = "bf16" if fast else "fp32"
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r} is unknown; choose auto, {', '.join(DTYPES)}")
    peak = find_peak(device, dtype)
    return Runtime(device, dtype, *peak, rank, world, ahead=device.type != "cpu")


def random_state():
    """What dropout and other noise will be, on every kind of device that this machine has."""
    states = {"cpu": torch.get_rng_state()}
    for kind in ("cuda", "mps"):
        if getattr(torch, kind).is_available():
            states[kind] = getattr(torch, kind).get_rng_state()
    return states


def set_random_state(states):
    """Go back to what `random_state` returned, perhaps on another machine."""
    torch.set_rng_state(states["cpu"])
    for kind in set(states) - {"cpu"}:
        if getattr(torch, kind).is_available():
            getattr(torch, kind).set_rng_state(states[kind])
