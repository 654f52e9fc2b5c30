"""data/rows.py: rows of any form, files, splits, data sets of the Hub."""

import gzip
import hashlib
import json
import random
import re
import tarfile
from pathlib import Path
from urllib.parse import quote

import pytest
from conftest import CHAT, calls, real, turn

from data.batches import chat_rows, preference_rows
from data.chat import tool_call
from data.cli import UserError
from data.download import download_path
from data.hotel import HOTEL_DB, OWN_HOTELS, read_hotels, search_hotels, synthetic_dialogues
from data.row_files import read_rows
from data.rows import first_words, load_data, read_examples, split_off, to_example
from data.sources import LAB, REVIEWS, SOURCES


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def alpaca(n):
    return [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(n)]


U, A, SYSTEM = turn("user", "q"), turn("assistant", "a"), turn("system", "s")
TOLD, FACILITIES = [{"name": "f"}], '{"facilities": ["健身房"], "price_range_lower": 500'


def said(role, value):
    return {"from": role, "value": value}


def call(**function):
    return [U, {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}]


SEARCH = {"role": "search", "arguments": json.loads(FACILITIES + ".0}")}
HOTEL = [U, SEARCH, {"role": "return", "records": [{"name": "n", "rating": 4.0, "price": None}]}, A]
RESULT = turn("tool", '[{"name": "n", "rating": 4, "price": null}]')
HOTEL_READ = [U, turn("call", f"search {FACILITIES}}}"), RESULT, A]
WRITTEN = {"role": "assistant", "content": "", "tool_calls": [tool_call("f", '{"x": 500.0}')]}
FORMS = {  # (row, the messages that it means)
    "alpaca": ({"instruction": "i", "input": "n", "output": "a", "system": "s"},
               [SYSTEM, turn("user", "i\nn"), A]),
    "with history": (
        {"instruction": "q", "output": "a", "history": [["p", "b"]], "reasoning_content": "hm"},
        [turn("user", "p"), turn("assistant", "b"), U, A | {"reasoning_content": "hm"}]),
    "firefly": ({"kind": "NLI", "input": "q", "target": "a", "history": [U, A]}, [U, A, U, A]),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, [U, A]),
    "question and answer": ({"question": "q", "answer": "a"}, [U, A]),
    "swift": ({"query": "q", "response": "a", "history": [["q", "a"]]}, [U, A, U, A]),
    "dolly": ({"instruction": "i", "context": "n", "response": "a"}, [turn("user", "i\nn"), A]),
    "sharegpt": (
        {"conversations": [
            said("human", "q"), said("function_call", '{"name": "f", "arguments": {"x": 1}}'),
            said("observation", "[]"), said("gpt", "a")], "tools": json.dumps(TOLD), "system": "s"},
        [SYSTEM, U, turn("call", 'f {"x": 1}'), turn("tool", "[]"), A]),
    "calls": ([U, said("function_call", '[{"name": "f"}, {"name": "g"}]')],
              [U, calls("f {}", "g {}")]),
    "minimind": (
        {"conversations": [turn("system", "") | {"tools": json.dumps(TOLD)}, U,
                           {"role": "assistant", "content": "", "tool_calls": '[{"name": "f"}]'}]},
        [turn("system", ""), U, calls("f {}")]),
    "openai": (
        {"messages": [SYSTEM, *call(name="f", arguments='{"x": 500.0}'), turn("tool", "[]"), A],
         "tools": TOLD},
        [SYSTEM, U, WRITTEN, turn("tool", "[]"), A]),
    "no arguments": (call(name="f", arguments=""), [U, calls("f {}")]),
    "order and numbers": (call(name="git", arguments={"b": ["git", "-m"], "a": 500.0}),
                          [U, calls('git {"b": ["git", "-m"], "a": 500.0}')]),
    "legacy": ([U, turn("assistant", "I look") | {"function_call": {"name": "f"}}],
               [U, calls("f {}", content="I look")]),
    "parts, capitals": ([turn("Developer", "d"), turn("USER", [{"type": "text", "text": "q"}]), A],
                        [turn("developer", "d"), U, A]),
    "in a cell of a table": ({"messages": json.dumps([U, A])}, [U, A]),
    "hotel": (HOTEL, HOTEL_READ),
    "published": ({"context": json.dumps(HOTEL[:3]), "response": json.dumps(A)}, HOTEL_READ),
    "saved by the chat": ({"messages": HOTEL_READ}, HOTEL_READ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_a_chat_of_every_known_form(name):
    row, messages = FORMS[name]
    kind, example = to_example(row)
    tools = {"tools": TOLD} if name in ("sharegpt", "minimind", "openai") else {}
    assert (kind, example) == ("chat", {"messages": messages} | tools)
    assert json.dumps(example["messages"]) == json.dumps(messages)  # the order of keys, 500.0


def learned(row):
    return CHAT.decode([i for i, m in zip(row.ids, row.mask) if m])


def test_a_turn_of_weight_0_is_read_and_not_learned():
    _, example = to_example({"messages": [U, turn("assistant", "no") | {"weight": 0}, U, A]})
    (row,) = chat_rows(example, CHAT, 99)
    assert "<|assistant|>no<|end|>" in CHAT.decode(row.ids) and learned(row) == "a<|end|>"
    _, pair = to_example({"prompt": "q", "chosen": [A], "rejected": [example["messages"][1]]})
    with pytest.raises(ValueError, match="an answer of the pair has weight 0"):
        preference_rows(pair, CHAT, 99)


def hh(answer):
    return f"\n\nHuman: q\n\nAssistant: a\n\nHuman: 2\n\nAssistant: {answer}"


def sides(*before):
    return {side: [*before, turn("assistant", text)] for side, text in TEXTS.items()}


TALK, TEXTS = [SYSTEM, U, A, turn("user", "2")], {"chosen": "good", "rejected": "bad"}
@pytest.mark.parametrize("row, before", [  # (row, the messages before the two answers)
    ({"prompt": "q", **TEXTS}, [U]),
    ({"prompt": "q", "messages": TALK, **sides(*TALK[1:])}, TALK[1:]),  # ultrafeedback
    ({"prompt": TALK, **sides(*TALK[1:])}, TALK),
    ({"prompt": [U, A], **sides(U)}, [U]),
    (sides(*TALK), TALK),  # TRL without a prompt, minimind
    ({"input": {"messages": TALK}, "preferred_output": sides()["chosen"],
      "non_preferred_output": sides()["rejected"]}, TALK),  # OpenAI
    ({"chosen": hh("good"), "rejected": hh("bad")}, TALK[1:]),  # HH
    ({"prompt": hh(""), **TEXTS}, TALK[1:]),
    ({"instruction": "2", "history": [["q", "a"]], "system": "s", **TEXTS}, TALK),  # LLaMA-Factory
    ({"conversations": [said("human", "q")], "chosen": said("gpt", "good"),
      "rejected": said("gpt", "bad")}, [U]),
    ({"system": "s", "question": "q", **TEXTS}, [SYSTEM, U]),
    ({"query": "q", "response": "good", "rejected_response": "bad"}, [U]),  # ms-swift
])
def test_all_turns_before_the_answers_of_a_pair_are_kept(row, before):
    kind, pair = to_example(row)
    assert (kind, pair) == ("prefer", {"messages": before} | sides())
    assert [learned(r) for r in preference_rows(pair, CHAT, 999)] == ["good<|end|>", "bad<|end|>"]


def test_labels_are_text():
    for label, text in (("pos", "pos"), (1, "1"), (2.0, "2"), (True, "True")):
        assert to_example({"text": "t", "label": label}) == ("label", {"text": "t", "label": text})


def test_a_field_that_nothing_reads_is_named_once_with_its_rows(tmp_path, capsys):
    rows = [row | {"id": i, "score": None} for i, row in enumerate(alpaca(3))]
    rows.append({"messages": [U, A | {"mood": "good"}], "conversation": [U, A]})
    read_examples(write(tmp_path / "x.jsonl", rows))
    (line,) = capsys.readouterr().err.splitlines()
    names = "id (3), turn.mood (1), conversation (1)"
    assert line.endswith(f"fields that are not used, with their rows: {names}")


def test_a_list_lines_a_gz_and_a_byte_order_mark_are_read_alike(tmp_path):
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\r\n" for r in alpaca(3))
    texts = {"list.json": json.dumps(alpaca(3), indent=2), "bom.json": "\ufeff" + lines}
    for name, text in (texts | {"lines.jsonl": lines, "lines.JSON": lines}).items():
        raw = text.encode("utf-16" if name.startswith("lines") else "utf-8")
        for path, content in ((name, raw), (f"{name}.GZ", gzip.compress(raw))):
            (tmp_path / path).write_bytes(content)
            kind, examples = read_examples(tmp_path / path)
            asked = [e["messages"][0]["content"] for e in examples]
            assert (kind, asked) == ("chat", ["q0", "q1", "q2"]), path


FILMS = [{"text": "a; ü, c", "label": "1"}, {"text": 'two\nlines and "a quote"', "label": "0"}]


def table(d):
    return f'text{d}label\n"a; ü, c"{d}1\n"two\nlines and ""a quote"""{d}0\n'


@pytest.mark.parametrize("name, text", [
    ("A.CSV", table(",").replace("\n", "\r\n")),
    ("A.TSV.GZ", table("\t")),
    ("european.csv", table(";")),
    ("tabs.csv", table("\t")),
    ("pandas.csv", table(",").replace("text", ", text").replace('\n"', '\n7,"')),
    ("blank.csv", table(",").replace("label\n", "label\n\n") + "\n"),
])
def test_the_rows_of_a_table_are_text_under_the_names_of_its_header(tmp_path, name, text):
    path = tmp_path / name
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "cp1252"):
        raw = text.encode(encoding)
        path.write_bytes(gzip.compress(raw) if name.lower().endswith(".gz") else raw)
        named = {"encoding": encoding} if encoding == "cp1252" else {}
        assert read_examples(path, **named) == ("label", FILMS)


