"""What a model costs: arithmetic with its sizes. Memory, on one machine and on several GPUs, what
these exchange, and the loss that a scaling law predicts."""
import os

from data.cli import UserError

GIB, GB = 2**30, 1e9
# bytes a second in one direction: between the GPUs of a machine (NVLink 4) and of two (400 Gbit/s)
LINKS = {"NVLink": 450 * GB, "400 Gbit/s": 50 * GB}
H100 = 0.5 * 989e12  # FLOP/s: half of the datasheet's, which good runs reach


def chinchilla_loss(parameters, tokens):
    """Predicted loss in nats a token, L = E + A / N^0.34 + B / D^0.28 (Hoffmann et al. 2022, eq.
    10). Fitted on web text with a 32k vocabulary: read it for trends, not as your loss."""
    return 1.69 + 406.4 / parameters**0.34 + 410.7 / tokens**0.28


def shape_lines(name, shape, parts, flops, tokens=None):
    """Lines about a model of that shape, a dict: {part: parameters}, FLOPs a token, and if it is to
    see so many `tokens` the loss that is predicted."""
    total = parts["total"]
    shown = ", ".join(f"{k} {v}" for k, v in shape.items())
    lines = [f"{name}: {shown}", "", f"{'part':14}{'parameters':>16}{'share':>9}"]
    for part, n in parts.items():
        lines.append(f"{part:14}{n:16,}{n / total:9.1%}")
    mib = total / 2**20
    lines += [
        "",
        f"weights            {4 * mib:8,.1f} MiB in fp32, {2 * mib:,.1f} MiB in bf16",
        f"gradients          {4 * mib:8,.1f} MiB in fp32",
        f"AdamW's moments    {8 * mib:8,.1f} MiB in fp32",
        f"training           {flops:8.3g} FLOPs per token, forward and backward",
        f"Chinchilla advises {20 * total:,} training tokens (20 per parameter)",
    ]
    if tokens:
        lines.append(
            f"on {tokens:,} tokens ({tokens / total:.3g} per parameter) its fit predicts a loss of "
            f"{chinchilla_loss(total, tokens):.3f} nats a token"
        )
    return [*lines, f"{name}: {total:,} parameters"]


def activation_bytes(config, tokens, checkpointed=False):
    """Bytes that the layers keep in fp32 for the backward pass of `tokens` tokens; with gradient
    checkpointing only each layer's input, and one layer in full."""
    layer = tokens * (12 * config.d_model + 3 * config.d_ff) * 4
    if checkpointed:
        return layer + config.n_layer * tokens * config.d_model * 4
    return config.n_layer * layer


def memory_needed(model, tokens):
    """Bytes that training takes in this process, roughly, with `tokens` in a micro-batch: weights,
    gradients and two moments in fp32, and what each layer keeps for its backward pass."""
    own = [(p, p.to_local() if hasattr(p, "to_local") else p) for p in model.parameters()]
    tensors = [part for _, part in own] + list(model.buffers())
    held = sum(t.numel() * t.element_size() for t in tensors)
    learned = sum(part.numel() for p, part in own if p.requires_grad)
    return held + 12 * learned + activation_bytes(model.config, tokens, model.grad_checkpoint)


def check_memory(model, tokens, runtime):
    """UserError if training with `tokens` in a micro-batch cannot fit this machine's memory (its
    CPU's; a GPU tells by itself)."""
    needed = memory_needed(model, tokens)
    if runtime.device.type == "cpu" and hasattr(os, "sysconf"):
        has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > has:
            raise UserError(
                f"this needs about {needed / 2**30:,.0f} GiB of memory, the machine has "
                f"{has / 2**30:,.0f}: use smaller batches, a shorter context or a smaller model"
            )


def memory_per_gpu(parameters, gathered, world, shard):
    """{what: bytes} that each of `world` GPUs holds in mixed bf16: fp32 weights, gradients and
    AdamW's moments, whole or a part. `gathered` parameters of a model that is cut are there at
    once, in bf16."""
    parts = world if shard else 1
    held = {"weights": 4 * parameters / parts, "gradients": 4 * parameters / parts}
    held["moments"] = 8 * parameters / parts
    return held | ({"gathered": 2 * gathered} if shard else {})


def traffic(parameters, world, shard, accumulation):
    """Bytes that each GPU sends in a step: gradients once in fp32, and of a model that is cut its
    weights in bf16 twice for each micro-batch."""
    share = (world - 1) / world
    if not shard:
        return 2 * share * 4 * parameters  # reduce, then spread the sums
    return share * (4 + accumulation * 2 * 2) * parameters


def world_lines(config, parameters, gathered, flops, world, shard):
    """Lines about a step of one micro-batch of one context on each GPU; `flops` are a token's."""
    held, tokens = memory_per_gpu(parameters, gathered, world, shard), config.context
    full, thin = (activation_bytes(config, tokens, checkpointed) / 2 for checkpointed in (0, 1))
    held |= {"activations": full, "with --grad_checkpoint": thin}
    lines = ["", f"{world} GPUs, {'each with a part' if shard else 'each with a copy'}, in bf16:"]
    lines += [f"  {what:24}{n / GIB:8,.1f} GiB a GPU" for what, n in held.items()]
    sent, seconds = traffic(parameters, world, shard, 1), flops * tokens / H100
    lines.append(f"  {tokens:,} tokens take {seconds:.3f} s at half of an H100's peak; to send")
    times = [f"{sent / speed:.3f} s by {link}" for link, speed in LINKS.items()]
    return [*lines, f"  {sent / GB:,.2f} GB a step takes {', '.join(times)}"]
