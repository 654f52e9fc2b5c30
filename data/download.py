"""Downloads: files of any host by `fetch`, models of the Hub by `snapshot_download`."""

import contextlib
import glob
import hashlib
import os
import re
import sys
import time
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from data.cli import UserError
from data.files import file_sha256, read_json, write_json, write_once
from data.progress import shown, waiting

DATA = Path("data")
MB = 1_000_000
MODELS = "https://huggingface.co"
_PART = r"\w(?:[\w.-]{0,94}\w)?"
REPO = rf"{_PART}/{_PART}"  # OWNER/NAME of a model or data set on the Hub
VIEWER = "https://datasets-server.huggingface.co"  # gives rows of the Hub's data sets
OWNERS = dict.fromkeys(("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"), "openai-community/")
OWNERS["bert-base-chinese"] = "google-bert/"  # these models may be named without their owner
EXTRAS = (  # not all models have them
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "tokenizer.model",
)  # fmt: skip
INDEX = "model.safetensors.index.json"  # says which file of many holds which tensor
WEIGHTS = (INDEX, "model.safetensors", "pytorch_model.bin")  # the best first


class HTTPError(UserError):
    """The server refused the request for good; `status` is its HTTP code."""


def resolve_url(url):
    """The address to ask in place of `url`: the Hub's mirror from HF_ENDPOINT, then
    SCRATCHLM_MIRROR=BASE, which serves https://host/path as BASE/host/path."""
    hub = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    if hub and url.startswith(f"{MODELS}/"):
        url = hub + url.removeprefix(MODELS)
    mirror = os.environ.get("SCRATCHLM_MIRROR", "").rstrip("/")
    return f"{mirror}/{url.split('://', 1)[1]}" if mirror else url


def download_path(url):
    """The path at which `url` is kept: data/downloads/host/path, and never outside of it."""
    u = urlsplit(url)
    host = u.netloc.strip(".") or "unknown"
    names = [p for p in unquote(u.path).split("/") if p not in ("", ".", "..")] or ["index.html"]
    if u.query:  # another query is another file
        names[-1] = hashlib.sha1(u.query.encode()).hexdigest()[:8] + "-" + names[-1]
    return DATA.joinpath("downloads", *(quote(p, safe=" ()[]+,=@") for p in (host, *names)))


def fetch(url, dest=None, sha256=None, tries=4, wait=1.0):
    """Download `url` to `dest` (default: `download_path`) unless it is there, and return the path.

    An interrupted download is resumed, by the next call, too. There are `tries` attempts, with
    pauses that double from `wait` seconds. UserError if the host is unreachable, refuses
    (HTTPError), or sends data that does not match `sha256` or the Hub's own hash.
    """
    dest = Path(dest) if dest else download_path(url)
    write_once(
        dest,
        lambda: dest.exists() and (sha256 is None or file_sha256(dest) == sha256),
        lambda: download(url, dest, sha256, tries, wait),
    )
    return dest


def download(url, dest, sha256, tries, wait):
    """Download a file for `fetch`."""
    import requests  # not above: most runs download nothing, and it takes longer than all the rest

    token, address = hub_token(url), resolve_url(url)
    for attempt in range(tries):
        try:
            part, hub_hash = download_part(address, dest, token)
            break
        except HTTPError as e:
            if e.status in (401, 403) and url.startswith((MODELS, VIEWER)):
                remedy = "see that HF_TOKEN is right and may read it" if token else "set HF_TOKEN"
                page = unquote(url).partition("/resolve/")[0]
                page = re.sub(rf"{VIEWER}/.*?dataset=([^&]*).*", rf"{MODELS}/datasets/\1", page)
                # the Hub also answers 401 to a wrong name without a token
                remedy = f"accept its licence on {page} and {remedy}"
                raise UserError(f"{e}: it is private or gated, or not there: {remedy}") from e
            raise
        except (requests.RequestException, ValueError) as e:  # ValueError: a redirect to no URL
            reason = str(e).split(": ")[-1].strip("\"')")[:100] or type(e).__name__
            with waiting(f"{dest.name}: {reason}; try {attempt + 1} of {tries}, waiting"):
                time.sleep(wait * 2**attempt if attempt + 1 < tries else 0)
    else:
        raise UserError(
            f"cannot download {address}: gave up after {tries} tries ({reason}). Offline or behind "
            f"a firewall? Set SCRATCHLM_MIRROR=BASE to read BASE/host/path instead (HF_ENDPOINT "
            f"for the Hugging Face Hub), or put the file at {dest}"
        )
    for wanted in filter(None, (sha256, hub_hash)):
        if (actual := file_sha256(part)) != wanted:
            part.unlink()
            found = f"sha256 {actual[:12]}…, wanted {wanted[:12]}…"
            raise UserError(f"{address} arrived damaged: {found}")
    os.replace(part, dest)


