"""Rewards: how good an answer is, as a number, for `finetune.py --objective grpo --reward NAME`.

A reward is a function of the conversation so far (a list of messages), the answer (a message) and
the data's own answer. If it returns None for the data's own answer, the turn is not learned from.
A function in a file of your own gets both answers as text, a call as `search {"price": 300}`:

    def reward(messages, answer, wanted):
        return float("酒店" in answer)
"""
import copy
import math
import re
import runpy

from data.chat import message_text
from data.cli import UserError, user_code
from data.scores import arguments_of, slot_counts
from data.sources import SOURCES


def slots(messages, answer, wanted):
    """F1 of the calls' slots; 0 for text in place of a call, or arguments that are not JSON."""
    if not wanted.get("tool_calls"):
        return None
    ours = arguments_of(answer)
    if not ours:
        return 0.0
    right, said, asked = slot_counts(ours, arguments_of(wanted))
    return 2 * right / (said + asked) if said + asked else 1.0


def label(messages, answer, wanted):
    """1 if the answer begins with the wanted label, whatever follows; else 0."""
    wanted, said = (message_text(m).strip().lower() for m in (wanted, answer))
    return float(bool(re.match(rf"{re.escape(wanted)}(?![0-9a-z])", said)))


def exact(messages, answer, wanted):
    """1 if the answer equals the wanted one, ignoring surrounding white space; else 0."""
    same_text = message_text(answer).strip() == message_text(wanted).strip()
    return float(same_text and ("tool_calls" in answer) == ("tool_calls" in wanted))


def length(messages, answer, wanted):
    """1 for as many characters as the wanted answer, linearly less down to 0 at none or twice."""
    goal = max(1, len(message_text(wanted)))
    return max(0.0, 1 - abs(len(message_text(answer)) - goal) / goal)


# To add a reward, add a function here.
REWARDS = (slots, label, exact, length, *(f for s in SOURCES.values() for f in s.rewards))
REWARDS = {f.__name__: f for f in REWARDS}


def load_callable(flag, path, name, signature):
    """The function or class `name` of the Python file that a flag gives."""
    with user_code(f"{flag} {path} cannot be loaded"):
        found = runpy.run_path(path).get(name)
    if not callable(found):
        raise UserError(f"{flag} {path} defines no {signature}")
    return found


def load_env(source):
    """The class of environments that --env names: that of a set of rows, or Env of a file."""
    known = SOURCES[source].env if source in SOURCES else None
    return known or load_callable("--env", source, "Env", "class Env, as data/hotel_env.py does")


def load_reward(source):
    """The function that --reward names: one of REWARDS, or `reward` of a Python file."""
    if source in REWARDS:
        return REWARDS[source]
    wanted = "function reward(messages, answer, wanted)"
    reward = load_callable("--reward", source, "reward", wanted)
    return lambda messages, *turns: reward(copy.deepcopy(messages), *map(message_text, turns))


def rate(reward, messages, answer, wanted, *tools):
    """The reward of an answer as a float, or None if it is not for this turn. UserError if the
    function fails or returns no finite number."""
    try:
        value = reward(messages, answer, wanted, *tools)
        if value is None:
            return None
        if math.isfinite(float(value)):
            return float(value)
        problem = f"is {value}"
    except Exception as e:  # the user's own code can fail in any way
        called = "; it is called as reward(messages, answer, wanted)"
        problem = f"fails ({type(e).__name__}: {e}{called * isinstance(e, TypeError)})"
    question, text = message_text(messages[-1]), message_text(answer)
    raise UserError(f"the reward {problem} for {text!r:.80} in answer to {question!r:.80}")
