"""The whole transformer, by hand, in PyTorch.

    python model.py --preset gpt2                 what a shape costs: parameters, bytes, FLOPs
    python model.py --preset novel --tokens 77919 and the loss that a scaling law predicts for it
    python model.py --ckpt out/stdlib             the same for a trained model
    python model.py --ckpt out/llama --export hf  a folder that transformers reads

One Transformer covers GPT-2, the Llama and Qwen families and the course's own model: every
difference between them is a field of `Config`, read once where the module is built. The chapters:
configuration, the parts of a block, the loss, the model and its key/value cache, checkpoints, what
a shape costs, and models of the Hugging Face Hub.

Text is in prepare_data.py and data/, optimizers are in train.py, sampling is in sample.py.

Shapes in comments: B batch, T time, C channels (d_model), nh query heads, nkv key/value heads,
hs head size, V vocabulary, N rows (B*T flattened), S cached keys.
"""

import contextlib
import copy
import math
import signal
import sys
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # no traceback for Ctrl-C during the slow imports; see `run_cli`
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from data import costs, hf_weights
from data.cli import Parser, UserError, check_limits, run_cli
from data.download import is_hub_name, snapshot_download
from data.files import read_json, write_json, write_whole
from data.hf_tokenizer import generation_config, hub_tokenizer, tokenizer_config, tokenizer_json
from data.tensors import fit_error, load_pt
from data.tokenizer import Tokenizer

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
_LLAMA3 = "factor low_freq_factor high_freq_factor original_max_position_embeddings"
# for more context than the model was first trained with; their parameters
ROPE_SCALINGS = {"linear": {"factor"}, "llama3": set(_LLAMA3.split())}


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
    d_ff: int | None = None  # None: 4 * d_model, for swiglu about 8/3 * d_model (as many weights)
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
    value_embed: bool = False  # a second table, whose rows are added to the values of each layer
    bigram: int = 0  # rows of a table for pairs of tokens, see `pair_rows`; 0 is none
    induction: bool = False  # an id that may be copied, see `copy_candidates`, is an input, too
    tied: bool = False  # the head is the embedding table, transposed
    dropout: float = 0.0
    eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": one of ROPE_SCALINGS, its parameters...}
    init: str = "zero_out"

    def __post_init__(self):
        if self.n_head < 1 or (self.head_size is None and self.d_model % self.n_head):
            raise UserError(f"d_model {self.d_model} is not divisible by n_head {self.n_head}")
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.head_size is None:
            self.head_size = self.d_model // self.n_head
        if self.d_ff is None:
            wide = 4 * self.d_model
            self.d_ff = wide if self.activation not in GATED else (wide * 2 // 3 + 7) // 8 * 8
        self.check()

    def check(self):
        """Raise UserError for a value or a combination that no model can have."""
        known = dict(position=POSITIONS, norm=NORMS, activation=ACTIVATIONS, init=INITS)
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                value = getattr(self, name)
                raise UserError(f"{name} {value!r} is unknown; choose from {', '.join(allowed)}")
        sizes = ("vocab_size", "n_layer", "d_model", "context", "n_kv_head", "head_size", "d_ff")
        for name in sizes:
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} must be at least 1")
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head {self.n_head} is no multiple of n_kv_head {self.n_kv_head}")
        if self.position == "rope" and self.head_size % 2:
            raise UserError(f"rope turns pairs of channels: head size {self.head_size} is odd")
        for name in ("eps", "rope_theta"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} {getattr(self, name)} must be above 0")
        if self.rope_scaling is not None:
            numbers = dict(self.rope_scaling)
            kind = numbers.pop("rope_type", None)
            if set(numbers) != ROPE_SCALINGS.get(kind) or not min(numbers.values()) > 0:
                raise UserError(f"rope_scaling {self.rope_scaling} is none that we can compute")
        if self.bigram < 0:
            raise UserError(f"bigram {self.bigram} must be at least 0")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout {self.dropout} must be in [0, 1)")
        if self.tied and self.head_bias:
            raise UserError("a tied head has no bias of its own: drop tied or head_bias")

    @classmethod
    def from_dict(cls, values):
        """Config from a plain dict, e.g. of a checkpoint; an unknown field is an error."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise UserError(f"unknown config fields: {', '.join(sorted(unknown))}")
        try:
            return cls(**values)
        except TypeError as e:
            raise UserError(f"a config field has a value of the wrong type: {e}") from e


# What learned fastest in our trials at this size (tests/BENCHMARKS.md): norms without weights, one
# more of them after the embedding, tables for values and for pairs of tokens, a candidate to be
# copied as an input, squared ReLU, an untied head, and outputs that start at zero.
# LayerNorm learns like RMSNorm here, and torch's kernel for it is twice as fast on a CPU.
_OURS = dict(
    norm="layernorm", norm_weight=False, activation="relu2", qk_norm=True, embed_norm=True,
    value_embed=True, bigram=8192, induction=True,
)  # fmt: skip
_GPT2 = dict(
    vocab_size=50257, context=1024, position="learned", norm="layernorm", activation="gelu_tanh",
    qkv_bias=True, out_bias=True, ff_bias=True, tied=True, init="gpt2",
)  # fmt: skip
_LLAMA3_8B = dict(vocab_size=128256, context=8192, rope_theta=500000.0)
# the course's model: waylandzhang/Transformer-from-scratch, scifi-demo
_NOVEL = dict(
    vocab_size=100256, context=128, position="sinusoidal", norm="layernorm", activation="relu",
    out_bias=True, ff_bias=True, head_bias=True, dropout=0.1, init="gpt2",
)  # fmt: skip

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
    "llama-8b": Config(n_layer=32, n_head=32, n_kv_head=8, d_model=4096, d_ff=14336, **_LLAMA3_8B),
    "novel": Config(n_layer=12, n_head=8, d_model=512, **_NOVEL),
}


def padded_vocab(size):
    """A vocabulary's size, rounded up to a multiple of 64: matrix products are faster so."""
    return -(-size // 64) * 64


def preset(name, **changes):
    """A copy of the named preset with some fields changed. `d_ff` and the head size follow
    `d_model` and `n_head` unless they are among the changes. UserError for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is unknown; choose from {', '.join(PRESETS)}")
    derived = {}
    if {"d_model", "n_head", "activation"} & set(changes):
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
    # on the CPU even where the default device is meta; rounded in transformers' order
    channel = torch.arange(0, head_size, 2, device="cpu").float()
    frequency = scale_frequency(1.0 / theta ** (channel / head_size), scaling or {})  # (hs/2,)
    angle = torch.arange(context, device="cpu").float()[:, None] * frequency  # (context, hs/2)
    angle = torch.cat((-angle, angle), dim=-1)  # see apply_rope
    return angle.cos(), angle.sin()


def scale_frequency(frequency, scaling):
    """Rotation frequencies slowed down for a longer context: all of them (`linear`), or only those
    of fewer than low_freq_factor turns in the original context, and up to high_freq_factor turns a
    blend (`llama3`, Llama 3.1's)."""
    kind, factor = scaling.get("rope_type"), scaling.get("factor", 1.0)
    if kind != "llama3":
        return frequency / factor
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / frequency)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequency / factor + keep * frequency


def apply_rope(x, cos, sin):
    """Rotate x (B, nh, T, hs) by the rows of `cos` and `sin` (broadcastable to x).

    Dot products of rotated queries and keys depend on the distance of their positions alone. Two
    channels a and b, hs/2 apart, become

        a cos - b sin    (so the first half of `rope_tables`' sines has the minus)
        b cos + a sin
    """
    other = x.roll(x.shape[-1] // 2, dims=-1)  # b where a was, and a where b was
    return (x * cos + other * sin).to(x.dtype)


def sinusoid_table(context, d_model):
    """The fixed positions of "Attention Is All You Need" (2017), section 3.5: (context, C)."""
    frequency = 10000.0 ** (-torch.arange(0, d_model, 2, device="cpu").float() / d_model)
    angle = torch.arange(context, device="cpu").float()[:, None] * frequency  # (context, ceil(C/2))
    table = torch.stack((angle.sin(), angle.cos()), dim=-1)  # even channels sine, odd cosine
    return table.flatten(1)[:, :d_model]


def naive_attention(q, k, v, mask=None, dropout=0.0, causal=True):
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
    """`naive_attention` by torch's fused kernel, which never holds the (T, S) scores."""
    T, S, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    if mask is None and causal and 1 < T < S:  # with a cache T queries face S > T keys
        mask = causal_mask(T, S, q.device)
    if group > 1 and mask is not None and q.is_cuda:  # no fused CUDA kernel has a mask and groups
        k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
    if mask is not None or T == 1:  # one query sees all keys
        causal = False
    how = dict(is_causal=causal, enable_gqa=group > 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, **how)


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

    def forward(self, x, rope=None, update_cache=None, mask=None, values=None):
        """x (B, T, C) -> (B, T, C). `update_cache(k, v)` gives all keys and values so far; `values`
        (B, T, nkv * hs) are added to the new ones."""
        B, T, _ = x.shape
        q = self.q_norm(self.q(x).view(B, T, self.n_head, self.head_size))
        k = self.k_norm(self.k(x).view(B, T, self.n_kv_head, self.head_size))
        v = self.v(x) if values is None else self.v(x) + values
        v = v.view(B, T, self.n_kv_head, self.head_size)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, hs)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if update_cache is not None:
            k, v = update_cache(k, v)  # (B, nkv, S, hs)
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
        self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x, rope=None, update_cache=None, mask=None, values=None):
        x = x + self.drop(self.attention(self.norm1(x), rope, update_cache, mask, values))
        return x + self.drop(self.feed_forward(self.norm2(x)))


