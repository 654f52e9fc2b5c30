"""Rows of any public form as examples to fine-tune on: chats, labelled texts, preference pairs.

An example is {"messages", perhaps "tools"}; the same with "chosen" and "rejected", two lists of
messages that continue it; or {"text", "label"}.
"""
import itertools
import json
import re
import sys
from collections import Counter
from functools import partial
from hashlib import sha256
from pathlib import Path

from data import chat
from data.cli import MALFORMED, UserError
from data.files import file_sha256
from data.hub_rows import hub_name, hub_rows
from data.progress import waiting, watched
from data.row_files import is_row_file, read_rows
from data.sources import SOURCES

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("search", "function_call", "call"), "call"),
    **dict.fromkeys(("return", "observation", "tool", "function", "tool_response"), "tool"),
    **{name: name for name in ("system", "developer")},
}
FORMS = (
    "messages or conversations (OpenAI, ShareGPT), instruction and output (Alpaca; Dolly's have a "
    "context), question and answer, query and response, prompt and completion, input and target "
    "(Firefly), chosen and rejected (also HH's transcripts), text and label"
)

# --------------------------------------------------------------------------------------------
# Turns -> messages
# --------------------------------------------------------------------------------------------


class Fields(dict):
    """A JSON object that is read field by field."""

    def take(self, *names, read=lambda value, name: value, needed=False):
        """Remove the first of the fields `names` that exists and is not null, and return
        read(value, name). ValueError if it is `needed`, but is null or a number."""
        there = [name for name in names if name in self]
        name = next((n for n in there if self[n] is not None), (there or names)[0])
        value = self.pop(name, None)
        if needed and (value is None or isinstance(value, (int, float))):
            raise ValueError(f"{name} is {json.dumps(value)}, not text or turns")
        return read(value, name)

    def close(self, unread, where=""):
        """Count the fields that remain, except empty ones, in the Counter `unread`."""
        unread.update(f"{where}{name}" for name, value in self.items() if value not in (None, ""))


def read_json(value, name):
    """The list or object in a field, perhaps as JSON in a text. It may be empty."""
    try:
        found = json.loads(value) if isinstance(value, str) and value else value
    except ValueError as e:
        raise ValueError(f"{name} is {value!r:.40}, not JSON ({e})") from e
    if found and not isinstance(found, (list, dict)):
        raise ValueError(f"{name} is {value!r:.40}, not a list or an object")
    return found


def read_message(turn, unread):
    """The message of a turn of a ShareGPT, OpenAI or hotel conversation."""
    turn = Fields(turn)
    name = turn.take("role", "from")
    role = ROLES.get(str(name).strip().lower())
    if role is None:
        raise ValueError(f"role {name!r} is unknown")
    content = turn.take("content", "value")
    calls = turn.take("tool_calls", "function_call", read=read_json) or []
    if role == "call" and "arguments" in turn:  # a hotel search, named after its role
        calls = {"name": name, "arguments": chat.normalize_numbers(turn.take("arguments"))}
    elif role == "call":  # ShareGPT: {"name": ..., "arguments": {...}}, or a list of such
        calls, content = read_json(content, "the call") or [], None
    elif role == "tool" and not isinstance(content, (str, list)):
        records = chat.normalize_numbers(turn.take("records")) if "records" in turn else content
        content = json.dumps(records, ensure_ascii=False)
    calls = [read_json(call, "a tool call") for call in (calls if type(calls) is list else [calls])]
    calls = list(map(chat.read_call, calls))
    if calls and role not in ("call", "assistant"):
        raise ValueError(f"a turn of {name} has tool calls")
    for call in calls:
        chat.parse_call(call)  # a ValueError if its arguments are not JSON
    role = "assistant" if role == "call" else role
    message = {"role": role, "content": chat.content_text(content), "tool_calls": calls}
    thoughts = "reasoning_content", "reasoning"
    message[thoughts[0]] = turn.take(*thoughts, read=chat.content_text)
    message |= {key: turn.take(key) for key in ("tool_call_id", "name", "weight", "tools")}
    message = {k: v for k, v in message.items() if v not in (None, "", []) or k == "content"}
    if message.get("weight", 1) not in (0, 1):
        raise ValueError(f"the weight is {message['weight']!r}, only 0 and 1 are possible")
    if role in ("user", "assistant") and not calls and not message["content"].strip():
        raise ValueError(f"a turn of {name} has no text")
    turn.close(unread, "turn.")
    return message


