"""The mixture of experts: its sum, its balance, how it trains, and all that is done to a model."""

import copy
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import CPU, close

import lora
import model as lm
import prepare_data
import train
from data.cli import UserError
from data.matmul import make_fast
from data.tokenizer import Tokenizer

IDS = torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(5))


def mixture(**changes):
    """A small model whose experts differ and whose weights are not at their start values."""
    shape = dict(n_layer=2, n_head=2, d_model=64, vocab_size=64, context=32, experts=4)
    torch.manual_seed(0)
    model = lm.Transformer(lm.preset("llama", **(shape | changes))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def by_tokens(moe, x):
    """What a mixture computes, written out for one token and one expert at a time."""
    rows = []
    for token in x.flatten(0, 1):
        p = moe.router(token).softmax(-1)
        best = p.argsort(descending=True)[: moe.k].tolist()
        total = p[best].sum() if moe.norm_topk_prob else 1
        rows.append(sum(p[i] / total * moe.experts[i](token) for i in best))
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("k, normalised", [(1, False), (1, True), (2, False), (3, True), (4, True)])
def test_the_sum_is_that_of_each_token_with_its_best_experts(k, normalised):
    torch.manual_seed(k)
    config = lm.preset("llama", experts=4, experts_per_token=k, norm_topk_prob=normalised)
    moe, x, results = lm.MoE(config), torch.randn(2, 5, config.d_model), []
    for compute in (moe, partial(by_tokens, moe)):
        moe.zero_grad()
        y = compute(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in moe.parameters())])
    close(*results)
    # the trap: if its only weight is 1 whatever the router computes, nothing reaches the router
    assert (results[0][1].abs().max() < 1e-6) == (k == 1 and normalised)


def test_one_expert_a_token_is_normalised_only_if_asked_and_never_trained_so_from_nothing():
    assert lm.preset("moe").norm_topk_prob and lm.preset("moe").d_ff == 384
    one = lm.preset("moe", experts_per_token=1)
    assert not one.norm_topk_prob and one.d_ff == 768
    flags = ["--preset", "moe", "--experts_per_token", "1", "--norm_topk_prob"]
    byte, meta = Tokenizer({"kind": "byte"}), {"largest_id": 9}
    with pytest.raises(UserError, match="router could not learn"):
        train.build_model(train.build_parser().parse_args(flags), None, "data", meta, byte)
    for n, k in ((0, 3), (4, 5)):
        with pytest.raises(UserError, match=f"experts_per_token {k} must be at most experts {n}"):
            lm.preset("tiny", experts=n, experts_per_token=k)


def balance_by_hand(model, ids):
    """Switch's equation 4 without its factor, less 1, of all layers, from what each router read."""
    inputs, total = [], 0
    hooks = [b.feed_forward.router.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
             for b in model.blocks]
    with lm.evaluating(model):
        model(ids)
    for block, x, hook in zip(model.blocks, inputs, hooks):
        hook.remove()
        p, k, E = block.feed_forward.router(x).softmax(-1), block.feed_forward.k, 4
        share = p.topk(k).indices.flatten().bincount(minlength=E) / (len(p) * k)
        total = total + E * (share * p.mean(0)).sum() - 1
    return total


def test_training_adds_the_balance_of_the_tokens_that_count_and_evaluation_does_not():
    model, targets = mixture(router_aux_loss_coef=0.1), IDS.roll(-1, 1)
    plain = model(IDS, targets)
    assert model.expert_counts == 0
    close(model.train()(IDS, targets), plain + 0.1 * IDS.numel() * balance_by_hand(model, IDS))
    assert model.expert_counts.sum(1).tolist() == [2.0 * IDS.numel()] * 2
    # no loss reads what follows a row's last target, and so neither does the balance
    model, grads = mixture().train(), []
    padded, masked = torch.nn.functional.pad(IDS, (0, 5)), targets.clone()
    masked[1] = -100
    for ids, goal in ((IDS[[0, 2]], targets[[0, 2]]), (IDS, masked),
                      (padded, torch.nn.functional.pad(masked, (0, 5), value=-100))):
        for model.grad_checkpoint in (False, True):
            model.zero_grad()
            model(ids, goal).backward()
            grads.append([p.grad.clone() for p in model.parameters()])
    for other in grads[1:]:
        close(other, grads[0])
    copy.deepcopy(model)  # nothing is left of a graph
    assert model(IDS, torch.full_like(IDS, -100)) == 0


