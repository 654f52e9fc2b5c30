"""data/hotel.py: the search, and values exchanged in dialogues."""

import copy
import itertools
import json
import random
from pathlib import Path

import pytest
from conftest import calls, real, turn

from data import hotel as data_hotel
from data.chat import parse_call
from data.cli import UserError
from data.facts import augment, records_of
from data.hotel import HOTEL_KEYS, read_hotels, repeats, search_hotels, tidy_calls, values_by_key
from data.hotel_env import Env
from data.rows import to_example
from data.sources import hotel_dialogues
from data.tools import load_tools


def substitute(example, pool, share=1.0, rng=None, made_up=0):
    return data_hotel.substitute(example, pool, share, rng or random.Random(0), made_up)


def calling(name, arguments):
    return calls(f"{name} {json.dumps(arguments, ensure_ascii=False)}")


def told(asked, arguments, record, spoken):
    """A conversation with one search, which returns one record."""
    result = turn("tool", json.dumps([record], ensure_ascii=False))
    talk = [turn("user", asked), calling("search", arguments), result, turn("assistant", spoken)]
    return {"messages": talk}


def hotel_talk(facilities, note=""):
    arguments = {"facilities": facilities, "rating_range_lower": 4}
    record = {"name": "wifi", "facilities": facilities, "note": note}
    asked, spoken = f"要有{'和'.join(facilities)}的", f"它有{'、'.join(facilities)}。"
    return told(asked, arguments, record, spoken)


def test_values_are_exchanged_everywhere_at_once_and_nothing_else():
    before = hotel_talk(["健身房", "SPA"], "健身房在二楼")
    pool = {"call.facilities": ["接机"], "tool.facilities": ["酒吧"], "tool.name": ["听涛宾馆"]}
    rng = random.Random(0)
    rng.random = iter([0.0, *[0.9] * 9]).__next__  # only the first value is exchanged
    after = substitute(before, pool, 0.5, rng)
    assert after == hotel_talk(["接机", "SPA"], "接机在二楼")
    assert before == hotel_talk(["健身房", "SPA"], "健身房在二楼")
    # a value inside another is not torn out of it
    inside, values, new = hotel_talk(["上网", "上网服务"]), ["接机", "SPA"], ["SPA", "接机"]
    rng.choice = lambda values: new.pop()
    after = substitute(inside, {"call.facilities": values}, rng=rng)
    assert after == hotel_talk(values)
    rng.random, new[:] = iter([0.0, 0.9, 0.9]).__next__, ["接机"]
    after = substitute(inside, {"call.facilities": values}, 0.5, rng)
    assert after == hotel_talk(["接机", "上网服务"])
    assert substitute(both := hotel_talk(values), {"call.facilities": values}) is both
    # what was not said stays, but for what may be asked for
    unsaid = {"messages": [turn("user", "x"), *before["messages"][1:3]]}
    assert substitute(unsaid, {"call.facilities": ["接机"]}) is unsaid
    result = substitute(unsaid, {"tool.name": ["听涛宾馆"]})
    record, = json.loads(result["messages"][2]["content"])
    assert record["name"] == "听涛宾馆" and record["facilities"] == ["健身房", "SPA"]


def test_what_the_assistant_reads_out_is_exchanged_unless_the_guest_has_said_it():
    def talk(name, price, rating):
        record = {"name": name, "price": price, "rating": rating, "phone": "010-45867"}
        record |= {"size": 12, "type": "豪华型"}  # too short; not read out, nor asked for
        spoken = f"{name}：{price}元，{rating}分，电话010-45867，450元以上，12间"
        return told("450元以上的", {"price_range_lower": 450}, record, spoken)

    pool = {"tool.price": [612], "tool.rating": [4.9], "tool.phone": ["010-45867"]}
    pool |= {"tool.name": ["听涛宾馆"], "tool.type": ["经济型"], "tool.size": [13]}
    after = substitute(talk("北京饭店", 458, 4.5), pool)
    assert after == talk("听涛宾馆", 612, 4.9)  # no part of the phone number
    said = talk("北京饭店", 450, 4.5)
    assert substitute(said, pool) == talk("听涛宾馆", 450, 4.9)
    values = values_by_key([said])
    assert (values["tool.name"], values["tool.price"]) == (["北京饭店"], [450])


