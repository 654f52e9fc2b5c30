"""prepare_data.py, from a bad network to a damaged token file. Nothing here leaves 127.0.0.1."""

import base64
import collections
import errno
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import random
import re
import socket
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken.registry
from conftest import SHARED, TIKTOKEN

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import prepare_data
from data.cli import UserError, run_cli
from data.download import download_path, fetch, resolve_url
from data.files import file_sha256
from data.sources import SOURCES, stdlib_files
from data.text import Documents, file_streams, safe_pieces
from data.tokenizer import PATTERN, Tokenizer, learn_bpe, train_bpe
from prepare_data import prepare, read_tokens

pytestmark = pytest.mark.usefixtures("elsewhere")
GPT2, CL100K = ({"kind": "tiktoken", "name": name} for name in ("gpt2", "cl100k_base"))
SALES_URL = SOURCES["sales"].fetch.keywords["train"]
SALES_PATH = "/".join(SALES_URL.split("/")[3:])  # without https://host
VOCABULARY = "/openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"

needs_vocabularies = pytest.mark.skipif(
    not TIKTOKEN.is_dir(), reason=f"no tiktoken vocabularies in {TIKTOKEN}"
)
TEXTS = {
    "english": "It's the seller's 1st rule: don't talk, LISTEN — they'll say... 20,000 times. ",
    "chinese": "他说：“学而时习之，不亦说乎？”今天是2024年10月31日，天气很好。我们去北京吧！",
    "russian": "Все счастливые семьи похожи друг на друга, каждая несчастливая — по-своему. ",
    "japanese": "吾輩は猫である。名前はまだ無い。どこで生れたか、とんと見当がつかぬ。\n",
    "hindi": "नमस्ते दुनिया! हिन्दी में लिखा हुआ एक छोटा पाठ। क्या आप कल यहाँ आएँगे? ",
    "code": "def f(x_1, *, y=None):\n    if x_1 >= 10:\n\t\treturn {'a': x_1 ** 2}  # it's\n\n\n",
    "emoji": "👩‍👩‍👧‍👦 naïve café 🇨🇳 ☕️ zero\u200bwidth e\u0301 𝔘𝔫𝔦 \ufeff end\n",
    "whitespace": "a  b\t\t c \n\n \n d\u3000e\u00a0 f\x0b\x0c\x85\u2028 \n   ",
}
ALL_TEXT = "".join(TEXTS.values())


def set_block(monkeypatch, size):
    """Text is read, encoded and written in pieces of so many bytes."""
    monkeypatch.setattr("data.text.BLOCK", size)
    monkeypatch.setattr(prepare_data, "BLOCK", size)


def real(name):
    """The text of a file of the real data, or a skip with the reason."""
    if not (SHARED / name).is_file():
        pytest.skip(f"real data {SHARED / name} is absent")
    return (SHARED / name).read_text(encoding="utf-8")


def tokens_of(folder, *splits):
    ids = [read_tokens(folder, s).tolist() for s in splits or ("train", "val")]
    return list(itertools.chain(*ids))


def write_documents(folder, texts, suffix=".txt"):
    Path(folder).mkdir()
    for i, text in enumerate(texts):
        (Path(folder) / f"{i:03}{suffix}").write_bytes(text.encode())


def pieces_of(*files, **options):
    """The text of each document in files, as prepare would read them."""
    streams = [s for f in files for s in file_streams(Path(f))]
    return ["".join(pieces) for _, pieces in Documents(streams, **options)]


# --------------------------------------------------------------------------------------------
# Download
# --------------------------------------------------------------------------------------------


