"""LoRA adapters and quantized layers: fine-tune a large model in little memory.

    python lora.py merge --ckpt out/stdlib --adapter out/chat --out out/merged
    python lora.py export --ckpt gpt2 --adapter out/style --out peft/style     for peft

finetune.py trains adapters (--lora_rank, --quantize). Both of the following replace the Linear
layers of an existing model, one by one:

    LoRA       y = W x  +  alpha / rank * B (A x)    W is frozen, the low-rank A and B are trained
    quantized  y = dequantize(codes, scales) x       W takes 4 or 8 bits per weight instead of 32

Together they are QLoRA. LoRA works on any module with nn.Linear, quantization on layers in TARGETS.
"""

import contextlib
import hashlib
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model as lm
from data.cli import Parser, UserError, run_cli
from data.download import is_hub_name
from data.hf_config import config_to_hf
from data.hf_weights import write_peft
from data.machine import shard_like
from data.tensors import fit_error

# --------------------------------------------------------------------------------------------
# Quantization: a frozen Linear whose weights are codes of 4 or 8 bits
# --------------------------------------------------------------------------------------------

# The 16 values of NormalFloat4 (QLoRA, Dettmers et al. 2023, appendix E): quantiles of a normal
# distribution, as weights are roughly normal, scaled to [-1, 1] and with an exact zero.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share a scale of their own (double quantization, section 3)


def blocks_of(x, size):
    """x flattened and cut into rows of `size`; the last row is padded with zeros."""
    return F.pad(x.flatten(), (0, -x.numel() % size)).view(-1, size)


def quantize_int8(x, size=BLOCK):
    """Codes (blocks, size) int8 and scales (blocks, 1) with x ~ codes * scales."""
    blocks = blocks_of(x, size)
    scales = blocks.abs().amax(dim=1, keepdim=True) / 127
    return torch.round(blocks / scales.clamp(min=1e-30)).to(torch.int8), scales


def quantize_nf4(weight):
    """Codes (blocks, 32) uint8, two per byte, the first in the high bits; scales (blocks, 1)."""
    blocks = blocks_of(weight, BLOCK)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(NF4, device=weight.device)
    # the nearest level: the borders lie half way between neighbours
    codes = torch.bucketize(blocks / absmax.clamp(min=1e-30), (levels[1:] + levels[:-1]) / 2)
    return (codes[:, 0::2] << 4 | codes[:, 1::2]).to(torch.uint8), absmax


def dequantize(buffers, rows, columns):
    """The weight (rows, columns), float32, of a QuantLinear with these `buffers`."""
    codes, scale_mean, scale_codes, scale_scales, *pairs = buffers
    scales = (scale_codes * scale_scales).view(-1)[: len(codes), None] + scale_mean
    if pairs:
        pairs = pairs[0].index_select(0, codes.view(-1).int())
        values = pairs.view(torch.float32).view(-1, BLOCK).mul_(scales)
    else:
        values = codes * scales
    return values.view(-1)[: rows * columns].view(rows, columns)


# An operation that is opaque to autograd and torch.compile: otherwise they would keep a
# dequantized copy of every layer from the forward pass to the backward pass.
@torch.library.custom_op("scratchlm::quantized_product", mutates_args=())
def quantized_product(
    x: Tensor, buffers: list[Tensor], bias: Tensor | None, rows: int, columns: int, transpose: bool
) -> Tensor:
    """x @ weight.T + bias if `transpose`, else x @ weight, for the weight of `dequantize`."""
    weight = dequantize(buffers, rows, columns).to(x.dtype)
    return F.linear(x, weight, bias) if transpose else x @ weight


@quantized_product.register_fake
def _(x, buffers, bias, rows, columns, transpose):
    return x.new_empty(*x.shape[:-1], rows if transpose else columns)


def _setup_context(ctx, inputs, output):
    _, buffers, _, *ctx.sizes, _ = inputs
    ctx.save_for_backward(*buffers)


@partial(quantized_product.register_autograd, setup_context=_setup_context)
def _(ctx, grad):
    buffers = list(ctx.saved_tensors)
    grad = quantized_product(grad, buffers, None, *ctx.sizes, False)
    return grad, [None] * len(buffers), None, None, None, None


