"""Hugging Face's tokenizers, tokenizer.json and its neighbours: in by `hub_tokenizer`, out by
`tokenizer_json`, `tokenizer_config` and `generation_config`."""

import base64
import itertools
import math
import re
from pathlib import Path

import regex

from data.chat import get_template
from data.cli import MALFORMED, explained
from data.download import find_tokenizer
from data.files import read_json
from data.sentencepiece import is_sentencepiece, read_model, written_json
from data.tokenizer import ANY_CHARACTER, END, UNKNOWN, Tokenizer

# tokenizer.json spells the bytes of a token as characters, as GPT-2 did: printable characters of
# Latin-1 stand for themselves, the other bytes for the characters from U+0100 on (a space is Ġ).
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_HIDDEN = sorted(set(range(256)) - set(_PRINTABLE))
BYTE_CHARS = {b: chr(b) for b in _PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(_HIDDEN)}
CHAR_BYTES = {c: b for b, c in BYTE_CHARS.items()}
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Each digit alone, and GPT-2's pattern on the stretches between: blanks before a digit end their
# stretch, so they are one piece, where GPT-2 would keep the last one for the following word.
DIGITS_PATTERN = (
    r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
)
MAX_MISSING_BYTES = 64  # SmolLM2 lacks tokens for some 20 bytes, those of rare characters


def spell(token):
    """The characters that tokenizer.json writes for the bytes of a token: b" é" is "ĠÃ©"."""
    return "".join(map(BYTE_CHARS.__getitem__, token))


def unspell(text):
    """The bytes of a token of tokenizer.json; ValueError if it is not spelled in GPT-2's way."""
    try:
        return bytes(map(CHAR_BYTES.__getitem__, text))
    except KeyError as e:
        raise ValueError(f"model: token {text!r} is not byte-level, {e} spells no byte") from e


