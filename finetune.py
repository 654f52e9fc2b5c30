"""Fine-tune: from a model that completes text to one that answers.

    python finetune.py --ckpt out/hotel --data hotel            a bot that calls a search tool
    python finetune.py --data sentiment                         label film reviews
    python finetune.py --data my_chats.jsonl --lora_rank 8      a few parameters only
    python finetune.py --data pairs.json                        preference pairs: DPO
    python finetune.py --data my_chats.jsonl --show_mask 2      what is learned, token by token

writes a run like train.py's, by the same loop (train.fit), and predictions.jsonl. What the rows are
is recognised from their shape: chats (Alpaca, ShareGPT, OpenAI messages, hotel dialogues), labelled
texts, preference pairs.

The chapters: the recipe, rows of any shape -> examples, examples -> token rows, rows -> batches,
what is minimised, what is measured, the model and its run, the command line.
"""

import argparse
import contextlib
import gzip
import hashlib
import json
import math
import random
import re
import signal
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C during the slow imports is no traceback; `console` takes over
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.nn.functional as F

import lora
import model as lm
import train
from prepare_data import (
    CHAT_TOKENS,
    SETS,
    DataError,
    Parser,
    Template,
    Tokenizer,
    call_text,
    console,
    default_name,
    drop_continued,
    fetch_set,
    json_rows,
    label_token,
    parse_call,
)
from sample import allowed_ids, chat_prompt, classify, generate, load, newest_run

# --------------------------------------------------------------------------------------------
# The recipe
# --------------------------------------------------------------------------------------------

# Added to train.RECIPE. A model has something to lose here: lower rates than from nothing.
RECIPE = train.RECIPE | dict(
    objective="auto",
    best_by="val_loss",
    epochs=3.0,
    val=0.1,
    split="val",
    loss_on="assistant",
    batch_tokens=4096,
    lr=1e-3,
    embed_lr=3e-3,
    head_lr=3e-3,
    muon_lr=0.01,
    weight_decay=0.0,
    warmup_steps=20,
    eval_every=100,
    eval_rows=64,
    augment=0.0,
    token_dropout=0.0,
    lora_rank=0,
    lora_alpha=None,  # twice the rank
    lora_dropout=0.0,
    lora_targets="all",
    dpo_beta=0.1,
    distill_lambda=0.5,
    distill_temperature=2.0,
)
# Tables are frozen under LoRA (new special tokens apart), so only the one rate counts.
RECIPES = {
    "lora": dict(lr=3e-3),
    "classify": dict(best_by="accuracy"),  # its loss turns up while it still gets better
    "dpo": dict(lr=1e-4, embed_lr=1e-4, head_lr=1e-4, epochs=1.0),
}

# --------------------------------------------------------------------------------------------
# Rows of any shape -> examples: {"messages"}, {"text", "label"} or {"messages", "chosen", ...}
# --------------------------------------------------------------------------------------------

# What the field calls the turns, and what render_chat does.
ROLE_NAMES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("search", "function_call", "call"), "call"),
    **dict.fromkeys(("return", "observation", "tool", "function"), "tool"),
    "system": "system",
}


def whole(value):
    """A JSON value with 500.0 as 500, so that the two are learned as one."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [whole(v) for v in value]
    return {k: whole(v) for k, v in value.items()} if isinstance(value, dict) else value


def call_message(name, arguments):
    """The message of a call; ValueError if `parse_call` could not read it back."""
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    content = call_text(name, whole(arguments))
    if parse_call(content)[0] != name or not name:
        raise ValueError(f"a tool cannot be called {name!r}")
    return {"role": "call", "content": content}


def to_messages(turn):
    """The messages of one turn of a ShareGPT, OpenAI or hotel conversation; ValueError if bad."""
    if not isinstance(turn, dict):
        raise ValueError(f"a turn is no object but {turn!r:.40}")
    name = turn.get("role", turn.get("from"))
    if not isinstance(name, str) or name not in ROLE_NAMES:
        raise ValueError(f"role {name!r} is unknown")
    role, content = ROLE_NAMES[name], turn.get("content", turn.get("value"))
    if role == "call" and "arguments" in turn:  # a hotel search, named after its role
        return [call_message(name, turn["arguments"])]
    if role == "tool" and "records" in turn:
        return [{"role": "tool", "content": json.dumps(whole(turn["records"]), ensure_ascii=False)}]
    out, calls = [], []
    if isinstance(content, str) and content.strip():
        if role == "call" and content.lstrip()[0] not in "[{":  # our own, as /save writes it
            out.append(call_message(*parse_call(content)))
        elif role == "call":  # ShareGPT: {"name": ..., "arguments": {...}}, or a list of such
            calls = json.loads(content)
            calls = calls if isinstance(calls, list) else [calls]
        else:
            out.append({"role": role, "content": content})
    for call in [*calls, *(turn.get("tool_calls") or [])]:
        call = call.get("function", call)  # OpenAI: arguments are JSON inside JSON
        out.append(call_message(call["name"], call.get("arguments", {})))
    if not out:
        raise ValueError(f"a turn of {name} has no text")
    return out


def conversation(turns, before=()):
    """{"messages"} of a list of turns, behind the messages `before` them; ValueError if nothing in
    it is the assistant's."""
    if not isinstance(turns, list):
        raise ValueError("the conversation is no list")
    messages = [m for turn in turns for m in to_messages(turn)]
    if before and messages and messages[0]["role"] == "system":  # two system turns are one
        parts = before[0]["content"], messages.pop(0)["content"]
        before = [before[0] | {"content": "\n".join(filter(None, parts))}]
    messages = [*before, *messages]
    if not any(m["role"] in ("assistant", "call") for m in messages):
        raise ValueError("no turn of the assistant, so nothing to learn")
    return {"messages": messages}


def answer_text(value):
    """The text of a preferred or rejected answer: a string, a turn, or turns that end in it."""
    value = value[-1] if isinstance(value, list) and value else value
    text = value if isinstance(value, str) else to_messages(value)[0]["content"]
    if not text.strip():
        raise ValueError("an answer is empty")
    return text


