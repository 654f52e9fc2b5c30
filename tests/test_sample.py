"""Decoding: each filter by hand, generation against the plainest loop, beams against exhaustive
search, text as it comes, and the command line on a checkpoint of a few kilobytes."""

import base64
import io
import math
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BYTE

import sample
from data.cli import UserError, printable
from data.tensors import write_safetensors
from data.tokenizer import Tokenizer
from model import Config, Transformer, load_checkpoint, save_checkpoint
from sample import (
    TextStream,
    analogy,
    beam_search,
    draw_uniforms,
    generate,
    naive_generate,
    next_token,
)


def bpe_tokenizer(tokens, pattern):
    """One that has a token for each byte, and these."""
    tokens = [*(bytes([b]) for b in range(256)), *tokens]
    encoded = [base64.b64encode(t).decode() for t in tokens]
    return Tokenizer({"kind": "bpe", "pattern": pattern, "tokens": encoded})


def noisy_model(seed=0, **shape):
    """A small model with loud random weights: its next token depends on all that it sees."""
    shape = dict(vocab_size=40, n_layer=2, n_head=4, d_model=16, context=12) | shape
    torch.manual_seed(seed)
    model = Transformer(Config(init="gpt2", **shape)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.6)
    return model


def rows_of(steps):
    """What `generate` yields, turned to one list a row, without the Nones."""
    return [[i for i in row if i is not None] for row in zip(*steps)]


def random_prompt(n, row=0):
    return torch.randint(40, (n,), generator=torch.Generator().manual_seed(n + row)).tolist()


PROBS = [0.1, 0.4, 0.05, 0.15, 0.3]  # unsorted on purpose
LOGITS = torch.tensor([PROBS]).log()
LENGTHS = (1, 5, 12, 3, 30, 13)
TEN = ("--temperature", "0", "--max_new_tokens", "10", "--print_ids")


def kept(logits):
    return [i for i, x in enumerate(logits[0].tolist()) if x > -math.inf]


@pytest.mark.parametrize("name, number, ids", [
    ("top_k", 2, [1, 4]),
    ("top_k", 1000, [0, 1, 2, 3, 4]),
    ("top_p", 0.0, [1]),
    ("top_p", 0.41, [1, 4]),  # 0.4 is not enough: the token that crosses 0.41 stays
    ("top_p", 0.96, [0, 1, 2, 3, 4]),
    ("min_p", 0.5, [1, 4]),
    ("min_p", 1.0, [1]),
])
def test_a_filter_keeps_these_ids_and_leaves_its_input_alone(name, number, ids):
    x = LOGITS.clone()
    out = getattr(sample, name)(x, number)
    assert kept(out) == ids and torch.equal(out[:, ids], x[:, ids])
    assert torch.equal(x, LOGITS) and out.data_ptr() != x.data_ptr()


def test_temperature_and_penalty_divide_and_equals_are_kept():
    x = torch.tensor([[2.0, -1.0, 0.0, 4.0, -3.0]])
    penalised = sample.repetition_penalty(x, [[1, 1, 3]], 2.0)
    assert penalised.tolist() == [[2.0, -2.0, 0.0, 2.0, -3.0]]
    looping = sample.loop_penalty(x, [[1, 2, 3, 0] * 2 + [1, 2, 3]], 1.5)
    assert looping.tolist() == [[0.5, -1.0, 0.0, 4.0, -3.0]]
    twice, far = [1, 2, 3, 0, 1, 2, 3], [1, 2, 3, 0] * 2 + [4] * 90 + [1, 2, 3]
    assert all(torch.equal(sample.loop_penalty(x, [ids], 1.5), x) for ids in (twice, far, [], [1]))
    assert kept(sample.top_k(torch.tensor([[1.0, 2.0, 1.0, 0.0, 3.0]]), 3)) == [0, 1, 2, 4]
    assert len(kept(sample.top_p(torch.zeros(1, 5), 0.5))) == 3  # 0.2, 0.4, then 0.6 crosses


