"""What a teacher costs and knows, and what its cheap forms would: size, operations, speed here, agreement.

    python -m trainer.profile --teacher=keras:teacher.keras --data=DATA --split=test

For each form (--teacher_precision of the main job): memory, images a second on this machine, top-1 on a split, and agreement with
the float32 original on views of the training split, which is what the main job refuses a form for. JSON goes to standard output,
a table to standard error. Exit codes: 0 done; 2 bad flags; 3 bad data or teacher.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from absl import flags

from trainer import cli
from trainer.core import options
from trainer.core.config import Config
from trainer.core.errors import ConfigError
from trainer.core.flags import SHARED, from_flags, shared_flags

_SHARED = ("train_split", "views", "mixup", "min_crop_area", "image_size", "seed")
_PASSES = 3  # timed, after one that compiles


def define_flags(values: flags.FlagValues) -> None:
    """The verb's flags: some of the main job's, and its own."""
    shared_flags(values, *SHARED, *_SHARED, batch_size=64)
    own: dict[str, Any] = {"flag_values": values, "module_name": "profile"}
    flags.DEFINE_string("split", "test", "Split of --data that top-1 is measured on.", **own)
    flags.DEFINE_multi_enum(
        "form", ["float32", "bfloat16", "int8"], options.TEACHER_PRECISIONS, "Form to look at; repeatable.", **own
    )


def main(argv: list[str] | None = None) -> int:
    """The verb; returns an exit code."""
    return cli.run(__doc__, define_flags, _main, argv)


def _main(values: Any) -> None:
    from trainer.core.console import Console

    chosen = from_flags(values, steps=1)
    for flag in ("data", "teacher"):
        if (count := len(getattr(chosen, flag))) != 1:
            raise ConfigError(f"--{flag} is given {count} times: give one")
    console = Console()
    result = run(chosen, values.split, tuple(dict.fromkeys(values.form)), console)
    console.info(table(result))
    print(json.dumps(result, indent=1))


def run(chosen: Config, split: str, wanted: tuple[str, ...], console: Any) -> dict[str, Any]:
    """Looks at one teacher.

    Args:
        chosen: with one teacher.
        split: that accuracy is measured on.
        wanted: forms.
        console: where people read.

    Returns:
        teacher, parameters, image_size, macs and gflops of one image (None: not known), and for each of `forms` its bytes,
        images_per_second, top1, and against float32 agreement_top1 and kl.
    """
    import dataclasses

    from trainer.data.dataset import Dataset
    from trainer.data.store import MemoryStore
    from trainer.models import bit, quantize, teachers
    from trainer.run import accelerator, teacher_precision
    from trainer.run.evaluator import Evaluator

    dataset = Dataset.load(chosen.data[0])
    parts = {flag: dataset.split(name, flag) for flag, name in (("train_split", chosen.train_split), ("split", split))}
    hardware = accelerator.resolve(chosen.tpu)
    jit_compile = hardware.jit_compile(chosen.jit_compile)
    with hardware.strategy.scope():
        (teacher,) = teachers.load(chosen, len(dataset.classes))
    for note in teacher.notes:
        console.info(note)
    settings = dataclasses.replace(chosen, image_size=teacher.size, store_size=chosen.store_size or 2 * teacher.size)
    settings = settings.resolve(parts["train_split"].examples)

    def decode(flag: str) -> MemoryStore:
        part = parts[flag]
        return MemoryStore(
            dataset, part, settings.store_size, lambda done, total: console.progress(f"decode {part.name}", done, total)
        )

    train, held = decode("train_split"), decode("split")
    cheaper = tuple(form for form in wanted if form != "float32")
    if cheaper and not bit.is_functional(teacher.model):
        console.info(f"{teacher.name} is a program whose layers cannot be exchanged: it has no cheap forms")
        wanted, cheaper = ("float32",), ()
    with hardware.strategy.scope():
        cost = quantize.cost(teacher.model, teacher.size)
        others = teacher_precision.convert_and_compare(
            settings, teacher, train, cheaper, native=hardware.int8_convolutions, jit_compile=jit_compile
        )
        evaluator = Evaluator(settings, hardware.strategy, held, jit_compile=jit_compile)
        rows = {}
        for one, compared in [(teacher, None), *others]:
            if one.precision not in wanted:
                continue
            outcome = evaluator.run(lambda images, training, one=one: one.logits(images), ())  # noqa: ARG005
            row: dict[str, Any] = {
                "bytes": quantize.cost(one.model, one.size).bytes,
                "images_per_second": _speed(one, settings.batch_size, jit_compile),
            }
            if "student_top1" in (found := outcome.metrics()):
                row["top1"] = found["student_top1"]
            if compared is not None:
                row |= {"agreement_top1": compared.top1, "kl": compared.kl, "views": compared.images}
            rows[one.precision] = row
    return {
        "teacher": teacher.name,
        "parameters": cost.parameters,
        "image_size": teacher.size,
        "macs": cost.macs,
        "gflops": cost.gflops,
        "device": hardware.description,
        "split": split,
        "forms": rows,
    }


def _speed(teacher: Any, batch: int, jit_compile: bool) -> float:
    """Images a second of one replica's forward pass: the best of a few."""
    import time

    import numpy as np

    from trainer.models import quantize

    view = (
        np.random.Generator(np.random.Philox(0))
        .uniform(-1, 1, (batch, teacher.size, teacher.size, 3))
        .astype(np.float32)
    )
    run = quantize.replicated(teacher.logits, jit_compile=jit_compile)
    run(view)
    seconds = []
    for _ in range(_PASSES):
        began = time.monotonic()
        run(view)
        seconds.append(time.monotonic() - began)
    return batch / min(seconds)


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    size = result["image_size"]
    work = (
        "operations not known"
        if result["macs"] is None
        else (f"{result['macs'] / 1e9:.3f} G multiply-adds ({result['gflops']:.3f} GFLOP) an image of {size} px")
    )
    lines = [
        f"{result['teacher']}: {result['parameters']:,} parameters, {work}; {result['device']}",
        "",
        f"| form | MiB | images/s | top-1 on {result['split']} | agrees with float32 | KL, nats |",
        "|---|---|---|---|---|---|",
    ]
    for form, row in result["forms"].items():
        top1 = f"{row['top1']:.2%}" if "top1" in row else ""
        agrees = f"{row['agreement_top1']:.2%} of {row['views']}" if "kl" in row else ""
        kl = f"{row['kl']:.2e}" if "kl" in row else ""
        lines.append(
            f"| {form} | {row['bytes'] / 2**20:.1f} | {row['images_per_second']:,.1f} | {top1} | {agrees} | {kl} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
