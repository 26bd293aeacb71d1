"""Teachers are judged on images before the first step: what they take, return and know.

The class of an image is its colour, and hand-made teachers know the colours exactly.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import RecordingConsole, build_job, here, strategy

from trainer.core.config import Config
from trainer.core.errors import DataError
from trainer.data.store import ImageStore
from trainer.models import teachers
from trainer.run import build, loop, teacher_check
from trainer.run.evaluator import Evaluator
from trainer.run.stores import Stores
from trainer.run.teacher_check import Decision, Pictures

SIDE = 16
COLOURS = np.array(
    [
        *((230, 25, 75), (60, 180, 75), (0, 130, 200), (255, 225, 25), (145, 30, 180), (70, 240, 240)),
        *((250, 190, 212), (128, 128, 0), (0, 0, 0), (255, 255, 255), (170, 110, 40), (128, 128, 128)),
    ],
    np.float32,
)
NAMES = tuple(str(number) for number in range(1, 13))
GREY = 128


class Images(ImageStore):
    """Images in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, names: tuple[str, ...] = NAMES) -> None:
        self.images, self.labels, self.classes = images, labels.astype(np.int32), names
        self.sizes = np.full((len(labels), 2), 40.0, np.float32)
        self.shape = images.shape[1:]

    def take(self, ids: np.ndarray) -> np.ndarray:
        return self.images[ids]


def coloured(count: int, frame: float = 1.0) -> Images:
    """Images of each class in turn; the colour fills this share of the side, from the border in."""
    labels, rng = np.arange(count) % 12, np.random.default_rng(0)
    images = np.full((count, 32, 32, 3), GREY, np.float32)
    width = round(16 * frame)
    ring = np.ones((32, 32), bool)
    ring[width : 32 - width, width : 32 - width] = False
    images[:, ring] = COLOURS[labels][:, None]
    noisy = np.clip(images + rng.normal(0, 8, images.shape), 0, 255)
    return Images(noisy.astype(np.uint8), labels)


def teacher(
    path: pathlib.Path,
    low: float = 0.0,
    high: float = 1.0,
    *,
    head: Callable | None = None,
    end: str | Callable = "linear",
    order: np.ndarray | None = None,
    scale: float = 40.0,
    crop: int = 0,
    dtype: str = "float32",
) -> str:
    """A `.keras` teacher that answers the nearest colour, for inputs from `low` to `high`.

    Args:
        path: folder to save in.
        low: input that means black.
        high: input that means white.
        head: layers before the classifier's input.
        end: activation of the classifier.
        order: which colour each output means.
        scale: of the logits.
        crop: pixels at each border that are all it looks at; 0: it looks at everything.
        dtype: of the classifier.
    """
    colours = COLOURS[np.arange(12) if order is None else order] / 255.0
    inputs = x = keras.Input((SIDE, SIDE, 3))
    if head is not None:
        x = head(x)
    if crop:
        mask = np.ones((SIDE, SIDE, 3), np.float32)
        mask[crop:-crop, crop:-crop] = 0
        x = keras.layers.Multiply()([x, keras.ops.convert_to_tensor(mask[None] / mask.mean())])
    dense = keras.layers.Dense(len(colours), activation=end, dtype=dtype)
    outputs = dense(keras.layers.GlobalAveragePooling2D()(x))
    factor = 1.0 / (high - low)
    weights = (scale * colours * factor).T
    bias = scale * (-0.5 * (colours**2).sum(1) - colours.sum(1) * low * factor)
    dense.set_weights([weights.astype(np.float32), bias.astype(np.float32)])
    file = path / "teacher.keras"
    keras.Model(inputs, outputs).save(file)
    return f"keras:{file}"


def judge(name: str, store: Images, *, names: tuple[str, ...] = NAMES, **flags: object) -> tuple[Decision, list[str]]:
    """The decision about a teacher, and the printed lines."""
    config = Config(
        teacher=(name,),
        image_size=SIDE,
        store_size=32,
        steps=1,
        batch_size=64,
        **flags,  # type: ignore[arg-type]
    ).resolve(1)
    (loaded,) = teachers.load(config, len(names))
    console = RecordingConsole()

    def make(images: ImageStore) -> Evaluator:
        return Evaluator(config, strategy(1), images, jit_compile=False)

    pictures = Pictures.of("test", store, names, make)
    (decision,) = teacher_check.judge(config, (loaded,), pictures, console)
    return decision, console.lines