# --------------------------------------------------------------------------------------------
# What is added to the embedding
# --------------------------------------------------------------------------------------------


class Table(nn.Embedding):
    """An nn.Embedding. On the meta device it skips the random initialisation, for which torch would
    import its compiler (more than a second)."""

    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


class BigramEmbedding(Table):
    """A table with a row for the pair of ids that ends at each position. The row is a hash of the
    pair, so some pairs share one (fastText, Bojanowski et al. 2017)."""

    def __init__(self, config):
        super().__init__(config.bigram, config.d_model)

    def init_weights(self):
        nn.init.zeros_(self.weight)

    def forward(self, ids, positions, embed):
        # a text's first id counts as the one before itself
        previous = ids.gather(1, (positions - 1).clamp(min=0))
        current = ids.gather(1, positions)
        return super().forward((previous * 36313 ^ current * 27191) % self.num_embeddings)


LONGEST_MATCH = 8


def copy_candidates(ids, positions):
    """(the id that may come next because it did so before, the length of the match), (B, T) each,
    for `positions` (B, T) of ids (B, S).

    The candidate follows the earlier position whose last ids are the same as the last ids here for
    the longest stretch, up to LONGEST_MATCH; the latest one if several are as long. Without any
    match both are 0.

    >>> copy_candidates(torch.tensor([[5, 6, 7, 5, 9, 5, 6]]), torch.tensor([[4, 5, 6]]))
    (tensor([[0, 9, 7]]), tensor([[0, 1, 2]]))
    """
    S, earlier = ids.shape[1], torch.arange(ids.shape[1], device=ids.device)
    small = torch.int16 if S * (LONGEST_MATCH + 1) < 2**15 else torch.int32  # faster, (B, T, S)
    padded = F.pad(ids.int(), (LONGEST_MATCH - 1, 0), value=-1)
    windows = padded.unfold(1, LONGEST_MATCH, 1)  # (B, S, 8): the ids that end at each position
    here = windows.gather(1, positions[..., None].expand(-1, -1, LONGEST_MATCH))  # (B, T, 8)
    pairs = zip(windows[:, None].unbind(-1), here[:, :, None].unbind(-1))
    same = earlier < positions[..., None]  # (B, T, S)
    length = torch.zeros_like(same, dtype=small)
    for theirs, ours in reversed(list(pairs)):  # from the newest id backwards
        same = same & (theirs == ours)
        length += same
    best = (length * S + earlier.to(small)).amax(-1).long()  # the longest, then the latest
    copied = ids.gather(1, (best % S + 1).clamp(max=S - 1))
    return torch.where(best < S, 0, copied), best // S


