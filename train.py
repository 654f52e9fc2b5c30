"""Pretrain a language model: from token files to a model that writes.

    python train.py                                        the default corpus, three minutes
    python train.py --data sales --preset baby --max_steps 2000
    python train.py --data data/mynovel --optimizer muon
    python train.py --resume                               go on with the newest run
    torchrun --nproc_per_node 2 train.py --batch_size 6    several processes or GPUs

writes out/NAME/last.pt (all that resuming needs), best.pt (what sampling needs), metrics.jsonl and
loss.svg. Text becomes token files in prepare_data.py; train.py calls it if they are not there.

The chapters: the recipe, batches, optimizers and schedule, evaluation, what a run shows, then
`fit`, the one training loop (fine-tuning calls it, too), and the command line.
"""

import argparse
import contextlib
import gc
import math
import os
import signal
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

if __name__ == "__main__":  # no traceback for Ctrl-C during the slow imports; see `run_cli`
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import model as lm
from data.cli import (
    Parser,
    StopSignal,
    UserError,
    check_limits,
    is_out_of_memory,
    printable,
    run_cli,
)
from data.files import write_json
from data.machine import (
    BF16Copy,
    dtype_name,
    make_runtime,
    random_state,
    set_random_state,
    synchronize,
)
from data.plot import line_svg
from data.runs import Log, newest_run, run_folder
from data.tokenizer import Tokenizer
from prepare_data import data_hashes, find_data, read_meta, read_tokens

# --------------------------------------------------------------------------------------------
# The recipe: every default in one place
# --------------------------------------------------------------------------------------------

# Found by experiment on the default corpus with two CPU cores; tests/BENCHMARKS.md has the trials.
# What mattered most: the embedding (rows of standard deviation 1, each seen seldom) wants ten times
# the matrices' learning rate, the head, which starts at zero, three times. Then small batches, so
# that three minutes hold many steps, and a linear decay to zero (cosine ended 0.015 higher).
RECIPE = dict(
    batch_size=8, grad_accum=1, optimizer="adamw", schedule="linear", warmup_steps=60,
    lr=3e-3, embed_lr=3e-2, head_lr=1e-2, min_lr=0.0, weight_decay=0.1, beta1=0.9, beta2=0.99,
    grad_clip=1.0, eval_every=250, eval_tokens=32768, log_every=20, patience=0, seed=0,
)  # fmt: skip
_LARGE = dict(embed_lr=None, head_lr=None, beta2=0.95, warmup_steps=200, schedule="cosine")

# Differences for other shapes and optimizers. GPT-2's are customary values, not tried here.
RECIPES = {
    # orthogonalising costs the same for a larger batch
    "muon": dict(batch_size=12, weight_decay=0.0),
    "small": dict(lr=2e-3, batch_size=16),
    "baby": dict(lr=1.5e-3, batch_size=16),
    "gpt2": _LARGE | dict(lr=6e-4, batch_size=4),
    "gpt2-medium": _LARGE | dict(lr=3e-4, batch_size=2),
    "gpt2-large": _LARGE | dict(lr=2.5e-4, batch_size=1),
    "gpt2-xl": _LARGE | dict(lr=2e-4, batch_size=1),
    "novel": _LARGE | dict(lr=6e-4, batch_size=4),
}

# With --ckpt: the first steps must not undo what the weights have learned. Rates that are None
# follow from the model's size, see `settle_rates`.
GOING_ON = dict(lr=None, embed_lr=None, head_lr=None)

# Without --max_steps and --max_minutes: whichever of the two comes first.
DEFAULT_STEPS, DEFAULT_MINUTES = 2500, 2.9


# --------------------------------------------------------------------------------------------
# Batches: a pure function of (seed, row number)
# --------------------------------------------------------------------------------------------


