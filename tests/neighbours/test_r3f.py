"""R3F: the loss and the gradients of two forwards, in every way to train; and what would go wrong in silence."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mixout_kernels as mk

from .models import (
    BERT_OFF,
    GPT2_OFF,
    albert,
    bert,
    bert_masked_language_model,
    gpt2,
    gpt2_language_model,
    padded_batch,
    roberta,
    spread,
    t5,
    vit,
)

EPS = 0.1


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def in_two_forwards(model, embeddings, batch, rows, *, detach=True, divisor=None):
    """The definition: CE(clean) + KL(a || b) + KL(b || a), a clean forward and one with noise on the embeddings.

    ``rows(logits)`` flattens the logits of the rows that have a label.
    """
    clean = model(**batch)

    def add_noise(_module, _args, embedded):
        torch.manual_seed(7)
        z = torch.empty_like(embedded).uniform_(-EPS, EPS)
        return (embedded.detach() if detach else embedded) + z

    hook = embeddings.register_forward_hook(add_noise)
    noised = model(**batch)
    hook.remove()
    a, b = rows(clean.logits).log_softmax(-1), rows(noised.logits).log_softmax(-1)
    divergence = ((a.exp() - b.exp()) * (a - b)).sum(-1)
    return clean.loss + divergence.sum() / (divisor or len(divergence)), clean.logits


def assert_is_two_forwards(model, embeddings, batch, rows, *, divisor=None, **options):
    model = model.train()
    expected, logits = in_two_forwards(model, embeddings, batch, rows, divisor=divisor, **options)
    expected.backward()
    exact = gradients(model)
    model.zero_grad()
    handle = mk.apply_r3f(model, eps=EPS, **options)
    torch.manual_seed(7)
    outputs = model(**batch)
    outputs.loss.backward()
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(outputs.logits, logits, rtol=1e-9, atol=1e-12)
    found = gradients(model)
    assert found.keys() == exact.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, exact[name], rtol=1e-8, atol=1e-13, msg=name)
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return handle


SENTENCES = {
    "bert": lambda: bert(**BERT_OFF),
    "roberta": lambda: roberta(**BERT_OFF),
    "albert": lambda: albert(**BERT_OFF, classifier_dropout_prob=0.0),
    "gpt2": lambda: gpt2(**GPT2_OFF),
}


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("name", SENTENCES)
def test_sentences(name, detach):
    model = spread(SENTENCES[name]())
    assert_is_two_forwards(model, model.get_input_embeddings(), padded_batch(), lambda logits: logits, detach=detach)


def test_masked_tokens():
    model, batch = spread(bert_masked_language_model(**BERT_OFF)), padded_batch()
    batch["labels"] = torch.where(torch.rand(5, 7) < 0.4, batch["input_ids"], -100)
    assert_is_two_forwards(model, model.get_input_embeddings(), batch, lambda t: t[batch["labels"] != -100])


@pytest.mark.parametrize("items", [None, 100])
def test_a_causal_model_whose_row_predicts_the_next_token(items):
    """Rows count by the label that they predict; and the term has the divisor of the loss."""
    model, batch = spread(gpt2_language_model(**GPT2_OFF)), padded_batch()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][:, :2] = -100  # a prompt
    if items is not None:
        batch["num_items_in_batch"] = torch.tensor(items)

    def rows(logits):
        return logits[:, :-1][batch["labels"][:, 1:] != -100]

    assert_is_two_forwards(model, model.get_input_embeddings(), batch, rows, divisor=items)


@pytest.mark.parametrize("labelled", [None, 0], ids=["no label", "a label that no row predicts"])
@pytest.mark.parametrize("items", [None, 100])
def test_a_first_batch_without_a_row_decides_nothing(items, labelled):
    """What the model divides by, and which rows its loss is of, is learnt of the next batch."""
    model, batch = spread(gpt2_language_model(**GPT2_OFF)).train(), padded_batch()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    if items is not None:
        batch["num_items_in_batch"] = torch.tensor(items)
    unlabelled = batch | {"labels": torch.full_like(batch["labels"], -100)}
    if labelled is not None:
        unlabelled["labels"][:, labelled] = 7
    own = model(**unlabelled).loss
    losses = []
    for first in ([unlabelled], []):
        with mk.apply_r3f(model, eps=EPS):
            for plain in first:
                torch.testing.assert_close(
                    model(**plain).loss, own, equal_nan=True, check_dtype=False
                )  # 0 / 100, or 0 / 0
            torch.manual_seed(7)
            losses.append(model(**batch).loss)
    assert torch.equal(*losses)


def test_a_loss_of_labels_at_the_first_position_alone_is_recognised():
    """As a causal model's it would be of no row."""
    model, batch = spread(bert_masked_language_model(**BERT_OFF)), padded_batch()
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    batch["labels"][:, 0] = 7
    assert_is_two_forwards(model, model.get_input_embeddings(), batch, lambda logits: logits[:, 0])


