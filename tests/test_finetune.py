"""finetune.py before and after training: rows of every shape, masks, batches, metrics."""

import argparse
import copy
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import finetune as ft
import model as lm
import prepare_data
from data.chat import CHAT_TOKENS, ROLES, call_text, label_token, parse_call, render_chat
from data.cli import UserError
from data.download import download_path
from data.hotel import (
    HOTEL_DB,
    OWN_HOTELS,
    read_hotels,
    search_hotels,
    substitute,
    synthetic_dialogues,
    tidy_calls,
    values_by_key,
)
from data.rows import first_words, load_data, read_examples, split_off, to_example
from data.scores import bleu4, chat_scores, confusion, macro_f1, slot_counts
from data.sources import LAB, REVIEWS, SOURCES
from data.tokenizer import Tokenizer

SHARED = Path(os.environ.get("SCRATCHLM_DATA") or ROOT.parent / "shared" / "data").resolve()
BYTE = Tokenizer({"kind": "byte"})
CHAT = BYTE.with_special(CHAT_TOKENS)
SYSTEM, USER, ASSISTANT, CALL, TOOL, END = range(257, 263)  # CHAT_TOKENS, behind end-of-text
TRICKY = "Say <|end|> and <|assistant|><|call|> <|endoftext|> naïve 你好，世界 👩‍👩‍👧 \n\n x"


def real(name):
    if not (SHARED / name).exists():
        pytest.skip(f"real data {SHARED / name} is absent")
    return SHARED / name


def turn(role, content):
    return {"role": role, "content": content}


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def alpaca(n):
    return [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(n)]


# ---- masks ---------------------------------------------------------------------------------


def test_a_label_is_all_that_a_text_row_learns():
    names = BYTE.with_special([label_token(n) for n in ("neg", "pos")])
    row, cut = ft.label_row("a fine film", "pos", names, 64)
    film = [97, 32, 102, 105, 110, 101, 32, 102, 105, 108, 109]
    assert (row.ids, cut) == ([*film, 256, 258], False)
    assert row.mask == [0] * 12 + [1]
    assert row.targets() == [-100] * 11 + [258]
    row, _ = ft.label_row("a fine film", "pos", names, 64, loss_on="all")
    assert row.targets() == [*film[1:], 256, 258]
    assert ft.label_row("a fine film", None, names, 64)[0].ids == [*film, 256]
    row, cut = ft.label_row("a fine film", "neg", names, 5)  # the end of a text is kept
    assert (row.ids, cut, row.targets()) == ([*b"film", 256, 257], True, [-100] * 4 + [257])


def test_the_mask_of_a_conversation_with_a_tool_call():
    talk = [
        turn("user", "q"),
        turn("call", call_text("f", {})),
        turn("tool", "r"),
        turn("assistant", "ok"),
        turn("user", "m"),
        turn("assistant", "yes"),
        turn("user", "bye"),  # behind the last answer there is nothing to learn
    ]
    drawn = """
        U q E A C f _ { } E T r E A o k E U m E A y e s E
        0 0 0 0 1 1 1 1 1 1 0 0 0 0 1 1 1 0 0 0 0 1 1 1 1   assistant
        0 0 0 0 1 1 1 1 1 1                                 call
        1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1   all
    """
    tokens, *masks = drawn.strip().split("\n")
    names = {"U": USER, "A": ASSISTANT, "C": CALL, "T": TOOL, "E": END, "_": 32}
    ids = [names.get(t) or ord(t) for t in tokens.split()]
    for line in masks:
        *mask, loss_on = line.split()
        row, cut = ft.chat_row(talk, CHAT, 99, loss_on)
        more = [USER, *b"bye", END] if loss_on == "all" else []
        assert row.ids == ids[: len(mask)] + more and not cut
        assert row.mask == [int(m) for m in mask] + [1] * len(more)
    row, _ = ft.chat_row(talk, CHAT, 99)
    after_role = row.ids.index(ASSISTANT)
    assert row.targets()[after_role] == CALL  # the first token of an answer is learned
    assert row.targets()[-4:] == [*b"yes", END]


def test_show_mask_marks_what_is_learned(capsys):
    row, _ = ft.chat_row([turn("user", "q"), turn("assistant", "ok\n")], CHAT, 99)
    ft.show_mask([row, row], CHAT, 1)
    assert capsys.readouterr().out.split("\n") == [
        "--- row 1: 8 tokens, 4 of them learned ---",
        "    0       258 <|user|>",
        "    1       113 q",
        "    2       262 <|end|>",
        "    3       259 <|assistant|>",
        "    4 *     111 o",
        "    5 *     107 k",
        "    6 *      10 \\n",
        "    7 *     262 <|end|>",
        "",
    ]


def test_context_cuts_the_rows_of_a_run_and_cannot_be_more_than_the_checkpoint_s(tmp_path, capsys):
    model, path = small_model("rope", 257), tmp_path / "model.pt"
    content = {"config": dataclasses.asdict(model.config), "model": model.state_dict()}
    lm.save_checkpoint(path, content | {"tokenizer": BYTE.spec, "step": 0})
    data = write(tmp_path / "x.jsonl", [{"instruction": words(60), "output": "a"}, *alpaca(3)])
    flags = ["--ckpt", str(path), "--data", str(data), "--show_mask", "4"]
    for given, longest in (([], 49), (["--context", "9"], 10)):
        ft.main([*flags, *given])
        shown = map(int, re.findall(r": (\d+) tokens", capsys.readouterr().out))
        assert max(shown) == longest
    for wrong in ("1", "49"):
        with pytest.raises(UserError, match=f"--context {wrong} must be from 2 to .* 48"):
            ft.main([*flags, "--context", wrong])


