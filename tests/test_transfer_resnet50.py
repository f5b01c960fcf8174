"""transfer_resnet50.py: what the frozen base gets and gives, its differences from the article."""

import json
import pathlib

import helpers
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gap_cats_dogs
import transfer_resnet50 as script

keras = script.keras

TINY = ["--synthetic", "--weights", "none", "--epochs", "2"]
TINY += ["--steps-per-epoch", "3", "--batch-size", "8"]


@pytest.fixture
def small(monkeypatch):
    """Make images and sets small, so that a run takes seconds."""
    monkeypatch.setattr(script, "IMAGE_SIZE", 44)
    monkeypatch.setattr(script, "SYNTHETIC_COUNTS", (80, 12, 8))


def one_layer(weights, include_top, input_tensor):
    """Return a base as wide as ResNet50, of random weights too, that takes no time."""
    x = keras.layers.Conv2D(2048, 11, strides=11, activation="relu")(input_tensor)
    outputs = keras.layers.BatchNormalization()(x)
    return keras.Model(keras.utils.get_source_inputs(input_tensor), outputs, name="resnet50")


@pytest.fixture
def quick(small, monkeypatch):
    """Put a base of one layer in the place of ResNet50 as well."""
    monkeypatch.setattr(script.resnet50, "ResNet50", one_layer)


def newest():
    """Return the folder of the newest run and the records of its arms."""
    runs = pathlib.Path("log/transfer_resnet50").iterdir()
    folder = max(runs, key=lambda path: path.stat().st_ctime)
    return folder, json.loads((folder / "results.json").read_text())["arms"]


# --- Model ---


@pytest.mark.parametrize("preprocess", ["imagenet", "article"])
def test_difference_1_what_the_base_gets(monkeypatch, preprocess):
    def passes_on(weights, include_top, input_tensor):
        return keras.Model(keras.utils.get_source_inputs(input_tensor), input_tensor)

    monkeypatch.setattr(script.resnet50, "ResNet50", passes_on)
    res_net = script.build_res_net("none", preprocess)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 100, 100, 3), dtype="uint8")
    if preprocess == "imagenet":  # BGR minus the means
        expected = pixels[..., ::-1].astype("float32") - [103.939, 116.779, 123.68]
    else:
        expected = pixels / 255
    np.testing.assert_allclose(res_net(pixels), expected, rtol=1e-3, atol=1e-3)


def test_networks_are_the_articles():
    tl_model = script.build_tl_model(script.build_res_net("none", "imagenet"))
    assert [layer.output.shape for layer in tl_model.layers] == [
        (None, 4, 4, 2048),
        (None, 2048),
        (None, 1),
    ]
    assert [layer.count_params() for layer in tl_model.layers] == [23_587_712, 0, 2_049]
    assert [tuple(weight.shape) for weight in tl_model.trainable_weights] == [(2048, 1), (1,)]
    assert script.build_standard_model().count_params() == 28_640 + 4 * 128 + 1601


def test_the_small_network_is_that_of_gap_cats_dogs():
    keras.utils.set_random_seed(0)
    weights = script.build_standard_model().get_weights()
    keras.utils.set_random_seed(0)
    others = gap_cats_dogs.build_model("avgpool").get_weights()
    for one, other in zip(weights, others, strict=True):
        np.testing.assert_array_equal(one, other)