class QuantLinear(nn.Module):
    """A frozen Linear in `int8` or `nf4`, dequantized whenever it is used. Each block of 64 weights
    has a scale; scales minus their mean are stored in int8, too: 8.13 or 4.13 bits per weight."""

    def __init__(self, linear, kind):
        super().__init__()
        self.kind = kind
        self.out_features, self.in_features = linear.weight.shape
        weight = linear.weight.detach().float()
        codes, scales = quantize_nf4(weight) if kind == "nf4" else quantize_int8(weight)
        self.codes, self.scale_mean = nn.Buffer(codes), nn.Buffer(scales.mean())
        scale_codes, scale_scales = quantize_int8(scales - self.scale_mean, SCALE_BLOCK)
        self.scale_codes, self.scale_scales = nn.Buffer(scale_codes), nn.Buffer(scale_scales)
        if kind == "nf4":
            # the two floats that a byte stands for, (256,), looked up as one long integer: that
            # takes a fifth of the time of looking up rows of two
            levels = torch.tensor(NF4, device=weight.device)
            pairs = torch.cartesian_prod(levels, levels).view(torch.int64)[:, 0]
            self.pairs = nn.Buffer(pairs.contiguous(), persistent=False)
        self.bias = linear.requires_grad_(False).bias

    @property
    def weight(self):
        """The dequantized weight (out, in), float32."""
        return dequantize([*self.buffers()], self.out_features, self.in_features)

    def forward(self, x):
        device = x.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        bias = None if self.bias is None else self.bias.to(low)
        sizes = self.out_features, self.in_features
        return quantized_product(x.to(low), [*self.buffers()], bias, *sizes, True)


def quantize(model, kind, device="cpu"):
    """Replace the Linears of the blocks with frozen, quantized ones and return their names. They go
    to `device` one by one, so that it never holds the full weights; the rest becomes float32."""
    layers = find_layers(model, "all", nn.Linear)
    for name, linear in layers.items():
        model.set_submodule(name, QuantLinear(linear.to(device), kind))
    model.float()
    return list(layers)


# --------------------------------------------------------------------------------------------
# Adapters
# --------------------------------------------------------------------------------------------

# Values of --lora_targets: a group, or our or transformers' names of layers, separated by commas.
TARGETS = {"attention": ("q", "k", "v", "out"), "mlp": ("up", "gate", "down")}
TARGETS["all"] = TARGETS["attention"] + TARGETS["mlp"]


def find_layers(model, targets, kinds):
    """{full name: layer} of the layers of `kinds` that `targets` names, each by its last or its
    full name. UserError if a name matches none of them."""
    theirs = (name.removesuffix("_proj") for name in re.findall(r"[\w.]+", targets))
    wanted = set(TARGETS.get(targets) or ("out" if name == "o" else name for name in theirs))
    bases = {layer.base for layer in adapted(model).values()}  # these are not targets themselves
    layers = {n: m for n, m in model.named_modules() if isinstance(m, kinds) and m not in bases}
    names = {n.rpartition(".")[2] for n in layers}
    unknown = wanted - names - set(layers)
    layers = {n: m for n, m in layers.items() if wanted & {n, n.rpartition(".")[2]}}
    if not layers or (unknown and targets not in TARGETS):
        advice = f"choose {', '.join(TARGETS)}, or layers by name: {', '.join(sorted(names))}"
        raise UserError(f"no layer is called {', '.join(sorted(unknown))}: {advice}")
    return layers


class Named(nn.ParameterDict):
    """Parameters under any name: torch refuses names with a dot, and those of methods (`copy`)."""

    def _key_to_attr(self, key):
        return "name_" + key.replace("%", "%25").replace(".", "%2E")


