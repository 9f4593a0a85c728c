"""Which split a row belongs to: as it was given, or by content."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from veneer_digests import epoch_order, split_of

DEFAULT_SPLIT = "train"

_BY_FILE_NAME = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_SHARE_UNITS = 10**12  # a share of 1 in the whole numbers that digests.split_of takes


class GroupKey(IntEnum):
    """What rows must share to be kept together."""

    PICTURES = 1
    FIELD = 2
    NONE = 3


@dataclass(frozen=True, slots=True)
class Fractions:
    """Splits by content: shares by name that sum up to 1."""

    shares: Mapping[str, float]
    group_key: GroupKey = GroupKey.PICTURES
    stratified: bool = False

    @property
    def weights(self) -> list[tuple[str, int]]:
        """Shares in whole numbers, by name: so that their order is always the same."""
        return [(split, round(share * _SHARE_UNITS)) for split, share in sorted(self.shares.items())]


def given_split(row_split: str, file_split: str, path: str) -> str:
    """The split of a row by what its submitter wrote: in the row, for the file, in the file's name."""
    stem = re.sub(r"\.[^.]*$", "", path.rpartition("/")[2])
    return row_split or file_split or _BY_FILE_NAME.get(stem, DEFAULT_SPLIT)


def group_of(key: GroupKey, row_digest: str, first_picture: str, field: str) -> str:
    """The key of the group that a row belongs to."""
    if key is GroupKey.FIELD and field:
        return f"field:{field}"
    return row_digest if key is GroupKey.NONE else first_picture or row_digest


def split_of_group(fractions: Fractions, group: str) -> str:
    """The split of a group by its key alone."""
    return split_of(group, fractions.weights)


def stratified_splits(fractions: Fractions, class_by_group: Mapping[str, str]) -> dict[str, str]:
    """The split of each group, such that each class is shared out as the fractions say.

    Within a class, groups in the order of their hashes are cut at the shares' bounds, rounded to whole groups.
    """
    groups_by_class: dict[str, list[str]] = defaultdict(list)
    for group, its_class in class_by_group.items():
        groups_by_class[its_class].append(group)
    split_by_group: dict[str, str] = {}
    for groups in groups_by_class.values():
        ordered = _by_hash(groups)
        start, bound = 0, 0
        for split, weight in fractions.weights:
            bound += weight
            end = round(len(ordered) * bound / _SHARE_UNITS)
            split_by_group.update(dict.fromkeys(ordered[start:end], split))
            start = end
        split_by_group.update(dict.fromkeys(ordered[start:], fractions.weights[-1][0]))
    return split_by_group


def _by_hash(groups: Sequence[str]) -> list[str]:
    keys = [hashlib.sha256(group.encode()).hexdigest() for group in groups]
    return [groups[index] for index in epoch_order(0, 0, keys)]
