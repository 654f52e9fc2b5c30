"""model.Decoder, the fast model for sampling, beside the Transformer that it stands for."""

import copy
import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model as lm
import sample

LLAMA = dict(position="rope", norm="rmsnorm", activation="swiglu", n_kv_head=2, rope_theta=5e5)
ARCHITECTURES = {
    "gpt2": dict(position="learned", norm="layernorm", activation="gelu_tanh", qkv_bias=True,
                 out_bias=True, ff_bias=True, tied=True),
    "llama": LLAMA,
    "qwen3": LLAMA | dict(qk_norm=True, tied=True, head_size=24),
    "qwen2": LLAMA | dict(qkv_bias=True),
    "default": dict(norm="layernorm", norm_weight=False, activation="relu2", qk_norm=True,
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


def decoder(model, **settings):
    return lm.Decoder(copy.deepcopy(model), **settings)


def both(model, ids, steps=3, **settings):
    """Hidden states of a prompt and of some tokens after it, by the model and by its Decoder."""
    fast, found = decoder(model, **settings), ([], [])
    for kept, m in zip(found, (model, fast)):
        cache = lm.KVCache(m, len(ids))
        with torch.no_grad():
            for part in (ids[:, :-steps], *ids[:, -steps:].split(1, dim=1)):
                kept.append(m.head(m.hidden(part, cache)))
        assert cache.length == ids.shape[1]
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
@pytest.mark.parametrize("prompts", [[[5, 7]], [[5, 7, 9], [1], [30] * 20]], ids=["one", "three"])
def test_greedy_text_of_256_tokens_is_the_models(name, prompts):
    model = build(name, 640, context=128)
    settings = dict(max_tokens=256, temperature=0, slide=lambda kept: None)
    plain = list(sample.generate(model, prompts, **settings))
    fast = list(sample.generate(decoder(model, rows=len(prompts)), prompts, **settings))
    assert fast == plain and len(plain) == 256
    assert len(set(itertools.chain(*plain))) > 5


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_beams_are_the_models(name):
    model = build(name)
    plain = sample.beam_search(model, [4, 8], 12, beams=3)
    fast = sample.beam_search(decoder(model, rows=3), [4, 8], 12, beams=3)
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


@pytest.mark.parametrize("rows", [1, 4])
def test_int8_rounds_rows_and_columns_each_by_its_own_scale(rows):
    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 512)
    with torch.no_grad():  # outputs and rows of very different sizes: one scale would not do
        layer.weight.mul_(torch.logspace(-3, 0, 512)[:, None])
    x = torch.randn(rows, 256) * torch.logspace(-2, 1, rows)[:, None]
    exact = layer(x)
    found = lm.product([copy.deepcopy(layer)], int8=True)(x)
    bias = layer.bias
    error = ((found - exact) / (exact - bias).norm(dim=1, keepdim=True)).norm(dim=1)
    assert found.shape == exact.shape and (error < 0.012).all() and (error > 1e-4).all()
    small = ((found - exact)[:, :50].norm() / (exact - bias)[:, :50].norm()).item()
    assert small < 0.02


def test_weights_are_held_once():
    model = build("qwen2", 640)
    weights = [m.weight for b in model.blocks for m in b.modules() if type(m) is torch.nn.Linear]
    lm.Decoder(model)
    assert all(m.weight is None for b in model.blocks for m in b.modules()
               if type(m) is torch.nn.Linear)  # fmt: skip
    assert len(weights) == 14 and model.embed.weight is not None
