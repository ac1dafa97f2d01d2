"""The small model that the explainer ships: it reads bytes, and its memories can be watched.

    palimpsest train recipes/explainer.py --out runs/explainer

Its text are short stories in which things change, so that to go on well a head must erase what it wrote: "The door is red.
Now the door is blue. What colour is the door?", and the docstrings of the Python standard library. Both are made here, from
a seed and from this interpreter's own library. To keep three things apart takes many stories: three minutes of a GPU, or a
day of two cores, where `--set steps=200` shows how it begins.
"""

import ast
import random
import sysconfig
from pathlib import Path

import torch

from palimpsest.models.kimi_linear import KimiLinearConfig
from palimpsest.train import Data, Evaluate, Optim, Output, Recipe, Schedule, TextFiles

TEXT = Path("runs/explainer-text")
THINGS = "door lamp boat kite coat gate roof flag ring book bell cart drum tent sail rope".split()
COLOURS = "red blue green white pink silver yellow orange".split()  # a letter tells them apart
NAMES = "Ada Ben Cleo Dan Eva Finn Gus Hana Ivo Juno Kai Lena Mara Nils Olga Pia".split()
PLACES = "garden kitchen attic cellar market library forest station".split()


def story(chance: random.Random) -> str:
    """A few facts, some of them overwritten, and between them questions that ask for the last word on each."""
    if chance.random() < 0.6:
        subjects = [f"the {thing}" for thing in chance.sample(THINGS, chance.randint(1, 3))]
        values, asks = COLOURS, "what colour is"
    else:
        subjects = chance.sample(NAMES, chance.randint(1, 3))
        values, asks = [f"in the {place}" for place in PLACES], "where is"
    now = {subject: chance.choice(values) for subject in subjects}
    sentences = [f"{subject} is {value}." for subject, value in now.items()]
    for _ in range(chance.randint(2, 4)):
        subject = chance.choice(subjects)
        if chance.random() < 0.5:
            now[subject] = chance.choice([value for value in values if value != now[subject]])
            sentences.append(f"{chance.choice(('now', 'then', 'later'))} {subject} is {now[subject]}.")
        subject = chance.choice(subjects)
        question = [f"{asks} {subject}?"] if chance.random() < 0.5 else []
        sentences += [*question, f"{subject} is {now[subject]}."]
    return " ".join(s[0].upper() + s[1:] for s in sentences)


def docstrings() -> list[str]:
    """Every docstring of at least a line in the standard library's top modules and packages."""
    found = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "lib2to3"} & set(file.parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        nodes = (n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)))
        found += [text for node in nodes if len(text := ast.get_docstring(node) or "") > 60]
    return found


def write_text(folder: Path, seed: int = 0) -> None:
    """Docstrings, and 60 MB of stories, in files of a megabyte."""
    chance = random.Random(seed)
    prose = docstrings()
    size, stories = 60_000_000, []
    while size > 0:
        stories.append(story(chance))
        size -= len(stories[-1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in (("docstrings", prose), ("stories", stories)):
        chance.shuffle(texts)
        whole = "\n\n".join(texts)
        for i in range(0, len(whole), 1 << 20):
            (folder / f"{name}-{i >> 20:03}.txt").write_text(whole[i : i + (1 << 20)], encoding="utf-8")


def recipe() -> Recipe:
    if not TEXT.is_dir():
        write_text(TEXT)
    return Recipe(
        model=KimiLinearConfig.tiny(
            "KKKM",
            hidden_size=64,
            intermediate_size=192,
            linear_num_heads=4,
            linear_head_dim=16,
            num_attention_heads=4,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            num_experts=0,
            tie_word_embeddings=True,
        ),
        data=Data(source=TextFiles(paths=(str(TEXT),)), sequence_length=192, batch_size=384),
        steps=1224,
        optim=Optim(lr=4.5e-3, matrix_lr=3e-2),
        schedule=Schedule(warmup=0.02, decay=0.4),
        evaluate=Evaluate(every=600, max_bytes=32768, final_max_bytes=1 << 17),
        output=Output(checkpoint_every=300, log_every=20),
        precision="bf16" if torch.cuda.is_available() else "no",
    )
