"""The trial of a network of another project before the first step."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from library.errors import UserError
from library.inference.networks import choose_networks
from networks.module_names import import_network_module
from networks.third_party_trial import check_states, keep_states_plain, make_network, naming_module, try_saving

THEIRS = "theirs.kohya"


class Network(nn.Module):
    """Weights as LyCORIS' algo=full takes them from a model in channels_last, and two names for one tensor."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last))
        self.same = self.weight

    def save_weights(self, file, dtype, metadata):
        state = {name: tensor.to(dtype) if dtype else tensor for name, tensor in self.state_dict().items()}
        save_file(state, file, metadata)


def test_tensors_that_safetensors_refuses_are_saved(tmp_path):
    network = Network()
    with pytest.raises(UserError, match=rf"--network_module {THEIRS}: it failed to save its weights, which was tried"):
        try_saving(network, THEIRS, tmp_path, suffix=".safetensors", dtype=None)
    keep_states_plain(network)
    try_saving(network, THEIRS, tmp_path, suffix=".safetensors", dtype=None)
    try_saving(network, THEIRS, tmp_path, suffix=".safetensors", dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    network.save_weights(tmp_path / "a.safetensors", None, {})
    assert all(torch.equal(tensor, network.weight) for tensor in load_file(tmp_path / "a.safetensors").values())


@pytest.mark.parametrize(
    ("save", "said"),
    [
        (lambda *_: None, "save_weights wrote no file"),
        (lambda file, *_: save_file({}, file), "save_weights wrote no tensors"),
        (lambda *_: {}["rank"], "it failed to save its weights, .*: KeyError: 'rank' .test_third_party_trial.py:"),
    ],
)
def test_a_module_that_cannot_save_is_found_before_the_first_step(tmp_path, save, said):
    network = Network()
    network.save_weights = save
    with pytest.raises(UserError, match=said) as caught:
        try_saving(network, THEIRS, tmp_path, suffix=".safetensors", dtype=None)
    assert "\n" not in str(caught.value)


def test_a_state_that_is_not_taken_back_is_said(caplog):
    network = nn.Linear(2, 2)
    before = network.weight.detach().clone()
    check_states(network, THEIRS, resumes=True, saves_states=True)

    def load(state, strict=True):
        network.weight.data.zero_()
        raise RuntimeError("Missing key(s):\n up_list.0")

    network.load_state_dict = load
    check_states(network, THEIRS, resumes=False, saves_states=False)
    check_states(network, THEIRS, resumes=False, saves_states=True)
    assert "Missing key(s): up_list.0" in caplog.text and "taken up with --network_weights" in caplog.text
    with pytest.raises(UserError, match="--resume: networks of theirs.kohya .* cannot be resumed"):
        check_states(network, THEIRS, resumes=True, saves_states=False)
    assert torch.equal(network.weight, before)


def test_what_another_module_raises_is_one_line_and_ours_is_left_as_it_is():
    for error in (ZeroDivisionError("by\nzero"), NotImplementedError()):
        with pytest.raises(UserError, match=rf"{THEIRS}: it failed to learn: {type(error).__name__}") as caught:
            with naming_module(THEIRS, "to learn"):
                raise error
        assert "\n" not in str(caught.value) and caught.value.__cause__ is error

    def fail(more):
        raise KeyError("rank")

    with pytest.raises(UserError, match=f"{THEIRS}: it could not make a network: KeyError: 'rank'"):
        make_network(THEIRS, fail, {})
    with pytest.raises(KeyError):
        make_network("networks.lora", fail, {})


def test_the_default_preset_of_lycoris_is_replaced_only_where_it_fails(caplog):
    def make(more):
        if not more:
            raise AssertionError("duplicated lora name: lora_unet_time_embedding_linear_1")
        return more["preset"]

    with caplog.at_level(logging.WARNING):
        preset, more = make_network("lycoris.kohya", make, {"algo": "lokr"})
    assert more == {"preset": "examples/lycoris/full.toml"} and preset.endswith(more["preset"])
    assert "fails with its default preset on this model; preset=examples/lycoris/full.toml is used" in caplog.text
    for name, given in (("lycoris.kohya", {"preset": "attn-mlp"}), ("other.module", {})):
        with pytest.raises(UserError, match="duplicated lora name"):
            make_network(name, make, given)


@pytest.mark.parametrize("name", ["../evil", "networks/lora", "networks.lora.py.", "", ".lora", "a b", "1x"])
def test_what_is_no_module_s_name_is_refused(name):
    with pytest.raises(UserError, match="not the name of a module; write it with dots"):
        import_network_module(name)


def test_a_module_that_fails_while_it_is_imported_is_one_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_network.py").write_text("def create_network(:\n")
    (tmp_path / "needy_network.py").write_text("import no_such_package_at_all\n")
    (tmp_path / "plain_network.py").write_text("x = 1\n")
    for name, said in (
        ("broken_network", "it cannot be imported: SyntaxError"),
        ("needy_network", "it needs the package no_such_package_at_all; pip install it"),
        ("plain_network", "not a network module .it has no create_network"),
        ("networks.lroa", 'did you mean "networks.lora"'),
    ):
        with pytest.raises(UserError, match=said) as caught:
            import_network_module(name)
        assert "\n" not in str(caught.value)
        sys.modules.pop(name, None)


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_no_number_is_refused(tmp_path, strength):
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=f"--network_mul {strength}: a strength must be a finite number"):
        choose_networks(["networks.lora"], [str(tmp_path / "a.safetensors")], [strength], None)
