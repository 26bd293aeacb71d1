"""Settings of TensorFlow's gs:// client, and its errors as one line.

No TensorFlow is imported here, because it reads the settings only once.

By default the client retries for more than three minutes and waits an hour for an answer. With
these settings a bucket that does not answer is an error within a minute: 5 tries with 1, 2, 4 and
4 seconds between them (plus up to one second at random), each with at most 6 seconds of silence.
Nothing is lost by that: the same command resumes. A variable that is set already is not changed.
"""

from __future__ import annotations

import os
import re

DEFAULTS = {
    "GCS_RETRY_CONFIG_MAX_RETRIES": "4",
    "GCS_RETRY_CONFIG_INIT_DELAY_TIME_US": "1000000",
    "GCS_RETRY_CONFIG_MAX_DELAY_TIME_US": "4000000",
    "GCS_REQUEST_CONNECTION_TIMEOUT_SECS": "6",
    "GCS_REQUEST_IDLE_TIMEOUT_SECS": "6",
    # A job reads the sizes of objects that it has just written; a cache of some seconds would give
    # the old ones.
    "GCS_STAT_CACHE_MAX_AGE": "0",
}
REFUSAL_PAUSES = (0.5, 1.5)  # seconds before each more try of a request that was refused

_STATUS = re.compile(r"HTTP response code (\d{3})")
_MESSAGE = re.compile(r'"message":\s*"([^"]*)"')
_TRIES = re.compile(r"All (\d+) retry attempts failed")


def set_defaults() -> None:
    """Sets `DEFAULTS` where the user has set nothing. Call it before importing TensorFlow."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


def explain(text: str, path: str) -> str:
    """An error of the client as one line: the answer of the server, and what to do.

    Args:
        text: TensorFlow's message, which may hold an HTTP status and a JSON body, or curl's
            message.
        path: gs://BUCKET/NAME.
    """
    bucket = path.partition("://")[2].partition("/")[0]
    code, detail, retries = _STATUS.search(text), _MESSAGE.search(text), _TRIES.search(text)
    status = int(code[1]) if code else 0
    answer = f"HTTP {status}" if status else text.partition("The last failure: ")[2] or text
    answer = re.sub(r"^Error executing an HTTP request: ", "", answer.splitlines()[0]).strip()
    if detail:
        answer += f" ({detail[1]})"
    if retries:
        answer += f", {int(retries[1]) + 1} times"
    return f"{answer}; {_advice(status, answer, bucket)}"


def _advice(status: int, answer: str, bucket: str) -> str:
    if status == 401 or "nonymous" in answer:
        return (
            "no credentials were found or they are not valid: run `gcloud auth application-default login`, set "
            "GOOGLE_APPLICATION_CREDENTIALS, or give the machine a service account, and start again"
        )
    if status == 403:
        return (
            f"this account may not do that in gs://{bucket}: give it roles/storage.objectAdmin there (to read: "
            "objectViewer)"
        )
    if status == 404:
        return f"check that the bucket gs://{bucket} exists and the name is right"
    if status == 412:
        return "another process is writing there: stop it, or choose another folder"
    if status == 429:
        return f"gs://{bucket} gets too many requests: give the same command again later"
    if "certificate" in answer or "SSL" in answer:
        return "the certificate of the storage, or of a proxy before it, is not trusted: see CURL_CA_BUNDLE"
    if "resolve" in answer:
        return "check the network connection"
    return (
        f"gs://{bucket} does not answer: give the same command again later, which resumes; "
        "GCS_RETRY_CONFIG_MAX_RETRIES=10 keeps trying for longer"
    )