def read_messages(turns, unread, role="user"):
    """The messages of a list of turns, or of a text that `role` says. A separate call joins the
    assistant's turn before it."""
    turns = {"role": role, "content": turns} if isinstance(turns, str) else turns
    single, messages = [], []
    for turn in [turns] if isinstance(turns, dict) else turns:
        if not isinstance(turn, dict):
            raise ValueError(f"a turn is not an object but {turn!r:.40}")
        if {"question", "answer"} <= turn.keys():  # two turns in one, as in an Alpaca's history
            single.append({"role": "user", "content": turn["question"]})
            turn = {"role": "assistant", "content": turn["answer"]}
        single.append(turn)
    for turn in single:
        message, last = read_message(turn, unread), messages[-1] if messages else {}
        calls = message.get("tool_calls")
        if calls and not message["content"] and last.get("role") == "assistant":
            messages[-1] = message | last | {"tool_calls": [*last.get("tool_calls", ()), *calls]}
        else:
            messages.append(message)
    return messages


def conversation(messages, row):
    """{"messages", perhaps "tools"} of messages, with the system text and tools of their row."""
    head, rest = chat.split_system(messages)
    system = dict(head[0]) if head else {"role": "system", "content": ""}
    tools = read_json(system.pop("tools", None), "tools")
    tools = tools or row.take("tools", "functions", read=read_json)
    texts = row.take("system", read=chat.content_text), system["content"]
    system["content"] = "\n".join(filter(None, texts))
    messages = [system, *rest] if head or system["content"] else rest
    if not any(m["role"] == "assistant" and m.get("weight", 1) for m in messages):
        raise ValueError("no turn of the assistant, so nothing to learn")
    tools = [tools] if isinstance(tools, dict) else tools
    return {"messages": messages} | ({"tools": tools} if tools else {})


# --------------------------------------------------------------------------------------------
# Rows -> examples
# --------------------------------------------------------------------------------------------

# The fields that hold a conversation, the question before an answer, the answer, and a pair.
TURNS = ("messages", "conversations", "conversation", "items")
QUESTIONS = ("prompt", "question", "query", "instruction", "input")
ANSWERS = ("completion", "output", "target", "answer", "response", "solution")
PAIRS = (
    ("chosen", "preferred_output", "response"),
    ("rejected", "non_preferred_output", "rejected_response"),
)


def transcript(text):
    """The turns of a text in the form of Anthropic's HH, "\n\nHuman: ...\n\nAssistant: ...", whose
    last turn may be empty; anything else as it is."""
    before, *parts = re.split(r"\n\n(Human|Assistant): ?", text) if isinstance(text, str) else [""]
    if len(parts) < 4 or before.strip():
        return text
    turns = [{"from": who.lower(), "value": said.strip()} for who, said in zip(*[iter(parts)] * 2)]
    return turns if turns[-1]["value"] else turns[:-1]


def read_question(row, unread):
    """The messages before an answer: a prompt or question, or Alpaca's history and instruction."""
    turns, names = row.take("history", read=read_json) or (), ("question", "answer")
    turns = [dict(zip(names, t)) if isinstance(t, list) and len(t) == 2 else t for t in turns]
    names = [name for name in ("prompt", "question", "query") if row.get(name) is not None]
    if names:
        text = row.take(*names, needed=True)
    else:  # Alpaca's, or Dolly's with a context
        read = partial(row.take, read=chat.content_text)
        text = "\n".join(filter(None, map(read, ("instruction", "input", "context"))))
    return read_messages(turns, unread) + read_messages(transcript(text), unread)


def read_pair(row, unread):
    """The example of a preference pair. The messages that both sides share become the prompt."""
    if isinstance(row.get("input"), dict):  # OpenAI
        row |= row.pop("input")
    if row.keys() & set(QUESTIONS):
        turns = read_question(row, unread)
    else:
        turns = row.take(*TURNS, needed=any(map(row.get, TURNS))) or []
        turns = read_messages(turns, unread)
    (told, asked), sides = chat.split_system(turns), []
    for names in PAIRS:
        side = read_messages(transcript(row.take(*names, needed=True)), unread, "assistant")
        system, said = chat.split_system(side)
        if not said or said[0]["role"] != "user":
            said = [*asked, *said]
        elif asked and asked[0]["content"].strip() != said[0]["content"].strip():
            raise ValueError(f"{names[0]} begins with another question than the prompt")
        sides.append([*(system or told), *said])
    chosen, rejected = sides
    same = chat.common_length(chosen, rejected)
    if same == len(chosen) == len(rejected):
        raise ValueError("chosen and rejected are the same")
    if not same or any(s[same:] == [] or s[-1]["role"] != "assistant" for s in sides):
        raise ValueError("a pair without a prompt, or a side that does not end with an answer")
    example = conversation(chosen, row)
    messages = example["messages"][: same - len(chosen)]
    return example | {"messages": messages, "chosen": chosen[same:], "rejected": rejected[same:]}


