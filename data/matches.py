"""The token that may come next because it followed the same tokens before."""

import torch
import torch.nn.functional as F

LONGEST_MATCH = 8


def copy_candidates(ids, positions, longest=LONGEST_MATCH):
    """(the id that may come next because it did so before, the length of the match), (B, T) each,
    for `positions` (B, T) of ids (B, S).

    Compares the run of ids that ends at each earlier position with the run that ends here, newest
    id first. The candidate is the id after the earlier position with the longest equal run (at most
    `longest` ids), the latest one if several are as long. Without a match both are 0.

    >>> copy_candidates(torch.tensor([[5, 6, 7, 5, 9, 5, 6]]), torch.tensor([[4, 5, 6]]))
    (tensor([[0, 9, 7]]), tensor([[0, 1, 2]]))
    """
    find = latest_matches if positions.shape == ids.shape else compare_positions
    match, length = find(ids, positions, longest)
    copied = ids.gather(1, (match + 1).clamp(max=ids.shape[1] - 1))
    return torch.where(length > 0, copied, 0), length


def latest_matches(ids, positions, longest):
    """(where the run that is copied ends, its length), (B, S) each, for all positions 0 .. S - 1.
    A stable sort by the last n ids puts, right before each position, the latest one equal to it."""
    S, run = ids.shape[1], torch.zeros_like(ids)
    match, length = torch.zeros_like(ids), torch.zeros_like(ids)
    for n in range(min(S, longest)):
        # a polynomial modulo 2^64 stands for n + 1 ids; where there are fewer, nothing is equal
        run = run + F.pad(ids[:, : S - n], (n, 0)) * (6364136223846793005**n % 2**63)
        run_or_none = torch.where(positions < n, -1 - positions, run)
        ordered, order = run_or_none.sort(stable=True)
        same = F.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
        found = torch.zeros_like(same).scatter(1, order, same)
        match = torch.where(found, torch.zeros_like(ids).scatter(1, order, order.roll(1, 1)), match)
        length += found
    return match, length


def compare_positions(ids, positions, longest):
    """The same for some positions, (B, T) each: faster than sorting if there are few."""
    S, earlier = ids.shape[1], torch.arange(ids.shape[1], device=ids.device)
    # int16 is faster for the (B, T, S) tensors, but length * S must not overflow it
    dtype = torch.int16 if S * (longest + 1) < 2**15 else torch.int32
    padded = F.pad(ids.int(), (longest - 1, 0), value=-1)
    windows = padded.unfold(1, longest, 1)  # (B, S, longest): the last ids at each
    here = windows.gather(1, positions[..., None].expand(-1, -1, longest))  # (B, T, longest)
    pairs = zip(windows[:, None].unbind(-1), here[:, :, None].unbind(-1))
    same = earlier < positions[..., None]  # (B, T, S)
    length = torch.zeros_like(same, dtype=dtype)
    for theirs, ours in reversed(list(pairs)):  # from the newest id backwards
        same = same & (theirs == ours)
        length += same
    best = (length * S + earlier.to(dtype)).amax(-1).long()  # the longest, then the latest
    return best % S, best // S
