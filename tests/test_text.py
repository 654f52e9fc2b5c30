"""data/text.py: encodings, archives, rows of JSON."""

import gzip
import io
import json
import random
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ALL_TEXT, TEXTS, pieces_of, set_block

from data.cli import UserError
from data.text import json_rows, split

pytestmark = pytest.mark.usefixtures("elsewhere")
ROWS = [{"text": "a }{"}, {"text": "b", "more": [{"c": 1}, []]}, {"text": "d"}]


@pytest.mark.parametrize("block", [5, 1 << 20])
@pytest.mark.parametrize("encoding, start, text", [  # (encoding, byte order mark, text)
    ("utf-8", b"", ALL_TEXT),
    ("utf-8", b"\xef\xbb\xbf", ALL_TEXT),
    ("utf-16-le", b"\xff\xfe", ALL_TEXT),
    ("utf-16-be", b"\xfe\xff", ALL_TEXT),
    ("utf-16-be", b"", TEXTS["english"] + TEXTS["code"]),
    ("utf-16-le", b"", TEXTS["chinese"] + "\n"),
    ("utf-16-be", b"", TEXTS["japanese"]),
    ("gb18030", b"", TEXTS["chinese"]),
    ("gb18030", b"", TEXTS["chinese"] * 60 + "\U0001f600"),
    ("gbk", b"", TEXTS["english"].replace("—", "-") * 30 + TEXTS["chinese"] * 30),
    ("gbk", b"", "他說：學而時習之，不亦說乎？我們今天去北京的時候，天氣很好！"),
    ("gbk", b"", "import os  # 用 os 的 path\nprint('A和B')  # 这是一个例子\n"),
    ("utf-8", b"", "four\r\ntwo\rthree\n\r\n\r"),
    *(("gbk", b"", text) for text in ("床前明月光，", "城市\n北京\n上海", "问题0,答案0\n")),
])
def test_encodings_and_line_ends_are_recognised(encoding, start, text, block, monkeypatch):
    set_block(monkeypatch, block)  # 5 bytes: nearly every character is cut somewhere
    Path("a.txt").write_bytes(start + text.encode(encoding))
    assert pieces_of("a.txt") == [re.sub("\r\n?", "\n", text)]


@pytest.mark.parametrize("times", [1, 50])
@pytest.mark.parametrize("encoding, text", [
    ("cp1252", "She\u2019s the seller\u2019s \u201cfriend\u201d\u2014don\u2019t talk. "),
    ("cp1252", "Größere Bücher für Schüler; schön, wärmer, möglich. "),
    ("shift_jis", TEXTS["japanese"]),
    ("euc_jp", TEXTS["japanese"]),
    ("big5", "他說：學而時習之，不亦說乎？我們今天去北京的時候，天氣很好！"),
    ("euc_kr", "안녕하세요 오늘은 날씨가 아주 좋습니다. 우리는 학교에 갑니다.\n"),
    ("cp1251", "мама мыла раму, дети идут туда. "),
])
def test_what_gb18030_would_turn_into_other_characters_is_refused(encoding, text, times):
    text *= times
    Path("a.txt").write_bytes(text.encode(encoding))
    assert text.encode(encoding).decode("gb18030") != text  # it can be decoded
    with pytest.raises(UserError, match=r"a\.txt: byte 0x.. at .* UTF-8.* --encoding cp1252"):
        pieces_of("a.txt")
    assert pieces_of("a.txt", encoding=encoding) == [text]


