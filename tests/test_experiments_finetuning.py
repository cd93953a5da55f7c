"""The experiments on MiniLM: what they leave out changes nothing, what is cut off is balanced, intervals are right."""

import functools
import json

import pytest
import torch
from scipy import stats
from torch import nn

import mixout_kernels as mk
from benchmarks.step.variants import Variant
from examples.experiments import finetuning, intervals, paper_time, rates, runs, stability, stability_page, sweep
from examples.experiments.finetuning import STRATEGIES, dropout, mixed_head, mixout, wdecay
from examples.finetune.model import Checkpoint
from examples.finetune.settings import Settings
from examples.finetune.training import Run, batches

from .finetune.conftest import review, save_checkpoint, write_csv


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiments")
    reviews = write_csv(
        folder / "reviews.csv", [review(number, "good" if number % 3 else "bad") for number in range(60)]
    )
    settings = Settings(
        csv=reviews, text_column="review", label_column="verdict", max_length=12, batch_size=8, steps=4, lr=1e-2
    )
    return finetuning.material_of(settings, Checkpoint(save_checkpoint(folder / "checkpoint"), 12), rows=7)


PULLED = f"{mixout(0.7)}, {wdecay(0.01)}"
EVERY_KIND = (dropout(0.1), dropout(0.5), wdecay(0.1), mixout(0.7), mixed_head(0.7), PULLED, *stability.TIERS[2])


@pytest.mark.parametrize("name", EVERY_KIND)
def test_a_trimmed_vocabulary_changes_no_result(name, material):
    """Bit for bit, in losses and in the outputs of what was trained; of 115 tokens fewer are left."""
    strategy = STRATEGIES[name]
    trimmed = finetuning.begin(strategy, material, material.settings, restart=3)
    whole = Run(material.settings, material.checkpoint, material.task, strategy, 3)
    if strategy.pull:
        mk.decay_to_target(whole.optimizer, whole.model, strategy.pull)
    assert trimmed.model.get_input_embeddings().weight.shape[0] == len(material.tokens)
    assert len(material.tokens) < whole.model.get_input_embeddings().weight.shape[0]
    for rows in batches(material.settings, len(material.task.train), 3):
        trimmed.step(*material.trimmed.train.batch(rows))
        whole.step(*material.task.train.batch(rows))
    assert trimmed.result.losses == whole.result.losses
    for run in (trimmed, whole):
        run.model.eval()
    inputs, other = material.trimmed.test.inputs, material.task.test.inputs
    assert torch.equal(trimmed.model(**inputs).logits, whole.model(**other).logits)


def test_strategies_are_what_their_names_say(material):
    def rates_of(model):
        return {module.p for module in model.modules() if isinstance(module, nn.Dropout)}

    def begun(name):
        return finetuning.begin(STRATEGIES[name], material, material.settings, restart=0)

    assert rates_of(begun(dropout(0.5)).model) == {0.5}
    assert rates_of(begun("R3F").model) == {0.1}
    assert rates_of(begun(wdecay(0.1)).model) == {0.0}
    for name in (mixout(0.7), mixed_head(0.7)):
        model = begun(name).model
        assert rates_of(model) == {0.0}
        assert isinstance(model.classifier, mk.MixLinear) == (name == mixed_head(0.7))
        assert model.bert.pooler.dense.p == 0.7
    decays = {name: begun(name).optimizer.param_groups[0]["weight_decay"] for name in (dropout(0.1), wdecay(0.1))}
    assert decays == {dropout(0.1): 0.01, wdecay(0.1): 0.0}


def test_all_strategies_of_a_restart_have_the_same_head_and_other_restarts_another(material):
    heads = [
        finetuning.begin(STRATEGIES[name], material, material.settings, restart).model.classifier.weight
        for name, restart in ((dropout(0.1), 1), (mixout(0.9), 1), ("R3F", 1), (dropout(0.1), 2))
    ]
    assert all(torch.equal(heads[0], head) for head in heads[1:3])
    assert not torch.equal(heads[0], heads[3])


def test_rows_of_the_test_split_are_spread_over_it(material):
    whole = finetuning.material_of(material.settings, material.checkpoint, rows=1000)
    few = material.task.test.inputs["input_ids"]
    every = whole.task.test.inputs["input_ids"]
    assert len(few) == 7
    assert torch.equal(few[[0, -1]], every[[0, -1]])
    assert material.task.majority_rate == material.task.test.labels.bincount().max().item() / 7


def scored(best, strategy, rate, **settings):
    """A validation accuracy that falls with the distance to the best rate, in doublings."""
    distance = abs(torch.tensor(rate / best[strategy]).log2().item())
    return {"accuracy": 0.9 - 0.01 * distance, "majority": 0.5, "failure": None}


