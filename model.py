"""The whole transformer, by hand, in PyTorch.

    python model.py --preset gpt2                 what a shape costs: parameters, bytes, FLOPs
    python model.py --preset novel --tokens 77919 and the loss a scaling law predicts for it
    python model.py --ckpt out/stdlib             the same for a trained model
    python model.py --check gpt2                  our logits of a model of the Hub, and others'
    python model.py --ckpt out/llama --export hf  a folder that transformers reads

One Transformer covers GPT-2, the Llama and Qwen families and the course's own model: every
difference between them is a field of `Config`, read once where the module is built. Data meets
the chapters in this order: configuration, the parts of a block, the loss, the model, the key/value
cache, checkpoints, other people's weights (safetensors, Hugging Face's names) in and out, and the
table that this file prints when you run it.

It does not know text (prepare_data.py has tokenizers, and downloads models), optimisers (train.py)
or sampling (sample.py).

Shapes in comments: B batch, T time, C channels (d_model), nh query heads, nkv key/value heads,
hs head size, V vocabulary, N rows (B*T flattened), S cached keys.
"""

import contextlib
import copy
import importlib
import json
import math
import mmap
import os
import re
import shutil
import signal
import sys
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C during the slow imports is no traceback; `console` takes over
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from prepare_data import (
    WEIGHTS,
    Parser,
    Tokenizer,
    console,
    fetch_hub,
    generation_config,
    hub_tokenizer,
    is_hub_name,
    read_json,
    tokenizer_config,
    tokenizer_json,
    weight_files,
)


class ModelError(ValueError):
    """A user's mistake about a model: one line that names the thing, the value and the remedy."""


# --------------------------------------------------------------------------------------------
# Configuration: every architectural choice, and the shapes that have names
# --------------------------------------------------------------------------------------------

POSITIONS = ("rope", "learned", "sinusoidal")
NORMS = ("rmsnorm", "layernorm")
# To add an activation: name it here, and in GATED if it is a gated one.
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2's
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # Primer, So et al. 2021
    "swiglu": F.silu,  # Shazeer 2020: silu(x W_gate) * (x W_up)
}
GATED = ("swiglu",)  # their feed-forward has a third matrix
INITS = ("zero_out", "gpt2")
ROPE_SCALINGS = {  # for more context than the model was first trained with; their parameters
    "linear": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
}


@dataclass
class Config:
    """The shape of a Transformer. Fields left at None follow from the others."""

    vocab_size: int = 2048
    n_layer: int = 4
    n_head: int = 4
    d_model: int = 128
    context: int = 128  # the most tokens the model can look at
    n_kv_head: int | None = None  # grouped-query attention; None: as many as n_head
    head_size: int | None = None  # None: d_model / n_head
    d_ff: int | None = None  # None: 4 * d_model, for swiglu 8/3 of it (the same parameters)
    position: str = "rope"
    norm: str = "rmsnorm"
    norm_weight: bool = True  # a learned scale (and, for layernorm, shift) in every norm
    activation: str = "swiglu"
    qkv_bias: bool = False
    out_bias: bool = False  # on the projection after attention
    ff_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False  # RMS-normalise queries and keys per head
    embed_norm: bool = False  # one more norm, right after the embedding
    tied: bool = False  # the head is the embedding table, transposed
    dropout: float = 0.0
    eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": one of ROPE_SCALINGS, its parameters...}
    init: str = "zero_out"

    def __post_init__(self):
        if self.n_head < 1 or (self.head_size is None and self.d_model % self.n_head):
            raise ModelError(f"d_model {self.d_model} is not divisible by n_head {self.n_head}")
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.head_size is None:
            self.head_size = self.d_model // self.n_head
        if self.d_ff is None:
            wide = 4 * self.d_model
            self.d_ff = wide if self.activation not in GATED else (wide * 2 // 3 + 7) // 8 * 8
        self.check()

    def check(self):
        """Raise ModelError for a value or a combination that no model can have."""
        for name, allowed in (
            ("position", POSITIONS),
            ("norm", NORMS),
            ("activation", tuple(ACTIVATIONS)),
            ("init", INITS),
        ):
            if getattr(self, name) not in allowed:
                value = getattr(self, name)
                raise ModelError(f"{name} {value!r} is unknown; choose from {', '.join(allowed)}")
        sizes = ("vocab_size", "n_layer", "d_model", "context", "n_kv_head", "head_size", "d_ff")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ModelError(f"{name} {getattr(self, name)} must be at least 1")
        if self.n_head % self.n_kv_head:
            raise ModelError(f"n_head {self.n_head} is no multiple of n_kv_head {self.n_kv_head}")
        if self.position == "rope" and self.head_size % 2:
            raise ModelError(f"rope turns pairs of channels: head size {self.head_size} is odd")
        for name in ("eps", "rope_theta"):
            if not getattr(self, name) > 0:
                raise ModelError(f"{name} {getattr(self, name)} must be above 0")
        if self.rope_scaling is not None:
            numbers = dict(self.rope_scaling)
            kind = numbers.pop("rope_type", None)
            if set(numbers) != ROPE_SCALINGS.get(kind) or not min(numbers.values()) > 0:
                raise ModelError(f"rope_scaling {self.rope_scaling} is none that we can compute")
        if not 0 <= self.dropout < 1:
            raise ModelError(f"dropout {self.dropout} must be in [0, 1)")
        if self.tied and self.head_bias:
            raise ModelError("a tied head has no bias of its own: drop tied or head_bias")

    @classmethod
    def from_dict(cls, values):
        """Config from a plain dict, e.g. of a checkpoint; an unknown field is an error."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ModelError(f"unknown config fields: {', '.join(sorted(unknown))}")
        try:
            return cls(**values)
        except TypeError as e:
            raise ModelError(f"a config field has a value of the wrong type: {e}") from e


# What learned fastest in our trials at this size (tests/BENCHMARKS.md): norms without weights, one
# more of them after the embedding, squared ReLU, an untied head, and outputs that start at zero.
# LayerNorm learns like RMSNorm here, and torch's kernel for it is twice as fast on a CPU.
_OURS = dict(
    norm="layernorm", norm_weight=False, activation="relu2", qk_norm=True, embed_norm=True
)
_GPT2 = dict(
    vocab_size=50257,
    context=1024,
    position="learned",
    norm="layernorm",
    activation="gelu_tanh",
    qkv_bias=True,
    out_bias=True,
    ff_bias=True,
    tied=True,
    init="gpt2",
)
# train.py replaces vocab_size by what the prepared data needs, rounded up to a multiple of 64.
PRESETS = {
    "tiny": Config(n_layer=4, n_head=4, d_model=160, context=128, **_OURS),
    "small": Config(vocab_size=4096, n_layer=6, n_head=8, d_model=256, context=256, **_OURS),
    "baby": Config(vocab_size=4096, n_layer=6, n_head=6, d_model=384, context=256, **_OURS),
    "gpt2": Config(n_layer=12, n_head=12, d_model=768, **_GPT2),
    "gpt2-medium": Config(n_layer=24, n_head=16, d_model=1024, **_GPT2),
    "gpt2-large": Config(n_layer=36, n_head=20, d_model=1280, **_GPT2),
    "gpt2-xl": Config(n_layer=48, n_head=25, d_model=1600, **_GPT2),
    # a Llama of tiny's size, which transformers can read
    "llama": Config(n_layer=4, n_head=4, d_model=160, context=128),
    # the course's model: waylandzhang/Transformer-from-scratch, scifi-demo
    "novel": Config(
        vocab_size=100256,
        n_layer=12,
        n_head=8,
        d_model=512,
        context=128,
        position="sinusoidal",
        norm="layernorm",
        activation="relu",
        out_bias=True,
        ff_bias=True,
        head_bias=True,
        dropout=0.1,
        init="gpt2",
    ),
}


def preset(name, **changes):
    """A copy of the named preset with some fields changed. `d_ff` and the head size follow
    `d_model` and `n_head` unless they are among the changes. ModelError for an unknown name."""
    if name not in PRESETS:
        raise ModelError(f"preset {name!r} is unknown; choose from {', '.join(PRESETS)}")
    # every preset's kv heads, head size and d_ff are the derived ones: let them follow
    derived = dict(n_kv_head=None, head_size=None, d_ff=None)
    return replace(PRESETS[name], **{**derived, **changes})


# --------------------------------------------------------------------------------------------
# The parts of a block: norm, rotary positions, attention, feed-forward
# --------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / rms(x), times a learned weight if there is one. Zhang & Sennrich 2019, eq. 4."""

    def __init__(self, size, eps, weight):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size)) if weight else None

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def make_norm(config, size):
    """The norm that `config` asks for, over the last dimension of length `size`."""
    if config.norm == "rmsnorm":
        return RMSNorm(size, config.eps, config.norm_weight)
    return nn.LayerNorm(size, config.eps, elementwise_affine=config.norm_weight)


