"""Hotels: a search tool, a set of dialogues, invented dialogues, and values exchanged in them.

`sample.py --tools hotel` uses what `get_tools` returns; questions and scores are in data/facts.py.
"""

import itertools
import json
import math
import random
import re
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

from data.chat import drop_continued, parse_call, tool_call
from data.cli import explained
from data.download import DATA
from data.scores import arguments_of

# --------------------------------------------------------------------------------------------
# The hotels and the search
# --------------------------------------------------------------------------------------------

HOTEL_DB = DATA / "hotel" / "hotel_db.json"  # the public one, once fetched
OWN_HOTELS = Path(__file__).with_name("hotels.json")  # a small one of our own invention
# CrossWOZ's fields and what the dialogues call them. Records begin with the fields that replies
# mention most: a number close to the hotel's name is easier to find.
HOTEL_KEYS = {
    "名称": "name", "价格": "price", "评分": "rating", "酒店类型": "type",
    "电话": "phone", "地铁": "subway", "地址": "address", "酒店设施": "facilities",
}  # fmt: skip


def hotel_db():
    """The path of the public database, or of our own small one until `--data hotel` is complete."""
    return HOTEL_DB if HOTEL_DB.exists() else OWN_HOTELS


def read_hotels(path=None):
    """The records of a hotel database: CrossWOZ's [[name, {...}], ...], or a list of records."""
    path = Path(path or hotel_db())
    with explained(f"{path} is not a hotel database"):
        rows = json.loads(path.read_text(encoding="utf-8"))
        if rows and isinstance(rows[0], list):
            rows = [{new: row[old] for old, new in HOTEL_KEYS.items()} for _, row in rows]
        return [
            r | {"facilities": [f.strip() for f in r["facilities"] if f.strip()]} for r in rows
        ]


def search_hotels(
    hotels,
    name: str | None = None,
    type: str | None = None,
    facilities: list | None = None,
    price_range_lower: float | None = None,
    price_range_upper: float | None = None,
    rating_range_lower: float | None = None,
    rating_range_upper: float | None = None,
):
    """The two best rated hotels (records of `read_hotels`) that fit all that is given: a record
    takes 150 tokens, and a small model's context is short. Guests name facilities in their own
    words, so these are compared by their characters."""

    def within(value, low, high):
        if low is None and high is None:
            return True
        return value is not None and (low or 0) <= value <= (math.inf if high is None else high)

    def similar(wanted, offered):
        shared = len(set(wanted) & set(offered))
        return wanted in offered or offered in wanted or shared >= 0.7 * len(set(wanted))

    def fits(h):
        return (
            (not name or name in h["name"] or h["name"] in name)
            and (not type or h["type"] == type)
            and within(h["price"], price_range_lower, price_range_upper)
            and within(h["rating"], rating_range_lower, rating_range_upper)
            and all(any(similar(f, has) for has in h["facilities"]) for f in facilities or ())
        )

    return sorted(filter(fits, hotels), key=lambda h: -(h["rating"] or 0))[:2]


def get_tools():
    """{name: function} for `sample.py --tools hotel`."""
    hotels = read_hotels()
    search = partial(search_hotels, hotels)
    search.needs_no_schema = True  # our hotel model knows it from training
    search.database = f"{len(hotels):,} hotels of {hotel_db()}"
    return {"search": search}


# --------------------------------------------------------------------------------------------
# Dialogues
# --------------------------------------------------------------------------------------------


