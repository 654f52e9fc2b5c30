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
import io
import math
import shutil
import signal
import time
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial

if __name__ == "__main__":  # no traceback for Ctrl-C during the slow imports; see `run_cli`
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
from torch import nn

import model as lm
from data.cli import (
    Parser,
    StopSignal,
    UserError,
    check_limits,
    printable,
    run_cli,
)
from data.costs import check_memory, memory_needed
from data.files import write_json, write_whole
from data.machine import dtype_name, make_runtime
from data.plot import line_svg
from data.runner import (
    cut_like,
    is_cut,
    launch,
    load_parts,
    make_runner,
    place,
    save_parts,
    whole,
    whole_state,
    whole_tensors,
)
from data.runs import Log, clock, eval_line, resumed_settings, run_folder
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
    grad_clip=1.0, eval_every=250, eval_tokens=32768, save_every=0, save_minutes=0.0,
    log_every=20, patience=0, seed=0,
)  # fmt: skip
_LARGE = dict(embed_lr=None, head_lr=None, beta2=0.95, warmup_steps=200, schedule="cosine")
_GPT2 = _LARGE | dict(warmup_steps=700, total_batch_tokens=2**19)

# Differences for other shapes and optimizers. GPT-2's are customary values, not tried here.
RECIPES = {
    # orthogonalising costs the same for a larger batch
    "muon": dict(batch_size=12, weight_decay=0.0),
    "small": dict(lr=2e-3, batch_size=16),
    "baby": dict(lr=1.5e-3, batch_size=16),
    "gpt2": _GPT2 | dict(lr=6e-4, min_lr=6e-5, batch_size=4),
    "gpt2-medium": _GPT2 | dict(lr=3e-4, min_lr=3e-5, batch_size=2),
    "gpt2-large": _GPT2 | dict(lr=2.5e-4, min_lr=2.5e-5, batch_size=1),
    "gpt2-xl": _GPT2 | dict(lr=2e-4, min_lr=2e-5, batch_size=1),
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
    def step(self, closure=None):
        """One step; a closure, as other optimizers take it, is not called."""
        for group in self.param_groups:
            # matrices of one shape go through the products together; one that is cut over several
            # processes is gathered alone
            alike = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p if is_cut(p) else p.shape].append(p)
            for params in alike.values():
                ahead = []
                for p in params:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    ahead.append(whole(p.grad.lerp(momentum, group["momentum"])))  # Nesterov
                size = group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5
                for p, direction in zip(params, orthogonalize(torch.stack(ahead))):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(cut_like(direction, p), alpha=size)


# To add an optimizer for the matrices inside blocks: {name: (class, its learning rate)}. The flag
# --NAME_lr changes the rate; what else it wants differently goes to RECIPES.
OPTIMIZERS = {"muon": (Muon, 0.02)}


