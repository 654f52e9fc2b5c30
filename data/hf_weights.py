"""Weights of Hugging Face's models, in and out, and adapters for peft.

Weights go in and out as plain dicts. model.py builds a Transformer from them and says, by the
arguments `complete` and `tensor_shapes`, which fields and tensors one has.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F

from data.cli import UserError
from data.download import WEIGHTS, weight_files
from data.files import write_json
from data.hf_config import config_to_hf, read_config
from data.hf_tokenizer import generation_config, hub_tokenizer, tokenizer_config, tokenizer_json
from data.tensors import Safetensors, fit_error, load_pt, write_safetensors
from data.tokenizer import Tokenizer

# The names of layers in each family. Parts that have the same name lie side by side in one tensor,
# in this order.
LLAMA = {
    "embed": "model.embed_tokens",
    "blocks": "model.layers",
    "norm": "model.norm",
    "head": "lm_head",
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


def joined(qkv=None, **others):
    """Names that differ from LLAMA's; `qkv` is that of queries, keys and values in one."""
    parts = dict(out="attention.out", up="feed_forward.up", down="feed_forward.down")
    names = {parts.get(part, part): name for part, name in others.items()}
    if "gate_up" in names:
        names |= dict.fromkeys(("feed_forward.gate", "feed_forward.up"), names.pop("gate_up"))
    return LLAMA | names | ({f"attention.{part}": qkv for part in "qkv"} if qkv else {})


_GLM = joined(gate_up="mlp.gate_up_proj")
_POST = dict(post_norm1="post_attention_layernorm", post_norm2="post_feedforward_layernorm")
NAMES = {
    "gpt2": joined(
        "attn.c_attn", embed="transformer.wte", position="transformer.wpe", blocks="transformer.h",
        norm="transformer.ln_f", norm1="ln_1", norm2="ln_2", out="attn.c_proj", up="mlp.c_fc",
        down="mlp.c_proj",
    ),
    "phi3": joined("self_attn.qkv_proj", gate_up="mlp.gate_up_proj"),
    "olmo2": joined(**_POST),
    "glm": _GLM,
    "glm4": _GLM | dict(post_norm1="post_self_attn_layernorm", post_norm2="post_mlp_layernorm"),
    "gemma3_text": joined(norm2="pre_feedforward_layernorm", **_POST),
    "gpt_neox": joined(
        "attention.query_key_value", embed="gpt_neox.embed_in", blocks="gpt_neox.layers",
        norm="gpt_neox.final_layer_norm", out="attention.dense",
        up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h",
    ),
    "internlm2": joined(
        "attention.wqkv", embed="model.tok_embeddings", head="output", norm1="attention_norm",
        norm2="ffn_norm", out="attention.wo", up="feed_forward.w3", down="feed_forward.w2",
    ) | {"feed_forward.gate": "feed_forward.w1"},
    "baichuan": joined("self_attn.W_pack"),
    "chatglm": joined(
        "self_attention.query_key_value", embed="transformer.embedding.word_embeddings",
        blocks="transformer.encoder.layers", norm="transformer.encoder.final_layernorm",
        head="transformer.output_layer", out="self_attention.dense", gate_up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
    ),
}  # fmt: skip
TRANSPOSED = ("gpt2",)  # the matrices of the blocks are (in, out)
GROUPED = ("internlm2", "gpt_neox")  # each key head comes with its queries and values
INTERLEAVED = ("glm", "glm4", "chatglm")  # rope rotates neighbouring channels
PLUS_ONE = ("gemma", "gemma3_text")  # norms multiply by 1 + weight
BAICHUAN2 = 125696  # its vocabulary; its head has rows of length 1, whatever the file says
# Buffers that old checkpoints carry: causal masks, and rotary frequencies that follow from config
IGNORED_TENSORS = r"(att(n|ention)\.(masked_)?bias|rotary_(pos_)?emb\.inv_freq)$"


