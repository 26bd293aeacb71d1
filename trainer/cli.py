"""The command line `funmatch VERB`: flags, errors as one line, exit codes."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import tempfile
from collections.abc import Callable

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
    "profile": "cost of a teacher in each precision",
    "recipes": "list published settings",
    "smoke": "the whole job on generated images, on a CPU, in minutes",
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
    """Parses flags, runs a verb, and turns each `FunmatchError` into one line and an exit code.

    Args:
        doc: text of `--help`, above the flags.
        define: defines the verb's flags.
        body: runs the verb with the parsed flags.
        argv: arguments without the program's name; None: those of the process.
        tensorflow: import TensorFlow, without its start-up messages, before `body`.

    Returns:
        The exit code (trainer.core.errors). Anything that is not a `FunmatchError` is a bug and
        passes through.
    """
    values = flags.FlagValues()
    define(values)
    flags.DEFINE_enum(
        "log_format",
        "auto",
        logs.FORMATS,
        "Format of lines on standard error. auto: JSON with a severity in a container of Vertex AI or "
        "Kubernetes, else text.",
        flag_values=values,
        module_name="logs",
    )
    arguments = sys.argv[1:] if argv is None else argv
    if any(argument in ("--help", "-h", "-help", "--helpfull") for argument in arguments):
        print(f"{(doc or '').strip()}\n{values.get_help()}")
        return EXIT_DONE
    try:
        positional = values(["funmatch", *arguments])[1:]
        if positional:
            raise flags.Error(f"unexpected argument {positional[0]!r}: every option is a flag, --name=value")
    except (flags.Error, OSError) as error:
        _print_error(" ".join(str(error).split()), EXIT_CONFIG)
        return EXIT_CONFIG
    if values["log_format"].present:  # a verb called by another verb keeps its format
        logs.set_format(values.log_format)
    try:
        with StopRequest(at_once=True):
            if tensorflow:
                environment.for_tensorflow(values.tpu if "tpu" in values else "none")
                _import_tensorflow()
            body(values)
    except FunmatchError as error:
        _print_error(str(error), error.exit_code)
        return error.exit_code
    return EXIT_DONE


def _print_error(text: str, code: int) -> None:
    """Prints the one line that a failed or stopped run ends with."""
    if logs.as_json():
        logs.write("WARNING" if code == EXIT_STOPPED else "ERROR", text, exit_code=code)
    else:
        print(text if code == EXIT_STOPPED else f"error: {text}", file=sys.stderr)


def _import_tensorflow() -> None:
    """Imports TensorFlow without its start-up messages; setting TF_CPP_MIN_LOG_LEVEL keeps them.

    They come from C++ before any log level applies, so the file descriptor itself is redirected. If
    the import fails, they are printed.
    """
    gcs_client.set_defaults()
    if "TF_CPP_MIN_LOG_LEVEL" in os.environ or "tensorflow" in sys.modules:
        return
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as messages:
        os.dup2(messages.fileno(), 2)
        try:
            import tensorflow as tf

            tf.get_logger().setLevel("ERROR")
        except BaseException:
            messages.seek(0)
            os.write(stderr, messages.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def main(argv: list[str] | None = None) -> int:
    """`funmatch VERB ...`; returns the verb's exit code."""
    arguments: list[str] = list(sys.argv[1:] if argv is None else argv)
    usage = "usage: funmatch VERB --flag=value ...\n\n" + "\n".join(
        f"  {verb:9} {description}" for verb, description in VERBS.items()
    )
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(f"{usage}\n\n`funmatch VERB --help` lists a verb's flags.")
        return EXIT_DONE if arguments else EXIT_CONFIG
    verb = RENAMED_VERBS.get(arguments[0], arguments[0])
    if verb not in VERBS:
        matches = difflib.get_close_matches(verb, VERBS, 1)
        print(
            f"error: unknown verb {verb!r}{f'; did you mean {matches[0]}?' if matches else ''}\n{usage}",
            file=sys.stderr,
        )
        return EXIT_CONFIG
    return int(importlib.import_module(f"trainer.{verb}").main(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main())
