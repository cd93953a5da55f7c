"""FSDP2 with sharded targets in the modes in which models train: Phi is always that of the forward that reads it."""

import functools

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint

import mixout_kernels as mk

from ..whole_model import models
from ..whole_model.processes import RANKS, on_each_rank
from .sharded import Twins, error_of, full, layers, mlp

SAME = {"losses": True, "gradients": True}


def first_alone(model):
    """The root then has a mixed weight too, which lies unsharded between forward and backward."""
    return layers(model)[:1]


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner = models.attention_net()
        self.reentrant = reentrant

    def forward(self, x):
        x = self.inner[0](x)
        return self.inner[2](checkpoint(self.inner[1], x, use_reentrant=self.reentrant))


def in_turns(**options):
    """Evaluation, a forward without backward, training steps."""
    twins = Twins(units=first_alone, **options)
    found = []
    for number in range(2):
        for train, grad in ((False, False), (True, False), (False, True), (True, True)):
            with torch.set_grad_enabled(grad):
                losses = [twins.loss(model.train(train), number) for model in twins.pair]
            found.append(torch.equal(*losses))
        found.append(twins.train(steps=1) == SAME)
    return found


def evaluated_before_backward():
    """What lies unsharded, or is gathered for backward, is no longer what forward read."""
    errors = []
    for reshard in (True, False):
        twins = Twins(p=0.7, reshard_after_forward=reshard)
        loss = twins.loss(twins.sharded.train())
        with torch.no_grad():
            twins.loss(twins.sharded.eval())
        errors.append(error_of(loss.backward))
    return errors


def trained_and_evaluated_in_one_gradient():
    """Columns that one forward's mask drops have a gradient of the other's."""
    twins = Twins(p=0.7)
    for evaluate in (False, True):
        twins.sharded.set_requires_gradient_sync(evaluate)
        for model in twins.pair:
            twins.loss(model.train(not evaluate)).backward()
    return twins.gradients_equal()


def checkpointed(reentrant):
    return Twins(functools.partial(Checkpointed, reentrant), units=lambda model: layers(model)[1:4]).train()


def prefetched():
    twins = Twins(models.attention_net, reshard_after_forward=True)
    sharded = layers(twins.sharded)
    twins.sharded.set_modules_to_forward_prefetch([*sharded])
    sharded[2].set_modules_to_backward_prefetch([sharded[1]])
    return twins.train()


def without_synchronisation():
    twins = Twins(models.attention_net, p=0.7)
    for step in range(2):
        twins.zero_grad()
        for micro in range(3):
            twins.sharded.set_requires_gradient_sync(micro == 2)
            twins.sharded.set_reshard_after_backward(micro == 2)
            for model in twins.pair:
                twins.loss(model.train(), 10 * step + micro).backward()
        equal = twins.gradients_equal()
        for optimizer in twins.optimizers:
            optimizer.step()
        yield equal


def different_masks_in_one_gradient():
    """Draws between forwards whose gradients are added before they are reduced: each has kept columns of its own."""
    twins = Twins(p=0.7)
    for micro in range(2):
        twins.sharded.set_requires_gradient_sync(micro == 1)
        for model in twins.pair:
            twins.loss(model.train(), micro).backward()
        for sampler in twins.samplers:
            sampler.advance()
    return twins.gradients_equal()