def draw(logits, n, seed=0, **settings):
    g = torch.Generator().manual_seed(seed)
    return next_token(logits.expand(n, -1), [[0]] * n, draw_uniforms(g, n), settings)


def test_temperature_zero_is_argmax_after_the_repetition_penalty():
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    settings = dict(temperature=0, top_k=1, top_p=0.5, min_p=0.5)
    assert next_token(x, [[0]] * 4, [None] * 4, settings) == x.argmax(-1).tolist()
    x, settings = torch.tensor([[1.0, 5.0, 4.0]]), dict(temperature=0, repetition_penalty=2.0)
    assert next_token(x, [[1]], [None], settings) == [2]
    for t in (1e-6, 1e-30, 1e-60):  # nearly greedy, and never NaN
        assert set(draw(torch.tensor([[1.0, 9.0, 3.0, -20.0, 8.0]]), 20, temperature=t)) == {1}


@pytest.mark.parametrize("settings, probs", [
    ({}, PROBS),
    (dict(temperature=0.5), [p * p / 0.285 for p in PROBS]),  # p**2, over the sum of squares
    (dict(top_k=2), [0, 4 / 7, 0, 0, 3 / 7]),
    (dict(top_p=0.8), [0, 0.4 / 0.85, 0, 0.15 / 0.85, 0.3 / 0.85]),
    (dict(min_p=0.5), [0, 4 / 7, 0, 0, 3 / 7]),
])
def test_draws_follow_the_distribution_that_the_ladder_leaves(settings, probs):
    count = np.bincount(draw(LOGITS, 5_000, **settings), minlength=5)
    wanted = 5_000 * np.array(probs)
    some = wanted > 0
    assert count[~some].sum() == 0
    # chi-square of at most 4 degrees of freedom: above 18.5 once in a thousand seeds
    assert ((count - wanted)[some] ** 2 / wanted[some]).sum() < 18.5


def test_top_p_sees_the_distribution_after_temperature_and_penalty():
    # at temperature 2 the largest of PROBS has only 0.30, so 0.35 needs a second token
    assert set(draw(LOGITS, 300, top_p=0.35)) == {1}
    assert set(draw(LOGITS, 300, top_p=0.35, temperature=2.0)) == {1, 4}
    x, settings = torch.tensor([[5.0, 1.0, 1.0]]), dict(top_k=1, repetition_penalty=50.0)
    assert set(draw(x, 20, **settings)) == {1, 2}


@pytest.mark.parametrize("shape", [
    dict(position="rope", value_embed=True, bigram=40, induction=True),
    dict(position="learned"),
    dict(position="sinusoidal", bigram=1),
    dict(position="rope", n_kv_head=2, qk_norm=True),
    dict(window=4, n_kv_head=2, rotary_share=0.5, norm_place="both", qk_norm=True),
    dict(window=5, window_layers=[True, False], window_theta=100.0, parallel=True),
    dict(position="learned", n_kv_head=1, norm="layernorm", activation="gelu"),
    dict(position="rope", context=7),
    dict(position="rope", context=1),
], ids=lambda s: "-".join(map(str, s.values())))
def test_each_prompt_of_a_batch_gives_what_the_naive_loop_gives(shape):
    """40 tokens are more than three contexts of 12: the window slides six times."""
    model, seeds, prompts = noisy_model(**shape), range(10, 16), [*map(random_prompt, LENGTHS)]
    forgets_nothing = dict(temperature=0, repetition_penalty=1e6)  # of what slid out of the window
    for settings in forgets_nothing, dict(temperature=1.3, top_p=0.95):
        together = rows_of(generate(model, prompts, 40, seeds=seeds, **settings))
        alone = [naive_generate(model, p, 40, seed=s, **settings) for p, s in zip(prompts, seeds)]
        assert together == alone
    assert min(len(set(ids)) for ids in together) > 5  # a constant would prove little