def test_bad_rows_of_a_table_are_named(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('text,label\na,0\nd\n"e\ne",f,0\ng,1\n' + "x" * 200_000 + ",1\n")
    (_, a), *bad, (where, g), (_, x) = read_rows(path)
    assert (a["text"], g["text"], where, len(x["text"])) == ("a", "g", f"{path}:6", 200_000)
    said = ["3: 1 cells for 2 columns", "4: 3 cells for 2 columns"]
    assert [str(e).removeprefix(f"{path}:") for _, e in bad] == said
    for text, says in (('text,label\na,0\n"b"c,1\n', "x.csv:3: a quote opens or ends at the wrong"),
                       ('text,label\na,"b\nc', "x.csv:2: a quote opens or ends at the wrong")):
        path.write_text(text)
        with pytest.raises(UserError, match=re.escape(says)):
            list(read_rows(path))


@pytest.mark.parametrize("name, content, says", [
    ("a.parquet", b"PAR1\0", "pandas.read_parquet('a.parquet').to_json('a.jsonl', orient="),
    ("y.feather", b"ARROW1\0\0", "pandas.read_feather('y.feather').to_json('y.jsonl', orient="),
    ("x.XLSX", b"PK\x03\x04", "x.XLSX is in xlsx format: convert it with python -c"),
    ("x.zip", b"PK\x03\x04\0", "x.zip is a binary file, not rows: name a .json, .jsonl, .csv"),
    ("x.jsonl", b"\x1f\x8b\x08\0", "x.jsonl: byte 0x8b at offset 1 is not text in UTF-8"),
    ("x.json.gz", b"[]", "x.json.gz: damaged"),
    ("x.csv", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "x.csv: byte 0x89 at offset 0 is not text"),
    ("folder", None, "folder is a folder: name a .json"),
    ("shakespeare", None, "shakespeare is plain text, not rows: python train.py --ckpt RUN --data"),
    ("novel.txt", b"Once upon", "novel.txt is plain text, not rows: python train.py --ckpt RUN --"),
    ("nothing.json", None, "nothing.json does not exist: name a .json"),
])
def test_a_file_that_holds_no_rows_says_what_it_is(elsewhere, name, content, says):
    Path("folder").mkdir()
    if content:
        Path(name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(says)) as e:
        read_examples(name)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("row, reason", [
    (7, "neither an object nor a list of turns but 7"),
    ({"texts": "a"}, "no known format has the keys texts; known are messages or"),
    ([U], "no turn of the assistant"),
    ({"prompt": [U]}, "no answer beside prompt: add one, for GRPO perhaps"),
    ([None, A], "a turn is not an object but None"),
    ([turn("user", 3), A], "content is 3, not text"),
    ([U, turn("assistant", " \n")], "a turn of assistant has no text"),
    ([U, A | {"weight": 0.5}], "the weight is 0.5"),
    ([U, turn("assistant", "\ud83d")], "surrogates not allowed"),
    ({"messages": None}, "messages is null, not text or turns"),
    ({"instruction": "q", "input": None, "output": None}, "output is null, not text"),
    ({"question": "q", "answer": 4}, "answer is 4, not text"),
    ({"messages": "hello"}, "messages is 'hello', not JSON"),
    ({"messages": [U, A], "tools": "f: finds"}, "tools is 'f: finds', not JSON"),
    ({"instruction": "q", "output": "a", "history": [["p"]]}, "not an object but ['p']"),
    ({"instruction": 5.0, "input": "x", "output": "a"}, "instruction is 5.0, not text"),
    ([U, A | {"tool_calls": 5}], "tool_calls is 5, not a list or an object"),
    (call(name="f", arguments="[1]"), "the arguments are not a JSON object"),
    (call(name="two words", arguments="{}"), "a tool cannot be called 'two words'"),
    ([U, said("function_call", "[[]]")], "a tool call is [], not an object with name"),
    ([U | {"tool_calls": [{"name": "f"}]}, A], "a turn of user has tool calls"),
    ({"text": " ", "label": "a"}, "the text is empty"),
    ({"text": "a", "label": ["b"]}, "the label is ['b']"),
    ({"text": "a", "label": "b"}, "a row of kind label among"),
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
    ({"prompt": "x", **TEXTS, "chosen": [U, A]}, "begins with another question than the prompt"),
    ({"chosen": "b", "rejected": "a"}, "a pair without a prompt"),
    ({"prompt": "q", "completion": "a", "label": "False"}, "(KTO) cannot be learned from"),
], ids=str)
def test_a_bad_row_is_named_by_file_line_and_reason(tmp_path, capsys, row, reason):
    rows = alpaca(150)
    path = write(tmp_path / "x.jsonl", [*rows[:100], row, *rows[100:]])
    kind, examples = read_examples(path)
    error, summary = capsys.readouterr().err.splitlines()
    assert error.startswith(f"bad row: {path}:101: ") and reason in error
    assert summary == f"{path}: 1 of 151 rows are bad and left out"
    assert (kind, len(examples)) == ("chat", 150)


def test_broken_lines_are_bad_rows_and_a_broken_list_is_refused(tmp_path, capsys):
    good = [json.dumps(r) for r in alpaca(300)]
    deep, long = "[" * 100_000, "1" * 5000
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join([*good, "", '{"a": 1', deep, long]), encoding="utf-8")
    assert len(read_examples(path)[1]) == 300
    errors = capsys.readouterr().err.splitlines()
    for error, line in zip(errors, (302, 303, 304)):  # the empty line counts as a line
        assert error.startswith(f"bad row: {path}:{line}: broken JSON (")
    odd = [{"instruction": "", "output": "a"}, {"prompt": 7, "answer": "a"}, [A, U, A, U]] * 2
    assert len(read_examples(write(path, [*alpaca(400), *odd]))[1]) == 402
    errors = capsys.readouterr().err.splitlines()
    for error, said in zip(errors, ("a turn of user has no text", "prompt is 7, not", "has no text",
                                    "prompt is 7", "4 of 406", "2 of 406 conversations end with")):
        assert said in error
    assert len(errors) == 6
    path = tmp_path / "x.json"
    for broken in ('{"a" 1}', deep, long, "", f"{good[0]}]\n[{good[1]}]"):
        path.write_text("[\n" + good[0] + ",\n\n" + broken, encoding="utf-8")
        with pytest.raises(UserError, match=re.escape(f"{path}: broken JSON (")):
            read_examples(path)
    bad = [*alpaca(150), {"instruction": "q", "output": ""}]
    path.write_text(json.dumps(bad, indent=1), encoding="utf-8")  # rows of a list are numbered
    assert len(read_examples(path)[1]) == 150
    assert f"{path}: row 151: a turn of assistant has no text" in capsys.readouterr().err


