"""Faster Linears for inference on a CPU: `make_fast` swaps them into a model, from outside.

A new token reads every weight once, so what counts is how they lie in memory. Which layout is best
depends on the CPU, the dtype, the shape and the number of rows: each candidate is timed, and one
that raises because the CPU or this build of torch lacks something is left out.
"""
import math
import time
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from data.cli import UserError, is_out_of_memory


class FastLinear(nn.Module):
    """x (..., in) @ weight (out, in).T + bias. `rows` is the number of rows that x mostly has."""

    def __init__(self, weight, bias=None, rows=1):
        super().__init__()
        self.in_features, self.bias = weight.shape[1], bias
        self._pack(weight, rows)

    def _pack(self, weight, rows):
        """Store the weight in the layout of this class."""
        self.weight = weight

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)

    def add_bias(self, y):
        """y + bias, if there is one."""
        return y if self.bias is None else y + self.bias


class TransposedLinear(FastLinear):
    """The weight as (in, out)."""

    def _pack(self, weight, rows):
        self.weight = weight.t().contiguous()

    def forward(self, x):
        return self.add_bias(x @ self.weight)


class HalvedLinear(TransposedLinear):
    """One row as two products of half the inputs: torch computes a single one on one core only."""

    def _pack(self, weight, rows):
        if rows > 1 or self.in_features % 2:
            raise RuntimeError("for one row and an even number of inputs")
        super()._pack(weight, rows)
        self.halves = self.weight.view(2, self.in_features // 2, -1)

    def forward(self, x):
        if x.numel() > self.in_features:
            return super().forward(x)
        y = torch.bmm(x.reshape(2, 1, -1), self.halves).sum(0)
        return self.add_bias(y.view(*x.shape[:-1], -1))


class PackedLinear(FastLinear):
    """The weight in the layout that oneDNN prefers on this CPU for so many rows."""

    def _pack(self, weight, rows):
        if not torch.backends.mkldnn.enabled:
            raise RuntimeError("oneDNN is switched off")
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def int8_scale(weight):
    """The scale of each output, (out,), by which its largest weight becomes 127."""
    return weight.float().abs().amax(1).clamp(min=1e-12) / 127


class Int8Linear(FastLinear):
    """Weights and x in 8 bits: a scale for each output, and one for each row of x as it comes."""

    def _pack(self, weight, rows):
        scale, zero = int8_scale(weight).double(), torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch recommends another package for this
            codes = torch.quantize_per_channel(weight.float(), scale, zero, 0, torch.qint8)
        self.weight = torch.ops.quantized.linear_prepack(codes, None)
        # CPUs without VNNI add pairs of products in 16 bits; with 7 bits for x they fit
        self.reduced = not torch.cpu._is_vnni_supported()

    def forward(self, x):
        product = torch.ops.quantized.linear_dynamic
        if x.numel() == self.in_features:
            return self.add_bias(product(x.float(), self.weight, self.reduced).to(x.dtype))
        # the operation has one scale for all rows, so bring them to the same size first
        largest = x.abs().amax(-1, keepdim=True).clamp(min=1e-12)
        y = product((x / largest).float(), self.weight, self.reduced).to(x.dtype)
        return self.add_bias(y * largest)


class Int8WeightLinear(FastLinear):
    """Only the weights in 8 bits; x in bf16, sums in fp32."""

    def _pack(self, weight, rows):
        scale = int8_scale(weight)
        self.weight = (weight / scale[:, None]).round().to(torch.int8)
        self.scale = scale.bfloat16()

    def forward(self, x):
        rows = x.bfloat16().reshape(-1, self.in_features)
        y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        return self.add_bias(y.view(*x.shape[:-1], -1).to(x.dtype))


FLOAT_LINEARS = (TransposedLinear, FastLinear, HalvedLinear, PackedLinear)
INT8_LINEARS = (Int8Linear, Int8WeightLinear)
SMALL = 1 << 18  # a smaller matrix stays in a core's cache, where its layout hardly matters
TIMED = 1 << 22  # of a larger one only so many weights are timed
timings = {}  # (shape, dtype, rows, int8) -> {class: seconds}, filled once a process


def time_linears(weight, rows, classes):
    """{class: seconds} of the `classes` that work here, of a small matrix only the first such one.
    UserError if there is none."""
    x, layers, seconds, error = weight.new_ones(rows, weight.shape[1]), {}, {}, ""
    for cls in classes:
        try:
            layer = cls(weight[: max(1, TIMED // weight.shape[1])], rows=rows)
            layer(x)
            layers[cls], seconds[cls] = layer, timed(layer, x)
        except (RuntimeError, AttributeError) as e:  # not on this CPU, or not in this torch
            if is_out_of_memory(e):
                raise
            error = str(e).split("\n")[0]
        if seconds and weight.numel() < SMALL:
            return seconds
    if not seconds:
        raise UserError(f"--dtype int8 cannot be computed on this machine: {error}")
    bound, memory = 5 * min(seconds.values()) + 5e-3, torch.ones(1 << 23)
    seconds = {cls: math.inf for cls, s in seconds.items() if s < bound}
    for _ in range(3):
        for cls in seconds:
            memory.sum()  # 32 MB push the weights out of the caches, as the other layers will
            seconds[cls] = min(seconds[cls], timed(layers[cls], x))
    return seconds


def timed(layer, x):
    """Seconds that layer(x) takes."""
    start = time.perf_counter()
    layer(x)
    return time.perf_counter() - start


def timing_lines():
    """A line for each shape of matrix: the candidates' times, the fastest first."""
    for (shape, dtype, rows, int8), seconds in timings.items():
        order = sorted(seconds.items(), key=lambda item: item[1])
        times = ", ".join(f"{cls.__name__} {s * 1e6:.0f}" for cls, s in order)
        name = "int8" if int8 else str(dtype).removeprefix("torch.")
        yield f"{shape[0]} x {shape[1]} {name}, {rows} row(s), microseconds: {times}"


def fastest(layers, rows, int8):
    """One FastLinear that computes the outputs of the nn.Linears `layers`, side by side."""
    weight = torch.cat([layer.weight.detach() for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
    key = tuple(weight.shape), weight.dtype, rows, int8
    if key not in timings:
        timings[key] = time_linears(weight, rows, INT8_LINEARS if int8 else FLOAT_LINEARS)
    return min(timings[key], key=timings[key].get)(weight, bias, rows)


class JointLinear(nn.Module):
    """One of several Linears of the same input, whose outputs one product computes: the first that
    is called leaves in `outputs`, which they share, what the others will take."""

    def __init__(self, layer, sizes, outputs, index):
        super().__init__()
        self.layer, self.sizes, self.outputs, self.index = layer, sizes, outputs, index

    def forward(self, x):
        if self.outputs.get("x") is not x or self.index not in self.outputs:
            self.outputs.update(enumerate(self.layer(x).split(self.sizes, dim=-1)), x=x)
        y = self.outputs.pop(self.index)
        if len(self.outputs) == 1:  # all are taken: x need not be kept
            self.outputs.clear()
        return y


JOINT = (("q", "k", "v"), ("gate", "up"))  # siblings with the same input


def make_fast(model, rows=1, int8=False):
    """Replace the model's nn.Linears, in place, by the fastest FastLinears for `rows` rows of x; by
    Int8Linears with `int8`. The model can then be evaluated only."""
    for parent in list(model.modules()):
        linears = {n: m for n, m in parent.named_children() if type(m) is nn.Linear}
        for names in JOINT:
            if set(names) <= set(linears):
                layers, outputs = [linears.pop(name) for name in names], {}
                joint, sizes = fastest(layers, rows, int8), [m.out_features for m in layers]
                for i, name in enumerate(names):
                    setattr(parent, name, JointLinear(joint, sizes, outputs, i))
        for name, layer in linears.items():
            setattr(parent, name, fastest([layer], rows, int8))
    for module in model.modules():
        if module is not model:  # `model.embed.weight` is asked for
            vars(module).update({name: direct(m) for name, m in module.named_children()})


def direct(module):
    """What module(x) computes, as a function without the microseconds of nn.Module's own call."""
    if type(module) is nn.LayerNorm:  # nor those of F.layer_norm
        shape, weight, bias, eps = module.normalized_shape, module.weight, module.bias, module.eps
        return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
    return module.forward