class Induction(nn.Module):
    """The embedding of the id that `copy_candidates` proposes, projected, times what a match of
    that length is worth.

    An induction head finds that id, too (Olsson et al. 2022), but takes thousands of steps to form;
    given it, a model copies after a hundred (n-gram heads, Akyürek et al. 2024).
    """

    def __init__(self, config):
        super().__init__()
        self.project = nn.Linear(config.d_model, config.d_model, bias=False)
        self.match = Table(LONGEST_MATCH + 1, config.d_model)

    def init_weights(self):
        nn.init.orthogonal_(self.project.weight, gain=0.5)
        nn.init.ones_(self.match.weight)[0] = 0.0

    def forward(self, ids, positions, embed):
        copied, length = copy_candidates(ids, positions)
        return self.match(length) * self.project(embed(copied))


# To add an input to the embedding: a field of Config and a module, made if the field is set. Its
# `forward` gets all ids so far (B, S), the positions (B, T) of the new ones among them, and the
# function that embeds ids; it returns what is added to the embedding, (B, T, C).
INPUTS = {"bigram": BigramEmbedding, "induction": Induction}


# --------------------------------------------------------------------------------------------
# The loss, without ever holding all logits
# --------------------------------------------------------------------------------------------

LOSS_ROWS = 256  # rows of logits at a time: 64 was 27 % slower at V = 100,256, more takes memory


class ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy of a linear head, a few rows of logits at a time.

    Full logits are (N, V): 2,048 rows of a 100,256-id vocabulary are 0.8 GB, and their softmax and
    gradient as much again. Here the loss *and* the gradient of each chunk of rows are computed
    together, then its logits are freed: d loss / d logits = softmax(logits) - onehot(target).
    The backward pass only scales the stored gradients.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, targets, with_grad, dtype):
        low = dtype or x.dtype  # what the matrix products run in (bf16 under autocast)
        x_low, w_low, b_low = x.to(low), weight.to(low), None if bias is None else bias.to(low)
        full = torch.float64 if x.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=full, device=x.device)
        need_x, need_w, need_b = (n and with_grad for n in ctx.needs_input_grad[:3])
        grad_x = torch.empty_like(x) if need_x else None
        grad_w = torch.zeros_like(weight, dtype=full) if need_w else None
        grad_b = torch.zeros_like(bias, dtype=full) if need_b else None
        # on a GPU large products pay: 2^28 logits are 1 GiB in float32
        step = max(LOSS_ROWS, 2**28 // len(weight)) if x.is_cuda else LOSS_ROWS
        for i in range(0, len(x), step):
            rows, goal = x_low[i : i + step], targets[i : i + step, None]
            log_p = F.log_softmax(F.linear(rows, w_low, b_low), dim=-1, dtype=full)  # (rows, V)
            loss -= log_p.gather(1, goal).sum()
            if not (need_x or need_w or need_b):
                continue
            error = log_p.exp_().scatter_add_(1, goal, -torch.ones_like(goal, dtype=full))
            if need_b:
                grad_b += error.sum(0)
            error = error.to(low)
            if need_x:
                grad_x[i : i + step] = error @ w_low
            if need_w:
                add_product(grad_w, error.T, rows)
        ctx.grads = (grad_x, grad_w, grad_b, None, None, None)
        return loss

    @staticmethod
    def backward(ctx, scale):
        if ctx.grads is None:
            raise RuntimeError("ChunkedLoss went backward twice: call the model again instead")
        grads, ctx.grads = ctx.grads, None
        # in place: another (V, C) copy would be the largest tensor of the step
        return tuple(None if g is None else g.mul_(scale) for g in grads)


def add_product(total, a, b):
    """total += a @ b, added up in the dtype of `total` whatever that of a and b is."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # a piece at a time: adding another dtype makes a copy of it
        for part, piece in zip(total.split(4096), a.split(4096)):
            part += piece @ b


def chunked_loss(x, weight, bias, targets, places=None):
    """Sum of -log softmax(x @ weight.T + bias)[target] over rows, a float32 scalar (of float64
    states a float64 one).

    x (..., C), weight (V, C), bias (V,) or None, targets (...) with -100
    for "no loss": such rows cost nothing. Equal to F.cross_entropy(..., reduction="sum"), value and
    gradients.
    `places` are those of the other targets, flattened; to look them up a GPU must be waited for.
    """
    x, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    if places is None:
        places = targets != -100
        places = slice(None) if places.all() else places
    x, targets = x[places], targets[places]
    device = x.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    with torch.autocast(device, enabled=False):
        return ChunkedLoss.apply(x, weight, bias, targets, torch.is_grad_enabled(), low)


def token_logps(x, weight, bias, targets, allowed=None):
    """log softmax(x @ weight.T + bias)[target] of each place (...), 0 where the target is -100, in
    float32 (of float64 states in float64): for losses that are no plain sum over tokens. Ids that
    are not `allowed`, bools (V,), have probability 0. Logits are made a few rows at a time and made
    again in the backward pass, so they are never all held."""
    full = torch.float64 if x.dtype == torch.float64 else torch.float32

    def logps(rows, goal):
        logits = F.linear(rows, weight, bias)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -math.inf)
        log_p = logits.log_softmax(-1, dtype=full)
        return log_p.gather(1, goal[:, None])[:, 0]

    keep = targets != -100
    kept, goals = x[keep].split(LOSS_ROWS), targets[keep].split(LOSS_ROWS)
    parts = [recompute(logps, r, g, use_reentrant=False) for r, g in zip(kept, goals)]
    out = torch.zeros(targets.shape, dtype=full, device=x.device)
    return out.masked_scatter(keep, torch.cat(parts))


# --------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """A decoder-only language model.

    `model(ids)` gives logits (B, T, V); `model(ids, targets)` the *summed* negative log-likelihood
    of the targets in float32 (see `chunked_loss`), which the training loop divides by their number.
    With `reduction="none"` it gives the log probability of every target, (B, T), among the ids that
    are `allowed`; with "logits" the logits (N, V) of the places that have a target.

    >>> model = Transformer(preset("tiny"))
    >>> model(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 2048])
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = copy.copy(config)
        self.embed = Table(c.vocab_size, c.d_model)
        self.value_embed = Table(c.vocab_size, c.n_kv_head * c.head_size) if c.value_embed else None
        self.inputs = nn.ModuleDict({n: make(c) for n, make in INPUTS.items() if getattr(c, n)})
        if c.position == "learned":
            self.position = Table(c.context, c.d_model)
        elif c.position == "sinusoidal":
            self.register_buffer("sines", sinusoid_table(c.context, c.d_model), persistent=False)
        elif c.position == "rope":
            cos, sin = rope_tables(c.context, c.head_size, c.rope_theta, c.rope_scaling)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.embed_norm = make_norm(c, c.d_model) if c.embed_norm else nn.Identity()
        self.drop = nn.Dropout(c.dropout) if c.dropout else nn.Identity()
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

        `zero_out`: each residual branch and the head start at zero, so the first steps learn little
        more than bigrams and no layer dominates another; inner matrices get std 0.577 / sqrt(C),
        which keeps a normalised input at a third of its variance. In our trials this halved the
        steps to the same loss. In both, what is added to the embedding starts small, or at 0.
        """
        c, gpt2 = self.config, self.config.init == "gpt2"
        # a tied table is also the head: at std 1 its first loss would be enormous
        nn.init.normal_(self.embed.weight, std=0.02 if gpt2 or c.tied else 1.0)
        for module in self.inputs.values():
            module.init_weights()
        for name, p in self.named_parameters():
            if name.startswith(("embed.", "inputs.")):
                continue
            if p.dim() < 2:  # biases 0, norm weights 1
                p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            elif name == "value_embed.weight":
                p.zero_()
            elif name.endswith(("attention.out.weight", "feed_forward.down.weight")):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer)) if gpt2 else p.zero_()
            elif name == "head.weight":
                nn.init.normal_(p, std=0.02) if gpt2 else p.zero_()
            else:
                nn.init.normal_(p, std=0.02 if gpt2 else 0.577 / math.sqrt(c.d_model))

    @torch.no_grad()
    def grow_vocabulary(self, vocab_size, known):
        """Room for at least `vocab_size` ids, of which the first `known` were in use until now. All
        rows after those, unused ones included, start at the mean of the known rows."""
        c, grown = self.config, max(self.config.vocab_size, vocab_size)
        for table in filter(None, (self.embed, self.value_embed, None if c.tied else self.head)):
            for name in ("weight", "bias"):
                old = getattr(table, name, None)
                if old is not None:
                    kept = old[:known]  # fewer, if there is an end of text that the model lacks
                    mean = kept.float().mean(0, keepdim=True).to(old.dtype)
                    new = mean.repeat(grown, *[1] * (old.dim() - 1))
                    new[: len(kept)] = kept
                    setattr(table, name, nn.Parameter(new, old.requires_grad))
        if c.tied:
            self.head.weight = self.embed.weight
        self.embed.num_embeddings = self.head.out_features = c.vocab_size = grown

    def hidden(self, ids, cache=None, step=None):
        """The final, normalised states (B, T, C) of ids (B, T); logits are `model.head` of them.

        With a `KVCache`, ids are the tokens after those that each of its rows holds; `step` is
        what `cache.begin(ids)` gives, if it was called before.
        """
        c, T = self.config, ids.shape[1]
        if cache is None:
            if c.context < T:
                raise UserError(f"{T} tokens do not fit the context of {c.context}")
            # not a slice: the compiler would make a graph for every length
            step = Step(torch.arange(T, device=ids.device))
        step = step or cache.begin(ids)
        tables = [table[step.positions] for table in self.position_tables()]
        x, rope = self.embed(ids), None  # (B, T, C)
        if c.position == "rope":  # (1, T, hs) or (B, 1, T, hs): the same for every head
            rope = [table.unsqueeze(-3) for table in tables]
        else:
            x = x + tables[0].to(x.dtype)
        x = self.embed_norm(x)
        if self.inputs:
            seen, at = ids if cache is None else cache.past(step), step.positions
            if isinstance(at, slice):
                at = torch.arange(at.start, at.stop, device=ids.device)
            at = at.expand_as(ids)
            for module in self.inputs.values():
                x = x + module(seen, at, self.embed_ids)
        x = self.drop(x)
        values = self.value_embed(ids) if self.value_embed is not None else None
        for i, block in enumerate(self.blocks):
            update_cache = partial(cache.update, i, step) if cache is not None else None
            if self.grad_checkpoint and self.training:
                x = recompute(block, x, rope, update_cache, step.mask, values, use_reentrant=False)
            else:
                x = block(x, rope, update_cache, step.mask, values)
        if cache is not None:
            cache.lengths += T
        return self.norm(x)

    def embed_ids(self, ids):
        """The normalised embedding of ids alone, without position: what an input looks up."""
        return self.embed_norm(self.embed(ids))

    def lookup_tables(self):
        """Names of the weights beside `embed` and `position` that ids or matches are looked up in:
        they learn with the embedding's rate."""
        names = [f"{n}.weight" for n, m in self.named_modules() if isinstance(m, Table)]
        return [n for n in names if n.startswith(("value_embed.", "inputs."))]

    def position_tables(self):
        """The tables that `hidden` looks positions up in: (context, ...) each."""
        if self.config.position == "learned":
            return [self.position.weight]
        return [self.sines] if self.config.position == "sinusoidal" else [self.cos, self.sin]

    def last_logits(self, ids, cache, step=None):
        """Logits (B, V) of what comes after the last of the ids (B, T): all that sampling needs."""
        return self.head(self.hidden(ids, cache, step)[:, -1])

    def forward(self, ids, targets=None, cache=None, reduction="sum", places=None, allowed=None):
        x = self.hidden(ids, cache)
        if targets is None:
            return self.head(x)  # (B, T, V)
        if reduction == "logits":
            return self.head(x[targets != -100])  # (N, V)
        if reduction == "none":
            return token_logps(x, self.head.weight, self.head.bias, targets, allowed)  # (B, T)
        return chunked_loss(x, self.head.weight, self.head.bias, targets, places)


