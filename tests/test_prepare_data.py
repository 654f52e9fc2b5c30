"""prepare_data.py, from sources to a damaged token file. Nothing here leaves 127.0.0.1."""

import base64
import gzip
import json
import lzma
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
from conftest import ALL_TEXT, ROOT, TEXTS, needs_vocabularies, pieces_of, set_block, tokens_of

import prepare_data
from data.cli import UserError
from data.files import file_sha256
from data.sources import SOURCES, Source, stdlib_files
from data.tokenizer import Tokenizer
from prepare_data import prepare, read_meta, read_tokens

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_a_folder_gives_its_text_files_in_order(capsys):
    Path("books/sub").mkdir(parents=True)
    Path("books/.git").mkdir()
    left_out = "p.png", "q.PNG", "LICENSE", "sub/x.json"
    for name in ("b.TXT", "a.md", "sub/c.py", ".git/x.txt", ".hidden.txt", *left_out):
        Path("books", name).write_text(f"<{name}>")
    Path("books/d.txt.GZ").write_bytes(gzip.compress(b"<d>"))
    texts = pieces_of(*prepare_data.find_files("books"))
    assert texts == ["<a.md>", "<b.TXT>", "<d>", "<sub/c.py>"]
    assert capsys.readouterr().err.startswith("folder books: files left out: 2 .png, 1 ")
    assert pieces_of(*prepare_data.find_files("books/[ax].*")) == ["<a.md>"]
    assert pieces_of(*prepare_data.find_files("**/*.py")) == ["<sub/c.py>"]
    names = {p.relative_to(Path(os.__file__).parent) for p in stdlib_files()}
    assert Path("json/decoder.py") in names
    assert not [n for n in names if {"test", "tests", "site-packages"} & set(n.parts)]


@pytest.mark.parametrize("name, named_so", [
    ("novels", "novels/ novels/*.txt novels/**/*.txt /a/novels/[*]/*"),
    ("text", ".. https://h/ /*.txt **"), ("many-en", "me/many:en"), ("c", "me/a:b/c.jsonl"),
    ("rotten_tomatoes", "rotten_tomatoes cornell-movie-review-data/rotten_tomatoes"),
    ("tale", "a/tale.txt tale.jsonl.gz tale.TAR.GZ tale.tar.xz https://h/x/tale.txt?download=1"),
])
def test_a_source_gives_its_folder_a_sensible_name(name, named_so):
    assert {prepare_data.default_name(source) for source in named_so.split()} == {name}


def test_several_sources_are_one_text():
    Path("a.txt").write_text("from the file\n" * 20)
    Path("b").mkdir()
    Path("b/c.txt").write_text("from the folder\n" * 20)
    Path("d.jsonl").write_text('{"text": "from the line"}\n')
    prepare_data.main(["a.txt", "b", "d.jsonl", "--tokenizer", "byte", "--name", "mix"])
    meta, text = read_meta("data/mix"), text_of("data/mix")
    assert meta["source"] == "a.txt b d.jsonl" and meta["documents"] == 3
    assert [text.count(f"from the {w}") for w in ("file", "folder", "line")] == [20, 20, 1]


def test_a_source_without_text_is_named():
    Path("empty").mkdir()
    Path("a.txt").write_text("a")
    message = {"nosuch": "not one of stdlib", "empty": "holds no", "a.txt": "1 tokens .* too few"}
    for source, reason in message.items():
        with pytest.raises(UserError, match=f"{source}.*{reason}"):
            prepare(source, "byte")
    assert not list(Path("data").rglob("*.*"))


def text_of(folder, *splits):
    """A prepared folder's text, tokenized by bytes, without end-of-text."""
    return bytes(i for i in tokens_of(folder, *splits) if i < 256).decode(errors="ignore")


def split_of(folder, *splits):
    """The documents of a prepared folder, which are ASCII, between end-of-text marks."""
    return "".join(map(chr, tokens_of(folder, *splits))).split(chr(256))


def prepare_books(texts, *args, **settings):
    Path("books").mkdir()
    for i, text in enumerate(texts):
        Path(f"books/{i:03}.txt").write_text(text)
    return prepare("books", *args, **settings)


def test_every_tenth_document_is_held_out_whole(monkeypatch):
    set_block(monkeypatch, 64)  # long documents go through in several pieces
    texts = [f"Document {i}. " + "Once more, " * (i % 7) for i in range(1, 36)]
    folder, val = prepare_books(texts, "byte"), texts[9::10]
    assert split_of(folder, "val") == val
    assert split_of(folder, "train") == [t for t in texts if t not in val]
    folder = prepare("books", "byte", val_fraction=0.25)  # every fourth
    assert split_of(folder, "val") == texts[3::4]


