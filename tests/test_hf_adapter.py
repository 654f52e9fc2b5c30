"""Adapters in peft's files: written by us and read by peft, written by peft and read by us."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lora
import model as lm
import sample
from data.cli import UserError
from data.hf_adapter import export_peft

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
safe = pytest.importorskip("safetensors.torch")

SHAPE = dict(n_layer=2, n_head=4, d_model=32, context=64, vocab_size=320, init="gpt2")
GATED = SHAPE | dict(n_kv_head=2, d_ff=56, position="rope", norm="rmsnorm", activation="swiglu")
CONFIGS = {
    "gpt2": lm.preset("gpt2", **SHAPE),
    "llama": lm.Config(**GATED),
    "qwen2": lm.Config(**GATED, qkv_bias=True, tied=True),
    "qwen3": lm.Config(**GATED, qk_norm=True, head_size=12),
}
MODULES = {  # what each group of ours is called in transformers
    "gpt2": {"attention": ["c_attn", "attn.c_proj"], "mlp": ["c_fc", "mlp.c_proj"]},
    "llama": {
        "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "mlp": ["gate_proj", "up_proj", "down_proj"],
    },
}
IDS = torch.randint(320, (2, 20), generator=torch.Generator().manual_seed(3))
every_family = pytest.mark.parametrize("family", CONFIGS)
every_group = pytest.mark.parametrize("group", ("attention", "mlp", "all"))


def modules(family, group):
    groups = MODULES["gpt2" if family == "gpt2" else "llama"]
    return groups["attention"] + groups["mlp"] if group == "all" else groups[group]


def base_of(family, **changes):
    """The content of a checkpoint with random weights, no bias or norm at its idle start value."""
    torch.manual_seed(0)
    model = lm.Transformer(lm.Config(**(asdict(CONFIGS[family]) | changes)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.dim() == 1 else 0.05))
    config, state = asdict(model.config), lm.unwrapped_state(model)
    return {"config": config, "model": state, "tokenizer": {"kind": "byte"}}


def theirs(base, folder):
    """The base in transformers, by way of the files that we write for it."""
    lm.export_hf(base, folder)
    auto, eager = transformers.AutoModelForCausalLM, dict(attn_implementation="eager")
    return auto.from_pretrained(folder, dtype=torch.float32, **eager).eval()


@torch.no_grad()
def ours(base, targets="attention", rank=4, alpha=12, dropout=0.1, seed=1):
    """The content of an adapter checkpoint over `base`, as finetune.py saves it; B is not zero."""
    model = lm.model_from_checkpoint(base)
    settings = dict(targets=targets, rank=rank, alpha=alpha, dropout=dropout)
    lora.add_lora(model, **settings)
    torch.manual_seed(seed)
    for layer in lora.adapted(model).values():
        for p in (*layer.a.values(), *layer.b.values()):
            p.normal_(std=0.2)
    about = settings | dict(quantize=None, base="base.pt", modules_to_save=[], base_vocab=320)
    about |= dict(base_sha256=lora.fingerprint(base["model"]))
    content = {"config": base["config"], "model": lora.adapter_state(model)}
    return content | {"tokenizer": base["tokenizer"], "data": {}, "adapter": about, "step": 1}


@torch.no_grad()
def by_peft(base, folder, bare=None, **settings):
    """Logits of peft's model with a new random adapter, which lies in `folder` then."""
    torch.manual_seed(2)
    bare = bare or theirs(base, folder / "bare")
    settings = dict(r=4, lora_alpha=12, task_type="CAUSAL_LM") | settings
    model = peft.get_peft_model(bare, peft.LoraConfig(**settings, init_lora_weights=False)).eval()
    halves = [p for name, p in model.named_parameters() if "lora_" in name]
    for p in halves:
        p.normal_(std=0.2)
    model.save_pretrained(folder)
    return model(IDS).logits


