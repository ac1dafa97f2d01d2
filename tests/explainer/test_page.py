"""The page, read as readers read it: in a browser, by mouse and keyboard, and with the network off.

Screenshots go to build/explainer/, to be looked at.
"""

import functools
import http.server
import re
import threading

import pytest
import torch

import palimpsest
from palimpsest.explainer import scenes
from palimpsest.explainer.export import export
from palimpsest.explainer.server import EXAMPLES, Library


def shown(x: float, digits: int = 4) -> str:
    """A number as the page writes it, for numbers that need no exponent."""
    x = float(x)
    if x == 0:
        return "0"
    assert 1e-4 <= abs(x) < 1e5, f"{x} would be written with an exponent"
    return f"{float(f'{x:.{digits}g}'):g}".replace("-", "−")


def number(text: str) -> float:
    head, _, tail = text.replace("−", "-").partition("\u2009×\u200910")
    return float(head) * 10.0 ** int(tail.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")) or 0)


def vectors(text: str) -> list[list[float]]:
    return [[number(x) for x in found.split(", ")] for found in re.findall(r"\[([^\]]*)\]", text)]


def test_the_walk_shows_its_exact_numbers_beat_by_beat(reader):
    assert reader.cells(2, 2) == [["10", "10"], ["2", "2"]]
    for beat, expected in {
        "decay": [["10", "10"], ["1", "1"]],
        "erase": [["10", "10"], ["0", "0"]],
        "write": [["10", "10"], ["5", "5"]],
        "read": [["10", "10"], ["5", "5"]],
    }.items():
        reader.press("ArrowRight")
        assert reader.page.locator("#whiteboard-equation").get_attribute("data-beat") == beat
        lit = reader.page.locator(f".beats [data-beat={beat}]")
        assert lit.get_attribute("aria-pressed") == "true"
        assert reader.cells(2, 2) == expected
    assert "o = [5, 5]" in reader.page.locator("#whiteboard-panel .story").inner_text()
    reader.press("ArrowLeft", "ArrowLeft")
    assert reader.cells(2, 2) == [["10", "10"], ["0", "0"]]
    reader.picture("walk")


def test_the_first_screen_is_a_token_at_work(reader, library):
    """By hand, since readers who want no motion see none; the numbers are those of the library's walk."""
    walk, hero = scenes.worked("walk"), reader.page.locator("#hero")
    cells = lambda: [number(x) for x in hero.locator(".cell:not(.key)").all_inner_texts()]
    assert hero.bounding_box()["y"] < 300
    for beat, name in (("Before", "start"), ("Fade", "decayed"), ("Erase", "erased"), ("Write", "written")):
        reader.choose("button", beat, within="#hero")
        assert cells() == walk[name].flatten().tolist()
    reader.choose("button", "Read", within="#hero")
    assert "[5, 5]" in hero.locator(".answer").inner_text()


def test_the_tour_is_led_by_keys_links_and_scrolling(reader):
    page, bar = reader.page, reader.page.locator(".tour")
    assert not bar.is_visible()
    page.get_by_role("button", name="Take the tour").click()
    assert "1 of 11" in bar.inner_text()
    for step in range(2, 12):
        page.keyboard.press("n")
        assert f"{step} of 11" in bar.inner_text()
        assert page.url.endswith(f"#step-{step}")
    page.keyboard.press("p")
    assert "10 of 11" in bar.inner_text()
    page.evaluate("location.hash = '#step-4'")
    reader.until(lambda: "4 of 11" in bar.inner_text())
    assert page.locator("#whiteboard-equation").get_attribute("data-beat") == "erase"
    page.wait_for_timeout(1000)  # until the tour's own scrolling is over
    page.locator("#figure-3").evaluate("figure => scrollTo(0, scrollY + figure.getBoundingClientRect().top - 60)")
    reader.until(lambda: "9 of 11" in bar.inner_text())
    reader.picture("tour")
    page.keyboard.press("Escape")
    assert not bar.is_visible()
    assert "#" not in page.url


def test_the_model_answers_blue(reader, library):
    box = reader.page.locator("#answer")
    reader.until(lambda: box.get_attribute("data-answer") != "")
    assert box.get_attribute("data-answer") == "The door is blue."
    replies = [line.strip() for line in box.locator(".reply").all_inner_texts()]
    assert replies == ["The door is red.", "The door is blue."]
    text = "The lamp is green. Now the lamp is white. What colour is the lamp?"
    reader.page.get_by_label("Your story").fill(text)
    reader.choose("button", "Answer", within="#answer")
    said = "".join(x["text"] for x in scenes.answers(library.get()[1], text)["said"]).replace("␣", " ").strip()
    reader.until(lambda: box.get_attribute("data-answer") == said)


def test_a_story_is_told_word_by_word_on_a_board_with_names(reader):
    reader.choose("radio", "A story, word by word")
    answers = reader.page.locator("#whiteboard-tokens .probe").all_inner_texts()
    assert answers == ["–"] * 3 + ["red"] * 9 + ["blue"] * 6
    reader.press("End")
    assert "o = [0, 0, 0.904]" in reader.page.locator("#whiteboard-panel .story").inner_text()
    board = reader.page.locator(".board canvas")
    board.focus()
    reader.page.keyboard.press("ArrowUp")
    assert reader.page.locator(".board .readout").inner_text().startswith("S, row door, column red: 0")


def test_what_a_trained_head_holds_is_what_the_library_says(reader, library):
    body, model = reader.page.locator("#inside"), library.get()[1]
    text, (layer, head) = EXAMPLES[0], model.telling()
    reader.until(lambda: body.get_attribute("data-head") == f"{layer}-{head}")
    expected = scenes.inside(model, text, layer, head, 10)
    reader.choose("button", "Token 11, s", within="#inside-tokens")
    assert body.get_attribute("data-asker") == "10"
    weights = lambda: [
        number(x.get_attribute("aria-label").rpartition(" ")[2])
        for x in reader.page.locator("#inside-tokens button").element_handles()
    ]
    for view, name in (
        ("asked", "One question, asked all along"),
        ("reads", "What each token reads"),
        ("left", "What is left of each token"),
    ):
        reader.choose("radio", name)
        assert body.get_attribute("data-view") == view
        for moment in (len(text) - 1, 20):
            reader.page.locator("#inside-tokens input").evaluate(
                "(input, value) => { input.value = value; input.dispatchEvent(new Event('input')) }", moment + 1
            )
            row = expected[view][moment].clone()
            row[moment + 1 :] = 0
            torch.testing.assert_close(torch.tensor(weights(), dtype=row.dtype), row, rtol=0.006, atol=0)
    longest = float(reader.page.locator("#inside-channels .chart").get_attribute("data-longest"))
    assert longest == pytest.approx(expected["half_life"].max().item(), rel=1e-6)
    reader.picture("inside")


def test_letters_and_words_explain_themselves(reader):
    tip, page = reader.page.locator("#tip"), reader.page
    letter = page.locator("#hero-law [data-term=beta]").first
    for show in (letter.hover, lambda: page.locator("button[data-term=latent]").focus()):
        show()
        reader.until(tip.is_visible)
    assert "latent attention" in tip.inner_text()
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    assert page.locator("button[data-term=alpha]").first.get_attribute("aria-description")


def test_one_key_writes_one_row(reader):
    reader.choose("radio", "One key, one row")
    assert reader.page.locator("#whiteboard").get_attribute("data-scene") == "row"
    reader.press("End")
    assert reader.cells(3, 3) == [["0"] * 3, ["5"] * 3, ["0"] * 3]


def test_a_sentence_of_ones_own_is_traced_and_its_numbers_are_the_librarys(reader, library):
    reader.watch_model()
    text = "The lamp is gold, then the lamp is blue. Say it again, the lamp?"
    assert len(text) == 64
    box = reader.page.get_by_label("Your sentence")
    box.fill(text)
    box.press("Enter")
    reader.settled()
    assert reader.page.locator("#whiteboard").get_attribute("data-tokens") == "64"
    for layer, head in ((0, 0), (2, 3)):
        reader.choose("radio", f"Layer {layer + 1}, head {head + 1}")
        assert reader.page.locator("#whiteboard").get_attribute("data-scene") == f"{layer}-{head}"
        expected = scenes.sentence(library.get()[1], text, layer, head)
        reader.press("Home")
        reader.press(*["ArrowRight"] * 7)  # the second token, after it has written
        page = [[number(x) for x in row] for row in (reader.cells(2, 16))]
        assert torch.tensor(page).sub(expected["written"][1][:2]).abs().max() < 1e-4
        row = reader.cells(1, 3)[0]
        for said, value in zip(row, expected["written"][1][0]):
            if 1e-4 <= abs(value) < 1e5:
                assert said == shown(value)
    assert reader.page.locator(".guess").count() == 3
    reader.picture("sentence")


def test_play_and_pause(reader):
    reader.watch_model()
    reader.page.get_by_label("Speed").select_option("8")
    reader.press("Home", "Space")
    where = lambda: int(reader.page.locator("#whiteboard").get_attribute("data-position"))
    reader.until(lambda: where() >= 6)
    reader.press("Space")
    still = where()
    reader.page.wait_for_timeout(300)
    assert where() == still
    reader.page.locator("#whiteboard").get_by_role("button", name="Play").click()
    reader.until(lambda: where() > still)
    reader.page.locator("#whiteboard").get_by_role("button", name="Pause").click()
    reader.page.get_by_role("button", name="To the beginning").click()
    assert where() == 0
    reader.page.get_by_role("button", name="Next token").click()
    assert where() == 4
    reader.press("Shift+ArrowRight")
    assert where() == 8
    reader.page.locator(".tokens [data-index='10']").click()
    assert where() == 43
    reader.page.locator(".tokens").first.focus()
    reader.page.keyboard.press("ArrowRight")
    assert where() == 48
    reader.press("End")
    assert where() == 4 * 63


def test_odd_sentences_are_answered_on_the_page(reader):
    reader.watch_model()
    box = reader.page.get_by_label("Your sentence")
    message = reader.page.locator("#whiteboard-tokens .message")
    for text, says in (("", "empty"), ("a" * 300, "300 tokens; up to 256")):
        box.fill(text)
        box.press("Enter")
        reader.settled()
        assert says in message.inner_text()
    box.fill("é 😀\u0007 \u202e!")
    box.press("Enter")
    reader.settled()
    assert message.inner_text() == ""
    chips = reader.page.locator(".tokens").first.locator("span").all_inner_texts()
    assert chips == ["é", "·", "␣", "😀", "·", "·", "·", "U+0007", "␣", "U+202E", "·", "·", "!"]
    # short of 16 tokens, figures 4 and 5 say so instead
    reader.choose("radio", "16", within="#chunks-controls")
    assert "13 tokens" in reader.page.locator("#chunks-tokens .message").inner_text()
    reader.complaints[:] = [c for c in reader.complaints if "400" not in c]  # the browser's own note on a refusal


def test_sliders_move_everything_by_the_librarys_numbers(reader):
    for name, value in {
        "row 1 keeps": 0.6,
        "row 2 keeps": 0.9,
        "β": 1.5,
        "Angle": 70,
        "v, column 1": -0.5,
        "Times": 5,
    }.items():
        reader.slide("#figure-2", name, value)
    expected = scenes.touch([0.6, 0.9], 1.5, 70.0, [-0.5, 0.8], 5, True)
    answers = reader.page.locator("#touch-answers")
    wanted = [shown(x, 3) for x in expected["new_answers"][-1]]
    assert f"[{', '.join(wanted)}]" in answers.inner_text()
    old = [shown(x, 3) for x in expected["old_answers"][-1]]
    assert f"[{', '.join(old)}]" in answers.inner_text()
    label = reader.page.locator("#touch-stages canvas").last.get_attribute("aria-label")
    entries = label.split(": ")[1].split(", ")
    assert entries == [shown(x, 3) for x in expected["written"][-1].flatten()]


def test_of_many_moves_the_last_one_stands(reader):
    """A slider that is dragged asks faster than answers come."""
    strength = reader.page.locator("#figure-2 .slider", has_text="β").locator("input")
    strength.evaluate(
        """(input) => {
            for (let i = 0; i <= 40; i++) {
                input.value = i / 20;
                input.dispatchEvent(new Event("input"));
            }
            input.value = 0.35;
            input.dispatchEvent(new Event("input"));
        }"""
    )
    reader.settled()
    expected = scenes.touch([1.0, 1.0], 0.35, 30.0, [0.8, 0.8], 1, True)
    label = reader.page.locator("#touch-stages canvas").last.get_attribute("aria-label")
    assert label.split(": ")[1].split(", ") == [shown(x, 3) for x in expected["written"][-1].flatten()]


def test_the_experiments_show_what_they_say(reader):
    answers = reader.page.locator("#touch-answers")

    def said(preset: str) -> list[list[float]]:
        reader.choose("button", preset, within="#touch-presets")
        return vectors(answers.inner_text())

    assert said("β = 1: wiped")[0] == [0.8, 0.8]
    assert said("No eraser")[0] == [1.3, 0.5]
    assert said("β = 0")[2] == [1, -0.6]
    assert said("No decay")[2] == [1.15, -0.05]
    new, _, old = said("Decay: it goes")[:3]
    assert new == [0.8, 0.8]
    assert abs(old[0] - 0.45) < 0.01
    handle = reader.page.locator(".handle")
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    reader.page.mouse.move(box["x"] + 9, box["y"] + 9)
    reader.page.mouse.down()
    reader.page.mouse.move(box["x"] - 60, box["y"] - 40)
    reader.page.mouse.up()
    reader.settled()
    angle = reader.page.locator("#figure-2 .slider", has_text="Angle").locator("output")
    assert number(angle.inner_text().rstrip("°")) > 35


def test_the_family_tells_its_story(reader):
    verdict = lambda member: reader.page.locator(f"[data-member={member}] .verdict").inner_text()
    assert verdict("softmax_lookup") == verdict("linear_attention") == "It cannot tell red from blue."
    assert verdict("kda") == verdict("delta_rule") == verdict("gated_delta") == "It says blue."
    probe = lambda member: reader.page.locator(f"[data-probe={member}] td").all_inner_texts()
    assert probe("kda") == probe("delta_rule") == ["red", "red", "blue"]
    assert probe("linear_attention") == ["red", "red", "red + blue"]
    positions = reader.page.get_by_label("Give softmax positions")
    positions.check()
    reader.settled()
    told = scenes.family("twice", 1.0, [0.7, 0.98], True)["members"]["softmax_lookup"]["answer"][-1].tolist()
    shares = reader.page.locator("[data-member=softmax_lookup] .bars .figure").all_inner_texts()
    assert shares == [f"{float(f'{x:.2f}'):g}" for x in told]
    assert verdict("softmax_lookup") == "It says blue."
    positions.uncheck()
    reader.settled()
    reader.choose("button", "door is red")
    assert verdict("kda") == "It says red."
    reader.choose("radio", "A long silence")
    reader.slide("#family", "door’s row", 0.5)
    expected = scenes.family("silence", 1.0, [0.5, 0.98])["members"]
    figures = lambda member: reader.page.locator(f"[data-member={member}] .bars .figure").all_inner_texts()
    for member in ("kda", "delta_rule", "gated_delta", "softmax_lookup"):
        wanted = [f"{float(f'{x:.2f}'):g}" for x in expected[member]["answer"][-1].tolist()]
        assert figures(member) == wanted
    reader.slide("#family-size", "Tokens", 20)
    assert "times as much as" in reader.page.locator("#family-size .story").inner_text()
    reader.slide("#family-size", "Tokens", 6)
    assert "exactly as much as" in reader.page.locator("#family-size .story").inner_text()


def test_chunks_agree_with_one_token_after_the_other(reader, library):
    result = reader.page.locator("#chunks-result")
    chips = reader.page.locator("#chunks-tokens .tokens span")
    for size in scenes.CHUNK_SIZES:
        reader.choose("radio", str(size), within="[aria-label='Tokens of a chunk']")
        reader.slide("#chunks", "First token", 21)
        expected = scenes.chunk_of_sentence(library.get()[1], EXAMPLES[0], *library.get()[1].telling(), 20, size)
        assert (result.get_attribute("data-size"), result.get_attribute("data-start")) == (str(size), "20")
        assert float(result.get_attribute("data-output")) == expected["output_difference"] < 1e-13
        assert chips.count() == size
    lit = lambda: [i for i, chip in enumerate(chips.all()) if "now" in (chip.get_attribute("class") or "")]
    assert lit() == []
    chips.nth(3).hover()
    reader.until(lambda: lit() == [3])
    reader.picture("chunks")
    marked = chips.nth(3).element_handle()
    reader.slide("#chunks", "First token", 11)
    assert marked.evaluate("chip => chip.isConnected")  # the pointer is on the same chip, with another token
    under = "chips => chips.flatMap((chip, i) => (chip.matches(':hover') ? [i] : []))"
    reader.until(lambda: lit() == chips.evaluate_all(under))
    reader.page.mouse.move(1, 1)
    reader.until(lambda: lit() == [])


def test_the_hybrid_holds_what_the_library_accounts_for(reader):
    reader.slide("#hybrid", "Tokens", 20)
    models = scenes.hybrid()["models"]
    chart = reader.page.locator("#hybrid-cache .chart")
    for name in ("hybrid", "latent"):
        wanted = models[name]["fixed"] + models[name]["per_token"] * 2**20
        assert float(chart.get_attribute(f"data-{name}")) == wanted
    assert "73.9 % is saved" in reader.page.locator("#hybrid-cache .story").inner_text()
    assert reader.page.locator(".layers li").count() == 27
    assert reader.page.locator("#hybrid-order .line").count() == 2


def test_every_figure_says_how_it_is_computed(reader):
    buttons = reader.page.get_by_role("button", name="How is this computed?")
    assert buttons.count() == 7
    for i in range(6):
        buttons.nth(i).click()
        reader.settled()
        dialog = reader.page.locator("dialog[open]")
        assert "def " in dialog.inner_text()
        assert "arXiv:2510.26692" in dialog.inner_text()
        reader.page.keyboard.press("Escape")
        reader.until(lambda: reader.page.locator("dialog[open]").count() == 0)


def test_dark_and_light(reader):
    theme = lambda: reader.page.locator("html").get_attribute("data-theme")
    paper = lambda: reader.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert theme() == "light"
    light = paper()
    reader.page.locator("#theme").click()
    assert theme() == "dark"
    reader.until(lambda: paper() != light)  # colours fade
    reader.page.reload()
    reader.page.wait_for_selector("html[data-ready]")
    assert theme() == "dark"


@pytest.mark.parametrize(
    ("width", "scheme", "beat"),
    [(1280, "light", 3), (1280, "dark", 2), (390, "light", 1), (390, "dark", 4)],
)
def test_no_one_is_shut_out(open_page, address, width, scheme, beat):
    """axe finds nothing, at any level, and nothing sticks out of a narrow screen."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    page = open_page(address, width=width, scheme=scheme)
    page.watch_model()
    page.press("Home", *["ArrowRight"] * (4 * 20 + beat))
    page.until(lambda: page.page.evaluate("document.getAnimations().length") == 0)  # colours have faded
    assert page.page.evaluate("document.documentElement.scrollWidth") <= width
    page.picture(f"page-{width}-{scheme}-{beat}")
    found = axe.Axe().run(page.page).response["violations"]
    assert [f"{v['id']}: {[n['target'] for n in v['nodes']][:4]}" for v in found] == []


def test_large_memories_are_drawn(open_page, tmp_path, run_server):
    """128 x 128, with heads as large as the published model's; `python -m benchmarks.explainer` times it."""
    config = palimpsest.KimiLinearConfig.tiny("K", linear_head_dim=128, linear_num_heads=1, num_experts=0)
    palimpsest.KimiLinearForCausalLM(config).save_pretrained(tmp_path)
    with run_server(Library(tmp_path)) as url:
        page = open_page(url)
        page.watch_model()
        page.press("Home")
        drawn = lambda: page.page.locator(".board canvas").screenshot()
        pictures = [drawn()]
        for _ in range(4):
            page.press("ArrowRight")
            pictures.append(drawn())
        assert len(set(pictures)) == 5  # each beat changes what is seen
        assert page.page.locator("#whiteboard").get_attribute("data-position") == "4"
        page.picture("board-128")


def test_a_checkpoint_that_cannot_be_used_is_said_on_the_page(open_page, tmp_path, run_server):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with run_server(Library(tmp_path)) as url:
        page = open_page(url)
        assert "llama" in page.page.locator("#status").inner_text()
        assert page.cells(2, 2) == [["10", "10"], ["2", "2"]]  # the first figure works all the same
        page.complaints.clear()  # the browser's own note on the refusal


def test_the_exported_site_opens_from_its_folder(open_page, tmp_path, library):
    """By a double click: no server, and nothing that a page of a folder may not load."""
    export(tmp_path / "site", library, EXAMPLES[:1])
    page = open_page((tmp_path / "site" / "index.html").as_uri())
    assert page.page.locator("html").get_attribute("data-failed") is None
    page.watch_model()
    assert float(page.page.locator("#whiteboard").get_attribute("data-drift")) < 1e-12
    page.until(lambda: page.page.locator("#answer").get_attribute("data-answer") == "The door is blue.")
    assert page.page.evaluate("document.fonts.check('16px \"Inter Variable\"')")


def test_the_exported_site_works_with_the_network_off(open_page, tmp_path, library):
    site = tmp_path / "site"
    export(site, library, EXAMPLES[:2])
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=site)) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        page = open_page(f"http://127.0.0.1:{host.server_port}/")
        page.press("End")
        assert page.cells(2, 2) == [["10", "10"], ["5", "5"]]
        page.watch_model()
        page.choose("radio", "Layer 3, head 2")
        assert page.page.locator("#whiteboard").get_attribute("data-scene") == "2-1"
        drift = float(page.page.locator("#whiteboard").get_attribute("data-drift"))
        assert drift < 1e-12  # the browser's memory against the one that the library wrote beside it
        expected = scenes.sentence(library.get()[1], EXAMPLES[0], 2, 1)
        page.press("Home")
        page.press(*["ArrowRight"] * 7)
        row = page.cells(1, 16)[0]
        assert torch.tensor([number(x) for x in row]).sub(expected["written"][1][0]).abs().max() < 1e-4
        page.page.get_by_label("Sentence", exact=True).select_option(EXAMPLES[1])
        page.settled()
        assert page.page.locator("#whiteboard").get_attribute("data-tokens") == str(len(EXAMPLES[1]))
        page.slide("#figure-2", "β", 0.5)
        halves = scenes.touch([1.0, 1.0], 0.5, 30.0, [0.8, 0.8], 1, True)["new_answers"][-1].tolist()
        wanted = ", ".join(shown(x, 3) for x in halves)
        assert f"[{wanted}]" in page.page.locator("#touch-answers").inner_text()
        page.choose("radio", "Two keys that overlap")
        kda = scenes.family("overlap", 1.0, [0.7, 0.98])["members"]["kda"]["answer"][-1].tolist()
        figures = page.page.locator("[data-member=kda] .bars .figure")
        assert figures.all_inner_texts() == [f"{float(f'{x:.2f}'):g}".replace("-", "−") for x in kda]
        assert float(page.page.locator("#chunks-result").get_attribute("data-output")) < 1e-13
        page.page.get_by_role("button", name="How is this computed?").first.click()
        page.settled()
        assert "copy of the law" in page.page.locator("dialog[open]").inner_text()
        page.picture("export")
        host.shutdown()
