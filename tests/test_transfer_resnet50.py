"""transfer_resnet50.py: what the frozen base gets and gives, its differences from the article."""

import functools
import json
import shutil

import helpers
import numpy as np
import photographs
import pytest
import tensorflow as tf
from helpers import Case, finish, start

import gap_cats_dogs
import transfer_resnet50 as script

keras = script.keras

ARMS = ["cnn", "resnet50"]
HISTORY = ["accuracy", "loss", "val_accuracy", "val_loss"]
FITS = {"scalars": {"epoch_accuracy", "epoch_loss"}}
BATCHES = {"scalars": {"batch_accuracy", "batch_loss", *FITS["scalars"]}}
STEPS = ["--steps-per-epoch", "3", "--batch-size", "8"]
CASE = Case(
    tiny=["--synthetic", "--weights", "none", "--epochs", "2", *STEPS],
    final_epochs=dict.fromkeys(ARMS, 2),
    history=dict.fromkeys(ARMS, HISTORY),
    events={
        f"{a}/{part}": k for a in ARMS for part, k in [("train", BATCHES), ("validation", FITS)]
    },
    figures=["training_accuracy.png", "validation_accuracy.png"],
    started="Epoch 2/7",
    again="Epoch 2/",
    bad_flags=[
        ["--steps-per-epoch", "0"],
        ["--batch-size", "0"],
        ["--arms"],
        ["--arms", "resnet50", "vgg"],
        ["--preprocess", "none"],
        ["--resume", "no/such/run"],
    ],
)


def arguments(*flags):
    return script.parse_args(["--synthetic", "--weights", "none", *map(str, flags)])


@pytest.fixture
def small(monkeypatch):
    """Make images and sets small, so that a run takes seconds."""
    original = script.synthetic_photographs
    monkeypatch.setattr(script, "IMAGE_SIZE", 44)
    monkeypatch.setattr(script, "synthetic_photographs", lambda count: original(count // 2))


def one_layer(top, weights, tensor, shape):
    """Return a base as wide as ResNet50, of random weights too, that takes no time."""
    convolution = keras.layers.Conv2D(2048, 11, strides=11, activation="relu")
    norm = keras.layers.BatchNormalization()
    return keras.Sequential([keras.Input(shape), convolution, norm], name="resnet50")


@pytest.fixture
def quick(small, monkeypatch):
    """Put a base of one layer in the place of ResNet50 as well."""
    monkeypatch.setattr(script.resnet50, "ResNet50", one_layer)


def newest():
    (run_dir,) = script.pathlib.Path("log/transfer_resnet50").iterdir()
    return run_dir, json.loads((run_dir / "results.json").read_text())


# --- Model ---


def identity():
    """Return a base that passes its input on: (100, 100, 3) feature maps."""
    return keras.Sequential([keras.Input((100, 100, 3)), keras.layers.Activation("linear")])


@pytest.mark.parametrize("preprocess", ["imagenet", "article"])
def test_difference_1_what_the_base_gets(preprocess):
    model = script.build_model("resnet50", identity(), preprocess)
    features = keras.Model(model.input, model.layers[-1].input)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 100, 100, 3), dtype="uint8")
    colour = pixels.astype("float64").mean((1, 2))  # red, green, blue
    if preprocess == "imagenet":
        expected = colour[:, ::-1] - [103.939, 116.779, 123.68]
    else:
        expected = colour / 255
    np.testing.assert_allclose(features(pixels), expected, rtol=1e-3, atol=1e-3)


def test_networks_are_the_articles(smoke_run):
    model = keras.models.load_model(smoke_run("transfer_resnet50").folder / "resnet50.keras")
    base = model.get_layer("resnet50")
    assert base.output_shape == (None, 4, 4, 2048)
    assert base.count_params() == 23_587_712
    assert [tuple(w.shape) for w in model.trainable_weights] == [(2048, 1), (1,)]
    printed = smoke_run("transfer_resnet50").stdout
    assert "23,587,712" in printed
    assert "Trainable params: 2,049" in printed
    cnn = script.build_model("cnn", None, "imagenet")
    assert cnn.count_params() == 28_640 + 4 * 128 + 1601


def test_the_small_network_is_that_of_gap_cats_dogs():
    weights = []
    for make in (
        lambda: script.build_model("cnn", None, ""),
        lambda: gap_cats_dogs.build_model("avgpool"),
    ):
        keras.utils.set_random_seed(0)
        model = make()
        weights.append(model.get_weights())
    for one, other in zip(*weights, strict=True):
        np.testing.assert_array_equal(one, other)


def test_difference_2_the_features_are_those_of_the_whole_model(quick):
    sets, base = script.load_data(arguments())
    model = script.build_model("resnet50", base, "imagenet")
    network, features = script.compute_features(model, sets)
    for dataset, computed in zip(sets, features):
        images, labels = next(iter(dataset.batch(100)))
        values, same = next(iter(computed.batch(100)))
        assert values.shape == (len(dataset), 2048)
        np.testing.assert_array_equal(labels, same)
        np.testing.assert_allclose(network(values), model(images), atol=1e-5)


