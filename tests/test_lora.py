"""lora.py: adapters as peft has them, NF4 as bitsandbytes has it, files, and the merge command."""

import argparse
import copy
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, close
from torch import nn

import finetune
import lora
import model as lm
import sample
from data.chat import CHAT_TOKENS
from data.cli import UserError

IDS = torch.randint(64, (3, 16), generator=torch.Generator().manual_seed(5))
every_kind = pytest.mark.parametrize("kind", ("int8", "nf4"))
every_base = pytest.mark.parametrize("kind", (None, "int8", "nf4"))
LAYERS = [f"attention.{name}" for name in ("q", "k", "v", "out")]
LAYERS += ["feed_forward.up", "feed_forward.down"]


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


@torch.no_grad()
def learn_something(model, seed=0):
    """Stand in for training: all that may learn is random now."""
    torch.manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.normal_(std=0.05)


def pairs(ours, theirs, name):
    """(ours, peft's) of every A and B of an adapter."""
    for full, layer in lora.adapted(ours).items():
        other = theirs.base_model.model.get_submodule(full)
        yield layer.a[name], other.lora_A[name].weight
        yield layer.b[name], other.lora_B[name].weight


def test_outputs_gradients_and_adamw_steps_of_adapters_and_table_are_pefts():
    peft = pytest.importorskip("peft")
    ours = tiny(tied=False)  # peft's copy of a tied table is not tied
    theirs = copy.deepcopy(ours)
    common = dict(target_modules=["q", "k", "v", "out", "up", "down"], modules_to_save=["embed"])
    for name, rank, alpha in (("two", 3, 2), ("one", 4, 12)):
        common |= dict(r=rank, lora_alpha=alpha, init_lora_weights=False)
        if name == "two":
            theirs = peft.get_peft_model(theirs, peft.LoraConfig(**common), adapter_name=name)
        else:
            theirs.add_adapter(name, peft.LoraConfig(**common))
        lora.add_lora(ours, "all", rank, alpha, name=name, modules_to_save=["embed"])
        with torch.no_grad():
            for our, their in pairs(ours, theirs, name):
                our.copy_(their)
                assert our.abs().max() > 0.01
    lora.set_adapter(ours, "one")
    theirs.set_adapter("one")
    sides = [ours, theirs.base_model.model]
    optimizers = [torch.optim.AdamW(side.parameters(), lr=1e-3) for side in sides]
    for _ in range(5):
        close(sides[0](IDS), sides[1](IDS))
        for side, optimizer in zip(sides, optimizers):
            side.zero_grad()
            (side(IDS, IDS.roll(-1, 1)) / IDS.numel()).backward()
            optimizer.step()
        for our, their in pairs(ours, theirs, "one"):
            assert our.grad.abs().max() > 1e-4
            close(our.grad, their.grad)
    for our, their in [*pairs(ours, theirs, "one"), *pairs(ours, theirs, "two")]:
        close(our, their)
    close(ours.embed.weight, theirs.base_model.model.embed.modules_to_save["one"].weight)
    for name in ("one", "two", "one"):  # an adapter brings its table along
        lora.set_adapter(ours, name)
        theirs.set_adapter(name)
        close(sides[0](IDS), sides[1](IDS))
    with pytest.raises(UserError, match="no adapter three; the model has two, one"):
        lora.set_adapter(ours, "three")


@every_base
def test_an_adapter_starts_as_no_change_and_disabled_is_the_base_exactly(kind):
    model = tiny()
    if kind:
        lora.quantize(model, kind)
    plain = model(IDS)
    lora.add_lora(model, "all", modules_to_save=["embed"])
    assert torch.equal(model(IDS), plain)
    learn_something(model)
    changed = model(IDS)
    with pytest.raises(KeyError), lora.disable_adapter(model):
        assert torch.equal(model(IDS), plain)
        raise KeyError
    assert torch.equal(model(IDS), changed) and not torch.equal(changed, plain)


def test_targets_are_groups_last_names_or_full_ones_and_bad_ones_change_nothing():
    for targets, layers in (("attention", LAYERS[:4]), ("mlp", LAYERS[4:]), ("all", LAYERS),
                            ("q, down", [LAYERS[0], LAYERS[5]])):
        model = tiny(tied=False)
        assert sorted(lora.add_lora(model, targets)) == names(layers) == sorted(lora.adapted(model))
        learning = [n for n, p in model.named_parameters() if p.requires_grad]
        assert all(".a." in n or ".b." in n for n in learning)
        assert len(learning) == 2 * len(names(layers))
    assert lora.add_lora(model, "blocks.1.attention.q", name="more") == ["blocks.1.attention.q"]
    model = lm.Transformer(lm.preset("tiny", tied=True, n_layer=1))
    for targets, message in (("query", "no layer is called query.*attention, mlp, all.*head"),
                             ("q,head", "head shares its weight")):
        with pytest.raises(UserError, match=message):
            lora.add_lora(model, targets)
    assert not lora.adapted(model) and all(p.requires_grad for p in model.parameters())
    lora.add_lora(model)
    lora.hold_frozen(model, torch.bfloat16)  # but not the table of a tied head
    assert model.embed.weight.dtype != model.blocks[0].attention.q.base.weight.dtype


