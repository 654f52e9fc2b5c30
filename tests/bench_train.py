"""How fast train.py is, and how fast its recipe learns, beside nanoGPT and the course's model.

    git clone https://github.com/karpathy/nanoGPT
    git clone https://github.com/waylandzhang/Transformer-from-scratch
    python tests/bench_train.py speed --nanogpt nanoGPT --course Transformer-from-scratch
    python tests/bench_train.py memory --nanogpt nanoGPT
    python tests/bench_train.py learning --nanogpt nanoGPT
    python tests/bench_train.py prepare

speed: tokens a second of whole steps (forward, backward, clipping, AdamW), ours and the peer's in
turn on the same batch, in fp32 and bf16. The peers get what their own scripts do, bf16 by autocast.

memory: the same for one row of 1,024 tokens (or --rows), each variant in a process of its own, for
its peak.

learning: nanoGPT's model and optimizer with its own CPU setting (tiny Shakespeare by characters,
4 layers, 128 wide, context 64, batch 12, 2,000 steps), and train.py in the same shape, batch and
context with AdamW and with Muon. Losses are nats per character over the *whole* validation split,
in the same non-overlapping windows; seconds are of training alone.

prepare: prepare_data.py on a gigabyte of text with gpt2's ids, and tiktoken alone.

It is a benchmark, not a test: pytest does not collect it. Prints markdown tables for
tests/BENCHMARKS.md; ten minutes each on two cores, half an hour for speed.
"""

import argparse
import contextlib
import io
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from bench_common import (
    about_machine,
    clocked,
    load_module,
    matmul_rate,
    our_step,
    random_batches,
    table,
    take_turns,
)

import model as lm
import prepare_data
import train
from data.machine import DTYPES

STEPS, EVERY, BATCH, CONTEXT = 2000, 100, 12, 64
SHAPE = "--n_layer 4 --n_head 4 --d_model 128 --context 64 --batch_size 12".split()  # noqa: SIM905


@torch.no_grad()
def whole_loss(loss_of, tokens):
    """Nats per token over all of `tokens` in windows of CONTEXT, for any summed-loss function."""
    n = (len(tokens) - 1) // CONTEXT * CONTEXT
    ids = torch.from_numpy(tokens[: n + 1].astype(np.int64))
    x, y = ids[:-1].view(-1, CONTEXT), ids[1:].view(-1, CONTEXT)
    return sum(loss_of(a, b) for a, b in zip(x.split(128), y.split(128))) / n


def run_nanogpt(folder, data):
    """nanoGPT's model, optimizer, schedule and batches: [(step, seconds, val loss)]."""
    nanogpt = load_module(Path(folder) / "model.py", "nanogpt_model")
    tokens = torch.from_numpy(np.array(prepare_data.read_tokens(data, "train")).astype(np.int64))
    val = prepare_data.read_tokens(data, "val")
    torch.manual_seed(1337)
    # its README: train.py config/train_shakespeare_char.py --device=cpu --compile=False
    #   --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000
    #   --lr_decay_iters=2000 --dropout=0.0
    config = nanogpt.GPTConfig(
        block_size=CONTEXT, vocab_size=65, n_layer=4, n_head=4, n_embd=128, dropout=0.0, bias=False
    )
    model = nanogpt.GPT(config)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    points, seconds = [], 0.0
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            model.eval()
            loss = whole_loss(lambda a, b: model(a, b)[1].item() * a.numel(), val)
            model.train()
            points.append((step, seconds, loss))
        start = time.perf_counter()
        decay = 0.5 * (1 + math.cos(math.pi * (step - 100) / (STEPS - 100)))
        lr = 1e-3 * (step + 1) / 101 if step < 100 else 1e-4 + decay * 9e-4
        for group in optimizer.param_groups:
            group["lr"] = lr
        at = torch.randint(len(tokens) - CONTEXT, (BATCH,))
        x = torch.stack([tokens[i : i + CONTEXT] for i in at])
        y = torch.stack([tokens[i + 1 : i + 1 + CONTEXT] for i in at])
        _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds += time.perf_counter() - start
    return points


def run_ours(data, steps, flags):
    """train.py in the same shape: [(step, seconds, val loss)]."""
    out = Path("out") / "-".join(["bench", str(steps), *flags]).replace("--", "")
    command = ["--data", str(data), *SHAPE, "--max_steps", str(steps), "--out", str(out), *flags]
    command += ["--eval_every", str(EVERY), "--eval_tokens", "0", "--log_every", str(EVERY)]
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(command)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = {r["step"]: r["seconds"] for r in rows if "seconds" in r}
    seen = {r["step"]: r["val_loss"] for r in rows if "val_loss" in r}
    return [(s, seconds[s], loss) for s, loss in sorted(seen.items()) if s in seconds]


