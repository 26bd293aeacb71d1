"""Files from Kaggle: downloaded by the `kaggle` package, unpacked by archives.py, cached.

    CACHE/kaggle/NAME/download/      the partial archive, and what the client needs to resume it
    CACHE/kaggle/NAME/content/       its files, renamed into place when all are unpacked
    CACHE/kaggle/NAME/complete.json  written last: all files' names and lengths

The client is isolated: importing it looks for credentials and may exit the process, its verbose
mode prints the request headers, and it only warns of a key that others can read. No message here
contains a key or a signed URL.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import io
import json
import os
import re
import shutil
import stat
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from trainer.core.console import Console, SilentConsole
from trainer.core.errors import ConfigError, DataError
from trainer.io import archives, files

# Without a new byte until a download fails. The client waits at most 32 seconds before a retry.
STALL_SECONDS = 180.0
_FORMS = "kaggle:OWNER/DATASET[/VERSION][:FILE] or kaggle:OWNER/MODEL/FRAMEWORK/VARIATION[/VERSION][:FILE]"
_SET_CREDENTIALS = (
    "set KAGGLE_API_TOKEN, or KAGGLE_USERNAME and KAGGLE_KEY, or put the kaggle.json of your account's page into "
    "~/.kaggle and chmod 600 it"
)


@dataclasses.dataclass(frozen=True)
class Address:
    """The text after `kaggle:`, parsed.

    Attributes:
        parts: owner and data set; or owner, model, framework and variation.
        version: "" for the newest.
        inside: path of the model in the archive; "" to search for the only one.
    """

    parts: tuple[str, ...]
    version: str
    inside: str

    @property
    def is_model(self) -> bool:
        """Whether it is one of Kaggle's models and not one of its data sets."""
        return len(self.parts) == 4

    @property
    def page(self) -> str:
        """Its URL for a browser."""
        return f"https://www.kaggle.com/{'models' if self.is_model else 'datasets'}/{'/'.join(self.parts)}"


def parse(text: str, role: str) -> Address:
    """Parses what follows `kaggle:`.

    Raises:
        ConfigError: it is neither a data set nor a model.
    """
    name, _, inside = text.partition(":")
    parts = tuple(name.split("/"))
    version = parts[-1] if len(parts) in (3, 5) else ""
    parts = parts[:-1] if version else parts
    valid = all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", part) for part in parts)
    if len(parts) not in (2, 4) or not valid or not re.fullmatch(r"([1-9]\d*)?", version):
        raise ConfigError(f"--{role}=kaggle:{text}: it must be {_FORMS}; a version is a number")
    try:
        inside = archives.safe_name(inside)
    except ValueError as error:
        raise ConfigError(f"--{role}=kaggle:{text}: {error}") from None
    return Address(parts, version, inside)


def fetch(text: str, role: str, console: Console | None = None) -> tuple[str, str]:
    """Downloads `kaggle:TEXT` to the cache, once, and finds the model in it.

    A download without a version is not repeated when Kaggle has a newer version.

    Args:
        text: what follows `kaggle:` in the flag.
        role: the flag, without dashes, for errors.
        console: shows the progress of the download; None: nothing is shown.

    Returns:
        The model's kind ("saved_model", "keras" or "bit"), and its path as that kind's flag takes
        it.

    Raises:
        ConfigError: see `parse`.
        DataError: the download failed, or holds no model or several; the text says what to do.
    """
    address, where = parse(text, role), f"--{role}=kaggle:{text}"
    folder = os.path.join(files.cache_folder(), "kaggle", "--".join((*address.parts, address.version or "newest")))
    content = os.path.join(folder, "content")
    with _locked(folder, where):
        if not _is_complete(folder):
            _download_and_unpack(address, folder, where, console or SilentConsole())
    return _find(content, address.inside, where)