def test_more_than_one_percent_or_nothing_left_is_refused(tmp_path):
    bad = [{"instruction": "", "output": "x"}]
    assert len(read_examples(write(tmp_path / "x.jsonl", alpaca(99) + bad))[1]) == 99
    for rows, says in ((alpaca(98) + bad, "1 of 99 rows are bad, first"), ([], "no rows")):
        with pytest.raises(UserError, match=says):
            read_examples(write(tmp_path / "x.jsonl", rows))


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
    greeted = [{"messages": [turn("user", "hi"), turn("assistant", str(n))]} for n in range(50)]
    train, val = split_off([*greeted, examples[5]], 0.2)  # a greeting does not join conversations
    assert len(val) == 10 and len(train) == 41
    with pytest.raises(UserError, match="cannot be split, all are alike"):
        split_off(examples[1:3], 0.5)


def test_load_data_names_the_files_it_read_by_their_hashes(tmp_path):
    train, val = write(tmp_path / "t.jsonl", alpaca(20)), write(tmp_path / "v.jsonl", alpaca(3))
    digest = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (train, val)]
    kind, parts, hashes = load_data(train, val)
    assert (kind, hashes) == ("chat", dict(zip(("train", "val"), digest)))
    assert (len(parts["train"]), len(parts["val"])) == (20, 3)
    _, parts, hashes = load_data(train, fraction=0.25)
    assert (len(parts["train"]), len(parts["val"]), hashes) == (15, 5, {"train": digest[0]})
    both = tmp_path / "b.json"
    both.write_text(json.dumps(alpaca(24)[20:]), encoding="utf-8")
    _, parts, hashes = load_data(f"{train},{both}", val)
    assert (len(parts["train"]), len(parts["val"])) == (24, 3)
    assert hashes["train"].startswith(digest[0]) and len(hashes["train"]) == 128
    assert type(hashes) is dict  # a checkpoint keeps it
    labels = write(tmp_path / "l.jsonl", [{"text": "t", "label": "x"}])
    for sources in ((train, labels), (f"{train},{labels}", val)):
        with pytest.raises(UserError, match=r"of different kinds.*l\.jsonl"):
            load_data(*sources)


