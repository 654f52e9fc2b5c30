"""GGUF files, read back by gguf, and their models run by llama.cpp (node-llama-cpp)."""

import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ALL_TEXT

import model as lm
from data import hf_tokenizer
from data.cli import UserError
from data.gguf import DTYPES, LLAMA3_PATTERN, split_name
from data.tokenizer import PATTERNS, Tokenizer, learn_bpe
from sample import naive_generate

gguf = pytest.importorskip("gguf")

BPE = Tokenizer(learn_bpe(400, [("", [ALL_TEXT])], len(ALL_TEXT), hf_tokenizer.GPT2_PATTERN))
SHAPE = dict(vocab_size=448, n_layer=2, n_head=4, d_model=64, context=128, init="gpt2")
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
MODELS = {
    "gpt2": lm._GPT2 | SHAPE,
    "llama": SHAPE | dict(n_kv_head=2),
    "llama 3": SHAPE | dict(rope_scaling=LLAMA3 | dict(original_max_position_embeddings=64)),
    "linear": SHAPE | dict(rope_scaling=dict(rope_type="linear", factor=2.0)),
    "qwen2": SHAPE | dict(n_kv_head=2, qkv_bias=True, tied=True),
    "qwen3": SHAPE | dict(n_kv_head=2, qk_norm=True, head_size=32),
}
WINDOW = {"window": MODELS["qwen3"] | dict(window=16)}


def content(name, tokenizer=BPE):
    """A checkpoint of a random model, sure enough of its tokens that rounding changes none."""
    torch.manual_seed(0)
    model = lm.Transformer(lm.Config(**(MODELS | WINDOW)[name])).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.normal_(p.mean(), 0.5 if "embed" in n else 0.12 if p.dim() > 1 else 0.2)
    checkpoint = {"config": asdict(model.config), "model": model.state_dict()}
    return model, checkpoint | ({"tokenizer": tokenizer.spec} if tokenizer else {})


@pytest.mark.parametrize("name", MODELS)
def test_a_file_holds_what_it_was_made_of(name, tmp_path):
    model, checkpoint = content(name)
    lm.export_gguf(checkpoint, tmp_path / "m.gguf", "f32")
    file = gguf.GGUFReader(tmp_path / "m.gguf")
    family = name.split()[0].replace("linear", "llama")
    values = {key: field.contents() for key, field in file.fields.items()}
    assert values["general.architecture"] == family
    assert values[f"{family}.attention.head_count_kv"] == model.config.n_kv_head
    tokens = values["tokenizer.ggml.tokens"]
    assert len(tokens) == len(set(tokens)) == model.config.vocab_size
    assert "".join(tokens[i] for i in BPE.encode("the seller")) == "theĠseller"
    architecture = getattr(gguf.MODEL_ARCH, family.upper())
    known = [gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[architecture]]
    known = {name.format(bid=layer) for name in known for layer in (0, 1)}
    names = {tensor.name for tensor in file.tensors}
    assert {n.rsplit(".", 1)[0] for n in names} <= known
    count = sum(p.numel() for p in model.parameters()) + ("rope_freqs.weight" in names) * 8
    assert sum(int(tensor.n_elements) for tensor in file.tensors) == count
    table = next(tensor.data for tensor in file.tensors if tensor.name == "token_embd.weight")
    assert np.array_equal(table, model.embed.weight.detach())


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_weights_are_rounded_as_by_gguf(kind):
    x = torch.randn(8, 96, generator=torch.Generator().manual_seed(1))
    x[1, :32] = 0
    ours = DTYPES[kind][3](x).contiguous().view(torch.uint8).numpy()
    wanted = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    assert ours.tobytes() == wanted.tobytes()


def test_the_split_pattern_is_named():
    assert split_name(hf_tokenizer.GPT2_PATTERN) == ("gpt-2", True)
    assert split_name(hf_tokenizer.DIGITS_PATTERN) == ("smollm", True)
    assert split_name(LLAMA3_PATTERN) == ("llama-bpe", True)
    assert not split_name(PATTERNS["bpe"])[1]


def test_what_llama_cpp_cannot_read_is_refused(tmp_path):
    char, byte = Tokenizer({"kind": "char", "chars": "abc"}), Tokenizer({"kind": "byte"})
    more = BPE.with_special([f"<{i}>" for i in range(99)])
    for name, tokenizer, message in (
        ("llama", None, "no tokenizer"), ("llama", char, "char vocabulary.*--tokenizer bpe:N"),
        ("llama", byte, "byte vocabulary"), ("llama", more, "455 ids, the model only 448"),
        ("window", BPE, "of a qwen3 model cannot have a window: 16"),
    ):
        with pytest.raises(UserError, match=message):
            lm.export_gguf(content(name, tokenizer)[1], tmp_path / "m.gguf", "f16")
    assert not list(tmp_path.iterdir())


LLAMA = os.environ.get("SCRATCHLM_NODE_MODULES")  # the folder in which node-llama-cpp is installed
SCRIPT = """
const {{getLlama}} = await import("{modules}/node-llama-cpp/dist/index.js");
const llama = await getLlama({{gpu: false, build: "never", logLevel: "error", maxThreads: 1}});
const model = await llama.loadModel({{modelPath: "m.gguf"}});
const context = await model.createContext({{contextSize: 128, threads: 1}});
const ids = [], prompt = model.tokenize({text});
for await (const i of context.getSequence().evaluate(prompt, {{temperature: 0}})) {{
  ids.push(i);
  if (ids.length == 24) break;
}}
console.log(JSON.stringify([prompt, ids]));
process.exit(0);
"""


@pytest.mark.slow
@pytest.mark.skipif(not LLAMA, reason="SCRATCHLM_NODE_MODULES names no node-llama-cpp")
@pytest.mark.parametrize("name", [*MODELS, "pieces"])
def test_llama_cpp_writes_what_we_write(name, elsewhere):
    tokenizer = BPE
    if name == "pieces":  # of SentencePiece's kind
        from test_sentencepiece import from_model, trained

        tokenizer = from_model(trained())
    MODELS["pieces"] = SHAPE | dict(vocab_size=lm.padded_vocab(tokenizer.n_vocab))
    model, checkpoint = content(name, tokenizer)
    lm.export_gguf(checkpoint, elsewhere / "m.gguf", "f32")
    text = "It's the seller's 1st rule,  你好 🦊"
    Path("run.mjs").write_text(SCRIPT.format(modules=LLAMA, text=json.dumps(text)))
    run = subprocess.run(["node", "run.mjs"], capture_output=True, text=True, timeout=120)
    prompt, ids = json.loads(run.stdout.splitlines()[-1])
    assert prompt == tokenizer.encode(text)
    assert ids == naive_generate(model, prompt, 24, temperature=0)
