"""The keys of a sampler's masks: SplitMix64 over seed, name and draw, by a second implementation and frozen numbers."""

import hashlib
import itertools
import math

import pytest
import torch
from torch import nn

import mixout_kernels as mk
from mixout_kernels.sampler import seeds
from mixout_kernels.sampler.seeds import Seeds

from . import models

CPU = torch.device("cpu")


def split_mix_64(state):
    """The numbers of the generator, as its authors' C code has them."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z // 2**30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z // 2**27)) * 0x94D049BB133111EB % 2**64
        yield z ^ (z // 2**31)


def finalised(z):
    return next(split_mix_64((z - 0x9E3779B97F4A7C15) % 2**64))


def expected_key(seed, name, draw):
    """From the words of ``seeds.py``'s docstring alone."""
    name_bits = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    start = finalised(next(split_mix_64(seed % 2**64)) ^ name_bits)
    key = next(itertools.islice(split_mix_64(start), draw, None))
    return key - 2**64 if key >= 2**63 else key


def test_the_finaliser_is_split_mix_64():
    """Its published numbers for the seed 1234567."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert list(itertools.islice(split_mix_64(1234567), 4)) == published
    assert [seeds.mix((1234567 + k * seeds.GOLDEN) % 2**64) for k in (1, 2, 3, 4)] == published


@pytest.mark.parametrize(
    ("seed", "name", "draw", "key"),
    [
        (0, "0", 0, 7319295147612032762),
        (1, "0", 0, 7337693879402312177),
        (0, "0", 1, -8220326536293720713),
        (-1, "bert.encoder.layer.11.output.dense", 12345, -2116727194956194263),
        (2**63 - 1, "1.query+1.key+1.value", 2**40, -2646685129189686555),
    ],
)
def test_frozen_keys(seed, name, draw, key):
    """A changed key changes the masks of every run that is resumed."""
    if draw < 10**6:
        assert expected_key(seed, name, draw) == key
    assert seeds.key_of(seed, name, draw) == key
    found = Seeds(seed, 1, [name])
    view = found.at(CPU, 0)
    found.restart(seed, draw)
    assert int(view) == key


@pytest.mark.parametrize("every", [1, 3, math.inf])
@pytest.mark.parametrize("seed", [0, -(2**63), 2**63 - 1, 12345])
def test_the_device_computes_the_keys_of_the_host(seed, every, device):
    names = [f"layer.{number}" for number in range(50)]
    found = Seeds(seed, every, names)
    views = [found.at(torch.device(device), number) for number in range(len(names))]
    addresses = [view.data_ptr() for view in views]
    for step in range(7):
        draw = 0 if every == math.inf else step // every
        assert [int(view) for view in views] == [expected_key(seed, name, draw) for name in names]
        found.advance(1)
    assert [view.data_ptr() for view in views] == addresses  # in place, as a CUDA graph needs it
    assert all(address % 16 == 0 for address in addresses)


def test_a_mask_is_named_after_its_layers():
    """By their full names, whatever else is in the model and in which order."""
    model = models.with_mixout(models.attention_net())
    mk.MixSampler(model, seed=3)
    shared = expected_key(3, "1.query+1.key+1.value", 0)
    assert models.seeds_of(model) == {
        "0": expected_key(3, "0", 0),
        "1.query": shared,
        "1.key": shared,
        "1.value": shared,
        "2": expected_key(3, "2", 0),
    }
    fewer = models.with_mixout(models.attention_net(), exclude=["0"])
    mk.MixSampler(fewer, seed=3)
    assert models.seeds_of(fewer).items() <= models.seeds_of(model).items()


def test_masks_of_neighbouring_seeds_draws_and_layers_are_independent():
    """Any two agree in a binomial count of entries: of 21 masks, 210 pairs, within 6 standard deviations."""
    features = 4096
    model = nn.Sequential(*(nn.Linear(features, 1) for _ in range(7)))
    mk.apply_mixout(model, p=0.5, exclude=())
    masks = []
    for seed, step in ((0, 0), (1, 0), (0, 1)):
        sampler = mk.MixSampler(model, seed=seed)
        sampler.load_state_dict({"seed": seed, "step": step})
        masks += [models.mask_of(layer)[0] for layer in model]
        sampler.remove()
    for first, second in itertools.combinations(masks, 2):
        agreeing = int((first == second).sum())
        assert abs(agreeing - features / 2) < 6 * math.sqrt(features) / 2


def test_restarts_with_seeds_in_a_row_share_no_key():
    keys = [
        seeds.key_of(seed, f"layer.{number}", draw) for seed in range(20) for number in range(24) for draw in range(50)
    ]
    assert len(set(keys)) == len(keys) == 20 * 24 * 50
