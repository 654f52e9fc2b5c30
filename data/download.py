"""Downloads, the only way by which anything comes from the network: files of any host by `fetch`,
models of the Hugging Face Hub by `snapshot_download`.
"""
import glob
import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from data.cli import UserError
from data.files import file_sha256, git_sha1, write_once

DATA = Path("data")
MB = 1_000_000


# --------------------------------------------------------------------------------------------
# One file
# --------------------------------------------------------------------------------------------


class TransferError(Exception):
    """The transfer broke in a way that trying again may mend."""


class HTTPError(UserError):
    """A server's answer that asking again won't change; `status` is its HTTP code."""

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status


def resolve_url(url):
    """The address to ask in place of `url`: the Hub's mirror from HF_ENDPOINT, then
    SCRATCHLM_MIRROR=BASE, which serves https://host/path as BASE/host/path."""
    hub = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    if hub and url.startswith("https://huggingface.co/"):
        url = hub + url.removeprefix("https://huggingface.co")
    mirror = os.environ.get("SCRATCHLM_MIRROR", "").rstrip("/")
    return f"{mirror}/{url.split('://', 1)[1]}" if mirror else url


def download_path(url):
    """Where `url` is kept: data/downloads/host/path, no part of which can leave that folder."""
    u = urlsplit(url)
    host = u.netloc.strip(".") or "unknown"
    parts = [p for p in unquote(u.path).split("/") if p not in ("", ".", "..")] or ["index.html"]
    if u.query:  # another query is another file
        parts[-1] = hashlib.sha1(u.query.encode()).hexdigest()[:8] + "-" + parts[-1]
    safe = [quote(p, safe=" ()[]+,=@") for p in (host, *parts)]
    return DATA.joinpath("downloads", *safe)


def fetch(url, dest=None, sha256=None, tries=4, wait=1.0, token=None):
    """Download `url` to `dest` (default: `download_path`) unless it is there, and return the path.

    Bytes go to a .part file that is renamed only once it is complete and its sha256, if one is
    given, is right. A cut connection is resumed by a Range request, up to `tries` times with
    doubling pauses from `wait` seconds, and by the next call if the server names versions (ETag).
    A `token` is shown to the host of `url` alone. The Hugging Face Hub says what its files' hashes
    are: they are checked, too. UserError tells of an unreachable host, an HTTP error (HTTPError, if
    it is final), or bytes that are not the wanted ones.
    """
    dest = Path(dest) if dest else download_path(url)

    def is_downloaded():
        return dest.exists() and (sha256 is None or file_sha256(dest) == sha256)

    write_once(dest, is_downloaded, lambda: download(url, dest, sha256, tries, wait, token))
    return dest


def download(url, dest, sha256, tries, wait, token):
    """What `fetch` does where the file is not there."""
    import requests  # not above: most runs download nothing, and it takes longer than all the rest

    url = resolve_url(url)  # what an error names, too
    for attempt in range(tries):
        try:
            part, named = download_part(url, dest, token)
            break
        except (requests.ConnectionError, requests.Timeout, TransferError) as e:
            reason = e
            if attempt < tries - 1:
                time.sleep(wait * 2**attempt)
        except UserError:
            raise
        except (requests.RequestException, ValueError) as e:  # redirects in a circle or to no URL
            raise UserError(f"cannot download {url}: {short(e)}") from e
    else:
        for part in dest.parent.glob(glob.escape(dest.name) + ".once.part"):
            part.unlink()  # no version to compare with: it could never be resumed
        raise UserError(
            f"cannot download {url}: gave up after {tries} tries ({short(reason)}). Offline "
            f"or behind a firewall? Set SCRATCHLM_MIRROR=BASE to read BASE/host/path instead "
            f"(HF_ENDPOINT for the Hugging Face Hub), or put the file at {dest}"
        )
    for wanted in filter(None, (sha256, named)):
        kind, found = ("sha256", file_sha256) if len(wanted) == 64 else ("git's sha1", git_sha1)
        if (got := found(part)) != wanted:
            part.unlink()
            raise UserError(f"{url} arrived damaged: {kind} {got[:12]}…, wanted {wanted[:12]}…")
    os.replace(part, dest)


def short(error):
    """The readable end of a nested requests / urllib3 error, without its object addresses."""
    text = re.sub(r"<[^>]*>:? ?|\(?Caused by |[\w.]*Error\(|[()'\"]", "", str(error))
    return text.strip().split(": ")[-1][:100] or type(error).__name__


