"""The commands with models of the Hub, which a server on this machine plays."""

import io
import itertools
import json
import shutil
import sys
from pathlib import Path

import check_logits
import pytest
import torch
from conftest import prompt_ids, render_chat, serve_folder
from test_hf_tokenizer import trained
from test_templates import TALKS, TOOLS, pair

import finetune
import lora
import model as lm
import prepare_data
import sample
import train
from data.chat import CHAT_TOKENS
from data.cli import UserError
from data.hf_tokenizer import hub_tokenizer
from data.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
SCRIPTS = {f"{m.__name__}.py": m.main for m in (prepare_data, train, sample, finetune, lm, lora)}
SCRIPTS |= {"check_logits.py": check_logits.main}
TEXT = "It was a bright cold day in April, and the clocks were striking 13. 你好，世界！\n" * 60
QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
SMALL |= dict(num_key_value_heads=1, max_position_embeddings=64)


def save_model(folder, config, tokens):
    """A random model and a tokenizer, as transformers writes them."""
    fast = trained("gpt2", behind=tokens, size=330)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=tokens[0])
    wrapped.chat_template = CHATML if len(tokens) > 1 else None
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config.vocab_size, config.eos_token_id, config.bos_token_id = 384, wrapped.eos_token_id, None
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A server with openai-community/gpt2 (a tiny one) and ann/qwen; its address."""
    root = tmp_path_factory.mktemp("hub")
    gpt2 = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64)
    save_model(root / "openai-community/gpt2/resolve/main", gpt2, QWEN_TOKENS[:1])
    shape = SMALL | dict(num_hidden_layers=2, max_position_embeddings=128)
    qwen = transformers.Qwen3Config(**shape, head_dim=8, tie_word_embeddings=True)
    save_model(root / "ann/qwen/resolve/main", qwen, QWEN_TOKENS)
    with serve_folder(root) as url:
        yield url, root


@pytest.fixture
def run(hub, elsewhere, monkeypatch, capsys):
    """Runs a script's main in an empty folder, with the hub; returns its output, or with code=2 its
    error."""
    monkeypatch.setenv("HF_ENDPOINT", hub[0])

    def call(script, *flags, code=0, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        if code == 2:
            with pytest.raises((UserError, SystemExit)) as error:
                SCRIPTS[script](list(flags))
            assert "\n" not in str(error.value)
            return f"{error.value}\n{capsys.readouterr().err}"
        assert (SCRIPTS[script](list(flags)) or 0) == code
        return capsys.readouterr().out

    return call


def greedy(folder, prompt, n=20):
    """The ids that transformers writes, up to a special one: with nothing of ours."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = model.generate(ids, max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0)
    new, ends = out[0, ids.shape[1] :].tolist(), tokenizer.added_tokens_decoder
    return new[: next((k for k, i in enumerate(new, 1) if i in ends), n)]


def printed(output):
    return [int(i) for i in output.split("\n")[-2].split(",")]


@pytest.mark.parametrize("name, place", [("gpt2", "openai-community/gpt2"), ("ann/qwen",) * 2])
def test_a_model_of_the_hub_writes_what_transformers_writes(run, hub, name, place, monkeypatch):
    want = greedy(hub[1] / place / "resolve/main", "the clocks were")
    assert "gpt2" in run("model.py", "--ckpt", name) or "qwen" in name
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # it is there now
    flags = ("--ckpt", name, "--prompt", "the clocks were", "--temperature", "0")
    assert printed(run("sample.py", *flags, "--max_new_tokens", "20", "--print_ids")) == want
    assert "the same best token at 100.00%" in run("check_logits.py", name)


def test_check_against_recorded_logits(run, hub):
    folder = hub[1] / "ann/qwen/resolve/main"
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([[5, 7, 300, 11]])
    logits = reference(ids).logits.detach()
    for content, code, told in (
        ({"ids": ids[0].tolist(), "logits": logits[0]}, 0, "100.00%"),
        ({"ids": ids, "logits": logits + torch.eye(4, 384) * 3}, 1, "difference 3.0"),
        ({"ids": ids + 373, "logits": logits}, 2, "the ids must be from 0 to 383"),
        ({"ids": [[]], "logits": logits[:, :0]}, 2, "x.pt holds no ids and logits"),
    ):
        torch.save(content, "x.pt")
        assert told in run("check_logits.py", "ann/qwen", "--against", "x.pt", code=code)


def prepare(run, tokenizer):
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    run("prepare_data.py", "text.txt", "--tokenizer", tokenizer, "--name", "text")


def test_pretraining_goes_on_from_a_model_of_the_hub_and_goes_back(run):
    prepare(run, "ann/qwen")
    # enough to unlearn the ids that no token has, which only transformers would write
    flags = ("--max_steps", "40", "--batch_size", "2", "--eval_tokens", "64")
    run("train.py", "--ckpt", "ann/qwen", "--data", "text", *flags, "--out", "out/on")
    assert lm.load_checkpoint("out/on")["tokenizer"]["kind"] == "hf"
    assert "Qwen3ForCausalLM" in run("model.py", "--ckpt", "out/on", "--export", "hf")
    prompt = "It was a bright 冷"
    flags = ("--prompt", prompt, "--temperature", "0", "--max_new_tokens", "20", "--print_ids")
    assert printed(run("sample.py", "--ckpt", "out/on", *flags)) == greedy("hf", prompt)


