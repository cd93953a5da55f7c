"""The Fisher information of examples that lie on several ranks."""

import functools

import pytest
import torch

import mixout_kernels as mk

from ..neighbours.models import bert, padded_batch, spread
from ..whole_model.processes import on_each_rank

SHARES = ([slice(0, 3), slice(3, 4)], [slice(4, 6)])  # of six examples: the batches of each rank


def batches(slices):
    return [{name: value[share] for name, value in padded_batch(6).items()} for share in slices]


def fisher(slices, mean):
    torch.manual_seed(0)  # the same model and the same examples on every rank
    return mk.fisher(spread(bert()), batches(slices), mean=mean)


def fisher_of_share(rank, mean):
    return fisher(SHARES[rank], mean)


@pytest.mark.parametrize("mean", [False, True], ids=["entries", "means"])
def test_every_rank_has_that_of_all_examples(tmp_path, mean):
    found = on_each_rank(functools.partial(fisher_of_share, mean=mean), tmp_path)
    for name, expected in fisher([slice(0, 6)], mean).items():
        for of_rank in found:
            torch.testing.assert_close(of_rank[name], expected, rtol=1e-10, atol=1e-14, msg=name)
