"""Sample images for the report, with what teacher and student predict."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from trainer.method import views
from trainer.models.teachers import ensemble, teacher_logits
from trainer.models.value_range import to_range
from trainer.output.report import Sample
from trainer.run.evaluator import EvalResult
from trainer.run.job import Job

_TOP = 3  # classes shown for each model


def train_samples(job: Job, count: int = 16) -> list[Sample]:
    """Training views of the run's last batch.

    Args:
        job: trained; its step is >= 1.
        count: largest number of samples.
    """
    config = job.config
    step = job.step - 1
    count = min(count, config.batch_size)
    batch = views.BatchRows.of(0, 1, config.batch_size, views.mixup_partner(config))
    # Only the first rows and their mixup partners, in the layout "reverse" for any mode.
    pairs = [part[:count] for part in batch.split_partners(batch.rows)]
    batch_rows = views.BatchRows(tf.concat(pairs, 0), "reverse") if batch.partner else views.BatchRows(pairs[0], "")
    ids = job.sampler.batches(step, 1)[0][batch_rows.rows.numpy()]
    batch_views = views.training_views(
        config,
        tf.constant(job.train_store.take(ids)),
        tf.constant(job.train_store.sizes[ids]),
        batch_rows,
        tf.constant(step),
        () if job.targets else tuple({teacher.size: None for teacher in job.teachers}),
    )
    image_ids, partner_ids = batch_rows.split_partners(ids)
    classes = job.eval_stores[config.final_split].classes
    student = _top_classes(job.student(to_range(batch_views.student, config.student_range), training=False), classes)
    teacher: list[list[tuple[str, float]]] = [[] for _ in student]
    if job.targets:
        logits = [tf.constant(table[image_ids]) for table in job.targets]
        teacher = _top_classes(ensemble(logits, config.ensemble), classes)
    elif job.teachers:
        logits = teacher_logits(job.teachers, batch_views.teachers)
        teacher = _top_classes(ensemble(logits, config.ensemble), classes)

    def caption(share: float, image: int, partner: int) -> str:
        return f"{share:.0%} of image {image}, the rest of image {partner}" if batch_rows.partner else f"image {image}"

    shares = batch_views.mixup_ratios.numpy()[:, 0]
    columns = zip(_pixels(batch_views.student), shares, image_ids, partner_ids, teacher, student, strict=True)
    return [Sample(pixels, caption(share, a, b), t, s, None) for pixels, share, a, b, t, s in columns]


def eval_samples(job: Job, evaluation: EvalResult, count: int = 16) -> tuple[list[Sample], str]:
    """Evaluation views of the final split, and how they were chosen, as a sentence.

    They are evenly spaced. Where no image has a label to judge the answers by, up to half are those
    on which the two models disagree with the highest confidence.

    Args:
        job: trained.
        evaluation: of the final split.
        count: largest number of samples.
    """
    config, store = job.config, job.eval_stores[job.config.final_split]
    ids = np.linspace(0, len(store) - 1, min(count, len(store))).astype(int)
    choice = "They are evenly spaced over the split."
    if evaluation.teacher_logits is not None and not evaluation.labelled:
        first = confident_disagreements(evaluation.teacher_logits, evaluation.student_logits, count // 2)
        if len(first):
            ids = np.concatenate([first, [i for i in ids if i not in first][: len(ids) - len(first)]]).astype(int)
            choice = (
                f"The first {len(first)} are those on which the models disagree with the highest confidence; "
                "the others are evenly spaced over the split."
            )
    images, sizes = tf.constant(store.take(ids)), tf.constant(store.sizes[ids])
    view = views.evaluation_view(config, images, sizes, config.image_size)
    student = _top_classes(evaluation.student_logits[ids], store.classes)
    teacher: list[list[tuple[str, float]]] = [[] for _ in student]
    if evaluation.teacher_logits is not None:
        teacher = _top_classes(evaluation.teacher_logits[ids], store.classes)
    labels = [store.classes[label] if label >= 0 else None for label in store.labels[ids]]
    columns = zip(_pixels(view), ids, teacher, student, labels, strict=True)
    return [Sample(pixels, f"image {number}", t, s, label) for pixels, number, t, s, label in columns], choice


def confident_disagreements(teacher: np.ndarray, student: np.ndarray, count: int) -> np.ndarray:
    """The examples on which two models are sure of different classes.

    Args:
        teacher: float32 logits [n, classes].
        student: the same.
        count: largest number of examples.

    Returns:
        int [at most count]: examples with different top-1 classes, by the probability that the less
        sure model gives its own, highest first.
    """
    confidence = np.minimum(*(tf.nn.softmax(logits).numpy().max(1) for logits in (teacher, student)))
    different = np.flatnonzero(teacher.argmax(1) != student.argmax(1))
    return different[np.argsort(-confidence[different], kind="stable")][:count]


def _top_classes(logits: tf.Tensor | np.ndarray, classes: tuple[str, ...]) -> list[list[tuple[str, float]]]:
    """For each row of logits [n, classes] its likeliest classes and their probabilities."""
    probabilities = tf.nn.softmax(tf.cast(logits, tf.float32)).numpy()
    return [[(classes[c], float(row[c])) for c in np.argsort(-row)[:_TOP]] for row in probabilities]


def _pixels(view: tf.Tensor) -> np.ndarray:
    """Views in [-1, 1] as uint8."""
    return np.clip((np.asarray(view) + 1.0) * 127.5 + 0.5, 0, 255).astype(np.uint8)
