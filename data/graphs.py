"""CUDA graphs: hundreds of small operations, recorded once and started by one call."""
import torch


class GraphedSteps:
    """`step`, the `last_logits` of a sample.FastTransformer, for one new token a text on a GPU. A
    graph is recorded for a cache and a number of texts; shapes must stay the same, so the Engine
    shows such a model, whose `static` is True, all places of its cache."""

    def __init__(self, step):
        self.step, self.key = step, None

    def __call__(self, ids, cache, positions=None, mask=None):
        if ids.shape[1] > 1 or mask is None:
            return self.step(ids, cache, positions, mask)
        new = ids, cache.lengths, positions, mask
        if self.key != (key := (cache.keys.data_ptr(), ids.shape, mask.shape)):
            self.key, self.inputs = key, [t.clone() for t in new]
            self.graph = torch.cuda.CUDAGraph()
            self.record(cache)
        for own, t in zip(self.inputs, new):
            own.copy_(t)
        self.graph.replay()
        return self.logits

    def record(self, cache):
        """Run a step on a stream of its own, as PyTorch wants it first, then record one."""
        (ids, cache.lengths, *rest), length = self.inputs, cache.length
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            self.step(ids, cache, *rest)
        here.wait_stream(aside)
        cache.length = length
        with torch.cuda.graph(self.graph):
            self.logits = self.step(ids, cache, *rest)
