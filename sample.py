"""Let a trained model write.

    python sample.py --prompt "def "                        the newest run continues
    python sample.py --prompt @story.txt --temperature 0    greedy, from a file
    cat question.txt | python sample.py --top_p 0.9 --num_samples 3
    python sample.py --prompt "Once" --beams 4              beam search
    python sample.py --analogy "king - man + woman"         arithmetic in the embedding table
    python sample.py --ckpt out/hotel-ft --chat --tools hotel       talk, and let it look things up
    python sample.py --ckpt out/sentiment-ft --prompt "a fine film"  a classifier's verdict

The chapters: the decoding ladder (logits in, one token out), generation with a key/value cache,
beam search, ids to text as they come, analogies, answers and tools, the terminal chat, and the
command line. Decoding works on ids alone and text on characters alone; they meet at the end.
"""

import codecs
import contextlib
import inspect
import json
import math
import re
import runpy
import select
import signal
import sys
import types
import typing
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C during the slow imports is no traceback; `console` takes over
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

import lora
from model import (
    DTYPES,
    WHAT_CKPT,
    Decoder,
    KVCache,
    ModelError,
    causal_mask,
    choose_device,
    dtype_name,
    find_checkpoint,
    load_checkpoint,
    model_from_checkpoint,
    timing_lines,
)
from prepare_data import (
    UNKNOWN,
    DataError,
    Parser,
    Template,
    Tokenizer,
    console,
    label_token,
    parse_call,
    read_hotels,
    render_chat,
    search_hotels,
)

OUT = Path("out")

# --------------------------------------------------------------------------------------------
# The decoding ladder: each rung takes logits (B, V) and returns new ones
# --------------------------------------------------------------------------------------------


def repetition_penalty(logits, previous, penalty):
    """Make the ids in `previous` (one list a row) less likely: positive logits are divided by
    `penalty`, negative ones multiplied (CTRL, Keskar et al. 2019). 1 changes nothing."""
    out = logits.clone()
    for row, ids in zip(out, previous):
        seen = torch.tensor(sorted(set(ids)), dtype=torch.long, device=logits.device)
        row[seen] = torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
    return out


def temperature(logits, t):
    """Sharpen (t < 1) or flatten (t > 1) the distribution; t above 0."""
    return logits / t


def top_k(logits, k):
    """Keep the k largest logits of each row (and all that equal the k-th)."""
    smallest = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < smallest, -math.inf)


def top_p(logits, p):
    """Keep the most likely tokens until their probabilities reach p (Holtzman et al. 2020): the one
    that crosses p is kept, so there is always one.

    >>> top_p(torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log(), 0.5).exp()
    tensor([[0.4000, 0.3000, 0.0000, 0.0000]])
    """
    total = logits.logsumexp(dim=-1, keepdim=True)
    for k in (1000, logits.shape[-1]):  # to sort all of a large vocabulary is seldom necessary
        ordered, order = logits.topk(min(k, logits.shape[-1]), dim=-1)
        probs = (ordered - total).exp()
        before = probs.cumsum(dim=-1) - probs  # probability of all that is more likely
        if (before[:, -1] >= p).all():
            break
    drop = torch.ones_like(logits, dtype=torch.bool).scatter(1, order, before >= p)
    drop.scatter_(1, order[:, :1], False)  # p = 0 keeps one, too
    return logits.masked_fill(drop, -math.inf)


def min_p(logits, p):
    """Keep tokens of at least p times the largest probability (Nguyen et al. 2024)."""
    probs = logits.softmax(dim=-1)
    return logits.masked_fill(probs < p * probs.max(dim=-1, keepdim=True).values, -math.inf)


def next_token(logits, previous, generators, settings):
    """One id a row from logits (B, V): the whole ladder, then a draw.

    `previous` are the ids so far, one list a row, `generators` one torch.Generator a row, so that
    no row's luck depends on its neighbours. Temperature 0 takes the largest logit. The penalty
    comes first: the other rungs should see the distribution that it leaves.
    """
    s = DECODING | settings
    logits = logits.float()
    if s["repetition_penalty"] != 1:
        logits = repetition_penalty(logits, previous, s["repetition_penalty"])
    if s["temperature"] < 1e-6:  # 0, or so little that a float has no room for the quotients
        return logits.argmax(dim=-1).tolist()
    logits = temperature(logits, s["temperature"])
    if s["top_k"] > 0:
        logits = top_k(logits, s["top_k"])
    if s["top_p"] < 1:
        logits = top_p(logits, s["top_p"])
    if s["min_p"] > 0:
        logits = min_p(logits, s["min_p"])
    probs = logits.softmax(dim=-1).cpu()  # drawn on the CPU: the same seed, the same text anywhere
    return [draw(p, g) for p, g in zip(probs, generators)]


def draw(probs, generator):
    """One id by its probability: the first whose sum with all before it reaches a random share of
    the whole, above 0, so never one of probability 0. One random number and not, as in
    torch.multinomial, one for each token: that took a millisecond with GPT-2's vocabulary."""
    reached = probs.cumsum(0, dtype=torch.float64)
    share = 1 - torch.rand(1, generator=generator, dtype=torch.float64)  # (0, 1]
    return torch.searchsorted(reached, share * reached[-1]).item()


# What each rung does when nothing is said: nothing.
DECODING = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)


# --------------------------------------------------------------------------------------------
# Generation: several rows at once, one new token a step
# --------------------------------------------------------------------------------------------


