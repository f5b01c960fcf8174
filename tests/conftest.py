"""Fixtures that the tests share. Which file guards what:

test_smoke.py      each script as a user starts it: results.json, TensorBoard's tags, PNGs, models
test_frame.py      flags, folders, faults, Ctrl-C, kill and resume, each on one script
test_contract.py   what all scripts have in common: order, equal blocks, flags, packages, lengths
test_notebook.py   each script pasted into a cell of a real kernel, interrupted, then main([...])
test_results.py    the figures of README.md and docs/results/README.md come from docs/results/*.json
test_<script>.py   the truth of one script: its algorithm, and its differences from the article
helpers.py         the scripts, their tiny settings, and how a test starts and reads one
oracles.py         what several of them are compared with: NumPy networks, scripted games
benchmark.py       speed, as ratios; run by hand
"""

import os
import tempfile

import helpers
import pytest

keras_home = tempfile.TemporaryDirectory()
os.environ["KERAS_HOME"] = keras_home.name  # Keras asks for it only when it is imported


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """Give each test a folder of its own, for caches too, the same random numbers, no figures."""
    monkeypatch.chdir(tmp_path)
    for name, value in helpers.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    import keras
    import matplotlib.pyplot as plt

    keras.utils.set_random_seed(0)
    yield
    plt.close("all")


@pytest.fixture
def small(request, monkeypatch):
    """Make a module's script's photographs small and few, so that a run takes seconds."""
    monkeypatch.setattr(request.module.script, "IMAGE_SIZE", 44)
    monkeypatch.setattr(request.module.script, "SYNTHETIC_COUNTS", (80, 9, 10))


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory, worker_id):
    """Return a function that gives a script's tiny run, made once for all the tests."""
    base = tmp_path_factory.getbasetemp()
    shared = (base if worker_id == "master" else base.parent) / "smoke"
    shared.mkdir(exist_ok=True)
    return lambda script: helpers.run_once(script, shared)
