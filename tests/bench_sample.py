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

NEW, PROMPT = 128, 32


def ours(model, prompts, new=NEW, **settings):
    """A work: generate as sample.py does, its settings greedy."""
    settings = {"temperature": 0, "slide": lambda kept: None, **settings}

    def work():
        for _ in sample.generate(model, prompts, new, **settings):
            pass

    return work


def low(model, dtype=torch.bfloat16):
    """The same model with its weights in `dtype`."""
    content = {"config": vars(model.config), "model": model.state_dict()}
    return lm.model_from_checkpoint(content, dtype=dtype)


def theirs(model, prompts, new=NEW):
    """A work: transformers' generate, greedy, with its cache."""
    ids = torch.tensor(prompts)
    how = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **how)


@torch.no_grad()
def no_cache(model, prompt, new=NEW):
    """nanoGPT's and the course's generate."""
    model.generate(torch.tensor([prompt]), new)


def gpt2(args):
    """The 124M shape: one row, then eight."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = lm.Transformer(lm.preset("gpt2")).eval()
    with tempfile.TemporaryDirectory() as folder:
        lm.export_hf({"config": vars(model.config), "model": model.state_dict()}, folder)
        load = transformers.AutoModelForCausalLM.from_pretrained
        hf = {d: load(folder, dtype=lm.DTYPES[d]).eval() for d in ("fp32", "bf16")}
    rows = torch.randint(50257, (8, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    weights = sum(p.numel() for n, p in model.named_parameters() if n != "position.weight")
    for prompts in (rows[:1], rows):
        n = len(prompts)
        works = {f"transformers {d}": theirs(m, prompts) for d, m in hf.items()}
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            works[f"ours {name} --plain"] = ours(low(model, dtype), prompts)
            works[f"ours {name}"] = ours(lm.Decoder(low(model, dtype), rows=n), prompts)
        works["ours int8"] = ours(lm.Decoder(copy.deepcopy(model), True, rows=n), prompts)
        if n == 1 and args.nanogpt:
            peer = nanogpt_model(args.nanogpt, **GPT2)[0].eval()
            works["nanoGPT fp32"] = partial(no_cache, peer, prompts[0])
        if n == 1 and args.course:
            peer = course_model(args.course)[0].eval()
            works["the course, its own 140.57M, fp32"] = partial(no_cache, peer, prompts[0])
        floor = read_rate() / (4 * weights)
        print(f"\nGPT-2 124M, {PROMPT} + {NEW} tokens, {n} row(s):\n")
        seconds = take_turns(works, args.rounds)
        print(table(seconds, NEW * n, "tokens/s", "transformers fp32"))
        floors = (f"{n * k * floor:.0f} {d}" for k, d in ((1, "fp32"), (2, "bf16"), (4, "int8")))
        print(f"\nfloor by bytes: {', '.join(floors)}; x transformers bf16:\n", flush=True)
        print(table({k: v for k, v in seconds.items() if "bf16" in k}, NEW * n, "tokens/s",
                    "transformers bf16"))


def small(args):
    """0.8M parameters, 500 tokens: there the operations count, not the bytes."""
    model = lm.Transformer(our_small()).eval()
    settings = dict(temperature=0.8, top_k=64)
    works = {"ours --plain": ours(model, [[0]], 500, **settings)}
    works["ours"] = ours(lm.Decoder(copy.deepcopy(model)), [[0]], 500, **settings)
    tiny = lm.Transformer(lm.preset("tiny")).eval()
    works["ours, default model (1.9M), top_p 0.95"] = ours(
        lm.Decoder(tiny), [[0]], 500, temperature=0.8, top_p=0.95
    )
    peer = "ours --plain"
    if args.nanogpt:
        theirs = nanogpt_model(args.nanogpt, **CHARS)[0].eval()
        start, peer = torch.zeros(1, 1, dtype=torch.long), "nanoGPT"
        works[peer] = torch.no_grad()(
            lambda: theirs.generate(start, 500, temperature=0.8, top_k=64)
        )
    print("\n0.8M parameters, 500 tokens:\n")
    print(table(take_turns(works, args.rounds), 500, "tokens/s", peer))


def start(args):
    """The whole process of sample.py on a tiny model, and of nanoGPT's sample.py."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        with contextlib.redirect_stdout(io.StringIO()):
            data = prepare_data.prepare("shakespeare", "char", name="shakespeare")
            run_ours(data, 2, [])
        flags = ["--prompt", "x", "--max_tokens", "10", "--top_k", "20"]
        run = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL)
        works = {"import torch": partial(run, [sys.executable, "-c", "import torch"])}
        works["ours"] = partial(run, [sys.executable, str(ROOT / "sample.py"), *flags])
        peer = "ours"
        if args.nanogpt:
            peer, module = "nanoGPT", nanogpt_model(args.nanogpt, **CHARS)[0]
            os.makedirs("theirs")
            torch.save({"model_args": dict(CHARS, dropout=0.0), "model": module.state_dict(),
                        "config": {}}, "theirs/ckpt.pt")  # fmt: skip
            script = str(Path(args.nanogpt, "sample.py").resolve())
            more = "--out_dir=theirs --device=cpu --dtype=float32 --start=x --num_samples=1"
            command = [sys.executable, script, *more.split(), "--max_new_tokens=10"]
            works[peer] = partial(run, command)
        print("\nwhole process, 10 tokens:\n")
        print(table(take_turns(works, args.rounds), 1, "per second", peer))


@torch.no_grad()
def perplexity(model, tokens, length):
    """exp of the mean negative log-likelihood over windows of `length`, a token after another where
    it is a Decoder (so with one row a product, as in writing)."""
    total = count = 0
    for at in range(0, len(tokens) - length, length):
        ids = torch.from_numpy(tokens[at : at + length + 1].astype(np.int64))[None]
        cache, logits = lm.KVCache(model, 1, length), []
        for part in ids[:, :-1].split(1 if isinstance(model, lm.Decoder) else length, dim=1):
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
        "fp32, Decoder": lm.Decoder(copy.deepcopy(plain)),
        "bf16, Decoder": lm.Decoder(low(plain)),
        "int8, Decoder": lm.Decoder(copy.deepcopy(plain), int8=True),
    }
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
    print(about_machine())
    {"gpt2": gpt2, "small": small, "start": start, "int8": int8}[args.what](args)


if __name__ == "__main__":
    main()
