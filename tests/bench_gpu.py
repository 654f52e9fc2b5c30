"""What a GPU makes of it: training beside nanoGPT, LoRA over a model of 8B, writing.

    git clone https://github.com/karpathy/nanoGPT
    python tests/bench_gpu.py train --nanogpt nanoGPT
    python tests/bench_gpu.py lora
    python tests/bench_gpu.py write

train: tokens a second of whole steps in bf16, compiled and not, AdamW and Muon, in turn with
nanoGPT's as its bench.py has them, compiled; peak memory. lora: a step of rank 8 adapters over nf4
weights. write: tokens a second, greedy, eager, by CUDA graphs, and transformers. Prints markdown
for tests/BENCHMARKS.md. On a CPU, `train` and `lora` with --preset llama only show that they run.
"""

import argparse
import itertools
import sys
import tempfile

import torch
from bench_common import load_nanogpt, our_step, peer_step, random_batches, table, take_turns
from bench_sample import make_transformers

import lora
import model as lm
import sample
from data.machine import make_runtime, synchronize

STEPS = 10  # of training in a turn


def tell_peak(name):
    """Print the peak of the GPU memory that this process has held, 0 without a GPU."""
    gib = torch.cuda.max_memory_allocated() / 2**30
    print(f"{name}: {gib:.1f} GiB at most", file=sys.stderr)


def make_steps(preset, rows, flags=(), adapt=False):
    """A job: training steps as `train.fit` makes them."""
    runtime = make_runtime()
    model = adapted_model(preset, runtime) if adapt else lm.Transformer(lm.preset(preset))
    batch = next(random_batches(model.config.vocab_size, rows, model.config.context))
    job = our_step(model, itertools.repeat(batch), steps=STEPS, flags=flags, runtime=runtime)
    return lambda: (job(), tell_peak(f"ours {flags}"))


def adapted_model(preset, runtime):
    """One with adapters over nf4, made block by block: all of it in fp32 would not fit."""
    model = lm.meta_model(lm.preset(preset))
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            module.to_empty(device="cpu", recurse=False)
            torch.nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, torch.nn.Linear) and module is not model.head:
                module.to(torch.bfloat16)
        elif isinstance(module, torch.nn.RMSNorm):
            module.weight = torch.nn.Parameter(torch.ones(module.weight.shape))
    lora.quantize(model, "nf4", device=runtime.device)
    lora.add_lora(model, "all", rank=8, alpha=16)
    model.grad_checkpoint = True
    return model


def make_nanogpt(folder, rows):
    """A job: steps of nanoGPT's model, as its bench.py has them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    settings = 1e-2, 1e-4, (0.9, 0.95)
    model, optimizer = load_nanogpt(folder, settings, device, block_size=1024, bias=False)
    batch = torch.randint(50304, (2, rows, 1024), device=device).unbind()
    batches = itertools.repeat(batch)
    job = peer_step(torch.compile(model), optimizer, batches, True, 0, STEPS, device)
    return lambda: (job(), tell_peak("nanoGPT"))


def make_writer(preset, new, graphs=False, folder=None):
    """A job: greedy writing of `new` tokens after 32, ours or transformers'."""
    runtime, prompts = make_runtime(), [list(range(32))]
    if folder:
        return make_transformers(folder, prompts, "bf16", new, runtime.device)
    model = lm.Transformer(lm.preset(preset)).eval().to(runtime.device, torch.bfloat16)
    if graphs:
        flags = ["--cuda_graphs", "--prompt", "x"]
        model = sample.fast_model(model, 1, sample.build_parser().parse_args(flags))

    def job():
        for _ in sample.generate(model, prompts, new, temperature=0.0):
            pass
        synchronize(runtime.device)

    return job


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("what", choices=("train", "lora", "write"))
    p.add_argument("--nanogpt", help="a clone of karpathy/nanoGPT")
    p.add_argument("--preset", help="gpt2; llama-8b for lora")
    p.add_argument("--rows", type=int, default=32, help="of a batch (32; lora: 1)")
    args = p.parse_args()
    preset = args.preset or ("llama-8b" if args.what == "lora" else "gpt2")
    config, jobs = lm.preset(preset), {}
    rows = 1 if args.what == "lora" else args.rows
    common = dict(preset=preset, rows=rows)
    if args.what == "train":
        for name, flags in (("compiled", ()), ("eager", ("--no-compile",)),
                            ("compiled, Muon", ("--optimizer", "muon"))):
            jobs[f"ours, {name}"] = make_steps, common | {"flags": flags}
        if args.nanogpt:
            jobs["nanoGPT, compiled"] = make_nanogpt, dict(folder=args.nanogpt, rows=rows)
    elif args.what == "lora":
        jobs["rank 8 over nf4"] = make_steps, common | {"adapt": True}
    tokens, peak = rows * config.context * STEPS, make_runtime().peak
    with tempfile.TemporaryDirectory() as folder:
        if args.what == "write":
            state = lm.Transformer(config).state_dict()
            lm.export_hf({"config": vars(config), "model": state}, folder)
            tokens = min(256, config.context - 32)
            for name, settings in (("eager", {}), ("CUDA graphs", {"graphs": True}),
                                   ("transformers", {"folder": folder})):
                jobs[name] = make_writer, dict(preset=preset, new=tokens) | settings
        seconds = take_turns(jobs)
    # the floor is that of training's matrix products, by their measured speed
    floor = peak / lm.flops_per_token(config) if args.what != "write" else None
    print(table(seconds, tokens, "tokens/s", next(iter(jobs)), floor))
    print(f"measured peak {peak / 1e12:.4g} TFLOP/s; torch {torch.__version__}")


if __name__ == "__main__":
    main()
