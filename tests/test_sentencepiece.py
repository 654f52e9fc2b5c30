"""data/sentencepiece.py beside the libraries sentencepiece, tokenizers and transformers."""

import copy
import functools
import io
import itertools
import json
import random
import re
import time
from pathlib import Path

import pytest
from conftest import ALL_TEXT, ROOT, TEXTS, render_chat, set_block, tokens_of

spm = pytest.importorskip("sentencepiece")
tokenizers = pytest.importorskip("tokenizers")
from test_hf_commands import CHATML
from test_hf_tokenizer import ours, saved, strings, write
from test_templates import both, rendered

from data.chat import CHAT_TOKENS, get_template
from data.cli import UserError
from data.gguf import vocabulary
from data.hf_tokenizer import hub_tokenizer, tokenizer_json
from data.reply import TextStream, parse
from data.text import safe_pieces
from data.tokenizer import Tokenizer
from prepare_data import prepare

pytestmark = pytest.mark.usefixtures("elsewhere")
USER_DEFINED = ["<|im_start|>", "▁▁", "the", "学而"]
MODELS = {
    "llama": {},
    "no prefix": dict(add_dummy_prefix=False),
    "words": dict(user_defined_symbols=USER_DEFINED),
    "trimmed": dict(remove_extra_whitespaces=True, split_digits=True),
    "across": dict(split_by_whitespace=False, split_by_unicode_script=False),
}
STRINGS = [*TEXTS.values(), ALL_TEXT, "", " ", "\n", "  a  b ", "▁ x▁y", "x<|im_start|>the the  th"]
STRINGS += [*strings(200), *(character * 999 for character in "a =中👩")]


@functools.cache
def trained(name="llama", kind="bpe"):
    """The bytes of a tokenizer.model that SentencePiece trained on all kinds of text."""
    file, code = io.BytesIO(), (ROOT / "model.py").read_text(encoding="utf-8")
    options = dict(byte_fallback=True, remove_extra_whitespaces=False) | MODELS[name]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(f"{ALL_TEXT * 9}\n{code}".split("\n")), model_writer=file,
        model_type=kind, vocab_size=3000, normalization_rule_name="identity", minloglevel=2,
        hard_vocab_limit=False, **options,
    )
    return file.getvalue()


def from_model(content, **beside):
    """Our Tokenizer of a tokenizer.model, its spec once through JSON."""
    write("bare", {}, **beside)
    Path("bare/tokenizer.json").unlink()
    Path("bare/tokenizer.model").write_bytes(content)
    return Tokenizer(json.loads(json.dumps(hub_tokenizer("bare"))))


@pytest.mark.parametrize("name", MODELS)
def test_ids_of_a_tokenizer_model_are_those_of_sentencepiece(name):
    t, theirs = from_model(trained(name)), spm.SentencePieceProcessor(model_proto=trained(name))
    for text in STRINGS:
        ids = theirs.encode(text)
        assert t.encode(text) == ids, text
        if name != "trimmed" or "▁" not in text:
            assert t.decode(ids) == theirs.decode(ids)
    assert t.n_vocab == theirs.vocab_size() and (t.bos_id, t.eos_id) == (1, 2)
    assert t.special == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert set(t.words) == (set(USER_DEFINED) if name == "words" else set())
    for pieces in map(t.spec["data"]["model"].get, ("vocab", "scores")):
        pieces["▁a中"] = pieces.pop("▁a")  # GGUF's flag does not depend on a piece
    values = vocabulary(Tokenizer(t.spec), t.n_vocab)
    assert values["tokenizer.ggml.add_space_prefix"] == (name != "no prefix")


SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
FRONT = {"type": "Prepend", "prepend": "▁"}


def metaspace(**options):
    return None, {"type": "Metaspace", "replacement": "▁", **options}


def steps(*normalizers):
    return {"type": "Sequence", "normalizers": list(normalizers)}


