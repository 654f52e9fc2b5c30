"""What several test files need: one thread, an own folder, real data, a server, chats."""

import os

# tests run in several processes at once, one for each core: so torch uses one thread in each
os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import functools
import hashlib
import http.server
import itertools
import json
import re
import struct
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

# stand-ins for other machines: without oneDNN, without the int8 operations for x86
if without := os.environ.get("SCRATCHLM_WITHOUT"):
    assert without in ("mkldnn", "x86_int8")
    if without == "mkldnn":
        torch.backends.mkldnn.set_flags(False)
    else:
        torch.backends.quantized.engine = "qnnpack"  # for ARM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.chat import CHAT_TOKENS, get_template, tool_call
from data.machine import Runtime
from data.text import Documents, file_streams
from data.tokenizer import Tokenizer
from prepare_data import read_tokens

CPU = Runtime(torch.device("cpu"), peak=1e11)
BYTE = Tokenizer({"kind": "byte"})
CHAT = BYTE.with_special(CHAT_TOKENS)
SYSTEM, USER, ASSISTANT, CALL, TOOL, END = range(257, 263)  # CHAT_TOKENS, behind end-of-text
SHARED = Path(os.environ.get("SCRATCHLM_DATA") or ROOT.parent / "shared" / "data").resolve()
TIKTOKEN = SHARED / "tiktoken"
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
needs_vocabularies = pytest.mark.skipif(
    not TIKTOKEN.is_dir(), reason=f"no tiktoken vocabularies in {TIKTOKEN}"
)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def pytest_collection_finish(session):
    """Tests see no GPU, whose rounding differs, unless all that run are marked `gpu`."""
    if not all(item.get_closest_marker("gpu") for item in session.items):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.backends.mps.is_available = lambda: False


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU, and a run of no other tests: pytest -m gpu")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The test works in its own folder, without the machine's mirror, proxy or token; Hugging
    Face's libraries stay offline; tiktoken finds its vocabularies if they are here."""
    monkeypatch.chdir(tmp_path)
    for name in ("SCRATCHLM_MIRROR", "HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if TIKTOKEN.is_dir():
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(TIKTOKEN))
    return tmp_path


@pytest.fixture
def windows(monkeypatch):
    """Files that this process has mapped cannot be replaced, as on Windows."""
    maps, os_replace = Path("/proc/self/maps"), os.replace
    if not maps.exists():
        pytest.skip("no list of mapped files here")

    def replace(source, target):
        if f"{Path(target).resolve()}\n" in maps.read_text():
            raise PermissionError(13, "Access is denied", str(target))
        os_replace(source, target)

    monkeypatch.setattr(os, "replace", replace)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serve_folder(folder):
    """The URL of a server on this machine that has the files of `folder`."""
    handler = functools.partial(Quiet, directory=str(folder))
    with serving(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)) as server:
        yield f"http://127.0.0.1:{server.server_port}"


class Site(http.server.ThreadingHTTPServer):
    """A web server with faults. `files` maps paths to bytes or (bytes, headers), `redirects` to
    (status, address, headers), and `faults` a path, or None for any, to what happens instead the
    next times: an HTTP status, the number of bytes after which the line goes dead, or None.
    `always` is such a status for all paths; a request without the `token`, if there is one, gets a
    401. `log` has (path, range, bearer) of each request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), SiteHandler)
        self.files, self.redirects, self.faults, self.log = {}, {}, {}, []
        self.always = self.token = None
        self.names_versions = self.takes_ranges = True
        self.base = f"http://127.0.0.1:{self.server_port}"

    @property
    def ranges(self):
        return [wanted for _, wanted, _ in self.log]

    @property
    def asked(self):
        return [path.split("/")[-1] for path, _, _ in self.log]


class SiteHandler(Quiet):
    def do_GET(self):
        site, wanted, bearer = self.server, self.headers["Range"], self.headers["Authorization"]
        site.log.append((self.path, wanted, bearer))
        faults = site.faults.get(self.path) or site.faults.get(None)
        fault = faults.pop(0) if faults else None
        if status := site.always or (fault if fault in range(400, 600) else None):
            return self.send_error(status)
        if site.token and bearer != f"Bearer {site.token}":
            return self.send_error(401)
        if self.path in site.redirects:
            status, address, headers = site.redirects[self.path]
            return self.answer(status, b"elsewhere", {"Location": address} | headers)
        if self.path not in site.files:
            return self.send_error(404)
        body, headers = site.files[self.path], {}
        if isinstance(body, tuple):
            body, headers = body
        elif site.names_versions:
            headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"'}
        if not wanted or not site.takes_ranges:
            return self.answer(200, body, headers, fault)
        start = int(re.match(r"bytes=(\d+)-", wanted)[1])
        if start >= len(body):
            return self.send_error(416)
        headers = headers | {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
        self.answer(206, body[start:], headers, fault)

    def answer(self, status, body, headers, cut=None):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body[:cut])


@contextlib.contextmanager
def serving(server):
    """The server, answering in a thread."""
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def mirror():
    with serving(Site()) as site:
        yield site


def real(name):
    """The path of a file or folder of the real data, or a skip with the reason."""
    if not (SHARED / name).exists():
        pytest.skip(f"real data {SHARED / name} is absent")
    return SHARED / name


def kept():
    """The names of all files in the test's folder except locks and notes of missing files."""
    files = (p for p in Path().rglob("*") if p.parent.name not in ("locks", ".no_exist"))
    return sorted(p.name for p in files if p.is_file())


