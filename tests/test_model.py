"""model.py against formulas, float64 references and other people's transformers."""

import itertools
import math
import os
import re
import struct
import zipfile
from dataclasses import asdict
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as lm
from data import costs
from data.cli import UserError
from model import Config, KVCache, Transformer

V, CONTEXT = 50, 16
KEY = "blocks.1.attention.k.weight"
same = torch.testing.assert_close


def build(seed=0, **fields):
    """A tiny model in eval mode whose every weight matters (zero_out would give zero logits)."""
    shape = dict(vocab_size=V, n_layer=2, n_head=4, d_model=32, context=CONTEXT, d_ff=40)
    torch.manual_seed(seed)
    model = Transformer(Config(**{**shape, **fields}))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2).add_(1.0 if p.dim() == 1 else 0.0)
    return model.eval()


def some_ids(B=2, T=CONTEXT, seed=1):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name, total", dict(
    tiny=21_899_328, novel=140_573_600, gpt2=124_439_808).items())
def test_known_shapes_have_their_known_parameters(name, total, capsys):
    parts = lm.count_parameters(lm.meta_model(lm.preset(name)))
    assert parts.pop("total") == total == sum(parts.values())
    lm.main(["--preset", name, "--tokens", "1000", "--world", "8", "--shard"])
    out = capsys.readouterr().out
    assert f"\n{name}: {total:,} parameters\n" in out and "does not apply: it gives" in out
    lm.main(["--preset", name, "--tokens", "1e10"])
    out = capsys.readouterr().out
    assert "nats a token" in out and ("outside its range" in out) == (name == "tiny")


def test_parameters_flops_and_the_chinchilla_papers_loss_by_hand():
    # a block: q 64, k and v 32 each, out 64, three 8 x 12; the head 80; scores 12 L nh hs context
    shape = dict(vocab_size=10, n_layer=2, n_head=2, n_kv_head=1, d_model=8, d_ff=12, context=16)
    parts = list(lm.count_parameters(lm.meta_model(Config(**shape, bigram=3))).values())
    assert parts == [80, 24, 0, 2 * 192, 2 * 288, 5 * 8, 80, 104 + 384 + 576 + 40 + 80]
    assert lm.flops_per_token(Config(**shape)) == 6 * (2 * (192 + 288) + 80) + 12 * 2 * 8 * 16
    matrices = 4 * (2 * (192 + 288) + 80 / 2)  # frozen, and a head for every second token
    assert lm.flops_per_token(Config(**shape), 5, 0.5, True) == matrices + 12 * 2 * 8 * 5
    c = Config(**shape)
    written, fused = (costs.memory_needed(Transformer(c), 2**16, n) for n in (512, 513))
    assert written - fused == 2 * 2 * 2**16 * 512 * 4  # scores: layers, heads, tokens, keys, bytes
    plain = Config(**shape, activation="relu")
    assert lm.flops_per_token(plain) == 6 * (2 * (192 + 192) + 80) + 12 * 2 * 8 * 16
    # powers that make the roots whole: N^0.34 = 2^17, D^0.28 = 2^7
    by_hand = 1.69 + 406.4 / 131072 + 410.7 / 128
    assert costs.chinchilla_loss(2**50, 2**25) == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("position", lm.POSITIONS)
def test_attention_and_tables_by_hand(position):
    """x = norm(embedding + position) + pairs[row], v = W x + values[id], out(weights @ v)."""
    ids, shape = torch.tensor([[3, 5, 5, 1]]), dict(value_embed=True, bigram=7, embed_norm=True)
    new = Transformer(lm.preset("tiny", n_layer=1))
    assert not new.value_embed.weight.any() and not new.inputs.bigram.weight.any()
    model, seen = build(n_layer=1, n_kv_head=2, qk_norm=True, position=position, **shape), {}
    block = model.blocks[0]
    block.norm1.register_forward_hook(lambda m, args, out: seen.update(x=args[0], norm=out))
    block.attention.register_forward_hook(lambda m, args, out: seen.update(y=out))
    model(ids)
    place = 0 if position == "rope" else lm.position_table(model)[:4]
    rows = [(a * 36313 ^ b * 27191) % 7 for a, b in ((3, 3), (3, 5), (5, 5), (5, 1))]
    x = model.embed_norm(model.embed(ids) + place) + model.inputs.bigram.weight[rows]
    v = block.attention.v(seen["norm"]) + model.value_embed(ids)
    weights = lm.attention_weights(model, ids[0].tolist())  # (nh, T, T)
    y = weights @ v.view(4, 2, 8).transpose(0, 1).repeat_interleave(2, dim=0)
    same(seen["x"], x)
    same(seen["y"], block.attention.out(y.transpose(0, 1).reshape(1, 4, -1)))
    assert not weights.triu(1).any() and (weights.tril() > 0).sum() == 4 * 10