def download_part(url, dest, token):
    """Fill dest.VERSION.part in one attempt, continuing an existing one; return its path and the
    Hub's sha256 of it, or None. VERSION is a hash of the server's ETag or Last-Modified."""
    import requests

    old = next(dest.parent.glob(f"{glob.escape(dest.name)}.????????.part"), None)
    size = old.stat().st_size if old else 0
    # identity: with a compressed transfer neither the length nor a Range would mean the file's own
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={size}-"} if size else {})
    # as auth: ~/.netrc would override a plain header; requests drops it in redirects elsewhere
    bearer = {"Authorization": f"Bearer {token}"}
    auth = (lambda request: request.headers.update(bearer) or request) if token else None
    with waiting(f"asking {urlsplit(url).netloc}"):
        r = requests.get(url, headers=headers, auth=auth, stream=True, timeout=(10, 60))
    with r:
        if r.status_code in (408, 429) or r.status_code >= 500:
            raise requests.ConnectionError(f"HTTP {r.status_code}")
        if r.status_code not in (200, 206) and not (size and r.status_code == 416):
            hint = " (a wrong name?)" if r.status_code == 404 else ""
            error = HTTPError(f"cannot download {url}: HTTP {r.status_code} {r.reason}{hint}")
            error.status = r.status_code
            raise error
        # the Hub names the content of a large file, usually in the redirect to its host
        tags = [answer.headers.get("X-Linked-ETag", "").strip('"') for answer in (*r.history, r)]
        hub_hash = next((tag for tag in tags if re.fullmatch("[0-9a-f]{64}", tag)), None)
        version = hub_hash or r.headers.get("ETag") or r.headers.get("Last-Modified")
        version = version and "." + hashlib.sha1(version.encode()).hexdigest()[:8]
        part = dest.with_name(f"{dest.name}{version or ''}.part")
        resumed = part == old and r.headers.get("Content-Range", "").startswith(f"bytes {size}-")
        if old and not resumed:
            old.unlink()
            if r.status_code != 200:
                raise requests.ConnectionError("the file changed on the server")
        start = size if resumed else 0
        total = start + int(r.headers.get("Content-Length", 0))  # start, if it is not known
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab" if resumed else "wb") as f, shown(f"{dest.name}: byte", f.tell, total):
            for block in r.iter_content(1 << 18):
                f.write(block)
            size = f.tell()
    if size < total:
        raise requests.ConnectionError(f"{size:,} of {total:,} bytes came")
    print(f"downloaded {dest.name}: {size:,} bytes", file=sys.stderr)
    return part, hub_hash


def is_hub_name(name):
    """Whether `name` looks like a model of the Hub (OWNER/NAME@REVISION), not like a path here."""
    path, pattern = Path(name), rf"({'|'.join(OWNERS)}|[\w.-]+/[\w.-]+)(@.*)?"
    in_folder = path.parent != Path() and path.parent.is_dir()
    local = path.exists() or in_folder or path.parts[:1] in (("out",), ("data",))
    return not local and re.fullmatch(pattern, str(name)) is not None


def snapshot_download(name, files=None, check=None):
    """Download a model of the Hugging Face Hub and return its folder, data/hub/OWNER/NAME/REVISION.

    `name` is OWNER/NAME or one of OWNERS; @ and a branch, tag or commit may follow. Downloads
    only `files`, if they are given; else config.json, and the first of WEIGHTS that there is (an
    index with all its shards). Those of EXTRAS may be missing. check(folder) is called before any
    weights are downloaded, and may raise. What is here is not asked for again: this works offline,
    and a branch that has moved on goes unnoticed.
    """
    full_name = OWNERS.get(name.partition("@")[0], "") + name
    match = re.fullmatch(rf"({REPO})(?:@(.*[^. ].*))?", full_name, re.ASCII)
    if not match:
        models = ", ".join(OWNERS)
        raise UserError(f"model {name!r} is not {models} or OWNER/NAME, perhaps with @revision")
    repo, revision = match[1], match[2] or "main"
    folder = DATA.joinpath("hub", *repo.split("/"), quote(revision, safe=""))

    def get(file, optional=False):
        url = f"{MODELS}/{repo}/resolve/{quote(revision, safe='')}/{file}"
        missing = folder / ".no_exist" / file  # the Hub has said that there is none
        if file in EXTRAS and find_tokenizer(folder) and missing.exists():
            return None
        try:
            return fetch(url, folder / file)
        except HTTPError as e:
            if not (optional and e.status == 404):
                raise
            write_json(missing, {})

    # the weights come last: if they are complete, the server has been asked for all the rest
    weights = weight_files(folder)
    if not files and weights and all((folder / f).exists() for f in ("config.json", *weights)):
        return folder
    for file in files or ("config.json", *EXTRAS):
        get(file, optional=file in EXTRAS)
    if files:
        return folder
    if check:
        check(folder)
    if not any(get(file, optional=True) for file in WEIGHTS):
        raise UserError(f"{repo} at {revision} has none of {', '.join(WEIGHTS)}")
    for file in weight_files(folder):
        get(file)
    return folder


def find_tokenizer(folder):
    """The file of the tokenizer in a model's folder, tokenizer.json or tokenizer.model; or None."""
    files = (Path(folder, f"tokenizer.{kind}") for kind in ("json", "model"))
    return next(filter(Path.exists, files), None)


def weight_files(folder):
    """The files that hold the weights in a model's folder: its index's shards, whether they are
    there or not; or the one file; or []. UserError if the index is damaged or names other paths."""
    index = folder / INDEX
    if not index.exists():
        return [file for file in WEIGHTS[1:] if (folder / file).exists()][:1]
    with contextlib.suppress(UserError, KeyError, TypeError, AttributeError):
        shards = sorted(set(read_json(index)["weight_map"].values()))
        if shards and all(re.fullmatch(r"\w+((-+|\.)\w+)*", s, re.ASCII) for s in shards):
            return shards
    raise UserError(f"{index} has no weight_map of plain file names; delete it")


def hub_token(url):
    """HF_TOKEN, if it is set and `url` asks the Hub (or HF_ENDPOINT in its place) or its viewer."""
    hub = os.environ.get("HF_ENDPOINT", "").rstrip("/") or MODELS
    hosts = (f"{hub}/", f"{VIEWER}/") if hub == MODELS else f"{hub}/"
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token or not resolve_url(url).startswith(hosts):
        return None
    if not re.fullmatch(r"[!-~]*", token):  # not shown in the message
        raise UserError("HF_TOKEN holds spaces or other characters that no token has")
    return token