def test_odd_values_survive_an_exchange():
    odd = ['a"b', "c\\d", "$1.*", "x|y", "(健身房)", "name", "facilities", "\\g<0>", "换\n行"]
    examples = [hotel_talk([a, b]) for a in odd for b in odd if a != b]
    pool, rng = values_by_key(examples), random.Random(0)
    assert set(pool["call.facilities"]) == set(odd) and "call.rating_range_lower" not in pool
    for e in examples:
        after = substitute(e, pool, 0.7, rng)
        new = parse_call(after["messages"][1]["tool_calls"][0])[1]["facilities"]
        record = json.loads(after["messages"][2]["content"])[0]
        assert record["facilities"] == new and set(new) <= set(odd)
        assert after["messages"][::3] == hotel_talk(new)["messages"][::3]


def test_made_up_values_begin_like_one_and_end_like_another():
    before, values, seen = hotel_talk(["健身房", "SPA"]), ["甲乙丙", "一二三"], set()
    for seed in range(200):
        after = substitute(before, {"call.facilities": values}, 1.0, random.Random(seed), 1)
        new = parse_call(after["messages"][1]["tool_calls"][0])[1]["facilities"]
        assert after == hotel_talk(new)
        seen |= set(new) - {"健身房", "SPA"}
    parts = [(a[:i], b[-j:]) for a in values for b in values for i in (1, 2, 3) for j in (1, 2, 3)]
    assert seen <= {start + end for start, end in parts} and len(seen) > 20


def test_calls_are_tidied_and_say_the_same():
    arguments = {"type": "豪华型", "facilities": ["c", "a", "z", "b"], "n": [2, 1]}
    talk = [turn("user", "b then c then a"), calling("f", arguments)]
    after = tidy_calls({"messages": talk})["messages"]
    tidy = parse_call(after[1]["tool_calls"][0])[1]
    assert list(tidy) == ["facilities", "n", "type"] and after[0] == talk[0]
    assert tidy == arguments | {"facilities": ["b", "c", "a", "z"]}
    assert tidy_calls({"messages": after})["messages"] == after


def test_rarely_passed_keys_come_in_the_share_of_conversations_that_is_wanted():
    def talk(**arguments):
        return {"messages": [turn("user", "?"), calling("search", arguments)]}

    talks = [talk(type="a")] * 9 + [talk(type="b", name="c")] * 2 + [talk()]
    assert repeats(talks, share=1 / 3) == [1] * 9 + [2] * 2 + [1]  # 12 / 3 / 2
    assert repeats(talks, share=1 / 12) == [1] * 12
    assert max(repeats([talk(**{f"key{i}": 1}) for i in range(300)])) == 8


def test_augmented_epochs_depend_on_their_seed_alone():
    examples = [tidy_calls(to_example(row)[1]) for row in data_hotel.synthetic_dialogues(40, "x")]
    first, again, second = (augment(examples, 0.5, random.Random(seed)) for seed in (3, 3, 4))
    assert first == again != second and len(first) == len(second) == 40


FOUR = [dict(zip(("name", "price", "rating", "type", "facilities"), values)) for values in (
    ("北京饭店", 300, 4.0, "豪华型", ["公共区域和部分房间提供wifi", "健身房"]),
    ("听涛宾馆", 400, 4.5, "舒适型", ["洗衣服务"]),
    ("c", None, None, "舒适型", []), ("d", 401, 4.9, "舒适型", []),
)]  # fmt: skip