def learning_table(runs):
    """Validation loss by step, one column a run, and what each needs for nanoGPT's last loss."""
    lines = ["| step | tokens | " + " | ".join(runs) + " |", "| --- " * (len(runs) + 2) + "|"]
    for step in (100, 200, 300, 400, 500, 600, 800, 1000, 1200, 1400, 1600, 1800, 2000):
        cells = []
        for points in runs.values():
            hit = [f"{loss:.3f} ({sec:.0f} s)" for s, sec, loss in points if s == step]
            cells.append(hit[0] if hit else "")
        if any(cells):
            lines.append(f"| {step} | {step * BATCH * CONTEXT:,} | " + " | ".join(cells) + " |")
    goal = runs["nanoGPT"][-1][2] if "nanoGPT" in runs else 1.898
    for name, points in runs.items():
        reached = [(s, sec) for s, sec, loss in points if loss <= goal]
        when = "not reached"
        if reached:
            step, sec = reached[0]
            when = f"step {step}, {step / STEPS:.2f} of nanoGPT's tokens, {sec:.0f} s"
        lines.append(f"\n{name}: last {points[-1][2]:.4f}; {goal:.3f} reached: {when}")
    return "\n".join(lines)


def learning(args):
    """The losses of nanoGPT and ours by steps and seconds."""
    nanogpt = Path(args.nanogpt).resolve() if args.nanogpt else None
    source = str(Path(args.source).resolve()) if Path(args.source).exists() else args.source
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        data = prepare_data.prepare(source, "char", name="shakespeare")
        runs = {"nanoGPT": run_nanogpt(nanogpt, data)} if nanogpt else {}
        for steps, flags in (
            (660, []),
            (400, ["--optimizer", "muon"]),
            (2000, []),
            (2000, ["--optimizer", "muon"]),
        ):
            name = f"ours, {flags[-1] if flags else 'adamw'}, {steps} steps"
            runs[name] = run_ours(data, steps, flags)
    print(learning_table(runs))


def peer_step(model, optimizer, batches, bf16=False, clip=1.0, steps=1):
    """A work: steps as the peers' scripts make them."""

    def work():
        for _ in range(steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                _, loss = model(*next(batches))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()

    return work


GPT2 = dict(block_size=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768, bias=True)
CHARS = dict(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128, bias=False)


def nanogpt_model(folder, shape):
    """nanoGPT's model and AdamW."""
    module = load_module(Path(folder) / "model.py", "nanogpt_model")
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(module.GPTConfig(dropout=0.0, **shape))
        return model, model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")


def course_model(folder):
    """The course's 140.57M model and AdamW."""
    model = load_module(Path(folder) / "scifi-demo" / "model.py", "course_model").Model()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def our_small():
    """nanoGPT's 0.8M shape in our model."""
    shape = dict(vocab_size=65, n_layer=4, n_head=4, d_model=128, context=64, position="learned")
    return lm.Config(**shape, norm="layernorm", activation="gelu", tied=True, init="gpt2")


def shape_of(case):
    """(our Config, rows, length, steps a round) of a case."""
    return {
        "GPT-2 124M, 4 x 256": (lm.preset("gpt2", vocab_size=50304), 4, 256, 1),
        "0.8M, 12 x 64": (our_small(), 12, 64, 100),
        "novel 140.57M, 4 x 128": (lm.preset("novel", dropout=0.1), 4, 128, 1),
    }[case]


def make_peer(case, folder, bf16):
    """The work of a case's peer."""
    config, rows, length, steps = shape_of(case)
    batches = random_batches(config.vocab_size, rows, length)
    if "novel" in case:  # the course does not clip
        return peer_step(*course_model(folder), batches, bf16, 0, steps)
    shape = GPT2 if "GPT-2" in case else CHARS
    return peer_step(*nanogpt_model(folder, shape), batches, bf16, 1.0, steps)


def make_ours(case, dtype):
    """Our work of a case."""
    config, rows, length, steps = shape_of(case)
    batches = random_batches(config.vocab_size, rows, length)
    return our_step(lm.Transformer(config), batches, dtype, steps)


def speed(args):
    """Steps of ours and the peers' in turn."""
    for case, peer, folder in (
        ("GPT-2 124M, 4 x 256", "nanoGPT", args.nanogpt),
        ("0.8M, 12 x 64", "nanoGPT", args.nanogpt),
        ("novel 140.57M, 4 x 128", "the course", args.course),
    ):
        config, rows, length, steps = shape_of(case)
        for dtype in ("fp32",) if "0.8M" in case else ("fp32", "bf16"):
            works = {peer: (make_peer, dict(case=case, folder=folder, bf16=dtype == "bf16"))}
            works = (works if folder else {}) | {"ours": (make_ours, dict(case=case, dtype=dtype))}
            # the floor is that of its matrix products, attention at this length counted
            flops = lm.flops_per_token(replace(config, context=length))
            floor = matmul_rate(DTYPES[dtype]) / flops
            seconds = take_turns(works, args.rounds)
            print(f"\n{case}, {dtype}:\n")
            tokens = rows * length * steps
            print(table(seconds, tokens, "tokens/s", next(iter(works)), floor), flush=True)


VARIANTS = ("nanoGPT", "ours", "ours --grad_checkpoint")


def one_variant(args):
    """In a process of its own: seconds of each step of a variant, and its peak memory."""
    import resource  # Unix alone has it, and tests import what is above

    batches = random_batches(50304, args.rows, 1024)
    if args.variant == "nanoGPT":
        work = peer_step(*nanogpt_model(args.nanogpt, GPT2), batches)
    else:
        model = lm.Transformer(lm.preset("gpt2", vocab_size=50304))
        model.grad_checkpoint = "checkpoint" in args.variant
        work = our_step(model, batches)
    seconds = [clocked(work) for _ in range(args.rounds + 1)][1:]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "peak": before * 1024}))