ROWS = [("2:5", "234"), (":2", "01"), ("17:", "789"), ("-3:-1", "78"), (None, "0123456789" * 2)]


@pytest.mark.parametrize("rows, last", ROWS)
def test_a_part_of_the_rows(elsewhere, rows, last):
    train, val = write(Path("t.jsonl"), alpaca(20)), write(Path("v.jsonl"), alpaca(3))
    _, parts, hashes = load_data(train, val, rows=rows)
    asked = [e["messages"][0]["content"] for e in parts["train"]]
    assert ("".join(q[-1] for q in asked), len(parts["val"])) == (last, 3)
    assert hashes.get("rows") == rows  # a resumed run must have the same ones
    _, parts, _ = load_data(train, rows=rows, max_rows=18, every_row=True)
    assert parts["val"] is parts["train"] and len(parts["val"]) <= 18
    for none in ("5", "1-5", "a:b", "1:5:2", ":-", "90:", "5:3"):
        with pytest.raises(UserError, match=f"--rows {none}"):
            load_data(train, rows=none)


@pytest.fixture
def hub(elsewhere, monkeypatch, mirror):
    """A mirror of the Hub: hub(repo, {config: {split: rows}}) adds a data set to its viewer."""
    monkeypatch.setenv("SCRATCHLM_MIRROR", mirror.base)

    def add(repo, configs, total=None):
        viewer, repo = "/datasets-server.huggingface.co", quote(repo, safe="")
        found = [{"config": c, "split": s} for c, splits in configs.items() for s in splits]
        mirror.files[f"{viewer}/splits?dataset={repo}"] = json.dumps({"splits": found}).encode()
        label = {"name": "label", "type": {"names": ["neg", "pos"], "_type": "ClassLabel"}}
        text = {"name": "text", "type": {"dtype": "string", "_type": "Value"}}
        for c, s in ((f["config"], f["split"]) for f in found):
            rows = configs[c][s]
            for n in range(0, len(rows), 100):
                page = {"features": [text, label], "num_rows_total": total or len(rows)}
                page["rows"] = [{"row": row} for row in rows[n : n + 100]]
                url = f"{viewer}/rows?dataset={repo}&config={c}&split={s}&offset={n}&length=100"
                mirror.files[url] = json.dumps(page).encode()

    add.mirror = mirror
    return add