@every_base
def test_merged_is_unmerged_in_train_mode_too_and_only_once(kind):
    model = tiny(tied=False)
    if kind:
        assert sorted(lora.quantize(model, kind)) == names()
    for name in ("off", "on"):
        lora.add_lora(model, "attention", rank=4, alpha=12, dropout=0.3, name=name)
        learn_something(model)
    assert not torch.equal(model.train()(IDS), model(IDS))  # dropout
    before, layer = model.eval()(IDS), model.blocks[1].attention.v
    delta = 3 * layer.b["on"].double() @ layer.a["on"].double()
    by_hand = (layer.base.weight.double() + delta).float()
    assert sorted(lora.merge(model.train())) == names(LAYERS if kind else LAYERS[:4])
    assert not model.training and lora.merge(model) == []
    close(model(IDS), before)
    close(model.blocks[1].attention.v.weight, by_hand, 1e-6)
    lm.load_weights(lm.Transformer(model.config), model.state_dict())  # a plain model's names


def base_file(path, seed=0, **changes):
    model = tiny(seed, vocab_size=320, **changes)
    content = {"config": asdict(model.config), "model": model.state_dict()}
    lm.save_checkpoint(path, content | {"tokenizer": {"kind": "byte"}})
    return path


def fine_tuned(folder, base, quantize=None, seed=1):
    """The model with an adapter over the checkpoint `base`, and `folder` with that, as finetune.py
    writes it."""
    settings = dict(ckpt=str(base), lora_rank=4, quantize=quantize, dropout=None, shard=None)
    args = argparse.Namespace(**(finetune.RECIPE | settings | dict(grad_checkpoint=None)))
    content, special = lm.load_checkpoint(base), lambda t: CHAT_TOKENS
    model, tokenizer, adapter = finetune.build_model(args, content, None, special, CPU)
    assert adapter["modules_to_save"] and adapter["base_vocab"] == 257
    learn_something(model, seed)
    content = {"config": asdict(model.config), "model": lora.adapter_state(model)}
    content |= {"tokenizer": tokenizer.spec, "data": {}, "adapter": adapter, "step": 1}
    lm.save_checkpoint(folder / "best.pt", content)
    return model.eval()


@pytest.mark.parametrize("quantize, tied", [(None, True), ("nf4", False)])
def test_the_merge_command_writes_base_and_adapter_as_one(tmp_path, capsys, quantize, tied):
    base, other = base_file(tmp_path / "base.pt", tied=tied), base_file(tmp_path / "b.pt", seed=1)
    model = fine_tuned(tmp_path / "run", base, quantize)
    out, new = tmp_path / "merged.pt", tmp_path / "new.pt"

    def merge(ckpt=base, adapter=tmp_path / "run", out=out):
        lora.main(f"merge --ckpt {ckpt} --adapter {adapter} --out {out}".split())

    merge()
    assert "12 layers merged" in capsys.readouterr().out
    written = out.read_bytes()
    merged, tokenizer, _ = sample.load(out, "cpu")
    assert type(merged) is lm.Transformer and "<|user|>" in tokenizer.special
    ids = torch.randint(320, (2, 32))
    close(merged(ids), model(ids))
    assert (merged(IDS) - tiny(vocab_size=320, tied=tied)(IDS)).abs().max() > 0.01
    for changes, message in (
        (dict(ckpt=out, out=new), "merged.pt is another model, or has it merged in already"),
        (dict(), "merged.pt exists: name another --out"),
        (dict(adapter=other, out=new), "a whole model, not an adapter"),
        (dict(ckpt=tmp_path / "run", out=new), "run is an adapter: name its base, .*base.pt"),
    ):
        with pytest.raises(UserError, match=f"^.*{message}.*$"):
            merge(**changes)
    assert out.read_bytes() == written and not new.exists()


