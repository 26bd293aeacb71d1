"""Files that people bring: damage is found, values keep their meaning, every format is named."""

from __future__ import annotations

import io
import pathlib
import struct
import subprocess
import sys

import numpy as np
import pillow_heif
import pillow_jxl
import pytest
import tensorflow as tf
from conftest import ROOT, here, silent
from PIL import Image, PngImagePlugin
from samples import put

from trainer.core.errors import DataError
from trainer.data import image_header, records, strict_decode
from trainer.data.dataset import Dataset, Split
from trainer.data.records import ImageRecord
from trainer.ingest import images, verify
from trainer.ingest.images import UnusableImage, ValidatedImage

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (96, 128, 3), np.uint8)
SMOOTH = np.stack(np.broadcast_arrays(np.arange(0, 240, 8)[None], np.arange(0, 200, 10)[:, None], 90), 2).astype(
    np.uint8
)
GREY = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (48, 1))  # from black to white
assert pillow_jxl  # its import makes Pillow write JPEG XL


def encode(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(**options: object) -> bytes:
    return encode(NOISE, "JPEG", **({"quality": 90} | options))


def validate(encoded: bytes) -> ValidatedImage:
    return images.validate_image(encoded, 0, "x", "in/x.jpg")


def refusal(encoded: bytes) -> str:
    with pytest.raises(UnusableImage, match=r"^in/x\.jpg: ") as error:
        validate(encoded)
    assert "\n" not in error.value.reason
    return error.value.reason


def pixels(image: ValidatedImage) -> np.ndarray:
    decoded = records.decode(tf.constant(image.record.encoded)).numpy()
    assert decoded.shape[:2] == (image.record.height, image.record.width)
    return decoded


# -- damage that decoders only warn about


def with_hole(whole: bytes, start: float = 1 / 3, stop: float = 2 / 3, fill: bytes = b"\0") -> bytes:
    first, last = int(len(whole) * start), int(len(whole) * stop)
    return whole[:first] + fill * (last - first) + whole[last:]


def closed(whole: bytes, share: float) -> bytes:
    """Cut, and then given an end by a tool."""
    return whole[: int(len(whole) * share)] + b"\xff\xd9"


def at_marker(whole: bytes, marker: int, change: bytes) -> bytes:
    """Replaces a marker of the image data."""
    position = whole.index(bytes([0xFF, marker]), whole.index(b"\xff\xda"))
    return whole[:position] + change + whole[position + 2 :]


HEADER_ONLY = jpeg()[: jpeg().index(b"\xff\xda") + 14]
DAMAGED = {
    "a hole of zeros": (with_hole(jpeg()), "extraneous bytes before marker 0xd9"),
    "a hole that reaches the end": (with_hole(jpeg()[:-2], 2 / 3, 1) + b"\xff\xd9", "extraneous bytes"),
    "cut and closed": (closed(jpeg(), 0.5), "premature end of data segment"),
    "cut near the end and closed": (closed(jpeg(), 0.99), "premature end of data segment"),
    "nothing after the header, closed": (HEADER_ONLY + b"\xff\xd9", "premature end of data segment"),
    "nothing after the header": (HEADER_ONLY, "Premature end"),
    "progressive, cut and closed": (closed(jpeg(progressive=True), 0.9), "premature end of data segment"),
    "another restart marker": (at_marker(jpeg(restart_marker_blocks=4), 0xD1, b"\xff\xd5"), "found marker 0xd5"),
    "a lost restart marker": (at_marker(jpeg(restart_marker_blocks=4), 0xD1, b""), "extraneous bytes"),
    "text before the end": (jpeg()[:-2] + b"a few words that do not belong here" + b"\xff\xd9", "extraneous bytes"),
    "a hole, and an odd version": (with_hole(jpeg()).replace(b"JFIF\0\1", b"JFIF\0\7"), "extraneous bytes"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_libjpeg_warns_about_is_damage(case: str, tmp_path: pathlib.Path) -> None:
    encoded, reason = DAMAGED[case]
    assert reason in refusal(encoded)
    if encoded.endswith(b"\xff\xd9"):  # --verify and training read it as it is
        image = ImageRecord(encoded, *NOISE.shape[:2], 0, "holed.jpg")
        assert records.decode(tf.constant(encoded)).shape == NOISE.shape  # TensorFlow says nothing
        shard = records.write_shard(str(tmp_path), "t", [image])
        dataset = Dataset(str(tmp_path), "t", ("a",), {"train": Split("train", (shard,))}, {})
        dataset.save()
        with pytest.raises(DataError, match=rf"record 0 .*holed\.jpg.*{reason}"):
            verify.verify(str(tmp_path), silent)
        corrupt = records.CorruptRecordLog(dataset, dataset.splits["train"], max_fraction=1)
        content = (tmp_path / "t").read_bytes()
        assert (records.index_shard(dataset, shard, content, "t", corrupt)["offset"] < 0).all()


WHOLE = {
    "bytes after the end": jpeg() + b"more" * 100,
    "a second picture": jpeg() + jpeg(quality=30),
    "zeros before the end": jpeg()[:-2] + bytes(1000) + b"\xff\xd9",
    "fill bytes before the end": jpeg()[:-2] + b"\xff" * 9 + b"\xff\xd9",
    "an unknown version of JFIF": jpeg().replace(b"JFIF\0\1", b"JFIF\0\7"),
    "scan parameters of another mode": jpeg().replace(b"\x11\x03\x11\x00\x3f\x00", b"\x11\x03\x11\x00\x00\x00", 1),
    "progressive": jpeg(progressive=True),
    "restart markers": jpeg(restart_marker_blocks=4),
    "white, with long runs of zeros": encode(np.full((300, 400, 3), 255, np.uint8), "JPEG", optimize=True),
    "grey": encode(NOISE[..., 0], "JPEG"),
    "ink": encode(Image.fromarray(NOISE).convert("CMYK"), "JPEG"),
    "one pixel": encode(NOISE[:1, :1], "JPEG"),
    "a line": encode(NOISE[:1], "JPEG"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_whole_jpegs_keep_their_bytes(case: str) -> None:
    """What means nothing for the pixels is no damage."""
    image = validate(WHOLE[case])
    assert image.record.encoded == WHOLE[case]
    assert not image.converted


def test_a_sampling_that_turbojpeg_does_not_know_is_left_to_tensorflow() -> None:
    """Colour at twice the resolution of brightness: rare, and allowed."""
    whole = encode(np.full((16, 16, 3), 90, np.uint8), "JPEG", subsampling=0)
    frame = whole.index(b"\xff\xc0")
    odd = bytearray(whole)
    odd[frame + 11], odd[frame + 14], odd[frame + 17] = 0x11, 0x22, 0x11
    decoded = strict_decode.decode_strictly(bytes(odd), "JPEG", 16, 16)
    assert decoded.shape == (2, 2, 3)


def test_jpegs_are_decoded_small_but_not_tiny() -> None:
    for size, expected in ((512, 64), (100, 38), (20, 20)):
        encoded = encode(np.zeros((size, size, 3), np.uint8), "JPEG")
        assert strict_decode.decode_strictly(encoded, "JPEG", size, size).shape == (expected, expected, 3)


def test_lossless_and_deep_jpegs_are_named() -> None:
    for marker, bits, message in ((0xC3, 8, "lossless"), (0xC0, 12, "12 bits per channel")):
        frame = jpeg().index(b"\xff\xc0")
        encoded = bytearray(jpeg())
        encoded[frame + 1], encoded[frame + 4] = marker, bits
        with pytest.raises(image_header.InvalidImage, match=message):
            image_header.parse_header(bytes(encoded))
        refusal(bytes(encoded))


def flipped(encoded: bytes, position: int) -> bytes:
    return encoded[:position] + bytes([encoded[position] ^ 1]) + encoded[position + 1 :]


RGBA = np.dstack([NOISE[:20, :30], NOISE[:20, :30, 0]])
COLOUR = NOISE[:20, :30]
STORED = {"compress_level": 0}  # a flipped bit is a wrong pixel, and nothing else notices it
CUT = {
    "png": encode(COLOUR, "PNG")[:-20],
    "png without an end": encode(COLOUR, "PNG")[:-12],
    "png, one bit": flipped(encode(COLOUR, "PNG", **STORED), 200),
    "png that is converted, one bit": flipped(encode(RGBA, "PNG", **STORED), 200),
    "png of 16 bits, one bit": flipped(encode((GREY * 65535).astype(np.uint16), "PNG", **STORED), 200),
    "png that is converted, its checksum": flipped(encode(RGBA, "PNG"), len(encode(RGBA, "PNG")) - 14),
    "gif": encode(COLOUR, "GIF")[:-300],
    "bmp": encode(COLOUR, "BMP")[:-9],
    "webp": encode(COLOUR, "WEBP")[:-90],
    "tiff": encode(COLOUR, "TIFF")[:-90],
    "ppm": encode(COLOUR, "PPM")[:-9],
    "avif": encode(COLOUR, "AVIF")[:-90],
    "jpeg 2000": encode(COLOUR, "JPEG2000")[:-400],
    "jpeg xl": encode(COLOUR, "JXL")[:-90],
}


@pytest.mark.parametrize("case", CUT)
def test_damaged_files_of_every_format_are_refused(case: str) -> None:
    assert refusal(CUT[case]).startswith("the image cannot be read (")


def test_damaged_text_in_a_png_is_no_damage_of_its_pixels() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Title", "daisies")
    encoded = encode(COLOUR, "PNG", pnginfo=text)
    damaged = flipped(encoded, encoded.index(b"daisies"))
    strict_decode.check_png(damaged)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html>Sign in</html>", "an HTML page"),
        (b"\xef\xbb\xbf\r\n<HTML>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n", "git lfs pull"),
        (b'{"error": 404}', "JSON"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "export it as PNG"),
        (bytes(1000), "1,000 zeros"),
        (tf.io.serialize_tensor(COLOUR).numpy(), "tf.io.encode_png"),
        (NOISE[:40, :40].tobytes(), "40 x 40 raw pixels"),
        (b"\0\0\0\x18ftypmp42" + bytes(100), "a film"),
        (b"\xff\xd8\xff\xe0", "a JPEG that is cut off in its header"),
        (b"no picture at all", "begin as no known format: b'no pictu'"),
    ],
)
def test_what_a_file_is_instead_is_said(content: bytes, what: str) -> None:
    assert what in refusal(content)


# -- values of more than 8 bits


def deep(scale: float, kind: type, suffix: str = "TIFF") -> bytes:
    return encode((GREY * scale).astype(kind), suffix)


@pytest.mark.parametrize(
    ("encoded", "mean"),
    [
        (deep(1, np.float32), 127.5),  # was 0: black
        (deep(255, np.float32), 127.5),
        (deep(0, np.float32), 0),
        (deep(65535, np.uint16), 127.5),
        (deep(65535, np.uint16, "PNG"), 127.5),
        (deep(255, np.uint16, "PNG"), 0.5),  # was 127: a dark picture became bright
        (deep(65535, np.dtype(">u2")), 127.5),
        (deep(255, np.int32), 127),
        (deep(1.999, np.int32), 0.5),  # integers of 0 and 1 are nearly black
    ],
)
def test_values_become_8_bits_by_their_kind(encoded: bytes, mean: float) -> None:
    image = validate(encoded)
    assert abs(pixels(image).mean() - mean) < 0.6
    assert image.dark == (mean == 0.5 and encoded.startswith(b"\x89PNG"))


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (encode(GREY - 0.5, "TIFF"), "from -0.5 to 0.5"),
        (deep(1000, np.float32), "from 0 to 1000"),
        (deep(1.02, np.float32), "from 0 to 1.02, and it is not known whether 1 or 255 is white"),  # as after enlarging
        (encode(np.where(GREY > 0.5, np.nan, GREY).astype(np.float32), "TIFF"), "NaN"),
        (deep(100_000, np.int32), "32-bit integers from 0 to 100000"),
        (encode((GREY * 200 - 9).astype(np.int32), "TIFF"), "from -9 to 191"),
    ],
)
def test_values_without_a_known_range_are_refused(encoded: bytes, reason: str) -> None:
    assert reason in refusal(encoded)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "CMYK", "YCbCr", "LAB", "RGBA", "RGBX"])
