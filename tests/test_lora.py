"""lora.py: adapters as peft has them, NF4 as bitsandbytes has it, files, and the merge command."""

import argparse
import copy
import runpy
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import finetune
import lora
import model as lm
import sample
from data.cli import UserError
from data.machine import Runtime

IDS = torch.randint(64, (3, 16), generator=torch.Generator().manual_seed(5))
every_kind = pytest.mark.parametrize("kind", ("int8", "nf4"))
LAYERS = ["attention.q", "attention.k", "attention.v", "attention.out"]
LAYERS += ["feed_forward.up", "feed_forward.down"]

CPU = Runtime(torch.device("cpu"))


def tiny(seed=0, **changes):
    shape = dict(n_layer=2, n_head=2, d_model=64, vocab_size=64, context=32) | changes
    torch.manual_seed(seed)
    model = lm.Transformer(lm.preset("gpt2", **shape)).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):  # or to lose one would go unseen
            nn.init.normal_(p, std=0.1)
    return model


def names(layers=LAYERS):
    return sorted(f"blocks.{i}.{name}" for i in range(2) for name in layers)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def learn_something(model, seed=0):
    """Stand in for training: all that may learn is random now."""
    torch.manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.normal_(std=0.05)


# ---- like peft -----------------------------------------------------------------------------

ADAPTERS = {"two": dict(rank=3, alpha=2), "one": dict(rank=4, alpha=12)}


def twins():
    """(ours, peft's): the same model with the same two adapters, B not zero, "one" active."""
    peft = pytest.importorskip("peft")
    ours = theirs = tiny()
    for name, s in ADAPTERS.items():
        modules = ["q", "k", "v", "out", "up", "down"]
        settings = dict(r=s["rank"], lora_alpha=s["alpha"], target_modules=modules)
        config = peft.LoraConfig(**settings, init_lora_weights=False)
        if theirs is ours:
            theirs = peft.get_peft_model(copy.deepcopy(ours), config, adapter_name=name)
        else:
            theirs.add_adapter(name, config)
        assert sorted(lora.add_lora(ours, "all", **s, name=name)) == names()
    with torch.no_grad():
        for name in ADAPTERS:
            for our, their in pairs(ours, theirs, name):
                our.copy_(their)
                assert our.abs().max() > 0.01
    lora.set_adapter(ours, "one")
    theirs.set_adapter("one")
    return ours, theirs


def pairs(ours, theirs, name):
    """(ours, peft's) of every A and B of an adapter."""
    for full, layer in lora.adapted(ours).items():
        other = theirs.base_model.model.get_submodule(full)
        yield layer.a[name], other.lora_A[name].weight
        yield layer.b[name], other.lora_B[name].weight


def test_outputs_gradients_and_ten_adamw_steps_are_pefts():
    ours, theirs = twins()
    sides = [ours, theirs.base_model.model]
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in sides
    ]
    for _ in range(10):
        close(sides[0](IDS), sides[1](IDS))
        for side, optimizer in zip(sides, optimizers):
            optimizer.zero_grad()
            (side(IDS, IDS.roll(-1, 1)) / IDS.numel()).backward()
        for our, their in pairs(ours, theirs, "one"):
            assert our.grad.abs().max() > 1e-4
            close(our.grad, their.grad)
        for optimizer in optimizers:
            optimizer.step()
    close(sides[0](IDS), sides[1](IDS))
    for name in ADAPTERS:
        for our, their in pairs(ours, theirs, name):
            close(our, their)


def test_two_adapters_over_one_base_are_switched_like_pefts():
    ours, theirs = twins()
    seen = []
    for name in ("two", "one", ["one", "two"]):
        lora.set_adapter(ours, *([name] if isinstance(name, str) else name))
        theirs.base_model.set_adapter(name)
        seen.append(ours(IDS))
        close(seen[-1], theirs.base_model.model(IDS))
    assert min((seen[i] - seen[i - 1]).abs().max() for i in range(3)) > 1e-2
    with pytest.raises(UserError, match="no adapter three; the model has one, two"):
        lora.set_adapter(ours, "three")


# ---- laying adapters over a model ----------------------------------------------------------