def make_optimizers(model, args):
    """The optimizers over all parameters that want a gradient; each group keeps its "peak" lr.

    Read from args: optimizer, lr, embed_lr, head_lr (None: lr), NAME_lr of OPTIMIZERS,
    weight_decay, beta1, beta2. The matrices inside blocks and `inputs` go to AdamW with decay,
    or to one of OPTIMIZERS. Everything else goes to AdamW without decay: it would shrink norms'
    scales and biases for nothing, and undo what rarely seen rows of the tables and head learned.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise UserError("nothing to train: no parameter wants a gradient")
    lookups = model.lookup_tables()
    inner = {n for n, p in named if p.dim() == 2 and n.startswith(("blocks.", "inputs."))}
    inner -= set(lookups)
    matrices = [p for n, p in named if n in inner]
    # a tied table is embedding and head at once: neither's own learning rate suits it
    tied = model.config.tied
    tables = {} if tied else {"embed.weight": args.embed_lr, "head.weight": args.head_lr}
    tables |= dict.fromkeys(lookups, args.embed_lr)
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
        optimizers.append(
            # eps far below the usual 1e-8: gradients of a *mean* over thousands of tokens are tiny
            torch.optim.AdamW(
                groups, betas=(args.beta1, args.beta2), eps=1e-10, weight_decay=0.0, fused=True
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
    for batch, counts in runtime.share(batches):
        length = min(T, targets - batch[0])
        window = np.asarray(batch)[:, None] + np.arange(length + 1)
        block = torch.from_numpy(tokens[window].astype(np.int64))
        n_bytes += counts * int(byte_lengths[block[:, 1:].numpy()].clip(0).sum())
        count += counts * block[:, 1:].numel()
        block = block.to(runtime.device)
        with lm.evaluating(model), runtime.autocast():
            loss += counts * model(block[:, :-1], block[:, 1:]).item()
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


def header(model, args, runtime, tokens, per_batch, length):
    """The lines before the first step: what is trained, on what, and what it will take. `tokens`
    are those of the training text, `per_batch` those of a micro-batch, `length` those of a row."""
    c, n = model.config, lm.count_parameters(lm.meta_model(model.config))["total"]
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = f", {learned:,} trained ({learned / n:.2%})" if learned != n else ""
    memory = memory_needed(model, per_batch) / 2**20
    per_step = per_batch * args.grad_accum * runtime.world
    lines = [
        f"device {runtime.device}, {runtime.dtype}, {runtime.world} process(es), matmul peak "
        f"{runtime.peak / 1e9:,.0f} GFLOP/s ({runtime.peak_source})",
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


def training_step(model, task, batches, runtime, scaler, seed):
    """Forward and backward over this step's micro-batches. Returns (this process's part of the mean
    loss, tokens read by all). Nothing waits for a GPU: the loss is a tensor.

    The summed losses are divided by the target tokens of the whole step, over all micro-batches and
    processes: so it never matters how a batch was cut, nor how unevenly its targets lie. Dropout is
    a function of `seed`, a tuple, and of the micro-batch's number among those of all processes.
    """
    count, tokens = runtime.total(
        sum(task.count(*b) for b in batches), sum(b[0].numel() for b in batches)
    )
    if not count:
        raise UserError("this step has no target token: every label is masked")
    total = 0.0
    for i, batch in enumerate(batches):
        number = runtime.rank * len(batches) + i
        torch.manual_seed(int(np.random.SeedSequence((*seed, number)).generate_state(1)[0]))
        batch = runtime.upload(batch)
        last, quiet = i == len(batches) - 1, contextlib.nullcontext()
        if runtime.sharded:  # gradients are exchanged once a step, with the last backward pass
            model.set_requires_gradient_sync(last)
        elif runtime.world > 1 and not last:
            quiet = model.no_sync()
        with quiet:
            with runtime.autocast():
                loss = task.loss(model, *batch)
            # both ways average over processes; what is wanted is the sum
            scaler.scale(loss * (runtime.world / count)).backward()
        total = total + loss.detach()
    return total / count, int(tokens)


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


def optimizer_step(model, optimizers, scaler, grad_clip, ahead=False):
    """Clip, step, clear. Returns the gradient's norm before clipping, a tensor."""
    for o in optimizers:
        scaler.unscale_(o)
    params = [p for p in model.parameters() if p.grad is not None]
    norm = whole(nn.utils.get_total_norm([p.grad for p in params]))
    # most norms are smaller: spare a CPU the pass over all gradients, and a GPU the question
    if grad_clip and (ahead or norm > grad_clip):
        nn.utils.clip_grads_with_norm_(params, grad_clip, norm)
    for o in optimizers:
        scaler.step(o)
    clear_gradients(model)
    scaler.update()
    return norm


