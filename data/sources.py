"""Texts and sets of rows that have a name: where they come from."""
import gzip
import io
import json
import sysconfig
import tarfile
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from data.cli import UserError
from data.download import DATA, VIEWER, fetch
from data.facts import augment, fact_scores, faithful
from data.files import read_json, write_once, write_whole
from data.hotel import HOTEL_DB, join_dialogues, synthetic_dialogues, tidy_calls

HUB = "https://huggingface.co/datasets"
REVIEWS = "https://www.cs.cornell.edu/people/pabo/movie-review-data/rt-polaritydata.tar.gz"
LAB = "https://raw.githubusercontent.com/agiclass/fine-tuning-lab/main/data"
CROSSWOZ = "https://raw.githubusercontent.com/thu-coai/CrossWOZ/master/data/crosswoz/database"


def stdlib_files():
    """Python's own source: no packages, no tests, and none of the tables that teach nothing."""
    skip = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3"}
    root = Path(sysconfig.get_path("stdlib"))
    return [p for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts[:-1])]


def download(sha256=None, **urls):
    """{split: path} of files that are taken as they are."""
    return {split: fetch(url, sha256=sha256) for split, url in urls.items()}


def made(name, splits, make):
    """{split: data/NAME/SPLIT.jsonl}, written with the rows of `make()`, {split: rows}, unless all
    are there."""
    paths = {split: DATA / name / f"{split}.jsonl" for split in splits}

    def write():
        for split, rows in make().items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_whole(paths[split], lambda f, text=text: f.write(text.encode()))

    write_once(DATA / name, lambda: all(path.exists() for path in paths.values()), write)
    return paths


def film_reviews():
    """Pang and Lee's sentences, labelled pos or neg."""
    splits = ("train", "val", "test")
    return made("sentiment", splits, lambda: split_reviews(fetch(REVIEWS)))


def split_reviews(archive):
    """{split: [{"text", "label"}]} of Pang and Lee's film review sentences (2005): the first 80 %
    of each class, the next 10 and the last 10, as the Hugging Face set cuts them."""
    rows = {"train": [], "val": [], "test": []}
    try:
        with tarfile.open(archive) as tar:
            for label in ("pos", "neg"):
                text = tar.extractfile(f"rt-polaritydata/rt-polarity.{label}").read()
                lines = text.decode("latin-1").strip("\n").split("\n")
                ends = round(0.8 * len(lines)), round(0.9 * len(lines))
                for i, line in enumerate(lines):
                    split = "train" if i < ends[0] else "val" if i < ends[1] else "test"
                    rows[split].append({"text": line.strip(), "label": label})
    except (tarfile.TarError, KeyError, EOFError, zlib.error) as e:
        raise UserError(f"{archive}: damaged, or not the archive of reviews ({e})") from e
    return rows


def hotel_dialogues():
    """CrossWOZ's hotel dialogues as the course has cut them, and the hotels themselves."""
    fetch(f"{CROSSWOZ}/hotel_db.json", HOTEL_DB)
    urls = {split: f"{LAB}/{split}.full.jsonl" for split in ("train", "dev", "test")}
    return made("hotel", urls, lambda: {s: join_dialogues(fetch(url)) for s, url in urls.items()})


def invented_dialogues():
    """The same for the few hotels in data/hotels.json, without a network."""
    sizes = {"train": 3000, "dev": 300, "test": 300}
    rows = lambda: {s: synthetic_dialogues(n, s) for s, n in sizes.items()}  # noqa: E731
    return made("hotel-synthetic", sizes, rows)


def shards(name, urls, read):
    """[(name, open)] of the files of a large text, as `Documents` takes them: each is downloaded
    when it is opened first, so a limit of tokens is one of downloads, too. read(path) is a binary
    stream of lines of JSON."""
    return [
        (f"{name}-{i:05}.jsonl", lambda url=url: read(fetch(url))) for i, url in enumerate(urls)
    ]


