from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from examples.finetune import command
from examples.finetune.settings import Variant
from examples.finetune.summary import summarise
from examples.finetune.training import Result

from .conftest import review, write_csv


@pytest.fixture(autouse=True)
def _no_process_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = {"dropout": 200.0, "plain": 300.0, "mixout": 100.0}
    monkeypatch.setattr(command, "peak_mebibytes", lambda *arguments: memory[arguments[-1].kind])


@pytest.fixture
def options(checkpoint_folder: Path, reviews: Path, tmp_path: Path) -> dict[str, str]:
    return {
        "--model": str(checkpoint_folder),
        "--csv": str(reviews),
        "--text-column": "review",
        "--label-column": "verdict",
        "--max-length": "12",
        "--steps": "2",
        "--restarts": "2",
        "--p": "0.5",
        "--output": str(tmp_path / "results"),
    }


def call(options: dict[str, str], **changes: str) -> int:
    changed = options | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    return command.main([word for pair in changed.items() for word in pair])


def test_report(options: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert call(options) == 0
    printed = capsys.readouterr()
    folder = tmp_path / "results"
    assert sorted(path.name for path in folder.iterdir()) == ["report.csv", "report.json", "report.md", "report.png"]

    found = json.loads((folder / "report.json").read_text())
    assert found["restarts_finished"] == 2
    assert found["task"]["test_rows"] == 12
    assert [line["variant"] for line in found["summary"]] == [
        "dropout + weight decay",
        "plain formula, p=0.5",
        "mixout_kernels, p=0.5",
    ]
    assert [line["memory_ratio"] for line in found["summary"]] == [1.0, 1.5, 0.5]
    assert [(run["variant"], run["restart"]) for run in found["runs"]] == [
        (line["variant"], restart) for restart in (0, 1) for line in found["summary"]
    ]
    for line in found["summary"]:
        runs = [run for run in found["runs"] if run["variant"] == line["variant"]]
        assert line["mean"] == pytest.approx(sum(run["accuracy"] for run in runs) / 2)
        assert line["maximum"] == max(run["accuracy"] for run in runs)
        assert line["runs"] == 2

    with (folder / "report.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["variant"], int(line["restart"]), float(line["accuracy"])) for line in lines] == [
        (run["variant"], run["restart"], run["accuracy"]) for run in found["runs"]
    ]
    assert [(line["steps"], line["peak_mib"]) for line in lines[:3]] == [("2", "200.0"), ("2", "300.0"), ("2", "100.0")]

    markdown = (folder / "report.md").read_text()
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({len(line) for line in table}) == 1
    for line, summary in zip(table[2:], found["summary"], strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == summary["variant"]
        assert cells[1:3] == [f"{summary['mean']:.1%}", f"{summary['maximum']:.1%}"]
        assert cells[4] == f"{summary['degenerate']} of 2"
        assert cells[5:7] == [f"{summary['step_ms']:.0f}", f"{summary['step_ratio']:.2f}"]
        assert line in printed.out
    with Image.open(folder / "report.png") as plot:
        assert len(plot.convert("RGB").getcolors(1 << 20)) > 10  # not blank


def test_a_report_in_bfloat16_names_the_attention_of_each_variant(
    options: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(options, precision="bfloat16", restarts="1") == 0
    printed, text = capsys.readouterr(), (tmp_path / "results" / "report.md").read_text()
    assert "12 tokens, bfloat16." in text
    (line,) = [line for line in text.splitlines() if line.startswith("- Attention: for each variant")]
    assert len(re.findall(r"(sdpa|eager) for [^;]+ \(sdpa \d+, eager \d+\)", line)) == 3
    assert line.removeprefix("- ") in printed.err
    assert line in printed.out


def test_summary_of_known_results() -> None:
    def result(variant: Variant, restart: int, accuracy: float | None, seconds: list[float]) -> Result:
        failure = "the loss became nan at step 2" if accuracy is None else None
        return Result(variant.name, restart, restart, accuracy, failure, [1.0] * len(seconds), seconds)

    dropout, mixout = Variant("dropout"), Variant("mixout", 0.9)
    results = [
        result(dropout, 0, 0.75, [9.0, 0.1, 0.2]),
        result(mixout, 0, 0.80, [9.0, 0.06, 0.04]),
        result(dropout, 1, 0.60, [9.0, 0.2, 0.9]),  # not above the majority rate
        result(mixout, 1, None, [9.0]),
    ]
    first, second = summarise([dropout, mixout], results, {dropout.name: 400.0, mixout.name: None}, 0.60)
    assert (first.mean, first.maximum, first.degenerate, first.runs) == (pytest.approx(0.675), 0.75, 1, 2)
    assert first.std == pytest.approx(0.15 / 2**0.5)
    assert (first.step_ms, first.step_ratio, first.memory_ratio) == (200.0, 1.0, 1.0)
    assert (second.mean, second.std, second.degenerate, second.runs) == (0.80, None, 1, 2)
    assert (second.step_ms, second.step_ratio) == (pytest.approx(50.0), pytest.approx(0.25))
    assert (second.memory_mib, second.memory_ratio) == (None, None)
    (alone,) = summarise([mixout], results, {}, 0.60)
    assert alone.step_ratio is None


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--model", "no-such-folder", "--model no-such-folder: no such folder"),
        ("--model", "{empty}", "no config.json in it"),
        ("--model", "{broken}", "cannot load"),
        ("--model", "{image}", "its tokenizer has 117 tokens, the model 0"),
        ("--csv", "no-such.csv", "cannot read no-such.csv: No such file or directory"),
        ("--csv", "{empty}", "cannot read"),
        ("--text-column", "text", "has no column 'text'; its columns: review, verdict, film"),
        ("--group-column", "movie", "has no column 'movie'"),
        ("--max-length", "64", "--max-length 64: this model takes at most 16 tokens"),
        ("--output", "{file}", "--output .*: cannot write there"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    option: str, value: str, message: str, options: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "file").touch()
    shutil.copytree(options["--model"], tmp_path / "image")
    (tmp_path / "image" / "config.json").write_text('{"model_type": "vit"}')
    options[option] = value.format(**{name: tmp_path / name for name in ("empty", "broken", "image", "file")})
    assert call(options) == 1
    line = one_line(capsys)
    assert line.startswith("error: ")
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--p", "1.5"], "argument --p: expected a number from 0 to 1, got '1.5'"),
        (["--p", "nan"], "argument --p: expected a number from 0 to 1, got 'nan'"),
        (["--restarts", "0"], "argument --restarts: expected a whole number, 1 or more, got '0'"),
        (["--lr", "-1"], "argument --lr: expected a number, 0 or more, got '-1'"),
        (["--text-column", "review"], "--text-column needs --csv"),
        (["--steps", "2", "--epochs", "2"], "not allowed with argument"),
    ],
)
def test_arguments(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_variants_and_p() -> None:
    settings = command.parse_settings(["--variants", "mixout", "plain", "--p", "0.9", "0.7", "0.9"])
    assert settings.variants == (Variant("mixout", 0.9), Variant("mixout", 0.7), Variant("plain", 0.9))


@pytest.mark.parametrize("stop", [KeyboardInterrupt, command.CommandError("no more")])
def test_finished_restarts_are_kept(
    stop: BaseException,
    options: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train = command.train_restart

    def stops_in_the_second(*arguments: Any) -> list[Result]:
        if arguments[3] == 1:
            raise stop
        return train(*arguments)

    monkeypatch.setattr(command, "train_restart", stops_in_the_second)
    assert call(options) == (130 if stop is KeyboardInterrupt else 1)
    folder = tmp_path / "results"
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"; restarts finished: 1, in {folder}")
    found = json.loads((folder / "report.json").read_text())
    assert found["restarts_finished"] == 1
    assert "1 of 2 restarts" in (folder / "report.md").read_text()


def test_failed_runs_are_in_the_report(
    options: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(options, lr="1e38", restarts="1", steps="3") == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "error: every run failed; try a smaller --lr"
    markdown = (tmp_path / "results" / "report.md").read_text()
    assert markdown.count("- Failed: ") == 3
    assert "- Failed: dropout + weight decay, restart 1 (seed 0): the loss became nan at step 2." in markdown
    found = json.loads((tmp_path / "results" / "report.json").read_text())
    assert [line["degenerate"] for line in found["summary"]] == [1, 1, 1]
    assert "1 of 1" in captured.out


def test_one_class(options: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_csv(tmp_path / "one.csv", [review(number, "good") for number in range(20)])
    assert call(options, csv=str(path)) == 1
    assert "all 16 training rows have the label 'good'" in one_line(capsys)
    assert not (tmp_path / "results").exists()


def test_nothing_but_the_progress_is_said(
    options: dict[str, str], capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    torch.manual_seed(0)
    assert call(options, restarts="1") == 0
    assert not [warning for warning in recwarn if "mixout_kernels" not in str(warning.message)]
    said = capsys.readouterr().err
    assert "Loading" not in said
    assert "newly initialized" not in said
    assert "MISSING" not in said
