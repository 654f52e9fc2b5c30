"""data/tools.py: functions of a file, their schemas, calls."""

import inspect
import json
import typing
from typing import Any, Literal

import pytest
from conftest import CHAT, calls

from data import tools as data_tools
from data.cli import UserError
from data.schema import fits
from data.tools import function_schema, load_tools, type_schema


def call_tool(tools, text):
    """What a tool returns for `name {arguments}`."""
    return data_tools.call_tool(tools, calls(text)["tool_calls"][0])


FILE = """
from __future__ import annotations
from json import dumps
import asyncio, functools, math
class Thing: pass
FACTOR = 2
def _twice(x): return FACTOR * x
def double(x: int): return _twice(x)
def now(): return math.pi
@functools.cache
def once(x: int = 1): return x
async def slow(x: int):
    await asyncio.sleep(0)
    return [x]
async def bad(): raise KeyError("没有")
"""


def test_the_public_functions_of_a_file_are_tools_and_nothing_else(tmp_path):
    path = tmp_path / "tools.py"
    path.write_text(FILE, encoding="utf-8")
    tools = load_tools(str(path))
    assert set(tools) == {"double", "now", "once", "slow", "bad"}
    assert call_tool(tools, 'slow {"x": 21}') == "[21]" and call_tool(tools, "once {}") == "1"
    assert json.loads(call_tool(tools, "bad {}")) == {"error": "bad failed: KeyError: '没有'"}
    assert call_tool(tools, 'double {"x": 21}') == "42"
    assert "x cannot be 'a'" in call_tool(tools, 'double {"x": "a"}')


@pytest.mark.parametrize("text, reason", [
    (None, "no such file"),
    ("def f(:\n", "SyntaxError"),
    ("def f(x: 'Nothing'): pass\n", "signature of f cannot be read: write it .*Nothing"),
    ("from typing import *\ndef f(x: Literal[b'a']): pass\n", "of f cannot be read: .*bytes"),
    ("from enum import *\nclass A(Enum): a = 1\ndef f(x: list[A]): pass\n", "A is an Enum"),
    ("import math\ndef get_tools(): return {'s': math.sqrt}\n", "of s .* x is taken by pos"),
    ("def get_tools(): return {'a': 5}\n", "signature of a .*5 is not a callable object"),
    ("from json import dumps\ndef _f(): pass\n", "no function"),
])
def test_a_file_of_tools_that_cannot_be_used_is_named(tmp_path, text, reason):
    path = tmp_path / "tools.py"
    if text:
        path.write_text(text)
    with pytest.raises(UserError, match=f"^.*{path}.*{reason}.*$"):
        load_tools(str(path))


@pytest.mark.parametrize("annotation, good, bad", [
    (str, ["", "x"], [1, None, True, [], {}]),
    (list[str], [["a"], []], ["a", None, [1]]),
    (typing.Optional[float], [1, 1.5, None], [False, "1"]),  # noqa: UP045
    (int, [1, -2], [1.5, True, "1"]),
    (bool, [True, False], [0, 1, "true"]),
    (typing.Literal["a", "你"], ["a", "你"], ["c", 1, None, []]),
    (dict[str, int], [{}, {"a": 1}], [{"a": "1"}, []]),
    (inspect.Parameter.empty, [1, None, "x", [], {}], []),
])
def test_json_values_suit_the_types_of_parameters(annotation, good, bad):
    found = [fits(v, type_schema(annotation)) for v in good + bad]
    assert found == [True] * len(good) + [False] * len(bad)


def test_choices_in_a_docstring_are_of_the_parameters_type():
    def pick(flag: bool, k: float = 1.0, days: list[str] = (), n: int | str = 1):
        """Pick.

        Args:
            flag: F (choices: [true])
            k: K (choices: [1, 0.5])
            days: D (choices: ["一", "二"])
            n: N (choices: [1, auto])
        """
        return "picked"

    assert call_tool({"pick": pick}, 'pick {"flag": true, "k": 0.5, "days": ["一"]}') == '"picked"'
    assert "(choices: [1, auto])" in json.dumps(function_schema("pick", pick))  # of a union: words
    for wrong in ('"flag": "true"', '"flag": false', '"flag": true, "days": "一"'):
        assert "cannot be" in call_tool({"pick": pick}, f"pick {{{wrong}}}")


@pytest.mark.parametrize("content, reason", [
    ('book {"city": "x"', "not JSON"),
    ("book " + "[" * 100_000, "not JSON"),
    ('fly {"city": "x"}', "fly: no such tool, only book"),
    ('book {"city": "x", "stars": 1}', "stars"),
    ('book {"nights": 1}', "city"),
    ('book {"city": "x", "nights": true}', "nights cannot be True"),
])
def test_a_call_that_does_not_fit_never_reaches_the_tool(content, reason):
    def book(city: str, nights: int = 1):
        raise AssertionError("called")

    result = json.loads(call_tool({"book": book}, content))
    assert set(result) == {"error"} and reason in result["error"]


def test_what_tools_return_is_json_and_what_they_raise_is_told():
    tools = {"echo": lambda text, **others: {"heard": text, **others}, "odd": lambda: {1, 2}}
    assert call_tool(tools, 'echo {"text": "你好 👩"}') == '{"heard": "你好 👩"}'
    assert json.loads(call_tool(tools, 'echo {"text": "a", "b": [1]}'))["b"] == [1]
    assert "odd failed: TypeError" in call_tool(tools, "odd {}")
    half = call_tool(tools, r'echo {"text": "\ud83d"}')  # half of a pair, as models write
    assert CHAT.decode(CHAT.encode(half)) and json.loads(half)


def look_up(city: str, days: int = 3, units: Literal["c", "f"] = "c", k: str = "u") -> list[dict]:
    """The weather of a city,
    day by day.

    Args:
        city: Its name, in any
            language.
        days (int): How many days.
        units: Of the temperature.
        k: One of these (choices: ["u", "v"])

    Returns:
        A list, one for each day.
    """


def mixed(
    a: str | None, c: list[int], d: dict[str, float], e: bool | None = None, g: list = (),
    h: dict | list[str] = (), i: Any = None, j: Literal[1, "x"] = 1,
):  # fmt: skip
    pass


mixed.__doc__ = "Many kinds.\n\nArgs:\n" + "".join(f"    {x}: {x}.\n" for x in "acdeghij")


@pytest.mark.parametrize("function", [look_up, mixed])
def test_a_functions_schema_is_that_of_transformers_and_without_words_it_has_one_too(function):
    theirs = pytest.importorskip("transformers").utils.get_json_schema(function)
    ours = function_schema(function.__name__, function)
    theirs["function"].pop("return", None)
    assert json.dumps(ours) == json.dumps(theirs)  # the order counts: it is text for a model
    schema = function_schema("f", lambda x, *more, y=2, **rest: 1)["function"]
    told = {"properties": {"x": {"description": ""}, "y": {"description": ""}}, "required": ["x"]}
    assert schema == {"name": "f", "description": "", "parameters": {"type": "object"} | told}
