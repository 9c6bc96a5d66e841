"""The least batch: how small a batch may be, and how smaller ones are enlarged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Draw(NamedTuple):
    """A number of a client's next samples, for one step."""

    client_id: int
    num_samples: int


class LeastBatch(NamedTuple):
    """The numbers of samples that a step needs.

    BatchNorm cannot train on a single value per channel. Where the network has such a
    layer, a batch needs two samples (in each process).

    Attributes:
        total: Of all clients of the step.
        own: Of each of them.
        layer: The path of the layer that needs them; empty: none does.
    """

    total: int = 1
    own: int = 1
    layer: str = ""

    @property
    def is_trivial(self) -> bool:
        """Whether every batch is large enough."""
        return max(self.total, self.own) < 2


def shared_out(first: int, second: int, least: int) -> tuple[int, int]:
    """Returns the sizes of two batches, shared out evenly, or as one batch.

    >>> shared_out(32, 1, least=2), shared_out(2, 1, least=2)
    ((17, 16), (3, 0))
    """
    total = first + second
    if total < 2 * least:
        return total, 0
    return total - total // 2, total // 2


def sizes_of(num_samples: int, batch_size: int, least: int = 1) -> list[int]:
    """Returns the sizes of the batches of a pass over samples.

    >>> sizes_of(65, 32), sizes_of(65, 32, least=2)
    ([32, 32, 1], [32, 17, 16])
    """
    full, rest = divmod(num_samples, batch_size)
    sizes = [batch_size] * full + [rest] * (rest > 0)
    if len(sizes) > 1 and sizes[-1] < least:
        *sizes, first, second = sizes
        sizes += [n for n in shared_out(first, second, least) if n]
    return sizes


def enlarged(
    steps: list[list[Draw]], sizes: Mapping[int, int], least: LeastBatch
) -> list[list[Draw]]:
    """Returns the steps of a round without batches that are too small.

    A batch that is too small and the client's batch before it, in the same pass, are
    shared out evenly (`shared_out`). The first batch of a pass takes the one behind it.
    A client's only batch joins another step, where clients train together.

    Args:
        steps: The draws of each step.
        sizes: Number of samples of each client.
        least: How small a batch may be.
    """
    counts = [dict(step) for step in steps]
    passes = {k: list(_passes_of(k, counts, size)) for k, size in sizes.items()}
    for number, step in enumerate(counts):
        for client_id in list(step):
            if step[client_id] < least.own or sum(step.values()) < least.total:
                own = next(p for p in passes[client_id] if number in p)
                if len(own) > 1:
                    _share_out(counts, number, client_id, own, least)
                else:
                    _join_another(counts, number, client_id, least)
    return [[Draw(k, n) for k, n in step.items()] for step in counts if step]


def _passes_of(
    client_id: int, counts: list[dict[int, int]], size: int
) -> Iterator[list[int]]:
    """Yields the steps in which a client takes part, pass by pass."""
    own, taken = list[int](), 0
    for number, step in enumerate(counts):
        if client_id in step:
            own.append(number)
            taken += step[client_id]
            if taken >= size:
                yield own
                own, taken = [], 0
    if own:
        yield own


def _share_out(
    counts: list[dict[int, int]],
    number: int,
    client_id: int,
    own: list[int],
    least: LeastBatch,
) -> None:
    """Shares a client's batch out with its neighbour in the same pass."""
    at = max(own.index(number), 1)
    first, second = own[at - 1], own[at]
    given = counts[first][client_id], counts[second][client_id]
    kept, rest = shared_out(*given, max(least.own, least.total))
    counts[first][client_id] = kept
    if rest:
        counts[second][client_id] = rest
    else:
        del counts[second][client_id]
        own.remove(second)


def _join_another(
    counts: list[dict[int, int]], number: int, client_id: int, least: LeastBatch
) -> None:
    """Moves a client's only batch of a pass to a neighbouring step of several."""
    if counts[number][client_id] < least.own:
        return  # the client has too few samples, which is refused at setup
    for other in (number - 1, number + 1):
        if (
            0 <= other < len(counts)
            and len(counts[other]) > 1
            and client_id not in counts[other]
        ):
            counts[other][client_id] = counts[number].pop(client_id)
            return