def test_difference_2_both_ways_give_the_same_head(small, monkeypatch):
    """Not the features alone: the order of the images, the steps, the validation, the joining."""
    once = functools.cache(script.resnet50.ResNet50)  # nothing alters it: a test below shows it
    monkeypatch.setattr(script.resnet50, "ResNet50", once)
    found = {}
    for flags in ([], ["--no-cache-features"]):
        final = script.main([*CASE.tiny, "--arms", "resnet50", "--seed", "3", *flags])
        run_dir, results = newest()
        model = keras.models.load_model(run_dir / "resnet50.keras")
        found[len(found)] = (final, results["arms"]["resnet50"]["history"], model.trainable_weights)
        shutil.rmtree("log")
    for one, other in zip(found[0][2], found[1][2], strict=True):
        assert np.abs(one - other).max() < 1e-4
    for metric, values in found[0][1].items():
        assert found[1][1][metric] == pytest.approx(values, abs=1e-4), metric
    assert found[0][0]["resnet50"] == pytest.approx(found[1][0]["resnet50"], abs=1e-4)


@pytest.mark.parametrize("flags", [[], ["--no-cache-features"]])
def test_the_frozen_base_stays_as_it_was(quick, flags):
    keras.utils.set_random_seed(7)
    before = one_layer(False, None, None, (44, 44, 3)).get_weights()
    script.main([*CASE.tiny, "--arms", "resnet50", "--seed", "7", *flags])
    model = keras.models.load_model(newest()[0] / "resnet50.keras")
    for one, other in zip(before, model.get_layer("resnet50").get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_saved_model_takes_pixels(smoke_run):
    """What the training found for the test images, the saved file finds for the images."""
    run = smoke_run("transfer_resnet50")
    images, labels = zip(*script.load_data(arguments("--arms", "cnn"))[0][2].as_numpy_iterator())
    for arm in ARMS:
        model = keras.models.load_model(run.folder / f"{arm}.keras")
        found = model(np.stack(images)).numpy()[:, 0] > 0.5
        accuracy = run.results["arms"][arm]["final"]["test_accuracy"]
        assert accuracy == pytest.approx(np.mean(found == np.array(labels)), abs=0.01)


# --- Data ---


def test_difference_3_4_6_come_from_the_same_code():
    for name in ("synthetic_photographs", "pre_process_image", "batch_sets", "build_head"):
        text = helpers.source("gap_cats_dogs")
        begin = text.index(f"def {name}(")
        assert text[begin : text.index("\n\n\n", begin)] in helpers.source("transfer_resnet50")


def test_differences_3_4_6_each_image_once(tmp_path, monkeypatch):
    photographs.prepare(tmp_path)
    args = script.parse_args(["--data-dir", str(tmp_path), "--arms", "cnn", "--epochs", "1"])
    args.steps_per_epoch = 1
    sets, base = script.load_data(args)
    assert base is None  # nothing is fetched that is not used
    made, windows, evaluated = [], [], []
    batch_sets, evaluate = script.batch_sets, keras.Model.evaluate

    def watched(self, x, **options):
        evaluated.append(x)
        return evaluate(self, x, **options)

    def shuffle(self, window, **options):
        windows.append(window)
        return self

    monkeypatch.setattr(script, "batch_sets", lambda *a: made.append(batch_sets(*a)) or made[-1])
    monkeypatch.setattr(tf.data.Dataset, "shuffle", shuffle)
    monkeypatch.setattr(keras.Model, "evaluate", watched)
    (tmp_path / "run").mkdir()
    script.train("cnn", args, None, sets, tmp_path / "run", {"arms": {}})
    ((train_dataset, *others),) = made
    assert windows == [32]  # all of the training images
    assert [x is others[1] for x in evaluated] == [False, True]  # validation, then the test
    greys = [[int(i[0, 0, 0]) for images, _ in dataset for i in images] for dataset in others]
    greys += [[int(i[0, 0, 0]) for images, _ in train_dataset.take(1) for i in images[:32]]]
    assert sorted(sum(greys, [])) == list(photographs.GREYS)


def test_difference_5_images_are_decoded_once(monkeypatch):
    decoded, original = [], script.synthetic_photographs

    def noted(image, label):
        tf.py_function(decoded.append, [label], [])
        return image, label

    monkeypatch.setattr(script, "synthetic_photographs", lambda count: original(10).map(noted))
    sets, _ = script.load_data(arguments("--arms", "cnn"))
    assert len(decoded) == 30
    for dataset in sets * 2:
        list(dataset)
    assert len(decoded) == 30


# --- Bad data and weights ---


@pytest.mark.parametrize("kind", ["empty", "half", "one byte"])
def test_damaged_data(tmp_path, capsys, kind):
    photographs.prepare(tmp_path / "data")
    folder = photographs.damage(tmp_path / "data", kind)
    flags = ["--data-dir", str(folder), "--epochs", "1", "--weights", "none"]
    with pytest.raises(SystemExit) as stop:
        script.run_as_command(lambda: script.main(flags))
    (line,) = helpers.error_lines(capsys.readouterr().err)
    assert stop.value.code == 1
    assert f"{folder}/cats_vs_dogs cannot be loaded" in line
    assert newest()[1]["arms"] == {}


@pytest.mark.parametrize("kind", ["no file", "a folder", "garbage", "half", "another shape"])
def test_bad_weights(monkeypatch, tmp_path, capsys, kind):
    monkeypatch.setattr(script, "IMAGE_SIZE", 32)
    path = tmp_path / "resnet.weights.h5"
    if kind == "a folder":
        path.mkdir()
    elif kind == "garbage":
        path.write_bytes(b"not weights")
    elif kind in ("half", "another shape"):
        other = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Conv2D(64, 5)])
        other.save_weights(path)
    if kind == "half":
        path.write_bytes(path.read_bytes()[:-1000])
    code, line = helpers.fails_in_one_line(
        lambda: script.run_as_command(
            lambda: script.main(["--synthetic", "--weights", str(path), "--epochs", "1"])
        ),
        capsys,
    )
    assert code == 1
    assert "the weights cannot be loaded" in line
    assert "--weights none" in line
    assert newest()[1]["arms"] == {}  # no arm has been trained before


