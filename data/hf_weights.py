"""Hugging Face's models: the fields of config.json, the names of tensors, and adapters for peft.

Configs and weights go in and out as plain dicts; model.py builds a Transformer from them.
"""

import fnmatch
import re
from pathlib import Path

import torch

from data.cli import UserError
from data.download import WEIGHTS, weight_files
from data.files import write_json
from data.tensors import Safetensors, load_pt, write_safetensors

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral")
# To add an architecture, add its model_type here and what is special about it to config_from_hf and
# config_to_hf. For each field of model.Config: its name and default in GPT-2, then in the others.
FIELDS = {
    "vocab_size": ("vocab_size", 50257, "vocab_size", None),
    "context": ("n_positions", 1024, "max_position_embeddings", None),
    "n_layer": ("n_layer", 12, "num_hidden_layers", None),
    "n_head": ("n_head", 12, "num_attention_heads", None),
    "n_kv_head": (None, None, "num_key_value_heads", None),
    "d_model": ("n_embd", 768, "hidden_size", None),
    "head_size": (None, None, "head_dim", None),
    "d_ff": ("n_inner", None, "intermediate_size", None),
    "activation": ("activation_function", "gelu_new", "hidden_act", "silu"),
    "out_bias": (None, None, "attention_bias", False),
    "ff_bias": (None, None, "mlp_bias", False),
    "tied": ("tie_word_embeddings", True, "tie_word_embeddings", False),
    "eps": ("layer_norm_epsilon", 1e-5, "rms_norm_eps", 1e-6),
}
# The further fields of a mixture of experts; Mixtral always normalises
_EXPERTS = dict(experts=("num_experts", None), experts_per_token=("num_experts_per_tok", None))
_EXPERTS["router_aux_loss_coef"] = ("router_aux_loss_coef", 0.001)
MOE_FIELDS = {
    "qwen3_moe": _EXPERTS
    | dict(d_ff=("moe_intermediate_size", None), norm_topk_prob=("norm_topk_prob", False)),
    "mixtral": _EXPERTS | dict(experts=("num_local_experts", None)),
}
_TANH = dict.fromkeys(("gelu_new", "gelu_pytorch_tanh"), "gelu_tanh")
GPT2_ACTIVATIONS = _TANH | dict(gelu="gelu", relu="relu")
LLAMA_ACTIVATIONS = dict(silu="swiglu", swish="swiglu")
# Biases that a family never has, whatever config.json says
NO_BIAS = {family: {"out_bias", "ff_bias"} for family in ("mistral", "mixtral", "qwen2")}
NO_BIAS = NO_BIAS | dict(qwen3={"ff_bias"}, qwen3_moe={"ff_bias"})
# Fields of transformers' classes that do not change what the model computes
IGNORED = """*_pdrop *_token_id *dropout *dtype _name_or_path architectures chunk_size_feed_forward
gradient_checkpointing id2label initializer_range is_llama_config keys_to_ignore_at_inference
label2id max_window_layers model_type n_ctx output_* pretraining_tp problem_type
reorder_and_upcast_attn return_dict router_jitter_noise summary_* task_specific_params transformers*
use_cache"""
# Fields that change it, unless they are off (null, false, 0 or empty) or 1
OFF = """add_cross_attention alibi attention_multiplier attn_logit_softcapping
final_logit_softcapping is_encoder_decoder layer_types mlp_only_layers quantization_config
rope_interleaved rope_parameters rope_scaling scale_attn_by_inverse_layer_idx use_mrope
use_sliding_window"""
ONE = """decoder_sparse_step embedding_multiplier logits_scaling partial_rotary_factor
residual_multiplier scale_attn_weights"""
ROPE_FIELDS = {"default": (), "linear": ("factor",)}  # other fields beside these have no effect