def test_bert_ignores_the_number_of_items_and_so_does_the_term():
    model, batch = spread(bert_masked_language_model(**BERT_OFF)), padded_batch()
    batch["labels"] = batch["input_ids"].clone()
    batch["num_items_in_batch"] = torch.tensor(100)
    assert_is_two_forwards(model, model.get_input_embeddings(), batch, lambda logits: logits.flatten(0, 1))


def test_sequences_in_an_encoder_and_a_decoder():
    """The noise is the encoder's, and the decoder's inputs are made of the labels before half of them are gone."""
    model, batch = spread(t5(dropout_rate=0.0)), padded_batch()
    batch["labels"] = batch["input_ids"][:, :4].clone()
    batch["labels"][0, 3] = -100
    embeddings = model.get_encoder().get_input_embeddings()
    assert_is_two_forwards(model, embeddings, batch, lambda logits: logits[batch["labels"] != -100], detach=False)


def test_images():
    model = spread(vit(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    batch = {"pixel_values": torch.randn(3, 3, 8, 8, dtype=torch.float64), "labels": torch.tensor([0, 1, 1])}
    assert_is_two_forwards(model, model.get_input_embeddings(), batch, lambda logits: logits)


def test_the_noise():
    """Uniform in (-eps, eps) or normal with deviation eps, on the second half alone."""
    model, batch = bert(**BERT_OFF).train(), padded_batch(64)
    seen = []
    for noise, deviation in (("uniform", EPS / 3**0.5), ("normal", EPS)):
        with mk.apply_r3f(model, eps=EPS, noise=noise):
            embeddings = model.get_input_embeddings()
            hook = embeddings.register_forward_hook(lambda *arguments: seen.append(arguments[2].detach()))
            model(**batch)
            hook.remove()
        clean, noised = seen.pop().chunk(2)
        assert torch.equal(clean, embeddings(batch["input_ids"]))
        z = noised - clean
        assert abs(z.std().item() / deviation - 1) < 0.03  # 7168 values: 0.8 % and 0.5 %
        assert noise == "normal" or z.abs().max() <= EPS * (1 + 1e-4)


def test_without_noise_it_is_r_drop():
    """With dropout the passes differ, without they do not."""
    batch = padded_batch()
    for model, differs in ((bert(), True), (bert(**BERT_OFF), False)):
        mk.apply_r3f(model.train(), noise=None)
        outputs = model(**batch)
        clean = F.cross_entropy(outputs.logits, batch["labels"])
        assert (outputs.loss > clean + 1e-7).item() is differs


def test_under_one_mixout_mask_the_term_of_the_published_noise_vanishes():
    """Both passes are one forward, with one mask; a noise of 0.1 is felt."""
    model, batch = bert(), padded_batch()
    mk.apply_mixout(model.train(), p=0.7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    terms = {}
    for eps in (1e-5, 0.1):
        with mk.apply_r3f(model, eps=eps):
            outputs = model(**batch)
        terms[eps] = (outputs.loss - F.cross_entropy(outputs.logits, batch["labels"])).item()
    assert abs(terms[1e-5]) < 1e-6
    assert terms[0.1] > 1e-4


def test_eval_and_unlabelled_forwards_are_plain():
    model, batch = bert().eval(), padded_batch()
    plain = model(**batch)
    mk.apply_r3f(model)
    found = model(**batch)
    assert torch.equal(found.loss, plain.loss)
    assert torch.equal(found.logits, plain.logits)
    del batch["labels"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch)
    model.train()
    with pytest.warns(UserWarning, match="a training forward without labels: R3F adds nothing to it"):
        assert model(**batch).logits.shape == plain.logits.shape
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        model(**batch)


def test_outputs_are_those_of_the_clean_half():
    model, batch = bert(**BERT_OFF).train(), padded_batch()
    plain = model(**batch, output_hidden_states=True)
    plain_tuple = model(**batch, return_dict=False)
    with mk.apply_r3f(model, eps=EPS):
        found = model(**batch, output_hidden_states=True)
        found_tuple = model(**batch, return_dict=False)
    assert found.keys() == plain.keys()
    torch.testing.assert_close(found.hidden_states, plain.hidden_states)
    torch.testing.assert_close(found_tuple[1], plain_tuple[1])
    assert found_tuple[0] > plain_tuple[0]


def test_positional_arguments_and_given_embeddings():
    model, batch = bert(**BERT_OFF).train(), padded_batch()
    embedded = model.get_input_embeddings()(batch["input_ids"])
    losses = []
    with mk.apply_r3f(model, eps=EPS):
        for call in (
            lambda: model(**batch),
            lambda: model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]),
            lambda: model(inputs_embeds=embedded, attention_mask=batch["attention_mask"], labels=batch["labels"]),
        ):
            torch.manual_seed(3)
            losses.append(call().loss.item())
    assert losses[0] == losses[1] == losses[2]


def test_r3f_loss_is_the_same():
    model, batch = spread(bert(**BERT_OFF)).train(), padded_batch()
    with mk.apply_r3f(model, eps=EPS, weight=0.7, noise="normal"):
        torch.manual_seed(3)
        expected = model(**batch).loss
    for _ in (model.train(), model.eval()):
        torch.manual_seed(3)
        loss, outputs = mk.r3f_loss(model, batch, eps=EPS, weight=0.7, noise="normal")
        assert torch.equal(loss, expected)
        assert outputs.logits.shape == (5, 2)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_trainer(tmp_path):
    """The loss that Trainer logs is that of a loop of our own, with accumulation, for a model that divides by items."""
    transformers = pytest.importorskip("transformers")
    batch = padded_batch(8)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(8)]
    model = spread(gpt2_language_model(**GPT2_OFF), torch.float32)
    again = copy.deepcopy(model)
    arguments = transformers.TrainingArguments(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
    )
    seen = []
    model.register_forward_pre_hook(
        lambda _module, _args, inputs: seen.append((torch.get_rng_state(), dict(inputs))), with_kwargs=True
    )
    mk.apply_r3f(model, eps=EPS)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    assert len(seen) == 2
    assert {int(inputs["num_items_in_batch"]) for _, inputs in seen} == {int((batch["labels"] != -100).sum())}

    def loss(state, inputs):
        torch.set_rng_state(state)
        return again.train()(**inputs).loss.item()

    plain = sum(loss(*call) for call in seen)
    mk.apply_r3f(again, eps=EPS)
    expected = sum(loss(*call) for call in seen)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert expected > 1.001 * plain


