"""The machine: device, precision, the speed of its matrix product, processes."""
import contextlib
import ctypes
import functools
import os
import timeit
from dataclasses import dataclass

import torch
import torch.distributed as dist

from data.cli import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name=None):
    """The torch.device called `name`; for None or "auto" CUDA, Apple's MPS or the CPU, whichever is
    there first. Each torchrun process uses its own GPU. UserError if it cannot be used here."""
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's and torch's
        # a compiled product takes up to 2 MB for each shape, and by default 1,024 shapes are kept:
        # six gigabytes after 450 steps of fine-tuning a small model, whose batches differ in length
        os.environ.setdefault(cache, "128")
    if name in (None, "auto"):
        several = int(os.environ.get("WORLD_SIZE", 1)) > 1  # MPS cannot exchange gradients
        mps = torch.backends.mps.is_available() and not several
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda":
        name += f":{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type == "cuda":  # streams, graphs and collectives use the current device
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).split("\n")[0].partition(". ")[0]
        raise UserError(f"--device {name} cannot be used here: {reason}") from e
    return device


def native_dtype(device):
    """bf16 on a GPU that has it, fp16 on one that only emulates it (T4, V100), else fp32."""
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


@dataclass
class Runtime:
    """Where and in which precision a model runs, in `world` processes, of which this is `rank`."""

    device: torch.device
    dtype: str = "fp32"
    peak: float = 0.0  # FLOP/s of the fastest matrix product, see `measure_peak`
    rank: int = 0
    world: int = 1
    sharded: bool = False  # each process has a part of the model: all must call it equally often

    @property
    def asynchronous(self):
        """Whether a GPU computes while Python goes on, so that reading a value means waiting."""
        return self.device.type != "cpu"

    def autocast(self):
        """Run matrix products in `dtype`; weights, sums and the loss stay in float32."""
        if self.dtype == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.dtype])

    def upload(self, batch):
        """The tensors of a batch, also those in lists, on the device; numbers stay as they are.
        Python need not wait for copies from pinned memory to a CUDA GPU; on MPS a copy that is not
        waited for may read memory that Python has freed by then."""
        if isinstance(batch, (list, tuple)):
            return [self.upload(x) for x in batch]
        if not torch.is_tensor(batch):
            return batch
        cuda = self.device.type == "cuda"
        return (batch.pin_memory() if cuda else batch).to(self.device, non_blocking=cuda)

    def total(self, *values):
        """Each number summed over all processes, as floats (by gloo, which needs no GPU)."""
        if self.world == 1:
            return [float(v) for v in values]
        t = torch.tensor([float(v) for v in values], dtype=torch.float64)
        dist.all_reduce(t)
        return t.tolist()

    def share(self, batches):
        """(batch, whether it counts) for each batch of this process. In a sharded model processes
        with fewer batches repeat the last one, which does not count then."""
        for first in range(0, len(batches), self.world):
            mine = first + self.rank
            if mine < len(batches) or self.sharded:
                yield batches[min(mine, len(batches) - 1)], mine < len(batches)

    def of_first(self, value):
        """The value that rank 0 has, so that all processes decide alike."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box)
        return box[0]


def full_tensor(tensor):
    """The whole of a sharded tensor (a collective: every process must call it), or `tensor`."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(tensor, other):
    """This process's part of a whole tensor if `other` is sharded, else `tensor`."""
    if not hasattr(other, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # takes a second

    mesh, placements = other.device_mesh, other.placements
    # a copy: the part is a view, which would keep the whole tensor in memory
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None).clone()