def config_from_hf(values):
    """The fields of a model.Config that a config.json means, as a dict, and the names of those that
    have no effect. UserError names the first one whose effect is not implemented here."""
    family = values.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"model_type {family!r} is not one of {', '.join(FAMILIES)}")

    def refuse(name, value):
        raise UserError(f"{name} = {value!r} is not implemented here")

    gpt2, no_bias = family == "gpt2", NO_BIAS.get(family, ())
    left, config = {name: v for name, v in values.items() if v is not None}, {"init": "gpt2"}
    for ours, names in FIELDS.items():
        name, default = names[:2] if gpt2 else names[2:]
        if name is not None:
            config[ours] = default if ours in no_bias else left.pop(name, default)
    activation = config["activation"]
    config["activation"] = (GPT2_ACTIVATIONS if gpt2 else LLAMA_ACTIVATIONS).get(activation)
    if config["activation"] is None:
        refuse("activation_function" if gpt2 else "hidden_act", activation)
    if gpt2:
        config |= dict(position="learned", norm="layernorm")
        config |= dict(qkv_bias=True, out_bias=True, ff_bias=True)
    else:
        config |= dict(qkv_bias=config["out_bias"] or family == "qwen2")
        config["qk_norm"] = family.startswith("qwen3")
        rope = left.pop("rope_parameters", {})  # the newer name; transformers prefers the older
        rope = left.pop("rope_scaling", None) or rope
        if any(isinstance(v, dict) for v in rope.values()):  # one for each type of layer
            refuse("rope_parameters", rope)
        rope = {"rope_theta": left.pop("rope_theta", 10000.0)} | rope
        config["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        if "partial_rotary_factor" in rope:
            left["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        rope = {n: v for n, v in rope.items() if n in ROPE_FIELDS.get(kind, rope)}
        config["rope_scaling"] = None if kind == "default" else {"rope_type": kind, **rope}
        window = left.pop("sliding_window", None)
        if family in ("mistral", "mixtral") and window:  # others only with use_sliding_window
            config["context"] = min(config["context"], window)  # inside it, attention is full
        if set(layers := left.pop("layer_types", [])) - {"full_attention"}:
            refuse("layer_types", layers)
    if family == "qwen3_moe" and "num_local_experts" in left:  # so transformers 5 writes it
        left["num_experts"] = left.pop("num_local_experts")
    for ours, (name, default) in MOE_FIELDS.get(family, {}).items():
        config[ours] = left.pop(name, default)
    supported = dict.fromkeys(OFF.split(), False) | dict.fromkeys(ONE.split(), 1)
    for name, value in left.items():
        if name in supported and (value or False) != supported[name]:
            refuse(name, value)
    known = (name for pattern in IGNORED.split() for name in fnmatch.filter(left, pattern))
    return config, sorted(left.keys() - supported.keys() - set(known))


def config_to_hf(config):
    """Convert the fields of a model.Config, a dict, to the config.json of the closest model family.
    The caller has to read the result back and compare, since that family may lack a field."""
    c, gpt2 = config, config["position"] == "learned"
    if gpt2:
        family, architecture = "gpt2", "GPT2LMHeadModel"
        activations = {ours: theirs for theirs, ours in GPT2_ACTIVATIONS.items()}
        activation = activations.get(c["activation"], "gelu_new")
        values = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), c["dropout"])
    else:
        family = "qwen3" if c["qk_norm"] else "qwen2" if c["qkv_bias"] > c["out_bias"] else "llama"
        if c["experts"]:
            family = "qwen3_moe" if c["qk_norm"] else "mixtral"
        words = (word.capitalize() for word in family.split("_"))
        architecture, activation = f"{''.join(words)}ForCausalLM", "silu"
        values = dict(rope_theta=c["rope_theta"], rope_scaling=c["rope_scaling"])
    values |= {"architectures": [architecture], "model_type": family}
    lacking = NO_BIAS.get(family, set()) | ({"head_size"} if family == "qwen2" else set())
    for ours, names in FIELDS.items():
        name = names[0 if gpt2 else 2]
        if name and ours not in lacking:
            values[name] = activation if ours == "activation" else c[ours]
    return values | {name: c[ours] for ours, (name, _) in MOE_FIELDS.get(family, {}).items()}