@pytest.mark.parametrize("count", [1, 2, 6])
def test_of_few_documents_the_last_tenth_of_the_tokens_is_held_out(count):
    texts = [f"Document {i}. " * 17 for i in range(count)]
    folder = prepare_books(["", *texts[:1], "", *texts[1:], ""], "byte")
    assert split_of(folder) == texts  # empty documents leave no end-of-text behind
    assert len(read_tokens(folder, "train")) == int(0.9 * len(tokens_of(folder)))
    assert read_meta(folder)["documents"] == count


def test_a_char_vocabulary_knows_held_out_documents_and_a_bpe_does_not(monkeypatch):
    """Merges learned from val would flatter the model; characters must just be there."""
    texts = ["the cat sat on the mat. "] * 9 + ["zyzzyva zyzzyva zyzzyva zyzzyva"]
    assert "v" in read_meta(prepare_books(texts, "char"))["tokenizer"]["chars"]
    files = sorted(Path("books").iterdir())
    monkeypatch.setitem(SOURCES, "tales", Source(lambda: {"train": files}, "char"))
    assert "v" in read_meta(prepare("tales"))["tokenizer"]["chars"]
    tokens = read_meta(prepare("books", "bpe:300"))["tokenizer"]["tokens"]
    tokens = [base64.b64decode(t) for t in tokens[256:]]
    assert b"at" in tokens and not [t for t in tokens if b"zy" in t]


@needs_vocabularies
def test_ids_above_65535_do_not_wrap():
    sizes = {257: "<u2", 65_536: "<u2", 65_537: "<u4"}
    assert {n: prepare_data.token_dtype(n).str for n in sizes} == sizes
    Path("a.txt").write_bytes((ALL_TEXT * 20).encode())
    folder = prepare("a.txt", "cl100k_base")
    wanted = tiktoken.get_encoding("cl100k_base").encode(ALL_TEXT * 20)
    assert max(wanted) > 65_535 and tokens_of(folder) == wanted


def test_an_impossible_tokenizer_is_named(capsys):
    prepare_data.make_tokenizer("bpe:400", [("", ["aa aa"])], 1)
    assert capsys.readouterr().out == "bpe:400: the text has pairs to merge for 258 tokens only\n"
    for name in ("nosuch", "bpe:", "bpe:many", "bpe:256", "bpe:9999999", "bpe:²"):
        with pytest.raises(UserError, match=re.escape(name)):
            prepare_data.make_tokenizer(name, [("", ["some text"])], 1)


@pytest.fixture
def prepared(elsewhere):
    Path("tale.txt").write_bytes((ALL_TEXT * 5).encode())
    return prepare("tale.txt", "bpe:400")


def test_meta_counts_what_the_files_hold_and_a_folder_lends_its_tokenizer(prepared):
    meta, text = read_meta(prepared), ALL_TEXT * 5
    t, ids = Tokenizer(meta["tokenizer"]), tokens_of(prepared)
    assert t.decode(ids) == text
    assert meta["characters"] == len(text) and meta["vocab_size"] == t.n_vocab == 400
    assert sum(s["bytes"] for s in meta["splits"].values()) == len(text.encode())
    assert sum(s["tokens"] for s in meta["splits"].values()) == len(ids)
    assert meta["largest_id"] == max(ids)
    assert meta["fallback_tokens"] == sum(int(t.fallback[i]) for i in ids) > 0
    for split, values in meta["splits"].items():
        assert values["sha256"] == file_sha256(prepared / f"{split}.bin")
    assert (meta["encodings"], meta["documents"]) == ({"utf-8": 1}, 1)
    assert meta["xz_after_training_text"] is None  # of so little text it would mean nothing
    train, val = meta["splits"]["train"]["bytes"], meta["splits"]["val"]["bytes"]
    best = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 26}
    whole = text.encode()
    parts = (whole[train:], whole[:train], whole)
    alone, first, both = (len(lzma.compress(part, filters=[best])) for part in parts)
    xz = prepare_data.xz_bits_per_byte([prepared / "train.bin", prepared / "val.bin"], t)
    assert xz == 8 * (both - first) / val < 0.5 * 8 * alone / val  # it has seen the same lines
    Path("b.txt").write_bytes((TEXTS["english"] * 20).encode())
    assert read_meta(prepare("b.txt", str(prepared)))["tokenizer"] == meta["tokenizer"]


