"""The hook that reduces kept columns against DDP without it: the same gradients, bit for bit, of two ranks."""

import contextlib
import gc
import re
import weakref
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import mixout_kernels as mk
from mixout_kernels.distributed import kept

from ..whole_model.models import Attention, mask_of, mixed_layers
from ..whole_model.processes import RANKS, on_each_rank

WIDTH, STEPS = 48, 3


class Net(nn.Module):
    """Weights as [out, in] and as [in, out], biases and norms, siblings, an embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(Attention(WIDTH), nn.LayerNorm(WIDTH)) for _ in range(2))
        self.wide = conv1d(2 * WIDTH, WIDTH)
        self.last = nn.Linear(2 * WIDTH, 20, bias=False)
        self.unused = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.last(torch.nn.functional.gelu(self.wide(x)))


def conv1d(out, into):
    from transformers.pytorch_utils import Conv1D

    return Conv1D(out, into)


def mixed(p=0.7, **options):
    """Away from the targets, where masks change the result."""
    torch.manual_seed(0)
    model = Net()
    mk.apply_mixout(model, p=p, exclude=("unused",), **options)
    moved(model)
    return model.train()


def moved(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def graddrop(mask, p=0.5):
    torch.manual_seed(0)
    model = Net()
    mk.apply_graddrop(model, p=p, mask=mask, exclude=("unused",))
    return model.train()


def both():
    model = mixed(p=0.5)
    mk.apply_graddrop(model, p=0.4)
    return model


def tied():
    model = mixed()
    model.blocks[1][0].value.weight = model.blocks[0][0].value.weight  # two layers, with masks of their own
    model.blocks[1][0].key.weight = model.blocks[1][0].query.weight  # siblings, which share one
    return model


def tied_to_an_embedding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(32, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 32, bias=False))
    model[2].weight = model[0].weight
    mk.apply_mixout(model, p=0.5)
    return model.train()


def frozen():
    model = mixed()
    model.blocks[0].requires_grad_(False)
    return model


def tokens(rank, number):
    generator = torch.Generator().manual_seed(100 * number + rank)
    return torch.randint(0, 20, (3, 5), generator=generator)


def train(rank, make, hook, *, accumulate=1, sync="last", between=None, inner=None, **ddp_options):
    """The gradients of each step, the weights at the end, and the hook's state."""
    model = make()
    if not ddp_options.get("find_unused_parameters") and isinstance(model, Net):
        model.unused.requires_grad_(False)
    sampler = mk.MixSampler(model, seed=5)
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.01, **ddp_options)
    state = None
    if hook:
        options = {} if inner is None else {"inner": inner}
        state = mk.KeptColumns(sampler, check=0 if between else 1, **options)
        ddp.register_comm_hook(state, mk.kept_columns_hook)
    elif inner is not None:
        ddp.register_comm_hook(None, lambda state, bucket: inner(state, bucket))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    gradients = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(accumulate):
            last = micro == accumulate - 1
            synced = last or sync == "every"
            with contextlib.nullcontext() if synced else ddp.no_sync():
                ddp(tokens(rank, accumulate * step + micro)).square().mean().backward()
            if between is not None and not last:
                between(model, sampler)
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    return gradients, [p.detach() for p in model.parameters()], state


def differences(plain, ours):
    found = [
        (step, name)
        for step, (a, b) in enumerate(zip(plain[0], ours[0], strict=True))
        for name in a.keys() | b.keys()
        if name not in a or name not in b or not torch.equal(a[name], b[name])
    ]
    return found + [number for number, pair in enumerate(zip(plain[1], ours[1], strict=True)) if not torch.equal(*pair)]


def advance(model, sampler):
    sampler.advance()


def change_p(model, sampler):
    for module in model.modules():
        if isinstance(module, mk.MixLinear):
            module.p = 0.2 if module.p != 0.2 else 0.9


def evaluate_a_block(model, sampler):
    model.blocks[0].train(not model.blocks[0].training)


def weight_mask():
    return mixed(mask="weight")


def output_mask():
    return mixed(mask="output")


def layer_mask():
    return mixed(p=0.5, mask="layer")


def nothing_kept():
    return mixed(p={"wide": 1.0, "*": 0.9})


def graddrop_neuron():
    return graddrop("neuron")


def graddrop_output():
    return graddrop("output")


def graddrop_blocks():
    return graddrop("layer")


