"""The mixture of experts: its sum, its balance, how it trains, and all that is done to a model."""

import contextlib
import copy
import io
import json
import os
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import lora
import model as lm
import sample
import train
from data.cli import UserError
from data.machine import Runtime
from data.matmul import make_fast

IDS = torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(5))
CPU = Runtime(torch.device("cpu"))


def mixture(seed=0, preset="llama", **changes):
    """A small model whose experts differ and whose weights are not at their start values."""
    shape = dict(n_layer=2, n_head=2, d_model=32, vocab_size=64, context=32, experts=4)
    torch.manual_seed(seed)
    model = lm.Transformer(lm.preset(preset, **(shape | changes))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def by_tokens(moe, x):
    """What a mixture computes, one token and one expert at a time."""
    y = torch.zeros_like(x)
    for place in ((b, t) for b in range(x.shape[0]) for t in range(x.shape[1])):
        p = (moe.router.weight @ x[place]).softmax(-1)
        best = sorted(range(len(p)), key=lambda i: -p[i])[: moe.k]
        total = sum(p[i] for i in best) if moe.norm_topk_prob else 1
        y[place] = sum(p[i] / total * moe.experts[i](x[place]) for i in best)
    return y


@pytest.mark.parametrize("k, normalised", [(1, False), (1, True), (2, False), (3, True), (4, True)])
def test_the_sum_is_that_of_each_token_with_its_best_experts(k, normalised):
    config = lm.preset("llama", d_model=32, experts=4, experts_per_token=k)
    config.norm_topk_prob, x = normalised, torch.randn(2, 5, 32)
    torch.manual_seed(k)
    moe = lm.MoE(config)
    gradients = []
    for compute in (moe, partial(by_tokens, moe)):
        moe.zero_grad(set_to_none=True)
        y = compute(x)
        y.square().sum().backward()
        gradients.append([y.detach(), *(p.grad if p.grad is not None else torch.zeros_like(p)
                                        for p in moe.parameters())])  # fmt: skip
    close(*gradients)
    # the trap: the only weight of a token is 1, so its router has nothing to learn
    trapped = k == 1 and normalised
    assert (gradients[0][1].abs().max() < 1e-6) == trapped
    if normalised and k > 1:  # as a softmax over the largest logits alone
        weights, _ = moe.router(x).topk(k)
        p = moe.router(x).softmax(-1).topk(k).values
        close(weights.softmax(-1), p / p.sum(-1, keepdim=True))


def test_one_expert_a_token_is_not_normalised_unless_asked_and_not_trained_so():
    assert not lm.preset("moe", experts_per_token=1).norm_topk_prob
    assert lm.preset("moe").norm_topk_prob and lm.preset("moe", d_ff=7).d_ff == 7
    args = train.build_parser().parse_args(["--preset", "moe", "--experts_per_token", "1",
                                            "--norm_topk_prob"])  # fmt: skip
    with pytest.raises(UserError, match="the router cannot learn"):
        train.build_model(args, None, "data", {"largest_id": 9}, argparse_tokenizer())
    with pytest.raises(UserError, match="experts_per_token 5 must be at most experts 4"):
        lm.preset("tiny", experts=4, experts_per_token=5)


def argparse_tokenizer():
    from data.tokenizer import Tokenizer

    return Tokenizer({"kind": "byte"})