@pytest.mark.parametrize("lengths", [LENGTHS[:4], (12, 1, 1, 2), (40, 2, 13, 12)])
@pytest.mark.parametrize("quits", [(0,), (0, 1, 3), (0, 1, 2, 3)])
def test_a_row_that_stops_leaves_its_neighbours_alone(lengths, quits):
    """The longest row may stop first, which makes the others slide at columns beyond the context"""
    model, count = noisy_model(position="learned"), [0] * 4
    prompts = [random_prompt(n, row) for row, n in enumerate(lengths)]
    last = {r: 2 + 5 * r for r in quits}  # the row ends with its token of this number

    def stop(r, i):
        count[r] += 1
        return count[r] == last.get(r)

    steps = list(generate(model, prompts, 40, seeds=[1, 2, 3, 4], stop=stop))
    assert len(steps) == (17 if len(quits) == 4 else 40)
    for r, (p, ids) in enumerate(zip(prompts, rows_of(steps))):
        n = count[r]  # it is not asked again after its end
        assert n == last.get(r, 40) and ids == naive_generate(model, p, n, seed=r + 1)
        assert [s[r] is None for s in steps] == [False] * n + [True] * (len(steps) - n)


@pytest.mark.parametrize("seed, V, n, width, penalty, end", [
    (3, 5, 4, 400, 2.0, 0),  # beams as wide as this are exhaustive search
    (3, 5, 3, 400, 1.0, None),
    (0, 7, 8, 3, -1.0, 0),
    (1, 7, 8, 3, 0.0, 0),
    (2, 7, 8, 3, 1.0, 0),
])
def test_beams_are_those_of_a_plain_search_without_cache_or_early_end(
    seed, V, n, width, penalty, end
):
    model, prompt = noisy_model(seed, vocab_size=V), [1, 2]
    live, done = [(0.0, [])], []
    for length in range(1, n + 1):
        grown = []
        for score, ids in live:
            with torch.no_grad():
                logp = model(torch.tensor([prompt + ids]))[0, -1].double().log_softmax(-1)
            grown += [(score + x, ids + [i]) for i, x in enumerate(logp.tolist())]
        grown = sorted(grown, key=lambda b: -b[0])[: 2 * width]
        over = [b for b in grown if b[1][-1] == end or length == n]
        done += [(s / length**penalty, ids) for s, ids in over]
        live = [b for b in grown if b not in over][:width]
    wanted = sorted(done, key=lambda b: -b[0])[:width]
    found = beam_search(model, prompt, n, width, penalty, end)
    assert [ids for _, ids in found] == [ids for _, ids in wanted]
    assert [s for s, _ in found] == pytest.approx([s for s, _ in wanted], abs=1e-4)


def test_beams_keep_to_the_allowed_ids_and_refuse_what_they_cannot_do():
    model, allowed = noisy_model(), torch.isin(torch.arange(40), torch.tensor([3, 17]))
    found = beam_search(model, [1, 2], 5, 4, allowed=allowed)
    assert len(found) == 4 and {i for _, ids in found for i in ids} == {3, 17}
    assert len(beam_search(model, [1, 2], 1, 4, allowed=allowed)) == 2  # there are no more
    for prompt in ([], [40], [-1]):
        with pytest.raises(UserError):
            beam_search(model, prompt, 3)
    with pytest.raises(UserError, match="context of 12"):
        beam_search(model, [1] * 10, 6)
    assert len(beam_search(model, [1] * 10, 2)[0][1]) == 2


def feed_all(stream, ids):
    return [stream.feed(i) for i in ids] + [stream.finish()]


def test_characters_come_whole_and_nothing_is_late():
    text = "😀👍🏽 é中b"
    shown = feed_all(TextStream(BYTE), BYTE.encode(text))
    for n in range(1, len(shown) + 1):
        assert "".join(shown[:n]) == text.encode()[:n].decode("utf-8", "ignore")


def test_broken_bytes_become_the_replacement_character_and_other_ids_are_silent():
    assert feed_all(TextStream(BYTE), [65, 0xFF, 66]) == ["A", "\ufffd", "B", ""]
    assert feed_all(TextStream(BYTE), [0xE4, 0xB8]) == ["", "", "\ufffd"]  # finish says it
    assert feed_all(TextStream(BYTE), [65, BYTE.eos_id, 300, 66]) == ["A", "", "", "B", ""]
    g = torch.Generator().manual_seed(0)
    for _ in range(50):  # random bytes: most are broken
        ids = torch.randint(256, (30,), generator=g).tolist()
        assert "".join(feed_all(TextStream(BYTE), ids)) == BYTE.decode(ids)