@pytest.mark.parametrize("kind", (None, "int8", "nf4"))
def test_an_adapter_starts_as_no_change_and_disabled_is_the_base_exactly(kind):
    model = tiny()
    if kind:
        lora.quantize(model, kind)
    plain = model(IDS)
    lora.add_lora(model, "all")
    assert torch.equal(model(IDS), plain)
    learn_something(model)
    changed = model(IDS)
    with pytest.raises(KeyError), lora.disable_adapter(model):
        assert torch.equal(model(IDS), plain)
        raise KeyError
    assert torch.equal(model(IDS), changed) and not torch.equal(changed, plain)
    lora.set_adapter(model)
    assert torch.equal(model(IDS), plain)


def test_tables_that_learn_beside_an_adapter_are_switched_with_it():
    model = tiny(tied=False)
    bare = copy.deepcopy(model.state_dict())
    lora.add_lora(model, "q", name="one", modules_to_save=["embed", "head"])
    learn_something(model, 1)
    one = model(IDS)
    with lora.disable_adapter(model):
        assert torch.equal(model.embed.weight, bare["embed.weight"])
    assert torch.equal(model(IDS), one)
    lora.add_lora(model, "head", name="two", modules_to_save=["embed"])  # the head is adapted
    lora.set_adapter(model, "two")
    assert torch.equal(model.head.weight, bare["head.weight"])
    learn_something(model, 2)
    two = model(IDS)
    for names, expected in (["one"], one), (["two"], two), (["one"], one):
        lora.set_adapter(model, *names)
        assert torch.equal(model(IDS), expected)
    lora.set_adapter(model)
    assert all(torch.equal(lora.base_parameters(model)[n], bare[n]) for n in bare)


def test_targets_are_groups_last_names_or_full_ones_and_nothing_else_learns():
    for targets, layers in (
        ("attention", LAYERS[:4]),
        ("mlp", LAYERS[4:]),
        ("all", LAYERS),
        ("q, down", [LAYERS[0], LAYERS[5]]),
    ):
        model = tiny(tied=False)
        assert sorted(lora.add_lora(model, targets)) == names(layers) == sorted(lora.adapted(model))
        learning = [n for n, p in model.named_parameters() if p.requires_grad]
        assert sorted(learning) == sorted(n for n in learning if ".a." in n or ".b." in n)
        assert len(learning) == 2 * len(names(layers))
    full = ["blocks.1.attention.q", "head"]
    assert sorted(lora.add_lora(model, ",".join(full), name="more")) == full
    gated = lm.Transformer(lm.Config(n_layer=1, d_model=32, vocab_size=64))
    assert "blocks.0.feed_forward.gate" in lora.add_lora(gated, "mlp")


def test_bad_settings_are_refused_and_change_nothing():
    model = lm.Transformer(lm.preset("tiny", tied=True, n_layer=1))
    for settings, message in (
        (dict(targets="query"), "no layer is called query.*attention, mlp, all.*head.*project"),
        (dict(targets="head"), "head shares its weight"),
        (dict(targets="q,head"), "head shares its weight"),
        (dict(rank=0), "rank >= 1"),
        (dict(alpha=0), "alpha > 0"),
        (dict(alpha=float("nan")), "alpha > 0"),
        (dict(dropout=1.0), "dropout < 1"),
        (dict(dropout=-0.1), "0 <= dropout"),
    ):
        with pytest.raises(UserError, match=message):
            lora.add_lora(model, **settings)
    for kind, targets in (("int4", "all"), ("nf4", "nobody")):
        with pytest.raises(UserError, match=r"int4|nobody"):
            lora.quantize(model, kind, targets)
    assert not lora.adapted(model) and all(p.requires_grad for p in model.parameters())


def test_a_name_is_taken_once_and_may_be_any_word():
    model, words = tiny(), ["chat-v1.2", "out/chat/best.pt", "copy", "keys", "a%2Eb", "a.b"]
    for name in words:
        lora.add_lora(model, "q", name=name)
    with pytest.raises(UserError, match=r"adapter 'a\.b' already"):
        lora.add_lora(model, "all", name="a.b")
    with pytest.raises(UserError, match="no layer is called base"):
        lora.add_lora(model, "base", name="inside")
    assert sorted(lora.adapted(model)) == names(LAYERS[:1])
    layer = lora.adapted(model)["blocks.0.attention.q"]
    assert list(layer.a) == words and len(list(layer.parameters())) == 2 + 2 * len(words)