def memory(args):
    """Seconds and peak of the variants, each a few times in turn."""
    seconds, peaks = {v: [] for v in VARIANTS if args.nanogpt or v != "nanoGPT"}, {}
    for _ in range(2):
        for v in seconds:
            command = [sys.executable, __file__, "one", "--variant", v, "--rounds", "3"]
            command += ["--rows", str(args.rows)]
            command += ["--nanogpt", args.nanogpt] if args.nanogpt else []
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            seconds[v] += found["seconds"]
            peaks[v] = found["peak"]
    print(f"\nGPT-2 124M, {args.rows} x 1024, fp32:\n")
    print(table(seconds, args.rows * 1024, "tokens/s", next(iter(seconds))))
    print("\npeak of the process: " + ", ".join(f"{v} {p / 1e9:.2f} GB" for v, p in peaks.items()))


def prepare(args):
    """MB/s of prepare_data.py on a large text, and of tiktoken alone on one thread."""
    import tiktoken

    text = "".join(p.read_text(encoding="utf-8", errors="ignore") for p in stdlib_files())
    encoding = tiktoken.get_encoding("gpt2")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        size = args.megabytes * 1_000_000
        with open("big.txt", "w", encoding="utf-8") as f:
            while f.tell() < size:
                f.write(text)
        size = Path("big.txt").stat().st_size
        script = str(Path(prepare_data.__file__))
        command = [sys.executable, script, "big.txt", "--tokenizer", "gpt2"]
        # a process begins with its parent's peak: let a small one start it
        small = "import resource as r, subprocess as s, sys; s.run(sys.argv[1:], check=True); "
        small += "print(r.getrusage(r.RUSAGE_CHILDREN).ru_maxrss * 1024)"
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", small, *command], check=True, text=True,
                              stdout=subprocess.PIPE)  # fmt: skip
        ours, peak = time.perf_counter() - start, int(done.stdout.split()[-1])
    one = clocked(lambda: encoding.encode_ordinary(text))
    alone = len(text.encode()) / one / 1e6
    print(f"prepare_data.py {size / ours / 1e6:.1f} MB/s, peak of its largest process "
          f"{peak / 1e6:.0f} MB; tiktoken alone, one thread, {alone:.1f} MB/s")


def stdlib_files():
    """The source files that the default corpus is made of."""
    return sorted(Path(argparse.__file__).parent.glob("*.py"))


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("what", choices=("speed", "memory", "learning", "prepare", "one"))
    p.add_argument("--nanogpt", help="a clone of karpathy/nanoGPT; without it only ours is run")
    p.add_argument("--course", help="a clone of waylandzhang/Transformer-from-scratch")
    p.add_argument("--rounds", type=int, default=5, help="turns that each work has (5)")
    p.add_argument("--source", default="shakespeare", help="for learning (shakespeare)")
    p.add_argument("--megabytes", type=int, default=1000, help="of text to prepare (1000)")
    p.add_argument("--rows", type=int, default=1, help="of 1,024 tokens, for memory (1)")
    p.add_argument("--variant", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.what == "one":
        one_variant(args)
        return
    print(about_machine())
    {"speed": speed, "memory": memory, "learning": learning, "prepare": prepare}[args.what](args)


if __name__ == "__main__":
    main()
