"""Hugging Face's tokenizers in and out: tokenizer.json and its neighbours."""
import base64
import itertools
import re
from collections import Counter
from pathlib import Path

import regex

from data.chat import get_template
from data.cli import UserError
from data.files import read_json
from data.tokenizer import ANY_CHARACTER, END, UNKNOWN, Tokenizer

# --------------------------------------------------------------------------------------------
# In
# --------------------------------------------------------------------------------------------

# tokenizer.json spells the bytes of a token as characters, the way GPT-2 did: the printable ones of
# Latin-1 stand for themselves, the others for the characters from U+0100 on (a space is Ġ).
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_HIDDEN = sorted(set(range(256)) - set(_PRINTABLE))
BYTE_CHARS = {b: chr(b) for b in _PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(_HIDDEN)}
CHAR_BYTES = {c: b for b, c in BYTE_CHARS.items()}
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Each digit alone, and GPT-2's pattern on the stretches between: blanks before a digit are the end
# of their stretch, so all of them are one piece, where GPT-2 keeps the last for the word behind it.
DIGITS_PATTERN = r"\p{N}|" + GPT2_PATTERN.replace(r"| ?\p{N}+", "").replace(
    r"|\s+(?!\S)", r"|\s+(?=\p{N})|\s+(?!\S)"
)
MOST_LOST = 64  # bytes without a token at most: SmolLM2 lacks some 20, those of rare characters
WORD_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
ID_LIMIT = 1_000_000  # no vocabulary is as large; a larger id is a damaged file


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
    """The last pieces of `token` before byte-pair encoding makes it one: two, if it ever does.

    These two are the only pair that it is ever made of, in any text: merges of lower rank inside
    it come first, and one across its border would leave no whole token here.

    >>> bpe_parts(b"low", {b"l": 0, b"o": 1, b"w": 2, b"lo": 3, b"low": 4})
    [b'lo', b'w']
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, ID_LIMIT) for a, b in itertools.pairwise(parts)]
        best = min(joined)
        if best == ID_LIMIT:
            break
        i = joined.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def hub_pattern(pre):
    """The split pattern of a pre_tokenizer; ValueError if it is none of the three that we know."""
    steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    kinds, first, last = [s["type"] for s in steps], steps[0], steps[-1]
    own = last.get("use_regex", True)
    plain = kinds[-1] == "ByteLevel" and last.get("add_prefix_space") is False
    if plain and own and kinds == ["ByteLevel"]:
        return GPT2_PATTERN
    if plain and own and kinds == ["Digits", "ByteLevel"] and first["individual_digits"] is True:
        return DIGITS_PATTERN
    split = plain and not own and kinds == ["Split", "ByteLevel"]
    if not split or first["behavior"] != "Isolated" or first.get("invert"):
        raise ValueError(
            f"pre_tokenizer {' + '.join(kinds)}, with its settings, is none of ByteLevel, Digits + "
            f"ByteLevel and Split + ByteLevel, without add_prefix_space"
        )
    pattern = first["pattern"].get("Regex", "")
    # Their regular expressions are Ruby's, tiktoken's are Rust's: these mean something else there.
    bare = re.sub(r"\\[pP]\{\w+\}|\\.|\[(?:\\.|[^\]\\])*\]", "", pattern)
    if re.search(r"[$^]|\}\+|\(\?[a-z-]*[msx]", bare) or regex.fullmatch(pattern, ""):
        raise ValueError(f"pre_tokenizer: its pattern {pattern!r} splits otherwise in tiktoken")
    return pattern


def hub_tokens(model, added):
    """Bytes -> id of a byte-level BPE model of tokenizer.json, `added` (name -> id) left out.

    ValueError if it is another kind of model, or one that tiktoken, which merges any two tokens
    that join to a third, those of the lowest id first, would read otherwise.
    """
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"model {model['type']}: only byte-level BPE can be read")
    if model.get("byte_fallback"):
        raise ValueError(
            "model: byte_fallback is SentencePiece's (Llama 2, TinyLlama, Mistral 7B); only "
            "byte-level BPE can be read"
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise ValueError(f"model: {key} {model[key]!r}: only byte-level BPE can be read")
    vocab = model["vocab"]
    ranks = {unspell(text): i for text, i in vocab.items() if text not in added}
    ids = [*ranks.values(), *added.values()]
    if bad := [i for i in ids if type(i) is not int or not 0 <= i < ID_LIMIT]:
        raise ValueError(f"{bad[0]!r} is no token id")
    twice = [i for i, n in Counter(ids).items() if n > 1]
    twice += [i for name, i in added.items() if vocab.get(name, i) != i]
    if twice:
        raise ValueError(f"model and added_tokens disagree about id {twice[0]}")
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing and (len(missing) > MOST_LOST or model.get("unk_token") is not None):
        raise ValueError(f"model: {len(missing)} bytes have no token, 0x{missing[0]:02X} first")
    check_merges(model["merges"], ranks, model.get("ignore_merges"))
    return ranks


def check_merges(merges, ranks, ignore_merges):
    """ValueError unless merging by id is what the `merges` of tokenizer.json say."""
    pairs, last = set(), 0
    for merge in merges:
        pair = tuple(map(unspell, merge.split(" ") if isinstance(merge, str) else merge))
        new = ranks.get(b"".join(pair))
        if len(pair) != 2 or new is None or not ranks.keys() >= set(pair):
            raise ValueError(f"merge {merge!r} does not make a token of two others")
        if new < last:
            raise ValueError(
                f"merge {merge!r} makes id {new} after id {last}; tiktoken merges by id, so the "
                f"ids must rise along the merges"
            )
        pairs.add(pair)
        last = new
    for token, i in ranks.items():
        parts = bpe_parts(token, ranks)  # more than two: reached only as a whole piece, if at all
        listed = tuple(parts) in pairs if len(parts) == 2 else len(parts) == 1 or ignore_merges
        if not listed:
            raise ValueError(f"token {spell(token)!r} (id {i}) is made by none of the merges")


def hub_begin(post, added):
    """The id that a post_processor puts in front of a text, or None; ValueError if not known."""
    steps = post["processors"] if post and post["type"] == "Sequence" else [post] if post else []
    begin = []
    for step in steps:
        if step["type"] == "TemplateProcessing":
            front = itertools.takewhile(lambda part: "SpecialToken" in part, step["single"])
            names = [part["SpecialToken"]["id"] for part in front]
            begin += [i for name in names for i in step["special_tokens"][name]["ids"]]
        elif step["type"] != "ByteLevel":  # that one moves offsets, no ids
            raise ValueError(f"post_processor {step['type']} can't be read")
    if len(begin) > 1 or not set(begin) <= set(added.values()):
        raise ValueError(f"post_processor: ids {begin} in front are not one added token's")
    return begin[0] if begin else None


def hub_end(folder, added):
    """The id of the end-of-text token that the files beside tokenizer.json name, or None.

    Configurations often carry a default eos_token_id that is no special token of theirs: such a
    one is passed over, or any text with that token in it would end there.
    """
    for name in ("generation_config.json", "config.json"):
        if (path := folder / name).exists():
            ids = read_json(path).get("eos_token_id")
            first = (ids or [None])[0] if isinstance(ids, list) else ids
            if first is not None and type(first) is not int:
                raise UserError(f"{path}: eos_token_id {ids!r} is no token id")
            if first in added.values():
                return first
    if (path := folder / "tokenizer_config.json").exists():
        name = read_json(path).get("eos_token")
        name = name.get("content") if isinstance(name, dict) else name
        if name is not None and not isinstance(name, str):
            raise UserError(f"{path}: eos_token {name!r} is no name of a token")
        if name in added:
            return added[name]
    return added.get(END)


def hub_name(folder):
    """OWNER/NAME of a folder that `snapshot_download` made, or else the folder's own name."""
    parts = Path(folder).resolve().parts
    return "/".join(parts[-3:-1] if parts[-4:-3] == ("hub",) else parts[-1:])