# ---- the chat template ---------------------------------------------------------------------


@pytest.fixture(params=["byte", "char", "bpe:300", "gpt2", "cl100k_base"])
def plain(request, monkeypatch):
    if request.param in ("gpt2", "cl100k_base"):
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(real("tiktoken")))
    return prepare_data.make_tokenizer(request.param, [("", [TRICKY * 9])], 9)


def test_special_tokens_stand_behind_the_vocabulary_and_the_spec_travels_as_json(plain):
    chat = plain.with_special(CHAT_TOKENS)
    assert [chat.special[n] for n in CHAT_TOKENS] == list(range(plain.n_vocab, plain.n_vocab + 6))
    assert (chat.n_vocab, chat.eos_id) == (plain.n_vocab + 6, plain.eos_id)
    assert chat.encode(TRICKY) == plain.encode(TRICKY) and chat.name == plain.name
    again = Tokenizer(json.loads(json.dumps(chat.spec)))
    assert again.special == chat.special and again.encode(TRICKY) == chat.encode(TRICKY)
    assert chat.with_special(CHAT_TOKENS).spec == chat.spec == again.spec
    more = chat.with_special([CHAT_TOKENS[0], "<|label:a|(*b|>"])
    assert more.special["<|label:a|(*b|>"] == chat.n_vocab == more.n_vocab - 1


def test_a_prompt_is_the_beginning_of_the_row_with_its_answer(plain):
    chat = plain.with_special(CHAT_TOKENS)
    roles = ["system", "user", "call", "tool", "assistant", "user", "assistant"]
    talk = [turn(role, TRICKY[i:]) for i, role in enumerate(roles)]
    ids, mask = render_chat(talk, chat)
    parts = [render_chat([m], chat) for m in talk]
    assert [ids, mask] == [joined(column) for column in zip(*parts)]
    for i, m in enumerate(talk):
        if m["role"] in ("assistant", "call"):
            prompt, nothing = render_chat(talk[:i], chat, add_generation_prompt=True)
            assert prompt == ids[: len(prompt)] and mask[len(prompt)] == 1
            assert sum(nothing) == sum(mask[: len(prompt)])
    specials = [chat.decode([i]) for i in ids if i in chat.special.values()]
    wanted = joined([*ROLES[m["role"]], "<|end|>"] for m in talk)
    assert specials == wanted  # and none from the text, whatever it spells
    assert chat.decode(parts[1][0][1:-1]) == talk[1]["content"]


# ---- formats -------------------------------------------------------------------------------

U, A, EMPTY = turn("user", "q"), turn("assistant", "a"), turn("tool", "[]")


def call(**function):
    return [U, {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}]


