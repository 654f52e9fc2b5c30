"""What the benchmarks share: taking turns, and what this machine can do at best."""

import contextlib
import importlib.util
import io
import multiprocessing as mp
import os
import platform
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train
from data.machine import Runtime, keep_freed_memory, measure_peak, synchronize


def load_nanogpt(folder, settings, device="cpu", **shape):
    """nanoGPT's model and its optimizer, made with `settings`: decay, rate, betas."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
    nanogpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    with contextlib.redirect_stdout(io.StringIO()):
        model = nanogpt.GPT(nanogpt.GPTConfig(dropout=0.0, **shape)).to(device)
        return model, model.configure_optimizers(*settings, device)


def peer_step(model, optimizer, batches, bf16=False, clip=1.0, steps=1, device="cpu"):
    """A job: steps as nanoGPT's script makes them."""

    def job():
        for _ in range(steps):
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                _, loss = model(*next(batches))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        synchronize(torch.device(device))

    return job


def clocked(work):
    """Seconds that `work()` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def make_job(make, settings):
    """In a process of its own: make the job that `do_job` does there."""
    global job
    job = make(**settings)


def do_job():
    """Seconds that the job of this process takes, or that it returns."""
    start = time.perf_counter()
    result = job()
    return result if isinstance(result, float) else time.perf_counter() - start


def take_turns(jobs, rounds):
    """{name: seconds of each round} of jobs that run in turn, A B A B ..., so that a slow moment of
    the machine affects all of them; a first round is not counted.

    `jobs` are {name: (make, settings)}: each is made in a process of its own by make(**settings),
    with the memory and threads that its own scripts ask for. What a process raises, or
    BrokenProcessPool if it dies, is raised here at once.
    """
    context, seconds, pools = mp.get_context("spawn"), {name: [] for name in jobs}, {}
    with contextlib.ExitStack() as stack:
        for name, (make, settings) in jobs.items():
            pools[name] = stack.enter_context(ProcessPoolExecutor(1, context))
            pools[name].submit(make_job, make, settings).result()
        for i in range(rounds + 1):
            for name, pool in pools.items():
                time.sleep(0.3)  # threads of the job before may still be spinning
                took = pool.submit(do_job).result()
                if i:
                    seconds[name].append(took)
    return seconds


def table(seconds, units, unit, peer, floor=None):
    """Markdown: the median rate of each job, its slowest and fastest round, and the median of its
    speed as a multiple of `peer`'s in the same round."""
    lines = [f"| | {unit}, median | slowest to fastest | x {peer} |"]
    lines.append("| --- | ---: | ---: | ---: |")
    for name, took in seconds.items():
        rates = sorted(units / s for s in took)
        ratio = statistics.median(p / s for p, s in zip(seconds[peer], took))
        spread = f"{rates[0]:,.4g} to {rates[-1]:,.4g}"
        lines.append(f"| {name} | {statistics.median(rates):,.4g} | {spread} | {ratio:.2f} |")
    if floor:
        lines.append(f"| floor of this machine | {floor:,.4g} | | |")
    return "\n".join(lines)


def our_step(model, batches, dtype="fp32", *, steps, flags=(), runtime=None):
    """A job: steps as `train.fit` makes them, with AdamW if no flag says otherwise."""
    keep_freed_memory()
    runtime = runtime or Runtime(torch.device("cpu"), dtype)
    # nanoGPT's rate: random tokens must not drive weights to extremes
    flags = ["--optimizer", "adamw", "--max_steps", "100", "--lr", "6e-4", *flags]
    args, _ = train.resolve(train.build_parser().parse_args(flags))
    train.place(model, args, runtime)
    task = train.Task(lambda step: [next(batches)], evaluate=None, extra={})
    model.train()
    runner, precision, after_step = train.make_runner(model, task, args, runtime)
    optimizers = train.make_optimizers(model, args)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == "fp16")
    train.clear_gradients(model)

    def job():
        for step in range(steps):
            train.training_step(runner, task, task.batches(step), precision, scaler, (0, step))
            train.optimizer_step(model, optimizers, scaler, 1.0, runtime)
            after_step()
        synchronize(runtime.device)

    return job


def random_batches(vocab, rows, length):
    """Endless different (ids, targets), each (rows, length). The same one again and again would be
    memorised, and a CPU takes several times as long for gradients that are denormal numbers."""
    generator = torch.Generator().manual_seed(0)
    while True:
        ids = torch.randint(vocab, (rows, length + 1), generator=generator)
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def read_rate():
    """Bytes a second of summing up a gigabyte of float32, the best of several."""
    a = torch.ones(1 << 28)
    return a.nbytes / min(clocked(a.sum) for _ in range(5))


def about_machine():
    """A line for the head of a table."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        name = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    fp32, bf16 = (measure_peak(torch.device("cpu"), dtype) / 1e9 for dtype in ("fp32", "bf16"))
    return (
        f"{time.strftime('%Y-%m-%d')}, {name}, {os.cpu_count()} cores, torch {torch.__version__}; "
        f"matrix products {fp32:,.0f} GFLOP/s in fp32, {bf16:,.0f} in bf16; "
        f"reading {read_rate() / 1e9:,.0f} GB/s"
    )