def named_hash(answers):
    """The sha256 or git sha1 by which the Hub, in one of its `answers`, names a file's content.

    It stands in X-Linked-ETag, usually of the redirect to the host that holds the bytes. That
    host's own ETag may look like a sha256 and be something else; the Hub's (its answers carry
    X-Repo-Commit) is git's sha1 for a small file. None if nobody names one, as on other servers.
    """
    sha256, sha1 = "[0-9a-f]{64}", "[0-9a-f]{40}"
    tags = [(a.headers.get("X-Linked-ETag", ""), f"{sha256}|{sha1}") for a in answers]
    tags += [(a.headers.get("ETag", ""), sha1) for a in answers if "X-Repo-Commit" in a.headers]
    found = (re.fullmatch(f'(?:W/)?"?({kind})"?', tag) for tag, kind in tags)
    return next((m[1] for m in found if m), None)


def download_part(url, dest, token=None):
    """One attempt at `fetch`: fill dest.VERSION.part, continuing one that is there, and return it
    with the hash that the Hub gives for it, or None."""
    import requests

    ours = re.compile(re.escape(dest.name) + r"\.([0-9a-f]{8}|once)\.part")
    old = next((p for p in dest.parent.glob("*") if ours.fullmatch(p.name)), None)
    have = old.stat().st_size if old and not old.name.endswith(".once.part") else 0
    # identity: with a compressed transfer neither the length nor a Range would mean the file's own
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    # as auth, since a mere header would yield to ~/.netrc; requests drops it on the way elsewhere
    bearer = {"Authorization": f"Bearer {token}"}
    auth = (lambda request: request.headers.update(bearer) or request) if token else None
    with requests.get(url, headers=headers, auth=auth, stream=True, timeout=(10, 60)) as r:
        if r.status_code in (408, 429) or r.status_code >= 500:
            raise TransferError(f"HTTP {r.status_code}")
        named = named_hash([*r.history, r])
        version = named or r.headers.get("ETag") or r.headers.get("Last-Modified")
        version = hashlib.sha1(version.encode()).hexdigest()[:8] if version else "once"
        part = dest.with_name(f"{dest.name}.{version}.part")
        offset = re.match(r"bytes (\d+)-", r.headers.get("Content-Range", ""))
        resumed = r.status_code == 206 and part == old and offset and int(offset[1]) == have
        if have and r.status_code in (206, 416) and not resumed:
            old.unlink()  # another version by now, or more than there is: start over
            raise TransferError("the file changed on the server")
        if r.status_code not in (200, 206):  # nor is a redirect to nowhere the file
            hint = " (private? or a wrong name?)" if r.status_code in (401, 403, 404) else ""
            what = f"HTTP {r.status_code} {r.reason}{hint}"
            raise HTTPError(f"cannot download {url}: {what}", r.status_code)
        if old and not resumed:
            old.unlink()
        have = have if resumed else 0
        length = r.headers.get("Content-Length")
        total = have + int(length) if length else None
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab" if resumed else "wb") as f:
            try:
                for block in progress(r.iter_content(1 << 18), dest.name, have, total):
                    f.write(block)
            except requests.RequestException as e:
                raise TransferError(short(e)) from e
    if total is not None and part.stat().st_size != total:
        raise TransferError(f"{part.stat().st_size:,} of {total:,} bytes came")
    return part, named


def progress(blocks, name, have, total):
    """Pass blocks of bytes through, drawing a line that rewrites itself on a terminal."""
    start, done, shown = time.monotonic(), have, 0.0
    for block in blocks:
        yield block
        done += len(block)
        now = time.monotonic()
        if sys.stderr.isatty() and now - shown > 0.2:
            shown = now
            of = f" of {total / MB:.1f}" if total else ""
            rate = (done - have) / MB / max(now - start, 1e-3)
            print(f"\r{name}  {done / MB:.1f}{of} MB  {rate:.1f} MB/s ", end="", file=sys.stderr)
    print(f"\rdownloaded {name}: {done:,} bytes" + " " * 20, file=sys.stderr)


# --------------------------------------------------------------------------------------------
# Models of the Hugging Face Hub: which files make one, and how to ask for them
# --------------------------------------------------------------------------------------------