@pytest.mark.parametrize("wanted, names", [
    ({}, ["d", "听涛宾馆"]),  # the two best rated
    (dict(price_range_lower=300, price_range_upper=400), ["听涛宾馆", "北京饭店"]),
    (dict(price_range_upper=0), []),
    (dict(rating_range_lower=4.0, rating_range_upper=4.0), ["北京饭店"]),
    (dict(name="c"), ["c"]),  # an unknown price is outside of ranges only
    (dict(name="c", price_range_lower=0), []),
    (dict(name="听涛宾馆（西直门店）"), ["听涛宾馆"]),
    (dict(type="舒适型", price_range_upper=None), ["d", "听涛宾馆"]),
    (dict(facilities=["部分房间提供wifi", "健身房"]), ["北京饭店"]),
    (dict(facilities=["房间和公共区域提供wifi"]), ["北京饭店"]),
    (dict(facilities=["洗衣"]), ["听涛宾馆"]),
    (dict(facilities=["健身房", "洗衣服务"]), []),
])
def test_a_search_finds_what_fits_all_that_is_wanted_in_the_guests_words(wanted, names):
    assert [h["name"] for h in search_hotels(FOUR, **wanted)] == names


def test_our_own_hotels_have_all_fields_and_can_all_be_found(elsewhere):
    hotels = read_hotels()
    assert len(hotels) >= 50
    for h in hotels:
        assert list(h)[:8] == [*HOTEL_KEYS.values()] and h["facilities"]
        assert h in search_hotels(hotels, name=h["name"], facilities=h["facilities"])


def test_the_public_data_base_is_read_into_the_same_fields():
    path = real("hotel/hotel_db.json")
    hotels, raw = read_hotels(path), json.loads(path.read_text(encoding="utf-8"))
    assert [h["name"] for h in hotels] == [name for name, _ in raw]
    assert all(list(h) == [*HOTEL_KEYS.values()] for h in hotels)
    assert not any(f != f.strip() or not f for h in hotels for f in h["facilities"])


def test_a_failed_download_leaves_the_search_with_the_hotels_that_it_names(
    elsewhere, monkeypatch, capsys
):
    def fetch(url, dest="rows.jsonl"):
        if "dev" in url:
            raise UserError("offline")
        Path(dest).parent.mkdir(parents=True, exist_ok=True)
        Path(dest).touch()
        return Path(dest)

    monkeypatch.setattr("data.sources.fetch", fetch)
    with pytest.raises(UserError, match="offline"):
        hotel_dialogues()
    load_tools("hotel")
    count = len(read_hotels(data_hotel.OWN_HOTELS))
    assert f"[search knows {count} hotels of {data_hotel.OWN_HOTELS}]" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", '[["a"]]', "[1]", '[{"name": "a"}]', '[["a", {"名称": 1}]]'])
def test_what_is_no_data_base_is_said(text, tmp_path):
    (tmp_path / "hotels.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"hotels.json is not a hotel database"):
        read_hotels(tmp_path / "hotels.json")


@pytest.mark.parametrize("reply, least, most", [
    ("{}", 1, 1), ("", 0.5, 0.5), ("推荐北京好梦酒店，99元。", 0.5, 0.6), ("{0}{0}", 0.5, 0.9),
    ("{}" + "好" * 160, 0.5, 0.5), (None, 0.1, 0.5),
])
def test_a_guest_is_content_with_right_calls_and_true_replies(reply, least, most, elsewhere):
    """Half of the reward is the calls', which are right here, or made again and again."""
    guest, rewards = Env([to_example(r)[1] for r in data_hotel.synthetic_dialogues(60, "x")]), []
    for seed, _ in itertools.product(range(20), "ab"):
        env, talk, done = copy.copy(guest), [], False
        new = env.reset(seed)
        while not done:
            talk, wanted = [*talk, *new], env.turns[-1][0]
            if isinstance(wanted, dict) and (new[-1]["role"] == "user" or reply is None):
                talk.append(calling("search", wanted))
            else:
                names = "、".join(records_of(new)) or "没有"
                right = names if isinstance(wanted, dict) else wanted
                talk.append(turn("assistant", (reply or "").format(right)))
            new, done = env.step(talk[-1])
        rewards.append(env.reward(talk))
    assert rewards[::2] == rewards[1::2] and least <= sum(rewards) / len(rewards) <= most
