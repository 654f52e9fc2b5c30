"""The fast paths beside what they stand for: matmul.make_fast, runner.BF16Copy."""

import argparse
import contextlib
import copy
import dataclasses
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_sample import perplexity

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lora
import model as lm
import prepare_data
import sample
import train
from data import runner
from data.cli import UserError
from data.machine import Runtime
from data.matmul import make_fast
from data.tokenizer import Tokenizer

REAL = Path(os.environ.get("SCRATCHLM_DATA", ROOT.parent / "shared" / "data"))
LLAMA = dict(position="rope", norm="rmsnorm", activation="swiglu", n_kv_head=2, rope_theta=5e5)

ARCHITECTURES = {
    "gpt2": dict(position="learned", norm="layernorm", activation="gelu_tanh", qkv_bias=True,
                 out_bias=True, ff_bias=True, tied=True),
    "erf": dict(position="learned", norm="layernorm", activation="gelu", ff_bias=True, tied=True),
    "llama": LLAMA,
    "qwen3": LLAMA | dict(qk_norm=True, tied=True, head_size=24),
    "qwen2": LLAMA | dict(qkv_bias=True),
    "default": dict(norm="layernorm", norm_weight=False, activation="relu2", qk_norm=True,
                    value_embed=True, bigram=50, induction=True,
                    embed_norm=True),
    "course": dict(position="sinusoidal", norm="layernorm", activation="relu", out_bias=True,
                   ff_bias=True, head_bias=True),
}  # fmt: skip


