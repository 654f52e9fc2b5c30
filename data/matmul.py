"""Ways to multiply by a weight matrix on a CPU, and the choice of the fastest by timing."""
import time
import warnings

import torch
import torch.nn.functional as F

from data.cli import UserError, is_out_of_memory

# Ways to compute x (N, in) @ weight (out, in).T: each prepares the weight for `rows` rows of x and
# returns x -> product. Which one is fastest depends on the CPU, the dtype and the shape, and some
# raise where the CPU or this build of torch lacks something: `fastest` tries and times them.


def by_linear(weight, rows):
    """F.linear with the weight unchanged."""
    return lambda x: F.linear(x, weight)


def by_transposed(weight, rows):
    """Stored the other way round, as (in, out)."""
    turned = weight.t().contiguous()
    return lambda x: x @ turned


def by_halves(weight, rows):
    """torch computes a product with one row on one core; two with half of the inputs use two."""
    if rows > 1 or weight.shape[1] % 2:
        raise RuntimeError("for one row and an even number of inputs")
    turned, half = weight.t().contiguous(), weight.shape[1] // 2
    pair = turned.view(2, half, -1)
    return lambda x: x @ turned if len(x) > 1 else torch.bmm(x.view(2, 1, half), pair).sum(0)


def by_onednn(weight, rows):
    """In oneDNN's own layout for this CPU and so many rows."""
    if not torch.backends.mkldnn.enabled:
        raise RuntimeError("oneDNN is switched off")
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def int8_scale(weight):
    """A scale for each output, (out,), by which its largest weight becomes 127."""
    return weight.float().abs().amax(1).clamp(min=1e-12) / 127


def by_int8_dynamic(weight, rows):
    """Weights and x in 8 bits, which multiply and add up exactly: weights with a scale for each
    output, x, as it comes, with one for each row."""
    scale, zero = int8_scale(weight).double(), torch.zeros(len(weight), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch recommends another package for this
        whole = torch.quantize_per_channel(weight.float(), scale, zero, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(whole, None)
    # CPUs without VNNI add pairs of products in 16 bits: x gets 7 bits there, so that they fit
    reduced = not torch.cpu._is_vnni_supported()

    def times(x):
        if len(x) == 1:
            return torch.ops.quantized.linear_dynamic(x.float(), packed, reduced).to(x.dtype)
        # the operation has one scale for all rows: make them alike first
        top = x.abs().amax(-1, keepdim=True).clamp(min=1e-12)
        y = torch.ops.quantized.linear_dynamic((x / top).float(), packed, reduced)
        return y.to(x.dtype) * top

    return times


def by_int8_weights(weight, rows):
    """Only the weights in 8 bits; x in bf16, sums in fp32."""
    scale = int8_scale(weight)
    whole, scale = (weight / scale[:, None]).round().to(torch.int8), scale.bfloat16()
    return lambda x: torch._weight_int8pack_mm(x.bfloat16(), whole, scale).to(x.dtype)


FLOAT_PRODUCTS = (by_transposed, by_linear, by_halves, by_onednn)
INT8_PRODUCTS = (by_int8_dynamic, by_int8_weights)
SMALL = 1 << 18  # a matrix of fewer weights stays in a core's cache: its layout hardly matters
TIMED = 1 << 22  # of a larger matrix only so many weights are timed
timings = {}  # (shape, dtype, rows, int8) -> {way: seconds}, filled once a process


def fastest(weight, rows, int8):
    """x (N, in) -> x @ weight.T by what is fastest here for `rows` rows. UserError if no way to
    compute int8 exists here."""
    if weight.device.type != "cpu":
        return by_linear(weight, rows)
    key = tuple(weight.shape), weight.dtype, rows, int8
    if key not in timings:
        timings[key] = time_products(weight, rows, INT8_PRODUCTS if int8 else FLOAT_PRODUCTS)
    return min(timings[key], key=timings[key].get)(weight, rows)


def time_products(weight, rows, ways):
    """{way: seconds} of those `ways` that do not raise; of the first alone for a small matrix."""
    part, few = weight[: max(1, TIMED // weight.shape[1])], weight[:64]
    x = torch.ones(rows, weight.shape[1], dtype=weight.dtype)
    works, seconds, reason = {}, {}, ""
    for way in ways:
        try:
            works[way] = way(few, rows), way(part, rows)
            seconds[way] = [timed(work, x) for work in works[way]][1]
        except (RuntimeError, AttributeError) as e:  # not on this CPU, or in this torch
            if is_out_of_memory(e):
                raise
            reason = str(e).split("\n")[0]
            continue
        if weight.numel() < SMALL:
            return seconds
    if not seconds:
        raise UserError(f"--dtype int8 cannot be computed on this machine: {reason}")
    best, memory = min(seconds.values()), torch.ones(1 << 23)
    seconds = {way: s for way, s in seconds.items() if s < 5 * best + 5e-3}  # drop the slowest
    for turn in range(3):
        for way in seconds:
            memory.sum()  # 32 MB push the weights out of the caches, as the other layers will do,
            works[way][0](x)  # but the code of each way stays in them
            s = timed(works[way][1], x)
            seconds[way] = min(s, seconds[way]) if turn else s
    return seconds


def timed(work, x):
    """Seconds that work(x) takes."""
    start = time.perf_counter()
    work(x)
    return time.perf_counter() - start


def timing_lines():
    """What `fastest` has chosen for which matrix, and the times, the best first: a line each."""
    for (shape, dtype, rows, int8), seconds in timings.items():
        order = sorted(seconds.items(), key=lambda item: item[1])
        each = ", ".join(f"{way.__name__.removeprefix('by_')} {s * 1e6:.0f}" for way, s in order)
        kind = "int8" if int8 else str(dtype).removeprefix("torch.")
        yield f"{shape[0]} x {shape[1]} {kind}, {rows} row(s), microseconds: {each}"


def product(layers, int8=False, rows=1, scale=1.0):
    """x (N, in) -> (N, out) as the Linears `layers` give it, their outputs side by side, times
    `scale`. Their weights are taken out of them and laid out for `rows` rows of x."""
    weight = torch.cat([layer.weight.detach() for layer in layers]).mul_(scale)
    bias = None
    if layers[0].bias is not None:
        bias = torch.cat([layer.bias.detach() for layer in layers]).mul_(scale)
    for layer in layers:
        layer.weight = None
    times = fastest(weight, rows, int8)
    return times if bias is None else lambda x: times(x) + bias
