"""Adapters in peft's files: written by us, read by peft."""

import json
from dataclasses import asdict

import pytest
import torch

import lora
import model as lm
from data.cli import UserError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SHAPE = dict(n_layer=2, n_head=4, d_model=32, context=64, vocab_size=320, init="gpt2")
GATED = SHAPE | dict(n_kv_head=2, d_ff=56, position="rope", norm="rmsnorm", activation="swiglu")
GEMMA = dict(norm_place="both", activation="geglu_tanh", embed_scale=32**0.5, window_theta=50.0)
GEMMA["window"] = 7
CONFIGS = {
    "gpt2": lm.preset("gpt2", **SHAPE),
    "llama": lm.Config(**GATED),
    "qwen2": lm.Config(**GATED, qkv_bias=True, tied=True),
    "qwen3": lm.Config(**GATED, qk_norm=True, head_size=12),
    "phi3": lm.Config(**GATED, rotary_share=0.75),
    "glm4": lm.Config(**GATED, norm_place="both", rotary_share=0.5, qkv_bias=True),
    "gemma3_text": lm.Config(**GATED | GEMMA, tied=True, qk_norm=True),
    "gpt_neox": lm.preset("gpt2", **SHAPE, position="rope", rotary_share=0.5, tied=False),
}
IDS = torch.randint(320, (2, 20), generator=torch.Generator().manual_seed(3))


def base_of(family, **changes):
    """The content of a checkpoint with random weights, biases and norms among them."""
    torch.manual_seed(0)
    model = lm.Transformer(lm.Config(**(asdict(CONFIGS[family]) | changes)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.dim() == 1 else 0.05))
    config, state = asdict(model.config), model.state_dict()
    return {"config": config, "model": state, "tokenizer": {"kind": "byte"}}


@torch.no_grad()
def adapter_of(base, targets="attention", rank=4, alpha=12, seed=1):
    """The content of an adapter checkpoint over `base`, as finetune.py saves it; B is not zero."""
    model = lm.model_from_checkpoint(base)
    settings = dict(targets=targets, rank=rank, alpha=alpha, dropout=0.1, modules_to_save=[])
    lora.add_lora(model, **settings)
    torch.manual_seed(seed)
    for layer in lora.adapted(model).values():
        for p in (*layer.a.values(), *layer.b.values()):
            p.normal_(std=0.2)
    info = settings | dict(quantize=None, base="base.pt", base_vocab=320)
    info["base_sha256"] = lora.fingerprint(base["model"])
    content = {"config": base["config"], "model": lora.adapter_state(model)}
    return content | {"tokenizer": base["tokenizer"], "adapter": info}


def export(folder, base, adapter):
    """Run `lora.py export`; returns the adapter_config.json that it wrote."""
    lm.save_checkpoint(folder / "base.pt", base)
    lm.save_checkpoint(folder / "run/best.pt", adapter)
    words = ["--ckpt", folder / "base.pt", "--adapter", folder / "run", "--out", folder / "peft"]
    lora.main(["export", *map(str, words)])
    return json.loads((folder / "peft/adapter_config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("targets, changes", [
    ("k,v,up", {}),  # of GPT-2's c_attn two thirds
    ("q,k,blocks.0.attention.v,down", {}),
    ("head,out", dict(tied=False)),
    ("blocks.1.attention.q,blocks.11.attention.k", dict(n_layer=12)),
    ("all", dict(norm_weight=False, ff_bias=False)),  # which transformers cannot leave out
])
@torch.no_grad()
def test_peft_computes_what_we_do_adapted_and_merged(tmp_path, family, targets, changes):
    base = base_of(family, **changes)
    content = adapter_of(base, targets, rank=3, alpha=7)
    values = export(tmp_path, base, content)
    assert values["fan_in_fan_out"] == (family == "gpt2")
    lm.export_hf(base, tmp_path / "bare")
    bare = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bare", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(bare, tmp_path / "peft").eval()
    want = lora.load_adapted(base, {"one": content})(IDS)
    assert (want - lm.model_from_checkpoint(base)(IDS)).abs().max() > 1e-3
    for theirs in (model(IDS), model.merge_and_unload()(IDS)):
        torch.testing.assert_close(theirs.logits, want, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_peft_cannot_express_is_refused_in_one_line(tmp_path):
    base, other = base_of("llama"), base_of("llama", norm_weight=False)
    content = adapter_of(base)
    info, state = content["adapter"], content["model"]
    wide = {"blocks.1.attention.q.a": torch.zeros(4, 40)}
    table = dict(adapter=info | dict(modules_to_save=["embed"]))
    table["model"] = state | {"embed.weight": base["model"]["embed.weight"]}
    for base_, change, message in (
        (base, table, "special tokens"),
        (base, dict(adapter=info | dict(quantize="nf4")), "quantized base"),
        (base, dict(model=state | wide), r"attention.q.a is \(4, 40\), the model has \(4, 32\)"),
        (other, {}, "is another model"),
    ):
        with pytest.raises(UserError, match=f"^.*{message}.*$"):
            export(tmp_path, base_, content | change)
        assert not (tmp_path / "peft").exists()
    strange = base_of("llama", embed_norm=True)
    with pytest.raises(UserError, match="no Hugging Face architecture has embed_norm"):
        export(tmp_path, strange, adapter_of(strange))
    export(tmp_path, base, content)
    with pytest.raises(UserError, match="exists: name another --out"):
        export(tmp_path, base, content)
    with pytest.raises(UserError, match="an adapter of peft's, which cannot be read"):
        lm.load_checkpoint(tmp_path / "peft")
