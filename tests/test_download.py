"""data/download.py: files from the network, over a bad one. Nothing here leaves 127.0.0.1."""

import hashlib
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
import tiktoken.registry
from conftest import ALL_TEXT, ROOT, TIKTOKEN, kept, needs_vocabularies, real, tokens_of

import prepare_data
from data.cli import UserError
from data.download import download_path, fetch
from data.files import locked
from data.sources import SOURCES
from data.tokenizer import Tokenizer
from prepare_data import prepare

pytestmark = pytest.mark.usefixtures("elsewhere")

SALES_URL = SOURCES["sales"].fetch.keywords["train"]
SALES_PATH = "/".join(SALES_URL.split("/")[3:])  # without https://host
VOCABULARY = "/openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
BODY = random.Random(1).randbytes(1_000_000)
BODY_SHA = hashlib.sha256(BODY).hexdigest()


def cut_download(mirror):
    """The first part of a file is here, from a run that gave up."""
    mirror.files["/a.bin"], mirror.faults = BODY, {None: [600_000]}
    with pytest.raises(UserError, match="gave up"):
        fetch(mirror.base + "/a.bin", tries=1)
    assert len(kept()) == 1 and kept()[0].endswith(".part")
    mirror.log.clear()


@needs_vocabularies
def test_sales_from_a_mirror_is_77919_tokens(mirror, monkeypatch):
    text = real("sales_textbook.txt").read_text(encoding="utf-8")
    mirror.files["/huggingface.co/" + SALES_PATH] = text.encode()
    monkeypatch.setenv("SCRATCHLM_MIRROR", mirror.base)
    prepare_data.main(["sales", "--tokenizer", "cl100k_base"])
    ids = tokens_of("data/sales")
    assert len(ids) == 77_919
    assert ids == tiktoken.get_encoding("cl100k_base").encode(text, disallowed_special=())
    prepare_data.main(["sales", "--tokenizer", "byte"])
    assert len(mirror.log) == 1, "downloaded twice"


@pytest.mark.parametrize("versions, takes_ranges", [(True, True), (False, True), (True, False)])
def test_the_next_call_resumes_what_an_earlier_one_could_not_finish(mirror, versions, takes_ranges):
    """If the server names versions and knows ranges; else it starts over."""
    mirror.names_versions, mirror.takes_ranges = versions, takes_ranges
    cut_download(mirror)
    assert fetch(mirror.base + "/a.bin", tries=1).read_bytes() == BODY
    assert [r is not None for r in mirror.ranges] == [versions] and kept() == ["a.bin"]


@pytest.mark.parametrize("new", [BODY[::-1], b"short"])
def test_a_file_that_changed_on_the_server_is_never_spliced(mirror, new):
    cut_download(mirror)
    mirror.files["/a.bin"] = new
    assert fetch(mirror.base + "/a.bin", wait=0.01).read_bytes() == new
    assert mirror.ranges[0] is not None and mirror.ranges[-1] is None
    assert kept() == ["a.bin"]


def test_wrong_content_is_refused_and_not_kept(mirror):
    mirror.files["/a.bin"] = BODY[:-1] + b"?"
    with pytest.raises(UserError, match=rf"a\.bin.*sha256.*{BODY_SHA[:8]}"):
        fetch(mirror.base + "/a.bin", sha256=BODY_SHA, wait=0.01)
    assert kept() == []


def test_404_is_final_a_server_in_trouble_is_asked_again_and_without_one_remedies_are_named(mirror):
    with pytest.raises(UserError, match=r"nothing\.txt.*404"):
        fetch(mirror.base + "/nothing.txt", wait=0.01)
    mirror.files["/a.bin"], mirror.faults[None] = BODY, [500, 503]
    assert fetch(mirror.base + "/a.bin", wait=0.01).read_bytes() == BODY
    assert mirror.asked == ["nothing.txt"] + ["a.bin"] * 3
    with pytest.raises(UserError, match=r"^.*127.0.0.1:9/.*SCRATCHLM_MIRROR.*HF_ENDPOINT.*$"):
        fetch("http://127.0.0.1:9/a.bin", tries=2, wait=0.01)


