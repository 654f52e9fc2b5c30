"""Models of the Hugging Face Hub, from a Hub and a CDN of our own on 127.0.0.1."""

import hashlib
import json
import random
import re
from pathlib import Path

import pytest
from conftest import Site, kept, serving

import prepare_data
from data.cli import UserError
from data.download import VIEWER, fetch, hub_token, resolve_url, snapshot_download

pytestmark = pytest.mark.usefixtures("elsewhere")
BODY = random.Random(1).randbytes(1_000_000)
INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
FOLDER = Path("data/hub/ann/tiny/main")


@pytest.fixture
def hub(monkeypatch):
    """Nobody waits before they try again."""
    monkeypatch.setattr(prepare_data.time, "sleep", lambda seconds: None)
    with serving(Site()) as site:
        monkeypatch.setenv("HF_ENDPOINT", f"{site.base}/")
        yield site


def address(file, repo="ann/tiny", revision="main"):
    return f"/{repo}/resolve/{revision}/{file}"


def put_small(hub, file, body=b"{}", **where):
    """As the Hub serves what git holds: itself, under git's own hash."""
    digest = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
    hub.files[address(file, **where)] = body, {"ETag": f'"{digest}"', "X-Repo-Commit": "c0ffee"}


def put_large(hub, mirror, file, body=BODY, hashed=None, **where):
    """As the Hub serves large files: a redirect that names the sha256 and leads to the CDN, whose
    ETag looks like a sha256 as well and is not the file's."""
    path = f"/store/{file}?sign=1"
    etag, linked = (hashlib.sha256(b).hexdigest() for b in (b"blocks" + body, hashed or body))
    mirror.files[path] = body, {"ETag": f'"{etag}"'}
    linked = {"X-Linked-ETag": f'"{linked}"', "X-Repo-Commit": "c0ffee"}
    hub.redirects[address(file, **where)] = 302, mirror.base + path, linked


def put_model(hub, mirror, **where):
    """A whole model in one file, with all that may come beside it."""
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        put_small(hub, file, file.encode(), **where)
    put_large(hub, mirror, "tokenizer.json", b"{}" * 1000, **where)
    put_large(hub, mirror, "model.safetensors", **where)


def put_shards(hub, mirror, names=SHARDS):
    put_small(hub, "config.json")
    weight_map = {f"layer.{i}": name for i, name in enumerate(names)}
    put_small(hub, INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}).encode())
    for i, name in enumerate(SHARDS):
        put_large(hub, mirror, name, BODY[i * 1000 :])


def refusal(*args, **kwargs):
    """The one line in which snapshot_download refuses; it names the address that was asked."""
    with pytest.raises(UserError) as e:
        snapshot_download(*args, **kwargs)
    line = str(e.value)
    assert "\n" not in line and "huggingface.co/ann/tiny/resolve" not in line
    return line


def test_a_model_in_one_file_comes_with_all_that_belongs_to_it(hub, mirror):
    put_model(hub, mirror)
    put_large(hub, mirror, "pytorch_model.bin")
    put_small(hub, "README.md")
    assert snapshot_download("ann/tiny") == FOLDER
    assert kept() == ["config.json", "generation_config.json", "model.safetensors",
                      "tokenizer.json", "tokenizer_config.json"]
    assert (FOLDER / "model.safetensors").read_bytes() == BODY
    assert (FOLDER / "config.json").read_bytes() == b"config.json"


def test_old_weights_are_taken_if_there_are_no_others_and_what_was_looked_for_is_named(hub, mirror):
    for name, there, parts in (
        ("ann/tiny@v2", "README.md", ("404", "a wrong name?", "ann/tiny", "v2", "config.json")),
        ("ann/tiny", "config.json", ("main", INDEX, "model.safetensors", "pytorch_model.bin")),
    ):
        put_small(hub, there)
        assert [part for part in parts if part not in refusal(name)] == []
    put_large(hub, mirror, "pytorch_model.bin")
    snapshot_download("ann/tiny")
    assert kept() == ["config.json", "pytorch_model.bin"]


def test_only_the_files_that_are_named_come_to_a_folder_of_the_revision(hub, mirror):
    put_model(hub, mirror, revision="refs%2Fpr%2F1")
    name, folder = "ann/tiny@refs/pr/1", Path("data/hub/ann/tiny/refs%2Fpr%2F1")
    assert snapshot_download(name, files=["tokenizer.json", "config.json"]) == folder
    assert kept() == ["config.json", "tokenizer.json"]
    assert [path.split("/")[4] for path, _, _ in hub.log] == ["refs%2Fpr%2F1"] * 2
    assert "vocab.txt" in refusal(name, files=["vocab.txt"])
    files = ["config.json", "tokenizer.json", "chat_template.jinja", "tokenizer.model"]
    snapshot_download(name, files=files)
    hub.log.clear()  # what is missing is remembered, so the next call needs no network
    assert snapshot_download(name, files=files) == folder and hub.log == []


def test_a_name_that_is_none_is_refused_before_anything_is_asked(hub):
    names = "x ../x x/.. a/b/c /a a/ a/b/ a/.b a/b?c a/b#c a\\b/c a/%2e%2e http://h/a/b a/b@ a/b@.."
    for name in ["", "a b/c", "a/b\n", *names.split()]:
        assert ("revision" if "@" in name else "OWNER/NAME") in refusal(name)
    assert hub.log == [] and not Path("data").exists()