MODELS = "https://huggingface.co"
VIEWER = "https://datasets-server.huggingface.co"  # gives rows of the Hub's data sets
GPT2_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # short for openai-community/...
EXTRAS = (  # not all have them
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
INDEX = "model.safetensors.index.json"  # says which file of many holds which tensor
WEIGHTS = (INDEX, "model.safetensors", "pytorch_model.bin")  # the best first


def is_hub_name(name):
    """Does `name` look like a model of the Hub: gpt2, OWNER/NAME, OWNER/NAME@REVISION?"""
    return re.fullmatch(rf"({'|'.join(GPT2_MODELS)}|[\w.-]+/[\w.-]+)(@.*)?", name) is not None


def snapshot_download(name, files=None, check=None):
    """Download a model of the Hugging Face Hub and return its folder, data/hub/OWNER/NAME/REVISION.

    `name` is OWNER/NAME or one of GPT2_MODELS; @ and a branch, tag or commit may follow. What comes
    is config.json, those of EXTRAS that there are, and the first of WEIGHTS that there is (an index
    with all its shards); or else only `files`. What is there is not asked for again, and of a
    whole model nothing is: it works offline, and a branch that has moved on goes unnoticed.
    check(folder) is called before any weights are asked for, and may raise.
    Private and gated models need HF_TOKEN. UserError if a name is bad, a needed file is missing or
    a download fails.
    """
    repo, at, revision = name.partition("@")
    revision = revision if at else "main"
    repo = f"openai-community/{repo}" if repo in GPT2_MODELS else repo
    if not re.fullmatch(r"(\w|\w[\w.-]{0,94}\w)/(\w|\w[\w.-]{0,94}\w)", repo, re.ASCII):
        raise UserError(f"model {name!r} is neither OWNER/NAME nor one of {', '.join(GPT2_MODELS)}")
    if not revision.strip(". "):
        raise UserError(f"revision {revision!r} of {repo} is no branch, tag or commit")
    folder = DATA.joinpath("hub", *repo.split("/"), quote(revision, safe=""))
    if files is not None:
        for file in check_file_names(files, f"what is wanted of {repo}"):
            fetch_of_hub(repo, revision, file, folder)
        return folder
    # the weights come last: where they are whole, the server has been asked for all the rest
    whole = ["config.json", *weight_files(folder)]
    if len(whole) > 1 and all((folder / file).exists() for file in whole):
        return folder
    fetch_of_hub(repo, revision, "config.json", folder)
    for file in EXTRAS:
        fetch_of_hub(repo, revision, file, folder, optional=True)
    if check:
        check(folder)
    if not any(fetch_of_hub(repo, revision, file, folder, optional=True) for file in WEIGHTS):
        raise UserError(f"{repo} has no weights that we read, at {revision}: {', '.join(WEIGHTS)}")
    for file in weight_files(folder):
        fetch_of_hub(repo, revision, file, folder)
    return folder


def check_file_names(names, where):
    """`names`, sorted; UserError if one is no plain file name and so might leave its folder."""
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"\w+((-+|\.)\w+)*", name, re.ASCII):
            raise UserError(f"{where}: {name!r} is no plain file name")
    return sorted(names)


def weight_files(folder):
    """The files that hold the weights in a model's folder: its index's shards, whether they are
    there or not; or the one file; or []. UserError if the index is none or names a strange file."""
    index = folder / INDEX
    if not index.exists():
        return [file for file in WEIGHTS[1:] if (folder / file).exists()][:1]
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{index} has no weight_map of names to files; delete it") from e
    if not shards:
        raise UserError(f"{index} has an empty weight_map; delete it")
    return check_file_names(shards, index)


def hub_token(url):
    """HF_TOKEN, if it is set and it is the Hub (or HF_ENDPOINT in its place) or its viewer that
    `url` asks."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch(r"[!-~]*", token):  # and don't show it
        raise UserError("HF_TOKEN holds spaces or other characters that no token has")
    hub = os.environ.get("HF_ENDPOINT", "").rstrip("/") or MODELS
    hosts = (f"{hub}/", f"{VIEWER}/") if hub == MODELS else f"{hub}/"
    return token if resolve_url(url).startswith(hosts) else None


def fetch_of_hub(repo, revision, file, folder, optional=False):
    """The path of one file of a model, or None if it is `optional` and the Hub has none."""
    url = f"{MODELS}/{repo}/resolve/{quote(revision, safe='')}/{file}"
    token = hub_token(url)
    try:
        return fetch(url, folder / file, token=token)
    except HTTPError as e:
        if e.status == 404 and optional:
            return None
        if e.status == 404:
            why = f"no such model, revision or file: {repo}, {revision}, {file}"
        elif e.status in (401, 403):  # 401 is also what a wrong name gets without a token
            do = "see that HF_TOKEN is right and yours may read it" if token else "set HF_TOKEN"
            why = f"{repo} is private or gated: accept its licence on {MODELS}/{repo} and {do}"
        else:
            raise
        raise UserError(f"cannot download {resolve_url(url)}: HTTP {e.status}: {why}") from e
