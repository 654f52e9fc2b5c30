"""data/rows.py: rows of any shape, sets and splits."""

import gzip
import hashlib
import io
import json
import random
import re
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import real, turn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sys
from pathlib import Path

from data.chat import parse_call
from data.cli import UserError
from data.download import download_path
from data.hotel import (
    HOTEL_DB,
    OWN_HOTELS,
    read_hotels,
    search_hotels,
)
from data.rows import first_words, load_data, read_examples, split_off, to_example
from data.sources import LAB, REVIEWS, SOURCES


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def alpaca(n):
    return [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(n)]


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
    with pytest.raises(UserError, match="cannot be split, all begin alike"):
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


def test_a_conversation_saved_by_the_chat_can_be_learned(tmp_path):
    saved = [{"role": "user", "content": "hi"}, {"role": "call", "content": 'search {"a": 1}'}]
    saved += [{"role": "tool", "content": "[]"}, {"role": "assistant", "content": "nothing"}]
    assert to_example({"messages": saved}) == ("chat", {"messages": saved})
