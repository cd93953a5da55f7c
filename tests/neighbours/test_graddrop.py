"""apply_graddrop: every parameter's gradient against its mask, in every way to make one."""

import copy
import math

import pytest
import torch
from torch import nn

import mixout_kernels as mk
from mixout_kernels.sampler.seeds import key_of

from .models import (
    BERT_OFF,
    GPT2_OFF,
    albert,
    bert,
    gpt2,
    gpt2_language_model,
    gradients,
    padded_batch,
    spread,
)

X = torch.tensor([[1.0, 2, 3, 4], [-1, 0.5, 0, 2]])
G = torch.tensor([[1, -2, 0.5], [0, 1, 2]])
SEED = 11


def weight_gradient(**options):
    weight = torch.zeros(3, 4, requires_grad=True)
    mk.mix_linear(X, weight, None, p=0, **options).backward(G)
    return weight.grad


def masked(gradient, key, p, mask, *, rescale=True, axis=None):
    """The definition, by ``keep_mask`` in the gradient's shape."""
    keep = mk.keep_mask(key, p=p, shape=gradient.shape, mask=mask, axis=axis)
    neuron = (1 if gradient.dim() > 1 else 0) if axis is None else axis
    along = {"neuron": [neuron], "output": [0], "weight": range(gradient.dim()), "layer": []}[mask]
    keep = keep.reshape([size if d in along else 1 for d, size in enumerate(gradient.shape)])
    return torch.where(keep, gradient / (1 - p) if rescale else gradient, 0)


# --- values by hand ---------------------------------------------------------------------------------------------------


def test_masks_by_hand():
    assert mk.keep_mask(7, p=0.5, shape=(3, 4)).tolist() == [True, True, False, False]
    expected = [[True, True, False, False], [False, True, False, True], [False, False, True, True]]
    assert mk.keep_mask(7, p=0.5, shape=(3, 4), mask="weight").tolist() == expected
    bits = [mk.keep_mask(seed, p=0.5, shape=(3, 4), mask="layer").item() for seed in range(8)]
    assert bits == [False, True] * 4


def test_a_layers_gradient_by_hand():
    expected = torch.tensor([[2.0, 4, 0, 0], [-6, -7, 0, 0], [-3, 4, 0, 0]])
    assert torch.equal(weight_gradient(grad_p=0.5, seed=7), expected)
    assert torch.equal(weight_gradient(grad_p=0.5, seed=7, rescale=False), expected / 2)
    expected = torch.tensor([[2.0, 4, 0, 0], [0, -7, 0, -12], [0, 0, 3, 12]])
    assert torch.equal(weight_gradient(grad_p=0.5, seed=7, mask="weight"), expected)


def test_mixout_and_graddrop_of_one_word_by_hand():
    """q = 0.7: column 1 is mixed and has no gradient."""
    assert mk.keep_mask(13, p=0.4, shape=(3, 4)).tolist() == [True, False, True, True]
    assert mk.keep_mask(13, p=0.7, shape=(3, 4)).tolist() == [False, False, True, True]
    weight, target = torch.zeros(3, 4, requires_grad=True), torch.zeros(3, 4)
    mk.mix_linear(X, weight, target, p=0.4, grad_p=0.5, seed=13).backward(G)
    assert not weight.grad[:, :2].any()
    torch.testing.assert_close(weight.grad[:, 2:], torch.tensor([[10, 40 / 3], [-20, -20], [5, 20]]))


def test_a_masked_entry_moves_on_by_its_momentum():
    """AdamW, lr 0.1, no decay: gradient 4 twice, and 4 then 0."""
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([w], lr=0.1, weight_decay=0)
    for gradient in ([4, 4], [4, 0]):
        w.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    torch.testing.assert_close(w.detach(), torch.tensor([0.8, 0.8329941751], dtype=torch.float64), rtol=0, atol=1e-9)


def test_one_word_has_the_law_of_two_masks():
    """Of 200 000 entries that the mix kept, 1 - grad_p have a gradient."""
    for p, grad_p in ((0.4, 0.5), (0.7, 0.3), (0.0, 0.9)):
        mixed = mk.keep_mask(5, p=p, shape=(400, 500), mask="weight")
        trained = mk.keep_mask(5, p=1 - (1 - p) * (1 - grad_p), shape=(400, 500), mask="weight")
        assert not (trained & ~mixed).any()
        assert abs(trained.sum() / mixed.sum() - (1 - grad_p)) < 0.005


