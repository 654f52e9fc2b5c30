"""Data sets of the Hugging Face Hub as files of rows: OWNER/NAME, OWNER/NAME:CONFIG.

The Hub's viewer gives the rows of most sets as JSON, a hundred a page. For other sets,
OWNER/NAME:FILE names a file of the repository. Downloads are kept.
"""
import contextlib
import io
import re
import sys
from functools import partial
from pathlib import Path
from urllib.parse import quote, urlencode

from data.cli import UserError
from data.download import REPO, VIEWER, fetch
from data.files import read_json
from data.progress import shown
from data.row_files import is_row_file
from data.sources import HUB, made

NAME = re.compile(rf"({REPO})(?::(.+))?", re.ASCII)
FILE = re.compile(r"\.(jsonl?|[ct]sv|gz|zip|txt|parquet|arrow|feather|xlsx)$", re.IGNORECASE)
# The Hub's names of our splits; the last one that a data set has is used.
SPLITS = {"train": ("train",), "val": ("dev", "val", "valid", "validation"), "test": ("test",)}
PAGE = 100  # rows, the most that the viewer gives at once
MOST_ROWS = 100_000  # larger splits are only downloaded with --max_rows


def hub_name(name):
    """("OWNER/NAME", what follows a colon or None) of a data set of the Hub, None for others."""
    match = NAME.fullmatch(name)
    if not match or Path(match[1]).exists() or Path(name).exists():
        return None
    local = match[1].startswith(("data/", "out/")) or FILE.search(match[1])
    return None if local else match.groups()


def hub_rows(repo, part, limits):
    """{split: path} of a data set's rows: the splits train, validation (as val) and test that it
    has. `part` is None, a configuration, a split to be used as the training rows, or a file of the
    repository; limits[split] is the number of rows to download, None for all. UserError if the
    viewer does not give the rows, or if `part` is missing or unknown."""
    if part and is_row_file(part):
        return {"train": fetch(f"{HUB}/{repo}/resolve/main/{quote(part)}")}
    try:
        splits = ask("splits", dataset=repo)["splits"]
    except UserError as e:
        raise UserError(
            f"{repo} is not a file or folder here, and the Hub's viewer does not give its rows: "
            f"name one of its files, as {repo}:FILE ({e})"
        ) from e
    config, names = choose_splits(repo, part, splits)
    paths = {s: viewer_file(repo, config, name, limits[s]) for s, name in names.items()}
    return {s: path for s, path in paths.items() if s == "train" or path.stat().st_size}


def ask(endpoint, **query):
    """The viewer's answer, an object with a list that is named after the endpoint."""
    url = f"{VIEWER}/{endpoint}?{urlencode(query)}"
    with contextlib.redirect_stderr(io.StringIO()):  # there may be hundreds of downloads
        return read_json(fetch(url))


def choose_splits(repo, part, splits):
    """(configuration, {our name of a split: its name there}) of what `part` of a data set means."""
    configs = list(dict.fromkeys(s["config"] for s in splits))
    config = next((c for c in (part, "default", *configs) if c in configs), None)
    there = [s["split"] for s in splits if s["config"] == config]
    wanted = SPLITS if part in (None, config) else {"train": (part,)}
    names = {ours: name for ours, known in wanted.items() for name in known if name in there}
    several = len(configs) > 1 and config not in (part, "default")
    if "train" in names and not several:
        return config, names
    what = "has several configurations" if several else f"has no split {wanted['train'][0]}"
    choices = (configs if several else there) or ["FILE"]
    raise UserError(
        f"{repo} {what}: name one, as {repo}:{choices[0]}; it has {', '.join(choices):.300}"
    )


def viewer_file(repo, config, split, limit):
    """The path of a file with the first `limit` rows of a split, or with all of them."""
    name = "-".join(quote(str(n), safe="") for n in (config, split, limit) if n is not None)
    rows = partial(viewer_rows, repo, config, split, limit)
    return made(f"datasets/{repo}", [name], lambda: {name: rows()})[name]


def viewer_rows(repo, config, split, limit):
    """The first `limit` rows of a split as the viewer gives them, without unlabelled rows."""
    rows, count, place = [], PAGE, dict(dataset=repo, config=config, split=split)
    with shown(f"{repo}: row", lambda: len(rows)):
        while len(rows) < count:
            page = ask("rows", **place, offset=len(rows), length=PAGE)
            count = page.get("num_rows_total") or 0
            if limit is None and count > MOST_ROWS:
                raise UserError(f"{repo} has {count:,} rows of {split}: say how many by --max_rows")
            count = count if limit is None else min(limit, count)
            rows += page_rows(page)
            if not page["rows"]:  # the set became smaller while it was downloaded
                break
    rows = rows[:limit]
    labelled = [row for row in rows if row.get("label", "") is not None]
    if bare := len(rows) - len(labelled):
        of = f"{bare} of {len(rows)} rows of {split}"
        print(f"{repo}: {of} have no label: left out", file=sys.stderr)
    return labelled


def page_rows(page):
    """The rows of a page, labels replaced by their names, or by None if there is none (-1)."""
    types = {f["name"]: f["type"] for f in page.get("features", ())}  # nested types may be lists
    labels = [k for k, t in types.items() if isinstance(t, dict) and t.get("_type") == "ClassLabel"]
    names = {key: dict(enumerate(types[key]["names"])) for key in labels}
    rows = [entry["row"] for entry in page["rows"]]
    return [row | {key: names[key].get(row.get(key)) for key in labels} for row in rows]
