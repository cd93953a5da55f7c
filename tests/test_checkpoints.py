"""Where targets may come from, under which names, and what is said of a source that does not fit."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mixout_kernels as mk

transformers = pytest.importorskip("transformers")


def net():
    torch.manual_seed(0)
    return nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "other": nn.Linear(4, 4)})


NAMES = ("body.0", "body.1", "other")


def other_weights(model):
    generator = torch.Generator().manual_seed(9)
    return {key: torch.randn(value.shape, generator=generator) for key, value in model.state_dict().items()}


def assert_targets(model, state, report):
    assert set(report.mixed) == set(NAMES)
    for name in NAMES:
        target = model.get_submodule(name).target
        assert torch.equal(target, state[f"{name}.weight"])
        assert target.data_ptr() != state[f"{name}.weight"].data_ptr()


def shards(folder, state, suffix):
    names = sorted(state)
    halves = {f"part-{k}{suffix}": {name: state[name] for name in names[k::2]} for k in range(2)}
    for file, part in halves.items():
        save_file(part, folder / file) if suffix == ".safetensors" else torch.save(part, folder / file)
    return {"weight_map": {name: file for file, part in halves.items() for name in part}}


def model_of(folder, state):
    model = net()
    model.load_state_dict(state)
    return model


def safetensors_file(folder, state):
    save_file(state, folder / "any.safetensors")
    return folder / "any.safetensors"


def torch_file(folder, state):
    torch.save(state, folder / "any.pt")
    return str(folder / "any.pt")


def old_torch_file(folder, state):
    torch.save(state, folder / "any.bin", _use_new_zipfile_serialization=False)
    return folder / "any.bin"


def training_checkpoint(folder, state):
    """As Lightning saves: the state_dict within, its names with the attribute of the LightningModule."""
    torch.save({"epoch": 3, "state_dict": {f"model.{name}": value for name, value in state.items()}}, folder / "a.ckpt")
    return folder / "a.ckpt"


def safetensors_folder(folder, state):
    save_file(state, folder / "model.safetensors")
    return folder


def torch_folder(folder, state):
    torch.save(state, folder / "pytorch_model.bin")
    return str(folder)


def safetensors_shards(folder, state):
    index = shards(folder, state, ".safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def torch_shards(folder, state):
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(shards(folder, state, ".bin")))
    return folder


def index_file(folder, state):
    return safetensors_shards(folder, state) / "model.safetensors.index.json"


SOURCES = [
    lambda folder, state: state,
    model_of,
    safetensors_file,
    torch_file,
    old_torch_file,
    training_checkpoint,
    safetensors_folder,
    torch_folder,
    safetensors_shards,
    torch_shards,
    index_file,
]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__.strip("<>"))
def test_sources(tmp_path, source):
    model = net()
    state = other_weights(model)
    assert_targets(model, state, mk.apply_mixout(model, p=0.5, targets=source(tmp_path, state)))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "_fsdp_wrapped_module."])
def test_names_with_what_wrappers_add(prefix):
    model = net()
    state = other_weights(model)
    wrapped = {f"{prefix}{name}": value for name, value in state.items()}
    assert_targets(model, state, mk.apply_mixout(model, p=0.5, targets=wrapped))


def test_a_compiled_model():
    model = net()
    state = other_weights(model)
    model.forward = lambda x: model["other"](model["body"](x))
    compiled = torch.compile(model, backend="eager")
    mk.apply_mixout(compiled, p=0.5, targets=state)
    assert torch.equal(model["other"].target, state["other.weight"])


def test_a_tied_weight_is_found_under_any_of_its_names():
    model = net()
    model["other"].weight = model["body"][0].weight
    for name in ("body.0", "other"):
        state = {"body.1.weight": torch.zeros(4, 4), f"{name}.weight": torch.ones(4, 4)}
        assert_targets(
            model,
            {f"{key}.weight": torch.zeros(4, 4) if key == "body.1" else torch.ones(4, 4) for key in NAMES},
            mk.apply_mixout(model, p=0.5, targets=state),
        )
        assert model["other"].target is model["body"][0].target
        mk.remove_mixout(model)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.zeros(4, 5), ValueError, r"targets: expected \[4, 4\] for 'other\.weight', got \[4, 5\]"),
        ([1.0], TypeError, r"targets: expected a tensor for 'other\.weight', got list"),
        (torch.zeros(4, 4, dtype=torch.int64), None, ""),
    ],
    ids=["shape", "type", "cast"],
)
def test_an_entry_that_does_not_fit_is_named(value, error, message):
    model = net()
    state = other_weights(model) | {"other.weight": value}
    if error is None:
        mk.apply_mixout(model, p=0.5, targets=state)
        assert model["other"].target.dtype == torch.float32
        return
    with pytest.raises(error, match=f"^apply_mixout: {message}"):
        mk.apply_mixout(model, p=0.5, targets=state)
    assert not any(isinstance(module, mk.MixLinear) for module in model.modules())


@pytest.mark.parametrize("source", ["no/such-model", "some/folder/on/the/disk", "./here", "weights.bin"])
def test_a_checkpoint_that_is_not_there(source, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"targets: expected a checkpoint, got no file at .* local cache of the"
    ):
        mk.apply_mixout(net(), p=0.5, targets=source)


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"got no file at .*model\.safetensors, nor .*pytorch_model\.bin"):
        mk.apply_mixout(net(), p=0.5, targets=tmp_path)


def test_a_hub_id_in_the_local_cache(tmp_path, monkeypatch):
    """In the layout of huggingface_hub; nothing is downloaded."""
    constants = pytest.importorskip("huggingface_hub.constants")
    snapshot = tmp_path / "models--some--model" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("0123abc")
    model = net()
    state = other_weights(model)
    save_file(state, snapshot / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert_targets(model, state, mk.apply_mixout(model, p=0.5, targets="some/model"))


# --- transformers -----------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def bert(cls=None):
    torch.manual_seed(1)
    config = transformers.BertConfig(**SMALL, vocab_size=50, max_position_embeddings=16)
    return (cls or transformers.BertForMaskedLM)(config)


def pretrained_weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters(remove_duplicate=False)}


def trained(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    return model


@pytest.mark.parametrize("saved", ["whole", "base", "within"])
def test_the_prefix_of_a_base_model(tmp_path, saved):
    """Saved with its head, without it, and looked up from a model that holds it as a part."""
    model = bert()
    pretrained = pretrained_weights(model)
    (model.bert if saved == "base" else model).save_pretrained(tmp_path)
    outer = nn.ModuleDict({"encoder": model}) if saved == "within" else model
    report = mk.apply_mixout(trained(outer), p=0.5, targets=tmp_path)
    assert len([name for name in report.mixed if "encoder.layer.0" in name]) == 6
    for name in report.mixed:
        key = f"{name}.weight".removeprefix("encoder.") if saved == "within" else f"{name}.weight"
        assert torch.equal(outer.get_submodule(name).target, pretrained[key]), name


def test_names_that_transformers_converts_on_saving(tmp_path):
    """The file's names are not the model's: transformers loads it, and its marks say what it has loaded."""
    config = transformers.ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=3)
    torch.manual_seed(1)
    model = transformers.ViTForImageClassification(config)
    pretrained = pretrained_weights(model)
    model.vit.save_pretrained(tmp_path)
    report = mk.apply_mixout(trained(model), p=0.5, targets=tmp_path)
    assert len(report.mixed) >= 6
    for name in report.mixed:
        assert torch.equal(model.get_submodule(name).target, pretrained[f"{name}.weight"]), name
    assert report.skipped["classifier"].startswith("new: targets has no entry for it")


def test_a_new_head_is_known_by_the_loaders_marks(tmp_path):
    """Under a name that no list has; and DebertaV2's pooler, which is new for classification only."""

    class WithHead(transformers.BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.bert = transformers.BertModel(config)
            self.my_output = nn.Linear(16, 3)
            self.post_init()

    bert().save_pretrained(tmp_path)
    model = WithHead.from_pretrained(tmp_path)
    report = mk.apply_mixout(model, p=0.5)
    assert report.skipped["my_output"] == "new: from_pretrained did not load it"
    assert report.skipped["bert.pooler.dense"] == "new: from_pretrained did not load it"
    assert "bert.encoder.layer.0.attention.self.query" in report.mixed
    mk.remove_mixout(model)
    assert "my_output" in mk.apply_mixout(model, p=0.5, exclude=()).mixed


def test_a_model_without_marks_is_judged_by_names():
    report = mk.apply_mixout(bert(transformers.BertForSequenceClassification), p=0.5)
    assert report.skipped["classifier"] == "excluded by 'classifier': new, by its name"
    assert "bert.pooler.dense" in report.mixed


def test_a_checkpoint_that_would_run_code(tmp_path):
    """Loaded with weights_only: a pickle is data."""
    torch.save(net(), tmp_path / "model.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        mk.apply_mixout(net(), p=0.5, targets=tmp_path / "model.pt")