# The names of layers: ours, GPT-2's, and the other families'
NAMES = {
    "embed": ("wte", "embed_tokens"),
    "position": ("wpe", None),
    "norm": ("ln_f", "norm"),
    "norm1": ("ln_1", "input_layernorm"),
    "norm2": ("ln_2", "post_attention_layernorm"),
    "attention.q": ("attn.c_attn", "self_attn.q_proj"),  # GPT-2 has q, k and v in one
    "attention.k": ("attn.c_attn", "self_attn.k_proj"),
    "attention.v": ("attn.c_attn", "self_attn.v_proj"),
    "attention.out": ("attn.c_proj", "self_attn.o_proj"),
    "attention.q_norm": (None, "self_attn.q_norm"),
    "attention.k_norm": (None, "self_attn.k_norm"),
    "feed_forward.gate": (None, "mlp.gate_proj"),
    "feed_forward.up": ("mlp.c_fc", "mlp.up_proj"),
    "feed_forward.down": ("mlp.c_proj", "mlp.down_proj"),
    "feed_forward.router": (None, "mlp.gate"),
}
# Mixtral's names of what Qwen3-MoE calls so
MIXTRAL = {"mlp": "block_sparse_moe", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
# Buffers that old checkpoints carry: causal masks, and rotary frequencies that follow from config
IGNORED_TENSORS = r"(attn\.(masked_)?bias|rotary_emb\.inv_freq)$"


def hf_name(name, gpt2, mixtral=False):
    """Their name for our tensor `name`.

    >>> hf_name("blocks.3.attention.k.weight", True), hf_name("head.weight", False)
    ('transformer.h.3.attn.c_attn.weight', 'lm_head.weight')
    >>> hf_name("blocks.3.feed_forward.experts.0.up.weight", False)
    'model.layers.3.mlp.experts.0.up_proj.weight'
    """
    if name == "head.weight":
        return "lm_head.weight"
    *block, part, leaf = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)", name).groups()
    expert = "".join(re.findall(r"experts\.\d+\.", part))
    part = NAMES[part.replace(expert, "")][0 if gpt2 else 1].replace("mlp.", f"mlp.{expert}")
    if mixtral:
        part = ".".join(MIXTRAL.get(word, word) for word in part.split("."))
    where = [] if block == [None] else ["h" if gpt2 else "layers", *block]
    return ".".join(["transformer" if gpt2 else "model", *where, part, leaf])


def transposed(name, tensor, gpt2):
    """Our tensor `name` from theirs, and back: GPT-2 keeps the blocks' matrices as (in, out)."""
    return tensor.T if gpt2 and name.startswith("blocks.") and tensor.dim() == 2 else tensor


def hf_tensors(folder):
    """{their name: the Safetensors or dict that holds it} of the weights in their folder."""
    files = [Path(folder, file) for file in weight_files(Path(folder))]
    if not files:
        raise UserError(f"{folder} has none of {', '.join(WEIGHTS)}")
    if missing := [file.name for file in files if not file.exists()]:
        raise UserError(f"{folder} lacks {missing[0]}, which {WEIGHTS[0]} names")
    if files[0].suffix == ".bin":
        state = load_pt(files[0])
        return dict.fromkeys(state, state)
    return {name: file for file in map(Safetensors, files) for name in file.entries}