def hub_template(folder):
    """{name: chat template in Jinja} that a model's folder brings, or None."""
    if (path := folder / "chat_template.jinja").exists():
        others = (folder / "additional_chat_templates").glob("*.jinja")
        found = {other.stem: other for other in others} | {"default": path}
        return {name: path.read_text(encoding="utf-8") for name, path in found.items()}
    path = folder / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.exists() else None
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}
    return template and {"default": template}


def template_tokens(folder):
    """The special tokens' names that a template may write: {"bos_token": ..., "eos_token": ...}."""
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    names = {key: config.get(key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    names = {key: n["content"] if isinstance(n, dict) else n for key, n in names.items()}
    return {key: name for key, name in names.items() if isinstance(name, str)}


def hub_ends(folder, added):
    """All ids of added tokens that generation_config.json says end a text."""
    path = folder / "generation_config.json"
    ids = read_json(path).get("eos_token_id") if path.exists() else None
    return [i for i in (ids if isinstance(ids, list) else [ids]) if i in added.values()]


def hub_tokenizer(folder):
    """The spec, of kind hf, of the tokenizer in a Hugging Face model's folder.

    Reads tokenizer.json and, for the end-of-text token, generation_config.json, config.json and
    tokenizer_config.json where they exist. The spec holds "pattern", "nfc", "tokens" (base64, a
    token's place is its id), "added" (name -> id), "end" and "begin" (ids, begin may be None), and
    for an export "name" and "chat_template".
    Added tokens that are special are never spelled by text. The others are in "words", too (name ->
    [id, flags...]), and are cut out of it, see `cut_words`. UserError if a file is missing or
    damaged, or if the tokenizer is no byte-level BPE that tiktoken encodes alike.
    """
    path = Path(folder) / "tokenizer.json"
    data = read_json(path)
    try:
        model, added, words = data["model"], {}, {}
        for t in data.get("added_tokens") or []:
            name = t["content"]
            added[name] = t["id"]
            if not t.get("special", True):
                words[name] = [t["id"], *(flag for flag in WORD_FLAGS if t.get(flag))]
            if not (name if name in words else name.strip()):
                raise ValueError(f"added_tokens: {name!r} is text like any other, not a mark in it")
        made = model.get("merges", ()) if words else ()
        made = {"".join(m.split(" ") if isinstance(m, str) else m) for m in made}
        own = {w for w in words if w in CHAR_BYTES or w in made}  # tokens of the model, too
        own = {w for w in own if model["vocab"].get(w) == added[w]}
        ranks = hub_tokens(model, {name: i for name, i in added.items() if name not in own})
        if (normalizer := data.get("normalizer") or {"type": None})["type"] not in (None, "NFC"):
            raise ValueError(f"normalizer {normalizer['type']} can't be read, only NFC")
        pattern = hub_pattern(data.get("pre_tokenizer") or {"type": "none"})
        begin = hub_begin(data.get("post_processor"), added)
        end = hub_end(path.parent, added)
        if end is None:
            end = added[END] = max(*ranks.values(), *added.values()) + 1
        tokens = [None] * (max(ranks.values()) + 1)
        for token, i in ranks.items():
            tokens[i] = base64.b64encode(token).decode()
        spec = {"kind": "hf", "pattern": pattern, "nfc": normalizer["type"] == "NFC"}
        spec |= {"tokens": tokens, "end": end, "begin": begin}
        spec["added"] = {name: i for name, i in added.items() if name not in own}
        spec["words"] = {w: about for w, about in words.items() if about[0] not in (end, begin)}
        spec |= {"name": hub_name(path.parent), "chat_template": hub_template(path.parent)}
        spec |= {"template_tokens": template_tokens(path.parent)}
        spec |= {"ends": hub_ends(path.parent, added)}
        Tokenizer(spec)  # tiktoken has not seen the pattern yet
    except UserError:
        raise
    except KeyError as e:
        raise UserError(f"{path}: {e} is missing") from e
    except (ValueError, regex.error) as e:
        raise UserError(f"{path}: {' '.join(str(e).splitlines())}") from e
    except (TypeError, AttributeError, IndexError) as e:
        raise UserError(f"{path} is damaged ({e})") from e
    return spec


# --------------------------------------------------------------------------------------------
# Out
# --------------------------------------------------------------------------------------------


def ruby_pattern(pattern):
    """A split pattern of tiktoken's for Ruby's regular expressions, which Hugging Face uses: there
    $ ends a line, {1,3}+ repeats, and s is no flag."""
    pattern = pattern.replace(ANY_CHARACTER, r"[\s\S]").replace("$", r"(?![\s\S])")
    return re.sub(r"(\{\d+(?:,\d*)?\})\+", r"\1", pattern)


def tokenizer_json(tokenizer):
    """The content of tokenizer.json for a Tokenizer: transformers reads the same ids out of it.

    Merges are found again from the ids (a second or two for 100,000 tokens). One thing differs
    there: text that spells a special token becomes it. UserError if an ordinary token is spelled
    like a special one: tokenizer.json could not tell them apart.
    """
    ranks = dict(sorted(tokenizer.encoding._mergeable_ranks.items(), key=lambda item: item[1]))
    kind, words = tokenizer.spec["kind"], tokenizer.spec.get("words", {})
    added = tokenizer.special | {w: i for w, (i, *_) in words.items()}
    added = dict(sorted(added.items(), key=lambda item: item[1]))
    own = kind == "hf"  # its pattern came from there
    pattern = tokenizer.spec["pattern"] if own else ruby_pattern(tokenizer.encoding._pat_str)
    split = {"type": "Split", "pattern": {"Regex": pattern}}
    split |= {"behavior": "Isolated", "invert": False}
    if kind == "char":
        vocab = {token.decode(): i for token, i in ranks.items()}
        model = {"type": "WordLevel", "unk_token": UNKNOWN}
        pre, decoder = split, {"type": "Fuse"}
    else:
        vocab = {spell(token): i for token, i in ranks.items()}
        halves = [bpe_parts(token, ranks) for token in ranks]
        merges = [[spell(pair[0]), spell(pair[1])] for pair in halves if len(pair) == 2]
        # tiktoken, too, takes a piece that is a token as it is, before any merge; a word is none
        whole = not words or any(len(pair) > 2 for pair in halves)
        model = {"type": "BPE", "dropout": None, "unk_token": None, "ignore_merges": whole}
        model |= {"continuing_subword_prefix": None, "end_of_word_suffix": None}
        model |= {"fuse_unk": False, "byte_fallback": False, "merges": merges}
        bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
        bytes_ |= {"use_regex": False}
        pre, decoder = {"type": "Sequence", "pretokenizers": [split, bytes_]}, bytes_
    if clash := {name for name, i in added.items() if vocab.get(name, i) != i}:
        raise UserError(f"special token {min(clash)!r} is spelled like an ordinary one")
    model["vocab"] = vocab | added  # there they keep their ids, whatever gaps lie between
    tokens = []
    for name, i in added.items():
        flags = {flag: flag in words.get(name, ()) for flag in WORD_FLAGS}
        tokens.append({"id": i, "content": name, **flags, "special": name not in words})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens,
        "normalizer": {"type": "NFC"} if tokenizer.spec.get("nfc") else None,
        "pre_tokenizer": pre,
        "post_processor": begin_template(tokenizer),
        "decoder": decoder,
        "model": model,
    }


def begin_template(tokenizer):
    """The post_processor that puts `tokenizer.bos_id` in front of a text; None without one."""
    names = {i: name for name, i in tokenizer.special.items()}
    if (name := names.get(tokenizer.bos_id)) is None:
        return None
    front = {"SpecialToken": {"id": name, "type_id": 0}}
    text, other = ({"Sequence": {"id": n, "type_id": t}} for n, t in (("A", 0), ("B", 1)))
    return {
        "type": "TemplateProcessing",
        "single": [front, text],
        "pair": [front, text, other],
        "special_tokens": {name: {"id": name, "ids": [tokenizer.bos_id], "tokens": [name]}},
    }


def tokenizer_config(tokenizer):
    """The content of tokenizer_config.json beside tokenizer_json's: the class for transformers, the
    end-of-text token and, if the tokenizer can chat, the template that it came with, or else
    ours."""
    names = {i: name for name, i in tokenizer.special.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": names[tokenizer.eos_id],
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.bos_id is not None:
        config["bos_token"] = names[tokenizer.bos_id]
    if template := get_template(tokenizer):
        config |= {key: v for key, v in template.variables.items() if key.endswith("_token")}
        named = [{"name": name, "template": text} for name, text in template.sources.items()]
        config["chat_template"] = named if len(named) > 1 else named[0]["template"]
    return config


def generation_config(tokenizer):
    """The content of generation_config.json: all ids that end what a model says."""
    ends = {tokenizer.eos_id, tokenizer.special.get(END, tokenizer.eos_id)}
    if template := get_template(tokenizer):
        ends |= template.ends
    return {"eos_token_id": sorted(ends) if len(ends) > 1 else tokenizer.eos_id}
