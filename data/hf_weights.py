"""Weights of Hugging Face's models, in and out, and adapters for peft.

Weights go in and out as plain dicts. model.py builds a Transformer from them, and gives us two
functions of a Config's fields: `complete` adds the others, `meta_state` makes tensors without data.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F

from data import hf_tokenizer
from data.cli import UserError
from data.download import WEIGHTS, find_tokenizer, weight_files
from data.files import read_json, write_json
from data.hf_config import config_from_hf, config_to_hf
from data.tensors import Safetensors, fit_error, load_pt, write_safetensors
from data.tokenizer import Tokenizer

# The names of the parts of our model in files: the usual ones, and what a family has instead. Parts
# that share a name lie side by side in one tensor, in this order.
LLAMA = """embed=model.embed_tokens blocks=model.layers norm=model.norm head=lm_head
norm1=input_layernorm q=self_attn.q_proj k=self_attn.k_proj v=self_attn.v_proj out=self_attn.o_proj
q_norm=self_attn.q_norm k_norm=self_attn.k_norm norm2=post_attention_layernorm
gate=mlp.gate_proj up=mlp.up_proj down=mlp.down_proj """
_POST = "post_norm1=post_attention_layernorm post_norm2=post_feedforward_layernorm "
_GLM = "gate,up=mlp.gate_up_proj "
NAMES = {
    "gpt2": """embed=transformer.wte position=transformer.wpe blocks=transformer.h
        norm=transformer.ln_f norm1=ln_1 norm2=ln_2 q,k,v=attn.c_attn out=attn.c_proj up=mlp.c_fc
        down=mlp.c_proj""",
    "qwen3_moe": """router=mlp.gate gate=mlp.experts.*.gate_proj up=mlp.experts.*.up_proj
        down=mlp.experts.*.down_proj""",
    "mixtral": """router=block_sparse_moe.gate gate=block_sparse_moe.experts.*.w1
        up=block_sparse_moe.experts.*.w3 down=block_sparse_moe.experts.*.w2""",
    "phi3": "q,k,v=self_attn.qkv_proj gate,up=mlp.gate_up_proj",
    "olmo2": _POST,
    "glm": _GLM,
    "glm4": _GLM + "post_norm1=post_self_attn_layernorm post_norm2=post_mlp_layernorm",
    "gemma3_text": _POST + "norm2=pre_feedforward_layernorm",
    "gpt_neox": """embed=gpt_neox.embed_in blocks=gpt_neox.layers norm=gpt_neox.final_layer_norm
        q,k,v=attention.query_key_value out=attention.dense up=mlp.dense_h_to_4h
        down=mlp.dense_4h_to_h""",
    "internlm2": """embed=model.tok_embeddings head=output norm1=attention_norm norm2=ffn_norm
        q,k,v=attention.wqkv out=attention.wo gate=feed_forward.w1 up=feed_forward.w3
        down=feed_forward.w2""",
    "baichuan": "q,k,v=self_attn.W_pack",
    "chatglm": """embed=transformer.embedding.word_embeddings blocks=transformer.encoder.layers
        norm=transformer.encoder.final_layernorm head=transformer.output_layer
        q,k,v=self_attention.query_key_value out=self_attention.dense gate,up=mlp.dense_h_to_4h
        down=mlp.dense_4h_to_h""",
}
TRANSPOSED = ("gpt2",)  # the matrices of the blocks are (in, out)
GROUPED = ("internlm2", "gpt_neox")  # each key head comes with its queries and values
INTERLEAVED = ("glm", "glm4", "chatglm")  # rope rotates neighbouring channels
PLUS_ONE = ("gemma", "gemma3_text")  # norms multiply by 1 + weight
BAICHUAN2 = 125696  # its vocabulary; its head has rows of length 1, whatever the file says
# Buffers that old checkpoints carry: causal masks, and rotary frequencies that follow from config
IGNORED_TENSORS = r"(att(n|ention)\.(masked_)?bias|rotary_(pos_)?emb\.inv_freq)$"


def hf_names(family):
    """{part of our model: its name in the family's files}."""
    items = (item.split("=") for item in (LLAMA + NAMES.get(family, "")).split())
    return {part: name for parts, name in items for part in parts.split(",")}


def hf_name(name, names):
    """Their name for our tensor `name`, given their `hf_names`.

    >>> hf_name("blocks.3.attention.k.weight", hf_names("gpt2"))
    'transformer.h.3.attn.c_attn.weight'
    """
    *path, part, leaf = name.split(".")
    part = names[part].replace("*", path[-1]) if path else names[part]  # the number of an expert
    return ".".join([*([names["blocks"], path[1]] if path else []), part, leaf])


def layout(family, config, tensors):
    """{their name: {our name: the rows of their tensor that are ours, in our order}} for `tensors`,
    our names and tensors, of a model with the fields `config`.

    Our rope rotates channel i of a head with channel i + hs/2. Theirs may rotate channels 2i and
    2i + 1, or only the first ones of a head.
    """
    names, hs, groups = hf_names(family), config["head_size"], {}
    channels, order = torch.arange(hs), list(names)
    if config["position"] == "rope":
        turned, others = channels.split([n := int(hs * config["rotary_share"]), hs - n])
        turned = turned.view(-1, 2).T if family in INTERLEAVED else turned.view(2, -1)
        channels = torch.cat((turned, others.view(2, -1)), dim=1).flatten()
    for name in sorted(tensors, key=lambda name: order.index(name.split(".")[-2])):
        groups.setdefault(hf_name(name, names), {})[name] = len(tensors[name])
    for sizes in groups.values():
        rows = torch.arange(sum(sizes.values()))
        if family in GROUPED and len(sizes) == 3:
            rows = rows.view(config["n_kv_head"], -1, hs)
            rows = torch.cat([rows[:, heads].flatten() for heads in (slice(-2), -2, -1)])
        for name, ours in zip(sizes, rows.split(list(sizes.values()))):
            turns = name.split(".")[-2] in ("q", "k")
            sizes[name] = ours.view(-1, hs)[:, channels].flatten() if turns else ours
    return groups


def transposed(name, tensor, family):
    """Our tensor `name` from theirs, and back: GPT-2 keeps the blocks' matrices as (in, out)."""
    blocks = family in TRANSPOSED and name.startswith("blocks.")
    return tensor.T if blocks and tensor.dim() == 2 else tensor


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


def read_state(folder, family, config, tensors, dtype):
    """{our name: tensor} of the weights in their folder, for a model with the fields `config` and
    `tensors` of these names and shapes.

    Tensors that have our layout and `dtype` stay on disk until they are touched. The others are
    converted one by one, so that two copies of the weights are never in memory.
    """
    files, state, head = hf_tensors(folder), {}, hf_name("head.weight", hf_names(family))
    if family == "gpt_neox" and "embed_out.weight" in files:  # as older files name it
        files[head] = {head: files.pop("embed_out.weight")["embed_out.weight"]}
    used = {head}  # there may be one even if it is tied
    bare = family == "gpt2" and "wte.weight" in files  # the first files have no "transformer."
    for theirs, parts in layout(family, config, untied(tensors, config)).items():
        theirs = theirs.removeprefix("transformer." if bare else "")
        for name, rows in parts.items():
            shape = tuple(tensors[name].shape)
            if theirs not in files:
                raise UserError(f"{folder} lacks the tensor {theirs} {shape}")
            file = files[theirs]
            used.add(theirs)
            tensor = transposed(name, file[theirs], family)
            height = sum(map(len, parts.values()))
            if tensor.shape != (height, *shape[1:]) or not tensor.is_floating_point():
                found = f"{tensor.dtype} {tuple(tensor.shape)}"
                raise UserError(f"{folder}: {theirs} gives {found}, the config {name} {shape}")
            first, stop = int(rows[0]), int(rows[0]) + len(rows)
            ordered = torch.equal(rows, torch.arange(first, stop))
            tensor = tensor[first:stop] if ordered else tensor[rows]  # a slice stays on disk
            if family in PLUS_ONE and "norm" in name:
                tensor = tensor.float() + 1  # in bfloat16 the sum would be rounded
            if family == "baichuan" and theirs == head and height == BAICHUAN2:
                tensor = F.normalize(tensor)
            state[name] = tensor.to(dtype or tensor.dtype).contiguous()
            if isinstance(file, Safetensors) and state[name] is not tensor:
                file.release()
    if extra := [n for n in files if n not in used and not re.search(IGNORED_TENSORS, n)]:
        raise UserError(f"{folder}: the tensor {extra[0]} is unknown to the model")
    return state | ({"head.weight": state["embed.weight"]} if config["tied"] else {})


def untied(tensors, config):
    """The tensors without the head if it is the embedding."""
    return {n: t for n, t in tensors.items() if n != "head.weight" or not config["tied"]}


def load(folder, complete, meta_state, dtype=None):
    """The checkpoint dict {"config", "model", "tokenizer"} of a folder in Hugging Face's layout,
    which may lack a tokenizer. Tensors that need no change stay on disk until they are touched;
    others are copied, to `dtype` if given."""
    folder, where = Path(folder), Path(folder, "config.json")
    family, config = config_from_hf(read_json(where), complete, where, verbose=True)
    state = read_state(folder, family, config, meta_state(config), dtype)
    content = {"config": config, "model": state}
    if find_tokenizer(folder):
        content["tokenizer"] = hf_tokenizer.hub_tokenizer(folder)
    return content


def nearest_model(content, complete, meta_state):
    """(config.json as a dict, the fields of its Config, its tensors by our names, the Tokenizer or
    None) of a checkpoint in the nearest architecture. A norm weight or bias that the checkpoint
    lacks is ones or zeros."""
    config, state = complete(content["config"]), {}
    values, nearest = config_to_hf(config, complete)
    if problem := fit_error(meta_state(config), content["model"]):
        raise UserError(f"this checkpoint does not fit its own config: {problem}")
    for name, tensor in meta_state(nearest).items():
        filler = torch.ones if name.endswith("weight") else torch.zeros
        ours = content["model"].get(name)
        state[name] = filler(tensor.shape) if ours is None else ours
    tokenizer = Tokenizer(content["tokenizer"]) if "tokenizer" in content else None
    return values, nearest, state, tokenizer


def export(content, folder, complete, meta_state):
    """Write a checkpoint's model and tokenizer as transformers reads them; return config.json."""
    folder = Path(folder)
    values, config, state, tokenizer = nearest_model(content, complete, meta_state)
    if tokenizer:
        values |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        write_json(folder / "tokenizer.json", hf_tokenizer.tokenizer_json(tokenizer))
        write_json(folder / "tokenizer_config.json", hf_tokenizer.tokenizer_config(tokenizer))
        write_json(folder / "generation_config.json", hf_tokenizer.generation_config(tokenizer))
    written, dtype, family = {}, state["embed.weight"].dtype, values["model_type"]
    for theirs, parts in layout(family, config, untied(state, config)).items():
        ours = [state[n] for n in parts]
        if family in PLUS_ONE and "norm" in theirs:
            ours = [tensor.float() - 1 for tensor in ours]
        tensor = torch.cat(ours)[torch.cat(list(parts.values())).argsort()]
        written[theirs] = transposed(next(iter(parts)), tensor, family).to(dtype)
    write_safetensors(folder / "model.safetensors", written)
    write_json(folder / "config.json", values | {"torch_dtype": str(dtype).removeprefix("torch.")})
    return values


def write_peft(content, weights, family, config, folder, base=None):
    """Write adapter_config.json and adapter_model.safetensors of an adapter checkpoint, for
    peft.PeftModel.from_pretrained over the base as `model.export_hf` writes it, as a model of
    `family` with the fields `config`. `weights` are the base's tensors by our names. UserError for
    what peft's files cannot describe.

    Where they have q, k and v in one matrix, the adapters of n of them become one of rank n r,

        A = [A_q; A_k; A_v]  (n r, in)      B = diag(B_q, B_k, B_v)  (3 C, n r)

    with zero rows in B for one that has none, and n alpha, so that alpha / rank stays the same.
    """
    adapter, state = content["adapter"], content["model"]
    experts = any(".feed_forward.experts." in name or ".router." in name for name in state)
    if adapter["modules_to_save"] or adapter["quantize"] or experts:
        what = "adapters of single experts, new special tokens or a quantized base"
        raise UserError(f"peft cannot express {what}: merge and export the model")
    tensors, counts = {}, {}
    weights = {name: t for name, t in weights.items() if name.endswith(".weight")}
    for module, parts in layout(family, config, weights).items():
        module, rows = module.removesuffix(".weight"), torch.cat(list(parts.values()))
        parts = {name.removesuffix(".weight"): len(r) for name, r in parts.items()}
        if inputs := [state[f"{name}.a"] for name in parts if f"{name}.a" in state]:
            outputs = [state.get(f"{n}.b", torch.zeros(h, 0)) for n, h in parts.items()]
            output = torch.block_diag(*outputs)[rows.argsort()]
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.cat(inputs)
            tensors[f"base_model.model.{module}.lora_B.weight"] = output
            counts[module] = len(inputs)
    rank, alpha = adapter["rank"], adapter["alpha"]
    values = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base)
    values |= dict(r=rank, lora_alpha=alpha, lora_dropout=adapter["dropout"], bias="none")
    values |= dict(target_modules=list(counts), inference_mode=True)
    values["fan_in_fan_out"] = family in TRANSPOSED
    values["rank_pattern"] = {m: n * rank for m, n in counts.items()}
    values["alpha_pattern"] = {m: n * alpha for m, n in counts.items()}
    write_safetensors(Path(folder, "adapter_model.safetensors"), tensors)
    write_json(Path(folder, "adapter_config.json"), values)