@pytest.mark.parametrize("text, stops, wanted", [
    ("aaaaabaab", ("aab",), "aaa"),
    ("x\n\nyz", ("yz", "\n\n"), "x"),
    ("你好。再见。", ("。",), "你好"),
    ("see 👍🏽 there", ("🏽",), "see 👍"),
    ("EN END", ("ENDE", "XX", ""), None),
])
def test_text_ends_before_the_stop_string_and_nothing_is_lost_without_one(text, stops, wanted):
    stream = TextStream(BYTE, stops)
    shown = "".join(feed_all(stream, BYTE.encode(text)))
    assert (shown, stream.stopped) == ((text, False) if wanted is None else (wanted, True))


def test_what_may_become_a_stop_is_held_back_and_one_inside_a_token_cuts_it():
    shown = feed_all(TextStream(BYTE, ["END"]), b"aENxENEN")
    assert shown == ["a", "", "", "ENx", "", "", "EN", "", "EN"]
    stream = TextStream(bpe_tokenizer([b"ab", b"abcd", b"abcdef"], ".+"), ["cd", "e"])
    assert stream.feed(258) == "ab" and stream.stopped
    assert stream.feed(65) == "" and stream.finish() == ""


DIRECTIONS = {" king": [1, 1, 0, 0], " man": [0, 1, 0, 0], " woman": [0, 0, 1, 0]}
DIRECTIONS |= {" queen": [1, 0, 1, 0.3], " apple": [0, 0, 0, 1]}  # royal, male, female, fruit


def test_king_minus_man_plus_woman_is_queen():
    # merges from left to right: every prefix of " king" is a token before " king" is
    tokens = [word[:n] for word in map(str.encode, DIRECTIONS) for n in range(2, len(word) + 1)]
    tokenizer = bpe_tokenizer(sorted(set(tokens), key=len), r" ?\w+|\s+|.")
    table = torch.zeros(tokenizer.n_vocab + 20, 8)  # all other tokens point elsewhere
    table[:, 4:] = torch.randn(len(table), 4, generator=torch.Generator().manual_seed(0))
    words = tokenizer, table
    for word, direction in DIRECTIONS.items():
        table[tokenizer.encode(word)[0]] = torch.tensor([*direction, 0, 0, 0, 0])
    # perfect, but no word; a spare row of the table
    table[[tokenizer.eos_id, -5]] = torch.tensor([1.0, 0, 1, 0, 0, 0, 0, 0])
    found = analogy("king - man + woman", *words)
    # goal (1, 0, 1), queen (1, 0, 1, 0.3): cosine 2 / (sqrt 2 sqrt 2.09)
    assert found[0] == (" queen", pytest.approx(2 / math.sqrt(2 * 2.09), abs=1e-5))
    assert len(found) == 10 and found == sorted(found, key=lambda pair: -pair[1])
    everything = [t for t, _ in analogy("king - man + woman", *words, n=10**6)]
    assert {" queen", " apple"} <= set(everything) and not {" king", " man"} & set(everything)
    assert len(everything) == tokenizer.n_vocab - 1 - 3  # nor end-of-text, nor spare rows
    found = analogy("king - man + woman", *words, ["apple", "queen", "man"])
    assert found[0][0] == "queen" and sorted(t for t, _ in found) == ["apple", "man", "queen"]
    for expression in ("", "- +", "king -", "king man", "king-man", "+ king", "king - - man"):
        with pytest.raises(UserError, match="--analogy"):
            analogy(expression, *words)


