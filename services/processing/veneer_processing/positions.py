"""Where each token stands: Qwen3-VL's three-axis rotary positions for text and pictures, in numpy.

Owns the arithmetic alone. The scheme is M-RoPE of Qwen2-VL (arXiv:2409.12191, section 2.1) as Qwen3-VL lays
out pictures: a text token has one position on all three axes; a picture's tokens share the time of its start
and have rows and columns counted from there; the text after it goes on at start + max(rows, columns).
"""

import numpy as np
from numpy.typing import NDArray


def rope_positions(
    ids_T: NDArray[np.int64], grids_n_3: NDArray[np.int64], image_pad_id: int, merge_size: int
) -> tuple[NDArray[np.int64], int]:
    """Positions of a sequence, and what decoding continues from.

    Args:
        ids_T: token ids, each picture expanded to its visual tokens.
        grids_n_3: frames (1), rows and columns of patches of each picture, in order.
        image_pad_id: id of a visual token.
        merge_size: patches along each edge that make one visual token.

    Returns:
        positions of shape (3, T) (time, row, column) and the delta: token T+k, generated after these, stands
        at T + k + delta on every axis.

    Raises:
        ValueError: the grids do not ask for as many visual tokens as there are.
    """
    rows_columns_n = grids_n_3[:, 1:] // merge_size
    visual_n = rows_columns_n.prod(axis=1)
    visual_at = np.flatnonzero(ids_T == image_pad_id)
    if len(visual_at) != visual_n.sum():
        raise ValueError(f"{len(visual_at)} visual tokens in the sequence, {visual_n.sum()} in the grids")
    positions_3_T = np.empty((3, len(ids_T)), np.int64)
    done = position = seen = 0
    for (rows, columns), visual in zip(rows_columns_n.tolist(), visual_n.tolist(), strict=True):
        start = int(visual_at[seen])
        positions_3_T[:, done:start] = np.arange(position, position + start - done)
        position += start - done
        done, seen = start + visual, seen + visual
        positions_3_T[0, start:done] = position
        positions_3_T[1, start:done] = position + np.repeat(np.arange(rows), columns)
        positions_3_T[2, start:done] = position + np.tile(np.arange(columns), rows)
        position += max(rows, columns)
    positions_3_T[:, done:] = np.arange(position, position + len(ids_T) - done)
    return positions_3_T, position - done
