"""Weights of Hugging Face's models in and out, beside transformers itself."""

import json
import os
import random
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model as lm  # noqa: E402
from model import ModelError  # noqa: E402

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

ROPE3 = {
    "rope_type": "llama3",
    "rope_theta": 50_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TINY = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=128,
    vocab_size=331,
)
MIDDLE = dict(
    hidden_size=320,
    intermediate_size=900,
    num_hidden_layers=5,
    num_attention_heads=10,
    num_key_value_heads=5,
    max_position_embeddings=256,
    vocab_size=5003,
)
MODELS = {
    "gpt2": ("GPT2", dict(n_embd=48, n_layer=2, n_head=4, n_positions=128, vocab_size=331)),
    "gpt2 untied, erf": (
        "GPT2",
        dict(n_embd=32, n_layer=1, n_head=2, n_positions=128, vocab_size=97, n_inner=50)
        | dict(tie_word_embeddings=False, activation_function="gelu"),
    ),
    "gpt2 middle": ("GPT2", dict(n_embd=256, n_layer=4, n_head=8, n_positions=256, vocab_size=5003)),
    "llama": ("Llama", TINY),
    "llama tied, biases": (
        "Llama", TINY | dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    ),
    "llama head_dim": ("Llama", TINY | dict(head_dim=20, num_key_value_heads=1)),
    "llama 3 rope": ("Llama", TINY | dict(rope_parameters=ROPE3)),
    "llama linear rope": (
        "Llama",
        TINY | dict(rope_parameters={"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}),
    ),
    "llama middle": ("Llama", MIDDLE | dict(rope_parameters=ROPE3, tie_word_embeddings=True)),
    "mistral": ("Mistral", TINY | dict(head_dim=8, sliding_window=None)),
    "mistral window": ("Mistral", TINY | dict(head_dim=8, sliding_window=100)),
    "mistral middle": ("Mistral", MIDDLE | dict(head_dim=32, sliding_window=None)),
    "qwen2": ("Qwen2", TINY | dict(tie_word_embeddings=True)),
    "qwen2 middle": ("Qwen2", MIDDLE),
    "qwen3": ("Qwen3", TINY | dict(head_dim=12, tie_word_embeddings=True)),
    "qwen3 biases": ("Qwen3", TINY | dict(head_dim=8, attention_bias=True)),
    "qwen3 middle": ("Qwen3", MIDDLE | dict(head_dim=40)),
}
every_model = pytest.mark.parametrize("name", MODELS)


def theirs(name, dtype=torch.float32):
    """A random model of transformers', its biases and norms not at their idle start values."""
    family, settings = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**settings)
    torch.manual_seed(0)
    for_lm = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, for_lm)._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.dim() == 1 else 0.05))
    return model.to(dtype).eval()


def ours(folder, dtype=torch.float32):
    return lm.model_from_checkpoint(lm.load_hf(folder), dtype=dtype, where=str(folder))


def some_ids(model, T=60, B=2):
    torch.manual_seed(1)
    return torch.randint(model.config.vocab_size, (B, T))


@every_model
def test_logits_equal_theirs_in_fp32_and_fp64(name, tmp_path):
    reference = theirs(name)
    reference.save_pretrained(tmp_path)
    model, ids = ours(tmp_path), some_ids(reference)
    with torch.no_grad():
        want = reference(ids).logits
        torch.testing.assert_close(model(ids), want, rtol=1e-4, atol=1e-4)
        model, reference = ours(tmp_path, torch.float64), reference.double()
        want = reference(ids).logits
        torch.testing.assert_close(model(ids), want, rtol=1e-9, atol=1e-9)
        cache = lm.KVCache(model, 2)
        steps = [model(part, cache=cache) for part in ids.split([40, 1, 1, 18], dim=1)]
        torch.testing.assert_close(torch.cat(steps, 1), want, rtol=1e-9, atol=1e-9)


@every_model
def test_greedy_text_is_theirs(name, tmp_path):
    import sample

    reference = theirs(name)
    reference.save_pretrained(tmp_path)
    ids = some_ids(reference, 9, 1)
    model = ours(tmp_path)
    want = reference.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None)
    got = [row[0] for row in sample.generate(model, ids.tolist(), 64, temperature=0)]
    assert got == want[0, 9:].tolist()