class Step(NamedTuple):
    """Where the T new tokens of each row stand, and what they may look at."""

    positions: slice | torch.Tensor  # of all rows, or (B, T) where these have different lengths
    mask: torch.Tensor | None = None  # (B, 1, T, S), see `naive_attention`
    layers: list | None = None  # (keys, values) of a KVCache up to the newest, (B, nkv, S, hs)


class KVCache:
    """Keys and values of all tokens seen so far, allocated once: (L, B, nkv, S, hs) each.

    Decoding one token then costs one row of matrix products and not T of them. `lengths` says how
    many tokens each row holds; it lies on the CPU, so that no one waits for a GPU to read it.
    """

    def __init__(self, model, batch, length=None):
        c, weight = model.config, model.embed.weight
        shape = (c.n_layer, batch, c.n_kv_head, min(length or c.context, c.context), c.head_size)
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self.ids = torch.zeros(batch, shape[3], dtype=torch.long, device=weight.device)
        self.lengths = torch.zeros(batch, dtype=torch.long)
        self.context = c.context

    @property
    def room(self):
        """The most tokens that a row can hold."""
        return self.keys.shape[3]

    def rows(self, first, last):
        """A KVCache of some of the rows, in the same memory."""
        part = copy.copy(self)
        part.keys, part.values = self.keys[:, first:last], self.values[:, first:last]
        part.ids, part.lengths = self.ids[first:last], self.lengths[first:last]
        return part

    def begin(self, ids, static=False):
        """The Step of ids (B, T) that follow those of each row, which it writes; `hidden` adds T to
        the lengths at its end. With `static` its shapes are the same whatever the lengths."""
        T, lengths, device = ids.shape[1], self.lengths.tolist(), ids.device
        start, stop = max(lengths), max(lengths) + T
        if stop > self.room:
            limit = "context" if self.room == self.context else "cache"
            raise UserError(f"{stop} tokens do not fit the {limit} of {self.room}")
        if start == min(lengths) and not static:
            positions, mask = slice(start, stop), None
            self.ids[:, positions] = ids
        else:
            stop = self.room if static else stop
            positions = (self.lengths[:, None] + torch.arange(T)).to(device)
            mask = torch.arange(stop, device=device) <= positions[:, None, :, None]
            self.ids.scatter_(1, positions, ids)
        keys, values = self.keys.narrow(3, 0, stop), self.values.narrow(3, 0, stop)
        return Step(positions, mask, list(zip(keys, values)))

    def update(self, i, step, *new):
        """Write the new keys and values of layer i, (B, nkv, T, hs) each; those of all tokens."""
        for cached, t in zip(step.layers[i], new):
            if isinstance(step.positions, slice):
                cached.narrow(2, step.positions.start, t.shape[2]).copy_(t)
            else:
                index = step.positions[:, None, :, None]
                cached.scatter_(2, index.expand_as(t), t.to(cached.dtype))
        return step.layers[i]

    def past(self, step):
        """All ids up to the newest, (B, S)."""
        return self.ids[:, : step.layers[0][0].shape[2]]

    def copy_rows(self, sources, targets=slice(None), n=None):
        """Give the rows `targets`, by default all, what the rows `sources` hold, or the first n
        tokens of it."""
        lengths = self.lengths[sources].clamp(max=n if n is not None else self.room)
        n = int(lengths.max())
        for t in (self.keys, self.values):
            t[:, targets, :, :n] = t[:, sources, :, :n]
        self.ids[targets, :n] = self.ids[sources, :n]
        self.lengths[targets] = lengths

    def grow(self, room):
        """Make room for more tokens."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:3], room, old.shape[4])
            new[:, :, :, : old.shape[3]] = old
            setattr(self, name, new)
        self.ids = F.pad(self.ids, (0, room - self.ids.shape[1]))


def meta_model(config):
    """The model without its memory: every shape, no storage (torch's meta device)."""
    with torch.device("meta"):
        return Transformer(config)


# --------------------------------------------------------------------------------------------
# Checkpoints: plain dicts, written so that a crash never loses the previous one
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


def unwrapped_state(module):
    """The module's state dict without the prefixes that torch.compile and DDP add to its keys."""
    state = module.state_dict()
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):  # either may be around the other
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def save_checkpoint(path, content):
    """Write a dict of tensors and plain values: temporary file, fsync, rename. UserError if the
    disk is full or read-only; what stood at `path` is then still whole."""
    write_whole(path, lambda f: torch.save(content, f))