def prefill(model, cache, rows):
    """Run the rows (lists of ids) into the empty cache, padded on the left to one length:

        row 0   .  .  5  9     . is padding: no position, seen by nobody
        row 1   7  1  2  3     new tokens of both go into the next column

    Returns (logits of the last column (B, V), padding per row (B,), mask of key columns or None).
    """
    device, B, T = cache.keys.device, len(rows), max(map(len, rows))
    pad = torch.tensor([T - len(r) for r in rows], device=device)
    ids = torch.tensor([[0] * (T - len(r)) + r for r in rows], device=device)
    cache.length = 0
    if not pad.any():
        return model.last_logits(ids, cache), pad, None
    column = torch.arange(cache.keys.shape[3], device=device)
    visible = column >= pad[:, None]  # (B, S)
    positions = (column[:T] - pad[:, None]).clamp(min=0)  # (B, T)
    mask = causal_mask(T, T, device) & visible[:, None, :T]
    mask |= torch.eye(T, dtype=torch.bool, device=device)  # padding sees itself, or softmax is NaN
    logits = model.last_logits(ids, cache, positions, mask[:, None])
    return logits, pad, visible.view(B, 1, 1, -1)


@torch.inference_mode()
def generate(
    model,
    prompts,
    max_tokens,
    *,
    seed=0,
    seeds=None,
    allowed=None,
    stop=None,
    slide=None,
    **settings,
):
    """Yield lists of new ids, one a prompt and step (None for a row that has stopped).

    prompts      lists of ids, of any lengths: each row gets what it would get alone
    settings     rungs of the ladder (see DECODING); row r draws with seeds[r], or `seed` for all
    allowed      bools (V,): ids that may come; None is all
    stop(r, id)  called with each new id; True ends row r, the id included
    slide(kept)  called when the context is full: the newest half of it is kept and read again
                 from position 0, which is right for every kind of positions. Once every context/2
                 tokens, it costs little.
    """
    context, device = model.config.context, model.embed.weight.device
    rows = [list(p) for p in prompts]
    check_ids(rows, model.config.vocab_size)
    assert set(settings) <= set(DECODING), f"no such rung: {set(settings) - set(DECODING)}"
    windows = [r[-context:] for r in rows]  # what the model looks at; `rows` remembers everything
    if slide and any(len(r) > context for r in rows):
        slide(context)
    generators = [torch.Generator().manual_seed(s) for s in seeds or [seed] * len(rows)]
    longest, even = max(map(len, windows)), len(set(map(len, windows))) == 1
    cache = KVCache(model, len(rows), min(longest + max_tokens, context * (1 if even else 2)))
    stopped = [False] * len(rows)
    logits, pad, visible = prefill(model, cache, windows)
    for left in reversed(range(max_tokens)):
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -math.inf)
        new = next_token(logits, rows, generators, settings)
        yield [None if s else i for s, i in zip(stopped, new)]
        for r, i in enumerate(new):
            if not stopped[r]:
                rows[r].append(i)
                windows[r].append(i)
                stopped[r] = bool(stop and stop(r, i))
        if all(stopped) or not left:
            return
        if any(len(w) > context and not s for s, w in zip(stopped, windows)):
            keep = max(1, context // 2)
            full = [s or len(w) > context for s, w in zip(stopped, windows)]
            windows = [w[-keep:] if f else w for f, w in zip(full, windows)]
            if slide:
                slide(keep)
            logits, pad, visible = prefill(model, cache, windows)
        else:
            ids = torch.tensor([[w[-1]] for w in windows], device=device)
            positions = mask = None
            if visible is not None:
                positions = (cache.length - pad[:, None]).clamp(max=context - 1)
                mask = visible[..., : cache.length + 1]
            logits = model.last_logits(ids, cache, positions, mask)


def check_ids(rows, vocab_size):
    """DataError for a prompt that is empty or has an id outside the vocabulary."""
    if not rows or not all(rows):
        raise DataError("an empty prompt: give at least one token")
    for i in (i for row in rows for i in row):
        if not 0 <= i < vocab_size:
            raise DataError(f"token id {i} is outside the vocabulary of 0 to {vocab_size - 1}")


# --------------------------------------------------------------------------------------------
# Beam search: the likeliest whole continuation, not the likeliest next token
# --------------------------------------------------------------------------------------------


@torch.inference_mode()
def beam_search(model, prompt, max_tokens, beams=4, length_penalty=1.0, end=None, allowed=None):
    """The best continuations of `prompt`, as [(score, ids)], best first, at most `beams` of them.

    A score is the sum of log probabilities over len(ids) ** length_penalty, the `end` id counted
    in both (Wu et al. 2016 without its constants). A finished beam waits beside the live ones: the
    search ends only when none of these can still overtake, whatever finished first.
    Prompt and continuation must fit the context (ModelError).
    """
    check_ids([prompt], model.config.vocab_size)
    device = model.embed.weight.device
    cache = KVCache(model, beams, len(prompt) + max_tokens)
    ids = torch.tensor([prompt] * beams, device=device)
    live = [(0.0, [])] + [(-math.inf, [])] * (beams - 1)  # equal at first: let one of them speak
    done = []
    for n in range(1, max_tokens + 1):
        logits = model.last_logits(ids, cache).float()  # (beams, V)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -math.inf)
        so_far = torch.tensor([[s] for s, _ in live], dtype=torch.float64)
        total = logits.log_softmax(-1).double().cpu() + so_far
        # each live beam has one way to end, so 2 x beams candidates leave enough that go on
        score, flat = total.flatten().topk(min(2 * beams, total.numel()))
        parent, token = flat // total.shape[1], flat % total.shape[1]
        grown = []
        for s, p, t in zip(score.tolist(), parent.tolist(), token.tolist()):
            if s == -math.inf:
                continue
            beam = live[p][1] + [t]
            if t == end or n == max_tokens:
                done.append((s / n**length_penalty, beam))
            elif len(grown) < beams:
                grown.append((s, beam, p))
        done = sorted(done, key=lambda b: -b[0])[:beams]
        if not grown:
            break
        # log probabilities only fall; a longer row may divide them by more
        reach = grown[0][0] / (max_tokens if length_penalty > 0 else n + 1) ** length_penalty
        if len(done) == beams and reach <= done[-1][0]:
            break
        grown += [(-math.inf, grown[0][1], grown[0][2])] * (beams - len(grown))
        live = [(s, b) for s, b, _ in grown]
        cache.reorder(torch.tensor([p for *_, p in grown], device=device))
        ids = torch.tensor([[b[-1]] for _, b in live], device=device)
    return done


# --------------------------------------------------------------------------------------------
# Text: characters as the ids come, and words as vectors
# --------------------------------------------------------------------------------------------


def printable(text):
    """`text` with its control characters, line ends and tabs apart, as \\x1b: printed as they are
    they would clear the terminal, or worse."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text)


class TextStream:
    """Ids to text, as they come: `feed` returns what can be shown already.

    A character that is not complete yet (Chinese ones take three bytes, often two tokens) waits,
    and so does text that may turn out to be the beginning of a stop string. After a stop string
    `stopped` is True and nothing more comes.
    """

    def __init__(self, tokenizer, stops=()):
        self.tokenizer, self.stops = tokenizer, [s for s in stops if s]
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held, self.stopped = "", False

    def feed(self, i):
        """The text that id `i` completes, maybe none."""
        hidden = i in self.tokenizer.special.values()
        token = b"" if hidden else self.tokenizer.token_bytes(i) or b""
        return self._release(self.decoder.decode(token))

    def finish(self):
        """What was still held back at the end."""
        text, self.held = self._release(self.decoder.decode(b"", final=True)) + self.held, ""
        return text

    def _release(self, text):
        if self.stopped:
            return ""
        self.held += text
        ends = [at for s in self.stops if (at := self.held.find(s)) >= 0]
        if ends:
            out, self.held, self.stopped = self.held[: min(ends)], "", True
            return out
        wait = max((overlap(self.held, s) for s in self.stops), default=0)
        out, self.held = self.held[: len(self.held) - wait], self.held[len(self.held) - wait :]
        return out


def overlap(text, stop):
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)


def word_vector(word, tokenizer, table):
    """(embedding, ids) of a word: of its single token, best with a space before it as words have in
    running text, else the mean of its tokens."""
    ways = [tokenizer.encode(" " + word), tokenizer.encode(word)]
    ids = next((w for w in ways if len(w) == 1), ways[1])
    check_ids([ids], len(table))
    return table[ids].float().mean(0), ids


def analogy(expression, tokenizer, table, choices=(), n=10):
    """[(text, cosine)], nearest first, for an expression such as "king - man + woman".

    table (V, C) is the embedding table. Candidates are `choices`, or all tokens but those of the
    expression. Mikolov et al. 2013: directions between words carry meaning.
    """
    parts = re.findall(r"([+-]?)\s*([^\s+-]+)", expression)
    if not parts:
        raise DataError(f"--analogy {expression!r}: words with + and - between them, please")
    goal, used = torch.zeros(table.shape[1]), set()
    for sign, word in parts:
        vector, ids = word_vector(word, tokenizer, table)
        goal = goal - vector if sign == "-" else goal + vector
        used.update(ids)
    if choices:
        names, vectors = list(choices), [word_vector(c, tokenizer, table)[0] for c in choices]
        near = torch.cosine_similarity(torch.stack(vectors), goal, dim=-1)
    else:
        known = [
            i for i in range(min(tokenizer.n_vocab, len(table))) if tokenizer.byte_lengths[i] > 0
        ]
        known = [i for i in known if i not in used]
        names = [tokenizer.decode([i]) for i in known]
        near = torch.cosine_similarity(table[known].float(), goal, dim=-1)
    best = near.topk(min(n, len(names)))
    return [(names[i], s) for s, i in zip(best.values.tolist(), best.indices.tolist())]


# --------------------------------------------------------------------------------------------
# Answers: a model's turn in a conversation, the tools it may call, a classifier's verdict
# --------------------------------------------------------------------------------------------


def chat_prompt(messages, tokenizer, room):
    """Ids of a conversation up to where the answer begins, at most `room`: the oldest turns are
    left out first, never the system's; a last one that is too long alone loses its beginning, and a
    system turn of more than half of the room gives way to the question."""
    template, messages = Template(tokenizer), list(messages)
    room -= len(template.start) + len(template.begin)
    oldest = 1 if messages and messages[0]["role"] == "system" else 0
    while True:
        rendered = [ids for _, ids, _ in template.turns(messages)]
        if sum(map(len, rendered)) <= room or len(messages) <= oldest + 1:
            break
        messages.pop(oldest)
    system = rendered[0] if oldest and len(rendered[0]) <= (room + 1) // 2 else []
    rest = [i for ids in rendered[1 if system else 0 :] for i in ids]
    rest = rest[max(0, len(system) + len(rest) - room) :]
    return template.start + system + rest + template.begin


@torch.inference_mode()
def classify(model, prompts, goals, batch=64):
    """Log probabilities (N, L) of the label ids `goals` after each prompt (lists of ids), among
    these labels alone."""
    device, out = model.embed.weight.device, []
    for start in range(0, len(prompts), batch):
        rows = prompts[start : start + batch]
        ends = torch.tensor([len(r) - 1 for r in rows], device=device)
        ids = torch.zeros(len(rows), int(ends.max()) + 1, dtype=torch.long, device=device)
        for row, r in zip(ids, rows):  # what is padded behind, nobody looks at
            row[: len(r)] = torch.tensor(r)
        last = model.hidden(ids)[torch.arange(len(rows)), ends]  # (B, C)
        out.append(model.head(last)[:, goals].float().log_softmax(-1).cpu())
    return torch.cat(out)


def labels_of(tokenizer):
    """The labels that a classifier's tokenizer knows; none for other models."""
    begin, end = label_token("\0").split("\0")
    return [n[len(begin) : -len(end)] for n in tokenizer.special if n.startswith(begin)]


def load_tools(source):
    """{name: function} of --tools: `hotel`, or the public functions of a Python file."""
    # To add a tool of your own: a file with a function; its parameters and their types are the
    # schema, what it returns (anything JSON can say) is what the model reads.
    if source == "hotel":
        return {"search": partial(search_hotels, read_hotels())}
    if not Path(source).is_file():
        raise DataError(f"--tools {source}: no such file; name a .py file, or hotel")
    try:
        found = runpy.run_path(source)
        own = {n: f for n, f in found.items() if inspect.isfunction(f) and n[0] != "_"}
        own = {n: f for n, f in own.items() if f.__code__.co_filename == source}
        for f in own.values():
            inspect.signature(f, eval_str=True)  # as call_tool will want it
    except (Exception, SystemExit) as e:  # the user's own code can fail in any way
        raise DataError(f"--tools {source} cannot be loaded ({type(e).__name__}: {e})") from e
    if not own:
        raise DataError(f"--tools {source} defines no function")
    return own


JSON_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", list: "array",
              types.NoneType: "null", tuple: "array", dict: "object"}  # fmt: skip


