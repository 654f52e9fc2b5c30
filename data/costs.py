"""What a model costs, by arithmetic: memory, bytes that GPUs exchange, and the predicted loss."""
import math
import os

from data.cli import UserError

# bytes a second in one direction: between the GPUs of a machine (NVLink 4) and of two (400 Gbit/s)
LINKS = {"NVLink": 450e9, "400 Gbit/s": 50e9}
HALF_H100 = 0.5 * 989e12  # FLOP/s: half of the datasheet's, which good runs reach
# On a CPU, `model.attention` stores the scores if there are at most so many tokens, or scores.
FEW_TOKENS, FEW_SCORES = 512, 2**22


def chinchilla_loss(parameters, tokens):
    """Predicted loss in nats a token, L = E + A / N^0.34 + B / D^0.28 (Hoffmann et al. 2022, eq.
    10). Fitted on web text with a 32k vocabulary, 70 million to 16 billion parameters and 5 to 500
    billion tokens: read it for trends, not as your loss."""
    return 1.69 + 406.4 / parameters**0.34 + 410.7 / tokens**0.28


def count_parameters(model):
    """{part: parameters}, their "total" (a tied head is counted once, as the embedding), and with
    experts "active", those that a token uses."""
    words = dict(embed="embedding", inputs="embedding", bigram="token n-grams")
    words |= dict(trigram="token n-grams", position="positions")
    words |= {"attention": "attention", "feed_forward": "feed-forward", "norm": "norms"}
    counts = dict.fromkeys([*words.values(), "head"], 0)
    for name, p in model.named_parameters():
        parts = [part for word, part in words.items() if word in name]
        counts[parts[-1] if parts else "head"] += p.numel()  # the last: embed_norm is a norm
    counts["total"] = sum(counts.values())
    if n := (c := model.config).experts:
        each = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name) // n
        counts["active"] = counts["total"] - (n - c.experts_per_token) * each
    return counts


def flops_per_token(config, length=None, learned=1.0, frozen=False):
    """Floating-point operations to train on one token of rows that are `length` tokens long (by
    default the context), forward and backward.

    Six per weight of a matrix product (a multiply and an add in the forward pass, and for each of
    the two gradients), four if the model is `frozen` and has adapters, plus the attention scores:
    12 n_layer nh hs length. That counts the masked half too, as PaLM (Chowdhery et al. 2022,
    appendix B) and nanoGPT do, so MFUs compare. The head is computed for the share `learned`.
    """
    c = config
    qkv = c.d_model * c.head_size * (c.n_head + 2 * c.n_kv_head)
    feed_forward = c.d_model * c.d_ff * (3 if "glu" in c.activation else 2) * c.experts_per_token
    block = qkv + c.n_head * c.head_size * c.d_model + feed_forward + c.d_model * c.experts
    weights = c.n_layer * block + learned * c.d_model * c.vocab_size
    weights += (c.induction + c.successor) * c.d_model**2
    scores = 12 * c.n_layer * c.n_head * c.head_size * (length or c.context)
    return (4 if frozen else 6) * weights + scores


def shape_lines(name, shape, counts, flops, tokens=None):
    """Lines about a model of this `shape` (a dict), with these `counts` ({part: parameters}) and
    `flops` a token, and the predicted loss if it is trained on `tokens`."""
    total, mib = counts["total"], counts["total"] / 2**20
    lines = [f"{name}: " + ", ".join(f"{k} {v}" for k, v in shape.items())]
    lines += ["", f"{'part':14}{'parameters':>16}{'share':>9}"]
    lines += [f"{part:14}{n:16,}{n / total:9.1%}" for part, n in counts.items()]
    lines += [
        "",
        f"weights            {4 * mib:8,.1f} MiB in fp32, {2 * mib:,.1f} MiB in bf16",
        f"gradients          {4 * mib:8,.1f} MiB in fp32",
        f"AdamW's moments    {8 * mib:8,.1f} MiB in fp32",
        f"training           {flops:8.3g} FLOPs per token, forward and backward",
        f"Chinchilla advises {20 * total:,} training tokens (20 per parameter)",
    ]
    if tokens:
        loss, guessing = chinchilla_loss(total, tokens), math.log(shape["vocab_size"])
        says = f"predicts a loss of {loss:.3f} nats a token"
        if loss > guessing:
            says = f"does not apply: it gives {loss:.3f} nats, guessing takes ln V = {guessing:.3f}"
        elif not (70e6 <= total <= 16e9 and 5e9 <= tokens <= 500e9):
            says += ", outside its range (70M to 16B parameters, 5B to 500B tokens)"
        lines.append(f"on {tokens:,} tokens ({tokens / total:.3g} per parameter) its fit {says}")
    return [*lines, f"{name}: {total:,} parameters"]


