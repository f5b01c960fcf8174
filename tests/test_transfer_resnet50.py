"""transfer_resnet50.py: what the frozen base gets and gives, its differences from the article."""

import helpers
import numpy as np
import oracles
import pytest
from helpers import newest_results, run_main

import gap_cats_dogs
import transfer_resnet50 as script

keras = script.keras

TINY = ["--synthetic", "--weights", "none", "--epochs", "2"]
TINY += ["--steps-per-epoch", "3", "--batch-size", "8"]


def one_layer(weights, include_top, input_tensor):
    """Return a base as wide as ResNet50, of random weights too, that takes no time."""
    x = keras.layers.Conv2D(2048, 11, strides=11, activation="relu")(input_tensor)
    outputs = keras.layers.BatchNormalization()(x)
    return keras.Model(keras.utils.get_source_inputs(input_tensor), outputs, name="resnet50")


@pytest.fixture
def quick(small, monkeypatch):
    """Put a base of one layer in the place of ResNet50 as well."""
    monkeypatch.setattr(script.resnet50, "ResNet50", one_layer)


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
    shapes = [layer.output.shape for layer in tl_model.layers]
    assert shapes == [(None, 4, 4, 2048), (None, 2048), (None, 1)]
    assert [layer.count_params() for layer in tl_model.layers] == [23_587_712, 0, 2_049]
    assert [tuple(weight.shape) for weight in tl_model.trainable_weights] == [(2048, 1), (1,)]
    assert script.build_standard_model().count_params() == 28_640 + 4 * 128 + 1601


def test_the_small_network_is_that_of_gap_cats_dogs():
    keras.utils.set_random_seed(0)
    weights = script.build_standard_model().get_weights()
    keras.utils.set_random_seed(0)
    others = gap_cats_dogs.build_model("avgpool").get_weights()
    oracles.assert_same(weights, others)


def test_weights_from_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr(script, "IMAGE_SIZE", 32)
    known = script.resnet50.ResNet50(weights=None, include_top=False, input_shape=(32, 32, 3))
    known.save_weights(tmp_path / "resnet.weights.h5")
    res_net = script.build_res_net(str(tmp_path / "resnet.weights.h5"), "imagenet")
    assert not res_net.trainable
    oracles.assert_same(known.get_weights(), res_net.get_weights())


def test_weights_that_are_not_there_end_the_run_before_it_trains(small, capsys):
    code, line = helpers.exit_of(lambda: script.main([*TINY, "--weights", "nowhere.h5"]), capsys)
    assert code == 1
    assert line.startswith("error: no weights for ResNet50 (ValueError: ")
    assert "--weights none" in line
    assert newest_results(".")[1]["arms"] == {}


def test_difference_2_both_ways_give_the_same_head_and_leave_the_base_alone(quick):
    """The features, the order of the images, the steps, the validation and the joining."""
    keras.utils.set_random_seed(3)
    base = script.build_res_net("none", "imagenet").get_weights()
    found = []
    for flags in ([], ["--no-cache-features"]):
        folder, arms = run_main(script, [*TINY, "--arms", "resnet50", "--seed", "3", *flags])
        model = keras.models.load_model(folder / "resnet50.keras")
        oracles.assert_same(base, model.get_layer("resnet50").get_weights())
        found.append((model.layers[-1].get_weights(), arms["resnet50"]))
    (head, record), (other_head, other) = found
    oracles.assert_same(head, other_head, atol=1e-4)
    for metric, values in record["history"].items():
        assert other["history"][metric] == pytest.approx(values, abs=1e-4), metric
    assert record["final"] == pytest.approx(other["final"], abs=1e-4)
    run_main(script, ["--resume", str(folder), "--epochs", "3"])  # as in the article, from its file
    model = keras.models.load_model(folder / "resnet50.keras")
    oracles.assert_same(base, model.get_layer("resnet50").get_weights())
    assert np.any(model.layers[-1].get_weights()[0] != other_head[0])


# --- Data ---
def test_differences_3_5_6_come_from_the_same_code():
    """gap_cats_dogs.py's tests try it."""
    text, other = helpers.source("transfer_resnet50"), helpers.source("gap_cats_dogs")
    data, model = text.index("# --- Data ---"), text.index("# --- Model ---")
    assert text[data:model] in other
    head = text.index("def build_head"), text.index("def build_standard_model")
    assert text[slice(*head)] in other


def test_differences_4_to_6_of_a_run(quick, monkeypatch):
    """It decodes once, shuffles all, and tests; its models take pixels."""
    decoded, windows = oracles.watch_photographs(script, monkeypatch)
    script.main(TINY)
    assert len(decoded) == 80 + 9 + 10 + 2  # and the two samples, which are drawn before
    assert windows == [80, 80]
    oracles.check_test_accuracy(script, 10)


# --- Going on after an interruption ---
def head_of(folder):
    return keras.models.load_model(folder / "resnet50.keras").layers[-1].get_weights()


def test_a_head_that_was_resumed_is_the_undisturbed_one(quick):
    """A step is a whole epoch on all images, so that their order plays no part."""
    flags = ["--synthetic", "--weights", "none", "--arms", "resnet50"]
    flags += ["--batch-size", "80", "--steps-per-epoch", "1"]
    undisturbed, arms = run_main(script, [*flags, "--epochs", "4"])
    folder, _ = run_main(script, [*flags, "--epochs", "2"])
    (folder / "resnet50.keras").write_bytes(b"half a file")  # as if it was killed there
    _, resumed = run_main(script, ["--resume", str(folder), "--epochs", "4"])
    for metric, values in arms["resnet50"]["history"].items():
        assert resumed["resnet50"]["history"][metric] == pytest.approx(values, abs=1e-5), metric
    oracles.assert_same(head_of(folder), head_of(undisturbed), atol=1e-5)
    (events,) = folder.glob("resnet50/resumed-*/train")
    assert [step for step, _ in helpers.events(events, "epoch_loss")] == [2, 3]  # not anew


@pytest.mark.parametrize("epochs_before", [0, 1])
def test_batch_curves_do_not_fold_back(quick, monkeypatch, epochs_before):
    def interrupted(saver, batch, logs=None):
        if batch == 1 and len(saver.record["history"].get("loss", [])) == epochs_before:
            raise KeyboardInterrupt

    def steps_of(folder, tag):
        return [step for step, _ in helpers.events(folder, tag)]

    with monkeypatch.context() as patch:
        patch.setattr(script.SaveEpochs, "on_train_batch_end", interrupted)
        with pytest.raises(SystemExit):
            script.main([*TINY, "--arms", "cnn"])
    folder, _ = newest_results(".")
    script.main(["--resume", str(folder)])
    (resumed,) = folder.glob("cnn/resumed-*")
    for tag in ("batch_loss", "batch_accuracy"):
        if epochs_before:  # at the end of an epoch they are written to the disk
            before = steps_of(folder / "cnn" / "train", tag)
            assert before == sorted(set(before))
        assert steps_of(resumed / "train", tag) == list(range(1, 3 * (2 - epochs_before) + 1))
    assert steps_of(resumed / "train", "epoch_loss") == list(range(epochs_before, 2))
