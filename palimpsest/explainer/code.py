"""How each figure is computed: the functions behind it, as they stand in this package, and the paper's equation.

Read from the source files, so nothing is imported.
"""

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
PAPER = {"label": "Kimi Linear, arXiv:2510.26692", "url": "https://arxiv.org/abs/2510.26692"}
PAPERS = {
    "softmax": {"label": "Attention is all you need, arXiv:1706.03762", "url": "https://arxiv.org/abs/1706.03762"},
    "linear": {"label": "Linear attention, arXiv:2006.16236", "url": "https://arxiv.org/abs/2006.16236"},
    "delta": {"label": "DeltaNet, arXiv:2406.06484", "url": "https://arxiv.org/abs/2406.06484"},
    "gla": {"label": "Gated linear attention, arXiv:2312.06635", "url": "https://arxiv.org/abs/2312.06635"},
    "gated": {"label": "Gated DeltaNet, arXiv:2412.06464", "url": "https://arxiv.org/abs/2412.06464"},
    "latent": {"label": "DeepSeek-V2, arXiv:2405.04434", "url": "https://arxiv.org/abs/2405.04434"},
}
FIGURES = {  # figure -> what in the paper, functions (file, name), further papers
    "whiteboard": (
        "equation 1, its four factors taken one after the other",
        (("ops/trace.py", "trace_memory"), ("layers/kimi_delta_attention.py", "KimiDeltaAttention.recurrence_inputs")),
        (),
    ),
    "answer": (
        "section 4, the model's architecture, and equation 1 for decoding",
        (("explainer/scenes.py", "answers"), ("explainer/scenes.py", "Watched.continued")),
        (),
    ),
    "inside": (
        "equation 1, unrolled: what a memory holds of each token",
        (("explainer/scenes.py", "inside"), ("ops/reference.py", "delta_memory")),
        ("delta",),
    ),
    "touch": ("equation 1", (("explainer/scenes.py", "touch"), ("ops/trace.py", "trace_memory")), ("delta",)),
    "family": (
        "section 2 and its table of update rules",
        (
            ("ops/reference.py", "delta_memory"),
            ("ops/reference.py", "softmax_lookup"),
            ("explainer/scenes.py", "family"),
        ),
        ("softmax", "linear", "delta", "gla", "gated"),
    ),
    "chunks": (
        "section 3, the chunkwise form: WY representation and UT transform",
        (("ops/chunked.py", "products"), ("ops/chunked.py", "merge"), ("explainer/scenes.py", "chunk")),
        ("delta",),
    ),
    "hybrid": (
        "section 4, the model's architecture",
        (
            ("explainer/scenes.py", "hybrid"),
            ("models/kimi_linear/model_state.py", "ModelState.account"),
            ("explainer/scenes.py", "order"),
        ),
        ("latent",),
    ),
}


@cache
def code() -> dict:
    """For each figure: where it stands in the paper, links, and the source of its functions."""
    return {
        figure: {
            "paper": PAPER | {"where": where},
            "papers": [PAPERS[name] for name in papers],
            "functions": [
                {"file": f"palimpsest/{file}", "name": name, "code": source(file, name)} for file, name in functions
            ],
        }
        for figure, (where, functions, papers) in FIGURES.items()
    }


def source(file: str, name: str) -> str:
    """The text of a function, or of a method as "Class.method".

    >>> source("ops/reference.py", "delta_memory").splitlines()[0]
    'def delta_memory('
    """
    text = (PACKAGE / file).read_text(encoding="utf-8")
    nodes: list[ast.stmt] = ast.parse(text).body
    node = None
    for part in name.split("."):
        node = next(n for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == part)
        nodes = node.body
    assert node is not None
    lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
    return "\n".join(line[node.col_offset :] for line in lines)
