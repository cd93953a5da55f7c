"""Which masks a sampler gives: the function of its seed and step, one per optimizer step, the same after a resume."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.utils.parametrize

import mixout_kernels as mk

from .. import axes
from . import models
from .transformers_models import MODELS, inputs, make


@pytest.mark.parametrize("premix", [True, False], ids=["premix", ""])
@axes.masks
def test_forward_is_the_plain_model_over_the_reference_mix(mask, premix):
    """On a CPU to the last bit; gradients within the error budget."""
    model = models.with_mixout(models.attention_net(), mask=mask)
    mk.MixSampler(model, premix=premix)
    x = models.random_input()
    ours, torchs = models.run(model, x), models.reference_run(model, x)
    assert torch.equal(ours.output, torchs.output)
    models.assert_in_budget(ours, torchs, models.reference_run(model, x, torch.float64))


@pytest.mark.parametrize("name", MODELS)
def test_transformers_models(name):
    model, x = models.with_mixout(make(name)), inputs(name)
    mk.MixSampler(model)
    ours, torchs = models.run(model, x), models.reference_run(model, x)
    assert torch.equal(ours.output, torchs.output)
    models.assert_in_budget(ours, torchs, models.reference_run(model, x, torch.float64))


def test_device(device):
    """The same on whatever there is, within the budget."""
    model = models.with_mixout(models.attention_net(), device=device)
    mk.MixSampler(model)
    x = models.random_input(device=device)
    ours, torchs = models.run(model, x), models.reference_run(model, x)
    models.assert_in_budget(ours, torchs, models.reference_run(model, x, torch.float64))


def test_the_mask_is_the_public_keep_mask_of_the_layers_seed():
    """With the identity as input, a layer's output shows its weight: u where keep_mask says dropped, and only there."""
    model = models.with_mixout(models.mlp())
    mk.MixSampler(model)
    layer = model[0]
    y = torch.nn.Sequential(layer)(torch.eye(models.IN)).t() - layer.bias[:, None]
    keep = mk.keep_mask(layer.slot.seed, p=0.5, shape=layer.weight.shape)
    exact = layer.weight.shape[0] * torch.finfo(torch.float32).eps  # the bias was added and taken away again
    assert torch.equal(((y - layer.target).abs() > exact).any(0), keep)


def test_layers_draw_apart():
    """No two layers, and no two steps, share a seed."""
    model = models.with_mixout(models.mlp())
    sampler = mk.MixSampler(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    seeds = []
    for _ in range(50):
        seeds += models.seeds_of(model).values()
        models.step(model, optimizer, models.random_input())
    assert len(set(seeds)) == len(seeds) == 100
    assert sampler.step == 50


def test_the_drop_rate_over_steps_is_p():
    """Each feature of 48 over 400 steps: a binomial count, within 5 standard deviations (2e-6 a test) in the mean."""
    p, steps = 0.7, 400
    model = models.with_mixout(models.mlp(), p=p)
    sampler = mk.MixSampler(model, seed=1)
    kept = torch.zeros(models.IN)
    for number in range(steps):
        sampler.load_state_dict({"seed": 1, "step": number})
        kept += models.mask_of(model[0])[0]
    deviation = math.sqrt(p * (1 - p) / steps)
    assert abs(kept.mean() / steps - (1 - p)) < 5 * deviation / math.sqrt(models.IN)
    assert ((kept / steps - (1 - p)).abs() < 5 * deviation).all()


def test_accumulated_gradients_are_those_of_one_mask():
    """Paper, eq. 2: the gradient over two micro-batches is the one of the whole batch under the same mask."""
    model = models.with_mixout(models.mlp())
    mk.MixSampler(model)
    x = models.random_input(8)
    whole = models.run(model, x, lambda x: model(x))
    model.zero_grad()
    for half in x.chunk(2):
        model(half).square().sum().backward()
    halves = models.Results(whole.output, {name: p.grad.clone() for name, p in model.named_parameters()})
    models.assert_in_budget(halves, models.reference_run(model, x), models.reference_run(model, x, torch.float64))


@pytest.mark.parametrize("every", [1, 2, 3, math.inf])
def test_every(every):
    model = models.with_mixout(models.mlp())
    sampler = mk.MixSampler(model, every=every)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    seen = []
    for _ in range(7):
        seen.append(models.seeds_of(model))
        models.step(model, optimizer, models.random_input())
    changed = [first != second for first, second in itertools.pairwise(seen)]
    assert changed == [every != math.inf and (number + 1) % every == 0 for number in range(6)]
    assert sampler.step == 7


def test_a_fixed_mask_is_mixed_anew_from_the_new_weights():
    model = models.with_mixout(models.mlp())
    mk.MixSampler(model, every=math.inf)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = models.random_input()
    first = model(x)
    models.step(model, optimizer, x)
    assert not torch.equal(model(x), first)
    assert torch.equal(model(x), models.reference_run(model, x).output)


def test_same_seed_same_masks_and_the_default_generator_governs_it():
    def masks(seed, generator_seed):
        torch.manual_seed(generator_seed)
        model = models.with_mixout(models.mlp())
        torch.manual_seed(generator_seed)
        mk.MixSampler(model, seed=seed)
        return models.seeds_of(model)

    assert masks(5, 1) == masks(5, 2)
    assert masks(None, 1) == masks(None, 1)
    assert masks(None, 1) != masks(None, 2)


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1, 0])
def test_seeds_at_the_ends_of_64_bits(seed):
    model = models.with_mixout(models.mlp())
    mk.MixSampler(model, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        x = models.random_input()
        assert torch.equal(model(x), models.reference_run(model, x).output)
        models.step(model, optimizer, x)


class Training:
    """A model, its optimizer and its sampler, as a script makes them from the pretrained weights."""

    def __init__(self, pretrained, **options):
        self.model = copy.deepcopy(pretrained)
        mk.apply_mixout(self.model, p=0.5)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, fused=True)
        self.sampler = mk.MixSampler(self.model, **options)

    def train(self, steps):
        for number in steps:
            models.step(self.model, self.optimizer, models.random_input(number + 1))

    def state(self):
        return {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "sampler")}

    def load(self, state):
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)


