"""Hugging Face's models: the fields of their config.json, and their names for our tensors.

Configs and weights go in and out as plain dicts: what a Transformer is, model.py knows.
"""

import math
import re
from pathlib import Path

import torch

from data.cli import UserError
from data.download import WEIGHTS, weight_files
from data.files import write_json
from data.tensors import Safetensors, load_pt, write_safetensors

# --------------------------------------------------------------------------------------------
# config.json
# --------------------------------------------------------------------------------------------

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
# To add an architecture: its model_type above, and what is special about it in the two functions
# below. The fields of model.Config, as GPT-2 and as the other families call them:
FIELDS = {
    "vocab_size": ("vocab_size", "vocab_size"),
    "context": ("n_positions", "max_position_embeddings"),
    "n_layer": ("n_layer", "num_hidden_layers"),
    "n_head": ("n_head", "num_attention_heads"),
    "n_kv_head": (None, "num_key_value_heads"),
    "d_model": ("n_embd", "hidden_size"),
    "head_size": (None, "head_dim"),
    "d_ff": ("n_inner", "intermediate_size"),
    "activation": ("activation_function", "hidden_act"),
    "out_bias": (None, "attention_bias"),
    "ff_bias": (None, "mlp_bias"),
    "tied": ("tie_word_embeddings", "tie_word_embeddings"),
    "eps": ("layer_norm_epsilon", "rms_norm_eps"),
}
# What a missing field means, by their names
GPT2_DEFAULTS = dict(
    vocab_size=50257,
    n_positions=1024,
    n_layer=12,
    n_head=12,
    n_embd=768,
    activation_function="gelu_new",
    tie_word_embeddings=True,
    layer_norm_epsilon=1e-5,
)
LLAMA_DEFAULTS = dict(
    hidden_act="silu",
    attention_bias=False,
    mlp_bias=False,
    tie_word_embeddings=False,
    rms_norm_eps=1e-6,
)
GPT2_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
LLAMA_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu"}
# Biases that a family has whatever config.json says, or never
FIXED = {"mistral": {"out_bias", "ff_bias"}, "qwen2": {"out_bias", "ff_bias"}, "qwen3": {"ff_bias"}}
# Fields of transformers' own classes that change nothing in what the model computes
IGNORED = """_name_or_path architectures attention_dropout attn_pdrop bos_token_id
chunk_size_feed_forward dtype embd_pdrop eos_token_id gradient_checkpointing id2label
initializer_range is_llama_config keys_to_ignore_at_inference label2id max_window_layers
model_type n_ctx output_attentions output_hidden_states output_past pad_token_id
problem_type reorder_and_upcast_attn resid_pdrop return_dict summary_activation
summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
task_specific_params torch_dtype transformers.js_config transformers_version use_cache"""
# Fields that change it, and the values that we support: those of a family's class in transformers,
_QWEN = {"use_sliding_window": (False,)}
OWN = {
    "gpt2": {"scale_attn_by_inverse_layer_idx": (False,), "scale_attn_weights": (True,)},
    "llama": {"pretraining_tp": (1,)},
    "qwen2": _QWEN,
    "qwen3": _QWEN,
}
# and those that change it in whatever file they stand
ANYWHERE = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "embedding_multiplier": (1.0,),
    "final_logit_softcapping": (),
    "is_encoder_decoder": (False,),
    "layer_types": (),
    "logits_scaling": (1.0,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": ({},),
    "residual_multiplier": (1.0,),
    "rope_interleaved": (False,),
    "rope_parameters": ({},),
    "rope_scaling": ({},),
    "use_mrope": (False,),
}
ROPE_FIELDS = {"default": (), "linear": ("factor",)}  # what these read; others may stand beside it


def config_from_hf(values):
    """(the fields of a model.Config, a dict; names of the fields that are passed over, as they are
    not the model's in transformers either) of a config.json. UserError names the first field whose
    value we do not compute: nothing that would change the model is ever passed over."""
    kind = values.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"model_type {kind!r} is none of {', '.join(FAMILIES)}")

    def refuse(name, value):
        raise UserError(f"{name} = {value!r} is not implemented here")

    gpt2 = kind == "gpt2"
    left = {name: value for name, value in values.items() if value is not None}
    found, default = {"init": "gpt2"}, GPT2_DEFAULTS if gpt2 else LLAMA_DEFAULTS
    for ours, theirs in FIELDS.items():
        if (name := theirs[not gpt2]) is not None:
            fixed = ours in FIXED.get(kind, ())
            found[ours] = default[name] if fixed else left.pop(name, default.get(name))
    known = GPT2_ACTIVATIONS if gpt2 else LLAMA_ACTIVATIONS
    if found["activation"] not in known:
        refuse(FIELDS["activation"][not gpt2], found["activation"])
    found["activation"] = known[found["activation"]]
    if gpt2:
        found |= dict(position="learned", norm="layernorm")
        found |= dict(qkv_bias=True, out_bias=True, ff_bias=True)
    else:
        found |= dict(qkv_bias=found["out_bias"] or kind == "qwen2", qk_norm=kind == "qwen3")
        found |= rope_from_hf(left, refuse)
        window = left.pop("sliding_window", None)
        if kind == "mistral" and window:  # the others do not use it unless they say that they do
            found["context"] = min(found["context"], window)  # inside it, attention is full
        if set(layers := left.pop("layer_types", [])) - {"full_attention"}:
            refuse("layer_types", layers)
        if left.get("use_sliding_window"):  # Qwen's, in layers from max_window_layers on
            window = values.get("sliding_window", 4096) or math.inf  # null is none
            some = left.get("max_window_layers", 28) < found["n_layer"] and not layers
            if not some or window >= found["context"]:
                del left["use_sliding_window"]
    known = ANYWHERE | OWN.get(kind, {})
    for name, value in left.items():
        if name in known and value not in known[name]:
            refuse(name, value)
    return found, sorted(left.keys() - known.keys() - set(IGNORED.split()))