def activation_bytes(config, tokens, checkpointed=False):
    """Bytes that the layers keep in fp32 for the backward pass of `tokens` tokens; with gradient
    checkpointing only the input of each layer, and one layer in full."""
    layer = tokens * (12 * config.d_model + 3 * config.d_ff * config.experts_per_token) * 4
    inputs = config.n_layer * tokens * config.d_model * 4
    return layer + inputs if checkpointed else config.n_layer * layer


def memory_needed(model, tokens, length=None):
    """Bytes that this process needs, roughly, to train with `tokens` in a micro-batch, in rows of
    `length` (default: the context): weights, gradients and two moments in fp32, and what the layers
    keep for the backward pass."""
    parameters = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    stored = sum(t.nbytes for t in [*parameters, *model.buffers()])
    trained = sum(t.numel() for t, p in zip(parameters, model.parameters()) if p.requires_grad)
    c, length = model.config, length or model.config.context
    kept = activation_bytes(c, tokens, model.grad_checkpoint)
    scores = c.n_head * length * tokens  # of a layer
    if (length <= FEW_TOKENS or scores <= FEW_SCORES) and parameters[0].device.type == "cpu":
        kept += 4 * scores * (1 if model.grad_checkpoint else c.n_layer)
    return stored + 12 * trained + kept


def check_memory(model, tokens, device, length=None):
    """UserError if training with `tokens` in a micro-batch cannot fit this machine's memory. A GPU
    reports that itself."""
    if device.type == "cpu" and hasattr(os, "sysconf"):
        needed = memory_needed(model, tokens, length)
        installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > installed:
            raise UserError(
                f"this needs about {needed / 2**30:,.0f} GiB of memory, the machine has "
                f"{installed / 2**30:,.0f}: use smaller batches, a shorter context, a smaller model"
            )


def world_lines(config, counts, flops, world, shard):
    """Lines about a training step on `world` GPUs, each with a micro-batch of one context, in mixed
    bf16: what each stores, replicated or sharded, and sends. `flops` are those of one token."""
    total, tokens, parts = counts["total"], config.context, world if shard else 1
    stored = {"weights": 4 * total, "gradients": 4 * total, "moments": 8 * total}
    stored = {what: n / parts for what, n in stored.items()}
    if shard:  # tables and two blocks are gathered at once, in bf16
        blocks = counts["attention"] + counts["feed-forward"]
        stored["gathered"] = 2 * (total - blocks + 2 * blocks // config.n_layer)
    for checkpointed, what in enumerate(("activations", "with --grad_checkpoint")):
        stored[what] = activation_bytes(config, tokens, checkpointed) / 2
    # gradients are reduced in fp32; then sums are spread, or bf16 weights gathered twice
    sent = (world - 1) / world * 8 * total
    seconds = flops * tokens / HALF_H100
    times = ", ".join(f"{sent / speed:.3f} s by {link}" for link, speed in LINKS.items())
    return [
        "",
        f"{world} GPUs, {'each with a part' if shard else 'each with a copy'}, in bf16:",
        *(f"  {what:24}{n / 2**30:8,.1f} GiB a GPU" for what, n in stored.items()),
        f"  {tokens:,} tokens take {seconds:.3f} s at half of an H100's peak; to send",
        f"  {sent / 1e9:,.2f} GB a step takes {times}",
    ]