class LoRALinear(nn.Module):
    """base(x) + alpha / rank * B(A(dropout(x))) for the active adapter, or base(x). A (rank, in)
    starts random and B (out, rank) at zero, so a new adapter changes nothing (Hu et al. 2021)."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = Named(), Named()
        self.scale, self.dropout, self.active = {}, {}, None

    def add(self, name, rank, alpha, dropout):
        """Add an adapter, not active yet."""
        device = next(iter(self.base.state_dict().values())).device
        a = nn.Linear(self.base.in_features, rank, bias=False, device=device)
        self.a[name] = a.weight
        self.b[name] = nn.Parameter(torch.zeros(self.base.out_features, rank, device=device))
        self.scale[name], self.dropout[name] = alpha / rank, dropout

    @property
    def weight(self):
        """The weight (out, in), with the active adapter merged in."""
        if (n := self.active) is None:
            return self.base.weight
        return self.base.weight + self.scale[n] * (self.b[n] @ self.a[n])

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        y, n = self.base(x), self.active
        if n is None:
            return y
        thin = F.linear(F.dropout(x, self.dropout[n], self.training), self.a[n].to(x.dtype))
        return y + self.scale[n] * F.linear(thin, self.b[n].to(thin.dtype))


def add_lora(
    model, targets="attention", rank=8, alpha=16, dropout=0.0, name="default", modules_to_save=()
):
    """Add adapters to the target layers, make them active, and freeze everything else; returns the
    layers' names. A second call with another `name` adds a second adapter over the same base.

    targets: attention, mlp, all, or names separated by commas. `modules_to_save` (peft's term) are
    trained in full beside the adapter and saved with it, such as the tables of a base that lacks
    special tokens. UserError if no layer matches or one shares its weight, as a tied head does.

    >>> add_lora(nn.Sequential(nn.Linear(4, 4)), "0", rank=2)
    ['0']
    """
    layers = find_layers(model, targets, (nn.Linear, QuantLinear, LoRALinear))
    ids = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    for full, layer in layers.items():
        if isinstance(layer, nn.Linear) and ids.count(id(layer.weight)) > 1:
            raise UserError(f"{full} shares its weight (a tied head): it cannot have an adapter")
    model.requires_grad_(False)
    for full, layer in layers.items():
        if not isinstance(layer, LoRALinear):
            layer = LoRALinear(layer).train(layer.training)
            model.set_submodule(full, layer)
        layer.add(name, rank, alpha, dropout)
    if not hasattr(model, "saved_tables"):
        model.active_adapter, model.saved_tables = None, {None: {}}  # None: the base's own tables
    base, tables = model.saved_tables[None], model.saved_tables.setdefault(name, {})
    for full, parameter in model.named_parameters():
        if full.rpartition(".")[0] in modules_to_save:
            tables[full] = base.setdefault(full, parameter.detach().clone())
            parameter.requires_grad_(True)
    set_adapter(model, name)
    return list(layers)


def adapted(model):
    """{full name: LoRALinear} of a model."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def hold_frozen(model, dtype):
    """Convert the weights of frozen Linears to `dtype`, that of autocast: it would cast each of
    them in every pass, and autograd would keep the copies."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}  # of tied heads
    for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
        if not layer.weight.requires_grad and id(layer.weight) not in tables:
            layer.to(dtype)


@torch.no_grad()
def set_adapter(model, name=None):
    """Activate the adapter `name`, or none if it is None. Its `modules_to_save` are copied into the
    model, and what the previous adapter learned there is kept for its return."""
    if name not in (None, *adapter_names(model)):
        listed = ", ".join(adapter_names(model)) or "none"
        raise UserError(f"there is no adapter {name}; the model has {listed}")
    for layer in adapted(model).values():
        layer.active = name if name in layer.a else None
    if (before := getattr(model, "active_adapter", None)) != name:
        saved, parameters = model.saved_tables, base_parameters(model)
        if before is not None:
            saved[before] = {n: parameters[n].detach().clone() for n in saved[before]}
        for n, table in (saved[None] | saved[name]).items():
            parameters[n].copy_(shard_like(table.to(parameters[n].device), parameters[n]))
    model.active_adapter = name


def adapter_names(model):
    """The names of a model's adapters."""
    return [name for name in getattr(model, "saved_tables", {}) if name is not None]


def base_parameters(model):
    """{name: parameter} of a model, under the names that its base has without adapters."""
    return {n.replace(".base.", "."): p for n, p in model.named_parameters()}


@contextlib.contextmanager
def disable_adapter(model):
    """Within the `with` block no adapter is active (this is the reference model of DPO)."""
    name = getattr(model, "active_adapter", None)
    set_adapter(model)
    try:
        yield
    finally:
        set_adapter(model, name)


# --------------------------------------------------------------------------------------------
# Files: an adapter alone, merged into its base, or written for peft
# --------------------------------------------------------------------------------------------


def fingerprint(state):
    """sha256 over the names and bytes of a state dict, by which an adapter identifies its base."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def adapter_parameters(model):
    """{name: parameter} of the active adapter: the layers' a and b, and the `modules_to_save`."""
    name, base, parameters = model.active_adapter, base_parameters(model), {}
    for full, layer in adapted(model).items():
        if name in layer.a:
            parameters |= {f"{full}.a": layer.a[name], f"{full}.b": layer.b[name]}
    return parameters | {n: base[n] for n in model.saved_tables[name]}


def adapter_state(model):
    """{name: tensor} of the active adapter."""
    return {n: p.detach() for n, p in adapter_parameters(model).items()}


@torch.no_grad()
def load_adapter(model, content, name="default"):
    """Make the adapter `name` active and copy the tensors of its checkpoint into it."""
    set_adapter(model, name)
    parameters, state = adapter_parameters(model), content["model"]
    if problem := fit_error(parameters, state):
        raise UserError(f"adapter {name} does not fit this base: {problem}")
    for n, parameter in parameters.items():
        parameter.copy_(shard_like(state[n], parameter))


def load_adapted(base, adapters, where="the base"):
    """The model of a base checkpoint's content with {name: content of an adapter checkpoint} over
    it, the first one active. UserError if an adapter belongs to another base."""
    if whole := [name for name, content in adapters.items() if "adapter" not in content]:
        raise UserError(f"{whole[0]} is a whole model, not an adapter: use it as --ckpt")
    if "adapter" in base:
        raise UserError(f"{where} is an adapter: name its base, {base['adapter']['base']}, instead")
    infos = {name: content["adapter"] for name, content in adapters.items()}
    quantized, *others = dict.fromkeys(info["quantize"] for info in infos.values())
    if others:
        kinds = f"{quantized or 'none'} and {others[0] or 'none'}"
        raise UserError(f"adapters with --quantize {kinds} cannot share a base")
    model = lm.model_from_checkpoint(base, dtype=None if quantized else torch.float32, where=where)
    sha256 = fingerprint(base["model"])
    for name, info in infos.items():
        if info["base_sha256"] != sha256:
            but = f"{where} is another model, or has it merged in already"
            raise UserError(f"adapter {name} was trained over {info['base']}; {but}")
        lm.grow_vocabulary(model, adapters[name]["config"]["vocab_size"], info["base_vocab"])
    if quantized:
        quantize(model, quantized)
    for name, info in infos.items():
        settings = {k: info[k] for k in ("targets", "rank", "alpha", "dropout", "modules_to_save")}
        add_lora(model, **settings, name=name)
        load_adapter(model, adapters[name], name)
    set_adapter(model, next(iter(adapters)))
    return model.eval()


@torch.no_grad()
def merge(model):
    """Replace each adapted layer with a plain Linear, W + alpha / rank * B A of the active adapter,
    in float32, and each quantized layer with a plain one. Returns their names."""
    model.eval()  # dropout cannot be merged
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (LoRALinear, QuantLinear))}
    # the quantized base of an adapted layer is merged with its adapter
    layers = {n: m for n, m in layers.items() if n.rpartition(".")[0] not in layers}
    for name, layer in layers.items():
        merged = nn.Linear(*layer.weight.T.shape, bias=False, device="meta")
        merged.weight, merged.bias = nn.Parameter(layer.weight.float()), layer.bias
        model.set_submodule(name, merged)
    return list(layers)