FORMS = {
    "legacy": (steps(FRONT, SPACES), None),
    "gemma": (SPACES, {"type": "Split", "pattern": {"String": " "},
                       "behavior": "MergedWithPrevious", "invert": False}),
    "first": metaspace(prepend_scheme="first", split=False),
    "always": metaspace(prepend_scheme="always", split=False),
    "never": metaspace(prepend_scheme="never", split=False),
}  # fmt: skip
every_form = pytest.mark.parametrize("form", FORMS)


@functools.cache
def hub_json(form, words=(), special=(), **model):
    """A tokenizer.json of this form; `words` are (text, normalized)."""
    data = tokenizer_json(from_model(trained()))
    data["normalizer"], data["pre_tokenizer"] = FORMS[form]
    if form in ("gemma", "never"):
        data["decoder"]["decoders"].pop()
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    vocab = data["model"]["vocab"]
    for word, late in [*words, *((s, None) for s in special)]:
        entry = dict(content=word, id=vocab.setdefault(word, len(vocab)), normalized=bool(late))
        data["added_tokens"].append(entry | flags | {"special": late is None})
    data["model"] |= model
    return json.dumps(data)


@every_form
def test_ids_of_a_tokenizer_json_are_those_of_tokenizers(form):
    words = ("<w>", False), ("<n w>", True), ("café", True)
    content = hub_json(form, words)
    t, theirs = ours(content), tokenizers.Tokenizer.from_str(content)
    exported = saved(t, "exported").backend_tokenizer
    rng, parts = random.Random(0), [w for w, _ in words] + ["the", "中国", *"  <▁é\n𝔘x"]
    mixed = ["".join(rng.choices(parts, k=rng.randint(1, 8))) for _ in range(300)]
    for text in STRINGS + mixed:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert t.encode(text) == ids, text
        assert exported.encode(text, add_special_tokens=False).ids == ids
        assert t.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


def test_a_million_equal_characters_take_seconds():
    t, start = ours(hub_json("legacy")), time.process_time()
    for character in "a 👩":
        assert t.decode(t.encode(character * 1_000_000)) == character * 1_000_000
    assert time.process_time() - start < 60


@pytest.mark.parametrize("form", [*FORMS, "model"])
def test_a_text_in_pieces_has_the_tokens_of_the_whole(form, monkeypatch):
    t = from_model(trained("trimmed")) if form == "model" else ours(hub_json(form))
    set_block(monkeypatch, 100)
    text = "".join(TEXTS.values()) * 5
    pieces = list(safe_pieces(re.findall("(?s:.{1,100})", text)))
    ids = [t.encode(piece, "text" if n else None) for n, piece in enumerate(pieces)]
    assert len(pieces) > 9 and list(itertools.chain(*ids)) == t.encode(text)
    Path("text.txt").write_text(text, encoding="utf-8")
    folder = "bare" if form == "model" else "theirs"
    assert tokens_of(prepare("text.txt", folder, val_fraction=0.5)) == t.encode(text)


def test_characters_come_whole_out_of_a_stream():
    t = from_model(trained())
    for text in STRINGS:
        stream = TextStream(t)
        shown = [stream.feed(i) for i in t.encode(text)] + [stream.finish()]
        assert "".join(shown) == " " * bool(text) + text.replace("▁", " ")
        assert not any("\ufffd" in part for part in shown)
    ids = t.encode("𝔘中")
    lengths = t.byte_lengths
    assert lengths[ids].sum() == 1 + len("𝔘中".encode()) and lengths[[0, 1, 2]].sum() == 0
    assert t.fallback[t.encode("\U00012345")[1:]].all() and not t.fallback[t.encode("the\n")].any()


ROLES = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]{% else %}"
    " {{ m.content }} </s>{% endif %}{% endfor %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>")
TALK = "Hi <s> 中", "Well!", " two  spaces", "好👩 "
TALK = [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, TALK)]


