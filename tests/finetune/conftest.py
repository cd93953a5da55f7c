from __future__ import annotations

import csv
import random
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from examples.finetune.data import Task, load_task
from examples.finetune.model import Checkpoint
from examples.finetune.settings import Settings

GOOD, BAD, OTHER = ["fine", "great", "warm"], ["dull", "poor", "cold"], ["a", "the", "film", "plot", "it", "is"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *OTHER, *map(str, range(100))]


def save_checkpoint(folder: Path, **overrides: int) -> Path:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=16, **sizes)
    config.update(overrides)
    torch.manual_seed(0)
    BertForSequenceClassification(config).bert.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def review(number: int, label: str) -> dict[str, str]:
    """Texts are told apart by their number, which is part of the vocabulary."""
    random_words = random.Random(number)
    words = random_words.choices(OTHER, k=4) + random_words.choices(GOOD if label == "good" else BAD, k=3)
    return {"review": " ".join([*words, str(number)]), "verdict": label, "film": f"film {number % 10}"}


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [review(number, "good" if number % 3 else "bad") for number in range(60)]
    return write_csv(tmp_path_factory.mktemp("data") / "reviews.csv", rows)


@pytest.fixture(scope="module")
def checkpoint(checkpoint_folder: Path) -> Checkpoint:
    return Checkpoint(checkpoint_folder, 12)


@pytest.fixture(scope="module")
def task(settings: Settings, checkpoint: Checkpoint) -> Task:
    """Of the module's own ``settings``."""
    return load_task(settings, checkpoint.tokenizer)
