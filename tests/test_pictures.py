"""Pictures from files: every kind of pixel right or refused by name; which class folder is which class; what counts."""

import struct
import zlib

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import ragged
from ragged.bench import folder as pictures
from ragged.data import read_picture

RAMP = np.linspace(0, 1, 64).reshape(8, 8)


def saved(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


# ---- reading ----


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_from_their_own_range(tmp_path, suffix):
    path = saved(tmp_path / f"grey.{suffix}", (RAMP * 65535).astype(np.uint16))
    found = np.asarray(read_picture(path))
    assert found.shape == (8, 8, 3) and (found == found[..., :1]).all()
    assert np.abs(found[..., 0] - RAMP * 255).max() <= 1 and found.min() == 0 and found.max() == 255


@pytest.mark.parametrize("dtype, said", [(np.int32, "32-bit integers"), (np.float32, "floats")])
def test_pixels_of_an_unknown_range_are_refused_by_name(tmp_path, dtype, said):
    path = saved(tmp_path / "depth.tif", (RAMP * 1000).astype(dtype))
    with pytest.raises(ValueError, match=rf"depth\.tif has pixels that are {said}.*8 or 16 bits"):
        read_picture(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_every_other_kind_is_read_as_torchvision_does(tmp_path, mode):
    from torchvision.datasets.folder import pil_loader

    picture = Image.fromarray((np.stack((RAMP, RAMP.T, 1 - RAMP), -1) * 255).astype(np.uint8))
    alpha = Image.fromarray((RAMP * 255).astype(np.uint8))
    if mode in ("LA", "PA", "RGBA"):
        picture = picture.convert(mode.removesuffix("A") or "L")
        picture.putalpha(alpha)
    else:
        picture = picture if mode == "LAB" else picture.convert(mode)
    suffix = "tif" if mode in ("YCbCr", "LAB", "CMYK", "PA") else "png"
    picture.save(tmp_path / f"picture.{suffix}")
    found = read_picture(tmp_path / f"picture.{suffix}")
    assert found.mode == "RGB" and found.tobytes() == pil_loader(tmp_path / f"picture.{suffix}").tobytes()


def test_a_picture_is_not_turned_by_its_exif(tmp_path):
    """torchvision and timm do not either, and the published accuracies are of their reading."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").size == (20, 10)


def png_of(width, height):
    """A PNG that says it is of this size, and holds next to nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content, said",
    [
        (png_of(60_000, 60_000), "is too large to be opened safely"),
        (b"no image at all", "is not an image"),
        (b"", "is not an image"),
        (png_of(50, 50), "is not an image"),  # cut off
        (b"version https://git-lfs.github.com/spec/v1\n", "is not an image"),
    ],
    ids=["bomb", "text", "empty", "cut", "pointer"],
)
def test_what_cannot_be_read_is_named(tmp_path, content, said):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.png {said}"):
        read_picture(tmp_path / "x.png")


# ---- which class is which ----


@pytest.fixture
def tree(tmp_path):
    """Make a validation folder: class names, each with so many images."""

    def make(*names, images=1):
        folder = tmp_path / "val"
        for name in names:
            (folder / name).mkdir(parents=True)
            for i in range(images):
                Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / name / f"{i}.png")
        return folder

    return make


def labels_of(listing):
    return {name: {label for path, label in listing.samples if f"/{name}/" in path} for name in listing.classes}


def test_numbers_are_in_the_order_of_the_numbers(tree):
    names = [str(n) for n in range(12)]
    found = pictures.find(tree(*names), 12)
    assert found.classes == names and labels_of(found) == {name: {int(name)} for name in names}
    assert "sorted as numbers: 0 = 0, 1 = 1, …, 10 = 10, 11 = 11" in found.summary()


def test_names_are_in_the_order_of_torchvision_and_timm(tree):
    folder = tree("n03", "n01", "n02", images=2)
    found = pictures.find(folder, 3)
    from timm.data.readers.reader_image_folder import find_images_and_targets
    from torchvision.datasets import ImageFolder

    assert found.samples == ImageFolder(folder).samples == sorted(find_images_and_targets(str(folder))[0])
    assert "6 images in 3 class folders, sorted by name: 0 = n01, 1 = n02, 2 = n03" in found.summary()


