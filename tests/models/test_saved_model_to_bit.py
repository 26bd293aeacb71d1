"""SavedModels that hold a BiT are converted; others run as they were saved, with a reason."""

from __future__ import annotations

import gc
import os
import pathlib
import random
import re
import subprocess
import sys
from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASSES, IMAGE, ROOT, build_job, opinionated, strategy

from trainer.core.config import Config
from trainer.data.order import ExampleSampler
from trainer.models import bit, saved_model_to_bit, saved_models, teachers

ARCH = bit.ARCHS["tiny"]


def network(classes: int = CLASSES) -> keras.Model:
    """A BiT whose weights all differ."""
    model = opinionated(bit.bit("tiny", classes, None, seed=5))
    rng = np.random.default_rng(1)
    model.set_weights([w + rng.normal(0, 0.2, w.shape).astype(np.float32) for w in model.get_weights()])
    return model


def hub_name(name: str) -> str:
    """The names in big_transfer's TensorFlow 2 code, with a classifier of Keras 2 on top."""
    layer, weight = name.split("/")
    if layer == "root_conv":
        return f"resnet/root_block/standardized_conv2d/{weight}"
    if layer == "final_norm":
        return f"resnet/group_norm/{weight}"
    if layer == "head":
        return f"my_bi_t_model/dense/{weight}"
    block, unit, part = layer.split("_")[:3]
    part = "a/proj" if part == "proj" else part
    kind = "group_norm" if layer.endswith("norm") else "standardized_conv2d"
    return f"resnet/{block}/{unit}/{part}/{kind}/{weight}"


class Foreign(tf.__internal__.tracking.AutoTrackable):
    """A BiT in plain TensorFlow that scales its input, as the Keras example's teacher.

    Args:
        rename: names of variables from ours.
        order: of their creation, from ours.
        flaw: a difference from a BiT.
    """

    def __init__(
        self,
        rename: Callable[[str], str] = hub_name,
        order: Callable[[list[str]], list[str]] = lambda names: [n for n in names if "head" in n] + names[:-2],
        value_range: str = "0,1",
        root_pool: str = "zero",
        flaw: str = "",
        ending: str = "logits",
        head: float = 1.0,
        listed: bool = True,
    ) -> None:
        super().__init__()
        values = {f"{x.name}/{w.name}": np.asarray(w) for x in network().layers for w in x.weights}
        self.kept = {name: tf.Variable(values[name], name=rename(name)) for name in order(list(values))}
        if listed:  # Keras 2 keeps this list
            self.variables = list(self.kept.values())
        for name in ("head/kernel", "head/bias"):
            self.kept[name].assign(head * self.kept[name])
        self.range, self.root_pool, self.flaw, self.ending = value_range, root_pool, flaw, ending

    def conv(self, x: tf.Tensor, name: str, stride: int, pad: int) -> tf.Tensor:
        kernel = self.kept[f"{name}/kernel"]
        mean, variance = tf.nn.moments(kernel, [0, 1, 2], keepdims=True)
        kernel = (kernel - mean) / tf.sqrt(variance + 1e-10)
        return tf.nn.conv2d(tf.pad(x, [[0, 0], [pad, pad], [pad, pad], [0, 0]]), kernel, stride, "VALID")

    def norm(self, x: tf.Tensor, name: str) -> tf.Tensor:
        shape = tf.shape(x)
        grouped = tf.reshape(x, [shape[0], shape[1] * shape[2], ARCH.groups, x.shape[-1] // ARCH.groups])
        mean, variance = tf.nn.moments(grouped, [1, 3], keepdims=True)
        x = tf.reshape((grouped - mean) / tf.sqrt(variance + (1e-2 if self.flaw == "epsilon" else 1e-5)), shape)
        return tf.nn.relu(x * self.kept[f"{name}/gamma"] + self.kept[f"{name}/beta"])

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.float32)])
    def classify(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        x = {"0,1": images * 2 - 1, "-1,1": images, "0,255": images / 127.5 - 1}[self.range]
        x = self.conv(x, "root_conv", 2, 3)
        if self.root_pool == "zero":
            x = tf.nn.max_pool2d(tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]]), 3, 2, "VALID")
        else:
            x = tf.nn.max_pool2d(x, 3, 2, [[0, 0], [1, 1], [1, 1], [0, 0]])
        for b, units in enumerate(ARCH.units, 1):
            for u in range(1, units + 1):
                where, stride = f"block{b}_unit{u:02d}", 2 if u == 1 and b > 1 else 1
                y = self.norm(x, f"{where}_a_norm")
                shortcut = self.conv(y, f"{where}_proj", stride, 0) if u == 1 else x
                y = self.norm(self.conv(y, f"{where}_a", 1, 0), f"{where}_b_norm")
                y = self.norm(self.conv(y, f"{where}_b", stride, 1), f"{where}_c_norm")
                x = shortcut + self.conv(y, f"{where}_c", 1, 0)
        x = tf.reduce_mean(self.norm(x, "final_norm"), [1, 2])
        logits = x @ self.kept["head/kernel"] + self.kept["head/bias"]
        if self.flaw == "relu":
            logits = tf.nn.relu(logits)
        return {"output_1": tf.nn.softmax(logits) if self.ending == "probabilities" else logits}