def test_imagenet_weights_without_a_network(tmp_path):
    command = [helpers.ROOT / "transfer_resnet50.py", "--synthetic", "--epochs", "1"]
    run = finish(start(command, tmp_path), tmp_path)
    assert run.code == 1
    (line,) = helpers.error_lines(run.stderr)
    assert "https://storage.googleapis.com/" in line
    assert "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5" in line
    assert "~/.keras/models" in line
    assert "--weights none" in line
    assert "Traceback" not in run.stderr
    assert not list(tmp_path.rglob("*.h5"))


def test_weights_from_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr(script, "IMAGE_SIZE", 32)
    known = script.resnet50.ResNet50(False, None, None, (32, 32, 3))
    known.save_weights(tmp_path / "resnet.weights.h5")
    _, base = script.load_data(arguments("--weights", tmp_path / "resnet.weights.h5"))
    assert base is not known
    assert not base.trainable
    for one, other in zip(known.get_weights(), base.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


# --- Resuming ---


class Killed(BaseException):
    """Stands for a kill: nothing in the script or in Keras catches it."""


KILLS = [
    (script, "compute_features", 1),
    (tf.train.CheckpointManager, "save", 2),  # the second epoch of resnet50
    (keras.Model, "save", 1),
    (script, "write_results", 2),  # the second epoch of cnn, after the end of resnet50
]


def test_resume_after_kills(monkeypatch, quick):
    flags = ["--synthetic", "--weights", "none", *STEPS, "--epochs", "3"]
    flags += ["--arms", "resnet50", "cnn"]
    for owner, name, count in KILLS:
        calls, original = [], getattr(owner, name)

        def struck(*args, calls=calls, original=original, count=count, **kwargs):
            calls.append(1)
            if len(calls) == count:
                raise Killed
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, struck)
            with pytest.raises(Killed):
                script.main(flags)
        run_dir, results = newest()
        flags = ["--resume", str(run_dir)]
    script.main(flags)
    results = newest()[1]
    assert results["complete"]
    for arm in ARMS:
        history = results["arms"][arm]["history"]
        assert set(history) == set(HISTORY)
        assert [len(values) for values in history.values()] == [3] * 4
        assert (run_dir / f"{arm}.keras").exists()


def test_a_resumed_head_is_the_undisturbed_one(quick):
    """With one step an epoch on all images, order plays no part: the weights must be equal."""
    flags = ["--synthetic", "--weights", "none", "--arms", "resnet50", "--batch-size", "80"]
    flags += ["--steps-per-epoch", "1"]
    weights = []
    for epochs in (["2", "4"], ["4"]):
        script.main([*flags, "--epochs", epochs[0]])
        if epochs[1:]:
            script.main(["--resume", str(newest()[0]), "--epochs", epochs[1]])
        model = keras.models.load_model(newest()[0] / "resnet50.keras")
        weights.append(model.layers[-1].get_weights())
        shutil.rmtree("log")
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_device_all_trains_on_two_devices(tmp_path):
    preparation = f"""
sys.path.append({str(helpers.ROOT / "tests")!r})
import test_transfer_resnet50
script.resnet50.ResNet50, script.IMAGE_SIZE = test_transfer_resnet50.one_layer, 44
"""
    flags = ["--synthetic", "--weights", "none", "--epochs", "1", "--steps-per-epoch", "2"]
    run = helpers.run_on_two_devices("transfer_resnet50", flags, tmp_path, preparation)
    assert set(run.results["arms"]) == set(ARMS)


@pytest.mark.slow
def test_claim_the_small_network_learns():
    """Seven epochs on the real photographs; ResNet50 needs its weights, which may be absent."""
    final = script.main(["--arms", "cnn"])
    assert final["cnn"]["accuracy"] > 0.85