def write_run(path, seed=0, only=b"abcdefgh "):
    """A checkpoint of a noisy model that writes the bytes `only`: readable, and never ending."""
    model = noisy_model(seed, vocab_size=320, n_layer=1, n_head=2, context=32, head_bias=True)
    with torch.no_grad():
        model.head.bias.fill_(-1000.0)
        model.head.bias[list(only)] = 0.0
    content = {"config": asdict(model.config), "model": model.state_dict(), "tokenizer": BYTE.spec}
    save_checkpoint(path, content | {"step": 1, "val_loss": 1.0})
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(path of a checkpoint, its model)."""
    path = tmp_path_factory.mktemp("run") / "last.pt"
    return str(path), write_run(path)


@pytest.fixture
def say(run, capsys, tmp_path, monkeypatch):
    """say("--prompt", "a", ...) -> what sample.py prints for the little checkpoint; what it prints
    to stderr is in say.err."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))

    def call(*argv, ckpt=run[0]):
        sample.main([*(["--ckpt", str(ckpt)] if ckpt else ()), "--device", "cpu", *argv])
        out, call.err = capsys.readouterr()
        return out

    return call


def last_ids(out):
    return [int(i) for i in out.splitlines()[-1].split(",")]


def test_prompt_then_text_then_ids(say, run):
    out = say("--prompt", "abc", "--max_new_tokens", "31", "--seed", "3", "--print_ids")
    settings = dict(temperature=0.8, top_p=0.95, allowed=torch.arange(320) < 257)
    (ids,) = rows_of(generate(run[1], [[97, 98, 99]], 31, seed=3, **settings))
    assert out == f"abc{BYTE.decode(ids)}\n{','.join(map(str, ids))}\n" and len(ids) == 31
    assert say.err.count("\n") == 1 and "context of 32 tokens was full" in say.err  # once
    say("--prompt", "abc", "--max_new_tokens", "30")  # the last token is drawn, but not read
    assert not say.err


def test_a_prompt_may_come_from_a_file_or_a_pipe_or_be_none(say, run, tmp_path, monkeypatch):
    wanted = naive_generate(run[1], [BYTE.eos_id], 10, temperature=0)  # none begins a document
    assert last_ids(say(*TEN)) == last_ids(say("--prompt", "", *TEN)) == wanted
    monkeypatch.setattr(sys, "stdin", None)  # pythonw has none
    assert last_ids(say(*TEN)) == wanted
    text = "@ab 中文 gh"  # piped text that begins with @ is text
    wanted = say("--prompt_ids", ",".join(map(str, text.encode())), *TEN)
    assert wanted.startswith(text) and len(last_ids(wanted)) == 10
    assert say("--prompt", "@" + text, *TEN) == wanted
    for mark in ("", "\ufeff"):
        (tmp_path / "p.txt").write_text(mark + text, encoding="utf-8")
        assert say("--prompt", "@p.txt", *TEN) == wanted
        monkeypatch.setattr(sys, "stdin", io.StringIO(mark + text))
        assert say(*TEN) == wanted


def test_a_batch_gives_each_prompt_and_sample_what_it_is_alone(say):
    prompts = ["a", "bcd efg", "h " * 30]
    alone = [say("--prompt", p, *TEN).splitlines() for p in prompts]
    lines = say(*(f for p in prompts for f in ("--prompt", p)), *TEN).splitlines()
    assert lines[:-3] == [x for r, a in enumerate(alone) for x in (f"--- {r + 1} ---", a[0])]
    assert lines[-3:] == [a[1] for a in alone]
    flags = ("--max_new_tokens", "30", "--print_ids")  # sample j has the seed 7 + j
    batch = say("--prompt", "a", "--prompt", "bc", "--num_samples", "2", "--seed", "7", *flags)
    alone = [say("--prompt", p, "--seed", s, *flags) for p in ("a", "bc") for s in ("7", "8")]
    assert batch.splitlines()[-4:] == [out.splitlines()[-1] for out in alone]
    assert len(set(alone)) == 4
    assert say("--prompt", "a") != say("--prompt", "a")  # without a seed another one each time


