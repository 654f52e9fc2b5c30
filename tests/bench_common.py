"""What the benchmarks share: taking turns, and what this machine can do at best."""

import importlib.util
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def load_module(path, name):
    """A Python file of somebody else's as a module called `name`."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def clocked(work):
    """Seconds that `work()` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def take_turns(works, rounds=5):
    """{name: seconds of each round} of works that run one after the other, A B A B ..., so that a
    slow moment of the machine meets them all; one round more, before, is not counted."""
    seconds = {name: [] for name in works}
    for i in range(rounds + 1):
        for name, work in works.items():
            took = clocked(work)
            if i:
                seconds[name].append(took)
    return seconds


def table(seconds, units, unit, peer, floor=None):
    """Markdown: the median rate of each work, its slowest and fastest round, and the median over
    the rounds of its speed as a multiple of `peer`'s in the same round."""
    lines = [f"| | {unit}, median | slowest to fastest | x {peer} |", "| --- | ---: | ---: | ---: |"]
    for name, took in seconds.items():
        rates = sorted(units / s for s in took)
        ratio = statistics.median(p / s for p, s in zip(seconds[peer], took))
        spread = f"{rates[0]:,.4g} to {rates[-1]:,.4g}"
        lines.append(f"| {name} | {statistics.median(rates):,.4g} | {spread} | {ratio:.2f} |")
    if floor:
        lines.append(f"| floor of this machine | {floor:,.4g} | | |")
    return "\n".join(lines)


def matmul_rate(dtype=torch.float32, size=1536):
    """FLOP/s of a large square product, the best of several."""
    a = torch.ones(size, size, dtype=dtype)
    return 2 * size**3 / min(clocked(lambda: a @ a) for _ in range(8))


def read_rate():
    """Bytes a second of summing up a gigabyte of float32, the best of several."""
    a = torch.ones(1 << 28)
    return a.nbytes / min(clocked(a.sum) for _ in range(5))


def about_machine():
    """A line for the head of a table."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return (
        f"{time.strftime('%Y-%m-%d')}, {name}, {os.cpu_count()} cores, torch {torch.__version__}; "
        f"matrix products {matmul_rate() / 1e9:,.0f} GFLOP/s in fp32, "
        f"{matmul_rate(torch.bfloat16) / 1e9:,.0f} in bf16; reading {read_rate() / 1e9:,.0f} GB/s"
    )
