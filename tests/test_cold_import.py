"""A fresh process, without Triton or anything but torch: the memory, the layers and the model work on a CPU."""

import subprocess
import sys

BLOCK = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {blocked!r} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def run(code: str, blocked: tuple[str, ...] = ()) -> str:
    script = BLOCK.format(blocked=blocked) + code
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_model_runs_with_torch_alone():
    extras = tuple("numpy triton transformers safetensors accelerate matplotlib typer rich tokenizers datasets".split())
    code = """
import palimpsest
kda = palimpsest.kda  # torch comes with it, and what torch would say of NumPy does not
import torch
q = k = v = torch.randn(1, 5, 2, 8)
assert kda(q, k, v, -torch.ones(1, 5, 2, 8), torch.ones(1, 5, 2)).output.isfinite().all()
from palimpsest.generate import generate
from palimpsest.models.kimi_linear.config import KimiLinearConfig
model = palimpsest.KimiLinearForCausalLM(KimiLinearConfig.tiny()).eval()
assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
print("ok")
"""
    assert run(code, extras).strip() == "ok"


def test_the_package_itself_does_not_load_torch():
    assert run("import palimpsest, sys; print('torch' in sys.modules)").strip() == "False"


def test_importing_the_ops_loads_no_kernel_compiler():
    assert run("import palimpsest.ops.variants, sys; print('triton' in sys.modules)").strip() == "False"
