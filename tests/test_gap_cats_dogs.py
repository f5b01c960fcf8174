"""gap_cats_dogs.py: photographs and networks by hand, its differences, and resuming."""

from unittest import mock

import helpers
import numpy as np
import oracles
import pytest
import tensorflow as tf

import gap_cats_dogs as script

keras = script.keras
TINY = ["--synthetic", "--arms", "gap", "--steps-per-epoch", "3", "--batch-size", "8", "--epochs"]
MAXIMA, DENSE = "MaxPooling2D (2, 2) (2, 2) valid", [oracles.NORM, "Dense 100 relu"]
BACK_ENDS = [
    ("fc", ["Flatten", *DENSE, *DENSE]),
    ("fc_dropout", ["Flatten", *DENSE, "Dropout 0.5", *DENSE]),
    ("avgpool", ["AveragePooling2D (2, 2) (2, 2) valid", "Flatten"]),
    ("gap", ["GlobalAveragePooling2D"]),  # difference 6: in the article it has that of avgpool
]


@pytest.mark.parametrize(("arm", "back_end"), BACK_ENDS)
def test_networks_are_the_articles_and_difference_5_heads_start_alike(arm, back_end):
    heads = []
    for name in ("gap", arm):
        keras.utils.set_random_seed(0)
        model = script.build_model(name)
        heads.append(model.layers[0])
    oracles.assert_same(*[head.get_weights() for head in heads])
    layers = [f"Rescaling {1 / 255}"]
    for filters in (32, 32, 64):
        layers += [f"Conv2D {filters} (3, 3) (1, 1) valid linear"]
        layers += [oracles.NORM, "Activation relu", MAXIMA]
    assert oracles.layers_as_text(heads[1]) == layers
    assert oracles.layers_as_text(model.layers[1]) == [*back_end, "Dense 1 sigmoid"]
    oracles.check_classifier(model, np.random.default_rng(0).integers(0, 256, (5, 100, 100, 3)))


def fitted(*flags):
    """Return the network, data and options that `fit` gets; the photographs' labels count them."""
    make = tf.data.Dataset.from_tensor_slices
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "synthetic_photographs", lambda n: make(oracles.numbered(n, 1, 1, 3)))
        fit = mock.create_autospec(keras.Model.fit, side_effect=EOFError)
        patch.setattr(keras.Model, "fit", fit)
        pytest.raises(EOFError, script.main, flags)
    return *fit.call_args.args, fit.call_args.kwargs


def test_differences_1_and_4_each_image_once_and_all_shuffled_together(small, monkeypatch):
    monkeypatch.setattr(script, "SYNTHETIC_COUNTS", (3000, 601, 33))
    flags = ["--synthetic", "--batch-size", "20", "--seed"]
    first, _ = oracles.check_shuffle(lambda seed: fitted(*flags, str(seed))[1], 3000, 20)
    assert max(first[0]) > 1000 + 20  # which a window of 1,000 cannot reach
    _, _, options = fitted(*flags, "0")
    valid = oracles.labels_of(options["validation_data"])
    assert (sum(valid, []), len(valid[0])) == (list(range(601)), 240)
    assert options["steps_per_epoch"] == (3000 + 601 + 33) // 20


def test_a_resumed_run_goes_on_with_the_images_that_follow(small):
    folder, _ = helpers.run_main(script, [*TINY, "1"])
    shown = oracles.labels_of(fitted(*TINY, "2")[1], 6)
    _, train, _ = fitted("--resume", str(folder), "--epochs", "2")
    assert shown[:3] != shown[3:] == oracles.labels_of(train, 3)


def test_difference_3_images_are_decoded_once_and_rounded(monkeypatch, small):
    image = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype="uint8")
    ours, _ = script.pre_process_image(image, 0)
    article = tf.image.resize(tf.cast(image, tf.float32) / 255.0, (44, 44))
    assert ours.dtype == tf.uint8
    assert 0.3 / 255 < np.abs(ours.numpy() / 255 - article.numpy()).max() <= 0.5001 / 255
    monkeypatch.setattr(script, "pre_process_image", lambda *_: (ours, tf.random.uniform([])))
    labels = sum(oracles.labels_of(fitted(*TINY, "1")[1], 20), [])
    assert sorted(labels[:80]) == sorted(labels[80:])  # the second pass has those of the first


def test_differences_2_and_5_networks_are_trained_apart(small):
    first, other = [fitted(*TINY, "1", "--seed", seed)[0].get_weights() for seed in "01"]
    assert np.any(first[0] != other[0])
    _, alone = helpers.run_main(script, [*TINY, "2"])
    folder, both = helpers.run_main(script, [*TINY, "2", "--arms", "avgpool", "gap"])
    assert both["gap"]["history"] == alone["gap"]["history"]
    model = keras.models.load_model(folder / "gap.keras")
    assert oracles.smallest_move(model.get_weights(), first) > 0  # the head is trained too
    oracles.check_final_numbers(script)


def test_load_data_takes_all_images_and_turns_faults_into_a_line(monkeypatch, tmp_path, capsys):
    fault = script.tfds.download.DownloadError("HTTP code: 404.")
    monkeypatch.setattr(script.tfds, "load", load := mock.Mock(side_effect=fault))
    line = helpers.exit_of(lambda: script.main([]), capsys)
    assert line == (1, "error: no cats_vs_dogs: DownloadError: HTTP code: 404.")
    assert not (tmp_path / "log").exists()
    splits = ["train[:80%]", "train[80%:90%]", "train[90%:]"]
    load.assert_called_once_with("cats_vs_dogs", split=splits, as_supervised=True)
