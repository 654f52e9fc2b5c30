"""The whole transformer, written by hand in PyTorch.

    python model.py --preset gpt2                   parameters, memory and FLOPs of a shape
    python model.py --preset novel --tokens 77919   also the loss that a scaling law predicts
    python model.py --ckpt out/stdlib               the same for a trained model
    python model.py --ckpt out/llama --export hf    write a folder that transformers can read

One Transformer covers GPT-2, the `novel` model and the families of data/hf_config.py, such as
Llama and Qwen. Their differences are fields of `Config`. prepare_data.py prepares text, train.py
has the optimizers, sample.py samples.

Shapes in comments: B batch, T time, C channels (d_model), nh query heads, nkv key/value heads,
hs head size, V vocabulary, N rows (positions of all texts, flattened), S keys (cached and new).
"""

import contextlib
import copy
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from data import costs, gguf, hf_config, hf_weights, tables
from data.cli import Parser, UserError, at_least, run_cli
from data.costs import FEW_SCORES, FEW_TOKENS, count_parameters, flops_per_token
from data.download import find_tokenizer, is_hub_name, snapshot_download
from data.files import read_json, write_whole
from data.hf_tokenizer import hub_tokenizer
from data.matches import LONGEST_MATCH, copy_candidates
from data.rope import known_scaling, scale_frequency
from data.runs import OUT, newest_run
from data.tensors import fit_error, load_pt
from data.tokenizer import Tokenizer, warn_unknown

# --------------------------------------------------------------------------------------------
# Configuration: every architectural choice, and named shapes
# --------------------------------------------------------------------------------------------

POSITIONS = ("rope", "learned", "sinusoidal")
NORMS = {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm}
NORM_PLACES = ("pre", "post", "both")

# To add an activation, give its name and function here. Names that contain "glu" are gated.
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2's
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # Primer, So et al. 2021
    "swiglu": F.silu,  # Shazeer 2020: silu(x W_gate) * (x W_up)
    "geglu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # Gemma's, gated in the same way
}
GATED = [name for name in ACTIVATIONS if "glu" in name]  # their feed-forward has a third matrix
INITS = ("zero_out", "gpt2")


