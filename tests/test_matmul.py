"""data/matmul.py: each layout computes the product, the fastest that works is chosen, and a model
made fast writes what it wrote before."""

import argparse
import copy

import pytest
import torch
from conftest import BYTE
from test_sample_chat import save

import lora
import model as lm
import sample
from data import matmul
from data.cli import UserError
from data.matmul import FLOAT_LAYOUTS, fastest, int8, plain

LLAMA = dict(position="rope", norm="rmsnorm", activation="swiglu", n_kv_head=2, rope_theta=5e5)
ARCHITECTURES = {
    "gpt2": dict(position="learned", norm="layernorm", activation="gelu_tanh", qkv_bias=True,
                 out_bias=True, ff_bias=True, tied=True),
    "llama": LLAMA,
    "qwen3": LLAMA | dict(qk_norm=True, tied=True, head_size=24),
    "qwen2": LLAMA | dict(qkv_bias=True),
    "default": dict(norm="layernorm", norm_weight=False, activation="relu2", qk_norm=True,
                    value_embed=True, bigram=50, induction=True, embed_norm=True),
    "course": dict(position="sinusoidal", norm="layernorm", activation="relu", out_bias=True,
                   ff_bias=True, head_bias=True),
    "gemma3": LLAMA | dict(norm_place="both", window=9, window_theta=50.0, activation="geglu_tanh",
                           embed_scale=8.0, attention_scale=0.8, qk_norm=True),
    "olmo2": LLAMA | dict(norm_place="post", qk_norm=True, qk_norm_wide=True, logit_scale=0.5),
    "neox": LLAMA | dict(norm="layernorm", parallel=True, rotary_share=0.5, residual_scale=0.5),
}  # fmt: skip