def test_a_model_that_was_copied_has_r3f_of_its_own():
    model, batch = bert(**BERT_OFF).train(), padded_batch()
    handle = mk.apply_r3f(model, eps=EPS)
    other = copy.deepcopy(model)
    handle.remove()
    plain = model(**batch).loss
    assert other(**batch).loss > plain


def test_r4f_is_spectral_norm_on_the_head():
    head = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[3.0, 0, 4], [0, 2, 0]]))
    torch.manual_seed(0)
    torch.nn.utils.parametrizations.spectral_norm(head, n_power_iterations=30)
    torch.testing.assert_close(head.weight, torch.tensor([[0.6, 0, 0.8], [0, 0.4, 0]]))
    model, batch = bert(**BERT_OFF).train(), padded_batch()
    torch.nn.utils.parametrizations.spectral_norm(model.classifier)
    mk.apply_mixout(model, p=0.7)  # leaves the head alone
    with mk.apply_r3f(model, eps=EPS):
        model(**batch).loss.backward()
    assert model.classifier.parametrizations.weight.original.grad.any()


@pytest.mark.parametrize("function", ["apply_r3f", "r3f_loss"])
def test_argument_errors(function):
    model, batch = bert(), padded_batch()

    def call(model, **options):
        return mk.apply_r3f(model, **options) if function == "apply_r3f" else mk.r3f_loss(model, batch, **options)

    with pytest.raises(ValueError, match=rf"{function}: eps: expected a number >= 0, got -1"):
        call(model, eps=-1)
    with pytest.raises(ValueError, match=rf"{function}: weight: expected a number >= 0, got nan"):
        call(model, weight=float("nan"))
    with pytest.raises(ValueError, match=rf"{function}: noise: expected 'uniform', 'normal' or None, got 'gaussian'"):
        call(model, noise="gaussian")
    with pytest.raises(TypeError, match=rf"{function}: model: expected an nn.Module, got str"):
        call("bert")
    with pytest.raises(TypeError, match=rf"{function}: model: expected one with get_input_embeddings\(\), whose"):
        call(nn.Linear(2, 2))
    mk.apply_r3f(model)
    with pytest.raises(
        ValueError, match=rf"{function}: model: expected one without R3F; call remove\(\) on the handle"
    ):
        call(model)


