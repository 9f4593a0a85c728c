"""From upright RGB pixels to the patches the vision tower reads.

Owns the size a picture is resized to, the one resize, normalisation and the order of patches. All of it
equals transformers' `Qwen2VLImageProcessorPil` bit for bit. Decoding is in `pictures`.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from veneer_processing.conversation import Picture
from veneer_processing.errors import PictureError

MAX_ASPECT_RATIO = 200
"""Longest edge over shortest; beyond it Qwen's own resize refuses, and so does this one."""

INTERPOLATION = "bicubic"


@dataclass(frozen=True, slots=True)
class PixelBounds:
    """Bounds on a picture's area after resizing, in pixels.

    They bound Qwen's resize as it is: rounding to whole patch groups may leave them a little, where they lie
    close together or the picture is very thin.

    Raises:
        ValueError: not 1 <= min_pixels <= max_pixels.
    """

    min_pixels: int
    max_pixels: int

    def __post_init__(self) -> None:
        if not 1 <= self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"pixel bounds are 1 <= min_pixels <= max_pixels, got {self.min_pixels}, {self.max_pixels}"
            )


DEFAULT_MAX_PIXELS = 448 * 448
"""The product's default for `max_pixels`; the model's own bound applies where it is lower."""


@dataclass(frozen=True)
class PixelSettings:
    """How pictures become patches: the part of the contract that concerns pixels.

    Attributes:
        bounds: on the area after resizing.
        patch_size: edge of a patch, in pixels.
        merge_size: patches along each edge that merge into one visual token.
        temporal_patch_size: frames in a patch; a picture repeats its one frame.
        image_mean: of red, green and blue, taken away after scaling to 0..1.
        image_std: likewise, divided by.
    """

    bounds: PixelBounds
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    @property
    def step(self) -> int:
        """What the edges of a resized picture are multiples of, in pixels."""
        return self.patch_size * self.merge_size

    @property
    def patch_values(self) -> int:
        """Numbers in a patch: 3 * temporal * patch * patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    def grid(self, picture: Picture) -> tuple[int, int, int]:
        """Frames (1), rows and columns of patches that the picture becomes.

        Raises:
            PictureError: as `resized_size`, or pixels resized under other settings.
        """
        height, width = self._final_size(picture)
        return 1, height // self.patch_size, width // self.patch_size

    def visual_tokens(self, picture: Picture) -> int:
        """Tokens that stand for the picture; errors as for `grid`."""
        height, width = self._final_size(picture)
        return (height // self.step) * (width // self.step)

    def resize(self, picture: Picture) -> NDArray[np.uint8]:
        """The picture at the size the model sees, (height, width, 3) uint8: one bicubic resize by Pillow.

        Raises:
            PictureError: it has no pixels, or as for `grid`.
        """
        height, width = self._final_size(picture)
        if picture.rgb is None:
            raise PictureError(f"picture {picture.sha256}: only its size is known, and pixels were asked for")
        if picture.is_resized:
            return picture.rgb
        return _resized(Image.fromarray(picture.rgb), height, width)

    def resize_image(self, image: Image.Image) -> NDArray[np.uint8]:
        """`resize` of what `decode_image` gave: the same pixels, for less copying.

        Raises:
            PictureError: as `resized_size`.
        """
        return _resized(image, *self.resized_size(image.height, image.width))

    def patches(self, picture: Picture) -> NDArray[np.float32]:
        """The picture's normalised patches, (rows * columns, 3 * temporal * patch * patch) float32.

        Patches come in groups of merge x merge, groups row by row; errors as for `resize`.
        """
        rgb = self.resize(picture)
        patch, merge = self.patch_size, self.merge_size
        groups = rgb.reshape(rgb.shape[0] // self.step, merge, patch, rgb.shape[1] // self.step, merge, patch, 3)
        samples_N_3_P = groups.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, patch * patch)
        patches_N_3_F_P = np.empty((len(samples_N_3_P), 3, self.temporal_patch_size, patch * patch), np.float32)
        for channel in range(3):
            patches_N_3_F_P[:, channel] = self._normalised_3_256[channel][samples_N_3_P[:, channel, None]]
        return patches_N_3_F_P.reshape(-1, self.patch_values)

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that a picture is resized to.

        Multiples of `step` near its own shape, the area within bounds: Qwen2-VL's `smart_resize`
        (QwenLM/Qwen2-VL, qwen-vl-utils).

        Raises:
            PictureError: longer than `MAX_ASPECT_RATIO` times its other edge.
        """
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise PictureError(f"a picture is at most {MAX_ASPECT_RATIO} times as long as wide, got {width}x{height}")
        step, bounds = self.step, self.bounds
        new_height, new_width = round(height / step) * step, round(width / step) * step
        if new_height * new_width > bounds.max_pixels:
            shrink = math.sqrt(height * width / bounds.max_pixels)
            new_height = max(step, math.floor(height / shrink / step) * step)
            new_width = max(step, math.floor(width / shrink / step) * step)
        elif new_height * new_width < bounds.min_pixels:
            grow = math.sqrt(bounds.min_pixels / (height * width))
            new_height = math.ceil(height * grow / step) * step
            new_width = math.ceil(width * grow / step) * step
        return new_height, new_width

    def _final_size(self, picture: Picture) -> tuple[int, int]:
        if not picture.is_resized:
            return self.resized_size(picture.height, picture.width)
        height, width, step = picture.height, picture.width, self.step
        least, most = self.bounds.min_pixels, self.bounds.max_pixels
        # What rounding up from `least`, or down from `most`, can leave.
        too_large = height * width > most and min(height, width) > step and (height - step) * (width - step) >= least
        too_small = height * width < least and (height + step) * (width + step) <= most
        if height % step or width % step or too_large or too_small:
            raise PictureError(
                f"picture {picture.sha256}: {width}x{height} is no size of these settings "
                f"(multiples of {step}, area {least} to {most})"
            )
        return height, width

    @cached_property
    def _normalised_3_256(self) -> NDArray[np.float32]:
        """What each sample value of each channel becomes.

        Scaled in float64, normalised in float32: the order in which transformers rounds.
        """
        scaled_256 = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
        mean_3_1 = np.array(self.image_mean, np.float32)[:, None]
        std_3_1 = np.array(self.image_std, np.float32)[:, None]
        normalised_3_256: NDArray[np.float32] = (scaled_256 - mean_3_1) / std_3_1
        return normalised_3_256


def _resized(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
