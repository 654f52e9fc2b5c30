"""The machine: device, precision, processes."""
import contextlib
import copy
import ctypes
import math
import os
import re
import time
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from data.cli import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_name(text):
    """What --dtype means: torch's own names of DTYPES become ours, any other text stays.

    >>> dtype_name("bfloat16"), dtype_name("auto")
    ('bf16', 'auto')
    """
    return next((name for name, dtype in DTYPES.items() if str(dtype) == f"torch.{text}"), text)


def choose_device(name=None):
    """The torch.device of that name; for None or "auto" CUDA, then Apple's MPS, then the CPU.
    UserError if this machine cannot use it."""
    if name in (None, "auto"):
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if not re.fullmatch(r"(cpu|mps|cuda)(:\d+)?", str(name)):
        raise UserError(f"--device {name} is unknown: choose auto, cpu, cuda, cuda:1 or mps")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError) as e:
        reason = str(e).split("\n")[0]
        raise UserError(f"--device {name} cannot be used here: {reason}") from e


@dataclass
class Runtime:
    """Where and how the arithmetic is done. `world` processes of which this one is `rank`."""

    device: torch.device
    dtype: str = "fp32"
    peak: float = 0.0  # FLOP/s of a large matrix product in `dtype`, measured
    rank: int = 0
    world: int = 1

    def autocast(self):
        """Run matrix products in `dtype`; weights, sums and the loss stay in float32."""
        if self.dtype == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.dtype])

    def total(self, *values):
        """Each value summed over all processes, as floats."""
        if self.world == 1:
            return [float(v) for v in values]
        t = torch.tensor([float(v) for v in values], dtype=torch.float64)
        t = t.to(self.device)
        dist.all_reduce(t)
        return t.tolist()

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


def measure_peak(device, dtype, size=None):
    """FLOP/s of this machine's matrix product, the best of a few runs: the "100 %" of MFU."""
    size = size or (8192 if device.type == "cuda" else 1024)
    a = torch.ones(size, size, device=device, dtype=DTYPES[dtype])
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


def make_runtime(device=None, dtype=None, wide=False):
    """Choose device and precision, join the other processes if torchrun started us.

    A `dtype` of None or "auto" is bf16 where a GPU has it, else fp16; on a CPU fp32, or bf16 for a
    `wide` model if that is measurably faster there (CPUs with AMX). Devices: `choose_device`.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(device)
    if device.type == "cuda":
        if device.index is None:  # each process its own GPU
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    keep_freed_memory()
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if dtype in (None, "auto"):
        dtype = "fp32"
        if device.type == "cuda":
            dtype = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        elif device.type == "cpu" and wide:
            fast = measure_peak(device, "bf16") > 1.5 * measure_peak(device, "fp32")
            dtype = "bf16" if fast else "fp32"
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r} is unknown; choose auto, {', '.join(DTYPES)}")
    return Runtime(device, dtype, measure_peak(device, dtype), rank, world)


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


class BF16Copy(nn.Module):
    """A bf16 copy of a model, for forward and backward passes on a CPU.

    Autocast casts every weight in every pass and keeps what flows between layers in float32; here
    all that is bf16, which was 1.2 times as fast at GPT-2's shape. But bf16 has three digits, and a
    step changes a weight by less than that. So the model itself, the master, stays in float32:
    gradients are added up there, the optimizer steps there, and `sync_weights` rounds it into the
    copy. (Mixed Precision Training, Micikevicius et al. 2018, section 3.1.)
    """

    def __init__(self, master):
        super().__init__()
        self.low = copy.deepcopy(master)
        self.masters, self.lows = list(master.parameters()), list(self.low.parameters())
        for p, low in zip(self.masters, self.lows):
            low.data = low.data.bfloat16()
            low.register_post_accumulate_grad_hook(partial(accumulate_grad, p))

    def forward(self, *args, **kwargs):
        return self.low(*args, **kwargs)

    def zero_grad(self, set_to_none=True):
        """Clear the gradients, which are the master's."""
        for p in self.masters:
            p.grad = None if set_to_none or p.grad is None else p.grad.zero_()

    def sync_weights(self):
        """Round the master's weights into the copy."""
        with torch.no_grad():
            torch._foreach_copy_(self.lows, self.masters)


def accumulate_grad(master, low):
    """Add the gradient of `low` to that of its master, in float32, and forget it."""
    if master.grad is None:
        master.grad = low.grad.float()
    else:
        master.grad.add_(low.grad)
    low.grad = None
