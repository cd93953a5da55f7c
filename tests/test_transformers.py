"""apply_mixout on real architectures of transformers, small and with random weights: nothing is downloaded."""

import pytest
import torch

import mixout_kernels as mk

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def bert():
    config = transformers.BertConfig(**SMALL, max_position_embeddings=16, num_labels=2)
    return transformers.BertForSequenceClassification(config)


def albert():
    config = transformers.AlbertConfig(**SMALL, embedding_size=8, max_position_embeddings=16, num_labels=2)
    return transformers.AlbertForSequenceClassification(config)


def roberta():
    config = transformers.RobertaConfig(**SMALL, max_position_embeddings=16, num_labels=2)
    return transformers.RobertaForSequenceClassification(config)


def gpt2():
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16, num_labels=2)
    config.pad_token_id = 0
    return transformers.GPT2ForSequenceClassification(config)


MODELS = {"bert": bert, "albert": albert, "roberta": roberta, "gpt2": gpt2}
TOKENS = torch.randint(5, 50, (3, 7), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 1])


@pytest.fixture(params=list(MODELS))
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]()


def test_trains(model):
    """A few steps: the loss is finite, weights and heads move, targets stay."""
    report = mk.apply_mixout(model.train(), p=0.7)
    targets = {name: model.get_submodule(name).target.clone() for name in report.mixed}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=TOKENS, labels=LABELS).loss
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    for name, target in targets.items():
        module = model.get_submodule(name)
        assert torch.equal(module.target, target), name
        assert not torch.equal(module.weight, target), name


def test_first_forward_is_the_pretrained_one(model):
    expected = model.eval()(input_ids=TOKENS).logits
    mk.apply_mixout(model.train(), p=0.7)
    torch.testing.assert_close(model(input_ids=TOKENS).logits, expected)


def test_no_dropout_is_left(model):
    """At w = u mixout changes nothing, so two training forwards are equal only if every dropout is off."""
    model.train()
    assert not torch.equal(model(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)
    report = mk.apply_mixout(model, p=0.7)
    assert report.dropout
    torch.testing.assert_close(model(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)
    mk.remove_mixout(model)
    assert not torch.equal(model(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


def test_heads_are_left_alone(model):
    report = mk.apply_mixout(model, p=0.7)
    heads = {name for name in report.skipped if "excluded by" in report.skipped[name]}
    assert heads
    assert not heads & set(report.mixed)
    linears = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ in ("Conv1D", "MixConv1D")
    }
    others = {name for name, why in report.skipped.items() if "a Parameter" in why}
    assert linears == (set(report.mixed) | set(report.skipped)) - others
    assert others == {
        name for name, p in model.named_parameters() if p.dim() > 1 and name.rpartition(".")[0] not in linears
    }


def test_saves_and_loads_as_the_plain_model(model, tmp_path):
    mk.apply_mixout(model, p=0.7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    assert not any(isinstance(module, (mk.MixLinear, mk.MixConv1D)) for module in plain.modules())
    torch.testing.assert_close(plain.eval()(input_ids=TOKENS).logits, model.eval()(input_ids=TOKENS).logits)


def test_gradient_checkpointing_gives_the_same_gradients(model):
    if not model.supports_gradient_checkpointing:
        pytest.skip(f"{type(model).__name__} has no gradient checkpointing")
    mk.apply_mixout(model.train(), p=0.5)

    def gradients():
        model.zero_grad()
        torch.manual_seed(3)
        model(input_ids=TOKENS, labels=LABELS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    for name, gradient in gradients().items():
        assert torch.equal(gradient, plain[name]), name


def test_gpt2_swaps_conv1d():
    report = mk.apply_mixout(gpt2(), p=0.7)
    assert report.mixed["transformer.h.0.attn.c_attn"] == "MixConv1D [16, 48], p=0.7"
    assert len(report.mixed) == 8
    assert set(report.skipped) == {"score", "transformer.wte.weight", "transformer.wpe.weight"}


def test_gpt2_language_model_head_stays_tied_to_the_embedding():
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    report = mk.apply_mixout(model, p=0.7)
    assert "lm_head" in report.mixed
    assert model.lm_head.weight is model.transformer.wte.weight
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert model.transformer.wte.weight.grad.any()


def test_albert_layers_are_one_module_for_all_layers():
    model = albert()
    report = mk.apply_mixout(model.train(), p=0.7)
    layers = [name for name in report.mixed if "albert_layers" in name]
    assert len(layers) == 6
    assert all(".0.albert_layers.0." in name for name in layers)


def test_a_resumed_run_takes_its_targets_from_the_pretrained_checkpoint(model, tmp_path):
    """As transformers saves it: with the head, and without, where the names lack the prefix of the base model."""
    pretrained = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.save_pretrained(tmp_path / "whole")
    model.base_model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    for folder in ("whole", "base"):
        report = mk.apply_mixout(model, p=0.7, targets=tmp_path / folder)
        for name in report.mixed:
            assert torch.equal(model.get_submodule(name).target, pretrained[f"{name}.weight"]), name
        mk.remove_mixout(model)
    with pytest.raises(
        ValueError,
        match=r"nothing to mix.*targets has no entry for it, but 1 others such as 'other'",
    ):
        mk.apply_mixout(model, p=0.7, targets={"other": torch.zeros(1)})


def test_the_report_warns_of_sdpa_without_dropout():
    """It takes a flash kernel then, which is slow in bfloat16 on a CPU; while attention has dropout it does not."""
    for attention, options, warned in [
        ("sdpa", {}, True),
        ("eager", {}, False),
        ("sdpa", {"disable_dropout": False}, False),
    ]:
        config = transformers.BertConfig(**SMALL, max_position_embeddings=16, attn_implementation=attention)
        report = mk.apply_mixout(transformers.BertModel(config), p=0.5, exclude=(), **options)
        assert [row.name for row in report.rows() if row.what == "slow"] == [""] * warned
        assert ("attn_implementation='eager'" in str(report)) == warned