def test_stop_ends_before_its_text(say):
    flags = ("--prompt", "ab", "--seed", "1", "--max_new_tokens", "60")
    text = say(*flags).removeprefix("ab").rstrip("\n")
    wanted, stop, _ = text.partition(text[20:23])
    out = say(*flags, "--stop", "zzz", "--stop", stop, "--print_ids")
    assert wanted and out.startswith(f"ab{wanted}\n")
    assert BYTE.decode(last_ids(out)) == wanted + stop  # the ids are what the model wrote


def test_end_of_text_ends_and_spare_rows_of_the_table_are_never_drawn(say, tmp_path):
    write_run(tmp_path / "last.pt", only=range(256, 320))  # one of these 64 has a token
    for flags in (["--top_p", "1", "--temperature", "2"], ["--beams", "2"]):
        assert say("--prompt", "ab", "--print_ids", *flags, ckpt=tmp_path) == "ab\n256\n"
    # ids may be special (0 bytes) or gaps (-1) in the middle, and spare at the end
    tokenizer = SimpleNamespace(byte_lengths=np.array([1, 0, 3, -1, 2, 0]), eos_id=5)
    allowed = sample.allowed_ids(noisy_model(vocab_size=320), tokenizer)
    assert allowed.nonzero().flatten().tolist() == [0, 2, 4, 5] and len(allowed) == 320


def test_beams_print_the_best_and_as_many_as_asked_and_end_with_the_context(say, run):
    flags = ("--prompt", "ab", "--max_new_tokens", "6", "--beams", "4", "--print_ids")
    wanted = beam_search(run[1], [97, 98], 6, 4)
    lines = say(*flags, "--num_samples", "2").splitlines()
    texts = [x for s, ids in wanted[:2] for x in (f"--- {s:.4f} ---", "ab" + BYTE.decode(ids))]
    assert lines == [*texts, *(",".join(map(str, ids)) for _, ids in wanted[:2])]
    out = say("--beams", "2", "--print_ids", "--prompt", "a" * 30)
    assert len(last_ids(out)) == 2 and "after 2 tokens" in say.err
    with pytest.raises(UserError, match="32 tokens"):
        say("--beams", "2", "--prompt", "a" * 32)


def test_the_newest_run_is_taken_and_named(say, tmp_path):
    with pytest.raises(UserError, match=r"train\.py.*--ckpt"):  # there is none
        say("--prompt", "a", ckpt=None)
    for name, seed, when in (("one", 1, 1000), ("two", 2, 2000), ("three", 3, 500)):
        path = tmp_path / "out" / name / "last.pt"
        write_run(path, seed)
        os.utime(path, (when, when))
    newest = say("--prompt", "ab", *TEN, ckpt=None)
    assert "two" in say.err.splitlines()[0]
    assert newest == say("--prompt", "ab", *TEN, ckpt="out/two")


def test_control_characters_are_shown_and_not_obeyed(say, tmp_path):
    text = "a\x1b[2Jb\r\x07\x9b\tc\nd é 好"
    assert printable(text) == "a\\x1b[2Jb\\x0d\\x07\\x9b\tc\nd é 好"
    write_run(tmp_path / "x.pt", only=b"\x1b")
    flags = ["--prompt", "\x1b[1m", "--max_new_tokens", "3", "--print_ids"]
    for more in ([], ["--num_samples", "2"], ["--beams", "2"]):
        out = say(*flags, *more, ckpt="x.pt")
        assert "\x1b" not in out and "\\x1b[1m\\x1b\\x1b\\x1b\n" in out and "27,27,27" in out


def test_a_model_without_a_tokenizer_is_refused(say, tmp_path, run):
    content = load_checkpoint(run[0])
    save_checkpoint(tmp_path / "x.pt", {k: content[k] for k in ("config", "model")})
    with pytest.raises(UserError, match="has no tokenizer"):
        say("--prompt", "ab", ckpt="x.pt")