def test_the_mean_and_the_norm_of_masked_gradients():
    gradient = torch.randn(40, dtype=torch.float64)
    drawn = torch.stack([mk.mixout(gradient, None, p=0.5, mask="weight", seed=seed) for seed in range(4000)])
    z = (drawn.mean(0) - gradient) / (gradient.abs() / 4000**0.5)  # a kept entry is doubled: its deviation is |g|
    assert z.abs().max() < 3.5
    assert drawn.norm(dim=1).square().mean().sqrt() / gradient.norm() == pytest.approx(2**0.5, rel=0.01)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("mask", ["neuron", "weight", "output"])
@pytest.mark.parametrize("make", [lambda: bert(**BERT_OFF), lambda: gpt2(**GPT2_OFF)], ids=["bert", "gpt2"])
def test_every_gradient_has_its_mask(make, mask, rescale):
    """Linear layers by their kernels, everything else by hooks; siblings with one input share a neuron mask."""
    model, batch = spread(make()).train(), padded_batch()
    plain = gradients(model, batch)
    report = mk.apply_graddrop(model, p=0.4, mask=mask, rescale=rescale)
    sampler = mk.MixSampler(model, seed=SEED)
    found = gradients(model, batch)
    parameters = set(plain) - set(report.skipped)
    assert {*report.hooks, *(f"{name}.weight" for name in report.layers)} == parameters
    keys = {"+".join(group): None for group in sampler._seeds.names}
    for name, gradient in plain.items():
        if name not in parameters:
            torch.testing.assert_close(found[name], gradient)
            continue
        layer = name.removesuffix(".weight")
        mask_name = next((n for n in sampler._seeds.names if layer in n.split("+") or name == n), None)
        conv = layer in report.layers and "Conv1D" in report.layers[layer]
        key, axis = key_of(SEED, mask_name, 0), 0 if conv and mask == "neuron" else None
        if conv and mask != "neuron":  # whose rows are input features: decided as [out, in]
            expected = masked(gradient.t(), key, 0.4, mask, rescale=rescale).t()
        else:
            expected = masked(gradient, key, 0.4, mask, rescale=rescale, axis=axis)
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-14, msg=name)
    assert len(keys) == len(sampler._seeds.names)


def test_forward_evaluation_and_checkpoints_stay():
    model, batch = spread(bert(**BERT_OFF)).train(), padded_batch()
    plain, state = model(**batch), copy.deepcopy(model.state_dict())
    types = [type(module) for module in model.modules()]
    mk.apply_graddrop(model, p=0.5)
    found = model(**batch)
    torch.testing.assert_close(found.logits, plain.logits, rtol=1e-12, atol=1e-14)
    assert torch.equal(model.eval()(**batch).logits, plain.logits)
    assert model.state_dict().keys() == state.keys()
    mk.remove_graddrop(model.train())
    assert [type(module) for module in model.modules()] == types
    assert not any(module._forward_pre_hooks for module in model.modules())
    expected = gradients(model, batch)
    assert all(gradient.abs().sum() > 0 for name, gradient in expected.items() if "key.bias" not in name)


def test_without_a_sampler_every_backward_draws_anew():
    model, batch = bert(**BERT_OFF).train(), padded_batch()
    mk.apply_graddrop(model, p=0.5)
    name = "bert.encoder.layer.0.output.dense.weight"
    first, second = gradients(model, batch)[name].clone(), gradients(model, batch)[name]
    assert not torch.equal(first == 0, second == 0)
    torch.manual_seed(3)
    first = {name: gradient.clone() for name, gradient in gradients(model, batch).items()}
    torch.manual_seed(3)
    assert all(torch.equal(gradient, first[name]) for name, gradient in gradients(model, batch).items())


def test_micro_batches_of_a_step_share_the_masks():
    model, batch = spread(bert(**BERT_OFF)).train(), padded_batch(6)
    mk.apply_graddrop(model, p=0.5, mask="weight")
    mk.MixSampler(model, seed=SEED)
    whole = {name: gradient.clone() for name, gradient in gradients(model, batch).items()}
    model.zero_grad()
    for start in (0, 3):
        (model(**{k: v[start : start + 3] for k, v in batch.items()}).loss / 2).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("every", "changes"), [(1, [1, 1, 1, 1]), (2, [0, 1, 0, 1]), (math.inf, [0, 0, 0, 0])])
