"""The mixers' door: a layer from a file outside is a member like any other, and one that lacks something is told what."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from palimpsest.generate import generate, prompt_lookup
from palimpsest.layers.layer_state import KDAState, LatentState
from palimpsest.models.kimi_linear import (
    KimiLinearConfig,
    KimiLinearForCausalLM,
    ModelState,
    StateHistory,
    load_state,
    register_mixer,
    save_state,
)
from palimpsest.models.kimi_linear.mixers import MIXERS, letters, make_mixer, unregister_mixer
from palimpsest.python_files import load_file

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "add-a-mixer.md"


@pytest.fixture
def outside(tmp_path):
    """The layer of the how-to, registered from its file."""
    source = re.search(r"write_text\('''\n(.*?)'''\)", PAGE.read_text(), re.DOTALL)[1]
    (tmp_path / "fading.py").write_text(source)
    yield load_file(tmp_path / "fading.py", "mixer")
    unregister_mixer("fading")


def build(pattern):
    torch.manual_seed(0)
    return KimiLinearForCausalLM(KimiLinearConfig.tiny(pattern, initializer_range=0.2)).eval()


@pytest.mark.parametrize("pattern", ["F", "KFM"])
def test_states_generation_and_files_take_a_layer_from_outside(outside, pattern, tmp_path):
    model, ids = build(pattern), torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole, cut = model(ids), model(ids[:, :25])
        logits, after = model.step_(ids[:, 25], cut.state.snapshot())
        torch.testing.assert_close(logits, whole.logits[:, 25], rtol=1e-4, atol=1e-4)
        mask = torch.arange(40) < torch.tensor([[25], [9]])
        padded = model(ids, mask=mask).state
        for row, n in enumerate((25, 9)):
            alone = model(ids[row : row + 1, :n]).state
            for a, b in zip(padded.select([row]).tensors().values(), alone.tensors().values(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert ModelState.join([padded.select([0]), padded.select([1])]).same(padded.select([0, 1]))
    assert padded.fork(2).batch_size == 4
    assert padded.nonfinite() == ()
    save_state(tmp_path / "state", padded, model)
    assert load_state(tmp_path / "state", model).same(padded)
    _, history = StateHistory.start(ModelState.empty(model.config, 2), every=16).read(model, ids)
    state, _ = history.rollback(model, 20)
    with torch.no_grad():
        for a, b in zip(state.tensors().values(), model(ids[:, :20]).state.tensors().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    together = generate(model, [[1, 2, 3], [5]], max_new_tokens=5, end_tokens=()).tokens
    assert together == [generate(model, [p], max_new_tokens=5, end_tokens=()).tokens[0] for p in ([1, 2, 3], [5])]
    drafted = generate(model, [[1, 2, 3]], max_new_tokens=5, end_tokens=(), draft=prompt_lookup).tokens
    assert drafted == together[:1]
    model.save_pretrained(tmp_path / "model")
    assert KimiLinearForCausalLM.from_pretrained(tmp_path / "model").config == model.config
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_saved_model_asks_for_its_layer(outside, tmp_path):
    build("KF").save_pretrained(tmp_path)
    unregister_mixer("fading")
    with pytest.raises(ValueError, match="names 'fading'; .* registered with register_mixer before its config is read"):
        KimiLinearForCausalLM.from_pretrained(tmp_path)
    register_mixer("fading", "F", lambda config, index: outside.Fading(config.hidden_size))


def test_the_packages_own_layers_have_what_the_door_asks_for():
    config = KimiLinearConfig.tiny("".join(letters()))
    from palimpsest.models.kimi_linear.mixers import _check_layer

    with torch.device("meta"):
        for i, name in enumerate(config.layer_types):
            layer = make_mixer(config, i)
            _check_layer(name, layer)
            assert isinstance(layer.empty_state(2), LatentState if MIXERS[name].full_attention else KDAState)


class Nothing(nn.Module):
    pass


class NoStep(nn.Module):
    def forward(self, x, state=None, *, mask=None, cu_seqlens=None): ...


class NoMask(NoStep):
    def forward(self, x, state=None): ...

    def step_(self, x, state, mask=None): ...


class NoState(NoStep):
    def step_(self, x, state, mask=None): ...

    def empty_state(self, batch_size, *, device, dtype):
        return {"mean": torch.zeros(batch_size, device=device)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c, i: 3, "the mixer 'bad' makes a int, which is no torch.nn.Module"),
        (
            lambda c, i: Nothing(),
            r"makes a Nothing, which lacks forward\(x, state=None, \*, mask=None, cu_seqlens=None\)",
        ),
        (lambda c, i: NoStep(), r"makes a NoStep, which lacks step_\(x, state, mask=None\)"),
        (lambda c, i: NoMask(), r"has a forward that cannot be called as forward\(x, state=None, .*mask"),
        (lambda c, i: NoState(), "has an empty_state that gives a dict; it must be a dataclass of tensors over"),
    ],
)
def test_what_a_layer_lacks_is_named(make, message):
    register_mixer("bad", "Z", make)
    try:
        with pytest.raises(TypeError, match=message):
            KimiLinearForCausalLM(KimiLinearConfig.tiny("KZ"))
    finally:
        unregister_mixer("bad")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: register_mixer("kda", "Z", print), "the name 'kda' is the package's own; choose another"),
        (lambda: register_mixer("mine", "K", print), "the letter 'K' is that of 'kda'; of the capitals these are free"),
        (lambda: register_mixer("mine", "ZZ", print), "letter is 'ZZ'; a mixer's letter is one letter"),
        (lambda: register_mixer("my layer", "Z", print), "name is 'my layer'; a mixer's name is one word"),
        (lambda: register_mixer("mine", "Z", 3), "make is 3; it must be a function"),
        (lambda: unregister_mixer("kda"), "was not registered from outside"),
    ],
)
def test_bad_registrations_are_refused_in_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    assert "mine" not in MIXERS