@pytest.fixture(scope="module")
def images() -> Images:
    return coloured(96)


def test_the_first_layer_tells_the_range(tmp_path: pathlib.Path, images: Images) -> None:
    decision, lines = judge(teacher(tmp_path, head=keras.layers.Rescaling(1 / 255), end="softmax"), images)
    assert (decision.value_range, decision.outputs, decision.top1, decision.labelled) == ("0,255", "logits", 1.0, 96)
    assert decision.chance == pytest.approx(1 / 12)
    assert "takes 0,255 (it begins with Rescaling, which gives 0 to 1)" in lines[0]
    assert "returns probabilities (softmax removed)" in lines[0]
    assert lines[1].endswith("on test: 100.0% of 96 images (95% interval 96.2 to 100.0); chance 8.3%")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-1, 1), (0, 255)])
def test_labelled_images_tell_the_range_where_the_model_does_not(
    tmp_path: pathlib.Path, images: Images, low: float, high: float
) -> None:
    decision, lines = judge(teacher(tmp_path, low, high), images)
    assert (decision.value_range, decision.top1) == (f"{low},{high}", 1.0)
    for name in ("-1,1", "0,1", "0,255"):
        assert f"{name} {'100.0%' if name == decision.value_range else ''}" in lines[0]


def test_without_a_clear_winner_the_job_stops(tmp_path: pathlib.Path, images: Images) -> None:
    """Colours that two ranges tell apart equally well.

    The likelihood of the labels must not decide between such ranges: more contrast gives more
    confidence, in a range that is wrong too.
    """
    few = Images(images.images[:10], images.labels[:10])
    name = teacher(tmp_path, 0, 1)
    with pytest.raises(
        DataError, match=r"none is clearly the best \(tried on 10 .*-1,1 .*0,1 100.0%, .*--teacher_range="
    ):
        judge(name, few)
    decision, lines = judge(name, few, force_teacher=True)
    assert decision.value_range == "0,1"  # the best of the three
    assert any(line.startswith("warning:") and "none is clearly the best" in line for line in lines)
    assert judge(name, few, teacher_range=("0,1",))[0].top1 == 1.0


def test_a_given_range_that_leaves_the_teacher_at_chance_is_refused(tmp_path: pathlib.Path, images: Images) -> None:
    name = teacher(tmp_path, 0, 255)
    with pytest.raises(
        DataError, match=r"takes 0,1 .--teacher_range.*but 0,255 is much better.*give --teacher_range=0,255"
    ):
        judge(name, images, teacher_range=("0,1",))


def test_a_given_range_that_the_first_layer_contradicts_is_refused_where_labels_do_too(
    tmp_path: pathlib.Path, images: Images
) -> None:
    name = teacher(tmp_path, 0, 1, head=keras.layers.Rescaling(1 / 255))
    with pytest.raises(DataError, match=r"takes -1,1 .--teacher_range; it begins with Rescaling.*give .*0,255"):
        judge(name, images, teacher_range=("-1,1",))


def test_a_layer_that_labels_contradict_is_refused(tmp_path: pathlib.Path, images: Images) -> None:
    """It divides by 255, and was trained on images that were divided before."""
    name = teacher(tmp_path, 0, 1 / 255, head=keras.layers.Rescaling(1 / 255))
    with pytest.raises(DataError, match=r"takes 0,255 .it begins with Rescaling.*but 0,1 is much better"):
        judge(name, images)
    assert judge(name, images, teacher_range=("0,1",))[0].top1 == 1.0


