"""gap_cats_dogs.py: data by hand, back ends by hand, its differences from the article, resuming."""

import json
import signal

import helpers
import matplotlib.pyplot as plt
import numpy as np
import photographs
import pytest
import tensorflow as tf
from helpers import Case, finish, start

import gap_cats_dogs as script

keras = script.keras

ARMS = ["fc", "fc_dropout", "gap", "avgpool"]
HISTORY = ["accuracy", "loss", "val_accuracy", "val_loss"]
FITS = {"scalars": {"epoch_accuracy", "epoch_loss"}}
CASE = Case(
    tiny=["--synthetic", "--epochs", "2", "--steps-per-epoch", "4", "--batch-size", "8"],
    final_epochs=dict.fromkeys(ARMS, 2),
    history=dict.fromkeys(ARMS, HISTORY),
    events={f"{arm}/{part}": FITS for arm in ARMS for part in ("train", "validation")},
    figures=["accuracy.png", "loss.png", "samples.png"],
    started="Epoch 2/7",
    again="Epoch 2/",
    bad_flags=[
        ["--steps-per-epoch", "0"],
        ["--batch-size", "0"],
        ["--arms"],
        ["--arms", "gap", "vgg"],
        ["--resume", "no/such/run"],
    ],
)


def arguments(*flags):
    return script.parse_args(["--synthetic", *map(str, flags)])


def numbered(*counts):
    """Return sets of images of one pixel, with their numbers as labels."""

    def dataset(count):
        return tf.data.Dataset.range(count).map(lambda i: (tf.zeros((1, 1, 3), tf.uint8), i))

    return [dataset(count) for count in counts]


def batches(dataset, count=-1):
    return [labels.numpy().tolist() for _, labels in dataset.take(count)]


def first_weights(arm, seed=0):
    keras.utils.set_random_seed(seed)
    return script.build_model(arm).layers[0].get_weights()


# --- Model ---


def test_difference_1_heads_are_alike_and_apart():
    heads = [first_weights(arm) for arm in ARMS]
    for head in heads[1:]:
        for one, other in zip(heads[0], head, strict=True):
            np.testing.assert_array_equal(one, other)
    assert not np.array_equal(first_weights("gap", seed=1)[0], heads[0][0])
    models = [script.build_model(arm) for arm in ("fc", "gap")]
    assert models[0].layers[0] is not models[1].layers[0]


def test_difference_1_one_arm_alone_gives_what_it_gives_among_all(smoke_run):
    among_all = smoke_run("gap_cats_dogs").results["arms"]["avgpool"]["history"]
    script.main([*CASE.tiny, "--arms", "avgpool"])
    (path,) = script.pathlib.Path("log").glob("*/*/results.json")
    arms = json.loads(path.read_text())["arms"]
    assert list(arms) == ["avgpool"]
    for metric, values in arms["avgpool"]["history"].items():
        assert values == pytest.approx(among_all[metric], rel=1e-3), metric


def test_difference_1_trained_weights_are_not_the_first(smoke_run):
    saved = keras.models.load_model(smoke_run("gap_cats_dogs").folder / "gap.keras")
    moved = [
        np.abs(a - b).max() for a, b in zip(saved.layers[0].get_weights(), first_weights("gap"))
    ]
    assert np.mean(np.array(moved) > 1e-5) > 0.9


@pytest.mark.parametrize("arm", ["gap", "avgpool"])
def test_difference_2_pooled_back_ends_by_hand(arm):
    model = script.build_model(arm)
    back_end = model.get_layer(arm)
    maps = np.random.default_rng(0).normal(size=(3, 10, 10, 64)).astype("float32")
    weights, bias = back_end.get_weights()
    if arm == "gap":
        pooled = maps.mean((1, 2))
    else:
        pooled = maps.reshape(3, 5, 2, 5, 2, 64).mean((2, 4)).reshape(3, 1600)
    assert weights.shape == (pooled.shape[1], 1)
    expected = 1 / (1 + np.exp(-(pooled @ weights + bias)))
    np.testing.assert_allclose(back_end(maps), expected, rtol=1e-4)


def test_networks_are_the_articles():
    head = (27 * 32 + 32) + (9 * 32 * 32 + 32) + (9 * 32 * 64 + 64) + 4 * (32 + 32 + 64)
    dense = 4 * 6400 + (6400 * 100 + 100) + 4 * 100 + (100 * 100 + 100) + 101
    behind = {"fc": dense, "fc_dropout": dense, "gap": 65, "avgpool": 1601}
    for arm in ARMS:
        model = script.build_model(arm)
        assert model.input_shape == (None, 100, 100, 3)
        assert model.layers[0].output_shape == (None, 10, 10, 64)
        assert model.output_shape == (None, 1)
        assert model.layers[0].count_params() == head
        assert model.get_layer(arm).count_params() == behind[arm]
    kinds = {a: [type(x).__name__ for x in script.build_model(a).layers[1].layers] for a in ARMS}
    kinds["fc"].insert(3, "Dropout")
    assert kinds["fc"] == kinds["fc_dropout"]


