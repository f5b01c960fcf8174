"""gap_cats_dogs.py: data by hand, back ends by hand, its differences from the article."""

import json
import pathlib

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

import gap_cats_dogs as script

keras = script.keras

ARMS = ["fc", "fc_dropout", "gap", "avgpool"]
TINY = ["--synthetic", "--epochs", "2", "--steps-per-epoch", "3", "--batch-size", "8"]


@pytest.fixture
def small(monkeypatch):
    """Make images and sets small, so that a run takes seconds."""
    monkeypatch.setattr(script, "IMAGE_SIZE", 44)
    monkeypatch.setattr(script, "SYNTHETIC_COUNTS", (80, 9, 10))


def run(flags):
    """Run the script; return its folder and the records of its arms."""
    script.main(flags)
    folder = max(pathlib.Path("log/gap_cats_dogs").iterdir(), key=lambda path: path.stat().st_ctime)
    return folder, json.loads((folder / "results.json").read_text())["arms"]


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


def test_difference_1_one_arm_alone_gives_what_it_gives_after_another(small):
    _, after_another = run([*TINY, "--arms", "gap", "avgpool"])
    folder, alone = run([*TINY, "--arms", "avgpool"])
    assert list(alone) == ["avgpool"]
    assert alone["avgpool"]["history"] == after_another["avgpool"]["history"]
    saved = keras.models.load_model(folder / "avgpool.keras").layers[0].get_weights()
    for one, other in zip(saved, first_weights("avgpool")):
        assert not np.array_equal(one, other)  # the head is trained too


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
    assert sum(batches(valid_dataset), []) == list(range(601))
    assert sum(batches(test_dataset), []) == list(range(33))


def test_difference_4_the_test_images_are_evaluated(small):
    folder, arms = run([*TINY, "--arms", "fc"])
    images, labels = zip(*script.synthetic_photographs(10))  # the test set's count
    images = [script.pre_process_image(image, 0)[0] for image in images]
    model = keras.models.load_model(folder / "fc.keras")
    expected = np.mean((model(np.stack(images)).numpy()[:, 0] > 0.5) == np.array(labels))
    assert arms["fc"]["final"]["test_accuracy"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("no_cache", [False, True])
def test_difference_5_images_are_decoded_once(monkeypatch, small, no_cache):
    decoded, original = [], script.synthetic_photographs

    def noted(image, label):
        tf.py_function(lambda: decoded.append(1), [], [])
        return image, label

    monkeypatch.setattr(script, "synthetic_photographs", lambda count: original(count).map(noted))
    run([*TINY, "--arms", "gap", "avgpool", *["--no-cache"] * no_cache])
    in_cache = 80 + 9 + 10 + 2  # and the two samples, which are drawn before
    assert (len(decoded) == in_cache) != no_cache


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
    train_dataset, _, _ = script.make_datasets(numbered(3000, 1, 1), 20, 3000, seed=0)
    first, second = (batches(train_dataset, 300)[i : i + 150] for i in (0, 150))
    for one_pass in (first, second):  # each pass has each image once
        assert sorted(sum(one_pass, [])) == list(range(3000))
    assert max(first[0]) > 1000 + 20  # which a window of 1,000 cannot reach
    assert not set(map(frozenset, first)) & set(map(frozenset, second))


@pytest.mark.parametrize(("flags", "window"), [([], 80), (["--no-cache"], 1000)])
def test_difference_6_the_window_and_the_steps_of_a_run(monkeypatch, small, flags, window):
    """Without the cache a wide window would decode as many images before the first batch."""
    windows, original = [], script.make_datasets

    def watched(sets, batch_size, window, seed):
        windows.append(window)
        return original(sets, batch_size, window, seed)

    monkeypatch.setattr(script, "make_datasets", watched)
    folder, _ = run(["--synthetic", "--epochs", "1", "--arms", "gap", "--batch-size", "8", *flags])
    assert windows == [window]
    model = keras.models.load_model(folder / "gap.keras")
    assert int(model.optimizer.iterations) == (80 + 9 + 10) // 8  # what all sets would fill


def test_the_seed_decides_the_batches():
    found = []
    for seed in (0, 0, 1):
        keras.utils.set_random_seed(seed)
        found.append(batches(script.make_datasets(numbered(60, 1, 1), 20, 60, seed)[0], 3))
    assert found[0] == found[1] != found[2]


def test_splits_share_no_image_and_leave_none_out(monkeypatch, tmp_path):
    """Let TFDS write its cats_vs_dogs with 40 images of ours, each of one grey level."""
    builder = tfds.builder("cats_vs_dogs", data_dir=tmp_path)

    def examples():
        for i in range(40):
            image = np.full((30 + i, 60 - i, 3), 5 * i, "uint8")
            yield i, {"image": image, "image/filename": f"{i}.jpg", "label": i % 2}

    monkeypatch.setattr(builder, "_split_generators", lambda manager: {"train": examples()})
    builder.download_and_prepare()
    parser = script.argparse.Namespace(synthetic=False, data_dir=str(tmp_path))
    sets = [list(dataset) for dataset in script.load_data(parser)]
    assert [len(part) for part in sets] == [32, 4, 4]
    numbers = [int(image[0, 0, 0]) // 5 for part in sets for image, _ in part]
    assert sorted(numbers) == list(range(40))
    found = [(tuple(image.shape), int(label)) for part in sets for image, label in part]
    assert found == [((30 + i, 60 - i, 3), i % 2) for i in numbers]


def test_synthetic_photographs_have_many_sizes_and_can_be_learned():
    images, labels = zip(*script.synthetic_photographs(100))
    assert {image.dtype for image in images} == {tf.uint8}
    assert len({tuple(image.shape) for image in images}) > 90
    # the grey levels change along one axis only
    upright = [np.ptp(image, axis=0).mean() < np.ptp(image, axis=1).mean() for image in images]
    assert upright == [label == 1 for label in labels]
    first = [next(iter(script.synthetic_photographs(count)))[0].shape for count in (100, 101)]
    assert first[0] != first[1]  # the sets are not parts of one another


# --- Faults ---


def test_an_error_line_names_what_tfds_raised(monkeypatch, capsys):
    def load(name, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(tfds, "load", load)
    with pytest.raises(SystemExit) as stop:
        script.main([])
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "error: no cats_vs_dogs (ConnectionError: no route)" in error
    assert "--synthetic" in error


def test_where_the_import_of_tfds_has_failed(monkeypatch, capsys):
    """As on Colab, where a cell before has imported it, with a tensorflow-metadata too new."""
    monkeypatch.delattr(tfds, "load")
    with pytest.raises(SystemExit) as stop:
        script.main([])
    assert stop.value.code == 1
    assert 'pip install "tensorflow-metadata<1.18"' in capsys.readouterr().err


def test_a_typing_error_in_the_pipeline_keeps_its_traceback(monkeypatch, small):
    monkeypatch.setattr(script, "pre_process_image", lambda image, label: imagee)  # noqa: F821
    with pytest.raises(NameError, match="imagee"):
        script.main(TINY)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_claim_dense_layers_overfit(seed):
    """Seven epochs on the real photographs: fc learns those to train by heart, gap does not."""
    final = script.main(["--arms", "fc", "gap", "--seed", str(seed)])
    assert final["fc"]["accuracy"] > 0.95
    assert final["fc"]["accuracy"] - final["fc"]["val_accuracy"] > 0.1
    assert final["gap"]["accuracy"] < 0.85
