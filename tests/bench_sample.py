"""How fast sample.py's model writes, beside transformers, nanoGPT and the course's model.

    git clone https://github.com/karpathy/nanoGPT
    git clone https://github.com/waylandzhang/Transformer-from-scratch
    python tests/bench_sample.py gpt2 --nanogpt nanoGPT --course Transformer-from-scratch
    python tests/bench_sample.py small --nanogpt nanoGPT
    python tests/bench_sample.py start --nanogpt nanoGPT
    python tests/bench_sample.py int8 --ckpt out/stdlib --data data/stdlib

gpt2: 32 tokens of prompt and 128 new ones by the 124M shape with random weights, greedy; all in
turn. transformers and its own cache, fp32 and bf16; ours the same, and int8; then eight rows.

small: 500 tokens by 0.8M parameters at temperature 0.8, the context sliding.

start: the whole process of `sample.py --prompt x` on a tiny model, nanoGPT's sample.py the same.

int8: what the rounding of `--dtype int8` (and bf16) costs: perplexity of validation text.

It is a benchmark, not a test: pytest does not collect it. Prints markdown tables for
tests/BENCHMARKS.md; ten minutes on two cores.
"""

import argparse
import contextlib
import copy
import io
import math
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from bench_common import ROOT, about_machine, read_rate, table, take_turns
from bench_train import CHARS, GPT2, course_model, nanogpt_model, our_small, run_ours

import model as lm
import prepare_data
import sample
from data.machine import DTYPES
from data.matmul import make_fast

NEW, PROMPT = 128, 32


def low(model, dtype=torch.bfloat16):
    """The same model with its weights in `dtype`."""
    content = {"config": vars(model.config), "model": model.state_dict()}
    return lm.model_from_checkpoint(content, dtype=dtype)


def make_ours(config, prompts, new, kind="fp32", plain=False, **settings):
    """A work: generate as sample.py does."""
    torch.manual_seed(0)
    model = lm.Transformer(config).eval()
    model = low(model) if kind == "bf16" else model
    if not plain:
        make_fast(model, len(prompts), kind == "int8")

    def work():
        for _ in sample.generate(model, prompts, new, slide=lambda kept: None, **settings):
            pass

    return work


def make_transformers(folder, prompts, dtype):
    """A work: transformers' generate, greedy, with its cache."""
    import transformers

    transformers.logging.set_verbosity_error()
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, ids = load(folder, dtype=DTYPES[dtype]).eval(), torch.tensor(prompts)
    how = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **how)


def make_peer(folder, prompt, new, shape=None, **settings):
    """A work: nanoGPT's generate, or the course's, which remember nothing between tokens."""
    model = (nanogpt_model(folder, shape) if shape else course_model(folder))[0].eval()
    return torch.no_grad()(lambda: model.generate(torch.tensor([prompt]), new, **settings))


