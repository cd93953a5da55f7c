"""mk.fisher against the loop over single examples, and against values computed by hand."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import mixout_kernels as mk

from .. import axes
from .models import (
    albert,
    bert,
    bert_masked_language_model,
    deberta,
    gpt2,
    gpt2_language_model,
    padded_batch,
    roberta,
    spread,
    t5,
    vit,
)


def loop(model, batch, losses):
    """The definition: one forward and one backward for each example."""
    model.eval()
    examples = len(next(iter(batch.values())))
    found = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for example in range(examples):
        loss = losses(model, {name: value[example : example + 1] for name, value in batch.items()}).sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        for total, gradient in zip(found.values(), gradients, strict=True):
            total += 0 if gradient is None else gradient.square() / examples
    return found


def assert_is_the_loop(model, batch, losses, *, mean=False, **options):
    """Against the largest tensor: a key's bias has a gradient of exactly 0, of which the loop finds a rounding."""
    expected = loop(model, batch, losses)
    found = mk.fisher(model, [batch], losses=losses, mean=mean, **options)
    if mean:
        expected = {name: tensor.mean() for name, tensor in expected.items()}
    largest = max(tensor.max() for tensor in expected.values())
    assert found.keys() <= expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-14 * largest.item(), msg=name)
    return found


def sentence_losses(model, batch):
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return F.cross_entropy(logits, batch["labels"], reduction="none")


def token_losses(model, batch):
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits.transpose(1, 2), batch["input_ids"], reduction="none").sum(1)


SENTENCES = {"bert": bert, "roberta": roberta, "albert": albert, "gpt2": gpt2}
TOKENS = {"bert": bert_masked_language_model, "gpt2": gpt2_language_model}


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("name", SENTENCES)
def test_sentences_with_padding(name, mean):
    """Broadcast positions (BERT), layers that are called twice (ALBERT), weights [in, out] (GPT-2)."""
    model = spread(SENTENCES[name]())
    found = assert_is_the_loop(model, padded_batch(), sentence_losses, mean=mean)
    assert found.keys() == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("name", TOKENS)
def test_an_output_layer_tied_to_the_embedding(name, mean):
    """Its two uses are summed before they are squared; by norms where the vocabulary is large, else whole."""
    for vocabulary in (50, 400):
        model = spread(TOKENS[name](vocab_size=vocabulary))
        assert_is_the_loop(model, padded_batch(), token_losses, mean=mean)


def test_the_default_losses_are_cross_entropies():
    model, batch = spread(bert()), padded_batch()
    found = mk.fisher(model, [batch])
    for name, tensor in mk.fisher(model, [batch], losses=sentence_losses).items():
        assert torch.equal(found[name], tensor)


def test_batches_of_any_sizes_give_the_mean_over_examples():
    model, whole = spread(bert()), padded_batch(9)
    expected = mk.fisher(model, [whole])
    for size in (1, 2, 5):
        pieces = [{k: v[start : start + size] for k, v in whole.items()} for start in range(0, 9, size)]
        for name, tensor in mk.fisher(model, pieces).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-10, atol=1e-13)


