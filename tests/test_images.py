"""The border to pixels: what goes out comes back, and a contact sheet does not show what it should not."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from safediffusion.errors import UserError
from safediffusion.images import contact_sheet, from_uint8, load_images, png_bytes, save_png, to_uint8


def random_images(count=3, height=10, width=8, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def test_every_uint8_value_survives_the_round_trip():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert np.array_equal(to_uint8(from_uint8(pixels)), pixels)


def test_values_are_clamped_and_rounded_to_nearest():
    image = torch.tensor([-1.0, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 2.0]).expand(1, 3, 1, 6)
    assert to_uint8(image)[0, 0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_and_graphs_are_taken(dtype):
    images = random_images().to(dtype).requires_grad_()
    assert to_uint8(images).shape == (3, 10, 8, 3)


def test_nan_has_no_colour():
    with pytest.raises(ValueError, match="diverged"):
        to_uint8(torch.full((1, 3, 2, 2), torch.nan))


def test_saved_images_load_to_within_rounding(tmp_path):
    images = random_images()
    paths = [tmp_path / "new" / f"{i}.png" for i in range(3)]
    for image, path in zip(images, paths, strict=True):
        save_png(image, path)
    torch.testing.assert_close(load_images(paths), images, atol=0.5 / 255 + 1e-6, rtol=0)
    assert sorted(tmp_path.rglob("*.*")) == paths


def test_equal_images_have_equal_bytes():
    image = random_images()[0]
    assert png_bytes(image) == png_bytes(image.clone())
    assert Image.open(io.BytesIO(png_bytes(image))).size == (8, 10)


def test_grey_palette_and_transparent_files_load_as_colour(tmp_path):
    for mode in ("L", "P", "RGBA", "1"):
        Image.new(mode, (4, 4)).save(tmp_path / f"{mode}.png")
    assert load_images(sorted(tmp_path.glob("*.png"))).shape == (4, 3, 4, 4)


def test_what_cannot_be_loaded_is_named(tmp_path):
    good, other, cut, text = (tmp_path / name for name in ("good.png", "other.png", "cut.png", "text.png"))
    save_png(random_images()[0], good)
    save_png(random_images(width=9)[0], other)
    cut.write_bytes(png_bytes(random_images(height=64, width=64)[0])[:3000])
    text.write_text("not a picture")
    with pytest.raises(UserError, match=r"other.png is 9x10 pixels but .*good.png is 8x10"):
        load_images([good, other])
    with pytest.raises(UserError, match=r"cut.png cannot be read as an image"):
        load_images([cut])
    with pytest.raises(UserError, match=r"text.png is not an image"):
        load_images([text])
    with pytest.raises(UserError, match=r"absent.png does not exist"):
        load_images([tmp_path / "absent.png"])
    with pytest.raises(UserError, match="no images"):
        load_images([])


def test_a_sheet_holds_each_image_in_its_place():
    images = random_images(5)
    sheet = contact_sheet(images, columns=3, blur=False)
    assert sheet.shape == (3, 2 * 12 + 2, 3 * 10 + 2)
    assert torch.equal(sheet[:, 2:12, 2:10], images[0])
    assert torch.equal(sheet[:, 14:24, 12:20], images[4])
    assert (sheet[:, 14:24, 22:30] == 1).all()
    assert contact_sheet(images[:2], columns=8, blur=False).shape == (3, 14, 22)


def test_a_sheet_is_blurred_unless_asked():
    stripes = torch.zeros(1, 3, 40, 40)
    stripes[..., ::2] = 1  # finer than a patch: after the blur no trace may be left
    sheet = contact_sheet(stripes, columns=1)[:, 2:-2, 2:-2]
    assert sheet.std() < 1e-6
    assert contact_sheet(stripes, columns=1, blur=False)[:, 2:-2, 2:-2].std() > 0.4


def test_blur_keeps_the_colours_of_its_own_image_only():
    red, blue = torch.zeros(2, 3, 20, 20).unbind()
    red[0], blue[2] = 1, 1
    sheet = contact_sheet(torch.stack([red, blue]), columns=2)
    assert torch.allclose(sheet[:, 2:22, 2:22], red)
    assert torch.allclose(sheet[:, 2:22, 24:44], blue)
