"""What the page shows is what the library computes."""

import importlib.util
import math
import random
import re
from pathlib import Path

import pytest
import torch

import palimpsest
from palimpsest.explainer import scenes

TEXT = "The door is red. Now the door is blue."


@pytest.fixture(scope="module")
def model() -> scenes.Watched:
    return scenes.Watched()


def test_the_worked_walk_has_its_exact_numbers():
    walk = scenes.worked("walk")
    assert walk["start"].tolist() == [[10, 10], [2, 2]]
    assert walk["decayed"][0].tolist() == [[10, 10], [1, 1]]
    assert walk["erased"][0].tolist() == [[10, 10], [0, 0]]
    assert walk["written"][0].tolist() == [[10, 10], [5, 5]]
    assert walk["read"][0].tolist() == [5, 5]


def test_one_key_writes_one_row():
    assert scenes.worked("row")["written"][0].tolist() == [[0, 0, 0], [5, 5, 5], [0, 0, 0]]


def test_the_sentence_is_the_memory_of_that_head(model):
    """The last memory is the one that the model itself carries on from."""
    ids = list(TEXT.encode())
    with torch.no_grad():
        state = model.model(torch.tensor([ids])).state
    for layer in model.watchable():
        for head in range(4):
            scene = scenes.sentence(model, TEXT, layer, head)
            assert scene["written"].shape == (len(ids), 16, 16)
            held = state.layers[layer].memory[0, head]
            torch.testing.assert_close(scene["final"].float(), held, rtol=1e-4, atol=1e-5)
            assert scene["final"].float().equal(scene["written"][-1])


def test_an_answer_is_the_sum_of_values_by_their_weights(model):
    for layer, head in ((0, 0), (1, 3), (2, 1)):
        traced, found = scenes.sentence(model, TEXT, layer, head), scenes.inside(model, TEXT, layer, head, 12)
        torch.testing.assert_close(found["reads"] @ traced["v"], traced["read"], rtol=1e-9, atol=1e-12)
        after = traced["written"].double().mT @ traced["q"][12]
        torch.testing.assert_close(found["asked"] @ traced["v"], after, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found["asked"][12], found["reads"][12])
        torch.testing.assert_close(found["left"].diagonal(), traced["beta"], rtol=1e-5, atol=1e-6)
        assert found["left"].triu(1).abs().max() == 0
        k, beta, alpha = traced["k"], traced["beta"], traced["alpha"]
        one_token = (torch.eye(16) - beta[5] * torch.outer(k[5], k[5])) @ torch.diag(alpha[5])
        spectrum = torch.linalg.eigvals(one_token).real.sort().values
        torch.testing.assert_close(found["eigenvalues"][5], spectrum, rtol=1e-6, atol=1e-8)
        slowest = (alpha.log().mean(0) * found["half_life"]).exp()
        torch.testing.assert_close(slowest, torch.full_like(slowest, 0.5))
    with pytest.raises(ValueError, match="Token 40 was asked for and there are 38"):
        scenes.inside(model, TEXT, 0, 0, 39)


def test_the_gallery_holds_every_heads_last_memory(model):
    memories = scenes.heads(model, TEXT)["memories"]
    assert memories.shape == (3, 4, 16, 16)
    for i, layer in enumerate(model.watchable()):
        for head in range(4):
            final = scenes.sentence(model, TEXT, layer, head)["final"].float()
            torch.testing.assert_close(memories[i, head], final, rtol=1e-4, atol=1e-5)


def test_the_beats_follow_from_the_inputs(model):
    scene = scenes.sentence(model, TEXT, 1, 2)
    k, v, alpha, beta = (scene[name] for name in ("k", "v", "alpha", "beta"))
    result = palimpsest.kda(
        *(x[None, :, None] for x in (scene["q"], k, v, alpha.log())),
        beta[None, :, None],
        scale=1.0,
        backend="reference",
    )
    torch.testing.assert_close(scene["read"], result.output[0, :, 0], rtol=1e-9, atol=1e-12)
    before = scene["written"][4].double()
    decayed = alpha[5][:, None] * before
    torch.testing.assert_close(scene["decayed"][5].double(), decayed, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scene["held"][5], beta[5] * decayed.T @ k[5], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        scene["erased"][5].double(), decayed - torch.outer(k[5], scene["held"][5]), rtol=1e-5, atol=1e-6
    )
    assert scene["norms"].shape == (len(TEXT), 4)
    assert scene["norms"][5, 0] == scene["norms"][4, 3]


def test_the_model_has_learned_to_overwrite(model):
    """Asked for what was overwritten, the shipped model says the last word, whichever came first."""
    colours = ("red", "blue", "green", "white", "pink")
    right = 0
    for first in colours:
        for last in colours:
            if first == last:
                continue
            text = f"The door is {first}. Now the door is {last}. What colour is the door? The door is "
            with torch.no_grad():
                logits = model.model(torch.tensor([list(text.encode())])).logits[0, -1]
            right += chr(int(logits.argmax())) == last[0]
    assert right >= 18  # of 20


