"""An independent implementation of the method in NumPy and float64, which tests compare with.

Nothing here imports TensorFlow or `trainer`. A crop's arithmetic is in float32, since rounding
could move a crop by a whole pixel.
"""

from __future__ import annotations

import numpy as np
from scipy import special

# Random numbers.


def threefry(key: tuple[int, int], counter: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Threefry-2x32, 20 rounds (Salmon et al. 2011): the first of the two words, uint64 holding 32
    bits.
    """
    mask = np.uint64(0xFFFFFFFF)
    k = [np.uint64(key[0]), np.uint64(key[1])]
    k.append(np.uint64(0x1BD11BDA) ^ k[0] ^ k[1])
    x = (np.asarray(counter[0], np.uint64) + k[0]) & mask
    y = (np.asarray(counter[1], np.uint64) + k[1]) & mask
    rotations = [13, 15, 26, 6, 17, 29, 16, 24]
    for i in range(20):
        x = (x + y) & mask
        r = np.uint64(rotations[i % 8])
        y = ((y << r) | (y >> (np.uint64(32) - r))) & mask ^ x
        if i % 4 == 3:
            n = i // 4 + 1
            x = (x + k[n % 3]) & mask
            y = (y + k[(n + 1) % 3] + np.uint64(n)) & mask
    return x


def uniform(seed: int, step: int, row: int, first: int, draws: int) -> np.ndarray:
    """Numbers `first` .. `first + draws - 1` of a row's sequence: float32 [draws] in [0, 1)."""
    bits = threefry((seed, step), (np.full(draws, row), np.arange(first, first + draws)))
    return ((bits >> np.uint64(8)).astype(np.float64) * 2.0**-24).astype(np.float32)


# Crops: top, left, height, width as fractions of the image.

ATTEMPTS, DRAWS = 8, 19


def inception_box(draws: np.ndarray, height: float, width: float, min_area: float = 0.05) -> np.ndarray:
    """The first permitted shape of eight, at a uniform position."""
    f = np.float32
    height, width = f(height), f(width)
    smallest, largest = f(min_area) * height * width, height * width
    for aspect_draw, height_draw in zip(draws[:ATTEMPTS], draws[ATTEMPTS : 2 * ATTEMPTS], strict=True):
        aspect = f(0.75) + f(4 / 3 - 3 / 4) * aspect_draw
        lowest, highest = np.round(np.sqrt(smallest / aspect)), np.round(np.sqrt(largest / aspect))
        if np.round(highest * aspect) > width:
            highest = np.floor((width + f(0.5 - 1e-4)) / aspect)
        highest = min(highest, height)
        lowest = min(lowest, highest)
        h = lowest + np.floor(height_draw * (highest - lowest + 1))
        if h * np.round(h * aspect) < smallest:
            h += 1
        if h * np.round(h * aspect) > largest:
            h -= 1
        w = np.round(h * aspect)
        if smallest <= h * w <= largest and 0 < h <= height and 0 < w <= width:
            break
    else:
        h, w = height, width
    top, left = np.floor(draws[-2] * (height - h)), np.floor(draws[-1] * (width - w))
    return np.array([top / height, left / width, h / height, w / width], np.float64)


def central_box(height: float, width: float, fraction: float) -> np.ndarray:
    """The centred square."""
    side = fraction * min(height, width)
    return np.array([(1 - side / height) / 2, (1 - side / width) / 2, side / height, side / width])


def mild_box(draws: np.ndarray, height: float, width: float, fraction: float) -> np.ndarray:
    """A square of the same size as `central_box`'s, at a uniform position."""
    side = fraction * min(height, width)
    return np.array([draws[0] * (1 - side / height), draws[1] * (1 - side / width), side / height, side / width])


# Pixels.


def bilinear(image: np.ndarray, box: np.ndarray, size: int, mirror: bool) -> np.ndarray:
    """Half-pixel centres, no antialiasing, borders of the crop repeated: [size, size, 3] in [-1,
    1].
    """
    side = len(image)

    def sample_positions(start: float, extent: float) -> np.ndarray:
        start, extent = start * side, extent * side
        positions = start + (np.arange(size) + 0.5) * extent / size - 0.5
        positions = np.clip(positions, start, start + max(extent - 1, 0))
        return np.clip(positions, 0, side - 1)

    def interpolate(pixels: np.ndarray, positions: np.ndarray) -> np.ndarray:
        low = np.minimum(np.floor(positions).astype(int), len(pixels) - 1)
        high = np.minimum(low + 1, len(pixels) - 1)
        weight = (positions - low)[:, None, None]
        return (1 - weight) * pixels[low] + weight * pixels[high]

    tall = interpolate(image.astype(np.float64), sample_positions(box[0], box[2]))
    wide = interpolate(tall.transpose(1, 0, 2), sample_positions(box[1], box[3])).transpose(1, 0, 2)
    return (wide[:, ::-1] if mirror else wide) / 127.5 - 1


def area(image: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    """The mean over what each pixel covers (at least one pixel of the image): [size, size, 3] in
    [-1, 1].
    """
    side = len(image)

    def coverage(start: float, extent: float) -> np.ndarray:
        start, step = start * side, extent * side / size
        weights = np.zeros((size, side))
        for i in range(size):
            centre, half = start + (i + 0.5) * step, max(step, 1) / 2
            low, high = np.clip(centre - half, 0, side - 1), np.clip(centre + half, 1, side)
            for j in range(side):
                weights[i, j] = max(0, min(high, j + 1) - max(low, j))
        return weights / weights.sum(1, keepdims=True)

    tall = np.einsum("is,swc->iwc", coverage(box[0], box[2]), image.astype(np.float64))
    return np.einsum("js,isc->ijc", coverage(box[1], box[3]), tall) / 127.5 - 1


# The views of a step.


def crop(
    kind: str, image: np.ndarray, size: tuple[float, float], draws: np.ndarray, out: int, **options: float
) -> np.ndarray:
    """One view of one image from its DRAWS numbers: [out, out, 3] in [-1, 1]."""
    fraction, min_area = options.get("fraction", 0.8), options.get("min_area", 0.05)
    if kind == "whole":
        return area(image, np.array([0.0, 0, 1, 1]), out)
    box = mild_box(draws[16:18], *size, fraction) if kind == "mild" else inception_box(draws[:18], *size, min_area)
    return bilinear(image, box, out, bool(draws[18] < 0.5))


# Mode: the student's crop, the teacher's.
MODES = {
    "fix/rs": ("whole", "fixed"),
    "fix/cc": ("mild", "fixed"),
    "fix/ic_ens": ("inception", "fixed"),
    "ind/rc": ("mild", "own"),
    "ind/ic": ("inception", "own"),
    "same/rc": ("mild", "same"),
    "same/ic": ("inception", "same"),
    "mix": ("inception", "same"),
}


def step_views(
    mode: str,
    images: np.ndarray,
    sizes: np.ndarray,
    seed: int,
    step: int,
    student_size: int,
    teacher_size: int,
    *,
    by_example: bool = False,
    reverse: bool = False,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """The views of a global batch.

    Args:
        mode: of `MODES`.
        images: uint8 [n, side, side, 3].
        sizes: float32 [n, 2], height and width of the originals in pixels.
        seed: of the run.
        step: updates made before.
        student_size: side of the student's views in pixels.
        teacher_size: side of the teacher's views in pixels.
        by_example: one mixup ratio for each example instead of one for the step.
        reverse: the mixup partner of row i is row n - 1 - i instead of i - 1.

    Returns:
        The student's views, the teacher's (None where its outputs are fixed), and the mixup ratios
        [n].
    """
    kind, teacher = MODES[mode]
    batch = len(images)

    def cropped(first: int, out: int) -> np.ndarray:
        return np.stack(
            [crop(kind, images[i], tuple(sizes[i]), uniform(seed, step, i, first, DRAWS), out) for i in range(batch)]
        )

    ratios = np.ones(batch)
    if mode == "mix" and by_example:
        ratios = np.array([uniform(seed, step, i, 2 * DRAWS, 1)[0] for i in range(batch)], np.float64)
    elif mode == "mix":
        ratios = np.full(batch, uniform(seed, step, 2**31 - 1, 0, 1)[0], np.float64)

    def mixed(views: np.ndarray) -> np.ndarray:
        if mode != "mix":
            return views
        partners = views[::-1] if reverse else np.roll(views, 1, axis=0)
        return ratios[:, None, None, None] * views + (1 - ratios[:, None, None, None]) * partners

    student = mixed(cropped(0, student_size))
    if teacher == "fixed":
        return student, None, ratios
    return student, mixed(cropped(0 if teacher == "same" else DRAWS, teacher_size)), ratios


# Distances, per example.


def kl(teacher: np.ndarray, student: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """T^2 KL(softmax(t / T) || softmax(s / T)) (paper, eq. 1)."""
    p = special.log_softmax(teacher.astype(np.float64) / temperature, axis=1)
    q = special.log_softmax(student.astype(np.float64) / temperature, axis=1)
    return temperature**2 * (np.exp(p) * (p - q)).sum(1)


def hard(teacher: np.ndarray, student: np.ndarray, smoothing: float = 0.0) -> np.ndarray:
    """KL to the teacher's most likely class."""
    classes = teacher.shape[1]
    target_probs = np.where(np.eye(classes)[teacher.argmax(1)] > 0, 1 - smoothing, smoothing / (classes - 1))
    student_log_probs = special.log_softmax(student.astype(np.float64), axis=1)
    return (special.xlogy(target_probs, target_probs) - target_probs * student_log_probs).sum(1)


def l2(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """Squared distance of the logits."""
    return ((student.astype(np.float64) - teacher.astype(np.float64)) ** 2).sum(1)


def clipped_kl(teacher: np.ndarray, student: np.ndarray, temperature: float) -> np.ndarray:
    """keras.losses.KLDivergence of two softmaxes, which clips both to [1e-7, 1]."""
    p, q = (np.clip(special.softmax(z.astype(np.float64) / temperature, axis=1), 1e-7, 1) for z in (teacher, student))
    return (p * np.log(p / q)).sum(1)


# Updates.


def schedule(t: int, warmup: int, total: int) -> float:
    """big_vision's: min(1, t / warmup) times half a cosine over the rest."""
    rise = min(1.0, t / warmup) if warmup else 1.0
    progress = min(1.0, max(0.0, (t - warmup) / (total - warmup)))
    return rise * 0.5 * (1 + np.cos(np.pi * progress))


def example_schedule(t: int, warmup: int, total: int) -> float:
    """The Keras example's WarmUpCosine, as a share of the peak."""
    if t > total:
        return 0.0
    return t / warmup if t < warmup else 0.5 * (1 + np.cos(np.pi * (t - warmup) / (total - warmup)))


class Adam:
    """Adam's direction for one array."""

    def __init__(self, epsilon: float) -> None:
        self.m, self.v, self.t, self.epsilon = 0.0, 0.0, 0, epsilon

    def __call__(self, g: np.ndarray) -> np.ndarray:
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g**2
        return (self.m / (1 - 0.9**self.t)) / (np.sqrt(self.v / (1 - 0.999**self.t)) + self.epsilon)


class Muon:
    """Muon's direction for one kernel as a matrix [all but the last axis, last axis]."""

    def __init__(self) -> None:
        self.m = 0.0

    def __call__(self, g: np.ndarray) -> np.ndarray:
        self.m = 0.95 * self.m + g
        x = (g + 0.95 * self.m).reshape(-1, g.shape[-1])
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        x = x / (np.linalg.norm(x) + 1e-7)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        x = x.T if tall else x
        return (0.2 * np.sqrt(max(x.shape)) * x).reshape(g.shape)


def clip_global(gradients: list[np.ndarray], bound: float) -> list[np.ndarray]:
    """By the norm of all together."""
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients))
    return [g * min(1.0, bound / norm) for g in gradients]


def clip_each(gradients: list[np.ndarray], bound: float) -> list[np.ndarray]:
    """Each by its own norm."""
    return [g * min(1.0, bound / np.linalg.norm(g)) for g in gradients]


def convolution(x: np.ndarray, w: np.ndarray, stride: int, pad: int) -> np.ndarray:
    """A convolution of float64 [n, h, w, in] with a kernel [kh, kw, in, out], padded by `pad` on
    each side.
    """
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    kh, kw = w.shape[:2]
    h, wd = (x.shape[1] - kh) // stride + 1, (x.shape[2] - kw) // stride + 1
    out = np.zeros((x.shape[0], h, wd, w.shape[3]))
    for i in range(kh):
        for j in range(kw):
            out += x[:, i : i + stride * h : stride, j : j + stride * wd : stride] @ w[i, j]
    return out