@dataclass
class Config:
    """The shape of a Transformer. The sizes that are None follow from the others."""

    vocab_size: int = 2048  # rows of the embedding and of the head
    n_layer: int = 4  # blocks
    n_head: int = 4  # heads of queries in each block
    d_model: int = 128  # channels between the blocks
    context: int = 128  # maximum number of tokens that the model can attend to
    n_kv_head: int | None = None  # key/value heads; fewer is grouped-query attention; None: n_head
    head_size: int | None = None  # channels of a head; None: d_model / n_head
    d_ff: int | None = None  # width of a feed-forward; None: 4 (gated 8/3) d_model / chosen experts
    experts: int = 0  # feed-forward networks per block, chosen by a router; 0: one, no router
    experts_per_token: int | None = None  # experts that a token uses; None: 2
    norm_topk_prob: bool | None = None  # scale chosen experts' shares to sum to 1; None: if several
    router_aux_loss_coef: float = 0.01  # weight of the loss that balances the use of the experts
    position: str = "rope"  # how positions are encoded
    norm: str = "rmsnorm"  # kind of norm, in the blocks and before the head
    norm_place: str = "pre"  # x + f(norm(x)): "pre"; x + norm(f(x)): "post"; "both": both norms
    norm_weight: bool = True  # a learned scale (and, for layernorm, shift) in every norm
    activation: str = "swiglu"  # in the feed-forward
    qkv_bias: bool = False  # on the projections to queries, keys and values
    out_bias: bool = False  # on the projection after attention
    ff_bias: bool = False  # on the two or three matrices of the feed-forward
    head_bias: bool = False  # on the logits
    qk_norm: bool = False  # RMS-normalise queries and keys per head
    qk_norm_wide: bool = False  # with qk_norm: normalise all heads together
    parallel: bool = False  # attention and feed-forward read the same input, as in GPT-NeoX
    embed_norm: bool = False  # another norm, right after the embedding
    value_embed: bool = False  # a second table, whose rows are added to the values of each layer
    bigram: int = 0  # rows of a table for pairs of ids, see `NgramEmbedding`; 0 is none
    trigram: int = 0  # rows of a table for the last three ids; 0 is none
    induction: bool = False  # also embed an id that may be copied, see `Induction`
    successor: bool = False  # also embed what followed the previous occurrence of each id
    tied: bool = False  # the head is the embedding table, transposed
    dropout: float = 0.0  # probability for embeddings, attention weights and sublayer outputs
    eps: float = 1e-5  # epsilon of the norms
    rope_theta: float = 10000.0  # base of the rotation frequencies; a larger one makes them lower
    rope_scaling: dict | None = None  # {"rope_type": one of data/rope.py's, its parameters...}
    rotary_share: float = 1.0  # share of a head's channels that rope rotates
    window: int = 0  # number of tokens that layers with a sliding window attend to; 0: no window
    window_layers: list | None = None  # for each layer, whether it has a window; None: all have
    window_theta: float = 0.0  # rope_theta of windowed layers, never scaled; 0: as in other layers
    embed_scale: float = 1.0  # multiplies embedding and positions if there is no embed_norm
    residual_scale: float = 1.0  # multiplies what attention and feed-forward add to their input
    logit_scale: float = 1.0  # multiplies the final states, and therefore the logits
    attention_scale: float = 1.0  # multiplies attention scores, beside 1 / sqrt(head_size)
    init: str = "zero_out"  # initial weights: `Transformer.init_weights`

    def __post_init__(self):
        if self.head_size is None and self.d_model % max(1, self.n_head):
            raise UserError(f"d_model {self.d_model} is not divisible by n_head {self.n_head}")
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.head_size is None:
            self.head_size = self.d_model // max(1, self.n_head)
        if self.experts_per_token is None:
            self.experts_per_token = 2 if self.experts > 1 else 1
        if self.norm_topk_prob is None:
            self.norm_topk_prob = self.experts_per_token > 1
        if self.d_ff is None:
            gated = self.activation in GATED
            size = 4 * self.d_model * (2 if gated else 3) // 3 // max(1, self.experts_per_token)
            self.d_ff = (size + 7) // 8 * 8 if gated else size
        self.check()

    def check(self):
        """UserError for a value or a combination that no model can have."""
        choices = dict(position=POSITIONS, norm=NORMS, activation=ACTIVATIONS, init=INITS)
        choices["norm_place"] = NORM_PLACES
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise UserError(f"{name} {value!r} is unknown; choose from {', '.join(allowed)}")
        for name in ("bigram", "trigram", "window", "experts", "router_aux_loss_coef"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} {getattr(self, name)} must be at least 0")
        scales = "embed_scale residual_scale logit_scale attention_scale rotary_share rope_theta"
        sizes = "eps vocab_size n_layer n_head d_model context n_kv_head head_size d_ff"
        for name in [*sizes.split(), *scales.split(), "experts_per_token"]:
            if not getattr(self, name) > 0:
                raise UserError(f"{name} {getattr(self, name)} must be above 0")
        if self.context > 2**24:
            raise UserError(f"context {self.context} must be at most {2**24}")
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        rotated = int(self.head_size * self.rotary_share)
        if self.position == "rope" and (self.head_size % 2 or rotated % 2 or self.rotary_share > 1):
            share = f"{rotated} of a head's {self.head_size}"
            raise UserError(f"rope rotates pairs of channels, it cannot rotate {share}")
        if self.window_layers is not None and len(self.window_layers) != self.n_layer:
            raise UserError(f"{len(self.window_layers)} window_layers for {self.n_layer} layers")
        if (rope := self.rope_scaling) is not None and not known_scaling(rope, rotated // 2):
            raise UserError(f"rope_scaling {rope} is not implemented for {rotated // 2} pairs")
        if (k := self.experts_per_token) > max(1, self.experts):
            raise UserError(f"experts_per_token {k} must be at most experts {self.experts}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout {self.dropout} must be in [0, 1)")
        if self.tied and self.head_bias:
            raise UserError("a tied head has no bias of its own: drop tied or head_bias")

    @classmethod
    def from_dict(cls, values, where="the config"):
        """The Config with the fields of a dict; UserError for an unknown field or a bad value."""
        try:
            return cls(**values)
        except (TypeError, ValueError) as e:
            raise UserError(f"{where} cannot be built: {e}") from e


# These settings learned fastest in our trials at these sizes (tests/BENCHMARKS.md): norms without
# weights, one more norm after the embedding, qk_norm, tables for values and pairs of tokens,
# `Induction`, squared ReLU, and two defaults of Config: an untied head, and output projections
# that start at zero. LayerNorm learns just as well as RMSNorm, and torch's kernel for it is twice
# as fast on a CPU.
_OURS = dict(
    norm="layernorm", norm_weight=False, activation="relu2", qk_norm=True, embed_norm=True,
    value_embed=True, bigram=8192, induction=True,
)  # fmt: skip
# 64 channels per head and large tables cost little time, see tests/BENCHMARKS.md
_TINY = dict(n_layer=4, n_head=3, d_model=192, context=1024)
_TABLES = _OURS | dict(bigram=2**15, trigram=2**16, successor=True)
_GPT2 = dict(
    vocab_size=50257, context=1024, position="learned", norm="layernorm", activation="gelu_tanh",
    qkv_bias=True, out_bias=True, ff_bias=True, tied=True, init="gpt2",
)  # fmt: skip
# the course's model: waylandzhang/Transformer-from-scratch, scifi-demo
_NOVEL = dict(
    vocab_size=100256, context=128, position="sinusoidal", norm="layernorm", activation="relu",
    out_bias=True, ff_bias=True, head_bias=True, dropout=0.1, init="gpt2",
)  # fmt: skip

# The fields of named shapes. train.py replaces vocab_size by the `padded_vocab` of the data.
PRESETS = {
    "tiny": _TINY | _TABLES,
    # tiny with four times the feed-forward weights, a quarter of which are used for each token
    "moe": _TINY | _TABLES | dict(experts=8),
    "small": _OURS | dict(vocab_size=4096, n_layer=6, n_head=8, d_model=256, context=256),
    "baby": _OURS | dict(vocab_size=4096, n_layer=6, n_head=6, d_model=384, context=256),
    "gpt2": _GPT2 | dict(n_layer=12, n_head=12, d_model=768),
    "gpt2-medium": _GPT2 | dict(n_layer=24, n_head=16, d_model=1024),
    "gpt2-large": _GPT2 | dict(n_layer=36, n_head=20, d_model=1280),
    "gpt2-xl": _GPT2 | dict(n_layer=48, n_head=25, d_model=1600),
    # tiny's layers and width, as a Llama that Hugging Face transformers can read
    "llama": _TINY,
    "llama-8b": dict(
        vocab_size=128256, n_layer=32, n_head=32, n_kv_head=8, d_model=4096, d_ff=14336,
        context=8192, rope_theta=500000.0,
    ),
    "novel": _NOVEL | dict(n_layer=12, n_head=8, d_model=512),
}  # fmt: skip


def padded_vocab(size):
    """The size rounded up to a multiple of 64, which makes matrix products faster."""
    return -(-size // 64) * 64


def preset(name, **changes):
    """The Config of a preset with some fields changed. If the number of heads is not given and does
    not divide a new `d_model`, it becomes about d_model / 64. UserError for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is unknown; choose from {', '.join(PRESETS)}")
    shape = PRESETS[name] | changes
    if "n_head" not in changes and shape["d_model"] % shape["n_head"]:
        C, nkv = shape["d_model"], shape.get("n_kv_head") or 1
        counts = [n for n in range(nkv, C, nkv) if C % (2 * n) == 0]  # rope needs even head sizes
        shape["n_head"] = min(counts, key=lambda n: (abs(n - C // 64), -n), default=1)
    return Config(**shape)


# --------------------------------------------------------------------------------------------
# The parts of a block: norm, rotary positions, attention, feed-forward
# --------------------------------------------------------------------------------------------


def make_norm(c):
    """The norm of a Config, over the last dimension."""
    return NORMS[c.norm](c.d_model, c.eps, elementwise_affine=c.norm_weight)


def rope_tables(context, head_size, theta, scaling=None, share=1.0):
    """Cosines and sines of the rotation angles, each (context, hs). RoFormer, Su et al. 2021.

    Channel i is rotated with channel i + hs/2 (the layout of Llama and Qwen weights), at position t
    by the angle t * theta ** (-2i / hs), which is largest for the first pair. With a `share` below
    1 only the first pairs are rotated, and hs in the angle is the number of channels in them.
    """
    # on the CPU even if the default device is meta; in the same order of operations as
    # transformers, so that results are rounded alike
    rotated = int(head_size * share)
    channel = torch.arange(0, rotated, 2, device="cpu").float()
    frequency = 1.0 / theta ** (channel / rotated)
    if scaling:
        frequency = scale_frequency(frequency, scaling, theta)
    frequency = F.pad(frequency, (0, (head_size - rotated) // 2))  # (hs/2,)
    angle = torch.arange(context, device="cpu").float()[:, None] * frequency  # (context, hs/2)
    angle = torch.cat((-angle, angle), dim=-1)  # see apply_rope
    factor = (scaling or {}).get("attention_factor", 1.0)  # yarn, longrope: squared in the scores
    factor = torch.where(frequency > 0, factor, 1.0).repeat(2)  # (hs,)
    return angle.cos() * factor, angle.sin() * factor


def apply_rope(x, cos, sin):
    """Rotate x (B, nh, T, hs) by the rows of `cos` and `sin` (broadcastable to x).

    The dot product of a rotated query and key depends only on the distance between them. Two
    channels a and b, hs/2 apart, become

        a cos - b sin    (the minus is in the first half of the sines of `rope_tables`)
        b cos + a sin
    """
    other = x.roll(x.shape[-1] // 2, dims=-1)  # b in the place of a, and a of b
    return (x * cos + other * sin).to(x.dtype)


def sinusoid_table(context, d_model):
    """Sinusoidal encodings (context, C) of "Attention Is All You Need" (2017), section 3.5."""
    frequency = 10000.0 ** (-torch.arange(0, d_model, 2, device="cpu").float() / d_model)
    angle = torch.arange(context, device="cpu").float()[:, None] * frequency  # (context, ceil(C/2))
    table = torch.stack((angle.sin(), angle.cos()), dim=-1)  # even channels sine, odd cosine
    return table.flatten(1)[:, :d_model]


def naive_attention(q, k, v, dropout=0.0, scale=None):
    """Causal attention written out: softmax(q k^T * scale) v.

    q (B, nh, T, hs); k and v (B, nkv, S, hs), each key head shared by nh/nkv query heads. A query
    attends to its own position and all before it. The default `scale` is 1 / sqrt(hs).
    """
    T, S, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    # added to the scores: -inf where a query may not attend
    attn_bias = q.new_zeros(T, S).masked_fill(~causal_mask(T, S, q.device), -math.inf)
    flat_q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B nh, T or S, hs)
    scale = scale or q.shape[-1] ** -0.5
    score = torch.baddbmm(attn_bias, flat_q, k.mT, alpha=scale)  # (B nh, T, S)
    return (F.dropout(score.softmax(dim=-1), dropout) @ v).unflatten(0, q.shape[:2])


def attention(q, k, v, mask=None, dropout=0.0, causal=True, scale=None):
    """Use `naive_attention` where it is faster (tests/BENCHMARKS.md), and otherwise torch's fused
    kernel, which never stores the (T, S) scores."""
    T, S, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    short = T <= FEW_TOKENS or q.shape[:2].numel() * T * S <= FEW_SCORES
    if mask is None and causal and 1 < T == S and short and q.device.type == "cpu":
        return naive_attention(q, k, v, dropout, scale)
    if mask is None and causal and 1 < T < S:  # is_causal would align the first query and key
        mask = causal_mask(T, S, q.device)
    if group > 1 and mask is not None and q.is_cuda:  # no fused kernel supports mask and groups
        k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
    # an `if`, because torch.compile cannot trace `is_causal=causal and T > 1`
    if mask is not None or T == 1:  # a single query sees all keys
        causal = False
    if T == 1 and q.dtype == torch.bfloat16 and not q.is_cuda:
        # torch's CPU kernel takes half as long for two queries as for one
        q = q.expand(-1, -1, 2, -1)
    options = dict(is_causal=causal, enable_gqa=group > 1, scale=scale)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, **options)
    return y[:, :, :T]


def causal_mask(T, S, device=None):
    """(T, S) bools: the last query sees all S keys, and each query one key fewer than the next.

    T=2, S=4:   1 1 1 0
                1 1 1 1
    """
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


class WideNorm(nn.RMSNorm):
    """RMS-normalises all heads of a position, (..., nh, hs), together."""

    def forward(self, x):
        return super().forward(x.flatten(-2)).view_as(x)


def scale_by(factor):
    """A function that multiplies by a constant."""
    return nn.Identity() if factor == 1 else partial(torch.mul, other=factor)


class Attention(nn.Module):
    """Multi-head self-attention, causal by default, with `n_kv_head` heads of keys and values."""

    def __init__(self, config, causal=True):
        super().__init__()
        c, self.causal = config, causal
        self.n_head, self.n_kv_head, self.head_size = c.n_head, c.n_kv_head, c.head_size
        self.dropout = c.dropout
        self.q = nn.Linear(c.d_model, c.n_head * c.head_size, bias=c.qkv_bias)
        self.k = nn.Linear(c.d_model, c.n_kv_head * c.head_size, bias=c.qkv_bias)
        self.v = nn.Linear(c.d_model, c.n_kv_head * c.head_size, bias=c.qkv_bias)
        self.out = nn.Linear(c.n_head * c.head_size, c.d_model, bias=c.out_bias)
        self.scale = None if c.attention_scale == 1 else c.attention_scale * c.head_size**-0.5
        # always RMS, whichever norm the block has: their only purpose is to bound the scores
        norm = WideNorm if c.qk_norm_wide else nn.RMSNorm
        norm = partial(norm, elementwise_affine=c.norm_weight) if c.qk_norm else nn.Identity
        heads = (c.n_head, c.n_kv_head) if c.qk_norm_wide else (1, 1)
        self.q_norm, self.k_norm = (norm(n * c.head_size, c.eps) for n in heads)

    def forward(self, x, rope=None, update_cache=None, mask=None, extra_values=None):
        """x (B, T, C) -> (B, T, C). `update_cache(k, v)` stores the new keys and values and returns
        all of them; `extra_values` (B, T, nkv * hs) are added to the new values."""
        B, T, _ = x.shape
        q = self.q_norm(self.q(x).view(B, T, self.n_head, self.head_size))
        k = self.k_norm(self.k(x).view(B, T, self.n_kv_head, self.head_size))
        v = self.v(x) if extra_values is None else self.v(x) + extra_values
        v = v.view(B, T, self.n_kv_head, self.head_size)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, hs)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if update_cache is not None:
            k, v = update_cache(k, v)  # (B, nkv, S, hs)
        dropout = self.dropout if self.training else 0.0
        y = attention(q, k, v, mask, dropout, self.causal, self.scale)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    """Two matrices (three if gated) and an activation, applied to each position separately."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.activation = ACTIVATIONS[c.activation]
        self.up = nn.Linear(c.d_model, c.d_ff, bias=c.ff_bias)
        self.gate = nn.Linear(c.d_model, c.d_ff, bias=c.ff_bias) if c.activation in GATED else None
        self.down = nn.Linear(c.d_ff, c.d_model, bias=c.ff_bias)

    def forward(self, x):
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): the pre-norm residual block. Config
    can also normalise the outputs of both before adding them, or give both one x (`parallel`)."""

    def __init__(self, config, causal=True):
        super().__init__()
        c, norm = config, partial(make_norm, config)
        before = norm if c.norm_place != "post" else nn.Identity
        after = norm if c.norm_place != "pre" else nn.Identity
        self.norm1 = before()
        self.attention, self.parallel = Attention(c, causal), c.parallel
        self.post_norm1 = after()
        self.norm2 = before()
        self.feed_forward = MoE(c) if c.experts else FeedForward(c)
        self.post_norm2 = after()
        self.drop = nn.Dropout(c.dropout) if c.dropout else nn.Identity()
        self.scale = scale_by(c.residual_scale)

    def forward(self, x, rope=None, update_cache=None, mask=None, extra_values=None):
        y = self.attention(self.norm1(x), rope, update_cache, mask, extra_values)
        y = x + self.scale(self.drop(self.post_norm1(y)))
        z = self.feed_forward(self.norm2(x if self.parallel else y))
        return y + self.scale(self.drop(self.post_norm2(z)))


# --------------------------------------------------------------------------------------------
# What is added to the embedding
# --------------------------------------------------------------------------------------------

# To add an input to the embedding, add a field of Config (its comment becomes the flag's help), a
# module, and a line in INPUTS below under the field's name. The module's `forward` gets all ids so
# far (B, S), the positions (B, T) of the new ones, and the function that embeds ids; it returns
# what is added, (B, T, C). Its `init_weights` sets all its parameters.


class Table(nn.Embedding):
    """An nn.Embedding. On the meta device it skips the random initialisation, for which torch would
    import its compiler (more than a second)."""

    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


class NgramEmbedding(Table):
    """Embeds the last n ids (2 or 3) at each position. A hash of them selects the row, so several
    n-grams may share one (fastText, Bojanowski et al. 2017)."""

    def __init__(self, rows, config, n):
        super().__init__(rows, config.d_model)
        self.factors = (27191, 36313, 51949)[:n]

    def init_weights(self):
        nn.init.zeros_(self.weight)

    def forward(self, ids, positions, embed):
        row = torch.zeros_like(positions)
        for back, factor in enumerate(self.factors):
            # before the start of a text, its first id is repeated
            row = row ^ ids.gather(1, (positions - back).clamp(min=0)) * factor
        return super().forward(row % self.num_embeddings)


class Induction(nn.Module):
    """The embedding of the id that followed the longest earlier match of the latest ids (see
    `copy_candidates`), projected, times a learned vector for the length of the match.

    An induction head finds that id, too (Olsson et al. 2022), but takes thousands of steps to form;
    given the id, a model learns to copy within a hundred (n-gram heads, Akyürek et al. 2024).
    """

    def __init__(self, config, longest=LONGEST_MATCH):
        super().__init__()
        self.longest = longest
        self.project = nn.Linear(config.d_model, config.d_model, bias=False)
        self.match = Table(longest + 1, config.d_model)

    def init_weights(self):
        nn.init.orthogonal_(self.project.weight, gain=0.5)
        nn.init.ones_(self.match.weight)[0] = 0.0

    def forward(self, ids, positions, embed):
        copied, length = copy_candidates(ids, positions, self.longest)
        return self.match(length) * self.project(embed(copied))


INPUTS = {
    "bigram": lambda c: NgramEmbedding(c.bigram, c, 2),
    "trigram": lambda c: NgramEmbedding(c.trigram, c, 3),
    "induction": Induction,
    "successor": lambda c: Induction(c, longest=1),
}


# --------------------------------------------------------------------------------------------
# The loss, a chunk of logits at a time
# --------------------------------------------------------------------------------------------

LOSS_ROWS = 256  # rows in a chunk of logits; ChunkedLoss takes more if more fit in its memory,
LOSS_BYTES = 2**27  # which on a CPU is this many bytes


def softmax_(logits, targets, full):
    """Replace logits (rows, V) in place by their softmax, computed in the dtype `full`. Returns the
    log probabilities (rows, 1) of the targets (rows, 1)."""
    log_p = logits.log_softmax(-1, dtype=full)
    of_targets = log_p.gather(1, targets)
    logits.copy_(log_p.exp_())
    return of_targets


class ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy of a linear head, computed some rows of logits at a time.

    Full logits are (N, V): 2,048 rows of a 100,256-id vocabulary take 0.8 GB, and their softmax and
    gradient as much again. Here the loss *and* the gradient of each chunk of rows are computed
    together, then its logits are freed. The backward pass only scales the stored gradients.
    """

    softmax_ = staticmethod(softmax_)  # train.py compiles it on a GPU

    @staticmethod
    def forward(ctx, x, weight, bias, targets, with_grad, dtype):
        low = dtype or x.dtype  # dtype of the matrix products
        x_low, w_low, b_low = x.to(low), weight.to(low), None if bias is None else bias.to(low)
        full = torch.float64 if x.dtype == torch.float64 else torch.float32
        # needs_input_grad ignores no_grad, and grad mode is off in here: hence the flag `with_grad`
        need_x, need_w, need_b = (n and with_grad for n in ctx.needs_input_grad[:3])
        loss, grad_x, grad_w, grad_b = torch.zeros((), dtype=full, device=x.device), [], None, 0
        # a GPU is faster with large products; a CPU's caches have room for only a few rows
        memory, cached = (2**29, len(x) + 1) if x.is_cuda else (LOSS_BYTES, 16)
        rows_at_once = max(LOSS_ROWS, memory // (low.itemsize * len(weight)))
        chunks = max(1, math.ceil(len(x) / rows_at_once))
        for rows, goal in zip(x_low.chunk(chunks), targets.chunk(chunks)):
            error = F.linear(rows, w_low, b_low)  # (rows, V): logits, then their gradient
            for part, wanted in zip(error.split(cached), goal[:, None].split(cached)):
                log_p = ChunkedLoss.softmax_(part, wanted, full)  # (rows, 1)
                part.scatter_(1, wanted, log_p.expm1().to(low))  # softmax - onehot(target)
                loss -= log_p.sum()
            if need_x:
                grad_x.append(error @ w_low)
            if need_w and grad_w is None:  # in full precision if other chunks are added to it
                grad_w = (error.T @ rows).to(weight.dtype if chunks == 1 else full)
            elif need_w:
                add_product(grad_w, error.T, rows)
            if need_b:
                grad_b += error.sum(0).to(full)
        grad_x = torch.cat(grad_x).to(x.dtype) if need_x else None
        ctx.grads = (grad_x, grad_w, grad_b if need_b else None, None, None, None)
        return loss

    @staticmethod
    def backward(ctx, scale):
        if ctx.grads is None:
            raise RuntimeError("ChunkedLoss went backward twice: call the model again instead")
        grads, ctx.grads = ctx.grads, None
        # in place, because another (V, C) would be the largest tensor of the step
        return tuple(None if g is None else g.mul_(scale) for g in grads)


def add_product(total, a, b):
    """Add a @ b to `total` in place, in the dtype of `total`, which a and b need not have."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # adding another dtype makes a copy, so do it for a few rows at a time
        for total_rows, a_rows in zip(total.split(4096), a.split(4096)):
            total_rows += a_rows @ b


def chunked_loss(x, weight, bias, targets, places=None):
    """The sum of -log softmax(x @ weight.T + bias)[target], a float32 scalar (float64 if x is
    float64). Equal to F.cross_entropy(..., reduction="sum"), value and gradients.

    x (..., C), weight (V, C), bias (V,) or None, targets (...) with -100 for "no loss": such rows
    cost nothing. `places` are the indices of the other rows, if known (see `target_places`).
    """
    x, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    if places is None:
        places = targets != -100
        places = slice(None) if places.all() else places
    device = x.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    with torch.autocast(device, enabled=False):
        args = x[places], weight, bias, targets[places]
        return ChunkedLoss.apply(*args, torch.is_grad_enabled(), low)


# --------------------------------------------------------------------------------------------
# The cache: what generation keeps of the tokens so far
# --------------------------------------------------------------------------------------------


class NewTokens(NamedTuple):
    """The positions of the T new tokens of each row, and the keys that they may attend to."""

    positions: slice | torch.Tensor  # a slice or (T,) if the same for all rows, else (B, T)
    mask: torch.Tensor | None = None  # (B, 1, T, S), True: may attend; None: causal
    # per layer (keys, values) (B, nkv, S, hs): parts of the cache, with room for the new tokens
    layers: list | None = None

    def indices(self, ids):
        """The positions as a tensor on the device of the new `ids`, (T,) or (B, T)."""
        if isinstance(self.positions, slice):
            return torch.arange(self.positions.start, self.positions.stop, device=ids.device)
        return self.positions

    def window_mask(self, window, ids):
        """The mask of layers that only attend to the last `window` of all tokens, `ids` (B, S)."""
        if window >= (S := ids.shape[1]):
            return self.mask
        distance = self.indices(ids)[..., None] - torch.arange(S, device=ids.device)
        mask = (distance >= 0) & (distance < window)  # (T, S) or (B, T, S)
        return mask if mask.dim() == 2 else mask[:, None]


class KVCache:
    """A preallocated cache of the ids, keys and values of all tokens so far; `grow` enlarges it.
    Keys and values are (n_layer, B, nkv, room, hs) each.

    With it, decoding one token runs the matrix products for one position instead of T. `lengths` is
    the number of tokens in each row. It lies on the CPU, so reading it does not wait for a GPU.
    """

    def __init__(self, model, batch, length=None):
        c, weight = model.config, model.embed.weight
        shape = (c.n_layer, batch, c.n_kv_head, min(length or c.context, c.context), c.head_size)
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self.ids = torch.zeros(batch, shape[3], dtype=torch.long, device=weight.device)
        self.lengths = torch.zeros(batch, dtype=torch.long)
        self.context = c.context
        self.graphs = {}  # CUDA graphs, recorded with the addresses of these tensors

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

    def begin(self, ids, positions=None):
        """Store ids (B, T) after those of each row, and return their NewTokens. `lengths` grow
        later: `Transformer.hidden` adds T after the last layer. For CUDA graphs, pass the ids'
        `positions` (B, T) on their device: then no shape depends on the lengths."""
        T, lengths, device = ids.shape[1], self.lengths.tolist(), ids.device
        start, stop = max(lengths), max(lengths) + T
        if stop > self.room:
            limit = "context" if self.room == self.context else "cache"
            raise UserError(f"{stop} tokens do not fit the {limit} of {self.room}")
        if start == min(lengths) and positions is None:
            positions, mask = slice(start, stop), None
            self.ids.narrow(1, start, T).copy_(ids)
        else:
            if positions is None:
                positions = (self.lengths[:, None] + torch.arange(T)).to(device)
            else:
                stop = self.room
            mask = torch.arange(stop, device=device) <= positions[:, None, :, None]
            self.ids.scatter_(1, positions, ids)
        keys, values = self.keys.narrow(3, 0, stop), self.values.narrow(3, 0, stop)
        return NewTokens(positions, mask, list(zip(keys, values)))

    def update(self, i, new, *keys_and_values):
        """Store the keys and values of the NewTokens in layer i, (B, nkv, T, hs) each; return layer
        i's keys and values of all tokens."""
        for cached, t in zip(new.layers[i], keys_and_values):
            if isinstance(new.positions, slice):
                cached.narrow(2, new.positions.start, t.shape[2]).copy_(t)
            else:
                index = new.positions[:, None, :, None]
                cached.scatter_(2, index.expand_as(t), t.to(cached.dtype))
        return new.layers[i]

    def seen_ids(self, new):
        """The ids of all tokens, old and new, (B, S)."""
        return self.ids[:, : new.layers[0][0].shape[2]]

    def copy_rows(self, sources, targets=slice(None), n=None):
        """Copy what the rows `sources` hold, or the first n tokens of it, to the rows `targets`."""
        lengths = self.lengths[sources].clamp(max=n if n is not None else self.room)
        n = int(lengths.max())
        for t in (self.keys, self.values):
            t[:, targets, :, :n] = t[:, sources, :, :n]
        self.ids[targets, :n] = self.ids[sources, :n]
        self.lengths[targets] = lengths

    def grow(self, room):
        """Enlarge the cache to `room` tokens a row."""
        self.graphs = {}
        more = room - self.room
        self.keys = F.pad(self.keys, (0, 0, 0, more))  # one after the other, to free the old ones
        self.values = F.pad(self.values, (0, 0, 0, more))
        self.ids = F.pad(self.ids, (0, more))


# --------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """A decoder-only language model.

    `model(ids)` returns logits (B, T, V). `model(ids, targets)` returns the *summed* negative log-
    likelihood of the targets in float32 (see `chunked_loss`), which the training loop divides by
    their number; in training with experts, a balancing term is added (`loss_with_balance`). With
    `output="log_probs"` it returns the log probability of each target among `allowed` ids, (B, T),
    with "logits" the logits (N, V) at the N positions that have a target (see `target_places`).

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
            tables = partial(rope_tables, c.context, c.head_size, share=c.rotary_share)
            table = partial(nn.Buffer, persistent=False)
            self.cos, self.sin = map(table, tables(c.rope_theta, c.rope_scaling))
            if c.window and c.window_theta:
                self.window_cos, self.window_sin = map(table, tables(c.window_theta))
        self.windowed = c.window_layers or [True] * c.n_layer  # matters only if c.window is set
        self.embed_norm = make_norm(c) if c.embed_norm else scale_by(c.embed_scale)
        self.drop = nn.Dropout(c.dropout) if c.dropout else nn.Identity()
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = make_norm(c)
        self.logit_scale = scale_by(c.logit_scale)
        self.head = nn.Linear(c.d_model, c.vocab_size, bias=c.head_bias)
        if c.tied:
            self.head.weight = self.embed.weight
        self.expert_counts = 0  # how often each expert was chosen in training, (n_layer, E)
        self.grad_checkpoint = False  # recompute blocks in the backward pass: less memory, slower
        if not self.embed.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """`gpt2`: normal(0.02), residual outputs divided by sqrt(2 n_layer) (Radford et al. 2019).

        `zero_out`: residual branches and an untied head start at zero, so the first steps learn
        little more than bigrams and no layer dominates another; inner matrices get std 0.577 /
        sqrt(C), so that outputs have a third of the variance of a normalised input. In our trials
        this reached the same loss in half the steps.
        """
        c, gpt2 = self.config, self.config.init == "gpt2"
        # a tied table is also the head: at std 1 its first loss would be enormous
        nn.init.normal_(self.embed.weight, std=0.02 if gpt2 or c.tied else 1.0)
        for module in self.inputs.values():
            module.init_weights()
        for name, p in self.named_parameters():
            if name.startswith(("embed.", "inputs.")):
                continue
            if p.dim() < 2 or name == "value_embed.weight":
                p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            elif name.endswith(("attention.out.weight", ".down.weight")):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer)) if gpt2 else p.zero_()
            elif name == "head.weight":
                nn.init.normal_(p, std=0.02) if gpt2 else p.zero_()
            else:
                nn.init.normal_(p, std=0.02 if gpt2 else 0.577 / math.sqrt(c.d_model))

    def hidden(self, ids, cache=None, new=None):
        """The final, normalised states (B, T, C) of ids (B, T); `model.head` gives their logits.

        With a `KVCache` the ids follow those that each of its rows holds. `new` is the result of
        `cache.begin(ids)` if the caller has called it (see data/graphs.py).
        """
        c, T = self.config, ids.shape[1]
        if cache is None and c.context < T:
            raise UserError(f"{T} tokens do not fit the context of {c.context}")
        if cache is None:  # not a slice: torch.compile would recompile for each length
            new = NewTokens(torch.arange(T, device=ids.device))
        elif new is None:
            new = cache.begin(ids)
        seen = ids if cache is None else cache.seen_ids(new)  # (B, S): all tokens, old and new
        x = self.embed(ids)  # (B, T, C)
        if c.position != "rope":
            table = self.position.weight if c.position == "learned" else self.sines
            x = x + table[new.positions].to(x.dtype)
        x = self.embed_norm(x)
        if self.inputs:
            positions = new.indices(ids).expand_as(ids)
            for module in self.inputs.values():
                x = x + module(seen, positions, self.embed_ids)
        x = self.drop(x)
        extra_values = self.value_embed(ids) if self.value_embed is not None else None
        rope_and_mask = [(self.rotation(new), new.mask)] * 2  # [if not windowed, if windowed]
        if c.window:
            mask = new.window_mask(c.window, seen)
            rope_and_mask[1] = self.rotation(new, c.window_theta > 0), mask
        for i, block in enumerate(self.blocks):
            update_cache = partial(cache.update, i, new) if cache is not None else None
            rope, mask = rope_and_mask[self.windowed[i]]
            args = x, rope, update_cache, mask, extra_values
            if self.grad_checkpoint and self.training:
                x = recompute(block, *args, use_reentrant=False)
            else:
                x = block(*args)
        if cache is not None:
            cache.lengths += T
        return self.logit_scale(self.norm(x))

    def rotation(self, new, windowed=False):
        """Cosines and sines for the NewTokens, (1, T, hs) or (B, 1, T, hs): equal for all heads."""
        if self.config.position == "rope":
            tables = (self.window_cos, self.window_sin) if windowed else (self.cos, self.sin)
            return [table[new.positions].unsqueeze(-3) for table in tables]

    def embed_ids(self, ids):
        """The embedding of ids, normalised or scaled as in `hidden`, but without positions."""
        return self.embed_norm(self.embed(ids))

    def last_logits(self, ids, cache, new=None, n=1):
        """Logits (B * n, V) for the token after each of the last n ids in ids (B, T)."""
        return self.head(self.hidden(ids, cache, new)[:, -n:].flatten(0, 1))

    def forward(self, ids, targets=None, cache=None, output="loss", places=None, allowed=None):
        if self.config.experts and self.training and output == "loss" and targets is not None:
            return loss_with_balance(self, ids, targets, places)
        x = self.hidden(ids, cache)
        if targets is None:
            return self.head(x)  # (B, T, V)
        if output == "logits":
            places = target_places(targets) if places is None else places
            return self.head(x.flatten(0, 1)[places])  # (N, V)
        weights = self.head.weight, self.head.bias
        if output == "log_probs":
            return token_logps(x, *weights, targets, allowed, places)  # (B, T)
        return chunked_loss(x, *weights, targets, places)