def gpt2(args):
    """The 124M shape: one row, then eight."""
    torch.manual_seed(0)
    config = lm.preset("gpt2")
    model = lm.Transformer(config)
    weights = model.head.weight.numel() + sum(p.numel() for p in model.blocks.parameters())
    rows = torch.randint(50257, (8, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        lm.export_hf({"config": vars(config), "model": model.state_dict()}, folder)
        for prompts in (rows[:1], rows):
            n, works, peers = len(prompts), {}, {}
            for dtype in ("fp32", "bf16"):
                hf = dict(folder=folder, prompts=prompts, dtype=dtype)
                works[f"transformers {dtype}"] = make_transformers, hf
            for kind in ("fp32", "bf16", "int8"):
                own = dict(config=config, prompts=prompts, new=NEW, kind=kind, temperature=0)
                if kind != "int8":
                    works[f"ours {kind} --no_fast"] = make_ours, own | {"plain": True}
                works[f"ours {kind}"] = make_ours, own
            if n == 1 and args.nanogpt:
                own = dict(folder=args.nanogpt, prompt=prompts[0], new=NEW, shape=GPT2)
                peers["nanoGPT fp32"] = make_peer, own
            if n == 1 and args.course:
                own = dict(folder=args.course, prompt=prompts[0], new=NEW)
                peers["the course, its own 140.57M, fp32"] = make_peer, own
            seconds = take_turns(works | peers, args.rounds)
            print(f"\nGPT-2 124M, {PROMPT} + {NEW} tokens, {n} row(s):\n")
            print(table(seconds, NEW * n, "tokens/s", "transformers fp32"))
            rate = n * read_rate() / (4 * weights)
            print(f"\nfloor by bytes: {rate:.0f} fp32, {2 * rate:.0f} bf16, {4 * rate:.0f} int8\n")
            bf16 = {k: v for k, v in seconds.items() if "bf16" in k}
            print(table(bf16, NEW * n, "tokens/s", "transformers bf16"), flush=True)


def small(args):
    """0.8M parameters, 500 tokens: there the operations count, not the bytes."""
    own = dict(config=our_small(), prompts=[[0]], new=500, temperature=0.8, top_k=64)
    tiny = dict(config=lm.preset("tiny"), prompts=[[0]], new=500, temperature=0.8, top_p=0.95)
    works = {"ours --no_fast": (make_ours, own | {"plain": True}), "ours": (make_ours, own)}
    works["ours, the default model (1.9M), top_p 0.95"] = make_ours, tiny
    peer = "ours --no_fast"
    if args.nanogpt:
        peer, own = "nanoGPT", dict(folder=args.nanogpt, prompt=[0], new=500, shape=CHARS)
        works[peer] = make_peer, own | dict(temperature=0.8, top_k=64)
    print("\n0.8M parameters, 500 tokens:\n")
    print(table(take_turns(works, args.rounds), 500, "tokens/s", peer))


def make_command(command, cwd):
    """A work: the whole of a process."""
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return partial(subprocess.run, command, check=True, cwd=cwd, **quiet)


def start(args):
    """The whole process of sample.py on a tiny model, and of nanoGPT's sample.py."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        with contextlib.redirect_stdout(io.StringIO()):
            data = prepare_data.prepare("shakespeare", "char", name="shakespeare")
            run_ours(data, 2, [])
        commands, peer = {"import torch": [sys.executable, "-c", "import torch"]}, "ours"
        flags = ["--prompt", "x", "--max_new_tokens", "10", "--top_k", "20"]
        commands["ours"] = [sys.executable, str(ROOT / "sample.py"), *flags]
        if args.nanogpt:
            peer, module = "nanoGPT", nanogpt_model(args.nanogpt, CHARS)[0]
            os.makedirs("theirs")
            content = {"model_args": dict(CHARS, dropout=0.0), "model": module.state_dict()}
            torch.save(content | {"config": {}}, "theirs/ckpt.pt")
            more = f"--out_dir={folder}/theirs --device=cpu --dtype=float32"
            more += " --start=!"  # whose id is 0
            script = str(Path(args.nanogpt, "sample.py"))
            more += " --num_samples=1 --max_new_tokens=10"
            commands[peer] = [sys.executable, script, *more.split()]
        print("\nwhole process, 10 tokens:\n")
        works = {name: (make_command, dict(command=c, cwd=folder)) for name, c in commands.items()}
        if args.nanogpt:  # its sample.py reads a file beside it
            works[peer][1]["cwd"] = args.nanogpt
        print(table(take_turns(works, args.rounds), 1, "a second", peer))


@torch.no_grad()
def perplexity(model, tokens, length):
    """exp of the mean negative log-likelihood over windows of `length`, a token after another (so
    with one row a product, as in writing)."""
    total = count = 0
    for at in range(0, len(tokens) - length, length):
        ids = torch.from_numpy(tokens[at : at + length + 1].astype(np.int64))[None]
        cache, logits = lm.KVCache(model, 1, length), []
        for part in ids[:, :-1].split(1, dim=1):
            logits.append(model.head(model.hidden(part, cache)[0]))
        losses = torch.cat(logits).float().log_softmax(-1).gather(1, ids[0, 1:, None])
        total, count = total - losses.sum().item(), count + length
    return math.exp(total / count)


def int8(args):
    """Perplexity of the first validation tokens by each kind of weights."""
    tokens = prepare_data.read_tokens(args.data, "val")[: args.tokens]
    content = lm.load_checkpoint(args.ckpt)
    plain = lm.model_from_checkpoint(content)
    length = plain.config.context
    kinds = {
        "fp32": plain,
        "bf16": low(plain),
        "int8": copy.deepcopy(plain),
    }
    make_fast(kinds["int8"], int8=True)
    print("| weights | perplexity | |\n| --- | ---: | ---: |")
    first = None
    for name, model in kinds.items():
        value = perplexity(model, tokens, length)
        first = first or value
        print(f"| {name} | {value:.4f} | {value / first - 1:+.3%} |", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("what", choices=("gpt2", "small", "start", "int8"))
    p.add_argument("--nanogpt", help="a clone of karpathy/nanoGPT")
    p.add_argument("--course", help="a clone of waylandzhang/Transformer-from-scratch")
    p.add_argument("--rounds", type=int, default=5, help="turns that each work has (5)")
    p.add_argument("--ckpt", default="out/stdlib", help="for int8")
    p.add_argument("--data", default="data/stdlib", help="for int8")
    p.add_argument("--tokens", type=int, default=20_000, help="of validation, for int8 (20,000)")
    args = p.parse_args()
    args.nanogpt = args.nanogpt and str(Path(args.nanogpt).resolve())
    print(about_machine())
    {"gpt2": gpt2, "small": small, "start": start, "int8": int8}[args.what](args)


if __name__ == "__main__":
    main()