@pytest.mark.parametrize("every", [1, 3, math.inf])
def test_a_resumed_run_continues_bit_for_bit(tmp_path, every):
    pretrained = models.attention_net()
    whole = Training(pretrained, every=every)
    whole.train(range(4))
    torch.save(whole.state(), tmp_path / "state.pt")
    whole.train(range(4, 8))

    resumed = Training(pretrained, every=every)  # with a seed of its own
    resumed.model(models.random_input())  # which has mixed already
    assert models.seeds_of(resumed.model) != models.seeds_of(whole.model)
    resumed.load(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.sampler.step == 4
    resumed.train(range(4, 8))
    assert models.seeds_of(resumed.model) == models.seeds_of(whole.model)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


def test_state_dict_holds_the_seed_and_the_step():
    model = models.with_mixout(models.mlp())
    sampler = mk.MixSampler(model, seed=-17)
    models.step(model, torch.optim.SGD(model.parameters(), lr=0.1), models.random_input())
    assert sampler.state_dict() == {"seed": -17, "step": 1}


def test_layers_on_several_devices():
    """The present seeds on each, and one launch for each; "meta" stands for a second GPU."""
    model, x = models.with_mixout(models.mlp()), models.random_input()
    expected = copy.deepcopy(model)
    model[2].to("meta")
    sampler, expected_sampler = (mk.MixSampler(m, seed=1, premix=True) for m in (model, expected))
    optimizers = [torch.optim.SGD(m[0].parameters(), lr=0.05) for m in (model, expected)]
    for step in range(3):
        assert (sampler.step, sampler.draws) == (step, expected_sampler.draws)
        outputs = []
        for m, optimizer in zip((model, expected), optimizers, strict=True):
            hidden = m[0](x)
            assert m[2](hidden.to(m[2].weight.device)).device == m[2].weight.device
            hidden.sum().backward()
            optimizer.step()
            outputs.append(hidden)
        assert torch.equal(*outputs)
        assert model[0].slot.mixed is not None


def test_a_replica_on_another_device():
    """nn.DataParallel gives the copies of a layer its slot, but weights of their own."""
    model, x = models.with_mixout(models.mlp()), models.random_input()
    mk.MixSampler(model, seed=1, premix=True)
    layer = model[0]
    y = layer(x)
    there = [t.to("meta") for t in (x, layer.weight, layer.target, layer.bias)]
    assert layer.slot(*there).device.type == "meta"
    assert torch.equal(layer(x), y)
    assert layer.slot.seed.device.type == "cpu"


def test_layers_that_come_to_the_device_one_by_one():
    """FSDP offloads weights to the host between uses. A seed that is saved for backward must not change meanwhile."""
    model, x = models.with_mixout(models.mlp()), models.random_input()
    sampler = mk.MixSampler(model, seed=1, premix=False)
    expected, y = models.seeds_of(model), x
    for layer in model:
        if isinstance(layer, mk.MixLinear):
            layer.slot.draw.seed = torch.empty(1, dtype=torch.int64, device="meta")  # as if it were still on the host
        y = layer(y)
    assert models.seeds_of(model) == expected
    y.sum().backward()
    models.step(model, torch.optim.SGD(model.parameters(), lr=0.1), x)
    assert sampler.step == 1


def test_p_0_under_a_sampler_is_the_plain_layer():
    model, x = models.with_mixout(models.mlp(), p=0.0), models.random_input()
    mk.MixSampler(model)
    assert torch.equal(model(x), model.eval()(x))


@pytest.mark.parametrize("premix", [True, False], ids=["premix", ""])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(2, 7), ValueError, r"input: expected \[..., 8\] for a weight \[4, 8\], got \[2, 7\]"),
        (torch.ones(()), ValueError, r"input: expected \[..., 8\] for a weight \[4, 8\], got \[\]"),
        (torch.ones(2, 8).double(), TypeError, r"input: expected the weight's dtype torch.float32, got torch.float64"),
        (torch.ones(2, 8).bfloat16(), TypeError, r"input: expected the weight's dtype torch.float32, got torch.bfloat"),
        (torch.ones(2, 8).long(), TypeError, r"input: expected a floating-point tensor, got torch.int64"),
        (torch.ones(2, 8).to_sparse(), TypeError, r"input: expected a dense tensor, got one with layout torch.sparse"),
    ],
    ids=["features", "scalar", "float64", "bfloat16", "int64", "sparse"],
)
def test_an_input_that_does_not_fit_is_an_error(x, error, message, premix):
    """As without a sampler, and as F.linear: in another dtype the layer would compute something else."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    mk.apply_mixout(model, p=0.5, exclude=())
    mk.MixSampler(model, premix=premix)
    with pytest.raises(error, match=f"^MixLinear: {message}"):
        model(x)