class Run:
    """A run in progress: the optimizers, what changes with every step, and how it is shown and
    saved. `state` is plain numbers; with weights and optimizers it is all that resuming needs.
    """

    def __init__(self, model, task, args, runtime, out, resume=None):
        self.model, self.task, self.args, self.runtime, self.out = model, task, args, runtime, out
        self.optimizers = make_optimizers(model, args)
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == "fp16")
        # bad: evaluations since the best one; warm_seconds: duration of the warmup
        self.state = dict(step=0, tokens=0, seconds=0.0, warm_seconds=0.0)
        self.state |= dict(best=math.inf, best_step=0, bad=0)
        if resume:
            self.restore(resume)
        self.log = Log(out, self.state["step"], quiet=runtime.rank > 0)
        self.last = {}  # the last evaluation
        # A window over the latest steps, so that every log line averages as many: (tokens, FLOPs,
        # seconds), losses, and [loss, norm], tensors that no one has waited for
        self.recent, self.losses = (deque(maxlen=args.log_every) for _ in range(2))
        self.unread, self.norm = [], 0.0
        self.writer, self.writing = ThreadPoolExecutor(1), None
        self.saved = self.state["seconds"]

    def write_settings(self):
        """Write settings.json: this call's flags, and the model's shape."""
        settings = vars(self.args) | asdict(self.model.config)
        settings["parameters"] = sum(p.numel() for p in self.model.parameters())
        write_json(self.out / "settings.json", settings)

    def fraction(self, step, seconds):
        """The fraction of the run that is over after so many steps and seconds: of its steps or of
        its minutes, whichever is further."""
        steps, minutes = self.args.max_steps, self.args.max_minutes
        return max(step / steps if steps else 0.0, seconds / 60 / minutes if minutes else 0.0)

    def progress(self):
        """The fraction of the run that is over."""
        return self.fraction(self.state["step"], self.state["seconds"])

    def over(self):
        """Why there is no step to do, in a line; None if there is one."""
        if self.progress() >= 1:
            return "this run is finished: a larger --max_steps or --max_minutes would go on"
        if self.args.patience and self.state["bad"] >= self.args.patience:
            return (
                f"{self.state['bad']} evaluations without a better one: stopping early; a larger "
                f"--patience or another limit would go on"
            )
        return None

    def set_lr(self):
        """Give every parameter group its learning rate for the coming step; returns AdamW's."""
        a, step, s = self.args, self.state["step"], self.state
        if step <= a.warmup_steps:
            s["warm_seconds"] = s["seconds"]
        # where the decay begins, under the limits of this call
        warm = self.fraction(min(step, a.warmup_steps), s["warm_seconds"])
        fraction = (self.progress() - warm) / (1 - warm)
        lr = lr_at(step, fraction, a.lr, a.min_lr, a.warmup_steps, a.schedule)
        for group in (g for o in self.optimizers for g in o.param_groups):
            group["lr"] = group["peak"] * lr / a.lr
        return lr

    def read_losses(self):
        """Wait for loss and gradient norm of the last steps. UserError if one is no number (fp16's
        loss scaling expects such norms, and skips these steps by itself)."""
        if not self.unread:
            return
        rows = torch.stack([torch.stack(pair) for pair in self.unread]).tolist()
        first = self.state["step"] - len(rows) + 1
        self.unread.clear()
        for step, (loss, self.norm) in enumerate(rows, first):
            fine = math.isfinite(self.norm) or self.scaler.is_enabled()
            if not (fine and math.isfinite(loss)):
                raise UserError(
                    f"step {step}: the loss ({loss}) or its gradient is no number; {self.out} "
                    f"keeps the checkpoint of the last evaluation. Try a lower --lr, a longer "
                    f"--warmup_steps or --dtype fp32"
                )
            self.losses.append(loss)

    def log_step(self, loss, norm, tokens, length, start, lr):
        """Count a step that began at `start` and whose rows are `length` tokens long; every
        log_every steps, print a line and write a row of metrics. A GPU is waited for then, and at
        every tenth step: in between it has always more to do."""
        s, flops = self.state, tokens * lm.flops_per_token(self.model.config, length)
        s["step"] += 1
        s["tokens"] += tokens
        self.unread.append((loss.float(), norm.float()))
        due = s["step"] % self.args.log_every == 0
        if due or s["step"] % 10 == 0 or not self.runtime.ahead:
            self.read_losses()
        # one clock for all processes: they must agree on when the time is up
        seconds = self.runtime.total(time.perf_counter() - start)[0] / self.runtime.world
        s["seconds"] += seconds
        self.recent.append((tokens, flops, seconds))
        done = self.progress()
        if not due and done < 1:
            return
        self.read_losses()
        counts, flops, times = zip(*self.recent)
        tok_s, flop_s = sum(counts) / sum(times), sum(flops) / sum(times)
        mfu = flop_s / (self.runtime.peak * self.runtime.world)
        row = dict(step=s["step"], tokens=s["tokens"], seconds=round(s["seconds"], 3))
        row["loss"] = self.runtime.total(sum(self.losses))[0] / len(self.losses)
        row |= dict(lr=lr, grad_norm=self.norm, tok_s=round(tok_s), mfu=mfu)
        more = self.task.metrics()
        self.log.write(**row, **more)
        of = f"/{self.args.max_steps}" if self.args.max_steps else ""
        eta = clock(s["seconds"] * (1 - done) / done)
        self.log.line(
            f"step {s['step']}{of}  loss {row['loss']:.3f}  lr {lr:.2e}  norm {self.norm:.2f}  "
            f"{tok_s:,.0f} tok/s  mfu {mfu:.0%}  eta {eta}"
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

    def wants_saving(self):
        """Whether it is time for a checkpoint between evaluations."""
        every, minutes = self.args.save_every, self.args.save_minutes
        late = minutes and self.state["seconds"] - self.saved >= 60 * minutes
        return late or bool(every and self.state["step"] % every == 0)

    def save(self, best=False):
        """Write the checkpoints and the picture. best.pt first: a crash in between costs nothing,
        since resuming from the older last.pt would write it again."""
        self.read_losses()  # weights that are no numbers are not to be saved
        self.saved = self.state["seconds"]
        # a model that is cut is saved in parts; adapters over it are small enough to be gathered
        parts, weights, optimizers = None, {}, []
        if self.runtime.sharded and self.task.weights is lm.unwrapped_state:
            parts = f"parts-{self.state['step']}"
            save_parts(self.out / parts, self.model, self.optimizers)
        else:
            optimizers = [whole_state(o) for o in self.optimizers]
        if best or not parts:
            weights = whole_tensors(self.task.weights(self.model))
        if self.runtime.rank > 0:
            return
        inference = {"config": asdict(self.model.config), "model": weights, **self.task.extra}
        inference |= {"step": self.state["step"], "best": self.state["best"]}
        if best:
            self.write("best.pt", inference)
        resuming = {
            "model": {} if parts else weights,
            "optimizers": optimizers,
            "parts": parts,  # the folder with weights and optimizers
            "scaler": self.scaler.state_dict(),
            "state": dict(self.state),
            "args": vars(self.args),
            "device": self.runtime.device.type,
        }
        self.write("last.pt", inference | resuming)
        for old in set(self.out.glob("parts-*")) - {self.out / str(parts)}:
            self.finish_writing()
            shutil.rmtree(old)
        rows = [r for r in self.log.rows if not r.get("final")]
        curves = {k: [(r["step"], r[c]) for r in rows if c in r] for k, c in self.task.curves}
        svg = line_svg(self.out.name, curves, "steps", self.task.unit)
        (self.out / "loss.svg").write_text(svg, encoding="utf-8")

    def write(self, name, content):
        """Write a checkpoint. A GPU goes on meanwhile: a thread writes what is copied now."""
        self.finish_writing()
        if not self.runtime.ahead:
            return lm.save_checkpoint(self.out / name, content)
        copy = io.BytesIO()
        torch.save(content, copy)
        path, data = self.out / name, copy.getbuffer()
        self.writing = self.writer.submit(write_whole, path, lambda f: f.write(data))

    def finish_writing(self):
        """Wait for the last checkpoint to be written; UserError if it could not be."""
        if self.writing:
            self.writing.result()

    def restore(self, content):
        """Put back all that `save` took, except the weights (but for those in parts)."""
        groups = [group for o in self.optimizers for group in o.param_groups]
        own = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        if content.get("parts"):
            load_parts(self.out / content["parts"], self.model, self.optimizers)
        else:
            for optimizer, saved in zip(self.optimizers, content["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
                for p, moments in optimizer.state.items():
                    for k, v in moments.items():
                        if v.dim():  # where only new rows learn, older runs have the whole table's
                            moments[k] = cut_like(v[-len(p) :], p)
        groups = [group for o in self.optimizers for group in o.param_groups]
        for group, settings in zip(groups, own):
            group.update(settings)  # rates and decay are this call's, which may be new ones
        if content["scaler"]:  # empty of a run in another precision
            self.scaler.load_state_dict(content["scaler"])
        del content["model"], content["optimizers"]  # a GPU has copies
        s, was = self.state, content["args"]
        s.update(content["state"])
        if s.pop("warm", None):  # of an older run: a fraction of its limit
            s["warm_seconds"] = s["seconds"] * min(1, self.args.warmup_steps / s["step"])
        if any(was.get(k) != getattr(self.args, k) for k in ("max_steps", "max_minutes")):
            s["bad"] = 0  # with another limit, --patience begins anew


def fit(model, task, args, runtime, out, resume=None):
    """Train `model` on `task`, write the run to folder `out`. Returns the final metrics, or None if
    the run to resume is over and has them.

    Read from args: max_steps, max_minutes (None: no limit), what `make_optimizers` reads, min_lr,
    warmup_steps, schedule, grad_clip, eval_every, save_every, save_minutes, log_every, patience,
    seed, compile, autocast.
    `resume` is the content of a last.pt, its weights already in the model.
    Raises UserError at a loss that is no number, SystemExit(130 or 143) after Ctrl-C or SIGTERM,
    the run saved.
    """
    run = Run(model, task, args, runtime, out, resume)
    if over := run.over():
        run.log.line(over)
        step = run.state["step"]
        if runtime.of_first(any(r.get("final") and r["step"] == step for r in run.log.rows)):
            return None
    if runtime.rank == 0:
        run.write_settings()
    model.train()
    runner, precision, after_step = make_runner(model, task, args, runtime, run.state["step"])
    clear_gradients(model)
    with StopSignal() as stop, run.log:
        while not run.over():
            start, lr = time.perf_counter(), run.set_lr()
            batches = task.batches(run.state["step"])
            seed = args.seed, run.state["step"]
            loss, tokens = training_step(runner, task, batches, precision, run.scaler, seed)
            clip = args.grad_clip
            norm = optimizer_step(model, run.optimizers, run.scaler, clip, runtime.ahead)
            after_step()
            length = sum(b[0].numel() for b in batches) / sum(len(b[0]) for b in batches)
            run.log_step(loss, norm, tokens, length, start, lr)
            if runtime.total(stop.number)[0]:
                run.save()
                run.finish_writing()
                step = run.state["step"]
                run.log.line(f"stopped at step {step}, saved: go on with --resume {out}")
                raise SystemExit(128 + (stop.number or signal.SIGINT))
            if run.state["step"] % args.eval_every == 0 or run.progress() >= 1:
                run.evaluate_and_save()
            elif run.wants_saving():
                run.save()
    if not over and run.progress() < 1:
        run.log.line(run.over())
    final = run.last  # it may have been of this step and the whole split
    if final.get("step") != run.state["step"] or final.get("val_share", 1) < 1:
        final = {"step": run.state["step"], **task.evaluate(model, True)}
        run.log.line(eval_line(final))
    final["final"] = True
    run.log.write(**final)
    run.finish_writing()
    return {**final, **run.state}


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
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile the model (default: on GPUs since Ampere)")
    add("--grad_checkpoint", action="store_true", default=None, help="less memory, slower")
    add("--shard", action=argparse.BooleanOptionalAction,
        help="cut model and optimizer over torchrun's processes, in place of a copy in each")
    add("--autocast", action="store_true", default=None,
        help="bf16 on a CPU without a bf16 copy of the weights")


def add_optimization(p):
    """Give a parser the flags that `fit` reads whatever is being learned; returns add_argument of
    their group."""
    add = p.add_argument_group("optimization").add_argument
    add("--grad_accum", type=int, help="micro-batches a step and process")
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
    add("--save_every", type=int, help="steps between checkpoints beside those; 0 is none")
    add("--save_minutes", type=float, help="minutes between them; 0 is none")
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
    add("--max_tokens", type=float, help="also a limit: training tokens, 1e9 for example")
    add("--max_minutes", type=float,
        help=f"of training, evaluation not counted (default {DEFAULT_MINUTES} if --max_steps is "
        "not given); with both, whichever comes first")
    add("--batch_size", type=int, help="rows a micro-batch (and process)")
    add("--total_batch_tokens", type=int,
        help="tokens a step of all processes, in place of --grad_accum")
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
        settings, content = resumed_settings(args, given, fixed, lm.load_checkpoint)
    else:
        content = None
        if "ckpt" in given and (shaped := sorted(shape & set(given) - {"ckpt", "context"})):
            raise UserError(f"--{shaped[0]} cannot be given with --ckpt, which brings its shape")
        preset, optimizer = given.get("preset", "tiny"), given.get("optimizer", "adamw")
        settings = RECIPE | RECIPES.get(optimizer, {}) | RECIPES.get(preset, {})
        settings |= GOING_ON if "ckpt" in given else optimizer_rates()
        settings = {"data": "stdlib", "preset": preset} | settings | given
        if not {"max_steps", "max_tokens", "max_minutes"} & set(given):
            settings |= dict(max_steps=DEFAULT_STEPS, max_minutes=DEFAULT_MINUTES)
    if {"grad_accum", "total_batch_tokens"} <= set(given):
        raise UserError("--grad_accum follows from --total_batch_tokens: give one of them")
    if "grad_accum" in given:
        settings["total_batch_tokens"] = None
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
        # one that is to be cut stays mapped from its file, so that no process ever holds all of it
        where = args.ckpt if args.resume is None else args.out
        dtype = None if args.shard else torch.float32
        model = lm.model_from_checkpoint(content, dtype=dtype, where=where)
        size = max(tokenizer.n_vocab, model.config.vocab_size)  # it may lack the end of text
        if args.resume is None:
            model.grow_vocabulary(lm.padded_vocab(size), model.config.vocab_size)
        model.train()
    else:
        changes = {k: getattr(args, k) for k in SHAPE if getattr(args, k) is not None}
        # a multiple of 64 suits the hardware and leaves rows for a chat's special tokens
        changes.setdefault("vocab_size", lm.padded_vocab(tokenizer.n_vocab))
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


def settle_steps(args, tokens, world):
    """Fill in --grad_accum and --total_batch_tokens, each from the other, and --max_steps from
    --max_tokens, for micro-batches of so many tokens in each of `world` processes. A run that goes
    on in more or fewer processes keeps its tokens a step, and so the order of its rows."""
    total = args.total_batch_tokens or tokens * world * args.grad_accum
    args.total_batch_tokens, args.grad_accum = total, total // (tokens * world)
    if total % (tokens * world) or not args.grad_accum:
        raise UserError(
            f"--total_batch_tokens {total} is no multiple of {tokens * world}: in {world} "
            f"process(es) each micro-batch has {tokens} tokens (--batch_size x --context)"
        )
    if args.max_tokens:
        args.max_steps = min(args.max_steps or math.inf, math.ceil(args.max_tokens / total))


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
    was, wide = (content or {}).get("device"), model.config.d_model >= 512
    runtime = make_runtime(args.device, args.dtype, wide, was)
    args.dtype = runtime.dtype
    place(model, args, runtime)
    train, val = read_tokens(folder, "train"), read_tokens(folder, "val")
    settle_context(args, model)
    settle_rates(args, model)
    settle_steps(args, args.batch_size * args.context, runtime.world)
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
        loss=lambda m, ids, targets: m(ids, targets, places=slice(None)),  # none is -100
    )
    if runtime.rank == 0:
        per_batch = args.batch_size * args.context
        about = header(model, args, runtime, len(train), per_batch, args.context)
        print("\n".join([f"{out}: {folder}, {tokenizer.name}, {args.optimizer}", *about]))

    def report(result):
        prompt = tokenizer.encode(args.prompt) if args.prompt else val[:16].tolist()
        lines = closing_lines(model, tokenizer, runtime, meta, result, out, prompt)
        if runtime.rank == 0:
            print("\n".join(lines))

    launch(partial(fit, model, task, args, runtime, out, content), report, runtime, out)


if __name__ == "__main__":
    run_cli(main)