def to_example(row):
    """(kind, example) of a row of any shape we know, kind being chat, label or prefer. ValueError
    says what is wrong with a row."""
    # To add a format: recognise its keys here.
    if isinstance(row, list):
        return "chat", conversation(row)
    if not isinstance(row, dict):
        raise ValueError(f"neither an object nor a list of turns but {row!r:.40}")
    system, tools = row.get("system") or "", row.get("tools")
    if not isinstance(system, str):
        raise ValueError(f"the system text is no text but {system!r:.40}")
    if isinstance(tools, str):  # JSON inside JSON, or any words
        try:
            tools = json.loads(tools or "[]")
        except ValueError:
            system, tools = "\n".join(filter(None, (system, tools))), None
    before = [{"role": "system", "content": system}] if system or tools else []
    if tools:  # schemas, which each family of templates has its own place for
        before[0]["tools"] = tools if isinstance(tools, list) else [tools]
    if {"chosen", "rejected"} <= set(row):
        turns = row.get("conversations", row.get("messages", row.get("prompt")))
        turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
        pair = {k: answer_text(row[k]) for k in ("chosen", "rejected")}
        if pair["chosen"] == pair["rejected"]:
            raise ValueError("chosen and rejected are the same")
        prompt = [m for turn in turns or [] for m in to_messages(turn)]
        if prompt and prompt[-1]["role"] == "assistant":  # whole conversations as the prompt's end
            prompt.pop()
        if not prompt:
            raise ValueError("a pair without a prompt")
        return "prefer", {"messages": before + prompt, **pair}
    if {"context", "response"} <= set(row):
        context, response = (
            json.loads(v) if isinstance(v, str) else v for v in (row["context"], row["response"])
        )
        return "chat", conversation([*context, response])
    for key in ("messages", "conversations", "items"):  # the last one is openchat's
        if key in row:
            return "chat", conversation(row[key], before)
    if {"instruction", "output"} <= set(row):
        asked = "\n".join(t for t in (row["instruction"], row.get("input")) if t)
        answer = {"role": "assistant", "content": row["output"]}
        return "chat", conversation([{"role": "user", "content": asked}, answer], before)
    if {"text", "label"} <= set(row):
        if not isinstance(row["text"], str) or not row["text"].strip():
            raise ValueError("the text is empty")
        label = whole(row["label"])
        if not isinstance(label, (str, int)) or label == "":
            raise ValueError(f"the label is {label!r:.40}")
        return "label", {"text": row["text"], "label": str(label)}
    raise ValueError(f"no known format has the keys {', '.join(map(str, row))[:80]}")


def read_rows(path):
    """(where it is, row or the error that it is) for each row of a JSON list or of JSON lines."""
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {what}: name a .json or .jsonl file, or {', '.join(SETS)}")
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        return json_rows([raw.decode("utf-8-sig")], str(path))
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise DataError(f"{path} is no JSON in UTF-8 ({e})") from e


MAX_BAD = 0.01  # share of rows that may be bad


def read_examples(path):
    """(kind, examples) of a file. Bad rows are named on stderr and left out; DataError if more than
    1 % are bad or none is left. Rows that continue each other are one conversation again."""
    found, bad, kind = [], [], None
    for where, row in read_rows(path):
        try:
            if isinstance(row, ValueError):
                bad.append(str(row))
                continue
            this, example = to_example(row)
            kind = kind or this
            if this != kind:
                raise ValueError(f"a row of {this} among rows of {kind}")
            json.dumps(example, ensure_ascii=False).encode()  # no half characters, as \ud83d
            found.append(example)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            reason = f"no {e}" if isinstance(e, KeyError) else str(e)
            bad.append(f"{where}: {reason}")
    for message in bad[:5]:
        print(f"bad row: {message}", file=sys.stderr)
    total = len(found) + len(bad)
    if not total:
        raise DataError(f"{path} holds no rows")
    if not found or len(bad) > MAX_BAD * total:
        first = f", first {bad[0]}" if bad else ""
        raise DataError(f"{path}: {len(bad)} of {total} rows are bad{first}")
    if bad:
        print(f"{path}: {len(bad)} of {total} rows are bad and left out", file=sys.stderr)
    if kind == "chat":  # learning a dialogue's last row teaches the answers of all before it
        found = drop_continued(found, key=lambda e: e["messages"])
    return kind, found


def first_words(example):
    """What conversations are told apart by: the first thing the user says, or the text."""
    if "text" in example:
        return example["text"]
    return next((m["content"] for m in example["messages"] if m["role"] == "user"), "")


def split_off(examples, fraction):
    """(train, val): about `fraction` of the conversations, always the same ones, with all their
    rows: no beginning of one is learned while its continuation is measured."""
    groups = {}
    for e in examples:
        groups.setdefault(first_words(e), []).append(e)
    order = sorted(groups, key=lambda words: hashlib.sha256(words.encode()).digest())
    n = min(max(1, round(fraction * len(groups))), len(groups) - 1)
    if len(groups) < 2:
        raise DataError(f"{len(examples)} rows that begin alike cannot be split: give --val_data")
    val = {id(e) for words in order[:n] for e in groups[words]}
    return [e for e in examples if id(e) not in val], [e for e in examples if id(e) in val]


def load_data(source, val_source=None, fraction=0.1):
    """(kind, {"train", "val", perhaps "test": examples}, {split: sha256}) of --data."""
    if source in SETS:
        paths = fetch_set(source)
    else:
        paths = {"train": source}
    if val_source:
        paths["dev"] = val_source
    kinds, parts, hashes = {}, {}, {}
    for split, path in paths.items():
        split = "val" if split == "dev" else split
        kinds[split], examples = read_examples(path)
        parts[split] = [tidy_calls(e) for e in examples] if kinds[split] == "chat" else examples
        hashes[split] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if len(set(kinds.values())) > 1:
        raise DataError(f"{source} and its validation rows are of different kinds: {kinds}")
    if "val" not in parts:
        parts["train"], parts["val"] = split_off(parts["train"], fraction)
    return kinds["train"], parts, hashes


# --------------------------------------------------------------------------------------------
# Examples -> token rows
# --------------------------------------------------------------------------------------------


@dataclass
class Row:
    """Token ids and, for each of them, whether it is to be learned (a target)."""

    ids: list
    mask: list

    def targets(self):
        """The ids to predict after each of ids[:-1]; -100 is none."""
        return [i if m else -100 for i, m in zip(self.ids[1:], self.mask[1:])]