@pytest.mark.parametrize("wrong", [
    *("../a", "/etc", "..", "", ".hidden", "a\\b", "C:b", "a%2fb", 5),  # a shard
    *(b"", b"{}", b'{"weight_map": []}', b"[" * 99_999),  # the index
])
def test_an_index_without_plain_file_names_is_refused_before_any_is_asked_for(hub, mirror, wrong):
    put_shards(hub, mirror, SHARDS if isinstance(wrong, bytes) else [*SHARDS, wrong])
    if isinstance(wrong, bytes):
        put_small(hub, INDEX, wrong)
    line = refusal("ann/tiny")
    assert line == f"{FOLDER / INDEX} has no weight_map of plain file names; delete it"
    assert hub.asked[-1] == INDEX and mirror.log == []
    assert kept() == ["config.json", INDEX] and refusal("ann/tiny") == line


def test_shards_come_by_their_index_and_of_half_a_model_only_the_rest_is_asked_for(hub, mirror):
    put_shards(hub, mirror)
    put_large(hub, mirror, "model.safetensors")
    hub.faults[address(SHARDS[1])] = [404]
    assert SHARDS[1] in refusal("ann/tiny")
    hub.log.clear(), mirror.log.clear()
    snapshot_download("ann/tiny")
    assert mirror.asked == [f"{SHARDS[1]}?sign=1"]
    assert not {"config.json", INDEX, SHARDS[0]} & set(hub.asked)
    assert kept() == sorted(["config.json", INDEX, *SHARDS])
    assert [(FOLDER / name).read_bytes() for name in SHARDS] == [BODY, BODY[1000:]]
    hub.log.clear(), mirror.log.clear()
    assert snapshot_download("ann/tiny") == FOLDER
    assert hub.log == mirror.log == []


def test_a_cut_is_mended_by_asking_for_the_rest_in_this_call_or_the_next(hub, mirror):
    """Even of a CDN that names no version: the Hub has named one."""
    put_model(hub, mirror)
    path = "/store/model.safetensors?sign=1"
    mirror.files[path] = BODY, {}
    mirror.faults[path] = [600_000, 503, 503, 503]
    assert "gave up after 4 tries" in refusal("ann/tiny")
    assert not (FOLDER / "model.safetensors").exists()
    snapshot_download("ann/tiny")
    assert (FOLDER / "model.safetensors").read_bytes() == BODY
    first, *others = (wanted for where, wanted, _ in mirror.log if where == path)
    starts = {int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) for wanted in others}
    assert first is None and 300_000 < min(starts) == max(starts) <= 600_000
    assert not list(FOLDER.glob("*.part"))


def test_weights_with_another_sha256_are_not_kept(hub, mirror):
    put_model(hub, mirror)
    put_large(hub, mirror, "model.safetensors", BODY, hashed=BODY[::-1])
    line = refusal("ann/tiny")
    assert "model.safetensors" in line and "arrived damaged: sha256" in line
    assert not list(FOLDER.glob("model*"))


def test_a_renamed_model_is_found_and_the_token_is_for_the_hub_alone(hub, mirror, monkeypatch):
    """The answer before the one that names the hash is a redirect as well."""
    monkeypatch.setenv("HF_TOKEN", " hf_secret\n")
    hub.token = "hf_secret"
    put_model(hub, mirror, repo="ann/new")
    for path in [*hub.files, *hub.redirects]:
        hub.redirects[path.replace("/ann/new/", "/ann/tiny/")] = 307, path, {}
    assert snapshot_download("ann/tiny") == FOLDER
    assert (FOLDER / "model.safetensors").read_bytes() == BODY
    assert {bearer for _, _, bearer in hub.log} == {"Bearer hf_secret"}
    assert len(mirror.log) == 2 and {bearer for _, _, bearer in mirror.log} == {None}
    hub.files["/datasets/a"] = BODY, {}
    fetch("https://huggingface.co/datasets/a")


def test_the_viewer_of_the_hub_is_shown_the_token_and_no_mirror_is(hub, mirror, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert hub_token(f"{VIEWER}/rows") is None
    assert resolve_url("https://github.com/x") == "https://github.com/x"
    monkeypatch.delenv("HF_ENDPOINT")
    assert hub_token(f"{VIEWER}/rows") == "hf_secret" and hub_token(f"{VIEWER}.me/rows") is None
    monkeypatch.setenv("SCRATCHLM_MIRROR", mirror.base)
    assert hub_token(f"{VIEWER}/rows") is None
    put_small(mirror, "config.json", repo="huggingface.co/ann/tiny")
    snapshot_download("ann/tiny", files=["config.json"])
    assert mirror.log == [("/huggingface.co/ann/tiny/resolve/main/config.json", None, None)]


@pytest.mark.parametrize("status", [401, 403])
def test_a_private_or_gated_model_names_the_licence_and_the_token(hub, status, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret\r\nX: y")  # refused, and not shown
    line = refusal("ann/tiny")
    assert "HF_TOKEN" in line and "secret" not in line and hub.log == []
    monkeypatch.delenv("HF_TOKEN")
    hub.always = status
    line = refusal("ann/tiny")
    assert f"HTTP {status}" in line and "licence on https://huggingface.co/ann/tiny and set" in line
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    line = refusal("ann/tiny")
    assert "see that HF_TOKEN is right" in line and "hf_secret" not in line
    assert len(hub.log) == 2 and kept() == []  # never asked twice
    monkeypatch.setenv("SCRATCHLM_MIRROR", hub.base)
    with pytest.raises(UserError, match=r"on https://huggingface\.co/datasets/ann/set and"):
        fetch(f"{VIEWER}/rows?dataset=ann%2Fset&split=train")


def test_a_server_in_trouble_is_asked_four_times(hub, mirror):
    """An optional file that can't be had is not the same as one that isn't there."""
    file = "generation_config.json"
    put_model(hub, mirror)
    hub.faults[address(file)] = [500] * 9
    line = refusal("ann/tiny")
    assert file in line and "gave up after 4 tries (HTTP 500)" in line and "HF_ENDPOINT" in line
    assert hub.asked.count(file) == 4