def hf_name(name, family):
    """Their name for our tensor `name`.

    >>> hf_name("blocks.3.attention.k.weight", "gpt2"), hf_name("head.weight", "llama")
    ('transformer.h.3.attn.c_attn.weight', 'lm_head.weight')
    """
    names = NAMES.get(family, LLAMA)
    block, part, leaf = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)", name).groups()
    return ".".join([*([names["blocks"], block] if block else []), names[part], leaf])


def layout(family, config, shapes):
    """{their name: {our name: the rows of their tensor that are ours, in our order}}. `shapes` are
    those of our tensors, as model.py has them for the fields `config`.

    Our rope rotates channel i of a head with channel i + hs/2. Theirs may rotate channels 2i and
    2i + 1, or only the first ones of a head.
    """
    groups, order, hs = {}, list(NAMES.get(family, LLAMA)), config["head_size"]
    turned = int(hs * config["rotary_share"])
    pairs = torch.arange(turned)
    pairs = pairs.view(-1, 2).T if family in INTERLEAVED else pairs.view(2, -1)
    channels = torch.cat((pairs, torch.arange(turned, hs).view(2, -1)), dim=1).flatten()
    for name in shapes:
        groups.setdefault(hf_name(name, family), {})[name] = shapes[name][0]
    for names in groups.values():
        rows = torch.arange(sum(names.values()))
        if family in GROUPED and len(names) == 3:
            rows = rows.view(config["n_kv_head"], -1, hs)
            rows = torch.cat((rows[:, :-2].flatten(), rows[:, -2].flatten(), rows[:, -1].flatten()))
        part = re.compile(r"(?:blocks\.\d+\.)?(.+)\.")
        ordered = sorted(names, key=lambda n: order.index(part.match(n)[1]))
        for name, ours in zip(ordered, rows.split([names[n] for n in ordered])):
            if ".attention." in name and name.split(".")[-2] in ("q", "k"):
                ours = ours.view(-1, hs)[:, channels].flatten()
            names[name] = ours
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


def read_state(folder, family, config, shapes, dtype=None):
    """{our name: tensor} of the weights in their folder; `shapes` are those that ours must have for
    the fields `config`.

    Tensors that have our layout and `dtype` stay on disk until they are touched. The others are
    converted one by one, so that two copies of the weights are never in memory.
    """
    files, state, head = hf_tensors(folder), {}, hf_name("head.weight", family)
    if family == "gpt_neox" and "embed_out.weight" in files:  # as older files name it
        files[head] = {head: files.pop("embed_out.weight")["embed_out.weight"]}
    used = {head}  # there may be one even if it is tied
    bare = family == "gpt2" and "wte.weight" in files  # the first files have no "transformer."
    for theirs, parts in layout(family, config, untied(shapes, config)).items():
        theirs = theirs.removeprefix("transformer." if bare else "")
        height = sum(map(len, parts.values()))
        for name, rows in parts.items():
            shape = shapes[name]
            if theirs not in files:
                raise UserError(f"{folder} lacks the tensor {theirs} {tuple(shape)}")
            file = files[theirs]
            used.add(theirs)
            tensor = transposed(name, file[theirs], family)
            if tensor.shape != (height, *shape[1:]) or not tensor.is_floating_point():
                found = f"{tensor.dtype} {tuple(tensor.shape)}"
                raise UserError(
                    f"{folder}: {theirs} gives {found}, the config {name} {tuple(shape)}"
                )
            ordered = torch.equal(rows, torch.arange(rows[0], rows[0] + len(rows)))
            tensor = tensor[rows[0] : rows[0] + len(rows)] if ordered else tensor[rows]
            if family in PLUS_ONE and "norm" in name:
                tensor = tensor.float() + 1  # in bfloat16 the sum would be rounded
            if family == "baichuan" and theirs == head and shape[0] == BAICHUAN2:
                tensor = F.normalize(tensor)
            state[name] = tensor.to(dtype or tensor.dtype).contiguous()
            if isinstance(file, Safetensors) and state[name] is not tensor:
                file.release()
    if extra := [n for n in files if n not in used and not re.search(IGNORED_TENSORS, n)]:
        raise UserError(f"{folder}: the tensor {extra[0]} is unknown to the model")
    return state | ({"head.weight": state["embed.weight"]} if config["tied"] else {})


