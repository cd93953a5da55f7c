"""transformers' Trainer and accelerate under DDP of two processes: the hook is registered, and changes no weight."""

import os
import warnings

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

import mixout_kernels as mk

from ..whole_model.processes import RANKS, on_each_rank
from ..whole_model.transformers_models import NO_DROPOUT, SMALL

pytest.importorskip("accelerate")


def bert(**options):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SMALL, **NO_DROPOUT, vocab_size=50, max_position_embeddings=16))
    mk.apply_mixout(model, p=0.7)
    return model, mk.MixSampler(model, seed=3, **options)


def examples():
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(1, 50, (6,), generator=generator), "labels": number % 2} for number in range(16)
    ]


def trainer(model, folder, callbacks, accumulation=1):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-3,
        use_cpu=True,
        ddp_backend="gloo",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    return Trainer(model=model, args=arguments, train_dataset=examples(), callbacks=callbacks)


def trained(folder, kept_columns, accumulation=1, own_hook=False, **options):
    """The weights, the hook's state, and what was warned of."""
    model, sampler = bert(**options)
    if kept_columns == "bf16":
        kept_columns = mk.KeptColumns(sampler, inner=bf16_compress_hook)
    train = trainer(model, folder, [mk.MixSamplerCallback(sampler, kept_columns)], accumulation)
    if own_hook:
        wrap = train.accelerator.prepare_model

        def prepare(*arguments, **keywords):
            ddp = wrap(*arguments, **keywords)
            ddp.register_comm_hook(None, allreduce_hook)
            return ddp

        train.accelerator.prepare_model = prepare
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train.train()
        train.train()  # once more with the same DDP
    assert isinstance(train.model_wrapped, DistributedDataParallel)
    states = [state for _, state in train.model_wrapped._comm_hooks if isinstance(state, mk.KeptColumns)]
    messages = [str(one.message) for one in said if "MixSamplerCallback" in str(one.message)]
    sent = [(state.sent_bytes, state.dense_bytes, state.inner.__name__) for state in states]
    return [parameter.detach() for parameter in model.parameters()], sent, messages


def with_accelerate(hooked):
    from accelerate import Accelerator

    model, sampler = bert()
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    state = mk.KeptColumns(sampler)
    if hooked:
        wrapped.register_comm_hook(state, mk.kept_columns_hook)
    for number in range(2):
        batch = examples()[2 * number + accelerator.process_index]
        accelerator.backward(wrapped(input_ids=batch["input_ids"][None], labels=torch.tensor([batch["labels"]])).loss)
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()], state.sent_bytes, state.dense_bytes


def every_case(rank):
    # What torchrun says to each process; the process group is there already.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29400", ACCELERATE_USE_CPU="true")
    folder = f"{os.environ['TMPDIR_OF_TEST']}/{rank}"
    return {
        "plain": trained(folder, False),
        "hooked": trained(folder, True),
        "plain, accumulated": trained(folder, False, accumulation=2),
        "hooked, accumulated": trained(folder, True, accumulation=2),
        "bf16": trained(folder, "bf16"),
        "another hook": trained(folder, True, own_hook=True),
        "masks of its own": trained(folder, True, same_on_all_ranks=False),
        "accelerate": (with_accelerate(False), with_accelerate(True)),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainers")
    os.environ["TMPDIR_OF_TEST"] = str(folder)
    return on_each_rank(every_case, folder)


@pytest.mark.parametrize("suffix", ["", ", accumulated"])
def test_trainer(ranks, suffix):
    for rank in ranks:
        plain, none, _ = rank[f"plain{suffix}"]
        hooked, [(sent, dense, inner)], messages = rank[f"hooked{suffix}"]
        assert all(map(torch.equal, plain, hooked))
        assert none == messages == []
        assert sent < dense
        assert inner == "allreduce_hook"


def test_trainer_with_a_hook_of_the_users(ranks):
    for rank in ranks:
        _, [(sent, dense, inner)], _ = rank["bf16"]
        assert sent < dense
        assert inner == "bf16_compress_hook"


def test_trainer_with_another_hook(ranks):
    for rank in ranks:
        weights, _, messages = rank["another hook"]
        assert all(map(torch.equal, weights, rank["plain"][0]))
        assert len(messages) == 1
        assert messages[0].startswith("MixSamplerCallback: kept_columns: gradients are sent whole, since ")


def test_trainer_with_masks_of_each_ranks_own(ranks):
    for rank in ranks:
        assert rank["masks of its own"][1:] == ([], [])


def test_accelerate(ranks):
    for rank in ranks:
        (plain, *_), (hooked, sent, dense) = rank["accelerate"]
        assert all(map(torch.equal, plain, hooked))
        assert 0 < sent < dense


def test_arguments_that_do_not_fit():
    _, sampler = bert()
    _, other = bert()
    with pytest.raises(TypeError, match=r"^MixSamplerCallback: kept_columns: expected True, False or .*, got int"):
        mk.MixSamplerCallback(sampler, kept_columns=1)
    with pytest.raises(ValueError, match=r"^MixSamplerCallback: kept_columns: expected one of this sampler, got"):
        mk.MixSamplerCallback(sampler, kept_columns=mk.KeptColumns(other))
