"""The index of a prepared data set: dataset.json, its splits and shards."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import google_crc32c

from trainer.core.errors import DataError
from trainer.io import files

FORMAT = "funmatch-dataset/1"
INDEX_FILE = "dataset.json"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One TFRecord file of a split, as dataset.json describes it.

    Attributes:
        file: name in the data set's folder.
        examples: number of records.
        bytes: length of the file.
        crc32c: CRC32C of the whole file.
    """

    file: str
    examples: int
    bytes: int
    crc32c: int


@dataclasses.dataclass(frozen=True)
class Split:
    """A named part of a data set, in one or more shards."""

    name: str
    shards: tuple[Shard, ...]

    @property
    def examples(self) -> int:
        """Number of records in all shards."""
        return sum(shard.examples for shard in self.shards)

    @property
    def crc32c(self) -> str:
        """Checksum of the content: CRC32C over the shards' lengths and CRC32Cs, 8 hex digits."""
        text = ",".join(f"{shard.bytes}:{shard.crc32c}" for shard in self.shards)
        return f"{google_crc32c.value(text.encode()):08x}"


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The content of dataset.json.

    Attributes:
        folder: where the data set is stored, a local path or gs:// prefix. Not part of
            dataset.json.
        name: display name of the source.
        classes: class names; a record's label is an index into them. Empty: unlabelled.
        splits: splits by name.
        image_size: largest and median height and width of the originals, in pixels.
        source: what the data set was made from and how. Shown in the report.
    """

    folder: str
    name: str
    classes: tuple[str, ...]
    splits: dict[str, Split]
    image_size: dict[str, int]
    source: dict[str, Any] = dataclasses.field(default_factory=dict)

    def split(self, name: str, flag: str) -> Split:
        """Returns the split `name`, which must not be empty.

        Messages name `flag` as the origin of the name.

        Raises:
            DataError: there is no such split, or it has no examples.
        """
        if name not in self.splits:
            available = ", ".join(f"{s.name} ({s.examples})" for s in self.splits.values()) or "none"
            raise DataError(f"{self.folder} has no split {name!r} (from --{flag}); it has: {available}")
        if not self.splits[name].examples:
            raise DataError(f"split {name!r} (from --{flag}) of {self.folder} is empty: prepare it with images in it")
        return self.splits[name]

    def to_json(self) -> bytes:
        """Serializes to the bytes of dataset.json."""
        value = dataclasses.asdict(self) | {"format": FORMAT}
        del value["folder"]
        value["splits"] = {
            name: {
                "examples": split.examples,
                "shards": [dataclasses.asdict(s) for s in split.shards],
            }
            for name, split in self.splits.items()
        }
        return (json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()

    def save(self) -> None:
        """Writes dataset.json, which makes the data set complete."""
        files.write(files.join(self.folder, INDEX_FILE), self.to_json(), "the data set's index")

    @classmethod
    def load(cls, folder: str, flag: str = "data") -> Dataset:
        """Reads dataset.json in `folder`. Messages name `--flag` as the origin of the folder.

        Raises:
            DataError: dataset.json is missing, damaged, or of another format version.
        """
        path = files.join(folder, INDEX_FILE)
        if not files.exists(path):
            raise DataError(
                f"no data set at --{flag}={folder}: {INDEX_FILE} is not there; "
                "make one with `python -m trainer.prepare --dataset=... --out=...`"
            )
        try:
            value = json.loads(files.read(path, "the data set's index"))
            if value["format"] != FORMAT:
                raise DataError(
                    f"{path} has format {value['format']!r}; this version reads {FORMAT!r}: prepare it again"
                )
            splits = {
                name: Split(name, tuple(Shard(**shard) for shard in split["shards"]))
                for name, split in value["splits"].items()
            }
            return cls(
                folder, value["name"], tuple(value["classes"]), splits, value["image_size"], value.get("source", {})
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is damaged ({error!r}): prepare the data set again") from error