bf16 = default_hooks.bf16_compress_hook
# name: (model, options of train)
EQUAL = {
    "plain": (mixed, {}),
    "bucket view": (mixed, {"gradient_as_bucket_view": True}),
    "static graph": (mixed, {"static_graph": True}),
    "find unused": (mixed, {"find_unused_parameters": True}),
    "no_sync": (mixed, {"accumulate": 3}),
    "no_sync, bucket view": (mixed, {"accumulate": 3, "gradient_as_bucket_view": True}),
    "several backwards": (mixed, {"accumulate": 3, "sync": "every"}),
    "several backwards, other masks between": (mixed, {"accumulate": 3, "sync": "every", "between": advance}),
    "bf16": (mixed, {"inner": bf16}),
    "fp16": (mixed, {"inner": default_hooks.fp16_compress_hook}),
    "bf16 wrapper": (mixed, {"inner": default_hooks.bf16_compress_wrapper(default_hooks.allreduce_hook)}),
    "output": (output_mask, {}),
    "layer": (layer_mask, {}),
    "weight": (weight_mask, {}),
    "p is 1": (nothing_kept, {}),
    "frozen": (frozen, {}),
    "tied": (tied, {}),
    "tied to an embedding": (tied_to_an_embedding, {}),
    "graddrop": (graddrop_neuron, {}),
    "graddrop, output": (graddrop_output, {}),
    "graddrop, blocks": (graddrop_blocks, {"find_unused_parameters": False}),
    "graddrop and mixout": (both, {"accumulate": 2}),
    "other masks between": (mixed, {"accumulate": 3, "between": advance}),
    "another p between": (mixed, {"accumulate": 3, "between": change_p}),
    "a block in eval mode between": (mixed, {"accumulate": 4, "between": evaluate_a_block}),
    "as on a GPU": (mixed, {"on_gpu": True}),
}


class Found(NamedTuple):
    differences: list
    sent_bytes: int
    dense_bytes: int
    described: str


def penalised(rank, hook, check, penalised_ranks=range(RANKS), seed=5):
    """The gradients of a step whose loss has a penalty on the weights, on some ranks; or what was raised."""
    model = mixed()
    model.unused.requires_grad_(False)
    sampler = mk.MixSampler(model)
    sampler.load_state_dict({"seed": seed, "step": 0})
    ddp = DistributedDataParallel(model)
    if hook:
        ddp.register_comm_hook(mk.KeptColumns(sampler, check=check), mk.kept_columns_hook)
    loss = ddp(tokens(rank, 0)).square().mean()
    if rank in penalised_ranks:
        loss = loss + sum(parameter.square().sum() for parameter in model.parameters())
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


def other_masks(rank):
    return penalised(rank, True, check=1, penalised_ranks=(), seed=5 + rank)


def terms_from_elsewhere(rank):
    return penalised(rank, True, check=1, penalised_ranks=(1,))


def the_same_terms_everywhere(rank):
    return all(map(torch.equal, penalised(rank, False, 0), penalised(rank, True, 0)))