def fineweb_edu():
    """A sample of FineWeb-Edu (Penedo et al. 2024) of 10 billion tokens, of which the Hub has files
    of Parquet alone; but its viewer gives JSON, a hundred rows a page."""
    page = f"{VIEWER}/rows?dataset=HuggingFaceFW%2Ffineweb-edu&config=sample-10BT&split=train"
    urls = [f"{page}&offset={n}&length=100" for n in range(0, 9_672_000, 100)]
    return {"train": shards("fineweb-edu", urls, viewer_rows)}


def viewer_rows(path):
    """The rows in a page of the Hub's viewer, as a stream of lines of JSON."""
    rows = [json.dumps(row["row"]) for row in read_json(path)["rows"]]
    return io.BytesIO("".join(f"{row}\n" for row in rows).encode())


def c4(folder, name, count):
    """A language of C4 (Raffel et al. 2020): lines of JSON in many .gz files."""
    url = f"{HUB}/allenai/c4/resolve/main/{folder}"
    files = [f"{url}{i:05}-of-{count:05}.json.gz" for i in range(count)]
    return {"train": shards(name, files, gzip.open)}


class Source(NamedTuple):
    """A text or set that has a name. `fetch()` returns {split: path, list of paths, or `shards`}
    and downloads or makes what is not there; `rows` is True for JSON rows that finetune.py takes.
    A `separator` stands between the documents of its files.

    What belongs to one set of rows alone: `tidy(example)` returns an example as it is learned;
    `augment(examples, share, rng)` the examples of an epoch, for --augment; `scores(jobs, turns)`
    more figures of answers; `rewards` are {name: function}, as in data/rewards.py.
    """

    fetch: Callable
    tokenizer: str = "bpe:4096"
    rows: bool = False
    separator: str | None = None
    tidy: Callable | None = None
    augment: Callable | None = None
    scores: Callable | None = None
    rewards: Mapping = MappingProxyType({})


HOTEL = dict(
    rows=True, tidy=tidy_calls, augment=augment, scores=fact_scores, rewards={"faithful": faithful}
)
# To add a text or a set of rows: a line here.
SOURCES = {
    "stdlib": Source(lambda: {"train": stdlib_files()}, "bpe:2048"),
    "sales": Source(
        partial(
            download,
            "1994f20f5becd3f0b3d7a632e5a68513cc38cf6c9737a9f38243f1b652e962da",
            train=f"{HUB}/goendalf666/sales-textbook_for_convincing_and_selling/resolve/main/"
            "sales_textbook.txt",
        ),
        "cl100k_base",
    ),
    "shakespeare": Source(
        partial(
            download,
            "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            train="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
            "tinyshakespeare/input.txt",
        ),
        "char",
    ),
    "tinystories": Source(
        partial(
            download,
            train=f"{HUB}/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt",
            val=f"{HUB}/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-valid.txt",
        ),
        separator="<|endoftext|>",
    ),
    "fineweb-edu": Source(fineweb_edu, "gpt2"),
    "c4": Source(partial(c4, "en/c4-train.", "c4", 1024), "gpt2"),
    "c4-zh": Source(partial(c4, "multilingual/c4-zh.tfrecord-", "c4-zh", 1024), "bpe:16384"),
    "sentiment": Source(film_reviews, rows=True),
    "hotel": Source(hotel_dialogues, **HOTEL),
    "hotel-synthetic": Source(invented_dialogues, **HOTEL),
    "alpaca-zh": Source(
        partial(
            download, train=f"{HUB}/shibing624/alpaca-zh/resolve/main/alpaca_gpt4_data_zh.json"
        ),
        rows=True,
    ),
    "dpo-zh": Source(
        partial(
            download,
            train="https://raw.githubusercontent.com/hiyouga/LLaMA-Factory/main/data/"
            "dpo_zh_demo.json",
        ),
        rows=True,
    ),
    "sharegpt": Source(
        partial(
            download,
            train=f"{HUB}/openchat/openchat_sharegpt4_dataset/resolve/main/sharegpt_gpt4.json",
        ),
        rows=True,
    ),
}
ROW_SETS = tuple(name for name, source in SOURCES.items() if source.rows)
# The same reviews as the course and the Hub call them.
SOURCES["rotten_tomatoes"] = SOURCES["sentiment"]
SOURCES["cornell-movie-review-data/rotten_tomatoes"] = SOURCES["sentiment"]