def test_the_model_answers_and_would_have_answered_otherwise_earlier(model):
    """The forks answer as whole texts do, and the states that they were taken from stay as they were."""
    text = "The door is red. Now the door is blue. What colour is the door?"
    scene = scenes.answers(model, text)
    spelled = "".join(token["text"] for token in scene["said"]).replace("␣", " ").strip()
    assert spelled == "The door is blue."
    assert [step["answer"] for step in scene["earlier"]] == ["The door is red.", "The door is blue."]
    alone = scenes.answers(model, "The door is red. What colour is the door?")["said"]
    assert "".join(token["text"] for token in alone).replace("␣", " ").strip() == scene["earlier"][0]["answer"]
    assert scene["earlier"][0]["chance"] == pytest.approx(min(token["chance"] for token in alone), rel=1e-4)
    assert scenes.answers(model, "No question here.")["earlier"] == []


def test_positions_tell_softmax_what_came_last():
    without, given = (scenes.family("twice", 1.0, [0.7, 0.98], on)["members"] for on in (False, True))
    red, _, blue = without["softmax_lookup"]["answer"][-1].tolist()
    assert red == pytest.approx(blue)
    assert given["softmax_lookup"]["answer"][-1].tolist() == pytest.approx(
        torch.tensor([8.0 - 4, -2, 8.0], dtype=torch.float64).softmax(0).tolist()
    )
    assert given["kda"]["answer"].equal(without["kda"]["answer"])


def test_beta_one_recalls_and_beta_two_mirrors():
    given = {"alpha": [1.0, 1.0], "angle": 40.0, "times": 1, "eraser": True}
    recalled = scenes.touch(beta=1.0, value=[0.3, -0.7], **given)
    assert recalled["new_answers"][-1].tolist() == pytest.approx([0.3, -0.7], abs=1e-15)
    mirrored = scenes.touch(beta=2.0, value=[0.0, 0.0], **given)
    assert mirrored["written"][-1].norm().item() == pytest.approx(mirrored["start"].norm().item(), abs=1e-15)
    torch.testing.assert_close(mirrored["new_answers"][-1], -mirrored["new_answers"][0])
    untouched = scenes.touch(beta=0.0, value=[1.0, 1.0], **given)
    assert untouched["written"][-1].equal(untouched["start"])


def test_without_the_eraser_facts_interfere_and_without_decay_a_residue_stays():
    given = {"beta": 1.0, "angle": 40.0, "value": [1.0, 1.0]}
    laid_on_top = scenes.touch(alpha=[1.0, 1.0], times=1, eraser=False, **given)
    assert abs(laid_on_top["new_answers"][-1][0].item() - 1) > 0.5
    stays = scenes.touch(alpha=[1.0, 1.0], times=24, eraser=True, **given)
    across = torch.tensor([-math.sin(math.radians(40)), math.cos(math.radians(40))], dtype=torch.float64)
    residue = lambda scene, t: (scene["written"][t].T @ across).norm().item()
    assert residue(stays, 23) == pytest.approx(residue(stays, 0), abs=1e-12)
    fades = scenes.touch(alpha=[0.8, 0.8], times=24, eraser=True, **given)
    assert residue(fades, 23) < 0.01 * residue(stays, 23)
    assert fades["new_answers"][-1].tolist() == pytest.approx([1, 1], abs=1e-12)


def test_the_family_answers_the_key_that_was_written_twice():
    members = scenes.family("twice", 1.0, [0.7, 0.98])["members"]
    last = {name: member["answer"][-1].tolist() for name, member in members.items()}
    assert last["softmax_lookup"][0] == last["softmax_lookup"][2]  # it cannot tell them apart
    assert last["linear_attention"] == [1, 0, 1]
    assert last["delta_rule"] == pytest.approx([0, 0, 1])
    assert last["gated_linear_attention"] == pytest.approx([0.49, 0, 1])
    assert last["gated_delta"] == pytest.approx([0, 0, 1])
    assert last["kda"] == pytest.approx([0, 0, 1])
    lamp = {name: members[name]["memory"][-1][1, 1].item() for name in ("kda", "gated_delta", "delta_rule")}
    assert lamp["kda"] == pytest.approx(0.98)  # its own channel; one decay for the head takes more of it
    assert lamp["gated_delta"] < lamp["kda"] < lamp["delta_rule"]


