"""Profile a teacher in each precision: size, operations, speed on this machine, accuracy, agreement
with float32.

    python -m trainer.profile --teacher=keras:teacher.keras --data=DATA --split=test

For each precision (--teacher_precision of the main job): memory, images a second on this machine,
top-1 on a split, and agreement with the float32 original on views of the training split, which
decides whether the main job accepts that precision. JSON goes to standard output, a table to
standard error.

Exit codes: 0 done; 2 bad flags; 3 bad data or teacher.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from absl import flags

from trainer import cli
from trainer.core import options
from trainer.core.config import Config
from trainer.core.console import Console
from trainer.core.errors import ConfigError
from trainer.core.flags import SHARED, from_flags, shared_flags

if TYPE_CHECKING:
    from trainer.data.store import ImageStore
    from trainer.models.teachers import Teacher
    from trainer.run.evaluator import Evaluator
    from trainer.run.teacher_precision import PrecisionCheck

_SHARED = ("train_split", "views", "mixup", "min_crop_area", "image_size", "seed")
_PASSES = 3  # timed, after one that compiles


def define_flags(values: flags.FlagValues) -> None:
    """The verb's flags: some of the main job's, and its own."""
    shared_flags(values, *SHARED, *_SHARED, batch_size=64)
    define: dict[str, Any] = {"flag_values": values, "module_name": "profile"}
    flags.DEFINE_string("split", "test", "Split of --data that top-1 is measured on.", **define)
    flags.DEFINE_multi_enum(
        "form",
        ["float32", "bfloat16", "int8"],
        options.TEACHER_PRECISIONS,
        "Precision to profile; repeatable.",
        **define,
    )


def main(argv: list[str] | None = None) -> int:
    """The verb; returns an exit code."""
    return cli.run(__doc__, define_flags, _main, argv)


def _main(values: flags.FlagValues) -> None:
    config = from_flags(values, steps=1)
    for flag in ("data", "teacher"):
        if (count := len(getattr(config, flag))) != 1:
            raise ConfigError(f"--{flag} is given {count} times: give one")
    console = Console()
    result = run(config, values.split, tuple(dict.fromkeys(values.form)), console)
    console.info(table(result))
    print(json.dumps(result, indent=1))


def run(config: Config, split: str, precisions: tuple[str, ...], console: Console) -> dict[str, Any]:
    """Profiles one teacher.

    Args:
        config: with one teacher and one data set.
        split: that accuracy is measured on.
        precisions: to profile, of "float32", "bfloat16", "int8".
        console: shows progress.

    Returns:
        teacher, value_range and outputs as they were found, parameters, image_size, macs and gflops
        of one image (None: not known), and for each of `forms` (precisions) its bytes,
        images_per_second, top1, and against float32 agreement_top1 and kl.

    Raises:
        ConfigError, DataError: as the main job does.
    """
    from trainer.data.dataset import Dataset
    from trainer.data.store import MemoryStore
    from trainer.models import bit, quantize, teachers
    from trainer.run import accelerator, teacher_precision
    from trainer.run.evaluator import Evaluator
    from trainer.run.teacher_check import Pictures, judge

    dataset = Dataset.load(config.data[0])
    splits = {flag: dataset.split(name, flag) for flag, name in (("train_split", config.train_split), ("split", split))}
    hardware = accelerator.resolve(config.tpu)
    jit_compile = hardware.jit_compile(config.jit_compile)
    with hardware.strategy.scope():
        (teacher,) = teachers.load(config, len(dataset.classes))
    teachers.print_notes([teacher], console)
    config = dataclasses.replace(config, image_size=teacher.size, store_size=config.store_size or 2 * teacher.size)
    config = config.resolve(splits["train_split"].examples)

    def decode(flag: str) -> MemoryStore:
        def progress(done: int, total: int) -> None:
            console.progress(f"decode {splits[flag].name}", done, total)

        return MemoryStore(dataset, splits[flag], config.store_size, progress)

    train, held_out = decode("train_split"), decode("split")
    evaluator = Evaluator(config, hardware.strategy, held_out, jit_compile=jit_compile)

    def make(images: ImageStore) -> Evaluator:
        return (
            evaluator if images is held_out else Evaluator(config, hardware.strategy, images, jit_compile=jit_compile)
        )

    (found,) = judge(config, (teacher,), Pictures.of(split, held_out, dataset.classes, make), console)
    teacher = found.apply(teacher)
    lower = tuple(precision for precision in precisions if precision != "float32")
    if lower and not bit.is_functional(teacher.model):
        console.info(f"{teacher.name} is a program whose layers cannot be exchanged: only float32 is profiled")
        precisions, lower = ("float32",), ()
    with hardware.strategy.scope():
        cost = quantize.cost(teacher.model, teacher.size)
        converted = teacher_precision.convert_and_compare(
            config, teacher, train, lower, native=hardware.int8_convolutions, jit_compile=jit_compile
        )
        rows = {
            model.precision: _profile(model, check, evaluator, config.batch_size, jit_compile)
            for model, check in [(teacher, None), *converted]
            if model.precision in precisions
        }
    return {
        "teacher": teacher.name,
        "parameters": cost.parameters,
        "image_size": teacher.size,
        "macs": cost.macs,
        "gflops": cost.gflops,
        "value_range": found.value_range,
        "outputs": found.outputs,
        "device": hardware.description,
        "split": split,
        "forms": rows,
    }


def _profile(
    teacher: Teacher,
    check: PrecisionCheck | None,
    evaluator: Evaluator,
    batch_size: int,
    jit_compile: bool,
) -> dict[str, Any]:
    """The row of one precision; `check` compares it with float32, None for float32 itself."""
    from trainer.models import quantize
    from trainer.run.evaluator import EvalResult

    logits = evaluator.teacher_logits((teacher,))
    metrics = EvalResult(evaluator.labels, logits, None).metrics()
    row: dict[str, Any] = {
        "bytes": quantize.cost(teacher.model, teacher.size).bytes,
        "images_per_second": _images_per_second(teacher, batch_size, jit_compile),
    }
    if "student_top1" in metrics:
        row["top1"] = metrics["student_top1"]
    if check is not None:
        row |= {"agreement_top1": check.top1, "kl": check.kl, "views": check.images}
    return row


def _images_per_second(teacher: Teacher, batch_size: int, jit_compile: bool) -> float:
    """Speed of one replica's forward pass: the fastest of a few."""
    import numpy as np

    from trainer.models import quantize

    shape = (batch_size, teacher.size, teacher.size, 3)
    images = np.random.Generator(np.random.Philox(0)).uniform(-1, 1, shape).astype(np.float32)
    forward = quantize.replicated(teacher.logits, jit_compile=jit_compile)
    forward(images)
    seconds = []
    for _ in range(_PASSES):
        start = time.monotonic()
        forward(images)
        seconds.append(time.monotonic() - start)
    return batch_size / min(seconds)


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    size = result["image_size"]
    work = (
        "operations not known"
        if result["macs"] is None
        else f"{result['macs'] / 1e9:.3f} G multiply-adds ({result['gflops']:.3f} GFLOP) an image of {size} px"
    )
    lines = [
        f"{result['teacher']}: {result['parameters']:,} parameters, {work}; {result['device']}",
        "",
        f"| precision | MiB | images/s | top-1 on {result['split']} | agrees with float32 | KL, nats |",
        "|---|---|---|---|---|---|",
    ]
    for precision, row in result["forms"].items():
        top1 = f"{row['top1']:.2%}" if "top1" in row else "no labels"
        agrees = f"{row['agreement_top1']:.2%} of {row['views']}" if "kl" in row else ""
        kl = f"{row['kl']:.2e}" if "kl" in row else ""
        lines.append(
            f"| {precision} | {row['bytes'] / 2**20:.1f} | {row['images_per_second']:,.1f} | {top1} | {agrees} | {kl} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