@pytest.mark.parametrize("file, damage, message", [
    ("train.bin", lambda data: data + b"\0\0", "is damaged"),
    ("train.bin", lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:], "is damaged"),
    ("train.bin", None, "is damaged or missing"),
    ("meta.json", None, "does not exist: prepare the text first"),
    ("meta.json", lambda data: b'{"format": 2}', "is of another version"),
    *(("meta.json", lambda _, text=text: text, "is not (JSON|a JSON object)")
      for text in (b"[]", b'{"format": 1', b"\xff\xfe")),
])
def test_what_is_damaged_is_refused(prepared, file, damage, message):
    path = prepared / file
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    with pytest.raises(UserError, match=f"{file} {message}"):
        read_tokens(prepared, "train")


def test_a_crash_between_the_files_leaves_nothing_that_reads_as_whole(prepared, monkeypatch):
    good = os.replace

    def full_disk(a, b):
        if Path(b).name == "val.bin":
            raise OSError(28, "No space left on device")
        good(a, b)

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        prepare("tale.txt", "byte")
    with pytest.raises(UserError, match="is damaged"):
        read_tokens(prepared, "train")


def test_preparing_again_gives_the_same_bytes_or_replaces_all_or_fails(prepared, monkeypatch):
    before = {p.name: p.read_bytes() for p in prepared.iterdir()}
    prepare("tale.txt", "bpe:400")
    assert {p.name: p.read_bytes() for p in prepared.iterdir()} == before
    set_block(monkeypatch, 1000)
    rows = [json.dumps(f"Row {i}") for i in range(3000)] + ["{broken"]  # the others are written
    Path("tale.jsonl").write_text("\n".join(rows))
    with pytest.raises(UserError, match="broken JSON"):
        prepare("tale.jsonl", "byte")
    assert {p.name: p.read_bytes() for p in prepared.iterdir()} == before
    Path("tale.txt").write_bytes(b"Something else. " * 40)
    assert prepare("tale.txt", "byte") == prepared
    assert bytes(tokens_of(prepared)) == b"Something else. " * 40
    assert {p.name for p in prepared.iterdir()} == {"train.bin", "val.bin", "meta.json"}


@pytest.mark.parametrize("name", ["tale", "hotel-synthetic"])
def test_several_processes_may_prepare_one_text(name):
    Path("tale.txt").write_text("".join(f"{i} is a number. " for i in range(3_000)))
    code = {"tale": "import prepare_data as p; p.read_tokens(p.find_data('tale.txt'), 'train')",
            "hotel-synthetic": "from data.sources import invented_dialogues as f; f()"}  # fmt: skip
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code[name]}"
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    started = [subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) for _ in range(3)]
    outputs = [p.communicate(timeout=120) for p in started]
    assert [p.returncode for p in started] == [0] * 3, outputs
    folder = Path("data", name)
    assert len(list(folder.iterdir())) == 3 and not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("flag, message", [
    *((f"--val_fraction={f}", f"--val_fraction {f} must be above 0") for f in (2, 0, -1, "nan")),
    ("--encoding=klingon", "--encoding klingon"),
    *((f"--name={name}", "plain name") for name in ("../up", "a/b", "..", "/tmp/x")),
])
def test_a_mistake_is_named_and_nothing_written(flag, message, capsys):
    Path("tale.txt").write_text("a tale " * 50)
    with pytest.raises((UserError, SystemExit)) as e:
        prepare_data.main(["tale.txt", flag])
    assert message in str(e.value) + capsys.readouterr().err
    assert [p.name for p in Path().rglob("*.*")] == ["tale.txt"]


def test_a_console_of_another_encoding_is_no_reason_to_die():
    Path("tale.txt").write_bytes((TEXTS["chinese"] * 20).encode())
    command = [sys.executable, ROOT / "prepare_data.py", "tale.txt", "--tokenizer", "char"]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    r = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (r.returncode, r.stderr) == (0, "") and "val begins: '?" in r.stdout