def saved(path: pathlib.Path, **how: object) -> str:
    foreign = Foreign(**how)  # type: ignore[arg-type]
    tf.saved_model.save(foreign, str(path / "saved"), signatures={"serving_default": foreign.classify})
    return f"saved_model:{path}/saved"


def views(count: int = 4, size: int = IMAGE) -> tf.Tensor:
    return tf.constant(np.random.default_rng(9).uniform(-1, 1, (count, size, size, 3)).astype(np.float32))


def load(name: str, **changes: object) -> teachers.Teacher:
    return teachers.load(Config(teacher=(name,), image_size=IMAGE, **changes), CLASSES)[0]  # type: ignore[arg-type]


def check_converted(teacher: teachers.Teacher, **how: object) -> None:
    """The teacher is a folded Keras BiT with the logits of `bit_of`."""
    expected = np.asarray(bit_of(**how)(views()))
    assert isinstance(teacher.model, keras.Model)
    assert not any(isinstance(layer, bit.StdConv2D) for layer in teacher.model.layers)  # folded, as any BiT
    assert np.abs(teacher.logits(views()).numpy() - expected).max() < 1e-4 * np.abs(expected).max()
    (note,) = teacher.notes
    assert "converted to Keras" in note
    assert teacher.model.count_params() == bit_of().count_params()


def bit_of(root_pool: str = "zero") -> keras.Model:
    model = bit.bit("tiny", CLASSES, None, root_pool=root_pool)
    model.set_weights(network().get_weights())
    return model


def grouped(names: list[str]) -> list[str]:
    """All convolutions of a unit before its norms, the projection last."""

    def key(name: str) -> tuple:
        layer = name.split("/")[0]
        if not layer.startswith("block"):
            return ({"root_conv": 0, "final_norm": 2, "head": 3}[layer],)
        block, unit, part = layer.split("_")[:3]
        return (1, block, unit, layer.endswith("norm"), "abc proj".index(part))

    return sorted(names, key=key)


def beta_first(names: list[str]) -> list[str]:
    return [n.replace("gamma", "*").replace("beta", "gamma").replace("*", "beta") for n in names]


