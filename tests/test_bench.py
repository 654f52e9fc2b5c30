"""The benchmarks' common part."""

import pytest
import torch
from bench_common import our_step, random_batches

import model as lm


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_step_that_is_timed_is_that_of_a_run(dtype):
    model = lm.Transformer(lm.preset("tiny", n_layer=1, vocab_size=64))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    our_step(model, random_batches(64, 2, 16), dtype, steps=3)()
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())
