"""Data sets of the Hugging Face Hub as files of rows: OWNER/NAME, OWNER/NAME:CONFIG.

The Hub's viewer gives the rows of most of them as JSON, a hundred a page, with the names of labels.
Where it does not, or for OWNER/NAME:FILE, a file of the repository is read, if its format is one of
ours. What has been downloaded is not asked for again.
"""
import contextlib
import io
import re
import sys
from pathlib import Path
from urllib.parse import quote, urlencode

from data.cli import UserError, watched
from data.download import MODELS, VIEWER, download_path, fetch, hub_token
from data.files import read_json
from data.row_files import is_row_file
from data.sources import HUB, made

PART = r"\w(?:[\w.-]{0,94}\w)?"
NAME = re.compile(rf"(({PART})/{PART})(?::(.+))?", re.ASCII)
FILE = re.compile(r"\.(jsonl?|[ct]sv|gz|zip|txt|parquet|arrow|feather|xlsx)$", re.IGNORECASE)
# What the splits are called there; the last name counts most.
SPLITS = {"train": ("train",), "val": ("dev", "val", "valid", "validation"), "test": ("test",)}
PAGE = 100  # rows, the most that the viewer gives at once
MANY = 100_000  # rows that are not downloaded unless --max_rows says so


class ViewerError(Exception):
    """The Hub's viewer does not give the rows of a data set, or cannot be reached."""


def hub_name(name):
    """("OWNER/NAME", what follows it behind a colon or None) if `name` means a data set of the Hub:
    no file or folder here, nor the name of one. Else None."""
    found = NAME.fullmatch(name)
    if not found or Path(found[1]).exists() or Path(name).exists():
        return None
    if found[2] in ("data", "out") or FILE.search(found[1]):
        return None
    return found[1], found[3]


def hub_rows(repo, part, most):
    """{split: path} of a data set's rows: the splits train, validation (as val) and test that it
    has. `part` is None, a configuration, a split that is to be the training rows, or a file of the
    repository; most[split] is the number of rows to download, None for all. UserError if neither
    the viewer nor the repository gives rows, or if `part` is missing or unknown."""
    if part and is_row_file(part):
        return {"train": repository_file(repo, part)}
    try:
        config, names = choose_splits(repo, part, ask("splits", 2, dataset=repo)["splits"])
        paths = {s: viewer_file(repo, config, n, most[s]) for s, n in names.items()}
        return {s: path for s, path in paths.items() if s == "train" or path.stat().st_size}
    except ViewerError as e:
        return repository_files(repo, part or "", e)


def ask(endpoint, tries, **query):
    """The viewer's answer, an object whose list has the endpoint's name; ViewerError without it."""
    try:
        answer = fetch_json(url := f"{VIEWER}/{endpoint}?{urlencode(query)}", tries)
    except UserError as e:
        raise ViewerError(str(e)) from e
    if not isinstance(answer.get(endpoint), list):
        raise ViewerError(f"{url} has no {endpoint}")
    return answer


def fetch_json(url, tries=4):
    """The JSON object at `url`, downloaded without a message: there may be hundreds of them."""
    with contextlib.redirect_stderr(io.StringIO()):
        return read_json(fetch(url, tries=tries, token=hub_token(url)))


def choose_splits(repo, part, splits):
    """(configuration, {our name of a split: its name there}) of what `part` of a data set means."""
    configs = {}
    for s in splits:
        configs.setdefault(s["config"], []).append(s["split"])
    if not configs:
        raise ViewerError(f"{repo} has no splits")
    config = next((c for c in (part, "default") if c in configs), None)
    config = next(iter(configs)) if len(configs) == 1 else config
    if config is None:
        raise UserError(
            f"{repo} has several configurations: name one, as {repo}:{next(iter(configs))}; it has "
            f"{', '.join(configs):.300}"
        )
    there, wanted = configs[config], SPLITS if part in (None, config) else {"train": (part,)}
    names = {ours: name for ours, known in wanted.items() for name in known if name in there}
    if "train" not in names:
        raise UserError(
            f"{repo} has no split {wanted['train'][0]}: name one to learn from, as "
            f"{repo}:{there[0]}; it has {', '.join(there):.300}"
        )
    return config, names


def viewer_file(repo, config, split, most):
    """The path of a file with the first `most` rows of a split, or with all of them."""
    name = "-".join(quote(str(n), safe="") for n in (config, split, most) if n is not None)
    rows = lambda: {name: viewer_rows(repo, config, split, most)}  # noqa: E731
    return made(f"datasets/{repo}", [name], rows)[name]


def viewer_rows(repo, config, split, most):
    """The first `most` rows of a split as the viewer gives them, less those without a label."""

    def page(offset):
        where = dict(dataset=repo, config=config, split=split)
        return ask("rows", 6, **where, offset=offset, length=PAGE)  # patient: it limits rates

    first = page(0)
    rows, total = page_rows(first), first.get("num_rows_total") or 0
    if most is None and total > MANY:
        raise UserError(f"{repo} has {total:,} rows of {split}: say how many by --max_rows")
    count = total if most is None else min(most, total)
    for n in watched(range(PAGE, count, PAGE), f"{repo}: page"):
        try:
            rows += page_rows(page(n))
        except ViewerError as e:
            raise UserError(f"{e}; {n:,} rows of {split} are kept: run this again to go on") from e
    if len(rows) < count:
        kept = download_path(VIEWER).parent
        raise UserError(f"{repo} changed on the Hub while it was downloaded: delete {kept}")
    labelled = [row for row in rows[:count] if row.get("label", "") is not None]
    if bare := count - len(labelled):
        print(f"{repo}: {bare} of {count} rows of {split} have no label: left out", file=sys.stderr)
    return labelled


def page_rows(page):
    """The rows of a page, labels replaced by their names, or by None if there is none (-1)."""
    names = {}
    for feature in page.get("features", ()):
        kind = feature["type"]  # a list or a dict of others if it is nested
        if isinstance(kind, dict) and kind.get("_type") == "ClassLabel":
            names[feature["name"]] = dict(enumerate(kind["names"]))
    rows = (found["row"] for found in page["rows"])
    return [row | {k: known.get(row.get(k)) for k, known in names.items()} for row in rows]


def repository_file(repo, file):
    """The path of a file of a data set's repository."""
    url = f"{HUB}/{repo}/resolve/main/{quote(file)}"
    return fetch(url, token=hub_token(url))


def repository_files(repo, part, reason):
    """{split: path} of those files of a repository that are rows and whose names contain `part`:
    the only one, or those that are called train, validation and test. `reason`: why not the viewer.
    """
    try:
        about = fetch_json(f"{MODELS}/api/datasets/{repo}")
    except UserError as e:
        raise UserError(f"{repo} is no file or folder here, nor can the Hub be asked: {e}") from e
    files = [f["rfilename"] for f in about.get("siblings", ())]
    files = [f for f in files if is_row_file(f) and part in f and "dataset_info" not in f]
    if not files:
        raise UserError(f"{repo} has no file of rows in JSON or CSV, and no viewer: {reason}")
    found = {}
    for split, names in SPLITS.items():
        word = re.compile(rf"(?<![a-z])({'|'.join(names)})(?![a-z])")
        found[split] = [f for f in files if word.search(f.lower())]
    if len(files) == 1:
        found = {"train": files}
    if not found["train"] or max(map(len, found.values())) > 1:
        raise UserError(
            f"{repo} has several files: name one, as {repo}:{files[0]}; {', '.join(files):.300}"
        )
    return {split: repository_file(repo, some[0]) for split, some in found.items() if some}
