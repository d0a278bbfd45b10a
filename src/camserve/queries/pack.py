"""Asks the masked queries of many items in micro-batches of one size.

Queries of any method, image and request share a micro-batch. Masks are made and blended for one micro-batch at a time,
so memory is bounded by the micro-batch and not by the number of queries. Nothing in the loop waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from camserve.saliency.masks import Queries

QueryRange = tuple[int, int, int]
"""Queries of one set: (index of the set, start, stop)."""


def micro_batches(sizes: Sequence[int], limit: int) -> Iterator[list[QueryRange]]:
    """Cuts sets of these sizes, laid end to end, into runs of `limit` queries; only the last run may be shorter."""
    batch: list[QueryRange] = []
    room = limit
    for which, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + room)
            batch.append((which, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield batch
                batch, room = [], limit
    if batch:
        yield batch


@torch.inference_mode()
def ask(
    network: Callable[[Tensor], Tensor],
    sets: Sequence[Queries],
    micro_batch: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """Returns the scores of every set's targets for every set's queries.

    Args:
        network: (n, 3, H, W) to outputs (n, numbers).
        sets: the queries; inputs of one size and device.
        micro_batch: how many queries one forward pass takes at most.
        on_progress: called with (done, total) after each micro-batch.

    Returns:
        For each set (N, K), in the dtype of its queries.
    """
    total, done = sum(map(len, sets)), 0
    scores = [queries.blend(0, 0).new_empty(len(queries), len(queries.targets)) for queries in sets]
    for batch in micro_batches([len(queries) for queries in sets], micro_batch):
        images = [sets[which].blend(start, stop) for which, start, stop in batch]
        joined = torch.cat(images) if len(images) > 1 else images[0]
        outputs = network(joined)
        row = 0
        for which, start, stop in batch:
            rows = outputs[row : row + stop - start].to(scores[which].dtype)
            targets = sets[which].targets
            scores[which][start:stop] = targets.value(rows) if sets[which].by_value else targets.query_value(rows)
            row += stop - start
        done += row
        if on_progress is not None:
            on_progress(done, total)
    return scores
