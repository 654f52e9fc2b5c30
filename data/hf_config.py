"""Hugging Face's config.json, in and out, a table for each family of models.

The fields of a model.Config go in and out as plain dicts. `complete`, an argument of several
functions, fills in the other fields of a Config, or raises UserError for an impossible one.
"""

import ast
import math
import re
import sys

from data.cli import UserError

# Each field of model.Config that may differ from its default: field=NAME:VALUE, with its name in
# config.json and the value if it is absent there, or field:VALUE if the family always has it. To
# add an architecture, add a line here, and the names of its tensors to data/hf_weights.py.
GPT2 = """vocab_size=vocab_size:50257 context=n_positions:1024 n_layer=n_layer:12 n_head=n_head:12
d_model=n_embd:768 d_ff=n_inner activation=activation_function:'gelu_new' qkv_bias,out_bias:True
ff_bias:True tied=tie_word_embeddings:True eps=layer_norm_epsilon:1e-5 position:'learned'
norm:'layernorm'"""
LLAMA = """vocab_size=vocab_size context=max_position_embeddings n_layer=num_hidden_layers
n_head=num_attention_heads n_kv_head=num_key_value_heads d_model=hidden_size head_size=head_dim
d_ff=intermediate_size activation=hidden_act:'silu' qkv_bias,out_bias=attention_bias:False
ff_bias=mlp_bias:False tied=tie_word_embeddings:False eps=rms_norm_eps:1e-6
rope_theta=rope_theta:10000.0 rope_scaling=rope_scaling """
BARE = LLAMA + "qkv_bias,out_bias,ff_bias:False "
GLM = BARE + "qkv_bias=attention_bias:True rotary_share=partial_rotary_factor:0.5 "
EXPERTS = """experts=num_experts experts_per_token=num_experts_per_tok
router_aux_loss_coef=router_aux_loss_coef:0.001 """
GEMMA = LLAMA + "ff_bias:False tied=tie_word_embeddings:True "
FAMILIES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "qwen2": BARE + "qkv_bias:True",
    "qwen3": LLAMA + "ff_bias:False qk_norm:True",
    "mixtral": BARE + EXPERTS + "experts=num_local_experts norm_topk_prob:True",
    "qwen3_moe": LLAMA + EXPERTS + """ff_bias:False qk_norm:True d_ff=moe_intermediate_size
        norm_topk_prob=norm_topk_prob:False""",
    "mistral": BARE,
    "phi3": BARE + "rotary_share=partial_rotary_factor:1.0 eps=rms_norm_eps:1e-5",
    "granite": LLAMA + """embed_scale=embedding_multiplier:1.0 logit_scale=logits_scaling:1.0
        residual_scale=residual_multiplier:1.0 attention_scale=attention_multiplier:1.0""",
    "olmo2": LLAMA + """ff_bias:False eps=rms_norm_eps:1e-5 norm_place:'post'
        qk_norm,qk_norm_wide:True""",
    "glm": GLM,
    "glm4": GLM + "norm_place:'both'",
    "gemma": GEMMA + "activation:'geglu_tanh'",
    "gemma3_text": GEMMA + """activation=hidden_activation:'gelu_pytorch_tanh' qk_norm:True
        norm_place:'both' attention_scale=query_pre_attn_scalar:256 rope_theta=rope_theta:1e6
        window_theta=rope_local_base_freq:1e4""",
    "gpt_neox": LLAMA + """n_kv_head,head_size:None activation=hidden_act:'gelu' norm:'layernorm'
        qkv_bias,out_bias=attention_bias:True ff_bias:True eps=layer_norm_eps:1e-5
        parallel=use_parallel_residual:True rope_theta=rotary_emb_base:10000.0
        rotary_share=rotary_pct:0.25""",
    "minicpm": BARE + """tied=tie_word_embeddings:True embed_scale=scale_emb:1.0
        residual_scale=scale_depth:1.0 logit_scale=dim_model_base:1.0""",
    "internlm2": BARE + "qkv_bias,out_bias=bias:False",
    "baichuan": BARE,
    "chatglm": BARE + """vocab_size=padded_vocab_size context=seq_length n_layer=num_layers
        n_kv_head=multi_query_group_num head_size=kv_channels d_ff=ffn_hidden_size
        activation:'swiglu' qkv_bias=add_qkv_bias:False out_bias,ff_bias=add_bias_linear:False
        eps=layernorm_epsilon:1e-5 rope_theta=rope_ratio:1.0 rotary_share:0.5""",
}  # fmt: skip
READ_ONLY = ("minicpm", "internlm2", "baichuan", "chatglm")  # transformers has no class for them
CLASSES = {  # where it is not the capitalized family name, as in LlamaForCausalLM
    "gpt2": "GPT2LMHeadModel", "gpt_neox": "GPTNeoXForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM", "gemma3_text": "Gemma3ForCausalLM",
}  # fmt: skip
TRAINING = ("dropout", "init", "router_aux_loss_coef")  # fields without effect on a trained model
ALL_WINDOWED = ("mistral", "mixtral", "phi3")
# Whether layer i has a window, given the other fields, if layer_types does not say so
WINDOWED = dict.fromkeys(ALL_WINDOWED, lambda i, values: True)
WINDOWED["qwen2"] = lambda i, values: i >= values.get("max_window_layers", 28)
WINDOWED["qwen3"] = WINDOWED["qwen2"]
WINDOWED["gemma3_text"] = lambda i, values: (i + 1) % values.get("sliding_window_pattern", 6) > 0
FULL, SLIDING = "full_attention", "sliding_attention"
PLAIN = dict(gelu_new="gelu_tanh", gelu_pytorch_tanh="gelu_tanh", gelu="gelu", relu="relu")
GATED = dict(silu="swiglu", swish="swiglu", gelu_pytorch_tanh="geglu_tanh")
# Fields whose values are converted: (theirs to ours, ours to theirs), given our other fields
CONVERTED = {
    "logits_scaling": (lambda v, c: 1 / v, lambda v, c: 1 / v),
    "attention_multiplier": (lambda v, c: v * c["head_size"] ** 0.5,
                             lambda v, c: v / c["head_size"] ** 0.5),
    "query_pre_attn_scalar": (lambda v, c: (c["head_size"] / v) ** 0.5,
                              lambda v, c: round(c["head_size"] / v**2)),
    "scale_depth": (lambda v, c: v / c["n_layer"] ** 0.5, None),
    "dim_model_base": (lambda v, c: v / c["d_model"], None),
    "rope_ratio": (lambda v, c: 10000.0 * v, None),
}  # fmt: skip

