"""Hotels: the search tool, the dialogue sets, invented dialogues, and exchanging values in them.

`sample.py --tools hotel` uses what `get_tools` returns.
"""

import contextlib
import itertools
import json
import math
import random
import re
from collections import Counter
from functools import partial
from pathlib import Path

from data.chat import drop_continued, parse_call, tool_call
from data.cli import UserError
from data.download import DATA

# --------------------------------------------------------------------------------------------
# The hotels and the search
# --------------------------------------------------------------------------------------------

HOTEL_DB = DATA / "hotel" / "hotel_db.json"  # the public one, once fetched
OWN_HOTELS = Path(__file__).with_name("hotels.json")  # a small one of our own invention
# CrossWOZ's fields and what the dialogues call them; a record begins with what replies say the
# most: a number close to the hotel's name is easier to find
HOTEL_KEYS = {
    "名称": "name",
    "价格": "price",
    "评分": "rating",
    "酒店类型": "type",
    "电话": "phone",
    "地铁": "subway",
    "地址": "address",
    "酒店设施": "facilities",
}


def read_hotels(path=None):
    """A hotel database as a list of records: CrossWOZ's [[name, {...}], ...] or one of records as
    they are. Default: the public one if it has been fetched, else our own small one."""
    path = Path(path or (HOTEL_DB if HOTEL_DB.exists() else OWN_HOTELS))
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if rows and isinstance(rows[0], list):
            rows = [{new: row[old] for old, new in HOTEL_KEYS.items()} for _, row in rows]
        rows = [r | {"facilities": [f.strip() for f in r["facilities"] if f.strip()]} for r in rows]
        return list(map(ordered, rows))
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is no hotel database ({e!r})") from e


def ordered(record):
    """The record with its fields in the order of HOTEL_KEYS, others after them."""
    return {k: record[k] for k in (*HOTEL_KEYS.values(), *record) if k in record}


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
    """The hotels (records of `read_hotels`) that fit all that is given, the best rated first, two
    at most: a record takes 150 tokens, and a small model's context is short. Guests name facilities
    in their own words, so these are compared by their characters.
    """

    def within(value, low, high):
        if low is None and high is None:
            return True
        return value is not None and (low or 0) <= value <= (math.inf if high is None else high)

    def offers(hotel, wanted):
        return any(
            wanted in has or has in wanted or len(set(wanted) & set(has)) >= 0.7 * len(set(wanted))
            for has in hotel["facilities"]
        )

    found = [
        h
        for h in hotels
        if (not name or name in h["name"] or h["name"] in name)
        and (not type or h["type"] == type)
        and within(h["price"], price_range_lower, price_range_upper)
        and within(h["rating"], rating_range_lower, rating_range_upper)
        and all(offers(h, f) for f in facilities or [])
    ]
    return sorted(found, key=lambda h: -(h["rating"] or 0))[:2]


def get_tools():
    """{name: function} for `sample.py --tools hotel`."""
    search = partial(search_hotels, read_hotels())
    search.needs_no_schema = True  # our hotel model knows it by training
    return {"search": search}


# --------------------------------------------------------------------------------------------
# Dialogues
# --------------------------------------------------------------------------------------------


