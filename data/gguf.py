"""GGUF, the format of llama.cpp and ollama: weights, vocabulary and chat template in one file, as
in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3.

    "GGUF"  3  tensors  values    key, type, value ...    name, shape, type, offset ...    data
"""

import re
import struct
import sys

import regex
import torch

from data.chat import get_template
from data.cli import UserError
from data.files import write_whole
from data.hf_tokenizer import DIGITS_PATTERN, GPT2_PATTERN, tokenizer_json
from data.hf_weights import nearest_model, untied
from data.rope import scale_frequency
from data.sentencepiece import BYTE, CONTROL, NORMAL, UNUSED, USER_DEFINED

FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")
ALIGNMENT, BLOCK = 32, 32  # bytes at whose multiples tensors begin; weights that share a scale

# Our names = theirs: of tensors, and of the numbers that describe a model's shape
NAMES = """embed=token_embd position=position_embd norm=output_norm head=output norm1=attn_norm
attention.q=attn_q attention.k=attn_k attention.v=attn_v attention.out=attn_output
attention.q_norm=attn_q_norm attention.k_norm=attn_k_norm norm2=ffn_norm
feed_forward.gate=ffn_gate feed_forward.up=ffn_up feed_forward.down=ffn_down"""
NAMES = dict(item.split("=") for item in NAMES.split())
SHAPE = """context=context_length d_model=embedding_length n_layer=block_count
d_ff=feed_forward_length vocab_size=vocab_size n_head=attention.head_count
n_kv_head=attention.head_count_kv head_size=attention.key_length head_size=attention.value_length
head_size=rope.dimension_count rope_theta=rope.freq_base eps=attention.layer_norm_epsilon
eps=attention.layer_norm_rms_epsilon"""

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp has split patterns built in, under these names; a file cannot bring another one.
SPLITS = {
    "gpt-2": GPT2_PATTERN,
    "llama-bpe": LLAMA3_PATTERN,
    "qwen2": LLAMA3_PATTERN.replace("{1,3}", ""),
    "smollm": DIGITS_PATTERN,
}
PROBE = "I'm 12345, you'RE  x_1;\n\n  def f(a):\n\treturn\t'é' 汉字，你好！ 3.14\r\n   end-- $9\n "


def split_name(pattern):
    """(llama.cpp's name of the pattern most like `pattern`, whether both split PROBE equally)."""
    both = {None: pattern} | SPLITS
    cuts = {name: {m.end() for m in regex.finditer(p, PROBE)} for name, p in both.items()}
    name = min(SPLITS, key=lambda name: len(cuts[name] ^ cuts[None]))
    return name, cuts[name] == cuts[None]


def vocabulary(tokenizer, size):
    """The values under tokenizer.* of a Tokenizer and `size` tokens; UserError if it is no BPE."""
    content, pieces = tokenizer_json(tokenizer), tokenizer.spec["kind"] == "spm"
    model = content["model"]
    if not (merges := model.get("merges")):
        remedy = "train a model on text of prepare_data.py --tokenizer bpe:N"
        raise UserError(f"llama.cpp cannot read a {tokenizer.name} vocabulary, only BPE: {remedy}")
    if tokenizer.n_vocab > size:
        raise UserError(f"the tokenizer has {tokenizer.n_vocab} ids, the model only {size}")
    tokens, types = [f"<|unused:{i}|>" for i in range(size)], [UNUSED] * size
    for text, i in model["vocab"].items():
        byte = pieces and re.fullmatch("<0x[0-9A-F]{2}>", text)
        tokens[i], types[i] = text, BYTE if byte else NORMAL
    for entry in content["added_tokens"]:
        types[entry["id"]] = CONTROL if entry["special"] else USER_DEFINED
    values = {
        "model": "llama" if pieces else "gpt2",
        "tokens": tokens,
        "token_type": types,
        "eos_token_id": tokenizer.eos_id,
        "bos_token_id": tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id,
        "add_bos_token": tokenizer.bos_id is not None,
    }
    if pieces:  # a score for each piece: the sooner it is merged, the higher
        ranks = {"".join(pair): n for n, pair in reversed([*enumerate(merges)])}
        values["scores"] = [-float(ranks.get(token, 0)) for token in tokens]
        values["add_space_prefix"] = tokenizer.encode("a") != tokenizer.encode("a", "text")
    else:
        values["merges"] = [" ".join(pair) for pair in merges]
        values["pre"], alike = split_name(tokenizer.encoding._pat_str)
        if not alike:
            note = f"{tokenizer.name} splits text in its own way, so llama.cpp may give other ids"
            print(f"[{note}; {values['pre']} is the nearest that it has]", file=sys.stderr)
    values = {f"tokenizer.ggml.{name}": value for name, value in values.items()}
    if template := get_template(tokenizer):
        values["tokenizer.ggml.eot_token_id"] = template.end
        values["tokenizer.chat_template"] = template.source_for(tools=True)
    return values


