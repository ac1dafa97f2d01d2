"""How often the explainer's model answers new stories with the last word on what is asked.

    python -m benchmarks.story_answers                    # the model that is shipped
    python -m benchmarks.story_answers runs/explainer     # another

200 stories each of one, two and three subjects, in which one to three facts are overwritten; the training text was drawn from
another seed. An answer counts if every byte of it, to the full stop, is the likeliest there.
"""

import argparse
import json
import random
from pathlib import Path

import torch

from palimpsest.explainer.scenes import SHIPPED
from palimpsest.models.kimi_linear import KimiLinearForCausalLM
from recipes.explainer import COLOURS, NAMES, PLACES, THINGS

RESULTS = Path(__file__).parent / "results" / "explainer"
STORIES, SEED = 200, 12345


def story(chance: random.Random, subjects: int) -> tuple[str, str]:
    """A story that ends in a question, and the answer."""
    if chance.random() < 0.6:
        who, values, asks = [f"the {x}" for x in chance.sample(THINGS, subjects)], COLOURS, "what colour is"
    else:
        who, values, asks = chance.sample(NAMES, subjects), [f"in the {x}" for x in PLACES], "where is"
    now = {x: chance.choice(values) for x in who}
    said = [f"{x} is {value}." for x, value in now.items()]
    for _ in range(chance.randint(1, 3)):
        x = chance.choice(who)
        now[x] = chance.choice([value for value in values if value != now[x]])
        said.append(f"{chance.choice(('now', 'then', 'later'))} {x} is {now[x]}.")
    x = chance.choice(who)
    capital = lambda sentence: sentence[0].upper() + sentence[1:]
    return " ".join(map(capital, [*said, f"{asks} {x}?"])), f" {capital(x)} is {now[x]}."


def right(model: KimiLinearForCausalLM, text: str, answer: str) -> bool:
    """Whether greedy decoding would give the answer: each of its bytes is the likeliest after those before it."""
    ids = torch.tensor([list(f"\n\n{text}{answer}".encode())])
    expected = ids[0, -len(answer.encode()) :]
    with torch.no_grad():
        logits = model(ids).logits
    return bool(torch.equal(logits[0, -len(expected) - 1 : -1].argmax(-1), expected))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=SHIPPED)
    folder = parser.parse_args().model
    model = KimiLinearForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chance = random.Random(SEED)
    rows = {n: sum(right(model, *story(chance, n)) for _ in range(STORIES)) for n in (1, 2, 3)}
    table = "\n".join(f"| {n} | {count} of {STORIES} |" for n, count in rows.items())
    print(f"| subjects | right |\n|---|---|\n{table}")
    if folder == SHIPPED:
        (RESULTS / "answers.json").write_text(
            json.dumps({"stories": STORIES, "seed": SEED, "right": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