def test_losses_without_distributions_raise():
    batch = padded_batch()
    floats = batch | {"labels": torch.rand(5)}
    many = batch | {"labels": torch.rand(5, 2)}
    for model, inputs in (
        (bert(num_labels=1), batch),
        (bert(num_labels=1), floats),
        (bert(problem_type="regression"), batch),
        (bert(problem_type="multi_label_classification"), many),
        (bert(), many),
    ):
        with pytest.raises(TypeError, match=r"r3f_loss: model: expected a head whose logits are distributions"):
            mk.r3f_loss(model, inputs)
        mk.apply_r3f(model.train())
        with pytest.raises(ValueError, match=r"apply_r3f: labels: expected class indices of a cross entropy, which"):
            model(**inputs)


def test_models_that_do_not_fit_raise():
    class NoEmbeddings(nn.Module):
        def __init__(self):
            super().__init__()
            self.embeddings, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

        def get_input_embeddings(self):
            return self.embeddings

        def forward(self, x, labels):
            logits = self.head(F.embedding(x, self.embeddings.weight)).mean(1)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    inputs = {"x": torch.randint(0, 9, (3, 4)), "labels": torch.tensor([0, 1, 0])}
    with pytest.raises(ValueError, match=r"r3f_loss: model: expected one whose forward calls get_input_embeddings\(\)"):
        mk.r3f_loss(NoEmbeddings(), inputs)

    class PooledAway(NoEmbeddings):
        def forward(self, x, labels):
            return {"loss": self.head(self.embeddings(x)).mean(), "logits": self.head(self.embeddings(x))}

    with pytest.raises(
        ValueError, match=r"expected outputs with a loss, and logits with one row for each of the labels"
    ):
        mk.r3f_loss(PooledAway(), inputs)
    with pytest.raises(
        TypeError, match=r"r3f_loss: inputs: expected a mapping with a tensor of labels, got the keys \['input_ids'"
    ):
        mk.r3f_loss(bert(), {"input_ids": inputs["x"]})