def load_checkpoint(path, dtype=None, resuming=False):
    """The dict that `save_checkpoint` wrote, its tensors mapped from disk and read when touched; or
    the like of what `find_checkpoint` finds, its tensors in `dtype` where they must be copied.

    Only tensors and plain values are unpickled (weights_only), never code. With `resuming`, for a
    run that will write the file again, the tensors are in memory (Windows does not replace a file
    that is mapped), and weights in parts are left to `Run.restore`; without, they are missing.
    """
    path = find_checkpoint(path)
    if (path / "config.json").exists():
        own = {"tokenizer": hub_tokenizer(path)} if (path / "tokenizer.json").exists() else {}
        return load_hf(path, dtype) | own
    if (path / "adapter_config.json").exists():
        raise UserError(f"{path} is an adapter of peft's, which cannot be read here")
    if path.is_dir():
        found = [path / name for name in ("best.pt", "last.pt") if (path / name).exists()]
        if not found:
            raise UserError(f"{path} holds no best.pt or last.pt; train first, or name a file")
        path = found[0]
    if not path.exists():
        raise UserError(
            f"checkpoint {path} does not exist; a file, a run's folder, or a model of the Hub "
            f"(gpt2, or owner/name)?"
        )
    content = load_pt(path, mapped=not resuming)
    if not isinstance(content, dict) or not {"config", "model"} <= set(content):
        raise UserError(f"{path} is no checkpoint of scratchlm: it has no config and model")
    if not resuming:
        content.pop("parts", None)
    return content