def test_masks_change_with_optimizer_steps(every, changes):
    """GradDrop, GradDrop-Epoch and a fixed random mask."""
    model, batch = bert(**BERT_OFF).train(), padded_batch()
    mk.apply_graddrop(model, p=0.5)
    mk.MixSampler(model, every=every, seed=SEED)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    names = ["bert.encoder.layer.0.output.dense.weight", "bert.embeddings.word_embeddings.weight"]
    seen = []
    for _ in range(5):
        found = gradients(model, batch)
        seen.append([(found[name] != 0).any(0) for name in names])
        optimizer.step()
    for k, change in enumerate(changes):
        for before, after in zip(seen[k], seen[k + 1], strict=True):
            assert torch.equal(before, after) is not bool(change)


def test_p_for_each_layer():
    model, batch = bert(**BERT_OFF).train(), padded_batch()
    report = mk.apply_graddrop(model, p={"*.layer.0.*": 0.25, "LayerNorm": 0.5, "attention": 1.0})
    assert report.layers["bert.encoder.layer.0.output.dense"].endswith("p=0.25, mask='neuron'")
    assert "p=0.5" in report.hooks["bert.encoder.layer.1.output.LayerNorm.weight"]
    assert report.skipped["bert.encoder.layer.1.output.dense.weight"] == "no pattern of p matches it"
    found = gradients(model, batch)
    assert not found["bert.encoder.layer.1.attention.self.query.weight"].any()
    assert not found["bert.encoder.layer.1.attention.self.query.bias"].any()
    assert found["bert.encoder.layer.1.output.dense.weight"].abs().sum() > 0


def test_a_weight_with_two_readers_is_masked_as_a_whole():
    """A tied output layer: its two gradients have one mask."""
    model, batch = spread(gpt2_language_model(**GPT2_OFF)).train(), padded_batch()
    batch["labels"] = batch["input_ids"]
    plain = gradients(model, batch)["transformer.wte.weight"]
    report = mk.apply_graddrop(model, p=0.5, mask="weight", include=["lm_head"])
    assert list(report.hooks) == ["transformer.wte.weight"]
    mk.MixSampler(model, seed=SEED)
    found = gradients(model, batch)["transformer.wte.weight"]
    key = key_of(SEED, "transformer.wte.weight", 0)
    torch.testing.assert_close(found, masked(plain, key, 0.5, "weight"), rtol=1e-9, atol=1e-14)


def test_a_layer_that_is_called_several_times_has_one_mask_by_a_sampler():
    model, batch = spread(albert(**BERT_OFF, classifier_dropout_prob=0.0)).train(), padded_batch()
    name = "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn"
    plain = gradients(model, batch)[f"{name}.weight"]
    mk.apply_graddrop(model, p=0.5)
    mk.MixSampler(model, seed=SEED)
    found = gradients(model, batch)[f"{name}.weight"]
    torch.testing.assert_close(found, masked(plain, key_of(SEED, name, 0), 0.5, "neuron"), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("mask", ["neuron", "weight"])
@pytest.mark.parametrize("first", ["mixout", "graddrop"])
def test_it_commutes_with_mixout(first, mask):
    """In either order: the forward of mixout, and a gradient where both keep, from one word."""
    model, batch = spread(bert(**BERT_OFF)).train(), padded_batch()

    def apply(what):
        if what == "mixout":
            mk.apply_mixout(model, p=0.4, mask=mask)
        else:
            mk.apply_graddrop(model, p=0.5, mask=mask)

    apply(first)
    apply({"mixout": "graddrop", "graddrop": "mixout"}[first])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)), alpha=0.1)
    mk.MixSampler(model, seed=SEED)
    loss, found = model(**batch).loss, gradients(model, batch)
    mk.remove_graddrop(model)
    mk.MixSampler(model, seed=SEED)
    mixed = gradients(model, batch)
    torch.testing.assert_close(model(**batch).loss, loss)
    name = "bert.encoder.layer.0.output.dense"
    keep = mk.keep_mask(key_of(SEED, name, 0), p=0.7, shape=found[f"{name}.weight"].shape, mask=mask)
    expected = torch.where(keep, mixed[f"{name}.weight"] / 0.5, 0)
    torch.testing.assert_close(found[f"{name}.weight"], expected, rtol=1e-9, atol=1e-14)
    mk.remove_mixout(model)
    assert not any(isinstance(module, mk.MixLinear) for module in model.modules())