def type_schema(hint):
    """The JSON schema of a type hint; {} for a type that JSON does not know."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    kind = origin or hint
    if kind in (typing.Union, types.UnionType):
        schemas = [type_schema(p) for p in parts if p is not types.NoneType]
        schema = {"anyOf": schemas}
        if len(schemas) == 1:
            schema = schemas[0]
        elif all(s.keys() == {"type"} and isinstance(s["type"], str) for s in schemas):
            names = sorted({s["type"] for s in schemas})
            schema = {"type": names if len(names) > 1 else names[0]}
        return schema | ({"nullable": True} if types.NoneType in parts else {})
    if kind is typing.Literal:
        names = list(dict.fromkeys(JSON_TYPES[type(p)] for p in parts))
        return {"type": names if len(names) > 1 else names[0], "enum": list(parts)}
    schema = {"type": JSON_TYPES[kind]} if kind in JSON_TYPES else {}
    if kind is list and parts:
        schema["items"] = type_schema(parts[0])
    elif kind is tuple and parts:
        schema["prefixItems"] = [type_schema(p) for p in parts]
    elif kind is dict and parts:
        schema["additionalProperties"] = type_schema(parts[1])
    return schema


def function_schema(name, function):
    """The JSON schema by which a model is told of a function: its parameters, their types, and what
    its docstring says in Google's style; the same as transformers.utils.get_json_schema makes."""
    text = "\n" + (inspect.getdoc(getattr(function, "func", function)) or "")
    head, *rest = re.split(r"\n\s*(Args|Returns|Raises):[ \t]*\n", text)
    sections, about, known = dict(zip(rest[::2], rest[1::2])), {}, None
    lines = [line for line in sections.get("Args", "").split("\n") if line.strip()]
    margin = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
    for line in lines:
        found = re.match(rf"\s{{{margin}}}(\w+)(?:[ \t]*\([^()]*\))?:(.*)", line)
        known = found[1] if found else known
        about[known] = f"{about.get(known, '')} {(found[2] if found else line).strip()}".strip()
    signature = inspect.signature(function, eval_str=True)
    properties, required = {}, []
    for key, p in signature.parameters.items():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        schema, said = type_schema(p.annotation), about.get(key, "")
        if choices := re.search(r"\(choices:\s*(.*?)\)\s*$", said, re.IGNORECASE):
            schema["enum"] = [c.strip() for c in json.loads(choices[1])]
            said = said[: choices.start()].strip()
        properties[key] = schema | {"description": said}
        required += [key] if p.default is p.empty else []
    parameters = {"type": "object", "properties": properties}
    parameters |= {"required": required} if required else {}
    schema = {"name": name, "description": head.strip(), "parameters": parameters}
    if signature.return_annotation is not signature.empty:
        schema["return"] = type_schema(signature.return_annotation)
        if "Returns" in sections:
            schema["return"]["description"] = sections["Returns"].strip()
    return {"type": "function", "function": schema}


