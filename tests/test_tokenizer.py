"""data/tokenizer.py: ids, round trips, byte-pair encoding."""

import base64
import collections
import itertools
import json
import random
import re
from pathlib import Path

import pytest
import tiktoken
from conftest import ALL_TEXT, ROOT, TEXTS, TIKTOKEN, needs_vocabularies, real, set_block, tokens_of

from data.text import safe_pieces
from data.tokenizer import Tokenizer, learn_bpe, train_bpe, warn_unknown
from prepare_data import make_tokenizer, prepare

pytestmark = pytest.mark.usefixtures("elsewhere")
KINDS = ("byte", "char", "bpe:700", "bpe-han:500", "gpt2", "cl100k_base")


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    if request.param in ("gpt2", "cl100k_base") and not TIKTOKEN.is_dir():
        pytest.skip(f"no tiktoken vocabularies in {TIKTOKEN}")
    return make_tokenizer(request.param, [("", [text * 3]) for text in TEXTS.values()], 1)


def test_round_trip(tokenizer):
    again = Tokenizer(json.loads(json.dumps(tokenizer.spec)))
    for text in TEXTS.values():
        ids = tokenizer.encode(text := text * 2)
        assert tokenizer.decode(ids) == text and max(ids) < tokenizer.n_vocab == again.n_vocab
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
        assert again.encode(text) == ids


def test_an_unknown_character_is_a_replacement_character_and_counted(capsys):
    t = make_tokenizer("char", [("", ["a^]\\-bc\n"])], 1)
    warn_unknown(t, t.encode("abc天"), "it")
    warn_unknown(t, t.encode("abc"), "it")
    line = "[it: 1 of 4 tokens (25%) are characters that the model does not know]\n"
    assert capsys.readouterr().err == line
    assert t.decode(t.encode("a-b^学]\\ \nd")) == "a-b^�]\\�\n�"
    assert t.n_vocab == 8 + 2
    assert t.fallback[t.encode("a学")].tolist() == [False, True]


@needs_vocabularies
@pytest.mark.parametrize("name", ["gpt2", "cl100k_base"])
def test_ids_equal_tiktokens(name):
    t, reference = Tokenizer({"kind": "tiktoken", "name": name}), tiktoken.get_encoding(name)
    text = ALL_TEXT + real("sales_textbook.txt").read_text(encoding="utf-8")[:50_000]
    assert t.encode(text) == reference.encode(text, disallowed_special=())
    assert (t.n_vocab, t.eos_id) == (reference.n_vocab, reference.eot_token)


def test_the_name_of_a_special_token_is_ordinary_text(tokenizer):
    text = "a<|endoftext|>b<|fim_prefix|>"
    ids = tokenizer.encode(text)
    assert tokenizer.eos_id not in ids and tokenizer.byte_lengths[ids].min() > 0
    if tokenizer.spec["kind"] != "char":
        assert tokenizer.decode(ids) == text
    if tokenizer.name == "byte":
        Path("a.txt").write_text(text * 20)
        Path("b.txt").write_text(text * 20)
        assert tokens_of(prepare("[ab].txt", "byte")).count(256) == 1


@pytest.mark.parametrize("tokenizer", KINDS[2:], indirect=True)
def test_runs_too_long_for_tiktokens_regex_have_the_ids_they_would_have(tokenizer):
    for run in (" ", "\t", "\u00a0", "\n", " \n", "-", "a", "中", "1", '"a', "'"):
        for text in (run * 300, f"x{run * 300}y", f"x {run * 300} y\n{run * 50}"):
            assert tokenizer._encode_by_piece(text).tolist() == tokenizer.encode(text), (run, text)
    parts = "word", " " * 999_999, " word"
    ids = tokenizer.encode("".join(parts))
    assert tokenizer.decode(ids) == "".join(parts)
    if tokenizer.name != "bpe-han:500":  # which has no piece that begins with one blank of a run
        assert ids == [i for part in parts for i in tokenizer.encode(part)]