def test_remove_mixout_leaves_graddrop():
    model, batch = bert(**BERT_OFF).train(), padded_batch()
    mk.apply_graddrop(model, p=0.5)
    mk.apply_mixout(model, p=0.7)
    mk.remove_mixout(model)
    layer = model.bert.encoder.layer[0].output.dense
    assert (layer.p, layer.grad_p, layer.target) == (0.0, 0.5, None)
    assert (gradients(model, batch)["bert.encoder.layer.0.output.dense.weight"] == 0).all(0).any()
    mk.apply_mixout(model, p=0.7)  # and once more
    mk.remove_graddrop(model)
    assert (layer.p, layer.grad_p) == (0.7, 0.0)


def test_child_tuning_f_masks_every_parameter():
    """g <- g * Bernoulli(reserve_p) / reserve_p for all of them, the head too."""
    model, batch = spread(bert(**BERT_OFF)).train(), padded_batch()
    plain = gradients(model, batch)
    report = mk.apply_graddrop(model, p=1 - 0.3, mask="weight", exclude=())
    assert not report.skipped
    for name, gradient in gradients(model, batch).items():
        kept = gradient != 0
        torch.testing.assert_close(gradient[kept], (plain[name] / 0.3)[kept], rtol=1e-9, atol=1e-14)


def test_hooks_follow_new_parameters():
    """A copy of the model has Parameters of its own, and so has a load that assigns."""
    model, batch = bert(**BERT_OFF).train(), padded_batch()
    mk.apply_graddrop(model, p=1.0)
    sampler = mk.MixSampler(model)
    other = copy.deepcopy(model)
    assert not any(gradient.any() for name, gradient in gradients(other, batch).items() if "classifier" not in name)
    mk.remove_graddrop(model)
    assert sampler not in {m.slot for m in other.modules() if isinstance(m, mk.MixLinear)}
    assert gradients(model, batch)["bert.embeddings.LayerNorm.weight"].any()
    other.load_state_dict(model.state_dict(), assign=True)
    assert not gradients(other, batch)["bert.embeddings.LayerNorm.weight"].any()


def test_a_model_without_linear_layers_has_a_sampler_too():
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Tanh(), nn.Conv1d(4, 2, 1)).double()
    mk.apply_graddrop(model, p=0.5)
    mk.MixSampler(model, seed=SEED)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for _ in range(6):
        model.zero_grad()
        model(torch.ones(2, 3, 5, dtype=torch.float64)).sum().backward()
        seen.append(model[0].weight.grad.any(0).any(1).tolist())
        optimizer.step()
    assert len({tuple(mask) for mask in seen}) > 1


@pytest.mark.parametrize("mask", ["neuron", "weight", "layer"])
def test_compiled_code_has_the_same_masks(mask):
    model = nn.ModuleDict(
        {"blocks": nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), "norm": nn.LayerNorm(6)}
    ).double()
    model.forward = lambda x: model.norm(model.blocks[2](model.blocks[1](model.blocks[0](x).tanh()).tanh())).sum()
    x = torch.randn(4, 6, dtype=torch.float64)
    mk.apply_graddrop(model, p=0.5, mask=mask)
    mk.MixSampler(model, seed=SEED)
    model(x).backward()
    eager = {
        name: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()
    }
    model.zero_grad()
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, eager[name], msg=name)


# --- errors, and the learning rate ------------------------------------------------------------------------------------