def test_analogy_and_choices_on_the_command_line(say, run):
    wanted = analogy("a - b + c", BYTE, run[1].embed.weight.detach())
    assert say("--analogy", "a - b + c") == "".join(f"{c:7.3f}  {t!r}\n" for t, c in wanted)
    lines = say("--analogy", "a - b + c", "--choices", "x, y,z").splitlines()
    assert sorted(line.split()[1] for line in lines) == ["'x'", "'y'", "'z'"]


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_words_of_a_bert_need_its_vocabulary_and_one_tensor(say, file):
    words = {"皇": [1, 0], "后": [1, 0], "国": [1, 0], "王": [1, 2], "女": [1, -1], "男": [1, 1]}
    words |= {"人": [3, 3], "play": [1, 1], "##ing": [5, 1], "[CLS]": [1, 1], "骑": [9, 0]}
    Path("bert").mkdir()
    Path("bert/vocab.txt").write_text("\n".join(words), encoding="utf-8")
    Path("bert/config.json").write_text('{"model_type": "bert"}')
    tensors = {"bert.embeddings.word_embeddings.weight": torch.tensor([*words.values()]) + 0.0}
    write = write_safetensors if file.endswith("safetensors") else lambda p, t: torch.save(t, p)
    write(Path("bert", file), tensors | {"bert.pooler.dense.weight": torch.zeros(1)})
    flags = "--analogy", "皇后 - 女人 + 男人", "--choices", "女王,骑,国王"
    # goal (1, 0) - (2, 1) + (2, 2) = (1, 1), the mean of 国 and 王
    more = "--analogy", "playing", "--choices", "国，play"
    lines = say(*flags, *more, ckpt="bert").splitlines()
    assert lines[:2] == [flags[1], "  1.000  '国王'"] and lines[5] == "  0.949  '国'"
    assert len(lines) == 4 + 3 and say(*flags, ckpt="bert").splitlines() == lines[1:4]
    others = say("--analogy", "playing", ckpt="bert").split()[1::2]
    assert sorted(others) == sorted(map(repr, words.keys() - {"play", "##ing", "[CLS]"}))
    assert say("--analogy", "PLÄY", ckpt="bert") == say("--analogy", "play", ckpt="bert")
    for word in ("plays", "e"):
        with pytest.raises(UserError, match=f"'{word}' is not in the model's vocabulary"):
            say("--analogy", word, ckpt="bert")
    with pytest.raises(UserError, match="--choices must be given for each --analogy"):
        say(*flags, "--analogy", "国")


@pytest.mark.parametrize("flags, named", [
    ("--top_p 2", "--top_p 2"),
    ("--top_k -1", "--top_k -1"),
    ("--max_new_tokens 0", "--max_new_tokens 0"),
    ("--temperature inf", "--temperature inf must be at least 0 and"),
    ("--prompt_ids a,b", "a,b"),
    ("--prompt_ids 5,320", "320 .*0 to 319"),
    (f"--prompt a --seed {2**70}", "--seed"),
    ("--device abacus", "--device abacus"),
    ("--choices a,b", "--choices is for --analogy"),
    ("--chat --stop x", "--stop is for --prompt"),
    ("--beams 2 --top_k 5", "--top_k is for sampling"),
    ("--analogy a --dtype int8", "--dtype is for models that write"),
    ("--system kind", "--system is for --chat"),
    ("--dtype int8 --no_fast", "--dtype int8 is for .* without --no_fast"),
    ("--beams 2 --num_samples 3", "--num_samples 3 is more than --beams 2"),
    ("--prompt @gb.txt", "gb.txt is not text in UTF-8"),
    ("--prompt @none.txt", "none.txt"),
    ("--prompt ab\udcff", "the prompt is not text in UTF-8"),  # a shell of another encoding
    ("--ckpt nowhere.pt", r"nowhere\.pt does not exist"),
    ("--ckpt .", r"best\.pt or last\.pt"),
    ("--ckpt gb.txt", r"gb\.txt"),
])
def test_a_value_that_makes_no_sense_is_named(say, capsys, flags, named):
    """By our own check, or by argparse in the same words."""
    Path("gb.txt").write_bytes("中文".encode("gb18030"))
    with pytest.raises((UserError, OSError, SystemExit)) as e:
        say(*flags.split())
    assert re.search(named, capsys.readouterr().err if str(e.value) == "2" else str(e.value))