@pytest.mark.parametrize("names, said", [(("c2", "c10"), "c10.*c2.*--class-map"), (("b", "C"), "order"),
                                         (("1", "01"), "same number")])  # fmt: skip
def test_an_order_that_is_not_clear_is_refused(tree, names, said):
    with pytest.raises(ValueError, match=said):
        pictures.find(tree(*names), 2)


def test_a_class_map_says_which_class_is_which(tree, tmp_path):
    folder, classes = tree("c2", "c10"), tmp_path / "classes.txt"
    classes.write_text("c2\nc3\nc10\n")
    found = pictures.find(folder, 3, classes)
    assert labels_of(found) == {"c2": {0}, "c10": {2}} and "0 = c2, 2 = c10" in found.summary()
    for text, said in (("c2\nc10\n", "expected 3 names.*has 2"), ("c2\nc2\nc10\n", "2 of them different"),
                       ("c2\nc3\nc4\n", "c10 is not in")):  # fmt: skip
        classes.write_text(text)
        with pytest.raises(ValueError, match=said):
            pictures.find(folder, 3, classes)


# ---- what counts ----


def test_hidden_folders_and_files_do_not_count(tree):
    folder = tree("a", "b", ".ipynb_checkpoints", "a/.ipynb_checkpoints", "a/inside")
    (folder / "a" / "._0.png").write_bytes(b"what macOS leaves behind")
    (folder / "a" / "notes.txt").touch()
    found = pictures.find(folder, 2)
    assert found.classes == ["a", "b"]
    assert [path.removeprefix(f"{folder}/") for path, _ in found.samples] == ["a/0.png", "a/inside/0.png", "b/0.png"]
    assert "1 files are no images and were left out (1 .txt)" in found.summary()


@pytest.mark.parametrize("target", ["a", "", "..", "a/inside"])
def test_a_loop_of_links_counts_an_image_once(tree, target):
    folder = tree("a", "b", "a/inside")
    (folder / "a" / "loop").symlink_to((folder / target).resolve(), target_is_directory=True)
    found = pictures.find(folder, 2)
    assert sorted(path.removeprefix(f"{folder}/").replace("loop", "inside") for path, _ in found.samples) == [
        "a/0.png", "a/inside/0.png", "b/0.png"]  # fmt: skip
    assert "1 links lead to a folder that is counted already" in found.summary()


def test_an_image_has_one_class(tree):
    folder = tree("a", "b")
    (folder / "a" / "link").symlink_to(folder / "b", target_is_directory=True)
    with pytest.raises(ValueError, match="belongs to the class b as well"):
        pictures.find(folder, 2)
    (folder / "a" / "link").unlink()
    (folder / "c").symlink_to(folder / "b", target_is_directory=True)
    with pytest.raises(ValueError, match="same folder"):
        pictures.find(folder, 3)


def test_a_link_to_nowhere_is_named(tree):
    folder = tree("a", "b")
    (folder / "b" / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    with pytest.raises(ValueError, match=r"gone\.jpg is no file"):
        pictures.find(folder, 2)


# ---- as the network wants it ----


def test_the_transform_is_the_model_s_own(tree):
    """Mean, deviation, crop and interpolation by the model's configuration, which differs between networks."""
    folder = tree("a", "b")
    Image.fromarray((np.random.default_rng(0).random((90, 120, 3)) * 255).astype(np.uint8)).save(folder / "a" / "0.png")
    found = {}
    for name in ("deit_tiny_patch16_224", "vit_tiny_patch16_224"):
        vit = timm.create_model(name, num_classes=2).eval()
        config = timm.data.resolve_model_data_config(vit)
        want = timm.data.create_transform(**config)(Image.open(folder / "a" / "0.png"))
        ((images, labels),) = pictures.image_folder(folder, vit, 2, 0)
        assert torch.equal(images[0], want) and labels.tolist() == [0, 1]
        found[name] = config["mean"]
    assert found["deit_tiny_patch16_224"] != found["vit_tiny_patch16_224"]  # or this test shows nothing
    small = ragged.load_deit("deit_tiny", num_classes=2, img_size=96)
    assert next(iter(pictures.image_folder(folder, small, 2, 0)))[0].shape == (2, 3, 96, 96)