def test_the_head_divides_by_255():
    head = script.build_head()
    rest = keras.Sequential([keras.Input((100, 100, 3)), *head.layers[1:]])
    pixels = np.random.default_rng(0).integers(0, 256, (2, 100, 100, 3), dtype="uint8")
    expected = rest(pixels.astype("float32") / 255)
    np.testing.assert_allclose(head(pixels), expected, rtol=1e-4, atol=1e-5)


# --- Data ---


def test_difference_3_validation_and_test_see_each_image_once():
    args = arguments("--batch-size", 8)
    _, valid_dataset, test_dataset = script.batch_sets(numbered(64, 601, 33), 64, args)
    assert sum(batches(valid_dataset), []) == list(range(601))
    assert sum(batches(test_dataset), []) == list(range(33))


def test_difference_6_all_images_are_shuffled_together():
    args = arguments("--batch-size", 20)
    train_dataset, _, _ = script.batch_sets(numbered(3000, 1, 1), 3000, args)
    first, second = (batches(train_dataset, 300)[i : i + 150] for i in (0, 150))
    for one_pass in (first, second):  # each pass has each image once
        assert sorted(sum(one_pass, [])) == list(range(3000))
    assert max(first[0]) > 1000 + 20  # which a window of 1,000 cannot reach
    assert not set(map(frozenset, first)) & set(map(frozenset, second))


def test_the_seed_decides_the_batches():
    found = []
    for seed in (0, 0, 1):
        keras.utils.set_random_seed(seed)
        args = arguments("--batch-size", 20, "--seed", seed)
        found.append(batches(script.batch_sets(numbered(60, 1, 1), 60, args)[0], 3))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("no_cache", [False, True])
def test_difference_5_images_are_decoded_once(monkeypatch, no_cache):
    decoded, original = [], script.synthetic_photographs

    def counting(count):
        def note(i):
            decoded.append(i)
            return i

        def noted(image, label):
            tf.py_function(note, [label], tf.int64)
            return image, label

        return original(10).map(noted)

    monkeypatch.setattr(script, "synthetic_photographs", counting)
    args = arguments(*["--no-cache"] * no_cache)
    _, sets = script.load_data(args)
    before = len(decoded)
    assert before == 30 + 2  # and the two samples
    window = len(sets[0])
    train_dataset, valid_dataset, _ = script.batch_sets(sets, window, args)
    for _ in range(3):
        batches(train_dataset, 2)
        batches(valid_dataset)
    assert (len(decoded) > before) == no_cache


def test_difference_5_rounding_moves_a_pixel_by_half_a_level():
    rng = np.random.default_rng(0)
    for shape in ((375, 500, 3), (61, 40, 3)):
        image = tf.constant(rng.integers(0, 256, shape, dtype="uint8"))
        ours, label = script.pre_process_image(image, 7)
        # the article's order: to float, divide, resize
        article = tf.image.resize(tf.cast(image, tf.float32) / 255.0, (100, 100))
        assert (ours.dtype, ours.shape, label) == (tf.uint8, (100, 100, 3), 7)
        difference = np.abs(ours.numpy() / 255 - article.numpy())
        assert 0.3 / 255 < difference.max() <= 0.5001 / 255


