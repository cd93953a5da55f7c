"""apply_mixout on many of transformers' model classes, small and with random weights; nothing is downloaded.

The classes below stand for what went wrong once. ``MIXOUT_KERNELS_ZOO=1`` (``make test-zoo``) walks through every
class that a small config can be made for.
"""

import os

import pytest
import torch

import mixout_kernels as mk
from mixout_kernels import selection

transformers = pytest.importorskip("transformers")

from . import zoo  # noqa: E402

CLASSES = (
    zoo.full_walk()
    if os.environ.get("MIXOUT_KERNELS_ZOO") == "1"
    else [
        "AlbertForMaskedLM",
        "BartForConditionalGeneration",
        "BertForMaskedLM",
        "BertForSequenceClassification",
        "BloomForCausalLM",
        "Data2VecVisionForImageClassification",
        "DebertaV2ForSequenceClassification",
        "DeiTForImageClassification",
        "DistilBertForQuestionAnswering",
        "ElectraForPreTraining",
        "FalconForCausalLM",
        "GPT2LMHeadModel",
        "JetMoeForCausalLM",
        "LlamaForCausalLM",
        "LlavaForConditionalGeneration",
        "MambaForCausalLM",
        "MixtralForCausalLM",
        "MobileBertForMaskedLM",
        "OPTForCausalLM",
        "PersimmonForCausalLM",
        "ProphetNetForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
        "RobertaForMultipleChoice",
        "SEWDForCTC",
        "SegformerForSemanticSegmentation",
        "SwinForImageClassification",
        "T5ForConditionalGeneration",
        "ViTForImageClassification",
        "Wav2Vec2ForCTC",
        "WavLMForCTC",
        "WhisperForConditionalGeneration",
        "XLNetLMHeadModel",
    ]
)

# What is random in training and no dropout: augmented positions, Gumbel noise, patches left out.
OTHER_NOISE = ("DINOv3", "Sapiens2", "GroupViT", "ViTMAE", "Vilt")


@pytest.fixture(scope="module", params=CLASSES)
def name(request):
    return request.param


def build(name):
    try:
        return zoo.build(name)
    except Exception as error:  # whatever a class says of a config that does not fit it
        if os.environ.get("MIXOUT_KERNELS_ZOO") != "1":
            raise
        pytest.skip(f"no small config for {name}: {error}")


def without_linears(error):
    """A model of convolutions, or one whose every linear layer is of a class with a forward of its own (Falcon)."""
    return "got 0 linear layers: none" in str(error) or "is a subclass of Linear (with a forward of its own)" in str(
        error
    )


def test_a_saved_model_is_the_source_of_its_own_targets(name, tmp_path):
    """The restart of a run: save_pretrained, from_pretrained, trained weights, targets=that folder."""
    model = build(name)
    pretrained = {key: weight.detach().clone() for key, weight in model.named_parameters(remove_duplicate=False)}
    model.save_pretrained(tmp_path)
    restarted = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in restarted.parameters():
            parameter.add_(1)
    try:
        report = mk.apply_mixout(restarted, p=0.5, targets=tmp_path)
    except ValueError as error:
        if without_linears(error):
            return
        raise
    for layer in report.mixed:
        target = restarted.get_submodule(layer).target
        assert torch.equal(target, pretrained[f"{layer}.weight"].to(target.dtype)), layer
    assert not [layer for layer, reason in report.skipped.items() if "no entry" in reason]


def test_no_dropout_goes_on_that_the_report_does_not_name(name):
    """At w = u mixout changes no bit, so two training forwards are equal if every dropout is off."""
    model = build(name).train()
    batch = zoo.inputs(model)
    try:
        with torch.no_grad():
            model(**batch)
    except Exception as error:  # its inputs are others
        pytest.skip(f"{name} takes other inputs: {error}")
    try:
        report = mk.apply_mixout(model, p=0.5, exclude=())
    except ValueError as error:
        if without_linears(error):
            return
        raise
    with torch.no_grad():
        first, second = (list(zoo.tensors(model(**batch))) for _ in range(2))
    same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert same or report.dropout_left or name.startswith(OTHER_NOISE)
    mk.remove_mixout(model)
    with torch.no_grad():
        for parameter, original in zip(model.parameters(), build(name).parameters(), strict=True):
            assert torch.equal(parameter, original)


KNOWN_UNREACHED = {
    "WavLMForCTC": {"q_proj", "k_proj", "v_proj", "out_proj"},
    "MambaForCausalLM": {"x_proj", "dt_proj", "out_proj"},
    "MobileBertForMaskedLM": {"dense", "decoder"},
}


@pytest.mark.parametrize("name", KNOWN_UNREACHED)
def test_weights_that_a_model_reads_itself_are_known(name, monkeypatch):
    """Without an example by a list; and an example finds them without the list."""
    model = zoo.build(name)
    report = mk.apply_mixout(model, p=0.5, exclude=())
    read = {layer for layer, reason in report.skipped.items() if "reads its weight itself" in reason}
    assert {layer.rpartition(".")[2] for layer in read} == KNOWN_UNREACHED[name]
    mk.remove_mixout(model)
    monkeypatch.setattr(selection, "READ_ELSEWHERE", {})
    proven = mk.apply_mixout(model, p=0.5, exclude=(), example=zoo.inputs(model))
    unreached = {layer for layer, reason in proven.skipped.items() if reason.startswith("not reached")}
    assert unreached
    assert unreached & read == unreached
