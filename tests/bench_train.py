"""How fast train.py is, compared with nanoGPT.

    git clone https://github.com/karpathy/nanoGPT
    python tests/bench_train.py --nanogpt nanoGPT

Tokens a second of whole steps (forward, backward, clipping, AdamW), ours and nanoGPT's in turn on
the same batches, in fp32 and bf16, which nanoGPT gets by autocast. Prints markdown tables for
tests/BENCHMARKS.md; a quarter of an hour on two cores.
"""

import argparse
from dataclasses import replace

import bench_common as bench
import torch

import model as lm
from data.machine import measure_peak

GPT2 = dict(block_size=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768, bias=True)
CHARS = dict(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128, bias=False)

# nanoGPT's 0.8M shape in our model
SMALL = lm.Config(vocab_size=65, n_layer=4, n_head=4, d_model=128, context=64, tied=True,
                  position="learned", norm="layernorm", activation="gelu", init="gpt2")
# {case: (our Config, nanoGPT's shape, rows, length, steps a round)}
CASES = {
    "GPT-2 124M, 4 x 256": (lm.preset("gpt2", vocab_size=50304), GPT2, 4, 256, 1),
    "0.8M, 12 x 64": (SMALL, CHARS, 12, 64, 100),
}


def make_nanogpt(case, folder, bf16):
    """The job of a case in nanoGPT."""
    config, shape, rows, length, steps = CASES[case]
    model, optimizer = bench.load_nanogpt(folder, (0.1, 6e-4, (0.9, 0.95)), **shape)
    batches = bench.random_batches(config.vocab_size, rows, length)
    return bench.peer_step(model, optimizer, batches, bf16, steps=steps)


def make_ours(case, dtype):
    """Our job of a case."""
    config, _, rows, length, steps = CASES[case]
    batches = bench.random_batches(config.vocab_size, rows, length)
    return bench.our_step(lm.Transformer(config), batches, dtype, steps=steps)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--nanogpt", help="a clone of karpathy/nanoGPT; without it only ours is run")
    p.add_argument("--rounds", type=int, default=5, help="turns that each job has (5)")
    args = p.parse_args()
    print(bench.about_machine() + "\n")
    for case, (config, _, rows, length, steps) in CASES.items():
        for dtype in ("fp32",) if "0.8M" in case else ("fp32", "bf16"):
            theirs = dict(case=case, folder=args.nanogpt, bf16=dtype == "bf16")
            jobs = {"nanoGPT": (make_nanogpt, theirs)} if args.nanogpt else {}
            jobs["ours"] = make_ours, dict(case=case, dtype=dtype)
            # the floor is that of its matrix products, attention at this length counted
            flops = lm.flops_per_token(replace(config, context=length))
            floor = measure_peak(torch.device("cpu"), dtype) / flops
            seconds = bench.take_turns(jobs, args.rounds)
            print(f"\n{case}, {dtype}:\n")
            tokens = rows * length * steps
            print(bench.table(seconds, tokens, "tokens/s", next(iter(jobs)), floor), flush=True)


if __name__ == "__main__":
    main()