def rope_tables(context, head_size, theta, scaling=None):
    """Cosines and sines of the rotation angles, each (context, hs). RoFormer, Su et al. 2021.

    Channel i turns together with channel i + hs/2 (the layout of Llama and Qwen weights), at
    position t by the angle t * theta ** (-2i / hs): the first pairs fast, the last slowly.
    """
    # always real numbers, even where a model is built without memory (on torch's meta device)
    # (and rounded in the order in which everyone rounds them)
    channel = torch.arange(0, head_size, 2, device="cpu").float()
    frequency = scale_frequency(1.0 / theta ** (channel / head_size), scaling or {})  # (hs/2,)
    angle = torch.arange(context, device="cpu").float()[:, None] * frequency  # (context, hs/2)
    angle = torch.cat((-angle, angle), dim=-1)  # see apply_rope
    return angle.cos(), angle.sin()


def scale_frequency(frequency, scaling):
    """Rotation frequencies slowed down for a longer context: all of them (`linear`), or only those
    that turn less than once in the context of before, with a ramp (`llama3`, Llama 3.1's)."""
    kind, factor = scaling.get("rope_type"), scaling.get("factor", 1.0)
    if kind != "llama3":
        return frequency / factor
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / frequency)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequency / factor + keep * frequency


def apply_rope(x, cos, sin):
    """Rotate x (B, nh, T, hs) by the rows of `cos` and `sin` (broadcastable to x).

    Dot products of rotated queries and keys depend on the distance of their positions alone.

        a and b, hs/2 apart      a cos - b sin   the sine in the first half of the table
        become                   b cos + a sin   is that of minus the angle
    """
    other = x.roll(x.shape[-1] // 2, dims=-1)  # b where a was, and a where b was
    return (x * cos + other * sin).to(x.dtype)


def sinusoid_table(context, d_model):
    """The fixed positions of "Attention Is All You Need" (2017), section 3.5: (context, C)."""
    frequency = 10000.0 ** (-torch.arange(0, d_model, 2, device="cpu").float() / d_model)
    angle = torch.arange(context, device="cpu").float()[:, None] * frequency  # (context, ceil(C/2))
    table = torch.stack((angle.sin(), angle.cos()), dim=-1)  # even channels sine, odd cosine
    return table.flatten(1)[:, :d_model]


def plain_attention(q, k, v, mask=None, dropout=0.0, causal=True):
    """Attention written out, for reading; the model calls `attention`, which a test holds equal.

    q (B, nh, T, hs); k and v (B, nkv, S, hs), each key head shared by nh/nkv query heads.
    `mask` is True where a query may look, broadcastable to (B, nh, T, S); without one a query looks
    at itself and what came before, or everywhere if not `causal`.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    score = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, nh, T, S)
    if mask is None and causal:
        mask = causal_mask(q.shape[2], k.shape[2], q.device)
    if mask is not None:
        score = score.masked_fill(~mask, float("-inf"))
    return F.dropout(score.softmax(dim=-1), dropout) @ v  # (B, nh, T, hs)


def attention(q, k, v, mask=None, dropout=0.0, causal=True):
    """`plain_attention` by torch's fused kernel, which never holds the (T, S) scores."""
    T, S = q.shape[2], k.shape[2]
    if mask is None and causal and 1 < T < S:  # behind a cache: the corner is not square
        mask = causal_mask(T, S, q.device)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and mask is None and T > 1,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def causal_mask(T, S, device=None):
    """(T, S) bools: the last query sees all S keys, each one before it sees one key less.

    T=2, S=4:   1 1 1 0
                1 1 1 1
    """
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


class Attention(nn.Module):
    """Multi-head self-attention, with fewer key/value heads where the config says so; causal, as
    text needs it, unless told otherwise."""

    def __init__(self, config, causal=True):
        super().__init__()
        c, self.causal = config, causal
        self.n_head, self.n_kv_head, self.head_size = c.n_head, c.n_kv_head, c.head_size
        self.dropout = c.dropout
        self.q = nn.Linear(c.d_model, c.n_head * c.head_size, bias=c.qkv_bias)
        self.k = nn.Linear(c.d_model, c.n_kv_head * c.head_size, bias=c.qkv_bias)
        self.v = nn.Linear(c.d_model, c.n_kv_head * c.head_size, bias=c.qkv_bias)
        self.out = nn.Linear(c.n_head * c.head_size, c.d_model, bias=c.out_bias)
        # per head, and RMS whatever the block's norm is: it is there to bound the scores
        self.q_norm = RMSNorm(c.head_size, c.eps, c.norm_weight) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_size, c.eps, c.norm_weight) if c.qk_norm else nn.Identity()

    def forward(self, x, rope=None, remember=None, mask=None):
        """x (B, T, C) -> (B, T, C). `remember(k, v)` swaps new keys and values for all so far."""
        B, T, _ = x.shape
        q = self.q_norm(self.q(x).view(B, T, self.n_head, self.head_size))
        k = self.k_norm(self.k(x).view(B, T, self.n_kv_head, self.head_size))
        v = self.v(x).view(B, T, self.n_kv_head, self.head_size)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, hs)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if remember is not None:
            k, v = remember(k, v)  # (B, nkv, S, hs)
        y = attention(q, k, v, mask, self.dropout if self.training else 0.0, self.causal)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    """Two matrices with an activation between them, applied at each position alone."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.activation = ACTIVATIONS[c.activation]
        self.up = nn.Linear(c.d_model, c.d_ff, bias=c.ff_bias)
        self.gate = (
            nn.Linear(c.d_model, c.d_ff, bias=c.ff_bias) if c.activation in GATED else None
        )
        self.down = nn.Linear(c.d_ff, c.d_model, bias=c.ff_bias)

    def forward(self, x):
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): the pre-norm residual block."""

    def __init__(self, config, causal=True):
        super().__init__()
        self.norm1 = make_norm(config, config.d_model)
        self.attention = Attention(config, causal)
        self.norm2 = make_norm(config, config.d_model)
        self.feed_forward = FeedForward(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, rope=None, remember=None, mask=None):
        x = x + self.drop(self.attention(self.norm1(x), rope, remember, mask))
        return x + self.drop(self.feed_forward(self.norm2(x)))


# --------------------------------------------------------------------------------------------
# The loss, without ever holding all logits
# --------------------------------------------------------------------------------------------

LOSS_ROWS = 256  # rows of logits at a time: 64 was 27 % slower at V = 100,256, more takes memory


class ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy of a linear head, a few rows of logits at a time.

    Full logits are (N, V): 2,048 rows of a 100,256-id vocabulary are 0.8 GB, and their softmax and
    gradient as much again. Here each chunk of rows is turned into its loss *and* its gradient while
    it is in hand, then dropped: d loss / d logits = softmax(logits) - onehot(target).
    Nothing is left for the backward pass but to scale what is already there.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, targets, with_grad, dtype):
        low = dtype or x.dtype  # what the matrix products run in (bf16 under autocast)
        x_low, w_low = x.to(low), weight.to(low)
        full = torch.float64 if x.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=full, device=x.device)
        need_x, need_w, need_b = (n and with_grad for n in ctx.needs_input_grad[:3])
        grad_x = torch.empty_like(x) if need_x else None
        grad_w = torch.zeros_like(weight, dtype=full) if need_w else None
        grad_b = torch.zeros_like(bias, dtype=full) if need_b else None
        for i in range(0, len(x), LOSS_ROWS):
            rows, goal = x_low[i : i + LOSS_ROWS], targets[i : i + LOSS_ROWS, None]
            logits = F.linear(rows, w_low, None if bias is None else bias.to(low))  # (rows, V)
            log_p = F.log_softmax(logits, dim=-1, dtype=full)
            loss -= log_p.gather(1, goal).sum()
            if not (need_x or need_w or need_b):
                continue
            error = log_p.exp_().scatter_add_(1, goal, -torch.ones_like(goal, dtype=full))
            if need_b:
                grad_b += error.sum(0)
            error = error.to(low)
            if need_x:
                grad_x[i : i + LOSS_ROWS] = error @ w_low
            if need_w and low == full:
                grad_w.addmm_(error.T, rows)
            elif need_w:  # add up in float32 whatever the product runs in, a piece at a time, since
                for part, piece in zip(grad_w.split(4096), error.split(4096, dim=1)):
                    part += piece.T @ rows  # the sum of two dtypes makes a copy of the second
        ctx.grads = (grad_x, grad_w, grad_b)
        return loss

    @staticmethod
    def backward(ctx, scale):
        # in place: another (V, C) copy would be the largest tensor of the step
        if ctx.grads is None:
            raise RuntimeError("ChunkedLoss went backward twice: call the model again instead")
        grads, ctx.grads = ctx.grads, None
        return *(None if g is None else g.mul_(scale) for g in grads), None, None, None