def test_rates_are_tried_until_the_best_is_inside(tmp_path, monkeypatch):
    best = {"inside": 2e-4, "high": 1.6e-3, "low": 5e-5, "beyond": 1.0}
    monkeypatch.setattr(rates, "fine_tune", functools.partial(scored, best))
    means = rates.search(tmp_path / "runs.jsonl", tuple(best), rates.FULL, workers=1)
    assert sorted(means["inside"]) == [1e-4, 2e-4, 4e-4]
    assert sorted(means["high"]) == pytest.approx([1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3])
    assert sorted(means["low"]) == pytest.approx([2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4])
    assert max(means["beyond"]) == pytest.approx(3.2e-3)  # and no further
    assert {name: rates.best(of) for name, of in means.items()} == pytest.approx(best | {"beyond": 3.2e-3})
    assert rates.best({2e-4: 0.7, 1e-4: 0.7}) == 1e-4


def test_a_search_that_was_cut_off_chooses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "runs.jsonl"
    monkeypatch.setattr(rates, "fine_tune", functools.partial(scored, {"one": 2e-4, "two": 2e-4}))
    rates.search(path, ("one",), rates.FULL, workers=1)
    lines = path.read_text().splitlines(keepends=True)
    rates.search(path, ("two",), rates.FULL, workers=1)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[: len(lines) + 4]))
    assert list(rates.search(path, ("one", "two"), rates.FULL, workers=0)) == ["one"]


def test_the_order_is_balanced_wherever_it_is_cut():
    means = {name: {1e-4: 0.5} for name in "abc"}
    order = stability.in_order(stability.GROUPS[0], means, finetuning.FULL)
    cells = {(one["strategy"], one["size"]) for one in order}
    assert len(cells) == 6
    assert len(order) == 6 * 20
    for cut in range(len(order) + 1):
        counts = [sum((one["strategy"], one["size"]) == cell for one in order[:cut]) for cell in cells]
        assert max(counts) - min(counts) <= 1
    assert {one["rate"] for one in order if one["size"] == 100} == {4e-4}


def run_of(strategy, restart, accuracy, **more):
    return {"strategy": strategy, "restart": restart, "accuracy": accuracy, "majority": 0.5, "failure": None, **more}


def test_pairs_are_of_the_same_restart():
    found = [run_of("a", 0, 0.7), run_of("b", 0, 0.6), run_of("b", 2, 0.9), run_of("a", 2, 0.8), run_of("a", 1, 0.1)]
    whole = stability.complete(found, ["a", "b"])
    assert [run["restart"] for run in whole["a"]] == [run["restart"] for run in whole["b"]] == [0, 2]
    others = [run_of("a", 3, 0.0), *reversed(whole["a"])]
    assert stability.paired(whole["b"], others) == ([0.6, 0.9], [0.7, 0.8])


def test_degenerate_runs():
    assert stability.is_degenerate(run_of("a", 0, None))
    assert stability.is_degenerate(run_of("a", 0, 0.519))
    assert not stability.is_degenerate(run_of("a", 0, 0.52))
    assert rates.accuracy_of(run_of("a", 0, None)) == 0.5


def test_bootstrap_of_a_known_case():
    """The mean of a resample of zeros and ones is binomial, so its percentiles are known."""
    ones = 6
    found = intervals.difference([1.0] * ones + [0.5] * (20 - ones), [0.0] * ones + [0.5] * (20 - ones))
    expected = stats.binom(20, ones / 20)
    assert found.value == pytest.approx(ones / 20)
    assert found.low == pytest.approx(expected.ppf(0.025) / 20)
    assert found.high == pytest.approx(expected.ppf(0.975) / 20)
    pairs = [0.1, 0.5, 0.2, 0.9, 0.3]
    assert intervals.difference([one + 0.25 for one in pairs], pairs) == pytest.approx((0.25, 0.25, 0.25))
    assert intervals.difference([1.0] * 4, [0.5] * 4) is None


def test_spreads_and_shares():
    values = [0.5, 0.6, 0.8, 0.9, 0.4]
    ratio = intervals.spread_ratio([value / 4 for value in values], values)
    assert ratio == pytest.approx((0.25, 0.25, 0.25))  # the same restarts in either
    none = intervals.share(0, 20)
    assert (none.value, none.low) == (0, 0)
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 20))
    assert intervals.Interval(0.01, 0.002, 0.02).in_points == "**+1.0 (+0.2 to +2.0)**"
    assert intervals.Interval(0.01, -0.002, 0.02).in_points == "+1.0 (-0.2 to +2.0)"