def test_classes_in_another_order_are_named(tmp_path: pathlib.Path, images: Images) -> None:
    """The data is in natural order, the teacher's outputs are in the order of texts."""
    order = np.array([NAMES.index(name) for name in sorted(NAMES)])
    name = teacher(tmp_path, -1, 1, order=order)
    message = (
        r"fits the classes in text order \(1, 10, 11, .*100.0% of the images right, instead of .*--class_order=text"
    )
    with pytest.raises(DataError, match=message):
        judge(name, images)  # although no range is clearly the best either
    with pytest.raises(DataError, match=message):
        judge(name, images, teacher_range=("-1,1",))
    _, lines = judge(name, images, teacher_range=("-1,1",), force_teacher=True)
    assert any(line.startswith("warning:") and "in text order" in line for line in lines)


def test_any_other_order_is_named_too(tmp_path: pathlib.Path, images: Images) -> None:
    name = teacher(tmp_path, 0, 1, order=np.random.default_rng(2).permutation(12))
    with pytest.raises(DataError, match=r"in another order than the data: its output .* means .*--classes=FILE"):
        judge(name, images, teacher_range=("0,1",))


def test_a_teacher_at_chance_is_refused_if_there_are_images_enough_to_tell(
    tmp_path: pathlib.Path, images: Images
) -> None:
    """The labels are drawn at random; 12 images are too few to tell."""
    rng = np.random.default_rng(0)
    random = Images(images.images, rng.integers(0, 12, 96))
    name = teacher(tmp_path, 0, 1)
    with pytest.raises(DataError, match=r"is at chance on test: .* of 96 images.*--force_teacher"):
        judge(name, random, teacher_range=("0,1",))
    few = Images(images.images[:12], rng.integers(0, 12, 12))
    _, lines = judge(name, few, teacher_range=("0,1",))
    assert any("may be at chance" in line and "too few images" in line for line in lines)


@pytest.mark.parametrize(
    ("factor", "message"),
    [(np.nan, "not finite .NaN or infinite. on 96 of 96 images"), (0.0, "the same outputs for all 96 images")],
)
@pytest.mark.parametrize("given", [("auto",), ("0,1",)])
def test_dead_teachers_are_refused(
    tmp_path: pathlib.Path, images: Images, factor: float, message: str, given: tuple[str, ...]
) -> None:
    name = teacher(tmp_path, scale=factor)
    with pytest.raises(DataError, match=message):
        judge(name, images, teacher_range=given)
    blank = Images(images.images, np.full(96, -1))
    with pytest.raises(DataError, match=message):
        judge(name, blank, teacher_range=("0,1",))


def test_without_labels_the_range_must_be_known(tmp_path: pathlib.Path, images: Images) -> None:
    blank = Images(images.images, np.full(96, -1))
    name = teacher(tmp_path, 0, 1)
    with pytest.raises(DataError, match="no image has a label to find it by: give --teacher_range="):
        judge(name, blank)
    decision, lines = judge(name, blank, teacher_range=("0,1",))
    assert (decision.top1, decision.labelled, decision.images) == (None, 0, 96)
    assert "test has no labels to judge it by; it answers 12 of 12 classes on 96 images" in lines[-1]


class Saved(tf.Module):
    """A program whose end cannot be seen: logits, or what is made of them."""

    def __init__(self, end: Callable[[tf.Tensor], tf.Tensor]) -> None:
        super().__init__()
        colours = COLOURS / 255.0
        self.weights = tf.Variable(8.0 * colours.T)
        self.bias, self.end = tf.constant(-4.0 * (colours**2).sum(1)), end

    @tf.function(input_signature=[tf.TensorSpec([None, SIDE, SIDE, 3], tf.float32)])
    def classify(self, images: tf.Tensor) -> tf.Tensor:
        return self.end(tf.reduce_mean(images, axis=(1, 2)) @ self.weights + self.bias)


def saved(path: pathlib.Path, end: Callable[[tf.Tensor], tf.Tensor]) -> str:
    module = Saved(end)
    tf.saved_model.save(module, str(path / "saved"), signatures={"serving_default": module.classify})
    return f"saved_model:{path}/saved"