def films(n, label=None):
    return [{"text": f"film {i}", "label": i % 2 if label is None else label} for i in range(n)]


def test_a_data_set_of_the_hub_comes_page_by_page_and_once(hub, capsys):
    splits = {"train": films(250), "validation": films(7), "test": films(3, -1)}
    hub("me/films", {"default": splits})
    hub.mirror.faults[None] = [None, None, 404]  # the third answer
    with pytest.raises(UserError, match="404"):
        load_data("me/films")
    kind, parts, _ = load_data("me/films")
    assert (kind, {s: len(p) for s, p in parts.items()}) == ("label", {"train": 250, "val": 7})
    assert [e["label"] for e in parts["train"]] == ["neg", "pos"] * 125
    assert parts["train"][249]["text"] == "film 249"
    err = capsys.readouterr().err
    assert "me/films: 3 of 3 rows of test have no label" in err and "downloaded" not in err
    asked = [path for path, _, _ in hub.mirror.log if "datasets-server" in path]
    assert len(asked) == 7 and len(set(asked)) == 6  # two lists, five pages, one of them twice


def sizes(source, **options):
    return {split: len(rows) for split, rows in load_data(source, **options)[1].items()}


def test_configurations_splits_parts_and_files_of_a_data_set(hub):
    splits = {"train": films(120), "test": films(9)}
    hub("me/many", {"en": splits, "zh": {"train_sft": films(30), "dev": films(5)}})
    hub("me/one", {"plain": {"train": films(2), "validation": films(8)}})
    assert sizes("me/many:en", rows="110:") == {"train": 9, "test": 9, "val": 1}
    assert sizes("me/many:en", max_rows=5) == {"train": 4, "test": 5, "val": 1}
    for rows, n in ((":15", 15), ("3:15", 12)):
        hub.mirror.files = {k: v for k, v in hub.mirror.files.items() if "offset=100" not in k}
        found = sizes("me/many:en", rows=rows, val_source="me/one")
        assert found == {"train": n, "test": 9, "val": 8}
    assert sizes("me/one") == {"train": 2, "val": 8}
    hub("me/sft", {"default": {"train_sft": films(30), "test_sft": films(5)}, "other": {}})
    assert sizes("me/sft:train_sft", val_source="me/sft:test_sft") == {"train": 30, "val": 5}
    for name, n in (("rows v2.csv", 30), ("data/Train.csv", 4)):
        url = f"/huggingface.co/datasets/me/split/resolve/main/{quote(name)}"
        hub.mirror.files[url] = b"text,label\n" + b"a,0\n" * n
        source = f"me/split:{name}"
        assert sizes(source, val_source=source) == {"train": n, "val": n}


