"""decay_to_target and track_targets: after every optimizer step, by the formula, and before the sampler mixes."""

import copy
import warnings
import weakref

import pytest
import torch
from torch import nn

import mixout_kernels as mk
from mixout_kernels import decay, targets

from .. import budget
from . import models

OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "sgd-foreach": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, foreach=True),
    "sgd-fused": lambda groups: torch.optim.SGD(groups, lr=0.1, fused=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.0, foreach=False),
    "adamw-foreach": lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.0, foreach=True),
    "adamw-fused": lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.0, fused=True),
    "adamw-tensor-lr": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(0.1), weight_decay=0.0, fused=True),
}
DECAY = 0.3


class Net(nn.Module):
    """A body, a norm, and a head that is not pretrained."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(models.IN, models.IN)
        self.norm = nn.LayerNorm(models.IN)
        self.classifier = nn.Linear(models.IN, 2)

    def forward(self, x):
        return self.classifier(self.norm(self.body(x)))


def two_groups(model):
    """The norm with a learning rate of its own."""
    norm = list(model.norm.parameters())
    others = [p for p in model.parameters() if all(p is not q for q in norm)]
    return [{"params": others}, {"params": norm, "lr": 0.025}]


def assert_lerp(result, start, end, amount):
    """``start + amount * (end - start)``, truth in float64, against the three operations in the same dtype."""
    start64, end64 = start.double(), end.double()
    terms = torch.stack([start64, amount * end64, amount * start64])
    budget.assert_close(
        result,
        start64 + amount * (end64 - start64),
        start + amount * (end.to(start.dtype) - start),
        norm1=terms.abs().sum(0),
        norm2=terms.norm(dim=0),
        terms=3,
        dtype=start.dtype,
    )


@pytest.mark.parametrize("mixout", [True, False], ids=["mixout", "plain"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pulls_every_weight_to_its_pretrained_value(device, name, mixout):
    """w -= lr * lambda * (w - u), from where the optimizer alone leaves w, with the learning rate of its group."""
    model = Net().to(device)
    pretrained = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if mixout:
        mk.apply_mixout(model, p=0.5)
    without = copy.deepcopy(model)
    optimizer, plain = (OPTIMIZERS[name](two_groups(m)) for m in (model, without))
    mk.decay_to_target(optimizer, model, DECAY)
    for _ in range(3):
        without.load_state_dict(model.state_dict())
        plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for twin, opt in ((model, optimizer), (without, plain)):
            opt.zero_grad()
            torch.manual_seed(1)
            twin(models.random_input(device=device)).square().mean().backward()
            opt.step()
        for key, parameter in model.named_parameters():
            alone = without.get_parameter(key).detach()
            if key.startswith("classifier"):
                assert torch.equal(parameter, alone)
            else:
                lr = 0.025 if key.startswith("norm") else 0.1
                assert_lerp(parameter.detach(), alone, pretrained[key], lr * DECAY)
                assert not torch.equal(parameter, alone)


def test_a_learning_rate_schedule_is_followed():
    model = Net()
    pretrained = model.body.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    mk.decay_to_target(optimizer, model, DECAY)
    with torch.no_grad():
        model.body.weight.add_(1)
    for lr in (0.5, 0.05, 0.005):
        before = model.body.weight.detach().clone()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        schedule.step()
        assert_lerp(model.body.weight.detach(), before, pretrained, lr * DECAY)


def pulled(model, optimizer, handle):
    """The parameters that move when all gradients are zero and all weights have left their target."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
            parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    handle.remove()
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize(
    ("exclude", "parts"),
    [
        (mk.DEFAULT_HEADS, {"body", "norm"}),
        ((), {"body", "norm", "classifier"}),
        (["norm", "classifier"], {"body"}),
        (["*.bias"], {"body.weight", "norm.weight", "classifier.weight"}),
    ],
)
def test_exclude(exclude, parts):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    moved = pulled(model, optimizer, mk.decay_to_target(optimizer, model, DECAY, exclude=exclude))
    expected = {name for name, _ in model.named_parameters() if name in parts or name.split(".")[0] in parts}
    assert moved == expected


def test_only_parameters_of_this_optimizer_move():
    model = Net()
    optimizer = torch.optim.SGD(model.norm.parameters(), lr=0.1)
    assert pulled(model, optimizer, mk.decay_to_target(optimizer, model, DECAY)) == {"norm.weight", "norm.bias"}