@pytest.mark.parametrize("precision", [tf.float32, tf.bfloat16, tf.float16])
def test_a_softmax_in_any_precision_is_recognised(tmp_path: pathlib.Path, images: Images, precision: tf.DType) -> None:
    """In bfloat16 its sums are up to 0.4 % off."""
    name = saved(tmp_path, lambda logits: tf.cast(tf.nn.softmax(tf.cast(logits, precision)), tf.float32))
    decision, lines = judge(name, images, teacher_range=("0,1",))
    assert (decision.outputs, decision.top1) == ("probabilities", 1.0)
    assert "returns probabilities, by their values" in lines[0]


def test_independent_probabilities_need_a_flag(tmp_path: pathlib.Path, images: Images) -> None:
    name = saved(tmp_path, tf.nn.sigmoid)
    with pytest.raises(DataError, match="do not sum to 1: give --teacher_outputs=sigmoid"):
        judge(name, images, teacher_range=("0,1",))
    decision, _ = judge(name, images, teacher_range=("0,1",), teacher_outputs="sigmoid")
    assert decision.outputs == "sigmoid"
    config = Config(teacher=(name,), teacher_outputs="sigmoid", teacher_range=("0,1",), steps=1)
    (loaded,) = teachers.load(config, 12)
    x = tf.random.stateless_uniform([3, SIDE, SIDE, 3], [1, 2], -1, 1)
    module = Saved(lambda logits: logits)
    assert np.allclose(loaded.logits(x), module.classify((x + 1) / 2), atol=1e-3)


def test_the_sigmoids_of_a_keras_file_are_removed_with_a_warning(tmp_path: pathlib.Path, images: Images) -> None:
    name = teacher(tmp_path, end="sigmoid")
    config = Config(teacher=(name,), steps=1)
    (loaded,) = teachers.load(config, 12)
    assert "ends in a sigmoid" in loaded.warnings[0]
    decision, _ = judge(name, images)
    assert (decision.outputs, decision.top1) == ("logits", 1.0)


def test_a_teacher_is_measured_on_whole_images_where_it_is_clearly_better_there(tmp_path: pathlib.Path) -> None:
    """The class is the colour of a frame that the central crop cuts off."""
    framed = coloured(96, frame=0.125)
    name = teacher(tmp_path, 0, 1, crop=1)
    decision, lines = judge(name, framed, teacher_range=("0,1",))
    assert (decision.view, decision.own_view_top1) == ("squash", 1.0)
    assert decision.top1 is not None
    assert decision.top1 < 0.5
    assert any("100.0% squashed" in line and "reported squashed" in line for line in lines)
    central, lines = judge(name, framed, teacher_range=("0,1",), teacher_view=("central",), force_teacher=True)
    assert (central.view, central.own_view_top1) == ("central", None)


def test_a_large_split_is_sampled_evenly_from_labelled_images(images: Images) -> None:
    count = 5 * teacher_check.SAMPLE
    labels = np.where(np.arange(count) % 2, np.arange(count) % 12, -1)
    store = Images(np.zeros((count, 2, 2, 3), np.uint8), labels)
    seen: list[ImageStore] = []

    def make(images: ImageStore) -> Evaluator:
        seen.append(images)
        return None  # type: ignore[return-value]

    pictures = Pictures.of("test", store, NAMES, make)
    assert not pictures.whole
    assert (len(pictures.labels), len(seen[0])) == (teacher_check.SAMPLE,) * 2
    assert (pictures.labels >= 0).all()
    assert Pictures.of("test", images, NAMES, make).whole


# --- in a job ------------------------------------------------------------------------------------


def test_what_was_found_is_kept_for_the_processes_that_resume(make_config: Callable[..., Config]) -> None:
    config = make_config(teacher_view=("squash",))
    job = build_job(config)
    path = pathlib.Path(config.workdir, teacher_check.FILE)
    content = json.loads(path.read_text())
    assert [entry["value_range"] for entry in content["teachers"]] == ["-1,1"]
    assert (content["run"], job.config.teacher_range) == (job.plan.run_id, ("-1,1",))
    assert job.decisions[0].images == 15
    content["teachers"][0]["value_range"] = "0,1"
    path.write_text(json.dumps(content))
    resumed = build_job(config)
    assert resumed.teachers[0].value_range == "0,1"
    assert resumed.teachers[0].view == "squash"
    content["run"] = "another"
    path.write_text(json.dumps(content))
    assert build_job(config).teachers[0].value_range == "-1,1"
    path.write_text("{")
    with pytest.raises(DataError, match=r"teacher\.json is damaged"):
        build_job(config)