def test_splits_share_no_image_and_leave_none_out(tmp_path):
    photographs.prepare(tmp_path)
    samples, sets = script.load_data(script.parse_args(["--data-dir", str(tmp_path)]))
    greys = [[int(image[0, 0, 0]) for image, _ in dataset] for dataset in sets]
    assert [len(part) for part in greys] == [32, 4, 4]
    assert sorted(sum(greys, [])) == list(photographs.GREYS)
    for dataset, part in zip(sets, greys):
        assert [int(label) for _, label in dataset] == [grey // 5 % 2 for grey in part]
    assert [sample.shape[0] + sample.shape[1] for sample in samples] == [90, 90]  # 30 + i, 60 - i
    assert samples[0].shape != samples[1].shape


def test_synthetic_photographs_have_many_sizes_and_can_be_learned():
    images, labels = zip(*script.synthetic_photographs(100))
    assert {image.dtype for image in images} == {tf.uint8}
    assert len({tuple(image.shape) for image in images}) > 90
    assert all(len(image.shape) == 3 and image.shape[2] == 3 for image in images)
    # the grey levels change along one axis only
    upright = [
        np.ptp(image.numpy(), axis=0).mean() < np.ptp(image, axis=1).mean() for image in images
    ]
    assert upright == [label == 1 for label in labels]
    first = [next(iter(script.synthetic_photographs(count)))[0].shape for count in (100, 101)]
    assert first[0] != first[1]  # the sets are not parts of one another


@pytest.mark.parametrize(("flags", "window"), [([], 80), (["--no-cache"], 1000)])
def test_difference_6_the_steps_and_the_window_of_a_run(monkeypatch, capsys, small, flags, window):
    """Without the cache a wide window would decode as many images before the first batch."""
    windows, original = [], script.batch_sets
    monkeypatch.setattr(script, "batch_sets", lambda *a: windows.append(a[1]) or original(*a))
    script.main(["--synthetic", "--epochs", "0", "--arms", "gap", "--batch-size", "8", *flags])
    assert f"{(80 + 9 + 10) // 8} batches an epoch" in capsys.readouterr().out  # as all sets fill
    assert windows == [window]


def test_difference_4_the_test_images_are_evaluated(smoke_run):
    run = smoke_run("gap_cats_dogs")
    images, labels = zip(*script.load_data(arguments())[1][2].as_numpy_iterator())
    for arm in ("fc", "gap"):
        model = keras.models.load_model(run.folder / f"{arm}.keras")
        found = model(np.stack(images)).numpy()[:, 0] > 0.5
        expected = np.mean(found == np.array(labels))
        assert run.results["arms"][arm]["final"]["test_accuracy"] == pytest.approx(
            expected, abs=0.02
        )
    assert run.stdout.count("1/1 - ") == len(ARMS)  # evaluations: once an arm


# --- Plots ---


@pytest.mark.parametrize("arms", [["fc_dropout", "avgpool"], ["fc", "gap", "avgpool"], ARMS])
def test_the_legend_has_a_column_an_arm_and_is_not_cut_off(monkeypatch, tmp_path, arms):
    figures = []
    monkeypatch.setattr(script, "save_figure", lambda figure, path: figures.append(figure))
    records = {arm: {"history": dict.fromkeys(HISTORY, [0.5, 0.6])} for arm in arms}
    script.plot(tmp_path, {"data": "x", "arms": records}, [np.zeros((9, 9, 3), "uint8")] * 2)
    for figure in figures[1:]:
        figure.draw_without_rendering()
        (legend,) = figure.legends
        box, canvas = legend.get_window_extent(), figure.bbox
        assert canvas.x0 <= box.x0 < box.x1 <= canvas.x1
        assert canvas.y0 <= box.y0 < box.y1 <= canvas.y1
        left = [text.get_window_extent().x0 for text in legend.get_texts()]
        assert left[::2] == pytest.approx(left[1::2])  # training above validation
        plt.close(figure)


# --- Bad data ---


@pytest.mark.parametrize("kind", photographs.DAMAGES)
def test_damaged_data(tmp_path, capsys, kind):
    photographs.prepare(tmp_path / "data")
    folder = photographs.damage(tmp_path / "data", kind)
    flags = ["--data-dir", str(folder), "--epochs", "1"]
    with pytest.raises(SystemExit) as stop:
        script.run_as_command(lambda: script.main(flags))
    (line,) = helpers.error_lines(capsys.readouterr().err)
    assert stop.value.code == 1
    assert f"{folder}/cats_vs_dogs cannot be loaded" in line
    assert "{{" not in line
    (path,) = script.pathlib.Path("log").glob("*/*/results.json")
    results = json.loads(path.read_text())
    assert (results["arms"], results["complete"]) == ({}, False)


def test_a_download_that_stops_half_way(tmp_path):
    command = ["-c", photographs.HALF_A_DOWNLOAD, "gap_cats_dogs"]
    run = finish(start(command, tmp_path), tmp_path)
    assert run.stdout.count("exit 1") == 2
    lines = helpers.error_lines(run.stderr)
    assert len(lines) == 2
    assert all("IncompleteRead" in line for line in lines)
    assert "Traceback" not in run.stderr
    assert run.results["arms"] == {}


# --- Resuming ---


class Killed(BaseException):
    """Stands for a kill: nothing in the script or in Keras catches it."""


@pytest.fixture
def small(monkeypatch):
    """Make images and sets small, so that a run takes a second or two."""
    original = script.synthetic_photographs
    monkeypatch.setattr(script, "IMAGE_SIZE", 44)
    monkeypatch.setattr(script, "synthetic_photographs", lambda count: original(count // 10))


SMALL = ["--synthetic", "--arms", "gap", "avgpool", "--steps-per-epoch", "2", "--batch-size", "8"]
KILLS = [
    ("results before", script, "write_results", 3),  # the second epoch of the first arm
    ("checkpoint before", tf.train.CheckpointManager, "save", 2),  # its third
    ("checkpoint after", tf.train.CheckpointManager, "save", 1),  # its third, again
    ("model before", keras.Model, "save", 1),
    ("results half written", script.os, "replace", 3),  # in the second arm
    ("figures before", script, "plot", 1),
]


def killed(monkeypatch, flags, when, owner, name, count):
    """Run the script; stop it at the call number `count` of owner.name; return its folder."""
    calls, original = [], getattr(owner, name)

    def struck(*args, **kwargs):
        calls.append(1)
        if len(calls) == count and "after" not in when:
            raise Killed
        value = original(*args, **kwargs)
        if len(calls) == count:
            raise Killed
        return value

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, struck)
        with pytest.raises(Killed):
            script.main(flags)
    (run_dir,) = script.pathlib.Path("log/gap_cats_dogs").iterdir()
    return run_dir, json.loads((run_dir / "results.json").read_text())


def check_history(results, epochs):
    for arm in ("gap", "avgpool"):
        history = results["arms"][arm]["history"]
        assert set(history) == set(HISTORY)
        assert [len(values) for values in history.values()] == [epochs] * 4
        assert all(np.isfinite(values).all() for values in history.values())


def test_resume_after_kills(monkeypatch, small):
    flags, trail = [*SMALL, "--epochs", "3"], []
    for kill in KILLS:
        run_dir, results = killed(monkeypatch, flags, *kill)
        trail.append({a: len(r["history"].get("loss", [])) for a, r in results["arms"].items()})
        flags = ["--resume", str(run_dir)]
    assert trail[0] == {"gap": 1}
    assert trail[-1] == {"gap": 3, "avgpool": 3}
    script.main(flags)
    results = json.loads((run_dir / "results.json").read_text())
    assert results["complete"]
    check_history(results, 3)
    # a finished run trains nothing more, unless it is given more epochs
    script.main(flags)
    assert json.loads((run_dir / "results.json").read_text())["arms"] == results["arms"]
    script.main([*flags, "--epochs", "4"])
    more = json.loads((run_dir / "results.json").read_text())
    check_history(more, 4)
    for arm in ("gap", "avgpool"):
        assert more["arms"][arm]["history"]["loss"][:3] == results["arms"][arm]["history"]["loss"]


def test_resume_after_sigkill(small, tmp_path):
    code = """
import os, signal, sys, gap_cats_dogs as script
script.IMAGE_SIZE = 44
save, calls = script.tf.train.CheckpointManager.save, []
def struck(self):
    calls.append(save(self))
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
script.tf.train.CheckpointManager.save = struck
script.main(sys.argv[1:])
"""
    flags = ["--synthetic", "--arms", "gap", "--steps-per-epoch", "2", "--epochs", "3"]
    run = finish(start(["-c", code, *flags], tmp_path), tmp_path)
    assert run.code == -signal.SIGKILL
    first = run.results["arms"]["gap"]["history"]["loss"]
    assert len(first) == 2
    script.main(["--resume", str(run.folder)])
    results = json.loads((run.folder / "results.json").read_text())
    history = results["arms"]["gap"]["history"]["loss"]
    assert results["complete"]
    assert (len(history), history[:2]) == (3, first)


def test_damaged_checkpoint(smoke_run, tmp_path, capsys):
    kind, folder = "data-00000-of-00001", "checkpoint/fc"
    code, line = helpers.resume_a_damaged_checkpoint(
        script, smoke_run("gap_cats_dogs"), kind, tmp_path, capsys, folder
    )
    assert code == 1
    assert f"{folder} is damaged" in line


def test_device_all_trains_on_two_devices(tmp_path):
    flags = ["--synthetic", "--epochs", "1", "--steps-per-epoch", "4", "--arms", "gap"]
    run = helpers.run_on_two_devices("gap_cats_dogs", flags, tmp_path, "script.IMAGE_SIZE = 44")
    assert list(run.results["arms"]["gap"]["history"]) == ["accuracy", "loss", *HISTORY[2:]]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_claim_dense_layers_overfit(seed):
    """Seven epochs on the real photographs: fc learns those to train by heart, gap does not."""
    final = script.main(["--arms", "fc", "gap", "--seed", str(seed)])
    assert final["fc"]["accuracy"] > 0.95
    assert final["fc"]["accuracy"] - final["fc"]["val_accuracy"] > 0.1
    assert final["gap"]["accuracy"] < 0.85
