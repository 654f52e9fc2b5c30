"""The fast paths beside what they stand for: matmul.make_fast and the bf16 copy of training."""

import argparse
import contextlib
import copy
import io
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_sample import perplexity
from conftest import real

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lora
import model as lm
import prepare_data
import sample
import train
from data import matmul
from data.cli import UserError
from data.machine import Runtime
from data.tokenizer import Tokenizer

LLAMA = dict(position="rope", norm="rmsnorm", activation="swiglu", n_kv_head=2, rope_theta=5e5)
ARCHITECTURES = {
    "gpt2": dict(position="learned", norm="layernorm", activation="gelu_tanh", qkv_bias=True,
                 out_bias=True, ff_bias=True, tied=True),
    "erf": dict(position="learned", norm="layernorm", activation="gelu", ff_bias=True, tied=True),
    "llama": LLAMA,
    "qwen3": LLAMA | dict(qk_norm=True, tied=True, head_size=24),
    "qwen2": LLAMA | dict(qkv_bias=True),
    "default": dict(norm="layernorm", norm_weight=False, activation="relu2", qk_norm=True,
                    value_embed=True, bigram=50, induction=True, embed_norm=True),
    "course": dict(position="sinusoidal", norm="layernorm", activation="relu", out_bias=True,
                   ff_bias=True, head_bias=True),
}  # fmt: skip
THREE = ["gpt2", "llama", "default"]


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
    return model


def save(model, path):
    content = {"config": vars(model.config), "model": model.state_dict()}
    lm.save_checkpoint(path, content | {"tokenizer": Tokenizer({"kind": "byte"}).spec})


@torch.no_grad()
def logits(model, ids, steps=3):
    """Of a prompt in one pass and of some tokens after it, one by one."""
    cache = lm.KVCache(model, len(ids))
    pieces = (ids[:, :-steps], *ids[:, -steps:].split(1, dim=1))
    return torch.cat([model.head(model.hidden(piece, cache)) for piece in pieces], dim=1)


@pytest.fixture
def only(monkeypatch):
    """only(cls): every Linear becomes one of that class, or the test is skipped where it cannot."""

    def choose(cls, rows):
        monkeypatch.setattr(matmul, "FLOAT_LINEARS", (cls,))
        monkeypatch.setattr(matmul, "timings", {})
        try:
            cls(torch.ones(4, 4), rows=rows)(torch.ones(rows, 4))
        except RuntimeError as e:
            pytest.skip(f"not on this machine: {e}")

    return choose