def chunked_loss(x, weight, bias, targets):
    """Sum of -log softmax(x @ weight.T + bias)[target] over rows, a float32 scalar (of float64
    states a float64 one).

    x (..., C), weight (V, C), bias (V,) or None, targets (...) with -100 for "no loss": such rows
    cost nothing. Equal to F.cross_entropy(..., reduction="sum"), value and gradients.
    """
    x, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    keep = targets != -100
    if not keep.all():
        x, targets = x[keep], targets[keep]
    device = x.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    with torch.autocast(device, enabled=False):
        return ChunkedLoss.apply(x, weight, bias, targets, torch.is_grad_enabled(), low)


def token_logps(x, weight, bias, targets):
    """log softmax(x @ weight.T + bias)[target] of each place (...), 0 where the target is -100, in
    float32 (of float64 states in float64): for losses that are no plain sum over tokens. Logits are
    made a few rows at a time and made again in the backward pass, so they are never all held."""
    full = torch.float64 if x.dtype == torch.float64 else torch.float32

    def some(rows, goal):
        log_p = F.linear(rows, weight, bias).log_softmax(-1, dtype=full)
        return log_p.gather(1, goal[:, None])[:, 0]

    keep = targets != -100
    kept, goals = x[keep].split(LOSS_ROWS), targets[keep].split(LOSS_ROWS)
    parts = [recompute(some, r, g, use_reentrant=False) for r, g in zip(kept, goals)]
    out = torch.zeros(targets.shape, dtype=full, device=x.device)
    return out.masked_scatter(keep, torch.cat(parts)) if parts else out


# --------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------


def make_table(rows, size):
    """An nn.Embedding; without its random start where there is no memory to draw into, since to
    find that out torch imports its compiler, for more than a second."""
    weight = torch.empty(rows, size)
    if weight.is_meta:
        return nn.Embedding.from_pretrained(weight, freeze=False)
    return nn.Embedding(rows, size)


class Transformer(nn.Module):
    """A decoder-only language model.

    `model(ids)` gives logits (B, T, V); `model(ids, targets)` the *summed* negative log-likelihood
    of the targets in float32 (see `chunked_loss`): whoever trains divides by what it counted. With
    `each` it gives the log probability of every target, (B, T).

    >>> model = Transformer(preset("tiny"))
    >>> model(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 2048])
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = copy.copy(config)
        self.embed = make_table(c.vocab_size, c.d_model)
        if c.position == "learned":
            self.position = make_table(c.context, c.d_model)
        elif c.position == "sinusoidal":
            self.register_buffer("sines", sinusoid_table(c.context, c.d_model), persistent=False)
        elif c.position == "rope":
            cos, sin = rope_tables(c.context, c.head_size, c.rope_theta, c.rope_scaling)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.embed_norm = make_norm(c, c.d_model) if c.embed_norm else nn.Identity()
        self.drop = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = make_norm(c, c.d_model)
        self.head = nn.Linear(c.d_model, c.vocab_size, bias=c.head_bias)
        if c.tied:
            self.head.weight = self.embed.weight
        self.grad_checkpoint = False  # recompute blocks in the backward pass: less memory, slower
        if not self.embed.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """`gpt2`: normal(0.02), residual outputs divided by sqrt(2 n_layer) (Radford et al. 2019).

        `zero_out`: each residual branch and the head start at zero, so the first step sees a plain
        bigram-like path and no layer drowns another; inner matrices get std 0.577 / sqrt(C), which
        keeps a normalised input at a third of its variance. In our trials this halved the steps.
        """
        c = self.config
        gpt2 = c.init == "gpt2"
        for name, p in self.named_parameters():
            if p.dim() < 2:  # biases 0, norm weights 1
                p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            elif name.endswith(("attention.out.weight", "feed_forward.down.weight")):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer)) if gpt2 else p.zero_()
            elif name == "head.weight":
                nn.init.normal_(p, std=0.02) if gpt2 else p.zero_()
            elif name == "embed.weight" and not gpt2:
                # a tied table is also the head: at std 1 its first loss would be enormous
                nn.init.normal_(p, std=0.02 if c.tied else 1.0)
            else:
                nn.init.normal_(p, std=0.02 if gpt2 else 0.577 / math.sqrt(c.d_model))

    @torch.no_grad()
    def grow_vocabulary(self, vocab_size, known):
        """Room for at least `vocab_size` ids, of which the first `known` have meant something until
        now. All rows after those, spare ones included, start at the mean of the known rows."""
        c, tables = self.config, [self.embed] if self.config.tied else [self.embed, self.head]
        grown = max(c.vocab_size, vocab_size)
        for table in tables:
            for name in ("weight", "bias"):
                old = getattr(table, name, None)
                if old is not None:
                    kept = old[:known]  # fewer, if there is an end of text that the model lacks
                    new = kept.mean(0, keepdim=True).repeat(grown, *[1] * (old.dim() - 1))
                    new[: len(kept)] = kept
                    setattr(table, name, nn.Parameter(new, old.requires_grad))
        if c.tied:
            self.head.weight = self.embed.weight
        self.embed.num_embeddings = self.head.out_features = c.vocab_size = grown

    def hidden(self, ids, cache=None, positions=None, mask=None):
        """The final, normalised states (B, T, C) of ids (B, T); logits are `model.head` of them.

        With a `KVCache`, ids are the tokens after those it holds. `positions` (T,) or (B, T)
        defaults to counting on from there; `mask` as in `plain_attention`.
        """
        T, start = ids.shape[1], cache.length if cache is not None else 0
        if positions is None and start + T > self.config.context:
            raise ModelError(f"{start + T} tokens do not fit the context of {self.config.context}")
        if positions is None:
            positions = torch.arange(start, start + T, device=ids.device)
        if cache is not None and start + T > cache.keys.shape[3]:
            raise ModelError(f"{start + T} tokens do not fit the cache of {cache.keys.shape[3]}")
        x = self.embed(ids)  # (B, T, C)
        rope = None
        if self.config.position == "learned":
            x = x + self.position(positions)
        elif self.config.position == "sinusoidal":
            x = x + self.sines[positions].to(x.dtype)
        else:  # one table row a position, the same for every head: (T, hs) or (B, 1, T, hs)
            rope = self.cos[positions], self.sin[positions]
            if positions.dim() == 2:
                rope = rope[0][:, None], rope[1][:, None]
        x = self.drop(self.embed_norm(x))
        for i, block in enumerate(self.blocks):
            remember = None if cache is None else cache.layer(i)
            if self.grad_checkpoint and self.training:
                x = recompute(block, x, rope, remember, mask, use_reentrant=False)
            else:
                x = block(x, rope, remember, mask)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def position_tables(self):
        """The tables that `hidden` looks positions up in: (context, ...) each."""
        if self.config.position == "learned":
            return [self.position.weight]
        return [self.sines] if self.config.position == "sinusoidal" else [self.cos, self.sin]

    def last_logits(self, ids, cache, positions=None, mask=None):
        """Logits (B, V) of what comes after the last of the ids (B, T): all that sampling needs."""
        return self.head(self.hidden(ids, cache, positions, mask)[:, -1])

    def forward(self, ids, targets=None, cache=None, positions=None, mask=None, each=False):
        x = self.hidden(ids, cache, positions, mask)
        if targets is None:
            return self.head(x)  # (B, T, V)
        if each:
            return token_logps(x, self.head.weight, self.head.bias, targets)  # (B, T)
        return chunked_loss(x, self.head.weight, self.head.bias, targets)


class KVCache:
    """Keys and values of all tokens seen so far, allocated once: 2 x (L, B, nkv, length, hs).

    Decoding one token then costs one row of matrix products and not T of them.
    """

    def __init__(self, model, batch, length=None):
        c, weight = model.config, model.embed.weight
        shape = (c.n_layer, batch, c.n_kv_head, length or c.context, c.head_size)
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self.layers = list(zip(self.keys, self.values))
        self.length = 0  # tokens held; the model adds to it after its last layer

    def layer(self, i):
        """remember(k, v) for layer i: store the new ones, return views of all up to them."""

        def remember(*new):
            start, count = self.length, new[0].shape[2]
            for old, more in zip(self.layers[i], new):
                old.narrow(2, start, count).copy_(more)
            return [old.narrow(2, 0, start + count) for old in self.layers[i]]

        return remember

    def reorder(self, rows):
        """Let batch row b continue what row rows[b] has seen (beam search)."""
        n = self.length
        self.keys[:, :, :, :n] = self.keys[:, rows, :, :n]
        self.values[:, :, :, :n] = self.values[:, rows, :, :n]


# --------------------------------------------------------------------------------------------
# The same model once more, flat and fast: for sampling on a CPU
# --------------------------------------------------------------------------------------------

class Decoder:
    """A Transformer that can only sample, but fast: the same `hidden`, `head` and `last_logits`,
    behind a KVCache. `Transformer` is the one to read; a test holds the two equal.

    A new token takes one pass over all weights, so the floor is their bytes by the memory's rate.
    Two things keep the plain model above it. Its products are not the fastest that this CPU has
    for one row of x: `product` chooses by timing. And a small model spends its time between the
    operations: here are fewer of them (q, k and v are one product, and rotated together) and no
    modules to call.

    `int8` rounds the matrices to eight bits (INT8_PRODUCTS); `rows` is how many texts will be
    written at once. `model` is used up: its matrices move, so that memory holds them once.
    """

    def __init__(self, model, int8=False, rows=1):
        c, self.config, self.embed = model.config, model.config, model.embed
        self.start, self.end = self.norm_of(model.embed_norm), self.norm_of(model.norm)
        self.activation, self.tables = ACTIVATIONS[c.activation], model.position_tables()
        scale = 1.0
        if c.activation == "gelu" and self.embed.weight.dtype == torch.float32:
            self.activation, scale = half_gelu, 0.5
        self.layers, make = [], partial(product, int8=int8, rows=rows)
        for block in model.blocks:
            a, f = block.attention, block.feed_forward
            qk_weight = None  # the weights of the norms of q and k, (nh + nkv, hs)
            if c.qk_norm and c.norm_weight:
                heads = [a.q_norm.weight] * c.n_head + [a.k_norm.weight] * c.n_kv_head
                qk_weight = torch.stack(heads).detach()
            up = (f.up,) if f.gate is None else (f.gate, f.up)
            products = make((a.q, a.k, a.v)), make((a.out,)), make(up, scale=scale), make((f.down,))
            norms = self.norm_of(block.norm1), self.norm_of(block.norm2)
            self.layers.append((*norms, qk_weight, *products))
        self.head = make((model.head,))

    def norm_of(self, module):
        """The norm of `make_norm`, as a function of x alone."""
        if isinstance(module, nn.Identity):
            return module.forward
        size, weight, eps = (self.config.d_model,), module.weight, module.eps
        if self.config.norm == "rmsnorm":
            return lambda x: torch.rms_norm(x, size, weight, eps)
        return lambda x: torch.layer_norm(x, size, weight, module.bias, eps)

    @torch.inference_mode()
    def hidden(self, ids, cache, positions=None, mask=None):
        """As `Transformer.hidden`: ids (B, T), after those that the cache holds, to (B, T, C)."""
        c, (B, T), start = self.config, ids.shape, cache.length
        nh, nkv, hs = c.n_head, c.n_kv_head, c.head_size
        at = slice(start, start + T) if positions is None else positions
        tables = [table[at] for table in self.tables]  # (T, ...) or (B, T, ...)
        x = F.embedding(ids, self.embed.weight)
        if c.position != "rope":
            x = x + tables[0].to(x.dtype)
        else:  # the same for all heads
            cos, sin = (t.unsqueeze(-2) for t in tables)
        x = self.start(x).view(B * T, -1)
        for i, (norm1, norm2, qk_weight, qkv, out, up, down) in enumerate(self.layers):
            y = qkv(norm1(x)).view(B, T, nh + 2 * nkv, hs)
            q, k, v = torch.split_with_sizes(y, (nh, nkv, nkv), dim=2)
            if c.qk_norm or c.position == "rope":
                qk = y[:, :, : nh + nkv]
                if c.qk_norm:
                    qk = torch.rms_norm(qk, (hs,), None, c.eps)
                    qk = qk if qk_weight is None else qk * qk_weight
                if c.position == "rope":
                    qk = apply_rope(qk, cos, sin)
                q, k = torch.split_with_sizes(qk, (nh, nkv), dim=2)
            k, v = cache.layer(i)(k.transpose(1, 2), v.transpose(1, 2))  # (B, nkv, S, hs)
            if T == 1:  # the heads of a group ask their one key head as if they were positions
                q = q.reshape(B, nkv, nh // nkv, hs)
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            else:
                y = attention(q.transpose(1, 2), k, v, mask).transpose(1, 2)
            x = x + out(y.reshape(B * T, nh * hs))
            y = up(norm2(x))
            if c.activation in GATED:
                gate, y = y.chunk(2, dim=-1)
                x = x + down(self.activation(gate) * y)
            else:
                x = x + down(self.activation(y))
        cache.length += T
        return self.end(x).view(B, T, -1)

    def last_logits(self, ids, cache, positions=None, mask=None):
        """As `Transformer.last_logits`."""
        return self.head(self.hidden(ids, cache, positions, mask)[:, -1])


ROOT = torch.tensor(2**0.5)  # a number would become such a tensor at every use


def half_gelu(h):
    """gelu(x) = x/2 + x/2 erf(x / sqrt(2)) of h = x/2; the half lies in the matrix before. torch's
    own calls oneDNN, whose overhead is larger than this computation."""
    return torch.addcmul(h, h, torch.erf(h * ROOT))


# Ways to compute x (N, in) @ weight (out, in).T: each prepares the weight for `rows` rows of x and
# returns x -> product. Which one is fastest depends on the CPU, the dtype and the shape, and some
# raise where the CPU or this build of torch lacks something: `fastest` tries and times them.


def by_linear(weight, rows):
    """As it is."""
    return lambda x: F.linear(x, weight)


def by_transposed(weight, rows):
    """Stored the other way round, as (in, out)."""
    turned = weight.t().contiguous()
    return lambda x: x @ turned


def by_halves(weight, rows):
    """torch computes a product with one row on one core; two with half of the inputs use two."""
    if rows > 1 or weight.shape[1] % 2:
        raise RuntimeError("for one row and an even number of inputs")
    turned, half = weight.t().contiguous(), weight.shape[1] // 2
    pair = turned.view(2, half, -1)
    return lambda x: x @ turned if len(x) > 1 else torch.bmm(x.view(2, 1, half), pair).sum(0)


def by_onednn(weight, rows):
    """In oneDNN's own layout for this CPU and so many rows."""
    if not torch.backends.mkldnn.enabled:
        raise RuntimeError("oneDNN is switched off")
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def int8_scale(weight):
    """A scale for each output, (out,), by which its largest weight becomes 127."""
    return weight.float().abs().amax(1).clamp(min=1e-12) / 127


