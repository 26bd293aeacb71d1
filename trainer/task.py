"""Distil a big frozen image classifier into a small one by function matching (Beyer et al. 2021, arXiv 2106.05237).

    python -m trainer.task --data=DATA --teacher=keras:teacher.keras --student=bit-r50x1 --epochs=1000 --workdir=RUN

The same command goes on where an earlier one stopped; on a finished run it says so. A file of flags: --flagfile=FILE.
Exit codes: 0 done; 2 bad flags; 3 bad data, teacher or checkpoint; 4 training diverged; 75 stopped early, resumable.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trainer import __version__, cli, config, environment, recipes
from trainer.config import Config
from trainer.errors import DataError

if TYPE_CHECKING:
    from trainer.journal import Screen
    from trainer.loop import Job
    from trainer.report import Sample


def main(argv: list[str] | None = None) -> int:
    """The verb; returns an exit code."""
    return cli.run(
        __doc__,
        config.define_flags,
        lambda values: _main(on_vertex(config.from_flags(values, recipes.find(values.recipe)))),
        argv,
    )


def on_vertex(chosen: Config) -> Config:
    """The configuration with the folders that Vertex AI names by variables, where flags do not say otherwise."""
    return dataclasses.replace(
        chosen,
        workdir=environment.workdir(chosen.workdir),
        model_dir=environment.model_dir(chosen.model_dir),
        tensorboard_dir=environment.tensorboard_dir(chosen.tensorboard_dir),
    )


def _main(chosen: Config) -> None:
    from trainer.journal import Screen

    run(chosen, Screen())


def run(chosen: Config, screen: Screen) -> dict[str, Any]:
    """The whole job; returns what result.json holds (for --check and --dry_run: nothing).

    Args:
        chosen: as the user gave it.
        screen: where progress goes.

    Raises:
        FunmatchError: see trainer.errors.
    """
    chosen.require_complete()
    import tensorflow as tf

    from trainer import accelerator, check, files, lock, loop

    resolved, _, _, identity = loop.identify(chosen)
    print_ = config.fingerprint(identity)
    if done := _finished(chosen, print_):
        screen.say(f"{chosen.workdir} is finished: nothing to do. {_summary(done)}")
        return done
    with contextlib.ExitStack() as stack:
        held: lock.Held = lock.Unlocked()
        if chosen.check:
            check.surroundings(chosen, screen)
        elif not chosen.dry_run:
            files.require_writable(chosen.workdir, "--workdir")
            if environment.is_chief():
                held = stack.enter_context(lock.hold(chosen.workdir, screen.say, chosen.lease_seconds))
        hardware = accelerator.resolve(chosen.tpu, screen.say)
        screen.say(f"{hardware.description}; {resolved.steps:,} steps of {resolved.batch_size} images")
        job = loop.build(chosen, hardware, screen)
        if chosen.check or chosen.dry_run:
            _rehearse(job, screen)
            return {}
        held.check()
        if hardware.chief:
            _write_json(
                files.join(chosen.workdir, "config.json"),
                {"config": job.config.to_dict(), "identity": identity},
            )
        journal, checkpoints = loop.open_run(job, held.check)
        try:
            loop.train(job, journal, checkpoints, screen)
            if job.config.export_from == "best":
                loop.take_best(job, checkpoints)
            return finish(job, journal, screen, print_, held.check)
        except tf.errors.OpError as error:
            if hardware.workers > 1:
                raise accelerator.worker_lost(error) from error
            raise


def finish(
    job: Job, journal: Any, screen: Screen, fingerprint: str, before_commit: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Measures on the final split, exports, reports, and writes result.json last: with it the run is finished.

    `before_commit` raises where this process must not write any more.
    """
    from trainer import export, files, loop, report

    settings = job.config
    outcome = loop.evaluate(job, settings.final_split, "final", journal, screen)
    measured = outcome.metrics()
    rates = [row["images_per_second"] for row in journal.rows if row["kind"] == "train"]
    result = measured | {
        "split": settings.final_split,
        "left_out": {name: [dataclasses.asdict(bad) for bad in bads] for name, bads in job.left_out.items()},
        "examples": len(job.train),
        "steps": job.step,
        "batch_size": settings.batch_size,
        "images_per_second": rates[-1] if rates else 0.0,
        "wall_seconds": job.seconds,
        "seed": settings.seed,
        "device": job.accelerator.description,
        "fingerprint": fingerprint,
        "exported": settings.export_from,
        "exported_step": job.best["step"] if settings.export_from == "best" else job.step,
        "best": job.best,
        "versions": versions(),
    }
    if not job.accelerator.chief:
        screen.say(f"this machine is done: {_summary(result)}; the chief writes the results")
        return result
    store = job.stores[settings.final_split]
    card = {
        "student": settings.student,
        "parameters": f"{job.student.count_params():,}",
        "teacher": ", ".join(settings.teacher) or "none, trained from labels",
        "trained on": f"{', '.join(settings.data)}, {settings.train_split} ({len(job.train):,} images)",
        "measured on": f"{settings.final_split} ({len(store):,} images)",
        **{name: f"{value:.4f}" for name, value in measured.items()},
        "steps": job.step,
        **({"weights of step": job.best["step"]} if settings.export_from == "best" else {}),
        "images a step": settings.batch_size,
    }
    before_commit()
    files.remove(files.join(settings.workdir, "result.json"))  # one of other weights does not outlive their export
    folder = files.join(settings.workdir, "export")
    export.write(folder, job.student, store.classes, settings, card)
    if settings.model_dir:
        files.copy_tree(files.join(folder, "saved_model"), settings.model_dir, "the served model", "saved_model.pb")
    trained_on, measured_on = samples(job, outcome)
    page = report.render(
        title=files.join(settings.workdir).rstrip("/").rsplit("/", 1)[-1],
        config=settings.to_dict(),
        history=journal.rows,
        result=result,
        train_samples=trained_on,
        eval_samples=measured_on,
        predictions=report.Predictions(
            labels=outcome.labels,
            teacher=None if outcome.teacher is None else outcome.teacher.argmax(1),
            student=outcome.student.argmax(1),
            classes=list(store.classes),
        ),
    )
    files.write(files.join(settings.workdir, "report.html"), page.encode(), "the report")
    journal.flush()
    export.clean(folder)
    before_commit()
    _write_json(files.join(settings.workdir, "result.json"), result)
    screen.say(f"finished: {_summary(result)}")
    screen.say(f"report {files.join(settings.workdir, 'report.html')}, model {folder}")
    return result


