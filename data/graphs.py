"""CUDA graphs: hundreds of small operations, recorded once and started by one call."""
import torch


class GraphedSteps:
    """`step`, the `last_logits` of a model, for one new token a row on a GPU. One graph is recorded
    for each cache and number of rows. Its shapes must stay the same, so that it attends to all of
    the cache's room, under a mask."""

    def __init__(self, step):
        self.step, self.key = step, None

    def __call__(self, ids, cache, n=1):
        if ids.shape[1] > 1:
            return self.step(ids, cache, n=n)
        begun = cache.begin(ids, static=True)
        inputs = ids, begun.positions, begun.mask
        if self.key != (key := (cache.keys.data_ptr(), begun.mask.shape)):
            self.key, self.inputs = key, [t.clone() for t in inputs]
            self.graph = torch.cuda.CUDAGraph()
            self.record(cache, begun)
        for static, t in zip(self.inputs, inputs):
            static.copy_(t)
        self.graph.replay()
        cache.lengths += 1
        return self.logits.clone()  # another group of rows may be run before these are read

    def record(self, cache, begun):
        """Run a step on another stream, as PyTorch requires, then record one."""
        ids, positions, mask = self.inputs
        begun, lengths = begun._replace(positions=positions, mask=mask), cache.lengths.clone()
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            self.step(ids, cache, begun)
        here.wait_stream(aside)
        with torch.cuda.graph(self.graph):
            self.logits = self.step(ids, cache, begun)
        cache.lengths.copy_(lengths)  # recording has written no token
