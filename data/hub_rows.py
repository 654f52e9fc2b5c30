"""Data sets of the Hugging Face Hub as files of rows: OWNER/NAME, OWNER/NAME:CONFIG.

The Hub's viewer gives the rows of most sets as JSON, a hundred a page. For other sets,
OWNER/NAME:FILE names a file of the repository. Downloads are kept.
"""
import contextlib
import io
import sys
from functools import partial
from pathlib import Path
from urllib.parse import quote, urlencode

from data.cli import UserError
from data.download import VIEWER, fetch, is_hub_name
from data.files import read_json
from data.progress import shown
from data.row_files import is_row_file
from data.sources import HUB, made

# The Hub's names of our splits; the last one that a data set has is used.
SPLITS = {"train": ("train",), "val": ("dev", "val", "valid", "validation"), "test": ("test",)}
PAGE = 100  # rows, the most that the viewer gives at once
MOST_ROWS = 100_000  # larger splits are only downloaded with --max_rows


def hub_name(name):
    """("OWNER/NAME", what follows a colon or "") of a data set of the Hub, None for others."""
    repo, _, part = name.partition(":")
    return (repo, part) if is_hub_name(repo) and not Path(name).exists() else None


def hub_rows(repo, part, limits):
    """{split: path} of a data set's rows: the splits train, validation (as val) and test that it
    has. `part` is "", a configuration, a split to be used as the training rows, or a file of the
    repository; limits[split] is the number of rows to download, None for all. UserError if the
    viewer does not give the rows, or if `part` is missing or unknown."""
    if is_row_file(part):
        return {"train": fetch(f"{HUB}/{repo}/resolve/main/{quote(part)}")}
    try:
        splits = ask("splits", dataset=repo)["splits"]
    except UserError as e:
        raise UserError(
            f"{repo} is not a file or folder here, and the Hub's viewer does not give its rows: "
            f"name one of its files, as {repo}:FILE ({e})"
        ) from e
    config, names = choose_splits(repo, part, splits)
    paths = {}
    for ours, name in names.items():
        file = "-".join(quote(str(n), safe="") for n in (config, name, limits[ours]) if n)
        rows = partial(viewer_rows, repo, config, name, limits[ours])
        paths[ours] = made(f"datasets/{repo}", {file: rows})[file]
    return {s: path for s, path in paths.items() if s == "train" or path.stat().st_size}


def ask(endpoint, **query):
    """The viewer's answer, an object with a list that is named after the endpoint."""
    with contextlib.redirect_stderr(io.StringIO()):  # there may be hundreds of downloads
        return read_json(fetch(f"{VIEWER}/{endpoint}?{urlencode(query)}"))


def choose_splits(repo, part, splits):
    """(configuration, {our name: the Hub's name of a split}) that `part` of a data set names."""
    configs = list(dict.fromkeys(s["config"] for s in splits))
    config = next((c for c in (part, "default", *configs) if c in configs), None)
    there = [s["split"] for s in splits if s["config"] == config]
    wanted = SPLITS if part in ("", config) else {"train": (part,)}
    names = {ours: name for ours, known in wanted.items() for name in known if name in there}
    several = len(configs) > 1 and config not in (part, "default")
    if "train" in names and not several:
        return config, names
    what = "has several configurations" if several else f"has no split {wanted['train'][0]}"
    choices = (configs if several else there) or ["FILE"]
    raise UserError(
        f"{repo} {what}: name one, as {repo}:{choices[0]}; it has {', '.join(choices):.300}"
    )


def viewer_rows(repo, config, split, limit):
    """The first `limit` rows of a split as the viewer gives them, labels replaced by their names.
    Rows without a label (-1) are left out."""
    rows, count, place = [], PAGE, dict(dataset=repo, config=config, split=split)
    with shown(f"{repo}: row", lambda: len(rows)):
        while len(rows) < count:
            page = ask("rows", **place, offset=len(rows), length=PAGE)
            count = page.get("num_rows_total") or 0
            if limit is None and count > MOST_ROWS:
                raise UserError(f"{repo} has {count:,} rows of {split}: say how many by --max_rows")
            count = count if limit is None else min(limit, count)
            rows += [entry["row"] for entry in page["rows"]]
            if not page["rows"]:  # the set became smaller while it was downloaded
                break
    rows = rows[:limit]
    for feature in page.get("features", ()):
        name, names = feature["name"], feature["type"]
        if isinstance(names, dict) and names.get("_type") == "ClassLabel":
            names = dict(enumerate(names["names"]))
            rows = [row | {name: names.get(row.get(name))} for row in rows]
    labelled = [row for row in rows if row.get("label", "") is not None]
    if bare := len(rows) - len(labelled):
        of = f"{bare} of {len(rows)} rows of {split}"
        print(f"{repo}: {of} have no label: left out", file=sys.stderr)
    return labelled
