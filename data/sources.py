"""Named texts and sets of rows, and where they come from."""

import gzip
import io
import json
import sysconfig
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data.download import DATA, VIEWER, fetch
from data.facts import augment, fact_scores, faithful
from data.files import dump_lines, read_json, write_once, write_whole
from data.hotel import HOTEL_DB, join_dialogues, synthetic_dialogues, tidy_calls
from data.hotel_env import Env

HUB = "https://huggingface.co/datasets"
GITHUB = "https://raw.githubusercontent.com"
REVIEWS = "https://www.cs.cornell.edu/people/pabo/movie-review-data/rt-polaritydata.tar.gz"
LAB = f"{GITHUB}/agiclass/fine-tuning-lab/main/data"
CROSSWOZ = f"{GITHUB}/thu-coai/CrossWOZ/master/data/crosswoz/database"


def stdlib_files():
    """Python's own source, without packages, tests and tables."""
    skip = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3"}
    root = Path(sysconfig.get_path("stdlib"))
    return [p for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts[:-1])]


def download(sha256=None, **urls):
    """{split: path} of files that are used unchanged."""
    return {split: fetch(url, sha256=sha256) for split, url in urls.items()}


def made(name, makers):
    """{split: data/NAME/SPLIT.jsonl} for {split: a function that returns its rows}, which is called
    unless all of the files exist."""
    paths = {split: DATA / name / f"{split}.jsonl" for split in makers}

    def write():
        for split, make in makers.items():
            text = dump_lines(make())
            write_whole(paths[split], lambda f, text=text: f.write(text.encode()))

    write_once(DATA / name, lambda: all(path.exists() for path in paths.values()), write)
    return paths


def film_reviews():
    """Pang and Lee's film review sentences (2005), labelled pos or neg: the first 80 % of each
    class, the next 10 and the last 10, as the Hugging Face set splits them."""

    def rows(start, stop):
        for label in ("pos", "neg"):
            with tarfile.open(fetch(REVIEWS)) as tar:
                text = tar.extractfile(f"rt-polaritydata/rt-polarity.{label}").read()
            lines = text.decode("latin-1").strip("\n").split("\n")
            for line in lines[round(start * len(lines)) : round(stop * len(lines))]:
                yield {"text": line.strip(), "label": label}

    parts = {"train": (0, 0.8), "val": (0.8, 0.9), "test": (0.9, 1)}
    return made("sentiment", {split: partial(rows, *part) for split, part in parts.items()})


def hotel_dialogues():
    """CrossWOZ's hotel dialogues as the course splits them, and the hotels themselves, which come
    last: until all is there, the search knows our own hotels, as before."""

    def rows(split):
        return join_dialogues(fetch(f"{LAB}/{split}.full.jsonl"))

    paths = made("hotel", {split: partial(rows, split) for split in ("train", "dev", "test")})
    fetch(f"{CROSSWOZ}/hotel_db.json", HOTEL_DB)
    return paths


def invented_dialogues():
    """Dialogues of the same kind about the hotels in data/hotels.json, without a network."""
    sizes = {"train": 3000, "dev": 300, "test": 300}
    makers = {split: partial(synthetic_dialogues, n, split) for split, n in sizes.items()}
    return made("hotel-synthetic", makers)


def shards(name, urls, read):
    """[(name, open)] of the files of a large text, for `Documents`. Each is downloaded when it is
    opened, so a limit of tokens limits the downloads. read(path) returns lines of JSON, binary."""
    return [(f"{name}-{i:05}.jsonl", lambda u=url: read(fetch(u))) for i, url in enumerate(urls)]


def fineweb_edu():
    """A sample of 10 billion tokens of FineWeb-Edu (Penedo et al. 2024). The Hub has it only as
    Parquet, but its viewer returns JSON, a hundred rows a page."""
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
    and downloads or makes what is missing. A `separator` stands between the documents of its files.

    `rows` is True for JSON rows that finetune.py takes. What belongs to one set of rows alone:
    `tidy(example)` returns the example as it is to be learned; `augment(examples, share, rng)`
    returns the examples of an epoch, for --augment; `scores(jobs, turns)` returns more figures of
    the answers to jobs; `rewards` are functions as in data/rewards.py; `env` is a class, for --env.
    """

    fetch: Callable
    tokenizer: str = "bpe:4096"
    separator: str | None = None
    rows: bool = False
    tidy: Callable | None = None
    augment: Callable | None = None
    scores: Callable | None = None
    rewards: tuple = ()
    env: Callable | None = None


_SALES = "goendalf666/sales-textbook_for_convincing_and_selling/resolve/main"
SALES = f"{HUB}/{_SALES}/sales_textbook.txt"
SALES_SHA256 = "1994f20f5becd3f0b3d7a632e5a68513cc38cf6c9737a9f38243f1b652e962da"
SHAKESPEARE = f"{GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINY_STORIES = f"{HUB}/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4"
ALPACA_ZH = f"{HUB}/shibing624/alpaca-zh/resolve/main/alpaca_gpt4_data_zh.json"
DPO_ZH = f"{GITHUB}/hiyouga/LLaMA-Factory/main/data/dpo_zh_demo.json"
SHAREGPT = f"{HUB}/openchat/openchat_sharegpt4_dataset/resolve/main/sharegpt_gpt4.json"
HOTEL = dict(
    rows=True, tidy=tidy_calls, augment=augment, scores=fact_scores, rewards=(faithful,), env=Env
)  # fmt: skip

# To add a text or a set of rows, add a line here.
SOURCES = {
    "stdlib": Source(lambda: {"train": stdlib_files()}, "bpe:2048"),
    "sales": Source(partial(download, SALES_SHA256, train=SALES), "cl100k_base"),
    "shakespeare": Source(partial(download, SHAKESPEARE_SHA256, train=SHAKESPEARE), "char"),
    "tinystories": Source(
        partial(download, train=f"{TINY_STORIES}-train.txt", val=f"{TINY_STORIES}-valid.txt"),
        separator="<|endoftext|>",
    ),
    "fineweb-edu": Source(fineweb_edu, "gpt2"),
    "c4": Source(partial(c4, "en/c4-train.", "c4", 1024), "gpt2"),
    "c4-zh": Source(partial(c4, "multilingual/c4-zh.tfrecord-", "c4-zh", 1024), "bpe:16384"),
    "sentiment": Source(film_reviews, rows=True),
    "hotel": Source(hotel_dialogues, **HOTEL),
    "hotel-synthetic": Source(invented_dialogues, **HOTEL),
    "alpaca-zh": Source(partial(download, train=ALPACA_ZH), rows=True),
    "dpo-zh": Source(partial(download, train=DPO_ZH), rows=True),
    "sharegpt": Source(partial(download, train=SHAREGPT), rows=True),
}
ROW_SETS = tuple(name for name, source in SOURCES.items() if source.rows)
# The same reviews, as the course and the Hub call them
SOURCES["rotten_tomatoes"] = SOURCES["sentiment"]
SOURCES["cornell-movie-review-data/rotten_tomatoes"] = SOURCES["sentiment"]