def meta_model(config):
    """The model without data, only shapes, on torch's meta device."""
    with torch.device("meta"):
        return Transformer(config)


# --------------------------------------------------------------------------------------------
# Checkpoints: plain dicts, written so that a crash never loses the previous one
# --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def evaluating(model):
    """Within the `with` block the model is in evaluation mode and records no gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        model.train(was_training)


def save_checkpoint(path, content):
    """Write a dict of tensors and plain values, whole or not at all (see `write_whole`)."""
    write_whole(path, lambda f: torch.save(content, f))


# The values of every --ckpt
WHAT_CKPT = "a checkpoint, a run's folder, gpt2, or owner/name[@revision] of the Hub"


def find_checkpoint(name):
    """The path of a checkpoint: a file, a run's folder, a folder in Hugging Face's layout, or a
    model of the Hub (`gpt2`, `owner/name`, `owner/name@revision`), which is downloaded."""
    if is_hub_name(name):
        return snapshot_download(str(name), check=check_readable)
    return Path(name)


def load_checkpoint(path, dtype=None, resuming=False):
    """The dict that `save_checkpoint` wrote, its tensors mapped from disk and read when touched, or
    an equivalent dict read from a Hugging Face folder (see `hf_weights.load` for `dtype`).

    Only tensors and plain values are unpickled (weights_only), never code. With `resuming`, for a
    run that will replace the file, tensors are in memory: Windows cannot replace a mapped file.
    """
    path = find_checkpoint(path)
    if (path / "config.json").exists():
        return load_hf(path, dtype=dtype)
    if (path / "adapter_config.json").exists():
        raise UserError(f"{path} is an adapter of peft's, which cannot be read: train one here")
    if path.is_dir():
        files = [path / name for name in ("best.pt", "last.pt") if (path / name).exists()]
        if not files:
            raise UserError(f"{path} has no best.pt or last.pt; train first, or name a file")
        path = files[0]
    if not path.exists():
        raise UserError(f"checkpoint {path} does not exist; name {WHAT_CKPT}")
    content = load_pt(path, mapped=not resuming)
    if not isinstance(content, dict) or not {"config", "model"} <= set(content):
        raise UserError(f"{path} is not a checkpoint of scratchlm: it has no config and model")
    return content


def checkpoint_tokenizer(content, where):
    """The Tokenizer of a loaded checkpoint; UserError if it is an adapter or carries none."""
    if "adapter" in content:
        raise UserError(f"{where} is an adapter: merge it first (python lora.py merge)")
    if "tokenizer" not in content:
        raise UserError(f"{where} has no tokenizer (or no tokenizer.json)")
    return Tokenizer(content["tokenizer"])


def load_weights(model, state, where="checkpoint", assign=False):
    """Load a state dict, or with `assign` use its tensors; UserError for what does not fit."""
    if problem := fit_error(model.state_dict(), state):
        raise UserError(f"{where} does not fit: {problem}")
    model.load_state_dict(state, assign=assign)


def model_from_checkpoint(content, device="cpu", dtype=torch.float32, where="checkpoint"):
    """The Transformer of a loaded checkpoint, on `device`, in evaluation mode. With `dtype` None
    weights keep their dtype, and stay mapped from the file as long as they are on the CPU."""
    config = Config.from_dict(content["config"], f"the config of {where}")
    model = meta_model(config)  # no memory for weights that would be overwritten at once
    state = {k: v.to(device=device, dtype=dtype) for k, v in content["model"].items()}
    load_weights(model, state, where, assign=True)
    if config.tied:
        model.head.weight = model.embed.weight
    return model.to(device).requires_grad_().eval()


# --------------------------------------------------------------------------------------------
# For some runs only: log probabilities of targets, a larger vocabulary
# --------------------------------------------------------------------------------------------


def target_places(targets):
    """The indices of the flattened targets that are not -100. Finding them synchronises a GPU, so
    training does it before a batch is moved there."""
    return (targets.flatten() != -100).nonzero()[:, 0]


def token_logps(x, weight, bias, targets, allowed=None, places=None):
    """log softmax(x @ weight.T + bias)[target] of each position (...), 0 where the target is -100.
    Ids outside of `allowed`, bools (V,), have probability 0. Logits are computed a few rows at a
    time, and again in the backward pass. `places` are the `target_places`."""
    full = torch.float64 if x.dtype == torch.float64 else torch.float32

    def row_logps(rows, goal):
        logits = F.linear(rows, weight, bias)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -math.inf)
        return logits.log_softmax(-1, dtype=full).gather(1, goal[:, None])[:, 0]

    places = target_places(targets) if places is None else places
    rows, goals = x.flatten(0, -2)[places], targets.flatten()[places]
    chunks = zip(rows.split(LOSS_ROWS), goals.split(LOSS_ROWS))
    logps = [recompute(row_logps, *chunk, use_reentrant=False) for chunk in chunks]
    out = torch.zeros(targets.numel(), dtype=full, device=x.device)
    return out.index_copy(0, places, torch.cat(logps)).view_as(targets)


@torch.no_grad()
def grow_vocabulary(model, vocab_size, used):
    """Make room for at least `vocab_size` ids, of which the tokenizer had `used` until now.
    All rows after those, spare ones included, start at the mean of the used rows."""
    c, grown = model.config, max(model.config.vocab_size, vocab_size)
    for table in filter(None, (model.embed, model.value_embed, None if c.tied else model.head)):
        for name, old in [*table.named_parameters()]:
            kept = old[:used]  # fewer if a model has no row for its tokenizer's end of text
            mean = kept.float().mean(0, keepdim=True).to(old.dtype)
            new = torch.cat((kept, mean.expand(grown - len(kept), *old.shape[1:])))
            setattr(table, name, nn.Parameter(new, old.requires_grad))
        table.num_embeddings = table.out_features = grown  # the one that it has
    if c.tied:
        model.head.weight = model.embed.weight
    model.head.out_features = c.vocab_size = grown


# --------------------------------------------------------------------------------------------
# A mixture of experts, in place of the feed-forward
# --------------------------------------------------------------------------------------------


class MoE(nn.Module):
    """Several feed-forwards, the experts, of which a router chooses k for each token: the model has
    the weights of E experts at the cost of k (Shazeer et al. 2017).

        p = softmax(router(x))           (E,)
        y = sum of p_i expert_i(x)       over the k experts whose p_i is largest

    With `norm_topk_prob` these p_i are divided by their sum, as if the softmax were over the k
    largest logits alone. If k is 1, p_i is then 1, and the router learns nothing from the text.
    """

    def __init__(self, config):
        super().__init__()
        self.k, self.norm_topk_prob = config.experts_per_token, config.norm_topk_prob
        self.router = nn.Linear(config.d_model, config.experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.experts))

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])  # (N, C)
        weights, chosen = self.router(rows).softmax(-1, dtype=torch.float32).topk(self.k)  # (N, k)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        # sort the choices by expert, so that the rows of each one lie side by side:
        #   chosen    [[2, 0], [0, 1], [2, 1]]
        #   expert    [0, 0, 1, 1, 2, 2]
        #   row       [0, 1, 1, 2, 0, 2]
        expert, order = chosen.flatten().sort(stable=True)  # (N k,) each
        row = order // self.k
        ends = torch.arange(1, len(self.experts), device=x.device)
        ends = torch.searchsorted(expert, ends).tolist()  # the only time Python waits for a GPU
        pairs = zip(self.experts, rows.index_select(0, row).tensor_split(ends))
        # in training, experts without rows run as well: DDP needs a gradient for every weight
        out = torch.cat([run(part) for run, part in pairs if self.training or len(part)])
        out = out * weights.flatten()[order, None]  # (N k, C)
        return torch.zeros_like(rows, dtype=out.dtype).index_add(0, row, out).to(x.dtype).view_as(x)


def loss_with_balance(model, ids, targets, places=None):
    """What `model(ids, targets)` returns in training with experts: the summed loss of the targets
    plus, times their number, each layer's load-balancing loss (Fedus et al. 2021, equation 4):

        router_aux_loss_coef * (E * sum of f_i P_i  -  1)

    f_i is the share of the choices that fell on expert i, P_i its mean probability. Only P has a
    gradient, which lowers the busiest experts most. E * sum is 1 if all are equally busy; this 1 is
    subtracted so that training and validation losses compare. A step divides by all its targets, so
    it has the mean over micro-batches and processes. `model.expert_counts` has the counts.
    """
    c, logits, kept = model.config, [], targets != -100
    with contextlib.ExitStack() as hooks:  # gone when gradient checkpointing runs blocks again
        for block in model.blocks:
            hook = block.feed_forward.router.register_forward_hook
            hooks.enter_context(hook(lambda router, args, out: logits.append(out)))
        x = model.hidden(ids)
    probs = torch.stack(logits).softmax(-1, dtype=torch.float32)  # (n_layer, N, E)
    chosen = torch.zeros_like(probs).scatter(-1, probs.topk(c.experts_per_token).indices, 1.0)
    # what follows a row's last target, such as padding, changes no loss and does not count
    rows = kept.flip(1).cumsum(1).flip(1).view(-1, 1) > 0
    n = rows.sum().clamp(min=1)
    counts, mean = (rows * chosen).sum(1), (rows * probs).sum(1) / n  # (n_layer, E)
    model.expert_counts = model.expert_counts + counts
    balance = (c.experts * counts / (c.experts_per_token * n) * mean).sum() - c.n_layer
    loss = chunked_loss(x, model.head.weight, model.head.bias, targets, places)
    return loss + c.router_aux_loss_coef * kept.sum() * balance


# --------------------------------------------------------------------------------------------
# Hugging Face's layout, in and out
# --------------------------------------------------------------------------------------------


def complete(values):
    """All fields, as a dict, of the Config in which these `values` are set."""
    return asdict(Config(**values))


def meta_state(values):
    """{name: tensor without data} of the model whose Config has these fields."""
    return meta_model(Config(**values)).state_dict()


def check_readable(folder):
    """UserError for an unsupported config or tokenizer, before the weights are downloaded."""
    where = folder / "config.json"
    hf_config.config_from_hf(read_json(where), complete, where)
    if find_tokenizer(folder):
        hub_tokenizer(folder)


# load a folder in Hugging Face's layout; export a checkpoint to such a folder, or to a GGUF file
load_hf = partial(hf_weights.load, complete=complete, meta_state=meta_state)
export_hf = partial(hf_weights.export, complete=complete, meta_state=meta_state)
export_gguf = partial(gguf.export, complete=complete, meta_state=meta_state)


# --------------------------------------------------------------------------------------------
# The command line: what a shape costs, and what a trained model's numbers are
# --------------------------------------------------------------------------------------------


@torch.no_grad()
def attention_weights(model, ids, layer=0):
    """The attention weights (nh, T, T) of a layer for `ids`, a list: what its heads return if the
    values are the identity matrix."""
    module, inputs, T = model.blocks[layer].attention, [], len(ids)
    with module.register_forward_pre_hook(lambda _, args: inputs.extend(args)):
        model.hidden(torch.tensor([ids]))
    bare, (x, rope, _, mask, *_) = copy.copy(module), inputs
    bare._modules = module._modules | {"out": nn.Identity()}
    identity = torch.eye(T).expand(1, module.n_kv_head, T, T)
    y = bare.forward(x, rope, lambda k, v: (k, identity), mask)  # (1, T, nh * T)
    return y.view(T, module.n_head, T).transpose(0, 1)


def position_table(model):
    """(context, C): the model's table of positions; for rope, which turns each pair of channels by
    an angle, the cosines of the angles and then their sines."""
    if model.config.position != "rope":
        return model.position.weight if model.config.position == "learned" else model.sines
    return torch.cat([t[:, model.config.head_size // 2 :] for t in (model.cos, model.sin)], dim=1)


def show(what, path, prompt, layer, head):
    """Print the numbers of a trained model that --show names, and draw them."""
    content, picture = load_checkpoint(path), OUT / f"show-{what}.png"
    tokenizer = checkpoint_tokenizer(content, path)
    model = model_from_checkpoint(content, where=path)
    ids, c = tokenizer.encode(prompt or "a fox met a fox"), model.config
    warn_unknown(tokenizer, ids, "the prompt")
    if layer >= c.n_layer or head >= c.n_head:
        has = f"{path} has {c.n_layer} layers of {c.n_head} heads, counted from 0"
        raise UserError(f"--layer {layer} --head {head}: {has}")
    texts, lines = tokenizer.texts(ids), tables.number_lines
    if what == "attention":
        table, lines = attention_weights(model, ids, layer)[head], tables.shade_lines
    elif what == "position":
        table, texts = position_table(model), [""] * c.context
    else:
        table = model.embed.weight[ids]
    table = table.detach().numpy()
    tables.draw_table(picture, table)
    print(*lines(texts, table), f"{picture}: {what} of {path}", sep="\n")


def build_parser():
    p = Parser(description="Show what a model costs or has learned, or export it.")
    model = p.add_mutually_exclusive_group()
    model.add_argument("--preset", help=f"{', '.join(PRESETS)} (default: tiny)")
    model.add_argument("--ckpt", help=f"{WHAT_CKPT}, instead of a preset")
    p.add_argument("--tokens", type=at_least(1), help="training tokens, to predict the loss")
    p.add_argument("--world", type=at_least(1), help="number of GPUs, to show what each needs")
    p.add_argument("--shard", action="store_true", help="with --world: shard the model over them")
    p.add_argument("--export", metavar="PATH", help="write --ckpt: a folder for transformers, or a "
                   ".gguf file for llama.cpp and ollama")  # fmt: skip
    p.add_argument("--dtype", choices=gguf.DTYPES, help="dtype of the .gguf file (default f16)")
    p.add_argument("--show", choices=("token", "position", "attention"),
                   help="print and draw embeddings, positions or attention weights")  # fmt: skip
    p.add_argument("--prompt", help="text for --show (default: a fox met a fox)")
    p.add_argument("--layer", type=at_least(0), default=0, help="layer of --show attention, from 0")
    p.add_argument("--head", type=at_least(0), default=0, help="head of --show attention, from 0")
    return p


def main(argv=None):
    args = build_parser().parse_args(argv)
    problems = {
        "--export needs --ckpt, the model to write": args.export and not args.ckpt,
        "--show needs a trained model: name it with --ckpt, not --preset":
            args.show and args.preset,
        "--export is not for --show": args.show and args.export,
        "--dtype is for --export FILE.gguf": args.dtype and not f"{args.export}".endswith(".gguf"),
        "--layer and --head are for --show attention":
            (args.layer or args.head) and args.show != "attention",
        "--prompt is for --show": args.prompt and not args.show,
        "--shard is for --world": args.shard and not args.world,
    }
    for message, wrong in problems.items():
        if wrong:
            raise UserError(message)
    if args.show:
        return show(args.show, args.ckpt or newest_run(), args.prompt, args.layer, args.head)
    content, name = load_checkpoint(args.ckpt) if args.ckpt else {}, args.preset or "tiny"
    config = Config.from_dict(content["config"]) if content else preset(name)
    if args.export:
        folder = Path(args.export)
        if "adapter" in content:
            raise UserError(f"{args.ckpt} is an adapter: export it with lora.py, or merge it first")
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise UserError(f"{folder} exists: name a new folder or file for --export")
        if folder.suffix == ".gguf":
            export_gguf(content, folder, args.dtype or "f16")
            return print(f"{folder}: {folder.stat().st_size / 2**20:,.1f} MiB")
        return print(f"{folder}: {export_hf(content, folder)['architectures'][0]}")
    counts, flops = count_parameters(meta_model(config)), flops_per_token(config)
    lines = costs.shape_lines(args.ckpt or name, asdict(config), counts, flops, args.tokens)
    if args.world:
        lines += costs.world_lines(config, counts, flops, args.world, args.shard)
    print("\n".join(lines))


if __name__ == "__main__":
    run_cli(main)