def chat_row(messages, tokenizer, context, loss_on="assistant"):
    """(Row, cut) of a conversation; `cut` says that it was too long.

    Nothing behind the last target is kept, since nothing can be learned from it. What is longer
    than context + 1 ids loses its oldest turns, never the system's; a question and answer that are
    too long by themselves lose the end.
    """
    template = Template(tokenizer)
    turns = template.turns(messages)
    for n, (role, ids, _) in enumerate(turns):
        if loss_on == "all":
            turns[n] = role, ids, [1] * len(ids)
        elif (loss_on == "call" and role != "call") or (loss_on == "last" and n < len(turns) - 1):
            turns[n] = role, ids, [0] * len(ids)
    while turns and not any(turns[-1][2]):
        turns.pop()
    room, cut = context + 1 - len(template.start), False
    while sum(len(ids) for _, ids, _ in turns) > room:
        cut = True
        oldest = 1 if turns[0][0] == "system" else 0
        if len(turns) <= oldest + 2:
            break
        turns.pop(oldest)
    ids = [i for _, part, _ in turns for i in part]
    mask = [m for _, _, part in turns for m in part]
    # a question that leaves no room for its answer loses its beginning: its end takes half the row,
    # or more where the answer is short
    first = mask.index(1) if 1 in mask else 0
    start = max(0, min(first - room // 2, len(ids) - room)) if first >= room else 0
    ids, mask = ids[start : start + room], mask[start : start + room]
    return Row(template.start + ids, [0] * len(template.start) + mask), cut


def label_row(text, label, tokenizer, context, loss_on="assistant"):
    """(Row, cut): the course's form. Only the label is learned, or with `all` the text, too.

    a fine film <|endoftext|> <|label:pos|>
    0 0    0    0             1
    """
    ids = tokenizer.encode(text)
    cut = len(ids) > context - 1
    ids = [*ids[-(context - 1) :], tokenizer.eot]
    mask = [int(loss_on == "all")] * len(ids)
    if label is None:
        return Row(ids, mask), cut
    return Row([*ids, tokenizer.special[label_token(label)]], [*mask, 1]), cut


def pair_rows(example, tokenizer, context):
    """((chosen Row, rejected Row), cut) of a preference pair: one prompt, two endings, of which
    alone anything is learned."""
    rows, cuts = [], []
    for which in ("chosen", "rejected"):
        ending = {"role": "assistant", "content": example[which]}
        row, cut = chat_row([*example["messages"], ending], tokenizer, context, "last")
        rows.append(row)
        cuts.append(cut)
    return tuple(rows), any(cuts)


def make_rows(kind, examples, tokenizer, context, loss_on="assistant"):
    """(rows, how many were cut). Rows without a target, which cannot be learned, are left out."""
    rows, cut = [], 0
    for e in examples:
        if kind == "chat":
            row, was_cut = chat_row(e["messages"], tokenizer, context, loss_on)
        elif kind == "label":
            row, was_cut = label_row(e["text"], e["label"], tokenizer, context, loss_on)
        else:
            row, was_cut = pair_rows(e, tokenizer, context)
        parts = row if kind == "prefer" else (row,)
        if all(any(r.mask[1:]) for r in parts):
            rows.append(row)
            cut += was_cut
    if not rows:
        raise DataError(f"no row has a target for --loss_on {loss_on}: nothing to learn")
    return rows, cut


def values_of(message):
    """(key, value) of each text that a call passes or a tool has returned."""
    objects = []
    if message["role"] == "call":
        objects = [parse_call(message["content"])[1]]
    elif message["role"] == "tool":
        with contextlib.suppress(ValueError, RecursionError):  # a result may be any text
            found = json.loads(message["content"])
            objects = found if isinstance(found, list) else [found]
    for key, value in (pair for o in objects if isinstance(o, dict) for pair in o.items()):
        for v in value if isinstance(value, list) else [value]:
            if isinstance(v, str) and v:
                yield f"{message['role']}.{key}", v


def values_by_key(examples):
    """{"call.KEY" or "tool.KEY": all texts it has anywhere}: what `substitute` draws from."""
    pool = {}
    for key, v in (pair for e in examples for m in e["messages"] for pair in values_of(m)):
        pool.setdefault(key, []).append(v)
    return pool


def substitute(example, pool, share, rng):
    """The conversation with some values exchanged, everywhere in it at once.

        user  找一家有健身房的酒店           user  找一家有接机服务的酒店
        call  {"facilities": ["健身房"]}     call  {"facilities": ["接机服务"]}

    What a call passes as the user has said it, and what the assistant says as a tool has returned
    it, becomes with probability `share` another value that this key has somewhere: so the model has
    to read it, not to recall it.
    """
    said = {"user": "", "assistant": ""}
    for m in example["messages"]:
        if m["role"] in said:
            said[m["role"]] += m["content"] + "\n"
    swap = {}
    for m in example["messages"]:
        source = said["user" if m["role"] == "call" else "assistant"]
        for key, v in values_of(m):
            if v in source and v not in swap and rng.random() < share:
                swap[v] = rng.choice(pool[key])
    if not swap or len(set(swap.values())) < len(swap):
        return example
    longest_first = sorted(swap, key=len, reverse=True)
    found = re.compile("|".join(map(re.escape, longest_first)))

    def exchange(value):
        if isinstance(value, str):
            return found.sub(lambda hit: swap[hit[0]], value)
        if isinstance(value, list):
            return [exchange(v) for v in value]
        return {k: exchange(v) for k, v in value.items()} if isinstance(value, dict) else value

    def rewrite(role, content):
        if role == "call":  # JSON stays JSON, its keys stay as they are
            name, arguments = parse_call(content)
            return call_text(name, exchange(arguments))
        if role == "tool":
            with contextlib.suppress(ValueError, RecursionError):
                new = exchange(old := json.loads(content))
                return content if new == old else json.dumps(new, ensure_ascii=False)
        return exchange(content)

    messages = [m | {"content": rewrite(m["role"], m["content"])} for m in example["messages"]]
    return {"messages": messages}


def tidy_calls(example):
    """The conversation with each call's arguments in one order: keys by the alphabet, the items of
    a list as the user has named them, which is easier to copy. What they say stays the same."""
    said, messages = "", []
    for m in example["messages"]:
        if m["role"] == "user":
            said += "\n" + m["content"]
        if m["role"] == "call":
            name, arguments = parse_call(m["content"])
            for key, value in arguments.items():
                if isinstance(value, list) and all(isinstance(v, str) for v in value):
                    arguments[key] = sorted(value, key=lambda v: (v not in said, said.rfind(v), v))
            m = m | {"content": call_text(name, dict(sorted(arguments.items())))}
        messages.append(m)
    return example | {"messages": messages}


def show_mask(rows, tokenizer, count):
    """Print rows token by token: what is learned in green, the rest grey (plain in a file: a * in
    front of what is learned), with ids."""
    color = sys.stdout.isatty()
    for number, row in enumerate(rows[:count], start=1):
        print(f"--- row {number}: {len(row.ids)} tokens, {sum(row.mask)} of them learned ---")
        for at, (i, m) in enumerate(zip(row.ids, row.mask)):
            text = repr(tokenizer.decode([i]))[1:-1]
            if color:
                print(f"\033[{'32' if m else '90'}m{text}\033[0m", end="")
            else:
                print(f"{at:5} {'*' if m else ' '} {i:7} {text}")
        if color:
            print(f"\nids {row.ids}")


# --------------------------------------------------------------------------------------------
# Rows -> batches: a pure function of (seed, number)
# --------------------------------------------------------------------------------------------


def pad(rows):
    """(ids, targets), both (B, T), of rows; short ones are filled with id 0 and -100 behind."""
    T = max(len(r.ids) for r in rows) - 1
    ids = torch.zeros(len(rows), T, dtype=torch.long)
    targets = torch.full((len(rows), T), -100)
    for b, r in enumerate(rows):
        ids[b, : len(r.ids) - 1] = torch.tensor(r.ids[:-1])
        targets[b, : len(r.ids) - 1] = torch.tensor(r.targets())
    return ids, targets


def pad_pairs(pairs, reference):
    """(ids, targets, reference): the chosen rows, then the rejected ones, and (P, 2) log
    probabilities under the reference model."""
    rows = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    return *pad(rows), torch.as_tensor(reference, dtype=torch.float32).view(-1, 2)


def pack(rows, context):
    """(ids, positions, segments, targets), each (B, context): as many rows in a window as fit.

        ids        a b c d e . .      two rows, a filler
        positions  0 1 2 0 1 0 0
        segments   1 1 1 2 2 0 0      attention stays inside one number: see `block_mask`
    """
    windows, room = [], []
    for r in sorted(rows, key=lambda r: -len(r.ids)):
        size = len(r.ids) - 1
        at = next((w for w, left in enumerate(room) if left >= size), None)
        if at is None:
            at = len(windows)
            windows.append([])
            room.append(context)
        windows[at].append(r)
        room[at] -= size
    ids, positions, segments = torch.zeros(3, len(windows), context, dtype=torch.long)
    targets = torch.full((len(windows), context), -100)
    for b, window in enumerate(windows):
        at = 0
        for number, r in enumerate(window, start=1):
            here = slice(at, at + len(r.ids) - 1)
            ids[b, here] = torch.tensor(r.ids[:-1])
            targets[b, here] = torch.tensor(r.targets())
            positions[b, here] = torch.arange(len(r.ids) - 1)
            segments[b, here] = number
            at = here.stop
    return ids, positions, segments, targets


def block_mask(segments):
    """(B, 1, T, T) bools for packed rows (segments (B, T)): each token sees those before it in its
    own row, and itself."""
    same = segments[:, :, None] == segments[:, None, :]
    return (same & lm.causal_mask(*same.shape[1:], segments.device))[:, None]


class Batches:
    """All rows of an epoch, in batches of similar lengths, in another order each epoch.

    A batch holds at most `batch_tokens` padded tokens (or one row). Batch n of the whole run is
    always the same, so resuming needs only the step. `epoch_rows(epoch)`, if given, makes each
    epoch's rows anew (augmentation); the batches of any epoch are as many as the first one's.
    """

    def __init__(self, rows, batch_tokens, seed, epoch_rows=None):
        self.rows, self.batch_tokens, self.seed = rows, batch_tokens, seed
        self.epoch_rows, self.epoch = epoch_rows, None
        self.per_epoch = len(self.cut(range(len(rows)), rows))

    def length(self, row):
        """Tokens that a row fills, the longer of a pair."""
        return max(len(r.ids) for r in (row if isinstance(row, tuple) else (row,))) - 1

    def cut(self, order, rows):
        """Lists of row numbers, about one length in each."""
        batches = []
        for i in sorted(order, key=lambda i: self.length(rows[i])):
            size = self.length(rows[i]) * (2 if isinstance(rows[i], tuple) else 1)
            if not batches or (len(batches[-1]) + 1) * size > self.batch_tokens:
                batches.append([])
            batches[-1].append(i)
        return batches

    def get(self, number):
        """(row numbers, rows) of batch `number` of the run."""
        epoch, at = divmod(number, self.per_epoch)
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self.now = self.epoch_rows(epoch) if self.epoch_rows else self.rows
            # sorted() keeps the shuffled order among rows of one length
            self.batches = self.cut(rng.permutation(len(self.now)).tolist(), self.now)
            rng.shuffle(self.batches)
            self.epoch = epoch
        # rows made anew may give more batches or fewer: some are left out then, or come again
        chosen = self.batches[at % len(self.batches)]
        return chosen, [self.now[i] for i in chosen]


# --------------------------------------------------------------------------------------------
# What is minimised
# --------------------------------------------------------------------------------------------


def packed_loss(model, ids, positions, segments, targets):
    """The plain loss, for batches from `pack`."""
    return model(ids, targets, positions=positions, mask=block_mask(segments))


def drop_tokens(ids, share, end, rng):
    """ids with a random `share` of them replaced by `end`: a model that sees few texts must not
    lean on any one word of them."""
    gone = torch.from_numpy(rng.random(ids.shape) < share)
    return torch.where(gone, end, ids)


def dpo_margin(model, ids, targets, reference):
    """By how much more than the reference does `model` like each answer? (P, 2): log probabilities
    of chosen and rejected, less the reference's, for batches from `pad_pairs`."""
    logps = model(ids, targets, each=True).sum(1)  # (2 P,)
    return torch.stack(logps.chunk(2), dim=1) - reference


def dpo_loss(model, ids, targets, reference, beta):
    """-log sigmoid(beta * (gain of chosen - gain of rejected)), summed over pairs. Rafailov et al.
    2023, equation 7."""
    chosen, rejected = dpo_margin(model, ids, targets, reference).unbind(1)
    return -F.logsigmoid(beta * (chosen - rejected)).sum()


def distill_loss(model, ids, targets, teacher, share, temperature):
    """share * cross-entropy + (1 - share) * T^2 * KL(teacher || model), both softened by T, summed
    over the targets. Hinton et al. 2015, section 2."""
    keep = targets != -100
    logits = model(ids)[keep].float()  # (N, V)
    with torch.no_grad():
        goal = teacher(ids)[keep].float()
    V, T = min(logits.shape[1], goal.shape[1]), temperature  # spare rows may differ
    ours, theirs = (x[:, :V].div(T).log_softmax(-1) for x in (logits, goal))
    kl = F.kl_div(ours, theirs, reduction="sum", log_target=True)
    return share * F.cross_entropy(logits, targets[keep], reduction="sum") + (1 - share) * T**2 * kl


# --------------------------------------------------------------------------------------------
# What is measured
# --------------------------------------------------------------------------------------------


def slot_counts(predicted, reference):
    """(right, predicted, wanted) values of two argument dicts, the items of a list one by one, as
    the course counts them; None for `predicted` means no arguments at all."""

    def values(arguments):
        items = ((k, v if isinstance(v, list) else [v]) for k, v in (arguments or {}).items())
        return Counter((k, json.dumps(whole(v), sort_keys=True)) for k, vs in items for v in vs)

    ours, wanted = values(predicted), values(reference)
    return (ours & wanted).total(), ours.total(), wanted.total()


def bleu4(prediction, reference):
    """Sentence BLEU over characters, n-grams of 1 to 4 (Papineni et al. 2002), from 0 to 1; the
    k-th precision that is zero counts as 1 / (2^k * n-grams), NLTK's smoothing method 3."""
    prediction, reference = prediction.strip(), reference.strip()
    if not set(prediction) & set(reference):
        return 0.0
    total, zeros = 0.0, 0
    for n in range(1, 5):
        ours, wanted = (
            Counter(text[i : i + n] for i in range(len(text) - n + 1))
            for text in (prediction, reference)
        )
        right, count = (ours & wanted).total(), max(1, ours.total())
        if not right:
            zeros += 1
            right = 0.5**zeros
        total += math.log(right / count) / 4
    short = min(0.0, 1 - len(reference) / len(prediction))  # log of the brevity penalty
    return math.exp(total + short)


def confusion(predicted, wanted, n):
    """(n, n) counts, a row for what was wanted, a column for what was predicted."""
    table = np.zeros((n, n), dtype=int)
    np.add.at(table, (wanted, predicted), 1)
    return table


def macro_f1(table):
    """The mean over classes of 2 * right / (predicted + wanted), from a confusion matrix."""
    return float(np.mean(2 * table.diagonal() / np.maximum(1, table.sum(0) + table.sum(1))))


def answer_jobs(examples, limit=None):
    """[(messages before, the turn to be answered)] of chats, or `limit` of them evenly spread."""
    jobs = [
        (e["messages"][:i], m)
        for e in examples
        for i, m in enumerate(e["messages"])
        if m["role"] in ("assistant", "call") and i
    ]
    if not limit or limit >= len(jobs):
        return jobs
    return [jobs[i * len(jobs) // limit] for i in range(limit)]


def answer(model, tokenizer, jobs, max_tokens=160, batch=48):
    """The model's greedy turn for each of `answer_jobs`, in their order."""
    max_tokens = min(max_tokens, model.config.context // 2)
    room = model.config.context - max_tokens
    prompts = [chat_prompt(before, tokenizer, room) for before, _ in jobs]
    order = sorted(range(len(jobs)), key=lambda j: len(prompts[j]))
    template, allowed = Template(tokenizer), allowed_ids(model, tokenizer, chat=True)
    said = {j: [] for j in order}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        rows = generate(
            model,
            [prompts[j] for j in chosen],
            max_tokens,
            temperature=0.0,
            allowed=allowed,
            stop=lambda r, i: i == template.end,
        )
        for new in rows:
            for j, i in zip(chosen, new):
                if i is not None:
                    said[j].append(i)
    return [template.parse(said[j]) for j in range(len(jobs))]


def chat_scores(jobs, turns):
    """A dict of what can be counted: where a tool should be called slot precision, recall and F1
    and the share of calls that parse; elsewhere BLEU-4 (a call in that place scores 0)."""
    slots, parsed, bleu = [0, 0, 0], [], []
    for (_, wanted), got in zip(jobs, turns):
        same = got["role"] == wanted["role"]
        if wanted["role"] == "assistant":
            bleu.append(bleu4(got["content"], wanted["content"]) if same else 0.0)
            continue
        try:
            arguments = parse_call(got["content"])[1] if same else None
        except ValueError:
            arguments = None
        parsed.append(arguments is not None)
        counts = slot_counts(arguments, parse_call(wanted["content"])[1])
        slots = [total + n for total, n in zip(slots, counts)]
    scores, (right, predicted, wanted) = {}, slots
    if parsed:
        scores |= dict(slot_p=right / max(1, predicted), slot_r=right / max(1, wanted))
        scores |= dict(slot_f1=2 * right / max(1, predicted + wanted))
        scores |= dict(valid_json=sum(parsed) / len(parsed))
    return scores | (dict(bleu4=sum(bleu) / len(bleu)) if bleu else {})


class Measure:
    """What `fit` asks for at an evaluation, over the rows and examples of one split.

    rows: what was made of `examples`, cut into `batches`. Models come in any mode and go back so.
    """

    def __init__(self, kind, examples, rows, tokenizer, runtime, args, labels=(), reference=None):
        self.kind, self.examples, self.rows, self.tokenizer = kind, examples, rows, tokenizer
        self.runtime, self.args, self.labels, self.reference = runtime, args, labels, reference
        self.batches = Batches(rows, args.batch_tokens, 0).cut(range(len(rows)), rows)

    def __call__(self, model, final=True):
        scores = {"chat": self.chat, "label": self.label, "prefer": self.prefer}[self.kind]
        with lm.evaluating(model), self.runtime.autocast():
            return self.runtime.of_first(scores(model, final))

    def chat(self, model, final):
        """Loss a target, and how the answers to some of the questions score, which only rank 0
        writes; `report` answers them all in the end."""
        loss, count = 0.0, 0
        for chosen in self.batches[self.runtime.rank :: self.runtime.world]:
            ids, targets = pad([self.rows[i] for i in chosen])
            loss += float(model(ids.to(self.runtime.device), targets.to(self.runtime.device)))
            count += int((targets != -100).sum())
        loss, count = self.runtime.total(loss, count)
        if final or not self.args.eval_rows or self.runtime.rank > 0:
            return {"val_loss": loss / count}
        jobs = answer_jobs(self.examples, self.args.eval_rows)
        return {"val_loss": loss / count} | chat_scores(jobs, answer(model, self.tokenizer, jobs))

    def label(self, model, final):
        """Loss and accuracy over the label tokens alone."""
        logps, wanted = self.label_logps(model)
        table = confusion(logps.argmax(1).numpy(), wanted.numpy(), len(self.labels))
        accuracy = float((logps.argmax(1) == wanted).float().mean())
        loss = float(F.nll_loss(logps, wanted))
        return {"val_loss": loss, "accuracy": accuracy, "f1": macro_f1(table)}

    def label_logps(self, model):
        """(log probabilities of the labels (N, L), the right ones (N,))."""
        t, context = self.tokenizer, model.config.context
        prompts = [label_row(e["text"], None, t, context)[0].ids for e in self.examples]
        goals = [t.special[label_token(name)] for name in self.labels]
        wanted = torch.tensor([self.labels.index(e["label"]) for e in self.examples])
        return classify(model, prompts, goals), wanted

    def gains(self, model):
        """`dpo_margin` of all pairs, (N, 2); without a reference the log probabilities as such."""
        out = torch.zeros(len(self.rows), 2)
        zero = torch.zeros_like(out)
        for chosen in self.batches:
            known = (zero if self.reference is None else self.reference)[chosen]
            batch = pad_pairs([self.rows[i] for i in chosen], known)
            out[chosen] = dpo_margin(model, *(t.to(self.runtime.device) for t in batch)).cpu()
        return out

    def prefer(self, model, final):
        """DPO's loss; rewards (beta times the gain) of chosen and rejected answers, how often the
        first is the larger, and by how much."""
        good, bad = (self.args.dpo_beta * self.gains(model)).unbind(1)
        return {
            "val_loss": float(-F.logsigmoid(good - bad).mean()),
            "reward_accuracy": float((good > bad).float().mean()),
            "reward_chosen": float(good.mean()),
            "reward_rejected": float(bad.mean()),
            "reward_margin": float((good - bad).mean()),
        }


def report(model, measure, out):
    """Everything about one split, of a model in evaluation mode: figures over all of it, a few
    answers beside the references or the confusion matrix, predictions.jsonl in folder `out`.
    Returns the figures."""
    rows, tokenizer = [], measure.tokenizer
    if measure.kind == "chat":
        jobs = answer_jobs(measure.examples)
        turns = answer(model, tokenizer, jobs)
        scores = chat_scores(jobs, turns)
        for (before, wanted), got in zip(jobs, turns):
            asked = before[-1]["content"]
            rows.append({"prompt": asked, "reference": wanted, "prediction": got})
        for row in rows[:: max(1, len(rows) // 4)][:4]:
            print(f"  asked      {shorten(row['prompt'])}")
            print(f"  reference  {shorten(row['reference']['content'])}")
            print(f"  answered   {shorten(row['prediction']['content'])}\n")
    else:
        scores = measure(model)
    if measure.kind == "label":
        logps, wanted = measure.label_logps(model)
        table = confusion(logps.argmax(1).numpy(), wanted.numpy(), len(measure.labels))
        print("rows: the right label, columns: the predicted one")
        names = [shorten(name, 11) for name in measure.labels]
        print(" " * 12 + "".join(f"{name:>12}" for name in names))
        for name, counts in zip(names, table):
            print(f"{name:>12}" + "".join(f"{n:12}" for n in counts))
        for e, row in zip(measure.examples, logps.exp().tolist()):
            best = measure.labels[row.index(max(row))]
            rows.append({"text": e["text"], "reference": e["label"], "prediction": best, "p": row})
    if rows:
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
        (out / "predictions.jsonl").write_text(text, encoding="utf-8")
    print("  ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in scores.items()))
    return scores


def shorten(text, width=160):
    """`text` on one line, at most `width` characters of it."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


# --------------------------------------------------------------------------------------------
# The model and its run
# --------------------------------------------------------------------------------------------

OBJECTIVES = {"sft": ("chat",), "classify": ("label",), "dpo": ("prefer",)}
OBJECTIVES["distill"] = ("chat", "label")


def resolve(args):
    """Fill in what the user left out; reads the data, whose kind decides on the objective. Returns
    (args, content of the last.pt to resume or None, kind, {split: examples}, {split: sha256})."""
    given = {k: v for k, v in vars(args).items() if v is not None and v is not False}
    fixed = {"ckpt", "objective", "optimizer", "seed", "loss_on", "teacher", "quantize", "pack"}
    fixed |= {"val", "context", "batch_tokens", "augment", "best_by"}  # what they decided stands
    fixed |= {k for k in vars(args) if k.startswith("lora_")}
    content, settings = None, {}
    if args.resume is not None:
        settings, content = train.resumed_settings(args, given, fixed)
    elif "data" not in given:
        raise DataError(f"--data is missing: a file, or one of {', '.join(SETS)}")
    else:
        settings = given if "ckpt" in given else given | {"ckpt": str(newest_run())}
    val = settings.get("val", RECIPE["val"])
    kind, parts, hashes = load_data(settings["data"], settings.get("val_data"), val)
    if content is None:
        usual = {"chat": "sft", "label": "classify", "prefer": "dpo"}[kind]
        objective = given.get("objective", usual)
        mode = RECIPES.get("lora", {}) if given.get("lora_rank") else {}
        settings = RECIPE | mode | RECIPES.get(objective, {}) | settings | {"objective": objective}
    elif content["data"] != hashes:
        raise DataError(f"{settings['data']} is not the data that the run began with")
    args = argparse.Namespace(**{k: settings.get(k) for k in vars(args)})
    train.check_settings(args, LIMITS)
    check_settings(args, kind)
    return args, content, kind, parts, hashes


LIMITS = (
    *train.LIMITS,
    ("batch_tokens show_mask", "at least 1", lambda v: v >= 1),
    ("val", "between 0 and 1", lambda v: 0 < v < 1),
    ("augment token_dropout distill_lambda", "from 0 to 1", lambda v: 0 <= v <= 1),
    (
        "epochs lora_alpha dpo_beta distill_temperature",
        "above 0 and finite",
        lambda v: 0 < v < math.inf,
    ),
    ("lora_rank eval_rows", "0 or more", lambda v: v >= 0),
)


def check_settings(args, kind):
    """DataError for settings that do not go together."""
    if kind not in OBJECTIVES[args.objective]:
        raise DataError(f"--objective {args.objective} does not suit {args.data}, rows of {kind}")
    if (args.objective == "distill") != bool(args.teacher):
        raise DataError("--teacher CKPT and --objective distill belong together")
    if args.quantize and not args.lora_rank:
        raise DataError("--quantize freezes the base: add --lora_rank 8, so that something learns")
    figure = {"chat": "slot_f1", "label": "accuracy", "prefer": "reward_accuracy"}[kind]
    if args.best_by not in ("val_loss", "last", figure):
        raise DataError(f"--best_by {args.best_by} is not measured on rows of {kind}: {figure} is")
    if args.augment and kind != "chat":
        raise DataError("--augment is for chats with tool calls")
    if args.pack and args.objective != "sft":
        raise DataError("--pack is for --objective sft")
    if args.token_dropout and (args.pack or args.objective == "dpo"):
        raise DataError("--token_dropout does not go together with --pack or --objective dpo")


def check_parts(args, kind, parts):
    """The labels of the training rows, sorted; none for other kinds. DataError if another split has
    one that these lack, or if there is no --split of that name."""
    args.split = "val" if args.split == "dev" else args.split
    if args.split not in parts:
        raise DataError(f"{args.data} has no split {args.split!r}; it has {', '.join(parts)}")
    if kind != "label":
        return []
    labels = sorted({e["label"] for e in parts["train"]})
    if strange := {e["label"] for p in parts.values() for e in p} - set(labels):
        raise DataError(f"label {min(strange)!r} is not among the training rows' labels")
    return labels


def missing_chat(tokenizer):
    """The special tokens that a tokenizer needs for a chat: none if it has those of some family."""
    try:
        Template(tokenizer)
        return ()
    except DataError:
        return CHAT_TOKENS


def build_model(args, content, kind, labels):
    """(model, tokenizer, what an adapter's file says about itself or None): the checkpoint's model
    with the special tokens it needs, as `content` (of a resumed run) left it."""
    lora_on = args.lora_rank > 0
    base = content if content and not lora_on else lm.load_checkpoint(args.ckpt)
    if "adapter" in base:
        raise DataError(f"{args.ckpt} is an adapter: merge it first (python lora.py merge)")
    if "tokenizer" not in base:
        raise DataError(f"{args.ckpt} carries no tokenizer")
    if args.dropout is not None:
        base = base | {"config": {**base["config"], "dropout": args.dropout}}
    bare = Tokenizer(base["tokenizer"])
    names = [label_token(name) for name in labels] if kind == "label" else missing_chat(bare)
    tokenizer = bare.with_special(names)
    about = None
    if content and lora_on:
        model, about = lora.load_adapted(base, {"default": content}, args.ckpt), content["adapter"]
    else:
        model = lm.model_from_checkpoint(base)
    if not content:  # a resumed run has trained its new and spare rows: they stay as they are
        model.grow_vocabulary(-(-tokenizer.n_vocab // 64) * 64, bare.n_vocab)
    if lora_on and not content:
        settings = dict(targets=args.lora_targets, rank=args.lora_rank, dropout=args.lora_dropout)
        settings["alpha"] = args.lora_alpha or 2 * args.lora_rank
        if args.quantize:
            lora.quantize(model, args.quantize)
        lora.add_lora(model, **settings)
        # special tokens that the base has never seen are rows of its tables: these must learn
        own = dict(model.named_parameters())
        tables = [t for t in ("embed.weight", "head.weight") if t in own and tokenizer is not bare]
        mark = lora.fingerprint(base["model"])
        about = settings | dict(quantize=args.quantize, base=args.ckpt, base_sha256=mark)
        about |= dict(tables=tables, first_row=bare.n_vocab)
    if about:
        lora.train_rows(model, about["tables"], about["first_row"])
    model.grad_checkpoint = bool(args.grad_checkpoint)
    return model, tokenizer, about


def measured(row, name):
    """A figure of an evaluation; DataError if these rows have no such figure."""
    if name not in row:
        raise DataError(f"--best_by {name}: the evaluation only gives {', '.join(row)}")
    return row[name]


def make_task(args, kind, batches, measure, reference, runtime, extra, end):
    """The `train.Task` of an objective; `batches` is a `Batches`, `end` the id that dropped tokens
    become, `reference` the log probabilities that DPO starts from."""

    def get(number):
        chosen, rows = batches.get(number)
        if args.objective == "dpo":
            return pad_pairs(rows, reference[chosen])
        if args.pack:
            return pack(rows, args.context)
        ids, targets = pad(rows)
        if args.token_dropout:
            rng = np.random.default_rng((args.seed, 1, number))
            ids = drop_tokens(ids, args.token_dropout, end, rng)
        return ids, targets

    def step_batches(step):
        first = (step * runtime.world + runtime.rank) * args.grad_accum
        return [get(first + i) for i in range(args.grad_accum)]

    task = train.Task(batches=step_batches, evaluate=measure, extra=extra)
    if args.best_by == "last":
        task.score = lambda row: -row["step"]
    elif args.best_by != "val_loss":  # a share of what is right
        task.score = lambda row: -measured(row, args.best_by)
    if args.objective == "dpo":
        task.loss = partial(dpo_loss, beta=args.dpo_beta)
        task.count = lambda ids, targets, known: len(known)
    elif args.objective == "distill":
        teacher, speaks, _ = load(args.teacher, str(runtime.device), "fp32")
        if speaks.spec != extra["tokenizer"]:
            raise DataError(
                f"--teacher {args.teacher} has other tokens, or special tokens, than the model: "
                f"fine-tune it on such rows first"
            )
        settings = dict(share=args.distill_lambda, temperature=args.distill_temperature)
        task.loss = partial(distill_loss, teacher=teacher, **settings)
    elif args.pack:
        task.loss = packed_loss
    return task


def evaluate_only(args):
    """--eval_only: load, measure one split, write predictions to --out."""
    if args.data is None:
        raise DataError(f"--data is missing: a file, or one of {', '.join(SETS)}")
    settings = RECIPE | {k: v for k, v in vars(args).items() if v is not None}
    args = argparse.Namespace(**{k: settings.get(k) for k in vars(args)})
    train.check_settings(args, LIMITS)
    runtime = train.make_runtime(args.device, args.dtype)
    model, tokenizer, where = load(args.ckpt, args.device, runtime.dtype)
    train.settle_context(args, model)
    kind, parts, _ = load_data(args.data, args.val_data, args.val)
    labels = check_parts(args, kind, parts)
    wanted = [label_token(n) for n in labels] if kind == "label" else missing_chat(tokenizer)
    if missing := [n for n in wanted if n not in tokenizer.special]:
        raise DataError(f"{where} does not know {missing[0]}: fine-tune it on such rows first")
    run = where.parent if where.suffix == ".pt" else where
    out = train.run_folder(args, None, f"{run.name}-eval", runtime)
    out.mkdir(parents=True, exist_ok=True)
    rows, _ = make_rows(kind, parts[args.split], tokenizer, args.context)
    measure = Measure(kind, parts[args.split], rows, tokenizer, runtime, args, labels)
    report(model, measure, out)
    print(f"{out}/predictions.jsonl")


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.eval_only:
        return evaluate_only(args)
    shown = args.show_mask
    args, content, kind, parts, hashes = resolve(args)
    labels = check_parts(args, kind, parts)
    torch.manual_seed(args.seed)
    model, tokenizer, about = build_model(args, content, kind, labels)
    train.settle_context(args, model)
    rows, cut = make_rows(kind, parts["train"], tokenizer, args.context, args.loss_on)
    if shown:
        flat = [r for row in rows for r in (row if kind == "prefer" else (row,))]
        show_mask(flat, tokenizer, shown)
        return None
    runtime = train.make_runtime(args.device, args.dtype, wide=model.config.d_model >= 512)
    args.dtype = runtime.dtype
    model.to(runtime.device)
    train.check_memory(model, args.batch_tokens, runtime)
    epoch_rows = None
    if args.augment:
        epoch_rows = Augmented(parts["train"], tokenizer, args)
    batches = Batches(rows, args.batch_tokens, args.seed, epoch_rows)
    if args.max_steps is None and args.max_minutes is None:
        per_step = args.grad_accum * runtime.world
        args.max_steps = max(1, math.ceil(args.epochs * batches.per_epoch / per_step))
    val_rows, _ = make_rows(kind, parts["val"], tokenizer, args.context, args.loss_on)
    measure = Measure(kind, parts["val"], val_rows, tokenizer, runtime, args, labels)
    extra = {"tokenizer": tokenizer.spec, "data": hashes}
    extra |= {"adapter": about} if about else {}
    reference = None
    if kind == "prefer":
        known = content and content["reference"]
        if not known:
            whole_set = Measure(kind, parts["train"], rows, tokenizer, runtime, args)
            with lm.evaluating(model), runtime.autocast(), lora.disabled(model):
                known = {"train": whole_set.gains(model), "val": measure.gains(model)}
        reference, measure.reference, extra["reference"] = known["train"], known["val"], known
    task = make_task(args, kind, batches, measure, reference, runtime, extra, tokenizer.eot)
    if about:
        task.weights = partial(lora.adapter_state, about=about)
    out = train.run_folder(args, content, f"{default_name(args.data)}-ft", runtime)
    if runtime.rank == 0:
        n, longest = batches.per_epoch, max(batches.length(r) for r in rows)
        what = {"chat": "conversations", "label": "labelled texts", "prefer": "preference pairs"}
        print(
            f"{out}: {args.objective} from {args.ckpt} on {args.data}: {len(parts['train']):,} "
            f"{what[kind]} to learn, {len(parts['val']):,} to measure; {len(rows):,} rows of at "
            f"most {longest:,} tokens, {cut:,} of them cut; {n:,} batches an epoch"
        )
        tokens = sum(batches.length(r) * (2 if kind == "prefer" else 1) for r in rows)
        sizes = tokens, args.batch_tokens, tokens / len(rows)
        print("\n".join(train.header(model, args, runtime, *sizes)))
        if cut > len(rows) / 10:
            print("many rows are cut: a longer --context, or a base that has one, keeps more")
    train.launch(model, task, args, runtime, out, content)
    if runtime.rank == 0:
        finish(model, args, measure, parts, kind, labels, out, reference)
    return None


class Augmented:
    """The training rows of an epoch, with values exchanged anew (see `substitute`)."""

    def __init__(self, examples, tokenizer, args):
        self.examples, self.tokenizer, self.args = examples, tokenizer, args
        self.pool = values_by_key(examples)

    def __call__(self, epoch):
        rng = random.Random(f"{self.args.seed} {epoch}")
        share, a = self.args.augment, self.args
        examples = [substitute(e, self.pool, share, rng) for e in self.examples]
        examples = [tidy_calls(e) for e in examples]
        return make_rows("chat", examples, self.tokenizer, a.context, a.loss_on)[0]


def finish(model, args, measure, parts, kind, labels, out, reference):
    """The closing report, with the best weights of the run, on --split."""
    best = lm.load_checkpoint(out / "best.pt")
    if "adapter" in best:
        lora.load_adapter(model, best)
    else:
        lm.load_weights(model, best["model"])
    if args.split != "val":  # pairs have none but the training rows beside it: `reference`
        rows, _ = make_rows(kind, parts[args.split], measure.tokenizer, args.context)
        runtime, tokenizer = measure.runtime, measure.tokenizer
        examples = parts[args.split]
        measure = Measure(kind, examples, rows, tokenizer, runtime, args, labels, reference)
    print(f"{out}/best.pt, step {best['step']}, on {args.split}:")
    with lm.evaluating(model):
        scores = report(model, measure, out)
    (out / "scores.json").write_text(json.dumps({args.split: scores}), encoding="utf-8")


# --------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------


# fmt: off (one line a flag)
def build_parser():
    p = Parser(
        description="Fine-tune a checkpoint. Defaults are the recipe's (finetune.RECIPE), or with "
        "--resume the run's own.")
    add = p.add_argument_group("the run").add_argument
    add("--ckpt", help=f"the model to start from: {lm.WHAT_CKPT} (default: the newest run)")
    add("--data", help=f"a .json or .jsonl file, .gz too, or one of {', '.join(SETS)}")
    add("--val_data", help="rows to measure on (default: the set's own, or --val)")
    add("--val", type=float, help="else the share of conversations held out (default 0.1)")
    add("--objective", choices=tuple(OBJECTIVES), help="default: what the rows suit")
    add("--out", help="folder of the run (default: out/DATA-ft, or with --eval_only out/CKPT-eval, "
        "numbered if taken)")
    train.add_machine(add)
    add("--eval_only", action="store_true", default=None, help="measure --ckpt, train nothing")
    add("--split", help="to report on at the end: val (default; dev), test, train")
    add("--best_by", choices=("val_loss", "accuracy", "slot_f1", "reward_accuracy", "last"),
        help="which evaluation makes best.pt (default val_loss; accuracy for labels)")
    add("--eval_rows", type=int,
        help="answers to generate at an evaluation, 0 is none (default 64; the last one: all)")
    add("--show_mask", type=int, metavar="N", help="print N rows token by token, train nothing")
    add = p.add_argument_group("rows").add_argument
    add("--loss_on", choices=("assistant", "call", "all"),
        help="learn the assistant's turns (default), its tool calls only, or every token")
    add("--augment", type=float, help="chance that a called value is exchanged, see substitute (0)")
    add("--token_dropout", type=float, help="chance that a token is hidden from the model (0)")
    add("--dropout", type=float, help="of the model (default: the checkpoint's)")
    add("--pack", action="store_true", default=None, help="several rows in one window")
    add("--batch_tokens", type=int, help="tokens a micro-batch at most, padding included (4096)")
    add("--context", type=int, help="rows are cut to it (default and most: the checkpoint's)")
    add = p.add_argument_group("few parameters, little memory").add_argument
    add("--lora_rank", type=int, help="adapters of this rank, all else frozen (default 0: none)")
    add("--lora_alpha", type=float, help="adapters count alpha / rank times (default 2 x rank)")
    add("--lora_dropout", type=float, help="in front of the adapters (default 0)")
    add("--lora_targets", help="attention, mlp, all (default), or names of layers with commas")
    add("--quantize", choices=("int8", "nf4"), help="the frozen base, with --lora_rank")
    add = p.add_argument_group("objectives").add_argument
    add("--dpo_beta", type=float, help="how tightly DPO holds on to the reference (default 0.1)")
    add("--teacher", help="checkpoint that distill learns from")
    add("--distill_lambda", type=float, help="share of the cross-entropy (default 0.5)")
    add("--distill_temperature", type=float, help="softens teacher and model (default 2)")
    add = train.add_optimisation(p)
    add("--epochs", type=float, help="passes over the rows, without the two below (default 3)")
    add("--max_steps", type=int, help="instead of --epochs")
    add("--max_minutes", type=float, help="of training, evaluation not counted")
    return p
# fmt: on


if __name__ == "__main__":
    console(main, lm.ModelError, train.TrainError)