def test_weights_from_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr(script, "IMAGE_SIZE", 32)
    known = script.resnet50.ResNet50(weights=None, include_top=False, input_shape=(32, 32, 3))
    known.save_weights(tmp_path / "resnet.weights.h5")
    res_net = script.build_res_net(str(tmp_path / "resnet.weights.h5"), "imagenet")
    assert not res_net.trainable
    for one, other in zip(known.get_weights(), res_net.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_weights_that_are_not_there_end_the_run_before_it_trains(small, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main([*TINY, "--weights", "nowhere.h5"])
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "error: no weights for ResNet50 (ValueError: " in error
    assert "--weights none" in error
    assert newest()[1] == {}


def test_difference_2_the_features_are_those_of_the_whole_model(quick):
    model = script.build_tl_model(script.build_res_net("none", "imagenet"))
    images = np.random.default_rng(0).integers(0, 256, (70, 44, 44, 3), dtype="uint8")
    dataset = tf.data.Dataset.from_tensor_slices((images, np.arange(70)))
    (features,) = script.compute_features(model.layers[0], [dataset])
    assert len(features) == 70
    values, labels = next(iter(features.batch(100)))
    assert labels.numpy().tolist() == list(range(70))
    np.testing.assert_allclose(model.layers[-1](values), model(images), atol=1e-5)


def test_difference_2_both_ways_give_the_same_head_and_leave_the_base_alone(quick):
    """Not the features alone: the order of the images, the steps, the validation, the joining."""
    keras.utils.set_random_seed(3)
    base = script.build_res_net("none", "imagenet").get_weights()
    found = []
    for flags in ([], ["--no-cache-features"]):
        script.main([*TINY, "--arms", "resnet50", "--seed", "3", *flags])
        folder, arms = newest()
        model = keras.models.load_model(folder / "resnet50.keras")
        for one, other in zip(base, model.get_layer("resnet50").get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)
        found.append((model.layers[-1].get_weights(), arms["resnet50"]))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    for metric, values in found[0][1]["history"].items():
        assert found[1][1]["history"][metric] == pytest.approx(values, abs=1e-4), metric
    assert found[0][1]["final"] == pytest.approx(found[1][1]["final"], abs=1e-4)


# --- Data ---


def test_differences_3_5_6_come_from_the_same_code():
    """gap_cats_dogs.py's tests try it."""
    text, other = helpers.source("transfer_resnet50"), helpers.source("gap_cats_dogs")
    data, model = text.index("# --- Data ---"), text.index("# --- Model ---")
    assert text[data:model] in other
    head = text.index("def build_head"), text.index("def build_standard_model")
    assert text[slice(*head)] in other


def test_difference_4_the_saved_models_take_pixels_and_were_tested(quick):
    script.main(TINY)
    images, labels = zip(*script.synthetic_photographs(8))  # the test set's count
    images = np.stack([script.pre_process_image(image, 0)[0] for image in images])
    folder, arms = newest()
    for arm, record in arms.items():
        model = keras.models.load_model(folder / f"{arm}.keras")
        expected = np.mean((model(images).numpy()[:, 0] > 0.5) == np.array(labels))
        assert record["final"]["test_accuracy"] == pytest.approx(expected, abs=1e-6)


def test_difference_5_and_6_a_run_decodes_once_and_shuffles_all(quick, monkeypatch):
    decoded, windows = [], []
    photographs, make_datasets = script.synthetic_photographs, script.make_datasets

    def noted(image, label):
        tf.py_function(lambda: decoded.append(1), [], [])
        return image, label

    def watched(sets, batch_size, window, seed):
        windows.append(window)
        return make_datasets(sets, batch_size, window, seed)

    monkeypatch.setattr(script, "synthetic_photographs", lambda n: photographs(n).map(noted))
    monkeypatch.setattr(script, "make_datasets", watched)
    script.main(TINY)
    assert len(decoded) == 80 + 12 + 8 + 2  # and the two samples, which are drawn before
    assert windows == [80, 80]


# --- Going on after an interruption ---


class KilledError(BaseException):
    """Stands for a kill: nothing in the script or in Keras catches it."""


def kill_at(owner, name, count, monkeypatch, flags):
    """Run the script until the call number `count` of owner.name begins."""
    calls, original = [], getattr(owner, name)

    def struck(self, *args, **options):
        calls.append(self)
        if len(calls) == count:
            for path in filter(lambda value: isinstance(value, pathlib.Path), args):
                path.write_bytes(b"half a file")
            raise KilledError
        return original(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, struck)
        with pytest.raises(KilledError):
            script.main(flags)


def test_a_head_that_was_killed_and_resumed_is_the_undisturbed_one(quick, monkeypatch):
    """A step is a whole epoch on all images, so that their order plays no part."""
    flags = ["--synthetic", "--weights", "none", "--arms", "resnet50", "--epochs", "4"]
    flags += ["--batch-size", "80", "--steps-per-epoch", "1"]
    script.main(flags)
    folder, undisturbed = newest()
    expected = keras.models.load_model(folder / "resnet50.keras").layers[-1].get_weights()

    kill_at(script.SaveEpochs, "on_epoch_end", 3, monkeypatch, flags)  # two epochs are saved
    folder, _ = newest()
    flags = ["--resume", str(folder)]
    kill_at(keras.Model, "save", 2, monkeypatch, flags)  # the last epoch, half written
    assert not (folder / "resnet50.keras").exists()
    kill_at(keras.Model, "save", 2, monkeypatch, flags)  # the whole model, half written
    script.main(flags)
    history = newest()[1]["resnet50"]["history"]
    for metric, values in undisturbed["resnet50"]["history"].items():
        assert history[metric] == pytest.approx(values, abs=1e-5), metric
    found = keras.models.load_model(folder / "resnet50.keras").layers[-1].get_weights()
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    script.main([*flags, "--epochs", "5"])  # a finished run goes on from its head, too
    assert len(newest()[1]["resnet50"]["history"]["loss"]) == 5


def steps_of(folder, tag):
    accumulator = EventAccumulator(str(folder), {"tensors": 0})
    accumulator.Reload()
    return [event.step for event in accumulator.Tensors(tag)]


@pytest.mark.parametrize("epochs_before", [0, 1])
def test_batch_curves_do_not_fold_back(quick, monkeypatch, epochs_before):
    name = "epoch_end" if epochs_before else "train_batch_end"
    kill_at(script.SaveEpochs, f"on_{name}", 2, monkeypatch, [*TINY, "--arms", "cnn"])
    folder, _ = newest()
    script.main(["--resume", str(folder)])
    (resumed,) = folder.glob("cnn/resumed-*")
    for tag in ("batch_loss", "batch_accuracy"):
        before = steps_of(folder / "cnn" / "train", tag)
        assert before == sorted(set(before))
        assert steps_of(resumed / "train", tag) == list(range(1, 3 * (2 - epochs_before) + 1))
    assert steps_of(resumed / "train", "epoch_loss") == list(range(epochs_before, 2))


def test_without_cached_features_the_base_stays_frozen_when_resumed(quick):
    flags = ["--arms", "resnet50", "--no-cache-features"]
    script.main([*TINY, *flags])
    folder, _ = newest()
    before = keras.models.load_model(folder / "resnet50.keras").get_layer("resnet50").get_weights()
    script.main(["--resume", str(folder), "--epochs", "3"])
    model = keras.models.load_model(folder / "resnet50.keras")
    assert int(model.optimizer.iterations) == 9
    assert len(model.trainable_weights) == 2
    for one, other in zip(before, model.get_layer("resnet50").get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_claim_the_small_network_learns():
    """Seven epochs on the real photographs; ResNet50 needs its weights, which may be absent."""
    final = script.main(["--arms", "cnn"])
    assert final["cnn"]["accuracy"] > 0.85