def test_finetuning_a_qwen_uses_its_own_template_and_its_adapter_travels(run, tmp_path):
    rows = [{"instruction": f"Say {i}", "output": f"{i}!"} for i in range(30)]
    Path("rows.json").write_text(json.dumps(rows), encoding="utf-8")
    flags = ["--max_steps", "3", "--eval_every", "3", "--eval_rows", "2", "--batch_tokens", "256"]
    output = run("finetune.py", "--ckpt", "ann/qwen", "--data", "rows.json", "--show_mask", "1")
    assert "<|im_start|>" in output and "<|assistant|>" not in output
    tune = ("finetune.py", "--ckpt", "ann/qwen", "--data", "rows.json", *flags)
    run(*tune, "--out", "out/full")
    assert lm.load_checkpoint("out/full")["config"]["vocab_size"] == 384  # nothing was added
    run(*tune, "--lora_rank", "2", "--out", "out/thin")
    for ckpt in ("out/full", "out/thin"):
        run("sample.py", "--ckpt", ckpt, "--chat", "--max_new_tokens", "8", stdin="Say 3\n")
    run("lora.py", "export", "--ckpt", "ann/qwen", "--adapter", "out/thin", "--out", "peft")
    assert (tmp_path / "peft/adapter_model.safetensors").exists()


def test_an_export_hands_on_how_to_talk_and_spares_what_is_there(run, hub, tmp_path):
    shutil.copytree(hub[1] / "ann/qwen/resolve/main", tmp_path / "chat")
    ids = hub_tokenizer(tmp_path / "chat")["added"]
    ends = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    Path("chat/generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    Path("chat/chat_template.jinja").write_text("{{ 'hey' }}")
    export = ("model.py", "--ckpt", "chat", "--export", "out")
    run(*export)
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    assert tokenizer.apply_chat_template([{"role": "user"}], tokenize=False) == "hey"
    config = transformers.GenerationConfig.from_pretrained("out")
    assert sorted(config.eos_token_id) == sorted(ends)
    assert "name a new folder or file for --export" in run(*export, code=2)


def test_a_name_without_a_model_and_a_model_without_a_tokenizer_are_named(run, hub, tmp_path):
    for name, words in ("ann/none", "ann/none"), ("nothing", "checkpoint nothing does not exist"):
        assert words in run("sample.py", "--ckpt", name, "--prompt", "x", code=2)
    shutil.copytree(hub[1] / "ann/qwen/resolve/main", tmp_path / "bare")
    (tmp_path / "bare/tokenizer.json").unlink()
    assert "Qwen3" in run("model.py", "--ckpt", "bare", "--export", "out-bare")
    assert "no tokenizer" in run("sample.py", "--ckpt", "bare", "--prompt", "x", code=2)


def edit(path, **changes):
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | changes))
    return values


@pytest.mark.parametrize("what", ["tokenizer", "config"])
def test_what_cannot_be_read_is_refused_before_its_weights_come(run, hub, what):
    folder = hub[1] / f"old/{what}/resolve/main"
    save_model(folder, transformers.LlamaConfig(**SMALL), QWEN_TOKENS[:1])
    if what == "config":
        edit(folder / "config.json", hidden_act="gelu")
    else:
        model = edit(folder / "tokenizer.json")["model"]
        edit(folder / "tokenizer.json", model=model | {"type": "Unigram"})
    err = run("sample.py", "--ckpt", f"old/{what}", "--prompt", "x", code=2)
    assert ("hidden_act" if what == "config" else "model Unigram: only byte-level BPE and") in err
    assert not list(Path("data/hub/old").rglob("*.safetensors*"))


@pytest.mark.parametrize("family", ["ours", "qwen3", "llama3.1", "mistral", "named"])
def test_an_exported_chat_is_rendered_alike(family, tmp_path):
    if family in ("ours", "named"):
        tokenizer = Tokenizer({"kind": "byte"}).with_special(CHAT_TOKENS * (family == "ours"))
        named = {"default": CHATML, "tool_use": "{{ tools | tojson }}" + CHATML}
        tokenizer = Tokenizer(tokenizer.spec | {"chat_template": named})
    else:
        tokenizer, _ = pair(family)
    config = lm.Config(vocab_size=tokenizer.n_vocab, n_layer=1, n_head=2, d_model=16, context=32)
    content = {"config": vars(config), "model": lm.Transformer(config).state_dict()}
    lm.save_checkpoint(tmp_path / "x.pt", content | {"tokenizer": tokenizer.spec})
    lm.main(["--ckpt", str(tmp_path / "x.pt"), "--export", str(tmp_path / "hf")])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    talks = ["turns", "system"] + ["a result", "calls"] * (family not in ("named", "llama3.1"))
    for talk, tools in itertools.product(map(TALKS.get, talks), (None, TOOLS)):
        how = {"tokenize": True, "return_dict": False, "tools": tools}
        got = theirs.apply_chat_template(talk, **how)
        assert got == render_chat(talk, tokenizer, tools=tools)[0]
        got = theirs.apply_chat_template(talk, add_generation_prompt=True, **how)
        assert got == prompt_ids(talk, tokenizer, tools)
