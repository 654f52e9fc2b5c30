"""Faster Linears for inference on a CPU, by which `make_fast` replaces those of a model.

A new token reads every weight once, so what counts is how they lie in memory. Which layout is best
depends on the CPU, the dtype, the shape and the number of rows: each candidate is timed, and one
that raises because the CPU or this build of torch lacks something is left out.
"""

import math
import time
import warnings
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from data.cli import UserError, is_out_of_memory

# A layout is a function of a weight (out, in) and a bias or None. It stores the weight in its own
# way and returns a function: x (..., in) -> (..., out).


def plain(weight, bias):
    """The weight as nn.Linear has it."""
    return lambda x: F.linear(x, weight, bias)


def transposed(weight, bias):
    """The weight as (in, out)."""
    weight = weight.t().contiguous()
    view = weight.t()  # (out, in) again, for one operation with the bias
    return lambda x: x @ weight if bias is None else F.linear(x, view, bias)


def packed(weight, bias):
    """The weight in the layout that oneDNN prefers on this CPU for several rows. The layout for one
    row took 1.4 times as long, even with one row (fp32, AMD EPYC 9005)."""
    if not torch.backends.mkldnn.enabled:
        raise RuntimeError("oneDNN is switched off")
    weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def int8(weight, bias):
    """Weights and x in 8 bits, with a scale for each output and for each row of x. The scales of x
    are computed at each call; x is float32."""
    n_in = weight.shape[1]
    scale = weight.float().abs().amax(1).clamp(min=1e-12) / 127  # the largest weight becomes 127
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch recommends another package for this
        zero = torch.zeros(len(scale), dtype=torch.long)
        codes = torch.quantize_per_channel(weight.float(), scale.double(), zero, 0, torch.qint8)
    weight = torch.ops.quantized.linear_prepack(codes, bias)
    product = torch.ops.quantized.linear_dynamic.default
    # CPUs without VNNI add pairs of products in 16 bits; with 7 bits for x they fit
    reduced = not torch.cpu._is_vnni_supported()

    def forward(x):
        if x.numel() == n_in:
            return product(x, weight, reduced)
        # the operation has one scale for all rows, so bring them to the same size first
        largest = x.abs().amax(-1, keepdim=True).clamp_(min=1e-12)
        y = product(x / largest, weight, reduced)  # (x / largest) @ weight.T + bias
        return y * largest if bias is None else torch.lerp(bias, y, largest)

    return forward


FLOAT_LAYOUTS = (plain, transposed, packed)
INT8_LAYOUTS = (int8,)
SMALL = 1 << 18  # a smaller matrix stays in a core's cache, where its layout hardly matters
TIMED = 1 << 22  # a larger matrix is timed on its first rows, about this many weights
timings = {}  # (shape, dtype, rows, layouts) -> {layout: seconds}, filled once a process


def time_layouts(weight, rows, layouts):
    """{layout: seconds} of the layouts that work here; for a small matrix, of the first alone."""
    x, linears, seconds, error = weight.new_ones(rows, weight.shape[1]), {}, {}, ""
    memory = torch.ones(1 << 23)

    def timed(layout):
        memory.sum()  # 32 MB push the weights out of the caches, as the other layers will
        start = time.perf_counter()
        linears[layout](x)
        return time.perf_counter() - start

    for layout in layouts:
        try:
            linears[layout] = layout(weight[: max(1, TIMED // weight.shape[1])], None)
            linears[layout](x)  # the first call may allocate
            seconds[layout] = timed(layout)
        except (RuntimeError, AttributeError) as e:  # not on this CPU, or not in this torch
            if is_out_of_memory(e):
                raise
            error = str(e).split("\n")[0]
        if seconds and weight.numel() < SMALL:
            return seconds
    if not seconds:
        raise UserError(f"--dtype int8 cannot be computed on this machine: {error}")
    bound = 5 * min(seconds.values()) + 5e-3
    candidates = [layout for layout, s in seconds.items() if s < bound]
    rounds = [[timed(layout) for layout in candidates] for _ in range(3)]
    return dict(zip(candidates, map(min, *rounds)))


def fastest(layers, rows, layouts):
    """A function that computes the concatenated outputs of the nn.Linears `layers`. The chosen
    layout minimises the product of the times for one row and for `rows`, because a server with many
    slots often writes a single text."""
    weight = torch.cat([layer.weight.detach() for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
    seconds = []
    for n in {1, rows}:
        key = tuple(weight.shape), weight.dtype, n, layouts
        if key not in timings:
            timings[key] = time_layouts(weight, n, layouts)
        seconds.append(timings[key])
    best = min(layouts, key=lambda layout: math.prod(s.get(layout, math.inf) for s in seconds))
    return best(weight, bias)


def joint(layers, rows, layouts):
    """A function for each of several nn.Linears of the same input, whose outputs one product
    computes: the first that is called leaves in `outputs` what the others will take."""
    linear, sizes, outputs = fastest(layers, rows, layouts), [m.out_features for m in layers], {}

    def forward(index, x):
        if outputs.get("x") is not x or index not in outputs:
            outputs.update(enumerate(linear(x).split(sizes, dim=-1)), x=x)
        y = outputs.pop(index)
        if len(outputs) == 1:  # all are taken: x need not be kept
            outputs.clear()
        return y

    return [partial(forward, index) for index in range(len(layers))]


JOINT = (("q", "k", "v"), ("gate", "up"))  # siblings with the same input


def make_fast(model, rows=1, int8=False):
    """Replace the model's nn.Linears, in place, with the functions that are fastest for `rows` rows
    of x; with `int8` their weights have 8 bits. From then on the model can only be evaluated."""
    layouts = INT8_LAYOUTS if int8 else FLOAT_LAYOUTS
    for parent in list(model.modules()):
        linears = {n: m for n, m in parent.named_children() if type(m) is nn.Linear}
        linears.pop("router", None)  # it is small, and rounded it would choose other experts
        functions = {}
        for names in JOINT:
            if set(names) <= set(linears):
                functions |= zip(names, joint([linears.pop(n) for n in names], rows, layouts))
        functions |= {n: fastest([m], rows, layouts) for n, m in linears.items()}
        for name, function in functions.items():
            delattr(parent, name)
            setattr(parent, name, function)
    for module in model.modules():
        if module is not model:  # other code reads `model.embed.weight`
            vars(module).update({name: direct(m) for name, m in module.named_children()})


def direct(module):
    """A function that computes module(x) without the overhead of nn.Module.__call__, and for a norm
    without that of torch.nn.functional. For a ModuleList, a list of such functions."""
    if type(module) is nn.ModuleList:
        return [direct(m) for m in module]
    if type(module) is nn.LayerNorm:
        shape, weight, bias, eps = module.normalized_shape, module.weight, module.bias, module.eps
        return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
    if type(module) is nn.RMSNorm:
        shape, weight, eps = module.normalized_shape, module.weight, module.eps
        return lambda x: torch.rms_norm(x, shape, weight, eps)
    return module.forward
