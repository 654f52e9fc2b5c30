"""What each process holds of a model that is cut over several, and the time of a step.

    torchrun --nproc_per_node 2 tests/bench_shard.py --preset gpt2-medium
"""

import argparse
import re
import resource
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.runner import place, shard

import model as lm
import train
from data.machine import make_runtime


def local_bytes(tensors):
    """Bytes of this process's parts of tensors."""
    parts = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in parts)


def own_memory():
    """Bytes that this process holds, without what is mapped from files."""
    return int(re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--preset", default="gpt2-medium")
    p.add_argument("--d_model", type=int, help="another width than the preset's")
    p.add_argument("--optimizer", default="adamw")
    p.add_argument("--steps", type=int, default=2)
    own = p.parse_args()
    flags = ["--preset", own.preset, "--optimizer", own.optimizer, "--shard", "--max_steps", "9"]
    args, _ = train.resolve(train.build_parser().parse_args(flags))
    runtime = make_runtime()
    with tempfile.TemporaryDirectory() as folder:  # as of the Hub: no process is to hold all of it
        folder = runtime.of_first(folder)
        if runtime.rank == 0:
            torch.manual_seed(0)
            width = {"d_model": own.d_model} if own.d_model else {}
            model = lm.Transformer(lm.preset(own.preset, **width))
            lm.export_hf({"config": asdict(model.config), "model": model.state_dict()}, folder)
            del model
        runtime.of_first(None)
        if runtime.world > 1:  # torch's own modules for it take memory, too
            shard(torch.nn.Linear(8, 8), [], runtime.device, None)
        before = own_memory()
        model = lm.model_from_checkpoint(lm.load_checkpoint(folder), dtype=None)
        model = place(model, args, runtime)
        loaded = own_memory() - before
        runtime.total(0)
    optimizers = train.make_optimizers(model, args)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    ids = torch.randint(model.config.vocab_size, (1, 16)).to(runtime.device)
    for _ in range(own.steps):
        start = time.perf_counter()
        model(ids, ids).backward()
        grads = local_bytes([p.grad for p in model.parameters() if p.grad is not None])
        train.optimizer_step(model, optimizers, scaler, 1.0)
        seconds = time.perf_counter() - start
    moments = [t for o in optimizers for s in o.state.values() for t in s.values()]
    held = local_bytes(model.parameters()) + grads + local_bytes(moments)
    if runtime.rank == 0:
        print(f"{runtime.world} process(es): {held} bytes of weights, gradients and moments each; "
              f"{seconds:.2f} s a step")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"process {runtime.rank}: {loaded} bytes to load it, {peak:,.0f} MiB at most")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