def test_every_mode_of_a_tiff_keeps_its_colours(mode: str) -> None:
    red = Image.new("RGB", (20, 10), (200, 30, 60))
    if mode == "LAB":
        drawn = Image.new("LAB", (20, 10), (114, 191, 155))  # sRGB 200, 30, 60
    elif mode in ("LA", "PA"):
        drawn = red.convert("RGBA").convert(mode)
    else:
        drawn = red.quantize(2) if mode == "P" else red.convert(mode, dither=Image.Dither.NONE)
    expected = {"1": (0, 0, 0), "L": (84, 84, 84), "LA": (84, 84, 84)}.get(mode, (200, 30, 60))
    found = pixels(validate(encode(drawn, "TIFF"))).reshape(-1, 3)
    assert np.abs(found.astype(int) - expected).max() <= (8 if mode == "LAB" else 2)


def test_transparency_of_greys_is_laid_on_white() -> None:
    grey = Image.new("LA", (4, 4), (100, 128))
    assert abs(pixels(validate(encode(grey, "TIFF"))).mean() - (100 * 128 + 255 * 127) / 255) < 2


# -- formats that TensorFlow does not know


def register_heif() -> None:
    pillow_heif.register_heif_opener()


CONVERTED = {
    "WebP": lambda: encode(SMOOTH, "WEBP", lossless=True),
    "AVIF": lambda: encode(SMOOTH, "AVIF", quality=100),
    "HEIC": lambda: encode(SMOOTH, "HEIF", quality=100),
    "JPEG XL": lambda: encode(SMOOTH, "JXL", lossless=True),
    "JPEG 2000": lambda: encode(SMOOTH, "JPEG2000"),
    "TIFF": lambda: encode(SMOOTH, "TIFF"),
    "PPM": lambda: encode(SMOOTH, "PPM"),
    "PNG with transparency": lambda: encode(np.dstack([SMOOTH, np.full((20, 30), 255, np.uint8)]), "PNG"),
    "16-bit PNG": lambda: png16(SMOOTH),
}


