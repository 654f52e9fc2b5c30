"""Benchmarks on a GPU: training and nanoGPT, generation and transformers, LoRA of an 8B model.

    git clone https://github.com/karpathy/nanoGPT
    pytest -n0 -m gpu
    for part in train write lora; do python tests/bench_gpu.py $part --nanogpt nanoGPT; done
    python tests/bench_gpu.py train --toy       shows on a CPU that a part runs

train: tokens a second of whole steps in bf16, compiled and not, AdamW and Muon, in turn with
nanoGPT's as its bench.py has them, compiled, of the same shape (ours has shifts in its norms); peak
memory. write: tokens a second, greedy. lora: a step of rank 8 adapters over nf4 weights. Prints
markdown for tests/BENCHMARKS.md.
"""

import argparse
import itertools
import sys
import tempfile

import bench_common as bench
import torch
from bench_sample import make_transformers

import lora
import model as lm
import sample
from data.machine import DTYPES, make_runtime, synchronize

STEPS = 5  # of training in a turn


def make_config(what, toy):
    """The shape for a part."""
    changes = {}
    if what == "train":  # nanoGPT's: a padded vocabulary, no biases
        changes = dict(vocab_size=50304, qkv_bias=False, out_bias=False, ff_bias=False)
    if toy:
        changes |= dict(n_layer=2, n_head=2, d_model=64, context=64, vocab_size=512)
    return lm.preset("llama-8b" if what == "lora" else "gpt2", **changes)


def alone(job, name):
    """A job that runs once untimed, then returns its seconds, and leaves the GPU's memory to the
    other processes."""

    def run():
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        job()
        seconds = bench.clocked(job)
        gib = torch.cuda.max_memory_allocated() / 2**30
        print(f"{name}: {gib:.1f} GiB at most", file=sys.stderr)
        torch.cuda.empty_cache()
        return seconds

    return run


def make_steps(name, config, rows, flags=(), adapt=False):
    """A job: training steps as `train.fit` makes them."""
    runtime = make_runtime()
    model = adapted_model(config, runtime) if adapt else lm.Transformer(config)
    batches = itertools.repeat(next(bench.random_batches(config.vocab_size, rows, config.context)))
    return alone(bench.our_step(model, batches, steps=STEPS, flags=flags, runtime=runtime), name)


def adapted_model(config, runtime):
    """One with adapters over nf4; before, its weights in fp32 take 30 GiB of the GPU."""
    with runtime.device:
        model = lm.Transformer(config)
    lora.quantize(model, "nf4", device=runtime.device)
    lora.add_lora(model, "all", rank=8, alpha=16)
    model.grad_checkpoint = True
    return model


def make_nanogpt(name, config, rows, folder):
    """A job: steps of nanoGPT's model, as its bench.py has them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    shape = dict(block_size=config.context, vocab_size=config.vocab_size, bias=False)
    shape |= dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.d_model)
    model, optimizer = bench.load_nanogpt(folder, (1e-2, 1e-4, (0.9, 0.95)), device, **shape)
    batch = torch.randint(config.vocab_size, (2, rows, config.context), device=device).unbind()
    work = torch.compile(model), optimizer, itertools.repeat(batch), True, 0, STEPS, device
    return alone(bench.peer_step(*work), name)


def writer(config, dtype, flags, device):
    """A function that writes greedy ids after 32, as sample.py does with these flags."""
    torch.manual_seed(0)
    model = lm.Transformer(config).eval().to(device, DTYPES[dtype])
    sample.fast_model(model, 1, sample.build_parser().parse_args(flags))
    engine, prompt = sample.Engine(model, 1, config.context), list(range(32))
    engine.draft = False  # random weights repeat themselves, which is easy to draft
    how = dict(max_new_tokens=config.context // 4, temperature=0.0, engine=engine)
    return lambda: [i for (i,) in sample.generate(model, [prompt], **how)]


def make_writer(name, config, flags=(), folder=None):
    """A job: greedy writing, ours or that of transformers with the model in `folder`."""
    device = make_runtime().device
    theirs = [list(range(32))], "bf16", config.context // 4, device
    job = make_transformers(folder, *theirs) if folder else writer(config, "bf16", flags, device)
    return alone(lambda: (job(), synchronize(device)), name)


def jobs_of(what, rows, nanogpt, folder):
    """{name: (make, settings beside its name and shape)} of a part."""
    if what == "write":
        ways = {"eager": {"flags": ["--no_fast"]}, "sample.py": {}}
        ways |= {"transformers": {"folder": folder}}
        return {name: (make_writer, way) for name, way in ways.items()}
    if what == "lora":
        return {"rank 8 over nf4": (make_steps, {"rows": 1, "adapt": True})}
    flags = {"compiled": (), "eager": ["--no-compile"], "Muon": ["--optimizer", "muon"]}
    jobs = {f"ours, {n}": (make_steps, {"rows": rows, "flags": f}) for n, f in flags.items()}
    if nanogpt:
        jobs["nanoGPT, compiled"] = make_nanogpt, {"rows": rows, "folder": nanogpt}
    return jobs


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("what", choices=("train", "write", "lora"))
    p.add_argument("--nanogpt", help="a clone of karpathy/nanoGPT")
    p.add_argument("--toy", action="store_true", help="two narrow layers, for a CPU")
    args = p.parse_args()
    config, rows = make_config(args.what, args.toy), 2 if args.toy else 32
    with tempfile.TemporaryDirectory() as folder:
        if args.what == "write":
            state = lm.Transformer(config).state_dict()
            lm.export_hf({"config": vars(config), "model": state}, folder)
        jobs = jobs_of(args.what, rows, args.nanogpt, folder).items()
        jobs = {name: (make, dict(name=name, config=config, **how)) for name, (make, how) in jobs}
        seconds = bench.take_turns(jobs, rounds=3)
    tokens, floor, peak = config.context // 4, None, make_runtime().peak
    if args.what != "write":  # the floor is that of training's matrix products
        tokens = config.context * STEPS * (rows if args.what == "train" else 1)
        floor = peak / lm.flops_per_token(config, frozen=args.what == "lora")
    print(bench.table(seconds, tokens, "tokens/s", next(iter(jobs)), floor))
    print(f"measured peak {peak / 1e12:.4g} TFLOP/s; torch {torch.__version__}")


if __name__ == "__main__":
    main()
