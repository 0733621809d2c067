"""Training data that is read as it comes: datasets on the Hub that are not, or can't be, downloaded first.

The order is a function of (seed, epoch), and a batch's place in it alone decides which worker makes it: batches are the
same for any number of workers. Ranks share the files of a dataset where these go round, and its rows otherwise; each
worker reads all rows of its rank, and decodes only the images of its own batches.
"""

from collections.abc import Iterator
from itertools import count, islice
from typing import Any, TypeAlias

import datasets
import fsspec  # type: ignore[import-untyped]
import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from m2f_trainer.data.collate import Transform, labelled
from m2f_trainer.data.hub_streams import Row, Stream
from m2f_trainer.errors import DataError

_BUFFER = 256  # rows that are mixed with one another, images encoded: some 40 MB of photos a worker

Place: TypeAlias = tuple[int, int, Row]  # epoch, number in the epoch's order, stored row


class InstanceStream(IterableDataset[dict[str, Any] | None]):
    """A stream seen through a transform, epoch after epoch, as the share of one rank.

    What a resumed run has seen already comes as None: it is counted, and not made again.
    """

    def __init__(self, stream: Stream, transform: Transform, seed: int = 0) -> None:
        self.stream, self.transform, self.seed = stream, transform, seed
        self.class_of = {category.id: k for k, category in enumerate(stream.categories)}
        self.rank, self.world, self.batch_size = 0, 1, 1
        self._span = torch.tensor([0, -1])  # first sample to make, and the one to end before; -1 is never
        self._span.share_memory_()

    def deal(self, rank: int, world: int, batch_size: int) -> None:
        """Chooses this process's share of the rows, and how many samples in a row one worker makes."""
        self.rank, self.world, self.batch_size = rank, world, batch_size

    def span(self, first: int, end: int) -> None:
        """Chooses which of this rank's samples are made, counted over all epochs."""
        self._span.copy_(torch.tensor([first, end]))

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        for place in self.places():
            yield None if place is None else self.sample(place)

    def places(self) -> Iterator[Place | None]:
        """What this worker is to make; None for each sample before the span."""
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        if worker:
            fsspec.asyn.reset_lock()  # a forked worker has the lock of its parent's connection, but not the connection
        first, end = self._span.tolist()
        rows = self._rows_from(first)
        for k in count() if end < 0 else range(end if first < end else 0):
            place = next(rows) if k >= first else None
            if k // self.batch_size % workers == number:
                yield place

    def sample(self, place: Place) -> dict[str, Any]:
        """The sample of a place.

        Raises:
            DataError: the row or its image can't be read, or a category isn't one of the model's
        """
        epoch, number, stored = place
        row = self.stream.convert(stored, number)
        return labelled(self.transform(row, epoch, number, ()), self.class_of)

    def _rows_from(self, first: int) -> Iterator[Place]:
        """This rank's rows from number `first` on, without end; epochs that are passed over whole aren't read."""
        epoch = 0
        while True:
            length = 0
            for number, row in self._epoch_rows(epoch):
                length += 1
                if length > first:
                    yield epoch, number, row
            if not length:
                raise DataError(
                    f"{self.stream.name}: expected at least {self.world} training images, one for each process, found"
                    " fewer. Add images, or start fewer processes."
                )
            passed, first = divmod(max(first - length, 0), length)
            epoch += 1 + passed

    def _epoch_rows(self, epoch: int) -> Iterator[tuple[int, Row]]:
        """(number, row) of this rank in an epoch's order: files shuffled, and rows mixed with those near them.

        datasets' own shuffle would do, but waits for 5 s at the end of every epoch.
        """
        rng, files = np.random.default_rng([self.seed, epoch]), self.stream.rows.num_shards
        by_file = files % self.world == 0
        order = rng.permutation(files).tolist()
        mine = [file for file in order if file % self.world == self.rank] if by_file else order
        rows = (row for file in mine for row in _one_by_one(self.stream.rows.shard(files, file)))
        for number, row in enumerate(_mixed(rows, rng)):
            if by_file:
                yield number * self.world + self.rank, row
            elif number % self.world == self.rank:
                yield number, row


def _mixed(rows: Iterator[Row], rng: np.random.Generator) -> Iterator[Row]:
    """The rows, each swapped with a random one of the `_BUFFER` around it."""
    held = list(islice(rows, _BUFFER))
    for row in rows:
        place = int(rng.integers(len(held)))
        yield held[place]
        held[place] = row
    yield from (held[place] for place in rng.permutation(len(held)))


def _one_by_one(rows: datasets.IterableDataset) -> Iterator[Row]:
    """The rows; iterating over them in a data worker would give that worker's share as datasets see it."""
    for batch in rows.iter(batch_size=1):
        yield {key: values[0] for key, values in batch.items()}