@torch.no_grad()
def logits_of(base, content):
    """Logits of our base with an adapter over it; one from peft's files gets its base's mark."""
    mark = dict(base="base.pt", base_sha256=lora.fingerprint(base["model"]))
    content = content | {"adapter": mark | content["adapter"]}
    return lora.load_adapted(base, {"one": content})(IDS)


def imported(folder, base):
    return lora.import_adapter(folder, lm.Config.from_dict(base["config"]))


def exported(content, base, folder):
    export_peft(content, *lora.linears(lm.Config.from_dict(base["config"])), folder)
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def close(a, b, apart_from=None):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    if apart_from is not None:
        assert (a - apart_from).abs().max() > 0.01, "an adapter that does nothing shows nothing"


def bare_logits(base):
    with torch.no_grad():
        return lm.model_from_checkpoint(base)(IDS)


# ---- ours to peft --------------------------------------------------------------------------


@torch.no_grad()
def check_export(base, content, folder):
    values = exported(content, base, folder)
    bare = theirs(base, folder / "bare")
    model = peft.PeftModel.from_pretrained(bare, folder).eval()
    want = logits_of(base, content)
    close(model(IDS).logits, want, bare_logits(base))
    close(model.merge_and_unload()(IDS).logits, want)
    return values


@every_family
@every_group
def test_our_adapter_gives_the_same_logits_in_peft(family, group, tmp_path):
    base = base_of(family)
    values = check_export(base, ours(base, group), tmp_path)
    assert values["fan_in_fan_out"] == (family == "gpt2")
    if family != "gpt2" or group == "all":  # else c_proj alone would mean one more layer
        last = {name.rpartition(".")[2] for name in modules(family, group)}
        assert set(values["target_modules"]) == last


@pytest.mark.parametrize(
    "targets, several",
    [
        ("q", {}),
        ("k,v", {"c_attn": 2}),
        ("v,out,up", {"c_attn": 1}),
        ("blocks.0.attention.q,blocks.1.attention.k,blocks.1.attention.v", {"h.1": 2}),
        ("q,blocks.1.attention.v,down", {"h.1": 2}),
        ("q,k,blocks.0.attention.v", {"h.0": 3, "h.1": 2}),
    ],
)
def test_some_of_q_k_and_v_become_one_pair_of_gpt2_with_the_same_scale(targets, several, tmp_path):
    base = base_of("gpt2")
    values = check_export(base, ours(base, targets, rank=3, alpha=7), tmp_path)
    want = {key: n for key, n in several.items() if n > 1}
    for field, one in (("rank_pattern", 3), ("alpha_pattern", 7)):
        found = values[field]
        assert sorted(found.values()) == sorted(n * one for n in want.values())
        assert all(any(key in name for name in found) for key in want)


def test_an_untied_head_a_single_block_and_more_than_ten_of_them_are_exported(tmp_path):
    for i, (family, targets, changes) in enumerate(
        [
            ("gpt2", "head,q", dict(tied=False)),
            ("llama", "head,up", {}),
            ("qwen3", "blocks.1.attention.out", {}),
            ("gpt2", "blocks.1.attention.q,blocks.1.attention.k", dict(n_layer=12)),
            ("llama", "blocks.1.attention.q,blocks.11.attention.k", dict(n_layer=12)),
        ]
    ):
        base = base_of(family, **changes)
        check_export(base, ours(base, targets), tmp_path / str(i))


def test_norms_without_weights_and_biases_that_are_missing_are_filled_in(tmp_path):
    base = base_of("gpt2", norm_weight=False, qkv_bias=False, ff_bias=False)
    check_export(base, ours(base, "all"), tmp_path)


def test_spare_rows_of_a_grown_table_are_not_in_the_way(tmp_path):
    base = base_of("llama")
    content = ours(base, "all")
    grown = content | {"config": base["config"] | dict(vocab_size=384)}
    exported(grown, base, tmp_path)
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(theirs(base, tmp_path / "bare"), tmp_path)(IDS)
    want = logits_of(base, grown)
    assert want.shape[-1] == 384
    close(found.logits, want[..., :320])