def read_state(folder, shapes, gpt2, tied, dtype=None):
    """{our name: tensor} of the weights in their folder; `shapes` are those that ours must have.

    Tensors that have our layout and `dtype` stay on disk until they are touched. The others are
    converted one by one, so that two copies of the weights are never in memory.
    """
    files, state, used = hf_tensors(folder), {}, {"lm_head.weight"}
    bare = gpt2 and "wte.weight" in files  # the first GPT-2 files have no "transformer."
    mixtral = any(f".{MIXTRAL['mlp']}." in name for name in files)
    for name, shape in shapes.items():
        if name == "head.weight" and tied:
            state[name] = state["embed.weight"]
            continue
        theirs = hf_name(name, gpt2, mixtral).removeprefix("transformer." if bare else "")
        if theirs not in files:
            raise UserError(f"{folder} lacks the tensor {theirs} {tuple(shape)}")
        used.add(theirs)
        file, part = files[theirs], name.split(".")[-2]
        tensor = file[theirs]
        if gpt2 and part in ("q", "k", "v"):  # side by side in one tensor
            tensor = tensor.chunk(3, dim=-1)["qkv".index(part)]
        tensor = transposed(name, tensor, gpt2)
        if tensor.shape != shape or not tensor.is_floating_point():
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise UserError(f"{folder}: {theirs} gives {found}, the config {name} {tuple(shape)}")
        state[name] = tensor.to(dtype or tensor.dtype).contiguous()
        if isinstance(file, Safetensors) and state[name] is not tensor:
            file.release()
    if extra := [n for n in files if n not in used and not re.search(IGNORED_TENSORS, n)]:
        raise UserError(f"{folder}: the tensor {extra[0]} is unknown to the model")
    return state


def write_model(folder, values, shapes, state):
    """Write config.json and model.safetensors of a model whose tensors, by our names, are to have
    `shapes`. A norm weight or bias that `state` lacks is filled with ones or zeros."""
    parts, dtype, gpt2 = {}, state["embed.weight"].dtype, values["model_type"] == "gpt2"
    for name, shape in shapes.items():
        filler = torch.ones if name.endswith("weight") else torch.zeros
        tensor = state[name] if name in state else filler(shape, dtype=dtype)
        theirs = hf_name(name, gpt2, values["model_type"] == "mixtral")
        parts.setdefault(theirs, []).append(transposed(name, tensor, gpt2))
    tensors = {name: torch.cat(p, dim=-1) for name, p in parts.items()}  # GPT-2's q, k and v
    write_safetensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", values | {"torch_dtype": str(dtype).removeprefix("torch.")})


def write_peft(content, weights, gpt2, folder, base=None):
    """Write adapter_config.json and adapter_model.safetensors of an adapter checkpoint, for
    peft.PeftModel.from_pretrained over the base as `model.export_hf` writes it. `weights` are the
    base's tensors by our names. UserError for what peft's files cannot describe.

    Where a GPT-2 has q, k and v in one matrix, the adapters of n of them become one of rank n r,

        A = [A_q; A_k; A_v]  (n r, in)      B = diag(B_q, B_k, B_v)  (3 C, n r)

    with zero rows in B for one that has none, and n alpha, so that alpha / rank stays the same.
    """
    adapter, state = content["adapter"], content["model"]
    if adapter["modules_to_save"] or adapter["quantize"]:
        raise UserError(
            "peft cannot express new special tokens or a quantized base: merge and export the model"
        )
    if any(".experts." in name or ".router." in name for name in state):
        raise UserError("peft knows no adapters of single experts: merge and export the model")
    modules, tensors, counts = {}, {}, {}
    for name in (n for n in weights if n.endswith(".weight")):
        module = hf_name(name, gpt2).removesuffix(".weight")
        modules.setdefault(module, {})[name.removesuffix(".weight")] = len(weights[name])
    for module, heights in modules.items():
        if inputs := [state[f"{name}.a"] for name in heights if f"{name}.a" in state]:
            outputs = [state.get(f"{n}.b", torch.zeros(h, 0)) for n, h in heights.items()]
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.cat(inputs)
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.block_diag(*outputs)
            counts[module] = len(inputs)
    rank, alpha = adapter["rank"], adapter["alpha"]
    values = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base)
    values |= dict(r=rank, lora_alpha=alpha, lora_dropout=adapter["dropout"], bias="none")
    values |= dict(target_modules=list(counts), inference_mode=True, fan_in_fan_out=gpt2)
    values["rank_pattern"] = {m: n * rank for m, n in counts.items()}
    values["alpha_pattern"] = {m: n * alpha for m, n in counts.items()}
    write_safetensors(Path(folder, "adapter_model.safetensors"), tensors)
    write_json(Path(folder, "adapter_config.json"), values)