def rope_from_hf(left, refuse):
    """The rotary fields of a model.Config, of those of a config.json, which are taken out."""
    rope = left.pop("rope_parameters", {})  # the newer name; transformers, too, prefers the older
    rope = left.pop("rope_scaling", None) or rope
    if not isinstance(rope, dict) or any(isinstance(v, dict) for v in rope.values()):
        refuse("rope_parameters", rope)  # no parameters, or others for each type of layer
    rope = {"rope_theta": left.pop("rope_theta", 10000.0)} | rope
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    theta = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        left["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    rope = {n: v for n, v in rope.items() if n in ROPE_FIELDS.get(kind, rope)}
    scaling = None if kind == "default" else {"rope_type": kind, **rope}
    return dict(rope_theta=theta, rope_scaling=scaling)


def config_to_hf(config):
    """The config.json, as a dict, of the model family closest to `config` (the fields of a
    model.Config, a dict). Whether it computes the same is for the caller to see, by reading it."""
    c, gpt2 = config, config["position"] == "learned"
    family = "qwen3" if c["qk_norm"] else "qwen2" if c["qkv_bias"] > c["out_bias"] else "llama"
    name = {"gpt2": "GPT2LM", "llama": "LlamaFor", "qwen2": "Qwen2For", "qwen3": "Qwen3For"}
    family = "gpt2" if gpt2 else family
    head = "HeadModel" if gpt2 else "CausalLM"
    values = {"architectures": [name[family] + head], "model_type": family}
    if gpt2:
        activations = {ours: theirs for theirs, ours in GPT2_ACTIVATIONS.items()}
        activation = activations.get(c["activation"], "gelu_new")
        values |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), c["dropout"])
    else:
        activation = "silu"
        values |= dict(rope_theta=c["rope_theta"], rope_scaling=c["rope_scaling"])
    lacking = FIXED.get(family, set()) | ({"head_size"} if family == "qwen2" else set())
    for ours, theirs in FIELDS.items():
        if theirs[not gpt2] and ours not in lacking:
            values[theirs[not gpt2]] = activation if ours == "activation" else c[ours]
    return values


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
        raise UserError(f"{folder} has none of {', '.join(WEIGHTS)}")
    if missing := [file.name for file in files if not file.exists()]:
        raise UserError(f"{folder} lacks {missing[0]}, which {WEIGHTS[0]} names")
    if files[0].suffix == ".bin":
        state = load_pt(files[0])
        return dict.fromkeys(state, state)
    found = {}
    for file in map(Safetensors, files):
        if twice := found.keys() & file.entries.keys():
            raise UserError(f"{folder}: the tensor {min(twice)} is in two of its files")
        found |= dict.fromkeys(file.entries, file)
    return found


def read_state(folder, shapes, gpt2, tied, dtype=None):
    """{our name: tensor} of the weights in a folder of Hugging Face's layout; `shapes` are those
    that our names must have.

    Tensors that are as we keep them stay on disk until they are touched; the others are copied one
    by one, and in `dtype` if one is given, so that at no time two copies are in memory.
    """
    files, state, used = hf_tensors(folder), {}, {"lm_head.weight"}
    bare = gpt2 and "wte.weight" in files  # the first GPT-2 files have no "transformer."
    for name, shape in shapes.items():
        theirs = hf_name(name, gpt2)
        theirs = theirs.removeprefix("transformer.") if bare else theirs
        if name == "head.weight" and tied:
            state[name] = state["embed.weight"]
            continue
        if theirs not in files:
            raise UserError(f"{folder} lacks the tensor {theirs} {tuple(shape)}")
        file, used = files[theirs], used | {theirs}
        found = from_hf(name, file[theirs], gpt2)
        if found.shape != shape or not found.is_floating_point():
            raise UserError(
                f"{folder}: {theirs} gives {found.dtype} {tuple(found.shape)} for {name}, the "
                f"config says {tuple(shape)}"
            )
        state[name] = found.to(dtype or found.dtype).contiguous()
        if isinstance(file, Safetensors) and state[name] is not found:
            file.release(theirs)
    if extra := [n for n in files if n not in used and not re.search(IGNORED_TENSORS, n)]:
        raise UserError(f"{folder}: the tensor {extra[0]} is unknown to the model")
    return state


# Buffers that old checkpoints carry: causal masks, and rotary frequencies that follow from config
IGNORED_TENSORS = r"(attn\.(masked_)?bias|rotary_emb\.inv_freq)$"


def write_model(folder, values, shapes, state):
    """Write config.json and model.safetensors of a model whose tensors, by our names, are to have
    `shapes`: where its architecture has a norm's weight or a bias, and `state` none, it gets ones
    or zeros."""
    filled, dtype = {}, state["embed.weight"].dtype
    for name, shape in shapes.items():
        filler = torch.ones if name.endswith("weight") else torch.zeros
        filled[name] = state[name] if name in state else filler(shape, dtype=dtype)
    tensors = to_hf(filled, values["model_type"] == "gpt2")
    write_safetensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", values | {"torch_dtype": str(dtype).removeprefix("torch.")})