# Fields that change what the model computes unless they are off (null, false, 0 or empty) or 1
OFF = """add_cross_attention alibi apply_residual_connection_post_layernorm attention_multiplier
attn_logit_softcapping final_logit_softcapping is_encoder_decoder layer_types mlp_only_layers
num_experts position_encoding_2d quantization_bit quantization_config rope_interleaved
rope_parameters rope_scaling scale_attn_by_inverse_layer_idx sparse_config use_mrope
use_bidirectional_attention use_sliding_window"""
ONE = """decoder_sparse_step embedding_multiplier logits_scaling multi_query_attention
partial_rotary_factor post_layer_norm residual_multiplier rmsnorm scale_attn_weights"""
ROPE_FIELDS = {"default": (), "linear": ("factor",)}  # other fields beside these have no effect


def fields_of(family):
    """({our field: (its name, its value if absent)}, {our field: what it always is})."""
    fields = {}
    for item in FAMILIES[family].split():  # a later item replaces an earlier one
        ours, name, value = re.fullmatch(r"([\w,]+)(?:=(\w+))?(?::(.+))?", item).groups()
        fields |= dict.fromkeys(ours.split(","), (name, value and ast.literal_eval(value)))
    read = {field: v for field, v in fields.items() if v[0]}
    return read, {field: v for field, (_, v) in fields.items() if field not in read}


def config_from_hf(values, complete, where, verbose=False):
    """(family, all fields of the Config as a dict) of a config.json; UserError if it is not
    supported. With `verbose`, a line on stderr names the ignored fields."""
    try:
        family, config, ignored = fields_from_hf(values)
        config = complete(config)
    except UserError as e:
        raise UserError(f"{where}: {e}") from e
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{where} lacks a field or has one of the wrong type: {e}") from e
    if ignored and verbose:
        print(f"[{where}: ignored fields: {', '.join(ignored)}]", file=sys.stderr)
    return family, config


