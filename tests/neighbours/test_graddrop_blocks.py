"""apply_graddrop(mask="layer"): one decision for a block of the model, and a block that is off costs nothing."""

import pytest
import torch
from torch import nn

import mixout_kernels as mk
from mixout_kernels.sampler.seeds import key_of

from .models import BERT_OFF, bert, gradients, padded_batch, spread

SEED = 11


def blocks_off(seed, step, p, model):
    prefix = "bert.encoder.layer"
    keys = [key_of(seed, f"{prefix}.{k}", step) for k in range(len(model.bert.encoder.layer))]
    return [not mk.keep_mask(key, p=p, shape=(1, 1), mask="layer").item() for key in keys]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)])
def test_a_block_that_is_off_stays_still(optimizer):
    """With momentum and decay; everything else is trained, and nothing stops requiring a gradient."""
    model, batch = spread(bert(**BERT_OFF, num_hidden_layers=6)).train(), padded_batch()
    plain = gradients(model, batch)
    mk.apply_graddrop(model, p=0.5, mask="layer")
    mk.MixSampler(model, seed=SEED)
    optimizer = optimizer(model.parameters(), lr=1e-3)
    for step in range(6):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        found = gradients(model, batch)
        assert all(parameter.requires_grad for parameter in model.parameters())
        off = blocks_off(SEED, step, 0.5, model)
        assert 0 < sum(off) < 6 or step
        optimizer.step()
        for name, parameter in model.named_parameters():
            block = int(name.split(".")[3]) if ".layer." in name else None
            if block is None:
                assert not torch.equal(parameter, before[name]), name
            elif off[block]:
                assert torch.equal(parameter, before[name]), name
                assert parameter.grad is None
            elif step == 0:
                torch.testing.assert_close(found[name], plain[name] / 0.5, rtol=1e-9, atol=1e-14, msg=name)


def test_a_block_that_is_off_saves_no_input():
    saved = {}
    for p in (0.0, 1.0):
        model, batch = bert(**BERT_OFF).train(), padded_batch()
        if p:
            mk.apply_graddrop(model, p=p, mask="layer")
            mk.MixSampler(model, seed=SEED)
        kept = []

        def pack(tensor, kept=kept):
            kept.append((tensor.data_ptr(), tensor.nbytes))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(**batch).loss.backward()
        saved[p] = sum(nbytes for _, nbytes in set(kept))
        name = "bert.encoder.layer.0.intermediate.dense"
        assert (model.get_submodule(name).weight.grad is None) is bool(p)
    assert saved[1.0] < 0.8 * saved[0.0]


@pytest.mark.parametrize("host_targets", [False, True])
def test_a_mixed_block_that_is_off_mixes_with_its_target(host_targets):
    """Where w = u, Phi is w for every mask."""
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    x = torch.ones(1, 4)
    expected = [layer(x) for layer in model.layers]
    mk.apply_mixout(model, p=0.3, mask="layer")
    mk.apply_graddrop(model, p=0.5, mask="layer")
    sampler = mk.MixSampler(model, seed=SEED, host_targets=host_targets)
    off = 0
    for _ in range(8):
        model.zero_grad()
        for number, layer in enumerate(model.layers):
            y = layer(x)
            torch.testing.assert_close(y, expected[number])
            y.sum().backward()
            off += layer.weight.grad is None
        sampler.advance()
    assert 0 < off < 16


def test_distributed_data_parallel_trains_on_with_blocks_off(tmp_path):
    """It waits for every parameter, and makes zeros of gradients that are None."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for options in (
            {},
            {"gradient_as_bucket_view": True},
            {"static_graph": True},
            {"find_unused_parameters": True},
        ):
            model, batch = bert(**BERT_OFF).train(), padded_batch()
            mk.apply_graddrop(model, p=0.5, mask="layer")
            mk.MixSampler(model, seed=SEED)
            parallel = nn.parallel.DistributedDataParallel(model, **options)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            for step in range(4):
                before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
                optimizer.zero_grad()
                parallel(**batch).loss.backward()
                optimizer.step()
                off = blocks_off(SEED, step, 0.5, model)
                for name, parameter in model.named_parameters():
                    if ".layer." in name:
                        assert torch.equal(parameter, before[name]) is off[int(name.split(".")[3])], (options, name)
    finally:
        dist.destroy_process_group()


def test_blocks_without_a_sampler_raise():
    model, batch = bert(**BERT_OFF).train(), padded_batch()
    mk.apply_graddrop(model, p=0.5, mask="layer")
    with pytest.raises(ValueError, match="layer masks are drawn once a step"):
        model(**batch)
    model.eval()(**batch)
    mk.MixSampler(model)
    model.train()(**batch)


def test_the_host_and_the_device_decide_alike():
    model = bert(**BERT_OFF).train()
    mk.apply_graddrop(model, p=0.3, mask="layer")
    sampler = mk.MixSampler(model, seed=SEED, every=2)
    seeds = sampler._seeds
    for _ in range(20):
        for number in range(2):
            key = seeds.at(torch.device("cpu"), number)
            assert seeds.drops(number, 0.3) is not mk.keep_mask(key, p=0.3, shape=(1, 1), mask="layer").item()
        sampler.advance()
    sampler.load_state_dict({"seed": 3, "step": 7})
    key = seeds.at(torch.device("cpu"), 1)
    assert seeds.drops(1, 0.3) is not mk.keep_mask(key, p=0.3, shape=(1, 1), mask="layer").item()