def png16(colour: np.ndarray) -> bytes:
    """A PNG of 16 bits per channel and three channels, which Pillow does not write."""
    return bytes(tf.io.encode_png(tf.constant(colour.astype(np.uint16) * 257)).numpy())


@pytest.mark.parametrize("kind", CONVERTED)
def test_other_formats_become_png(kind: str) -> None:
    register_heif()
    image = validate(CONVERTED[kind]())
    assert image.converted == kind
    assert image.record.encoded.startswith(b"\x89PNG")
    assert np.abs(pixels(image).astype(int) - SMOOTH).mean() < 3


def test_the_first_of_several_images_is_taken_and_reported() -> None:
    other = [Image.fromarray(255 - SMOOTH)]
    for kind, name in (("TIFF", "TIFF"), ("GIF", "GIF"), ("WEBP", "WebP"), ("PNG", "PNG")):
        image = validate(encode(SMOOTH, kind, save_all=True, append_images=other))
        assert image.first_of_several == name
        assert np.abs(pixels(image).astype(int) - SMOOTH).mean() < 20


def test_without_the_extra_a_line_says_what_to_install(tmp_path: pathlib.Path) -> None:
    """Pictures of a telephone, before and after `pip install 'funmatch[images]'`."""
    register_heif()
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / f"in/{number}.heic").write_bytes(encode(COLOUR + np.uint8(number), "HEIF"))
    (tmp_path / "in/x.jxl").write_bytes(encode(COLOUR, "JXL"))
    hide = (
        "import sys; sys.modules.update(pillow_heif=None, pillow_jxl=None); from trainer import prepare; prepare.main()"
    )
    flags = [f"--dataset=folder:{tmp_path}/in", f"--out={tmp_path}/out"]
    command = [sys.executable, "-c", f"{hide}", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    line = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "4 of 4 images cannot be used" in line
    assert "0.heic and 2 more: a HEIC image, which needs pillow-heif: pip install 'funmatch[images]'" in line
    assert "x.jxl: a JPEG XL image" in line
    process = here("prepare", *flags)  # resumes, and does not remember the refusal
    assert process.returncode == 0, process.stderr
    assert "4 images were converted to PNG" in process.stderr
    assert "3 HEIC, 1 JPEG XL" in process.stderr


# -- images that occur twice


def commented(encoded: bytes, comment: bytes) -> bytes:
    """The same picture with other bytes, as a tool writes it that changes EXIF or comments."""
    return encoded[:2] + b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment + encoded[2:]


def test_digests_are_those_of_pixels() -> None:
    whole = encode(NOISE, "JPEG", quality=90)
    digests = [
        validate(whole).digest,
        validate(commented(whole, b"by hand")).digest,
        validate(encode(NOISE, "JPEG", quality=80)).digest,
        validate(encode(np.roll(NOISE, 1, 1), "JPEG", quality=90)).digest,
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    png = [validate(encode(COLOUR, "PNG", compress_level=level)).digest for level in (0, 9)]
    others = [validate(encode(COLOUR, kind)).digest for kind in ("TIFF", "BMP", "PPM")]
    assert len({*png, *others}) == 1
    assert images.NO_DIGEST not in {*png, *digests}
    flat = [validate(encode(np.zeros(size, np.uint8), "PNG")).digest for size in ((4, 9), (9, 4), (6, 6))]
    assert len(set(flat)) == 3


def test_images_of_several_splits_or_labels_are_reported(tmp_path: pathlib.Path) -> None:
    names = [*(f"train/daisy/{n}.jpg" for n in range(6)), "train/rose/9.jpg", "test/daisy/7.jpg", "test/rose/8.jpg"]
    put(tmp_path / "in", *names)
    root = tmp_path / "in"

    def again(name: str, *others: str) -> None:
        for number, other in enumerate(others):
            (root / other).write_bytes(commented((root / name).read_bytes(), bytes([number])))

    again("train/daisy/1.jpg", "test/daisy/a.jpg", "test/rose/b.jpg")  # the second with another label
    again("train/daisy/2.jpg", "train/rose/c.jpg")
    again("train/daisy/3.jpg", "train/daisy/d.jpg")
    process = here("prepare", f"--dataset=folder:{root}", f"--out={tmp_path}/out")
    assert process.returncode == 0, process.stderr
    lines = process.stderr.splitlines()
    assert (
        "warning: 2 of 4 images of test are also in train, with the same pixels, 1 of them with another label (first: "
        "test/daisy/a.jpg = train/daisy/1.jpg): remove them from one of the two"
    ) in lines
    assert (
        "warning: 2 images of train have the same pixels as others and another label (first: train/daisy/2.jpg (daisy) and "
        "train/rose/c.jpg (rose)): correct the labels, or remove the images"
    ) in lines
    assert "2 of 9 images of train have the same pixels as others" in lines
    source = Dataset.load(str(tmp_path / "out")).source
    assert source["duplicates"] == {"test": {"train": 2, "test": 1}, "train": {"train": 2}}
    assert source["labels"] == {"train": [7, 2], "test": [2, 2]}


def test_classes_without_images_in_a_split_are_reported(tmp_path: pathlib.Path) -> None:
    put(tmp_path / "in", "train/a/1.jpg", "train/b/2.jpg", "test/a/3.jpg")
    process = here("prepare", f"--dataset=folder:{tmp_path}/in", f"--out={tmp_path}/out")
    assert "warning: 1 class has no image in test: b" in process.stderr
    assert Dataset.load(str(tmp_path / "out")).source["labels"] == {"test": [1, 0], "train": [1, 1]}