def join_dialogues(path):
    """The dialogues, lists of turns, of rows {"context": the turns so far, "response": the next},
    both JSON in strings. The fields of records are in the order of HOTEL_KEYS."""
    with explained(f"{path} has no rows of context and response"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        turns = [[*json.loads(r["context"]), json.loads(r["response"])] for r in rows]
        for turn in itertools.chain(*turns):
            for n, r in enumerate(turn.get("records", ())):
                turn["records"][n] = {k: r[k] for k in (*HOTEL_KEYS.values(), *r) if k in r}
    return drop_continued(turns)


# How a guest may ask for each property of a hotel
_WISHES = {
    "type": ("{}的酒店", "{}酒店", "一家{}的"),
    "facilities": ("能提供{}", "有{}", "带{}的", "提供{}服务"),
    "price": ("价格在{0}-{1}元", "{0}到{1}元之间", "预算{0}-{1}元"),
    "rating": ("评分{}分以上", "评分在{}分以上的", "评分不低于{}分"),
}
_OPENINGS = ("你好，帮我找个酒店，", "我想订酒店，", "请推荐一家酒店，", "您好，我要住酒店，")
QUESTIONS = (  # a field, its name, questions that do not name the hotel, the answer
    ("phone", "电话", ("这家酒店的电话是多少？", "电话号码给我一下。"), "{name}的电话是{phone}"),
    ("address", "地址", ("这家酒店在哪里？", "地址是什么？"), "{name}的地址是{address}"),
    ("price", "价格", ("一晚多少钱？", "价格是多少？"), "{name}的价格是{price}元"),
    ("rating", "评分", ("评分怎么样？", "这家的评分是多少？"), "{name}的评分是{rating}分"),
)
# What a question may be about, as `values_of` names it
ASKED = {"tool.name", *(f"tool.{field}" for field, *_ in QUESTIONS)}


def answer_about(record, question):
    """The answer, without a full stop, to one of QUESTIONS about a hotel."""
    field, label, _, answer = question
    if record.get(field) in (None, "", -1):
        return f"{record['name']}的{label}暂时未知"
    return answer.format(**record)


def synthetic_dialogues(count, seed):
    """`count` invented hotel dialogues, lists of turns with the public set's schema."""
    hotels, rng = read_hotels(OWN_HOTELS), random.Random(f"hotel-synthetic {seed}")
    dialogues = []
    for _ in range(count):
        hotel = rng.choice(hotels)  # one that the search finds
        arguments, wishes = {}, []
        for key in rng.sample(sorted(_WISHES), rng.randint(1, 3)):
            wish, values = rng.choice(_WISHES[key]), {key: hotel[key]}
            if key == "price":
                low = int(hotel["price"] // 100 * 100)
                values = {"price_range_lower": low, "price_range_upper": low + 100}
            elif key == "rating":
                low = rng.choice((4, 4.5)) if hotel["rating"] >= 4.5 else 4
                values = {"rating_range_lower": low}
            elif key == "facilities":
                values[key] = rng.sample(hotel[key], rng.randint(1, 2))
            arguments |= values
            texts = ("和".join(v) if isinstance(v, list) else v for v in values.values())
            wishes.append(wish.format(*texts))
        records = search_hotels(hotels, **arguments)
        turns = [
            {"role": "user", "content": rng.choice(_OPENINGS) + "，".join(wishes) + "。"},
            {"role": "search", "arguments": arguments},
            {"role": "return", "records": records},
            {"role": "assistant", "content": f"为您推荐{'、'.join(r['name'] for r in records)}。"},
        ]
        if len(records) == 1 and rng.random() < 0.7:
            question = rng.choice(QUESTIONS)
            turns.append({"role": "user", "content": rng.choice(question[2])})
            answer = answer_about(records[0], question) + "。"
            turns.append({"role": "assistant", "content": answer})
        dialogues.append(turns)
    return dialogues


def tidy_calls(example):
    """The conversation with each call's arguments in an order that is easier to learn: the keys are
    sorted, and lists of texts (sets of wishes) follow the order in which the user named them."""
    said, messages = "", []
    for m in example["messages"]:
        if m["role"] == "user":
            said += "\n" + m["content"]
        calls = []
        for name, arguments in map(parse_call, m.get("tool_calls") or ()):
            arguments = dict(sorted(arguments.items()))
            for key, value in arguments.items():
                if isinstance(value, list) and all(isinstance(v, str) for v in value):
                    arguments[key] = sorted(value, key=lambda v: (v not in said, said.rfind(v), v))
            calls.append(tool_call(name, arguments))
        messages.append(m | {"tool_calls": calls} if calls else m)
    return example | {"messages": messages}


# --------------------------------------------------------------------------------------------
# Augmentation: values are exchanged for others
# --------------------------------------------------------------------------------------------


def values_of(message):
    """(key, value) of each text in a call's arguments ("call.KEY"), and of each text and number in
    the records that a search returned ("tool.KEY")."""
    kind, objects = "call", arguments_of(message) or []
    if message["role"] == "tool":
        kind, objects = "tool", json.loads(message["content"])
    for key, value in (pair for o in objects for pair in o.items()):
        for v in value if isinstance(value, list) else [value]:
            if (isinstance(v, str) and v) or (kind == "tool" and is_number(v)):
                yield f"{kind}.{key}", v


def is_number(value):
    """Whether a JSON value is a number of at least three characters: any text contains a 5."""
    return type(value) in (int, float) and len(str(value)) > 2


def value_pattern(value):
    """The pattern that finds a text, or a number that is not a part of another one."""
    text = re.escape(str(value))
    return text if isinstance(value, str) else rf"(?<![\d.]){text}(?![\d.])"


def is_in(value, text):
    """Whether `value_pattern` finds the value in a text."""
    return str(value) in text and bool(re.search(value_pattern(value), text))


def values_by_key(examples):
    """{"call.KEY" or "tool.KEY": all its values}, from which `substitute` draws. A value that was
    returned under a key may be passed under that key, too, and counts once there."""
    pool = defaultdict(list)
    for key, value in (pair for e in examples for m in e["messages"] for pair in values_of(m)):
        pool[key].append(value)
    for key in [key for key in pool if key.startswith("call.")]:
        pool[key] += dict.fromkeys(pool.get(key.replace("call.", "tool."), ()))
    return pool


def repeats(examples, share=1 / 6):
    """How often each conversation should come in an epoch, 1 to 8 times, so that each argument
    occurs in that share of them: 100 calls in 3,000 are too few to learn to copy a name."""
    keys = [
        {key for m in e["messages"] for passed in arguments_of(m) or () for key in passed}
        for e in examples
    ]
    counts = Counter(itertools.chain(*keys))
    return [min(8, max([1, *(share * len(keys) / counts[k] for k in passed)])) for passed in keys]


def another_value(values, made_up, rng):
    """One of the values. With probability `made_up`, a text is a new one instead: the start of one
    value and the end of another. A model that has seen all values would not need to copy them."""
    a = rng.choice(values)
    if not isinstance(a, str) or rng.random() >= made_up:
        return a
    b = str(rng.choice(values))
    return a[: rng.randint(1, len(a))] + b[rng.randrange(len(b)) :]


def substitute(example, pool, share, rng, made_up=0.5):
    """The conversation with some values exchanged, each everywhere at once.

        user  找一家有健身房的酒店           user  找一家有接机服务的酒店
        call  {"facilities": ["健身房"]}     call  {"facilities": ["接机服务"]}

    With probability `share` another value takes the place of one that a call passes as the user has
    said it, that the assistant says as the search has returned it, or that may be asked for: the
    model has to read it and cannot recall it. Numbers that the user says or a call passes stay.
    """
    texts = {"user": "", "assistant": "", "tool": "", "system": ""}
    for m in example["messages"]:
        texts[m["role"]] += m["content"] + "\n"
    passed = json.dumps([arguments_of(m) for m in example["messages"]], ensure_ascii=False)
    present = {v for m in example["messages"] for _, v in values_of(m)}
    swap, kept = {}, {}  # kept values are matched too, so that a shorter value inside stays
    for m in example["messages"]:
        source = texts["user" if m.get("tool_calls") else "assistant"]
        for key, v in values_of(m):
            kept |= {v: v} if key.startswith("call.") else {}
            free = isinstance(v, str) or not is_in(v, texts["user"] + passed)
            eligible = free and key in pool and (key in ASKED or is_in(v, source))
            if v not in swap and eligible and rng.random() < share:
                taken = present.union(swap.values())  # two values must not become one
                new = (another_value(pool[key], made_up, rng) for _ in range(4))
                if (new := next((n for n in new if n not in taken), None)) is not None:
                    swap[v] = new
    if not swap:
        return example
    new_texts = {str(v): str(new) for v, new in (kept | swap).items()}
    longest_first = sorted(kept | swap, key=lambda v: len(str(v)), reverse=True)
    pattern = re.compile("|".join(map(value_pattern, longest_first)))

    def exchange(value):
        if isinstance(value, str):
            return pattern.sub(lambda match: new_texts[match[0]], value)
        if isinstance(value, list):
            return [exchange(v) for v in value]
        if isinstance(value, dict):
            return {k: exchange(v) for k, v in value.items()}
        return swap.get(value, value) if is_number(value) else value

    messages = []
    for m in example["messages"]:
        new = m | {"content": exchange(m["content"])}
        if m["role"] == "tool":  # not as one text, in which keys and quotes could be exchanged
            records = exchange(json.loads(m["content"]))
            new["content"] = json.dumps(records, ensure_ascii=False)
        if "tool_calls" in m:
            calls = map(parse_call, m["tool_calls"])
            new["tool_calls"] = [tool_call(name, exchange(values)) for name, values in calls]
        messages.append(new)
    return example | {"messages": messages}