def build(name, d_model=64, context=48, seed=0, **changes):
    """A model of that architecture with random weights that are not small."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=300, n_layer=2, n_head=4, d_model=d_model, context=context)
    model = lm.Transformer(lm.Config(**shape | ARCHITECTURES[name] | changes))
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.normal_(1.0 if "norm" in n and n.endswith("weight") else 0.0, 0.1)
    return model.eval()


def fast_copy(model, rows=1, int8=False):
    model = copy.deepcopy(model)
    matmul.make_fast(model, rows, int8)
    assert not any(type(m) is torch.nn.Linear for m in model.modules())
    return model


def pack_or_skip(layout, weight, x, bias=None):
    """The function that computes x @ weight.T + bias, or a skip with the reason."""
    try:
        linear = layout(weight, bias)
        linear(x)
        return linear
    except (RuntimeError, AttributeError) as e:
        pytest.skip(f"not on this machine: {e}")


def rounding(step, values):
    """The error of rounding to multiples of `step`, relative to the size of the values."""
    return step / 12**0.5 / values.square().mean(-1).sqrt()


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("rows", [1, 4])
def test_int8_errs_by_what_its_bits_leave(rows, vnni, monkeypatch):
    if vnni and not torch.cpu._is_vnni_supported():
        pytest.skip("this CPU has no VNNI: pairs of products of 8 bits do not fit its 16")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    torch.manual_seed(0)
    weight = torch.randn(512, 256) * torch.logspace(-3, 0, 512)[:, None]  # one scale would not do
    x = torch.randn(rows, 256) * torch.logspace(-2, 1, rows)[:, None]
    bias, unit = torch.randn(512), x / x.abs().amax(-1, keepdim=True)
    y = pack_or_skip(int8, weight, x, bias)(x) - bias
    x_error = rounding((unit.max() - unit.min()) / (2 ** (8 if vnni else 7) - 1), unit)
    exact, weight_error = x @ weight.T, rounding(weight.abs().amax(1) / 127, weight)  # (512,)
    for half in (slice(0, 256), slice(256, 512)):  # small outputs as exactly as large ones
        error = ((y - exact)[:, half].norm(dim=1) / exact[:, half].norm(dim=1)).square()
        bound = weight_error[half].square().mean() + torch.as_tensor(x_error).square()
        assert (error < 1.5**2 * bound).all() and (error > 0.5**2 * bound).all()
    assert y.shape == exact.shape and y.dtype == x.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("layout", FLOAT_LAYOUTS)
def test_each_layout_gives_the_product(layout, rows, dtype):
    torch.manual_seed(0)
    weight, few = torch.randn(640, 320).to(dtype), torch.randn(rows, 320).to(dtype)
    bias = torch.randn(640).to(dtype)
    linear = pack_or_skip(layout, weight, few, bias)
    for x in (few, torch.randn(70, 320).to(dtype)):  # a prompt has more rows
        exact = x.double() @ weight.double().T + bias.double()
        bound = 4 * torch.finfo(dtype).eps * exact.norm()
        assert (linear(x).double() - exact).norm() < bound and linear(x).dtype == dtype


def test_the_fastest_that_works_is_chosen(monkeypatch):
    def broken(weight, bias):
        raise RuntimeError("not on this CPU")

    def slow(weight, bias):
        return lambda x: torch.stack([x @ weight.T for _ in range(6)])[0]

    linear, timings = torch.nn.Linear(300, 1024), {}
    monkeypatch.setattr(matmul, "timings", timings)
    fastest([linear], 1, (broken, slow, plain))
    assert next(iter(timings.values())).keys() <= {slow, plain}
    fastest([torch.nn.Linear(300, 8)], 1, (broken, slow, plain))
    assert list(timings.values())[1].keys() == {slow}  # of a small one the first that works
    for rows, seconds in ((1, {slow: 3, plain: 1}), (16, {slow: 1, plain: 2})):  # 1 x 2 < 3 x 1
        timings[(1024, 300), torch.float32, rows, (slow, plain)] = seconds
    assert fastest([linear], 16, (slow, plain)).__qualname__.startswith("plain")
    with pytest.raises(UserError, match="int8 cannot be computed on this machine: not on this"):
        fastest([linear], 1, (broken,))


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama", "default"])
def test_bfloat16_is_as_near_as_bfloat16_is_and_int8_nearly(name):
    model, ids = build(name, 640), torch.randint(300, (1, 12))
    content = {"config": vars(model.config), "model": model.state_dict()}
    low = lm.model_from_checkpoint(content, dtype=torch.bfloat16)
    copies, exact = (low, fast_copy(low), fast_copy(model, int8=True)), model(ids)
    plain, fast, rounded = ((m(ids) - exact).norm() / exact.norm() for m in copies)
    assert fast < min(0.05, 1.5 * plain + 1e-3) and 1e-4 < rounded < 0.2


@pytest.mark.parametrize("flags", [
    "fp32 --no_fast", "bf16 --no_fast", "fp32 --beams 2", "bf16 --num_samples 3", "int8",
    "int8 --num_samples 3", "int8 --beams 2",
])
def test_every_path_writes_on_this_machine(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(matmul, "timings", {})
    save(tmp_path / "x.pt", build("default", 512, n_layer=1), BYTE)
    command = f"--ckpt {tmp_path}/x.pt --prompt x --max_new_tokens 6 --print_ids --dtype {flags}"
    sample.main(command.split())
    assert 1 <= len(capsys.readouterr().out.strip().split("\n")[-1].split(",")) <= 6
    assert bool(matmul.timings) is ("--no_fast" not in flags)


def test_what_cannot_be_is_named():
    model = build("llama")
    args = argparse.Namespace(dtype="fp32", no_fast=False)
    lora.add_lora(model, "attention", rank=2, alpha=4)
    sample.fast_model(model, 1, args)  # adapters may be switched: it stays as it is
    assert isinstance(model.blocks[0].attention.q.base, torch.nn.Linear)
    args.dtype = "int8"
    with pytest.raises(UserError, match=r"int8 is for .* adapters, which lora\.py merges"):
        sample.fast_model(model, 1, args)