@pytest.mark.parametrize("tokenizer", ["bpe:700", "gpt2", "cl100k_base"], indirect=True)
@pytest.mark.parametrize("block", [64, 333])
def test_a_stream_of_pieces_has_the_tokens_of_the_whole(tokenizer, block, monkeypatch):
    set_block(monkeypatch, block)
    code = (ROOT / "prepare_data.py").read_text(encoding="utf-8")
    for text in (code, *(text * 60 for text in TEXTS.values())):
        pieces = list(safe_pieces(re.findall(f"(?s:.{{1,{block}}})", text)))
        assert "".join(pieces) == text and len(pieces) > 5
        assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)
    pieces = list(safe_pieces(["x" * block] * 95))  # without any place to cut: bounded all the same
    assert "".join(pieces) == "x" * 95 * block and max(map(len, pieces)) <= 8 * block


def naive_bpe(counts, size):
    """Byte-pair encoding by recounting everything before each merge, as slow as it is plain."""
    words = {piece: [bytes([b]) for b in piece] for piece in counts}
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < size:
        total = collections.Counter()
        for piece, word in words.items():
            for a, b in itertools.pairwise(word):
                total[a, b] += counts[piece]
        if not total or max(total.values()) < 2:
            break
        rank = {t: i for i, t in enumerate(tokens)}
        best = min(total, key=lambda p: (-total[p], rank[p[0]], rank[p[1]]))
        tokens.append(best[0] + best[1])
        for word in words.values():
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [best[0] + best[1]]
                i += 1
    return tokens


@pytest.mark.parametrize("alphabet", [b"a", b"ab", b"abc", b"abcdefghij"])
def test_train_bpe_equals_recounting_everything(alphabet):
    """Few letters make runs like aaaa, and ties at nearly every step."""
    for seed in range(10):
        rng, counts = random.Random(seed), {}
        for _ in range(rng.choice([3, 20, 60])):
            counts[bytes(rng.choices(alphabet, k=rng.randint(1, 14)))] = rng.randint(1, 9)
        counts[bytes(rng.choices(alphabet, k=300))] = 1  # as of a text without blanks
        for size in (256, 260, 300):
            assert train_bpe(counts, size) == naive_bpe(counts, size)


def test_a_sample_of_a_large_corpus_reaches_all_of_it(monkeypatch):
    monkeypatch.setattr("data.tokenizer.BPE_SAMPLE", 1000)
    pieces = ["front front front ", "skipped skipped "] * 20
    pieces += ["later later later ", "end end "] * 25  # every third piece is counted, not second
    spec = learn_bpe(290, [("", pieces)], sum(map(len, pieces)))
    tokens = [base64.b64decode(t) for t in spec["tokens"]]
    assert {b" front", b" later", b" end"} <= {*tokens}


def test_a_value_has_the_same_tokens_wherever_it_stands():
    """In the guest's words, in a call and in a record, next to any other characters."""
    text = '找一家有无烟房和SPA的酒店{"facilities": ["无烟房", "SPA"], "price_range_lower": 300}\n'
    t = make_tokenizer("bpe-han:420", [("", [text] * 50)], 1)
    assert t.name == Tokenizer(t.spec).name == f"bpe-han:{t.n_vocab}"
    for value in ("无烟房", "SPA", "300"):
        own = t.encode(value)
        for around in ("有{}的", '{{"facilities": ["{}"]}}', '"a", "{}", "b"', "({}店)", "，{}。"):
            ids = t.encode(around.format(value))
            assert any(ids[i : i + len(own)] == own for i in range(len(ids)))
    assert len(t.encode("300")) == 3
    pieces = [t.decode([i]) for i in t.encode('{"facilities": ["无烟房", "SPA"]}')]
    assert pieces[:6] == ['{"facilities": ["', "无", "烟", "房", '", "', "SPA"]
