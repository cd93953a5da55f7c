from __future__ import annotations

import bz2
import dataclasses
import gzip
import io
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from benchmarks.common.errors import CommandError
from examples.finetune import data
from examples.finetune.data import Encoded, Row, cleaned, load_task, read_file, sample, split
from examples.finetune.model import Checkpoint
from examples.finetune.settings import Settings

from .conftest import review, write_csv


@pytest.fixture(scope="module")
def settings(reviews: Path) -> Settings:
    return Settings(csv=reviews, text_column="review", label_column="verdict", max_length=12)


@pytest.fixture(scope="module")
def tokenizer(checkpoint_folder: Path) -> PreTrainedTokenizerBase:
    return Checkpoint(checkpoint_folder, 12).tokenizer


def texts(encoded: Encoded) -> set[tuple[int, ...]]:
    return {tuple(ids) for ids in encoded.inputs["input_ids"].tolist()}


@given(st.lists(st.integers(0, 9), min_size=2, max_size=60), st.integers(1, 30), st.integers(0, 99))
def test_no_group_is_on_both_sides(groups: list[int], test_size: int, seed: int) -> None:
    rows = [Row(f"text {number}", "label", f"group {group}") for number, group in enumerate(groups)]
    train, test = split(rows, test_size, seed)
    assert not {row.group for row in train} & {row.group for row in test}
    assert len(test) == min(test_size, len(rows))
    assert set(train) <= set(rows)
    assert split(rows, test_size, seed) == (train, test)


def test_sample_takes_rows_once() -> None:
    rows = [Row(str(number), "", "") for number in range(50)]
    taken = sample(rows, 20, seed=3)
    assert len(set(taken)) == 20
    assert sample(rows, 20, seed=4) != taken
    assert sample(rows, None, seed=3) == sample(rows, 50, seed=3) == rows


def test_cleaned_keeps_the_first_of_equal_texts_and_no_empty_cell() -> None:
    rows = [Row("a", "x", "1"), Row("", "x", "2"), Row("b", "", "3"), Row("a", "y", "4"), Row("c", "y", "5")]
    assert cleaned(rows) == ([rows[0], rows[4]], 3)


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".csv.bz2", ".tsv"])
def test_files_as_they_come(suffix: str, tmp_path: Path) -> None:
    delimiter = "\t" if suffix == ".tsv" else ","
    # A byte order mark, a quoted line break, and a text beyond the csv module's default limit.
    lines = ["label|text", 'x|"one\ntwo"', f"y|{'long ' * 40_000}", "z"]
    content = "\ufeff" + "\r\n".join(lines).replace("|", delimiter)
    opener = {".csv.gz": gzip.open, ".csv.bz2": bz2.open}.get(suffix, open)
    with opener(tmp_path / f"file{suffix}", "wb") as file:
        file.write(content.encode())
    rows = read_file(tmp_path / f"file{suffix}", "text", "label", None)
    assert rows == [Row("one\ntwo", "x", "0"), Row(("long " * 40_000).strip(), "y", "1"), Row("", "z", "2")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,stars\nfine,5\n", "has no column 'label'; its columns: text, stars"),
        (b"", "has no column 'text'; its columns: none, it is empty"),
        (b"text,label\n\xff\xfe,1\n", "is not UTF-8 text"),
        (None, "cannot read .*No such file"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CommandError, match=message) as error:
        read_file(path, "text", "label", None)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["file.csv.gz", "file.csv.bz2"])
def test_a_file_that_is_not_what_its_name_says(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"text,label\nfine,1\n")
    with pytest.raises(CommandError, match="cannot read"):
        read_file(tmp_path / name, "text", "label", None)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "has no row with both a text and a label"),
        (["same"] * 20, "all 16 training rows have the label 'same'"),
        ([f"{number}.5" for number in range(20)], "20 different labels in 16 training rows"),
        (["one"], "the training split is empty"),
    ],
)
def test_data_that_cannot_be_learnt_from(
    labels: list[str], message: str, settings: Settings, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [review(number, "") | {"verdict": label} for number, label in enumerate(labels)]
    path = write_csv(tmp_path / "file.csv", rows or [review(0, "")])
    with pytest.raises(CommandError, match=message) as error:
        load_task(dataclasses.replace(settings, csv=path), tokenizer)
    assert "\n" not in str(error.value)


def test_task(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> None:
    task = load_task(dataclasses.replace(settings, train_size=30, group_column="film"), tokenizer)
    assert (len(task.train), len(task.test)) == (30, 12)
    assert task.label_names == ["bad", "good"]
    assert not texts(task.train) & texts(task.test)
    share = task.test.labels.double().mean().item()
    assert task.majority_rate == max(share, 1 - share)
    bad_words = tokenizer.convert_tokens_to_ids(["dull", "poor", "cold"])
    has_bad_word = torch.isin(task.train.inputs["input_ids"], torch.tensor(bad_words)).any(1)
    assert torch.equal(task.train.labels == 0, has_bad_word)


def test_texts_of_a_given_test_split_are_not_trained_on(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    held_out = write_csv(
        tmp_path / "test.csv", [review(number, "good" if number % 3 else "bad") for number in range(9)]
    )
    task = load_task(dataclasses.replace(settings, test_csv=held_out), tokenizer)
    assert (len(task.train), len(task.test)) == (51, 9)
    assert not texts(task.train) & texts(task.test)


def test_validation_looks_at_training_rows_only(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> None:
    settings = dataclasses.replace(settings, group_column="film")
    task, validation = (load_task(dataclasses.replace(settings, validate=flag), tokenizer) for flag in (False, True))
    assert len(validation.test) == len(task.test) == 12
    assert len(validation.train) == len(task.train) - 12
    assert texts(validation.train) | texts(validation.test) == texts(task.train)
    assert not texts(validation.train) & texts(validation.test)
    assert "36 training and 12 validation rows" in validation.description
    assert "48 training and 12 test rows" in task.description


def test_the_pinned_sentences_without_plots_and_leaks(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["category,text,movie_name,has_plot_and_reviews"]
    lines += [f"{'fresh' if n % 2 else 'rotten'},{n},movie {n % 7},True" for n in range(90)]
    lines += ["plot,a film,movie 1,True", "fresh,5,movie 1,True"]
    monkeypatch.setattr(data.assets, "rotten_tomatoes", lambda _: io.StringIO("\n".join(lines)))
    task = load_task(Settings(train_size=40, test_size=20, max_length=12), tokenizer)
    assert "(90 without 1 duplicates)" in task.description
    assert task.label_names == ["fresh", "rotten"]
    movies = [
        {int(tokenizer.decode(row[1])) % 7 for row in split.inputs["input_ids"]} for split in (task.train, task.test)
    ]
    assert movies[0]
    assert movies[1]
    assert not movies[0] & movies[1]


def test_evaluation_batches_hold_every_row_and_cut_padding_only(
    settings: Settings, tokenizer: PreTrainedTokenizerBase
) -> None:
    test = load_task(settings, tokenizer).train
    seen = []
    for inputs, labels in test.evaluation_batches(7):
        assert inputs["attention_mask"].sum(1).max() == inputs["attention_mask"].shape[1]
        seen += zip((tuple(row[row != 0].tolist()) for row in inputs["input_ids"]), labels.tolist(), strict=True)
    whole = (tuple(row[row != 0].tolist()) for row in test.inputs["input_ids"])
    assert sorted(seen) == sorted(zip(whole, test.labels.tolist(), strict=True))