def bpe_parts(token, ranks):
    """The last pieces of `token` before byte-pair encoding merges them into it: two, if it does.

    These two are the only pair that it is ever made of, in any text: merges of lower rank inside
    it come first, and one across its border would leave no whole token here.

    >>> bpe_parts(b"low", {b"l": 0, b"o": 1, b"w": 2, b"lo": 3, b"low": 4})
    [b'lo', b'w']
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [a + b for a, b in itertools.pairwise(parts)]
        best = min(joined, key=lambda token: ranks.get(token, math.inf))
        if best not in ranks:
            break
        i = joined.index(best)
        parts[i : i + 2] = [best]
    return parts


def hub_pattern(pre):
    """The split pattern of a pre_tokenizer; ValueError if it is none of the three that we know."""
    steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    kinds, first, last = [s["type"] for s in steps], steps[0], steps[-1]
    if kinds[-1] == "ByteLevel" and last.get("add_prefix_space") is False:
        if last.get("use_regex", True):
            if kinds == ["ByteLevel"]:
                return GPT2_PATTERN
            if kinds == ["Digits", "ByteLevel"] and first["individual_digits"] is True:
                return DIGITS_PATTERN
        elif kinds == ["Split", "ByteLevel"] and first["behavior"] == "Isolated":
            pattern = first["pattern"]["Regex"]
            # Hugging Face's regular expressions are Ruby's, which differ from Rust's in these
            bare = re.sub(r"\\[pP]\{\w+\}|\\.|\[(?:\\.|[^\]\\])*\]", "", pattern)
            if re.search(r"[$^]|\}\+|\(\?[a-z-]*[msx]", bare):
                raise ValueError(f"pre_tokenizer: pattern {pattern!r} has another meaning here")
            return pattern
    raise ValueError(f"pre_tokenizer {' + '.join(kinds)}, with its settings, can't be read")


def hub_tokens(model, added):
    """Bytes -> id of a byte-level BPE model of tokenizer.json, `added` (name -> id) left out.

    ValueError if tiktoken would read it otherwise: it merges any two tokens that join to a third,
    in the order of the ids.
    """
    ranks = {unspell(text): i for text, i in model["vocab"].items() if text not in added}
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing and (len(missing) > MAX_MISSING_BYTES or model.get("unk_token") is not None):
        raise ValueError(f"model: {len(missing)} bytes have no token, 0x{missing[0]:02X} first")
    made = [unspell("".join(pair)) for pair in model["merges"]]
    ids = [ranks[token] for token in made]
    if ids != sorted(ids):
        raise ValueError("tiktoken merges by id, but the ids do not rise along the merges")
    others = [token for token in ranks.keys() - set(made) if len(token) > 1]
    if others and not model.get("ignore_merges"):
        raise ValueError(f"token {spell(others[0])!r} is made by none of the merges")
    return ranks


def hub_begin(post, added):
    """The id that a post_processor puts in front of a text, or None; ValueError if not known."""
    begin, post = [], post or {"type": "ByteLevel"}
    for step in post["processors"] if post["type"] == "Sequence" else [post]:
        if step["type"] == "TemplateProcessing":
            for part in itertools.takewhile(lambda part: "SpecialToken" in part, step["single"]):
                begin += step["special_tokens"][part["SpecialToken"]["id"]]["ids"]
        elif step["type"] != "ByteLevel":  # ByteLevel changes offsets, not ids
            raise ValueError(f"post_processor {step['type']} can't be read")
    if len(begin) > 1 or not set(begin) <= set(added.values()):
        raise ValueError(f"post_processor: ids {begin} in front do not belong to one added token")
    return begin[0] if begin else None


def byte_level_spec(data, added):
    """The fields of a spec that only the kind hf has; ValueError if tiktoken encodes otherwise."""
    if (normalizer := data.get("normalizer") or {"type": None})["type"] not in (None, "NFC"):
        raise ValueError(f"normalizer {normalizer['type']} can't be read, only NFC")
    ranks = hub_tokens(data["model"], added)
    tokens = [None] * (max(ranks.values()) + 1)
    for token, i in ranks.items():
        tokens[i] = base64.b64encode(token).decode()
    pattern = hub_pattern(data.get("pre_tokenizer") or {"type": "none"})
    return dict(kind="hf", pattern=pattern, nfc=normalizer["type"] == "NFC", tokens=tokens)


def char_spec(data):
    """The spec of the char tokenizer that `tokenizer_json` has written; ValueError for others."""
    vocab, names = data["model"]["vocab"], [entry["content"] for entry in data["added_tokens"]]
    chars = "".join(sorted(vocab.keys() - {UNKNOWN, *names}, key=vocab.get))
    spec = {"kind": "char", "chars": chars, "special": names[1:]}
    written = tokenizer_json(Tokenizer(spec))
    if any(data.get(key) != written[key] for key in ("model", "normalizer", "pre_tokenizer")):
        raise ValueError("model WordLevel: only one of single characters, as exported from here")
    return spec


def hub_tokenizer(folder):
    """The spec, of kind hf or spm, of the tokenizer in a Hugging Face model's folder.

    pattern, nfc, tokens    how text is split, and base64 of each token; its place is its id
    data                    of kind spm in their place: see SentencePiece
    added, end, begin       name -> id; the ids at the end and (or None) in front of a text
    words                   name -> id of added tokens that are not special
    name, chat_template, template_tokens, ends    for chats, see data/chat.py, and exports

    Text never encodes to special tokens, but `words` are cut out of it. UserError if a file is
    missing or damaged, or if the tokenizer is neither SentencePiece's BPE nor a byte-level one
    that tiktoken encodes alike.
    """
    path = find_tokenizer(folder) or Path(folder) / "tokenizer.json"
    folder = path.parent
    files = [folder / f"{name}config.json" for name in ("tokenizer_", "generation_", "")]
    config, *others = (read_json(file) if file.exists() else {} for file in files)
    data = read_json(path) if path.suffix == ".json" else read_model(path, config)
    config = data.pop("config", {}) | config
    with explained(f"{path} cannot be read", *MALFORMED, regex.error):
        model, entries = data["model"], data.get("added_tokens") or []
        spm, kind = is_sentencepiece(data), model.get("type", "BPE")
        marks = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        if kind == "WordLevel":
            return char_spec(data)
        if kind != "BPE" or marks:
            raise ValueError(f"model {kind}{marks or ''}: only byte-level BPE and SentencePiece's")
        ids = {t["content"]: t["id"] for t in entries}
        words = {t["content"]: t for t in entries if not t.get("special", True)}
        for word, t in words.items():
            if t.get("single_word") or t.get("lstrip") or t.get("rstrip"):
                raise ValueError(f"{word!r} has single_word, lstrip or rstrip set")
        merges = model.get("merges", ())  # in old files a pair is one string
        model["merges"] = [m.split(" ") if isinstance(m, str) else m for m in merges]
        spec = dict(kind="spm", data=data) if spm else byte_level_spec(data, ids)
        names = {f"{n}_token": config.get(f"{n}_token") for n in ("bos", "eos", "unk", "pad")}
        names = {key: n["content"] if isinstance(n, dict) else n for key, n in names.items() if n}
        begin = hub_begin(data.get("post_processor"), ids)
        if path.suffix == ".model" and config.get("add_bos_token"):
            begin = ids.get(names.get("bos_token"))
        ends = [other.get("eos_token_id") for other in others]
        ends = [[i for i in (e if isinstance(e, list) else [e]) if i in ids.values()] for e in ends]
        # a config.json may carry a default eos_token_id that is an ordinary token of this model
        end = next(itertools.chain(*ends), ids.get(names.get("eos_token"), ids.get(END)))
        if end is None:
            end = ids[END] = max((model["vocab"] | ids).values()) + 1
        words = {word: ids[word] for word in words if ids[word] not in (end, begin)}
        spec |= dict(added=ids, words=words, end=end, begin=begin, ends=ends[0])
        parts = folder.resolve().parts  # .../hub/OWNER/NAME/REVISION if it was downloaded
        spec["name"] = "/".join(parts[-3:-1] if parts[-4:-3] == ("hub",) else parts[-1:])
        template = config.get("chat_template")
        if (file := folder / "chat_template.jinja").exists():
            template = file.read_text(encoding="utf-8")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}
        spec |= dict(chat_template=template, template_tokens=names)
        Tokenizer(spec)  # raises if tiktoken cannot compile the pattern
    return spec


def tokenizer_json(tokenizer):
    """The content of tokenizer.json for a Tokenizer, from which transformers gets the same ids.

    Merges are found again from the ids (a second or two for 100,000 tokens). One thing differs
    there: text that spells a special token becomes it.
    """
    spec, words = tokenizer.spec, tokenizer.spec.get("words", {})
    added = dict(sorted((tokenizer.special | words).items(), key=lambda item: item[1]))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    kinds = {n: dict(normalized=n in words, special=n not in words) for n in added}
    entries = [{"id": i, "content": n, **flags, **kinds[n]} for n, i in added.items()]
    if spec["kind"] == "spm":
        return written_json(spec["data"], entries) | {"post_processor": begin_template(tokenizer)}
    ranks = dict(sorted(tokenizer.encoding._mergeable_ranks.items(), key=lambda item: item[1]))
    pattern = spec.get("pattern")
    if spec["kind"] != "hf":
        # in their regular expressions, Ruby's, $ ends a line, {1,3}+ repeats, and s is no flag
        pattern = tokenizer.encoding._pat_str.replace(ANY_CHARACTER, r"[\s\S]")
        pattern = re.sub(r"(\{\d+(?:,\d*)?\})\+", r"\1", pattern.replace("$", r"(?![\s\S])"))
    split = dict(type="Split", pattern={"Regex": pattern}, behavior="Isolated", invert=False)
    if spec["kind"] == "char":
        vocab = {token.decode(): i for token, i in ranks.items()}
        model = {"type": "WordLevel", "unk_token": UNKNOWN}
        pre_tokenizer, decoder = split, {"type": "Fuse"}
    else:
        vocab = {spell(token): i for token, i in ranks.items()}
        parts = [bpe_parts(token, ranks) for token in ranks]
        model = {"type": "BPE", "merges": [list(map(spell, p)) for p in parts if len(p) == 2]}
        # tiktoken takes a piece that is a token as it is, before any merge, but not a word
        model["ignore_merges"] = not words or any(len(p) > 2 for p in parts)
        flags = dict.fromkeys(("add_prefix_space", "trim_offsets", "use_regex"), False)
        decoder = {"type": "ByteLevel"} | flags
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, decoder]}
    model["vocab"] = vocab | added  # in the model, too, they keep their ids whatever gaps there are
    return {
        "version": "1.0",
        "added_tokens": entries,
        "normalizer": {"type": "NFC"} if spec.get("nfc") else None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": begin_template(tokenizer),
        "decoder": decoder,
        "model": model,
    }


def begin_template(tokenizer):
    """The post_processor that puts `tokenizer.bos_id` in front of a text; None without one."""
    if tokenizer.bos_id is None:
        return None
    name = next(name for name, i in tokenizer.special.items() if i == tokenizer.bos_id)
    front = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": n, "type_id": t}} for n, t in (("A", 0), ("B", 1)))
    special = {name: {"id": name, "ids": [tokenizer.bos_id], "tokens": [name]}}
    template = dict(single=[front, first], pair=[front, first, second], special_tokens=special)
    return {"type": "TemplateProcessing"} | template


def tokenizer_config(tokenizer):
    """The content of tokenizer_config.json: class, special tokens, the template if there is one."""
    names = {i: name for name, i in tokenizer.special.items()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config["eos_token"] = names[tokenizer.eos_id]
    if tokenizer.bos_id is not None:
        config["bos_token"] = names[tokenizer.bos_id]
    if template := get_template(tokenizer):
        config |= {key: v for key, v in template.variables.items() if key.endswith("_token")}
        named = [{"name": name, "template": text} for name, text in template.sources.items()]
        config["chat_template"] = named if len(named) > 1 else named[0]["template"]
    return config


def generation_config(tokenizer):
    """The content of generation_config.json: the ids of all tokens that end an answer."""
    ends = {tokenizer.eos_id, tokenizer.special.get(END, tokenizer.eos_id)}
    if template := get_template(tokenizer):
        ends |= template.ends
    return {"eos_token_id": sorted(ends) if len(ends) > 1 else tokenizer.eos_id}
