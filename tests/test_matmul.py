"""data/matmul.py: products by timing."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.cli import UserError
from data.matmul import (
    FLOAT_PRODUCTS,
    INT8_PRODUCTS,
    by_int8_dynamic,
    by_linear,
    fastest,
    int8_scale,
    timing_lines,
)


def rounding(step, values):
    """The error of rounding to multiples of `step`, relative to the size of the values."""
    return step / 12**0.5 / values.square().mean(-1).sqrt()


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("way", INT8_PRODUCTS)
def test_int8_errs_by_what_its_bits_leave(way, rows, vnni, monkeypatch):
    if vnni and not torch.cpu._is_vnni_supported():
        pytest.skip("this CPU has no VNNI: pairs of products of 8 bits do not fit its 16")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    torch.manual_seed(0)
    weight = torch.randn(512, 256) * torch.logspace(-3, 0, 512)[:, None]  # one scale would not do
    x = torch.randn(rows, 256) * torch.logspace(-2, 1, rows)[:, None]
    try:
        found = way(weight, rows)(x)
    except (RuntimeError, AttributeError) as e:
        pytest.skip(f"not on this machine: {e}")
    if way is by_int8_dynamic:
        same = x / x.abs().amax(-1, keepdim=True)
        bits = 8 if vnni else 7
        of_x = rounding((same.max() - same.min()) / (2**bits - 1), same)  # (rows,)
    else:
        of_x = 2.0**-9  # bf16 has 8 bits, the sign not counted
    of_weight = rounding(int8_scale(weight), weight)  # (512,)
    exact = x @ weight.T
    for part in (slice(0, 256), slice(256, 512)):  # small outputs as exactly as large ones
        off = ((found - exact)[:, part].norm(dim=1) / exact[:, part].norm(dim=1)).square()
        bound = of_weight[part].square().mean() + torch.as_tensor(of_x).square()
        assert (off < 1.5**2 * bound).all() and (off > 0.5**2 * bound).all()
    assert found.shape == exact.shape and found.dtype == x.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("way", FLOAT_PRODUCTS)
def test_ways_to_multiply_give_the_product(way, rows, dtype):
    torch.manual_seed(0)
    weight, few = torch.randn(640, 320).to(dtype), torch.randn(rows, 320).to(dtype)
    try:
        work = way(weight, rows)
        work(few)
    except (RuntimeError, AttributeError) as e:
        pytest.skip(f"not on this machine: {e}")
    for x in (few, torch.randn(70, 320).to(dtype)):  # a prompt has more rows
        exact = x.double() @ weight.double().T
        bound = 4 * torch.finfo(dtype).eps * exact.norm()
        assert (work(x).double() - exact).norm() < bound and work(x).dtype == dtype


def test_the_fastest_way_that_works_is_taken(monkeypatch):
    def broken(weight, rows):
        raise RuntimeError("not on this CPU")

    def slow(weight, rows):
        return lambda x: torch.stack([x @ weight.T] * 200)[0]

    weight = torch.randn(1024, 300)
    timings = {}
    monkeypatch.setattr("data.matmul.timings", timings)
    monkeypatch.setattr("data.matmul.FLOAT_PRODUCTS", (broken, slow, by_linear))
    torch.testing.assert_close(fastest(weight, 1, False)(torch.eye(300)), weight.T)
    [seconds] = timings.values()
    assert min(seconds, key=seconds.get) is by_linear and broken not in seconds
    assert "linear" in next(timing_lines())
    fastest(weight[:8], 1, False)  # so small that nothing is timed but the first that works
    assert list(list(timings.values())[1]) == [slow]
    monkeypatch.setattr("data.matmul.INT8_PRODUCTS", (broken,))
    with pytest.raises(UserError, match="int8 cannot be computed on this machine: not on this"):
        fastest(weight, 1, True)