def to_example(row, unread=None):
    """(kind, example) of a row of any known form; the kind is chat, label or prefer. `unread`, a
    Counter, gets the names of fields that nothing reads. ValueError says what is wrong with a row.

    To add a form, recognise its keys here.
    """
    unread = Counter() if unread is None else unread
    row = {"messages": row} if isinstance(row, list) else row
    if not isinstance(row, dict):
        raise ValueError(f"neither an object nor a list of turns but {row!r:.40}")
    row, keys, kind = Fields(row), set(row), "chat"
    rated = None if "text" in keys else row.get("label", row.get("kto_tag"))
    if isinstance(rated, bool) or (rated is not None and {"prompt", "completion"} <= keys):
        raise ValueError("answers rated one by one (KTO) cannot be learned from; pairs can")
    if all(keys & set(names) for names in PAIRS):
        kind, example = "prefer", read_pair(row, unread)
    elif {"context", "response"} <= keys and not keys & set(QUESTIONS):
        # the hotel dialogues as they are published
        context, response = (row.take(n, read=read_json) for n in ("context", "response"))
        turns = [*(context or ()), response]
        example = conversation(read_messages(turns, unread), row)
    elif keys & set(TURNS):
        turns = row.take(*TURNS, read=read_json, needed=True) or []
        example = conversation(read_messages(turns, unread), row)
    elif keys & set(ANSWERS) and keys & set(QUESTIONS):
        messages, answer = read_question(row, unread), row.take(*ANSWERS, needed=True)
        if isinstance(answer, str):
            answer = {"role": "assistant", "content": answer}
            answer["reasoning_content"] = row.take("reasoning_content", "reasoning")
        example = conversation(messages + read_messages(answer, unread), row)
    elif {"text", "label"} <= keys:
        kind, text, label = "label", row.take("text"), chat.normalize_numbers(row.take("label"))
        if not isinstance(text, str) or not text.strip():
            raise ValueError("the text is empty")
        if not isinstance(label, (str, int)) or label == "":
            raise ValueError(f"the label is {label!r:.40}")
        example = {"text": text, "label": str(label)}
    elif keys & set(QUESTIONS):
        names = ", ".join(row)
        raise ValueError(f"no answer beside {names:.80}: add one, for GRPO perhaps a placeholder")
    else:
        raise ValueError(f"no known format has the keys {', '.join(row):.80}; known are {FORMS}")
    row.close(unread)
    return kind, example


def as_chat(example):
    """An example of any kind as a conversation that ends with the chosen answer or the label."""
    if "messages" not in example:
        asked = {"role": "user", "content": example["text"]}
        return {"messages": [asked, {"role": "assistant", "content": example["label"]}]}
    example = {key: value for key, value in example.items() if key != "rejected"}
    return example | {"messages": [*example["messages"], *example.pop("chosen", ())]}


# --------------------------------------------------------------------------------------------
# Files -> examples
# --------------------------------------------------------------------------------------------


def row_slice(text):
    """The slice that --rows START:STOP means, both ends optional."""
    match = re.fullmatch(r"(-?\d+)?:(-?\d+)?", text or ":")
    if not match:
        raise UserError(f"--rows {text} must be START:STOP, as 1000:5001, 1000: or :500")
    return slice(*(int(n) if n else None for n in match.groups()))


def report_bad(bad, total, path):
    """Print the first of `bad`, pairs (row, reason) of `total` rows; UserError if they are over
    1 %."""
    if len(bad) > 0.01 * total:
        raise UserError(f"{path}: {len(bad)} of {total} rows are bad, first {': '.join(bad[0])}")
    for where, why in bad[:5]:
        print(f"bad row: {where}: {why}", file=sys.stderr)
    if bad:
        print(f"{path}: {len(bad)} of {total} rows are bad and left out", file=sys.stderr)


def read_examples(path, rows=None, limit=None, encoding=None):
    """(kind, examples) of a file, or of `row_slice(rows)` of its first `limit` rows. Bad rows are
    named on stderr and left out; UserError if more than 1 % are bad or none is left. Rows that
    continue each other become one conversation again."""
    examples, bad, kind, unread = [], [], None, Counter()
    with waiting(f"reading {path}"):
        found = list(itertools.islice(read_rows(path, encoding), limit))[row_slice(rows)]
    for where, row in watched(found, "reading row"):
        if isinstance(row, UserError):
            bad.append(tuple(str(row).split(": ", 1)))
            continue
        try:
            row_kind, example = to_example(row, unread)
            kind = kind or row_kind
            if row_kind != kind:
                raise ValueError(f"a row of kind {row_kind} among rows of kind {kind}")
            json.dumps(example, ensure_ascii=False).encode()  # fails for a lone surrogate, \ud83d
            examples.append(example)
        except MALFORMED as e:
            bad.append((where, str(e)))
    total = len(examples) + len(bad)
    if not total:
        raise UserError(f"{path} holds no rows" + (f" at --rows {rows}" if rows else ""))
    report_bad(bad, total, path)
    if unread:
        names = ", ".join(f"{name} ({count:,})" for name, count in unread.most_common(12))
        print(f"{path}: fields that are not used, with their rows: {names}", file=sys.stderr)
    if kind == "chat":
        if count := sum(e["messages"][-1]["role"] == "user" for e in examples):
            where = f"{count:,} of {total:,} conversations end with a turn of the user"
            print(f"{path}: {where}, which is left out", file=sys.stderr)
        # the last row of a dialogue teaches the answers of the rows before it, too
        examples = chat.drop_continued(examples, key=lambda e: e["messages"])
    return kind, examples