def test_an_adapter_that_peft_cannot_express_is_not_exported(tmp_path):
    base, plain = base_of("llama"), ours(base_of("llama"))
    about, state = plain["adapter"], plain["model"]
    name, wide = "blocks.0.attention.q.b", {"blocks.1.attention.q.a": torch.zeros(4, 40)}
    for change, message in (
        (dict(adapter=about | dict(modules_to_save=["embed"])), "special tokens"),
        (dict(adapter=about | dict(quantize="nf4")), "a base in nf4.*export the whole model"),
        (dict(adapter=about | dict(rank=5)), r"does not fit this base: .* the model has \(5, 32\)"),
        (dict(model=state | wide), r"attention.q.a is \(4, 40\), the model has \(4, 32\)"),
        (dict(model={k: v for k, v in state.items() if k != name}), f"{name} .* is missing"),
        (dict(model=state | {"blocks.7.attention.q.a": torch.zeros(4, 32)}), "blocks.7.* unknown"),
    ):
        with pytest.raises(UserError, match=message) as error:
            exported(plain | change, base, tmp_path / "out")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no Hugging Face architecture has"):
        export_peft(plain, *lora.linears(lm.preset("tiny")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- peft to ours --------------------------------------------------------------------------


@every_family
@every_group
def test_pefts_adapter_gives_the_same_logits_here(family, group, tmp_path):
    base = base_of(family)
    names = modules(family, group)
    settings = dict(target_modules=names, fan_in_fan_out=family == "gpt2", lora_dropout=0.2)
    want = by_peft(base, tmp_path, **settings)
    content = imported(tmp_path, base)
    close(logits_of(base, content), want, bare_logits(base))
    about = content["adapter"]
    assert (about["rank"], about["alpha"], about["dropout"]) == (4, 12, 0.2)
    assert sorted(about["targets"].split(",")) == sorted(
        name.rpartition(".")[2]
        for parts in [lora.find(lm.meta_model(CONFIGS[family]), group, torch.nn.Linear)]
        for name in parts
        if name.startswith("blocks.0.")
    )


PATTERNS = {
    "gpt2": dict(
        rank_pattern={"c_attn": 6, r"h.1.mlp.c_proj": 2, "mlp.c_proj": 3},
        alpha_pattern={"^transformer.h.0.attn.c_attn": 5, r".*\.1\.mlp.c_fc": 0.5},
    ),
    "llama": dict(
        rank_pattern={"q_proj": 6, r"layers.1.mlp.down_proj": 2, "mlp.down_proj": 3},
        alpha_pattern={"^model.layers.0.self_attn.v_proj": 5, r".*\.1\.mlp.up_proj": 0.5},
    ),
}


@every_family
@pytest.mark.parametrize("rslora", (False, True))
@pytest.mark.parametrize("patterns", (False, True))
def test_ranks_alphas_and_rslora_mean_what_they_mean_to_peft(family, rslora, patterns, tmp_path):
    base = base_of(family)
    settings = PATTERNS["gpt2" if family == "gpt2" else "llama"] if patterns else {}
    names = modules(family, "all")
    want = by_peft(base, tmp_path, target_modules=names, use_rslora=rslora, **settings)
    content = imported(tmp_path, base)
    close(logits_of(base, content), want, bare_logits(base))
    assert content["adapter"]["rank"] == (6 if patterns else 4)


@pytest.mark.parametrize(
    "settings",
    [
        dict(target_modules=r".*layers\.1\..*(q_proj|mlp\.up_proj)"),
        dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[1]),
        dict(target_modules=["q_proj"], layers_to_transform=0, layers_pattern="layers"),
        dict(target_modules=["q_proj", "v_proj"], exclude_modules=["layers.0.self_attn.v_proj"]),
        dict(target_modules=["q_proj", "v_proj"], exclude_modules=r".*\.1\..*v_proj"),
        dict(target_modules=["model.layers.0.self_attn.q_proj", "down_proj"]),
        dict(target_modules="all-linear"),
        dict(target_modules=["q_proj"], task_type=None),
    ],
)
def test_modules_chosen_in_every_way_are_the_ones_adapted(settings, tmp_path):
    base = base_of("llama")
    want = by_peft(base, tmp_path, **settings)
    close(logits_of(base, imported(tmp_path, base)), want, bare_logits(base))


def test_a_head_of_its_own_may_have_an_adapter_but_a_tied_one_may_not(tmp_path):
    for family, save in (("llama", True), ("qwen2", False)):
        base, folder = base_of(family), tmp_path / family
        bare = theirs(base, folder / "bare")
        model = peft.get_peft_model(bare, peft.LoraConfig(target_modules=["lm_head", "q_proj"]))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.normal_(std=0.2)
            want = model.eval()(IDS).logits
        model.save_pretrained(folder, save_embedding_layers=False)
        if save:
            close(logits_of(base, imported(folder, base)), want, bare_logits(base))
            model.save_pretrained(folder, save_embedding_layers=True)
            with pytest.raises(UserError, match=r"base_layer\.weight .* is unknown"):
                imported(folder, base)
        else:
            with pytest.raises(UserError, match="head shares its weight"):
                imported(folder, base)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_adapters_in_half_precision_become_float32(dtype, tmp_path):
    base = base_of("gpt2")
    by_peft(base, tmp_path, target_modules=["c_attn"])
    file = tmp_path / "adapter_model.safetensors"
    half = {k: v.to(dtype) for k, v in safe.load_file(file).items()}
    safe.save_file(half, file)
    content = imported(tmp_path, base)
    assert {t.dtype for t in content["model"].values()} == {torch.float32}
    a = half["base_model.model.transformer.h.1.attn.c_attn.lora_A.weight"]
    assert torch.equal(content["model"]["blocks.1.attention.k.a"], a.float())
    with torch.no_grad():
        model = peft.PeftModel.from_pretrained(theirs(base, tmp_path / "bare"), tmp_path)
        close(logits_of(base, content), model(IDS).logits, bare_logits(base))


@every_family
@every_group
def test_there_and_back_again_is_the_same_model(family, group, tmp_path):
    base = base_of(family)
    content = ours(base, group)
    exported(content, base, tmp_path / "one")
    back = imported(tmp_path / "one", base)
    close(logits_of(base, back), logits_of(base, content), bare_logits(base))
    if family != "gpt2":  # whose q, k and v came back with the rank of all three
        assert all(torch.equal(back["model"][k], t) for k, t in content["model"].items())
        for field in ("rank", "alpha", "dropout", "quantize", "modules_to_save"):
            assert back["adapter"][field] == content["adapter"][field]
    exported(back, base, tmp_path / "two")
    again = imported(tmp_path / "two", base)
    close(logits_of(base, again), logits_of(base, content))


# ---- refusals ------------------------------------------------------------------------------


@pytest.fixture
def llama_folder(tmp_path):
    base = base_of("llama")
    by_peft(base, tmp_path, target_modules=["q_proj", "v_proj"])
    return tmp_path, base


def refused(folder, base, message, kind=UserError):
    with pytest.raises(kind, match=message) as error:
        imported(folder, base)
    assert "\n" not in str(error.value)


REFUSED_FIELDS = [
    ("peft_type", "IA3"),
    ("peft_type", None),
    ("task_type", "SEQ_CLS"),
    ("bias", "all"),
    ("bias", "lora_only"),
    ("use_dora", True),
    ("lora_bias", True),
    ("modules_to_save", ["lm_head"]),
    ("trainable_token_indices", [1, 2]),
    ("target_parameters", ["x"]),
    ("layer_replication", [[0, 2]]),
    ("alora_invocation_tokens", [1]),
    ("use_qalora", True),
    ("megatron_config", {"x": 1}),
    ("loftq_config", {"loftq_bits": 4}),
    ("init_lora_weights", "pissa"),
    ("init_lora_weights", "loftq"),
    ("ensure_weight_tying", True),
    ("a_field_of_tomorrow", "on"),
]


@pytest.mark.parametrize("field, value", REFUSED_FIELDS)
def test_a_field_that_would_change_the_result_is_refused_by_its_name(field, value, llama_folder):
    folder, base = llama_folder
    where = folder / "adapter_config.json"
    values = json.loads(where.read_text(encoding="utf-8")) | {field: value}
    where.write_text(json.dumps(values), encoding="utf-8")
    refused(folder, base, f"adapter_config.json: {field} = .* is not implemented here")


SENSELESS = [
    ("lora_alpha", 0, "alpha 0"),
    ("lora_alpha", -1, "alpha -1"),
    ("lora_alpha", float("nan"), "alpha nan"),
    ("lora_alpha", float("inf"), "alpha inf"),
    ("lora_alpha", "12", "makes no sense"),
    ("lora_alpha", [12], "makes no sense"),
    ("lora_dropout", 1.0, "lora_dropout 1.0 is not in"),
    ("lora_dropout", "much", "makes no sense"),
    ("alpha_pattern", ["q_proj"], "makes no sense"),
    ("alpha_pattern", {"(": 3}, "makes no sense"),
    ("alpha_pattern", {"q_proj": "x"}, "makes no sense"),
]


@pytest.mark.parametrize("field, value, message", SENSELESS)
def test_a_field_that_makes_no_sense_is_one_line(field, value, message, llama_folder):
    folder, base = llama_folder
    where = folder / "adapter_config.json"
    values = json.loads(where.read_text(encoding="utf-8")) | {field: value}
    where.write_text(json.dumps(values), encoding="utf-8")
    refused(folder, base, message)


def test_tensors_that_do_not_fit_are_named(llama_folder):
    folder, base = llama_folder
    file = folder / "adapter_model.safetensors"
    good, stem = safe.load_file(file), "base_model.model.model.layers.0.self_attn.q_proj."
    half, other = stem + "lora_B.weight", stem.replace("layers.0", "layers.5") + "lora_A.weight"
    embedding = "base_model.model.model.embed_tokens.lora_embedding_A"
    for change, message in (
        ({half: None}, r"q_proj.lora_B.weight \(32, 4\) is missing"),
        ({half: good[half].T}, r"q_proj.lora_B.weight is \(4, 32\), the model has \(32, 4\)"),
        ({other: torch.zeros(4, 32)}, r"layers.5.* is unknown"),
        ({stem + "lora_magnitude_vector": torch.zeros(32)}, "lora_magnitude_vector .* is unknown"),
        ({stem + "lora_B.bias": torch.zeros(32)}, "lora_B.bias .* is unknown"),
        ({embedding: torch.zeros(4, 320)}, "lora_embedding_A .* is unknown"),
    ):
        changed = {k: v.contiguous() for k, v in (good | change).items() if v is not None}
        safe.save_file(changed, file)
        refused(folder, base, message)
    safe.save_file(good, file)
    refused(folder, base_of("llama", d_ff=64, d_model=48), r"the model has \(4, 48\)")
    refused(folder, base_of("gpt2"), "is unknown to the model")
    imported(folder, base)
    refused(folder / "nowhere", base, "adapter_config.json is missing", UserError)
    whole = file.read_bytes()
    for bad in (b"", whole[:-4], whole[: len(whole) // 2], b"{" * 100):
        file.write_bytes(bad)
        refused(folder, base, "adapter_model.safetensors")
    file.unlink()
    with pytest.raises((UserError, OSError), match=r"adapter_model\.safetensors"):
        imported(folder, base)


# ---- the command line ----------------------------------------------------------------------


def run(*words):
    command = [sys.executable, str(ROOT / "lora.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, encoding="utf-8")


@pytest.mark.parametrize("family", ("gpt2", "qwen3"))
def test_the_commands_carry_an_adapter_to_peft_and_back(family, tmp_path):
    base = base_of(family)
    content = ours(base, "all")
    lm.save_checkpoint(tmp_path / "base.pt", base)
    lm.save_checkpoint(tmp_path / "run" / "best.pt", content)
    flags = "--ckpt", tmp_path / "base.pt", "--adapter"
    done = run("export", *flags, tmp_path / "run", "--out", tmp_path / "peft")
    assert done.returncode == 0 and str(tmp_path / "peft") in done.stdout, done.stderr
    with torch.no_grad():
        bare = theirs(base, tmp_path / "bare")
        want = peft.PeftModel.from_pretrained(bare, tmp_path / "peft").eval()(IDS).logits
    close(want, logits_of(base, content), bare_logits(base))
    done = run("import", *flags, tmp_path / "peft", "--out", tmp_path / "back")
    assert done.returncode == 0 and "layers adapted" in done.stdout, done.stderr
    saved = lm.load_checkpoint(tmp_path / "back")
    assert saved["tokenizer"] == base["tokenizer"]
    assert saved["adapter"]["base_sha256"] == content["adapter"]["base_sha256"]
    for ckpt, over in ((tmp_path / "base.pt", [tmp_path / "back"]), (tmp_path / "back", [])):
        model, tokenizer, _ = sample.load(ckpt, "cpu", adapters=over)
        assert tokenizer.n_vocab == 257
        with torch.no_grad():
            close(model(IDS), want)
    done = run("merge", *flags, tmp_path / "back", "--out", tmp_path / "merged.pt")
    assert done.returncode == 0, done.stderr
    close(bare_logits(lm.load_checkpoint(tmp_path / "merged.pt")), want)


def test_the_commands_refuse_in_one_line_and_leave_what_was_there(tmp_path):
    base, other = base_of("llama"), base_of("llama", norm_weight=False)
    content = ours(base)
    lm.save_checkpoint(tmp_path / "base.pt", base)
    lm.save_checkpoint(tmp_path / "other.pt", other)
    lm.save_checkpoint(tmp_path / "run.pt", content)
    exported(content, base, tmp_path / "peft")
    config = (tmp_path / "peft" / "adapter_config.json").read_bytes()
    for command, ckpt, adapter, out, message in (
        ("export", "base.pt", "run.pt", "peft", "exists: name another --out"),
        ("export", "other.pt", "run.pt", "new", "other.pt is another model"),
        ("export", "base.pt", "base.pt", "new", "no adapter but a whole model"),
        ("export", "base.pt", "nothing", "new", "does not exist"),
        ("import", "base.pt", "peft", "run.pt", "exists: name another --out"),
        ("import", "run.pt", "peft", "new", "is an adapter itself"),
        ("import", "base.pt", "nothing", "new", "adapter_config.json is missing"),
        ("import", "base.pt", "run.pt", "new", ""),
    ):
        paths = [str(tmp_path / name) for name in (ckpt, adapter, out)]
        words = [w for f in zip(("--ckpt", "--adapter", "--out"), paths) for w in f]
        with pytest.raises((UserError, OSError)) as error:
            lora.main([command, *words])
        assert message in str(error.value) and "\n" not in str(error.value)
        assert not (tmp_path / "new").exists()
    done = run("import", *words)  # one of them as a program
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("lora.py: ") and done.stderr.count("\n") == 1
    assert (tmp_path / "peft" / "adapter_config.json").read_bytes() == config
