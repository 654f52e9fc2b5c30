"""Pretrain a language model: from token files to a model that writes.

    python train.py                                        the default corpus, three minutes
    python train.py --data sales --preset baby --max_steps 2000
    python train.py --data data/mynovel --optimizer muon
    python train.py --resume                               continue the newest run
    torchrun --nproc_per_node 2 train.py --batch_size 8    several processes or GPUs

A run writes out/NAME/last.pt (all that resuming needs), best.pt (what sampling needs),
metrics.jsonl and loss.svg. Text becomes token files in prepare_data.py; train.py calls it if they
are not there.

Read it from here to the end of `fit`, the loop that fine-tuning also uses. The rest is the command
line and what only some runs need: bf16, a compiler, several processes.
"""

import argparse
import contextlib
import copy
import gc
import inspect
import math
import os
import re
import signal
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map_only

import model as lm
from data import cli, machine
from data.cli import Parser, StopSignal, UserError, at_least, between, positive, printable, run_cli
from data.costs import check_memory, memory_needed
from data.machine import DTYPES, fast_products, full_tensor, make_runtime, native_dtype, shard_like
from data.progress import waiting, watched
from data.runs import Log, clock, eval_line, newest_run, run_folder, run_settings, step_line
from data.tokenizer import Tokenizer
from prepare_data import data_hashes, find_data, other_tokenizer, read_meta, read_tokens

# --------------------------------------------------------------------------------------------
# The recipe: the defaults of training
# --------------------------------------------------------------------------------------------

# Found by experiment on the default corpus with two CPU cores; tests/BENCHMARKS.md has the trials.
# Learning rates mattered most: the embedding (rows of standard deviation 1, each rarely seen) needs
# ten times that of the matrices, the head (which starts at zero) three times. Small batches, which
# fit more steps into three minutes, helped, as did a linear decay to zero (cosine ended 0.015 bits
# per byte higher) and short rows in every second step, which are faster (--short_context).
RECIPE = dict(
    batch_size=8, grad_accum=1, optimizer="adamw", schedule="linear", warmup_steps=60,
    lr=3e-3, embed_lr=3e-2, head_lr=1e-2, min_lr=0.0, weight_decay=0.1, beta1=0.9, beta2=0.99,
    grad_clip=1.0, eval_every=250, eval_tokens=None, save_every=0,
    log_every=20, patience=0, seed=0,
)  # fmt: skip
# None: the same as lr
_LARGE = dict(embed_lr=None, head_lr=None, beta2=0.95, warmup_steps=200, schedule="cosine")
# grad_accum follows from total_batch_tokens, the tokens per step, see `settle`
_GPT2 = _LARGE | dict(warmup_steps=700, total_batch_tokens=2**19)

