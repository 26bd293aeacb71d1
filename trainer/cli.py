"""Command lines: `funmatch VERB`, and what every verb's main does with flags, mistakes and exit codes."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from absl import flags

from trainer.core import environment, logs
from trainer.core.errors import EXIT_CONFIG, EXIT_DONE, EXIT_STOPPED, FunmatchError
from trainer.core.signals import StopRequest
from trainer.io import gcs_client

VERBS = {
    "prepare": "turn images into TFRecords",
    "teacher": "train a teacher with labels",
    "task": "distil: the main job",
    "evaluate": "accuracy of any model on a split",
    "profile": "what a teacher costs, and its cheaper precisions",
    "recipes": "list published settings",
    "smoke": "the whole job on drawn pictures, on a CPU, in minutes",
}

# Names of earlier versions.
RENAMED_VERBS = {"appraise": "profile"}


def run(
    doc: str | None,
    define: Callable[[flags.FlagValues], None],
    body: Callable[[flags.FlagValues], None],
    argv: list[str] | None,
    *,
    tensorflow: bool = True,
) -> int:
    """Parses flags, runs a verb, and turns what a user can act on into one line and an exit code.

    Args:
        doc: text of `--help`, above the flags.
        define: defines the verb's flags.
        body: the verb, given the parsed flags.
        argv: without the program's name; None takes the process's.
        tensorflow: the verb needs it; it is imported quietly first.

    Returns:
        The exit code (trainer.core.errors). Anything that is not a `FunmatchError` is a bug and passes through.
    """
    values = flags.FlagValues()
    define(values)
    flags.DEFINE_enum(
        "log_format",
        "auto",
        logs.FORMATS,
        "Lines on standard error. auto: JSON with a severity in a container of Vertex AI or Kubernetes, else text.",
        flag_values=values,
        module_name="logs",
    )
    arguments = sys.argv[1:] if argv is None else argv
    if any(argument in ("--help", "-h", "-help", "--helpfull") for argument in arguments):
        print(f"{(doc or '').strip()}\n{values.get_help()}")
        return EXIT_DONE
    try:
        rest = values(["funmatch", *arguments])[1:]
        if rest:
            raise flags.Error(f"unexpected argument {rest[0]!r}: every option is a flag, --name=value")
    except (flags.Error, OSError) as error:
        _tell(" ".join(str(error).split()), EXIT_CONFIG)
        return EXIT_CONFIG
    if values["log_format"].present:  # a verb that runs others keeps what it was told itself
        logs.set_format(values.log_format)
    try:
        with StopRequest(at_once=True):
            if tensorflow:
                environment.for_tensorflow(values.tpu if "tpu" in values else "none")
                _import_tensorflow()
            body(values)
    except FunmatchError as error:
        _tell(str(error), error.exit_code)
        return error.exit_code
    return EXIT_DONE


def _tell(text: str, code: int) -> None:
    """The one line that a run ends with if it does not end well."""
    if logs.as_json():
        logs.write("WARNING" if code == EXIT_STOPPED else "ERROR", text, exit_code=code)
    else:
        print(text if code == EXIT_STOPPED else f"error: {text}", file=sys.stderr)


def _import_tensorflow() -> None:
    """Imports TensorFlow without its start-up chatter, which hides our one line; TF_CPP_MIN_LOG_LEVEL set keeps it.

    The chatter comes from C++ before any log level applies, so the file descriptor itself is turned away.
    """
    gcs_client.set_defaults()
    if "TF_CPP_MIN_LOG_LEVEL" in os.environ or "tensorflow" in sys.modules:
        return
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as chatter:
        os.dup2(chatter.fileno(), 2)
        try:
            import tensorflow as tf

            tf.get_logger().setLevel("ERROR")
        except BaseException:
            chatter.seek(0)
            os.write(kept, chatter.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def main(argv: list[str] | None = None) -> int:
    """`funmatch VERB ...`; returns the verb's exit code."""
    arguments: list[str] = list(sys.argv[1:] if argv is None else argv)
    usage = "usage: funmatch VERB --flag=value ...\n\n" + "\n".join(
        f"  {verb:9} {what}" for verb, what in VERBS.items()
    )
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(f"{usage}\n\n`funmatch VERB --help` lists a verb's flags.")
        return EXIT_DONE if arguments else EXIT_CONFIG
    verb = RENAMED_VERBS.get(arguments[0], arguments[0])
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1)
        print(
            f"error: unknown verb {verb!r}{f'; did you mean {near[0]}?' if near else ''}\n{usage}",
            file=sys.stderr,
        )
        return EXIT_CONFIG
    module: Any = importlib.import_module(f"trainer.{verb}")
    return int(module.main(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main())