@pytest.mark.parametrize("source, says", [
    ("me/many", "has several configurations: name one, as me/many:en; it has en, zh"),
    ("me/many:zh", "has no split train: name one, as me/many:train_sft; it has t"),
    ("me/sft:train_dpo", "has no split train_dpo: name one, as me/sft:train_sft"),
    ("me/large", "has 100,100 rows of train: say how many by --max_rows"),
    ("me/bare", "data/datasets/me/bare/default-train.jsonl holds no rows"),
    ("me/none", "me/none is not a file or folder here, and the Hub's viewer does not give its"),
    ("my/here", "my/here is a folder"),
    ("data/none", "data/none does not exist: name a .json, .jsonl, .csv, .tsv file, .gz too"),
])
def test_a_data_set_that_cannot_be_read_is_a_line(hub, source, says):
    hub("me/many", {"en": {"train": films(1)}, "zh": {"train_sft": films(1)}})
    hub("me/sft", {"default": {"train_sft": films(1)}})
    hub("me/large", {"default": {"train": films(1)}}, total=100_100)
    hub("me/bare", {"default": {"train": films(9, -1)}})
    Path("my/here").mkdir(parents=True)
    with pytest.raises(UserError, match=re.escape(says)) as e:
        load_data(source)
    assert "\n" not in str(e.value)