def suits(value, annotation):
    """Whether a JSON value may be given for a parameter of that type. Types that JSON does not know
    are not checked."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(suits(value, p) for p in parts)
    if origin is typing.Literal:
        return value in parts
    kind = origin or annotation  # list[str]: its items are not looked at
    if kind not in (str, int, float, bool, list, dict, types.NoneType):
        return True
    if isinstance(value, bool):  # for Python an int, too
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def call_tool(tools, content):
    """What a tool returns for the call turn `content`, as JSON text. A call that does not fit the
    function's parameters never reaches it: the model reads {"error": ...} instead."""
    try:
        name, arguments = parse_call(content)
        if name not in tools:
            raise ValueError(f"there is no tool {name!r}, only {', '.join(tools)}")
        signature = inspect.signature(tools[name], eval_str=True)
        try:
            signature.bind(**arguments)
        except TypeError as e:
            raise ValueError(f"{name}: {e}") from e
        for key, value in arguments.items():
            parameter = signature.parameters.get(key)  # none if **others take it
            if parameter and not suits(value, parameter.annotation):
                raise ValueError(f"{name}: {key} cannot be {value!r}")
    except ValueError as e:
        return json.dumps({"error": str(e)}, ensure_ascii=False)
    try:
        result = json.dumps(tools[name](**arguments), ensure_ascii=False, allow_nan=False)
    except Exception as e:  # a tool that fails is news for the model, no reason to stop talking
        error = f"{name} failed: {type(e).__name__}: {e}"
        result = json.dumps({"error": error}, ensure_ascii=False)
    return result.encode("utf-8", "replace").decode()  # half of a pair, \ud83d, is no text


