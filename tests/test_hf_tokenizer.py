"""Hugging Face's tokenizers in and out of prepare_data.py, beside tokenizers and transformers."""

import copy
import functools
import hashlib
import json
import random
import unicodedata
from pathlib import Path

import conftest
import pytest
from conftest import TIKTOKEN

import prepare_data

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from data.chat import CHAT_TOKENS
from data.cli import UserError
from data.gguf import LLAMA3_PATTERN
from data.hf_tokenizer import BYTE_CHARS, hub_tokenizer, tokenizer_config, tokenizer_json
from data.tokenizer import END, Tokenizer

pytestmark = pytest.mark.usefixtures("elsewhere")
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
TEXTS = conftest.TEXTS | {
    "french": "Où est l'été ? Voilà : 3 œufs à 1 250 €, c\u0327a va, na\u0131\u0308f.\n",
    "digits": "1 22  333   4444\t5\n 6\n\n7 a8b 9's x  10,5 \u0663\u0664 ½ Ⅷ ²  ",
    "crlf": "one\r\n\r\n two\r\n  three \r four 5\r\n 6\r\n",
}


def byte_level(use_regex=True):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split(pattern):
    first = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([first, byte_level(False)])


STEPS = {  # the pre_tokenizers of well-known models
    "gpt2": byte_level(),
    "llama3": split(LLAMA3_PATTERN),
    "qwen2": split(LLAMA3_PATTERN.replace("{1,3}", "")),
    "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level()]),
    "letters only": split(r"\p{L}+"),  # what lies between the matches is a piece, too
}


def strings(count=300, seed=0):
    """Random texts of characters that have been in Unicode for so long that every table here knows
    them alike: letters, digits, blanks and marks of all scripts beside each other."""
    old, rng = unicodedata.ucd_3_2_0, random.Random(seed)
    points = [c for c in map(chr, range(0x30000)) if old.category(c) not in ("Cn", "Cs")]
    pools = (points, " \n\t\r  ", "0123456789", "aeiouszéßſ中の", "'._-!,—", "'s 'LL\u0301\u0327")
    lengths = [rng.randint(1, 60) for _ in range(count)]
    return ["".join(rng.choice(rng.choice(pools)) for _ in range(n)) for n in lengths]


ALL_TEXTS = [*TEXTS.values(), "".join(TEXTS.values()), "", *strings()]


def trained(step="llama3", nfc=False, front=(), behind=(), size=700):
    """A byte-level BPE that the tokenizers library has trained on TEXTS."""
    theirs, alphabet = tokenizers.Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    theirs.pre_tokenizer, theirs.decoder = STEPS[step], tokenizers.decoders.ByteLevel()
    if nfc:
        theirs.normalizer = normalizers.NFC()
    options = dict(special_tokens=list(front), initial_alphabet=alphabet, show_progress=False)
    trainer = trainers.BpeTrainer(vocab_size=size, **options)
    theirs.train_from_iterator([text * 3 for text in TEXTS.values()], trainer)
    theirs.add_special_tokens(list(behind))
    return theirs


def write(folder, content, **beside):
    """A folder with tokenizer.json (an object, or a tokenizer of theirs) and other files."""
    Path(folder).mkdir(exist_ok=True)
    if isinstance(content, tokenizers.Tokenizer):
        content = json.loads(content.to_str())
    for name, data in {"tokenizer": content, **beside}.items():
        text = data if isinstance(data, str) else json.dumps(data)
        (Path(folder) / f"{name}.json").write_text(text, encoding="utf-8")
    return folder


def ours(content, **beside):
    """Our Tokenizer of what they saved; its spec has been through JSON, as in meta.json."""
    return Tokenizer(json.loads(json.dumps(hub_tokenizer(write("theirs", content, **beside)))))


def assert_same(tokenizer, theirs, texts=ALL_TEXTS):
    for text in texts:
        want = theirs.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == want, repr(text)
        assert tokenizer.decode(want) == theirs.decode(want, skip_special_tokens=False)


@pytest.mark.parametrize("nfc", [False, True], ids=["plain", "nfc"])
@pytest.mark.parametrize("step", STEPS)
def test_ids_of_a_trained_tokenizer_are_theirs(step, nfc):
    theirs = trained(step, nfc, front=["<pad>", END], behind=["<|user|>", "<|call|>"])
    t = ours(theirs)
    assert_same(t, theirs)
    assert t.n_vocab == theirs.get_vocab_size()
    behind = theirs.get_vocab_size() - 2
    assert t.special == {"<pad>": 0, END: 1, "<|user|>": behind, "<|call|>": behind + 1}
    assert (t.eos_id, t.bos_id, t.name) == (1, None, "theirs")
    assert t.decode(t.encode("e\u0301")) == ("é" if nfc else "e\u0301")


