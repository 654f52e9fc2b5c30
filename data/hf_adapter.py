"""Adapters in the files of Hugging Face's peft, for models that transformers has, too.

In and out go plain dicts: `layers` is {our name: (out, in)} of every Linear of the base.
"""

import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F

from data.cli import UserError
from data.files import read_json, write_json
from data.hf_weights import hf_name
from data.tensors import Safetensors, fit_error, write_safetensors

# Fields of an adapter_config.json that change nothing in what a finished adapter computes: the
# tensor file says which modules have one, and of which rank. Tensors lie the same way under either
# fan_in_fan_out, which only tells how the base keeps its weight.
IGNORED = """auto_mapping base_model_name_or_path eva_config exclude_modules fan_in_fan_out
inference_mode layers_pattern layers_to_transform megatron_core peft_version qalora_group_size r
rank_pattern revision target_modules"""
# Fields that `import_peft` reads
READ = "alpha_pattern lora_alpha lora_dropout use_rslora"
# Fields that would change it, and the values that we support; every other field must be off. Some
# ways to start an adapter change the base: those are not among these.
SUPPORTED = {
    "bias": ("none",),
    "init_lora_weights": (True, "eva", "gaussian", "orthogonal"),
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
}


def modules_of(layers, gpt2):
    """{path of a module in transformers: our names in it}: three for the c_attn of a GPT-2, one
    elsewhere."""
    modules = {}
    for name in layers:
        path = hf_name(f"{name}.weight", gpt2).removesuffix(".weight")
        modules.setdefault(path, []).append(name)
    return modules


def peft_key(path, half):
    """What peft calls the half "A" or "B" of the adapter on a module."""
    return f"base_model.model.{path}.lora_{half}.weight"


def shortest(names, everything):
    """The last parts of dotted names, sorted, if nothing else in `everything` ends like them; or
    the names."""
    last = {name.rpartition(".")[2] for name in names}
    meant = {name for name in everything if name.rpartition(".")[2] in last}
    return sorted(last if meant == set(names) else names)


def adapter_shapes(rank, sizes, a, b):
    """{a, b: tensors without storage} as the halves of one adapter over layers of `sizes`, their
    outputs side by side."""
    height, width = sum(out for out, _ in sizes), sizes[0][1]
    return {a: torch.empty(rank, width, device="meta"), b: torch.empty(height, rank, device="meta")}


def export_peft(content, layers, gpt2, folder, base=None):
    """Write adapter_config.json and adapter_model.safetensors of an adapter checkpoint, for
    peft.PeftModel.from_pretrained over the base as `model.export_hf` writes it. UserError for what
    peft's files cannot say.

    Where a GPT-2 has q, k and v in one matrix (in, 3 C), their adapters become one of n ranks,

        A = [A_q; A_k; A_v]  (n r, in)      B = diag(B_q, B_k, B_v)  (3 C, n r)

    zero rows in B for one that has none, and n alpha: alpha / rank stays what it was.
    """
    about, state, modules = content["adapter"], content["model"], modules_of(layers, gpt2)
    rank, alpha = about["rank"], about["alpha"]
    for field, why in (
        ("modules_to_save", "new special tokens, which a base of peft's lacks"),
        ("quantize", f"a base in {about['quantize']}, which peft's files cannot describe"),
    ):
        if about[field]:
            raise UserError(f"the adapter has learned {why}: merge it, and export the whole model")
    expected, found = {}, {}  # found: {path: our names in it that have an adapter}
    for path, names in modules.items():
        for name in (n for n in names if f"{n}.a" in state):
            expected |= adapter_shapes(rank, [layers[name]], f"{name}.a", f"{name}.b")
            found.setdefault(path, []).append(name)
    if problem := fit_error(expected, state):
        raise UserError(f"the adapter does not fit this base: {problem}")
    tensors, ranks, alphas = {}, {}, {}
    for path, names in found.items():
        blocks = [state.get(f"{n}.b", torch.zeros(layers[n][0], 0)) for n in modules[path]]
        tensors[peft_key(path, "A")] = torch.cat([state[f"{name}.a"] for name in names])
        tensors[peft_key(path, "B")] = torch.block_diag(*blocks)
    for n in (2, 3):
        keys = shortest([path for path in found if len(found[path]) == n], found)
        ranks |= dict.fromkeys(keys, n * rank)
        alphas |= dict.fromkeys(keys, n * alpha)
    values = dict(peft_type="LORA", task_type="CAUSAL_LM", r=rank, lora_alpha=alpha)
    values |= dict(rank_pattern=ranks, alpha_pattern=alphas, lora_dropout=about["dropout"])
    values |= dict(target_modules=shortest(found, modules), bias="none", inference_mode=True)
    values |= dict(base_model_name_or_path=base, fan_in_fan_out=gpt2)  # GPT-2's are (in, out)
    write_safetensors(Path(folder, "adapter_model.safetensors"), tensors)
    write_json(Path(folder, "adapter_config.json"), values)


