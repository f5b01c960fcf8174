"""Each script, started as a user starts it, with tiny settings: what a run leaves."""

import re

import helpers
import pytest
from helpers import CASES, SCRIPTS

LOAD_MODELS = """
import sys, keras, numpy as np
for path in sys.argv[1:]:
    model = keras.models.load_model(path)
    assert np.isfinite(model(np.zeros((2, *model.input_shape[1:]), "float32"))).all()
    print(model.count_params())
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_results_in_one_folder(smoke_run, script):
    case, run = CASES[script], smoke_run(script)
    assert run.code == 0, run.stderr
    assert run.results["complete"] is True
    assert run.results["script"] == script
    assert run.results["device"] == "CPU"
    assert set(run.results["versions"]) >= {"tensorflow", "numpy"}
    epochs = int(case.tiny[case.tiny.index("--epochs") + 1])
    assert run.results["config"]["epochs"] == epochs
    assert list(run.results["arms"]) == list(case.history)
    for arm, record in run.results["arms"].items():
        assert sorted(record["history"]) == sorted(case.history[arm])
        assert len({len(values) for values in record["history"].values()}) == 1
        assert record["final"]
        assert record["seconds"] > 0
    if "--synthetic" in case.tiny:
        assert (run.results["data"], run.results["article"]) == ("synthetic", {})
    assert run.folder.name.endswith("-synthetic") == ("--synthetic" in case.tiny)
    assert re.fullmatch(r"\d{8}-\d{6}(-synthetic)?", run.folder.name)
    logdir = run.folder.parent.parent
    assert list(logdir.glob("*/*")) == [run.folder]
    assert not [path for path in run.folder.rglob("*") if "tmp" in path.name]


@pytest.mark.parametrize("script", SCRIPTS)
def test_output_ends_with_lines_to_paste(smoke_run, script):
    run = smoke_run(script)
    lines = run.stdout.splitlines()
    assert f'tensorboard --logdir "{run.folder.relative_to(run.folder.parents[2])}"' in lines
    for arm, record in run.results["arms"].items():
        if (run.folder / f"{arm}.keras").exists():
            assert any("load_model(" in line and f"{arm}.keras" in line for line in lines)
        assert any(line.startswith(arm) for line in lines if record["final"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_tags_and_figures(smoke_run, script):
    run = smoke_run(script)
    for folder, kinds in CASES[script].tags.items():
        found = helpers.tags(run.folder / folder)
        for kind, tags in kinds.items():
            assert found["graph"] if kind == "graph" else tags <= found[kind], (folder, kind)
    paths = sorted(run.folder.glob("*.png"))
    assert [path.name for path in paths] == CASES[script].figures
    for path in paths:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert 5_000 < len(content) < 300_000


def test_models_load_in_a_fresh_process(smoke_run, tmp_path):
    counts = {}
    for script in ("resnet_cifar10", "dueling_q_cartpole"):
        run = smoke_run(script)
        for arm, record in run.results["arms"].items():
            counts[run.folder / f"{arm}.keras"] = record["final"]["parameters"]
    loaded = helpers.finish(helpers.start(["-c", LOAD_MODELS, *counts], tmp_path), tmp_path)
    assert loaded.code == 0, loaded.stderr
    assert list(map(int, loaded.stdout.split())) == list(counts.values())