@pytest.mark.parametrize("training", (True, False))
def test_dropout_acts_in_train_mode_only(training):
    model = tiny().train(training)
    lora.add_lora(model, "all", dropout=0.5)
    learn_something(model)
    assert torch.equal(model(IDS), model(IDS)) is not training
    assert torch.equal(model.eval()(IDS), model(IDS))


@pytest.mark.parametrize("kind", (None, "int8", "nf4"))
def test_merged_is_unmerged_in_train_mode_too_and_only_once(kind):
    model = tiny(tied=False)
    if kind:
        assert sorted(lora.quantize(model, kind)) == names()
    for name, dropout in (("one", 0.3), ("two", 0.0), ("off", 0.0)):
        lora.add_lora(model, "attention", rank=4, alpha=12, dropout=dropout, name=name)
        learn_something(model, len(name + str(dropout)))
    lora.set_adapter(model, "one", "two")
    before, layer = model.eval()(IDS), model.blocks[1].attention.v
    delta = sum(3 * layer.b[n].double() @ layer.a[n].double() for n in ("one", "two"))
    by_hand = (layer.base.weight.double() + delta).float()
    assert sorted(lora.merge(model.train())) == names(LAYERS if kind else LAYERS[:4])
    assert not model.training and lora.merge(model) == []
    close(model(IDS), before)
    close(model.blocks[1].attention.v.weight, by_hand, 1e-6)
    plain = lm.Transformer(model.config).eval()
    lm.load_weights(plain, model.state_dict())
    assert torch.equal(plain(IDS), model(IDS))


# ---- files ---------------------------------------------------------------------------------


def base_file(path, seed=0, **changes):
    model = tiny(seed, vocab_size=320, **changes)
    content = {"config": asdict(model.config), "model": lm.unwrapped_state(model)}
    lm.save_checkpoint(path, content | {"tokenizer": {"kind": "byte"}})
    return path


def fine_tuned(folder, base, quantize=None, seed=1):
    """The model with an adapter over the checkpoint `base`, and `folder` with that, as finetune.py
    writes it."""
    settings = dict(ckpt=str(base), lora_rank=4, quantize=quantize, dropout=None, shard=None)
    args = argparse.Namespace(**(finetune.RECIPE | settings | dict(grad_checkpoint=None)))
    content, special = lm.load_checkpoint(base), lambda t: finetune.CHAT_TOKENS
    model, tokenizer, about = finetune.build_model(args, content, None, special, CPU)
    assert about["modules_to_save"] and about["base_vocab"] == 257
    learn_something(model, seed)
    content = {"config": asdict(model.config), "model": lora.adapter_state(model)}
    content |= {"tokenizer": tokenizer.spec, "data": {}, "adapter": about, "step": 1}
    lm.save_checkpoint(folder / "best.pt", content)
    return model.eval()


def test_in_bf16_an_adapted_model_keeps_its_tables_of_positions(tmp_path):
    base = base_file(tmp_path / "base/best.pt", position="rope")
    fine_tuned(tmp_path / "tuned", base)
    content = lm.load_checkpoint(tmp_path / "tuned")
    state = {k: torch.zeros_like(v) if k.endswith(".b") else v for k, v in content["model"].items()}
    content["adapter"]["modules_to_save"] = []
    state.pop("embed.weight")
    state.pop("head.weight", None)
    lm.save_checkpoint(tmp_path / "none/best.pt", {**content, "model": state})
    plain, *_ = sample.load(base, "cpu", "bf16")
    adapted, *_ = sample.load(tmp_path / "none", "cpu", "bf16")
    assert adapted.cos.dtype == plain.cos.dtype == torch.float32
    assert adapted.blocks[0].attention.q.base.weight.dtype == torch.bfloat16
    ids = torch.randint(200, (1, 12))
    known = content["adapter"]["base_vocab"]
    assert torch.equal(adapted(ids)[..., :known], plain(ids)[..., :known])


def merge_command(monkeypatch, **flags):
    """Exit code of `python lora.py merge --...`, run as that in this process."""
    words = [x for k, v in flags.items() for x in (f"--{k}", str(v))]
    monkeypatch.setattr(sys, "argv", ["lora.py", "merge", *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "lora.py"), run_name="__main__")
    return end.value.code


