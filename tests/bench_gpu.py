"""What a GPU makes of it: training beside nanoGPT, LoRA over a model of 8B, writing.

    git clone https://github.com/karpathy/nanoGPT
    python tests/bench_gpu.py train --nanogpt nanoGPT
    python tests/bench_gpu.py lora
    python tests/bench_gpu.py write

train: tokens a second of whole steps in bf16, compiled and not, AdamW and Muon, in turn with
nanoGPT's model and optimizer as its bench.py has them, compiled; MFU by the datasheet; peak memory.
lora: a step of rank 8 adapters over nf4 weights. write: tokens a second, greedy, eager, by CUDA
graphs, and transformers. Prints markdown for tests/BENCHMARKS.md. On a CPU, with --preset tiny, it
only shows that it runs.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench_common import load_module, take_turns
from data.runner import make_runner, place

import lora
import model as lm
import sample
import train
from data.machine import make_runtime


def wait():
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def tell_peak(name):
    """Print what this process has held on the GPU at most."""
    if torch.cuda.is_available():
        gib = torch.cuda.max_memory_allocated() / 2**30
        print(f"{name}: {gib:.1f} GiB at most", file=sys.stderr)


def random_batch(vocab, rows, length, runtime):
    """(ids, targets) of a language model, (rows, length) each."""
    ids = torch.randint(vocab, (rows, length + 1))
    return runtime.upload([ids[:, :-1].contiguous(), ids[:, 1:].contiguous()])


def make_steps(preset, rows, steps, flags=(), prepare=None):
    """A work: `steps` training steps as `train.fit` makes them."""
    flags = ["--preset", preset, "--max_steps", "9", *flags]
    args, _ = train.resolve(train.build_parser().parse_args(flags))
    runtime = make_runtime()
    model = (prepare or new_model)(preset, runtime)
    place(model, args, runtime)
    batch = random_batch(model.config.vocab_size, rows, model.config.context, runtime)
    task = train.Task(
        lambda step: [batch], evaluate=None, extra={},
        loss=lambda m, ids, targets: m(ids, targets, places=slice(None)),
        count=lambda ids, targets: targets.numel(),
    )  # fmt: skip
    model.train()
    runner, precision, after_step = make_runner(model, task, args, runtime)
    optimizers = train.make_optimizers(model, args)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == "fp16")

    def work():
        for step in range(steps):
            train.training_step(runner, task, [batch], precision, scaler, (0, step))
            train.optimizer_step(model, optimizers, scaler, 1.0, runtime)
            after_step()
        wait()
        tell_peak(" ".join(flags))

    return work


def new_model(preset, runtime):
    """A model of random weights."""
    torch.manual_seed(0)
    return lm.Transformer(lm.preset(preset))


def adapted_model(preset, runtime):
    """One with adapters over nf4, made block by block: all of it in fp32 would not fit."""
    model = lm.meta_model(lm.preset(preset))
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            module.to_empty(device="cpu", recurse=False)
            torch.nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, torch.nn.Linear) and module is not model.head:
                module.to(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, torch.nn.RMSNorm):
            module.weight = torch.nn.Parameter(torch.ones(module.weight.shape))
    lora.quantize(model, "nf4", device=runtime.device)
    lora.add_lora(model, "all", rank=8, alpha=16)
    model.grad_checkpoint = True
    return model


def make_nanogpt(folder, rows, steps):
    """A work: steps of nanoGPT's model, as its bench.py has them."""
    nanogpt = load_module(Path(folder) / "model.py", "nanogpt_model")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    model = nanogpt.GPT(nanogpt.GPTConfig(block_size=1024, dropout=0, bias=False)).to(device)
    optimizer = model.configure_optimizers(1e-2, 1e-4, (0.9, 0.95), device)
    model = torch.compile(model)
    ids, targets = (torch.randint(50304, (rows, 1024), device=device) for _ in range(2))

    def work():
        for _ in range(steps):
            with torch.autocast(device, torch.bfloat16):
                loss = model(ids, targets)[1]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        wait()
        tell_peak("nanoGPT")

    return work


def make_writer(preset, new, graphs=False, folder=None):
    """A work: greedy writing of `new` tokens after 32, ours or transformers'."""
    runtime = make_runtime()
    prompt = list(range(32))
    if folder:
        import transformers

        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(folder, dtype=torch.bfloat16).eval().to(runtime.device)
        ids = torch.tensor([prompt], device=runtime.device)
        how = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **how) is None
    model = new_model(preset, runtime).eval().to(runtime.device, torch.bfloat16)
    if graphs:
        flags = ["--cuda_graphs", "--prompt", "x"]
        model = sample.fast_model(model, 1, sample.build_parser().parse_args(flags))

    def work():
        for _ in sample.generate(model, [prompt], new, temperature=0.0):
            pass
        wait()

    return work


def show(seconds, tokens, flops=None):
    """Print a row for each work: the median of its rounds, and the spread."""
    runtime = make_runtime()
    print("| | tokens/s, median | slowest to fastest | MFU |\n| --- | ---: | ---: | ---: |")
    for name, took in seconds.items():
        rates = sorted(tokens / s for s in took)
        middle = statistics.median(rates)
        mfu = f"{middle * flops / runtime.peak:.1%}" if flops else ""
        print(f"| {name} | {middle:,.0f} | {rates[0]:,.0f} to {rates[-1]:,.0f} | {mfu} |")
    peak = f"peak {runtime.peak / 1e12:.4g} TFLOP/s, {runtime.peak_source}"
    print(f"{peak}; torch {torch.__version__}")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("what", choices=("train", "lora", "write"))
    p.add_argument("--nanogpt", help="a clone of karpathy/nanoGPT")
    p.add_argument("--preset", help="gpt2; llama-8b for lora")
    p.add_argument("--rows", type=int, default=32, help="of a batch (32; lora: 1)")
    p.add_argument("--steps", type=int, default=10, help="a turn (10)")
    p.add_argument("--rounds", type=int, default=5, help="turns that each work has (5)")
    args = p.parse_args()
    preset = args.preset or ("llama-8b" if args.what == "lora" else "gpt2")
    config, works = lm.preset(preset), {}
    rows = 1 if args.what == "lora" else args.rows
    own = dict(preset=preset, rows=rows, steps=args.steps)
    if args.what == "train":
        for name, flags in (("compiled", ()), ("eager", ("--no-compile",)),
                            ("compiled, Muon", ("--optimizer", "muon"))):
            works[f"ours, {name}"] = make_steps, own | {"flags": flags}
        if args.nanogpt:
            other = dict(folder=args.nanogpt, rows=rows, steps=args.steps)
            works["nanoGPT, compiled"] = make_nanogpt, other
    elif args.what == "lora":
        works["rank 8 over nf4"] = make_steps, own | {"prepare": adapted_model}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if args.what == "write":
            state = new_model(preset, None).state_dict()
            lm.export_hf({"config": vars(config), "model": state}, folder)
            new = min(256, config.context - 32)
            works["eager"] = make_writer, dict(preset=preset, new=new)
            works["CUDA graphs"] = make_writer, dict(preset=preset, new=new, graphs=True)
            works["transformers"] = make_writer, dict(preset=preset, new=new, folder=folder)
            show(take_turns(works, args.rounds), new)
        else:
            tokens = rows * config.context * args.steps
            show(take_turns(works, args.rounds), tokens, lm.flops_per_token(config))
    print(f"({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