def q8_0(x):
    """Bytes of x (rows, columns): for each BLOCK a scale in fp16 and codes of 8 bits."""
    blocks = x.reshape(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    codes = (blocks * scale.reciprocal().nan_to_num(posinf=0)).round().to(torch.int8)
    return torch.cat((scale.half().view(torch.uint8), codes.view(torch.uint8)), 1)


def q4_0(x):
    """Bytes of x (rows, columns): for each BLOCK a scale in fp16 and codes of 4 bits, of which the
    second half of the block has the high ones. The weight of largest magnitude becomes -8."""
    blocks = x.reshape(-1, BLOCK)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = largest / -8
    codes = (blocks * scale.reciprocal().nan_to_num(posinf=0, neginf=0) + 8.5).clamp(0, 15).byte()
    low, high = codes.chunk(2, 1)
    return torch.cat((scale.half().view(torch.uint8), low | high << 4), 1)


# name: (number of the type, number of a file of that type, bytes of BLOCK weights, x in that type)
DTYPES = {
    "f32": (0, 0, 128, lambda x: x),
    "f16": (1, 1, 64, lambda x: x.half()),
    "q4_0": (2, 2, 18, q4_0),
    "q8_0": (8, 7, 34, q8_0),
}


def file_tensors(state, family, config):
    """{llama.cpp's name: tensor} of a state dict of ours. In a "llama" it rotates neighbouring
    channels, so the rows of q and k change their order; a "gpt2" has q, k and v in one matrix."""
    tensors, names = {}, NAMES
    if family == "gpt2":
        names = NAMES | dict.fromkeys(("attention.q", "attention.k", "attention.v"), "attn_qkv")
    for name, tensor in state.items():
        block, part, leaf = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(\w+)", name).groups()
        if family == "llama" and part in ("attention.q", "attention.k"):
            heads = config["n_head" if part == "attention.q" else "n_kv_head"]
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        theirs = (f"blk.{block}." if block else "") + f"{names[part]}.{leaf}"
        tensors[theirs] = torch.cat((tensors[theirs], tensor)) if theirs in tensors else tensor
    return tensors


def text(value):
    """The bytes of a string, after their number."""
    return struct.pack("<Q", len(value.encode())) + value.encode()


def packed(value):
    """A value after the number of its type: bool, int, float, str, or a list of numbers or str."""
    if isinstance(value, list):
        if isinstance(value[0], str):
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        number, form = (5, "i") if isinstance(value[0], int) else (6, "f")
        return struct.pack(f"<IIQ{len(value)}{form}", 9, number, len(value), *value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    number, form = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}[type(value)]
    return struct.pack(f"<I{form}", number, value)


def hyperparameters(config, family):
    """The values that describe a model's shape. llama.cpp ignores those that a family lacks."""
    pairs = (item.split("=") for item in SHAPE.split())
    values = {theirs: config[ours] for ours, theirs in pairs}
    values["rope.freq_base"] = float(config["rope_theta"])
    scaling = config["rope_scaling"] or {"rope_type": None}
    if scaling["rope_type"] == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
    elif scaling["rope_type"] and (family, scaling["rope_type"]) != ("llama", "llama3"):
        raise UserError(f"a GGUF file of a {family} model with rope_scaling {scaling}: not written")
    return {f"{family}.{name}": value for name, value in values.items()}


def export(content, path, dtype, complete, meta_state):
    """Write a checkpoint's model and tokenizer as llama.cpp and ollama read them; see
    data/hf_weights.py for the two functions.

    Matrices are in `dtype`, one of DTYPES; with q4_0 the embedding and the head are in q8_0, as
    errors matter most there. Vectors and positions are in f32."""
    values, config, state, tokenizer = nearest_model(content, complete, meta_state)
    if (family := values["model_type"]) not in FAMILIES:
        raise UserError(f"GGUF files can be written for {', '.join(FAMILIES)}, not for {family}")
    if config["window"]:
        raise UserError(f"a GGUF file of a {family} model cannot have a window: {config['window']}")
    if tokenizer is None:
        raise UserError("the checkpoint carries no tokenizer, which llama.cpp needs")
    values = {"general.architecture": family, "general.file_type": DTYPES[dtype][1]}
    values |= hyperparameters(config, family) | vocabulary(tokenizer, config["vocab_size"])
    tensors = file_tensors(untied(state, config), family, config)
    if (scaling := config["rope_scaling"] or {}).get("rope_type") == "llama3":
        theta, size = config["rope_theta"], config["head_size"]
        frequency = 1.0 / theta ** (torch.arange(0, size, 2) / size)
        tensors["rope_freqs.weight"] = frequency / scale_frequency(frequency, scaling, theta)
    start = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    start += b"".join(text(key) + packed(value) for key, value in values.items())
    encoders, offset = [], 0
    for name, tensor in tensors.items():
        kind = "q8_0" if dtype == "q4_0" and name.startswith(("token_embd", "output.")) else dtype
        if tensor.dim() < 2 or name.startswith("position"):
            kind = "f32"
        elif kind.startswith("q") and tensor.shape[1] % BLOCK:
            kind = "f16"
        number, _, block_bytes, encode = DTYPES[kind]
        shape = tensor.shape[::-1]
        start += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, number, offset)
        offset += tensor.numel() * block_bytes // BLOCK
        offset += -offset % ALIGNMENT
        encoders.append(encode)

    def write(f):
        f.write(start + bytes(-len(start) % ALIGNMENT))
        for tensor, encode in zip(tensors.values(), encoders):
            encoded = encode(tensor.float()).contiguous().flatten().view(torch.uint8)
            f.write(memoryview(encoded.numpy()))
            f.write(bytes(-f.tell() % ALIGNMENT))

    write_whole(path, write)