def turn(role, content):
    """A message of a conversation; that of a call is `name {arguments}`."""
    if role == "call":
        return calls(content)
    return {"role": role, "content": content}


def calls(*texts, content=""):
    """The assistant's message with calls, each `name {arguments}`."""
    tool_calls = []
    for name, _, arguments in (text.partition(" ") for text in texts):
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
        tool_calls.append(tool_call(name, arguments))
    return {"role": "assistant", "content": content, "tool_calls": tool_calls}


def prompt_ids(messages, tokenizer, tools=None, room=None, **variables):
    """The ids of a prompt, at most `room`."""
    template = get_template(tokenizer)
    if room is not None:
        return template.fit_prompt(messages, tools, room, variables)
    return template.prompt_ids(messages, tools, variables)


def render_chat(messages, tokenizer, add_generation_prompt=False, tools=None, **variables):
    """(ids, mask) of a conversation, mask 1 where the assistant's own words are learned."""
    template = get_template(tokenizer)
    prompt = {"add_generation_prompt": add_generation_prompt}
    ids = template.prompt_ids(messages, tools, variables | prompt)
    mask = [0] * len(ids)
    for row, learned, _ in template.rows(messages, tools)[-1:]:
        stop = len(learned) - learned[::-1].index(1) if 1 in learned else 0
        mask[:stop] = learned[:stop] if ids[:stop] == row[:stop] else mask[:stop]
    return ids, mask


def set_block(monkeypatch, size):
    """Text is read, encoded and written in pieces of `size` bytes."""
    monkeypatch.setattr("data.text.BLOCK", size)
    monkeypatch.setattr("prepare_data.BLOCK", size)


def tokens_of(folder, *splits):
    """The ids in a prepared folder."""
    ids = [read_tokens(folder, s).tolist() for s in splits or ("train", "val")]
    return list(itertools.chain(*ids))


def pieces_of(*files, **options):
    """The text of each document in files, as prepare would read them."""
    streams = [s for f in files for s in file_streams(Path(f))]
    return ["".join(pieces) for _, pieces in Documents(streams, **options)]


def idx(array):
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def toy_files(train=300):
    """{name: IDX bytes}: a digit d is a bright bar in line 2 d + 4, with noise."""
    files, random = {}, np.random.default_rng(0)
    for kind, n in (("train", train), ("t10k", 100)):
        labels = np.arange(n) % 10
        images = random.integers(0, 60, (n, 28, 28))
        for i, d in enumerate(labels):
            images[i, 2 * d + 3 : 2 * d + 6, 4:24] = 250
        files[f"{kind}-images-idx3-ubyte"] = idx(images)
        files[f"{kind}-labels-idx1-ubyte"] = idx(labels)
    return files


@pytest.fixture
def toy(tmp_path):
    """A folder with a small data set that is easy to learn."""
    folder = tmp_path / "toy"
    folder.mkdir()
    for name, content in toy_files().items():
        (folder / name).write_bytes(content)
    return str(folder)
