"""How long an epoch of the course's network takes with the images in memory, beside a DataLoader.

    python tests/bench_mnist.py

trains the same network (784-256-128-64-10, dropout, SGD, batches of 64) on MNIST, by turns: with
mnist.py's own loop, on the tensor of all images; with a torch DataLoader whose data set converts
and normalises an image when it is asked for, as torchvision's ToTensor and Normalize do; and, as
the floor, with nothing but the matrix products of such an epoch. Prints a markdown table.

It is a benchmark, not a test: pytest does not collect it. A minute on two cores.
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mnist  # noqa: E402

BATCH = 64


class Converting(torch.utils.data.Dataset):
    """Raw bytes, converted one image at a time."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        image = torch.from_numpy(self.images[i]).float().div(255)
        return image.sub(mnist.MEAN).div(mnist.STD), int(self.labels[i])


def with_loader(raw, labels):
    """Seconds of an epoch through the DataLoader."""
    torch.manual_seed(42)
    model = mnist.MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = torch.utils.data.DataLoader(Converting(raw, labels), batch_size=BATCH)
    start = time.perf_counter()
    model.train()
    for images, goals in loader:
        optimizer.zero_grad()
        loss = F.nll_loss(model(images), goals)
        loss.backward()
        optimizer.step()
    return time.perf_counter() - start, loss.item()


def with_tensor(images, labels):
    """Seconds of an epoch of mnist.fit."""
    args = mnist.build_parser().parse_args(["--epochs", "1", "--out", "unused"])
    mnist.settle(args)
    torch.manual_seed(42)
    run = mnist.Run(mnist.MLP(), args, 10**6)
    losses = []

    def batch_loss(model, x, y):
        losses.append(F.nll_loss(model(x), y))
        return losses[-1]

    start = time.perf_counter()
    mnist.fit(run, images, labels, batch_loss, dict)
    return time.perf_counter() - start, losses[-1].item()


def products(images):
    """Seconds of the matrix products alone: forward, by the input and by the weight. The first
    layer's input needs no gradient."""
    sizes = [784, 256, 128, 64, 10]
    weights = [torch.randn(b, a) for a, b in itertools.pairwise(sizes)]
    states = [torch.randn(BATCH, a) for a in sizes]
    start = time.perf_counter()
    for _ in range(-(-len(images) // BATCH)):
        for i, w in enumerate(weights):
            torch.mm(states[i], w.T)
            torch.mm(states[i + 1].T, states[i])
            if i:
                torch.mm(states[i + 1], w)
    return time.perf_counter() - start, None


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--rounds", type=int, default=7, help="epochs of each kind (default 7)")
    p.add_argument("--data", help="a folder with the four IDX files (default: download MNIST)")
    args = p.parse_args()
    (images, labels), _ = mnist.load_mnist(folder=args.data)
    raw = ((images * mnist.STD + mnist.MEAN) * 255).round().byte().numpy()
    kinds = {
        "DataLoader, converting each image": lambda: with_loader(raw, labels.numpy()),
        "mnist.py": lambda: with_tensor(images, labels),
        "its matrix products alone": lambda: products(images),
    }
    seconds, last = {name: [] for name in kinds}, {}
    for _ in range(args.rounds):
        for name, run in kinds.items():
            took, last[name] = run()
            seconds[name].append(took)
    slow, ours, _ = seconds.values()
    ratio = statistics.median(a / b for a, b in zip(slow, ours))
    flops = 6 * sum(p.numel() for p in mnist.MLP().parameters() if p.dim() > 1) * len(images)
    print("| an epoch of 60,000 images | median s | fastest | loss of the last batch |")
    print("| --- | ---: | ---: | ---: |")
    for name, times in seconds.items():
        loss = "" if last[name] is None else f"{last[name]:.4f}"
        print(f"| {name} | {statistics.median(times):.2f} | {min(times):.2f} | {loss} |")
    print(f"\n{args.rounds} rounds, {torch.get_num_threads()} threads: median ratio {ratio:.1f}. ")
    print(f"The epoch is {flops / 1e9:.0f} GFLOP.")


if __name__ == "__main__":
    main()