@pytest.mark.parametrize("template", [CHATML, ROLES, LLAMA2], ids=["chatml", "roles", "llama2"])
@every_form
def test_a_chat_has_the_ids_of_transformers_and_answers_begin_as_they_were_learned(form, template):
    content = hub_json(form, special=SPECIAL)
    theirs, ends = tokenizers.Tokenizer.from_str(content), dict(eos_token="</s>", bos_token="<s>")
    t, theirs = both("chat", theirs, chat_template=template, **ends)
    plain = [m | {"content": m["content"].replace("<s>", "s")} for m in TALK]
    ids, mask = render_chat(plain, t)
    prompt, _ = render_chat(plain[:3], t, add_generation_prompt=True)
    assert prompt == rendered(theirs, plain[:3], None, True, True)
    assert prompt == ids[: len(prompt)] and mask[len(prompt)] == 1
    assert ids.count(1) == 2 * (template == LLAMA2)
    assert render_chat(TALK, t)[0].count(1) == ids.count(1)  # what somebody types stays text
    if template == ROLES:  # no part ends within a text
        assert ids == rendered(theirs, plain, None, False, True)
    chat, said = get_template(t), ids[len(prompt) :]
    said = list(itertools.takewhile(lambda i: i not in chat.ends, said))
    assert parse(said, chat, prompt)["content"] == "好👩 "


def test_what_stands_beside_a_model_names_its_tokens():
    glm = from_model(trained(), tokenizer_config={"tokenizer_class": "ChatGLMTokenizer"})
    n = glm.n_vocab - 9
    assert glm.bos_id is None and glm.eos_id == 2
    assert (glm.special["[gMASK]"], glm.special["<|user|>"]) == (n + 1, n + 6)
    tokens = {"2999": {"content": "<|im_start|>", "special": True}, str(n): {"content": "<pad>"}}
    t = from_model(trained(), tokenizer_config={
        "added_tokens_decoder": tokens, "eos_token": "<|im_start|>", "add_bos_token": False
    })  # fmt: skip
    assert (t.eos_id, t.bos_id, t.special["<pad>"], t.n_vocab) == (2999, None, n, n + 1)
    first = from_model(trained(), tokenizer_config={"legacy": False})
    assert first.encode("the", "special") == first.encode("the", "text") != first.encode("the")
    assert glm.encode("the", "special") == glm.encode("the") == first.encode("the")
    more = t.with_special(CHAT_TOKENS)
    assert more.special["<|end|>"] == t.n_vocab + 5
    assert more.encode("a <|end|>") == t.encode("a <|end|>")
    assert t.same_ids(Tokenizer(t.spec)) and not t.same_ids(more) and not t.same_ids(glm)


@pytest.mark.parametrize("name", ["llama", "no prefix", "words"])
def test_transformers_reads_what_a_tokenizer_model_is_exported_to(name):
    t = from_model(trained(name)).with_special(CHAT_TOKENS)
    theirs = saved(t)
    for text in STRINGS:
        spaced = f" {text}".replace("▁", " ")  # they cut words out before the space is put there
        if not any(word.replace("▁", " ") in spaced for word in t.words):
            assert theirs(text)["input_ids"] == [1, *t.encode(text)], text
    again = Tokenizer(hub_tokenizer("out"))
    assert again.special == t.special and again.encode("and 中\n") == t.encode("and 中\n")


def test_what_cannot_be_read_is_named():
    with pytest.raises(UserError, match=r"tokenizer.model is unigram with identity, .* only BPE"):
        from_model(trained(kind="unigram"))
    whole = trained()
    for size in (0, 1, 5, 100, len(whole) - 1):
        with pytest.raises(UserError, match="no model of SentencePiece's, or is damaged"):
            from_model(whole[:size])
    good = json.loads(hub_json("legacy"))
    for changes, said in (
        ({"model": good["model"] | {"type": "Unigram"}}, "model Unigram: only byte-level BPE and"),
        ({"model": good["model"] | {"ignore_merges": True}}, "with byte_fallback and all merges"),
        ({"model": good["model"] | {"merges": ["▁t qq"]}}, "merge '▁t qq' makes no token"),
        ({"normalizer": steps({"type": "Lowercase"})}, "normalizer Lowercase can't be read"),
    ):
        with pytest.raises(UserError, match=said):
            ours(copy.deepcopy(good) | changes)
