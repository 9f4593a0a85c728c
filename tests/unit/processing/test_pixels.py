"""Sizes, resize, normalisation and patches equal transformers' PIL image processor, bit for bit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from veneer_processing import Picture, PictureError, PixelBounds
from veneer_processing.pixels import PixelSettings

SHA = "c0" * 32
RNG = np.random.default_rng(11)
SIZES = [
    (1, 1),
    (7, 5),
    (32, 32),
    (33, 31),
    (64, 448),
    (480, 640),
    (769, 1025),
    (1, 200),
    (200, 1),
    (90, 17_999),
]


def settings_with(
    least: int = 65_536,
    most: int = 200_704,
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
    std: tuple[float, float, float] = (0.5, 0.5, 0.5),
    patch: int = 16,
) -> PixelSettings:
    return PixelSettings(PixelBounds(least, most), patch, 2, 2, mean, std)


def noise(height: int, width: int) -> Picture:
    return Picture(SHA, width, height, RNG.integers(0, 256, (height, width, 3), np.uint8))


def theirs(settings: PixelSettings) -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": settings.bounds.min_pixels, "longest_edge": settings.bounds.max_pixels},
        patch_size=settings.patch_size,
        merge_size=settings.merge_size,
        temporal_patch_size=settings.temporal_patch_size,
        image_mean=list(settings.image_mean),
        image_std=list(settings.image_std),
    )


@pytest.mark.parametrize(
    "settings",
    [
        settings_with(),
        settings_with(1, 1_024),
        settings_with(4_096, 1_000_000),
        settings_with(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711), patch=14),
    ],
    ids=["default", "one token", "wide", "mean and std of CLIP, patch 14"],
)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[1]}x{size[0]}")
def test_patches_and_grid_are_those_of_transformers(settings: PixelSettings, size: tuple[int, int]) -> None:
    picture = noise(*size)
    expected = theirs(settings)(picture.rgb, return_tensors="np", input_data_format="channels_last")
    patches = settings.patches(picture)
    assert patches.dtype == np.float32
    np.testing.assert_array_equal(patches, expected["pixel_values"])
    assert settings.grid(picture) == tuple(expected["image_grid_thw"][0])
    assert settings.visual_tokens(picture) == expected["image_grid_thw"].prod() // 4


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[1]}x{size[0]}")
def test_pixels_shipped_after_the_resize_give_the_same_patches(size: tuple[int, int]) -> None:
    settings, picture = settings_with(), noise(*size)
    resized = settings.resize(picture)
    assert resized.dtype == np.uint8
    shipped = Picture.resized(SHA, resized)
    assert settings.grid(shipped) == settings.grid(picture)
    np.testing.assert_array_equal(settings.patches(shipped), settings.patches(picture))


edges = st.one_of(st.integers(1, 300), st.integers(1, 30_000))


@given(height=edges, width=edges, least=st.integers(1, 300_000), room=st.integers(0, 3_000_000))
def test_every_size_is_resized_as_qwen_does_or_refused_as_it_does(
    height: int, width: int, least: int, room: int
) -> None:
    settings = settings_with(least, least + room)
    try:
        expected = smart_resize(height, width, 32, least, least + room)
    except ValueError:
        with pytest.raises(PictureError, match="at most 200 times as long"):
            settings.resized_size(height, width)
        return
    assert settings.resized_size(height, width) == expected
    # What the resize made is accepted as resized, whatever the bounds, and stays as it is.
    grid = settings.grid(Picture(SHA, expected[1], expected[0], is_resized=True))
    assert grid == settings.grid(Picture(SHA, width, height)) == (1, expected[0] // 16, expected[1] // 16)


def test_a_picture_of_1_by_20000_is_refused_with_the_reason() -> None:
    with pytest.raises(PictureError, match="at most 200 times as long as wide, got 20000x1"):
        settings_with().grid(Picture(SHA, 20_000, 1))


@pytest.mark.parametrize(("width", "height"), [(448, 440), (448, 480), (32, 32)])
def test_pixels_resized_under_other_settings_are_refused(width: int, height: int) -> None:
    with pytest.raises(PictureError, match=f"{width}x{height} is no size of these settings"):
        settings_with().grid(Picture(SHA, width, height, is_resized=True))


def test_a_picture_of_which_only_the_size_is_known_has_no_patches() -> None:
    with pytest.raises(PictureError, match="only its size is known"):
        settings_with().patches(Picture(SHA, 64, 64))


@pytest.mark.parametrize(("least", "most"), [(0, 10), (-1, 10), (11, 10)])
def test_bounds_that_bound_nothing_are_refused(least: int, most: int) -> None:
    with pytest.raises(ValueError, match=f"got {least}, {most}"):
        PixelBounds(least, most)