def every_case(rank):
    found = {}
    for name, (make, options) in EQUAL.items():
        on_gpu = options.pop("on_gpu", False)
        plain = train(rank, make, False, **options)
        with mock.patch.object(kept, "_host_knows", return_value=not on_gpu):
            ours = train(rank, make, True, **options)
        found[name] = Found(differences(plain, ours), ours[2].sent_bytes, ours[2].dense_bytes, str(ours[2]))
    for case in (other_masks, terms_from_elsewhere, the_same_terms_everywhere):
        found[case.__name__] = case(rank)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return on_each_rank(every_case, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", EQUAL)
def test_gradients_are_those_of_plain_ddp(found, name):
    for rank in found:
        assert rank[name].differences == []


def test_less_is_sent(found):
    """Of p=0.7 and p=0.5 by the masks' own rates; of the rest as much as there is to send."""
    for rank in found:
        share = {name: rank[name].sent_bytes / rank[name].dense_bytes for name in EQUAL}
        assert share["plain"] == share["bucket view"] == share["static graph"] == share["no_sync"]
        assert 0.25 < share["plain"] < 0.45
        assert 0.25 < share["output"] < 0.45
        assert 0.4 < share["graddrop"] < 0.6
        assert 0.4 < share["graddrop, output"] < 0.6
        assert share["graddrop and mixout"] < 0.4
        assert share["layer"] < 1
        assert share["graddrop, blocks"] < 1
        assert share["p is 1"] < 0.2
        assert share["as on a GPU"] < 1
        assert share["weight"] == share["other masks between"] == 1
        assert share["plain"] < share["a block in eval mode between"] < 1


def test_what_is_sent_is_told(found):
    described = {name: found[0][name].described for name in EQUAL}
    assert re.search(r"^  wide\.weight +\d+ of 48 on axis 0$", described["plain"], re.MULTILINE)
    assert re.search(r"^  last\.weight +\d+ of 96 on axis 1$", described["plain"], re.MULTILINE)
    assert "bias" not in described["plain"]
    assert re.search(r"^  last\.weight +whole: each entry is decided by itself$", described["weight"], re.MULTILINE)
    assert re.search(r"^  0\.weight +whole: Embedding holds it too$", described["tied to an embedding"], re.MULTILINE)
    assert "0.query.weight  whole: it is not masked now" in described["a block in eval mode between"]


def test_ranks_with_other_masks_are_an_error_on_each(found):
    for rank in found:
        assert rank["other_masks"].startswith(
            "KeptColumns: sampler: expected the same mask of 'blocks.0.0.query.weight' on every rank, got different "
            "ones on ranks 0 and 1"
        )


def test_terms_from_elsewhere_are_an_error_on_each(found):
    for rank in found:
        assert re.match(
            r"KeptColumns: the gradient of 'blocks\.0\.0\.query\.weight': expected zeros where its mask drops, got "
            r"\d+ other entries on rank 1: ",
            rank["terms_from_elsewhere"],
        )


def test_terms_that_are_the_same_everywhere_are_kept(found):
    assert all(rank["the_same_terms_everywhere"] for rank in found)


# --- one process ------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def hooked(model, hook=mk.kept_columns_hook, **options):
    sampler = mk.MixSampler(model, seed=5)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    state = mk.KeptColumns(sampler, **options)
    ddp.register_comm_hook(state, hook)
    return ddp, state


def test_the_bytes_are_those_of_the_masks(alone):
    ddp, state = hooked(mixed())
    ddp(tokens(0, 0)).sum().backward()
    layers = mixed_layers(ddp.module)
    kept = sum(int(mask_of(layer).sum()) for layer in layers.values())
    rest = [p.numel() for n, p in ddp.module.named_parameters() if n.removesuffix(".weight") not in layers]
    assert len(layers) == 8
    assert state.sent_bytes == 4 * (kept + sum(rest))
    assert state.dense_bytes == 4 * sum(p.numel() for p in ddp.module.parameters())


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.overloadpacket)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("on_gpu", [True, False])
def test_on_a_gpu_nothing_is_read_back(alone, monkeypatch, on_gpu):
    """The host waits for the device in an operation whose result it needs: a scalar, or a number of indices."""
    if on_gpu:
        monkeypatch.setattr(kept, "_host_knows", lambda parameter: False)
    operations = Operations()

    def watched(state, bucket):
        with operations:
            return mk.kept_columns_hook(state, bucket)

    ddp, state = hooked(mixed(), watched, check=0)
    ddp(tokens(0, 0)).sum().backward()
    assert torch.ops.aten.index_select in operations.seen
    reads = {torch.ops.aten.nonzero, torch.ops.aten._local_scalar_dense, torch.ops.aten.equal}
    assert bool(operations.seen & reads) is not on_gpu
    assert state.sent_bytes < state.dense_bytes


def test_a_compiled_reducer_is_refused(alone):
    _, state = hooked(mixed())
    with pytest.raises(
        TypeError, match=r"^kept_columns_hook: bucket: expected a torch\.distributed\.GradBucket, got a? ?tup"
    ):
        mk.kept_columns_hook(state, (torch.zeros(3), torch.zeros(3)))


def test_without_the_sampler_gradients_are_whole(alone):
    ddp, state = hooked(mixed())
    state.sampler.remove()
    ddp(tokens(0, 0)).sum().backward()
    assert state.sent_bytes == state.dense_bytes > 0


def test_the_state_keeps_nothing_alive():
    model = mixed()
    sampler = weakref.ref(mk.MixSampler(model))
    state = weakref.ref(mk.KeptColumns(sampler()))
    gc.collect()
    assert state() is None
    assert sampler() is not None
    model(tokens(0, 0)).sum().backward()
    del model
    gc.collect()
    assert sampler() is None


def test_arguments_that_do_not_fit():
    model = mixed()
    sampler = mk.MixSampler(model, same_on_all_ranks=False)
    with pytest.raises(
        ValueError, match=r"^KeptColumns: sampler: expected one with same_on_all_ranks=True, got False: "
    ):
        mk.KeptColumns(sampler)
    sampler.remove()
    sampler = mk.MixSampler(model)
    with pytest.raises(TypeError, match=r"^KeptColumns: sampler: expected a MixSampler, got Net$"):
        mk.KeptColumns(model)
    with pytest.raises(TypeError, match=r"^KeptColumns: inner: expected a communication hook, got str$"):
        mk.KeptColumns(sampler, inner="allreduce")
    for check in (-1, 1.0, True):
        with pytest.raises(ValueError, match=rf"^KeptColumns: check: expected an int >= 0, got {check}$"):
            mk.KeptColumns(sampler, check=check)