OPENAI = [turn("system", "s"), *call(name="f", arguments='{"x": 500.0}'), EMPTY, A]
SHAREGPT = [
    {"from": "human", "value": "q"},
    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": "高"}}'},
    {"from": "observation", "value": "[]"},
    {"from": "gpt", "value": "a"},
]
HOTEL = [
    U,
    {"role": "search", "arguments": {"facilities": ["健身房"], "price_range_lower": 500.0}},
    {"role": "return", "records": [{"name": "n", "rating": 4.0, "price": None}]},
    A,
]
HOTEL_CALL = turn("call", 'search {"facilities": ["健身房"], "price_range_lower": 500}')
HOTEL_RECORDS = turn("tool", '[{"name": "n", "rating": 4, "price": null}]')
PAIR = {"chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}}
TOLD = turn("system", "s") | {"tools": [{"name": "f"}]}
CHATS = {
    "alpaca": ({"instruction": "i", "input": "", "output": "a"}, [turn("user", "i"), A]),
    "alpaca with input": (
        {"instruction": "i", "input": "n", "output": "a", "system": "s"},
        [turn("system", "s"), turn("user", "i\nn"), A],
    ),
    "sharegpt": (
        {"conversations": SHAREGPT, "tools": '[{"name": "f"}]', "system": "s"},
        [TOLD, U, turn("call", 'f {"x": "高"}'), EMPTY, A],
    ),
    "sharegpt, tools in words": (
        {"conversations": SHAREGPT, "tools": "f: finds", "system": "s"},
        [turn("system", "s\nf: finds"), U, turn("call", 'f {"x": "高"}'), EMPTY, A],
    ),
    "several calls in one turn": (
        [U, {"from": "function_call", "value": '[{"name": "f"}, {"name": "g"}]'}],
        [U, turn("call", "f {}"), turn("call", "g {}")],
    ),
    "openai": (
        {"messages": OPENAI},
        [turn("system", "s"), U, turn("call", 'f {"x": 500}'), EMPTY, A],
    ),
    "openai with tools": (
        {"messages": OPENAI, "tools": [{"name": "f"}]},
        [TOLD, U, turn("call", 'f {"x": 500}'), EMPTY, A],
    ),
    "hotel": (HOTEL, [U, HOTEL_CALL, HOTEL_RECORDS, A]),
    "context and response": (
        {"context": json.dumps(HOTEL[:3]), "response": json.dumps(A)},
        [U, HOTEL_CALL, HOTEL_RECORDS, A],
    ),
}


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_of_every_known_form(name):
    row, messages = CHATS[name]
    assert to_example(row) == ("chat", {"messages": messages})


def test_labelled_texts_and_preference_pairs_of_every_known_form():
    assert to_example({"text": "t", "label": "pos"}) == ("label", {"text": "t", "label": "pos"})
    assert to_example({"text": "t", "label": 1})[1]["label"] == "1"
    wanted = ("prefer", {"messages": [U], "chosen": "good", "rejected": "bad"})
    whole = {k: [U, turn("assistant", v["value"])] for k, v in PAIR.items()}
    text = {k: v["value"] for k, v in PAIR.items()}
    assert to_example({"conversations": [{"from": "human", "value": "q"}], **PAIR}) == wanted
    assert to_example({"prompt": "q", **text}) == wanted
    assert to_example({"prompt": [U], **whole}) == wanted
    assert to_example({"prompt": [U, A], **whole}) == wanted
    _, pair = to_example({"messages": [U], "system": "s", **text})
    assert pair["messages"] == [turn("system", "s"), U]


def test_a_list_lines_a_gz_and_a_byte_order_mark_are_read_alike(tmp_path):
    rows = alpaca(3)
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\r\n" for r in rows)
    files = {
        "list.json": json.dumps(rows, indent=2),
        "bom.json": "\ufeff" + json.dumps(rows),
        "lines.jsonl": lines,
        "lines.json": lines,
        "bom.jsonl": "\ufeff\n" + lines,
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            kind, examples = read_examples(path)
            asked = [e["messages"][0]["content"] for e in examples]
            assert (kind, asked) == ("chat", ["q0", "q1", "q2"]), path


@pytest.mark.parametrize(
    "name, kind, count",
    [
        ("instruct/alpaca_en_demo.json", "chat", 999),
        ("instruct/alpaca_zh_demo.json", "chat", 1000),
        ("instruct/dpo_en_demo.json", "prefer", 300),
        ("instruct/dpo_zh_demo.json", "prefer", 300),
        ("instruct/glaive_toolcall_zh_demo.json", "chat", 300),
        ("hotel/train.jsonl", "chat", 3111),
        ("hotel/dev.jsonl", "chat", 395),
    ],
)
def test_public_files_are_read_whole(name, kind, count, capsys):
    found, examples = read_examples(real(name))
    assert (found, len(examples), capsys.readouterr().err) == (kind, count, "")
    calls = [m for e in examples for m in e["messages"] if m["role"] == "call"]
    assert all(isinstance(parse_call(m["content"])[1], dict) for m in calls)
    assert bool(calls) == ("hotel" in name or "glaive" in name)


# ---- bad rows ------------------------------------------------------------------------------

BAD = [
    (7, "neither an object nor a list of turns but 7"),
    ({}, "no known format"),
    ({"texts": "a"}, "no known format has the keys texts"),
    ([], "no turn of the assistant"),
    ([U], "no turn of the assistant"),
    ([None, A], "a turn is no object but None"),
    ([turn("narrator", "x"), A], "role 'narrator' is unknown"),
    ([turn(["user"], "x"), A], "role ['user'] is unknown"),
    ([U, {"role": "user", "arguments": {}}], "a turn of user has no text"),
    ([turn("user", None), A], "a turn of user has no text"),
    ([turn("user", 3), A], "a turn of user has no text"),
    ([U, turn("assistant", " \n")], "a turn of assistant has no text"),
    ([U, turn("assistant", [{"deep": [{}]}])], "a turn of assistant has no text"),
    ({"messages": None}, "the conversation is no list"),
    ({"messages": [U, A], "system": 3}, "the system text is no text but 3"),
    ({"instruction": "i", "output": ""}, "a turn of assistant has no text"),
    ({"instruction": "", "output": "a"}, "a turn of user has no text"),
    ({"instruction": 3, "output": "a"}, "expected str"),
    ({"instruction": "i"}, "no known format has the keys instruction"),
    (call(name="f", arguments="{x}"), "Expecting property name"),
    (call(name="f", arguments="[1]"), "the arguments are no JSON object"),
    (call(name="f", arguments=None), "the arguments are no JSON object"),
    (call(name="two words", arguments="{}"), "the arguments are no JSON"),
    (call(name=None, arguments="{}"), "a tool cannot be called None"),
    (call(arguments="{}"), "no 'name'"),
    ([U, {"from": "function_call", "value": "no"}], "Expecting value"),
    ([U, {"from": "function_call", "value": "[[]]"}], "'list' object has no attribute"),
    ([U, {"role": "assistant", "tool_calls": 3}], "must be an iterable"),
    ({"context": "[", "response": "{}"}, "Expecting value"),
    ({"context": None, "response": json.dumps(A)}, "must be an iterable"),
    ({"text": " ", "label": "a"}, "the text is empty"),
    ({"text": 3, "label": "a"}, "the text is empty"),
    ({"text": "a", "label": None}, "the label is None"),
    ({"text": "a", "label": ["b"]}, "the label is ['b']"),
    ({"text": "a", "label": "b"}, "a row of label among rows of chat"),
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
    ({"prompt": "q", "chosen": "a", "rejected": " "}, "an answer is empty"),
    ({"prompt": "q", "chosen": None, "rejected": "a"}, "a turn is no object but None"),
    ({"chosen": "b", "rejected": "a"}, "a pair without a prompt"),
    ([U, turn("assistant", "\ud83d")], "surrogates not allowed"),
]


@pytest.mark.parametrize("row, reason", BAD, ids=str)
def test_a_bad_row_is_named_by_file_line_and_reason(tmp_path, capsys, row, reason):
    rows = alpaca(150)
    path = write(tmp_path / "x.jsonl", [*rows[:100], row, *rows[100:]])
    kind, examples = read_examples(path)
    error, summary = capsys.readouterr().err.splitlines()
    assert error.startswith(f"bad row: {path}:101: ") and reason in error
    assert summary == f"{path}: 1 of 151 rows are bad and left out"
    assert (kind, len(examples)) == ("chat", 150)


def test_broken_lines_are_bad_rows_and_a_broken_list_is_refused_at_its_line(tmp_path, capsys):
    good = [json.dumps(r) for r in alpaca(300)]
    deep, long = "[" * 100_000, "1" * 5000
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join([*good, "", '{"a": 1', deep, long]), encoding="utf-8")
    assert len(read_examples(path)[1]) == 300
    errors = capsys.readouterr().err.splitlines()
    for error, line in zip(errors, (302, 303, 304)):  # the empty line counts as a line
        assert error.startswith(f"bad row: {path}:{line}: broken JSON (")
    for broken in ('{"a" 1}', deep, long, "", '{"instruction": "q"'):
        path = tmp_path / "x.json"
        path.write_text("[\n" + good[0] + ",\n\n" + broken, encoding="utf-8")
        with pytest.raises(UserError, match=re.escape(f"{path}: broken JSON (")):
            read_examples(path)
    path.write_text(f"[{good[0]}]\n[{good[1]}]", encoding="utf-8")
    with pytest.raises(UserError, match=r"x\.json: broken JSON \(Extra data: line 2 column 1"):
        read_examples(path)


@pytest.mark.parametrize("indent", [None, 1])
def test_the_rows_of_a_list_are_numbered(tmp_path, capsys, indent):
    rows = alpaca(200)
    rows[150] = {"instruction": "q", "output": ""}
    path = tmp_path / "x.json"
    path.write_text(json.dumps(rows, indent=indent), encoding="utf-8")
    assert len(read_examples(path)[1]) == 199
    assert f"{path}: row 151: a turn of assistant has no text" in capsys.readouterr().err


def test_more_than_one_percent_or_nothing_left_is_refused(tmp_path):
    bad = [{"instruction": "", "output": "x"}]
    assert len(read_examples(write(tmp_path / "x.jsonl", alpaca(99) + bad))[1]) == 99
    for rows, says in ((alpaca(98) + bad, "1 of 99 rows are bad, first "), (bad, "1 of 1 rows")):
        with pytest.raises(UserError, match=says):
            read_examples(write(tmp_path / "x.jsonl", rows))
    with pytest.raises(UserError, match="holds no rows"):
        read_examples(write(tmp_path / "x.jsonl", []))
    packed = gzip.compress(b"{}" * 99)
    damaged = [b"", b"xx", b"\xff", packed[:-9], packed[:12] + b"\xff" * 3 + packed[15:]]
    for name, content in [("x.jsonl", b"\xff\xfe{}"), *(("x.json.gz", d) for d in damaged)]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            read_examples(tmp_path / name)
    with pytest.raises(UserError, match="does not exist: name a "):
        read_examples(tmp_path / "nothing.json")


# ---- sets and splits -----------------------------------------------------------------------


def test_beginnings_of_a_dialogue_are_joined_and_never_split(tmp_path):
    talk = [m for i in range(3) for m in (turn("user", f"q{i}"), turn("assistant", f"a{i}"))]
    rows = [{"context": talk[:i], "response": talk[i]} for i in (1, 3, 5)]
    other = {"context": [turn("user", "q0")], "response": turn("assistant", "else")}
    _, examples = read_examples(write(tmp_path / "x.jsonl", [*rows, other, other]))
    assert [len(e["messages"]) for e in examples] == [6, 2, 2]
    examples += [{"messages": [turn("user", str(i)), A]} for i in range(99) for _ in range(2)]
    train, val = split_off(examples, 0.2)
    assert len(train) + len(val) == len(examples) and 30 <= len(val) <= 44
    assert not {first_words(e) for e in train} & {first_words(e) for e in val}
    again = split_off(random.Random(0).sample(examples, len(examples)), 0.2)[1]
    assert sorted(map(str, again)) == sorted(map(str, val))
    five = [{"text": t, "label": "x"} for t in "abcde"]
    assert [e["text"] for e in split_off(five, 0.4)[1]] == ["c", "d"]  # everywhere, for ever
    for fraction in (0.01, 0.5, 0.99):
        assert all(split_off(examples[2:7], fraction))
    with pytest.raises(UserError, match="begin alike cannot be split"):
        split_off(examples[:3], 0.5)


def test_load_data_names_the_files_it_read_by_their_hashes(tmp_path):
    train, val = write(tmp_path / "t.jsonl", alpaca(20)), write(tmp_path / "v.jsonl", alpaca(3))
    digest = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (train, val)]
    kind, parts, hashes = load_data(train, val)
    assert (kind, hashes) == ("chat", dict(zip(("train", "val"), digest)))
    assert (len(parts["train"]), len(parts["val"])) == (20, 3)
    _, parts, hashes = load_data(train, fraction=0.25)
    assert (len(parts["train"]), len(parts["val"]), hashes) == (15, 5, {"train": digest[0]})
    labels = write(tmp_path / "l.jsonl", [{"text": "t", "label": "x"}])
    with pytest.raises(UserError, match="of different kinds"):
        load_data(train, labels)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty folder to work in, without a network."""

    def refuse(*args, **kwargs):
        raise AssertionError("no test asks the network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("requests.get", refuse)


def test_synthetic_dialogues_say_what_their_calls_ask_and_find_what_fits(offline, tmp_path):
    paths = SOURCES["hotel-synthetic"].fetch()
    first = {s: p.read_bytes() for s, p in paths.items()}
    for p in paths.values():
        p.unlink()
    SOURCES["hotel-synthetic"].fetch()
    assert first == {s: p.read_bytes() for s, p in paths.items()}
    rows = [json.loads(line) for line in first["train"].decode().splitlines()]
    assert len(rows) == 3000 and len(read_examples(paths["test"])[1]) == 300
    hotels = read_hotels(OWN_HOTELS)
    for user, search, found, answer, *_ in rows:
        said, a = user["content"], search["arguments"]
        low, high = a.get("price_range_lower"), a.get("price_range_upper")
        clauses = ["type" in a, "facilities" in a, low is not None, "rating_range_lower" in a]
        assert said.rstrip("。").split("酒店，", 1)[1].count("，") + 1 == sum(clauses), said
        assert all(f in said for f in [a.get("type", ""), *a.get("facilities", [])])
        assert low is None or f"{low}-{high}元" in said or f"{low}到{high}元" in said
        rating = a.get("rating_range_lower", 0)
        assert not rating or re.search(rf"(?<![\d.]){rating}分", said)

        def fits(h, a=a, low=low, high=high, rating=rating):
            cheap = low is None or low <= h["price"] <= high
            return cheap and a.get("type", h["type"]) == h["type"] and h["rating"] >= rating

        assert all(fits(r) and r["name"] in answer["content"] for r in found["records"])
        exact = [h for h in hotels if fits(h) and {*a.get("facilities", [])} <= {*h["facilities"]}]
        assert min(len(exact), 2) <= len(found["records"]) <= 2
    assert sum(not r[2]["records"] for r in rows) < 0.1 * len(rows)


def test_film_reviews_are_split_as_the_public_set_is(offline):
    folder, files = real("rotten_tomatoes"), {}
    archive = download_path(REVIEWS)
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w:gz") as tar:
        for label in ("pos", "neg"):
            raw = (folder / f"rt-polarity.{label}").read_bytes()
            files[label] = [line.strip() for line in raw.decode("latin-1").strip().split("\n")]
            member = tarfile.TarInfo(f"rt-polaritydata/rt-polarity.{label}")
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    kind, parts, _ = load_data("sentiment")
    assert kind == "label"
    assert {s: len(rows) for s, rows in parts.items()} == dict(train=8530, val=1066, test=1066)
    ends = {"train": (0, 4265), "val": (4265, 4798), "test": (4798, 5331)}
    for split, (start, stop) in ends.items():
        for label in ("pos", "neg"):
            texts = [e["text"] for e in parts[split] if e["label"] == label]
            assert texts == files[label][start:stop]
    first, last = parts["train"][0]["text"], parts["test"][-1]["text"]
    assert first.startswith("the rock is destined to be the 21st century's new")
    assert last.startswith("enigma is well-made , but it's just too dry")


def test_the_public_hotel_set_with_its_database(offline):
    for split, name in {"train": "train", "dev": "dev", "test": "dev"}.items():
        path = download_path(f"{LAB}/{split}.full.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = []
        for line in real(f"hotel/{name}.jsonl").read_text(encoding="utf-8").splitlines():
            turns = json.loads(line)
            rows += [
                json.dumps({"context": json.dumps(turns[:i]), "response": json.dumps(turn)})
                for i, turn in enumerate(turns)
                if turn["role"] in ("search", "assistant")
            ]
        path.write_text("\n".join(rows), encoding="utf-8")
    HOTEL_DB.parent.mkdir(parents=True)
    HOTEL_DB.write_bytes(real("hotel/hotel_db.json").read_bytes())
    kind, parts, hashes = load_data("hotel")
    assert {s: len(rows) for s, rows in parts.items()} == dict(train=3111, val=395, test=395)
    assert hashes["val"] == hashes["test"] and kind == "chat"
    hotels = read_hotels()
    assert len(hotels) > 1000 and len(search_hotels(hotels, type="豪华型")) == 2


# ---- rows that are too long ----------------------------------------------------------------


def words(n):
    return "".join(chr(97 + i % 26) for i in range(n))


def test_the_oldest_turns_are_cut_first_and_at_their_borders():
    talk = [turn("system", "s")]
    talk += [t for i in range(4) for t in (turn("user", f"q{i}"), turn("assistant", f"a{i}"))]
    row, cut = ft.chat_row(talk, CHAT, 34)  # 3 of system, then 4 a turn
    assert (row.ids, cut) == (render_chat(talk, CHAT)[0], False)
    row, cut = ft.chat_row(talk, CHAT, 20)
    assert (row.ids, cut) == (render_chat([talk[0], *talk[-4:]], CHAT)[0], True)
    args = argparse.Namespace(context=20, loss_on="assistant")
    split = ft.SFT(args, CHAT).make_split([{"messages": talk}, {"messages": talk[:3]}])
    assert (len(split.rows), split.cut) == (2, 1)
    long = [turn("user", words(50)), turn("assistant", "ok")]
    row, cut = ft.chat_row(long, CHAT, 10)  # the end of a question that is too long, and the answer
    assert (row.ids, cut) == (render_chat(long, CHAT)[0][-11:], True) and row.mask[-3:] == [1] * 3
    long = [turn("user", "q"), turn("assistant", words(50))]
    row, cut = ft.chat_row(long, CHAT, 10)
    assert (row.ids, cut) == (render_chat(long, CHAT)[0][:11], True)
    chosen = {"messages": long[:1], "chosen": words(50), "rejected": "no"}
    (good, bad), cut = ft.pair_rows(chosen, CHAT, 10)
    assert cut and len(good.ids) == 11 and good.mask == [0] * 4 + [1] * 7
    assert bad.ids == [USER, 113, END, ASSISTANT, *b"no", END] and sum(bad.mask) == 3


def test_any_conversation_keeps_a_target_and_the_turns_before_it():
    rng = random.Random(0)
    kept_whole = 0
    for _ in range(1500):
        roles = rng.choices(["user", "assistant", "call", "tool"], k=rng.randint(1, 7))
        roles += ["assistant"] if not {"assistant", "call"} & set(roles) else []
        roles = ["system", *roles] if rng.random() < 0.3 else roles
        talk = [turn(r, words(rng.choice((1, 3, 8, 30)))) for r in roles]
        context, loss_on = rng.randint(3, 60), rng.choice(("assistant", "all"))
        row, cut = ft.chat_row(talk, CHAT, context, loss_on)
        parts = [render_chat([m], CHAT)[0] for m in talk]
        while loss_on != "all" and roles[-1] not in ("assistant", "call"):
            parts.pop()
            roles.pop()
        system, rest = (parts[:1], parts[1:]) if roles[0] == "system" else ([], parts)
        tails = [joined(system + rest[k:]) for k in range(max(1, len(rest) - 1))]
        fitting = [t for t in tails if len(t) <= context + 1]
        assert len(row.ids) == len(row.mask) <= context + 1
        assert any(t != -100 for t in row.targets())
        if fitting:
            kept_whole += 1
            assert row.ids == fitting[0] and cut == (fitting[0] != tails[0])
        else:
            room, last = context + 1, tails[-1]
            assert cut and row.ids in [last[at : at + room] for at in range(len(last) - room + 1)]
    assert 300 < kept_whole < 1400


# ---- batches -------------------------------------------------------------------------------


def random_rows(count, longest=30, seed=0, low=2):
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        n = rng.randint(low, longest)
        ids = [rng.randrange(64) for _ in range(n)]
        rows.append(ft.Row(ids, [0, *(rng.randint(0, 1) for _ in range(n - 2)), 1]))
    return rows


@pytest.mark.parametrize("pairs", [False, True])
def test_an_epoch_of_batches_holds_each_row_once_within_the_budget(pairs):
    rows = random_rows(200)
    rows = list(zip(rows[:100], rows[100:])) if pairs else rows
    batches = ft.BucketLoader(rows, 120, seed=5)
    epochs = []
    for epoch in range(3):
        drawn = [batches.get(epoch * batches.per_epoch + i) for i in range(batches.per_epoch)]
        assert sorted(i for chosen, _ in drawn for i in chosen) == list(range(len(rows)))
        for chosen, got in drawn:
            assert [rows[i] for i in chosen] == got
            flat = [r for pair in got for r in pair] if pairs else got
            assert ft.pad(flat)[0].numel() <= 120
        epochs.append([chosen for chosen, _ in drawn])
    assert epochs[0] != epochs[1] != epochs[2]
    numbers = random.Random(1).sample(range(3 * batches.per_epoch), 40)
    again = ft.BucketLoader(rows, 120, seed=5)
    for n in numbers:  # in any order, as after a resume
        epoch, at = divmod(n, batches.per_epoch)
        assert again.get(n)[0] == epochs[epoch][at]
    assert ft.BucketLoader(rows, 120, seed=6).get(0)[0] != epochs[0][0]
    assert ft.BucketLoader(rows, 1, seed=5).per_epoch == len(rows)  # a larger row is a batch


def test_epochs_that_are_made_anew_have_as_many_batches_as_the_first():
    sizes = [30, 4, 30, 60, 15]
    epochs = [random_rows(40, longest, seed=e, low=3) for e, longest in enumerate(sizes)]
    batches = ft.BucketLoader(epochs[0], 60, 0, epochs.__getitem__)
    native = [ft.BucketLoader(rows, 60, 0).per_epoch for rows in epochs]
    assert native[1] < 7 < native[0] < native[3]
    for epoch, rows in enumerate(epochs):
        n = batches.per_epoch
        drawn = [batches.get(epoch * n + i) for i in range(n)]
        assert all(got == [rows[i] for i in chosen] for chosen, got in drawn)
        seen = {i for chosen, _ in drawn for i in chosen}
        assert len(seen) == 40 or native[epoch] > n
    assert batches.get(n - 1)[0] == ft.BucketLoader(epochs[0], 60, 0).get(n - 1)[0]


def test_padding_adds_no_targets():
    rows = [ft.Row([1, 2, 3], [0, 0, 1]), ft.Row([4, 5, 6, 7], [0, 1, 0, 1])]
    ids, targets = ft.pad(rows)
    assert ids.tolist() == [[1, 2, 0], [4, 5, 6]]
    assert targets.tolist() == [[-100, 3, -100], [5, -100, 7]]
    pairs = [(rows[0], rows[1]), (rows[1], rows[0])]
    split = ft.Split([], pairs, reference=torch.tensor([[1, 2], [3, 4]]))
    ids, _, reference = ft.DPO(None, CHAT).batch(split, [0, 1], pairs)
    assert ids.tolist() == [[1, 2, 0], [4, 5, 6], [4, 5, 6], [1, 2, 0]]  # chosen, then rejected
    assert reference.tolist() == [[1, 2], [3, 4]]


def small_model(position, vocab=64):
    torch.manual_seed(0)
    shape = dict(vocab_size=vocab, n_layer=2, n_head=2, d_model=32, context=48, init="gpt2")
    model = lm.Transformer(lm.Config(**shape, position=position))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


# ---- augmentation --------------------------------------------------------------------------


def hotel_talk(facilities, note=""):
    arguments = {"facilities": facilities, "rating_range_lower": 4}
    records = [{"name": "wifi", "facilities": facilities, "note": note}]
    return {
        "messages": [
            turn("user", f"要有{'和'.join(facilities)}的"),
            turn("call", call_text("search", arguments)),
            turn("tool", json.dumps(records, ensure_ascii=False)),
            turn("assistant", f"它有{'、'.join(facilities)}。"),
        ]
    }


def test_values_are_exchanged_everywhere_at_once_and_nothing_else():
    before = hotel_talk(["健身房", "SPA"], "健身房在二楼")
    kept = copy.deepcopy(before)
    pool = {"call.facilities": ["接机"], "tool.facilities": ["酒吧"], "tool.name": ["听涛宾馆"]}

    rng = random.Random(0)
    rng.random = iter([0.0, *[0.9] * 9]).__next__  # only the first value is exchanged
    after = substitute(before, pool, 0.5, rng)
    assert after == hotel_talk(["接机", "SPA"], "接机在二楼") and before == kept
    assert substitute(before, pool, 0.0, random.Random(0)) is before
    assert substitute(before, pool, 1.0, random.Random(0)) is before  # two would become one
    unsaid = {"messages": [turn("user", "x"), *before["messages"][1:]]}
    assert substitute(unsaid, pool, 1.0, random.Random(0)) is unsaid


def test_what_the_assistant_reads_out_of_a_result_is_exchanged_in_both():
    def talk(name, phone):
        records = json.dumps([{"name": name, "phone": phone, "type": "豪华型"}], ensure_ascii=False)
        texts = ("找一家酒店", 'search {"rating": 4}', records, f"推荐{name}，电话{phone}。")
        roles = ("user", "call", "tool", "assistant")
        return {"messages": [turn(role, text) for role, text in zip(roles, texts)]}

    pool = {"tool.name": ["听涛宾馆"], "tool.phone": ["1-2"], "tool.type": ["经济型"]}
    after = substitute(talk("北京饭店", "010-1"), pool, 1.0, random.Random(0))
    assert after == talk("听涛宾馆", "1-2")  # the type was not read out: it stays
    assert values_by_key([talk("a", "b")])["tool.name"] == ["a"]


def test_a_value_inside_another_is_not_torn_out_of_it():
    before, pool = hotel_talk(["上网", "上网服务"]), {"call.facilities": ["接机", "SPA"]}
    rng, new = random.Random(0), ["SPA", "接机"]
    rng.choice = lambda values: new.pop()
    assert substitute(before, pool, 1.0, rng) == hotel_talk(["接机", "SPA"])


ODD = ['a"b', "c\\d", "$1.*", "x|y", "(健身房)", "name", "facilities", "\\1", "换\n行", "\\g<0>"]


def test_odd_values_survive_an_exchange():
    examples = [hotel_talk([a, b]) for a in ODD for b in ODD if a != b]
    pool, rng = values_by_key(examples), random.Random(0)
    assert set(pool["call.facilities"]) == set(ODD) and "call.rating_range_lower" not in pool
    changed = 0
    for e in examples:
        after = substitute(e, pool, 0.7, rng)
        changed += after != e
        new = parse_call(after["messages"][1]["content"])[1]["facilities"]
        records = json.loads(after["messages"][2]["content"])
        assert list(records[0]) == ["name", "facilities", "note"]
        assert records[0]["facilities"] == new and set(new) <= set(ODD)
        assert after["messages"][::3] == hotel_talk(new)["messages"][::3]
    assert changed > 50


def test_a_tool_result_that_is_no_json_is_text_and_one_without_the_value_stays_as_it_is():
    talk = hotel_talk(["健身房"])["messages"]
    for result, wanted in (("有 健身房!", "有 接机!"), ('{"a":  1.50}', '{"a":  1.50}')):
        talk[2] = turn("tool", result)
        pool = {"call.facilities": ["接机"]}
        after = substitute({"messages": talk}, pool, 1.0, random.Random(0))
        assert after["messages"][2]["content"] == wanted
        assert after["messages"][0]["content"] == "要有接机的"


def test_calls_are_tidied_and_say_the_same():
    arguments = {"type": "豪华型", "facilities": ["c", "a", "z", "b"], "n": [2, 1]}
    talk = [turn("user", "b then c then a"), turn("call", call_text("f", arguments))]
    after = tidy_calls({"messages": [*talk, A]})["messages"]
    tidy = parse_call(after[1]["content"])[1]
    assert list(tidy) == ["facilities", "n", "type"] and after[0] == talk[0] and after[2] == A
    assert tidy["facilities"] == ["b", "c", "a", "z"] and tidy["n"] == [2, 1]
    assert sorted(tidy["facilities"]) == sorted(arguments["facilities"])
    assert tidy_calls({"messages": after})["messages"] == after


def test_augmented_epochs_depend_on_seed_and_epoch_alone():
    rows = synthetic_dialogues(40, "x")
    examples = [tidy_calls(to_example(r)[1]) for r in rows]
    args = argparse.Namespace(context=4000, loss_on="assistant")
    objective = ft.SFT(args, CHAT)
    make = ft.augmented(examples, objective, 0.5, seed=3)
    first, second = make(0), make(1)
    again = ft.augmented(examples, objective, 0.5, seed=3)
    assert make(0) == first != second and again(1) == second
    assert ft.augmented(examples, objective, 0.5, seed=4)(0) != first
    assert len(first) == len(second) == 40
    for row in first:
        text = CHAT.decode(row.ids)
        for content in re.findall(r"<\|call\|>(.*?)<\|end\|>", text, re.S):
            said = text[: text.index("<|call|>")]
            for value in parse_call(content)[1].values():
                for v in value if isinstance(value, list) else [value]:
                    assert str(v) in said


# ---- metrics -------------------------------------------------------------------------------


def test_bleu_is_nltk_s_with_its_third_smoothing():
    bleu = pytest.importorskip("nltk.translate.bleu_score")
    rng, smooth = random.Random(0), bleu.SmoothingFunction().method3
    alphabets = ["abc", "推荐您去北京丽晶酒店", "ab 酒店。"]
    for _ in range(600):
        letters = rng.choice(alphabets)
        reference = "".join(rng.choices(letters, k=rng.randint(1, 25))).strip() or "a"
        if rng.random() < 0.5:  # near each other
            ours = "".join(c for c in reference if rng.random() < 0.8)
        else:
            ours = "".join(rng.choices(letters + "z", k=rng.randint(0, 12)))
        ours = ours.strip()
        want = bleu.sentence_bleu([list(reference)], list(ours), smoothing_function=smooth)
        assert bleu4(f" {ours}\n", reference) == pytest.approx(want, abs=1e-12)


def test_bleu_by_hand():
    assert bleu4("", "abc") == bleu4("abc", "") == bleu4("xyz", "abc") == 0.0
    assert bleu4("一家酒店", "一家酒店") == pytest.approx(1.0)
    # precisions 4/4, 2/3, 0/2 -> 1/4, 0/1 -> 1/4
    assert bleu4("abdc", "dcab") == pytest.approx((2 / 3 / 4 / 4) ** 0.25)
    # 2/2, 1/1, then no n-gram: 1/2, 1/4; two characters for four: exp(1 - 2)
    assert bleu4("ab", "abcd") == pytest.approx((1 / 8) ** 0.25 * np.exp(-1))


@pytest.mark.parametrize(
    "predicted, reference, counts",
    [
        ({"a": 500}, {"a": 500.0}, (1, 1, 1)),
        ({"f": ["x", "y"]}, {"f": ["y", "z", "x"]}, (2, 2, 3)),
        ({"f": "x"}, {"f": ["x"]}, (1, 1, 1)),
        ({"f": ["x", "x"]}, {"f": ["x"]}, (1, 2, 1)),
        ({"a": 1, "b": 2}, {"a": 3}, (0, 2, 1)),
        ({"a": "1"}, {"a": 1}, (0, 1, 1)),
        ({"a": "x"}, {"b": "x"}, (0, 1, 1)),
        ({"a": {"k": 1, "l": 2.0}}, {"a": {"l": 2, "k": 1}}, (1, 1, 1)),
        (None, {"a": 1, "f": ["x", "y"]}, (0, 0, 3)),
        ({}, {}, (0, 0, 0)),
    ],
)
def test_slots_are_counted_value_by_value(predicted, reference, counts):
    assert slot_counts(predicted, reference) == counts


def test_chat_scores_of_four_answers():
    wanted = [
        turn("call", 'f {"a": 1, "b": ["x", "y"]}'),
        turn("call", 'f {"a": 1}'),
        turn("call", 'f {"a": 1}'),
        turn("assistant", "一家酒店"),
        turn("assistant", "ok"),
    ]
    got = [
        turn("call", 'f {"a": 1.0, "b": ["y", "z"]}'),  # 2 right of 3, 3 wanted
        turn("call", 'f {"a": '),  # no JSON
        turn("assistant", "hm"),  # no call
        turn("assistant", "一家酒店"),
        turn("call", "ok"),  # no answer
    ]
    scores = chat_scores([([], w) for w in wanted], got)
    assert scores == pytest.approx(
        dict(slot_p=2 / 3, slot_r=2 / 5, slot_f1=0.5, valid_json=1 / 3, bleu4=0.5)
    )
    assert chat_scores([], []) == {}


def test_confusion_and_macro_f1_by_hand():
    wanted, predicted = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 0]
    table = confusion(np.array(predicted), np.array(wanted), 4)
    assert table.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    # class 0: precision 2/4, recall 2/3; class 1: 1/2, 1/2; class 2: 0; class 3 never occurs: 0
    f1 = [2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3), 0.5, 0.0, 0.0]
    assert macro_f1(table) == pytest.approx(np.mean(f1))
    assert macro_f1(np.diag([3, 2])) == 1.0


def test_every_answer_but_an_opening_one_is_a_job_and_a_few_are_spread_evenly():
    greeting = {"messages": [A, U, turn("call", "f {}"), turn("tool", "r"), A]}
    jobs = ft.answer_jobs([greeting, {"messages": [U, A]}])
    asked = [(len(before), m["role"]) for before, m in jobs]
    assert asked == [(2, "call"), (4, "assistant"), (1, "assistant")]
    many = [{"messages": [turn("user", str(i)), A]} for i in range(100)]
    for limit in (1, 3, 64, 99, 100, 200):
        asked = [int(before[0]["content"]) for before, _ in ft.answer_jobs(many, limit)]
        assert len(asked) == min(limit, 100) and len(set(asked)) == len(asked)
        assert asked[-1] >= 100 - 100 / len(asked) - 1  # the end is asked, too


def test_a_conversation_saved_by_the_chat_can_be_learned(tmp_path):
    saved = [{"role": "user", "content": "hi"}, {"role": "call", "content": 'search {"a": 1}'}]
    saved += [{"role": "tool", "content": "[]"}, {"role": "assistant", "content": "nothing"}]
    assert to_example({"messages": saved}) == ("chat", {"messages": saved})
