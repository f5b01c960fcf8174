"""gap_cats_dogs.py: data by hand, back ends by hand, its differences from the article."""

from unittest import mock

import numpy as np
import oracles
import pytest
import tensorflow as tf
from helpers import exit_of, run_main
from oracles import labels_of

import gap_cats_dogs as script

keras = script.keras

ARMS = ["fc", "fc_dropout", "gap", "avgpool"]
TINY = ["--synthetic", "--epochs", "2", "--steps-per-epoch", "3", "--batch-size", "8"]


def numbered(*counts):
    """Return sets of images of one pixel, with their numbers as labels."""

    def dataset(count):
        return tf.data.Dataset.range(count).map(lambda i: (tf.zeros((1, 1, 3), tf.uint8), i))

    return [dataset(count) for count in counts]


def first_weights(arm, seed=0):
    keras.utils.set_random_seed(seed)
    return script.build_model(arm).layers[0].get_weights()


# --- Model ---
def test_difference_1_heads_are_alike_and_apart():
    heads = [first_weights(arm) for arm in ARMS]
    for head in heads[1:]:
        oracles.assert_same(heads[0], head)
    assert not np.array_equal(first_weights("gap", seed=1)[0], heads[0][0])
    models = [script.build_model(arm) for arm in ("fc", "gap")]
    assert models[0].layers[0] is not models[1].layers[0]


def test_difference_1_one_arm_alone_gives_what_it_gives_after_another(small):
    _, after_another = run_main(script, [*TINY, "--arms", "gap", "avgpool"])
    folder, alone = run_main(script, [*TINY, "--arms", "avgpool"])
    assert list(alone) == ["avgpool"]
    assert alone["avgpool"]["history"] == after_another["avgpool"]["history"]
    saved = keras.models.load_model(folder / "avgpool.keras").layers[0].get_weights()
    assert oracles.smallest_move(saved, first_weights("avgpool")) > 0  # the head is trained too


@pytest.mark.parametrize("arm", ["gap", "avgpool"])
def test_difference_2_pooled_back_ends_by_hand(arm):
    back_end = script.build_model(arm).layers[1]
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
        assert [layer.count_params() for layer in model.layers] == [head, behind[arm]]
    kinds = {a: [type(x).__name__ for x in script.build_model(a).layers[1].layers] for a in ARMS}
    kinds["fc"].insert(4, "Dropout")  # behind the first ReLU
    assert kinds["fc"] == kinds["fc_dropout"]


def test_the_head_divides_by_255():
    head = script.build_head()
    rest = keras.Sequential([keras.Input((100, 100, 3)), *head.layers[1:]])
    pixels = np.random.default_rng(0).integers(0, 256, (2, 100, 100, 3), dtype="uint8")
    expected = rest(pixels.astype("float32") / 255)
    np.testing.assert_allclose(head(pixels), expected, rtol=1e-4, atol=1e-5)


# --- Data ---
def test_difference_3_validation_and_test_see_each_image_once():
    _, valid_dataset, test_dataset = script.make_datasets(numbered(64, 601, 33), 8, 64, seed=0)
    assert sum(labels_of(valid_dataset), []) == list(range(601))
    assert sum(labels_of(test_dataset), []) == list(range(33))


@pytest.mark.parametrize("no_cache", [False, True])
def test_differences_4_to_6_of_a_run(monkeypatch, small, no_cache):
    """It decodes once, shuffles all, and tests; without the cache a wide window takes too long."""
    decoded, windows = oracles.watch_photographs(script, monkeypatch)
    flags = ["--synthetic", "--epochs", "2", "--batch-size", "8", "--arms", "gap", "avgpool"]
    folder, _ = run_main(script, [*flags, *["--no-cache"] * no_cache])
    in_cache = 80 + 9 + 10 + 2  # and the two samples, which are drawn before
    assert (len(decoded) == in_cache) != no_cache
    assert windows == [1000 if no_cache else 80] * 2
    oracles.check_test_accuracy(script, 10)
    model = keras.models.load_model(folder / "gap.keras")
    assert int(model.optimizer.iterations) == 2 * ((80 + 9 + 10) // 8)  # what all sets would fill


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


def test_difference_6_all_images_are_shuffled_together():
    sets = numbered(3000, 1, 1)
    first, _ = oracles.check_shuffle(
        lambda seed: script.make_datasets(sets, 20, 3000, seed)[0], 3000, 20
    )
    assert max(first[0]) > 1000 + 20  # which a window of 1,000 cannot reach


def test_splits_share_no_image_and_leave_none_out(monkeypatch):
    monkeypatch.setattr(script.tfds, "load", lambda name, **options: (name, options))
    args = script.argparse.Namespace(synthetic=False, data_dir="here")
    split = ["train[:80%]", "train[80%:90%]", "train[90%:]"]
    options = {"split": split, "as_supervised": True, "data_dir": "here"}
    assert script.load_data(args) == ("cats_vs_dogs", options)


def test_faults_of_tfds_are_one_line(monkeypatch, capsys):
    """The second is Colab's, where a cell before has imported it, with tensorflow-metadata 1.21."""
    monkeypatch.setattr(script.tfds, "load", mock.Mock(side_effect=ConnectionError("no route")))
    code, line = exit_of(lambda: script.main([]), capsys)
    assert code == 1
    assert line.startswith("error: no cats_vs_dogs (ConnectionError: no route)")
    assert "--synthetic" in line
    monkeypatch.delattr(script.tfds, "load")
    code, line = exit_of(lambda: script.main([]), capsys)
    assert code == 1
    assert 'pip install "tensorflow-metadata<1.18"' in line
