"""prepare_data.py, from a bad network to a damaged token file. Nothing here leaves 127.0.0.1."""

import base64
import errno
import gzip
import json
import lzma
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken.registry
from conftest import (
    ALL_TEXT,
    TEXTS,
    TIKTOKEN,
    needs_vocabularies,
    normal,
    pieces_of,
    set_block,
    tokens_of,
    write_documents,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import prepare_data
from data import sources
from data.cli import UserError
from data.files import file_sha256
from data.sources import stdlib_files
from data.tokenizer import Tokenizer
from prepare_data import prepare, read_tokens

pytestmark = pytest.mark.usefixtures("elsewhere")


# --------------------------------------------------------------------------------------------
# Sources
# --------------------------------------------------------------------------------------------


def test_a_folder_gives_its_text_files_in_order(capsys):
    Path("books/sub").mkdir(parents=True)
    Path("books/.git").mkdir()
    left_out = "p.png", "q.PNG", "LICENSE", "sub/x.json"
    for name in ("b.TXT", "a.md", "sub/c.py", ".git/x.txt", ".hidden.txt", *left_out):
        Path("books", name).write_text(f"<{name}>")
    Path("books/d.txt.GZ").write_bytes(gzip.compress(b"<d>"))
    assert pieces_of(*prepare_data.find_files("books")) == [
        "<a.md>",
        "<b.TXT>",
        "<d>",
        "<sub/c.py>",
    ]
    about = "folder books: files left out: 2 .png, 1 "
    assert capsys.readouterr().err.startswith(about)


def test_a_glob_gives_its_files_and_a_sensible_name():
    write_documents("novels", ["one", "two", "three"])
    assert pieces_of(*prepare_data.find_files("novels/00[12].txt")) == ["two", "three"]
    assert pieces_of(*prepare_data.find_files("**/*.txt")) == ["one", "two", "three"]
    assert prepare_data.default_name("novels/*.txt") == "novels"


@pytest.mark.parametrize(
    "source, name",
    [
        ("novels/", "novels"),
        ("a/tale.txt", "tale"),
        ("tale.jsonl.gz", "tale"),
        ("tale.TAR.GZ", "tale"),
        ("tale.tar.xz", "tale"),
        ("https://h/x/tale.txt?download=1", "tale"),
        ("..", "text"),
        ("https://h/", "text"),
    ],
)
def test_names(source, name):
    assert prepare_data.default_name(source) == name


def test_several_sources_are_one_text(tmp_path):
    Path("a.txt").write_text("from the file\n" * 20)
    Path("b").mkdir()
    Path("b/c.txt").write_text("from the folder\n" * 20)
    Path("d.jsonl").write_text('{"text": "from the line"}\n')
    prepare_data.main(["a.txt", "b", "d.jsonl", "--tokenizer", "byte", "--name", "mix"])
    folder = Path("data/mix")
    meta = prepare_data.read_meta(folder)
    ids = [i for s in ("train", "val") for i in prepare_data.read_tokens(folder, s)]
    text = bytes(i for i in ids if i < 256)
    assert meta["source"] == "a.txt b d.jsonl" and meta["documents"] == 3
    assert [text.count(f"from the {w}".encode()) for w in ("file", "folder", "line")] == [20, 20, 1]
    prepare_data.main(["a.txt", "b", "--tokenizer", "byte"])
    assert Path("data/a/meta.json").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_is_refused_and_one_in_a_folder_passed_over():
    Path("b").mkdir()
    os.mkfifo("b/pipe.txt")
    with pytest.raises(UserError, match=r"b/pipe\.txt is no regular file"):
        prepare("b/pipe.txt", "byte")
    Path("b/c.txt").write_text("text " * 20)
    assert prepare_data.read_meta(prepare("b", "byte"))["documents"] == 1


def test_a_full_disk_is_named(monkeypatch):
    def full(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    Path("a.txt").write_text("text " * 20)
    monkeypatch.setattr(prepare_data, "write_tokens", full)
    with pytest.raises(OSError, match="No space left on device: 'data/a'"):
        prepare("a.txt", "byte")
    assert not Path("data/a").exists()


def test_the_size_of_a_vocabulary_has_limits():
    Path("a.txt").write_text("text " * 20)
    for size in (256, 99999999):
        with pytest.raises(UserError, match="a size from 257 to 1,000,000"):
            prepare("a.txt", f"bpe:{size}")


def test_a_missing_source_and_an_empty_folder_are_named():
    with pytest.raises(UserError, match=r"'nosuch'.*shakespeare"):
        prepare("nosuch")
    Path("empty").mkdir()
    with pytest.raises(UserError, match="empty holds no"):
        prepare("empty")


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe:300"])
@pytest.mark.parametrize("text", ["", "a"])
def test_text_too_short_to_split_is_an_error(text, tokenizer):
    Path("a.txt").write_text(text)
    with pytest.raises(UserError, match=r"a\.txt"):
        prepare("a.txt", tokenizer)
    assert not list(Path("data").rglob("*.*"))


def test_stdlib_is_source_without_tests():
    names = {p.relative_to(Path(os.__file__).parent) for p in stdlib_files()}
    assert {Path("os.py"), Path("json/decoder.py")} <= names
    assert not [n for n in names if {"test", "tests", "site-packages"} & set(n.parts)]


# --------------------------------------------------------------------------------------------
# Splitting
# --------------------------------------------------------------------------------------------


def split_at(ids, mark):
    """The documents between end-of-text marks."""
    out = [[]]
    for i in ids:
        out.append([]) if i == mark else out[-1].append(i)
    return [bytes(d).decode() for d in out]


@pytest.mark.parametrize("workers", [1, 3])
def test_every_tenth_document_is_held_out_whole(workers, monkeypatch):
    set_block(monkeypatch, 64)  # long documents go through in several pieces
    texts = [f"Document {i}. " + "Once more, " * (i % 7) for i in range(1, 36)]
    write_documents("books", texts)
    folder = prepare("books", "byte", workers=workers)
    val = texts[9::10]
    assert split_at(tokens_of(folder, "val"), 256) == val
    assert split_at(tokens_of(folder, "train"), 256) == [t for t in texts if t not in val]


def test_val_fraction_sets_how_many_documents_are_held_out():
    texts = [f"Row {i}" for i in range(20)]
    Path("a.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts))
    folder = prepare("a.jsonl", "byte", val_fraction=0.25)
    assert split_at(tokens_of(folder, "val"), 256) == texts[3::4]
    for bad in ("0", "-1", "0.6", "nan"):
        with pytest.raises(SystemExit):
            prepare_data.main(["a.jsonl", f"--val_fraction={bad}"])


@pytest.mark.parametrize("count", [1, 2, 9])
def test_of_few_documents_the_last_tenth_of_the_tokens_is_held_out(count):
    texts = [f"Document {i}. " * 17 for i in range(count)]
    write_documents("books", texts)
    folder = prepare("books", "byte")
    ids = tokens_of(folder)
    assert split_at(ids, 256) == texts
    assert len(read_tokens(folder, "train")) == int(0.9 * len(ids))


def test_empty_documents_leave_no_end_of_text_behind():
    write_documents("books", ["", "one two three", "", "", "four five six", ""])
    folder = prepare("books", "byte")
    assert split_at(tokens_of(folder), 256) == ["one two three", "four five six"]
    assert prepare_data.read_meta(folder)["documents"] == 2


def test_a_char_vocabulary_knows_held_out_documents_and_a_bpe_does_not():
    """Merges learned from val would flatter the model; characters must just be there."""
    texts = ["the cat sat on the mat. "] * 9 + ["zyzzyva zyzzyva zyzzyva zyzzyva"]
    write_documents("books", texts)
    spec = prepare_data.read_meta(prepare("books", "char"))["tokenizer"]
    assert "v" in spec["chars"]
    spec = prepare_data.read_meta(prepare("books", "bpe:300"))["tokenizer"]
    tokens = [base64.b64decode(t) for t in spec["tokens"][256:]]
    assert b"at" in tokens and not [t for t in tokens if b"zy" in t]


# --------------------------------------------------------------------------------------------
# Tokenizers
# --------------------------------------------------------------------------------------------


def test_dtype_follows_the_vocabulary():
    assert prepare_data.token_dtype(257) == np.dtype("<u2")
    assert prepare_data.token_dtype(65_536) == np.dtype("<u2")  # the largest id is 65,535
    assert prepare_data.token_dtype(65_537) == np.dtype("<u4")


@needs_vocabularies
def test_ids_above_65535_do_not_wrap():
    Path("a.txt").write_bytes((ALL_TEXT * 20).encode())
    folder = prepare("a.txt", "cl100k_base")
    wanted = tiktoken.get_encoding("cl100k_base").encode(normal(ALL_TEXT) * 20)
    assert max(wanted) > 65_535
    assert tokens_of(folder) == wanted
    assert np.dtype(prepare_data.read_meta(folder)["dtype"]).itemsize == 4


def test_a_prepared_folder_lends_its_tokenizer():
    Path("a.txt").write_bytes((ALL_TEXT * 5).encode())
    Path("b.txt").write_bytes((TEXTS["english"] * 20).encode())
    a = prepare("a.txt", "bpe:400")
    b = prepare("b.txt", str(a))
    assert prepare_data.read_meta(a)["tokenizer"] == prepare_data.read_meta(b)["tokenizer"]


@pytest.mark.parametrize("name", ["nosuch", "bpe:", "bpe:many", "bpe:256", "bpe:9999999", "bpe:²"])
def test_an_impossible_tokenizer_is_named(name):
    with pytest.raises(UserError, match=re.escape(name)):
        prepare_data.make_tokenizer(name, [("", ["some text"])], 1)


# --------------------------------------------------------------------------------------------
# meta.json and the reader
# --------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(elsewhere):
    Path("tale.txt").write_bytes((ALL_TEXT * 5).encode())
    return prepare("tale.txt", "bpe:400")


def change_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    (folder / "meta.json").write_text(json.dumps(meta | changes), encoding="utf-8")


def test_meta_counts_what_the_files_hold(prepared):
    meta, text = prepare_data.read_meta(prepared), normal(ALL_TEXT) * 5
    t = Tokenizer(meta["tokenizer"])
    ids = tokens_of(prepared)
    assert t.decode(ids) == text
    assert meta["characters"] == len(text) and meta["vocab_size"] == t.n_vocab == 400
    assert sum(s["bytes"] for s in meta["splits"].values()) == len(text.encode())
    assert sum(s["tokens"] for s in meta["splits"].values()) == len(ids)
    assert meta["largest_id"] == max(ids)
    assert meta["fallback_tokens"] == sum(int(t.fallback[i]) for i in ids) > 0
    for split, said in meta["splits"].items():
        assert said["sha256"] == file_sha256(prepared / f"{split}.bin")
    assert (meta["encodings"], meta["documents"]) == ({"utf-8": 1}, 1)
    assert meta["xz_bits_per_byte"] is None  # of so little text it would mean nothing
    val = read_tokens(prepared, "val")
    held_out = b"".join(t.token_bytes(i) for i in val.tolist())
    xz = len(lzma.compress(held_out, preset=9 | lzma.PRESET_EXTREME)) * 8 / len(held_out)
    assert prepare_data.xz_bits_per_byte(prepared / "val.bin", t) == xz


@pytest.mark.parametrize("name", ["../up", "a/b", "..", "/tmp/x"])
def test_a_name_cannot_leave_the_data_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("some text " * 50, encoding="utf-8")
    with pytest.raises(UserError, match="plain name"):
        prepare_data.main(["a.txt", "--name", name])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt"]


def test_a_file_of_another_size_is_refused(prepared):
    with open(prepared / "val.bin", "ab") as f:
        f.write(b"\0\0")
    assert len(read_tokens(prepared, "train"))
    with pytest.raises(UserError, match=r"val\.bin"):
        read_tokens(prepared, "val")


def test_one_flipped_bit_is_refused(prepared):
    data = bytearray((prepared / "train.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (prepared / "train.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"train\.bin.*sha256"):
        read_tokens(prepared, "train")


def test_missing_files_are_named(prepared):
    (prepared / "val.bin").unlink()
    with pytest.raises(UserError, match=r"val\.bin does not exist"):
        read_tokens(prepared, "val")
    (prepared / "meta.json").unlink()
    with pytest.raises(UserError, match=r"meta\.json does not exist"):
        read_tokens(prepared, "train")


def test_another_format_is_refused(prepared):
    change_meta(prepared, format=prepare_data.FORMAT + 1)
    with pytest.raises(UserError, match="format 2"):
        read_tokens(prepared, "train")


@pytest.mark.parametrize(
    "changes", [{"dtype": "<u4"}, {"dtype": ">u2"}, {"vocab_size": 70_000}, {"largest_id": 400}]
)
def test_a_meta_that_contradicts_itself_is_refused(prepared, changes):
    change_meta(prepared, **changes)
    with pytest.raises(UserError, match="contradicts itself"):
        read_tokens(prepared, "train")


@pytest.mark.parametrize("lost", ["format", "vocab_size", "dtype", "largest_id", "splits", "val"])
def test_a_meta_that_lost_a_key_is_refused(prepared, lost):
    meta = json.loads((prepared / "meta.json").read_text(encoding="utf-8"))
    del (meta["splits"] if lost == "val" else meta)[lost]
    (prepared / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"meta\.json"):
        read_tokens(prepared, "val")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"format": 1', b"\xff\xfe", b"null"])
def test_a_damaged_meta_is_refused(prepared, content):
    (prepared / "meta.json").write_bytes(content)
    with pytest.raises(UserError, match=r"meta\.json"):
        read_tokens(prepared, "train")


@pytest.mark.parametrize("stage", ["reading", "describing"])
def test_a_failed_prepare_leaves_the_earlier_one_as_it_was(prepared, stage, monkeypatch):
    before = {p.name: p.read_bytes() for p in prepared.iterdir()}
    if stage == "reading":  # well behind the first blocks, which are tokenized by then
        set_block(monkeypatch, 1000)
        rows = [json.dumps(f"Row {i}") for i in range(3000)] + ["{broken"]
        Path("tale.jsonl").write_text("\n".join(rows))
        source = "tale.jsonl"
    else:
        Path("tale.txt").write_text("another tale")
        monkeypatch.setattr(prepare_data, "describe", lambda *a: 1 / 0)
        source = "tale.txt"
    with pytest.raises((UserError, ZeroDivisionError)):
        prepare(source, "byte")
    assert {p.name: p.read_bytes() for p in prepared.iterdir()} == before


def test_a_crash_between_the_files_leaves_nothing_that_reads_as_whole(prepared, monkeypatch):
    good = os.replace

    def full_disk(a, b):
        if Path(b).name == "val.bin":
            raise OSError(28, "No space left on device")
        good(a, b)

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        prepare("tale.txt", "byte")
    for split in ("train", "val"):
        with pytest.raises(UserError):
            read_tokens(prepared, split)


def test_preparing_again_replaces_everything(prepared):
    Path("tale.txt").write_bytes(b"Something else. " * 40)
    assert prepare("tale.txt", "byte") == prepared
    assert bytes(tokens_of(prepared)) == b"Something else. " * 40
    assert {p.name for p in prepared.iterdir()} == {"train.bin", "val.bin", "meta.json"}


@pytest.mark.parametrize("what", ["find_data('tale.txt')", "prepare('tale.txt')", "made"])
def test_of_processes_that_prepare_one_text_at_once_the_others_wait(what):
    Path("tale.txt").write_text("".join(f"{i} is a number. " for i in range(30_000)))
    if what == "made":
        code = "from data.sources import invented_dialogues as f; print(sorted(f()))"
    else:
        code = f"import prepare_data as p; p.read_tokens(p.{what}, 'train')"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"]
    pipe = subprocess.PIPE
    started = [subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) for _ in range(3)]
    outputs = [p.communicate(timeout=120) for p in started]
    assert [p.returncode for p in started] == [0] * 3, outputs
    if what.startswith("find"):
        assert sum("ready in" in out for out, _ in outputs) == 1
    folder = Path("data/hotel-synthetic" if what == "made" else "data/tale")
    assert len(list(folder.iterdir())) == 3 and not list(folder.glob("*.tmp"))


def test_preparing_twice_gives_the_same_bytes(prepared):
    before = {p.name: p.read_bytes() for p in prepared.iterdir()}
    prepare("tale.txt", "bpe:400", workers=1)
    assert {p.name: p.read_bytes() for p in prepared.iterdir()} == before


# --------------------------------------------------------------------------------------------
# As a program
# --------------------------------------------------------------------------------------------


def run_script(*arguments, **env):
    return subprocess.run(
        [sys.executable, ROOT / "prepare_data.py", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | env,
    )


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["nosuch"], "nosuch"),
        (["tale.txt", "--tokenizer", "nosuch"], "nosuch"),
        (["tale.txt", "--val_fraction", "2"], "val_fraction"),
        (["tale.txt", "--workers", "-1"], "workers"),
        (["tale.txt", "--encoding", "klingon"], "klingon"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, named):
    Path("tale.txt").write_text("a tale " * 50)
    r = run_script(*arguments)
    assert r.returncode == 2
    assert r.stdout == ""
    assert len(r.stderr.splitlines()) == 1 and named in r.stderr
    assert r.stderr.startswith("prepare_data.py: ")


def test_an_unknown_flag_is_exit_code_2():
    r = run_script("--nosuch")
    assert r.returncode == 2 and "--nosuch" in r.stderr and "Traceback" not in r.stderr


def test_a_console_of_another_encoding_is_no_reason_to_die():
    Path("tale.txt").write_bytes((TEXTS["chinese"] * 20).encode())
    r = run_script("tale.txt", "--tokenizer", "char", PYTHONIOENCODING="ascii")
    assert (r.returncode, r.stderr) == (0, "")
    assert "data/tale" in r.stdout.replace("\\", "/")
    assert Path("data/tale/meta.json").exists()


# --------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------

# VmHWM and not getrusage where there is a /proc: ru_maxrss is inherited through fork and exec, so
# it would be pytest's own peak that is measured.
MEASURED = """
import re, resource, sys
sys.path.insert(0, sys.argv[1])
import prepare_data
prepare_data.main(sys.argv[2:])
try:
    peak = int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
except OSError:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
print("peak", peak)
"""


def peak_memory(size, tokenizer):
    """Peak bytes of memory that preparing `size` bytes of made-up text takes."""
    pytest.importorskip("resource", reason="no resource module to measure memory with")
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(5000)]
    words += list("的一是不了人我在有他这")
    block = (" ".join(rng.choices(words, k=150_000)) + ".\n").encode()
    with open("big.txt", "wb") as f:
        while f.tell() < size:
            f.write(block)
    flags = ["--tokenizer", tokenizer, "--workers", "2"]  # each has blocks of its own in flight
    command = [sys.executable, "-c", MEASURED, ROOT, "big.txt", *flags]
    out = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
    meta = prepare_data.read_meta("data/big")
    assert sum(s["bytes"] for s in meta["splits"].values()) == os.path.getsize("big.txt")
    return int(re.search(r"peak (\d+)", out.stdout)[1])


def skip_without_vocabulary(tokenizer):
    if tokenizer == "gpt2" and not TIKTOKEN.is_dir():
        pytest.skip(f"no tiktoken vocabularies in {TIKTOKEN}")


@pytest.mark.parametrize("tokenizer", ["byte", "gpt2"])
def test_memory_does_not_grow_with_the_text(tokenizer):
    skip_without_vocabulary(tokenizer)
    assert peak_memory(60_000_000, tokenizer) < 250_000_000


@pytest.mark.skipif(
    os.environ.get("SCRATCHLM_SLOW") != "1", reason="2 GB of text: SCRATCHLM_SLOW=1 to run it"
)
@pytest.mark.parametrize("tokenizer", ["byte", "gpt2"])
def test_two_gigabytes_fit_in_one(tokenizer):
    skip_without_vocabulary(tokenizer)
    assert peak_memory(2_000_000_000, tokenizer) < 1_000_000_000


# ---- large texts -----------------------------------------------------------------------------


@pytest.fixture
def network(elsewhere, monkeypatch):
    """What is fetched is made by network(make), make(url) giving the bytes; the list of URLs."""

    def serve(make):
        asked = []

        def fetch(url, **_):
            path = Path(f"fetched-{len(asked)}-{url.rpartition('/')[2][:20]}")
            asked.append(url)
            path.write_bytes(make(url))
            return path

        monkeypatch.setattr(sources, "fetch", fetch)
        return asked

    return serve


def text_of(folder, split):
    return bytes(i for i in tokens_of(folder, split) if i < 256).decode()


def test_of_a_text_without_end_as_much_is_fetched_as_is_wanted(network):
    def page(url):
        first = int(re.search(r"offset=(\d+)&length=100", url)[1])
        found = [{"row_idx": n, "row": {"text": f"page {n} {'word ' * 2000}", "id": "x"}}
                 for n in range(first, first + 100)]
        return json.dumps({"rows": found}).encode()

    asked = network(page)
    with pytest.raises(UserError, match=r"fineweb-edu has no end: .* --max_tokens"):
        prepare("fineweb-edu")
    assert not asked
    folder = prepare("fineweb-edu", tokenizer="byte", max_tokens=500_000, workers=1)
    assert prepare_data.read_meta(folder)["splits"]["train"]["tokens"] == 500_000
    assert text_of(folder, "train").startswith("page 0 word word ")
    assert len(set(asked)) < 20 and all("config=sample-10BT" in url for url in asked)


def test_files_of_c4_follow_each_other(network):
    row = lambda url, n: json.dumps({"text": f"{url[-22:-8]} {n} {'词' * 9999}"})  # noqa: E731
    asked = network(lambda url: gzip.compress("\n".join(row(url, n) for n in range(40)).encode()))
    folder = prepare("c4-zh", tokenizer="byte", max_tokens=3e6, workers=1)
    assert asked[0].endswith("multilingual/c4-zh.tfrecord-00000-of-01024.json.gz")
    text = text_of(folder, "train")[:2_900_000]
    assert text.index("00000-of-01024 0 ") == 0 < text.index("00001-of-01024 0 ")


def test_named_texts_may_have_their_own_validation(network):
    network(lambda url: f"{url[-9:]}<|endoftext|>\n".encode() * 20)
    folder = prepare("tinystories", tokenizer="byte")
    assert text_of(folder, "val") == "valid.txt" * 20
    assert text_of(folder, "train") == "train.txt" * 20
