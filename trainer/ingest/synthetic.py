"""Draws flowers: a stand-in for Flowers102 that any machine can make, offline.

Each species has its own number and shape of petals, colours and centre. Petal colours come from a
few families that species share, so colour alone does not identify a species. Each image has its
own pose, light, background and clutter. Everything is a function of (seed, split, index): any
image can be drawn alone, in any order, by any process. NumPy draws; Pillow only encodes JPEG.
"""

from __future__ import annotations

import colorsys
import dataclasses
import functools
import io
import zlib

import numpy as np
from PIL import Image

PATTERNS = ("plain", "vein", "rim", "eye", "spots", "stripes")
TEXTURES = ("smooth", "seeds", "ring", "stamens")

# Hue, saturation, value of petals.
_FAMILIES = (
    (0.12, 0.08, 0.97),  # white
    (0.145, 0.85, 0.97),  # yellow
    (0.04, 0.85, 0.92),  # orange to red
    (0.92, 0.60, 0.92),  # pink
    (0.78, 0.60, 0.80),  # violet
    (0.64, 0.65, 0.85),  # blue
)
_CENTRES = ((0.14, 0.85, 0.95), (0.08, 0.70, 0.35), (0.25, 0.60, 0.60), (0.12, 0.15, 0.95))
_PETALS = (3, 4, 5, 5, 6, 7, 8, 10, 13, 18)


@dataclasses.dataclass(frozen=True)
class Species:
    """The parameters of a species, the same in all its images.

    Lengths are in flower radii; hues, saturations and values are those of HSV, in 0..1.

    Attributes:
        petals: number in a whorl, 3 to 18.
        width: half-width of a petal, 0.05 to 0.46.
        rise: how slowly a petal widens from its base; 0.35 (paddle) to 1.5 (club).
        blunt: shape of the tip, 1 (pointed) to 6 (square).
        notch: depth of the dent in the tip, 0 to 0.3.
        whorl: length of a second whorl, set between the petals; 0: none; up to 0.8: in front of
            the first one; above: behind it.
        base: hue, saturation, value at the petal's base.
        tip: the same at its tip.
        pattern: one of PATTERNS.
        mark: hue, saturation, value of the pattern.
        centre: radius of the centre, 0.1 to 0.36.
        core: hue, saturation, value of the centre.
        texture: of the centre, one of TEXTURES.
    """

    petals: int
    width: float
    rise: float
    blunt: float
    notch: float
    whorl: float
    base: tuple[float, float, float]
    tip: tuple[float, float, float]
    pattern: str
    mark: tuple[float, float, float]
    centre: float
    core: tuple[float, float, float]
    texture: str


def species(index: int, seed: int) -> Species:
    """Returns species number `index` (>= 0) for `seed` (>= 0).

    Species cycle through the colour families, and within a family through the numbers of petals:
    consecutive species use all colours evenly, and colour alone does not identify one.
    """
    shuffle = _generator(seed, 0)
    families, petals = shuffle.permutation(len(_FAMILIES)), shuffle.permutation(len(_PETALS))
    turn, family = divmod(index, len(_FAMILIES))
    number = _PETALS[int(petals[(turn + 3 * family) % len(_PETALS)])]
    rng = _generator(seed, 1, index)
    hue, saturation, value = _FAMILIES[int(families[family])]
    hue = (hue + rng.uniform(-0.02, 0.02)) % 1.0
    base = (hue, saturation * rng.uniform(0.75, 1.1), value * rng.uniform(0.85, 1.03))
    tip = (
        (hue + float(rng.choice([0.0, 0.0, -0.05, 0.05]))) % 1.0,
        base[1] * float(rng.choice([1.0, 1.0, 0.55])),
        base[2],
    )
    dark = (hue, min(1.0, base[1] + 0.3), 0.4 * base[2])
    pale = (hue, 0.15 * base[1], 1.0)
    gold = (0.14, 0.85, 0.95)
    marks = (dark, gold) if base[1] < 0.2 else (dark, pale)
    return Species(
        petals=number,
        # A fraction of the space between the neighbouring petals.
        width=float(min(0.46, rng.uniform(0.6, 1.3) * 0.62 * np.tan(np.pi / number))),
        rise=float(rng.uniform(0.35, 1.5)),
        blunt=float(rng.choice([1.0, 1.6, 2.5, 4.0, 6.0])),
        notch=float(rng.choice([0.0, 0.0, 0.0, 0.18, 0.3])),
        whorl=float(rng.choice([0.0, 0.0, 0.6, 0.92])),
        base=_clip(base),
        tip=_clip(tip),
        pattern=str(rng.choice(PATTERNS)),
        mark=_clip(marks[int(rng.integers(2))]),
        centre=float(rng.uniform(0.1, 0.36)),
        core=_CENTRES[int(rng.integers(len(_CENTRES)))],
        texture=str(rng.choice(TEXTURES)),
    )


