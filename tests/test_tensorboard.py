"""TensorBoard itself, over HTTP: every script's scalars, images and graphs, listed by arm."""

import json
import shutil
import time
import urllib.request

import pytest
from helpers import SCRIPTS, case
from tensorboard import program

PLUGINS = {"scalars": "scalars/tags", "images": "images/tags", "graph": "graphs/info"}


@pytest.fixture
def read(tmp_path, smoke_run):
    """Return read(path): what TensorBoard, started on all scripts' runs, answers there."""
    for script in SCRIPTS:
        shutil.copytree(smoke_run(script).folder, tmp_path / "log" / script)
    server = program.TensorBoard()
    server.configure(
        argv=[None, "--logdir", str(tmp_path / "log"), "--host", "127.0.0.1", "--port", "0"]
    )
    address = server.launch()
    without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def read(path):
        with without_proxy.open(f"{address}data/{path}", timeout=30) as answer:
            return json.load(answer)

    return read


def test_every_arm_is_listed(read):
    wanted = {
        (
            kind,
            f"{script}/{folder}".rstrip("/"),
            frozenset() if kind == "graph" else frozenset(tags),
        )
        for script in SCRIPTS
        for folder, kinds in case(script).events.items()
        for kind, tags in kinds.items()
    }
    deadline, missing = time.monotonic() + 60, wanted
    while missing and time.monotonic() < deadline:  # it reads the events in the background
        found = {kind: read(f"plugin/{path}") for kind, path in PLUGINS.items()}
        missing = {
            (kind, run, tags)
            for kind, run, tags in wanted
            if run not in found[kind] or not tags <= set(found[kind][run])
        }
        time.sleep(0.5)
    assert not missing
    assert len({run for _, run, _ in wanted}) > len(SCRIPTS)