def test_compiled_it_computes_the_same_with_any_number_of_rows(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    task = train.Task(lambda step: [(IDS, IDS)], None, {})
    eager, compiled = mixture().train(), mixture().train()
    torch._dynamo.utils.counters.clear()
    train.compile_blocks(compiled, task, CPU, 0)
    for size in ((3, 12), (2, 7), (1, 1), (5, 20)):
        ids = torch.randint(64, size)
        close(compiled(ids, ids), eager(ids, ids))
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 16


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_writes_who_was_used(elsewhere, dtype, capsys, monkeypatch):
    monkeypatch.setattr("data.machine.measure_peak", lambda *_: 1e11)
    Path("words.txt").write_text("to be or not to be, that is the question. " * 200)
    prepare_data.main(["words.txt", "--tokenizer", "byte"])
    shape = "--n_layer 2 --n_head 2 --d_model 32 --context 16 --batch_size 4 --log_every 2"
    flags = f"--data words --preset moe {shape} --experts 3 --max_steps 5 --dtype {dtype}"
    train.main([*flags.split(), "--out", "out/moe"])
    rows = [json.loads(line) for line in Path("out/moe/metrics.jsonl").read_text().splitlines()]
    counts = {r["step"]: torch.tensor(r["experts"]) for r in rows if "experts" in r}
    used = [[step, *c.sum(1).tolist()] for step, c in counts.items()]
    assert used == [[2, 256, 256], [4, 256, 256], [5, 128, 128]]
    busiest = {r["step"]: r["busiest_expert"] for r in rows if "experts" in r}
    assert busiest[4] == pytest.approx(float(counts[4].max() / 256))
    said = capsys.readouterr().out
    assert "busiest expert 0." in said and " active for a token" in said


def test_costs_know_what_is_active():
    dense, moe = lm.preset("tiny"), lm.preset("moe")
    parts, router = lm.count_parameters(lm.meta_model(moe)), 4 * 192 * 8
    assert parts["active"] == lm.count_parameters(lm.meta_model(dense))["total"] + router
    assert parts["total"] == parts["active"] + 4 * 6 * 2 * 192 * 384
    assert lm.flops_per_token(moe) == lm.flops_per_token(dense) + 6 * router


@pytest.mark.parametrize("int8", [False, True])
def test_make_fast_keeps_the_logits_and_never_rounds_the_router(int8):
    model = mixture()
    fast = copy.deepcopy(model)
    make_fast(fast, int8=int8)
    with torch.no_grad():
        for ids in (IDS, IDS[:1, :1]):
            want = model(ids)
            difference = (fast(ids) - want).norm() / want.norm()
            assert difference < (0.2 if int8 else 1e-5)
    moe = model.blocks[0].feed_forward
    make_fast(moe, int8=int8)
    assert type(moe.router) is torch.nn.Linear and type(moe.experts[0].up) is not torch.nn.Linear


@pytest.mark.parametrize("kind", [None, "int8", "nf4"])
def test_adapters_of_experts_learn_and_are_merged_over_quantized_ones_too(kind, tmp_path):
    model, base = mixture(), {"config": asdict(mixture().config), "model": mixture().state_dict()}
    assert not kind or len(lora.quantize(model, kind)) == 2 * (4 + 4 * 3)
    named = lora.add_lora(model, "all", rank=2)
    assert len(named) == 2 * (4 + 4 * 3) and not any("router" in name for name in named)
    model.train()(IDS, IDS).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p) * p.requires_grad
    want = model.eval()(IDS)
    adapter = dict(modules_to_save=(), quantize=kind, rank=2, alpha=16, dropout=0.0)
    with pytest.raises(UserError, match="quantized base" if kind else "single experts"):
        content = {"adapter": adapter, "model": lora.adapter_state(model)}
        lora.write_peft(content, base["model"], "mixtral", base["config"], tmp_path)
    lora.merge(model)
    close(model(IDS), want, 1e-4)