def species_name(index: int) -> str:
    """Returns the class name of species `index`, such as "species_007"."""
    return f"species_{index:03d}"


def draw(species: Species, rng: np.random.Generator, size: int) -> np.ndarray:
    """Draws one image of a species.

    Args:
        species: what to draw.
        rng: determines everything else; advanced by an amount that depends on the image.
        size: pixels of the longer side, >= 16.

    Returns:
        uint8 [height, width, 3] RGB in 0..255, max(height, width) == size, width / height within
        2/3 to 3/2 up to rounding.
    """
    aspect = float(np.exp(rng.uniform(-np.log(1.5), np.log(1.5))))
    height, width = (size, round(size * aspect)) if aspect < 1 else (round(size / aspect), size)
    side = min(height, width)
    canvas = _background(rng, height, width)
    _clutter(rng, canvas, side)
    radius = side * float(rng.uniform(0.24, 0.52))
    y, x = height * float(rng.uniform(0.33, 0.67)), width * float(rng.uniform(0.33, 0.67))
    light = float(rng.uniform(0, 2 * np.pi))
    if rng.random() < 0.25:
        beside = (y + height * float(rng.choice([-0.6, 0.6])), width * float(rng.uniform(0, 1)))
        smaller = radius * float(rng.uniform(0.5, 0.9))
        _flower(rng, canvas, species, *beside, smaller, light)
    if rng.random() < 0.6:
        _blade(rng, canvas, x, y, side * float(rng.uniform(0.012, 0.03)), below=True)
    _flower(rng, canvas, species, y, x, radius, light)
    for _ in range(int(rng.integers(0, 4))):
        at = width * float(rng.uniform(0, 1))
        _blade(rng, canvas, at, height / 2, side * float(rng.uniform(0.006, 0.025)), below=False)
    return _develop(rng, canvas, light)


def example(
    seed: int, split: str, index: int, classes: int, size: int, quality: int = 90
) -> tuple[bytes, int, tuple[int, int]]:
    """Draws and encodes image `index` of a split, a function of the arguments alone.

    Args:
        seed: of species and images, >= 0.
        split: any name; splits share the species and have different images.
        index: >= 0.
        classes: number of species, >= 1; the label is `index % classes`.
        size: pixels of the longer side, >= 16.
        quality: of the JPEG, 1 to 95.

    Returns:
        JPEG bytes, label, (height, width) in pixels.
    """
    label = index % classes
    rng = _generator(seed, 2, zlib.crc32(split.encode()), index)
    image = draw(species(label, seed), rng, size)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue(), label, (image.shape[0], image.shape[1])


def examples(
    seed: int, split: str, start: int, stop: int, classes: int, size: int
) -> list[tuple[bytes, int, tuple[int, int]]]:
    """Draws several images; worker processes call this function.

    Args:
        seed: see `example`, as for `split`, `classes` and `size`.
        split: name of the split.
        start: index of the first image.
        stop: index after the last image.
        classes: number of species.
        size: pixels of the longer side.

    Returns:
        The results of `example` for each index.
    """
    return [example(seed, split, index, classes, size) for index in range(start, stop)]


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def _clip(hsv: tuple[float, float, float]) -> tuple[float, float, float]:
    hue, saturation, value = (float(part) for part in hsv)
    return hue % 1.0, min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0)


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """Converts a colour to RGB: float32 [3, 1, 1]."""
    rgb = colorsys.hsv_to_rgb(*_clip((hue, saturation, value)))
    return np.asarray(rgb, np.float32)[:, None, None]


