"""data/schema.py: which texts fit a schema, and that ids which fit keep their probabilities."""

import json
import random

import pytest
import torch
from conftest import BYTE, CALL, CHAT, END
from test_finetune_runs import small_model

import sample
from data.chat import get_template
from data.reply import parse
from data.schema import call_grammar, json_grammar, make_constraint

OBJECT = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "价": {"type": ["string", "null"]},
                   "c": {"enum": ["x", 3]}, "d": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["a"],
}  # fmt: skip
CASES = [  # a schema, what fits it, what does not
    (OBJECT,
     ['{"a": 1}', '{"a":-12,"价":null}', '{"价": "q\\u00e9中\\n", "a": 0}', '{\n  "a": 1\n}',
      '{"c": 3, "a": 5, "d": [{"a": 1}, {"a": 2, "d": []}]}'],
     ["{}", '{"a": 01}', '{"a": 1.5}', '{"a": 1,}', '{"a": 1, "a": 2}', '{"a": 1, "z": 2}',
      '{"a": 1}}', '{"a": 1', '{"c": "y"', '{"a": 1, "d": [{}]}', "[", '{"a": "\n']),
    ({}, ["1.5e-7", "-0", '[1, {"q": [true, null]}]', '"\\""', "[]", "{}"],
     ["01", "1.", "tru", "+1", '"\t"', '"\\x"', "[1,]", "'a'", ""]),
    ({"anyOf": [{"type": "boolean"}, {"const": "tru"}], "nullable": True},
     ["true", "false", '"tru"', "null"], ['"true"', "tru", "nul", "1"]),
    ({"type": "object", "additionalProperties": {"type": "number"}},
     ['{"any": 1, "more": 2.5}', "{}"], ['{"any": "1"}', '{"a": 1 "b": 2}']),
    ({"type": "object", "additionalProperties": False}, ["{}"], ['{"a": 1}']),
    ({"$ref": "#/$defs/t~1", "$defs": {"t/": {"type": "string"}}}, ['""'], ["1"]),
    ({"$ref": "#/$defs/40", "$defs": {"0": {"type": "integer"}, **{  # 2^40 ways to the integer
        str(n): {"anyOf": [{"$ref": f"#/$defs/{n - 1}"}] * 2} for n in range(1, 41)}}},
     ["1"], ["true"]),
]  # fmt: skip


def fits(schema, text):
    state = make_constraint(BYTE, json_grammar(schema, [BYTE.eos_id]))
    for i in [*text.encode(), BYTE.eos_id]:
        state = state and state.after(i)
    return bool(state)


@pytest.mark.parametrize("schema, good, bad", CASES)
def test_texts_that_fit_a_schema_and_those_that_do_not(schema, good, bad):
    assert [fits(schema, text) for text in good + bad] == [True] * len(good) + [False] * len(bad)


@pytest.mark.parametrize("schema", [case[0] for case in CASES])
def test_whatever_is_drawn_is_json(schema):
    for seed in range(20):
        rng, ids = random.Random(seed), []
        state = make_constraint(BYTE, json_grammar(schema, [BYTE.eos_id]))
        while BYTE.eos_id not in ids:
            weights = [20 * (i in b'"]}') + (i < 128) for i in range(256)] + [20]
            while not (after := state.after(i := rng.choices(range(257), weights)[0])):
                pass
            ids, state = [*ids, i], after
        json.loads(text := bytes(ids[:-1]).decode())
        assert fits(schema, text)


@pytest.mark.parametrize("schema, problem", [
    ({"type": "string", "minLength": 3}, "minLength"), ({"type": "text"}, "type"), (5, "5"),
    ({"properties": {"a": {"items": 3}}}, "3 is malformed"), ({"$ref": "#/$defs/none"}, "none"),
    ({"$ref": "#"}, "#"), ({"enum": []}, "enum"), ({"anyOf": [{}], "properties": {}}, "anyOf"),
    ({"items": False}, "False"), ({"anyOf": [False]}, "False"), ({"required": "a"}, "required"),
])
def test_what_is_not_supported_is_said(schema, problem):
    with pytest.raises(ValueError, match=problem):
        json_grammar(schema, [256])


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_ids_that_fit_keep_their_ratios(monkeypatch, temperature):
    """Every way to draw is followed, with its probability: their sums are those of the ids that
    fit, renormalised."""
    torch.manual_seed(0)
    logits, shares, scripts = torch.full((260,), -torch.inf), torch.zeros(260), [[]]
    logits[list(b"t{n#!abc")] = 2 * torch.randn(8)
    state = make_constraint(BYTE, json_grammar({}, [256]))
    fit = torch.tensor([bool(state.after(i)) for i in range(260)])

    def draw(logits, *_):
        p = (logits[0] / max(temperature, 1e-4)).softmax(0)
        options = p.nonzero()[:, 0].tolist()
        if len(path) >= len(script):
            scripts.extend([*path, i] for i in options[1:])
        path.append(script[len(path)] if len(path) < len(script) else options[0])
        chances.append(p[path[-1]].item())
        return path[-1:]

    monkeypatch.setattr(sample, "next_token", draw)
    ways = 0
    while scripts:
        script, path, chances = scripts.pop(), [], []
        text = sample.Text(0, uniforms=[0.0] * 99, constraint=state)
        i = sample.fitting(text, logits, *draw(logits[None]))
        assert str(text.constraint.stacks) == str(state.after(i).stacks)
        shares[i] += torch.tensor(chances).prod()
        ways += 1
    wanted = logits.masked_fill(~fit, -torch.inf)
    wanted = (wanted / temperature).softmax(0) if temperature else wanted == wanted.max()
    assert torch.allclose(shares, wanted.float(), atol=1e-6)
    assert ways > 20 * bool(temperature)


TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}}
         for name, schema in (("find", OBJECT), ("wait", {"type": "object", "minProperties": 1}))]


def test_a_call_can_only_be_one_of_a_tool():
    """A model that knows nothing calls as the schema says, if it begins a call."""
    template, model = get_template(CHAT), small_model(vocab_size=320, context=400)
    bias, names = {CALL: 7.0, END: 7.0, **dict.fromkeys(b'"}]', 9.0)}, set()
    allowed = sample.allowed_ids(model, CHAT, chat=True)
    for seed in range(8):
        ids, state = [], make_constraint(CHAT, call_grammar(template, TOOLS))
        options = dict(seed=seed, allowed=allowed, constraint=state, logit_bias=bias)
        for [i] in sample.generate(model, [[1]], 99, **options):
            ids.append(i)
            if i in template.ends:
                break
        for call in parse(ids, template).get("tool_calls", ()) if i in template.ends else ():
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            names.add(name)
            assert fits(OBJECT if name == "find" else {"type": "object"}, arguments)
    assert names == {"wait", "find"}