def half_precision():
    """Phi is mixed in float32 and rounded once; dw is that of the same products in one process."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    twins = Twins(functools.partial(mlp, 48, 41, 9), units=lambda model: [], mp_policy=policy)
    layer, alone = layers(twins.sharded)[0], layers(twins.alone)[0]
    seen = []

    def look(module, args, output):
        seen.extend([module.weight.detach().clone(), args[0]])
        output.register_hook(seen.append)

    layer.register_forward_hook(look)
    twins.loss(twins.sharded.train()).backward()
    phi, x, g = seen
    seed = alone.slot.seed.clone()
    expected = mk.reference.mixout(alone.weight.detach(), alone.target, p=alone.p, seed=seed).bfloat16()
    keep = mk.reference.keep_mask(seed, p=alone.p, shape=alone.weight.shape)
    dw = (g.float().t() @ x.float()) * keep / (1 - alone.p) * twins.ratio
    found = full(layer.weight.grad)
    error = ((found - dw).norm() / dw.norm()).item()
    return torch.equal(phi, expected), found.dtype == torch.float32, error < torch.finfo(torch.bfloat16).eps


def brought_elsewhere():
    """``_apply`` and assign=True bring new local tensors, of uneven shards too."""
    twins = Twins(functools.partial(mlp, 48, 41, 9), units=first_alone)
    found = [twins.train(steps=1)]
    for model in twins.pair:
        model.double().float()
    state = {name: value.clone() for name, value in twins.sharded.state_dict().items()}
    twins.sharded.load_state_dict(state, assign=True)
    twins.sharded.set_modules_to_forward_prefetch([layers(twins.sharded)[0]])
    for sampler in twins.samplers:
        sampler.advance(0)
    twins.optimize(torch.optim.SGD)
    return [*found, twins.train(steps=2)]


def compiled():
    twins = Twins()
    torch._dynamo.reset()
    twins.sharded.compile(backend="aot_eager")
    found = twins.train()
    for model in twins.pair:
        model.eval()
    return found, torch.equal(*(twins.loss(model) for model in twins.pair))


def sampler_made_late():
    """After the first forward, and once more after it was removed."""

    def forward(model):
        model.eval()(torch.randn(2, 48))

    twins = Twins(between=forward)
    found = [twins.train(steps=2)]
    whole = twins.alone
    for sampler in twins.samplers:
        sampler.remove()
    found.append([torch.equal(a.target, b.target) for a, b in zip(layers(whole), layers(twins.sharded), strict=True)])
    twins.samplers = [mk.MixSampler(model, seed=5) for model in twins.pair]
    return [*found, twins.train(steps=2)]


def drawn_between_forward_and_backward():
    twins = Twins(reshard_after_forward=True)
    loss = twins.loss(twins.sharded.train())
    twins.samplers[1].advance()
    return error_of(loss.backward)


def called_past_fsdp():
    """A layer of a unit that lies unsharded for another mode: nothing tells FSDP of this call."""
    twins = Twins(units=lambda model: [], reshard_after_forward=False)
    with torch.no_grad():
        twins.loss(twins.sharded.train())
    layer = layers(twins.sharded)[0]
    return error_of(lambda: layer.eval()(torch.ones(1, 48)))


def read_beside_the_layer():
    twins = Twins(p=0.7, units=lambda model: [])
    model = twins.sharded.train()
    penalties = []
    layers(model)[0].register_forward_hook(lambda module, args, output: penalties.append(module.weight.square().sum()))
    loss = twins.loss(model)
    return error_of((loss + penalties[0]).backward)


def compiled_autograd():
    from mixout_kernels.sampler.shards import units

    twins = Twins()
    known = units._TORCH
    units._TORCH = (2, 11)
    try:
        with torch._dynamo.config.patch(compiled_autograd=True):
            return error_of(lambda: twins.loss(twins.sharded.train()))
    finally:
        units._TORCH = known


CASES = {
    "turns": in_turns,
    "turns, resharded": functools.partial(in_turns, reshard_after_forward=True),
    "turns, not resharded": functools.partial(in_turns, reshard_after_forward=False),
    "turns, kept columns gathered": functools.partial(in_turns, sampler={"kept_all_gather": True}),
    "evaluated before": evaluated_before_backward,
    "trained and evaluated": trained_and_evaluated_in_one_gradient,
    "checkpointed": functools.partial(checkpointed, False),
    "checkpointed, reentrant": functools.partial(checkpointed, True),
    "prefetched": prefetched,
    "without synchronisation": lambda: list(without_synchronisation()),
    "different masks": different_masks_in_one_gradient,
    "half precision": half_precision,
    "brought elsewhere": brought_elsewhere,
    "compiled": compiled,
    "late": sampler_made_late,
    "drawn between": drawn_between_forward_and_backward,
    "past FSDP": called_past_fsdp,
    "read": read_beside_the_layer,
    "compiled autograd": compiled_autograd,
}


def every_case(rank):
    return {name: case() for name, case in CASES.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    ranks = on_each_rank(every_case, tmp_path_factory.mktemp("ranks"))
    return lambda name: [rank[name] for rank in ranks]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("turns")])
def test_evaluation_and_training_in_turns(found, name):
    assert found(name) == [[True] * 10] * RANKS


@pytest.mark.parametrize("name", ["checkpointed", "checkpointed, reentrant", "prefetched"])
def test_steps_of_one_process(found, name):
    assert found(name) == [SAME] * RANKS


def test_gradients_that_are_reduced_later(found):
    assert found("without synchronisation") == [[True, True]] * RANKS


@pytest.mark.parametrize("name", ["trained and evaluated", "different masks"])
def test_no_column_is_lost_where_masks_differ(found, name):
    assert found(name) == [True] * RANKS


def test_phi_is_rounded_once(found):
    assert found("half precision") == [(True, True, True)] * RANKS


def test_a_model_that_was_brought_elsewhere(found):
    assert found("brought elsewhere") == [[SAME, SAME]] * RANKS


def test_compiled(found):
    assert found("compiled") == [(SAME, True)] * RANKS


def test_a_late_sampler(found):
    """And targets are whole again once a sampler was removed."""
    assert found("late") == [[SAME, [True, True], SAME]] * RANKS


@pytest.mark.parametrize("name", ["drawn between", "evaluated before"])
def test_backward_with_another_weight_than_forward(found, name):
    for messages in found(name):
        for message in messages if isinstance(messages, list) else [messages]:
            assert "MixLinear '2': expected in backward the weight of its forward, that of draw 0" in message


def test_a_call_past_fsdp(found):
    for message in found("past FSDP"):
        assert message.startswith(
            "RuntimeError: MixLinear '0': expected a weight that was gathered for evaluation, got"
        )


def test_a_gradient_from_outside_the_layer(found):
    for message in found("read"):
        assert message.startswith("RuntimeError: MixSampler: the gradient of the weight of '0': expected zeros in the")


def test_compiled_autograd_of_old_versions(found):
    for message in found("compiled autograd"):
        assert message.startswith(
            "RuntimeError: MixSampler: expected no compiled autograd with sharded targets in torch"
        )