def fields_from_hf(values):
    """(family, fields of a model.Config as a dict, names of the ignored fields) of a config.json.
    UserError names the first field whose effect is not implemented here."""
    left = {name: v for name, v in values.items() if v is not None}
    family = left.get("model_type", "minicpm" if "scale_emb" in left else None)
    if family not in FAMILIES:
        raise UserError(f"model_type {family!r} is not one of {', '.join(FAMILIES)}")
    if family == "baichuan" and "max_position_embeddings" not in left:
        raise UserError("Baichuan 13B uses ALiBi, which is not implemented here; use the 7B")
    if "chatglm2" in left.get("_name_or_path", "") and left.get("rope_ratio", 1) != 1:
        refuse("rope_ratio", left["rope_ratio"])  # ChatGLM2 divides positions by it
    if family == "qwen3_moe" and "num_local_experts" in left:  # transformers 5 writes it so
        left["num_experts"] = left.pop("num_local_experts")
    names, config = fields_of(family)
    if "rope_scaling" in names:
        left["rope_scaling"] = read_rope(left, names)
    config |= {ours: left.get(name, default) for ours, (name, default) in names.items()}
    config["init"] = "gpt2"
    left = {name: v for name, v in left.items() if name not in dict(names.values())}
    if "activation" in names:
        known = PLAIN if config.get("norm") == "layernorm" else GATED
        if config["activation"] not in known:
            refuse(names["activation"][0], config["activation"])
        config["activation"] = known[config["activation"]]
    if config.get("head_size") is None:
        config["head_size"] = config["d_model"] // config["n_head"]
    for ours in (ours for ours, (name, _) in names.items() if name in CONVERTED):
        config[ours] = CONVERTED[names[ours][0]][0](config[ours], config)
    if family.startswith("gemma"):
        config["embed_scale"] = config["d_model"] ** 0.5
    config |= read_windows(family, left, config["n_layer"])
    supported = dict.fromkeys(OFF.split(), False) | dict.fromkeys(ONE.split(), 1)
    for name, value in left.items():
        if name in supported and (value or False) != supported[name]:
            refuse(name, value)
    used = {"model_type", "max_window_layers", "sliding_window_pattern"}
    return family, config, sorted(left.keys() - supported.keys() - used)


def refuse(name, value):
    """UserError for a field whose effect is not implemented."""
    raise UserError(f"{name} = {value!r} is not implemented here")


def read_rope(left, names):
    """The rope_scaling of a Config, or None. Moves theta and the rotary share from the rope entry
    of the config.json `left` to the fields that `names` gives for them."""
    rope = left.pop("rope_parameters", {})  # the newer name; transformers prefers the older
    rope = left.pop("rope_scaling", None) or rope
    if "window_theta" in names and FULL in rope:  # one for each type of layer
        left[names["window_theta"][0]], rope = rope[SLIDING]["rope_theta"], rope[FULL]
    if any(isinstance(v, dict) for v in rope.values()):
        refuse("rope_parameters", rope)
    rope = {name: v for name, v in rope.items() if v is not None}
    for ours, name in (("rope_theta", "rope_theta"), ("rotary_share", "partial_rotary_factor")):
        if name in rope:
            left[names.get(ours, (name,))[0]] = rope.pop(name)
    kind, context = rope.pop("rope_type", rope.pop("type", "default")), names["context"][0]
    rope = {n: v for n, v in rope.items() if n in ROPE_FIELDS.get(kind, rope)}
    # dynamic changes nothing up to max_position_embeddings, which is the context
    if kind == "default" or (kind == "dynamic" and rope.keys() <= {"factor"}):
        return None
    original = rope.get("original_max_position_embeddings", left.get(context))
    if kind == "yarn":  # max_position_embeddings may still be the original context
        size = 0.1 * math.log(rope["factor"]) + 1
        rope = dict(beta_fast=32, beta_slow=1, attention_factor=size) | rope
        rope["original_max_position_embeddings"] = original
        left[context] = max(left[context], int(rope["factor"] * original))
    elif kind in ("longrope", "su"):  # in the original context; beyond it, all angles change
        kind, original = "longrope", left.pop("original_max_position_embeddings", original)
        factor = max(rope.get("factor", left[context] / original), 1)
        size = rope.get("attention_factor", (1 + math.log(factor) / math.log(original)) ** 0.5)
        rope = dict(short_factor=rope["short_factor"], attention_factor=size)
        left[context] = original
    return {"rope_type": kind, **rope}


