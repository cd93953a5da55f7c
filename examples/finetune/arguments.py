"""The command line, turned into checked settings."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from mixout_kernels.draws import KINDS as MASKS
from mixout_kernels.draws import Mask

from .neighbours import NEIGHBOURS, NeighbourKind
from .settings import KINDS, Kind, Settings, Variant


def parse_settings(arguments: Sequence[str] | None) -> Settings:
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m examples.finetune",
        usage="%(prog)s [options]",
        description="Fine-tunes a pretrained transformer on little data, once per variant and restart, and compares "
        "dropout, mixout by the plain formula and mixout_kernels in accuracy, time per step and memory. Without "
        "options: all-MiniLM-L6-v2 on 700 sentences of movie reviews.",
    )
    task = parser.add_argument_group("model and data")
    task.add_argument("--model", type=Path, metavar="FOLDER", help="a local transformers checkpoint (MiniLM)")
    task.add_argument("--csv", type=Path, metavar="FILE", help="your data: .csv or .tsv, also with .gz or .bz2")
    task.add_argument("--text-column", metavar="NAME", help=f"of --csv ({default.text_column})")
    task.add_argument("--label-column", metavar="NAME", help=f"of --csv ({default.label_column})")
    task.add_argument("--group-column", metavar="NAME", help="of --csv: rows of a group stay on one side of the split")
    task.add_argument("--test-csv", type=Path, metavar="FILE", help="a test split of your own")
    task.add_argument(
        "--test-fraction", type=fraction, metavar="PART", help="of --csv, for the test split (%(default)s)"
    )
    task.add_argument("--train-size", type=count, metavar="ROWS", help="at most (700 sentences; all rows of --csv)")
    task.add_argument("--test-size", type=count, metavar="ROWS", help="at most (1000 sentences; --test-fraction)")
    task.add_argument(
        "--validate", action="store_true", help="measure accuracy on training rows held out, to choose --lr or --p by"
    )

    compared = parser.add_argument_group("what is compared")
    kinds = (*KINDS, *NEIGHBOURS)
    compared.add_argument(
        "--variants", nargs="+", choices=kinds, metavar="KIND", help=f"of {', '.join(kinds)} ({' '.join(KINDS)})"
    )
    compared.add_argument(
        "--p", nargs="+", type=probability, help="mix probabilities (0.7 0.9); plain and graddrop take the first"
    )
    compared.add_argument("--mask", choices=MASKS, help="of plain and mixout (neuron)")
    compared.add_argument("--restarts", type=count, metavar="N", help="(%(default)s; 20 in the paper)")

    training = parser.add_argument_group("training")
    length = training.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=count, metavar="N", help="(%(default)s)")
    length.add_argument("--steps", type=count, metavar="N", help="instead of --epochs")
    training.add_argument("--batch-size", type=count, metavar="N", help="(%(default)s)")
    training.add_argument("--max-length", type=count, metavar="N", help="tokens of a text (%(default)s)")
    training.add_argument("--lr", type=rate, help="of AdamW, with linear warm-up and decay (%(default)s)")
    training.add_argument("--weight-decay", type=rate, metavar="RATE", help="of the dropout variant (%(default)s)")
    training.add_argument("--precision", choices=("float32", "bfloat16"), help="bfloat16: under autocast (%(default)s)")
    training.add_argument(
        "--attention",
        choices=("sdpa", "eager"),
        help="of transformers (its own choice in float32; in bfloat16 what is fastest for each variant)",
    )
    training.add_argument("--seed", type=int, metavar="N", help="of the split and of the first restart (%(default)s)")
    training.add_argument("--output", type=Path, metavar="FOLDER", help="for the report (%(default)s)")

    own = {"variants": KINDS, "p": [0.7, 0.9], "mask": "neuron"}
    columns = {"text_column": None, "label_column": None}  # None: not given
    parser.set_defaults(**vars(default) | own | columns)

    given = vars(parser.parse_args(arguments))
    for name in ("text_column", "label_column", "group_column", "test_csv"):
        if given[name] is not None and given["csv"] is None:
            parser.error(f"--{name.replace('_', '-')} needs --csv")
        given[name] = given[name] or getattr(default, name)
    given["variants"] = variants(given["variants"], given.pop("p"), given.pop("mask"))
    return Settings(**given)


def variants(kinds: Sequence[Kind | NeighbourKind], rates: Sequence[float], mask: Mask) -> tuple[Variant, ...]:
    """Each kind once; mixout with every p, the plain formula, whose cost does not depend on p, with the first."""
    found = []
    for kind in kinds:
        for p in {"mixout": rates, "plain": rates[:1], "graddrop": rates[:1]}.get(kind, [0.0]):
            found.append(Variant(kind, p, mask))
    return tuple(dict.fromkeys(found))


def _number(convert: Callable[[str], float], accepts: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


count = _number(int, lambda value: value >= 1, "a whole number, 1 or more")
rate = _number(float, lambda value: 0 <= value < math.inf, "a number, 0 or more")
fraction = _number(float, lambda value: 0 < value < 1, "a number between 0 and 1")
probability = _number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