@contextlib.contextmanager
def _locked(folder: str, where: str) -> Iterator[None]:
    """One process at a time; the kernel drops the lock with the process."""
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(os.path.join(folder, "lock"), "w")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"{where}: cannot keep it in {folder}: {files.reason(error)}; set FUNMATCH_CACHE") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_complete(folder: str) -> bool:
    try:
        with open(os.path.join(folder, "complete.json"), encoding="utf-8") as file:
            sizes = json.load(file)["files"]
        return all(os.path.getsize(os.path.join(folder, "content", name)) == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _download_and_unpack(address: Address, folder: str, where: str, console: Console) -> None:
    marker, content, download = (os.path.join(folder, name) for name in ("complete.json", "content", "download"))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(marker)
    for name in os.listdir(folder):  # of processes that were killed
        if name == "content" or name.endswith(".part"):
            shutil.rmtree(os.path.join(folder, name))
    archive = _download(address, download, where, console)
    part = f"{content}.{uuid.uuid4().hex[:8]}.part"
    try:
        names = archives.extract(archive, part, f"{where}: the archive")
    except DataError:
        shutil.rmtree(download)  # the next try must not resume a bad archive
        raise
    os.replace(part, content)
    with open(archive, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    sizes = {name: os.path.getsize(os.path.join(content, name)) for name in names}
    text = json.dumps({"from": address.page, "archive_sha256": digest, "files": sizes}, indent=1, sort_keys=True)
    files.write(marker, text.encode(), "the cache's record of")
    shutil.rmtree(download)


def _find(content: str, inside: str, where: str) -> tuple[str, str]:
    root = os.path.join(content, *inside.split("/")) if inside else content
    if not os.path.exists(root):
        raise DataError(f"{where}: there is no {inside} in it; it holds {_listing(content)}")
    models: list[tuple[str, str]] = []
    for folder, folders, names in os.walk(root):
        if "saved_model.pb" in names:
            models.append(("saved_model", folder))
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if name != "__MACOSX")
        models += [_kind(os.path.join(folder, name)) for name in sorted(names) if name.endswith((".keras", ".npz"))]
    if os.path.isfile(root) and root.endswith((".keras", ".npz")):
        models = [_kind(root)]
    if not models:
        listing = _listing(root if os.path.isdir(root) else content)
        raise DataError(f"{where}: no model is in it (a SavedModel, .keras or .npz); it holds {listing}")
    if len(models) > 1:
        names = [os.path.relpath(path.removeprefix("@"), content) for _, path in models]
        raise DataError(
            f"{where}: several models are in it; add one of them, as in :{names[0]} (or {', '.join(names[1:6])})"
        )
    return models[0]


def _kind(path: str) -> tuple[str, str]:
    return ("keras", path) if path.endswith(".keras") else ("bit", f"@{path}")


def _listing(root: str) -> str:
    names = sorted(os.path.relpath(os.path.join(f, name), root) for f, _, names in os.walk(root) for name in names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more files" if len(names) > 5 else "")


@dataclasses.dataclass(frozen=True)
class Credentials:
    """Credentials for the client.

    Attributes:
        source: where they were found; "" for none, which is enough for public data sets.
        variables: of the environment, to be set while the client authenticates.
    """

    source: str
    variables: dict[str, str]

    def __repr__(self) -> str:
        return f"Credentials({self.source!r})"


def credentials(where: str) -> Credentials:
    """Finds credentials in the client's order: a token, a key, a login of `kaggle auth login`.

    Args:
        where: flag and value, for errors.

    Raises:
        DataError: they are incomplete, kaggle.json is damaged, or others can read the file.
    """
    environment = os.environ
    home = os.path.expanduser("~")
    if token := environment.get("KAGGLE_API_TOKEN"):
        if os.path.exists(token):
            _require_private(token, where)
        return Credentials("KAGGLE_API_TOKEN", {})
    for name in ("access_token", "access_token.txt"):
        if os.path.exists(path := os.path.join(home, ".kaggle", name)):
            _require_private(path, where)
            return Credentials(path, {})
    user, key = environment.get("KAGGLE_USERNAME"), environment.get("KAGGLE_KEY")
    if user and key:
        return Credentials("KAGGLE_USERNAME and KAGGLE_KEY", {})
    if user or key:
        given, missing = ("KAGGLE_USERNAME", "KAGGLE_KEY") if user else ("KAGGLE_KEY", "KAGGLE_USERNAME")
        raise DataError(f"{where}: {given} is set and {missing} is not: set both, or neither")
    config = environment.get("XDG_CONFIG_HOME") or os.path.join(home, ".config")
    folders = [environment.get("KAGGLE_CONFIG_DIR"), os.path.join(home, ".kaggle"), os.path.join(config, "kaggle")]
    for folder in folders:
        if folder and os.path.exists(path := os.path.join(folder, "kaggle.json")):
            _require_private(path, where)
            try:
                with open(path, encoding="utf-8") as file:
                    values = json.load(file)
                return Credentials(path, {"KAGGLE_USERNAME": str(values["username"]), "KAGGLE_KEY": str(values["key"])})
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{where}: {path} does not hold a username and a key ({type(error).__name__}): "
                    "make a new one on your account's page"
                ) from None
    if os.path.exists(path := os.path.join(home, ".kaggle", "credentials.json")):
        _require_private(path, where)
        return Credentials(path, {})
    return Credentials("", {})


def _require_private(path: str, where: str) -> None:
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if mode & 0o077:
        raise DataError(f"{where}: {path} can be read or changed by others (mode {mode:04o}): chmod 600 {path}")


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    """Sets variables of the environment, and restores them at the end."""
    previous = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _client(login: Credentials, folder: str) -> Any:
    """An authenticated client, with `folder` for its configuration."""
    quiet = {"KAGGLE_CONFIG_DIR": folder, "VERBOSE": "", "VERBOSE_OUTPUT": ""}
    with _environment(quiet | login.variables):
        from kaggle.api.kaggle_api_extended import KaggleApi

        api = KaggleApi()
        api.args = [flag for flag in api.args if flag not in ("--verbose", "-v")]  # prints headers
        api.config_values = {}
        if login.source:
            api.authenticate()
    return api


def _download(address: Address, folder: str, where: str, console: Console) -> str:
    """Downloads the archive into `folder`, or resumes, and returns its path."""
    login = credentials(where)
    os.makedirs(folder, exist_ok=True)
    message = ""
    target = os.path.join(folder, address.parts[1] + (".tar.gz" if address.is_model else ".zip"))
    try:
        # The client prints to standard output, which belongs to the job.
        with contextlib.redirect_stdout(io.StringIO()):
            api = _client(login, folder)
            name = "/".join(address.parts)
            if address.is_model:
                version = address.version or str(api.model_instance_get(name).version_number)
                name = f"{name}/{version}"
                request = functools.partial(api.model_instance_version_download, name, path=folder, quiet=True)
            else:
                name = f"{name}/{address.version}" if address.version else name
                request = functools.partial(api.dataset_download_files, name, path=folder, quiet=True)
            _watch(request, target, where, console)
    except DataError:
        raise
    except ImportError as error:
        message = f"the package kaggle is missing ({error}): pip install kaggle"
    except SystemExit:  # the client exits when it has no valid credentials
        message = f"Kaggle does not accept the credentials of {login.source}: {_SET_CREDENTIALS}"
    except Exception as error:
        message = _reason(error, address, login)
    # Raised outside of `except`, so that no traceback shows the client's error and its secrets.
    if message:
        raise DataError(f"{where}: {message}")
    if not os.path.isfile(target):
        raise DataError(f"{where}: Kaggle's client ended without {os.path.basename(target)}")
    return target


def _watch(request: Callable[[], object], target: str, where: str, console: Console) -> None:
    """Runs `request` in a thread and shows its progress, until no byte arrives for too long."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            request()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    previous_size, quiet_seconds = -1, 0.0
    try:
        while thread.is_alive():
            thread.join(0.25)
            size = os.path.getsize(target) if os.path.exists(target) else 0
            quiet_seconds = 0.0 if size != previous_size else quiet_seconds + 0.25
            previous_size = size
            if total := _archive_size(target):
                note = "" if quiet_seconds < 5 else f"quiet for {quiet_seconds:.0f} s"
                console.progress("download, MB", size >> 20, max(total >> 20, 1), note)
            if quiet_seconds >= STALL_SECONDS:
                raise DataError(
                    f"{where}: nothing has arrived for {STALL_SECONDS:.0f} s after {size:,} bytes; the same command "
                    "resumes the download"
                )
    finally:
        console.close()
    if errors:
        raise errors[0]


def _archive_size(target: str) -> int:
    """Bytes of the whole archive, from the client's note beside a partial one; 0: not known."""
    try:
        with open(f"{target}.kaggle-partial", encoding="utf-8") as file:
            return int(json.load(file)["size"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _reason(error: Exception, address: Address, login: Credentials) -> str:
    """What went wrong and what to do, without the secrets that a URL or a header may contain."""
    code = getattr(getattr(error, "response", None), "status_code", None)
    kind = "model" if address.is_model else "data set"
    if code == 401 and login.source:
        return f"Kaggle does not accept the credentials of {login.source} (401): {_SET_CREDENTIALS}"
    if code in (401, 403) and not login.source:
        return f"{address.page} needs credentials ({code}): {_SET_CREDENTIALS}"
    if code == 403:
        return f"your account has no access to {address.page} (403): open the page once and accept its terms"
    if code == 404:
        version = f" in version {address.version}" if address.version else ""
        return f"there is no {kind} {'/'.join(address.parts)}{version} at Kaggle (404), or it is private"
    if code is not None:
        return f"Kaggle answers {code}: try again later"
    return f"cannot be downloaded from Kaggle ({type(error).__name__}); the same command resumes the download"