def build(name, d_model=64, context=48, seed=0, **changes):
    """A model of that architecture with weights that say something; large ones are packed."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=300, n_layer=2, n_head=4, d_model=d_model, context=context)
    model = lm.Transformer(lm.Config(**shape | ARCHITECTURES[name] | changes))
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.normal_(1.0 if "norm" in n and n.endswith("weight") else 0.0, 0.1)
    return model.eval()


def fast_copy(model, **settings):
    model = copy.deepcopy(model)
    make_fast(model, **settings)
    return model


def both(model, ids, steps=3, **settings):
    """Hidden states of a prompt and of some tokens after it, by the model and its fast copy."""
    fast, found = fast_copy(model, **settings), ([], [])
    for kept, m in zip(found, (model, fast)):
        cache = lm.KVCache(m, len(ids))
        with torch.no_grad():
            for part in (ids[:, :-steps], *ids[:, -steps:].split(1, dim=1)):
                kept.append(m.head(m.hidden(part, cache)))
        assert set(cache.lengths.tolist()) == {ids.shape[1]}
    return (torch.cat(kept, dim=1) for kept in found)


@pytest.mark.parametrize("d_model", [64, 640], ids=["small", "packed"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_the_models(name, rows, d_model):
    model = build(name, d_model)
    ids = torch.randint(300, (rows, 12))
    plain, fast = both(model, ids, rows=rows)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "default"])
@pytest.mark.parametrize("prompts", [[[5, 7]], [[5, 7, 9], [2], [30] * 20]], ids=["one", "three"])
def test_greedy_text_of_256_tokens_is_the_models(name, prompts):
    model = build(name, 640, context=128)
    settings = dict(max_new_tokens=256, temperature=0, slide=lambda kept: None)
    plain = list(sample.generate(model, prompts, **settings))
    fast = list(sample.generate(fast_copy(model, rows=len(prompts)), prompts, **settings))
    assert fast == plain and len(plain) == 256
    assert len(set(itertools.chain(*plain))) > 5


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_beams_are_the_models(name):
    model = build(name)
    plain = sample.beam_search(model, [4, 8], 12, beams=3)
    fast = sample.beam_search(fast_copy(model, rows=3), [4, 8], 12, beams=3)
    assert [ids for _, ids in fast] == [ids for _, ids in plain]


@pytest.mark.parametrize("name", ["gpt2", "llama", "default"])
def test_bfloat16_is_as_near_as_bfloat16_is(name):
    model = build(name, 640)
    ids = torch.randint(300, (1, 12))
    exact, _ = both(model, ids)
    low = lm.model_from_checkpoint(
        {"config": vars(model.config), "model": model.state_dict()}, dtype=torch.bfloat16
    )
    plain, fast = both(low, ids)
    assert fast.dtype == torch.bfloat16
    error = (fast - exact).norm() / exact.norm()
    assert error < 1.5 * (plain - exact).norm() / exact.norm() + 1e-3 and error < 0.05


def test_loading_and_writing_need_no_compiler(tmp_path):
    """torch._dynamo takes longer to import than torch itself."""
    tokenizer = Tokenizer({"kind": "byte"})
    model = build("gpt2")
    content = {"config": vars(model.config), "model": model.state_dict()}
    lm.save_checkpoint(tmp_path / "x.pt", content | {"tokenizer": tokenizer.spec})
    code = "import sys, sample; sample.main(); assert 'torch._dynamo' not in sys.modules"
    flags = ["--ckpt", str(tmp_path / "x.pt"), "--prompt", "x", "--max_tokens", "3"]
    subprocess.run([sys.executable, "-c", code, *flags], check=True, cwd=ROOT)


@pytest.mark.parametrize("flags", ["", "--no_fast", "--num_samples 3", "--beams 2"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_every_path_writes_on_this_machine(dtype, flags, tmp_path, capsys):
    if dtype == "int8" and flags == "--no_fast":
        return  # refused, see below
    model, tokenizer = build("default", 512), Tokenizer({"kind": "byte"})
    content = {"config": vars(model.config), "model": model.state_dict()}
    lm.save_checkpoint(tmp_path / "x.pt", content | {"tokenizer": tokenizer.spec})
    command = f"--ckpt {tmp_path}/x.pt --prompt x --max_tokens 6 --print_ids --dtype {dtype} "
    sample.main(["--verbose", *command.split(), *flags.split()])
    out, err = capsys.readouterr()
    assert 1 <= len(out.strip().split("\n")[-1].split(",")) <= 6
    assert ("2048 x 512" in err) is (flags != "--no_fast")  # what was chosen, for each shape


# --------------------------------------------------------------------------------------------
# What it costs, on real text: bf16 in training, int8 in sampling
# --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shakespeare(tmp_path_factory):
    """A folder with a quarter of tiny Shakespeare prepared, and 80 steps trained on it in fp32 and
    bf16 (whose products crawl on a CPU that has none of its own)."""
    text = REAL / "tinyshakespeare.txt"
    if not text.exists():
        pytest.skip(f"needs {text} (or SCRATCHLM_DATA)")
    folder = tmp_path_factory.mktemp("shakespeare")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        Path("part.txt").write_text(text.read_text(encoding="utf-8")[:250_000], encoding="utf-8")
        data = prepare_data.prepare("part.txt", "char", name="shakespeare")
        for dtype in ("fp32", "bf16"):
            flags = "--n_layer 2 --n_head 4 --d_model 64 --context 64 --batch_size 6 "
            flags += f"--max_steps 80 --eval_every 80 --dtype {dtype} --out out/{dtype}"
            train.main(["--data", str(data), *flags.split()])
    return folder


def final_loss(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(r["val_loss"] for r in rows if r.get("final"))


def test_bf16_with_masters_learns_as_fp32_does(shakespeare):
    exact, low = (final_loss(shakespeare / "out" / d) for d in ("fp32", "bf16"))
    assert exact < 2.3  # nats a character; 3.3 is where the letters' frequencies are known
    assert abs(low / exact - 1) < 0.005 and low != exact


def test_int8_costs_less_than_half_a_percent_of_perplexity(shakespeare):
    tokens = prepare_data.read_tokens(shakespeare / "data" / "shakespeare", "val")[:4000]
    content = lm.load_checkpoint(shakespeare / "out/fp32")
    exact = perplexity(lm.model_from_checkpoint(content), tokens, 64)
    model = lm.model_from_checkpoint(content)
    make_fast(model, int8=True)
    rounded = perplexity(model, tokens, 64)
    assert rounded != exact and abs(rounded / exact - 1) < 0.005


# --------------------------------------------------------------------------------------------
# The twin
# --------------------------------------------------------------------------------------------


def test_the_bf16_copys_gradients_are_the_models_but_for_rounding():
    model = build("gpt2")
    other, twin = copy.deepcopy(model), runner.BF16Copy(model)
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
    twin, before = runner.BF16Copy(model), model.embed.weight.detach().clone()
    with torch.no_grad():
        for _ in range(300):  # each a tenth of what bf16 can tell from 1
            for p in model.parameters():
                p.mul_(1 + 2**-11)
            twin.sync_weights()
    grown = (twin.low.embed.weight.float() / before).median().item()
    assert grown == pytest.approx((1 + 2**-11) ** 300, rel=0.01)
    assert torch.equal(twin.low.cos, model.cos) and twin.low.cos.dtype == torch.float32


def test_a_bf16_copy_is_for_a_cpu_alone_and_all_of_a_model():
    model, runtime = build("llama"), Runtime(torch.device("cpu"), "bf16")
    args = argparse.Namespace(autocast=None, compile=False)
    found, precision, _ = runner.make_runner(model, None, args, runtime)
    assert isinstance(found, runner.BF16Copy) and precision.dtype == "fp32"
    for other in (dict(dtype="fp32"), dict(device=torch.device("cuda"))):
        other = dataclasses.replace(runtime, **other)
        assert runner.make_runner(model, None, args, other)[:2] == (model, other)
    model.embed.weight.requires_grad_(False)
    assert runner.make_runner(model, None, args, runtime)[0] is model


@pytest.mark.parametrize("works", [True, False])
def test_the_compilers_trial_leaves_nothing_behind(works, monkeypatch):
    """Its batch goes forward and backward once; the first step must not see its gradients."""
    model = build("llama")
    twin, ids = runner.BF16Copy(model), torch.randint(300, (2, 20))
    seen, hidden = [], twin.low.hidden

    def compiled(*args):
        seen.append(args)
        if not works:
            raise RuntimeError("no compiler here")
        return hidden(*args)

    monkeypatch.setattr(torch, "compile", lambda plain: compiled)
    task = train.Task(lambda step: [(ids, ids)], evaluate=None, extra={})
    twin.train()
    runner.try_compile(twin, task, Runtime(torch.device("cpu")))
    assert len(seen) == 1 and (twin.low.hidden == hidden) is not works
    assert all(p.grad is None for p in (*model.parameters(), *twin.parameters()))
    twin.low(ids, ids)
    assert len(seen) == 1 + works
    with lm.evaluating(twin):
        twin.low(ids, ids)
    assert len(seen) == 1 + works  # only in training


@pytest.mark.parametrize("plain", [True, False])
def test_autocast_trains_without_a_bf16_copy(plain, tmp_path, monkeypatch):
    made, copied = [], runner.BF16Copy
    monkeypatch.setattr(runner, "BF16Copy", lambda m: made.append(m) or copied(m))
    model, ids = build("llama"), torch.randint(300, (2, 20))
    flags = ["--max_steps", "1", "--eval_every", "9", *(["--autocast"] if plain else [])]
    args = train.resolve(train.build_parser().parse_args(flags))[0]
    task = train.Task(lambda step: [(ids, ids)], lambda m, final: {"val_loss": 1.0}, {})
    train.fit(model, task, args, Runtime(torch.device("cpu"), "bf16", 1e9), tmp_path)
    assert bool(made) is not plain


def test_int8_says_what_stands_in_its_way():
    args = argparse.Namespace(dtype="int8", no_fast=True, verbose=False, cuda_graphs=False)
    model = build("llama")
    with pytest.raises(UserError, match="--dtype int8 excludes --no_fast"):
        sample.fast_model(model, 1, args)
    args.no_fast = False
    lora.add_lora(model, "attention", rank=2, alpha=4)
    with pytest.raises(UserError, match=r"int8 does not round adapters: lora\.py merge"):
        sample.fast_model(model, 1, args)
    args.dtype = "fp32"
    assert sample.fast_model(model, 1, args) is model