def test_synthetic_dialogues_say_what_their_calls_ask_and_find_what_fits():
    rows = synthetic_dialogues(150, "train")
    assert rows == synthetic_dialogues(150, "train") != synthetic_dialogues(150, "dev")
    for user, search, result, answer, *_ in rows:
        arguments, asked = search["arguments"], user["content"]
        words = [arguments.get("type", ""), *arguments.get("facilities", ())]
        words += [str(value) for value in arguments.values() if isinstance(value, int | float)]
        assert all(word in asked for word in words)
        assert result["records"] == search_hotels(read_hotels(OWN_HOTELS), **arguments)
        assert all(record["name"] in answer["content"] for record in result["records"])
    assert sum(not r[2]["records"] for r in rows) < 0.1 * len(rows)


def test_film_reviews_are_split_as_the_public_set_is(elsewhere):
    folder, files = real("rotten_tomatoes"), {}
    archive = download_path(REVIEWS)
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for label in ("pos", "neg"):
            path = folder / f"rt-polarity.{label}"
            files[label] = [x.strip() for x in path.read_text("latin-1").strip().split("\n")]
            tar.add(path, f"rt-polaritydata/{path.name}")
    both = {"train": slice(4265), "val": slice(4265, 4798), "test": slice(4798, 5331)}
    wanted = {split: [{"text": t, "label": label} for label in files for t in files[label][part]]
              for split, part in both.items()}  # fmt: skip
    assert load_data("sentiment")[:2] == ("label", wanted)
    for name in ("rotten_tomatoes", "cornell-movie-review-data/rotten_tomatoes"):
        assert SOURCES[name] is SOURCES["sentiment"]  # as the course and the Hub call it


def test_the_public_hotel_set_with_its_database(elsewhere):
    rows = []
    for line in real("hotel/dev.jsonl").read_text(encoding="utf-8").splitlines()[:40]:
        turns = json.loads(line)
        for i, reply in enumerate(turns):
            if reply["role"] in ("search", "assistant"):
                rows.append({"context": json.dumps(turns[:i]), "response": json.dumps(reply)})
    for split in ("train", "dev", "test"):
        path = download_path(f"{LAB}/{split}.full.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, rows)
    HOTEL_DB.parent.mkdir(parents=True)
    HOTEL_DB.write_bytes(real("hotel/hotel_db.json").read_bytes())
    kind, parts, hashes = load_data("hotel")
    assert {s: len(rows) for s, rows in parts.items()} == dict(train=40, val=40, test=40)
    assert hashes["val"] == hashes["test"] and kind == "chat"
    assert len(read_hotels()) > 1000 and len(search_hotels(read_hotels(), type="豪华型")) == 2
