"""Labelled texts from a CSV file: read, cleaned, split without a leak, tokenised."""

from __future__ import annotations

import bz2
import csv
import gzip
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from benchmarks.common import assets
from benchmarks.common.errors import CommandError

from .settings import Settings

# Of the pinned sentences: as little training data as the paper's smallest tasks have, and a test split that is
# evaluated in seconds (one standard error of an accuracy of 0.75 is then 0.014).
SENTENCES_TRAIN_SIZE = 700
SENTENCES_TEST_SIZE = 1000


class Row(NamedTuple):
    text: str
    label: str
    group: str  # rows of one group are never on both sides of the split


@dataclass(frozen=True)
class Encoded:
    """Tokenised texts: the model's inputs, each ``[rows, max_length]``, padded at the right; labels ``[rows]``."""

    inputs: dict[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {name: values[rows] for name, values in self.inputs.items()}, self.labels[rows]

    def evaluation_batches(self, size: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """All rows, those of like length together and without the columns that are padding throughout."""
        lengths = self.inputs["attention_mask"].sum(1)
        for rows in lengths.argsort().split(size):
            inputs, labels = self.batch(rows)
            longest = int(lengths[rows].max())
            yield {name: values[:, :longest] for name, values in inputs.items()}, labels


@dataclass(frozen=True)
class Task:
    train: Encoded
    test: Encoded
    label_names: list[str]
    majority_rate: float  # the accuracy of always naming the most frequent label of the test rows
    description: str


def load_task(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Task:
    train, test, description = _rows(settings)
    label_names = sorted({row.label for row in [*train, *test]})
    for name, rows in (("training", train), ("test", test)):
        if not rows:
            raise CommandError(f"the {name} split is empty: {description}")
    trained_labels = {row.label for row in train}
    if len(trained_labels) < 2:
        raise CommandError(
            f"all {len(train)} training rows have the label {train[0].label!r}: a classifier needs two labels or more"
        )
    if len(label_names) > len(train) / 2:
        raise CommandError(
            f"{len(label_names)} different labels in {len(train)} training rows: is {settings.label_column!r} the "
            "column of a class label?"
        )
    majority = Counter(row.label for row in test).most_common(1)[0][1] / len(test)
    return Task(
        _encode(train, label_names, tokenizer, settings.max_length),
        _encode(test, label_names, tokenizer, settings.max_length),
        label_names,
        majority,
        description,
    )


def _rows(settings: Settings) -> tuple[list[Row], list[Row], str]:
    if settings.csv is None:
        file = assets.rotten_tomatoes(assets.cache_folder())
        rows = read_rows(file, "the pinned sentences", "text", "category", "movie_name")
        rows, dropped = cleaned([row for row in rows if row.label != "plot"])
        train, test = split(rows, settings.test_size or SENTENCES_TEST_SIZE, settings.seed)
        where = f"rotten-tomatoes sentences ({len(rows)} without {dropped} duplicates), no movie in both splits"
        return _held_out(train, test, where, settings, settings.train_size or SENTENCES_TRAIN_SIZE)

    columns = (settings.text_column, settings.label_column, settings.group_column)
    rows, dropped = cleaned(read_file(settings.csv, *columns))
    where = f"{settings.csv} ({len(rows)} rows without {dropped} empty or repeated ones)"
    if not rows:
        raise CommandError(f"{settings.csv} has no row with both a text and a label")
    if settings.test_csv is None:
        size = settings.test_size or max(1, round(len(rows) * settings.test_fraction))
        train, test = split(rows, size, settings.seed)
    else:
        test, _ = cleaned(read_file(settings.test_csv, *columns))
        test = sample(test, settings.test_size, settings.seed)
        tested = {row.text for row in test}
        train = [row for row in rows if row.text not in tested]
        where = f"{where}, test split from {settings.test_csv}"
    return _held_out(train, test, where, settings, settings.train_size)


def _held_out(
    train: list[Row], test: list[Row], where: str, settings: Settings, train_size: int | None
) -> tuple[list[Row], list[Row], str]:
    """Hold out rows of the training split for validation, in place of the test split, which nobody then looks at."""
    if settings.validate:
        train, test = split(train, len(test), settings.seed + 1)
    train = sample(train, train_size, settings.seed)
    return train, test, f"{len(train)} training and {len(test)} {settings.held_out} rows of {where}"


def read_file(path: Path, text_column: str, label_column: str, group_column: str | None) -> list[Row]:
    openers = {".bz2": bz2.open, ".gz": gzip.open}
    opener = openers.get(path.suffix, open)
    try:
        # utf-8-sig: spreadsheets put a byte order mark in front, which would become part of the first column's name.
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            delimiter = "\t" if ".tsv" in path.suffixes else ","
            return read_rows(file, str(path), text_column, label_column, group_column, delimiter)
    except UnicodeDecodeError as error:
        raise CommandError(f"{path} is not UTF-8 text: {error}") from None
    except (OSError, EOFError) as error:
        raise CommandError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def read_rows(
    file: TextIO, name: str, text_column: str, label_column: str, group_column: str | None, delimiter: str = ","
) -> list[Row]:
    csv.field_size_limit(sys.maxsize)  # the default refuses texts beyond 128 kB
    reader = csv.DictReader(file, delimiter=delimiter)
    try:
        existing = list(reader.fieldnames or ())
        for column in (text_column, label_column, group_column):
            if column is not None and column not in existing:
                raise CommandError(
                    f"{name} has no column {column!r}; its columns: {', '.join(existing) or 'none, it is empty'}"
                )
        rows = []
        for number, row in enumerate(reader):
            text, label = ((row[column] or "").strip() for column in (text_column, label_column))
            group = str(number) if group_column is None else row[group_column] or ""
            rows.append(Row(text, label, group))
    except csv.Error as error:
        raise CommandError(f"{name}, line {reader.line_num}: {error}") from None
    return rows


def cleaned(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """The rows that have a text and a label and whose text did not come before, and how many others there are."""
    first: dict[str, Row] = {}
    for row in rows:
        if row.text and row.label:
            first.setdefault(row.text, row)
    return list(first.values()), len(rows) - len(first)


def split(rows: Sequence[Row], test_size: int, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, test): whole groups in random order go to test until it has ``test_size`` rows; a surplus is dropped."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    train: list[Row] = []
    test: list[Row] = []
    for group in order:
        (test if len(test) < test_size else train).extend(groups[group])
    return train, test[:test_size]


def sample(rows: list[Row], size: int | None, seed: int) -> list[Row]:
    return rows if size is None or size >= len(rows) else random.Random(seed).sample(rows, size)


def _encode(
    rows: Sequence[Row], label_names: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    inputs = tokenizer(
        [row.text for row in rows], truncation=True, max_length=max_length, padding="max_length", return_tensors="pt"
    )
    ids = {label: number for number, label in enumerate(label_names)}
    return Encoded(dict(inputs), torch.tensor([ids[row.label] for row in rows]))