def read_windows(family, left, n_layer):
    """The fields window and window_layers of a Config, taken from the config.json `left`."""
    window, kinds = left.pop("sliding_window", None), left.pop("layer_types", [])
    if family not in WINDOWED or ("qwen" in family and not left.pop("use_sliding_window", False)):
        window = None  # many have the field, without an effect
    if set(kinds) - ({FULL, SLIDING} if window else {FULL}):
        refuse("layer_types", kinds)
    layers = [k == SLIDING for k in kinds]
    if window and not kinds:
        layers = [WINDOWED[family](i, left) for i in range(n_layer)]
    return dict(window=window, window_layers=None if all(layers) else layers) if any(layers) else {}


def config_to_hf(config, complete):
    """(config.json as a dict, the fields of its Config) of the Hugging Face architecture that
    computes the same as the Config with these fields. It may have additional biases and norm
    weights, which are then zeros and ones. UserError names a field that no architecture has."""
    candidates = []
    for family in (family for family in FAMILIES if family not in READ_ONLY):
        values, misfits, added = fields_to_hf(config, family), [], 0
        try:
            theirs = complete(fields_from_hf(values)[1])
        except UserError as e:  # for example: rope, and an odd number of channels in a head
            problem = e
            continue
        for name, value in config.items():
            other = theirs[name]
            close = isinstance(value, float) and math.isclose(value, other)
            if value != other and not close and name not in TRAINING:
                fits = other is True and (name == "norm_weight" or name.endswith("_bias"))
                added, misfits = added + fits, misfits + [name] * (not fits)
        candidates.append((len(misfits), added, misfits, values, theirs))
    if not candidates:
        raise UserError(f"no Hugging Face architecture has the shape of this model: {problem}")
    *_, misfits, values, theirs = min(candidates, key=lambda candidate: candidate[:2])
    for name in misfits[:1]:
        field = f"{name} {config[name]} (the nearest, {values['model_type']}, has {theirs[name]})"
        raise UserError(f"no Hugging Face architecture has {field} with the rest of this model")
    return values, theirs


def fields_to_hf(config, family):
    """The config.json of a model of `family` that is as near as possible to a Config's fields. The
    caller has to read it back and compare, since the family may lack a field."""
    c, kind = config, CLASSES.get(family, f"{family.capitalize()}ForCausalLM")
    # the class's own id of padding may lie beyond the vocabulary
    values = {"architectures": [kind], "model_type": family, "pad_token_id": None}
    if family == "gpt2":
        values |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), c["dropout"])
    read, fixed = fields_of(family)
    for ours, (name, default) in read.items():
        value = c[ours]
        if ours == "activation":
            known = PLAIN if fixed.get("norm") == "layernorm" else GATED
            value = next((theirs for theirs, o in known.items() if o == value), default)
        elif name in CONVERTED:
            value = CONVERTED[name][1](value, c)
        values[name] = values.get(name, False) or value  # attention_bias: of qkv or out
    if (scaling := values.get("rope_scaling")) and scaling["rope_type"] == "longrope":
        values["rope_scaling"] = scaling | {"long_factor": scaling["short_factor"]}
        values["original_max_position_embeddings"] = c["context"]
    if c["window"] and family in WINDOWED:
        values["sliding_window"] = c["window"]
        if family not in ALL_WINDOWED:
            layers = c["window_layers"] or [True] * c["n_layer"]
            values["layer_types"] = [SLIDING if windowed else FULL for windowed in layers]
        if "qwen" in family:
            values["use_sliding_window"] = True
    return values
