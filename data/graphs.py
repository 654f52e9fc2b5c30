"""CUDA graphs: hundreds of small operations, recorded once and started by one call."""
import torch

MOST = 16  # new ids of a row; more are part of a prompt, whose length seldom recurs


class GraphedSteps:
    """Runs `step`, the `last_logits` of a model on a GPU, as CUDA graphs for a few new tokens a row
    at most. A KVCache keeps a graph for each range of rows and number of tokens. The shapes and
    addresses of a graph never change, so it attends to all of the cache's room under a mask."""

    def __init__(self, step):
        self.step = step

    def __call__(self, ids, cache, **options):
        T, graphs = ids.shape[1], cache.graphs
        if T > MOST:
            return self.step(ids, cache, **options)
        inputs = ids, cache.lengths[:, None] + torch.arange(T)  # the ids and their positions
        if (key := (cache.keys.data_ptr(), ids.shape, *options.items())) not in graphs:
            graphs[key] = None  # recorded the second time, because many shapes occur only once
            return self.step(ids, cache, cache.begin(ids, inputs[1].to(ids.device)), **options)
        if graphs[key] is None:
            copies = [t.to(ids.device, copy=True) for t in inputs]
            graphs[key] = self.record(cache, *copies, **options)
        graph, static_inputs, logits = graphs[key]
        for static, t in zip(static_inputs, inputs):
            static.copy_(t)
        graph.replay()
        cache.lengths += T
        return logits.clone()  # another graph may use this memory before they are read

    def record(self, cache, ids, positions, **options):
        """(a graph of a step, its inputs, its logits). Graphs of a cache share their memory."""
        pool = next((kept[0].pool() for kept in cache.graphs.values() if kept), None)
        graph, lengths = torch.cuda.CUDAGraph(), cache.lengths.clone()
        with (
            torch.cuda.device(ids.device),  # in a new thread the current device is GPU 0
            torch.cuda.graph(graph, pool, capture_error_mode="thread_local"),
        ):
            logits = self.step(ids, cache, cache.begin(ids, positions), **options)
        cache.lengths.copy_(lengths)  # recording has written no token
        return graph, (ids, positions), logits