def test_errors():
    model = bert()
    with pytest.raises(TypeError, match=r"apply_graddrop: model: expected an nn.Module, got str"):
        mk.apply_graddrop("bert", p=0.5)
    with pytest.raises(ValueError, match=r"apply_graddrop: p: expected either p or keep, got neither"):
        mk.apply_graddrop(model)
    with pytest.raises(ValueError, match=r"apply_graddrop: p: expected either p or keep, got both"):
        mk.apply_graddrop(model, p=0.5, keep={})
    with pytest.raises(ValueError, match=r"apply_graddrop: p: expected a number in \[0, 1\], got 1.5"):
        mk.apply_graddrop(model, p=1.5)
    with pytest.raises(ValueError, match=r"apply_graddrop: mask: expected one of 'neuron', .*, got 'row'"):
        mk.apply_graddrop(model, p=0.5, mask="row")
    with pytest.raises(ValueError, match=r"apply_graddrop: include: expected patterns that match .* got 'no_such'"):
        mk.apply_graddrop(model, p=0.5, include=["no_such"])
    with pytest.raises(ValueError, match=r"apply_graddrop: nothing to mask: .* \(not included\)"):
        mk.apply_graddrop(model, p=0.5, include=["classifier"])
    with pytest.raises(ValueError, match=r"apply_graddrop: p: expected patterns that match, got 'no_such'"):
        mk.apply_graddrop(model, p={"no_such": 0.5})
    with pytest.raises(ValueError, match=r"apply_graddrop: p: expected one p for each block with mask='layer', got"):
        mk.apply_graddrop(model, p={"attention": 0.3, "*": 0.5}, mask="layer")
    with pytest.raises(ValueError, match=r"apply_graddrop: nothing to mask: .* \(outside of every block: always on\)"):
        mk.apply_graddrop(nn.Linear(2, 2), p=0.5, mask="layer")
    with pytest.raises(ValueError, match=r"remove_graddrop: model: expected one with graddrop, got none"):
        mk.remove_graddrop(model)
    assert not any(isinstance(module, mk.MixLinear) for module in model.modules())
    mk.apply_graddrop(model, p=0.5)
    with pytest.raises(ValueError, match=r"apply_graddrop: model: expected one without graddrop; call remove_graddrop"):
        mk.apply_graddrop(model, p=0.5)


def test_sharded_parameters_raise():
    class Sharded(nn.Parameter):
        pass

    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    model[1].weight = Sharded(torch.ones(3))
    with pytest.raises(
        TypeError, match=r"apply_graddrop: model: expected plain Parameters, got a Sharded in '1.weight'"
    ):
        mk.apply_graddrop(model, p=0.5)
    assert type(model[0]) is nn.Linear


def test_one_word_serves_one_granularity():
    model = bert()
    mk.apply_mixout(model, p=0.7)
    expected = r"apply_graddrop: mask: expected 'neuron', the mask of its mixout, for 'bert.encoder.*', got 'weight'"
    with pytest.raises(ValueError, match=expected):
        mk.apply_graddrop(model, p=0.5, mask="weight")
    assert not any(isinstance(module, mk.MixLinear) and module.grad_p for module in model.modules())
    model = bert()
    mk.apply_graddrop(model, p=0.5, mask="weight")
    expected = r"apply_mixout: mask: expected 'weight', the mask of its graddrop, for 'bert.encoder.*', got 'neuron'"
    with pytest.raises(ValueError, match=expected):
        mk.apply_mixout(model, p=0.7)


@pytest.mark.parametrize(("p", "measured"), [(0.5, 0.707), (0.9, 0.314)])
def test_adam_moves_slower_by_the_root_of_what_is_kept(p, measured):
    """A constant gradient and fresh masks: the distance, relative to that without a mask; rescaled or not."""
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 1 / (1 - p)):
        w = torch.zeros(4000, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.AdamW([w], lr=1e-3, weight_decay=0)
        for _ in range(1000):
            w.grad = (torch.rand(4000, generator=generator, dtype=torch.float64) >= p).double() * scale
            optimizer.step()
        speed = -w.detach().mean().item() / 1.0
        assert speed == pytest.approx(measured, rel=0.1)
        assert speed * mk.learning_rate_factor(p) == pytest.approx(1, rel=0.1)


def test_the_learning_rates_factor():
    assert mk.learning_rate_factor(0.0) == 1
    assert mk.learning_rate_factor(0.75) == 2
    assert mk.learning_rate_factor(0.5, 0.5) == pytest.approx(2)
    with pytest.raises(ValueError, match=r"learning_rate_factor: p: expected a number below 1, got 1: nothing moves"):
        mk.learning_rate_factor(1)
    with pytest.raises(ValueError, match=r"learning_rate_factor: grad_p: expected a number in \[0, 1\], got 2"):
        mk.learning_rate_factor(0.5, 2)


def test_evaluation_is_whole():
    """So the Fisher information is the same with graddrop in the model."""
    model, batch = spread(bert(**BERT_OFF)).train(), padded_batch()
    expected = {per: mk.fisher(model, [batch], per=per) for per in ("example", "batch")}
    mk.apply_graddrop(model, p=0.5)
    for per, tensors in expected.items():
        for name, tensor in mk.fisher(model, [batch], per=per).items():
            torch.testing.assert_close(tensor, tensors[name], rtol=1e-10, atol=0, msg=name)