@pytest.mark.parametrize("tied, quantize", [(True, None), (False, "nf4")])
def test_adapters_and_their_tables_survive_files_and_switching(tmp_path, tied, quantize):
    base, ids = base_file(tmp_path / "base.pt", tied=tied), IDS + 240  # new tokens among them
    names = "keys", "a.b%2E"  # any word may be a name
    models = {n: fine_tuned(tmp_path / n, base, quantize, seed=len(n)) for n in names}
    saved = {name: lm.load_checkpoint(tmp_path / name) for name in models}
    both = lora.load_adapted(lm.load_checkpoint(base), saved)
    assert torch.equal(both(ids), models["keys"](ids))
    for name in reversed(names):
        lora.set_adapter(both, name)
        assert torch.equal(both(ids), models[name](ids))
        again = lora.adapter_state(both)
        assert again.keys() == saved[name]["model"].keys()
        assert all(torch.equal(t, saved[name]["model"][k]) for k, t in again.items())
    assert torch.equal(sample.load(None, "cpu", "auto", [tmp_path / "keys"])[0](ids),
                       models["keys"](ids))
    for change, message in ((dict(rank=2), r"my.pt does not fit this base: .* is \(4, 64\)"),
                            (dict(quantize="int8"), "--quantize .* and int8 cannot share a base")):
        other = saved["keys"] | {"adapter": saved["keys"]["adapter"] | change}
        with pytest.raises(UserError, match=message):
            lora.load_adapted(lm.load_checkpoint(base), saved | {"my.pt": other})


def test_nf4_levels_are_quantiles_of_a_normal_distribution():
    offset = 0.9677083  # of bitsandbytes' authors
    low, high = (torch.linspace(offset, 0.5, n).double()[:-1] for n in (8, 9))
    quantiles = torch.special.ndtri(torch.cat((1 - low, torch.tensor([0.5]), high.flip(0))))
    close(torch.tensor(lora.NF4), (quantiles / quantiles.max()).float(), 1e-6)


@every_kind
def test_a_weight_becomes_its_nearest_levels_times_8_bit_scales(kind):
    levels = lora.NF4 if kind == "nf4" else [i / 127 for i in range(-127, 128)]
    levels = torch.tensor(levels, dtype=torch.float64)
    torch.manual_seed(0)
    mixed = torch.cat((torch.zeros(64), 1e-6 * torch.randn(64), 1e6 * torch.randn(64)))[None]
    for weight in (*map(torch.randn, ((160, 96), (1, 1), (50, 33))), torch.zeros(8, 16), mixed):
        linear, fill = nn.Linear(*weight.T.shape), (0, -weight.numel() % 64)
        linear.weight = nn.Parameter(weight)
        values = lora.QuantLinear(linear, kind).weight
        assert values.shape == weight.shape and values.dtype == torch.float32
        blocks, ours = (F.pad(x.flatten(), fill).view(-1, 64).double() for x in (weight, values))
        largest = blocks.abs().amax(1, keepdim=True)
        unit = blocks / torch.where(largest > 0, largest, 1)
        off = largest * (unit[..., None] - levels).abs().amin(-1)
        # a scale, less the mean of all, is one of 8 bits as well
        off = off + (largest - largest.mean()).abs().amax() / 254 + 1e-7 * largest.max()
        assert ((ours - blocks).abs() <= 1.0001 * off).all()


@every_kind
def test_a_quantized_layer_is_small_and_a_linear_of_what_it_stands_for_in_either_precision(kind):
    torch.manual_seed(0)
    stored = lora.QuantLinear(nn.Linear(768, 3072, bias=False), kind).state_dict().values()
    bits = 8 * sum(t.nbytes for t in stored) / (768 * 3072)
    assert bits == pytest.approx(4.13 if kind == "nf4" else 8.13, abs=0.005)
    layer, x = lora.QuantLinear(nn.Linear(96, 40), kind), torch.randn(5, 3, 96)
    weight, up = layer.weight, torch.randn(5, 3, 40)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    kept = []  # what autograd keeps for the backward pass: not the dequantized weight
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(ours)
    assert not [t for t in kept if t.dtype == torch.float32 and t.numel() == weight.numel()]
    expected = F.linear(theirs, weight, layer.bias)
    compiled = torch.compile(layer, backend="aot_eager_decomp_partition")(ours)
    kept = compiled.grad_fn.saved_tensors  # a compiler would keep it, too
    assert not [t for t in kept if t.dtype == torch.float32 and t.numel() == weight.numel()]
    assert torch.equal(compiled, y)
    close(y, expected, 1e-6)
    (y * up).sum().backward()
    (expected * up).sum().backward()
    close(ours.grad, theirs.grad, 1e-6)
    assert all(p.grad is None and not p.requires_grad for p in (weight, *layer.parameters()))
    ours.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(ours)
    (low.float() * up).sum().backward()
    assert low.dtype == torch.bfloat16 and ours.grad.dtype == torch.float32
    close(low.float(), expected, 3e-2)
    close(ours.grad, theirs.grad, 5e-2)