def join_dialogues(path):
    """Read dialogues, lists of turns, from a file whose rows are {"context": the turns so far,
    "response": the next one}, both JSON in strings; the records that they hold are `ordered`."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        turns = [[*json.loads(r["context"]), json.loads(r["response"])] for r in rows]
        for turn in itertools.chain(*turns):
            if "records" in turn:
                turn["records"] = list(map(ordered, turn["records"]))
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} holds no rows of context and response ({e!r})") from e
    return drop_continued(turns)


_WAYS = {  # how a guest may ask for each argument
    "type": ("{}的酒店", "{}酒店", "一家{}的"),
    "facilities": ("能提供{}", "有{}", "带{}的", "提供{}服务"),
    "price": ("价格在{0}-{1}元", "{0}到{1}元之间", "预算{0}-{1}元"),
    "rating": ("评分{}分以上", "评分在{}分以上的", "评分不低于{}分"),
}
_OPENINGS = ("你好，帮我找个酒店，", "我想订酒店，", "请推荐一家酒店，", "您好，我要住酒店，")
QUESTIONS = (  # a field, its name, how it is asked for without the hotel's name, the answer
    ("phone", "电话", ("这家酒店的电话是多少？", "电话号码给我一下。"), "{name}的电话是{phone}"),
    ("address", "地址", ("这家酒店在哪里？", "地址是什么？"), "{name}的地址是{address}"),
    ("price", "价格", ("一晚多少钱？", "价格是多少？"), "{name}的价格是{price}元"),
    ("rating", "评分", ("评分怎么样？", "这家的评分是多少？"), "{name}的评分是{rating}分"),
)
# What of a result may be asked for, as `values_of` calls it
ASKED = {"tool.name", *(f"tool.{field}" for field, *_ in QUESTIONS)}


def answer_about(record, question):
    """The answer, without a full stop, to one of QUESTIONS about a hotel."""
    field, what, _, answer = question
    if record.get(field) in (None, "", -1):
        return f"{record['name']}的{what}暂时未知"
    return answer.format(**record)


def synthetic_dialogues(count, seed):
    """`count` invented hotel dialogues, each a list of turns with the public set's schema and exact
    arguments: the same ones for the same seed, on any machine."""
    hotels, rng = read_hotels(OWN_HOTELS), random.Random(f"hotel-synthetic {seed}")
    rows = []
    while len(rows) < count:
        wish = rng.choice(hotels)  # so that something is found
        arguments, words = {}, []
        for key in rng.sample(sorted(_WAYS), rng.randint(1, 3)):
            way = rng.choice(_WAYS[key])
            if key == "price":
                low = int(wish["price"] // 100 * 100)
                arguments |= {"price_range_lower": low, "price_range_upper": low + 100}
                words.append(way.format(low, low + 100))
            elif key == "rating":
                low = rng.choice((4, 4.5)) if wish["rating"] >= 4.5 else 4
                arguments["rating_range_lower"] = low
                words.append(way.format(low))
            elif key == "facilities":
                chosen = rng.sample(wish["facilities"], rng.randint(1, 2))
                arguments[key] = chosen
                words.append(way.format("和".join(chosen)))
            else:
                arguments[key] = wish[key]
                words.append(way.format(wish[key]))
        records = search_hotels(hotels, **arguments)
        names = "、".join(r["name"] for r in records) or "没有找到"
        reply = f"为您推荐{names}。" if records else "抱歉，没有符合要求的酒店。"
        turns = [
            {"role": "user", "content": rng.choice(_OPENINGS) + "，".join(words) + "。"},
            {"role": "search", "arguments": arguments},
            {"role": "return", "records": records},
            {"role": "assistant", "content": reply},
        ]
        if len(records) == 1 and rng.random() < 0.7:
            question = rng.choice(QUESTIONS)
            turns.append({"role": "user", "content": rng.choice(question[2])})
            turns.append(
                {"role": "assistant", "content": answer_about(records[0], question) + "。"}
            )
        rows.append(turns)
    return rows


# --------------------------------------------------------------------------------------------
# Values exchanged for others
# --------------------------------------------------------------------------------------------


def calls_of(message):
    """[(name, arguments)] of the calls of a message."""
    return [parse_call(call) for call in message.get("tool_calls") or ()]


def values_of(message):
    """(key, value) of each text that a call passes or a tool has returned, and of its numbers."""
    objects, kind = [arguments for _, arguments in calls_of(message)], "call"
    if message["role"] == "tool":
        kind = "tool"
        with contextlib.suppress(ValueError, RecursionError):  # a result may be any text
            found = json.loads(message["content"])
            objects = found if isinstance(found, list) else [found]
    for key, value in (pair for o in objects if isinstance(o, dict) for pair in o.items()):
        for v in value if isinstance(value, list) else [value]:
            if (isinstance(v, str) and v) or (kind == "tool" and is_number(v)):
                yield f"{kind}.{key}", v


def is_number(value):
    """Whether a JSON value is a number of three characters or more: a 5 stands in any text."""
    return type(value) in (int, float) and len(str(value)) > 2


def value_pattern(value):
    """The pattern that finds a text, or a number that is not a part of another one."""
    text = re.escape(str(value))
    return text if isinstance(value, str) else rf"(?<![\d.]){text}(?![\d.])"


def is_in(value, text):
    """Whether a text holds a value as `value_pattern` finds it."""
    return str(value) in text and bool(re.search(value_pattern(value), text))


def values_by_key(examples):
    """{"call.KEY" or "tool.KEY": all values it has anywhere}: what `substitute` draws from. What
    tools have returned under a key may be passed, too, and counts once there."""
    pool = {}
    for key, v in (pair for e in examples for m in e["messages"] for pair in values_of(m)):
        pool.setdefault(key, []).append(v)
    for key, values in pool.items():
        if key.startswith("call."):
            values += dict.fromkeys(pool.get(key.replace("call.", "tool."), ()))
    return pool


def repeats(examples, share=1 / 6):
    """How often each conversation should come in an epoch, 1 to 8 times, so that each key that
    calls pass is in that share of them: 100 calls among 3,000 do not teach to copy a name."""
    calls = [[call for m in e["messages"] for call in calls_of(m)] for e in examples]
    keys = [{key for _, arguments in some for key in arguments} for some in calls]
    counts = Counter(key for some in keys for key in some)
    wanted = {key: share * len(keys) / count for key, count in counts.items()}
    return [min(8, max([1, *(wanted[key] for key in some)])) for some in keys]


def another_value(values, made_up, rng):
    """One of the values, or of texts with probability `made_up` one that nobody has said, the start
    of one and the end of another: a model that has seen all values would not need to copy them."""
    a = rng.choice(values)
    if not isinstance(a, str) or rng.random() >= made_up:
        return a
    b = str(rng.choice(values))
    return a[: rng.randint(1, len(a))] + b[rng.randrange(len(b)) :]


def substitute(example, pool, share, rng, made_up=0.5):
    """The conversation with some values exchanged, everywhere in it at once.

        user  找一家有健身房的酒店           user  找一家有接机服务的酒店
        call  {"facilities": ["健身房"]}     call  {"facilities": ["接机服务"]}

    What a call passes as the user has said it, what the assistant says as a tool has returned it,
    and what of a result may be asked for becomes with probability `share` another value: so the
    model has to read it, not to recall it. Numbers that a user has said or a call passes stay.
    """
    said = dict.fromkeys(("user", "call", "tool", "assistant", "system"), "")
    for m in example["messages"]:
        said[m["role"].replace("developer", "system")] += m["content"] + "\n"
        for _, arguments in calls_of(m):
            said["call"] += json.dumps(arguments, ensure_ascii=False) + "\n"
    swap = {}
    for m in example["messages"]:
        source = said["user" if m.get("tool_calls") else "assistant"]
        for key, v in values_of(m):
            free = isinstance(v, str) or not is_in(v, said["user"] + said["call"])
            eligible = free and key in pool and (key in ASKED or is_in(v, source))
            if v not in swap and eligible and rng.random() < share:
                new = another_value(pool[key], made_up, rng)
                if new not in swap.values():  # two values must not become one
                    swap[v] = new
    if not swap:
        return example
    longest_first = sorted(swap, key=lambda v: len(str(v)), reverse=True)
    found = re.compile("|".join(map(value_pattern, longest_first)))
    texts = {str(v): v for v in swap}

    def exchange(value):
        if isinstance(value, str):
            return found.sub(lambda hit: str(swap[texts[hit[0]]]), value)
        if is_number(value):
            return swap.get(value, value)
        if isinstance(value, list):
            return [exchange(v) for v in value]
        return {k: exchange(v) for k, v in value.items()} if isinstance(value, dict) else value

    def exchange_call(call):
        name, old = parse_call(call)
        new = exchange(old)
        return call if new == old else tool_call(name, new, call.get("id"))

    def rewrite(message):
        if message["role"] == "tool":
            with contextlib.suppress(ValueError, RecursionError):
                new = exchange(old := json.loads(message["content"]))
                return {"content": json.dumps(new, ensure_ascii=False)} if new != old else {}
        new = {k: exchange(message[k]) for k in ("content", "reasoning_content") if k in message}
        if "tool_calls" in message:  # JSON stays JSON, its keys stay as they are
            new["tool_calls"] = list(map(exchange_call, message["tool_calls"]))
        return new

    return example | {"messages": [m | rewrite(m) for m in example["messages"]]}


def tidy_calls(example):
    """The hotel conversation with each call's arguments in one order: keys by the alphabet, the
    items of a list as the user has named them, which is easier to copy. What they say stays the
    same: a list of this set is a set of wishes."""
    said, messages = "", []
    for m in example["messages"]:
        if m["role"] == "user":
            said += "\n" + m["content"]
        calls = calls_of(m)
        for _, arguments in calls:
            for key, value in arguments.items():
                if isinstance(value, list) and all(isinstance(v, str) for v in value):
                    arguments[key] = sorted(value, key=lambda v: (v not in said, said.rfind(v), v))
        if calls:
            m = m | {"tool_calls": [tool_call(name, dict(sorted(a.items()))) for name, a in calls]}
        messages.append(m)
    return example | {"messages": messages}
