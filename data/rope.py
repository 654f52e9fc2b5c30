"""Rotary positions for a longer context than a model was first trained with."""

import math

import torch

# The parameters of each kind of rope scaling in a config
_BOTH = {"factor", "original_max_position_embeddings"}
PARAMETERS = {
    "linear": {"factor"},
    "llama3": _BOTH | {"low_freq_factor", "high_freq_factor"},
    "yarn": _BOTH | {"beta_fast", "beta_slow", "attention_factor"},
    "longrope": {"short_factor", "attention_factor"},
}


def known_scaling(scaling, pairs):
    """Whether a dict {"rope_type": one of PARAMETERS, its parameters...} has all of them, as
    numbers above 0 (`short_factor`: a list of them, one for each of the `pairs` of channels)."""
    numbers = dict(scaling)
    known = PARAMETERS.get(numbers.pop("rope_type", None)) == set(numbers)
    factors = numbers.pop("short_factor", [1] * pairs)
    return known and len(factors) == pairs and min(*factors, *numbers.values()) > 0


def scale_frequency(frequency, scaling, theta):
    """Rotation frequencies of pairs of channels, slowed down: all alike (`linear`), each by its own
    factor (`longrope`), or according to how often they turn in the original context: in full below
    a low number of turns, not at all above a high one, in part in between, where the slowdown falls
    linearly with the turns (`llama3`) or grows with the pair's index (`yarn`, Peng et al. 2023)."""
    kind, factor, pairs = scaling["rope_type"], scaling.get("factor"), len(frequency)
    original = scaling.get("original_max_position_embeddings")
    if kind == "linear":
        return frequency / factor
    if kind == "longrope":
        return frequency / torch.tensor(scaling["short_factor"], device="cpu")
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = original / (2 * math.pi / frequency)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        first, last = (  # the pairs that turn so often
            pairs * math.log(original / (2 * math.pi * scaling[turns])) / math.log(theta)
            for turns in ("beta_fast", "beta_slow")
        )
        first, last = max(math.floor(first), 0), min(math.ceil(last), 2 * pairs - 1)
        pair = torch.arange(pairs, device="cpu")
        keep = 1 - ((pair - first) / max(last - first, 1e-3)).clamp(0, 1)
    return (1 - keep) * frequency / factor + keep * frequency