def by_int8_dynamic(weight, rows):
    """Weights and x in 8 bits, which multiply and add up exactly: weights with a scale for each
    output, x, as it comes, with one for each row."""
    scale, zero = int8_scale(weight).double(), torch.zeros(len(weight), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch recommends another package for this
        whole = torch.quantize_per_channel(weight.float(), scale, zero, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(whole, None)
    # CPUs without VNNI add pairs of products in 16 bits: x gets 7 bits there, so that they fit
    reduced = not torch.cpu._is_vnni_supported()

    def times(x):
        if len(x) == 1:
            return torch.ops.quantized.linear_dynamic(x.float(), packed, reduced).to(x.dtype)
        # the operation has one scale for all rows: make them alike first
        top = x.abs().amax(-1, keepdim=True).clamp(min=1e-12)
        y = torch.ops.quantized.linear_dynamic((x / top).float(), packed, reduced)
        return y.to(x.dtype) * top

    return times


def by_int8_weights(weight, rows):
    """Only the weights in 8 bits; x in bf16, sums in fp32."""
    scale = int8_scale(weight)
    whole, scale = (weight / scale[:, None]).round().to(torch.int8), scale.bfloat16()
    return lambda x: torch._weight_int8pack_mm(x.bfloat16(), whole, scale).to(x.dtype)


FLOAT_PRODUCTS = (by_transposed, by_linear, by_halves, by_onednn)
INT8_PRODUCTS = (by_int8_dynamic, by_int8_weights)
SMALL = 1 << 18  # a matrix of fewer weights stays in a core's cache: its layout hardly matters
TIMED = 1 << 22  # of a larger matrix only so many weights are timed
timings = {}  # (shape, dtype, rows, int8) -> {way: seconds}, filled once a process


def fastest(weight, rows, int8):
    """x (N, in) -> x @ weight.T by what is fastest here for `rows` rows. ModelError if no way to
    compute int8 exists here."""
    key = tuple(weight.shape), weight.dtype, rows, int8
    if key not in timings:
        timings[key] = time_products(weight, rows, INT8_PRODUCTS if int8 else FLOAT_PRODUCTS)
    return min(timings[key], key=timings[key].get)(weight, rows)


def time_products(weight, rows, ways):
    """{way: seconds} of those `ways` that do not raise; of the first alone for a small matrix."""
    part, few = weight[: max(1, TIMED // weight.shape[1])], weight[:64]
    x = torch.ones(rows, weight.shape[1], dtype=weight.dtype)
    works, seconds, reason = {}, {}, ""
    for way in ways:
        try:
            works[way] = way(few, rows), way(part, rows)
            seconds[way] = [timed(work, x) for work in works[way]][1]
        except (RuntimeError, AttributeError) as e:  # not on this CPU, or in this torch
            reason = str(e).split("\n")[0]
            continue
        if weight.numel() < SMALL:
            return seconds
    if not seconds:
        raise ModelError(f"--dtype int8 cannot be computed on this machine: {reason}")
    best, memory = min(seconds.values()), torch.ones(1 << 23)
    seconds = {way: s for way, s in seconds.items() if s < 5 * best + 5e-3}  # drop the hopeless
    for turn in range(3):
        for way in seconds:
            memory.sum()  # 32 MB push the weights out of the caches, as the other layers will do,
            works[way][0](x)  # but the code of each way stays in them
            s = timed(works[way][1], x)
            seconds[way] = min(s, seconds[way]) if turn else s
    return seconds


def timed(work, x):
    """Seconds that work(x) takes."""
    start = time.perf_counter()
    work(x)
    return time.perf_counter() - start


def timing_lines():
    """What `fastest` has chosen for which matrix, and the times, the best first: a line each."""
    for (shape, dtype, rows, int8), seconds in timings.items():
        order = sorted(seconds.items(), key=lambda item: item[1])
        each = ", ".join(f"{way.__name__.removeprefix('by_')} {s * 1e6:.0f}" for way, s in order)
        kind = "int8" if int8 else str(dtype).removeprefix("torch.")
        yield f"{shape[0]} x {shape[1]} {kind}, {rows} row(s), microseconds: {each}"


def product(layers, int8=False, rows=1, scale=1.0):
    """x (N, in) -> (N, out) as the Linears `layers` give it, their outputs side by side, times
    `scale`. Their weights are taken out of them and laid out for `rows` rows of x."""
    weight = torch.cat([layer.weight.detach() for layer in layers]).mul_(scale)
    bias = None
    if layers[0].bias is not None:
        bias = torch.cat([layer.bias.detach() for layer in layers]).mul_(scale)
    for layer in layers:
        layer.weight = None
    times = fastest(weight, rows, int8)
    return times if bias is None else lambda x: times(x) + bias


# --------------------------------------------------------------------------------------------
# Checkpoints: plain dicts, written so that no moment of a crash loses the one before
# --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def evaluating(model):
    """The model without dropout and gradients for as long as the `with` lasts, then as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        model.train(was_training)


def plain_state(module):
    """The module's state dict without the prefixes that torch.compile and DDP add to its keys."""
    state = module.state_dict()
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):  # either may be around the other
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def save_checkpoint(path, content):
    """Write a dict of tensors and plain values: temporary file, fsync, rename. ModelError if the
    disk is full or read-only; what stood at `path` is then still whole."""
    write_whole(path, lambda f: torch.save(content, f))


def write_whole(path, write):
    """Let write(file) fill a temporary file, then give it the name `path`, as `save_checkpoint`."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        reason = str(e).strip().split("\n")[0]
        with contextlib.suppress(OSError):  # torch's zip writer is silent about a full disk
            free = shutil.disk_usage(path.parent).free
            reason = "the disk is full" if free < 1 << 20 else reason
            temporary.unlink()
        raise ModelError(f"cannot write {path}: {reason}; what was there before is kept") from e


def lock_folder(folder):
    """Lock a run's folder for this process, until the returned file is closed or the process ends;
    ModelError if another process has it. Windows has no such lock."""
    try:
        import fcntl
    except ImportError:
        return open(os.devnull, "rb")
    file = open(Path(folder, ".lock"), "wb")  # noqa: SIM115 (open as long as the run)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        file.close()
        raise ModelError(f"{folder} is being written by another process: wait for its end") from e
    return file


def find_checkpoint(name):
    """The path that `name` means: a file, a run's folder, a folder of Hugging Face's layout, or
    else a model of the Hub (`gpt2`, `owner/name`, `owner/name@revision`), downloaded."""
    path = Path(name)
    local = path.exists() or path.parts[0] in ("out", "data")
    local = local or (path.parent != Path() and path.parent.is_dir())
    return fetch_hub(str(name), check=readable) if not local and is_hub_name(str(name)) else path


def readable(folder):
    """ModelError or DataError if we cannot read config or tokenizer in a folder of Hugging Face's
    layout: to be said before the weights are downloaded."""
    config_from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
    if (folder / "tokenizer.json").exists():
        hub_tokenizer(folder)


def load_checkpoint(path, dtype=None):
    """The dict that `save_checkpoint` wrote, its tensors mapped from disk and read when touched; or
    the like of what `find_checkpoint` finds, its tensors in `dtype` where they must be copied.

    Only tensors and plain values are unpickled (weights_only), never code.
    """
    path = find_checkpoint(path)
    if (path / "config.json").exists():
        own = {"tokenizer": hub_tokenizer(path)} if (path / "tokenizer.json").exists() else {}
        return load_hf(path, dtype) | own
    if (path / "adapter_config.json").exists():
        raise ModelError(f"{path} is an adapter of peft's: `lora.py import` turns it into ours")
    if path.is_dir():
        found = [path / name for name in ("best.pt", "last.pt") if (path / name).exists()]
        if not found:
            raise ModelError(f"{path} holds no best.pt or last.pt; train first, or name a file")
        path = found[0]
    if not path.exists():
        raise ModelError(
            f"checkpoint {path} does not exist; a file, a run's folder, or a model of the Hub "
            f"(gpt2, or owner/name)?"
        )
    content = load_pt(path)
    if not isinstance(content, dict) or not {"config", "model"} <= set(content):
        raise ModelError(f"{path} is no checkpoint of scratchlm: it has no config and model")
    return content


def load_pt(path):
    """What torch.save wrote: plain values and tensors, mapped from disk, never code. ModelError if
    it is another file or damaged: its zip's checksums are compared, 0.3 s for GPT-2's weights."""
    try:
        with zipfile.ZipFile(path) as records:
            damaged = records.testzip()
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:
        # torch and zipfile tell of a foreign or cut file in a dozen ways; one is enough
        raise ModelError(f"{path} is not a checkpoint of ours, or is cut short") from e
    if damaged:
        raise ModelError(f"{path} is damaged: the checksum of {damaged} is another")
    return content


def fit_error(expected, found):
    """One line on how a state dict `found` misfits `expected`, or None. Both name -> tensor."""
    for name, tensor in expected.items():
        if name not in found:
            return f"{name} {tuple(tensor.shape)} is missing"
        if found[name].shape != tensor.shape:
            return f"{name} is {tuple(found[name].shape)}, the model has {tuple(tensor.shape)}"
    extra = [name for name in found if name not in expected]
    return f"{extra[0]} {tuple(found[extra[0]].shape)} is unknown to the model" if extra else None


def load_weights(model, state, where="checkpoint", assign=False):
    """Copy a state dict into the model, or with `assign` make its tensors the model's own;
    ModelError names the first key or shape that misfits."""
    problem = fit_error(model.state_dict(), state)
    if problem:
        raise ModelError(f"{where} does not fit: {problem}")
    model.load_state_dict(state, assign=assign)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_name(text):
    """What --dtype means: torch's own names of DTYPES become ours, any other text stays.

    >>> dtype_name("bfloat16"), dtype_name("auto")
    ('bf16', 'auto')
    """
    return next((name for name, dtype in DTYPES.items() if str(dtype) == f"torch.{text}"), text)


def choose_device(name=None):
    """The torch.device of that name; for None or "auto" CUDA, then Apple's MPS, then the CPU.
    ModelError if this machine cannot use it."""
    if name in (None, "auto"):
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if not re.fullmatch(r"(cpu|mps|cuda)(:\d+)?", str(name)):
        raise ModelError(f"--device {name} is unknown: choose auto, cpu, cuda, cuda:1 or mps")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError) as e:
        reason = str(e).split("\n")[0]
        raise ModelError(f"--device {name} cannot be used here: {reason}") from e


def model_from_checkpoint(content, device="cpu", dtype=torch.float32, where="checkpoint"):
    """The Transformer in a loaded checkpoint, on `device`, in evaluation mode."""
    try:
        config = Config.from_dict(dict(content["config"]))
    except (TypeError, ValueError) as e:
        raise ModelError(f"{where} has a config that cannot be built: {e}") from e
    model = skeleton(config)  # no memory for weights that would be overwritten at once
    state = {k: v.to(device=device, dtype=dtype) for k, v in content["model"].items()}
    load_weights(model, state, where, assign=True)
    if config.tied:
        model.head.weight = model.embed.weight
    return model.to(device).requires_grad_().eval()


# --------------------------------------------------------------------------------------------
# safetensors: a length, a table of contents in JSON, and the bytes of all tensors
# --------------------------------------------------------------------------------------------

SAFE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
HEADER_LIMIT = 100_000_000  # the format's own


class Safetensors:
    """The tensors of a .safetensors file, mapped from disk: nothing is read until it is touched.

    8 bytes          header: {name: {"dtype", "shape", "data_offsets"}, ...}     data
    header's length  JSON, UTF-8, perhaps with spaces behind                     without gaps

    ModelError names the file and what is wrong with it.
    """

    def __init__(self, path):
        self.path = Path(path)
        try:
            with open(path, "rb") as f:
                size = os.fstat(f.fileno()).st_size
                length = int.from_bytes(f.read(8), "little")
                if size < 8 or not 2 <= length <= min(size - 8, HEADER_LIMIT):
                    raise ModelError(f"{path} is no safetensors file, or is cut short")
                header = json.loads(f.read(length).decode(), object_pairs_hook=unique_keys)
                self.map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        except (ValueError, RecursionError) as e:
            if isinstance(e, ModelError):
                raise
            raise ModelError(f"{path} is no safetensors file: its header is no JSON ({e})") from e
        if not isinstance(header, dict):
            raise ModelError(f"{path} is no safetensors file: its header is no JSON object")
        header.pop("__metadata__", None)
        self.start, self.entries = 8 + length, {}
        for name, entry in header.items():
            self.entries[name] = self.check(name, entry, size - self.start)
        end = 0
        for name, (_, _, begin, stop) in sorted(self.entries.items(), key=lambda e: e[1][2:]):
            if begin != end:
                raise ModelError(f"{path}: tensor {name} begins at {begin}, not at {end}")
            end = stop
        if end != size - self.start:
            raise ModelError(f"{path} has {size - self.start} bytes of tensors, its header {end}")

    def check(self, name, entry, size):
        """(dtype, shape, begin, end) of a header's entry, or ModelError."""
        try:
            dtype, shape = SAFE_DTYPES[entry["dtype"]], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as e:
            what = entry.get("dtype") if isinstance(entry, dict) else entry
            raise ModelError(f"{self.path}: tensor {name} is described badly ({what})") from e
        numbers = (*shape, begin, end)
        if not all(type(n) is int and 0 <= n <= size for n in numbers) or begin > end:
            raise ModelError(f"{self.path}: tensor {name} {shape} lies outside of the file")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ModelError(f"{self.path}: tensor {name} {shape} takes no {end - begin} bytes")
        return dtype, shape, begin, end

    def __getitem__(self, name):
        dtype, shape, begin, end = self.entries[name]
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        count = (end - begin) // dtype.itemsize
        flat = torch.frombuffer(self.map, dtype=dtype, count=count, offset=self.start + begin)
        return flat.view(shape)

    def release(self, name):
        """Let the kernel take back the memory in which a tensor was read: it is on disk."""
        _, _, begin, end = self.entries[name]
        first = -(-(self.start + begin) // mmap.PAGESIZE) * mmap.PAGESIZE
        length = self.start + end - first
        if length > 0 and hasattr(self.map, "madvise"):
            self.map.madvise(mmap.MADV_DONTNEED, first, length)


def unique_keys(pairs):
    """A dict of a JSON object's pairs; ValueError if a key comes twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name comes twice")
    return found


def write_safetensors(path, tensors, metadata=None):
    """Write {name: tensor} as a .safetensors file, whole or not at all."""
    names = {dtype: name for name, dtype in SAFE_DTYPES.items()}
    header, end = {"__metadata__": metadata or {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.dtype.itemsize
        about = dict(dtype=names[tensor.dtype], shape=list(tensor.shape))
        header[name] = about | dict(data_offsets=[end, end + size])
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8

    def write(f):
        f.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            f.write(memoryview(flat.view(torch.uint8).numpy()))

    write_whole(path, write)


# --------------------------------------------------------------------------------------------
# Hugging Face's models: their config.json and their names for our tensors
# --------------------------------------------------------------------------------------------

# Fields of a config.json that change nothing in what the model computes
IDLE = """_name_or_path architectures attention_dropout attn_pdrop bos_token_id
chunk_size_feed_forward dtype embd_pdrop eos_token_id gradient_checkpointing id2label
initializer_range is_llama_config keys_to_ignore_at_inference label2id max_window_layers
model_type n_ctx output_attentions output_hidden_states output_past pad_token_id
problem_type reorder_and_upcast_attn resid_pdrop return_dict summary_activation
summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
task_specific_params torch_dtype transformers.js_config transformers_version use_cache"""
# Fields that would change it, and the values of which we compute what they ask for
ONLY = {
    "add_cross_attention": (False,),
    "hidden_act": ("silu", "swish"),
    "is_encoder_decoder": (False,),
    "partial_rotary_factor": (1.0,),
    "pretraining_tp": (1,),
    "quantization_config": (),
    "rope_interleaved": (False,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
    "use_mrope": (False,),
    "use_sliding_window": (False,),
}
GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
GPT2_ACTIVATIONS["relu"] = "relu"
FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")


def config_from_hf(values, where="config.json"):
    """Our Config of a Hugging Face config.json. ModelError names the first field whose value we do
    not compute: nothing that would change the model is ever passed over."""
    left, kind = dict(values), values.get("model_type")
    if kind not in FAMILIES:
        raise ModelError(f"{where}: model_type {kind!r} is none of {', '.join(FAMILIES)}")

    def take(name, default=None):
        value = left.pop(name, None)
        return default if value is None else value

    def refuse(name, value):
        raise ModelError(f"{where}: {name} = {value!r} is not implemented here")

    try:
        config = Config(**(gpt2_fields if kind == "gpt2" else llama_fields)(kind, take, refuse))
    except TypeError as e:
        raise ModelError(f"{where} lacks a field or has one of the wrong type: {e}") from e
    for name, value in left.items():
        if name not in IDLE.split() and value is not None and value not in ONLY.get(name, ()):
            refuse(name, value)
    return config


def gpt2_fields(kind, take, refuse):
    """Config's fields from those of a GPT-2."""
    activation, d_model = take("activation_function", "gelu_new"), take("n_embd", 768)
    if activation not in GPT2_ACTIVATIONS:
        refuse("activation_function", activation)
    return _GPT2 | dict(
        vocab_size=take("vocab_size", 50257),
        context=take("n_positions", 1024),
        n_layer=take("n_layer", 12),
        n_head=take("n_head", 12),
        d_model=d_model,
        d_ff=take("n_inner", 4 * d_model),
        activation=GPT2_ACTIVATIONS[activation],
        eps=take("layer_norm_epsilon", 1e-5),
        tied=take("tie_word_embeddings", True),
    )


def llama_fields(kind, take, refuse):
    """Config's fields from those of a Llama, Mistral or Qwen: they differ in biases, QK-norm."""
    rope = {"rope_theta": take("rope_theta", 10000.0)}
    rope |= take("rope_scaling", {}) | take("rope_parameters", {})
    scaling = rope.pop("rope_type", rope.pop("type", "default"))
    theta = rope.pop("rope_theta")
    known = {"default": set(), **ROPE_SCALINGS}
    if scaling not in known or set(rope) - known[scaling]:
        refuse("rope scaling", {"rope_type": scaling, **rope})
    context, window = take("max_position_embeddings"), take("sliding_window")
    if kind == "mistral" and window:  # the others do not use it unless they say that they do
        context = min(context, window)  # inside of its window sliding attention is as any other
    if set(layers := take("layer_types", [])) - {"full_attention"}:
        refuse("layer_types", layers)
    attention_bias = take("attention_bias", False)
    return dict(
        vocab_size=take("vocab_size"),
        context=context,
        n_layer=take("num_hidden_layers"),
        n_head=take("num_attention_heads"),
        n_kv_head=take("num_key_value_heads"),
        d_model=take("hidden_size"),
        head_size=take("head_dim"),
        d_ff=take("intermediate_size"),
        activation="swiglu",
        qkv_bias=attention_bias or kind == "qwen2",
        out_bias=attention_bias,
        ff_bias=take("mlp_bias", False),
        qk_norm=kind == "qwen3",
        tied=take("tie_word_embeddings", False),
        eps=take("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=None if scaling == "default" else {"rope_type": scaling, **rope},
        init="gpt2",
    )


def hf_config(config):
    """(config.json as a dict, the Config that it will be read as) of the Hugging Face architecture
    that computes what ours does. ModelError names a switch that none of them has."""
    c = config
    if c.position == "learned":
        family = "gpt2"
        full = replace(c, norm_weight=True, qkv_bias=True, out_bias=True, ff_bias=True)
        near = dict(norm="layernorm", qk_norm=False, n_kv_head=c.n_head, rope_scaling=None)
        near["head_size"] = c.d_model // c.n_head
        if c.activation not in GPT2_ACTIVATIONS.values():
            near["activation"] = "gelu"
    else:
        family = "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias > c.out_bias else "llama"
        full = replace(c, norm_weight=True)
        near = dict(position="rope", norm="rmsnorm", activation="swiglu")
        near |= dict(ff_bias=False) if family != "llama" else {}
        if family == "qwen2":
            near["head_size"] = c.d_model // c.n_head
        else:
            near["out_bias"] = c.qkv_bias
    near |= dict(embed_norm=False, head_bias=False)
    for name, value in near.items():
        if getattr(c, name) != value:
            raise ModelError(
                f"no Hugging Face architecture has {name} {getattr(c, name)} with the rest of this "
                f"model (the nearest, {family}, has {value})"
            )
    architecture = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}
    architecture |= {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    return {
        "architectures": [architecture[family]],
        "model_type": family,
        "vocab_size": c.vocab_size,
        "tie_word_embeddings": c.tied,
        **hf_fields(c, family),
    }, full


def hf_fields(config, family):
    """The fields of a config.json that have other names in GPT-2 than in the other FAMILIES."""
    c, activations = config, {v: k for k, v in GPT2_ACTIVATIONS.items()}
    if family == "gpt2":
        return dict(
            n_positions=c.context,
            n_embd=c.d_model,
            n_layer=c.n_layer,
            n_head=c.n_head,
            n_inner=c.d_ff,
            activation_function=activations[c.activation],
            layer_norm_epsilon=c.eps,
            resid_pdrop=c.dropout,
            embd_pdrop=c.dropout,
            attn_pdrop=c.dropout,
        )
    values = dict(
        max_position_embeddings=c.context,
        hidden_size=c.d_model,
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head,
        intermediate_size=c.d_ff,
        hidden_act="silu",
        rms_norm_eps=c.eps,
        rope_theta=c.rope_theta,
        rope_scaling=c.rope_scaling,
        head_dim=c.head_size,
    )
    values |= dict(attention_bias=c.out_bias) if family != "qwen2" else {}
    return values | (dict(mlp_bias=c.ff_bias) if family == "llama" else {})


# --------------------------------------------------------------------------------------------
# Names: which of their tensors holds which of ours
# --------------------------------------------------------------------------------------------

GPT2_NAMES = {
    "embed": "wte",
    "position": "wpe",
    "norm": "ln_f",
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attention.q": "attn.c_attn",  # q, k and v in one
    "attention.k": "attn.c_attn",
    "attention.v": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "feed_forward.up": "mlp.c_fc",
    "feed_forward.down": "mlp.c_proj",
}
LLAMA_NAMES = {
    "embed": "embed_tokens",
    "norm": "norm",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}


def hf_name(name, gpt2):
    """Their name for our tensor `name`.

    >>> hf_name("blocks.3.attention.k.weight", True), hf_name("head.weight", False)
    ('transformer.h.3.attn.c_attn.weight', 'lm_head.weight')
    """
    if name == "head.weight":
        return "lm_head.weight"
    *block, part, leaf = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)", name).groups()
    part = (GPT2_NAMES if gpt2 else LLAMA_NAMES)[part]
    where = [] if block == [None] else ["h" if gpt2 else "layers", *block]
    return ".".join(["transformer" if gpt2 else "model", *where, part, leaf])


def flipped(part, tensor, gpt2):
    """Our weight or bias of `part` from theirs, and back: GPT-2 keeps matrices as (in, out)."""
    matrix = tensor.dim() == 2 and part in ("q", "k", "v", "out", "up", "down")
    return tensor.T if gpt2 and matrix else tensor


def from_hf(name, tensor, gpt2):
    """Our tensor `name` out of theirs: GPT-2 keeps q, k and v side by side."""
    part = name.split(".")[-2]
    if gpt2 and part in ("q", "k", "v"):
        tensor = tensor.chunk(3, dim=-1)["qkv".index(part)]
    return flipped(part, tensor, gpt2)


def to_hf(state, gpt2):
    """{their name: tensor} of a state dict of ours; the inverse of `from_hf`."""
    found = {}
    for name, tensor in state.items():
        theirs = found.setdefault(hf_name(name, gpt2), [])
        theirs.append(flipped(name.split(".")[-2], tensor, gpt2))
    return {name: torch.cat(parts, dim=-1) for name, parts in found.items()}


def hf_tensors(folder):
    """{their name: what holds it, a Safetensors or a dict} of the weights in a folder of Hugging
    Face's layout."""
    files = [Path(folder, file) for file in weight_files(Path(folder))]
    if not files:
        raise ModelError(f"{folder} has none of {', '.join(WEIGHTS)}")
    if missing := [file.name for file in files if not file.exists()]:
        raise ModelError(f"{folder} lacks {missing[0]}, which {WEIGHTS[0]} promises")
    if files[0].suffix == ".bin":
        state = load_pt(files[0])
        return dict.fromkeys(state, state)
    found = {}
    for file in map(Safetensors, files):
        if twice := found.keys() & file.entries.keys():
            raise ModelError(f"{folder}: the tensor {min(twice)} is in two of its files")
        found |= dict.fromkeys(file.entries, file)
    return found


def load_hf(folder, dtype=None):
    """The checkpoint dict {"config", "model"} of a folder in Hugging Face's layout.

    Tensors that are as we keep them stay on disk until they are touched; the others are copied one
    by one, and in `dtype` if one is given, so that at no time two copies are in memory.
    """
    folder = Path(folder)
    values = read_json(folder / "config.json")
    config = config_from_hf(values, str(folder / "config.json"))
    if config.context < values.get("max_position_embeddings", 0):
        window = f"the window of {config.context} is the context"
        print(f"[its attention slides: {window}]", file=sys.stderr)
    gpt2, files = config.position == "learned", hf_tensors(folder)
    state, used = {}, {"lm_head.weight"}
    bare = gpt2 and "wte.weight" in files  # the first GPT-2 files have no "transformer."
    for name, want in skeleton(config).state_dict().items():
        theirs = hf_name(name, gpt2)
        theirs = theirs.removeprefix("transformer.") if bare else theirs
        if name == "head.weight" and config.tied:
            state[name] = state["embed.weight"]
            continue
        if theirs not in files:
            raise ModelError(f"{folder} lacks the tensor {theirs} {tuple(want.shape)}")
        file, used = files[theirs], used | {theirs}
        found = from_hf(name, file[theirs], gpt2)
        if found.shape != want.shape or not found.is_floating_point():
            raise ModelError(
                f"{folder}: {theirs} gives {found.dtype} {tuple(found.shape)} for {name}, the "
                f"config says {tuple(want.shape)}"
            )
        state[name] = found.to(dtype or found.dtype).contiguous()
        if isinstance(file, Safetensors) and state[name] is not found:
            file.release(theirs)
    if extra := [n for n in files if n not in used and not re.search(IDLE_TENSORS, n)]:
        raise ModelError(f"{folder}: the tensor {extra[0]} is unknown to the model")
    return {"config": asdict(config), "model": state}


# Buffers that old checkpoints carry: causal masks, and rotary frequencies that follow from config
IDLE_TENSORS = r"(attn\.(masked_)?bias|rotary_emb\.inv_freq)$"


def export_hf(content, folder, more=None):
    """Write config.json, with `more` fields, and model.safetensors of a checkpoint's model, for
    transformers to read.

    Where their architecture has a norm's weight or a bias and ours has none, it gets ones or zeros.
    """
    config = Config.from_dict(dict(content["config"]))
    values, full = hf_config(config)
    gpt2, state = values["model_type"] == "gpt2", {}
    if problem := fit_error(skeleton(config).state_dict(), content["model"]):
        raise ModelError(f"this checkpoint does not fit its own config: {problem}")
    for name, want in skeleton(full).state_dict().items():
        if name == "head.weight" and full.tied:
            continue
        filler = torch.ones if name.endswith("weight") else torch.zeros
        own = content["model"].get(name)
        dtype = content["model"]["embed.weight"].dtype
        state[name] = filler(want.shape, dtype=dtype) if own is None else own
    values["torch_dtype"] = str(content["model"]["embed.weight"].dtype).removeprefix("torch.")
    write_safetensors(Path(folder) / "model.safetensors", to_hf(state, gpt2))
    write_json(Path(folder) / "config.json", values | (more or {}))


def write_json(path, values):
    """Write an object as a JSON file, whole or not at all."""
    write_whole(path, lambda f: f.write(json.dumps(values, indent=2, ensure_ascii=False).encode()))


# --------------------------------------------------------------------------------------------
# Are we right? Our logits beside those of somebody else
# --------------------------------------------------------------------------------------------


def recorded_logits(path):
    """(ids (B, T), logits (B, T, V)) of somebody else, in a file that torch.save wrote of {"ids",
    "logits"}; a single row may lack its B."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        ids, logits = torch.as_tensor(found["ids"]), torch.as_tensor(found["logits"])
        assert logits.is_floating_point() and not ids.is_floating_point()
        ids, logits = (t[None] if ids.dim() == 1 else t for t in (ids, logits))
        assert ids.dim() == 2 and ids.shape == logits.shape[:-1] and ids.numel()
    except Exception as e:
        want = 'torch.save of {"ids": (B, T), "logits": (B, T, V)}'
        raise ModelError(f"{path} holds no ids and logits: {want}") from e
    return ids.long(), logits


def transformers_logits(folder, ids):
    """The logits that transformers computes from a folder in its layout, if it is installed."""
    if not (Path(folder) / "config.json").exists():
        raise ModelError(f"{folder} is neither a file of ids and logits nor a folder with a model")
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as e:
        raise ModelError("transformers is not installed: --against a file of ids and logits") from e
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids).logits


def check(name, against=None, ids=None):
    """(lines that say how far our logits for a model are from those that a file records, or that
    transformers computes from a folder or model of the Hub, by default the same one; whether they
    are the same but for rounding)."""
    folder = find_checkpoint(name)
    hub = (folder / "config.json").exists()
    if not hub and against is None:
        raise ModelError(f"{name} is no Hugging Face model: --against what?")
    content = load_hf(folder) if hub else load_checkpoint(folder)
    model = model_from_checkpoint(content, where=str(name))
    vocab, length = model.config.vocab_size, min(64, model.config.context)
    if ids is None:  # any ids will do
        ids = torch.randint(vocab, (1, length), generator=torch.Generator().manual_seed(0))
    against, theirs = find_checkpoint(against or folder), None
    if against.is_file():
        ids, theirs = recorded_logits(against)
    if ids.numel() == 0 or not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise ModelError(f"the ids must be from 0 to {vocab - 1}")
    with torch.no_grad():
        ours = model(ids)
    theirs = transformers_logits(against, ids) if theirs is None else theirs
    if ours.shape != theirs.shape:
        raise ModelError(f"our logits are {tuple(ours.shape)}, theirs {tuple(theirs.shape)}")
    found = compare_logits(ours, theirs)
    same = found["max"] <= 1e-3 * max(1.0, theirs.abs().max().item())
    return [
        f"{ids.numel()} places, {vocab} logits each, in float32:",
        f"largest difference {found['max']:.2e}, mean {found['mean']:.2e}",
        f"the same best token at {found['top1']:.2%} of the places",
        "equal but for rounding" if same else "NOT EQUAL: this is more than rounding",
    ], same


def compare_logits(ours, theirs):
    """{"max", "mean": absolute differences, "top1": share of places with the same best id} of two
    tensors of logits (..., V)."""
    apart = (ours.double() - theirs.double()).abs()
    same = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
    return {"max": apart.max().item(), "mean": apart.mean().item(), "top1": same.item()}


# --------------------------------------------------------------------------------------------
# What a shape costs
# --------------------------------------------------------------------------------------------


def skeleton(config):
    """The model without its memory: every shape, no storage (torch's meta device)."""
    with torch.device("meta"):
        return Transformer(config)


def count_parameters(model):
    """{part: parameters}, a tied table counted once, and "total"."""
    parts = {k: 0 for k in ("embedding", "positions", "attention", "feed-forward", "norms", "head")}
    for name, p in model.named_parameters():  # a tied head is listed once, as the embedding
        if "norm" in name:
            part = "norms"
        elif name.startswith(("embed.", "position.", "head.")):
            part = {"e": "embedding", "p": "positions", "h": "head"}[name[0]]
        else:
            part = "attention" if ".attention." in name else "feed-forward"
        parts[part] += p.numel()
    return {**parts, "total": sum(parts.values())}


def flops_per_token(config, length=None):
    """Floating-point operations to train on one token of rows that are `length` tokens long (by
    default the context), forward and backward.

    Six per weight that takes part in a product (a multiply and an add, three times: forward, by
    the input, by the weight), plus the attention scores: 12 n_layer nh hs length. That counts the
    masked half too, as PaLM (Chowdhery et al. 2022, appendix B) and nanoGPT do, so MFUs compare.
    """
    c = config
    qkv = c.d_model * c.head_size * (c.n_head + 2 * c.n_kv_head)
    feed_forward = c.d_model * c.d_ff * (3 if c.activation in GATED else 2)
    block = qkv + c.n_head * c.head_size * c.d_model + feed_forward
    weights = c.n_layer * block + c.d_model * c.vocab_size
    return 6 * weights + 12 * c.n_layer * c.n_head * c.head_size * (length or c.context)


def chinchilla_loss(parameters, tokens):
    """Predicted loss in nats a token, L = E + A / N^0.34 + B / D^0.28 (Hoffmann et al. 2022, eq.
    10). Fitted on web text with a 32k vocabulary: read it for trends, not as your loss."""
    return 1.69 + 406.4 / parameters**0.34 + 410.7 / tokens**0.28


def report(name, config, tokens=None):
    """The lines that `python model.py` prints."""
    parts = count_parameters(skeleton(config))
    total = parts["total"]
    shape = ", ".join(f"{k} {v}" for k, v in asdict(config).items())
    lines = [f"{name}: {shape}", "", f"{'part':14}{'parameters':>16}{'share':>9}"]
    for part, n in parts.items():
        lines.append(f"{part:14}{n:16,}{n / total:9.1%}")
    mib = total / 2**20
    lines += [
        "",
        f"weights            {4 * mib:8,.1f} MiB in fp32, {2 * mib:,.1f} MiB in bf16",
        f"gradients          {4 * mib:8,.1f} MiB in fp32",
        f"AdamW's moments    {8 * mib:8,.1f} MiB in fp32",
        f"training           {flops_per_token(config):8.3g} FLOPs per token, forward and backward",
        f"Chinchilla advises {20 * total:,} training tokens (20 per parameter)",
    ]
    if tokens:
        lines.append(
            f"on {tokens:,} tokens ({tokens / total:.3g} per parameter) its fit predicts a loss of "
            f"{chinchilla_loss(total, tokens):.3f} nats a token"
        )
    return "\n".join([*lines, f"{name}: {total:,} parameters"])


# What every --ckpt takes: see `find_checkpoint`
WHAT_CKPT = "a checkpoint, a run's folder, gpt2, or owner/name[@revision] of the Hub"


def build_parser():
    p = Parser(description="Parameters, memory and FLOPs of a model.")
    which = p.add_mutually_exclusive_group()
    which.add_argument("--preset", default="tiny", help=f"{', '.join(PRESETS)} (default: tiny)")
    which.add_argument("--ckpt", help=f"{WHAT_CKPT}, instead of a preset")
    which.add_argument("--check", metavar="MODEL", help="compare our logits of a model of the Hub, "
                       "or a folder like one, with a reference's")
    p.add_argument("--tokens", type=int, help="training tokens, for the predicted loss")
    p.add_argument("--export", metavar="DIR", help="write --ckpt as transformers reads it")
    p.add_argument("--against", metavar="REF", help="reference of --check: a model, for "
                   "transformers (default: the same), or a file, torch.save of {'ids', 'logits'}")
    p.add_argument("--ids", help="token ids for --check, e.g. 464,3290 (default: 64 random ones)")
    return p


def export(name, folder):
    """Write what --ckpt means as a folder for transformers; a line about it."""
    folder, content = Path(folder), load_checkpoint(name)
    if "adapter" in content:
        raise ModelError(f"{name} is an adapter: export it with lora.py, or merge it first")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ModelError(f"{folder} is there already: name a new folder for --export")
    tokenizer = Tokenizer(content["tokenizer"]) if "tokenizer" in content else None
    more = {"bos_token_id": tokenizer.begin, "eos_token_id": tokenizer.eot} if tokenizer else {}
    export_hf(content, folder, more)
    if tokenizer:
        write_json(folder / "tokenizer.json", tokenizer_json(tokenizer))
        write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer))
        write_json(folder / "generation_config.json", generation_config(tokenizer))
    return f"{folder}: {read_json(folder / 'config.json')['architectures'][0]}"


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.tokens is not None and args.tokens < 1:
        raise ModelError(f"--tokens {args.tokens} must be at least 1")
    if args.export and not args.ckpt:
        raise ModelError("--export needs --ckpt, the model to write")
    for name, needs in (("against", args.check), ("ids", args.check), ("tokens", not args.check)):
        if getattr(args, name) is not None and (not needs or args.export):
            raise ModelError(f"--{name} means nothing here")
    if args.check:
        try:
            ids = args.ids and torch.tensor([[int(i) for i in args.ids.split(",")]])
        except ValueError as e:
            raise ModelError(f"--ids {args.ids!r}: numbers with commas, please") from e
        lines, same = check(args.check, args.against, ids)
        print("\n".join(lines))
        return 0 if same else 1
    elif args.export:
        print(export(args.ckpt, args.export))
    else:
        name, config = args.ckpt or args.preset, None
        if args.ckpt:
            config = Config.from_dict(dict(load_checkpoint(args.ckpt)["config"]))
        print(report(name, config or preset(name), args.tokens))


if __name__ == "__main__":
    console(main, ModelError)