@pytest.mark.parametrize("size", scenes.CHUNK_SIZES)
def test_a_chunk_gives_what_one_token_after_the_other_gives(model, size):
    for layer, head in ((0, 0), (2, 3)):
        scene = scenes.chunk_of_sentence(model, TEXT, layer, head, 7, size)
        assert scene["output_difference"] < 1e-13
        assert scene["memory_difference"] < 1e-13
        assert scene["library_difference"] < 1e-13
        assert scene["identity_error"] < 1e-13
        assert scene["A"].triu().abs().max() == 0
        whole = scenes.sentence(model, TEXT, layer, head)
        torch.testing.assert_close(scene["output"], whole["read"][7 : 7 + size], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(scene["after"].float(), whole["written"][6 + size])


def test_the_hybrid_has_the_released_shapes():
    scene = scenes.hybrid()
    assert scene["layer_types"].count("kda") == 20
    assert scene["layer_types"].count("mla") == 7
    assert scene["models"]["hybrid"]["per_token"] == 7 * 576 * 2
    assert scene["models"]["latent"] == {"fixed": 0, "per_token": 27 * 576 * 2}
    assert scene["models"]["hybrid"]["fixed"] == 20 * (32 * 128 * 128 * 4 + 3 * 4096 * 3 * 2)


def test_order_is_seen_by_the_memory_and_not_by_the_latent_layer(model):
    scene = scenes.order(model, TEXT)
    assert scene["memory"] > 1e-3
    assert scene["latent"] < 1e-5


def test_odd_sentences_have_labels(model):
    text = "é\x00\U0001f600\n\u200d\ud800"
    tokens, ids = model.tokens(text)
    assert [t["text"] for t in tokens] == ["é"] * 2 + ["U+0000"] + ["😀"] * 4 + ["\\n"] + ["U+200D"] * 3 + [
        "U+D800"
    ] * 3
    assert len(tokens) == len(ids)
    assert [t.get("part") for t in tokens[3:7]] == [1, 2, 3, 4]
    assert scenes.sentence(model, text, 0, 0)["written"].isfinite().all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: scenes.sentence(m, "", 0, 0), "empty"),
        (lambda m: scenes.sentence(m, "a" * 257, 0, 0), "257 tokens; up to 256"),
        (lambda m: scenes.sentence(m, "abc", 3, 0), "Layer 3 cannot be watched"),
        (lambda m: scenes.sentence(m, "abc", 0, 4), "Head 4 does not exist"),
        (lambda m: scenes.chunk_of_sentence(m, "abc", 0, 0, 0, 4), "there are 3"),
        (lambda m: scenes.chunk_of_sentence(m, TEXT, 0, 0, 0, 5), "choose 4, 8, 16"),
        (lambda m: scenes.order(m, "abc"), "at least 8"),
        (lambda m: scenes.worked("nope"), "choose one of walk"),
        (lambda m: scenes.family("twice", 3.0, [1.0, 1.0]), "beta is 3.0; expected 0 to 2"),
        (lambda m: scenes.touch([1.0, 1.0], 1.0, 0.0, [0.0, 0.0], 100, True), "times is 100"),
        (lambda m: scenes.touch([1.0, math.nan], 1.0, 0.0, [0.0, 0.0], 1, True), "alpha 2 is nan"),
    ],
)
def test_bad_input_is_answered_with_a_sentence(model, call, says):
    with pytest.raises(ValueError, match=says):
        call(model)


def test_a_model_without_the_delta_rule_is_refused(tmp_path):
    config = palimpsest.KimiLinearConfig.tiny("AM")
    palimpsest.KimiLinearForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="nothing here can be watched"):
        scenes.Watched(tmp_path)


def test_a_model_of_another_vocabulary_needs_its_tokenizer(tmp_path):
    config = palimpsest.KimiLinearConfig.tiny("K", vocab_size=100, eos_token_id=None)
    palimpsest.KimiLinearForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer"):
        scenes.Watched(tmp_path)


def test_the_stories_that_the_shipped_model_reads_ask_for_the_last_word():
    """Every answer, in every story, is the last thing that was said of that subject."""
    place = Path(__file__).parents[2] / "recipes" / "explainer.py"
    if not place.is_file():
        pytest.skip("the recipes are not part of an installed package")
    spec = importlib.util.spec_from_file_location("explainer_recipe", place)
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    chance = random.Random(3)
    overwritten = 0
    for _ in range(200):
        said: dict[str, str] = {}
        asked = None
        for sentence in re.findall(r"[^.?]+[.?]", recipe.story(chance)):
            words = re.sub(r"^(now|then|later) ", "", sentence.strip().lower()).rstrip(".?").split()
            if sentence.endswith("?"):
                asked = " ".join(words[words.index("is") + 1 :])
                continue
            subject, value = (" ".join(part) for part in (words[: words.index("is")], words[words.index("is") + 1 :]))
            if asked is not None:
                assert (subject, value) == (asked, said[subject])
                asked = None
            overwritten += subject in said and said[subject] != value
            said[subject] = value
    assert overwritten >= 200