class TokenLoader:
    """Windows of `context` + 1 tokens in a seeded random order, each once an epoch.

    An epoch cuts the text at a random phase into windows and permutes them, so no two epochs show
    the same cuts. Row r of the whole run is always the same window: resuming needs only the step,
    and processes that share a step each take their slice of its rows.
    """

    def __init__(self, tokens, context, seed):
        self.tokens, self.context, self.seed = tokens, context, seed
        possible = (len(tokens) - 1) // context
        if possible < 1:
            raise UserError(
                f"the training text has {len(tokens)} tokens, fewer than the context of {context} "
                f"plus one: use a shorter --context or more text"
            )
        self.n = max(1, possible - 1)  # one less leaves room for every phase
        self.epoch, self.starts = None, None

    def epoch_starts(self, epoch):
        """Where the windows of an epoch begin, (n,), in its order."""
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            room = len(self.tokens) - 1 - self.n * self.context
            phase = rng.integers(min(room, self.context - 1) + 1)
            self.epoch, self.starts = epoch, rng.permutation(self.n) * self.context + phase
        return self.starts

    def rows(self, first, count):
        """Rows first .. first + count - 1 of the run: ids and targets, both (count, context)."""
        at = [self.epoch_starts(r // self.n)[r % self.n] for r in range(first, first + count)]
        window = np.asarray(at)[:, None] + np.arange(self.context + 1)
        block = torch.from_numpy(self.tokens[window].astype(np.int64))
        return block[:, :-1].contiguous(), block[:, 1:].contiguous()


def micro_batches(loader, step, batch_size, grad_accum, rank=0, world=1):
    """This process's share of the rows of `step`, as `grad_accum` batches of `batch_size` rows."""
    first = (step * world + rank) * grad_accum * batch_size
    return [loader.rows(first + i * batch_size, batch_size) for i in range(grad_accum)]


# --------------------------------------------------------------------------------------------
# Optimizers and schedule
# --------------------------------------------------------------------------------------------


def orthogonalize(g, steps=5):
    """The nearest (semi-)orthogonal matrix to each matrix of g (..., rows, columns), roughly.

    An odd polynomial of X, iterated: singular values between 0 and 1 all end between 0.7 and 1.2,
    by nothing but matrix products (Newton-Schulz; coefficients by Keller Jordan, 2024).
    """
    x = g.bfloat16() if g.is_cuda else g.float()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the products below are of the smaller side
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for the matrices inside blocks (Keller Jordan, 2024).

    Adam scales each entry by its own history; Muon scales each *direction* of the whole matrix:
    every singular value of the step is about one, so rare directions are learned as fast as
    frequent ones. It costs a few matrix products a step and halves the
    steps to the same loss at our sizes.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = defaultdict(list)  # matrices of one shape go through the products together
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape].append(p)
            for shape, params in alike.items():
                grad = torch.stack([p.grad for p in params])
                for p, g in zip(params, grad):
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    state["momentum"].lerp_(g, 1 - group["momentum"])
                    g.lerp_(state["momentum"], group["momentum"])  # Nesterov: look one step ahead
                size = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                for p, direction in zip(params, orthogonalize(grad)):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(direction, alpha=size)


# To add an optimizer for the matrices inside blocks: {name: (class, its learning rate)}. The flag
# --NAME_lr changes the rate; what else it wants differently goes to RECIPES.
OPTIMIZERS = {"muon": (Muon, 0.02)}


def make_optimizers(model, args):
    """The optimizers over all parameters that want a gradient; each group keeps its "peak" lr.

    Read from args: optimizer, lr, embed_lr, head_lr (None: lr), NAME_lr of OPTIMIZERS,
    weight_decay, beta1, beta2. The matrices inside blocks, and `induction`, go to AdamW with decay,
    or to one of OPTIMIZERS. Everything else goes to AdamW without decay: it would shrink norms'
    scales and biases for nothing, and undo what rarely seen rows of the tables and head learned.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise UserError("nothing to train: no parameter wants a gradient")
    inner = {n for n, p in named if p.dim() == 2 and ("blocks." in n or n == "induction.weight")}
    matrices = [p for n, p in named if n in inner]
    # a tied table is embedding and head at once: neither's own learning rate suits it
    tied = model.config.tied
    tables = {} if tied else {"embed.weight": args.embed_lr, "head.weight": args.head_lr}
    tables |= {f"{name}.weight": args.embed_lr for name in ("value_embed", "bigram", "match")}
    groups = [dict(params=[p], lr=tables[n] or args.lr) for n, p in named if n in tables]
    others = [p for n, p in named if n not in tables and n not in inner]
    groups.append(dict(params=others, lr=args.lr))
    optimizers = []
    if args.optimizer in OPTIMIZERS and matrices:
        make, rate = OPTIMIZERS[args.optimizer][0], getattr(args, f"{args.optimizer}_lr")
        optimizers.append(make(matrices, lr=rate, weight_decay=args.weight_decay))
    else:
        groups.append(dict(params=matrices, lr=args.lr, weight_decay=args.weight_decay))
    groups = [g for g in groups if g["params"]]
    if groups:
        fused = all(p.device.type in ("cpu", "cuda") for g in groups for p in g["params"])
        optimizers.append(
            # eps far below the usual 1e-8: gradients of a *mean* over thousands of tokens are tiny
            torch.optim.AdamW(
                groups, betas=(args.beta1, args.beta2), eps=1e-10, weight_decay=0.0, fused=fused
            )
        )
    for group in (g for o in optimizers for g in o.param_groups):
        group["peak"] = group["lr"]
    return optimizers


# To add a schedule: the share of the peak that is left when a fraction f of the decay has passed.
SCHEDULES = {
    "cosine": lambda f: 0.5 * (1 + math.cos(math.pi * f)),
    "linear": lambda f: 1 - f,
    "wsd": lambda f: min(1.0, (1 - f) / 0.4),  # warmup, stable, decay over the last 40 %
    "constant": lambda f: 1.0,
}


def lr_at(step, fraction, lr, min_lr=0.0, warmup_steps=0, schedule="cosine"):
    """The learning rate of `step`: a linear warmup from lr / warmup_steps to lr, then `schedule`
    from lr to min_lr as `fraction` (of the run after the warmup) goes from 0 to 1."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    return min_lr + (lr - min_lr) * SCHEDULES[schedule](min(1.0, max(0.0, fraction)))


# --------------------------------------------------------------------------------------------
# Evaluation: fixed windows, in order, the same ones every time
# --------------------------------------------------------------------------------------------


def evaluate(model, tokens, byte_lengths, runtime, limit=None, context=None):
    """Loss over non-overlapping windows of `tokens`, every target once; a dict for metrics.

    All of the split, its last short window included, or `limit` tokens in evenly spread windows.
    A window has `context` targets, by default the model's context.
    val_loss is nats a token, val_ppl its exponential, val_bpb bits per byte of text (which compares
    across tokenizers), val_share what share of the split was read.
    """
    T, targets = context or model.config.context, len(tokens) - 1
    if targets < 1:
        raise UserError(f"the validation text has {len(tokens)} tokens: two at least are needed")
    starts = np.arange(0, targets, T)
    if limit and limit < targets:
        wanted = max(1, limit // T)
        starts = [starts[i * len(starts) // wanted] for i in range(wanted)]
    loss, count, n_bytes = 0.0, 0, 0
    full = [s for s in starts if s + T <= targets]
    per_batch = max(1, 8192 // T)
    batches = [full[i : i + per_batch] for i in range(0, len(full), per_batch)]
    batches += [[s] for s in starts if s + T > targets]  # the short rest, in a batch of its own
    for batch in batches[runtime.rank :: runtime.world]:
        length = min(T, targets - batch[0])
        window = np.asarray(batch)[:, None] + np.arange(length + 1)
        block = torch.from_numpy(tokens[window].astype(np.int64))
        n_bytes += int(byte_lengths[block[:, 1:].numpy()].clip(0).sum())
        count += block[:, 1:].numel()
        block = block.to(runtime.device)
        with lm.evaluating(model), runtime.autocast():
            loss += model(block[:, :-1], block[:, 1:]).item()
    loss, count, n_bytes = runtime.total(loss, count, n_bytes)
    mean = loss / count
    return {
        "val_loss": mean,
        "val_ppl": math.exp(min(mean, 700)),
        "val_bpb": loss / math.log(2) / n_bytes if n_bytes else None,
        "val_share": count / targets,
    }


# --------------------------------------------------------------------------------------------
# What a run shows
# --------------------------------------------------------------------------------------------


def clock(seconds):
    """3723 -> 1:02:03, 62 -> 1:02."""
    m, s = divmod(int(seconds), 60)
    return f"{m // 60}:{m % 60:02d}:{s:02d}" if m >= 60 else f"{m}:{s:02d}"


def memory_needed(model, tokens):
    """Bytes that training takes, roughly, with `tokens` in a micro-batch: weights, gradients and
    two moments in fp32, and what each layer keeps for its backward pass."""
    c = model.config
    layer = tokens * (12 * c.d_model + 3 * c.d_ff) * 4
    kept = c.n_layer * layer
    if model.grad_checkpoint:  # only each layer's input, and one layer in full
        kept = layer + c.n_layer * tokens * c.d_model * 4
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return held + 12 * learned + kept


def check_memory(model, tokens, runtime):
    """UserError if training with `tokens` in a micro-batch cannot fit this machine's memory (its
    CPU's; a GPU tells by itself)."""
    needed = memory_needed(model, tokens)
    if runtime.device.type == "cpu" and hasattr(os, "sysconf"):
        has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > has:
            raise UserError(
                f"this needs about {needed / 2**30:,.0f} GiB of memory, the machine has "
                f"{has / 2**30:,.0f}: use smaller batches, a shorter context or a smaller model"
            )


def header(model, args, runtime, tokens, per_batch, length):
    """The lines before the first step: what is trained, on what, and what it will take. `tokens`
    are those of the training text, `per_batch` those of a micro-batch, `length` those of a row."""
    c, n = model.config, lm.count_parameters(lm.meta_model(model.config))["total"]
    # of a table that learns some rows only (lora.train_new_embeddings) just these count
    trained = [p for p in model.parameters() if p.requires_grad]
    learned = sum(getattr(p, "learned", p.numel()) for p in trained)
    share = f", {learned:,} trained ({learned / n:.2%})" if learned != n else ""
    memory = memory_needed(model, per_batch) / 2**20
    per_step = per_batch * args.grad_accum * runtime.world
    lines = [
        f"device {runtime.device}, {runtime.dtype}, {runtime.world} process(es), matmul peak "
        f"{runtime.peak / 1e9:,.0f} GFLOP/s",
        f"{n:,} parameters{share}: {c.n_layer} layers x {c.d_model}, {c.n_head} heads, context "
        f"{c.context}, vocabulary {c.vocab_size:,}",
        f"{tokens:,} training tokens, {tokens / n:.2g} per parameter (Chinchilla advises 20)",
        f"memory about {memory:,.0f} MB; {per_step:,} tokens a step",
    ]
    if args.max_steps:
        flops = lm.flops_per_token(c, length) * per_step * args.max_steps
        least = clock(flops / (runtime.peak * runtime.world))
        lines[-1] += f"; {args.max_steps:,} steps take {least} at least, by the matmul peak"
    if args.max_minutes:
        lines.append(f"stops after {args.max_minutes:g} minutes of training at the latest")
    return lines


# --------------------------------------------------------------------------------------------
# fit: the training loop, the only one in the project
# --------------------------------------------------------------------------------------------


@dataclass
class Task:
    """What `fit` needs to know of what is being learned.

    `batches(step)` gives this process's micro-batches, tuples of tensors that begin with the ids.
    `loss(model, *batch)` is the *summed* loss of one, `count(*batch)` what it is divided by in the
    end: by default the targets that are not -100, the last tensor. `evaluate(model, final)` returns
    a dict with at least "val_loss"; final asks for the whole split. `score` of such a dict is least
    where the model is best. `weights(model)` is what of the model a checkpoint keeps, `extra` goes
    beside it (the tokenizer's spec, for one). `metrics()` are more for a line of the log; `curves`
    says what loss.svg shows, (name, key in metrics.jsonl), and `unit` in what.
    """

    batches: Callable
    evaluate: Callable
    extra: dict
    loss: Callable = lambda model, ids, targets: model(ids, targets)
    count: Callable = lambda *batch: int((batch[-1] != -100).sum())
    weights: Callable = lm.unwrapped_state
    score: Callable = lambda row: row["val_loss"]
    metrics: Callable = dict
    curves: tuple = (("train", "loss"), ("validation", "val_loss"))
    unit: str = "loss, nats per token"


def training_step(model, task, batches, runtime, scaler):
    """Forward and backward over this step's micro-batches. Returns (mean loss, tokens read).

    The summed losses are divided by the target tokens of the whole step, over all micro-batches and
    processes: so it never matters how a batch was cut, nor how unevenly its targets lie.
    """
    count, tokens = runtime.total(
        sum(task.count(*b) for b in batches), sum(b[0].numel() for b in batches)
    )
    if not count:
        raise UserError("this step has no target token: every label is masked")
    total = 0.0
    for i, batch in enumerate(batches):
        batch = [t.to(runtime.device, non_blocking=True) for t in batch]
        last = i == len(batches) - 1  # DDP exchanges gradients once a step, with the last backward
        quiet = model.no_sync() if runtime.world > 1 and not last else contextlib.nullcontext()
        with quiet:
            with runtime.autocast():
                loss = task.loss(model, *batch)
            # DDP averages over processes; what is wanted is the sum
            scaler.scale(loss * (runtime.world / count)).backward()
        total = total + loss.detach()
    return runtime.total(total)[0] / count, int(tokens)


def clear_gradients(model):
    """Clear the gradients; with gradient checkpointing those in blocks become zeros.

    Pre-allocated, because gradients allocated mid-backward, between activations that come and go,
    fragment the heap: 4 rows of 1,024 tokens at GPT-2's shape peaked at 4.7 GB, and at 3.5 GB with
    zeros allocated before.
    """
    model.zero_grad(set_to_none=True)
    if model.grad_checkpoint:
        for p in (p for p in model.blocks.parameters() if p.requires_grad):
            p.grad = torch.zeros_like(p)


def optimizer_step(model, optimizers, scaler, grad_clip, loss):
    """Clip, step, clear. Returns the gradient norm before clipping; None, without a step, if loss
    or norm are no number (fp16's loss scaling expects and skips such gradients by itself)."""
    for o in optimizers:
        scaler.unscale_(o)
    params = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in params])
    if grad_clip and norm > grad_clip:  # most are not: spare a pass over all gradients
        nn.utils.clip_grads_with_norm_(params, grad_clip, norm)
    norm = float(norm)
    if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
        return None
    for o in optimizers:
        scaler.step(o)
    clear_gradients(model)
    scaler.update()
    return norm


class Run:
    """A run in progress: the optimizers, what changes with every step, and how it is shown and
    saved. `state` is plain numbers; with weights, optimizers and RNG it is all that resuming needs.
    """

    def __init__(self, model, task, args, runtime, out, resume=None):
        self.model, self.task, self.args, self.runtime, self.out = model, task, args, runtime, out
        self.optimizers = make_optimizers(model, args)
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == "fp16")
        # bad: evaluations since the best one; warm: progress at which the warmup ended
        self.state = dict(step=0, tokens=0, seconds=0.0, warm=0.0)
        self.state |= dict(best=math.inf, best_step=0, bad=0)
        if resume:
            self.restore(resume)
        self.log = Log(out, self.state["step"], quiet=runtime.rank > 0)
        if runtime.rank == 0:
            settings = vars(args) | asdict(model.config)
            settings["parameters"] = sum(p.numel() for p in model.parameters())
            write_json(out / "settings.json", settings)
        self.last = {}  # the last evaluation
        # (loss, tokens, FLOPs, seconds) of the last steps, so that a shorter last interval averages
        # as many
        self.recent = deque(maxlen=args.log_every)

    def progress(self):
        """The fraction of the run that is over: by steps or by minutes, whichever is further."""
        steps, minutes = self.args.max_steps, self.args.max_minutes
        by_steps = self.state["step"] / steps if steps else 0.0
        by_time = self.state["seconds"] / 60 / minutes if minutes else 0.0
        return max(by_steps, by_time)

    def set_lr(self):
        """Give every parameter group its learning rate for the coming step; returns AdamW's."""
        a, step, done = self.args, self.state["step"], self.progress()
        if step == a.warmup_steps:
            self.state["warm"] = done  # the decay begins here
        fraction = (done - self.state["warm"]) / (1 - self.state["warm"])
        lr = lr_at(step, fraction, a.lr, a.min_lr, a.warmup_steps, a.schedule)
        for group in (g for o in self.optimizers for g in o.param_groups):
            group["lr"] = group["peak"] * lr / a.lr
        return lr

    def log_step(self, loss, tokens, length, seconds, lr, norm):
        """Count a step whose rows are `length` tokens long; every log_every steps, print a line and
        write a row of metrics."""
        s, flops = self.state, tokens * lm.flops_per_token(self.model.config, length)
        s["step"] += 1
        s["tokens"] += tokens
        # one clock for all processes: they must agree on when the time is up
        s["seconds"] += self.runtime.total(seconds)[0] / self.runtime.world
        self.recent.append((loss, tokens, flops, seconds))
        done = self.progress()
        if s["step"] % self.args.log_every and done < 1:
            return
        losses, counts, flops, times = zip(*self.recent)
        tok_s = sum(counts) / sum(times)
        peak = self.runtime.peak * self.runtime.world
        row = dict(step=s["step"], tokens=s["tokens"], seconds=round(s["seconds"], 3))
        row |= dict(loss=sum(losses) / len(losses), lr=lr, grad_norm=norm, tok_s=round(tok_s))
        row["mfu"] = sum(flops) / sum(times) / peak
        more = self.task.metrics()
        self.log.write(**row, **more)
        of = f"/{self.args.max_steps}" if self.args.max_steps else ""
        eta = clock(s["seconds"] * (1 - done) / done)
        self.log.line(
            f"step {s['step']}{of}  loss {row['loss']:.3f}  lr {lr:.2e}  norm {norm:.2f}  "
            f"{tok_s:,.0f} tok/s  mfu {row['mfu']:.0%}  eta {eta}"
            + "".join(f"  {k.replace('_', ' ')} {v:.3g}" for k, v in more.items()),
            rewrite=True,
        )

    def evaluate_and_save(self):
        """Evaluate, show, save: last.pt always, best.pt if this was the best so far."""
        s, row = self.state, {"step": self.state["step"], **self.task.evaluate(self.model, False)}
        score = self.task.score(row)
        better = score < s["best"]
        s.update(dict(best=score, best_step=s["step"], bad=0) if better else {})
        s["bad"] += not better
        self.last = row
        self.log.write(**row)
        self.log.line(eval_line(row) + ("  best" if better else ""))
        self.save(better)

    def save(self, best=False):
        """Write the checkpoints and the picture. best.pt first: a crash in between costs nothing,
        since resuming from the older last.pt would write it again."""
        if self.runtime.rank > 0:
            return
        weights = {k: v.float() for k, v in self.task.weights(self.model).items()}
        inference = {"config": asdict(self.model.config), "model": weights, **self.task.extra}
        inference |= {"step": self.state["step"], "best": self.state["best"]}
        if best:
            lm.save_checkpoint(self.out / "best.pt", inference)
        resuming = {
            "optimizers": [o.state_dict() for o in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "state": dict(self.state),
            "rng": random_state(),
            "args": vars(self.args),
        }
        lm.save_checkpoint(self.out / "last.pt", inference | resuming)
        rows = [r for r in self.log.rows if not r.get("final")]
        curves = {k: [(r["step"], r[c]) for r in rows if c in r] for k, c in self.task.curves}
        svg = line_svg(self.out.name, curves, "steps", self.task.unit)
        (self.out / "loss.svg").write_text(svg, encoding="utf-8")

    def restore(self, content):
        """Put back all that `save` took, except the weights."""
        for optimizer, saved in zip(self.optimizers, content["optimizers"], strict=True):
            own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, settings in zip(optimizer.param_groups, own):
                group.update(settings)  # rates and decay are this call's, which may be new ones
        self.scaler.load_state_dict(content["scaler"])
        self.state.update(content["state"])
        set_random_state(content["rng"])


def try_compile(model, task, runtime, step=0):
    """torch.compile(model), tried on a batch of that step; the model itself if that fails."""
    rng = torch.get_rng_state()
    try:
        compiled = torch.compile(model)
        batch = [t.to(runtime.device) for t in task.batches(step)[0]]
        with runtime.autocast():
            task.loss(compiled, *batch).backward()
        return compiled
    except Exception as e:  # whatever the compiler raised, eager mode still works
        reason = str(e).strip().split("\n")[0][:100]
        print(f"--compile does not work here, going on without ({type(e).__name__}: {reason})")
        return model
    finally:
        model.zero_grad(set_to_none=True)
        torch.set_rng_state(rng)  # dropout of the trial must not shift that of the run


def make_runner(model, task, args, runtime, step=0):
    """(the module to call in place of `model`, the Runtime to call it in, what to call after each
    optimizer step): the model itself or its BF16Copy, perhaps compiled or in DDP.

    On a GPU casting costs little, so there is no copy; DDP would exchange gradients that the copy
    no longer has; and frozen weights are better not held twice.
    """
    runner, precision, after_step = model, runtime, lambda: None
    copied = runtime.dtype == "bf16" and runtime.device.type == "cpu" and runtime.world == 1
    if copied and not args.autocast and all(p.requires_grad for p in model.parameters()):
        runner, precision = BF16Copy(model), replace(runtime, dtype="fp32")
        after_step = runner.sync_weights
    runner = try_compile(runner, task, precision, step) if args.compile else runner
    if runtime.world > 1:
        # buffers are only tables of positions
        runner = nn.parallel.DistributedDataParallel(runner, broadcast_buffers=False)
    return runner, precision, after_step


def fit(model, task, args, runtime, out, resume=None):
    """Train `model` on `task`, write the run to folder `out`. Returns the final metrics.

    Read from args: max_steps, max_minutes (None: no limit), what `make_optimizers` reads, min_lr,
    warmup_steps, schedule, grad_clip, eval_every, log_every, patience, compile, autocast.
    `resume` is the content of a last.pt, its weights already in the model.
    Raises UserError at a loss that is no number, SystemExit(130 or 143) after Ctrl-C or SIGTERM,
    the run saved.
    """
    run = Run(model, task, args, runtime, out, resume)
    if run.progress() >= 1:
        run.log.line("this run is finished: a larger --max_steps or --max_minutes would go on")
    model.train()
    runner, precision, after_step = make_runner(model, task, args, runtime, run.state["step"])
    clear_gradients(model)
    with StopSignal() as stop, run.log:
        while run.progress() < 1:
            start, lr = time.perf_counter(), run.set_lr()
            batches = task.batches(run.state["step"])
            loss, tokens = training_step(runner, task, batches, precision, run.scaler)
            norm = optimizer_step(model, run.optimizers, run.scaler, args.grad_clip, loss)
            after_step()
            if norm is None:
                raise UserError(
                    f"step {run.state['step'] + 1}: the loss ({loss}) or its gradient is no "
                    f"number; {out} keeps the checkpoint of the last evaluation. Try a lower --lr, "
                    f"a longer --warmup_steps or --dtype fp32"
                )
            synchronize(runtime.device)
            length = sum(b[0].numel() for b in batches) / sum(len(b[0]) for b in batches)
            run.log_step(loss, tokens, length, time.perf_counter() - start, lr, norm)
            if runtime.total(stop.number)[0]:
                run.save()
                step = run.state["step"]
                run.log.line(f"stopped at step {step}, saved: go on with --resume {out}")
                raise SystemExit(128 + (stop.number or signal.SIGINT))
            if run.state["step"] % args.eval_every == 0 or run.progress() >= 1:
                run.evaluate_and_save()
            if args.patience and run.state["bad"] >= args.patience:
                run.log.line(f"{run.state['bad']} evaluations without a better one: stopping early")
                break
    final = run.last  # it may have been of this step and the whole split
    if final.get("step") != run.state["step"] or final.get("val_share", 1) < 1:
        final = {"step": run.state["step"], **task.evaluate(model, True)}
        run.log.line(eval_line(final))
    final["final"] = True
    run.log.write(**final)
    return {**final, **run.state}


def eval_line(row):
    """One line about an evaluation row."""
    text = f"step {row['step']}  val loss {row['val_loss']:.4f}"
    if row.get("val_ppl"):
        text += f"  ppl {row['val_ppl']:,.2f}"
    if row.get("val_bpb"):
        text += f"  bits/byte {row['val_bpb']:.4f}"
    if row.get("val_share"):
        text += f"  ({row['val_share']:.0%} of val)"
    known = {"step", "final", "val_loss", "val_ppl", "val_bpb", "val_share"}
    for name, value in row.items():  # whatever else a task measures
        if name not in known:
            text += f"  {name.removeprefix('val_').replace('_', ' ')} {value:.4g}"
    return text


# --------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------


# fmt: off (one line a flag)
def add_machine(add):
    """Give a parser's group, by its add_argument, the flags of any run: where it is computed, and
    how it goes on."""
    add("--resume", nargs="?", const="", help="go on with this run (default: the newest one)")
    add("--seed", type=int, help="of weights, adapters, batches and dropout")
    add("--device", help="auto (default), cpu, cuda, cuda:1, mps")
    add("--dtype", type=dtype_name,
        help="auto (default), fp32, bf16, fp16: precision of matrix products")
    add("--compile", action="store_true", default=None, help="torch.compile the model")
    add("--grad_checkpoint", action="store_true", default=None, help="less memory, slower")
    add("--autocast", action="store_true", default=None,
        help="bf16 on a CPU without a bf16 copy of the weights")


def add_optimization(p):
    """Give a parser the flags that `fit` reads whatever is being learned; returns add_argument of
    their group."""
    add = p.add_argument_group("optimization").add_argument
    add("--grad_accum", type=int, help="micro-batches a step")
    add("--optimizer", choices=("adamw", *OPTIMIZERS), help="of the matrices inside blocks")
    add("--lr", type=float, help="peak learning rate")
    add("--embed_lr", type=float, help="of the embedding table")
    add("--head_lr", type=float, help="of an untied head")
    for name, (_, rate) in OPTIMIZERS.items():
        add(f"--{name}_lr", type=float, help=f"peak, with {name} (pretraining: {rate})")
    add("--min_lr", type=float, help="where the schedule ends")
    add("--warmup_steps", type=int, help="steps of linear warmup")
    add("--schedule", choices=tuple(SCHEDULES), help="after the warmup")
    add("--weight_decay", type=float, help="of the matrices inside blocks")
    add("--beta1", type=float, help="AdamW's first beta")
    add("--beta2", type=float, help="AdamW's second beta")
    add("--grad_clip", type=float, help="largest gradient norm; 0 is no clipping")
    add("--eval_every", type=int, help="steps between evaluations, each with a checkpoint")
    add("--log_every", type=int, help="steps between lines")
    add("--patience", type=int, help="stop after so many evaluations without a better one; 0 never")
    return add


# The fields of a shape that are flags; a rope_scaling comes with models of the Hub alone
SHAPE = tuple(f.name for f in fields(lm.Config) if f.name != "rope_scaling")


def build_parser():
    p = Parser(
        description="Pretrain a language model. Defaults are the recipe's (train.RECIPE), or with "
        "--resume the run's own.")
    add = p.add_argument_group("the run").add_argument
    add("--data", help="a prepared folder, or a source that prepare_data.py knows (default stdlib)")
    add("--preset", help=f"model shape: {', '.join(lm.PRESETS)} (default tiny)")
    add("--ckpt", help=f"start from weights, shape and tokenizer of {lm.WHAT_CKPT}")
    add("--out", help="folder of the run (default: out/NAME of the data, numbered if taken)")
    add_machine(add)
    add("--prompt", help="of the sample at the end (default: how the validation text begins)")
    add = add_optimization(p)
    add("--max_steps", type=int, help=f"default {DEFAULT_STEPS} if --max_minutes is not given")
    add("--max_minutes", type=float,
        help=f"of training, evaluation not counted (default {DEFAULT_MINUTES} if --max_steps is "
        "not given); with both, whichever comes first")
    add("--batch_size", type=int, help="rows a micro-batch (and process)")
    add("--eval_tokens", type=int,
        help="validation tokens an evaluation reads; 0 is all (the last one always reads all)")
    shape = p.add_argument_group("model shape, in place of the preset's (see model.Config)")
    for name in SHAPE:
        kind = type(getattr(lm.PRESETS["tiny"], name))
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind)
        if kind is str:
            how["choices"] = tuple(getattr(lm, f"{name.upper()}S"))
        shape.add_argument(f"--{name}", help=f"Config.{name}", **how)
    return p


# fmt: on


def resumed_settings(args, given, fixed):
    """(settings, content of last.pt) of the run that --resume means: its own settings, changed by
    what was `given` now, as long as that is not among the `fixed` ones."""
    run = Path(args.resume) if args.resume else newest_run()
    path = run / "last.pt" if run.is_dir() else run
    if run.is_dir() and not path.exists():
        instead = f"--ckpt {run} starts from its weights" if any(run.glob("*.pt")) else "start anew"
        raise UserError(f"{run} has no last.pt to resume: {instead}")
    content = lm.load_checkpoint(path)
    if "args" not in content:
        raise UserError(f"{path} is for sampling only: resume a last.pt, or --ckpt {path}")
    if ("objective" in content["args"]) != ("objective" in vars(args)):
        script = "finetune.py" if "objective" in content["args"] else "train.py"
        raise UserError(f"{path} was written by {script}: resume it with that, or name another run")
    if "out" in given:
        raise UserError(f"--out cannot be given with --resume, which goes on in {path.parent}")
    inherited = {k: v for k, v in content["args"].items() if v is not None}
    inherited["autocast"] = inherited.pop("plain", inherited.get("autocast"))  # its old name
    if changed := [k for k in given if k in fixed and given[k] != inherited.get(k)]:
        raise UserError(f"--{changed[0]} cannot change when resuming {path}")
    if {"max_steps", "max_minutes", "epochs"} & set(given):  # a new limit replaces the old ones
        inherited |= dict(max_steps=None, max_minutes=None, epochs=None)
    settings = inherited | given | {"out": str(path.parent)}
    new = " and ".join(f"{k} {v}" for k, v in given.items() if k != "resume")
    but = f", but {new}" if new else ""
    print(f"resuming {path} at step {content['step']}; settings are the run's own{but}")
    return settings, content


def optimizer_rates():
    """{flag: value} of the learning rates of OPTIMIZERS."""
    return {f"{name}_lr": rate for name, (_, rate) in OPTIMIZERS.items()}


def resolve(args):
    """Fill in every flag the user left out. Returns (args, the checkpoint to resume or None).

    What was given wins; a resumed run's own settings come next, then the recipe of the preset.
    """
    given = {k: v for k, v in vars(args).items() if v is not None}
    shape = {*SHAPE, "preset", "ckpt"}
    fixed = shape | {"optimizer", "seed"}  # what a run cannot change on its way
    if args.resume is not None:
        settings, content = resumed_settings(args, given, fixed)
    else:
        content = None
        if "ckpt" in given and (shaped := sorted(shape & set(given) - {"ckpt", "context"})):
            raise UserError(f"--{shaped[0]} cannot be given with --ckpt, which brings its shape")
        preset, optimizer = given.get("preset", "tiny"), given.get("optimizer", "adamw")
        settings = RECIPE | RECIPES.get(optimizer, {}) | RECIPES.get(preset, {})
        settings |= GOING_ON if "ckpt" in given else optimizer_rates()
        settings = {"data": "stdlib", "preset": preset} | settings | given
        if not {"max_steps", "max_minutes"} & set(given):
            settings |= dict(max_steps=DEFAULT_STEPS, max_minutes=DEFAULT_MINUTES)
    args = argparse.Namespace(**{k: settings.get(k) for k in vars(args)})
    check_limits(settings)
    return args, content


def build_model(args, content, meta, tokenizer):
    """The model to train: resumed, from --ckpt, or new in the preset's shape."""
    if content is None and args.ckpt:
        content = lm.load_checkpoint(args.ckpt)
    if content is not None and "adapter" in content:
        raise UserError(f"{args.ckpt} is an adapter: merge it first (python lora.py merge)")
    if content is not None:
        if args.resume is not None and content.get("data") != data_hashes(meta):
            raise UserError(
                f"{args.data} is not the text that the run began with: resume with that one, or "
                f"start a new run from these weights with --ckpt"
            )
        if not Tokenizer(content["tokenizer"]).same_ids(tokenizer):
            theirs = Tokenizer(content["tokenizer"]).name
            raise UserError(
                f"the checkpoint's tokenizer is {theirs}, that of {args.data} {tokenizer.name} (or "
                f"one with other tokens): prepare the text with the same one (prepare_data.py "
                f"--tokenizer takes a prepared folder, and a model of the Hub)"
            )
        model = lm.model_from_checkpoint(content)
        if tokenizer.n_vocab > model.config.vocab_size:  # it lacks the end of text
            model.grow_vocabulary((tokenizer.n_vocab + 63) // 64 * 64, model.config.vocab_size)
        model.train()
    else:
        changes = {k: getattr(args, k) for k in SHAPE if getattr(args, k) is not None}
        # a multiple of 64 suits the hardware and leaves rows for a chat's special tokens
        changes.setdefault("vocab_size", (tokenizer.n_vocab + 63) // 64 * 64)
        model = lm.Transformer(lm.preset(args.preset, **changes))
    if meta["largest_id"] >= model.config.vocab_size:
        raise UserError(
            f"token id {meta['largest_id']} in {args.data} is not below the model's vocab_size "
            f"{model.config.vocab_size}"
        )
    model.grad_checkpoint = bool(args.grad_checkpoint)
    return model


def settle_context(args, model):
    """Fill in --context, the length of training windows: a checkpoint's model may be able to look
    at more. UserError if it is less."""
    most = model.config.context
    args.context = most if args.context is None else args.context
    if not 2 <= args.context <= most:
        raise UserError(f"--context {args.context} must be from 2 to the model's {most}")


def settle_rates(args, model):
    """Fill in the learning rates of a run that goes on from weights, where none are given: smaller
    for larger models, 1e-3 for the default shape, 6e-5 for GPT-2. The trials: tests/BENCHMARKS.md.
    """
    if not args.ckpt:
        return
    if args.lr is None:
        size = sum(p.numel() for p in model.parameters())
        args.lr = float(f"{min(1e-3, 15 / size ** (2 / 3)):.1e}")
    for name, rate in optimizer_rates().items():
        setattr(args, name, getattr(args, name) or rate * args.lr / 2e-3)  # half where lr is 1e-3
    if model.config.init == "zero_out":  # about the ratios of RECIPE
        args.embed_lr, args.head_lr = args.embed_lr or 10 * args.lr, args.head_lr or 3 * args.lr


def closing_lines(model, tokenizer, runtime, meta, result, out, prompt_ids):
    """What is printed at the end: figures, xz's beside them, and a sample."""
    from sample import allowed_ids, generate  # not above: training is read before sampling

    lines = [
        f"{result['tokens']:,} tokens in {clock(result['seconds'])} of training; "
        f"best val loss {result['best']:.4f} at step {result['best_step']}",
    ]
    if meta.get("xz_bits_per_byte") and result.get("val_bpb"):
        lines.append(
            f"held-out text: {result['val_bpb']:.3f} bits per byte; xz -9e takes "
            f"{meta['xz_bits_per_byte']:.3f}"
        )
    prompt_ids = prompt_ids[: model.config.context]
    allowed = allowed_ids(model, tokenizer)
    with lm.evaluating(model):
        rows = generate(model, [prompt_ids], 160, temperature=0.8, top_p=0.95, allowed=allowed)
        ids = [row[0] for row in rows]
    text = printable(tokenizer.decode(prompt_ids + ids))
    lines += ["", f"--- a sample ({len(prompt_ids)} tokens of prompt) ---", text, "---"]
    lines.append(f"{out}/: last.pt, best.pt, metrics.jsonl, loss.svg")
    lines.append(f"write with it: python sample.py --ckpt {out}")
    return lines


def launch(model, task, args, runtime, out, content):
    """`fit`; then all processes leave together. A full memory becomes a UserError with advice."""
    try:
        result = fit(model, task, args, runtime, out, content)
        if runtime.world > 1:
            # free DDP before the process group: a process that exits while DDP still uses gloo's
            # threads is aborted
            dist.barrier()
            gc.collect()
        return result
    except RuntimeError as e:
        if is_out_of_memory(e):
            advice = "halve the batch and double --grad_accum"
            raise UserError(f"out of memory: {advice}, or try --grad_checkpoint") from e
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main(argv=None):
    args, content = resolve(build_parser().parse_args(argv))
    folder = find_data(args.data, resuming=content is not None)
    args.data = str(folder)
    meta = read_meta(folder)
    tokenizer = Tokenizer(meta["tokenizer"])
    torch.manual_seed(args.seed)
    try:
        model = build_model(args, content, meta, tokenizer)
    except RuntimeError as e:  # torch could not allocate it, or its size overflows
        reason = str(e).split("\n")[0]
        raise UserError(f"a model of this size cannot be built here ({reason})") from e
    runtime = make_runtime(args.device, args.dtype, wide=model.config.d_model >= 512)
    args.dtype = runtime.dtype
    model.to(runtime.device)
    train, val = read_tokens(folder, "train"), read_tokens(folder, "val")
    settle_context(args, model)
    settle_rates(args, model)
    loader = TokenLoader(train, args.context, args.seed)
    check_memory(model, args.batch_size * args.context, runtime)
    out = run_folder(args, content, folder.name, runtime)
    task = Task(
        batches=lambda step: micro_batches(
            loader, step, args.batch_size, args.grad_accum, runtime.rank, runtime.world
        ),
        evaluate=lambda m, final: evaluate(
            m, val, tokenizer.byte_lengths, runtime, None if final else args.eval_tokens,
            args.context,
        ),
        extra={"tokenizer": tokenizer.spec, "data": data_hashes(meta)},
    )
    if runtime.rank == 0:
        per_batch = args.batch_size * args.context
        about = header(model, args, runtime, len(train), per_batch, args.context)
        print("\n".join([f"{out}: {folder}, {tokenizer.name}, {args.optimizer}", *about]))
    result = launch(model, task, args, runtime, out, content)
    if runtime.rank == 0:
        prompt = tokenizer.encode(args.prompt) if args.prompt else val[:16].tolist()
        lines = closing_lines(model, tokenizer, runtime, meta, result, out, prompt)
        print("\n".join(lines))


if __name__ == "__main__":
    run_cli(main)
