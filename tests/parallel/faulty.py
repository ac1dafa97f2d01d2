"""Run as a program: pairs of processes that train, one of which is wrong, killed or stopped, in each case in a way of its own.

    python faulty.py FOLDER

Torch is loaded once and each pair is forked from here. FOLDER/CASE gets what each process said and its exit code.
"""

import os
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

import torch

from palimpsest import cli
from palimpsest.parallel.watch import watching
from palimpsest.train import checkpoints, data, logger, loop, processes

RECIPE = """
from palimpsest.models.kimi_linear import KimiLinearConfig
from palimpsest.train import Data, Evaluate, Output, Recipe, TextFiles

def recipe():
    small = KimiLinearConfig.tiny("KM", hidden_size=16, intermediate_size=32, linear_head_dim=8, moe_intermediate_size=8)
    return Recipe(
        model=small, data=Data(source=TextFiles(paths=({texts!r},)), sequence_length=32, batch_size=4), steps=6,
        evaluate=Evaluate(every=100, piece_bytes=64, max_bytes=256, final_max_bytes=512),
        output=Output(checkpoint_every=2, log_every=1),
    )
"""


def at_step(step, act):
    """Does something as this process comes to a step."""
    real = loop._step

    def before(*arguments):
        before.step += 1
        if before.step == step:
            act()
        return real(*arguments)

    before.step = 0
    loop._step = before


def while_saving(act):
    """Does something in the middle of the second checkpoint."""
    real = checkpoints.write_rows

    def write(file, *arguments):
        real(file, *arguments)
        if "step-00000004" in str(file):
            act()

    checkpoints.write_rows = write


def other_data():
    """This process reads other text under the same names, as on a host whose copy is old."""
    real = data._read_text
    data._read_text = lambda file: real(file).replace(b"return", b"yield")


def hit(number):
    os.kill(os.getpid(), number)


UNEVEN = ["parallel.expert=2", "model.num_experts=3"]
CASES = {  # what each of the two does; then settings of each
    "with experts": ({}, ["parallel.expert=2"], ["parallel.expert=2"]),
    "another recipe": ({}, ["seed=1"], ["seed=2"]),
    "other data": ({1: lambda: other_data()}, [], []),
    "no such data": ({}, [], ["data.source.paths=/nowhere"]),
    "a plan too large": ({}, ["parallel.data=3"], ["parallel.data=3"]),
    "experts that do not divide": ({}, UNEVEN, UNEVEN),
    "rows that do not divide": ({}, ["data.batch_size=3"], ["data.batch_size=3"]),
    "the second killed": ({1: lambda: at_step(4, lambda: hit(signal.SIGKILL))}, [], []),
    "the first killed": ({0: lambda: at_step(4, lambda: hit(signal.SIGKILL))}, [], []),
    "the second stopped": ({1: lambda: at_step(4, lambda: hit(signal.SIGSTOP))}, [], []),
    "the second killed while saving": ({1: lambda: while_saving(lambda: hit(signal.SIGKILL))}, [], []),
    "both killed while saving": (dict.fromkeys((0, 1), lambda: while_saving(lambda: hit(signal.SIGKILL))), [], []),
}  # fmt: skip


def child(folder, case, rank, port):
    acts, *settings = CASES[case]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    said = open(folder / f"said-{rank}", "w")  # noqa: SIM115  # for as long as the process lives
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    acts.get(rank, lambda: None)()
    sets = [part for setting in settings[rank] for part in ("--set", setting)]
    return cli.run(["train", str(folder.parent / "recipe.py"), "--out", str(folder / "run"), "--quiet", *sets])


def pair(folder, case):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir()
    children = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                code = child(folder, case, rank, port)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(pid)
    began, codes = time.monotonic(), {}
    while len(codes) < 2 and time.monotonic() - began < 40:
        for rank, pid in enumerate(children):
            if rank not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(ended[1])
        if 0 in codes and 1 not in codes and case == "the second stopped":
            os.kill(children[1], signal.SIGKILL)
        time.sleep(0.05)
    for rank, pid in enumerate(children):
        if rank not in codes:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    (folder / "codes").write_text(" ".join(str(codes.get(rank, "hung")) for rank in range(2)))
    (folder / "seconds").write_text(str(time.monotonic() - began))


def main(folder, cases):
    (folder / "texts").mkdir()
    for i in range(6):
        (folder / "texts" / f"file{i}.py").write_text("".join(f"def f{i}_{j}(x):\n    return x\n" for j in range(20)))
    (folder / "recipe.py").write_text(RECIPE.format(texts=str(folder / "texts")))
    for case in cases:
        pair(folder / case, case)


if __name__ == "__main__":
    processes.watching = partial(watching, every=0.2, silent=1.5)  # seconds, where they are 5 and 40
    logger.draw_loss_curve = lambda *arguments: []
    main(Path(sys.argv[1]), sys.argv[2:] or list(CASES))