@conftest.needs_vocabularies
def test_ids_and_merges_of_the_real_gpt2_are_theirs():
    urls = (f"{GPT2_URL}/{name}" for name in ("encoder.json", "vocab.bpe"))
    files = [TIKTOKEN / hashlib.sha1(url.encode()).hexdigest() for url in urls]
    theirs = tokenizers.Tokenizer(models.BPE.from_file(*map(str, files)))
    theirs.pre_tokenizer, theirs.decoder = STEPS["gpt2"], tokenizers.decoders.ByteLevel()
    theirs.add_special_tokens([END])
    t, reference = ours(theirs), Tokenizer({"kind": "tiktoken", "name": "gpt2"})
    assert_same(t, theirs, ALL_TEXTS + strings(500, seed=1))
    assert all(t.token_bytes(i) == reference.token_bytes(i) for i in range(50257))
    merges = files[1].read_text(encoding="utf-8").splitlines()[1:]
    model = tokenizer_json(reference)["model"]  # merges are found again from the ids
    assert model["merges"] == [line.split() for line in merges]


@pytest.mark.parametrize("step", STEPS)
def test_bytes_without_a_token_are_left_out_as_theirs_leaves_them_out(step):
    """SmolLM2's vocabulary has only the bytes that its text had."""
    data = json.loads(trained(step).to_str())
    lost = [0, 7, *range(0xC0, 0xC3), *range(0xF1, 0x100)]
    spelled = set(map(BYTE_CHARS.get, lost))
    model = data["model"]
    model["vocab"] = {t: i for t, i in model["vocab"].items() if not spelled & set(t)}
    model["merges"] = [pair for pair in model["merges"] if not spelled & set("".join(pair))]
    t, theirs = ours(data), tokenizers.Tokenizer.from_str(json.dumps(data))
    assert [t.decode(t.encode(text)) for text in ("\x00", "a\x00b\x07", "")] == ["", "ab", ""]
    assert_same(t, theirs, [*ALL_TEXTS, "th\x00e\x07!!\x00! ", "\U00040000 x\U000f0000", "ééß\x00"])
    assert_same(t, saved(t).backend_tokenizer, ALL_TEXTS)
    model["unk_token"] = "a"
    with pytest.raises(UserError, match="20 bytes have no token, 0x00 first"):
        ours(data)