def first_words(example):
    """What tells conversations apart: the first thing that the user says, or the text."""
    said = (m["content"] for m in example.get("messages", ()) if m["role"] == "user")
    return example.get("text") or next(said, "")


def split_off(examples, fraction):
    """(train, val): about `fraction` of the conversations, always the same ones, with all their
    rows, so that no conversation is learned in part and measured in part. First words that more
    than `fraction` of the rows share are a common greeting: such rows are told apart as a whole."""
    keys = list(map(first_words, examples))
    sizes, most = Counter(keys), max(1, fraction * len(examples))
    for n, key in enumerate(keys):
        if sizes[key] > most:
            keys[n] = json.dumps(examples[n], sort_keys=True)
    order = sorted(set(keys), key=lambda key: sha256(key.encode()).digest())
    if len(order) < 2:
        what = f"{len(examples)} row(s) cannot be split, all are alike"
        raise UserError(f"{what}: give --val_data, or --val 0 to learn from all")
    held = set(order[: min(max(1, round(fraction * len(order))), len(order) - 1)])
    train = [e for key, e in zip(keys, examples) if key not in held]
    return train, [e for key, e in zip(keys, examples) if key in held]


def row_paths(source, limits):
    """{"train", perhaps "val", "test": path} of what --data names; `limits`: see `hub_rows`."""
    if source in SOURCES and SOURCES[source].rows:
        paths = SOURCES[source].fetch()
        return {"val" if split == "dev" else split: path for split, path in paths.items()}
    name = hub_name(str(source))
    return hub_rows(*name, limits) if name else {"train": source}


def load_data(
    source, val_source=None, fraction=0.1, rows=None, max_rows=None, encoding=None, every_row=False
):
    """(kind, {"train", "val", perhaps "test": examples}, {split: sha256}) of --data: a file, a
    named set, a data set of the Hub, or several with commas. `rows` START:STOP is the part of the
    training rows to take of each, `max_rows` the most rows of a split. `fraction` of the training
    rows becomes the validation rows if there are no others (if it is 0, a tenth of the rows is in
    both); with `every_row`, all rows of a file are in both."""
    part, limits = row_slice(rows), dict.fromkeys(("train", "val", "test"), max_rows)
    held = row_paths(val_source, limits) if val_source else {}
    if part.stop is not None and min(part.start or 0, part.stop) >= 0:
        limits["train"] = min(part.stop, max_rows or part.stop)  # no more need be downloaded
    names = [source] if Path(source).exists() else str(source).split(",")
    files = [(name, *item) for name in names for item in row_paths(name, limits).items()]
    if held:
        files = [file for file in files if file[1] != "val"]
        files.append((source, "val", held.get("val", held["train"])))
    kinds, splits, hashes = {}, {}, {}
    for name, split, path in files:
        part, tidy = rows if split == "train" else None, getattr(SOURCES.get(name), "tidy", None)
        kinds[str(path)], examples = read_examples(path, part, max_rows, encoding)
        splits.setdefault(split, []).extend(map(tidy, examples) if tidy else examples)
        hashes[split] = hashes.get(split, "") + file_sha256(path)
    if len(set(kinds.values())) > 1:
        raise UserError(f"the rows of {source} are of different kinds: {kinds}")
    options = dict(rows=rows, max_rows=max_rows, encoding=encoding)  # other rows of the same files
    hashes |= {name: value for name, value in options.items() if value}
    if "val" not in splits and every_row and source not in SOURCES and is_row_file(source):
        splits["val"] = splits["train"]
    elif "val" not in splits and not fraction:
        splits["val"] = splits["train"][::10]
        print(f"[validating on {len(splits['val']):,} rows that are learned]", file=sys.stderr)
    elif "val" not in splits:
        splits["train"], splits["val"] = split_off(splits["train"], fraction)
    return kinds[str(path)], splits, hashes
