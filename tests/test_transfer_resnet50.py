"""transfer_resnet50.py: what the frozen base gets and gives, its differences from the article."""

import sys

import helpers
import numpy as np
import oracles
import pytest

import gap_cats_dogs
import transfer_resnet50 as script

keras = script.keras
TINY = ["--synthetic", "--steps-per-epoch", "3", "--batch-size", "8", "--epochs"]


@pytest.fixture
def quick(small, monkeypatch):
    """Put one layer, of random weights too and as wide, in the place of ResNet50."""

    def one_layer(weights, include_top, input_tensor):
        assert weights is None  # --synthetic downloads nothing
        x = keras.layers.Conv2D(2048, 11, strides=11, activation="relu")(input_tensor)
        outputs = keras.layers.BatchNormalization()(x)
        return keras.Model(keras.utils.get_source_inputs(input_tensor), outputs, name="resnet50")

    monkeypatch.setattr(script.resnet50, "ResNet50", one_layer)


def test_data_and_the_small_network_are_those_of_gap_cats_dogs():
    """Differences 1 to 4 are tried there."""
    texts = [helpers.source(name) for name in ("transfer_resnet50", "gap_cats_dogs")]
    imports = ("# Colab's tensorflow-metadata", "from keras import layers")
    data, order = ("# %% Data", "# %% Model"), ("cat_train = cat_train.", "# a resumed")
    for begin, end in (imports, data, order):
        parts = [text[text.index(begin) : text.index(end)] for text in texts]
        assert parts[0] == parts[1]
    images, outputs = np.random.default_rng(0).integers(0, 256, (3, 100, 100, 3)), []
    for build in (script.build_standard_model, lambda: gap_cats_dogs.build_model("avgpool")):
        keras.utils.set_random_seed(0)
        outputs.append(build()(images))
    oracles.assert_same(*outputs)


def test_tl_model_is_the_articles():
    tl_model = script.build_tl_model("none")
    layers = oracles.layers_as_text(tl_model)
    assert layers == ["Functional", "GlobalAveragePooling2D", "Dense 1 sigmoid"]
    assert tl_model.layers[0].count_params() == 23_587_712  # ResNet50 without its end
    assert [tuple(weight.shape) for weight in tl_model.trainable_weights] == [(2048, 1), (1,)]
    images = np.random.default_rng(0).integers(100, 130, (4, 100, 100, 3))  # others give p = 1
    oracles.check_classifier(tl_model, images)


def test_difference_6_both_ways_and_both_resumed_give_the_same_network(quick):
    runs = []
    for flags in ([], ["--no-cache-features", "--arms", "resnet50"]):
        runs.append(helpers.run_main(script, [*TINY, "2", *flags]))
        oracles.check_final_numbers(script)
        folder, _ = helpers.run_main(script, [*TINY, "1", *flags, "--arms", "resnet50"])
        runs.append(helpers.run_main(script, ["--resume", str(folder), "--epochs", "2"]))
    models = [keras.models.load_model(folder / "resnet50.keras") for folder, _ in runs]
    first_model, (_, first_arms) = models[0], runs[0]
    for model, (_, arms) in zip(models, runs):
        oracles.assert_same(model.get_weights(), first_model.get_weights(), atol=1e-4)
        for metric, values in first_arms["resnet50"]["history"].items():
            assert arms["resnet50"]["history"][metric] == pytest.approx(values, abs=1e-4), metric
    keras.utils.set_random_seed(0)
    untrained, weights = script.build_tl_model("none").get_weights(), first_model.get_weights()
    oracles.assert_same(untrained[:-2], weights[:-2])
    assert oracles.smallest_move(untrained[-2:], weights[-2:]) > 0


def test_weights_from_a_file_and_difference_5_what_the_base_gets(small):
    known = script.resnet50.ResNet50(weights=None, include_top=False, input_shape=(44, 44, 3))
    known.save_weights("known.weights.h5")
    base = script.build_tl_model("known.weights.h5").layers[0]
    pixels = np.random.default_rng(0).integers(0, 256, (4, 44, 44, 3)).astype("float32")
    expected = known(pixels[..., ::-1] - np.array([103.939, 116.779, 123.68], "float32"))
    np.testing.assert_allclose(base(pixels), expected, rtol=1e-3, atol=1e-3 * np.std(expected))


def test_weights_that_are_not_there(small, capsys, tmp_path, monkeypatch):
    def end(*flags):
        return helpers.exit_of(lambda: script.main([*TINY, "1", "--weights", *flags]), capsys)

    code, line = end("no.h5")
    assert (code, line.split("error: ")[1]) == (2, "argument --weights: there is no file no.h5")
    for flags in (["--arms", "resnet50"], []):  # without cnn there is no run, and no folder
        assert not (tmp_path / "log").exists()
        code, line = end("imagenet", *flags)
        assert line.startswith("error: no weights: URL fetch failure on https://")
        assert line.endswith("use --weights FILE or --arms cnn")
    folder, results = helpers.newest_results(".")
    assert list(results["arms"]) == ["cnn"]
    assert keras.models.load_model(folder / "cnn.keras").optimizer.iterations == 3
    # It goes on with other weights, until there is an epoch with them
    half = {"accuracy": 0.5, "val_accuracy": 0.5}
    monkeypatch.setattr(script, "train_tl_model", lambda run, _: run.record("resnet50", 1, half))
    script.main(["--resume", str(folder), "--weights", "none"])
    assert helpers.newest_results(".")[1]["config"]["weights"] == "none"
    _, line = end("imagenet", "--resume", str(folder))
    assert line.endswith("error: argument --weights: must be as in the run to resume")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="there it has to be installed")
def test_tfds_needs_no_importlib_resources_before_it_downloads(tmp_path):
    (tmp_path / "importlib_resources.py").write_text("raise ModuleNotFoundError(__name__)")
    ask = "import transfer_resnet50 as t; print(t.tfds.builder('cats_vs_dogs').url_infos)"
    run = helpers.finish(helpers.start(["-c", ask], tmp_path), tmp_path)
    assert "kagglecatsanddogs" in run.stdout, run.stderr
