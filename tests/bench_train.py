"""How fast the recipe learns, beside nanoGPT's own on the same text, shape and machine.

    git clone https://github.com/karpathy/nanoGPT
    python tests/bench_train.py --nanogpt nanoGPT

trains, one after the other in one process each: nanoGPT's model and optimiser with its own CPU
setting (tiny Shakespeare by characters, 4 layers, 128 wide, context 64, batch 12, 2,000 steps), and
train.py in the same shape, batch and context with AdamW and with Muon. Losses are nats per
character over the *whole* validation split, in the same non-overlapping windows; seconds are of
training alone. Prints markdown tables for tests/BENCHMARKS.md.

It is a benchmark, not a test: pytest does not collect it. About ten minutes on two cores.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import prepare_data  # noqa: E402
import train  # noqa: E402

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
    """nanoGPT's model, optimiser, schedule and batches: [(step, seconds, val loss)]."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
    nanogpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
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


def table(runs):
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


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--nanogpt", help="a clone of karpathy/nanoGPT; without it only ours is run")
    p.add_argument("--source", default="shakespeare", help="for prepare_data.py (shakespeare)")
    args = p.parse_args()
    nanogpt = Path(args.nanogpt).resolve() if args.nanogpt else None
    source = str(Path(args.source).resolve()) if Path(args.source).exists() else args.source
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch "
          f"{torch.__version__}, {time.strftime('%Y-%m-%d')}")
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
    print(table(runs))


if __name__ == "__main__":
    main()
