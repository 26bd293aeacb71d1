"""Judges teachers on images before the first step: what they take and return, how good they are.

A wrong value range, outputs that are taken for others, or classes in another order make a wrong
student without an error. So each teacher is run on images of the evaluation split first. What was
found decides the weights; `teacher.json` in the workdir keeps it for the processes that resume.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from trainer.core.config import Config
from trainer.core.console import Console
from trainer.core.errors import DataError
from trainer.core.options import RANGES
from trainer.data.store import ImageStore
from trainer.io import files
from trainer.models import teachers
from trainer.models.teachers import Teacher
from trainer.models.value_range import Evidence
from trainer.run import teacher_statistics as statistics
from trainer.run.accelerator import Accelerator
from trainer.run.evaluator import Evaluator
from trainer.run.plan import RunPlan
from trainer.run.stores import Stores
from trainer.run.teacher_statistics import Accuracy

FILE = "teacher.json"
SAMPLE = 512  # images that a teacher is judged on, of a larger split
MIN_IMAGES = 30  # labelled images below which a teacher at chance is warned about, not refused
_GOOD = 0.8  # accuracy from which a range that the model itself tells is not questioned
_MUCH = 0.2  # gain in accuracy that another range must bring to be preferred to that
_VIEW_NAMES = {"central": "on the central crop", "squash": "squashed", "pad": "padded"}


@dataclasses.dataclass(frozen=True)
class Decision:
    """What was found out about a teacher.

    Attributes:
        teacher: value of `--teacher`.
        value_range: that it takes.
        range_reason: why, a clause.
        outputs: "logits", "probabilities" or "sigmoid", as its model returns them.
        outputs_reason: why, a clause.
        view: of `views.TEACHER_VIEWS`, on which its own accuracy is measured.
        split: that it was judged on.
        images: number of images.
        labelled: how many of them have a label; 0: no accuracy is known.
        top1: accuracy on the central crop, in [0, 1]; None if it is not known.
        interval: its 95 % interval.
        chance: share of right answers without looking.
        own_view_top1: accuracy on `view`; None if that is the central crop.
    """

    teacher: str
    value_range: str
    range_reason: str
    outputs: str
    outputs_reason: str
    view: str = "central"
    split: str = ""
    images: int = 0
    labelled: int = 0
    top1: float | None = None
    interval: tuple[float, float] | None = None
    chance: float | None = None
    own_view_top1: float | None = None

    def findings(self) -> dict[str, Any]:
        """The fields but for `teacher`, which holds a path, as values of JSON."""
        return json.loads(json.dumps({k: v for k, v in dataclasses.asdict(self).items() if k != "teacher"}))

    def apply(self, teacher: Teacher) -> Teacher:
        """The teacher with what was found."""
        return dataclasses.replace(
            teacher,
            value_range=self.value_range,
            probabilities=self.outputs == "probabilities",
            sigmoid=self.outputs == "sigmoid",
            view=self.view,
        )


class _Sample(ImageStore):
    """Some examples of a store."""

    def __init__(self, store: ImageStore, ids: np.ndarray) -> None:
        self._store, self._ids = store, ids
        self.labels, self.sizes = store.labels[ids], store.sizes[ids]
        self.classes, self.shape = store.classes, store.shape

    def take(self, ids: np.ndarray) -> np.ndarray:
        """See `ImageStore`."""
        return self._store.take(self._ids[ids])


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The images that teachers are judged on.

    Attributes:
        split: name of the split.
        evaluator: runs teachers on them.
        labels: int32 [n], -1 where there is none.
        classes: names; empty if the data has none.
        whole: they are the whole split, so that `evaluator` can serve its evaluations.
    """

    split: str
    evaluator: Evaluator
    labels: np.ndarray
    classes: tuple[str, ...]
    whole: bool

    @classmethod
    def of(
        cls, split: str, store: ImageStore, classes: tuple[str, ...], make: Callable[[ImageStore], Evaluator]
    ) -> Pictures:
        """All images of a small split, or `SAMPLE` evenly spaced ones, with labels if any has
        one.

        Args:
            split: its name.
            store: its images.
            classes: names.
            make: makes the evaluator of a store.
        """
        if len(store) <= SAMPLE:
            return cls(split, make(store), store.labels, classes, True)
        labelled = np.flatnonzero(store.labels >= 0)
        ids = labelled if len(labelled) else np.arange(len(store))
        if len(ids) > SAMPLE:
            ids = ids[np.arange(SAMPLE) * len(ids) // SAMPLE]
        sample = _Sample(store, ids.astype(np.int32))
        return cls(split, make(sample), sample.labels, classes, False)


def settle(
    plan: RunPlan,
    accelerator: Accelerator,
    loaded: tuple[Teacher, ...],
    stores: Stores,
    console: Console,
    *,
    begun_before: bool,
) -> tuple[tuple[Teacher, ...], RunPlan, tuple[Decision, ...], dict[str, Evaluator]]:
    """Judges the teachers of a run, or takes what an earlier process of it found.

    Args:
        plan: of the run.
        accelerator: that the teachers run on.
        loaded: as `teachers.load` gives them.
        stores: of the run.
        console: gets a line or more for each teacher.
        begun_before: the run was begun by version 0.1, which found out nothing.

    Returns:
        The teachers with range, outputs and view; the plan with them in its configuration; the
        decisions; and the evaluator of a split if it was made for this, by the split's name.

    Raises:
        DataError: a teacher cannot be used: see `judge`.
    """
    config = plan.config
    if not loaded:
        return loaded, plan, (), {}
    path = "" if config.check or config.dry_run or not config.workdir else files.join(config.workdir, FILE)
    evaluators: dict[str, Evaluator] = {}
    decisions = as_before(loaded, console) if begun_before else _read(path, plan, loaded, console) if path else None
    if decisions is None:
        split, store = config.eval_split, stores.eval[config.eval_split]
        if (store.labels < 0).all() and (stores.train.labels >= 0).any():
            split, store = config.train_split, stores.train

        def make(images: ImageStore) -> Evaluator:
            jit_compile = accelerator.jit_compile(config.jit_compile)
            return Evaluator(config, accelerator.strategy, images, jit_compile=jit_compile)

        pictures = Pictures.of(split, store, plan.eval_set.classes, make)
        if pictures.whole and store is stores.eval.get(split):
            evaluators[split] = pictures.evaluator
        decisions = judge(config, loaded, pictures, console)
        if path and accelerator.chief:
            content = {"run": plan.run_id, "teachers": [dataclasses.asdict(decision) for decision in decisions]}
            files.write(path, (json.dumps(content, indent=1) + "\n").encode(), "what was found about the teachers")
    # Views do not affect the weights, so a flag may change them in a resumed run.
    flags = [teachers.of_teacher(config.teacher_view, position, "auto") for position in range(len(loaded))]
    decisions = tuple(
        decision if flag in ("auto", decision.view) else dataclasses.replace(decision, view=flag, own_view_top1=None)
        for decision, flag in zip(decisions, flags, strict=True)
    )
    config = dataclasses.replace(
        config,
        teacher_range=tuple(decision.value_range for decision in decisions),
        teacher_view=tuple(decision.view for decision in decisions),
    )
    loaded = tuple(decision.apply(teacher) for decision, teacher in zip(decisions, loaded, strict=True))
    return loaded, dataclasses.replace(plan, config=config), decisions, evaluators


def _read(path: str, plan: RunPlan, loaded: tuple[Teacher, ...], console: Console) -> tuple[Decision, ...] | None:
    """What an earlier process of this very run found; None if there was none."""
    if not files.exists(path):
        return None
    try:
        content = json.loads(files.read(path, "what was found about the teachers"))
        if content["run"] != plan.run_id or len(content["teachers"]) != len(loaded):
            return None  # of a run that was stopped before its first checkpoint
        found = [_tuples(value) for value in content["teachers"]]
        decisions = tuple(
            Decision(**(value | {"teacher": teacher.name})) for value, teacher in zip(found, loaded, strict=True)
        )
    except (ValueError, KeyError, TypeError):
        raise DataError(
            f"{path} is damaged, and it says what the teachers of this run take: restore it, or take another --workdir"
        ) from None
    for decision in decisions:
        console.info(f"teacher {decision.teacher}: takes {decision.value_range}, as found when this run began")
    return decisions


def _tuples(value: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(item) if isinstance(item, list) else item for name, item in value.items()}


def begun_before(plan: RunPlan) -> bool:
    """Whether a run was begun by version 0.1: it has a checkpoint, but not what is found here."""
    workdir = plan.config.workdir
    if not workdir or files.exists(files.join(workdir, FILE)):
        return False
    return any(name.startswith("checkpoint-") for name in files.names(files.join(workdir, "checkpoints")))


def as_before(loaded: tuple[Teacher, ...], console: Console) -> tuple[Decision, ...]:
    """What version 0.1 assumed about the teachers, for a run that it began."""
    decisions = []
    for teacher in loaded:
        value_range = "-1,1" if teacher.evidence.strength in ("none", "layers", "convention") else teacher.value_range
        if teacher.evidence.value_range not in ("", value_range):
            console.warning(
                f"teacher {teacher.name} seems to take {teacher.evidence.value_range} ({teacher.evidence.reason}), but "
                f"this run began with a version that showed it {value_range}, and keeps that; start it again in another "
                "--workdir for the right range"
            )
        decisions.append(
            Decision(teacher.name, value_range, "as this run began", _outputs(teacher), "as this run began")
        )
    return tuple(decisions)


def judge(
    config: Config,
    loaded: Sequence[Teacher],
    pictures: Pictures,
    console: Console,
    *,
    refuse: bool = True,
    role: str = "teacher",
) -> tuple[Decision, ...]:
    """Finds what each teacher takes and returns, and how good it is.

    Args:
        config: teacher_range, teacher_view, force_teacher.
        loaded: as `teachers.load` gives them.
        pictures: to judge on.
        console: gets the findings.
        refuse: raise where a teacher cannot be used; else only warn.
        role: what messages and flags call it.

    Raises:
        DataError: on these images the range is not clear, or the teacher is not finite, constant,
            at chance, or knows the classes in another order; not with `--force_teacher`.
    """
    decisions = []
    for position, teacher in enumerate(loaded):
        if teacher.name.startswith("random:"):
            reason = "it is untrained"
            decisions.append(Decision(teacher.name, teacher.value_range, reason, _outputs(teacher), reason))
            continue
        view = teachers.of_teacher(config.teacher_view, position, "auto")
        decisions.append(_Judge(teacher, pictures, console, refuse and not config.force_teacher, role).decide(view))
    return tuple(decisions)


def _outputs(teacher: Teacher) -> str:
    return "probabilities" if teacher.probabilities else "sigmoid" if teacher.sigmoid else "logits"


class _Judge:
    """Judges one teacher."""

    def __init__(self, teacher: Teacher, pictures: Pictures, console: Console, refuse: bool, role: str) -> None:
        self._role, self._pictures, self._console, self._refuse = role, pictures, console, refuse
        self._name, self._teacher = teacher.name, teacher
        self._rows = np.flatnonzero(pictures.labels >= 0)
        self._labels = pictures.labels[self._rows]

    def decide(self, view: str) -> Decision:
        """The decision, with a view of `views.TEACHER_VIEWS` or "auto"."""
        self._find_range()
        self._find_outputs()
        teacher, evidence = self._teacher, self._teacher.evidence
        self._say(f"takes {teacher.value_range} ({evidence.reason}), returns {teacher.outputs}")
        logits = self._logits(teacher, "central")
        decision = Decision(
            teacher=self._name,
            value_range=teacher.value_range,
            range_reason=evidence.reason,
            outputs=_outputs(teacher),
            outputs_reason=teacher.outputs,
            split=self._pictures.split,
            images=len(logits),
            labelled=len(self._rows),
        )
        if not self._require_alive(logits):
            return decision
        if not len(self._rows):
            self._console.info(
                f"{self._role} {self._name}: {self._pictures.split} has no labels to judge it by; it answers "
                f"{len(np.unique(logits.argmax(1)))} of {logits.shape[1]} classes on {len(logits):,} images, with a mean "
                f"confidence of {statistics.mean_confidence(logits):.0%}"
            )
            return dataclasses.replace(decision, view="central" if view == "auto" else view)
        correct = self._right(logits)
        accuracy = self._accuracy(correct)
        decision = dataclasses.replace(
            decision, top1=accuracy.share, interval=accuracy.interval, chance=accuracy.chance
        )
        self._say(f"{accuracy}", on=True)
        view = self._choose_view(view, correct)
        own = logits if view == "central" else self._logits(teacher, view)
        self._require_knowledge(own)
        share = self._right(own).mean()
        return dataclasses.replace(decision, view=view, own_view_top1=None if view == "central" else float(share))

    def _say(self, text: str, *, on: bool = False) -> None:
        where = f" on {self._pictures.split}" if on else ""
        self._console.info(f"{self._role} {self._name}{where}: {text}")

    def _fail(self, text: str) -> None:
        """Refuses the teacher, or warns."""
        if self._refuse:
            raise DataError(f"--{self._role}={self._name} {text}; or --force_teacher to use it all the same")
        self._console.warning(f"{self._role} {self._name} {text}")

    def _logits(self, teacher: Teacher, view: str) -> np.ndarray:
        def progress(done: int, total: int) -> None:
            if done < total:
                self._console.progress(f"judge the {self._role}", done, total)

        logits = self._pictures.evaluator.teacher_logits((teacher,), (view,), progress)
        self._console.close()
        return logits

    def _right(self, logits: np.ndarray) -> np.ndarray:
        return statistics.right(logits[self._rows], self._labels)

    def _accuracy(self, correct: np.ndarray) -> Accuracy:
        return Accuracy.of(correct, self._labels, self._teacher.classes)

    def _with_range(self, value_range: str) -> Teacher:
        return dataclasses.replace(self._teacher, value_range=value_range)

    def _find_range(self) -> None:
        """Sets the range where model and flags do not say, and questions it where they do."""
        evidence, now = self._teacher.evidence, self._teacher.value_range
        if not self._teacher.outputs:  # the order of the outputs is the same for all that they may be
            self._teacher = dataclasses.replace(self._teacher, probabilities=False, sigmoid=False)
        if evidence.strength == "certain":
            return
        if not len(self._rows):
            if evidence.strength == "flag" and evidence.contradicts:
                self._console.warning(
                    f"{self._role} {self._name} is shown {now} (--{self._role}_range), but seems to take "
                    f"{evidence.contradicts}; no image has a label to tell which is right"
                )
            if evidence.strength == "none":
                why = f" ({evidence.reason})" if evidence.reason else ""
                self._fail(
                    f"does not say which value range it takes{why}, and no image has a label to find it by: give "
                    f"--{self._role}_range={'|'.join(RANGES)}"
                )
            return
        if evidence.strength != "none":
            accuracy = self._accuracy(self._right(self._logits(self._teacher, "central")))
            if accuracy.above_chance and accuracy.share >= _GOOD:
                return
        correct = {name: self._right(self._logits(self._with_range(name), "central")) for name in RANGES}
        figures = ", ".join(f"{name} {rows.mean():.1%}" for name, rows in correct.items())
        tried = f"tried on {len(self._rows):,} labelled images of {self._pictures.split}: {figures}"
        # Shown a wrong range it may give one answer for all images, right for those of one class.
        winner = statistics.clear_winner(correct) if len(np.unique(self._labels)) > 1 else ""
        if evidence.strength == "none":
            best = winner or max(correct, key=lambda name: correct[name].sum())
            self._set_range(best, tried)
            if not winner:
                self._explain(tried)
                why = f" ({evidence.reason})" if evidence.reason else ""
                self._fail(
                    f"does not say which value range it takes{why}, and none is clearly the best ({tried}): give "
                    f"--{self._role}_range={'|'.join(RANGES)}"
                )
        elif winner not in ("", now) and correct[winner].mean() >= correct[now].mean() + _MUCH:
            if evidence.strength == "convention":
                self._set_range(winner, tried)
            else:
                if correct[winner].mean() < _GOOD:
                    self._explain(tried)
                self._fail(
                    f"takes {now} ({evidence.reason}), but {winner} is much better ({tried}): give --{self._role}_range={winner}"
                )

    def _explain(self, tried: str) -> None:
        """Refuses a teacher for which no range is right, if there is a better reason."""
        logits = self._logits(self._teacher, "central")
        if not self._require_varying(logits):
            return
        names = self._pictures.classes
        orders = []
        for name in RANGES if len(names) == logits.shape[1] else ():
            answers = self._logits(self._with_range(name), "central")[self._rows].argmax(1)
            if order := statistics.better_order(answers, self._labels, names):
                orders.append((order.share, name, order))
        if orders:
            _, name, order = max(orders, key=lambda item: item[:2])
            self._set_range(name, tried)
            self._fail(f"{_describe_order(order, names)} (shown {name}; in the data's order, {tried})")

    def _set_range(self, value_range: str, reason: str) -> None:
        evidence = Evidence(value_range, "tried", reason)
        self._teacher = dataclasses.replace(self._teacher, value_range=value_range, evidence=evidence)

    def _find_outputs(self) -> None:
        """Sets what the model returns where its layers and the flags do not say."""
        if self._teacher.outputs:
            if self._teacher.outputs.endswith("(--teacher_outputs)"):
                self._question_outputs()
            return
        values = self._logits(self._teacher, "central")
        kind = teachers.outputs_of_values(values)
        if kind == "sigmoid":
            self._fail(
                f"returns values from {values.min():.2g} to {values.max():.2g} that do not sum to 1: give "
                f"--{self._role}_outputs=sigmoid if they are independent probabilities, probabilities if they are a part or "
                "a power of a softmax, or logits"
            )
            kind = "logits"
        self._teacher = dataclasses.replace(
            self._teacher, probabilities=kind == "probabilities", outputs=f"{kind}, by their values"
        )

    def _question_outputs(self) -> None:
        """Refuses `--teacher_outputs` if the values cannot be what it says."""
        flag = _outputs(self._teacher)
        if flag == "logits":
            return
        bare = dataclasses.replace(self._teacher, probabilities=False, sigmoid=False)
        values = self._logits(bare, "central")
        if not np.isfinite(values).all():
            return
        least, most = values.min(), values.max()
        if least < -teachers.SUM_TOLERANCE or (flag == "sigmoid" and most > 1 + teachers.SUM_TOLERANCE):
            self._fail(
                f"returns values from {least:.2g} to {most:.2g}, which --{self._role}_outputs={flag} says are probabilities: "
                "leave that flag out"
            )
        elif flag == "sigmoid" and teachers.outputs_of_values(values) == "probabilities":
            self._fail(
                f"returns values that sum to 1, which --{self._role}_outputs=sigmoid says are independent: leave that flag out"
            )

    def _require_varying(self, logits: np.ndarray) -> bool:
        """Whether the outputs are finite and depend on the image."""
        bad = int((~np.isfinite(logits).all(axis=1)).sum())
        where = f"images of {self._pictures.split}, shown {self._teacher.value_range}"
        if bad:
            self._fail(
                f"gives outputs that are not finite (NaN or infinite) on {bad:,} of {len(logits):,} {where}: check its "
                f"file and --{self._role}_range"
            )
        elif constant := statistics.is_constant(logits):
            self._fail(
                f"gives the same outputs for all {len(logits):,} {where}: check its file and --{self._role}_range"
            )
        return not bad and not constant

    def _require_alive(self, logits: np.ndarray) -> bool:
        """Whether the outputs say anything about the images at all."""
        if not self._require_varying(logits):
            return False
        uniform = statistics.is_uniform(logits)
        if uniform:
            self._fail(
                f"gives all {logits.shape[1]} classes nearly the same probability on each of {len(logits):,} images of "
                f"{self._pictures.split}: check its file, --{self._role}_range and --{self._role}_outputs "
                f"(taken as {self._teacher.outputs})"
            )
        return not uniform

    def _choose_view(self, view: str, central: np.ndarray) -> str:
        """The view of the teacher's own accuracy; `central`: what it gets right on central
        crops.
        """
        if view == "central":
            return view
        kind = "squash" if view == "auto" else view
        other = self._right(self._logits(self._teacher, kind))
        better = statistics.clear_winner({"central": central, kind: other}) == kind
        chosen = kind if better or view != "auto" else "central"
        if chosen != "central" or abs(other.mean() - central.mean()) >= 0.01:
            shown = _VIEW_NAMES[chosen]
            self._say(
                f"{other.mean():.1%} {_VIEW_NAMES[kind]}, {central.mean():.1%} on the central crop; its own accuracy is "
                f"reported {shown}",
                on=True,
            )
        return chosen

    def _require_knowledge(self, logits: np.ndarray) -> None:
        """Refuses a teacher at chance, or with another order of the classes."""
        answers, names = logits[self._rows].argmax(1), self._pictures.classes
        accuracy = self._accuracy(self._right(logits))
        if len(names) == logits.shape[1] and (order := statistics.better_order(answers, self._labels, names)):
            self._fail(_describe_order(order, names))
        elif len(np.unique(self._labels)) == 1 and accuracy.share > 1 / logits.shape[1]:
            self._console.warning(
                f"{self._role} {self._name} cannot be judged on {self._pictures.split}: all {accuracy.images:,} labelled images "
                f"are of one class, {self._class_name(self._labels[0])}; use a split with images of every class"
            )
        elif not accuracy.above_chance and accuracy.images >= MIN_IMAGES:
            self._fail(
                f"is at chance on {self._pictures.split}: {accuracy}. It was shown {self._teacher.value_range} "
                f"({self._teacher.evidence.reason}): check its file, --{self._role}_range={'|'.join(RANGES)}, and that the data "
                "names the teacher's classes in its order (prepare --classes=FILE)"
            )
        elif not accuracy.above_chance:
            self._console.warning(
                f"{self._role} {self._name} may be at chance: {accuracy}; that is too few images to tell"
            )
        missing = statistics.never_answered(answers, self._labels, logits.shape[1])
        if len(missing) and accuracy.above_chance:
            listed = ", ".join(self._class_name(number) for number in missing[:5])
            self._console.warning(
                f"{self._role} {self._name} never answers {len(missing)} of {logits.shape[1]} classes that have images: {listed}"
                f"{', ...' if len(missing) > 5 else ''}"
            )
        wrong = {
            k: v for k, v in statistics.never_right(answers, self._labels, logits.shape[1]).items() if k not in missing
        }
        if wrong and accuracy.above_chance:
            listed = ", ".join(
                f"{self._class_name(k)} (it answers {self._class_name(v)})" for k, v in list(wrong.items())[:5]
            )
            self._console.warning(
                f"{self._role} {self._name} is right on no image of {len(wrong)} of {logits.shape[1]} classes: {listed}"
                f"{', ...' if len(wrong) > 5 else ''}: check that it has the classes in the data's order"
            )

    def _class_name(self, number: int) -> str:
        return self._pictures.classes[number] if self._pictures.classes else str(number)


def _describe_order(order: statistics.Order, names: tuple[str, ...]) -> str:
    now, then = f"{order.share_now:.1%}", f"{order.share:.1%}"
    listed = ", ".join(names[number] for number in order.classes[:6]) + (", ..." if len(names) > 6 else "")
    remedy = "prepare the data with --classes=FILE, which lists the classes in the teacher's order"
    if order.name in ("text", "natural"):
        remedy = f"prepare the data with --class_order={order.name}"
    if order.name:
        what = {"one later": "one output later", "one earlier": "one output earlier"}.get(
            order.name, f"in {order.name} order"
        )
        return f"fits the classes {what} ({listed}): {then} of the images right, instead of {now}: {remedy}"
    moved = np.flatnonzero(order.classes != np.arange(len(names)))
    pairs = ", ".join(f"{number} means {names[order.classes[number]]}, not {names[number]}" for number in moved[:4])
    return (
        f"has the classes in another order than the data: its output {pairs}{', ...' if len(moved) > 4 else ''} "
        f"({len(moved)} of {len(names)} differ). With that order, taken from half of the images, it is right on {then} of "
        f"the others, instead of {now}: {remedy}"
    )