@settings(max_examples=40, deadline=None)
@given(
    examples=st.integers(1, 6),
    positions=st.integers(1, 9),
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    mean=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_linear_network(examples, positions, sizes, mean, seed):
    """Whatever is larger, the positions or the matrices."""
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    model = nn.Sequential(
        *[m for layer in layers for m in (layer, nn.Tanh(), nn.LayerNorm(layer.out_features))]
    ).double()
    batch = {"x": torch.randn(examples, positions, sizes[0], dtype=torch.float64)}
    assert_is_the_loop(model, batch, lambda model, batch: model(batch["x"]).square().sum((1, 2)), mean=mean)


def test_a_large_weight_is_squared_in_blocks():
    model = nn.Linear(300, 1000).double()  # more than twice the elements of a block
    batch = {"x": torch.randn(3, 4, 300, dtype=torch.float64)}
    assert_is_the_loop(model, batch, lambda model, batch: model(batch["x"]).tanh().sum((1, 2)))


def softmax_regression():
    model = nn.Linear(2, 3).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, -1], [0.25, 0.75], [-0.5, 0]], dtype=torch.float64))
        model.bias.copy_(torch.tensor([0.1, 0, -0.2], dtype=torch.float64))
    x = torch.tensor([[1.0, 2], [-1, 0.5], [0, -2], [3, 1]], dtype=torch.float64)
    y = torch.tensor([0, 2, 1, 1])
    return model, (x, y), lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def test_softmax_regression_by_hand():
    model, batch, losses = softmax_regression()
    found = mk.fisher(model, [batch], losses=losses)
    weight = [[0.4138820491, 1.7330115838], [0.4494629081, 1.7699480657], [0.0742277644, 0.0316904775]]
    bias = [0.4526885205, 0.4964408396, 0.0746178407]
    torch.testing.assert_close(found["weight"], torch.tensor(weight, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(found["bias"], torch.tensor(bias, dtype=torch.float64), rtol=0, atol=1e-10)


def test_per_batch_is_the_square_of_the_mean_gradient():
    model, batch, losses = softmax_regression()
    expected = [[0.004225712, 0.6999595197], [0.011758441, 0.8144105971], [0.0300820657, 0.0043311102]]
    expected = torch.tensor(expected, dtype=torch.float64)
    for batch_losses in (losses, lambda *arguments: losses(*arguments).mean()):
        found = mk.fisher(model, [batch], losses=batch_losses, per="batch")
        torch.testing.assert_close(found["weight"], expected, rtol=0, atol=1e-9)
    means = mk.fisher(model, [batch], losses=losses, per="batch", mean=True)
    torch.testing.assert_close(means["weight"], expected.mean(), rtol=1e-6, atol=0)


def test_a_weight_used_twice_by_hand():
    """loss = ((w.x)^2 + 3 w.x) / 2, the layer being called once for each term."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Linear(2, 1, bias=False)

        def forward(self, x):
            return (self.w(x).square() + 3 * self.w(x)).squeeze(1) / 2

    model = Twice().double()
    with torch.no_grad():
        model.w.weight.copy_(torch.tensor([[0.7, -0.3]], dtype=torch.float64))
    x = torch.tensor([[1, 2], [-1, 0.5]], dtype=torch.float64)
    found = mk.fisher(model, [x], losses=lambda model, x: model(x))["w.weight"]
    torch.testing.assert_close(found, torch.tensor([[1.49125, 5.1728125]], dtype=torch.float64))


def test_padding_idx_has_no_gradient_and_other_tokens_have_theirs():
    model = nn.Sequential(nn.Embedding(6, 3, padding_idx=2), nn.Tanh(), nn.Linear(3, 1)).double()
    batch = {"x": torch.tensor([[2, 2, 1, 1], [5, 2, 0, 1]])}
    found = assert_is_the_loop(model, batch, lambda model, batch: model(batch["x"]).square().sum((1, 2)))
    assert not found["0.weight"][2].any()
    assert found["0.weight"][1].all()


def test_positions_without_a_batch_dimension():
    class Positioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions, self.out = nn.Embedding(9, 4), nn.Embedding(8, 4), nn.Linear(4, 1)

        def forward(self, x):
            return self.out((self.tokens(x) + self.positions(torch.arange(x.shape[1]))).tanh()).sum((1, 2))

    for positions in (5, 3):  # 3: as many as examples
        batch = {"x": torch.randint(0, 9, (3, positions))}
        model = Positioned().double()
        if positions != 3:
            assert_is_the_loop(model, batch, lambda model, batch: model(batch["x"]))
        else:
            with pytest.raises(TypeError, match="'positions', whose output mixes the examples of a batch"):
                mk.fisher(model, [batch], losses=lambda model, batch: model(batch["x"]))


def test_an_in_place_activation():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2), nn.ReLU(inplace=True)).double()
    batch = {"x": torch.randn(5, 2, 3, dtype=torch.float64)}
    assert_is_the_loop(model, batch, lambda model, batch: model(batch["x"]).sum((1, 2)))


def test_activation_checkpointing():
    """Calls the modules of a segment again in backward. (The reentrant form raises by itself.)"""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)

        def forward(self, x):
            return checkpoint(lambda y: self.second(y).tanh(), self.first(x), use_reentrant=False).sum((1, 2))

    batch = {"x": torch.randn(5, 2, 3, dtype=torch.float64)}
    assert_is_the_loop(Checkpointed().double(), batch, lambda model, batch: model(batch["x"]))


@axes.masks
def test_mixout_in_the_model_changes_nothing(mask):
    model, batch = spread(bert()), padded_batch()
    expected = mk.fisher(model, [batch])
    mk.apply_mixout(model, p=0.7, mask=mask)
    for name, tensor in mk.fisher(model.train(), [batch]).items():
        assert torch.equal(tensor, expected[name])


def test_the_model_is_as_before():
    model, batch = spread(bert()).train(), padded_batch()
    model.bert.pooler.eval()
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    requires = [parameter.requires_grad for parameter in model.parameters()]
    found = mk.fisher(model, [batch])
    assert "bert.embeddings.word_embeddings.weight" not in found
    assert modes == [module.training for module in model.modules()]
    assert requires == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_model_is_as_before_after_an_error():
    model = spread(bert()).train()
    with pytest.raises(RuntimeError, match="asked for"):
        mk.fisher(model, [padded_batch()], losses=_raising)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def _raising(model, batch):
    model.bert.embeddings.word_embeddings(batch["input_ids"])
    raise RuntimeError("asked for")


def test_half_precision_is_summed_in_float32():
    model, batch = spread(bert(), torch.float32).bfloat16(), padded_batch()
    found = mk.fisher(model, [batch])
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    exact = mk.fisher(model.double(), [batch])
    for name in ("bert.encoder.layer.0.output.dense.weight", "bert.embeddings.LayerNorm.weight"):
        assert (found[name] - exact[name]).norm() < 0.05 * exact[name].norm()


@pytest.mark.parametrize("make", [deberta, t5, vit])
def test_batches_of_one_example_serve_every_model(make):
    """Relative positions, raw Parameters, convolutions: where several examples raise."""
    model = spread(make())
    batch = padded_batch(1)
    if make is vit:
        batch = {"pixel_values": torch.randn(1, 3, 8, 8, dtype=torch.float64), "labels": torch.tensor([1])}
    losses = sentence_losses
    if make is t5:
        batch["labels"] = batch["input_ids"]

        def losses(model, batch):
            return model(**batch).loss.reshape(1)

    assert_is_the_loop(model, batch, losses)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (deberta, r"got '.*' in a batch of 3 examples"),
        (vit, r"got 'vit.embeddings.cls_token' in a batch of 3 examples"),
        (t5, r"got 'encoder.block.0.layer.0.SelfAttention.relative_attention_bias', whose output \[7, 7, 2\] does not"),
    ],
)
def test_several_examples_of_such_a_model_raise(make, message):
    batch = padded_batch(3)
    if make is vit:
        batch = {"pixel_values": torch.randn(3, 3, 8, 8), "labels": torch.tensor([1, 0, 1])}
    if make is t5:
        batch["labels"] = batch["input_ids"]
    with pytest.raises(TypeError, match=message) as raised:
        mk.fisher(make(), [batch], losses=lambda model, batch: model(**batch).loss)
    assert "include=" in str(raised.value)
    assert "batches of one example" in str(raised.value)


def test_t5_without_its_relative_positions():
    model, batch = spread(t5()), padded_batch(3)

    def losses(model, batch):
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["input_ids"]
        ).logits
        return F.cross_entropy(logits.transpose(1, 2), batch["input_ids"], reduction="none").sum(1)

    for mean in (False, True):
        found = assert_is_the_loop(model, batch, losses, mean=mean, exclude=["relative_attention_bias"])
        assert len(found) == len(list(model.parameters())) - 2


def test_a_weight_read_outside_of_its_forward_raises():
    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return F.linear(self.layer(x), self.layer.weight).sum(1)

    with pytest.raises(TypeError, match=r"got 'layer.weight', which is read outside of the forward of its module"):
        mk.fisher(Outside(), [torch.randn(4, 3)], losses=lambda model, x: model(x))


def test_include_and_exclude():
    model, batch = spread(bert()), padded_batch()
    found = mk.fisher(model, [batch], include=["attention"], exclude=["bias", "LayerNorm"])
    assert len(found) == 8
    expected = mk.fisher(model, [batch])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_the_progress_bar(capsys):
    pytest.importorskip("rich")
    model, batch = spread(bert()), padded_batch()
    mk.fisher(model, [batch])
    assert capsys.readouterr() == ("", "")  # no terminal
    mk.fisher(model, [batch] * 3, progress=True)
    assert "Fisher information" in capsys.readouterr().err


def test_without_rich(monkeypatch):
    model, batch = spread(bert()), padded_batch()
    for name in ("rich.console", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    mk.fisher(model, [batch])
    with pytest.raises(ModuleNotFoundError, match=r"fisher: progress: expected the package rich; pip install rich"):
        mk.fisher(model, [batch], progress=True)


def _mean_loss(model, batch):
    return sentence_losses(model, batch).mean()


def test_errors():
    model, batch = bert(), padded_batch(16)
    expected = r"fisher: losses: expected one loss for each of the 16 examples, got \[\]"
    with pytest.raises(ValueError, match=expected):
        mk.fisher(model, [batch], losses=_mean_loss)
    with pytest.raises(ValueError, match=r"fisher: batches: expected one batch or more, got none"):
        mk.fisher(model, [])
    with pytest.raises(TypeError, match=r"fisher: batches: expected an iterable of batches, got one dict"):
        mk.fisher(model, batch)
    with pytest.raises(ValueError, match=r"fisher: per: expected 'example' or 'batch', got 'token'"):
        mk.fisher(model, [batch], per="token")
    with pytest.raises(TypeError, match=r"fisher: batches: expected mappings, sequences or tensors, got a int"):
        mk.fisher(model, [3])
    with pytest.raises(TypeError, match=r"fisher: losses: expected them to be given for batches .* got a tuple"):
        mk.fisher(model, [(batch["input_ids"], batch["labels"])])
    with pytest.raises(ValueError, match=r"fisher: losses: expected them to be given unless logits are \[n, C\]"):
        mk.fisher(bert_masked_language_model(), [batch])
    with pytest.raises(ValueError, match=r"fisher: losses: expected losses that depend on the parameters"):
        mk.fisher(model, [batch], losses=lambda model, batch: torch.zeros(16))
    with pytest.raises(TypeError, match=r"fisher: model: expected an nn.Module, got str"):
        mk.fisher("bert", [batch])
    with pytest.raises(TypeError, match=r"expected the model itself, got a DataParallel: pass model.module"):
        mk.fisher(nn.DataParallel(model), [batch])
    with pytest.raises(TypeError, match=r"expected the model itself, got a OptimizedModule: pass model._orig_mod"):
        mk.fisher(torch.compile(model), [batch])
    with pytest.raises(ValueError, match=r"fisher: model: expected parameters that require grad and match"):
        mk.fisher(model.requires_grad_(False), [batch])


def test_top_entries_by_the_rule_of_child_tuning_d():
    fisher = {"a": torch.tensor([[1, 8, 3], [2, 9, 0.5]]), "b": torch.tensor([4, 7, 0.1, 6])}
    masks = mk.top_entries(fisher, keep=0.3)
    assert masks["a"].tolist() == [[False, True, False], [False, True, False]]
    assert masks["b"].tolist() == [False, True, False, False]


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(0, 10, width=32), min_size=1, max_size=60), keep=st.floats(0, 1))
def test_the_threshold_is_numpys_percentile(values, keep):
    numpy = pytest.importorskip("numpy")
    values = torch.tensor(values)
    threshold = numpy.percentile(values.double().numpy(), (1 - keep) * 100)
    near = (values.double() - threshold).abs() < 1e-9  # NumPy multiplies by 100 and divides again
    mask = mk.top_entries({"x": values}, keep=keep)["x"]
    assert torch.equal(mask[~near], (values.double() >= threshold)[~near])


def test_top_entries_of_neurons():
    fisher = {"w": torch.tensor([[1.0, 5, 0], [1, 7, 4]]), "b": torch.tensor([0.0, 3])}
    masks = mk.top_entries(fisher, keep=0.5, axis="neuron")  # means 1, 6, 2 and 0, 3: the third of five is 2
    assert masks["w"].tolist() == [False, True, True]
    assert masks["b"].tolist() == [False, True]
    assert mk.top_entries({"w": fisher["w"].t()}, keep=0.5, axis=0)["w"].tolist() == [False, True, True]
    assert all(mask.all() for mask in mk.top_entries(fisher, keep=1).values())


def test_top_entries_errors():
    fisher = {"w": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=r"top_entries: keep: expected a number in \[0, 1\], got 30"):
        mk.top_entries(fisher, keep=30)
    with pytest.raises(ValueError, match=r"top_entries: axis: expected None, 'neuron' or an int, got 'row'"):
        mk.top_entries(fisher, axis="row")
    with pytest.raises(ValueError, match=r"top_entries: axis: expected one that 'w' \[2, 3\] has, got 2"):
        mk.top_entries(fisher, axis=2)
    with pytest.raises(ValueError, match=r"expected the Fisher information of one parameter or more, got none"):
        mk.top_entries({})
    with pytest.raises(ValueError, match=r"expected tensors, got a scalar for 'w' \(mean=True has them\)"):
        mk.top_entries({"w": torch.tensor(1.0)})