def test_a_run_of_version_0_1_resumes_as_it_began(tmp_path: pathlib.Path, make_config: Callable[..., Config]) -> None:
    """That version showed a teacher with a Rescaling inside the range from -1 to 1."""
    model = keras.Sequential(
        [keras.Input((24, 24, 3)), keras.layers.Rescaling(1 / 255), keras.layers.Flatten(), keras.layers.Dense(5)]
    )
    model.save(tmp_path / "t.keras")
    config = make_config(teacher=(f"keras:{tmp_path}/t.keras",), force_teacher=True)
    assert build_job(config).teachers[0].value_range == "0,255"
    pathlib.Path(config.workdir, teacher_check.FILE).unlink()
    job = build_job(config)
    writer, checkpoints = build.open_run(job)
    loop.save(job, writer, checkpoints)
    pathlib.Path(config.workdir, teacher_check.FILE).unlink()
    assert build_job(config).teachers[0].value_range == "-1,1"
    assert pathlib.Path(config.workdir, teacher_check.FILE).exists() is False


def test_the_job_ends_with_3_before_the_first_step(data: str, tmp_path: pathlib.Path) -> None:
    """--check and the job itself."""
    model = keras.Sequential([keras.Input((24, 24, 3)), keras.layers.Flatten(), keras.layers.Dense(5)])
    model.set_weights([w * np.nan for w in model.get_weights()])
    model.save(tmp_path / "nan.keras")
    flags = ["task", f"--data={data}", f"--teacher=keras:{tmp_path}/nan.keras", "--student=bit-tiny", "--steps=2"]
    flags += ["--image_size=24", "--batch_size=4", f"--workdir={tmp_path}/run"]
    for more in ([], ["--check"], ["--dry_run"]):
        done = here(*flags, *more)
        assert done.returncode == 3, done.stderr
        assert "not finite (NaN or infinite) on 15 of 15 images of validation" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_evaluate_reports_bad_models_and_exits_0(
    data: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = keras.Sequential([keras.Input((24, 24, 3)), keras.layers.Flatten(), keras.layers.Dense(5)])
    model.set_weights([w * np.nan for w in model.get_weights()])
    model.save(tmp_path / "nan.keras")
    done = here("evaluate", f"--model=keras:{tmp_path}/nan.keras", f"--data={data}")
    assert done.returncode == 0, done.stderr
    content = json.loads(capsys.readouterr().out)
    assert (content["not_finite"], content["top1"]) == (23, 0.0)
    assert content["interval"][1] < 0.2
    assert "not finite (NaN or infinite) on 23 of 23 images, which count as wrong" in done.stderr
    assert "--model_range" in done.stderr
    assert "--teacher" not in done.stderr


def test_an_unlabelled_evaluation_split_is_replaced_by_labelled_training_images(
    make_config: Callable[..., Config],
) -> None:
    job = build_job(make_config(teacher_view=("central",), force_teacher=True))
    unlabelled = Images(np.zeros((7, 32, 32, 3), np.uint8), np.full(7, -1), job.train_store.classes)
    stores = Stores(job.train_store, [len(job.train_store)], {"validation": unlabelled}, {})
    plan = dataclasses.replace(job.plan, config=dataclasses.replace(job.config, workdir=""))
    _, _, decisions, evaluators = teacher_check.settle(
        plan, job.accelerator, job.teachers, stores, RecordingConsole(), begun_before=False
    )
    assert (decisions[0].split, decisions[0].labelled) == ("train", 40)
    assert not evaluators  # of training images: none that an evaluation may use


def test_images_of_one_class_judge_nothing(tmp_path: pathlib.Path) -> None:
    everything = coloured(480)
    one = Images(everything.images[1::12], everything.labels[1::12])
    decision, lines = judge(teacher(tmp_path, head=keras.layers.Rescaling(1 / 255)), one)
    assert decision.top1 == 1.0
    assert any("cannot be judged on test: all 40 labelled images are of one class, 2" in line for line in lines)
    # Shown another range, it may answer that class for every image.
    with pytest.raises(DataError, match=r"none is clearly the best.*give --teacher_range"):
        judge(teacher(tmp_path, 0, 255), one)


def test_a_given_range_is_questioned_above_chance_too(tmp_path: pathlib.Path, images: Images) -> None:
    name = teacher(tmp_path, 0, 1)
    decision, _ = judge(name, images, teacher_range=("-1,1",), force_teacher=True)
    assert decision.top1 is not None
    assert 0.2 < decision.top1 < 0.8
    with pytest.raises(DataError, match=r"takes -1,1 .*but 0,1 is much better.*give --teacher_range=0,1"):
        judge(name, images, teacher_range=("-1,1",))


def test_a_given_range_that_the_layers_contradict_is_reported_without_labels(
    tmp_path: pathlib.Path, images: Images
) -> None:
    unlabelled = Images(images.images, np.full(len(images.labels), -1))
    name = teacher(tmp_path, head=keras.layers.Rescaling(1 / 255))
    _, lines = judge(name, unlabelled, teacher_range=("0,1",))
    assert any(
        line.startswith("warning:") and "seems to take 0,255 (it begins with Rescaling" in line for line in lines
    )
    _, lines = judge(name, unlabelled, teacher_range=("0,255",))
    assert not any(line.startswith("warning:") for line in lines)


@pytest.mark.parametrize(
    ("end", "flag", "words"),
    [
        ("linear", "probabilities", "says are probabilities"),
        ("linear", "sigmoid", "says are probabilities"),
        ("softmax", "sigmoid", "sum to 1, which --teacher_outputs=sigmoid says are independent"),
    ],
)
def test_given_outputs_that_the_values_contradict_are_refused(
    end: str, flag: str, words: str, tmp_path: pathlib.Path, images: Images
) -> None:
    name = teacher(tmp_path, head=keras.layers.Rescaling(1 / 255), end=end)
    with pytest.raises(DataError, match=words):
        judge(name, images, teacher_outputs=flag)


@pytest.mark.parametrize("total", [100.0, 255.0])
def test_probabilities_in_percent_are_recognised(total: float) -> None:
    probabilities = np.random.default_rng(0).dirichlet(np.ones(5), 8).astype(np.float32)
    assert teachers.outputs_of_values(total * probabilities) == "probabilities"
    assert teachers.outputs_of_values(17 * probabilities) == "logits"


def test_one_probability_for_two_classes_is_asked_about(tmp_path: pathlib.Path) -> None:
    """Its sigmoid is hidden by a layer behind it; read as a logit, 0 to 1 would say little."""
    everything = coloured(240)
    rows = np.flatnonzero(np.isin(everything.labels, (8, 9)))  # black and white
    two = Images(everything.images[rows], everything.labels[rows] - 8, ("black", "white"))
    inputs = keras.Input((SIDE, SIDE, 3))
    dense = keras.layers.Dense(1, activation="sigmoid")
    pooled = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(inputs))
    model = keras.Model(inputs, keras.layers.Rescaling(0.98, offset=0.01)(dense(pooled)))
    dense.set_weights([np.full((3, 1), 4, np.float32), np.array([-6.0], np.float32)])
    model.save(tmp_path / "t.keras")
    name = f"keras:{tmp_path / 't.keras'}"
    with pytest.raises(DataError, match="--teacher_outputs=sigmoid"):
        judge(name, two, names=two.classes)
    config = Config(teacher=(name,), image_size=SIDE, steps=1, teacher_outputs="sigmoid")
    decision, _ = judge(name, two, names=two.classes, teacher_outputs="sigmoid")
    assert (decision.top1, decision.outputs) == (1.0, "probabilities")
    (loaded,) = teachers.load(config, 2)
    views = two.images[:4, ::2, ::2].astype(np.float32) / 127.5 - 1
    expected = model(127.5 * (views + 1), training=False).numpy()[:, 0]
    got = tf.nn.softmax(decision.apply(loaded).logits(tf.constant(views))).numpy()[:, 1]
    assert np.allclose(got, expected, atol=1e-5)