@functools.lru_cache(maxsize=4096)
def _taps(coarse: int, fine: int) -> tuple[np.ndarray, np.ndarray]:
    """Interpolation from `coarse` to `fine` points: index before, weight of the next: [fine]."""
    position = np.linspace(0.0, coarse - 1.0, fine)
    before = np.minimum(position.astype(np.intp), coarse - 2)
    fraction = position - before
    # Smoothstep: linear interpolation would show the coarse points as a lattice.
    weight = (fraction * fraction * (3.0 - 2.0 * fraction)).astype(np.float32)
    before.setflags(write=False)
    weight.setflags(write=False)
    return before, weight


def _noise(rng: np.random.Generator, cells: int, height: int, width: int) -> np.ndarray:
    """Smooth noise, about `cells` features per side: float32 [height, width], 0 +- 1."""
    grid = rng.standard_normal((cells, cells), np.float32)
    # No matrix product: its rounding may depend on the number of threads.
    (row, down), (column, right) = _taps(cells, height), _taps(cells, width)
    lines = grid[row] + down[:, None] * (grid[row + 1] - grid[row])
    left = lines[:, column]
    return left + right * (lines[:, column + 1] - left)


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A canvas, float32 [3, height, width] in 0..1.

    Colour planes come first, since NumPy is slow where the last axis is short.
    """
    kind = int(rng.integers(5))
    if kind == 0:  # foliage
        back = _rgb(rng.uniform(0.2, 0.4), rng.uniform(0.4, 0.9), rng.uniform(0.08, 0.35))
        front = _rgb(rng.uniform(0.18, 0.36), rng.uniform(0.4, 0.8), rng.uniform(0.35, 0.75))
    elif kind == 1:  # soil
        back = _rgb(rng.uniform(0.04, 0.11), rng.uniform(0.3, 0.6), rng.uniform(0.1, 0.35))
        front = _rgb(rng.uniform(0.05, 0.13), rng.uniform(0.2, 0.5), rng.uniform(0.4, 0.75))
    elif kind == 2:  # sky, wall or night
        hue, tone = rng.choice([0.58, 0.1, 0.7]), rng.uniform(0.05, 0.95)
        back = _rgb(hue, rng.uniform(0.0, 0.45), tone)
        front = _rgb(hue, rng.uniform(0.0, 0.45), tone + rng.uniform(-0.25, 0.25))
    elif kind == 3:  # lights in the dark, out of focus
        back = _rgb(rng.uniform(0.2, 0.6), rng.uniform(0.2, 0.7), rng.uniform(0.05, 0.4))
        front = _rgb(rng.uniform(0.1, 0.4), rng.uniform(0.1, 0.6), rng.uniform(0.3, 0.6))
    else:  # a bed of other flowers, out of focus
        back = _rgb(rng.uniform(0.2, 0.4), rng.uniform(0.3, 0.8), rng.uniform(0.2, 0.5))
        hue, saturation, value = _FAMILIES[int(rng.integers(len(_FAMILIES)))]
        front = _rgb(hue, saturation * 0.8, value * rng.uniform(0.6, 0.95))
    angle = rng.uniform(0, 2 * np.pi)
    rows = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None] * np.float32(np.sin(angle))
    columns = np.linspace(-0.5, 0.5, width, dtype=np.float32) * np.float32(np.cos(angle))
    mix = (0.45 + 0.7 * (rows + columns)).astype(np.float32)
    strength = (0.3, 0.2, 0.08, 0.15, 0.4)[kind]
    for cells, share in ((4, 1.0), (9, 0.8), (19, 0.5)):
        mix += np.float32(strength * share) * _noise(rng, cells, height, width)
    if kind == 1:
        mix += np.float32(0.1) * rng.standard_normal((height, width), np.float32)
    canvas = back + np.clip(mix, 0, 1) * (front - back)
    if kind == 3:
        for _ in range(int(rng.integers(4, 10))):
            _disc(rng, canvas)
    return canvas


def _paint(area: np.ndarray, mask: np.ndarray, colour: np.ndarray) -> None:
    """Blends `colour` into an area [3, h, w] in place, with opacity `mask` [h, w] in 0..1."""
    area += mask * (colour - area)


def _window(canvas: np.ndarray, y: float, x: float, reach: float) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Cuts out what is within `reach` of a point: area [3, h, w], dy [h, 1], dx [1, w]."""
    _, height, width = canvas.shape
    top, bottom = max(0, int(y - reach)), min(height, int(y + reach) + 2)
    left, right = max(0, int(x - reach)), min(width, int(x + reach) + 2)
    if top >= bottom or left >= right:
        return None
    dy = np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(y)
    dx = np.arange(left, right, dtype=np.float32)[None, :] - np.float32(x)
    return canvas[:, top:bottom, left:right], dy, dx


