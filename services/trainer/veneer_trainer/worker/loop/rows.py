"""The rows of a split as the loop takes them: checked, encoded, in an epoch's order, from memory where they fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from veneer_digests import epoch_order
from veneer_processing import Conversation, Encoded, Picture, ProcessingError, Processor
from veneer_trainer.worker.loop.dataset import Dataset
from veneer_trainer.worker.refusal import Refused

_ROW_BYTES = 1024  # of Python's own, about


@dataclass(frozen=True, slots=True)
class Row:
    """A row, encoded; its patches are made when they are needed."""

    encoded: Encoded
    pictures: tuple[Picture, ...]

    @property
    def size_bytes(self) -> int:
        """Memory that it takes, about."""
        pixels = sum(3 * picture.width * picture.height for picture in self.pictures)
        return _ROW_BYTES + pixels + self.encoded.positions_3_T.nbytes + 9 * len(self.encoded.ids_T)


@dataclass(frozen=True, slots=True)
class LengthRule:
    """What becomes of rows longer than `max_length` tokens."""

    max_length: int
    skip: bool


class Split:
    """One split.

    Args:
        dataset: where rows come from.
        processor: under the job's contract.
        name: of the split.
        row_count: rows that it has.
        rule: for long rows.
        cache_bytes: most memory for rows.

    Attributes:
        size_bytes: memory that its rows take.
    """

    def __init__(
        self, dataset: Dataset, processor: Processor, name: str, row_count: int, rule: LengthRule, cache_bytes: int
    ) -> None:
        self._dataset = dataset
        self._processor = processor
        self._name = name
        self._row_count = row_count
        self._rule = rule
        self._cache_bytes = cache_bytes
        self._rows: list[Row] | None = []  # in stored order; None where they do not fit
        self._digests: list[str] | None = []  # of all rows in stored order; None where they were not all read
        self._skipped: set[int] = set()  # positions in stored order
        self.size_bytes = 0

    @property
    def skipped_rows(self) -> int:
        """Rows left out because they are too long."""
        return len(self._skipped)

    @property
    def used_rows(self) -> int:
        """Rows of an epoch."""
        return self._row_count - len(self._skipped)

    def load(self, lengths_known: bool) -> None:
        """Reads rows into memory, and checks them before the first step.

        Args:
            lengths_known: no row is too long; then reading stops when memory is full.

        Raises:
            Refused: a row cannot be trained on, with its place.
        """
        digests: list[str] = []
        rows: list[Row] = []
        for position, (digest, conversation) in enumerate(self._dataset.read(self._name)):
            row = self._row(digest, conversation)
            digests.append(digest)
            if row is None:
                self._skipped.add(position)
                continue
            if self._rows is None:
                continue
            rows.append(row)
            self.size_bytes += row.size_bytes
            if self.size_bytes > self._cache_bytes:
                self._rows, rows, self.size_bytes = None, [], 0
                if lengths_known:
                    self._digests = None
                    return
        self._row_count = len(digests)
        self._digests = digests
        if self._rows is not None:
            self._rows = rows

    def epoch(self, seed: int, epoch: int, start: int) -> Iterator[Row]:
        """Yields an epoch's rows from the `start`-th on; raises Refused."""
        if self._digests is None:
            return self._streamed(self._dataset.read(self._name, (seed, epoch), start))
        order = list(epoch_order(seed, epoch, self._digests))
        used = [place for place, position in enumerate(order) if position not in self._skipped]
        if self._rows is not None:
            kept = self._positions()
            return iter([self._rows[kept[order[place]]] for place in used[start:]])
        offset = used[start] if start < len(used) else len(order)
        return self._streamed(self._dataset.read(self._name, (seed, epoch), offset))

    def stored(self) -> Iterator[Row]:
        """Yields all rows in stored order; raises Refused."""
        if self._rows is not None:
            return iter(self._rows)
        return self._streamed(self._dataset.read(self._name))

    def _positions(self) -> dict[int, int]:
        """Where each row that is used stands among the kept ones, by its position in stored order."""
        used = (position for position in range(self._row_count) if position not in self._skipped)
        return {position: index for index, position in enumerate(used)}

    def _streamed(self, source: Iterator[tuple[str, Conversation]]) -> Iterator[Row]:
        for digest, conversation in source:
            row = self._row(digest, conversation)
            if row is not None:
                yield row

    def _row(self, digest: str, conversation: Conversation) -> Row | None:
        """The row encoded; None where it is left out."""
        place = f"row {digest[:12]} of split {self._name}"
        try:
            encoded = self._processor.encode(conversation, with_patches=False)
        except ProcessingError as error:
            raise Refused("ROW_UNUSABLE", f"{place}: {error}") from error
        length, limit = len(encoded.ids_T), self._rule.max_length
        if length <= limit:
            return Row(encoded, tuple(conversation.pictures))
        if self._rule.skip:
            return None
        text = f"{place} has {length} tokens, max_length is {limit}: set it to {length}, or over_length=SKIP"
        raise Refused("ROWS_TOO_LONG", text)