def load_weights(model, state, where="checkpoint", assign=False):
    """Copy a state dict into the model, or with `assign` make its tensors the model's own;
    UserError names the first key or shape that misfits."""
    problem = fit_error(model.state_dict(), state)
    if problem:
        raise UserError(f"{where} does not fit: {problem}")
    model.load_state_dict(state, assign=assign)


def model_from_checkpoint(content, device="cpu", dtype=torch.float32, where="checkpoint"):
    """The Transformer in a loaded checkpoint, on `device`, in evaluation mode. Its weights are in
    `dtype`; for None as they lie in the file, and mapped from it if they stay on the CPU."""
    try:
        config = Config.from_dict(dict(content["config"]))
    except (TypeError, ValueError) as e:
        raise UserError(f"{where} has a config that cannot be built: {e}") from e
    if content.get("parts"):  # a sharded run is resumed: `Run.restore` loads the weights
        return Transformer(config).eval()
    model = meta_model(config)  # no memory for weights that would be overwritten at once
    state = {k: v.to(device=device, dtype=dtype) for k, v in content["model"].items()}
    load_weights(model, state, where, assign=True)
    if config.tied:
        model.head.weight = model.embed.weight
    return model.to(device).requires_grad_().eval()


# --------------------------------------------------------------------------------------------
# What a shape costs
# --------------------------------------------------------------------------------------------


def count_parameters(model):
    """{part: parameters}, a tied table counted once, and "total"."""
    parts = {k: 0 for k in ("embedding", "positions", "attention", "feed-forward", "norms", "head")}
    for name, p in model.named_parameters():  # a tied head is listed once, as the embedding
        if "norm" in name:
            part = "norms"
        elif name.startswith(("embed.", "value_embed.", "inputs.")):
            part = "embedding"
        elif name.startswith(("position.", "head.")):
            part = {"p": "positions", "h": "head"}[name[0]]
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
    weights = c.n_layer * block + c.d_model * c.vocab_size + c.induction * c.d_model**2
    return 6 * weights + 12 * c.n_layer * c.n_head * c.head_size * (length or c.context)


def report(name, config, tokens=None, world=None, shard=False):
    """The lines that `python model.py` prints."""
    parts = count_parameters(meta_model(config))
    flops = flops_per_token(config)
    lines = costs.shape_lines(name, asdict(config), parts, flops, tokens)
    if world:  # the tables and two blocks of a model that is cut are gathered at once
        total, blocks = parts["total"], parts["attention"] + parts["feed-forward"]
        gathered = total - blocks + 2 * blocks // config.n_layer
        lines += costs.world_lines(config, total, gathered, flops, world, shard)
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------
# Hugging Face's layout, in and out
# --------------------------------------------------------------------------------------------


def find_checkpoint(name):
    """The path that `name` means: a file, a run's folder, a folder of Hugging Face's layout, or
    else a model of the Hub (`gpt2`, `owner/name`, `owner/name@revision`), downloaded."""
    path = Path(name)
    local = path.exists() or path.parts[0] in ("out", "data")
    local = local or (path.parent != Path() and path.parent.is_dir())
    if local or not is_hub_name(str(name)):
        return path
    return snapshot_download(str(name), check=readable)


def readable(folder):
    """UserError if we cannot read config or tokenizer in a folder of Hugging Face's
    layout: to be said before the weights are downloaded."""
    config_from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
    if (folder / "tokenizer.json").exists():
        hub_tokenizer(folder)