@torch.no_grad()
def merge_and_save(model, tokenizer, path):
    """Merge the active adapter and write a checkpoint like any other, verified by its logits."""
    torch.manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (2, min(64, model.config.context)))
    before = model(ids)
    names = merge(model)
    difference = float((model(ids) - before).abs().max() / before.abs().max())
    if not difference < 1e-3:
        raise UserError(f"merging changed the logits by a relative {difference:.1e}: not saved")
    content = {"config": asdict(model.config), "model": dict(model.state_dict())}
    lm.save_checkpoint(path, content | {"tokenizer": tokenizer})
    print(f"{path}: {len(names)} layers merged, relative difference of the logits {difference:.1e}")


# --------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------


def build_parser():
    p = Parser(description="Merge or export LoRA adapters, which finetune.py trains.")
    p.add_argument("command", choices=("merge", "export"), help="merge: write base and adapter as "
                   "one checkpoint; export: write the adapter for Hugging Face's peft")  # fmt: skip
    p.add_argument("--ckpt", required=True, help=f"the base: {lm.WHAT_CKPT}")
    p.add_argument("--adapter", required=True, help="the adapter: a run's folder or its file")
    p.add_argument("--out", "--export_dir", required=True,
                   help="folder to write, or for merge a .pt file")  # fmt: skip
    return p


def main(argv=None):
    args = build_parser().parse_args(argv)
    path = Path(args.out)
    if args.command == "export" or path.suffix != ".pt":
        path /= "best.pt" if args.command == "merge" else "adapter_config.json"
    if path.exists():
        raise UserError(f"{path} exists: name another --out")
    base, content = lm.load_checkpoint(args.ckpt), lm.load_checkpoint(args.adapter)
    model = load_adapted(base, {args.adapter: content}, args.ckpt)  # raises if not their base
    if args.command == "merge":
        return merge_and_save(model, content["tokenizer"], path)
    values, config = config_to_hf(lm.complete(base["config"]), lm.complete)
    in_transformers = is_hub_name(args.ckpt) or Path(args.ckpt, "config.json").exists()
    where = args.ckpt if in_transformers else None
    write_peft(content, base["model"], values["model_type"], config, path.parent, where)
    print(f"{path.parent}: an adapter for peft; its base is {args.ckpt} as model.py exports it")


if __name__ == "__main__":
    run_cli(main)