def test_a_good_file_is_not_downloaded_again_and_a_damaged_one_kept_until_it_is_replaced(mirror):
    path = download_path(mirror.base + "/a.bin")
    path.parent.mkdir(parents=True)
    path.write_bytes(BODY)
    assert fetch(mirror.base + "/a.bin") == fetch(mirror.base + "/a.bin", sha256=BODY_SHA) == path
    assert mirror.log == []
    path.write_bytes(b"damaged")
    mirror.files["/a.bin"], mirror.faults = BODY, {None: [500, 500]}
    with pytest.raises(UserError):
        fetch(mirror.base + "/a.bin", sha256=BODY_SHA, tries=2, wait=0.01)
    assert path.read_bytes() == b"damaged"
    assert fetch(mirror.base + "/a.bin", sha256=BODY_SHA).read_bytes() == BODY


def test_no_url_leads_out_of_the_download_folder():
    top = Path("data/downloads").resolve()
    urls = "h/../../../etc/passwd h/a/%2e%2e/%2e%2e/%2e%2e/b h/..%2f..%2f..%2fb h/.. ../../b ../b"
    for url in [*urls.split(), "h/%00/C:%5Cb"]:
        path = Path(os.path.normpath(download_path(f"http://{url}").absolute()))
        assert path.is_relative_to(top) and path != top, url
    urls = ["http://h/a.txt", "http://h/a.txt?x=1", "http://h/a.txt?x=2", "http://g/a.txt"]
    assert len({download_path(u) for u in urls}) == 4  # another query is another file


def test_a_source_may_be_a_url(mirror):
    mirror.files["/books/tale.txt"] = ALL_TEXT.encode()
    assert prepare(mirror.base + "/books/tale.txt", "byte") == Path("data/tale")
    assert bytes(tokens_of("data/tale")) == ALL_TEXT.encode()


@needs_vocabularies
def test_a_vocabulary_comes_through_the_mirror_and_a_damaged_one_is_named(mirror, monkeypatch):
    good = (TIKTOKEN / "9b5ad71b2ce5302211f9c61530b329a4922fc6a4").read_bytes()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(Path("cache").absolute()))
    monkeypatch.setenv("SCRATCHLM_MIRROR", mirror.base)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    mirror.files[VOCABULARY] = good[:-100]
    with pytest.raises(UserError, match=r"cl100k_base cannot be read: delete data"):
        Tokenizer({"kind": "tiktoken", "name": "cl100k_base"})
    mirror.files[VOCABULARY] = good
    shutil.rmtree("data/downloads")
    assert Tokenizer({"kind": "tiktoken", "name": "cl100k_base"}).n_vocab == 100_277


def start_fetch(url):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom data.download import fetch\n"
    command = [sys.executable, "-c", f"{code}fetch({url!r})"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_if_several_processes_download_a_file_one_does_and_the_others_find_it(mirror):
    mirror.files["/a.bin"] = BODY
    processes = [start_fetch(mirror.base + "/a.bin") for _ in range(3)]
    errors = [p.communicate(timeout=60)[1] for p in processes]
    assert [p.returncode for p in processes] == [0] * 3, errors
    assert mirror.ranges == [None]  # asked once
    assert kept() == ["a.bin"]


def test_a_download_waits_only_for_one_of_the_same_file(mirror):
    mirror.files["/a.bin"] = mirror.files["/b.bin"] = BODY
    with locked(download_path(mirror.base + "/a.bin")):
        waits = start_fetch(mirror.base + "/a.bin")
        assert waits.stderr.readline().startswith("waiting for another process that writes data")
        fetch(mirror.base + "/b.bin")
        assert waits.poll() is None
    assert waits.communicate(timeout=60) and waits.returncode == 0 and len(mirror.ranges) == 2