NAMINGS: dict[str, dict] = {
    "hub": {},
    "deep": {"rename": lambda name: "model/keras_layer/" + hub_name(name)},
    "numbered": {"rename": lambda name: hub_name(name).replace("conv2d/", "conv2d_3/").replace("norm/", "norm_11/")},
    "ours": {"rename": lambda name: f"bit_tiny/{name}"},
    "none": {"rename": lambda _: "Variable"},
    "none, classifier last": {"rename": lambda _: "w", "order": lambda names: names},
    "none, convolutions first": {"rename": lambda _: "w", "order": grouped},
    "none, shifts first": {"rename": lambda _: "w", "order": beta_first},
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_variables_are_matched_by_any_naming_or_order(naming: str) -> None:
    """The right assignment is among the candidates; with names, it is the only one."""
    foreign = Foreign(**NAMINGS[naming])
    candidates = list(saved_model_to_bit._candidates([foreign.variables]))
    assert all(arch == ARCH for arch, _ in candidates)
    assert any(all(assigned[name] is foreign.kept[name] for name in foreign.kept) for _, assigned in candidates)
    assert len(candidates) == 1 if not naming.startswith("none") else 1 <= len(candidates) <= 16


@pytest.mark.parametrize("change", ["one too many", "one too few", "shuffled", "two roots"])
def test_other_variables_are_not_matched(change: str) -> None:
    variables = Foreign(rename=lambda _: "w").variables
    changed = {
        "one too many": [*variables, tf.Variable(tf.zeros([3]))],
        "one too few": variables[:5] + variables[6:],
        "shuffled": random.Random(0).sample(variables, len(variables)),
        "two roots": [*variables, variables[2]],
    }[change]
    assert list(saved_model_to_bit._candidates([changed])) == []


def live_models_and_variables() -> list:
    gc.collect()
    return [o for o in gc.get_objects() if isinstance(o, (tf.Variable, saved_models.SavedClassifier))]


def test_the_examples_teacher_is_converted_and_leaves_no_copy(tmp_path: pathlib.Path) -> None:
    name = saved(tmp_path)
    before = {id(o) for o in live_models_and_variables()}
    teacher = load(name)
    new = [o for o in live_models_and_variables() if id(o) not in before]
    assert not [o for o in new if isinstance(o, saved_models.SavedClassifier)]
    # The teacher's variables, and nothing else of that size.
    assert sum(int(np.prod(o.shape)) for o in new) < 1.2 * teacher.model.count_params()
    check_converted(teacher)
    assert "a BiT tiny that takes 0,1: converted to Keras" in teacher.notes[0]
    assert teacher.value_range == "-1,1"


def test_variables_without_names_another_range_and_a_softmax(tmp_path: pathlib.Path) -> None:
    """The value range agrees with the flag; probabilities become exact logits."""
    how = {"rename": lambda _: "w", "value_range": "0,255", "ending": "probabilities"}
    teacher = load(saved(tmp_path, **how), teacher_range=("0,255",))
    check_converted(teacher)
    assert "takes 0,255" in teacher.notes[0]
    assert not teacher.probabilities


def test_root_pool_and_order_of_use_are_recognised(tmp_path: pathlib.Path) -> None:
    name = saved(tmp_path, rename=lambda _: "w", listed=False, root_pool="inf", value_range="-1,1")
    teacher = load(name)
    check_converted(teacher, root_pool="inf")
    assert "root pool inf that takes -1,1" in teacher.notes[0]


def test_a_range_that_contradicts_the_probe_gives_a_warning(tmp_path: pathlib.Path) -> None:
    """It may have been trained with this range, so it runs as it was saved."""
    teacher = load(saved(tmp_path), teacher_range=("-1,1",))
    assert isinstance(teacher.model, saved_models.SavedClassifier)
    (warning,) = teacher.warnings
    assert "it takes 0,1" in warning
    assert "--teacher_range is -1,1" in warning
    expected = np.asarray(bit_of()(views() * 2 - 1))
    assert np.abs(teacher.logits(views()) - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"flaw": "epsilon"}, r"differs by \S+ of the largest logit"),
        ({"head": 0.0}, "does not show whether it takes"),
    ],
)
def test_a_near_bit_runs_as_it_was_saved(tmp_path: pathlib.Path, how: dict, reason: str) -> None:
    teacher = load(saved(tmp_path, **how))
    assert isinstance(teacher.model, saved_models.SavedClassifier)
    (warning,) = teacher.warnings
    assert warning.startswith(f"saved_model:{tmp_path}/saved runs as it was saved")
    assert re.search(reason, warning), warning
    foreign = Foreign(**how)
    assert np.allclose(teacher.logits(views()), foreign.classify(views())["output_1"], atol=1e-4)


def test_other_networks_give_no_warning(tmp_path: pathlib.Path) -> None:
    keras.Sequential(
        [keras.Input((IMAGE, IMAGE, 3)), keras.layers.Conv2D(4, 7), keras.layers.Flatten(), keras.layers.Dense(CLASSES)]
    ).export(str(tmp_path / "saved"), verbose=False)
    assert load(f"saved_model:{tmp_path}/saved").notes == ()


