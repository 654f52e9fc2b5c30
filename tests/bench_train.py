"""How fast train.py, finetune.py and mnist.py are, beside nanoGPT, the course's model, peft and a
DataLoader, and how fast the recipe learns.

    git clone https://github.com/karpathy/nanoGPT
    git clone https://github.com/waylandzhang/Transformer-from-scratch
    python tests/bench_train.py speed --nanogpt nanoGPT --course Transformer-from-scratch
    python tests/bench_train.py learning --nanogpt nanoGPT
    python tests/bench_train.py lora
    python tests/bench_train.py mnist
    python tests/bench_train.py load

speed: tokens a second of whole steps (forward, backward, clipping, AdamW), ours and the peer's in
turn on the same batch, in fp32 and bf16. The peers get what their own scripts do, bf16 by autocast.

learning: nanoGPT's model and optimizer with its own CPU setting (tiny Shakespeare by characters,
4 layers, 128 wide, context 64, batch 12, 2,000 steps), and train.py in the same shape with AdamW
and with Muon. Losses are nats per character over the *whole* validation split.

lora: steps of rank 8 adapters on attention, 124M, 8 rows of 32 tokens, and peft's. mnist: epochs of
the course's network on images in memory, and through a DataLoader that converts each image when it
is asked for. load: peak memory while real weights are loaded, beside the size of their file.

It is a benchmark, not a test: pytest does not collect it. Prints markdown tables for
tests/BENCHMARKS.md; two to ten minutes each on two cores, half an hour for speed.
"""

import argparse
import contextlib
import io
import json
import math
import multiprocessing as mp
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from bench_common import (
    about_machine,
    load_module,
    matmul_rate,
    our_step,
    random_batches,
    table,
    take_turns,
)