@pytest.mark.parametrize("quantize, tied", [(None, True), ("nf4", False)])
def test_the_merge_command_writes_base_and_adapter_as_one(tmp_path, monkeypatch, quantize, tied):
    base, folder = base_file(tmp_path / "base.pt", tied=tied), tmp_path / "chat-v1.2"
    model = fine_tuned(folder, base, quantize)
    flags = dict(ckpt=base, adapter=folder / "best.pt", out=tmp_path / "merged")
    assert merge_command(monkeypatch, **flags) == 0
    merged, tokenizer, _ = sample.load(tmp_path / "merged", "cpu")
    assert type(merged) is lm.Transformer and "<|user|>" in tokenizer.special
    ids = torch.randint(320, (2, 32))
    close(merged(ids), model(ids))
    assert (merged(IDS) - tiny(vocab_size=320, tied=tied)(IDS)).abs().max() > 0.01


def test_the_merge_command_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    base, other = base_file(tmp_path / "base.pt"), base_file(tmp_path / "other.pt", seed=1)
    fine_tuned(tmp_path / "run", base)
    out, new = tmp_path / "merged.pt", tmp_path / "new.pt"
    good = dict(ckpt=base, adapter=tmp_path / "run", out=out)
    assert merge_command(monkeypatch, **good) == 0
    assert "12 layers merged" in capsys.readouterr().out
    written = out.read_bytes()
    for change, message in (
        (dict(ckpt=out, out=new), f"{out} is another model, or has it merged in already"),
        (dict(ckpt=other, out=new), f"{other} is another model, or has it merged in"),
        (dict(), f"{out} exists: name another --out"),
        (dict(adapter=other, out=new), "no adapter but a whole model"),
        (dict(ckpt=tmp_path / "run", out=new), "does not fit"),
        (dict(ckpt=tmp_path / "nothing.pt", out=new), "does not exist"),
    ):
        assert merge_command(monkeypatch, **(good | change)) == 2
        said = capsys.readouterr()
        assert message in said.err and said.err.startswith("lora.py: ")
        assert said.err.count("\n") == 1 and said.out == ""
    assert out.read_bytes() == written and not new.exists()


def test_an_adapter_of_gpt2_is_a_file_of_under_two_and_a_half_megabytes(tmp_path):
    model = lm.meta_model(lm.preset("gpt2"))
    assert len(lora.add_lora(model, "attention", rank=8)) == 48
    for layer in lora.adapted(model).values():  # the adapters alone take memory
        for matrices in (layer.a, layer.b):
            matrices["default"] = nn.Parameter(torch.zeros(matrices["default"].shape))
    content = {"config": asdict(model.config), "model": lora.adapter_state(model)}
    lm.save_checkpoint(tmp_path / "adapter.pt", content)
    assert 2.3e6 < (tmp_path / "adapter.pt").stat().st_size < 2.5e6


@pytest.mark.parametrize("tied, quantize", [(True, None), (False, "nf4")])
def test_adapters_and_their_tables_survive_files_and_switching(tmp_path, tied, quantize):
    base, ids = base_file(tmp_path / "base.pt", tied=tied), IDS + 240  # special ones among them
    models = {n: fine_tuned(tmp_path / n, base, quantize, seed=len(n)) for n in ("kind", "rude!")}
    saved = {name: lm.load_checkpoint(tmp_path / name) for name in models}
    both = lora.load_adapted(lm.load_checkpoint(base), saved)
    assert torch.equal(both(ids), models["kind"](ids))
    for name in ("rude!", "kind"):
        lora.set_adapter(both, name)
        assert torch.equal(both(ids), models[name](ids))
        assert torch.equal(both.embed.weight, models[name].embed.weight)
        again = lora.adapter_state(both, name)
        assert again.keys() == saved[name]["model"].keys()
        assert all(torch.equal(t, saved[name]["model"][k]) for k, t in again.items())
    lora.load_adapter(both, saved["rude!"], "rude!")
    assert torch.equal(both.embed.weight, models["rude!"].embed.weight)
    narrow = saved["kind"] | {"adapter": saved["kind"]["adapter"] | {"rank": 2}}
    with pytest.raises(UserError, match=r"my.pt does not fit this base: .* is \(4, 64\)"):
        lora.attach(both, narrow, "more", "my.pt")


# ---- quantization --------------------------------------------------------------------------

# Appendix E of the QLoRA paper, typed off once more.
PAPER_NF4 = """
    -1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
    -0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725
    0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941
    0.7229568362236023 1.0"""
PAPER_NF4 = torch.tensor([float(x) for x in PAPER_NF4.split()], dtype=torch.float64)