def replicated(teacher: teachers.Teacher, images: tf.Tensor, compiled: bool) -> np.ndarray:
    """Logits of the replicas of the current strategy, one after the other."""
    current = tf.distribute.get_strategy()
    body = tf.function(teacher.logits, jit_compile=compiled)
    run = tf.function(lambda x: current.run(body, (x,)))
    return np.concatenate([part.numpy() for part in current.experimental_local_results(run(images))])


@pytest.mark.parametrize("value_range", [(), ("-1,1",)])
def test_under_xla_and_on_two_replicas(tmp_path: pathlib.Path, value_range: tuple[str, ...]) -> None:
    """Converted, and as it was saved."""
    name = saved(tmp_path)
    changes = {"teacher_range": value_range} if value_range else {}
    with strategy(2).scope():
        teacher = load(name, **changes)
        assert isinstance(teacher.model, saved_models.SavedClassifier) == bool(value_range)
        logits = replicated(teacher, views(), compiled=False)
    expected = np.asarray(bit_of()(views() * 2 - 1 if value_range else views()))
    assert np.abs(logits - np.concatenate([expected] * 2)).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(tf.function(load(name, **changes).logits, jit_compile=True)(views()) - expected).max() < 1e-3


def test_architectures_are_inferred_from_shapes() -> None:
    layout = saved_model_to_bit._layout(bit.Arch((2, 3, 1), 32), saved_model_to_bit._ORDERS[0])
    assert teachers.bit_weights.infer_arch(dict(layout)) == bit.Arch((2, 3, 1), 32)
    for name, arch in bit.ARCHS.items():
        shapes = dict(saved_model_to_bit._layout(arch, saved_model_to_bit._ORDERS[3]))
        assert teachers.bit_weights.infer_arch(shapes) == arch, name
        built = (
            {f"{x.name}/{w.name}" for x in bit.bit(arch, 2).layers for w in x.weights} if not arch.released else None
        )
        assert built is None or built == shapes.keys() | {"head/kernel", "head/bias"}


@pytest.mark.slow
def test_the_examples_teacher_saved_by_keras_2(tmp_path: pathlib.Path, make_config: Callable[..., Config]) -> None:
    """hub.KerasLayer and Dense in a subclassed model, saved in another environment."""
    folder = ROOT / "tests" / "keras2"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--require-hashes",
        "--target",
        str(tmp_path / "k2"),
    ]
    subprocess.run([*install, "-r", str(folder / "requirements.txt")], check=True, capture_output=True, text=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "k2"), "TF_USE_LEGACY_KERAS": "1"}
    subprocess.run(
        [sys.executable, str(folder / "make_teacher.py"), str(tmp_path / "T"), str(CLASSES), str(IMAGE)],
        check=True,
        env=environment,
    )
    expected = np.load(tmp_path / "T.npz")
    teacher = load(f"saved_model:{tmp_path}/T")
    assert "a BiT tiny that takes 0,1: converted to Keras" in teacher.notes[0]
    logits = teacher.logits(tf.constant(expected["images"] * 2 - 1)).numpy()
    assert np.abs(logits - expected["logits"]).max() < 1e-4 * np.abs(expected["logits"]).max()
    # As it was saved: compiled, and on two replicas.
    raw = load(f"saved_model:{tmp_path}/T", teacher_range=("0,255",))
    assert isinstance(raw.model, saved_models.SavedClassifier)
    compiled = tf.function(lambda x: raw.model(x), jit_compile=True)(tf.constant(expected["images"]))
    assert np.abs(compiled - expected["logits"]).max() < 1e-4 * np.abs(expected["logits"]).max()
    results = []
    for replicas in (1, 2):
        config = make_config(teacher=(f"saved_model:{tmp_path}/T",), teacher_range=("0,255",))
        job = build_job(config, replicas)
        results.append(job.run_steps(2, ExampleSampler(0, len(job.train_store), 8)))
    assert results[0] == pytest.approx(results[1], rel=2e-3)
    assert not [name for name in sys.modules if name.split(".")[0] in ("tf_keras", "tensorflow_hub")]