class Mirror(ThreadingHTTPServer):
    """A web server with faults: `files` maps paths to bytes; each request takes one of `faults`,
    an HTTP status, ("cut", bytes after which the line goes dead), or None for a good answer."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.log = {}, [], []
        self.sent, self.versions, self.always = 0, True, None
        self.base = f"http://127.0.0.1:{self.server_port}"

    @property
    def ranges(self):
        return [r for _, r in self.log]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        m, wanted = self.server, self.headers["Range"]
        m.log.append((self.path, wanted))
        fault = m.faults.pop(0) if m.faults else m.always
        body = m.files.get(self.path)
        if isinstance(fault, int) or body is None:
            return self.send_error(fault or 404)
        start = int(re.match(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
        if start and start >= len(body):
            return self.send_error(416)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(body) - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if m.versions:
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.end_headers()
        part = body[start : start + fault[1]] if fault else body[start:]
        m.sent += len(part)
        self.wfile.write(part)

    def log_message(self, *args):
        pass


@pytest.fixture
def mirror():
    with Mirror() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


BODY = random.Random(1).randbytes(1_000_000)
BODY_SHA = hashlib.sha256(BODY).hexdigest()


def parts_left():
    return list(Path("data").rglob("*.part"))


@needs_vocabularies
def test_sales_from_a_mirror_is_77919_tokens(mirror, monkeypatch):
    text = real("sales_textbook.txt")
    mirror.files["/huggingface.co/" + SALES_PATH] = text.encode()
    monkeypatch.setenv("SCRATCHLM_MIRROR", mirror.base)
    prepare_data.main(["sales", "--tokenizer", "cl100k_base"])
    ids = tokens_of("data/sales")
    assert len(ids) == 77_919
    assert ids == tiktoken.get_encoding("cl100k_base").encode(text, disallowed_special=())
    prepare_data.main(["sales", "--tokenizer", "byte"])
    assert len(mirror.log) == 1, "downloaded twice"


def test_shakespeare_from_a_mirror_is_its_characters(mirror, monkeypatch):
    text = real("tinyshakespeare.txt")
    path = "/" + SOURCES["shakespeare"].fetch.keywords["train"].split("://")[1]
    mirror.files[path] = text.encode()
    monkeypatch.setenv("SCRATCHLM_MIRROR", mirror.base + "/")
    prepare_data.main(["shakespeare"])
    meta = prepare_data.read_meta("data/shakespeare")
    assert len(read_tokens("data/shakespeare", "train")) == int(0.9 * len(text))
    assert Tokenizer(meta["tokenizer"]).decode(tokens_of("data/shakespeare")) == text
    assert meta["vocab_size"] == 65 + 2  # and U+FFFD and end-of-text


def test_hf_endpoint_stands_for_the_hub_only(mirror, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", mirror.base + "/hub/")
    mirror.files["/hub/" + SALES_PATH] = BODY
    url = SOURCES["sales"].fetch.keywords["train"]
    assert fetch(url, wait=0.01).read_bytes() == BODY
    assert resolve_url("https://github.com/x") == "https://github.com/x"


def test_a_cut_download_is_resumed_where_it_broke(mirror):
    mirror.files["/a.bin"] = BODY
    mirror.faults = [("cut", 700_000)]
    path = fetch(mirror.base + "/a.bin", sha256=BODY_SHA, wait=0.01)
    assert path.read_bytes() == BODY
    assert mirror.ranges[0] is None
    resumed_at = int(re.fullmatch(r"bytes=(\d+)-", mirror.ranges[1])[1])
    assert 400_000 < resumed_at <= 700_000
    assert mirror.sent == 700_000 + len(BODY) - resumed_at
    assert not parts_left()


def test_the_next_call_resumes_what_an_earlier_one_could_not_finish(mirror):
    mirror.files["/a.bin"] = BODY
    mirror.faults = [("cut", 600_000)]
    with pytest.raises(UserError):
        fetch(mirror.base + "/a.bin", tries=1)
    assert parts_left()
    assert fetch(mirror.base + "/a.bin", tries=1).read_bytes() == BODY
    assert mirror.ranges[1] is not None


def test_without_versions_a_cut_download_starts_over(mirror):
    mirror.files["/a.bin"], mirror.versions = BODY, False
    mirror.faults = [("cut", 600_000)]
    assert fetch(mirror.base + "/a.bin", wait=0.01).read_bytes() == BODY
    assert mirror.ranges == [None, None]


def test_without_versions_a_download_that_never_succeeds_leaves_nothing(mirror):
    mirror.files["/a.bin"], mirror.versions, mirror.always = BODY, False, ("cut", 600_000)
    with pytest.raises(UserError, match="after 3 tries"):
        fetch(mirror.base + "/a.bin", tries=3, wait=0.01)
    assert mirror.ranges == [None] * 3
    assert not [p for p in Path("data").rglob("*") if p.is_file()]


def test_a_file_that_changed_on_the_server_is_never_spliced(mirror):
    mirror.files["/a.bin"] = BODY
    mirror.faults = [("cut", 600_000)]
    with pytest.raises(UserError):
        fetch(mirror.base + "/a.bin", tries=1)
    mirror.files["/a.bin"] = new = BODY[::-1]
    assert fetch(mirror.base + "/a.bin", wait=0.01).read_bytes() == new
    assert mirror.ranges[1] is not None and mirror.ranges[-1] is None
    assert not parts_left()


def test_a_file_that_became_shorter_on_the_server_starts_over(mirror):
    mirror.files["/a.bin"] = BODY
    mirror.faults = [("cut", 600_000)]
    with pytest.raises(UserError):
        fetch(mirror.base + "/a.bin", tries=1)
    mirror.files["/a.bin"] = b"short"
    assert fetch(mirror.base + "/a.bin", wait=0.01).read_bytes() == b"short"


def test_one_download_leaves_the_part_of_another_alone(mirror):
    mirror.files["/a.txt"], mirror.files["/a.txt.gz"] = b"text", BODY
    mirror.faults = [("cut", 600_000)]
    with pytest.raises(UserError):
        fetch(mirror.base + "/a.txt.gz", tries=1)
    left = parts_left()
    assert fetch(mirror.base + "/a.txt", wait=0.01).read_bytes() == b"text"
    assert parts_left() == left != []


def test_a_resume_that_the_server_ignores_starts_over(mirror, monkeypatch):
    """Servers that know no Range answer 200 and the whole file."""
    mirror.files["/a.bin"] = BODY
    mirror.faults = [("cut", 600_000)]
    with pytest.raises(UserError):
        fetch(mirror.base + "/a.bin", tries=1)
    good = Handler.do_GET

    def deaf(self):
        del self.headers["Range"]
        good(self)

    monkeypatch.setattr(Handler, "do_GET", deaf)
    assert fetch(mirror.base + "/a.bin", tries=1).read_bytes() == BODY
    assert not parts_left()


def test_wrong_content_is_refused_and_not_kept(mirror):
    mirror.files["/a.bin"] = BODY[:-1] + b"?"
    with pytest.raises(UserError, match=r"a\.bin.*sha256") as e:
        fetch(mirror.base + "/a.bin", sha256=BODY_SHA, wait=0.01)
    assert BODY_SHA[:8] in str(e.value)
    assert not [p for p in Path("data").rglob("*") if p.is_file()]


def test_404_is_final(mirror):
    with pytest.raises(UserError, match=r"nothing\.txt.*404"):
        fetch(mirror.base + "/nothing.txt", wait=0.01)
    assert len(mirror.log) == 1


def test_a_server_that_recovers_is_asked_again(mirror):
    mirror.files["/a.bin"] = BODY
    mirror.faults = [500, 503]
    assert fetch(mirror.base + "/a.bin", wait=0.01).read_bytes() == BODY
    assert len(mirror.log) == 3


def test_an_unreachable_host_names_the_remedies():
    with socket.socket() as s:  # a port that was free a moment ago: nobody listens there
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with pytest.raises(UserError, match="SCRATCHLM_MIRROR") as e:
        fetch(f"http://127.0.0.1:{port}/a.bin", tries=2, wait=0.01)
    assert "HF_ENDPOINT" in str(e.value) and f"127.0.0.1:{port}" in str(e.value)
    assert "\n" not in str(e.value)


def test_a_good_file_is_not_downloaded_again(mirror):
    path = download_path(mirror.base + "/a.bin")
    path.parent.mkdir(parents=True)
    path.write_bytes(BODY)
    assert fetch(mirror.base + "/a.bin") == path
    assert fetch(mirror.base + "/a.bin", sha256=BODY_SHA) == path
    assert mirror.log == []


def test_a_damaged_file_is_replaced_but_kept_until_then(mirror):
    path = download_path(mirror.base + "/a.bin")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"damaged")
    mirror.files["/a.bin"], mirror.always = BODY, 500
    with pytest.raises(UserError):
        fetch(mirror.base + "/a.bin", sha256=BODY_SHA, tries=2, wait=0.01)
    assert path.read_bytes() == b"damaged"
    mirror.always = None
    assert fetch(mirror.base + "/a.bin", sha256=BODY_SHA).read_bytes() == BODY


@pytest.mark.parametrize(
    "url",
    [
        "http://h/../../../etc/passwd",
        "http://h/a/%2e%2e/%2e%2e/%2e%2e/b",
        "http://h/..%2f..%2f..%2fb",
        "http://h/..",
        "http://h/%00/C:%5Cb",
        "http://../../b",
        "http://../b",
    ],
)
def test_no_url_leads_out_of_the_download_folder(url):
    top = Path("data/downloads").resolve()
    path = Path(os.path.normpath(download_path(url).absolute()))
    assert path.is_relative_to(top) and path != top


def test_other_queries_are_other_files():
    urls = ["http://h/a.txt", "http://h/a.txt?x=1", "http://h/a.txt?x=2", "http://g/a.txt"]
    assert len({download_path(u) for u in urls}) == 4


def test_a_source_may_be_a_url(mirror):
    mirror.files["/books/tale.txt"] = ALL_TEXT.encode()
    folder = prepare(mirror.base + "/books/tale.txt", "byte")
    assert folder == Path("data/tale")
    assert bytes(tokens_of(folder)) == normal(ALL_TEXT).encode()


@needs_vocabularies
def test_a_vocabulary_comes_through_the_mirror_and_a_damaged_one_is_not_kept(mirror, monkeypatch):
    good = (TIKTOKEN / "9b5ad71b2ce5302211f9c61530b329a4922fc6a4").read_bytes()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(Path("cache").absolute()))
    monkeypatch.setenv("SCRATCHLM_MIRROR", mirror.base)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    mirror.files[VOCABULARY] = good[:-100]
    with pytest.raises(UserError, match="cl100k_base"):
        Tokenizer(CL100K)
    mirror.files[VOCABULARY] = good
    assert Tokenizer(CL100K).n_vocab == 100_277


# --------------------------------------------------------------------------------------------
# Encodings
# --------------------------------------------------------------------------------------------


def normal(text):
    return text.replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.parametrize("block", [5, 1 << 20])
@pytest.mark.parametrize(
    "encoding, start, text",
    [
        ("utf-8", b"", ALL_TEXT),
        ("utf-8", b"\xef\xbb\xbf", ALL_TEXT),
        ("utf-16-le", b"\xff\xfe", ALL_TEXT),
        ("utf-16-be", b"\xfe\xff", ALL_TEXT),
        ("utf-16-le", b"", TEXTS["english"] + TEXTS["code"]),
        ("utf-16-be", b"", TEXTS["english"] + TEXTS["code"]),
        ("gb18030", b"", TEXTS["chinese"]),
        ("gbk", b"", TEXTS["english"].replace("—", "-") * 30 + TEXTS["chinese"] * 30),
        ("gb18030", b"", TEXTS["chinese"] * 60 + "\U0001f600"),
    ],
)
def test_encodings_are_recognised(encoding, start, text, block, monkeypatch):
    """With blocks of 5 bytes nearly every character is cut somewhere."""
    set_block(monkeypatch, block)
    Path("a.txt").write_bytes(start + text.encode(encoding))
    assert pieces_of("a.txt") == [text]


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_line_ends_become_newlines(block, monkeypatch):
    set_block(monkeypatch, block)
    Path("a.txt").write_bytes(b"one\r\ntwo\rthree\n\r\n\r")
    assert pieces_of("a.txt") == ["one\ntwo\nthree\n\n\n"]


@pytest.mark.parametrize("size, at", [(30_000, 3_000), (1_500_000, 1_200_000), (60_000, 59_997)])
@pytest.mark.parametrize(
    "damage", [b"\xff", b"A", b"\xe4\xb8A"], ids=["no-start", "no-middle", "cut-short"]
)
def test_a_damaged_chinese_file_is_named_with_its_byte(size, at, damage):
    """A damaged UTF-8 file must not pass for GB18030; and what the message says can be looked up
    in a hex editor: that byte stands at that offset."""
    data = bytearray(("学而时习之不亦说" * (size // 24 + 1)).encode()[:size])
    lead = at + 1 if damage == b"A" else at
    data[lead : lead + len(damage)] = damage
    Path("poem.txt").write_bytes(data)
    with pytest.raises(UserError, match=rf"poem\.txt.* {at:,} ") as e:
        pieces_of("poem.txt")
    assert f"{data[at]:#04x}" in str(e.value) and "--encoding" in str(e.value)


def test_damage_that_gb18030_would_swallow_is_still_named():
    data = bytearray(("的是" * 2000).encode())
    data[6000] = 0xC0  # never in UTF-8, and a lead byte in GB18030
    assert len(data.decode("gb18030")) == 6000
    Path("poem.txt").write_bytes(data)
    with pytest.raises(UserError, match=r"poem\.txt.*0xc0 at offset 6,000 "):
        pieces_of("poem.txt")


def test_a_utf8_file_cut_inside_its_last_character_is_named():
    data = ("床前明月光" * 100).encode()[:-1]
    Path("poem.txt").write_bytes(data)
    with pytest.raises(UserError, match=rf"middle of .* at offset {len(data) - 2:,}$"):
        pieces_of("poem.txt")


def test_a_named_encoding_is_used_and_its_failures_are_named():
    Path("a.txt").write_bytes("naïve café ÿ".encode("latin-1"))
    assert pieces_of("a.txt", encoding="latin-1") == ["naïve café ÿ"]
    with pytest.raises(UserError, match=r"a\.txt: .*utf-8 at byte offset 2$"):
        pieces_of("a.txt", encoding="utf-8")
    with pytest.raises(UserError, match="klingon"):
        pieces_of("a.txt", encoding="klingon")


# --------------------------------------------------------------------------------------------
# Sources
# --------------------------------------------------------------------------------------------


def test_a_folder_gives_its_text_files_in_order():
    Path("books/sub").mkdir(parents=True)
    Path("books/.git").mkdir()
    for name in ("b.txt", "a.md", "sub/c.py", "picture.png", ".git/x.txt", ".hidden.txt"):
        Path("books", name).write_text(f"<{name}>")
    Path("books/d.txt.gz").write_bytes(gzip.compress(b"<d>"))
    assert pieces_of(*prepare_data.find_files("books")) == [
        "<a.md>",
        "<b.txt>",
        "<d>",
        "<sub/c.py>",
    ]


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
        ("https://h/x/tale.txt?download=1", "tale"),
        ("..", "text"),
        ("https://h/", "text"),
    ],
)
def test_names(source, name):
    assert prepare_data.default_name(source) == name


def test_a_zip_gives_its_text_members_and_unpacks_nothing():
    with zipfile.ZipFile("a.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("b.txt", "床前明月光\r\n")
        z.writestr("../../escaped.txt", "second")
        z.writestr("c.png", b"\x89PNG")
        z.writestr("rows.jsonl", '{"text": "third"}\n"fourth"')
    assert pieces_of("a.zip") == ["床前明月光\n", "second", "third", "fourth"]
    assert [p.name for p in Path().rglob("*")] == ["a.zip"]


def test_jsonl_rows_are_documents():
    rows = ["plain", {"text": "t", "content": "no"}, {"content": "c"}, {"title": "x", "text": ""}]
    lines = "\r\n\r\n".join(json.dumps(r) for r in rows) + '\r\n"\u2028last\\n"'
    Path("a.jsonl").write_bytes(lines.encode())
    Path("a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    wanted = ["plain", "t", "c", "", "\u2028last\n"]
    assert pieces_of("a.jsonl") == pieces_of("a.jsonl.gz") == wanted
    Path("b.jsonl").write_text('{"text": "no", "body": "yes"}\n')
    assert pieces_of("b.jsonl", field="body") == ["yes"]


@pytest.mark.parametrize("block", [3, 1 << 20])
def test_a_bad_json_line_is_named(block, monkeypatch):
    set_block(monkeypatch, block)
    Path("a.jsonl").write_text('{"text": "fine"}\n\n{"text": "cut\n')
    with pytest.raises(UserError, match=r"a\.jsonl:3\b.*JSON"):
        pieces_of("a.jsonl")


@pytest.mark.parametrize(
    "row, reason",
    [
        ('{"body": "x"}', "a.jsonl:2: no text or content or .*its keys are body: .*--field"),
        ('["x"]', r"a.jsonl:2 is neither text nor a dialogue but \['x'\]"),
        ("7", "a.jsonl:2 is neither text nor a dialogue but 7"),
        ("null", "a.jsonl:2 is neither text nor a dialogue but None"),
        ('{"text": 5}', "a.jsonl:2: its text is neither text nor a dialogue but 5"),
    ],
)
def test_a_json_line_without_text_is_named(row, reason):
    Path("a.jsonl").write_text(f'"fine"\n{row}\n')
    with pytest.raises(UserError, match=reason):
        pieces_of("a.jsonl")


def test_a_json_list_is_read_as_its_rows_are(tmp_path):
    rows = [
        "plain", {"text": "t"}, [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}],
        {"instruction": "i", "input": "", "output": "o"},
        {"instruction": "i", "input": "n", "output": "o"},
        {"id": 1, "items": [{"from": "human", "value": "你好"}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ]
    wanted = ["plain", "t", "hi\nho", "i\no", "i\nn\no", "你好", "q\na"]
    Path("a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for name, text in (
        ("list.json", json.dumps(rows)),
        ("pretty.json", json.dumps(rows, indent=2)),
        ("lines.json", Path("a.jsonl").read_text()),
    ):
        Path(name).write_text(text)
        assert pieces_of(name) == pieces_of("a.jsonl") == wanted
    Path("zip.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    assert pieces_of("zip.json.gz") == wanted
    Path("bad.json").write_text(json.dumps([*rows, {"text": 5}]))
    with pytest.raises(UserError, match=r"bad\.json: row 8: its text is neither"):
        pieces_of("bad.json")
    Path("cut.json").write_text(json.dumps(rows)[:-9])
    with pytest.raises(UserError, match=r"cut\.json: broken JSON \(.*line 1 column"):
        pieces_of("cut.json")


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


def test_an_encrypted_zip_is_named():
    with zipfile.ZipFile("a.zip", "w") as z:
        z.writestr("x.txt", "text")
    raw = bytearray(Path("a.zip").read_bytes())
    raw[6] |= 1  # the flag of the local header, and of the list at the end
    raw[raw.index(b"PK\1\2") + 8] |= 1
    Path("a.zip").write_bytes(raw)
    with pytest.raises(UserError, match=r"a\.zip:x\.txt: encrypted"):
        pieces_of("a.zip")


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


def test_half_a_surrogate_pair_in_json_is_no_crash():
    """Scraped JSON has them (an emoji cut by a length limit), and UTF-8 has no bytes for them."""
    rows = "".join(json.dumps({"text": f"cut emoji {i} \ud83d"}) + "\n" for i in range(30))
    Path("a.jsonl").write_text(rows)
    for tokenizer in ("byte", "char", "bpe:270"):
        folder = prepare("a.jsonl", tokenizer)
        text = Tokenizer(prepare_data.read_meta(folder)["tokenizer"]).decode(tokens_of(folder))
        assert text.count("cut emoji") == 30


@pytest.mark.parametrize("damage", ["cut", "flipped", "no gzip at all"])
@pytest.mark.parametrize("encoding", [None, "utf-8"])
def test_a_damaged_gz_is_named(damage, encoding):
    data = bytearray(gzip.compress(random.Random(0).randbytes(5000).hex().encode()))
    if damage == "flipped":
        data[2000] ^= 255
    Path("a.txt.gz").write_bytes({"cut": data[:-2000], "flipped": data}.get(damage, b"text"))
    with pytest.raises(UserError, match=r"a\.txt\.gz: damaged"):
        pieces_of("a.txt.gz", encoding=encoding)


def test_a_damaged_zip_is_named():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as z:
        z.writestr("b.txt", "x" * 5000)
    Path("a.zip").write_bytes(buffer.getvalue()[:-50])
    with pytest.raises(UserError, match=r"a\.zip: damaged"):
        pieces_of("a.zip")
    data = bytearray(buffer.getvalue())
    data[2000] = ord("y")  # the archive is well-formed, its member is not what it was
    Path("a.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.zip:b\.txt: damaged"):
        pieces_of("a.zip")


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
    for bad in (0, -1, 0.6, float("nan")):
        with pytest.raises(UserError, match="val_fraction"):
            prepare("a.jsonl", "byte", val_fraction=bad)


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


@pytest.fixture(scope="module")
def own_bpe():
    documents = [("", [text * 3]) for text in TEXTS.values()]
    return Tokenizer(learn_bpe(700, documents, 1))


@pytest.fixture
def tokenizer(request, own_bpe):
    if request.param == "bpe":
        return own_bpe
    if request.param == "char":
        return prepare_data.make_tokenizer("char", [("", [ALL_TEXT])], 1)
    if request.param in ("gpt2", "cl100k_base") and not TIKTOKEN.is_dir():
        pytest.skip(f"no tiktoken vocabularies in {TIKTOKEN}")
    return prepare_data.make_tokenizer(request.param, [], 1)


every_tokenizer = pytest.mark.parametrize(
    "tokenizer", ["byte", "char", "bpe", "gpt2", "cl100k_base"], indirect=True
)


@every_tokenizer
@pytest.mark.parametrize("language", TEXTS)
def test_round_trip(tokenizer, language):
    text = TEXTS[language] * 2
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids) < tokenizer.n_vocab
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@every_tokenizer
def test_a_spec_that_went_through_json_gives_the_same_tokenizer(tokenizer):
    again = Tokenizer(json.loads(json.dumps(tokenizer.spec)))
    assert again.encode(ALL_TEXT) == tokenizer.encode(ALL_TEXT)
    assert (again.n_vocab, again.eos_id) == (tokenizer.n_vocab, tokenizer.eos_id)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"], indirect=True)
def test_any_unicode_round_trips_where_bytes_are_tokens(tokenizer):
    rng = random.Random(0)
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    text = "".join(map(chr, rng.choices(range(0x3000), k=3000) + rng.choices(points, k=3000)))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_byte_ids_are_the_bytes():
    t = Tokenizer({"kind": "byte"})
    assert t.encode(ALL_TEXT) == list(ALL_TEXT.encode())
    assert (t.n_vocab, t.eos_id) == (257, 256)


def test_an_unknown_character_is_a_replacement_character():
    t = prepare_data.make_tokenizer("char", [("", ["a^]\\-bc\n"])], 1)
    assert t.decode(t.encode("a-b^学]\\ \nd")) == "a-b^�]\\�\n�"
    assert t.n_vocab == 8 + 2
    assert t.fallback[t.encode("a学")].tolist() == [False, True]


@needs_vocabularies
@pytest.mark.parametrize("name", ["gpt2", "cl100k_base"])
def test_ids_equal_tiktokens(name):
    t, reference = Tokenizer({"kind": "tiktoken", "name": name}), tiktoken.get_encoding(name)
    text = ALL_TEXT + real("sales_textbook.txt")[:50_000]
    assert t.encode(text) == reference.encode(text, disallowed_special=())
    assert (t.n_vocab, t.eos_id) == (reference.n_vocab, reference.eot_token)


@every_tokenizer
def test_the_name_of_a_special_token_is_ordinary_text(tokenizer):
    text = "a<|endoftext|>b<|fim_prefix|>"
    ids = tokenizer.encode(text)
    assert tokenizer.eos_id not in ids
    assert tokenizer.byte_lengths[ids].min() > 0
    own = tokenizer.for_one_thread()
    assert own.encode(text) == ids and own.encoding is not tokenizer.encoding
    if tokenizer.spec["kind"] != "char":
        assert tokenizer.decode(ids) == text
    Path("a.txt").write_text(text * 20)
    Path("b.txt").write_text(text * 20)
    if tokenizer.spec["kind"] == "byte":
        assert tokens_of(prepare("[ab].txt", "byte")).count(256) == 1


@pytest.mark.parametrize("tokenizer", ["bpe", "gpt2", "cl100k_base"], indirect=True)
@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("block", [64, 333])
def test_a_stream_of_pieces_has_the_tokens_of_the_whole(tokenizer, language, block, monkeypatch):
    set_block(monkeypatch, block)
    text = TEXTS[language] * 60
    if language == "code":
        text = (ROOT / "prepare_data.py").read_text(encoding="utf-8")
    pieces = list(safe_pieces(re.findall(f"(?s:.{{1,{block}}})", text)))
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_a_document_without_any_place_to_cut_still_comes_in_bounded_pieces(monkeypatch):
    set_block(monkeypatch, 100)
    pieces = list(safe_pieces(["x" * 100] * 95))
    assert "".join(pieces) == "x" * 9500
    assert max(map(len, pieces)) <= 800


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
# Training a BPE
# --------------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("seed", range(12))
def test_train_bpe_equals_recounting_everything(alphabet, seed):
    """Few letters make runs like aaaa, and ties at nearly every step."""
    rng = random.Random(seed)
    counts = {}
    for _ in range(rng.choice([3, 20, 60])):
        piece = bytes(rng.choices(alphabet, k=rng.randint(1, 14)))
        counts[piece] = rng.randint(1, 9)
    for size in (256, 260, 300):
        assert train_bpe(counts, size) == naive_bpe(counts, size)


def test_train_bpe_stops_at_its_size_and_never_merges_what_occurs_once():
    assert len(train_bpe({b"abcdefgh": 100}, 259)) == 259
    assert len(train_bpe({b"abcd": 1, b"efgh": 1}, 300)) == 256
    assert len(train_bpe({}, 300)) == 256


def chinese_text():
    rows = json.loads(real("instruct/alpaca_zh_demo.json"))
    return "\n".join(r["output"] for r in rows).encode()[:200_000].decode(errors="ignore")


@pytest.mark.parametrize("corpus", ["shakespeare", "chinese"])
def test_train_bpe_agrees_with_the_tokenizers_library(corpus):
    """Equal up to ties: among pairs that occur equally often we take the smallest ids and the
    library the smallest of its own ids, which number the bytes in another order. A tie taken the
    other way changes a few rare tokens (and only those that come last stay out), so nearly all
    tokens must be common, and the corpus must come out equally short.
    """
    tokenizers = pytest.importorskip("tokenizers")
    pre, trainers = tokenizers.pre_tokenizers, tokenizers.trainers
    text = real("tinyshakespeare.txt") if corpus == "shakespeare" else chinese_text()
    size = 2000
    ours = Tokenizer(learn_bpe(size + 1, [("", [text])], 1))
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = pre.Sequence(
        [
            pre.Split(tokenizers.Regex(PATTERN), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    theirs.train_from_iterator([text], trainer)
    # ByteLevel writes each byte as a printable character: the printable ones as themselves, the
    # others as the characters from 256 on
    printable = {c: ord(c) for c in alphabet if ord(c) < 256}
    others = sorted(set(range(256)) - set(printable.values()))
    byte_of = printable | dict(zip(sorted(c for c in alphabet if ord(c) > 255), others))
    vocabulary = {bytes(byte_of[c] for c in token) for token in theirs.get_vocab()}
    mine = {base64.b64decode(t) for t in ours.spec["tokens"]}
    assert len(mine) == len(vocabulary) == size
    assert len(mine & vocabulary) >= 0.99 * size
    a, b = len(ours.encode(text)), len(theirs.encode(text).ids)
    assert abs(a - b) <= 0.001 * b


def test_a_sample_of_a_large_corpus_reaches_all_of_it(monkeypatch):
    monkeypatch.setattr("data.tokenizer.BPE_SAMPLE", 1000)
    pieces = ["front front front ", "skipped skipped "] * 25
    pieces += ["later later later ", "skipped skipped "] * 25
    spec = learn_bpe(280, [("", pieces)], sum(map(len, pieces)))
    tokens = [base64.b64decode(t) for t in spec["tokens"]]
    assert b" front" in tokens and b" later" in tokens
    assert not [t for t in tokens if b"sk" in t], "it is to count every second piece"


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


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UserError("bad thing"), 2, "x.py: bad thing\n"),
        (FileNotFoundError(2, "No such file", "a.txt"), 2, "x.py: a.txt: No such file\n"),
        (OSError(28, "No space left on device"), 2, "x.py: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "\nx.py: interrupted\n"),
        (None, 0, ""),
    ],
)
def test_console_turns_errors_into_exit_codes(error, code, line, monkeypatch, capsys):
    def main():
        if error:
            raise error

    monkeypatch.setattr(sys, "argv", ["/somewhere/x.py"])
    with pytest.raises(SystemExit) as e:
        run_cli(main)
    assert e.value.code == code
    assert capsys.readouterr().err == line


def test_console_does_not_hide_a_bug():
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda: 1 / 0)


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


def test_work_is_done_in_order_and_only_a_few_jobs_ahead():
    taken = itertools.count()
    jobs = (next(taken) for _ in range(100))
    results = prepare_data.parallel_map(lambda job: -job, jobs, 2)
    for i, result in enumerate(results):
        assert result == -i
        if i == 50:
            assert next(taken) <= 50 + 6
            break


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
