"""Sample images for the report, with what teacher and student predict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.output.report import Sample
    from trainer.run.job import Job


def samples(job: Job, outcome: Any, count: int = 16) -> tuple[list[Sample], list[Sample]]:
    """Pictures for the report: views of the run's last batch, and of the final split, with what both models say."""
    import numpy as np
    import tensorflow as tf

    from trainer.method import views
    from trainer.models import value_range
    from trainer.models.teachers import ensemble, teacher_logits
    from trainer.output import report

    settings, names = job.config, job.stores[job.config.final_split].classes

    def best(logits: Any) -> list[list[tuple[str, float]]]:
        shares = tf.nn.softmax(tf.cast(logits, tf.float32)).numpy()
        return [[(names[c], float(row[c])) for c in np.argsort(-row)[:3]] for row in shares]

    def pixels(view: Any) -> Any:
        return np.clip((np.asarray(view) + 1.0) * 127.5 + 0.5, 0, 255).astype(np.uint8)

    step = job.step - 1
    ids = job.order.batches(step, 1)[0]
    count = min(count, settings.batch_size)
    whole = views.BatchRows.of(0, 1, settings.batch_size, views.mixup_partner(settings))
    # The first rows alone, each beside its partner: the layout of "reverse", whatever the partner is.
    pairs = [part[:count] for part in whole.split_partners(whole.rows)]
    rows = views.BatchRows(tf.concat(pairs, 0), "reverse") if whole.partner else views.BatchRows(pairs[0], "")
    chosen = ids[rows.rows.numpy()]
    made = views.training_views(
        settings,
        tf.constant(job.train.take(chosen)),
        tf.constant(job.train.sizes[chosen]),
        rows,
        tf.constant(step),
        () if job.targets else tuple({t.size: None for t in job.teachers}),
    )
    own, other = rows.split_partners(chosen)
    student = best(job.student(value_range.to_range(made.student, settings.student_range), training=False))
    teacher: list[list[tuple[str, float]]] = [[] for _ in student]
    if job.targets:
        teacher = best(ensemble([tf.constant(table[own]) for table in job.targets], settings.ensemble))
    elif job.teachers:
        teacher = best(ensemble(teacher_logits(job.teachers, made.teachers), settings.ensemble))

    def caption(share: float, a: int, b: int) -> str:
        return f"{share:.0%} of image {a}, the rest of image {b}" if rows.partner else f"image {a}"

    seen = [
        report.Sample(picture, caption(share, a, b), t, s, None)
        for picture, share, a, b, t, s in zip(
            pixels(made.student), made.mixup_ratios.numpy()[:, 0], own, other, teacher, student, strict=True
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
