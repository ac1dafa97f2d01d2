"""The page's own copy of the law, as it is shipped, against the library. It runs in node; the browser's tests run it too."""

import json
import shutil
import subprocess

import pytest
import torch

from palimpsest.explainer import scenes
from palimpsest.explainer.server import STATIC
from palimpsest.ops import chunked, reference

SCRIPT = """
import { readFileSync } from "node:fs";
const { trace, chunk, softmaxLookup } = await import(process.argv[1]);
const given = JSON.parse(readFileSync(0, "utf8"));
const lift = (x) => Array.isArray(x) ? Float64Array.from(x) : x;
const inputs = Object.fromEntries(Object.entries(given).map(([name, x]) => [name, lift(x)]));
const { T, K, V, q, k, write } = inputs;
const found = { ...trace(inputs), chunk: chunk(inputs), lookup: softmaxLookup(T, K, V, q, k, write, 3) };
console.log(JSON.stringify(found, (_, x) => x instanceof Float64Array ? [...x] : x));
"""


def in_javascript(**inputs) -> dict:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    given = json.dumps({name: x.flatten().tolist() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()})
    command = [node, "--input-type=module", "-e", SCRIPT, (STATIC / "assets" / "law.js").as_uri()]
    return json.loads(subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("decay", ["none", "slow", "fast"])
def test_the_law_in_the_browser_is_the_law(decay):
    torch.manual_seed(5)
    T, K, V = 16, 5, 7
    double = {"dtype": torch.float64}
    q, k, v = (
        torch.randn(T, K, **double),
        torch.nn.functional.normalize(torch.randn(T, K, **double), dim=-1),
        torch.randn(T, V, **double),
    )
    beta = 2 * torch.rand(T, 1, **double)
    log_decay = {"none": 0.0, "slow": -0.02, "fast": -40.0}[decay] * torch.rand(T, K, **double)
    start = torch.randn(K, V, **double)
    found = in_javascript(T=T, K=K, V=V, q=q, k=k, erase=beta * k, write=beta * v, alpha=log_decay.exp(), start=start)
    one = lambda x: x[None, :, None]
    given = [one(x) for x in (q, k, beta * k, beta * v, log_decay)]
    output, memory = reference.delta_memory(*given, start[None, None])
    same = lambda name, x, y: torch.testing.assert_close(
        torch.tensor(x, **double).view(y.shape), y, rtol=1e-12, atol=1e-12, msg=lambda m: f"{name}: {m}"
    )
    same("read", found["read"], output[0, :, 0])
    same("written", found["written"][-K * V :], memory[0, 0])
    products = chunked.products(*given)
    for name in ("A", "M", "W", "U", "P"):
        same(name, found["chunk"][name], getattr(products, name)[0, 0, 0])
    same("output", found["chunk"]["output"], output[0, :, 0])
    same("after", found["chunk"]["after"], memory[0, 0])
    same("lookup", found["lookup"]["answer"], reference.softmax_lookup(3 * one(q), one(k), one(beta * v))[0, :, 0])


def test_the_worked_walk_is_exact_there_too():
    walk = scenes.worked("walk")
    k, beta = walk["k"], walk["beta"][:, None]
    found = in_javascript(
        T=1, K=2, V=2, q=k, k=k, erase=beta * k, write=beta * walk["v"], alpha=walk["alpha"], start=walk["start"]
    )
    assert found["decayed"] == [10, 10, 1, 1]
    assert found["erased"] == [10, 10, 0, 0]
    assert found["written"] == [10, 10, 5, 5]