def scale(path, rank, values):
    """What the B A of the adapter on the module at `path` counts for, by adapter_config.json."""
    patterns = values.get("alpha_pattern") or {}
    # the first pattern at the end of the path, as peft has it
    own = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", path)), None)
    alpha = patterns.get(own, values.get("lora_alpha", 8))
    if not 0 < alpha < math.inf:
        raise UserError(f"{path} has alpha {alpha!r}: it must be above 0")
    return alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)


def import_peft(folder, layers, gpt2):
    """(settings of `lora.add_lora`, tensors by our names) of an adapter in peft's files. UserError
    names the first field or tensor that we would not compute: none is ever passed over.

    One of our adapters has one rank and one alpha: thinner ones get zeros, other scales go into B.
    On the c_attn of a GPT-2, q, k and v share A, and each takes its third of B.
    """
    where, modules = Path(folder, "adapter_config.json"), modules_of(layers, gpt2)
    values, file = read_json(where), Safetensors(Path(folder, "adapter_model.safetensors"))
    told = {"peft_type": str(values.get("peft_type"))}  # first, before what only others have
    for name, value in ({"peft_type": None} | values | told).items():
        known = name in (IGNORED + " " + READ).split()
        if value and not known and value not in SUPPORTED.get(name, ()):
            raise UserError(f"{where}: {name} = {value!r} is not implemented here")
    tensors, expected, ranks = {name: file[name] for name in file.entries}, {}, {}
    for path, names in modules.items():
        first, second = peft_key(path, "A"), peft_key(path, "B")
        if first in tensors:
            ranks[path] = tensors[first].shape[:1].numel()
            expected |= adapter_shapes(ranks[path], [layers[n] for n in names], first, second)
    if problem := fit_error(expected, tensors):
        raise UserError(f"{file.path} does not fit: {problem}")
    if not min(ranks.values(), default=0):
        raise UserError(f"{file.path} holds no adapter, or one of rank 0")
    dropout = values.get("lora_dropout") or 0.0
    try:
        scales = {path: scale(path, rank, values) for path, rank in ranks.items()}
        if not 0 <= dropout < 1:
            raise UserError(f"{where}: lora_dropout {dropout} is not in [0, 1)")
    except (TypeError, AttributeError, re.error) as e:
        raise UserError(f"{where} has a field that makes no sense: {e}") from e
    top, most = max(ranks.values()), max(scales.values())
    state = {}
    for path, rank in ranks.items():
        a, b = (tensors[peft_key(path, half)].float() for half in "AB")
        a, b = F.pad(a, (0, 0, 0, top - rank)), F.pad(b * (scales[path] / most), (0, top - rank))
        pieces = b.split([layers[name][0] for name in modules[path]])
        for name, piece in zip(modules[path], pieces):
            state |= {f"{name}.a": a.clone(), f"{name}.b": piece.clone()}
    targets = ",".join(shortest([name for path in ranks for name in modules[path]], layers))
    return dict(targets=targets, rank=top, alpha=most * top, dropout=dropout), state
