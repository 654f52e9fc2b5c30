"""data/matmul.py: each layout computes the product, and the fastest that works is chosen."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import matmul
from data.cli import UserError
from data.matmul import FLOAT_LINEARS, INT8_LINEARS, FastLinear, Int8Linear, fastest, int8_scale


def rounding(step, values):
    """The error of rounding to multiples of `step`, relative to the size of the values."""
    return step / 12**0.5 / values.square().mean(-1).sqrt()


def build_or_skip(cls, weight, rows, x):
    """A layer of that class that can compute x, or a skip with the reason."""
    try:
        layer = cls(weight, rows=rows)
        layer(x)
        return layer
    except (RuntimeError, AttributeError) as e:
        pytest.skip(f"not on this machine: {e}")


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("cls", INT8_LINEARS)
def test_int8_errs_by_what_its_bits_leave(cls, rows, vnni, monkeypatch):
    if vnni and not torch.cpu._is_vnni_supported():
        pytest.skip("this CPU has no VNNI: pairs of products of 8 bits do not fit its 16")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    torch.manual_seed(0)
    weight = torch.randn(512, 256) * torch.logspace(-3, 0, 512)[:, None]  # one scale would not do
    x = torch.randn(rows, 256) * torch.logspace(-2, 1, rows)[:, None]
    y = build_or_skip(cls, weight, rows, x)(x)
    x_error = 2.0**-9  # bf16 has 8 bits, the sign not counted
    if cls is Int8Linear:
        unit = x / x.abs().amax(-1, keepdim=True)
        x_error = rounding((unit.max() - unit.min()) / (2 ** (8 if vnni else 7) - 1), unit)
    exact, weight_error = x @ weight.T, rounding(int8_scale(weight), weight)  # (512,)
    for half in (slice(0, 256), slice(256, 512)):  # small outputs as exactly as large ones
        error = ((y - exact)[:, half].norm(dim=1) / exact[:, half].norm(dim=1)).square()
        bound = weight_error[half].square().mean() + torch.as_tensor(x_error).square()
        assert (error < 1.5**2 * bound).all() and (error > 0.5**2 * bound).all()
    assert y.shape == exact.shape and y.dtype == x.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("cls", FLOAT_LINEARS)
def test_each_layout_gives_the_product(cls, rows, dtype):
    torch.manual_seed(0)
    weight, few = torch.randn(640, 320).to(dtype), torch.randn(rows, 320).to(dtype)
    layer = build_or_skip(cls, weight, rows, few)
    for x in (few, torch.randn(70, 320).to(dtype)):  # a prompt has more rows
        exact = x.double() @ weight.double().T
        bound = 4 * torch.finfo(dtype).eps * exact.norm()
        assert (layer(x).double() - exact).norm() < bound and layer(x).dtype == dtype


def test_the_fastest_that_works_is_chosen(monkeypatch):
    class Broken(FastLinear):
        def forward(self, x):
            raise RuntimeError("not on this CPU")

    class Slow(FastLinear):
        def forward(self, x):
            return torch.stack([torch.nn.functional.linear(x, self.weight)] * 200)[0]

    linear, timings = torch.nn.Linear(300, 1024), {}
    monkeypatch.setattr(matmul, "timings", timings)
    monkeypatch.setattr(matmul, "FLOAT_LINEARS", (Broken, Slow, FastLinear))
    assert type(fastest([linear], 1, False)) is FastLinear
    assert next(iter(timings.values())).keys() == {Slow, FastLinear}
    assert "FastLinear" in next(matmul.timing_lines())
    small = torch.nn.Linear(300, 8)  # so small that nothing is timed but the first that works
    assert type(fastest([small], 1, False)) is Slow
    monkeypatch.setattr(matmul, "INT8_LINEARS", (Broken,))
    with pytest.raises(UserError, match="int8 cannot be computed on this machine: not on this"):
        fastest([linear], 1, True)
