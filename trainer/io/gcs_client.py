"""How TensorFlow's client of gs:// is set up, and what its errors mean for people. No TensorFlow here: it reads settings once.

The client's own settings retry for more than three minutes, and wait an hour for an answer that does not come. Ours give up on
a bucket that does not answer within a minute: 5 tries with 1, 2, 4 and 4 seconds between them (and up to one more each, at
random), 6 seconds of silence each at most. Nothing is lost by that: the same command goes on. A variable that is set already
is left as it is.
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
    # Objects here are written by one job alone, so what it was told of one five seconds ago may be of its own making.
    "GCS_STAT_CACHE_MAX_AGE": "0",
}

_STATUS = re.compile(r"HTTP response code (\d{3})")
_MESSAGE = re.compile(r'"message":\s*"([^"]*)"')
_TRIES = re.compile(r"All (\d+) retry attempts failed")


def set_defaults() -> None:
    """Sets what the user has not set; to be called before TensorFlow is imported."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


def explain(text: str, path: str) -> str:
    """A client's error about `path` as one line: what came back, and what to do.

    Args:
        text: TensorFlow's message, which may hold an HTTP status and a JSON body, or words of curl.
        path: gs://BUCKET/...; errors about other places are returned as they are.
    """
    if not path.startswith("gs://"):
        return text
    bucket = path.removeprefix("gs://").partition("/")[0]
    found, message, tries = _STATUS.search(text), _MESSAGE.search(text), _TRIES.search(text)
    status = int(found[1]) if found else 0
    said = f"HTTP {status}" if status else text.partition("The last failure: ")[2] or text
    said = re.sub(r"^Error executing an HTTP request: ", "", said.splitlines()[0]).strip()
    if message:
        said += f" ({message[1]})"
    if tries:
        said += f", {int(tries[1]) + 1} times"
    return f"{said}; {_advice(status, said, bucket)}"


def _advice(status: int, said: str, bucket: str) -> str:
    if status == 401 or "nonymous" in said:
        return (
            "no credentials were found or they are not valid: run `gcloud auth application-default login`, set "
            "GOOGLE_APPLICATION_CREDENTIALS, or give the machine a service account, and start again"
        )
    if status == 403:
        return f"this account may not do that in gs://{bucket}: give it roles/storage.objectAdmin there (to read: objectViewer)"
    if status == 404:
        return f"check that the bucket gs://{bucket} exists and the name is right"
    if status == 412:
        return "another process writes there too: stop it, or choose another place"
    if status == 429:
        return f"gs://{bucket} is asked too often: give the same command again later"
    if "certificate" in said or "SSL" in said:
        return "the certificate of the storage, or of a proxy on the way, is not trusted: see CURL_CA_BUNDLE"
    if "resolve" in said:
        return "is there a network?"
    return (
        f"gs://{bucket} does not answer: give the same command again later, which goes on; "
        "GCS_RETRY_CONFIG_MAX_RETRIES=10 keeps trying for longer"
    )