def untied(tensors, config):
    """The tensors, or their shapes, without the head if it is the embedding."""
    return {n: t for n, t in tensors.items() if n != "head.weight" or not config["tied"]}


def write_model(folder, values, config, shapes, state):
    """Write config.json and model.safetensors of a model whose tensors, by our names, are to have
    `shapes`. A norm weight or bias that `state` lacks is filled with ones or zeros."""
    tensors, dtype, family = {}, state["embed.weight"].dtype, values["model_type"]
    for theirs, parts in layout(family, config, untied(shapes, config)).items():
        ours = []
        for name in parts:
            filler = torch.ones if name.endswith("weight") else torch.zeros
            tensor = state[name] if name in state else filler(shapes[name], dtype=dtype)
            ours.append((tensor.float() - 1) if family in PLUS_ONE and "norm" in name else tensor)
        tensor = torch.cat(ours)[torch.cat(list(parts.values())).argsort()]
        tensors[theirs] = transposed(next(iter(parts)), tensor, family).to(dtype)
    write_safetensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", values | {"torch_dtype": str(dtype).removeprefix("torch.")})


def load(folder, complete, tensor_shapes, dtype=None):
    """The checkpoint dict {"config", "model", "tokenizer"} of a folder in Hugging Face's layout,
    which may lack a tokenizer. Tensors that need no change stay on disk until they are touched;
    others are copied, to `dtype` if given."""
    family, config = read_config(folder, complete, verbose=True)
    state = read_state(folder, family, config, tensor_shapes(config), dtype)
    has_tokenizer = (folder / "tokenizer.json").exists()
    tokenizer = {"tokenizer": hub_tokenizer(folder)} if has_tokenizer else {}
    return {"config": config, "model": state} | tokenizer


def export(content, folder, complete, tensor_shapes):
    """Write a checkpoint's model, and its tokenizer if it has one, as transformers reads them;
    returns config.json as a dict."""
    config = complete(content["config"])
    values, nearest = config_to_hf(config, complete)
    shapes = {
        name: torch.empty(shape, device="meta") for name, shape in tensor_shapes(config).items()
    }
    if problem := fit_error(shapes, content["model"]):
        raise UserError(f"this checkpoint does not fit its own config: {problem}")
    if "tokenizer" in content:
        tokenizer = Tokenizer(content["tokenizer"])
        values |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        write_json(folder / "tokenizer.json", tokenizer_json(tokenizer))
        write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer))
        write_json(folder / "generation_config.json", generation_config(tokenizer))
    write_model(folder, values, nearest, tensor_shapes(nearest), content["model"])
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
    if adapter["modules_to_save"] or adapter["quantize"]:
        raise UserError(
            "peft cannot express new special tokens or a quantized base: merge and export the model"
        )
    tensors, counts = {}, {}
    shapes = {name: t.shape for name, t in weights.items() if name.endswith(".weight")}
    for module, parts in layout(family, config, shapes).items():
        module, parts = (
            module.removesuffix(".weight"),
            {n[: -len(".weight")]: r for n, r in parts.items()},
        )
        if inputs := [state[f"{name}.a"] for name in parts if f"{name}.a" in state]:
            outputs = [state.get(f"{n}.b", torch.zeros(len(r), 0)) for n, r in parts.items()]
            output = torch.block_diag(*outputs)[torch.cat(list(parts.values())).argsort()]
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.cat(inputs)
            tensors[f"base_model.model.{module}.lora_B.weight"] = output
            counts[module] = len(inputs)
    rank, alpha = adapter["rank"], adapter["alpha"]
    values = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base)
    values |= dict(r=rank, lora_alpha=alpha, lora_dropout=adapter["dropout"], bias="none")
    values |= dict(
        target_modules=list(counts), inference_mode=True, fan_in_fan_out=family in TRANSPOSED
    )
    values["rank_pattern"] = {m: n * rank for m, n in counts.items()}
    values["alpha_pattern"] = {m: n * alpha for m, n in counts.items()}
    write_safetensors(Path(folder, "adapter_model.safetensors"), tensors)
    write_json(Path(folder, "adapter_config.json"), values)