def test_files_of_other_forms_are_read_too():
    """GPT-2's own file says neither type nor use_regex, and writes merges as "a b"; Llama 3's lists
    every pair of tokens that joins to a third."""
    theirs = trained("gpt2")
    data = json.loads(theirs.to_str())
    del data["model"]["type"], data["pre_tokenizer"]["use_regex"]
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    data["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    assert_same(ours(data), theirs)
    data = json.loads(trained().to_str())
    vocab = data["model"]["vocab"]
    halves = [(t[:i], t[i:]) for t in vocab for i in range(1, len(t))]
    halves = [(a, b) for a, b in halves if a in vocab and b in vocab]
    halves.sort(key=lambda pair: [vocab[t] for t in ("".join(pair), *pair)])
    assert len(halves) > len(data["model"]["merges"])
    data["model"]["merges"] = halves
    assert_same(ours(data), tokenizers.Tokenizer.from_str(json.dumps(data)))


def test_a_token_that_no_merge_makes_is_a_whole_piece_or_refused():
    data = json.loads(trained().to_str())
    data["model"]["vocab"]["Ġxyzzyq"] = 700
    with pytest.raises(UserError, match=r"'Ġxyzzyq' .*made by none of the merges"):
        ours(data)
    data["model"]["ignore_merges"] = True
    t, reference = ours(data), tokenizers.Tokenizer.from_str(json.dumps(data))
    assert t.encode(" xyzzyq") == [700]
    assert_same(t, reference, [" xyzzyq", " xyzzyqs", "xyzzyq"])


@pytest.mark.parametrize("step", ["gpt2", "qwen2", "smollm2"])
def test_added_words_are_cut_out_of_text(step):
    """Words of all kinds, which overlap each other and the tokens."""
    theirs = trained(step, nfc=step == "qwen2", front=["<s>"])
    words = "covid covid-19 19a 北京市 é_ them_ _x <cite> <c ite> 's_"
    for word in [*words.split(), "  ", "\n\n", "a\nb", " x ", "a b"]:
        theirs.add_tokens([word])
        assert not theirs.get_added_tokens_decoder()[theirs.token_to_id(word)].special
    t, rng = ours(theirs), random.Random(1)
    parts = [*t.words, " ", "  ", "\n", "\u3000", "\x1c", *"_b9é中\u0301<", "xx"]
    texts = ["".join(rng.choices(parts, k=rng.randint(1, 9))) for _ in range(1000)]
    texts += [*ALL_TEXTS, *(f"x {w} {w}{w}y" for w in t.words)]
    reloaded, again = saved(t, "words"), ours(tokenizer_json(t))
    for text in texts:
        ids = theirs.encode(text).ids
        assert t.encode(text) == again.encode(text) == ids, text
        assert reloaded.encode(text, add_special_tokens=False) == ids, text
    assert again.words == t.words and "<s>" in t.special
    assert t.with_special(CHAT_TOKENS).encode(" ".join(t.words)) == t.encode(" ".join(t.words))


def test_added_words_are_drawn_and_shown_and_special_tokens_are_not():
    theirs = trained(front=["<s>"])
    theirs.add_tokens(["th-", "<cite>", "<think>"])
    t = ours(theirs, tokenizer_config={"chat_template": "{{ '<think>' }} the"})
    ids = t.encode("in th-<cite>s<s><think>")
    known = [theirs.token_to_id(w) for w in ("th-", "<cite>", "<think>")]
    assert [i for i in ids if i in known] == known[:2]  # a chat's template writes the last one
    assert set(t.special) == {"<s>", "<think>", END} and len(t.words) == 2
    assert t.decode(ids) == "in th-<cite>s<s><think>"
    assert t.byte_lengths[known].tolist() == [3, 6, 0]
    special = [a["content"] for a in tokenizer_json(t)["added_tokens"] if a["special"]]
    assert sorted(special) == ["<s>", END]
    more = t.with_special(["<cite>"])
    assert more.special["<cite>"] == known[1] not in more.encode("a <cite>")


BEGIN = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 0)])


def test_begin_is_what_stands_in_front():
    theirs, offsets = trained(front=["<s>", "</s>"]), processors.ByteLevel(trim_offsets=False)
    assert ours(theirs).bos_id is None
    for post in BEGIN, processors.Sequence([offsets, BEGIN]):
        theirs.post_processor = post
        t = ours(theirs)
        assert t.bos_id == 0 and [0, *t.encode("hi you")] == theirs.encode("hi you").ids
    theirs.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    assert ours(theirs).bos_id is None


@pytest.mark.parametrize("beside, end", [
    ({}, END),
    ({"tokenizer_config": {"eos_token": {"content": "</s>", "lstrip": False}}}, "</s>"),
    ({"tokenizer_config": {"eos_token": "<nobody's>"}}, END),
    ({"config": {"eos_token_id": 0}, "tokenizer_config": {"eos_token": "</s>"}}, "<s>"),
    ({"config": {"eos_token_id": 0}, "generation_config": {"eos_token_id": [3, 1]}}, "<u>"),
    ({"config": {"eos_token_id": 0}, "generation_config": {"eos_token_id": []}}, "<s>"),
    ({"config": {"eos_token_id": 99}, "tokenizer_config": {"eos_token": "<u>"}}, "<u>"),
])
def test_end_of_text_is_what_the_files_say(beside, end):
    t = ours(trained(front=["<s>", "</s>", END, "<u>"]), **beside)
    assert t.eos_id == t.special[end]


PLAIN = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
ISOLATED = {"type": "Split", "behavior": "Isolated", "invert": False}
STRIPS = {"id": 0, "content": "<s>", "special": False, "rstrip": True}


@pytest.fixture(scope="module")
def good():
    theirs = trained(front=["<s>"], size=300)
    theirs.post_processor = BEGIN
    return json.loads(theirs.to_str())


def steps(*all_steps):
    return {"type": "Sequence", "pretokenizers": all_steps}


def split_by(text, **changes):
    first = ISOLATED | {"pattern": {"Regex": text}} | changes
    return steps(first, PLAIN | {"use_regex": False})