def test_nf4_levels_are_the_papers_and_quantiles_of_a_normal_distribution():
    assert torch.equal(torch.tensor(lora.NF4, dtype=torch.float64), PAPER_NF4)
    offset, quantile = 0.9677083, statistics.NormalDist().inv_cdf  # of bitsandbytes' authors
    halves = [torch.linspace(offset, 0.5, n, dtype=torch.float64)[:-1] for n in (8, 9)]
    low, high = ([quantile(float(p)) for p in half] for half in halves)
    levels = torch.tensor(sorted([-x for x in low] + [0.0] + high), dtype=torch.float64)
    close(PAPER_NF4, levels / levels.max(), 1e-6)


def weights_of_all_sorts():
    torch.manual_seed(0)
    yield from (torch.randn(shape) for shape in ((160, 128), (3, 7), (1, 1), (50, 33), (64, 1)))
    yield torch.zeros(8, 16)
    yield torch.full((2, 64), -0.25)
    yield torch.cat((torch.zeros(64), 1e-6 * torch.randn(64), 1e6 * torch.randn(64)))[None]


def in_blocks(x, size=64):
    """(blocks, size) in float64, the last one filled up with zeros."""
    whole = torch.zeros(-(-x.numel() // size) * size, dtype=torch.float64)
    whole[: x.numel()] = x.detach().flatten()
    return whole.view(-1, size)


def halves_of(codes):
    """(blocks, 64) codes of 4 bits: of each byte the high half first."""
    return torch.stack((codes // 16, codes % 16), -1).flatten(1).long()


def scale_error(scales):
    """The most that 8-bit codes of scales, less their mean, may be off, block by block."""
    off = in_blocks(scales - scales.double().mean(), 256).abs().amax(1, keepdim=True) / 254
    return off.expand(-1, 256).reshape(-1)[: len(scales), None] * 1.0001 + 1e-7 * scales.max()


def dequantized(weight, kind):
    linear = nn.Linear(*weight.T.shape)
    linear.weight = nn.Parameter(weight)
    found = lora.QuantLinear(linear, kind).weight
    assert found.shape == weight.shape and found.dtype == torch.float32
    return in_blocks(found)


def test_nf4_codes_are_the_nearest_levels_and_stand_for_them_times_8_bit_scales():
    for weight in weights_of_all_sorts():
        blocks = in_blocks(weight)
        largest = blocks.abs().amax(1, keepdim=True)
        unit = blocks / torch.where(largest > 0, largest, 1)
        nearest = (unit[..., None] - PAPER_NF4).abs().argmin(-1)
        codes, absmax = lora.quantize_nf4(weight)
        assert codes.dtype == torch.uint8 and codes.shape == (len(blocks), 32)
        assert torch.equal(halves_of(codes), nearest) and torch.equal(absmax.double(), largest)
        error = (dequantized(weight, "nf4") - PAPER_NF4[nearest] * largest).abs()
        assert (error <= PAPER_NF4[nearest].abs() * scale_error(absmax)).all()


def test_int8_is_off_by_half_a_step_and_the_scales_own_error_at_most():
    for weight in weights_of_all_sorts():
        blocks = in_blocks(weight)
        codes, scales = lora.absmax_int8(weight, 64)
        assert codes.dtype == torch.int8 and codes.abs().max() <= 127
        close(scales.double(), blocks.abs().amax(1, keepdim=True) / 127, 1e-6)
        assert ((codes * scales.double() - blocks).abs() <= 0.50001 * scales).all()
        error = (dequantized(weight, "int8") - blocks).abs()
        assert (error <= 0.50001 * scales + codes.abs() * scale_error(scales)).all()


def test_nf4_codes_and_values_are_bitsandbytes_own():
    bnb = pytest.importorskip("bitsandbytes.functional")
    for weight in weights_of_all_sorts():
        if weight.numel() % 2:
            continue  # the two fill the last byte up in their own ways
        try:
            packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
            values = bnb.dequantize_4bit(packed, state)
        except (RuntimeError, NotImplementedError, AssertionError) as e:
            pytest.skip(f"bitsandbytes cannot do it on a CPU: {e}")
        codes, absmax = lora.quantize_nf4(weight)
        assert torch.equal(codes.flatten()[: weight.numel() // 2], packed.flatten())
        assert torch.equal(absmax.flatten(), state.absmax)
        ours = (torch.tensor(lora.NF4)[halves_of(codes)] * absmax).flatten()[: weight.numel()]
        assert torch.equal(ours.view_as(weight), values)


def quantized(kind, seed=0):
    torch.manual_seed(seed)
    return lora.QuantLinear(nn.Linear(96, 40), kind), torch.randn(5, 3, 96)


@every_kind
def test_a_quantized_layer_is_a_linear_of_its_dequantized_weight_and_keeps_no_copy(kind):
    layer, x = quantized(kind)
    weight, up, kept = layer.weight, torch.randn(5, 3, 40), []
    hooks = lambda t: kept.append(t.numel()) or t, lambda t: t
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(*hooks):
        y = layer(ours)
        assert weight.numel() not in kept
        expected = F.linear(theirs, weight, layer.bias)
    assert weight.numel() in kept, "a plain product keeps it for the backward pass"
    assert not any(isinstance(v, torch.Tensor) for v in vars(y.grad_fn).values())
    close(y, expected, 1e-6)
    (y * up).sum().backward()
    (expected * up).sum().backward()
    close(ours.grad, theirs.grad, 1e-6)
    assert all(p.grad is None and not p.requires_grad for p in (weight, *layer.parameters()))


@every_kind
def test_a_quantized_layer_works_in_every_precision_and_its_state_dict_brings_it_back(kind):
    layer, x = quantized(kind)
    exact, state = layer(x), copy.deepcopy(layer.state_dict())
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    close(y.float(), exact, 3e-2)
    close(x.grad, layer.weight.sum(0).expand_as(x), 3e-2)
    other, _ = quantized(kind, seed=1)
    assert not torch.equal(other(x), exact)
    other.load_state_dict(state)
    assert torch.equal(other(x), exact)
    for dtype in (torch.float16, torch.float64, torch.bfloat16, torch.float32):
        y = layer.to(dtype)(x.detach().to(dtype))
        assert y.dtype == dtype
        close(y.float(), exact, 3e-2)
        assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items() if k != "bias")


@pytest.mark.parametrize("kind, bits", [("nf4", 4.13), ("int8", 8.13)])
def test_a_frozen_gpt2_takes_at_most_three_tenths_of_its_bytes(kind, bits):
    def held(module):
        tensors = (*module.parameters(), *module.buffers())
        return sum(t.numel() * t.element_size() for t in tensors)

    blocks = lm.Transformer(lm.preset("gpt2", n_layer=1, vocab_size=64)).blocks
    whole = held(blocks)
    assert whole == 4 * sum(p.numel() for p in blocks.parameters())
    lora.quantize(blocks, kind)
    assert held(blocks) <= 0.30 * whole
    state = blocks[0].feed_forward.up.state_dict()
    stored = sum(t.numel() * t.element_size() for n, t in state.items() if n != "bias")
    assert 8 * stored / (768 * 3072) == pytest.approx(bits, abs=0.005)


def chain(following, rows, seed):
    """Rows of ids, each followed by the one that `following` says, but one in ten by any."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(64, (rows, 33), generator=generator)
    odd = torch.rand(rows, 33, generator=generator) < 0.1
    for t in range(1, 33):
        ids[:, t] = torch.where(odd[:, t], ids[:, t], following[ids[:, t - 1]])
    return ids[:, :-1], ids[:, 1:]


def learn(model, following, lr, steps=120):
    """The loss before and after, on rows that are not learned."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(steps + 1):
        if step in (0, steps):
            with torch.no_grad():
                losses.append(float(model(*chain(following, 64, 999))) / (64 * 32))
        optimizer.zero_grad()
        ids, targets = chain(following, 16, step)
        (model(ids, targets) / targets.numel()).backward()
        optimizer.step()
    return losses


def test_learning_through_a_quantized_base_ends_where_plain_lora_does():
    known = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    base, ends = tiny(), {}
    learn(base, known, lr=3e-3)
    for kind in (None, "int8", "nf4"):
        model = copy.deepcopy(base)
        if kind:
            lora.quantize(model, kind)
        torch.manual_seed(0)  # the same A for all three
        lora.add_lora(model, "all", rank=8, alpha=16)
        before, ends[kind] = learn(model, known.roll(1), lr=5e-3)
        assert ends[kind] < 0.5 * before
    assert [ends["int8"], ends["nf4"]] == pytest.approx([ends[None]] * 2, rel=0.02)
