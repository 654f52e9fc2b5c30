"""Weights of Hugging Face's models in and out, beside transformers itself."""

import functools
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import lora
import model as lm
import sample
from data import hf_config
from data.cli import UserError

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

ROPE3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
ROPE3 |= dict(original_max_position_embeddings=32)

TINY = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6)
TINY |= dict(num_key_value_heads=2, max_position_embeddings=128, vocab_size=331)

NEOX = {name: value for name, value in TINY.items() if name != "num_key_value_heads"}
YARN = dict(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=32)
LONG = dict(rope_type="longrope", short_factor=[1.0, 1.1, 1.2, 1.5], long_factor=[2.0] * 4)
LONG = dict(rope_parameters=LONG | {"rope_theta": 1e4}, max_position_embeddings=512)
LONG |= dict(original_max_position_embeddings=64, pad_token_id=0)
SCALES = dict(embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=6.0)
EXPERTS = dict(moe_intermediate_size=40, norm_topk_prob=True, tie_word_embeddings=True)
FULL, WINDOW = "full_attention", "sliding_attention"
GEMMA = {FULL: dict(rope_type="linear", factor=8.0, rope_theta=1e6)}
GEMMA = dict(rope_parameters=GEMMA | {WINDOW: dict(rope_type="default", rope_theta=1e4)})
GEMMA |= dict(layer_types=[WINDOW, FULL], query_pre_attn_scalar=12, sliding_window=10)
GPT2 = dict(n_embd=48, n_layer=2, n_head=4, n_positions=128, vocab_size=331)
MODELS = {  # the first word is the family
    "gpt2": GPT2,
    "gpt2 untied": GPT2 | dict(n_inner=50, tie_word_embeddings=False, activation_function="gelu"),
    "llama": TINY,
    "llama tied, biases": TINY | dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama 3 rope": TINY | dict(rope_parameters=ROPE3 | {"rope_theta": 5e4}),
    "mistral": TINY | dict(head_dim=8, sliding_window=11),
    "qwen2": TINY | dict(tie_word_embeddings=True),
    "qwen3": TINY | dict(head_dim=12, tie_word_embeddings=True, attention_bias=True),
    "qwen2 window": TINY | dict(use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen3_moe": TINY | EXPERTS | dict(head_dim=12, num_experts=5, num_experts_per_tok=3),
    "qwen3_moe of minimind-3": TINY | EXPERTS | dict(num_experts=4, num_experts_per_tok=1),
    "mixtral": TINY | dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen2 yarn": TINY | dict(rope_parameters=YARN),
    "phi3": TINY | dict(pad_token_id=0, sliding_window=13),
    "phi3 share": TINY | dict(pad_token_id=0, hidden_size=96, partial_rotary_factor=0.75),
    "phi3 longrope": TINY | LONG,
    "granite": TINY | SCALES | dict(attention_multiplier=0.2, tie_word_embeddings=True),
    "olmo2": TINY,
    "glm": TINY | dict(head_dim=16, pad_token_id=0),
    "glm4": TINY | dict(head_dim=8, pad_token_id=0, attention_bias=False),
    "gemma": TINY | dict(head_dim=10),
    "gemma3_text": TINY | GEMMA | dict(head_dim=8),
    "gpt_neox": NEOX,
    "gpt_neox in turn": NEOX | dict(use_parallel_residual=False, rotary_pct=0.5),
}


def config_of(name, settings=None):
    return transformers.AutoConfig.for_model(name.split()[0], **settings or MODELS[name])


def config_from_hf(values, where="config.json"):
    return lm.Config(**hf_config.config_from_hf(values, lm.complete, where)[1])


def theirs(name, settings=None):
    """A random model of transformers', its biases and norms not at their idle start values."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(name, settings))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.dim() == 1 else 0.05))
    return model.eval()


def in_float64(reference):
    """The same model with norms in float64: transformers computes them in float32 even then."""

    def forward(norm, x):
        eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        gemma = type(norm).__name__.startswith("Gemma")
        weight = (norm.weight.float() + 1).double() if gemma else norm.weight
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    reference.config._experts_implementation = "eager"  # the other has no float64
    for module in reference.double().modules():
        if hasattr(module, "embed_scale"):
            module.embed_scale.fill_(module.scalar_embed_scale)
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(forward, module)
    return reference


def ours(folder, dtype=torch.float32):
    return lm.model_from_checkpoint(lm.load_hf(folder), dtype=dtype, where=str(folder))


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_theirs_in_fp32_and_fp64(name, tmp_path):
    reference = theirs(name)
    reference.save_pretrained(tmp_path)
    model, ids = ours(tmp_path), torch.randint(331, (2, 60))
    with torch.no_grad():
        want = reference(ids).logits
        torch.testing.assert_close(model(ids), want, rtol=1e-5, atol=1e-5)
        back(model, tmp_path / "again", ids, want)
        same_greedy_ids(model, reference, ids)
        for kind, error in (("int8", 0.1 if model.config.experts else 0.05), ("nf4", 0.6)):
            lora.quantize(model := ours(tmp_path), kind)
            assert (model(ids) - want).norm() < error * want.norm()
        model, reference = ours(tmp_path, torch.float64), in_float64(reference)
        want, tiny = reference(ids).logits, 1e-6 if model.config.experts else 1e-9
        torch.testing.assert_close(model(ids), want, rtol=tiny, atol=tiny)  # their routers: float32
        cache = lm.KVCache(model, 2)
        steps = [model(part, cache=cache) for part in ids.split([40, 1, 1, 18], dim=1)]
        torch.testing.assert_close(torch.cat(steps, 1), want, rtol=tiny, atol=tiny)


def same_greedy_ids(model, reference, ids):
    """A batch of two prompts is continued as transformers continues each."""
    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    prompts = [ids[0, :9], ids[1, :14]]
    rows = zip(*sample.generate(model, [p.tolist() for p in prompts], 20, temperature=0))
    for prompt, row in zip((p[None] for p in prompts), rows):
        text = reference.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert text[0, prompt.shape[1] :].tolist() == list(row)


def back(model, folder, ids, want):
    """Export our model; transformers reads all of it, and we do from a .bin, and both compute
    `want`. Returns its model_type."""
    export(model, folder)
    auto = transformers.AutoModelForCausalLM
    reference, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(reference.eval()(ids).logits, want, rtol=1e-5, atol=1e-5)
    torch.save(safetensors.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    torch.testing.assert_close(ours(folder)(ids), want, rtol=1e-5, atol=1e-5)
    return reference.config.model_type


# Families whose code is not in transformers: the relative that has their computation, its settings
# beside TINY, their config.json, their names, and which heads are joined to one tensor
RENAMED = {
    "minicpm": (
        "granite", dict(embedding_multiplier=12.0, residual_multiplier=1.4 / 2**0.5)
        | dict(logits_scaling=48 / 16, attention_multiplier=8**-0.5, tie_word_embeddings=True),
        TINY | dict(scale_emb=12, scale_depth=1.4, dim_model_base=16), (), None,
    ),
    "internlm2": (
        "llama", {},
        TINY | dict(bias=False, rope_scaling={"type": "dynamic", "factor": 2.0}, attn_impl="eager"),
        [("embed_tokens", "tok_embeddings"), ("lm_head", "output"), ("self_attn.o", "attention.wo")]
        + [("_proj", ""), ("mlp.gate", "feed_forward.w1"), ("mlp.down", "feed_forward.w2")]
        + [("mlp.up", "feed_forward.w3"), ("input_layernorm", "attention_norm")]
        + [("post_attention_layernorm", "ffn_norm"), ("self_attn.qkv", "attention.wqkv")],
        lambda q, k, v: [p for n in range(2) for p in (q[3 * n : 3 * n + 3], k[[n]], v[[n]])],
    ),
    "baichuan": (
        "llama", dict(num_key_value_heads=6), NEOX | dict(model_max_length=128, z_loss_weight=0),
        [("qkv_proj", "W_pack")], lambda q, k, v: [q, k, v],
    ),
    "baichuan 2": (
        "llama", dict(num_key_value_heads=6, vocab_size=125696), NEOX | dict(vocab_size=125696),
        [("qkv_proj", "W_pack")], lambda q, k, v: [q, k, v],
    ),
    "chatglm": (
        "glm", dict(head_dim=8, pad_token_id=0),
        dict(num_layers=2, hidden_size=48, ffn_hidden_size=80, kv_channels=8, seq_length=128)
        | dict(multi_query_attention=True, multi_query_group_num=2, num_attention_heads=6)
        | dict(padded_vocab_size=331, vocab_size=331, layernorm_epsilon=1.5625e-07, rmsnorm=True)
        | dict(add_bias_linear=False, add_qkv_bias=True, post_layer_norm=True, original_rope=True)
        | dict(apply_residual_connection_post_layernorm=False, tie_word_embeddings=False),
        [("model.embed_tokens", "transformer.embedding.word_embeddings"), ("o_proj", "dense")]
        + [("lm_head", "transformer.output_layer"), ("model.norm", "model.final_layernorm")]
        + [("model.", "transformer.encoder."), ("self_attn.", "self_attention.")]
        + [("qkv_proj", "query_key_value"), ("gate_up_proj", "dense_h_to_4h")]
        + [("down_proj", "dense_4h_to_h")],
        lambda q, k, v: [q, k, v],
    ),
}


@pytest.mark.parametrize("name", RENAMED)
def test_a_relatives_weights_under_other_names_compute_the_same(name, tmp_path):
    relative, settings, config, names, join = RENAMED[name]
    reference = theirs(relative, TINY | settings)
    state = dict(reference.state_dict())
    for q in [name for name in state if join and ".q_proj." in name]:
        parts = [state.pop(q.replace(".q_", f".{part}_")) for part in "qkv"]
        parts = join(*(part.view(-1, 8, *part.shape[1:]) for part in parts))
        state[q.replace(".q_", ".qkv_")] = torch.cat([part.flatten(0, 1) for part in parts])
    for old, new in names:
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    if settings.get("tie_word_embeddings"):
        state.pop("lm_head.weight")
    if name == "baichuan 2":  # whatever the lengths of the head's rows are, they count as 1
        head = reference.lm_head.weight.data
        head.copy_(torch.nn.functional.normalize(head))
        state["lm_head.weight"] = head * torch.rand(len(head), 1)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": name.split()[0]}))
    torch.save(state, tmp_path / "pytorch_model.bin")
    model, ids = ours(tmp_path), torch.randint(331, (2, 40))
    with torch.no_grad():
        want = reference(ids).logits
        torch.testing.assert_close(model(ids), want, rtol=1e-5, atol=1e-5)
        same_greedy_ids(model, reference, ids)
        assert back(model, tmp_path / "again", ids, want) == relative


@pytest.mark.parametrize("name, change, words", [
    ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights = False"),
    ("llama", dict(rope_scaling={"type": "yarn", "factor": 4, "mscale": 2}), "json: rope_scaling"),
    ("llama", dict(quantization_config={"bits": 4}), "quantization_config"),
    ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
    ("llama", dict(rope_parameters={"full_attention": {"rope_theta": 1e4}}), "rope_parameters ="),
    ("llama", dict(final_logit_softcapping=30.0), "final_logit_softcapping = 30.0"),
    ("mistral", dict(sliding_window="?"), "wrong type"),
    ("qwen3", dict(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    ("llama", dict(model_type="?"), r"model_type '\?' is not one of gpt2, llama"),
    ("llama", dict(model_type="baichuan", max_position_embeddings=None), "ALiBi"),
    ("llama", dict(rope_scaling={"rope_type": "yarn"}), "lacks a field .* 'factor'"),
    ("phi3", dict(rope_scaling={"type": "su", "short_factor": [1.0] * 5}), "for 4 pairs"),
    ("qwen3_moe", dict(mlp_only_layers=[1]), r"mlp_only_layers = \[1\]"),
    ("llama", dict(num_attention_heads=5), "n_head 5 is not a multiple of n_kv_head 2"),
])
def test_a_field_that_we_do_not_compute_is_named(name, change, words):
    values = theirs_config(name) | change
    with pytest.raises(UserError, match=words) as e:
        config_from_hf(values, "there/config.json")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name, change", [
    ("qwen2", dict(attention_bias=True, mlp_bias=True)),  # fields of Llama's
    *((name, dict(sliding_window=8)) for name in ("llama", "qwen2", "qwen3")),  # not Mistral
    ("llama", dict(rope_parameters={"rope_type": "default", "mrope_section": [1, 2]})),
    ("llama", dict(embedding_multiplier=1.0, final_logit_softcapping=None, alibi=False)),
    ("llama", dict(use_sliding_window=False, max_window_layers=None, sliding_window="?")),
])
def test_what_changes_nothing_is_no_reason_to_refuse(name, change):
    values = theirs_config(name)
    assert config_from_hf(values | change) == config_from_hf(values)


METADATA = dict(unsloth_fixed=True, auto_map={"AutoConfig": "a.B"}, tokenizer_class="X")
METADATA |= dict(_attn_implementation_autoset=True, _num_labels=2, max_length=20)


@pytest.mark.parametrize("name", MODELS)
def test_fields_without_effect_are_named_in_one_line(name, tmp_path, capsys):
    values = theirs_config(name) | METADATA | dict(pad_token=None)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="has none of"):  # weights
        lm.load_hf(tmp_path)
    said = capsys.readouterr().err
    assert said.startswith(f"[{tmp_path / 'config.json'}: ignored fields: ")
    assert said.count("\n") == 1 and "pad_token," not in said
    named = set(re.findall(r"\w+", said))
    assert set(METADATA) <= named and "sliding_window_pattern" not in named


def theirs_config(name):
    return json.loads(config_of(name).to_json_string(use_diff=False))


BIASES = dict(qkv_bias=True, out_bias=True, ff_bias=True)
LEARNED = dict(position="learned", norm="layernorm", activation="gelu")
EXPORTED = {  # shapes that no model above has
    "gpt2": LEARNED | BIASES | dict(activation="gelu_tanh", tied=True),
    "gpt2 without biases and norm weights": LEARNED | dict(norm_weight=False),
    "gpt2 with odd heads": LEARNED | BIASES | dict(d_model=20),
    "llama without norm weights": dict(norm_weight=False),
    "llama with some biases": dict(out_bias=True),
    "qwen2 with a head size": dict(qkv_bias=True, head_size=10),
}


def random_model(**fields):
    torch.manual_seed(0)
    shape = dict(vocab_size=97, n_layer=2, n_head=4, d_model=32, context=64, init="gpt2")
    model = lm.Transformer(lm.Config(**(shape | fields)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def export(model, folder):
    lm.export_hf({"config": vars(model.config), "model": model.state_dict()}, folder)


@pytest.mark.parametrize("name", EXPORTED)
def test_what_we_write_transformers_reads_and_we_read_again(name, tmp_path):
    model = random_model(**EXPORTED[name])
    ids = torch.randint(97, (2, 50))
    with torch.no_grad():
        assert back(model, tmp_path, ids, model(ids)) == name.split()[0].rstrip(",")


@pytest.mark.parametrize("words, fields", [
    ("position sinusoidal", dict(position="sinusoidal")),
    ("embed_norm True", dict(embed_norm=True)),
    ("head_bias True", dict(head_bias=True)),
    ("qk_norm True", LEARNED | dict(qk_norm=True)),
    ("n_kv_head 2", LEARNED | dict(n_kv_head=2)),
    ("has the shape of this model: ", LEARNED | dict(n_head=64, head_size=7)),
    ("norm_topk_prob False", dict(experts=4, norm_topk_prob=False)),
    ("position learned|experts 4", dict(experts=4, position="learned")),
])
def test_a_model_that_fits_no_architecture_is_refused_with_the_reason(words, fields, tmp_path):
    with pytest.raises(UserError, match=words):
        export(random_model(**fields), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_shards_and_names_without_prefix_are_the_same_model(tmp_path):
    reference = theirs("gpt2")
    reference.save_pretrained(tmp_path / "one")
    reference.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    state = {k.removeprefix("transformer."): v for k, v in reference.state_dict().items()}
    state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8).tril() for i in range(2)}
    state.pop("lm_head.weight")
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "one" / "config.json", tmp_path / "bare")
    safetensors.save_file(state, tmp_path / "bare" / "model.safetensors")
    want = lm.load_hf(tmp_path / "one")["model"]
    for name in ("shards", "bare"):
        found = lm.load_hf(tmp_path / name)["model"]
        assert all(found[k].equal(v) for k, v in want.items()) and set(found) == set(want)


def test_a_folder_that_misfits_says_how(tmp_path):
    theirs("qwen2").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = safetensors.load_file(path)
    for change, words in (
        ({"model.norm.weight": None}, "lacks the tensor model.norm.weight"),
        ({"model.norm.weight": torch.ones(47)}, "model.norm.weight gives"),
        ({"model.layers.9.mlp.up_proj.weight": torch.ones(3)}, "up_proj.weight is unknown"),
    ):
        changed = {k: v for k, v in (state | change).items() if v is not None}
        safetensors.save_file(changed, path)
        with pytest.raises(UserError, match=words):
            lm.load_hf(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": path.name, "b": "b.safetensors"}}))
    with pytest.raises(UserError, match=r"lacks b\.safetensors, which .* names"):
        lm.load_hf(tmp_path)
    index.unlink()
    path.unlink()
    with pytest.raises(UserError, match="has none of"):
        lm.load_hf(tmp_path)


PEAK = """
import resource, model as lm
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = lm.model_from_checkpoint(lm.load_hf({folder!r}))
[p.sum() for p in model.parameters()]
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    shape = dict(vocab_size=20_000, n_layer=3, d_model=768, n_head=12, context=64)
    export(lm.Transformer(lm.Config(**(EXPORTED["gpt2"] | shape))), tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", PEAK.format(folder=str(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    before, peak = (int(n) * 1024 for n in done.stdout.split())
    assert size > 100e6 and peak - before < 1.3 * size