@pytest.mark.parametrize("cls", matmul.FLOAT_LINEARS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_the_models(name, rows, cls, only):
    only(cls, rows)
    model, ids = build(name), torch.randint(300, (rows, 12))
    fast = fast_copy(model, rows)
    assert any(type(m) is cls for m in fast.modules())
    assert not any(type(m) is torch.nn.Linear for m in fast.modules())
    torch.testing.assert_close(logits(fast, ids), logits(model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize("prompts", [[[5, 7]], [[5, 7, 9], [2], [30] * 20]], ids=["one", "three"])
def test_greedy_text_is_the_models(name, prompts):
    model = build(name, 640)
    settings = dict(max_new_tokens=100, temperature=0, slide=lambda kept: None)
    plain = list(sample.generate(model, prompts, **settings))
    assert list(sample.generate(fast_copy(model, len(prompts)), prompts, **settings)) == plain
    assert len(plain) == 100 and len(set(itertools.chain(*plain))) > 5


def test_a_joint_product_serves_each_input_anew():
    """Its outputs may be asked for in any order, or not at all."""
    attention = build("qwen2").blocks[0].attention
    fast = fast_copy(attention)
    for names in ("qkv", "vqk", "k", "qq", "kv", "qkv"):
        x = torch.randn(1, 2, 64)
        for name in names:
            wanted = getattr(attention, name)(x)
            torch.testing.assert_close(getattr(fast, name)(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", THREE)
def test_bfloat16_is_as_near_as_bfloat16_is(name):
    model, ids = build(name, 640), torch.randint(300, (1, 12))
    low = lm.model_from_checkpoint(
        {"config": vars(model.config), "model": model.state_dict()}, dtype=torch.bfloat16
    )
    exact, plain, fast = (logits(m, ids) for m in (model, low, fast_copy(low)))
    assert fast.dtype == torch.bfloat16
    error = (fast - exact).norm() / exact.norm()
    assert error < 1.5 * (plain - exact).norm() / exact.norm() + 1e-3 and error < 0.05


def test_loading_and_writing_need_no_compiler(tmp_path):
    """torch._dynamo takes longer to import than torch itself."""
    save(build("gpt2"), tmp_path / "x.pt")
    code = "import sys, sample; sample.main(); assert 'torch._dynamo' not in sys.modules"
    flags = ["--ckpt", str(tmp_path / "x.pt"), "--prompt", "x", "--max_new_tokens", "3"]
    subprocess.run([sys.executable, "-c", code, *flags], check=True, cwd=ROOT)


@pytest.mark.parametrize("flags", ["", "--no_fast", "--num_samples 3", "--beams 2"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_every_path_writes_on_this_machine(dtype, flags, tmp_path, capsys):
    save(build("default", 512, n_layer=1), tmp_path / "x.pt")
    command = f"--ckpt {tmp_path}/x.pt --prompt x --max_new_tokens 6 --print_ids --dtype {dtype} "
    command = ["--verbose", *command.split(), *flags.split()]
    if dtype == "int8" and flags == "--no_fast":
        with pytest.raises(UserError, match="--dtype int8 excludes --no_fast"):
            sample.main(command)
        return
    sample.main(command)
    out, err = capsys.readouterr()
    assert 1 <= len(out.strip().split("\n")[-1].split(",")) <= 6
    assert ("2048 x 512" in err) is (flags != "--no_fast")  # what was chosen, for each shape


def test_what_cannot_be_is_named():
    model = build("llama")
    args = argparse.Namespace(dtype="fp32", no_fast=False, verbose=False, cuda_graphs=True)
    with pytest.raises(UserError, match="--cuda_graphs needs a GPU"):
        sample.fast_model(model, 1, args)
    args.cuda_graphs = False
    lora.add_lora(model, "attention", rank=2, alpha=4)
    sample.fast_model(model, 1, args)  # adapters may be switched: it stays as it is
    assert isinstance(model.blocks[0].attention.q.base, torch.nn.Linear)
    args.dtype = "int8"
    with pytest.raises(UserError, match=r"int8 does not round adapters: lora\.py merge"):
        sample.fast_model(model, 1, args)


def test_int8_costs_less_than_half_a_percent_of_perplexity(tmp_path, monkeypatch):
    text = real("tinyshakespeare.txt").read_text(encoding="utf-8")[:150_000]
    monkeypatch.chdir(tmp_path)
    Path("part.txt").write_text(text, encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        data = prepare_data.prepare("part.txt", "char", name="shakespeare")
        flags = "--n_layer 2 --n_head 4 --d_model 64 --context 64 --batch_size 6 --max_steps 60"
        train.main(["--data", str(data), *flags.split(), "--eval_every", "60", "--dtype", "fp32"])
    tokens = prepare_data.read_tokens(data, "val")[:2000]
    model = lm.model_from_checkpoint(lm.load_checkpoint("out/shakespeare"))
    exact, rounded = (perplexity(m, tokens, 64) for m in (model, fast_copy(model, int8=True)))
    assert exact < 20  # it has learned something
    assert rounded != exact and abs(rounded / exact - 1) < 0.005


def test_the_bf16_copys_gradients_are_the_models_but_for_rounding():
    model = build("gpt2")
    other, twin = copy.deepcopy(model), train.BF16Copy(model)
    ids = torch.randint(300, (2, 40))
    for _ in range(2):  # two micro-batches: they add up
        twin(ids, ids).backward()
        other(ids, ids).backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        assert p.dtype == p.grad.dtype == torch.float32, name
        if not name.endswith("k.bias"):  # softmax does not care about it: its gradient is zero
            assert (p.grad - q.grad).norm() < 0.05 * q.grad.norm(), name
    assert all(p.grad is None and p.dtype == torch.bfloat16 for p in twin.low.parameters())
    assert twin.low.head.weight is twin.low.embed.weight


def test_steps_too_small_for_bf16_are_not_lost():
    model = build("llama")
    twin, before = train.BF16Copy(model), model.embed.weight.detach().clone()
    with torch.no_grad():
        for _ in range(300):  # each a tenth of what bf16 can tell from 1
            for p in model.parameters():
                p.mul_(1 + 2**-11)
            twin.sync_weights()
    grown = (twin.low.embed.weight.float() / before).median().item()
    assert grown == pytest.approx((1 + 2**-11) ** 300, rel=0.01)
    assert torch.equal(twin.low.cos, model.cos) and twin.low.cos.dtype == torch.float32


@pytest.mark.parametrize("works", [True, False])
def test_the_compilers_trial_leaves_nothing_behind(works, monkeypatch):
    """Its batch goes forward and backward once; the first step must not see its gradients."""
    model, ids, seen = build("llama"), torch.randint(300, (2, 20)), []
    hidden = model.hidden

    def compiled(*args):
        seen.append(args)
        if not works:
            raise RuntimeError("no compiler here")
        return hidden(*args)

    monkeypatch.setattr(torch, "compile", lambda plain: compiled)
    task = train.Task(lambda step: [(ids, ids)], evaluate=None, extra={})
    model.train()
    train.compile_blocks(model, task, Runtime(torch.device("cpu")), 0)
    assert len(seen) == 1 and all(p.grad is None for p in model.parameters())
    model(ids, ids)
    assert len(seen) == 1 + works
    with lm.evaluating(model):
        model(ids, ids)
    assert len(seen) == 1 + works  # only in training