@pytest.mark.parametrize("path, value, said", [
    ("model.type", "WordPiece", "model WordPiece"),
    ("model.type", "WordLevel", "model WordLevel: only one of single characters"),
    ("model.byte_fallback", True, "KeyError: '<0x00>'"),
    ("model.vocab.▁the", 400, "'▁the' is not byte-level"),
    ("model.merges.0", ["Q", "x"], "KeyError: b'Qx'"),
    ("swap", None, "the ids do not rise along the merges"),
    ("model", None, "cannot be read"),
    ("normalizer", {"type": "Lowercase"}, "normalizer Lowercase"),
    ("pre_tokenizer", None, "pre_tokenizer none"),
    ("pre_tokenizer", PLAIN | {"add_prefix_space": True}, "pre_tokenizer ByteLevel"),
    ("pre_tokenizer", split_by(r"\p{L}+", behavior="Removed"), "Split"),
    ("pre_tokenizer", steps({"type": "Digits", "individual_digits": False}, PLAIN), "Digits"),
    ("pre_tokenizer", split_by(r"\s++$|\S+"), "has another meaning"),
    ("added_tokens.0", STRIPS, "'<s>' has single_word, lstrip or rstrip"),
    ("post_processor", {"type": "RobertaProcessing"}, "post_processor RobertaProcessing"),
    ("post_processor.single.0", {"SpecialToken": {"id": "<x>"}}, "KeyError: '<x>'"),
    ("post_processor.special_tokens.<s>.ids", [0, 0], r"ids \[0, 0\] in front"),
])
def test_what_tiktoken_would_read_otherwise_is_refused(good, path, value, said):
    data, vocab = copy.deepcopy(good), good["model"]["vocab"]
    if path == "swap":  # ids must rise along the merges
        first, last = "".join(good["model"]["merges"][0]), max(vocab, key=vocab.get)
        path, value = "model.vocab", vocab | {first: vocab[last], last: vocab[first]}
    *way, last = (int(key) if key == "0" else key for key in path.split("."))
    functools.reduce(lambda values, key: values[key], way, data)[last] = value
    with pytest.raises(UserError, match=said) as e:
        ours(data)
    assert str(e.value).startswith(str(Path("theirs/tokenizer.json"))) and "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["tokenizer", "config", "generation_config", "tokenizer_config"])
def test_what_is_no_json_object_is_said_so(good, name):
    for data in (b"", b"[]", b'"\xff"', b"[" * 100_000):
        write("theirs", good)
        Path(f"theirs/{name}.json").write_bytes(data)
        with pytest.raises(UserError, match=rf"theirs.{name}.json is not (JSON|a JSON object)"):
            hub_tokenizer("theirs")
    Path("empty").mkdir(exist_ok=True)
    with pytest.raises(UserError, match=r"empty.tokenizer\.json is missing"):
        hub_tokenizer("empty")


def make(name):
    if name == "hf":  # with everything: NFC, digits, specials in front, a begin
        theirs = trained("smollm2", nfc=True, front=["<s>", "</s>"], behind=["<x>"])
        theirs.post_processor = BEGIN
        return ours(theirs, config={"eos_token_id": 1})
    documents = [("", [text * 3]) for text in TEXTS.values()]
    return prepare_data.make_tokenizer(name, documents, 1)


def saved(tokenizer, folder="out"):
    """transformers' own reading of what we write."""
    write(folder, tokenizer_json(tokenizer), tokenizer_config=tokenizer_config(tokenizer))
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("special", [(), CHAT_TOKENS], ids=["bare", "chat"])
@pytest.mark.parametrize("kind", ["byte", "char", "bpe:700", "hf"])
def test_transformers_reads_our_tokenizers(kind, special):
    t = make(kind).with_special(special)
    theirs = saved(t)
    assert_same(t, theirs.backend_tokenizer)
    again = Tokenizer(hub_tokenizer("out"))
    assert (again.eos_id, again.bos_id, again.special) == (t.eos_id, t.bos_id, t.special)
    assert again.n_vocab == t.n_vocab and (again.byte_lengths == t.byte_lengths).all()
    assert tokenizer_json(again)["model"] == tokenizer_json(t)["model"]
    for text in ALL_TEXTS:
        ids = t.encode(text)
        assert again.encode(text) == ids
        assert theirs(text)["input_ids"] == ([] if t.bos_id is None else [t.bos_id]) + ids
    for name, i in t.special.items():
        assert theirs.convert_tokens_to_ids(name) == i
        around = [*t.encode("a"), i, *t.encode("b")]
        assert theirs.encode(f"a{name}b", add_special_tokens=False) == around
    ids = [t.eos_id, *t.encode("text"), t.eos_id]
    assert theirs.decode(ids, skip_special_tokens=True) == "text"