@pytest.mark.parametrize("size, at", [(30_000, 3_000), (1_500_000, 1_200_000), (60_000, 59_997)])
@pytest.mark.parametrize("damage", [b"\xff", b"\xc0", b"A", b"\xe4\xb8A", b""])
def test_a_damaged_chinese_file_does_not_pass_for_gb18030_and_its_byte_is_named(size, at, damage):
    data = ("学而时习之不亦说" * (size // 24 + 1)).encode()[:size]
    lead = at + 1 if damage == b"A" else at
    data = data[:lead] + damage + data[lead + len(damage) :]
    if not damage:  # cut inside a character
        data, at = data[:-1], size - 3
    Path("poem.txt").write_bytes(data)
    said = rf"poem\.txt: byte {data[at]:#04x} at offset {at:,} .*--encoding"
    with pytest.raises(UserError, match=said):
        pieces_of("poem.txt")


def test_failures_of_a_named_encoding_are_named():
    Path("a.txt").write_bytes("naïve café ÿ".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt: byte 0xef at offset 2 is not text in utf-8$"):
        pieces_of("a.txt", encoding="utf-8")
    for encoding in ("hex", "rot13", "base64", "undefined", "nope", "utf-16"):
        with pytest.raises(UserError, match=rf"a\.txt: --encoding {encoding}: .*(encoding|BOM)"):
            pieces_of("a.txt", encoding=encoding)


def test_a_zip_gives_its_text_members_and_unpacks_nothing():
    with zipfile.ZipFile("a.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("b.txt", "床前明月光\r\n")
        z.writestr("../../escaped.txt", "second")
        z.writestr("c.png", b"\x89PNG")
        for hidden in ("__MACOSX/._b.txt", ".git/x.txt", "b/.x.txt"):
            z.writestr(hidden, "\0\5\26\7")
        z.writestr("rows.jsonl", '{"text": "third"}\n"fourth"')
    assert pieces_of("a.zip") == ["床前明月光\n", "second", "third", "fourth"]
    assert [p.name for p in Path().rglob("*")] == ["a.zip"]


@pytest.mark.parametrize("suffix, mode", [("tar", ""), ("TAR.GZ", "gz"), ("tar.xz", "xz")])
def test_a_tar_file_gives_its_text_members_and_follows_nothing(suffix, mode, capsys):
    Path("secret.txt").write_text("secret")
    with tarfile.open(f"a.{suffix}", f"w:{mode}") as tar:
        for name, text in (
            ("./B.TXT", "old"), ("./B.TXT", "床前明月光\r\n"), ("../up.txt", "second"),
            ("/tmp/c.md", "third"), ("rows.Jsonl", '"fourth"'), (".x/y.txt", ""), ("d.pdf", "%PDF"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
        for kind, name in ((tarfile.SYMTYPE, "s"), (tarfile.LNKTYPE, "l"), (tarfile.FIFOTYPE, "f")):
            info = tarfile.TarInfo(f"{name}.txt")
            info.type, info.linkname = kind, str(Path("secret.txt").resolve())
            tar.addfile(info)
    assert pieces_of(f"a.{suffix}") == ["床前明月光\n", "second", "third", "fourth"]
    assert sorted(p.name for p in Path().rglob("*")) == [f"a.{suffix}", "secret.txt"]
    assert capsys.readouterr().err == f"a.{suffix}: files left out: 1 .pdf\n"
    data = Path(f"a.{suffix}").read_bytes()
    for damaged in (data[:300], b"no archive"):
        Path(f"a.{suffix}").write_bytes(damaged)
        with pytest.raises(UserError, match=rf"a\.{suffix}: damaged"):
            pieces_of(f"a.{suffix}")


def test_jsonl_rows_are_documents():
    rows = ["plain", {"text": "t", "content": "no"}, {"content": "c"}, {"title": "x", "text": ""}]
    rows.append("half an emoji \ud83d")  # as a limit of length leaves it; UTF-8 has no bytes for it
    lines = "\r\n\r\n".join(json.dumps(r) for r in rows) + '\r\n"\u2028last\\n"'
    Path("a.jsonl").write_bytes(lines.encode())
    Path("a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    wanted = ["plain", "t", "c", "", "half an emoji \ufffd", "\u2028last\n"]
    assert pieces_of("a.jsonl") == pieces_of("a.jsonl.gz") == wanted
    Path("b.jsonl").write_text('{"text": "no", "body": "yes"}\n')
    assert pieces_of("b.jsonl", field="body") == ["yes"]


def test_a_json_line_without_text_is_named(monkeypatch):
    set_block(monkeypatch, 3)
    for row, reason in (
        ('{"body": "x"}', ": no text or content or .*its keys are body: .*--field"),
        ('["x"]', r" is neither text nor a dialogue but \['x'\]"),
        ('{"text": 5}', " is neither text nor a dialogue but 5"),
        ('{"instruction": "i", "output": "o", "history": [5]}', ": history is not a list of lists"),
        ('{"text": "cut', ": broken JSON .*column 10"),
    ):
        Path("a.jsonl").write_text(f'"fine"\n\n{row}\n')
        with pytest.raises(UserError, match=f"a.jsonl:3{reason}"):
            pieces_of("a.jsonl")


def test_a_json_list_is_read_as_its_rows_are():
    human, user = {"from": "human", "value": "h"}, {"role": "user", "content": "q"}
    rows = [
        "plain", {"text": "t"}, [human, {"from": "gpt", "value": "你好"}],
        {"instruction": "i", "input": "", "output": "o"},
        {"system": "s", "history": [["h", "g"]], "instruction": "i", "input": "n", "output": "o"},
        {"id": 1, "items": [human]}, {"messages": [user, {"role": "assistant", "content": "a"}]},
        {"messages": [user, {"content": None, "tool_calls": [5]}]},
        [{"role": "search", "arguments": {}}, {"role": "return", "records": []}],
    ]
    wanted = ["plain", "t", "h\n你好", "i\no", "s\nh\ng\ni\nn\no", "h", "q\na", "q\n[5]", "{}\n[]"]
    Path("a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert pieces_of("a.jsonl") == wanted
    Path("zip.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    assert pieces_of("zip.json.gz") == wanted
    Path("bad.json").write_text(json.dumps([*rows, {"text": 5}]))
    with pytest.raises(UserError, match=r"bad\.json: row 10 is neither"):
        pieces_of("bad.json")
    Path("cut.json").write_text(json.dumps(rows)[:-9])
    with pytest.raises(UserError, match=r"cut\.json: broken JSON \(.*line 1 column"):
        pieces_of("cut.json")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "A.JSONL"])
@pytest.mark.parametrize("indent", [None, 0, 4])
@pytest.mark.parametrize("form", ["one", "several", "list"])
def test_values_of_json_may_take_several_lines(form, indent, name):
    rows, dump = ROWS[:1] if form == "one" else ROWS, lambda v: json.dumps(v, indent=indent)
    text = dump(rows) if form == "list" else "\n\n".join(map(dump, rows))
    found = [row for _, row in json_rows([text[:9], text[9:]], name)]
    in_a_line = name.lower() == "a.jsonl" and (form, indent) == ("list", None)
    assert found == ([rows] if in_a_line else rows)


@pytest.mark.parametrize("cut", ['{"text": "cut', '{"text": [1,', "{", "}", "nonsense", "{x}"])
def test_a_row_cut_short_takes_no_other_with_it(cut):
    good = [json.dumps(row) for row in ROWS]
    rows = list(json_rows(["\n".join([good[0], cut, *good[1:], cut])], "a.jsonl"))
    wanted = [f"a.jsonl:{n}" for n in range(1, 6)]
    assert [where for where, _ in rows] == wanted
    assert [r for _, r in rows if not isinstance(r, UserError)] == ROWS
    assert all(f"{wanted[i]}: broken JSON" in str(rows[i][1]) for i in (1, 4))
    with pytest.raises(UserError, match=r"a\.jsonl: broken JSON \(.*line 3"):
        list(json_rows(['{\n"text": "a",\n{}\n'], "a.jsonl"))


def test_a_damaged_gz_or_zip_is_named():
    data = gzip.compress(random.Random(0).randbytes(5000).hex().encode())
    flipped = data[:2000] + bytes([data[2000] ^ 255]) + data[2001:]
    for damaged in (data[:-2000], flipped, b"text"):
        Path("a.txt.gz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.txt\.gz: damaged"):
            pieces_of("a.txt.gz")
    with zipfile.ZipFile("a.zip", "w", zipfile.ZIP_STORED) as z:
        z.writestr("b.txt", "x" * 5000)
    data = Path("a.zip").read_bytes()
    encrypted = bytearray(data)
    encrypted[6] |= 1  # the flag of the local header, and of the list at the end
    encrypted[data.index(b"PK\1\2") + 8] |= 1
    changed = data[:2000] + b"y" + data[2001:]  # the archive is well-formed, its member is not
    cases = (data[:-50], "a.zip: damaged"), (changed, "b.txt: damaged"), (encrypted, "encrypted")
    for content, message in cases:
        Path("a.zip").write_bytes(content)
        with pytest.raises(UserError, match=message):
            pieces_of("a.zip")


def test_a_separator_keeps_documents_apart_however_blocks_are_cut():
    text = "<|endoftext|>\n".join(["一 story\n", "\n", "two\nlines\n", "three"])
    for size in (1, 5, 20, 1000):
        blocks = [text[i : i + size] for i in range(0, len(text), size)]
        assert list(split(blocks, "<|endoftext|>")) == text.split("<|endoftext|>")
