"""Trainer's and accelerate's checkpoints with a sampler: a resumed run has the masks and weights of a whole one."""

import copy
import json

import pytest
import torch

import mixout_kernels as mk

from . import models
from .conftest import products_of_f_linear
from .test_trainers import Watched
from .transformers_models import NO_DROPOUT, SMALL

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

STEPS, SAVED = 6, 4


def pretrained():
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, **NO_DROPOUT, vocab_size=50, max_position_embeddings=16)
    return transformers.BertForSequenceClassification(config)


class Run:
    """A Trainer, as a script makes it from the pretrained weights: the sampler has a seed of its own."""

    def __init__(self, folder, seed, callback=True, **options):
        self.model = pretrained()
        mk.apply_mixout(self.model, p=0.7)
        self.sampler = mk.MixSampler(self.model, seed=seed)
        self.watched = Watched(self.model.bert.encoder.layer[0].intermediate.dense)
        generator = torch.Generator().manual_seed(5)
        data = [
            {"input_ids": torch.randint(1, 50, (6,), generator=generator), "labels": number % 2} for number in range(16)
        ]
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            use_cpu=True,
            report_to=[],
            save_steps=SAVED,
            logging_strategy="no",
            disable_tqdm=True,
            **options,
        )
        self.callback = mk.MixSamplerCallback(self.sampler)
        callbacks = [self.callback] if callback else []
        self.trainer = transformers.Trainer(self.model, arguments, train_dataset=data, callbacks=callbacks)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run = Run(folder, seed=1)
    with products_of_f_linear():  # as the tests have it, whose own fixture is set up later
        run.trainer.train()
    return run, folder / f"checkpoint-{SAVED}"


@pytest.mark.parametrize("options", [{}, {"restore_callback_states_from_checkpoint": True}], ids=["", "restored"])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["", "another-output-folder"])
def test_a_resumed_trainer_has_the_masks_and_weights_of_an_uninterrupted_one(whole, tmp_path, elsewhere, options):
    run, checkpoint = whole
    resumed = Run(tmp_path if elsewhere else checkpoint.parent, seed=2, **options)
    resumed.trainer.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.sampler.state_dict() == run.sampler.state_dict() == {"seed": 1, "step": STEPS}
    assert resumed.watched.seeds == run.watched.seeds[SAVED:]
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


def test_what_is_in_the_checkpoint(whole):
    _, checkpoint = whole
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["MixSampler"]["attributes"] == {"seed": 1, "step": SAVED}
    assert state["global_step"] == SAVED


def test_a_checkpoint_of_a_run_without_the_callback(tmp_path):
    without = Run(tmp_path, seed=1, callback=False)
    without.trainer.train()
    resumed = Run(tmp_path, seed=2)
    with pytest.warns(UserWarning, match=r"the checkpoint of step 4 was saved without this callback"):
        resumed.trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))
    assert resumed.sampler.state_dict() == {"seed": 2, "step": STEPS - SAVED}


def test_a_folder_that_is_not_there(whole, tmp_path):
    run, _ = whole
    arguments = copy.copy(run.trainer.args)
    arguments.output_dir = str(tmp_path)
    with pytest.warns(UserWarning, match="the sampler's state is not in this checkpoint"):
        run.callback.on_save(arguments, run.trainer.state, run.trainer.control)


def test_a_callback_is_of_a_sampler():
    expected = (
        r"^MixSamplerCallback: sampler: expected a MixSampler, or a function of the model that makes one, got {}$"
    )
    for given in (torch.nn.Linear(2, 2), "sampler"):
        with pytest.raises(TypeError, match=expected.format(type(given).__name__)):
            mk.MixSamplerCallback(given)


def test_a_sampler_that_is_made_when_training_begins(whole, tmp_path):
    """Once for a model, however often it is trained; its state is saved, and resumed from, as that of any other."""
    run, checkpoint = whole
    resumed = Run(tmp_path, seed=2)
    resumed.sampler.remove()
    made = []

    def make(model):
        made.append(mk.MixSampler(model, seed=4))
        return made[-1]

    callback = mk.MixSamplerCallback(make)
    with pytest.raises(RuntimeError, match="the sampler is made when training begins"):
        _ = callback.sampler
    resumed.trainer.remove_callback(resumed.callback)
    resumed.trainer.add_callback(callback)
    resumed.trainer.train(resume_from_checkpoint=str(checkpoint))
    assert callback.sampler.state_dict() == {"seed": 1, "step": STEPS}
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name
    resumed.trainer.train()
    assert made == [callback.sampler]


def test_a_sampler_of_another_model(tmp_path):
    """As after a cell of a notebook was run twice: the masks would stay the first ones."""
    run, other = Run(tmp_path, seed=2, callback=False), Run(tmp_path, seed=2)
    run.trainer.add_callback(other.callback)
    with pytest.raises(ValueError, match="MixSamplerCallback: sampler: expected one of the model that Trainer trains"):
        run.trainer.train()


def test_a_function_that_makes_no_sampler(tmp_path):
    run = Run(tmp_path, seed=2, callback=False)
    run.trainer.add_callback(mk.MixSamplerCallback(lambda model: None))
    with pytest.raises(TypeError, match="expected a function that makes a MixSampler, got one that returns a NoneType"):
        run.trainer.train()


def accelerated(seed, pretrained):
    model = copy.deepcopy(pretrained)
    mk.apply_mixout(model, p=0.5)
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    sampler = mk.MixSampler(model, seed=seed)
    accelerator.register_for_checkpointing(sampler)

    def train(steps):
        seeds = []
        for number in steps:
            seeds.append(models.seeds_of(model))
            accelerator.backward(wrapped(models.random_input(number + 1)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        return seeds

    return accelerator, model, train


def test_accelerate_saves_and_loads_it(tmp_path):
    start = models.attention_net()
    accelerator, model, train = accelerated(1, start)
    train(range(3))
    accelerator.save_state(str(tmp_path / "state"))
    expected = train(range(3, 6))
    accelerator, resumed, train = accelerated(2, start)
    accelerator.load_state(str(tmp_path / "state"))
    assert train(range(3, 6)) == expected
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name