# --------------------------------------------------------------------------------------------
# The terminal chat
# --------------------------------------------------------------------------------------------

MAX_CALLS = 3  # tool calls in one turn of the model
CHAT_HELP = (
    "/reset forgets, /retry answers again, /system TEXT, /save FILE, /adapter NAME, /quit; "
    "Ctrl-C stops an answer"
)


class Chat:
    """A conversation with a model: the messages so far, and how the next one is made.

    A model that was never taught to chat (its tokenizer has no role tokens) is given a transcript
    to continue instead.
    """

    def __init__(self, model, tokenizer, tools=None, max_tokens=200, seed=None, settings=None):
        self.model, self.tokenizer, self.tools = model, tokenizer, tools or {}
        self.settings, self.seed = settings or {}, seed
        self.max_tokens = min(max_tokens, model.config.context // 2)
        try:
            self.template = Template(tokenizer)
        except DataError:
            self.template = None
        self.plain = self.template is None
        # the one tool of our own hotel model is known to it by training: of others it must be told
        ours = self.plain or self.template.kind == "ours"
        told = {n: f for n, f in self.tools.items() if not (ours and isinstance(f, partial))}
        self.schemas = [function_schema(n, f) for n, f in told.items()]
        self.messages, self.turns = [], 0

    def prompt(self):
        """(ids to continue, whether the oldest turns had to be left out)."""
        room = self.model.config.context - self.max_tokens
        if not self.plain:
            messages = self.messages
            if self.schemas:
                if not messages or messages[0]["role"] != "system":
                    messages = [{"role": "system", "content": ""}, *messages]
                messages = [messages[0] | {"tools": self.schemas}, *messages[1:]]
            full = len(render_chat(messages, self.tokenizer, True)[0])
            return chat_prompt(messages, self.tokenizer, room), full > room
        said = "".join(f"{m['role'].title()}: {m['content']}\n" for m in self.messages)
        ids = self.tokenizer.encode(said + "Assistant:")
        return ids[-room:], len(ids) > room

    def turn(self, show, may_call=True):
        """Generate and remember one message; show(text) gets its words as they come. An answer
        that Ctrl-C stops is remembered as far as it went; in the middle of a call it is passed on.
        """
        ids, t, stopped = [], self.tokenizer, False
        call, ends, is_call = None, {t.eot}, lambda ids: False
        if not self.plain:
            call, ends = self.template.call, {t.eot, self.template.end}
            is_call = self.template.is_call
        stream = TextStream(t, ["\nUser:", "\nSystem:"] if self.plain else ())
        allowed = allowed_ids(self.model, t, chat=not self.plain)
        if call is not None and not (may_call and self.tools):
            allowed[call] = False

        def stop(r, i):
            ids.append(i)
            if not is_call(ids):  # a call is shown when it is whole
                show(stream.feed(i))
            return i in ends or stream.stopped

        seed = torch.seed() % 2**31 if self.seed is None else self.seed + self.turns
        self.turns += 1
        try:
            rows = generate(
                self.model,
                [self.prompt()[0]],
                self.max_tokens,
                seed=seed,
                allowed=allowed,
                stop=stop,
                **self.settings,
            )
            for _ in rows:
                pass
        except KeyboardInterrupt:
            if is_call(ids):
                raise
            stopped = True
        # a character that was cut off is nothing to show or to remember
        show(stream.finish().rstrip(UNKNOWN) + (" [stopped]" if stopped else ""))
        if self.plain:
            text = re.split(r"\n(?:User|System):", t.decode([i for i in ids if i not in ends]))[0]
            message = {"role": "assistant", "content": text.strip()}
        else:
            message = self.template.parse(ids)
        message["content"] = message["content"].rstrip(UNKNOWN)
        self.messages.append(message)
        return message

    def answer(self, show):
        """Turns until the model has spoken: calls are shown, made, and what they return is fed
        back, at most MAX_CALLS times."""
        for left in reversed(range(MAX_CALLS + 1)):
            message = self.turn(show, may_call=left > 0)
            if message["role"] != "call":
                return
            show(f"-> {message['content']}\n")
            result = call_tool(self.tools, message["content"])
            show(f"<- {result if len(result) < 400 else result[:400] + '…'}\n")
            self.messages.append({"role": "tool", "content": result})

    def command(self, line):
        """Do what a line with a slash says. Returns what to tell the user, or None to answer the
        last question again."""
        name, _, rest = line[1:].partition(" ")
        system = [m for m in self.messages[:1] if m["role"] == "system"]
        if name == "reset":
            self.messages = system
            return "forgotten"
        if name == "retry":
            asked = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
            if not asked:
                return "nothing has been asked yet"
            del self.messages[asked[-1] + 1 :]
            return None
        if name == "system":
            text = {"role": "system", "content": rest}
            self.messages = ([text] if rest else []) + self.messages[len(system) :]
            return "the system turn is set" if rest else "no system turn any more"
        if name == "save" and rest:
            saved = {"messages": self.messages} | ({"tools": self.schemas} if self.schemas else {})
            text = json.dumps(saved, ensure_ascii=False)
            try:
                Path(rest).write_text(text + "\n", encoding="utf-8")
            except OSError as e:
                return f"{rest}: {e.strerror}"
            return f"saved to {rest}"
        if name == "adapter":
            if isinstance(self.model, Decoder):  # made only of a model without adapters
                return "this model has no adapters: sample.py --adapter RUN lays one over it"
            try:
                lora.switch(self.model, *rest.split())
            except ModelError as e:
                return str(e)
            return f"talking through {rest or 'the bare base'}"
        return CHAT_HELP


def read_message():
    """What the user types: a line, or the lines of one paste. With readline, where Python has it,
    lines can be edited and called back; in a terminal it hands a paste over as one input."""
    text = input("> " if sys.stdin.isatty() else "")
    while sys.stdin.isatty() and text[:1] != "/" and more_waits():
        text += "\n" + input()
    return text.strip()


def more_waits():
    """Is there another line already, as behind the first one of a paste? Nobody types so fast."""
    try:
        return bool(select.select([sys.stdin], [], [], 0.05)[0])
    except (OSError, ValueError):  # Windows can only ask sockets
        return False


def talk(chat):
    """Read messages, answer them, until the input ends or /quit."""
    if chat.plain:
        print("[a base model: it continues the transcript, nobody has taught it to answer]")
    print(f"[{CHAT_HELP}]", file=sys.stderr)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (input() uses it from now on)
    told = False

    def show(text):
        print(printable(text), end="", flush=True)

    while True:
        try:
            line = read_message()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n[/quit or Ctrl-D leaves]", file=sys.stderr)
            continue
        except UnicodeDecodeError:
            print("[that was no UTF-8]", file=sys.stderr)
            continue
        if not line:
            continue
        if line == "/quit":
            return
        if line.startswith("/"):
            reply = chat.command(line)
            if reply is not None:
                print(f"[{reply}]")
                continue
        else:
            chat.messages.append({"role": "user", "content": line})
        if chat.prompt()[1] and not told:
            told = True
            print("[the context is full: the oldest turns are left out]", file=sys.stderr)
        try:
            chat.answer(show)
        except KeyboardInterrupt:  # in the middle of a tool
            show("[stopped]")
        print()


# --------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------


def newest_run():
    """The folder under out/ whose checkpoint was written last; DataError if there is none."""
    found = [p for name in ("last.pt", "best.pt") for p in OUT.glob(f"*/{name}")]
    if not found:
        raise DataError(f"no run in {OUT}/: train one (python train.py), or name it with --ckpt")
    return max(found, key=lambda p: p.stat().st_mtime).parent


def load(ckpt=None, device=None, dtype=None, adapters=(), ids_alone=False):
    """(model, tokenizer, where) of a checkpoint or run's folder, the newest run if None. An adapter
    brings its base along; `adapters` are laid over a base, the first one active, and are called by
    their folder's or file's name. With `ids_alone` the tokenizer may be missing, and is None."""
    where = Path(ckpt) if ckpt is not None else newest_run()
    device = choose_device(device)
    dtype = "fp32" if dtype == "int8" else dtype  # which the Decoder makes of it
    if dtype in (None, "auto"):
        dtype = "bf16" if device.type == "cuda" else "fp32"
    # an adapter knows its base by the weights as they are on disk
    content = load_checkpoint(where, None if adapters else DTYPES[dtype])
    over = [Path(a) for a in adapters]
    if "adapter" in content:
        over, base = [where, *over], find_checkpoint(content["adapter"]["base"])
        if not base.exists():
            raise DataError(
                f"{where} is an adapter over {base}, which is not there: name its base with --ckpt "
                f"and this one with --adapter"
            )
        content = load_checkpoint(base)
    else:
        base = where
    names = [(p.parent if p.name in ("best.pt", "last.pt") else p).name for p in over]
    names = [name.removesuffix(".pt") for name in names]
    if len(set(names)) < len(names):
        raise DataError(f"two adapters are called alike: {', '.join(names)}")
    named = {name: load_checkpoint(p) for name, p in zip(names, over)}
    if "tokenizer" not in content and not (ids_alone and not named):
        raise DataError(
            f"{where} carries no tokenizer (or no tokenizer.json): sample.py --prompt_ids 1,2 "
            f"--print_ids needs none"
        )
    specs = [a["tokenizer"] for a in named.values()] or [content.get("tokenizer")]
    if any(s != specs[0] for s in specs):
        raise DataError("the adapters have other special tokens: only alike ones go together")
    if named:
        model = lora.load_adapted(content, named, base).to(device)
        for p in model.parameters():  # not the tables of positions, which stay in fp32
            p.data = p.data.to(DTYPES[dtype])
    else:
        model = model_from_checkpoint(content, device, DTYPES[dtype], where)
    return model, specs[0] and Tokenizer(specs[0]), where


def decoder(model, rows, args):
    """What to write `rows` texts at once with: the model's Decoder on a CPU, unless it has adapters
    (they may be switched) or args.plain says no. DataError if args.dtype int8 is not possible."""
    int8, plain = args.dtype == "int8", args.plain
    adapted = any(isinstance(m, (lora.LoRALinear, lora.QuantLinear)) for m in model.modules())
    device = model.embed.weight.device.type
    if not (plain or adapted or device != "cpu"):
        fast = Decoder(model, int8, rows)
        if args.verbose:
            print("\n".join(timing_lines()), file=sys.stderr)
        return fast
    if int8:
        reason = f"is for a CPU, not {device}"
        if adapted:
            reason = "does not round adapters: lora.py merge writes a checkpoint without them"
        raise DataError(f"--dtype int8 {'excludes --plain' if plain else reason}")
    return model


def allowed_ids(model, tokenizer, chat=False):
    """Bools (V,): the ids that a token has; the table's spare rows must never be drawn. Of the
    special ones only the end of the text may come, or in a `chat` what its template speaks."""
    allowed = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    lengths = torch.from_numpy(tokenizer.byte_lengths[: len(allowed)])
    allowed[: len(lengths)] = lengths > 0
    for i in Template(tokenizer).spoken if chat else (tokenizer.eot,):
        if i < len(allowed):
            allowed[i] = True
    return allowed.to(model.embed.weight.device)


def resolve_prompt(prompt):
    """What a --prompt means: itself, the content of @FILE, or of standard input for None."""
    where = "the prompt"
    try:
        if prompt is None:
            where = "standard input"
            piped = sys.stdin is not None and not sys.stdin.isatty()
            text = sys.stdin.read() if piped else ""
        elif prompt.startswith("@"):
            where = prompt[1:]
            text = Path(where).read_text(encoding="utf-8")
        else:
            text = prompt
        text.encode("utf-8")  # bytes that a shell could not read hide as lone surrogates
        return text
    except UnicodeError as e:
        raise DataError(f"{where} is not text in UTF-8 ({e.reason} at {e.start})") from e


def read_prompts(args, tokenizer, vocab_size):
    """The prompts as lists of ids: from --prompt_ids, --prompt, or a pipe into this script."""
    if args.prompt_ids is not None:
        try:
            rows = [[int(i) for i in args.prompt_ids.split(",")]]
        except ValueError as e:
            raise DataError(f"--prompt_ids {args.prompt_ids!r}: numbers with commas, please") from e
    else:  # nothing at all means: begin a document
        texts = [resolve_prompt(p) for p in args.prompt or [None]]
        begin = [] if tokenizer.begin is None else [tokenizer.begin]
        rows = [begin + tokenizer.encode(t) or [tokenizer.eot] for t in texts]
    check_ids(rows, vocab_size)
    return rows


def write_rows(model, tokenizer, prompts, args):
    """Generate for every prompt, --num_samples times; print text as it comes. Returns the ids.

    Sample j draws with seed + j whatever the batch, so each can be had again alone.
    """
    prompts = [p for p in prompts for _ in range(args.num_samples)]
    seed = args.seed if args.seed is not None else torch.seed() % 2**31
    seeds = [seed + r % args.num_samples for r in range(len(prompts))]
    streams = [TextStream(tokenizer, args.stop or ()) for _ in prompts]
    texts, ids, said = [""] * len(prompts), [[] for _ in prompts], []

    def show(r, text):
        texts[r] += text
        if len(prompts) == 1:
            print(printable(text), end="", flush=True)

    def stop(r, i):
        ids[r].append(i)
        show(r, streams[r].feed(i))
        return i == tokenizer.eot or streams[r].stopped

    def slide(kept):
        if not said:
            context = model.config.context
            note = f"the context of {context} tokens is full: going on with the newest {kept}"
            print(f"[{note}]", file=sys.stderr)
        said.append(kept)

    if len(prompts) == 1:
        print(prompt_text(tokenizer, prompts[0]), end="", flush=True)
    settings = {name: getattr(args, name) for name in DECODING}
    allowed = allowed_ids(model, tokenizer)
    for _ in generate(
        model,
        prompts,
        args.max_new_tokens,
        seeds=seeds,
        allowed=allowed,
        stop=stop,
        slide=slide,
        **settings,
    ):
        pass
    for r, stream in enumerate(streams):
        show(r, stream.finish())
        if len(prompts) > 1:
            print(f"--- {r + 1} ---\n{prompt_text(tokenizer, prompts[r])}{printable(texts[r])}")
    if len(prompts) == 1:
        print()
    return ids


def write_ids(model, prompts, args):
    """`write_rows` for a model without a tokenizer: no text, and no id that ends one."""
    prompts = [p for p in prompts for _ in range(args.num_samples)]
    seed = args.seed if args.seed is not None else torch.seed() % 2**31
    seeds = [seed + r % args.num_samples for r in range(len(prompts))]
    settings = {name: getattr(args, name) for name in DECODING}
    settings |= dict(seeds=seeds, slide=lambda kept: None)
    return [list(row) for row in zip(*generate(model, prompts, args.max_new_tokens, **settings))]


def prompt_text(tokenizer, ids):
    """Printable text of ids, without the end-of-text token and ids that no token has."""
    known = [i for i in ids if i != tokenizer.eot and tokenizer.token_bytes(i)]
    return printable(tokenizer.decode(known))


def write_beams(model, tokenizer, prompt, args):
    """Beam search from one prompt; prints the beams, best first. Returns the ids."""
    room = model.config.context - len(prompt)
    if room < 1:
        raise DataError(f"the prompt has {len(prompt)} tokens; beams need room in the context")
    if room < args.max_new_tokens:
        print(f"[beams end with the context, after {room} tokens]", file=sys.stderr)
    beams = beam_search(
        model,
        prompt,
        min(room, args.max_new_tokens),
        args.beams,
        args.length_penalty,
        tokenizer.eot,
        allowed_ids(model, tokenizer),
    )
    beams = beams[: args.num_samples]
    for score, ids in beams:
        if len(beams) > 1:
            print(f"--- {score:.4f} ---")
        print(prompt_text(tokenizer, prompt) + prompt_text(tokenizer, ids))
    return [ids for _, ids in beams]


# fmt: off (one line a flag)
def build_parser():
    p = Parser(description="Write with a trained model.")
    add = p.add_argument
    add("--ckpt", help=f"{WHAT_CKPT} (default: the newest run in out/)")
    start = p.add_mutually_exclusive_group()
    start.add_argument("--prompt", action="append",
        help="text, or @FILE; given several times it is a batch (default: standard input if it is "
        "a pipe, else the model begins a document)")
    start.add_argument("--prompt_ids", help="token ids instead, e.g. 5,17,200")
    add("--print_ids", action="store_true", help="the new ids on the last line, a line a sample")
    add("--max_new_tokens", type=int, default=200, help="new tokens at most (default 200)")
    add("--num_samples", type=int, default=1, help="per prompt, in one batch (default 1)")
    add("--temperature", type=float, help="0 is greedy (default 0.8; with --tools 0)")
    add("--top_k", type=int, default=0, help="keep the k likeliest tokens; 0 is all (default)")
    add("--top_p", type=float, default=0.95, help="keep the likeliest up to p; 1 is all (0.95)")
    add("--min_p", type=float, default=0.0, help="keep what has p times the likeliest's; 0 is all")
    add("--repetition_penalty", type=float, default=1.0, help="above 1 discourages (default 1)")
    add("--beams", type=int, default=0, help="beam search of this width; 0 samples (default)")
    add("--length_penalty", type=float, default=1.0, help="of beams: above 1 favours long ones (1)")
    add("--stop", action="append", help="end at this text; may be given several times")
    add("--seed", type=int, help="of the drawing (default: another one each time)")
    add("--device", default="auto", help="auto (default), cpu, cuda, mps")
    add("--dtype", default="auto", type=dtype_name,
        choices=("auto", "fp32", "bf16", "fp16", "int8"),
        help="of the weights (default auto: bf16 on CUDA, else fp32); int8 is for CPUs")
    add("--plain", action="store_true", help="write with the Transformer itself, not its Decoder")
    add("--verbose", action="store_true", help="show which products the Decoder timed")
    add("--adapter", action="append", help="LoRA run to lay over --ckpt; several can be switched")
    add("--chat", action="store_true", help="talk in the terminal")
    add("--system", metavar="TEXT", help="with --chat: what the model is told before the talk")
    add("--tools", help="with --chat: hotel, or a .py file whose functions the model may call")
    add("--analogy", help='nearest tokens of e.g. "king - man + woman" in the embedding table')
    add("--choices", help="with --analogy: pick among these, separated by commas")
    return p
# fmt: on


def check_settings(args):
    """DataError for a number that makes no sense."""
    for name, low in (("max_new_tokens", 1), ("num_samples", 1), ("top_k", 0), ("beams", 0)):
        if getattr(args, name) < low:
            raise DataError(f"--{name} {getattr(args, name)} must be at least {low}")
    for name in ("temperature", "top_p", "min_p"):
        value = getattr(args, name)
        if not (0 <= value < math.inf and (name == "temperature" or value <= 1)):
            limit = "0 or more and finite" if name == "temperature" else "from 0 to 1"
            raise DataError(f"--{name} {value} must be {limit}")
    if not 0 < args.repetition_penalty < math.inf:
        penalty = args.repetition_penalty
        raise DataError(f"--repetition_penalty {penalty} must be above 0 and finite")
    if not abs(args.length_penalty) <= 10:
        raise DataError(f"--length_penalty {args.length_penalty} must be from -10 to 10")
    if args.seed is not None and not 0 <= args.seed < 2**62:
        raise DataError(f"--seed {args.seed} must be from 0 to 2**62")
    if args.chat and (args.prompt or args.prompt_ids or args.beams or args.num_samples > 1):
        raise DataError("--chat takes no --prompt, --beams or --num_samples")
    if args.choices and not args.analogy:
        raise DataError("--choices is for --analogy")
    for name in ("tools", "system"):
        if getattr(args, name) is not None and not args.chat:
            raise DataError(f"--{name} is for --chat")
    if args.beams and args.stop:
        raise DataError("--stop does not work with --beams, which end with the end of the text")
    if args.beams and args.num_samples > args.beams:
        raise DataError(f"--num_samples {args.num_samples} is more than --beams {args.beams}")


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.temperature is None:
        args.temperature = 0.0 if args.tools else 0.8
    check_settings(args)
    tools = load_tools(args.tools) if args.tools else None
    ids_alone = args.prompt_ids is not None and args.print_ids and not args.beams
    model, tokenizer, where = load(
        args.ckpt, args.device, args.dtype, args.adapter or (), ids_alone
    )
    if args.ckpt is None:
        print(f"[{where}]", file=sys.stderr)
    if args.analogy is not None:
        choices = [c.strip() for c in (args.choices or "").split(",") if c.strip()]
        table = model.embed.weight.detach().cpu()
        for text, cosine in analogy(args.analogy, tokenizer, table, choices):
            print(f"{cosine:7.3f}  {text!r}")
        return
    if args.chat:
        model = decoder(model, 1, args)
        settings = {name: getattr(args, name) for name in DECODING}
        chat = Chat(model, tokenizer, tools, args.max_new_tokens, args.seed, settings)
        if args.system:
            chat.command(f"/system {args.system}")
        talk(chat)
        return
    prompts = read_prompts(args, tokenizer, model.config.vocab_size)
    if labels := tokenizer and labels_of(tokenizer):
        rows = [p[1 - model.config.context :] + [tokenizer.eot] for p in prompts]
        goals = [tokenizer.special[label_token(name)] for name in labels]
        for row in classify(model, rows, goals).exp().tolist():
            best = sorted(zip(row, labels), reverse=True)
            print("  ".join(f"{name} {p:.3f}" for p, name in best))
        return
    rows = args.beams or len(prompts) * args.num_samples
    model = decoder(model, rows, args)
    if args.beams:
        ids = [i for p in prompts for i in write_beams(model, tokenizer, p, args)]
    elif tokenizer is None:
        ids = write_ids(model, prompts, args)
    else:
        ids = write_rows(model, tokenizer, prompts, args)
    if args.print_ids:
        print("\n".join(",".join(map(str, row)) for row in ids))


if __name__ == "__main__":
    console(main, ModelError)