# VmHWM and not getrusage: ru_maxrss is inherited through fork and exec, so it would be pytest's
# own peak that is measured.
MEASURED = """
import re, sys
sys.path.insert(0, sys.argv[1])
import prepare_data
prepare_data.main(sys.argv[2:])
print("peak", re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read the peak from")
def test_memory_does_not_grow_with_the_text():
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu的一是不了人我在有他这", k=5)) for _ in range(5000)]
    block = (" ".join(rng.choices(words, k=150_000)) + ".\n").encode()
    Path("big.txt").write_bytes(block * (60_000_000 // len(block)))
    command = [sys.executable, "-c", MEASURED, ROOT, "big.txt", "--tokenizer", "byte"]
    out = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
    meta = read_meta("data/big")
    assert sum(s["bytes"] for s in meta["splits"].values()) == os.path.getsize("big.txt")
    assert int(re.search(r"peak (\d+)", out.stdout)[1]) < 250_000  # KiB


def network(monkeypatch, make):
    """What is fetched is what make(url) gives; the list of URLs."""
    asked = []

    def fetch(url, **_):
        path = Path(f"fetched-{len(asked)}-{url.rpartition('/')[2][:20]}")
        asked.append(url)
        path.write_bytes(make(url))
        return path

    monkeypatch.setattr("data.sources.fetch", fetch)
    set_block(monkeypatch, 50_000)
    return asked


def test_of_a_text_without_end_as_much_is_fetched_as_is_wanted(monkeypatch):
    def page(url):
        first = int(re.search(r"offset=(\d+)&length=100", url)[1])
        text = {n: f"page {n} {'word ' * 100}" for n in range(first, first + 100)}
        return json.dumps({"rows": [{"row": {"text": text[n], "id": "x"}} for n in text]}).encode()

    asked = network(monkeypatch, page)
    with pytest.raises(UserError, match=r"fineweb-edu has no end: .* --max_tokens"):
        prepare("fineweb-edu")
    assert not asked
    folder = prepare("fineweb-edu", tokenizer="byte", max_tokens=60_000)
    assert read_meta(folder)["splits"]["train"]["tokens"] == 60_000
    assert text_of(folder, "train").startswith("page 0 word word ")
    assert len(set(asked)) < 20 and all("config=sample-10BT" in url for url in asked)

    def rows(url):  # files of C4 follow each other
        texts = (f"{url[-22:-8]} {n} {'词' * 999}" for n in range(40))
        return gzip.compress("\n".join(json.dumps({"text": text}) for text in texts).encode())

    asked = network(monkeypatch, rows)
    folder = prepare("c4-zh", tokenizer="byte", max_tokens=3e5)
    assert asked[0].endswith("multilingual/c4-zh.tfrecord-00000-of-01024.json.gz")
    text = text_of(folder, "train")
    assert text.index("00000-of-01024 0 ") == 0 < text.index("00001-of-01024 0 ")


def test_named_texts_may_have_their_own_validation(monkeypatch):
    network(monkeypatch, lambda url: f"{url[-9:]}<|endoftext|>\n".encode() * 20)
    for limit, n in ((None, 20), (26, 3)):
        folder = prepare("tinystories", tokenizer="byte", max_tokens=limit)
        assert text_of(folder, "val") == "valid.txt" * 20
        assert text_of(folder, "train") == ("train.txt" * 20)[: limit and limit - n + 1]
        assert read_meta(folder)["characters"] == (20 * 18 if n == 20 else 24 + 180)
    assert "v" in read_meta(prepare("tinystories", tokenizer="char"))["tokenizer"]["chars"]
    set_block(monkeypatch, 64)  # no more blocks are encoded than are wanted
    Path("long.txt").write_text("a tale " * 99)
    assert read_meta(prepare("long.txt", "byte", max_tokens=190))["characters"] == 190


def test_a_file_that_has_changed_is_prepared_again_with_the_same_settings(capsys):
    Path("tale.jsonl").write_text('{"a": "one"}\n' * 40)
    folder = prepare("tale.jsonl", "char", val_fraction=0.25, field="a")
    Path("tale.jsonl").write_text('{"a": "two"}\n' * 40)
    os.utime("tale.jsonl", (2**32, 2**32))
    assert prepare_data.find_data("tale.jsonl") == folder
    assert read_meta(folder)["tokenizer"]["chars"] == "otw"
    flags = "--tokenizer char --field a --val_fraction 0.25"
    assert f"(python prepare_data.py tale.jsonl {flags})\n" in capsys.readouterr().out
    said = prepare_data.other_tokenizer(folder, Tokenizer({"kind": "byte"}))
    assert f" {flags.replace('char', 'byte')} --name tale " in said
    with pytest.raises(UserError, match="is not a file"):
        prepare_data.find_data("none")
    assert not capsys.readouterr().out