@pytest.mark.parametrize("position", lm.POSITIONS)
def test_show_prints_and_draws_the_numbers_of_a_model(position, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = build(vocab_size=257, position=position)
    lm.save_checkpoint("out/r/best.pt", content_of(model, tokenizer={"kind": "byte"}))
    tables = {"token": model.embed.weight[ord("a")], "position": lm.position_table(model)[1]}
    for what, row in tables.items():
        lm.main(["--show", what, "--prompt", "xa好"])
        _, *rows, size, picture = capsys.readouterr().out.splitlines()
        numbers = [float(n) for n in rows[1].replace("...", "").split()[-8:]]
        assert numbers == pytest.approx([*row[:4].tolist(), *row[-4:].tolist()], abs=1e-4)
        assert size == f"[{len(rows) if what == 'token' else CONTEXT} rows x {len(row)} columns]"
        assert (tmp_path / picture.split(":")[0]).read_bytes()[:4] == b"\x89PNG"
    lm.main(["--show", "attention", "--prompt", "xa好", "--head", "2"])
    _, *rows, _, _ = capsys.readouterr().out.splitlines()
    weights = lm.attention_weights(model, list("xa好".encode()))[2]
    assert rows[0] == "   0 x  ██" and rows[4][:7] == "   4 好 "
    assert rows[4][-2] == lm.tables.SHADES[int(5 * weights[4, 4] ** 0.5)]
    with pytest.raises(UserError, match="--layer"):
        lm.main(["--show", "attention", "--prompt", "a", "--layer", "2"])
    for flags in ("--show token --layer 1", "--dtype q8_0", "--shard"):
        with pytest.raises(UserError, match=r"^--.* (is|are) for --"):
            lm.main(flags.split())
    lm.main(["--show", "token"])
    assert "".join(line[5] for line in capsys.readouterr().out.splitlines()[1:9]) == "a fox me"


def candidate(ids, t, longest):
    """`copy_candidates` of one position, by looking back."""
    for n in range(longest, 0, -1):
        for j in range(t - 1, n - 2, -1):
            if t >= n - 1 and ids[j - n + 1 : j + 1] == ids[t - n + 1 : t + 1]:
                return ids[j + 1], n
    return 0, 0


@pytest.mark.parametrize("longest", [1, lm.LONGEST_MATCH])
@pytest.mark.parametrize("S", [1, 2, 3, 40, 4000])
def test_candidates_to_copy_are_found_by_looking_back(S, longest):
    ids = torch.cat([torch.randint(2, (3, S)), torch.randint(6, (3, S))])
    positions = torch.randint(S, (6, 1)) if S > 40 else torch.arange(S).expand(6, S)
    rows = zip(ids.tolist(), positions.tolist())
    expected = [[candidate(row, t, longest) for t in positions] for row, positions in rows]
    found = torch.stack(lm.copy_candidates(ids, positions, longest), -1)  # by sorting
    assert torch.equal(found, torch.tensor(expected))
    few = lm.copy_candidates(ids, positions[:, -1:], longest)  # by comparing
    assert torch.equal(torch.stack(few, -1), torch.tensor(expected)[:, -1:])


@pytest.mark.parametrize("fields, message", [
    *((dict([pair]), "{} .*{}".format(*pair)) for pair in [
        ("position", "alibi"), ("init", "xavier"), ("vocab_size", 0), ("n_kv_head", -2),
        ("n_kv_head", 3), ("n_head", 0), ("dropout", math.nan), ("rope_theta", 0.0), ("bigram", -1),
    ]),
    (dict(d_model=30), "d_model 30 .* n_head 4"),
    (dict(head_size=5), "rope .* 5"),
    (dict(tied=True, head_bias=True), "tied .* head_bias"),
    (dict(rope_scaling=dict(rope_type="yarn", factor=2.0)), "yarn"),
    (dict(rope_scaling=dict(rope_type="linear", factor=0.0)), "factor"),
])
def test_a_bad_value_or_combination_is_named(fields, message):
    with pytest.raises(UserError, match=message) as error:
        Config(**fields)
    assert "\n" not in str(error.value)


def test_a_preset_follows_its_changes_and_stays_as_it_was():
    before = dict(lm.PRESETS["gpt2"])
    changed = lm.preset("gpt2", d_model=96, n_head=4, tied=False)
    assert (changed.d_ff, changed.head_size, changed.n_kv_head) == (384, 24, 4)
    assert lm.preset("gpt2", d_ff=7).d_ff == 7
    assert lm.preset("tiny", d_model=200).n_head == 4 and lm.preset("tiny", d_model=320).n_head == 5
    assert lm.preset("llama-8b", d_model=336).n_head == 8  # as many as keys have
    assert Config(experts=1).experts_per_token == 1
    assert lm.PRESETS["gpt2"] == before
    with pytest.raises(UserError, match="gpt3"):
        lm.preset("gpt3")


def reference_attention(q, k, v, mask, causal):
    """Softmax over the keys that may be seen, each step written out."""
    T, S = q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if mask is None:
        mask = torch.ones(T, S).tril(S - T if causal else S)
    weights = (q @ k.mT / q.shape[-1] ** 0.5).exp() * mask
    return weights / weights.sum(-1, keepdim=True) @ v


@pytest.mark.parametrize("seen", ["before", "some", "all"])
@pytest.mark.parametrize("T, S", [(5, 5), (1, 7), (3, 7), (1, 1)])
@pytest.mark.parametrize("nkv", [4, 2, 1])
def test_attention_equals_the_reference_with_its_gradients(nkv, T, S, seen):
    mask = None
    if seen == "some":  # any pattern in which each query sees something
        mask = torch.rand(T, S, generator=torch.Generator().manual_seed(2)) > 0.4
        mask[:, 0] = True
    torch.manual_seed(0)
    shapes = (2, 4, T, 6), (2, nkv, S, 6), (2, nkv, S, 6)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    results = []
    options, naive = dict(mask=mask, causal=seen != "all"), lm.naive_attention
    for f in (reference_attention, lm.attention, *[naive] * (seen == "before")):
        y = f(*inputs, **({} if f is naive else options))
        results.append((y, *torch.autograd.grad((y * torch.arange(6) ** 2).sum(), inputs)))
        same(results[-1], results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("C", [5, 64])
def test_the_sinusoids_are_the_courses(C):
    position = torch.arange(0, 128, dtype=torch.float).unsqueeze(1)
    div = torch.exp(torch.arange(0, C, 2).float() * (-math.log(10000.0) / C))
    pe = torch.zeros(128, C)
    pe[:, 0::2] = torch.sin(position * div)
    pe[:, 1::2] = torch.cos(position * div)[:, : C // 2]
    same(lm.sinusoid_table(128, C), pe, rtol=0, atol=5e-5)


@pytest.fixture
def few_rows(monkeypatch):
    monkeypatch.setattr(lm, "LOSS_BYTES", 0)
    monkeypatch.setattr(lm, "LOSS_ROWS", 3)  # 10 targets: chunks of 3, 3, 3 and 1


def loss_inputs(dtype=torch.float64, ignored=4):
    torch.manual_seed(3)
    x = torch.randn(2, 7, 6, dtype=dtype, requires_grad=True)
    weight = torch.randn(11, 6, dtype=dtype, requires_grad=True)
    bias = torch.randn(11, dtype=dtype, requires_grad=True)
    targets = torch.randint(11, (2, 7))
    targets.view(-1)[torch.randperm(14)[:ignored]] = -100
    return x, weight, bias, targets


def full_loss(x, weight, bias, targets):
    logits = F.linear(x, weight, bias).flatten(0, -2)
    return F.cross_entropy(logits, targets.flatten(), reduction="sum", ignore_index=-100)


@pytest.mark.parametrize("rows", [1, 3, 256])
@pytest.mark.parametrize("ignored", [0, 4, 14])
@pytest.mark.parametrize("frozen", [None, 0, 1, 2, "no bias"])
def test_the_loss_is_cross_entropy_with_its_gradients(few_rows, monkeypatch, rows, ignored, frozen):
    monkeypatch.setattr(lm, "LOSS_ROWS", rows)
    results = []
    for f in (lm.chunked_loss, full_loss):
        *parts, targets = loss_inputs(ignored=ignored)
        if frozen == "no bias":
            parts[2] = None
        elif frozen is not None:
            parts[frozen].requires_grad_(False)
        loss = f(*parts, targets)
        (loss * 0.37).backward()  # whoever divides by the token count scales the gradients
        results.append((loss.detach(), *(p if p is None else p.grad for p in parts)))
    for ours, expected in zip(*results):
        same(ours, expected, rtol=1e-9, atol=1e-9)


def test_the_loss_is_the_same_with_its_softmax_compiled(monkeypatch):
    """In one graph for any number of rows, as on a GPU."""
    torch._dynamo.utils.counters.clear()
    results = []
    # not the default backend, whose code crashes on CPUs that are held to AVX2
    options = dict(fullgraph=True, dynamic=True, backend="aot_eager")
    for softmax_ in (lm.softmax_, torch.compile(lm.softmax_, **options)):
        monkeypatch.setattr(lm.ChunkedLoss, "softmax_", staticmethod(softmax_))
        for ignored in (1, 4, 9):
            *parts, targets = loss_inputs(torch.bfloat16, ignored)
            loss = lm.chunked_loss(*parts, targets)
            results.append((loss.detach(), *torch.autograd.grad(loss, parts)))
    for eager, ours in zip(results[:3], results[3:]):
        same(ours, eager, rtol=2e-2, atol=1e-2)
        assert ours[0].item() == pytest.approx(eager[0].item(), rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_under_bf16_autocast_products_are_rounded_and_the_loss_is_not(few_rows):
    exact, low = loss_inputs(torch.float32), loss_inputs(torch.float32)
    expected = full_loss(*exact)
    with torch.autocast("cpu", torch.bfloat16):
        loss = lm.chunked_loss(*low)
    assert loss.dtype == torch.float32
    *rounded, targets = (t.bfloat16() if t.is_floating_point() else t for t in low)
    logits = F.linear(*rounded).double().flatten(0, 1)
    wanted = F.cross_entropy(logits, targets.flatten(), reduction="sum").item()
    assert loss.item() == pytest.approx(wanted, rel=1e-4)
    assert loss.item() != pytest.approx(expected.item(), rel=1e-6)
    expected.backward()
    loss.backward()
    for ours, theirs in zip(low[:3], exact[:3]):
        assert ours.grad.dtype == torch.float32
        assert (ours.grad - theirs.grad).norm() < 0.02 * theirs.grad.norm()


@pytest.mark.parametrize("fields", [dict(), dict(tied=True), dict(head_bias=True)])
def test_a_models_loss_is_that_of_its_logits(few_rows, fields):
    model, ids, targets = build(**fields), some_ids(), some_ids(seed=2)
    targets[0, :5] = -100
    wanted = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="sum")
    grads = []
    for loss in (model(ids, targets), wanted):
        grads.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    same(*grads, rtol=1e-4, atol=1e-4)


def test_the_loss_never_holds_all_logits(few_rows):
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    inputs = loss_inputs()
    with Sizes():
        loss = lm.chunked_loss(*inputs)
        loss.backward(retain_graph=True)
    assert inputs[1].numel() <= max(sizes) <= inputs[0].numel() < 10 * len(inputs[1])
    with pytest.raises(RuntimeError, match="twice"):  # not a wrong gradient
        loss.backward()


@pytest.mark.parametrize("chunks", [[1] * CONTEXT, [5, 4, 1, 1, 5], [CONTEXT], [1, 15]])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("position", lm.POSITIONS)
@torch.no_grad()
def test_cached_logits_equal_uncached_and_so_no_token_sees_a_later_one(position, n_kv_head, chunks):
    model, ids = build(position=position, n_kv_head=n_kv_head, qk_norm=True), some_ids()
    cache = KVCache(model, 2)
    parts = [model(piece, cache=cache) for piece in ids.split(chunks, dim=1)]
    same(torch.cat(parts, dim=1), model(ids), rtol=1e-5, atol=1e-5)
    assert cache.lengths.tolist() == [CONTEXT] * 2


@torch.no_grad()
def test_more_tokens_than_the_context_are_refused():
    model = build()
    with pytest.raises(UserError, match=r"17 .*16"):
        model(some_ids(T=17))
    cache = KVCache(model, 2)
    model(some_ids(T=10), cache=cache)
    with pytest.raises(UserError, match=r"17 .*16"):
        model(some_ids(T=7), cache=cache)
    assert cache.lengths.tolist() == [10, 10]
    short = KVCache(model, 2, length=4)
    model(some_ids(T=4), cache=short)
    with pytest.raises(UserError, match="4"):
        model(some_ids(T=1), cache=short)


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("shape", [*(dict(position=p) for p in lm.POSITIONS), lm._OURS])
@torch.no_grad()
def test_rows_of_different_lengths_go_on_as_each_alone(shape, T):
    model, ids, lengths = build(n_kv_head=2, **shape), some_ids(B=3), [9, 2, 5]
    cache = KVCache(model, 4)
    for row, n in enumerate(lengths):
        model(ids[row, None, :n], cache=cache.rows(row + 1, row + 2))
    new, rows = torch.stack([row[n : n + T] for row, n in zip(ids, lengths)]), cache.rows(1, 4)
    places = rows.lengths[:, None] + torch.arange(T)
    static = model.last_logits(new, rows, rows.begin(new, places))  # as for a CUDA graph
    rows.lengths -= T
    logits = model(new, cache=rows)
    same(static, logits[:, -1], rtol=1e-5, atol=1e-5)
    assert cache.lengths.tolist() == [0, *(n + T for n in lengths)]
    for row, n, ours in zip(ids, lengths, logits):
        same(ours, model(row[None, : n + T])[0, n:], rtol=1e-5, atol=1e-5)


FEATURES = {" ".join(kinds): dict(zip(("position", "norm", "activation"), kinds))
            for kinds in itertools.product(lm.POSITIONS, lm.NORMS, lm.ACTIVATIONS)}
FEATURES |= {
    "course": dict(position="sinusoidal", out_bias=True, ff_bias=True, head_bias=True),
    "ours": lm._OURS,
    # not with learned positions: there softmax cannot see a key bias, its gradient is zero
    "qwen 2": dict(qkv_bias=True, tied=True),
    "own head size": dict(n_head=3, n_kv_head=1, head_size=6),
    "layernorm without weight": dict(norm="layernorm", norm_weight=False, embed_norm=True),
    "dropout": dict(dropout=0.2, residual_scale=0.5),
    "olmo 2": dict(norm_place="post", qk_norm=True, qk_norm_wide=True, n_kv_head=2),
    "gemma 3": dict(norm_place="both", qk_norm=True, window=3, window_theta=9.0, embed_scale=4.0),
    "neox": dict(parallel=True, rotary_share=0.5, attention_scale=0.5, logit_scale=2.0),
}


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_trains(name):
    model, ids, targets = build(**FEATURES[name]), some_ids(T=8), some_ids(T=8, seed=2)
    assert model(ids).shape == (2, 8, V)
    loss = model.train()(ids, targets)
    loss.backward()
    assert math.isfinite(loss.item())
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert p.grad.any(), f"{name} takes no part"


def test_the_relus_are_their_formulas():
    """Models of the Hub have the other activations: test_hf_weights.py compares them."""
    x = torch.linspace(-3, 3, 13)
    same(lm.ACTIVATIONS["relu"](x), x.clamp(min=0))
    same(lm.ACTIVATIONS["relu2"](x), x.clamp(min=0) ** 2)


def test_dropout_works_in_training_and_is_off_in_evaluation():
    model, ids = build(dropout=0.3), some_ids()
    same(model(ids), build(dropout=0.0)(ids))
    model.train()
    assert not torch.allclose(model(ids), model(ids))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_grad_checkpoint_recomputes_and_changes_no_gradient(dropout):
    results = []
    for on in (False, True):
        model = build(dropout=dropout, n_kv_head=2).train()
        model.grad_checkpoint = on
        calls = []
        model.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(7)
        loss = model(some_ids(), some_ids(seed=2))
        loss.backward()
        assert len(calls) == 1 + on
        results.append((loss, *(p.grad for p in model.parameters())))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("fields", [dict(), lm._OURS, dict(norm="layernorm", ff_bias=True)])
def test_zero_out_starts_at_the_loss_of_knowing_nothing(fields):
    model = Transformer(Config(**{**fields, "vocab_size": V, "init": "zero_out"}))
    assert not model(some_ids()).any()
    loss = model(some_ids(), some_ids(seed=2)) / some_ids().numel()
    assert loss.item() == pytest.approx(math.log(V), rel=1e-6)


def content_of(model, **more):
    return {"config": asdict(model.config), "model": model.state_dict(), **more}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "run" / "last.pt"  # the folder is made on the way
    lm.save_checkpoint(path, content_of(build(), step=7))
    return path


@pytest.mark.parametrize("fields", [dict(), dict(tied=True), dict(lm._OURS, n_kv_head=2)])
@torch.no_grad()
def test_a_checkpoint_comes_back_as_it_was(tmp_path, fields):
    model = build(**fields)
    lm.save_checkpoint(tmp_path / "a.pt", content_of(model, step=7))
    content = lm.load_checkpoint(tmp_path / "a.pt")
    again = lm.model_from_checkpoint(content)
    assert content["step"] == 7 and again.config == model.config and not again.training
    assert torch.equal(again(some_ids()), model(some_ids()))
    assert os.listdir(tmp_path) == ["a.pt"]
    half = lm.model_from_checkpoint(content, dtype=torch.bfloat16)
    assert half(some_ids()).dtype == torch.bfloat16 and half.cos.dtype == torch.float32


def test_flipped_bytes_are_found_by_their_checksum(saved):
    whole = saved.read_bytes()
    with zipfile.ZipFile(saved) as records:
        starts = [i.header_offset + 30 for i in records.infolist() if i.file_size > 7]
    for start in starts:  # of a name and padding of these lengths, and then the record
        at = start + sum(struct.unpack("<HH", whole[start - 4 : start]))
        damaged = bytes(b ^ 0xFF for b in whole[at : at + 8])
        saved.write_bytes(whole[:at] + damaged + whole[at + 8 :])
        with pytest.raises(UserError, match=re.escape(str(saved))):
            lm.load_checkpoint(saved)
    saved.write_bytes(whole)
    assert lm.load_checkpoint(saved)["step"] == 7 and len(starts) > 10


@pytest.mark.parametrize("where, error", [
    ("torch.save", RuntimeError("PytorchStreamWriter failed writing file: no space")),
    ("os.fsync", OSError(28, "No space left on device")),
])
def test_a_failing_write_keeps_the_old_file_and_leaves_no_other(saved, monkeypatch, where, error):
    before = saved.read_bytes()
    monkeypatch.setattr(where, Mock(side_effect=error))
    with pytest.raises(UserError, match=r"last\.pt.*space") as caught:
        lm.save_checkpoint(saved, content_of(build(seed=1)))
    assert "\n" not in str(caught.value)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == ["last.pt"]


class Command(str):
    """A pickle of this runs a shell command when it is loaded."""

    def __reduce__(self):
        return os.system, (str(self),)


def pickled(path, **options):
    torch.save({"more": Command(f"echo ran > {path.parent / 'marker'}")}, path, **options)


DAMAGES = {
    "empty": lambda path, data: path.write_bytes(b""),
    "cut": lambda path, data: path.write_bytes(data[: len(data) // 2]),
    "weights alone": lambda path, data: torch.save(build().state_dict(), path),
    "code": lambda path, data: pickled(path),
    "old pickle": lambda path, data: pickled(path, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_is_no_checkpoint_is_refused_by_name_and_runs_nothing(saved, kind):
    DAMAGES[kind](saved, saved.read_bytes())
    with pytest.raises(UserError) as caught:
        lm.load_checkpoint(saved)
    assert str(saved) in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(saved.parent) == ["last.pt"]


def test_a_folder_means_its_best_then_its_last(saved):
    assert lm.load_checkpoint(saved.parent)["step"] == 7
    lm.save_checkpoint(saved.with_name("best.pt"), content_of(build(), step=5))
    assert lm.load_checkpoint(saved.parent)["step"] == 5
    assert lm.load_checkpoint(saved)["step"] == 7
    with pytest.raises(UserError, match=r"has no best\.pt"):
        lm.load_checkpoint(saved.parent.parent)
    with pytest.raises(UserError, match=r"none\.pt does not exist"):
        lm.load_checkpoint(saved.with_name("none.pt"))


@pytest.mark.parametrize("change, message", [
    ({KEY: None}, r"run/last\.pt.*blocks\.1\.attention\.k\.weight \(32, 32\) is missing"),
    ({KEY: torch.zeros(16, 32)}, r"k\.weight is \(16, 32\), the model has \(32, 32\)"),
    ({"wings": torch.zeros(2, 3)}, r"wings \(2, 3\) is unknown"),
])
def test_a_misfit_is_named_with_its_shapes(change, message):
    state = build().state_dict() | change
    with pytest.raises(UserError, match=message):
        lm.load_weights(build(), {k: v for k, v in state.items() if v is not None}, "run/last.pt")


@pytest.mark.parametrize("bad", [{"wings": 2}, {"n_layer": 0}, {"vocab_size": "many"}])
def test_a_checkpoint_with_an_impossible_config_is_a_users_mistake(bad):
    content = content_of(build())
    content["config"] |= bad
    with pytest.raises(UserError, match=r"run/last\.pt"):
        lm.model_from_checkpoint(content, where="run/last.pt")