def _disc(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """Paints a light out of focus."""
    _, height, width = canvas.shape
    radius = min(height, width) * float(rng.uniform(0.05, 0.16))
    window = _window(canvas, height * rng.uniform(0, 1), width * rng.uniform(0, 1), radius)
    colour = _rgb(rng.uniform(0.08, 0.45), rng.uniform(0.1, 0.6), rng.uniform(0.5, 1.0))
    opacity = np.float32(rng.uniform(0.25, 0.7))
    if window is None:
        return
    area, dy, dx = window
    mask = np.clip((radius - np.sqrt(dy * dy + dx * dx)) * np.float32(3.0 / radius), 0, 1)
    _paint(area, mask * opacity, colour)


def _clutter(rng: np.random.Generator, canvas: np.ndarray, side: int) -> None:
    """Paints leaves, sharp and blurred, and distant blossoms that are mere blots."""
    _, height, width = canvas.shape
    for _ in range(int(rng.integers(1, 5))):
        length = side * float(rng.uniform(0.15, 0.5))
        slim, angle = float(rng.uniform(0.2, 0.5)), float(rng.uniform(0, 2 * np.pi))
        soft = float(np.float32(max(1.0, length * slim * rng.choice([0.05, 0.3, 0.9]))))
        colour = _rgb(rng.uniform(0.18, 0.4), rng.uniform(0.3, 0.9), rng.uniform(0.15, 0.65))
        if rng.random() < 0.3:
            hue, saturation, value = _FAMILIES[int(rng.integers(len(_FAMILIES)))]
            colour, slim = _rgb(hue, saturation * 0.85, value * rng.uniform(0.6, 1.0)), 0.85
        y, x = height * rng.uniform(0, 1), width * rng.uniform(0, 1)
        window = _window(canvas, y, x, length + soft)
        if window is None:
            continue
        area, dy, dx = window
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        along, across = (dx * cos + dy * sin) / np.float32(length), dy * cos - dx * sin
        reach = np.float32(length * slim) * (1.0 - along * along)
        mask = np.clip((reach - np.abs(across)) / soft + np.float32(0.5), 0, 1)
        fold = 0.85 + 0.15 * np.clip(across, -1, 1)
        _paint(area, mask, colour * fold)


def _blade(rng: np.random.Generator, canvas: np.ndarray, x: float, y: float, half: float, below: bool) -> None:
    """Paints a stem (only `below` the point) or a blade of grass, of half width `half` pixels."""
    _, height, width = canvas.shape
    lean, bend = rng.normal(0, 0.35), rng.normal(0, 0.4)
    colour = _rgb(rng.uniform(0.2, 0.38), rng.uniform(0.35, 0.9), rng.uniform(0.2, 0.7))
    dy = np.arange(height, dtype=np.float32)[:, None] - np.float32(y)
    if below:
        dy = dy[max(0, min(height, int(y))) :]
    if not len(dy):
        return
    line = np.float32(x) + np.float32(lean) * dy + np.float32(bend / height) * dy * dy
    left = max(0, int(line.min() - half - 1))
    right = min(width, int(line.max() + half + 3))
    if left >= right:
        return
    off = np.arange(left, right, dtype=np.float32) - line
    mask = np.clip(np.float32(half + 0.5) - np.abs(off), 0, 1)
    shade = 1.0 + np.float32(0.2 / half) * np.clip(off, -half, half)
    _paint(canvas[:, height - len(dy) :, left:right], mask, colour * shade)


def _flower(
    rng: np.random.Generator,
    canvas: np.ndarray,
    kind: Species,
    y: float,
    x: float,
    radius: float,
    light: float,
) -> None:
    """Paints a flower whose centre is at (y, x), in pixels, lit from the angle `light`."""
    window = _window(canvas, y, x, 1.3 * radius)
    if window is None:
        return
    area, dy, dx = window
    tilt, lean = float(rng.uniform(0.5, 1.0)), float(rng.uniform(0, 2 * np.pi))
    toward, aside = np.float32(np.cos(light) / radius), np.float32(np.sin(light) / radius)
    lit = 1.0 + np.float32(rng.uniform(0.05, 0.3)) * (dx * toward + dy * aside)

    shadow = np.sqrt((dx * toward + dy * aside + 0.15) ** 2 + (dy * toward - dx * aside) ** 2)
    mask = np.float32(rng.uniform(0, 0.6)) * np.clip(2.2 - 2.0 * shadow, 0, 1)
    area *= 1.0 - mask

    # From pixels to flower radii in the plane of the petals; the nearer rim looks larger.
    cos, sin = np.float32(np.cos(lean) / radius), np.float32(np.sin(lean) / radius)
    u, v = dx * cos + dy * sin, (dy * cos - dx * sin) / np.float32(tilt)
    near = 1.0 + np.float32(rng.uniform(0, 0.5) * (1.0 - tilt)) * np.clip(v, -1.3, 1.3)
    u, v = u / near, v / near
    r = np.sqrt(u * u + v * v)
    angle = np.arctan2(v, u) * np.float32(0.5 / np.pi) + np.float32(rng.uniform(1, 2))
    pixels = np.float32(radius * (0.4 + 0.6 * tilt))

    hue, saturation = rng.normal(0, 0.022), rng.uniform(0.62, 1.1)
    value = rng.uniform(0.8, 1.05)
    colours = [_rgb(h + hue, s * saturation, b * value) for h, s, b in (kind.base, kind.tip, kind.mark)]
    whorls = [(1.0, 0.0, 1.0)]
    if kind.whorl > 0.8:
        whorls.insert(0, (kind.whorl, 0.5, 0.7))
    elif kind.whorl > 0:
        whorls.append((kind.whorl, 0.5, 0.9))
    for length, offset, shade in whorls:
        _whorl(rng, area, kind, r, angle, pixels, length, offset, lit * np.float32(shade), colours)

    core = _rgb(kind.core[0] + rng.normal(0, 0.015), kind.core[1], kind.core[2] * value)
    q = r * np.float32(1.0 / kind.centre)
    shade = lit * (1.05 - 0.3 * q * q)
    if kind.texture == "seeds":
        shade = shade * (0.85 + 0.3 * np.sin(angle * np.float32(26 * np.pi)) * np.sin(q * 9.0))
    elif kind.texture == "ring":
        shade = shade * np.clip(1.0 - 4.0 * (q - 0.62), 0.4, 1.0)
    elif kind.texture == "stamens":
        # A ragged rim rather than a disc.
        q = q * (1.0 - 0.3 * np.sin(angle * np.float32(22 * np.pi)))
    mask = np.clip((1.0 - q) * (kind.centre * pixels) + 0.5, 0, 1)
    _paint(area, mask, core * shade)


def _whorl(
    rng: np.random.Generator,
    area: np.ndarray,
    kind: Species,
    r: np.ndarray,
    angle: np.ndarray,
    pixels: np.float32,
    length: float,
    offset: float,
    lit: np.ndarray,
    colours: list[np.ndarray],
) -> None:
    """Paints one ring of petals, each deformed in its own way.

    Args:
        rng: determines the deformations.
        area: float32 [3, h, w], painted in place.
        kind: of flower.
        r: radius of each pixel in the flower's plane, float32 [h, w].
        angle: likewise, in turns, > 0.
        pixels: length of a flower radius.
        length: of the petals, in flower radii.
        offset: in petals.
        lit: brightness, float32 [h, w].
        colours: of base, tip and mark, each float32 [3, 1, 1].
    """
    count = kind.petals
    sector = angle * np.float32(count) + np.float32(offset)
    whole = np.floor(sector)
    number = whole.astype(np.intp) % count
    lengths = (length * rng.uniform(0.84, 1.06, count)).astype(np.float32)[number]
    widths = (kind.width * length * rng.uniform(0.85, 1.12, count)).astype(np.float32)[number]
    tones = rng.normal(1.0, 0.06, count).astype(np.float32)[number]
    sways = rng.normal(0, 0.16 / np.sqrt(count), count).astype(np.float32)[number]
    curls = rng.normal(0, 0.3 / np.sqrt(count), count).astype(np.float32)[number]
    phi = (sector - whole - np.float32(0.5)) * np.float32(2 * np.pi / count) + sways + curls * r
    across = r * np.sin(phi) / widths
    t = r * np.cos(phi) / lengths
    if kind.notch:
        t = t / (1.0 - np.float32(kind.notch) * np.exp(-6.0 * across * across))
    inside = np.clip(t, 1e-3, 1.0)
    outline = inside ** np.float32(kind.rise) * np.sqrt(1.0 - inside ** np.float32(kind.blunt))
    outline *= np.float32(_fullness(kind.rise, kind.blunt))
    side = np.abs(across)
    mask = np.clip((outline - side) * widths * pixels + 0.5, 0, 1)
    # Beyond the tip the outline would be a line of nonzero opacity.
    mask *= np.clip((1.0 - t) * lengths * pixels + 0.5, 0, 1)

    base, tip, mark = colours
    colour = base + inside * (tip - base)
    if kind.pattern == "vein":
        _paint(colour, 0.85 * np.exp(-14.0 * across * across), mark)
    elif kind.pattern == "rim":
        _paint(colour, 0.85 * np.clip(4.0 * (side - outline + 0.42), 0, 1), mark)
    elif kind.pattern == "eye":
        _paint(colour, 0.9 * np.clip(6.0 * (0.52 - inside), 0, 1), mark)
    elif kind.pattern == "spots":
        dots = np.sin(inside * np.float32(17.0)) * np.cos(across * np.float32(7.0))
        _paint(colour, 0.8 * np.clip(4.0 * (dots - 0.15), 0, 1), mark)
    elif kind.pattern == "stripes":
        _paint(colour, 0.8 * np.clip(4.0 * np.sin(inside * np.float32(16.0)), 0, 1), mark)
    colour *= lit * tones * (1.0 - 0.22 * np.minimum(side, 1.0) ** 2) * (0.78 + 0.22 * inside)
    _paint(area, mask, colour)


@functools.lru_cache(maxsize=4096)
def _fullness(rise: float, blunt: float) -> float:
    """Returns the factor that scales the outline's largest width to 1."""
    t = np.linspace(0, 1, 257)
    return float(1.0 / np.max(t**rise * np.sqrt(1.0 - t**blunt)))


def _develop(rng: np.random.Generator, canvas: np.ndarray, light: float) -> np.ndarray:
    """Applies light and camera: float32 [3, height, width] -> uint8 [height, width, 3]."""
    _, height, width = canvas.shape
    rows = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None] * np.float32(np.sin(light))
    columns = np.linspace(-0.5, 0.5, width, dtype=np.float32) * np.float32(np.cos(light))
    np.clip(canvas, 0, 1, out=canvas)
    canvas **= np.float32(rng.uniform(0.75, 1.35))
    cast = rng.uniform(0.8, 1.15, (3, 1, 1)) * rng.uniform(0.6, 1.15)
    canvas *= cast.astype(np.float32)
    canvas *= 1.0 + np.float32(rng.uniform(0, 0.5)) * (rows + columns)
    haze = np.float32(rng.uniform(0, 0.25) * (rng.random() < 0.4))
    canvas += haze * (np.float32(0.7) - canvas)
    if rng.random() < 0.35:
        blur, step = np.float32(rng.uniform(0.1, 0.33)), 1
        # Wider steps in larger images, so that the blur looks the same at any size.
        while 64 * step <= max(64, height, width):
            inner = canvas[:, step:-step]
            inner += blur * (canvas[:, : -2 * step] + canvas[:, 2 * step :] - 2.0 * inner)
            inner = canvas[:, :, step:-step]
            inner += blur * (canvas[:, :, : -2 * step] + canvas[:, :, 2 * step :] - 2.0 * inner)
            step *= 2
    grain = np.float32(rng.uniform(0.005, 0.035))
    canvas += grain * rng.standard_normal(canvas.shape, np.float32)
    canvas = np.clip(canvas, 0, 1) * np.float32(255) + np.float32(0.5)
    return np.ascontiguousarray(canvas.astype(np.uint8).transpose(1, 2, 0))