def samples(job: Job, outcome: Any, count: int = 16) -> tuple[list[Sample], list[Sample]]:
    """Pictures for the report: views of the run's last batch, and of the final split, with what both models say."""
    import numpy as np
    import tensorflow as tf

    from trainer import report, views
    from trainer.models.teachers import ensemble, opinions

    settings, names = job.config, job.stores[job.config.final_split].classes

    def best(logits: Any) -> list[list[tuple[str, float]]]:
        shares = tf.nn.softmax(tf.cast(logits, tf.float32)).numpy()
        return [[(names[c], float(row[c])) for c in np.argsort(-row)[:3]] for row in shares]

    def pixels(view: Any) -> Any:
        return np.clip((np.asarray(view) + 1.0) * 127.5 + 0.5, 0, 255).astype(np.uint8)

    step = job.step - 1
    ids = job.order.batches(step, 1)[0]
    count = min(count, settings.batch_size)
    whole = views.Rows.of(0, 1, settings.batch_size, views.partner(settings))
    # The first rows alone, each beside its partner: the layout of "reverse", whatever the partner is.
    pairs = [part[:count] for part in whole.split(whole.numbers)]
    rows = views.Rows(tf.concat(pairs, 0), "reverse") if whole.partner else views.Rows(pairs[0], "")
    chosen = ids[rows.numbers.numpy()]
    made = views.training_views(
        settings,
        tf.constant(job.train.take(chosen)),
        tf.constant(job.train.sizes[chosen]),
        rows,
        tf.constant(step),
        () if job.targets else tuple({t.size: None for t in job.teachers}),
    )
    own, other = rows.split(chosen)
    student = best(job.student(views.to_range(made.student, settings.student_range), training=False))
    teacher: list[list[tuple[str, float]]] = [[] for _ in student]
    if job.targets:
        teacher = best(ensemble([tf.constant(table[own]) for table in job.targets], settings.ensemble))
    elif job.teachers:
        teacher = best(ensemble(opinions(job.teachers, made.teachers), settings.ensemble))

    def caption(share: float, a: int, b: int) -> str:
        return f"{share:.0%} of image {a}, the rest of image {b}" if rows.partner else f"image {a}"

    seen = [
        report.Sample(picture, caption(share, a, b), t, s, None)
        for picture, share, a, b, t, s in zip(
            pixels(made.student), made.share.numpy()[:, 0], own, other, teacher, student, strict=True
        )
    ]
    store = job.stores[settings.final_split]
    picks = np.linspace(0, len(store) - 1, min(count, len(store))).astype(int)
    view = views.evaluation_view(
        settings, tf.constant(store.take(picks)), tf.constant(store.sizes[picks]), settings.image_size
    )
    student = best(outcome.student[picks])
    teacher = best(outcome.teacher[picks]) if outcome.teacher is not None else [[] for _ in student]
    truths = [names[label] if label >= 0 else None for label in store.labels[picks]]
    measured = [
        report.Sample(picture, f"image {number}", t, s, truth)
        for picture, number, t, s, truth in zip(pixels(view), picks, teacher, student, truths, strict=True)
    ]
    return seen, measured


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    import keras
    import numpy
    import tensorflow

    return {
        "funmatch": __version__,
        "tensorflow": tensorflow.__version__,
        "keras": keras.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def _rehearse(job: Job, screen: Screen) -> None:
    """Two short turns of the real step, of which nothing is kept, and the plan that follows from them."""
    import time

    from trainer import check

    settings = job.config
    began = time.monotonic()
    metrics = job.advance(1)
    compiled = time.monotonic() - began
    screen.say(
        f"first step: loss {metrics['loss']:.4f}, gradient norm {metrics['grad_norm']:.4f}, {compiled:.1f} s with compilation"
    )
    if settings.check:
        check.built(job, screen)
        screen.say("check passed: accelerator, data, teacher, workdir and the first batch are fine")
        return
    began = time.monotonic()
    job.advance(2)
    rate = 2 * settings.batch_size / (time.monotonic() - began)
    images = settings.steps * settings.batch_size
    state = sum(array.nbytes for array in job.state().values())
    screen.say(
        f"plan: {settings.steps:,} steps = {images:,} images = {images / len(job.train):,.1f} epochs of {len(job.train):,}; "
        f"{rate:,.0f} images/s here: {images / rate / 3600:.2f} h; a checkpoint is {state / 2**20:.1f} MiB, "
        f"every {settings.checkpoint_every:,} steps, {settings.keep_checkpoints} kept. Nothing was written"
    )


def _finished(chosen: Config, fingerprint: str) -> dict[str, Any] | None:
    """result.json of this very run, if it is there and is about the weights that are asked for.

    Raises:
        DataError: it is there and belongs to another configuration.
    """
    from trainer import files

    workdir = chosen.workdir
    path = files.join(workdir, "result.json")
    if not files.exists(path):
        return None
    try:
        result = json.loads(files.read(path, "the result"))
        same, exported = result["fingerprint"] == fingerprint, result.get("exported", "last")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}): delete it to have it made again") from error
    if not same:
        raise DataError(
            f"--workdir={workdir} holds a finished run of another configuration (see its config.json): choose another workdir"
        )
    return result if exported == chosen.export_from else None


def _summary(result: dict[str, Any]) -> str:
    told = [
        ("student", "student_top1"),
        ("teacher", "teacher_top1"),
        ("agreement", "agreement_top1"),
    ]
    return ", ".join(f"{word} {100 * result[name]:.1f}%" for word, name in told if name in result)


def _write_json(path: str, value: dict[str, Any]) -> None:
    from trainer import files

    files.write(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode(), "a result")


if __name__ == "__main__":
    sys.exit(main())