import lora
import mnist
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
    # as its README's command for a CPU
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
    """Validation losses by step, and the first step with nanoGPT's last loss, of {name: points}."""
    steps = [step for step, _, _ in next(iter(runs.values()))][::4]
    lines = ["| step | " + " | ".join(map(str, steps)) + " | nanoGPT's last loss at |"]
    lines.append("| --- " * (len(steps) + 2) + "|")
    goal = runs["nanoGPT"][-1][2] if "nanoGPT" in runs else 1.898
    for name, points in runs.items():
        losses = {step: f"{loss:.3f}" for step, _, loss in points}
        reached = [f"step {step}, {sec:.0f} s" for step, sec, loss in points if loss <= goal]
        cells = [losses.get(step, "") for step in steps] + [*reached, "never"][:1]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
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
    """A job: steps as the peers' scripts make them."""

    def job():
        for _ in range(steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                _, loss = model(*next(batches))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()

    return job


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
    """The job of a case's peer."""
    config, rows, length, steps = shape_of(case)
    batches = random_batches(config.vocab_size, rows, length)
    if "novel" in case:  # the course does not clip
        return peer_step(*course_model(folder), batches, bf16, 0, steps)
    shape = GPT2 if "GPT-2" in case else CHARS
    return peer_step(*nanogpt_model(folder, shape), batches, bf16, 1.0, steps)


def make_ours(case, dtype):
    """Our job of a case."""
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
            jobs = {peer: (make_peer, dict(case=case, folder=folder, bf16=dtype == "bf16"))}
            jobs = (jobs if folder else {}) | {"ours": (make_ours, dict(case=case, dtype=dtype))}
            # the floor is that of its matrix products, attention at this length counted
            flops = lm.flops_per_token(replace(config, context=length))
            floor = matmul_rate(DTYPES[dtype]) / flops
            seconds = take_turns(jobs, args.rounds)
            print(f"\n{case}, {dtype}:\n")
            tokens = rows * length * steps
            print(table(seconds, tokens, "tokens/s", next(iter(jobs)), floor), flush=True)


def make_peft(folder, dtype):
    """A job: a step of peft's LoRA over the exported model."""
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["c_attn", "attn.c_proj"], fan_in_fan_out=True
    )
    model, batches = peft.get_peft_model(base, config).train(), random_batches(50257, 8, 32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    # transformers shifts the labels itself
    run = lambda ids, _: (None, model(input_ids=ids, labels=ids).loss)  # noqa: E731
    run.parameters = model.parameters
    return peer_step(run, optimizer, batches)


def make_lora(quantized, dtype):
    """A job: a step of finetune.py's LoRA over a base that is perhaps quantized."""
    torch.manual_seed(0)
    model = lm.Transformer(lm.preset("gpt2"))
    if quantized:
        lora.quantize(model, quantized)
    lora.add_lora(model, "attention", rank=8, alpha=16)
    return our_step(model, random_batches(50257, 8, 32), dtype)


def lora_steps(args):
    """Steps of ours and peft's LoRA in turn."""
    with tempfile.TemporaryDirectory() as folder:
        model = lm.Transformer(lm.preset("gpt2"))
        lm.export_hf({"config": vars(model.config), "model": model.state_dict()}, folder)
        jobs = {f"peft {d}": (make_peft, dict(folder=folder, dtype=d)) for d in ("fp32", "bf16")}
        for base, dtype in ((None, "fp32"), (None, "bf16"), ("int8", "fp32"), ("nf4", "bf16")):
            settings = dict(quantized=base, dtype=dtype)
            jobs[f"ours {dtype}, {base or 'full'} base"] = make_lora, settings
        seconds = take_turns(jobs, args.rounds)
    print(table(seconds, 8, "samples/s", "peft fp32"))


class Converting(torch.utils.data.Dataset):
    """Images converted one at a time, in the steps of torchvision's ToTensor and Normalize."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        from PIL import Image

        image = np.array(Image.fromarray(self.images[i]), np.uint8, copy=True)
        image = torch.from_numpy(image).view(28, 28, 1).permute(2, 0, 1).contiguous().float()
        return image.div(255).sub_(mnist.MEAN).div_(mnist.STD), int(self.labels[i])


def make_loader(folder):
    """A job: an epoch through the DataLoader."""
    (images, labels), _ = mnist.load_mnist(folder=folder)
    raw = ((images * mnist.STD + mnist.MEAN) * 255).round().byte().numpy()
    loader = torch.utils.data.DataLoader(Converting(raw, labels.numpy()), batch_size=64)

    def job():
        model = mnist.MLP().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for x, y in loader:
            optimizer.zero_grad()
            F.nll_loss(model(x), y).backward()
            optimizer.step()

    return job


def make_epoch(folder):
    """A job: an epoch of mnist.fit."""
    (images, labels), _ = mnist.load_mnist(folder=folder)
    args = mnist.build_parser().parse_args(["--epochs", "1", "--out", "unused"])
    mnist.settle(args)

    def job():
        run = mnist.Run(mnist.MLP(), args, len(images))
        mnist.fit(run, images, labels, lambda model, x, y: F.nll_loss(model(x), y), dict)

    return job


def mnist_epochs(args):
    """Epochs of both in turn."""
    count = len(mnist.load_mnist(folder=args.data)[0][0])
    settings = dict(folder=args.data)
    jobs = {"DataLoader": (make_loader, settings), "mnist.py": (make_epoch, settings)}
    print(table(take_turns(jobs, args.rounds), count / 1000, "1,000 images/s", "mnist.py"))


def save_hf(kind, fields, folder):
    """Save a model of transformers with random weights."""
    import transformers

    config = getattr(transformers, kind)(**fields)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def measure_load(folder, dtype):
    """(bytes of the weights in memory, peak before loading, peak after a forward pass)."""
    import resource  # not on Windows

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model = lm.model_from_checkpoint(lm.load_hf(folder, DTYPES[dtype]), dtype=DTYPES[dtype])
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3, 4]]))
    weights = sum(p.nbytes for p in model.parameters())
    return weights, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load(args):
    """Peak memory of loading, in a process for each model and dtype."""
    llama = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=24,
                 num_attention_heads=16, vocab_size=32000, tie_word_embeddings=False)  # fmt: skip
    models = {"GPT2Config": dict(n_embd=1024, n_layer=24, n_head=16), "LlamaConfig": llama}
    print("| model | file | loaded as | weights | peak | of which torch |\n" + "| --- " * 6 + "|")
    for kind, fields in models.items():
        with tempfile.TemporaryDirectory() as folder:
            for dtype in (None, "fp32", "bf16"):
                with ProcessPoolExecutor(1, mp.get_context("spawn")) as pool:
                    if dtype is None:
                        pool.submit(save_hf, kind, fields, folder).result()
                        continue
                    sizes = pool.submit(measure_load, folder, dtype).result()
                size = sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
                weights, before, peak = (f"{n / 1e9:.2f} GB" for n in sizes)
                cells = f"{size / 1e9:.2f} GB | {dtype} | {weights} | {peak} | {before}"
                print(f"| {kind} | {cells} |")


def main():
    jobs = dict(speed=speed, learning=learning, lora=lora_steps, mnist=mnist_epochs, load=load)
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("what", choices=tuple(jobs))
    p.add_argument("--nanogpt", help="a clone of karpathy/nanoGPT; without it only ours is run")
    p.add_argument("--course", help="a clone of waylandzhang/Transformer-from-scratch")
    p.add_argument("--rounds", type=int, default=5, help="turns that each job has (5)")
    p.add_argument("--source", default="shakespeare", help="for learning (shakespeare)")
    p.add_argument("--data", help="a folder with MNIST's files (default: download)")
    args = p.parse_args()
    print(about_machine() + "\n")
    jobs[args.what](args)


if __name__ == "__main__":
    main()