def test_several_workers_finish_what_one_left(tmp_path):
    """``dict`` as what is run, since a process that is spawned need not import anything for it."""
    path, settings = tmp_path / "runs.jsonl", [{"number": number} for number in range(5)]
    runs.run_all(path, settings[:2], dict)
    assert runs.run_all(path, settings, dict, workers=0) == settings[:2]
    assert runs.run_all(path, settings, dict, workers=2) == settings
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line["settings"]["number"] for line in lines) == list(range(5))
    assert all(line["settings"] == line["results"] for line in lines)
    assert sorted(runs.finished(path), key=lambda run: run["number"]) == settings


def accuracies(strategy, size, rate, split, rows, restart, steps=None):
    """Best at 2e-4; mixout 2 points above the others, and dropout degenerate in its first restart."""
    accuracy = 0.7 + restart / 1000 + (0.02 if strategy.startswith("mixout") else 0.0)
    accuracy -= 0.1 if split == "validation" and rate != 2e-4 else 0.0
    degenerate = split == "test" and restart == 0 and strategy == stability.BASELINE
    return {"accuracy": 0.5 if degenerate else accuracy, "majority": 0.5, "failure": None}


def test_pages_are_made_of_finished_runs_alone(tmp_path, monkeypatch):
    for module in (rates, stability, sweep):
        monkeypatch.setattr(module, "fine_tune", accuracies)
    stability.results(tmp_path, quick=False, workers=1)
    sweep.results(tmp_path, quick=False, workers=1)
    # Cut within the second tier of the first stages: the first has all of its restarts, the second three.
    lines = (tmp_path / finetuning.FILE).read_text().splitlines(keepends=True)
    first = sum(map(len, stability.TIERS[:2])) * 9 + 2 * 20 * len(stability.TIERS[0])
    (tmp_path / finetuning.FILE).write_text("".join(lines[: first + 3 * 2 * len(stability.TIERS[1]) + 1]))
    for module in (rates, stability, sweep):
        monkeypatch.setattr(module, "fine_tune", lambda **_: pytest.fail("a page runs nothing"))
    found = stability.results(tmp_path, quick=False, workers=0)
    text = stability_page.page(found)
    assert text.count("| 20 of 20 |") == 2 * len(stability.TIERS[0])
    assert text.count("|  3 of 20 |") == 2 * len(stability.TIERS[1])
    assert "**+3.0 (+2.0 to +5.0)**" in text  # 19 times 2 points, once 22
    assert "1 (0% to 25%)" in text
    assert text.count("is finished yet") == 2
    stability_page.draw(found, tmp_path / "stability.png")
    swept = sweep.page(sweep.results(tmp_path, quick=False, workers=0))
    assert swept.count("is finished yet") == 2
    sweep.draw(sweep.results(tmp_path, quick=False, workers=0), tmp_path / "sweep.png")


def test_a_step_leaves_the_model_as_it_was():
    training = paper_time.OneModel(paper_time.TINY)
    before = {name: (type(module), id(module)) for name, module in training.model.named_modules()}
    parameters = {name: id(parameter) for name, parameter in training.model.named_parameters()}
    dropouts = {module.p for module in training.model.modules() if isinstance(module, nn.Dropout)}
    for variant in (*paper_time.COMPARED, Variant("plain", 0.9)):
        with paper_time.regularised(training.model, variant):
            inside = {module.p for module in training.model.modules() if isinstance(module, nn.Dropout)}
            assert inside == (dropouts if variant.kind == "dropout" else {0.0})
        assert {name: (type(module), id(module)) for name, module in training.model.named_modules()} == before
        assert {name: id(parameter) for name, parameter in training.model.named_parameters()} == parameters
        assert {module.p for module in training.model.modules() if isinstance(module, nn.Dropout)} == dropouts
    weight = training.model.bert.encoder.layer[0].output.dense.weight.clone()
    assert training.seconds(Variant("layers", 0.5)) > 0
    assert not torch.equal(weight, training.model.bert.encoder.layer[0].output.dense.weight)


def test_time_counts_whole_rounds(tmp_path):
    order = paper_time.in_turn(paper_time.TINY, 3)
    assert [one["round"] for one in order] == sorted([0, 1, 2] * len(paper_time.COMPARED))
    assert order[len(paper_time.COMPARED)]["kind"] == paper_time.COMPARED[1].kind  # another one is first
    steps = [{**one, "seconds": 2.0 if one["kind"] == "dropout" else 1.0} for one in order[:-1]]
    (times,) = paper_time.whole_rounds(steps).values()
    assert {len(seconds) for seconds in times.values()} == {2}
    assert "| mixout_kernels, layer by layer, p=0.9     |                1 |              1 to 1 |        0.50 |" in (
        paper_time.page(steps)
    )