def test_frozen_parameters_stay():
    model = Net()
    model.norm.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert pulled(model, optimizer, mk.decay_to_target(optimizer, model, DECAY)) == {"body.weight", "body.bias"}


def test_tied_weights_are_pulled_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    pretrained = model[0].weight.detach().clone()
    mk.apply_mixout(model, p=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    handle = mk.decay_to_target(optimizer, model, DECAY)
    assert pulled(model, optimizer, handle) == {"0.weight", "0.bias", "1.bias"}
    assert_lerp(model[0].weight.detach(), pretrained + 1, pretrained, 0.5 * DECAY)


def test_zero_decay_changes_no_bit():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert pulled(model, optimizer, mk.decay_to_target(optimizer, model, 0.0)) == set()


def test_remove():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mk.decay_to_target(optimizer, model, DECAY).remove()
    assert pulled(model, optimizer, mk.decay_to_target(optimizer, model, 0.0)) == set()


def test_bfloat16_targets():
    model = Net()
    mk.apply_mixout(model, p=0.5, target_dtype=torch.bfloat16)
    target = model.body.target.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    assert "body.weight" in pulled(model, optimizer, mk.decay_to_target(optimizer, model, DECAY))
    before = model.body.weight.detach().clone()
    mk.decay_to_target(optimizer, model, DECAY)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert_lerp(model.body.weight.detach(), before, target, 0.5 * DECAY)


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_targets_follow_their_weights(device, decay, dtype):
    """u = decay u + (1 - decay) w, with the weight that the step has left."""
    model = Net().to(device)
    mk.apply_mixout(model, p=0.5, target_dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mk.track_targets(optimizer, model, decay)
    average = model.body.target.float()
    for _ in range(3):
        before = model.body.target.clone()
        optimizer.zero_grad()
        model(models.random_input(device=device)).square().mean().backward()
        optimizer.step()
        if dtype is None:
            assert_lerp(model.body.target, before, model.body.weight.detach(), 1 - decay)
        else:
            average.lerp_(model.body.weight.detach(), 1 - decay)
            assert torch.equal(model.body.target, average.to(dtype))
        if decay == 1:
            assert torch.equal(model.body.target, before)
        elif decay == 0:
            assert torch.equal(model.body.target, model.body.weight.to(before.dtype))
        else:
            assert not torch.equal(model.body.target, before)


def narrow_and_tracked(decay, dtype=torch.bfloat16):
    """A target of ones, and a weight of twos that stays."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    nn.init.ones_(model[0].weight)
    mk.apply_mixout(model, p=0.5, target_dtype=dtype)
    nn.init.constant_(model[0].weight, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    mk.track_targets(optimizer, model, decay)
    model[0].weight.grad = torch.zeros(4, 4)
    return model[0], optimizer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_target_follows_slowly(dtype):
    """Each step is less than the target's dtype resolves; what has added up is not."""
    layer, optimizer = narrow_and_tracked(0.999, dtype)
    optimizer.step()
    assert layer.target.dtype == dtype
    assert (layer.target - 1).abs().max() <= 0.001
    for _ in range(999):
        optimizer.step()
    expected = torch.full((4, 4), 2 - 0.999**1000)
    assert torch.allclose(layer.target.float(), expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("how", ["another", "in place", "moved"])
def test_a_narrow_target_that_was_replaced(how):
    """The average goes on from another value, and goes on as it was with the model that is moved."""
    layer, optimizer = narrow_and_tracked(0.9985)
    optimizer.step()  # the average is 1.0015, which is rounded to 1
    if how == "another":
        layer.target = torch.full_like(layer.target, 1.5)
    elif how == "in place":
        layer.target.fill_(1.5)
    else:
        layer.target = layer.target.clone()
    optimizer.step()
    optimizer.step()
    # 1.0045 is nearer to 1.0078 than to 1, and 1.003, as without the first step, nearer to 1. So is 1.5015 to 1.5.
    assert layer.target.unique().tolist() == ([1.0078125] if how == "moved" else [1.5])


def test_the_average_of_a_layer_that_is_no_longer_mixed_is_let_go(monkeypatch):
    kept = []
    averages = targets._Averages
    monkeypatch.setattr(targets, "_Averages", lambda: kept.append(averages()) or kept[-1])
    layer, optimizer = narrow_and_tracked(0.9)
    optimizer.step()
    average = weakref.ref(kept[0]._of[layer][0])
    mk.remove_mixout(layer)
    optimizer.step()
    assert average() is None


def test_a_shared_target_moves_once_a_step():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    mk.apply_mixout(model, p=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    mk.track_targets(optimizer, model, 0.5)
    before = model[0].target.clone()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert_lerp(model[0].target, before, model[0].weight.detach(), 0.5)
    assert model[1].target.data_ptr() == model[0].target.data_ptr()


def test_after_the_model_has_moved():
    """.to() replaces the tensors: the layers' own targets go on moving, and are pulled to."""
    model = Net()
    mk.apply_mixout(model, p=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mk.track_targets(optimizer, model, 0.5)
    model.double()
    before = model.body.target.clone()
    model(models.random_input().double()).square().mean().backward()
    optimizer.step()
    assert_lerp(model.body.target, before, model.body.weight.detach(), 0.5)


@pytest.mark.parametrize("sampler_first", [True, False], ids=["sampler-first", "sampler-last"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_sampler_mixes_the_final_weight_and_target_of_the_step(name, sampler_first, monkeypatch):
    """Optimizer, then decay, then the moving target, then Phi: mixed once, whatever was made first."""
    model, x = Net(), models.random_input()
    models.with_mixout(model)
    optimizer = OPTIMIZERS[name](two_groups(model))
    if sampler_first:
        mk.MixSampler(model)
    mk.decay_to_target(optimizer, model, DECAY)
    mk.track_targets(optimizer, model, 0.9)
    if not sampler_first:
        mk.MixSampler(model)
    models.run(model, x)
    mixed = []
    cpu = mk.backends.load("cpu")
    mixout_list = cpu.mixout_list
    monkeypatch.setattr(cpu, "mixout_list", lambda *arguments: (mixed.append(1), mixout_list(*arguments)))
    for number in range(1, 4):
        optimizer.step()
        ours = models.run(model, x)
        assert len(mixed) == number
        assert torch.equal(ours.output, models.reference_run(model, x).output)
        expected = mk.reference.mixout(model.body.weight, model.body.target, p=0.5, seed=model.body.slot.seed)
        assert torch.equal(model.body.slot.mixed, expected)


def pulled_and_followed(tracking):
    """A mixed model, and an optimizer with both hooks."""
    model = Net()
    mk.apply_mixout(model, p=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    mk.decay_to_target(optimizer, model, DECAY)
    mk.track_targets(optimizer, model, tracking)
    return model, optimizer


def test_decay_pulls_to_the_target_before_it_moves():
    model, optimizer = pulled_and_followed(0.9)
    target = model.body.target.clone()
    weight, before = step_from_1_away(model, optimizer)["body.weight"]
    assert_lerp(weight, before, target, 0.5 * DECAY)
    assert_lerp(model.body.target, target, weight, 0.1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_gradscaler_skips_moves_nothing(name, device):
    model = Net().to(device)
    models.with_mixout(model, device=device)
    optimizer = OPTIMIZERS[name](two_groups(model))
    mk.decay_to_target(optimizer, model, DECAY)
    mk.track_targets(optimizer, model, 0.5)
    scaler = torch.amp.GradScaler(device)
    for factor, moves in ((float("inf"), False), (1.0, True), (float("nan"), False)):
        before = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
        optimizer.zero_grad()
        scaler.scale(factor * model(models.random_input(device=device)).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        after = [*model.parameters(), *model.buffers()]
        same = [torch.equal(t, old) for t, old in zip(after, before, strict=True)]
        assert not any(same) if moves else all(same)


@pytest.mark.parametrize(
    ("decay", "error"),
    [(-0.1, ValueError), (float("nan"), ValueError), (float("inf"), ValueError), ("x", TypeError), (True, TypeError)],
)
def test_a_decay_that_is_no_number_from_0_on(decay, error):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = "decay_to_target: decay: expected a finite number >= 0, or a function that gives one, got"
    with pytest.raises(error, match=expected):
        mk.decay_to_target(optimizer, model, decay)


@pytest.mark.parametrize(
    ("decay", "error"),
    [(-0.1, ValueError), (1.1, ValueError), (float("nan"), ValueError), ("x", TypeError), (True, TypeError)],
)
def test_a_tracking_decay_outside_0_and_1(decay, error):
    model = models.with_mixout(models.mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error, match=r"track_targets: decay: expected a number in \[0, 1\], got"):
        mk.track_targets(optimizer, model, decay)


class Wrapper:
    """What no torch.optim.Optimizer is, around one that is."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


@pytest.mark.parametrize("kind", ["accelerate", "other", "twice"])
def test_an_optimizer_in_a_wrapper(kind):
    model = Net()
    mk.apply_mixout(model, p=0.5)
    optimizer = inner = torch.optim.SGD(model.parameters(), lr=0.5)
    if kind == "accelerate":
        accelerate = pytest.importorskip("accelerate")
        accelerate.Accelerator(cpu=True)
        optimizer = accelerate.optimizer.AcceleratedOptimizer(optimizer)
    else:
        optimizer = Wrapper(optimizer) if kind == "other" else Wrapper(Wrapper(optimizer))
    before = model.body.target.clone()
    mk.track_targets(optimizer, model, 0.5)
    handle = mk.decay_to_target(optimizer, model, DECAY)
    stepped = optimizer if kind == "accelerate" else inner
    moved = pulled(model, stepped, handle)
    assert moved == {"body.weight", "body.bias", "norm.weight", "norm.bias"}
    assert not torch.equal(model.body.target, before)


def test_an_optimizer_around_another_is_itself():
    class Around(torch.optim.Optimizer):
        """As Lookahead: its step is more than that of the other."""

        def __init__(self, optimizer):
            super().__init__(optimizer.param_groups[0]["params"], {"lr": 0.5})
            self.optimizer = optimizer

        def step(self, closure=None):
            self.optimizer.step()

    model = Net()
    optimizer = Around(torch.optim.SGD(model.parameters(), lr=0.5))
    steps = []
    mk.decay_to_target(optimizer, model, lambda step: steps.append(step) or 0.0)
    optimizer.step()
    assert steps == [0]
    assert not optimizer.optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("function", [mk.decay_to_target, mk.track_targets])
def test_arguments_in_the_wrong_place(function):
    model = models.with_mixout(models.mlp())
    optimizer, name = torch.optim.SGD(model.parameters(), lr=0.5), function.__name__
    with pytest.raises(TypeError, match=f"^{name}: optimizer: expected a torch.optim.Optimizer, got Sequential$"):
        function(model, optimizer, 0.5)
    with pytest.raises(TypeError, match=f"^{name}: model: expected an nn.Module, got list$"):
        function(optimizer, list(model.parameters()), 0.5)


def test_nothing_to_pull():
    model, other = Net(), Net()
    with pytest.raises(
        ValueError, match="decay_to_target: optimizer: expected one that holds pretrained parameters of the model"
    ):
        mk.decay_to_target(torch.optim.SGD(other.parameters(), lr=0.1), model, DECAY)
    with pytest.raises(ValueError, match="decay_to_target: optimizer"):
        mk.decay_to_target(torch.optim.SGD(model.classifier.parameters(), lr=0.1), model, DECAY)


def test_nothing_to_track():
    for model in (Net(), nn.Sequential(mk.MixLinear(4, 4, p=0.5))):
        with pytest.raises(ValueError, match="track_targets: model: expected one with mixout layers that have"):
            mk.track_targets(torch.optim.SGD(model.parameters(), lr=0.1), model, 0.5)


def test_a_schedule_of_decay_gets_the_steps_taken_before():
    model = Net()
    pretrained = model.body.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    seen = []

    def decay(step):
        seen.append(step)
        return 0.1 * step

    mk.decay_to_target(optimizer, model, decay)
    with torch.no_grad():
        model.body.weight.add_(1)
    for step in range(3):
        before = model.body.weight.detach().clone()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert_lerp(model.body.weight.detach(), before, pretrained, 0.5 * 0.1 * step)
    assert seen == [0, 1, 2]


def test_a_schedule_that_gives_no_decay():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    mk.decay_to_target(optimizer, model, lambda step: -1.0)
    with pytest.raises(ValueError, match=r"decay_to_target: decay: expected a finite number >= 0, .*got -1\.0"):
        optimizer.step()


@pytest.mark.parametrize("mixout", [True, False], ids=["mixout", "plain"])
def test_a_resumed_run_is_pulled_to_the_pretrained_weights(mixout):
    """The model holds the weights of a training checkpoint; biases and norms have their pretrained values elsewhere."""
    model = Net()
    pretrained = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    del pretrained["classifier.weight"], pretrained["classifier.bias"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    if mixout:
        mk.apply_mixout(model, p=0.5, targets=pretrained)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    mk.decay_to_target(optimizer, model, DECAY, targets=pretrained)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        if name in pretrained:
            assert_lerp(parameter.detach(), before[name], pretrained[name], 0.5 * DECAY)
        else:
            assert torch.equal(parameter, before[name])


def test_new_parameters_by_the_loaders_marks_are_not_pulled():
    model = Net()
    model.body.weight._is_hf_initialized = True
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert pulled(model, optimizer, mk.decay_to_target(optimizer, model, DECAY)) == {"body.weight"}


def test_a_typo_in_exclude():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"decay_to_target: exclude: expected patterns that match a para.*'nrom'"):
        mk.decay_to_target(optimizer, model, DECAY, exclude=["nrom"])


def step_from_1_away(model, optimizer):
    """One step with zeros for gradients, of weights that were moved by 1 before; each as it was, and as it is then."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
            parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    return {name: (parameter.detach(), before[name]) for name, parameter in model.named_parameters()}


def values_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def zero_gradients(model):
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None


@pytest.mark.parametrize("from_elsewhere", [False, True], ids=["", "targets"])
@pytest.mark.parametrize("how", ["added", "thawed"])
def test_gradual_unfreezing(how, from_elsewhere, monkeypatch):
    """What trains later is pulled to its pretrained value too, of which no copy is kept until then."""
    model = Net()
    pretrained = values_of(model)
    if from_elsewhere:
        with torch.no_grad():
            model.body.weight.add_(3)
    copied = []
    copy_of = decay.frozen_copy
    monkeypatch.setattr(decay, "frozen_copy", lambda weight: copied.append(weight.shape) or copy_of(weight))
    model.body.requires_grad_(how == "added")
    optimizer = torch.optim.SGD(model.norm.parameters() if how == "added" else model.parameters(), lr=0.5)
    mk.decay_to_target(optimizer, model, DECAY, targets=pretrained if from_elsewhere else None)
    assert len(copied) == 2 + (how == "thawed" and from_elsewhere) * 2  # of a head too, which targets= has an entry for
    zero_gradients(model)
    optimizer.step()
    if how == "added":
        optimizer.add_param_group({"params": list(model.body.parameters()), "lr": 0.25})
    model.body.requires_grad_()
    zero_gradients(model)
    optimizer.step()  # from its pretrained value
    for name, (weight, before) in step_from_1_away(model, optimizer).items():
        if name.startswith("body"):
            assert_lerp(weight, before, pretrained[name], (0.25 if how == "added" else 0.5) * DECAY)
            assert not torch.equal(weight, before)


@pytest.mark.parametrize("how", ["changed", "replaced"])
def test_what_joins_too_late_is_named(how):
    """Its pretrained value is no more: that of its first step would be another one."""
    model = Net()
    optimizer = torch.optim.SGD(model.norm.parameters(), lr=0.5)
    mk.decay_to_target(optimizer, model, DECAY)
    if how == "changed":
        with torch.no_grad():
            model.body.weight.mul_(2)
    else:
        model.body.weight = nn.Parameter(model.body.weight.detach().clone())
    optimizer.add_param_group({"params": list(model.body.parameters())})
    zero_gradients(model)
    with pytest.warns(
        UserWarning, match=r"^decay_to_target: not pulled: 'body.weight', 1 in all, which train from this"
    ):
        optimizer.step()
    moved = step_from_1_away(model, optimizer)
    assert {name for name, (weight, before) in moved.items() if not torch.equal(weight, before)} == {
        "norm.weight", "norm.bias", "body.bias"
    }  # fmt: skip


@pytest.mark.parametrize("mixout", [True, False], ids=["mixout", "plain"])
def test_parameters_that_were_replaced(mixout):
    """In the model and in the optimizer, as accelerate does it for FSDP2."""
    model = Net()
    pretrained = values_of(model)
    if mixout:
        mk.apply_mixout(model, p=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    mk.decay_to_target(optimizer, model, DECAY)
    for layer in (model.body, model.norm):
        for name, parameter in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(parameter.detach().clone()))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    for name, (weight, before) in step_from_1_away(model, optimizer).items():
        if name.startswith("classifier"):
            assert torch.equal(weight, before)
        else:
            assert_lerp(weight, before, pretrained[name], 0.5 * DECAY)


def test_parameters_that_were_replaced_in_the_model_alone():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    mk.decay_to_target(optimizer, model, DECAY)
    optimizer.param_groups[0]["params"] = list(Net().parameters())
    with pytest.warns(UserWarning, match="^decay_to_target: the optimizer holds none of the parameters of the model"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_what_has_no_gradient_stands_still():
    """As under torch's own decay, which apply_graddrop counts on for a block that is off."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    mk.decay_to_target(optimizer, model, DECAY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    zero_gradients(model)
    model.body.weight.grad = None
    before = values_of(model)
    optimizer.step()
    assert torch.equal(model.body.weight, before["body.weight"])
    assert not torch.equal(model.body.bias, before["body.bias"])


def test_a_model_that_was_resized():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    mk.decay_to_target(optimizer, model, DECAY)
    model.body.weight = nn.Parameter(torch.zeros(3, models.IN))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    zero_gradients(model)
    with pytest.raises(
        TypeError, match=r"^decay_to_target: model: expected 'body.weight' .* \[48, 48\], got a Param.* \[3"
    ):
        optimizer.step()


def test_weights_on_the_meta_device():
    with torch.device("meta"):
        model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with pytest.raises(
        ValueError, match=r"^decay_to_target: model: expected pretrained weights, got 'body.weight' on the"
    ):
        mk.decay_to_target(optimizer, model, DECAY)


@pytest.mark.parametrize("stepped", [True, False], ids=["stepped", "at-once"])
@pytest.mark.parametrize("host", [True, False], ids=["host-targets", ""])
def test_after_remove_mixout(stepped, host):
    """The pull goes on, to the last targets; those that followed are no more."""
    model, optimizer = pulled_and_followed(0.5)
    pretrained = values_of(model)
    if host:
        mk.MixSampler(model, host_targets=True)
    if stepped:
        step_from_1_away(model, optimizer)
    pretrained["body.weight"] = model.body.target.clone()
    mk.remove_mixout(model)
    for name, (weight, before) in step_from_1_away(model, optimizer).items():
        if not name.startswith("classifier"):
            assert_lerp(weight, before, pretrained[name], 0.5 * DECAY)


def test_a_target_is_not_held_while_its_layer_is_mixed():
    """A sampler that shards targets, or moves them to the host, lets them go."""
    model, optimizer = pulled_and_followed(0.5)
    step_from_1_away(model, optimizer)
    target = weakref.ref(model.body.target)
    model.body.target = model.body.target.clone()
    assert target() is None


def test_a_target_of_tied_weights_is_found_wherever_it_is():
    """The embedding comes first, and has none."""
    model = nn.ModuleDict({"embedding": nn.Embedding(8, 8), "decoder": nn.Linear(8, 8, bias=False)})
    model["decoder"].weight = model["embedding"].weight
    mk.apply_mixout(model, p=0.5, targets={"decoder.weight": torch.zeros(8, 8)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    mk.decay_to_target(optimizer, model, DECAY)
    ((weight, before),) = step_from_1_away(model, optimizer).values()
    assert_lerp(weight, before, torch.zeros(8, 8), 0.5 * DECAY)


def test_the_handle_removes_all_hooks():
    model = Net()
    optimizer = torch.optim.SGD(model.norm.parameters(), lr=0.5)
    with mk.decay_to_target(optimizer, model, DECAY):
        assert optimizer._optimizer_step_pre_hooks
        assert optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_moved_targets_are_saved_and_given_back():
    """A checkpoint of the model holds none; targets_state_dict does, under the names of the weights."""
    model = Net()
    mk.apply_mixout(model, p=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    mk.track_targets(optimizer, model, 0.5)
    models.run(model, models.random_input())
    optimizer.step()
    state = copy.deepcopy((model.state_dict(), mk.targets_state_dict(model)))
    assert state[1].keys() == {"body.weight"}

    resumed = Net()
    resumed.load_state_dict(state[0])
    mk.apply_mixout(resumed, p=0.5, targets=state[1])
    assert torch.equal(resumed.body.target, model.body.target)
    assert not torch.equal(resumed.body.target, Net().body.weight)
    with pytest.raises(ValueError, match="targets_state_dict: model: expected one with mixout layers that have a targ"):
        mk.targets_state_dict(Net())
