"""One rank, at its end of the network: it reads what to measure, in lines of JSON, and answers each by another one."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from benchmarks.common.interleave import interleave
from benchmarks.common.rows import Row, attempt, guarded

from .methods import MODELS, Method, Training, methods
from .network import ADDRESSES, sent_bytes

PORT = 29511
_Sample = tuple[float, int]


def main() -> None:
    rank, interface, model = int(sys.argv[1]), sys.argv[2], MODELS[sys.argv[3]]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    dist.init_process_group(
        "gloo", f"tcp://{ADDRESSES[0]}:{PORT}", timedelta(minutes=3), rank=rank, world_size=len(ADDRESSES)
    )
    trainings: dict[str, Training] = {}
    rows: dict[str, Row] = {}
    for line in sys.stdin:
        task = json.loads(line)
        if "engine" in task:
            trainings.clear()  # the memory of the last engine's models
            chosen = [one for one in methods() if one.engine == task["engine"] and one.name in task["methods"]]
            rows = {one.name: Row("", one.name, one.engine) for one in chosen}
            for one in chosen:
                with attempt([rows[one.name]]):
                    trainings[one.name] = one.start(model.make(), model.inputs(rank))
            _interleaved(trainings, rows, 2, interface)  # the first step of all builds buckets, and grows memory
            answer = {}
        else:
            answer = _answer(chosen, trainings, rows, task["rounds"], interface)
        print(json.dumps(answer), file=answers, flush=True)
    dist.destroy_process_group()


def _answer(
    chosen: list[Method], trainings: dict[str, Training], rows: dict[str, Row], rounds: int, interface: str
) -> dict[str, dict[str, object]]:
    samples = _interleaved(trainings, rows, rounds, interface)
    found: dict[str, dict[str, object]] = {}
    for one in chosen:
        row, taken = rows[one.name], [sample for sample in samples.get(one.name, []) if sample is not None]
        found[one.name] = {"failure": row.failure, "seconds": [], "matches": None}
        if row.failure is None and taken:
            training = trainings[one.name]
            other = trainings.get(one.same_as or "")
            same = None if other is None else all(map(torch.equal, training.weights(), other.weights()))
            sent = sorted(sent for _, sent in taken)[len(taken) // 2]
            found[one.name] |= {"seconds": [seconds for seconds, _ in taken], "matches": same}
            found[one.name] |= {"sent_bytes": sent, "target_bytes": training.target_bytes}
    return found


def _interleaved(
    trainings: dict[str, Training], rows: dict[str, Row], rounds: int, interface: str
) -> dict[str, list[_Sample | None]]:
    """Take samples in the same random order on every rank."""
    samplers = {
        name: guarded([rows[name]], _sampler(training.step, interface))
        for name, training in trainings.items()
        if rows[name].failure is None
    }
    return interleave(samplers, rounds)


def _sampler(step: Callable[[], object], interface: str) -> Callable[[], _Sample]:
    def sample() -> _Sample:
        dist.barrier()
        sent, started = sent_bytes(interface), time.perf_counter()
        step()
        dist.barrier()
        return time.perf_counter() - started, sent_bytes(interface) - sent

    return sample


if __name__ == "__main__":
    main()