def config_from_hf(values, where="config.json", verbose=False):
    """Our Config of a Hugging Face config.json, a dict; UserError if we cannot compute it. With
    `verbose`, a line on stderr names the fields that are passed over."""
    try:
        found, spare = hf_weights.config_from_hf(values)
        config = Config(**found)
    except TypeError as e:
        raise UserError(f"{where} lacks a field or has one of the wrong type: {e}") from e
    except UserError as e:
        raise UserError(f"{where}: {e}") from e
    if spare and verbose:
        print(f"[{where}: ignored fields: {', '.join(spare)}]", file=sys.stderr)
    return config


def config_to_hf(config):
    """(config.json as a dict, the Config that it means) of the Hugging Face architecture that
    computes what ours does: it may have additional biases and norm weights, which change nothing.
    UserError names a field that no architecture has."""
    values = hf_weights.config_to_hf(asdict(config))
    full = config_from_hf(values)
    for name, value in asdict(config).items():
        other = getattr(full, name)
        added = other is True and (name == "norm_weight" or name.endswith("_bias"))
        if value != other and not added and name not in ("dropout", "init"):
            raise UserError(
                f"no Hugging Face architecture has {name} {value} with the rest of this model (the "
                f"nearest, {values['model_type']}, has {other})"
            )
    return values, full


def load_hf(folder, dtype=None):
    """The checkpoint dict {"config", "model"} of a folder in Hugging Face's layout, tensors as
    `hf_weights.read_state` gives them."""
    values = read_json(Path(folder, "config.json"))
    config = config_from_hf(values, str(Path(folder, "config.json")), verbose=True)
    if config.context < values.get("max_position_embeddings", 0):
        window = f"the window of {config.context} is the context"
        print(f"[its attention slides: {window}]", file=sys.stderr)
    shapes = {name: t.shape for name, t in meta_model(config).state_dict().items()}
    gpt2 = config.position == "learned"
    state = hf_weights.read_state(Path(folder), shapes, gpt2, config.tied, dtype)
    return {"config": asdict(config), "model": state}


def export_hf(content, folder, more=None):
    """Write config.json, with `more` fields, and model.safetensors of a checkpoint's model, for
    transformers to read."""
    config = Config.from_dict(dict(content["config"]))
    values, full = config_to_hf(config)
    if problem := fit_error(meta_model(config).state_dict(), content["model"]):
        raise UserError(f"this checkpoint does not fit its own config: {problem}")
    wanted = {name: t.shape for name, t in meta_model(full).state_dict().items()}
    if full.tied:
        del wanted["head.weight"]
    hf_weights.write_model(Path(folder), values | (more or {}), wanted, content["model"])


def export(name, folder):
    """Write what --ckpt means as a folder for transformers; a line about it."""
    folder, content = Path(folder), load_checkpoint(name)
    if "adapter" in content:
        raise UserError(f"{name} is an adapter: export it with lora.py, or merge it first")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} is there already: name a new folder for --export")
    tokenizer = Tokenizer(content["tokenizer"]) if "tokenizer" in content else None
    more = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id} if tokenizer else {}
    export_hf(content, folder, more)
    if tokenizer:
        write_json(folder / "tokenizer.json", tokenizer_json(tokenizer))
        write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer))
        write_json(folder / "generation_config.json", generation_config(tokenizer))
    return f"{folder}: {read_json(folder / 'config.json')['architectures'][0]}"


# --------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------

# What every --ckpt takes: see `find_checkpoint`
WHAT_CKPT = "a checkpoint, a run's folder, gpt2, or owner/name[@revision] of the Hub"


def build_parser():
    p = Parser(description="Parameters, memory and FLOPs of a model.")
    which = p.add_mutually_exclusive_group()
    which.add_argument("--preset", default="tiny", help=f"{', '.join(PRESETS)} (default: tiny)")
    which.add_argument("--ckpt", help=f"{WHAT_CKPT}, instead of a preset")
    p.add_argument("--tokens", type=int, help="training tokens, for the predicted loss")
    p.add_argument("--world", type=int, help="GPUs: what each holds and sends")
    p.add_argument("--shard", action="store_true", help="with --world: cut over them")
    p.add_argument("--export", metavar="DIR", help="write --ckpt as transformers reads it")
    return p


def main(argv=None):
    args = build_parser().parse_args(argv)
    check_limits(vars(args))
    if args.export and not args.ckpt:
        raise UserError("--export needs --ckpt, the model to write")
    if args.export and args.tokens:
        raise UserError("--tokens means nothing with --export")
    if args.export:
        print(export(args.ckpt, args.export))
    else:
        name, config = args.ckpt or args.preset, None
        if args.ckpt:
            config = Config.from_dict(dict(load_checkpoint(args.ckpt)["config"]))
        config = config or preset(name)
        print(report(name, config, args.tokens, args.world, args.shard))


if __name__ == "__main__":
    run_cli(main)