def make_runtime(device=None, dtype=None, previous=None, config=None, tokens=0, wide=512):
    """Choose device and precision, and join the other processes if torchrun started this one.

    A `dtype` of None or "auto" is the GPU's `native_dtype`; on a CPU it is fp32, or bf16 if d_model
    is at least `wide` and bf16 is measurably faster. A run that resumes on another kind of device
    than `previous` does not keep its `dtype`. `config` is the model's, `tokens` those of a
    micro-batch.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    keep_freed_memory()
    if world > 1 and not dist.is_initialized():
        gpu = device if device.type == "cuda" else None
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", device_id=gpu)
    if dtype in (None, "auto") or previous not in (None, device.type):
        dtype = native_dtype(device)
        if device.type == "cpu" and config and config.d_model >= wide:
            fast = measure_peak(device, "bf16") > 1.5 * measure_peak(device, "fp32")
            dtype = "bf16" if fast else "fp32"
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r} is unknown; choose auto, {', '.join(DTYPES)}")
    c = config
    pairs = ((c.d_model, c.d_ff), (c.d_ff, c.d_model), (c.d_model, c.vocab_size)) if c else ()
    peak = measure_peak(device, dtype, [(tokens, *pair) for pair in pairs])
    return Runtime(device, dtype, peak, rank, world)


def keep_freed_memory():
    """Let glibc keep large freed blocks. A training step on the CPU takes the same blocks again and
    again, and the kernel would hand them out page by page, which takes a sixth longer for GPT-2."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc: nothing to do
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets pages of its own, which come zeroed each time
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never return memory


@contextlib.contextmanager
def fast_products():
    """Within this context, or a function that it decorates, oneDNN multiplies float32 matrices if
    it is faster on this CPU. Generation does not use it: it is slow for the products of one token.
    """
    before = torch.get_float32_matmul_precision()
    if before == "highest" and onednn_is_faster():  # it is "high" in a run on a GPU
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@functools.cache
def onednn_is_faster():
    """Whether oneDNN's float32 products are much faster than MKL's on this CPU, and as exact. MKL
    uses AVX-512 on Intel's CPUs only: on an AMD EPYC 9005 oneDNN is 2.2 times as fast.

    torch calls oneDNN if products may be rounded to bf16 ("medium"). CPUs with AMX round them, and
    this is False there; other CPUs do not.
    """
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    threads, errors, times = torch.get_num_threads(), [], []
    torch.set_num_threads(1)  # other jobs of the machine then disturb fewer of the measurements
    for precision in ("medium", "highest"):
        torch.set_float32_matmul_precision(precision)
        errors.append((x @ x - x.double() @ x.double()).abs().max())
        times.append(min(timeit.repeat(lambda: x @ x, number=1, repeat=20)))
    torch.set_num_threads(threads)
    # with a margin, since a resumed run must choose as it did before
    return bool(errors[0] < 4 * errors[1] and 1.4 * times[0] < times[1])


def measure_peak(device, dtype, shapes=()):
    """FLOP/s of the fastest matrix product on this machine: a large square one, or one of these
    shapes (rows, inputs, outputs), whose sides are cut to that of the square."""
    large = 8192
    if device.type == "cpu":  # smaller where bf16 or fp16 are emulated
        large = 1024 if product_speed(device, dtype, 128, 128, 128) > 1e10 else 256
    cut = {tuple(min(size, large) for size in shape) for shape in [*shapes, (large,) * 3]}
    return max(product_speed(device, dtype, *shape) for shape in cut)


@fast_products()
def product_speed(device, dtype, rows, inputs, outputs):
    """FLOP/s of a matrix product, the best of six."""
    # random numbers: a GPU multiplies matrices of ones faster, as it needs less power for them
    x, w = (torch.randn(n, inputs, device=device).to(DTYPES[dtype]) for n in (rows, outputs))
    times = timeit.repeat(lambda: (x @ w.T, synchronize(device)), number=1, repeat=6)
    return 2 * rows * inputs * outputs / min(times)


def synchronize(device):
    """Wait for the GPU, so that a clock read after this is right."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def random_state():
    """{device: state of its random number generator} for every kind that this machine has."""
    kinds = {"cpu": torch, "cuda": torch.cuda, "mps": torch.mps}
    return {k: m.get_rng_state() for k, m in kinds.items() if k == "cpu" or m.is_available()}


def set_random_state(states):
    """Restore what `random_state` returned, perhaps on another machine."""
    for kind in states.keys() & random_state().keys():
        (torch if kind == "cpu" else getattr(torch, kind)).set_rng_state(states[kind])
