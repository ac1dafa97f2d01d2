"""Each figure leads to the code behind it."""

from palimpsest.explainer.code import FIGURES, PACKAGE, code


def test_every_figure_names_functions_that_exist():
    for figure, entry in code().items():
        assert entry["paper"]["where"], figure
        for function in entry["functions"]:
            assert f"def {function['name'].split('.')[-1]}(" in function["code"]
            assert (PACKAGE.parent / function["file"]).is_file()


def test_every_figure_of_the_page_has_a_link():
    page = (PACKAGE / "explainer" / "static" / "index.html").read_text(encoding="utf-8")
    for figure in FIGURES:
        assert f'data-how="{figure}"' in page
    assert page.count("data-how=") == page.count('class="figure"') == len(FIGURES)