# Changes for a preset or an optimizer. GPT-2's values are customary and were not tried here.
RECIPE_CHANGES = {
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

# If neither --max_steps nor --max_minutes is given, a run ends at whichever of these comes first.
DEFAULT_STEPS, DEFAULT_MINUTES = 4000, 2.9


# --------------------------------------------------------------------------------------------
# Batches: a pure function of (seed, row number)
# --------------------------------------------------------------------------------------------


class TokenLoader:
    """Windows of `context` + 1 tokens in a seeded random order, each once per epoch.

    An epoch cuts the text at a random phase into windows and permutes them, so two epochs seldom
    show the same cuts. Row r of the whole run is always the same window: resuming needs only the
    step, and processes that share a step each take their slice of its rows.
    """

    def __init__(self, tokens, context, seed):
        self.tokens, self.context, self.seed = tokens, context, seed
        possible = (len(tokens) - 1) // context
        if possible < 1:
            length = f"{len(tokens)} tokens, fewer than the context of {context} plus one"
            raise UserError(f"the training text has {length}: use a shorter --context or more text")
        self.per_epoch = max(1, possible - 1)  # one less leaves room for every phase
        self.epoch, self.starts = None, None

    def epoch_starts(self, epoch):
        """The positions where the windows of an epoch begin, (n,), in the order of the epoch."""
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            room = len(self.tokens) - 1 - self.per_epoch * self.context
            phase = rng.integers(min(room, self.context - 1) + 1)
            self.epoch, self.starts = epoch, rng.permutation(self.per_epoch) * self.context + phase
        return self.starts

    def rows(self, first, count):
        """Rows first .. first + count - 1 of the run: ids and targets, both (count, context)."""
        rows = range(first, first + count)
        starts = [self.epoch_starts(row // self.per_epoch)[row % self.per_epoch] for row in rows]
        window = np.asarray(starts, int)[:, None] + np.arange(self.context + 1)
        block = torch.from_numpy(self.tokens[window].astype(np.int64))
        return block[:, :-1].contiguous(), block[:, 1:].contiguous()


def micro_batches(loader, step, n_rows, grad_accum, rank=0, world=1):
    """This process's share of the `n_rows` rows of `step`, as `grad_accum` batches. All batches of
    all processes have equally many rows, give or take one; with few rows, some have none."""
    parts = grad_accum * world
    bounds = [step * n_rows - (-i * n_rows // parts) for i in range(parts + 1)]
    mine = range(rank * grad_accum, (rank + 1) * grad_accum)
    return [loader.rows(bounds[i], bounds[i + 1] - bounds[i]) for i in mine]


# --------------------------------------------------------------------------------------------
# Optimizers and schedule
# --------------------------------------------------------------------------------------------


def orthogonalize(g, steps=5):
    """Approximate the (semi-)orthogonal matrix nearest to each matrix of g (n, rows, columns).

    Applies an odd polynomial `steps` times, by matrix products alone. This brings the singular
    values of the normalised g, which are at most 1, to between 0.7 and 1.2, except those very near
    0 (Newton-Schulz; coefficients by Keller Jordan, 2024).
    """
    x = g.float()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.to(DTYPES[native_dtype(g.device)])  # after this division, since fp16 has a small range
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # so that x @ x.mT is the smaller of the two products
    for _ in range(steps):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return (x.mT if tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for the matrices inside blocks and inputs (Keller Jordan, 2024).

    Adam scales each entry by its own history; Muon scales each *direction* of the matrix: every
    singular value of the step is about one, so rare directions are learned as fast as frequent
    ones. It costs a few matrix products per step and reaches the same loss in half the steps at our
    sizes. torch.optim.Muon is not used, because it multiplies in bf16, which many CPUs emulate.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            # matrices of one shape go through the products together; a sharded one (--shard) is
            # gathered first and goes alone
            alike = defaultdict(list)
            for p in (p for p in group["params"] if p.grad is not None):
                alike[p if hasattr(p, "full_tensor") else p.shape].append(p)
            for params in alike.values():
                for p in params:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                buffers = [self.state[p]["momentum"] for p in params]
                updates = [p.grad for p in params]  # changed in place: the step is their last use
                torch._foreach_lerp_(buffers, updates, 1 - group["momentum"])
                torch._foreach_lerp_(updates, buffers, group["momentum"])  # Nesterov momentum
                updates = orthogonalize(torch.stack([full_tensor(u) for u in updates]))
                rows, columns = params[0].shape
                # each output of a tall matrix then changes as much as one of a square matrix
                step_size = group["lr"] * max(1, rows / columns) ** 0.5
                updates = [shard_like(update, p) for update, p in zip(updates, params)]
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, updates, alpha=-step_size)


# Optimizers other than AdamW for matrices in blocks and `model.inputs`: {name: (class, its rate)}.
# The flag --NAME_lr changes the rate; RECIPE_CHANGES has other settings. To add one, add a
# line here with a class that takes lr and weight_decay.
MATRIX_OPTIMIZERS = {"muon": (Muon, 0.02)}


LARGE_TABLE = 2**15  # Adagrad trains tables of at least so many rows, except `embed` and positions
ADAGRAD_RATIO = 13  # Adagrad's learning rate divided by embed_lr


def make_optimizers(model, args):
    """The optimizers of all parameters that require a gradient; each group keeps its "peak" lr.

    The matrices inside blocks and `inputs` go to AdamW with decay, or to one of MATRIX_OPTIMIZERS.
    The rest goes to AdamW without decay: decay would shrink the scales and biases of norms for
    nothing, and undo what rarely seen rows of tables and head have learned. Large tables, except
    `embed` and positions, go to Adagrad, which changes only the rows that a step has read.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    tables = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, lm.Table)}
    tables -= {"embed.weight", "position.weight"}
    inner = {n for n, p in named if p.dim() == 2 and n.startswith(("blocks.", "inputs."))} - tables
    matrices = [p for n, p in named if n in inner]
    large = {n: p for n, p in named if n in tables and len(p) >= LARGE_TABLE}
    embed_lr, tied = args.embed_lr or args.lr, model.config.tied
    table_rates = dict.fromkeys(tables, embed_lr) | {"head.weight": args.head_lr or args.lr}
    # a tied table is also the head: its rate is at most lr
    table_rates["embed.weight"] = min(embed_lr, args.lr) if tied else embed_lr
    own_rate = [(n, p) for n, p in named if n in table_rates and n not in large]
    groups = [dict(params=[p], lr=table_rates[n]) for n, p in own_rate]
    others = [p for n, p in named if n not in table_rates and n not in inner]
    groups.append(dict(params=others, lr=args.lr))
    optimizers = []
    if args.optimizer in MATRIX_OPTIMIZERS and matrices:
        make, rate = MATRIX_OPTIMIZERS[args.optimizer][0], getattr(args, f"{args.optimizer}_lr")
        optimizers.append(make(matrices, lr=rate, weight_decay=args.weight_decay))
    else:
        groups.append(dict(params=matrices, lr=args.lr, weight_decay=args.weight_decay))
    if groups := [g for g in groups if g["params"]]:
        # eps is far below the usual 1e-8: gradients of a mean over thousands of tokens are tiny
        options = dict(betas=(args.beta1, args.beta2), eps=1e-10, weight_decay=0.0, fused=True)
        optimizers.append(torch.optim.AdamW(groups, **options))
    if large:
        torch.sparse.check_sparse_tensor_invariants.disable()  # the default; torch warns if unset
        for name, p in large.items():  # if sparse, gradients have only the rows that were read
            alone = p.device.type == "cpu" and not args.compile and not dist.is_initialized()
            model.get_submodule(name.removesuffix(".weight")).sparse = alone
        optimizers.append(torch.optim.Adagrad(large.values(), lr=ADAGRAD_RATIO * embed_lr))
    for group in (g for o in optimizers for g in o.param_groups):
        group["peak"] = group["lr"]
    return optimizers


# Each function maps progress f to a factor for lr - min_lr. The end of the warmup is f = 0, and the
# end of the run is f = 1. To add a schedule, add a line here.
SCHEDULES = {
    "cosine": lambda f: 0.5 * (1 + math.cos(math.pi * f)),
    "linear": lambda f: 1 - f,
    "wsd": lambda f: min(1.0, (1 - f) / 0.4),  # warmup, stable, decay over the last 40 %
    "constant": lambda f: 1.0,
}


def fraction_done(args, step, seconds):
    """The fraction of the run that is over: of its steps or of its minutes, the larger one."""
    of_steps = step / args.max_steps if args.max_steps else 0.0
    return max(of_steps, seconds / 60 / args.max_minutes if args.max_minutes else 0.0)


def scheduled_lr(args, state):
    """The learning rate of the coming step: a linear warmup from lr / warmup_steps to lr, then the
    schedule from lr to min_lr over the rest of the run, by the limits given now (a resumed run may
    have new ones). `state` is a `Run`'s; warm_seconds is how long the warmup took."""
    if state["step"] < args.warmup_steps:
        return args.lr * (state["step"] + 1) / args.warmup_steps
    warm = fraction_done(args, args.warmup_steps, state["warm_seconds"])
    fraction = (fraction_done(args, state["step"], state["seconds"]) - warm) / (1 - warm)
    share = SCHEDULES[args.schedule](min(1.0, max(0.0, fraction)))
    return args.min_lr + (args.lr - args.min_lr) * share


# --------------------------------------------------------------------------------------------
# Evaluation: fixed windows, in order, the same ones every time
# --------------------------------------------------------------------------------------------


@fast_products()  # float32 products by oneDNN where it is faster on this CPU
def evaluate(model, tokens, byte_lengths, runtime, limit=None, context=None, stride=None):
    """Return the loss over windows of `tokens`, each target counted once, for metrics.jsonl.

    The windows, of `context` targets (default: the model's), cover the split or, if it has more
    than `limit` tokens, are spread over it. They are separate or, with `stride`, begin that many
    tokens apart: after the first, each counts only its last `stride` targets (the rest is context).
    val_loss is in nats per token, val_ppl its exponential, val_bpb in bits per byte of text (which
    compares across tokenizers), val_share the share of targets that were read. `byte_lengths` has
    the bytes of each id, -1 for ids without a token. `runtime` is a data.machine.Runtime.
    """
    T, targets = context or model.config.context, len(tokens) - 1
    stride = stride or T
    if targets < 1:
        raise UserError(f"the validation text has {len(tokens)} tokens: at least two are needed")
    starts = np.arange(0, max(1, targets - T + stride), stride)
    if limit and limit < targets:
        wanted = max(1, min(limit // stride, len(starts)))
        starts = starts[np.arange(wanted) * len(starts) // wanted]
    full = starts[starts + T <= targets]
    per_batch = max(1, 8192 // T)
    batches = [full[i : i + per_batch] for i in range(0, len(full), per_batch)]
    batches += [[s] for s in starts if s + T > targets]  # the short rest, in a batch of its own
    losses, count, n_bytes = [torch.zeros((), device=runtime.device)], 0, 0
    for batch, is_new in watched(list(runtime.share(batches)), "validating: batch"):
        length = min(T, targets - batch[0])
        window = np.asarray(batch)[:, None] + np.arange(length + 1)
        block = torch.from_numpy(tokens[window].astype(np.int64))
        goals = block[:, 1:].clone()
        goals[np.asarray(batch) > 0, : T - stride] = -100
        places = lm.target_places(goals)
        n_bytes += is_new * int(byte_lengths[goals.flatten()[places].numpy()].clip(0).sum())
        count += is_new * len(places)  # `is_new` is False for a repeat, see Runtime.share
        ids, goals, places = runtime.upload([block[:, :-1], goals, places])
        with lm.evaluating(model), runtime.autocast():
            losses.append(is_new * model(ids, goals, places=places))  # read later: no GPU sync
    loss, count, n_bytes = runtime.total(sum(torch.stack(losses).tolist()), count, n_bytes)
    mean = loss / count
    return {
        "val_loss": mean,
        "val_ppl": math.exp(min(mean, 700)),
        "val_bpb": loss / math.log(2) / n_bytes if n_bytes else None,
        "val_share": count / targets,
    }


# --------------------------------------------------------------------------------------------
# A step: any number of micro-batches, one gradient
# --------------------------------------------------------------------------------------------


@dataclass
class Task:
    """What `fit` needs to know about what is learned.

    batches(step): this process's micro-batches, tuples of tensors that begin with the ids.
    evaluate(model, when): a dict with at least "val_loss"; `when` is "start", "step" or "end".
    extra: what checkpoints contain besides weights, such as the tokenizer's spec.
    loss(model, *batch): the *summed* loss of a micro-batch.
    count(*batch): what losses are divided by; by default the targets (last tensor) except -100.
    weights(model): the tensors that checkpoints keep, by name; all of them unless only adapters
        are trained.
    score(evaluation): the smallest one is best.
    metrics(): {name: number} that is added to a line of the log.
    curves, unit: what loss.svg shows: pairs (name, key in metrics.jsonl), measured in `unit`.
    """

    batches: Callable
    evaluate: Callable
    extra: dict
    loss: Callable = lambda model, ids, targets: model(ids, targets)
    count: Callable = lambda *batch: int((batch[-1] != -100).sum())
    weights: Callable = nn.Module.state_dict
    score: Callable = lambda row: row["val_loss"]
    metrics: Callable = dict
    curves: tuple = (("train", "loss"), ("validation", "val_loss"))
    unit: str = "loss, nats per token"


@fast_products()
def training_step(model, task, batches, runtime, scaler, seed):
    """Forward and backward over this step's micro-batches. Returns this process's part of the
    mean loss, as a tensor (to avoid a GPU sync), and the number of tokens that all processes read.

    The summed losses are divided by the target tokens of the whole step, over all micro-batches and
    processes, so how they are spread over batches matters only to `loss_with_balance`. Dropout is
    a function of `seed`, a tuple, and of the micro-batch's number among those of all processes.
    """
    count, tokens = runtime.total(
        sum(task.count(*b) for b in batches), sum(b[0].numel() for b in batches)
    )
    if not count:
        raise UserError("this step has no target token: every label is masked")
    total, last = 0.0, len(batches) - 1
    for i, batch in enumerate(batches):
        number = runtime.rank * len(batches) + i
        torch.manual_seed(int(np.random.SeedSequence((*seed, number)).generate_state(1)[0]))
        # DDP exchanges gradients in the last backward pass of a step. FSDP does so in each one:
        # otherwise every process would hold the gradients of the whole model
        replicated = runtime.world > 1 and not runtime.sharded
        with model.no_sync() if replicated and i < last else contextlib.nullcontext():
            with runtime.autocast():
                loss = task.loss(model, *runtime.upload(batch))
            # DDP and FSDP average over processes, but the sum is wanted
            scaler.scale(loss * (runtime.world / count)).backward()
        total = total + loss.detach()
    return total / count, int(tokens)


def clear_gradients(model):
    """Drop all gradients. With gradient checkpointing those of the blocks become zeros instead:
    allocated in the backward pass, between activations that come and go, they would fragment the
    heap (4 rows of 1,024 tokens at GPT-2's shape peaked at 4.7 GB, not 3.5)."""
    model.zero_grad(set_to_none=True)
    if model.grad_checkpoint:
        for p in (p for p in model.blocks.parameters() if p.requires_grad):
            p.grad = torch.zeros_like(p)


@fast_products()
def optimizer_step(model, optimizers, scaler, grad_clip, runtime):
    """Clip gradients, step, clear them. Returns the norm before clipping, without large tables."""
    for o in optimizers:
        scaler.unscale_(o)
    # in every run the norm leaves out Adagrad's tables: their gradients may be sparse (on a CPU)
    adagrad = [o for o in optimizers if isinstance(o, torch.optim.Adagrad)]
    tables = {p for o in adagrad for group in o.param_groups for p in group["params"]}
    params = [p for p in model.parameters() if p.grad is not None and p not in tables]
    norm = full_tensor(nn.utils.get_total_norm([p.grad for p in params]))
    # on a CPU, skip the pass over all gradients if the norm is small, as it mostly is; on a GPU
    # always clip, because comparing the norm would be a GPU sync
    if grad_clip and (runtime.asynchronous or norm > grad_clip):
        nn.utils.clip_grads_with_norm_(params, grad_clip, norm)
    # the scaler would skip only the optimizer whose gradients are not finite: skip all of them
    skip = scaler.is_enabled() and len(optimizers) > 1 and not norm.isfinite()
    for o in optimizers if not skip else ():
        scaler.step(o)
    clear_gradients(model)
    scaler.update()
    return norm


# --------------------------------------------------------------------------------------------
# Checkpoints: all that resuming needs
# --------------------------------------------------------------------------------------------


class Run:
    """A run in progress: what a checkpoint saves (model, optimizers, loss scaling, and `state`,
    plain numbers), and when and where it is saved."""

    def __init__(self, model, task, args, runtime, out):
        self.model, self.task, self.args, self.runtime, self.out = model, task, args, runtime, out
        self.optimizers = make_optimizers(model, args)
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == "fp16")
        # warm_seconds: duration of the warmup; bad: evaluations since the best one
        self.state = dict(step=0, tokens=0, seconds=0.0, warm_seconds=0.0)
        self.state |= dict(best=math.inf, best_step=0, bad=0)

    def evaluate(self, log, train_loss):
        """Evaluate and log it. Returns the row, and whether its score is the best (smallest)."""
        row = {"step": self.state["step"], **self.task.evaluate(self.model, "step")}
        state, score = self.state, self.task.score(row)
        better = score < state["best"]
        state["bad"] = 0 if better else state["bad"] + 1
        if better:
            state["best"], state["best_step"] = score, state["step"]
        log.evaluation(row, train_loss, better)
        return row, better

    def save(self, best=False):
        """Write last.pt, and best.pt if this is the best evaluation. best.pt comes first: after a
        crash in between, resuming from the older last.pt writes it again."""
        weights = whole_tensors(self.task.weights(self.model), self.runtime)
        optimizers = [whole_tensors(o.state_dict(), self.runtime) for o in self.optimizers]
        if self.runtime.rank > 0:
            return
        inference = {"config": asdict(self.model.config), "model": weights, **self.task.extra}
        inference |= {"step": self.state["step"], "best": self.state["best"]}
        if best:
            lm.save_checkpoint(self.out / "best.pt", inference)
        resuming = {
            "optimizers": optimizers,
            "scaler": self.scaler.state_dict(),
            "state": dict(self.state),
            "args": vars(self.args),
            "device": self.runtime.device.type,
        }
        lm.save_checkpoint(self.out / "last.pt", inference | resuming)

    def restore(self, content):
        """Restore all that `save` wrote, except the weights, which the model has already. Learning
        rates, decay and betas (all options of the groups) stay those of the current command."""
        for optimizer, saved in zip(self.optimizers, content["optimizers"], strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for i, moments in saved["state"].items():  # one by one, as a GPU may not hold all
                tensors = {k: v for k, v in moments.items() if v.dim()}
                if any(v.shape != params[i].shape for v in tensors.values()):
                    raise UserError(f"{self.out} trained other parameters: start with --ckpt")
                moments |= {k: shard_like(v, params[i]) for k, v in tensors.items()}
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        if content["scaler"]:  # empty if the run was in another precision
            self.scaler.load_state_dict(content["scaler"])
        del content["model"], content["optimizers"]  # free the CPU's copies if a GPU has its own
        self.state.update(content["state"])
        if any(content["args"].get(k) != vars(self.args)[k] for k in ("max_steps", "max_minutes")):
            self.state["bad"] = 0  # with another limit, --patience counts anew


# --------------------------------------------------------------------------------------------
# fit: the training loop of every language model here
# --------------------------------------------------------------------------------------------


def end_reason(args, state):
    """Why the run is over, in one line; None while it is not."""
    if fraction_done(args, state["step"], state["seconds"]) >= 1:
        return "this run is finished: raise --max_steps, --max_minutes or (finetune.py) --epochs"
    if args.patience and state["bad"] >= args.patience:
        bad = f"{state['bad']} evaluations without a better one"
        return f"{bad}: stopping early; raise --patience or a limit to continue"


class Meter:
    """Mean loss and speed over the latest `window` steps, and the last gradient norm. Losses stay
    tensors until `read`, since reading one is a GPU sync."""

    def __init__(self, window, dtype):
        # work: (tokens, FLOPs, seconds) of each step
        self.work, self.losses = deque(maxlen=window), deque(maxlen=window)
        self.unread, self.norm, self.dtype = [], 0.0, dtype

    def read(self, step):
        """Read the losses up to `step`. UserError if one, or its gradient, is not finite (fp16's
        loss scaling expects such norms and skips these steps)."""
        if not self.unread:
            return
        rows = torch.stack([torch.stack(pair) for pair in self.unread]).tolist()
        for number, (loss, norm) in enumerate(rows, start=step - len(rows) + 1):
            if not (math.isfinite(loss) and (math.isfinite(norm) or self.dtype == "fp16")):
                raise UserError(
                    f"step {number}: the loss ({loss}) or its gradient is not finite; the last "
                    f"checkpoint is kept. Try a lower --lr or more --warmup_steps"
                    f"{', or --dtype fp32' * (self.dtype != 'fp32')}"
                )
            self.losses.append(loss)
            self.norm = norm
        self.unread.clear()

    def mean_loss(self, step, runtime):
        """The mean loss of the window up to `step`, over all processes; None before any step."""
        self.read(step)
        return runtime.total(sum(self.losses))[0] / len(self.losses) if self.losses else None

    def row(self, state, lr, runtime):
        """The row of metrics.jsonl."""
        tokens, flops, seconds = (sum(column) for column in zip(*self.work))
        row = dict(step=state["step"], tokens=state["tokens"], seconds=round(state["seconds"], 3))
        row |= dict(loss=self.mean_loss(state["step"], runtime), lr=lr, grad_norm=self.norm)
        mfu = flops / seconds / (runtime.peak * runtime.world)
        return row | dict(tok_s=round(tokens / seconds), mfu=mfu)


def fit(model, task, args, runtime, out, resume=None):
    """Train `model` on `task` and write the run to folder `out`. Returns the final metrics, or None
    if a resumed run had ended. `args` has what `add_optimization` adds, max_steps, max_minutes,
    seed, compile and eval_tokens; `resume` is the content of a last.pt whose weights the
    model has. UserError if a loss is not finite, SystemExit(130 or 143) after a stop signal."""
    run = Run(model, task, args, runtime, out)
    if resume:
        run.restore(resume)
    state, evaluation, stopping = run.state, {}, 0
    log = Log(out, state["step"], quiet=runtime.rank > 0)
    if over := end_reason(args, state):
        log.line(over)
        # a run that was killed before its final evaluation skips the loop and makes up for it below
        if runtime.of_first(any(r.get("final") and r["step"] == state["step"] for r in log.rows)):
            return None
    log.settings(vars(args), asdict(model.config), parameters=lm.count_parameters(model)["total"])
    model.train()
    # mostly the model and the runtime themselves; see the next chapter for what differs
    step_model, step_runtime, after_step = make_runner(model, task, args, runtime, state["step"])
    clear_gradients(model)
    meter = Meter(args.log_every, runtime.dtype)
    train_loss = meter.mean_loss if task.unit == Task.unit else lambda *_: None  # None: not in nats
    with StopSignal() as stop, log:
        if not state["step"]:
            log.evaluation({"step": 0, **task.evaluate(model, "start")})
        elif over:  # perhaps stopped before the evaluation of its last step
            evaluation, better = run.evaluate(log, None)
            run.save(better)
        while not (stopping or end_reason(args, state)):
            start = time.perf_counter()
            if state["step"] <= args.warmup_steps:
                state["warm_seconds"] = state["seconds"]
            lr = scheduled_lr(args, state)
            for group in (g for o in run.optimizers for g in o.param_groups):
                group["lr"] = group["peak"] * lr / args.lr
            batches, seed = task.batches(state["step"]), (args.seed, state["step"])
            loss, tokens = training_step(step_model, task, batches, step_runtime, run.scaler, seed)
            norm = optimizer_step(model, run.optimizers, run.scaler, args.grad_clip, runtime)
            after_step()

            # count the step. Reading losses is a GPU sync: only for a row, a save, every tenth step
            state["step"] += 1
            state["tokens"] += tokens
            meter.unread.append((loss.float(), norm.float()))
            log_now = state["step"] % args.log_every == 0
            if log_now or state["step"] % 10 == 0 or not runtime.asynchronous:
                meter.read(state["step"])
            # one clock for all processes: they must agree on when the time is up
            seconds = runtime.total(time.perf_counter() - start)[0] / runtime.world
            state["seconds"] += seconds
            meter.work.append((tokens, tokens * flops_per_token(model, batches), seconds))
            done = fraction_done(args, state["step"], state["seconds"])
            if log_now or done >= 1:
                row = meter.row(state, lr, runtime)
                metrics = task.metrics() | expert_metrics(step_model, runtime)
                log.write(**row, **metrics)
                log.line(step_line(row, metrics, args, done), rewrite=True)
            elif int(state["seconds"]) > int(state["seconds"] - seconds):  # each second
                log.live(step_line(meter.row(state, lr, runtime), {}, args, done))

            stopping, better = runtime.total(stop.number)[0], False
            evaluate_now = done >= 1 or state["step"] % args.eval_every == 0
            if evaluate_now and not stopping:
                evaluation, better = run.evaluate(log, train_loss(state["step"], runtime))
            save_now = args.save_every and state["step"] % args.save_every == 0
            if stopping or evaluate_now or save_now:
                meter.read(state["step"])  # never save weights that are not finite
                run.save(better)
                log.draw(task.curves, task.unit)
        if runtime.total(stop.number)[0]:
            log.line(f"stopped at step {state['step']}: continue with --resume {cli.quoted(out)}")
            raise SystemExit(128 + (stop.number or signal.SIGINT))
        stop.restore()  # everything is saved: from here on, a signal ends the run at once
        if not over and done < 1:  # stopped early
            log.line(end_reason(args, state))
        if evaluation.get("val_share", 1) < 1 and args.eval_tokens is None:  # now the whole split
            evaluation = {"step": state["step"], **task.evaluate(model, "end")}
            log.line(eval_line(evaluation, train_loss(state["step"], runtime)))
        log.write(**evaluation, final=True)
    return {**evaluation, **state}


# --------------------------------------------------------------------------------------------
# How a model runs: in bf16, compiled, in several processes
# --------------------------------------------------------------------------------------------


class BF16Copy(nn.Module):
    """A bf16 copy of a model, for forward and backward passes on a CPU. At GPT-2's shape it is 1.2
    times as fast as autocast, which casts every weight in every pass.

    bf16 has three digits, and a step often changes a weight by less than the last one. So the model
    itself, the master, stays in float32: gradients are accumulated and the optimizer steps there,
    and `sync_weights` rounds it into the copy. (Micikevicius et al. 2018, section 3.1.)
    """

    def __init__(self, master):
        super().__init__()
        self.low = copy.deepcopy(master)
        self.masters, self.lows = list(master.parameters()), list(self.low.parameters())
        for p, low in zip(self.masters, self.lows):
            low.data = low.data.bfloat16()
            low.register_post_accumulate_grad_hook(partial(self.move_grad, p))

    def forward(self, *args, **kwargs):
        return self.low(*args, **kwargs)

    @staticmethod
    def move_grad(master, low):
        """Add the gradient of a weight of the copy to that of its master, in float32."""
        grad, low.grad = low.grad, None
        master.grad = grad.float() if master.grad is None else master.grad.add_(grad)

    @torch.no_grad()
    def sync_weights(self):
        """Round the master's weights into the copy."""
        torch._foreach_copy_(self.lows, self.masters)


def compiled_if_possible(function, **options):
    """`function`, compiled. If compilation fails, even for a later shape, it runs uncompiled."""
    compiled, works = torch.compile(function, **options), True

    def run(*args):
        nonlocal works
        if works:
            try:
                return compiled(*args)
            except Exception as e:  # whatever the compiler raised, eager mode still works
                works, reason = False, f"{type(e).__name__}: {e}".split("\n")[0][:120]
                print(f"torch.compile does not work here; continuing without it ({reason})")
        return function(*args)

    return run


def compile_blocks(model, task, runtime, step):
    """Compile the blocks for training and try them on a batch of that step. One graph serves all of
    them. (With one graph of the whole model, all gradients would be exchanged at its end.) On a GPU
    the softmax of the loss is compiled as well: it reads the logits twice and writes them once.
    """
    from torch._functorch import config as functorch  # takes a second

    forward, compiled = lm.Block.forward, compiled_if_possible(lm.Block.forward)
    # compile the backward pass during the forward pass, so that a failure can be handled there
    functorch.force_non_lazy_backward_lowering = True

    def run(block, x, rope=None, update_cache=None, *args):
        training = block.training and update_cache is None
        return (compiled if training else forward)(block, x, rope, update_cache, *args)

    if runtime.device.type == "cuda":
        lm.ChunkedLoss.softmax_ = staticmethod(compiled_if_possible(lm.softmax_, dynamic=True))
    for block in model.blocks:
        block.forward = partial(run, block)
        if isinstance(block.feed_forward, lm.MoE):  # its shapes change with every batch
            block.feed_forward.forward = torch.compiler.disable(block.feed_forward.forward)
    with waiting("compiling the model, once, perhaps for a minute"), runtime.autocast():
        task.loss(model, *runtime.upload(task.batches(step)[0])).backward()
    model.expert_counts = 0


def place(model, args, runtime):
    """Move the model to the device. With --shard each process keeps a part of every parameter (rows
    of it): a block is gathered in the runtime's precision when it runs, while weights, gradients
    and moments stay in float32. (ZeRO stage 3, Rajbhandari et al. 2020; torch's FSDP2.)"""
    if not args.shard or runtime.world == 1:
        return model.to(runtime.device, torch.float32)
    if runtime.dtype == "fp16":
        raise UserError("--shard does not work in fp16: choose --dtype bf16 or fp32")
    from torch.distributed import fsdp  # takes a second
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(runtime.device.type, (runtime.world,))
    dtype = None if runtime.dtype == "fp32" else DTYPES[runtime.dtype]
    # inputs are not cast: tables of positions need the precision of float32
    policy = fsdp.MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for module in (*model.blocks, model):  # a model mapped from its file is read part by part
        fsdp.fully_shard(module.float(), mesh=mesh, mp_policy=policy)
    for method in ("hidden", "last_logits"):  # called without forward
        fsdp.register_fsdp_forward_method(model, method)
    runtime.sharded = True
    return model


def make_runner(model, task, args, runtime, step=0):
    """(the module to call in place of `model`, the Runtime to call it in, what to call after each
    optimizer step). The module is the model or its BF16Copy, perhaps compiled or in DDP."""
    device, fp32 = runtime.device, replace(runtime, dtype="fp32")
    # `place` has set the precision of a sharded model
    runner, precision, after_step = model, fp32 if runtime.sharded else runtime, lambda: None
    # no copy on a GPU (casting costs little there), with DDP (it would exchange the gradients of
    # the copy) or of frozen weights (they need not be held twice)
    copied = runtime.dtype == "bf16" and device.type == "cpu" and runtime.world == 1
    copied &= model.config.d_model >= 512  # in a narrow model, casting is as cheap as the copy
    if copied and all(p.requires_grad for p in model.parameters()):
        runner, precision = BF16Copy(model), fp32
        after_step = runner.sync_weights
    ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if args.compile or (args.compile is None and ampere):  # where it is worth its minute
        compile_blocks(getattr(runner, "low", runner), task, precision, step)
    if runtime.world > 1 and not runtime.sharded:  # buffers are only tables of positions
        runner = nn.parallel.DistributedDataParallel(runner, forward_sync_buffers=False)
    return runner, precision, after_step


def expert_metrics(model, runtime):
    """{"experts": how often each expert of each layer was chosen since the last call, in all
    processes, "busiest_expert": the largest share of a layer's choices}; {} without experts."""
    model = getattr(model, "low", getattr(model, "module", model))  # of BF16Copy, of DDP
    counts, model.expert_counts = getattr(model, "expert_counts", 0), 0
    if not torch.is_tensor(counts):
        return {}
    total = np.reshape(runtime.total(*counts.flatten().tolist()), counts.shape)
    share = total.max() / total.sum(axis=1).max()
    return {"experts": total.astype(int).tolist(), "busiest_expert": share}


def flops_per_token(model, batches):
    """`lm.flops_per_token` of micro-batches (ids, targets, ...)."""
    tokens = sum(b[0].numel() for b in batches)
    length = tokens / max(1, sum(len(b[0]) for b in batches))
    learned = sum(np.count_nonzero(b[1].numpy() != -100) for b in batches)
    frozen = not all(p.requires_grad for p in model.parameters())
    return lm.flops_per_token(model.config, length, learned / max(1, tokens), frozen)


def whole_tensors(state, runtime):
    """A state dict whose tensors are whole, in float32 and on the CPU of rank 0, where other
    processes get None. For a sharded model this is a collective."""

    def whole(tensor):
        tensor = full_tensor(tensor)
        return tensor.to("cpu", torch.float32) if runtime.rank == 0 else None

    return tree_map_only(torch.Tensor, whole, dict(state))


def launch(fit, report, runtime, out):
    """Call fit() and then report(its result), if there is one, in every process: those of a sharded
    model must compute together. UserError if another process has ended."""
    if runtime.world > 1:  # torchrun sends SIGTERM if another process has ended; see the line below
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        result = fit()
        if runtime.world > 1:
            dist.barrier()  # until best.pt is written
            gc.collect()  # DDP: a process that exits while DDP still uses gloo's threads is aborted
        if result:
            report(result)
    except (RuntimeError, KeyboardInterrupt) as e:
        saved = f"; {out}/last.pt is saved: --resume {cli.quoted(out)} continues"
        saved = saved if Path(out, "last.pt").exists() else ""
        if isinstance(e, KeyboardInterrupt):  # after the last step, or a second one
            raise KeyboardInterrupt(f"interrupted{saved}") from e
        if isinstance(e, dist.DistError) or "gloo" in str(e):
            raise UserError(f"another process of this run has ended{saved}") from e
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# --------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------


# fmt: off (one line a flag)
def add_machine(add):
    """Add the flags that any run has: where it is computed, and how it goes on."""
    add("--resume", nargs="?", const="", help="continue this run (default: the newest one)")
    add("--seed", type=at_least(0), help="random seed of weights, adapters, batches and dropout")
    add("--device", help="auto (default), cpu, cuda, cuda:1, mps")
    add("--dtype", help="auto (default), fp32, bf16, fp16: precision of matrix products")
    yes_or_no = argparse.BooleanOptionalAction
    add("--compile", action=yes_or_no, help="torch.compile (default: on GPUs since Ampere)")
    add("--grad_checkpoint", action="store_true", default=None, help="less memory, slower")
    add("--shard", action=yes_or_no, help="each of torchrun's processes keeps a part of the model")


def add_optimization(p):
    """Add the flags that `fit` reads in a group of their own; returns its add_argument."""
    add = p.add_argument_group("optimization").add_argument
    beta = between(0, 0.99999)
    add("--grad_accum", type=at_least(1), help="micro-batches per step and process")
    add("--optimizer", choices=("adamw", *MATRIX_OPTIMIZERS), help="of the matrices in blocks")
    add("--lr", type=positive, help="peak learning rate; others keep their ratio to it")
    add("--embed_lr", type=positive, help="learning rate of the embedding and the other tables")
    add("--head_lr", type=positive, help="learning rate of an untied head")
    for name, (_, rate) in MATRIX_OPTIMIZERS.items():
        add(f"--{name}_lr", type=positive, help=f"peak rate of {name} (pretraining: {rate})")
    add("--min_lr", type=at_least(0, float), help="learning rate at the end of the schedule")
    add("--warmup_steps", type=at_least(0), help="steps of linear warmup")
    add("--schedule", choices=tuple(SCHEDULES), help="learning rate schedule after the warmup")
    add("--weight_decay", type=at_least(0, float), help="decay of the matrices inside blocks")
    add("--beta1", type=beta, help="AdamW's first beta")
    add("--beta2", type=beta, help="AdamW's second beta")
    add("--grad_clip", type=at_least(0, float), help="largest gradient norm; 0 is no clipping")
    add("--eval_every", type=at_least(1), help="steps between evaluations, each with a checkpoint")
    add("--save_every", type=at_least(0), help="steps between further checkpoints; 0 is none")
    add("--log_every", type=at_least(1), help="steps between lines")
    add("--patience", type=at_least(0), help="end after so many evaluations without a better one")
    return add


EVAL_TOKENS = 32768  # per evaluation, if no flag says otherwise; the last one reads all
# The fields of Config that have flags; the structured ones only come with models of the Hub
SHAPE = [f.name for f in fields(lm.Config) if f.name not in ("rope_scaling", "window_layers")]


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
    add = add_optimization(p)
    add("--max_steps", type=at_least(1), help=f"default {DEFAULT_STEPS} if there is no limit")
    add("--max_minutes", type=positive,
        help=f"of training, without evaluation (default {DEFAULT_MINUTES} if there is no limit)")
    add("--batch_size", type=at_least(1), help="rows per micro-batch and process")
    add("--short_context", type=at_least(0),
        help="length of the rows in every second step; the other steps have fewer, longer rows "
        "(default 128 without --context, if d_model is below 512 and the context at least 512; "
        "0: all rows have the full context)")
    add("--total_batch_tokens", type=at_least(1), help="tokens per step, instead of --grad_accum")
    add("--eval_tokens", type=at_least(0),
        help=f"tokens per evaluation; 0: all (default {EVAL_TOKENS}, and all in the last one)")
    add("--eval_only", action="store_true", default=None,
        help="print the loss of --ckpt or --resume on the validation text; see --eval_tokens")
    shape = p.add_argument_group("model shape, in place of the preset's (model.Config)")
    comments = dict(re.findall(r"^    (\w+): .*  # (.+)", inspect.getsource(lm.Config), re.M))
    for name in SHAPE:
        kind = type(getattr(lm.Config(), name))
        options = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        if kind is str:
            options["choices"] = tuple(getattr(lm, f"{name.upper()}S"))
        shape.add_argument(f"--{name}", help=comments[name], **options)
    return p
# fmt: on


def optimizer_rates():
    """{flag: value} of the learning rates of MATRIX_OPTIMIZERS."""
    return {f"{name}_lr": rate for name, (_, rate) in MATRIX_OPTIMIZERS.items()}


def short_warmup(steps, max_steps):
    """The default warmup, at most a fifth of the run, so that a short run reaches its peak rate."""
    return min(steps, max(1, max_steps // 5)) if max_steps else steps


def scale_rates(settings, given):
    """`settings` whose other learning rates keep their ratios to the --lr that is `given`."""
    factor = given["lr"] / settings["lr"] if settings["lr"] and "lr" in given else 1.0
    rates = {k: settings.get(k) for k in ("embed_lr", "head_lr", "min_lr", *optimizer_rates())}
    return settings | {k: factor * rate for k, rate in rates.items() if rate}


def resolve(args):
    """Fill in every flag that the user left out. Returns (args, the checkpoint to resume or None).

    Flags that were given win over the settings of the resumed run, or over the recipe.
    """
    given = {k: v for k, v in vars(args).items() if v is not None}
    shape = {*SHAPE, "preset", "ckpt"}
    content = None
    if args.eval_only and args.ckpt is None and args.resume is None:
        args.resume = ""  # the newest run
    if {"grad_accum", "total_batch_tokens"} <= set(given):
        raise UserError("--grad_accum follows from --total_batch_tokens: give one of them")
    if args.resume is not None:
        settings, content = resumed_settings(args, given, shape | {"optimizer", "seed"})
    else:
        if "ckpt" in given and (changed := sorted(shape & set(given) - {"ckpt", "context"})):
            raise UserError(f"--{changed[0]} cannot be given with --ckpt, which brings its shape")
        preset, optimizer = given.get("preset", "tiny"), given.get("optimizer", "adamw")
        data = (args.eval_only and run_settings(args.ckpt).get("data")) or "stdlib"
        settings = {"data": data, "preset": preset} | RECIPE | optimizer_rates()
        settings |= RECIPE_CHANGES.get(optimizer, {}) | RECIPE_CHANGES.get(preset, {})
        if "ckpt" in given:  # rates follow from the model's size, see `settle`
            settings |= dict.fromkeys(("lr", "embed_lr", "head_lr", *optimizer_rates()))
        settings["warmup_steps"] = short_warmup(settings["warmup_steps"], given.get("max_steps"))
        settings = scale_rates(settings, given) | given
        if not {"max_steps", "max_minutes"} & set(given):
            settings |= dict(max_steps=DEFAULT_STEPS, max_minutes=DEFAULT_MINUTES)
    if "grad_accum" in given:
        settings["total_batch_tokens"] = None
    return argparse.Namespace(**{k: settings.get(k) for k in vars(args)}), content


def resumed_settings(args, given, fixed):
    """(settings, content of last.pt) of the run that --resume names: its own settings, changed by
    the flags `given` now. UserError if one of the `fixed` flags would change."""
    run = Path(args.resume or args.out or newest_run())  # --resume --out RUN is --resume RUN, too
    path = run / "last.pt" if run.is_dir() else run
    if not path.exists():
        raise UserError(f"{path} does not exist: name the run to resume, or start from --ckpt")
    # a sharded run maps the file, so that no process ever holds all of it
    sharded = given.get("shard", run_settings(path).get("shard"))
    content = lm.load_checkpoint(path, resuming=not sharded)
    if "args" not in content:
        raise UserError(f"{path} is for sampling: resume a last.pt, or --ckpt {cli.quoted(path)}")
    if ("objective" in content["args"]) != ("objective" in vars(args)):
        script = "finetune.py" if "objective" in content["args"] else "train.py"
        raise UserError(f"{path} was written by {script}: resume it with that, or name another run")
    inherited = {k: v for k, v in content["args"].items() if v is not None}
    inherited["out"] = str(path.parent)  # the folder may have been moved
    fixed = fixed | {"out"} if args.resume else fixed
    if changed := [k for k in given if k in fixed and given[k] != inherited.get(k)]:
        raise UserError(f"--{changed[0]} cannot change when resuming {path}")
    limits = dict.fromkeys(("max_steps", "max_minutes", "epochs"))
    if set(limits) & set(given):  # a new limit replaces the old ones
        inherited |= limits
    if int(os.environ.get("RANK", 0)) == 0:
        unsaid = ("resume", "out", "eval_only")
        new = " and ".join(f"{k} {v}" for k, v in given.items() if k not in unsaid)
        but = f", but {new}" if new else ""
        print(f"resuming {path} at step {content['step']}; settings are the run's own{but}")
    if "dtype" in given:
        content.pop("device", None)  # the given dtype is kept on another device, too
    return scale_rates(inherited, given) | given | {"out": inherited["out"]}, content


def build_model(args, content, folder, meta, tokenizer):
    """The model to train: resumed, from --ckpt, or new in the preset's shape."""
    resuming, device = content is not None, machine.choose_device(args.device)
    if args.ckpt and not resuming:
        content = lm.load_checkpoint(args.ckpt)
    if content is None:
        changes = {k: getattr(args, k) for k in SHAPE if getattr(args, k) is not None}
        # a multiple of 64 suits the hardware and leaves rows for a chat's special tokens
        changes.setdefault("vocab_size", lm.padded_vocab(tokenizer.n_vocab))
        config = lm.preset(args.preset, **changes)
        # with --shard, weights are made in full, but not their gradients and moments
        check_memory(lm.meta_model(config).requires_grad_(not args.shard), 0, device)
        model = lm.Transformer(config)
        if config.norm_topk_prob and config.experts_per_token == 1:
            raise UserError("--norm_topk_prob with one expert a token: the router could not learn")
    else:
        where = args.out if resuming else args.ckpt
        theirs = lm.checkpoint_tokenizer(content, where)
        same = theirs.same_ids(tokenizer)
        if resuming and content.get("data") != data_hashes(meta) and same:
            raise UserError(f"{folder} is not the text of this run: for a new run, give --ckpt")
        if not same:
            raise UserError(other_tokenizer(folder, theirs))
        # with --shard it stays mapped from its file, so that no process ever holds all of it
        dtype = None if args.shard else torch.float32
        if dtype:
            check_memory(lm.meta_model(lm.Config.from_dict(content["config"])), 0, device)
        model = lm.model_from_checkpoint(content, dtype=dtype, where=where)
        if not resuming:
            size = max(tokenizer.n_vocab, model.config.vocab_size)  # the model may lack end of text
            lm.grow_vocabulary(model, lm.padded_vocab(size), model.config.vocab_size)
    if meta["largest_id"] >= model.config.vocab_size:
        size = f"the model's vocab_size {model.config.vocab_size}"
        raise UserError(f"token id {meta['largest_id']} in {folder} is not below {size}")
    model.grad_checkpoint = bool(args.grad_checkpoint)
    return model


def check_context(context, model):
    """The length of training rows: --context, or the model's. UserError if the model's is less."""
    longest = model.config.context
    context = longest if context is None else context
    if not 2 <= context <= longest:
        limit = "at least 2" if context < 2 else f"at most the model's {longest}"
        raise UserError(f"--context {context} must be {limit}")
    return context


def settle(args, model, runtime, context, folder):
    """`args` completed by what follows from the model, the machine and the folder of the text:
    precision, accumulation, learning rates, folders. Nothing changes settings after this."""
    a = argparse.Namespace(**vars(args))
    a.dtype, a.context, a.data = runtime.dtype, context, str(folder)
    # accumulation follows from the tokens a step, or they from it. A run that is resumed in another
    # number of processes keeps its tokens a step, and so the order of its rows
    tokens = a.batch_size * a.context * runtime.world
    a.total_batch_tokens = a.total_batch_tokens or tokens * a.grad_accum
    a.grad_accum, rest = divmod(a.total_batch_tokens, tokens)
    if rest:
        total = f"--total_batch_tokens {a.total_batch_tokens}"
        share = f"{tokens}: {runtime.world} process(es) x --batch_size {a.batch_size} x {a.context}"
        raise UserError(f"{total} is not a multiple of {share}")
    if a.ckpt:  # lower rates for larger models: 1e-3 for the default shape, 6e-5 for GPT-2
        size = sum(p.numel() for p in model.parameters())
        a.lr = a.lr or float(f"{min(1e-3, 15 / size ** (2 / 3)):.1e}")
        for name, rate in optimizer_rates().items():
            setattr(a, name, getattr(a, name) or rate * a.lr / 2e-3)  # half of RECIPE's at 1e-3
        if model.config.init == "zero_out":  # about the ratios of RECIPE
            a.embed_lr, a.head_lr = a.embed_lr or 10 * a.lr, a.head_lr or 3 * a.lr
    if a.resume is None:  # last, because it creates the folder of the run
        a.out = str(run_folder(a.out, folder.name, runtime))
    return a


def header(model, args, runtime, per_batch, per_step, length, learned=1.0):
    """The lines before the first step: what is trained, what it takes. A micro-batch has up to
    `per_batch` tokens, a step `per_step` (or None), a row `length`; `learned` is a share."""
    c, counts = model.config, lm.count_parameters(lm.meta_model(model.config))
    n = counts["total"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = f", {trained:,} trained ({trained / n:.2%})" if trained != n else ""
    share += f", {counts['active']:,} active for a token" if c.experts else ""
    lines = [
        f"device {runtime.device}, {runtime.dtype}, {runtime.world} process(es), matmul peak "
        f"{runtime.peak / 1e9:,.0f} GFLOP/s",
        f"{n:,} parameters{share}: {c.n_layer} layers x {c.d_model}, {c.n_head} heads, context "
        f"{c.context}, vocabulary {c.vocab_size:,}",
        f"memory about {memory_needed(model, per_batch, length) / 2**20:,.0f} MB",
    ]
    if per_step:
        lines[-1] += f"; {per_step:,.0f} tokens a step"
    tables = ("embed_lr", "head_lr") if not c.tied and model.embed.weight.requires_grad else ()
    rates = {k: vars(args).get(k) for k in ("lr", *tables, f"{args.optimizer}_lr")}
    if set(rates.values()) - {None, args.lr}:
        rates = ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items() if rate)
        lines.insert(2, f"learning rates: {rates}")
    # not for narrow models, which spend most of the time outside of matrix products
    if args.max_steps and per_step and c.d_model >= 512:  # half of the scores are masked
        flops = lm.flops_per_token(c, length / 2, learned, trained != n)
        least = clock(flops * per_step * args.max_steps / (runtime.peak * runtime.world))
        lines[-1] += f"; {args.max_steps:,} steps take at least {least} at the matmul peak"
    if args.max_minutes:
        lines.append(f"stops after {args.max_minutes:g} minutes of training at the latest")
    return lines


def closing_text(model, tokenizer, meta, result, out, val):
    """The last lines: figures, beside those of xz, and a continuation of the validation text."""
    # imported here, because sample.py is read after train.py
    from sample import DEFAULTS, allowed_ids, generate

    prompt_ids = val[:16].tolist()
    with lm.evaluating(model), waiting("writing a sample"):
        allowed = allowed_ids(model, tokenizer)
        rows = generate(model, [prompt_ids], 160, allowed=allowed, **DEFAULTS)
        text = printable(tokenizer.decode(prompt_ids + [row[0] for row in rows]))
    bits, r, xz = "", result, meta.get("xz_after_training_text")
    if xz and r.get("val_bpb"):
        bits = f"held-out text: {r['val_bpb']:.3f} bits per byte on separate windows, "
        if "overlap_bpb" in r:
            bits += f"{r['overlap_bpb']:.3f} on overlapping ones, as a compressor reads "
            bits += f"({r['overlap_share']:.0%} of it); "
        bits += f"xz -9e after the training text {xz:.3f}\n"
    return (
        f"{r['tokens']:,} tokens in {clock(r['seconds'])} of training; "
        f"best val loss {r['best']:.4f} at step {r['best_step']}\n{bits}\n"
        f"--- a sample ({len(prompt_ids)} tokens of prompt) ---\n{text}\n---\n"
        f"{out}/: last.pt, best.pt, metrics.jsonl, loss.svg\n"
        f"generate text with it: python sample.py --ckpt {cli.quoted(out)}"
    )


def main(argv=None):
    args, content = resolve(build_parser().parse_args(argv))
    folder = find_data(args.data, resuming=content is not None)
    meta, train, val = read_meta(folder), read_tokens(folder, "train"), read_tokens(folder, "val")
    tokenizer = Tokenizer(meta["tokenizer"])
    torch.manual_seed(args.seed)
    model = build_model(args, content, folder, meta, tokenizer)
    previous, context = (content or {}).get("device"), check_context(args.context, model)
    if args.short_context is None:
        narrow = args.context is None and model.config.d_model < 512 <= context
        args.short_context = 128 if narrow else 0
    short = min(args.short_context or context, context)
    per_batch = max(args.batch_size * short, context)
    runtime = make_runtime(args.device, args.dtype, previous, model.config, per_batch, 128)
    place(model, args, runtime)

    def measure(model, when):
        few = EVAL_TOKENS if args.eval_tokens is None else args.eval_tokens
        read = partial(evaluate, model, val, tokenizer.byte_lengths, runtime, context=context)
        if when != "end":
            return read(few)
        row, overlap = read(args.eval_tokens), read(few, stride=max(1, context // 8))
        return row | {"overlap_bpb": overlap["val_bpb"], "overlap_share": overlap["val_share"]}

    log = print if runtime.rank == 0 else lambda *_, **__: None
    if args.eval_only:
        whole = partial(measure, model, "end")
        return launch(whole, lambda row: log(f"{folder}: {eval_line(row)}"), runtime, folder)
    loaders = [TokenLoader(train, length, args.seed) for length in sorted({short, context})]
    check_memory(model, per_batch, runtime.device, context)
    args = settle(args, model, runtime, short, folder)
    args.context, out = context, Path(args.out)
    n_rows = [max(1, args.total_batch_tokens // loader.context) for loader in loaders]
    per_step = sum(n * loader.context for n, loader in zip(n_rows, loaders)) / len(loaders)

    def batches(step):
        number, kind = divmod(step, len(loaders))
        share = args.grad_accum, runtime.rank, runtime.world
        return micro_batches(loaders[kind], number, n_rows[kind], *share)

    def loss(model, ids, targets):
        if len(ids):
            return model(ids, targets, places=slice(None))  # none is -100
        # a batch without rows has a gradient, too, of zeros, because DDP and FSDP wait for it
        return model(ids.new_zeros(1, 2), targets.new_full((1, 2), -100), places=slice(0))

    task = Task(
        batches=batches,
        evaluate=measure,
        extra={"tokenizer": tokenizer.spec, "data": data_hashes(meta)},
        loss=loss,
    )  # fmt: skip
    ratio = len(train) / sum(p.numel() for p in model.parameters())
    log(f"{out}: {folder}, {tokenizer.name}, {args.optimizer}")
    log(f"{len(train):,} training tokens, {ratio:.2g} per parameter (Chinchilla advises 20)")
    log(*header(model, args, runtime, per_batch, per_step, context), sep="\n")

    def report(result):
        # a sharded model's layers compute in runtime.dtype, but a KVCache has its weights' dtype
        with runtime.autocast() if runtime.sharded else contextlib.nullcontext():
            log(closing_text(model, tokenizer, meta, result, out, val))

    launch(partial(fit, model, task, args, runtime, out, content), report, runtime, out)


if __name__ == "__main__":
    run_cli(main)
