"""Fit lines with TensorFlow Probability: Bayes' theorem, maximum likelihood, a band of noise.

Article: "Bayes Theorem, maximum likelihood estimation and TensorFlow Probability".

Bayes' theorem turns what was believed before the data into what is believed after. Without a prior
belief, the parameters under which the data are most likely are the best. A network that ends in a
distribution finds them by descent on the negative log likelihood (NLL): of a line, then of a line
and its growing noise.

    python bayes_mle.py                # the article's fits, beside closed forms and the truth
    python bayes_mle.py --converge     # goes on until the maximum is reached

Measured (seeds 0 to 4): the first fit misses least squares by up to 0.07 in slope and 0.21 in
intercept; the second its maximum by 0.05, 0.004, 1.0, 4.8 and 0.002 NLL a point, so that its band
holds 92, 95, 61, 42 and 95 % of the points. `--converge` reaches both to 0.001; the bands hold
95 to 98 %. Ten seconds on two cores, fifteen with `--converge`.

Differences from the article:
1. Everything is a column (N, 1). Today's Keras refuses an x of shape (N,); with a column y the
   article's `loc=x[:, 0]` broadcasts to (N, N) without an error: each y is compared with every
   mean, and the line comes out too flat (slopes 0.51, 0.13 and 1.44 for seeds 0 to 2).
2. tf_keras instead of Keras 3, whose models TensorFlow Probability's layers reject.
3. Scale is the standard deviation; the article calls sigma, and what grows, the variance.
4. Data come from a seed and can be drawn again; the article's `noise` overwrites its own function.
5. The prior moves in closed form, the estimates stand beside least squares, the truth and
   (`--converge`) the maximum, the points in the band are counted. The article shows pictures.
Kept: batches of 32, the last of 4 counting as much; a scale of 1, although the noise has 3.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "tensorflow>=2.20,<3", "tf-keras>=2.20,<3", "tensorflow-probability>=0.25,<1",
#     "tensorboard>=2.20,<3", "numpy>=2,<3", "matplotlib>=3.9,<4",
# ]
# ///

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import sys
import time

import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp
import tf_keras

# --- Constants ---

SCRIPT = "bayes_mle"
PACKAGES = ("tensorflow", "tf-keras", "tensorflow-probability", "numpy")
GRAD, INTERCEPT = 2.0, 3.0  # of the line from which the data are drawn
TRUTH = {"slope": GRAD, "intercept": INTERCEPT}  # the article gives no estimates of its own
ARTICLE = {"constant_noise": TRUTH, "growing_noise": TRUTH}
VERBOSE = 1 if sys.stdout.isatty() or "ipykernel" in sys.modules else 2  # a bar, or plain lines
PRIOR_MEAN = 130.0  # cm, the teacher's guess of the mean height; the other heights are ours
PRIOR_STDDEV, CLASS_MEAN, CLASS_STDDEV, PUPILS = 10.0, 142.0, 8.0, 30
RAIN, RAIN_AFTER_RAIN = 0.1, 0.3  # P(RT=1) and P(RT=1 | RY=1)
LEARNING_RATE, LAST_LEARNING_RATE = 0.05, 0.2  # of the article's fit; where --converge begins
tfd = tfp.distributions

# --- Command line ---


def build_parser():
    """Return the parser of this script's flags."""
    style = argparse.ArgumentDefaultsHelpFormatter
    first_line = str(__doc__).partition("\n")[0]
    parser = OneLineParser(description=first_line, formatter_class=style, allow_abbrev=False)
    add = parser.add_argument
    add("--epochs", type=number(int, 0), default=500, help="of the first fit; twice that next")
    add("--device", default="auto", help="auto, cpu, gpu or gpu:N")
    add("--logdir", default="log", help="where each run makes a folder of its own")
    add("--seed", type=number(int, 0), default=0, help="seed of all random numbers")
    add("--samples", type=number(int, 3, 10**6), default=100, help="points of each data set")
    add("--noise", type=number(float, 0.1, 1e3), default=3.0, help="spread of the first data set")
    add("--converge", action="store_true", help="then fit on, until the maximum is reached")
    return parser


def parse_args(argv):
    """Parse `argv` strictly; None stands for the command line, in a notebook cell for no flags."""
    if argv is None and "__file__" not in globals():
        argv = []  # there sys.argv belongs to the kernel
    return build_parser().parse_args(argv)


# --- Shared helpers: the same text in every script that has them ---


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports a bad flag in one line and exits with code 2."""

    def error(self, message):
        self.exit(2, f"error: {message}; see --help\n")


def number(kind, low, high=2**31 - 1):
    """Return an argparse type: an int or float (`kind`) from `low` to `high`, both included."""

    def number(text):  # argparse takes "invalid number value" from this name
        if not low <= kind(text) <= high:  # nan is refused too
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)

    return number


def select_device(device, several=False):
    """Let TensorFlow see only the device of --device ("all" if `several`); return its name."""
    gpus = tf.config.list_physical_devices("GPU")
    choices = {"auto": gpus[:1], "cpu": []} | {f"gpu:{i}": [gpu] for i, gpu in enumerate(gpus)}
    choices |= {"all": gpus} if several else {}
    chosen = choices.get("gpu:0" if device == "gpu" else device)
    if chosen is None:
        build_parser().error(f"argument --device: {device} is not one of {', '.join(choices)} here")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    try:
        tf.config.set_visible_devices(chosen, "GPU")
    except RuntimeError:  # TensorFlow has started in this process
        build_parser().error(f"argument --device: too late for {device}; restart Python first")
    return ", ".join(gpu.name.removeprefix("/physical_device:") for gpu in chosen) or "CPU"


def new_run_dir(args, data, device):
    """Make the folder of this run, <logdir>/<script>/<time>; return it and the results so far."""
    name = time.strftime("%Y%m%d-%H%M%S") + ("-synthetic" if data == "synthetic" else "")
    for count in itertools.count():  # two runs may start in the same second
        run_dir = pathlib.Path(args.logdir, SCRIPT, f"{name}-{count}" if count else name)
        with contextlib.suppress(FileExistsError):
            run_dir.mkdir(parents=True)
            break
    results = {"script": SCRIPT, "config": vars(args), "device": device, "data": data, "arms": {}}
    results["versions"] = {package: importlib.metadata.version(package) for package in PACKAGES}
    results |= {"article": {} if data == "synthetic" else ARTICLE, "complete": False}
    write_results(run_dir, results)
    print(f"{SCRIPT} on {data}, device {device}, writes to {run_dir}")
    return run_dir, results


def write_results(run_dir, results):
    """Replace results.json in one step; keep it, and raise FloatingPointError, for nan or inf."""
    try:
        text = json.dumps(results, indent=1, allow_nan=False)
    except ValueError:
        raise FloatingPointError("the loss is not finite; try another --seed") from None
    temporary = run_dir / "results.json.tmp"
    temporary.write_text(text)
    os.replace(temporary, run_dir / "results.json")


def save_figure(figure, path):
    """Save a figure as PNG; show it too where this runs in a notebook."""
    figure.savefig(path, dpi=100)
    if "inline" in plt.get_backend():
        plt.show()
    plt.close(figure)


def report(run_dir, results):
    """Print the final values beside the article's, the files, and how to see the events."""
    print(f"\n{SCRIPT} on {results['data']}, epochs: {results['config']['epochs']}")
    print(f"{'arm':<16}{'metric':<32}{'here':>12}{'article':>12}{'spread':>12}")
    for arm, record in results["arms"].items():
        final, article = record["final"], results["article"].get(arm, {})
        for metric in final | article:
            values = final.get(metric), article.get(metric), record.get("spread", {}).get(metric)
            cells = ("-" if value is None else f"{round(value, 4):,}" for value in values)
            print("{:<16}{:<32}{:>12}{:>12}{:>12}".format(arm, metric, *cells))
    print(*sorted(map(str, run_dir.glob("*.*"))), f"tensorboard --logdir {run_dir}", sep="\n")


def run_as_command(main):
    """Call `main`; a fault that can be foreseen ends in one line and an exit code."""
    try:
        return main()
    except (KeyboardInterrupt, SystemError):  # C code makes the second of the first
        code, message = 130, "interrupted: what had been finished is in the run's folder"
    except (OSError, FloatingPointError, tf.errors.ResourceExhaustedError) as error:
        reason = str(error).split("}} ")[-1].partition("\n")[0]  # TensorFlow's begin with {{...}}
        ours = not error.args[1:] and not hasattr(error, "op")
        code, message = 1, f"error: {reason}" + ("" if ours else "; see to that path and its disk")
    print(message, file=sys.stderr)
    if "__file__" in globals():  # a notebook's kernel stays usable
        sys.exit(code)


# --- Data ---


def load_data(arm, samples, noise, seed):
    """Return x, y and the true standard deviation of y at x, each (samples, 1) float32.

    y = 2 x + 3 + N(0, noise); in the arm "growing_noise" the same draws, stretched to 0.5 x + 2.
    """
    x = np.arange(samples)[:, np.newaxis] * 10.0 / samples  # (N, 1) from here on
    stddev = np.full_like(x, noise) if arm == "constant_noise" else (0.5 * x + 2.0) * noise / 3.0
    y = GRAD * x + INTERCEPT + np.random.default_rng(seed).normal(0, stddev)
    return np.float32(x), np.float32(y), np.float32(stddev)


# --- Model ---


def build_model(arm):
    """Return the network of an arm: x (N, 1) to N Normals, whose loc and scale are (N, 1), as y."""

    def normal(t):
        if arm == "constant_noise":
            return tfd.Normal(loc=t, scale=1)
        return tfd.Normal(loc=t[:, :1], scale=1e-3 + tf.math.softplus(0.3 * t[:, 1:]))

    dense = tf_keras.layers.Dense(1 if arm == "constant_noise" else 2)
    return tf_keras.Sequential([tf_keras.Input((1,)), dense, tfp.layers.DistributionLambda(normal)])


# --- Algorithm ---


def bayes_theorem(likelihood, prior, evidence):
    """Return P(theta | D) = P(D | theta) P(theta) / P(D)."""
    return likelihood * prior / evidence


def posterior_of_mean(heights, prior_mean, prior_stddev, stddev):
    """Return mean and standard deviation, in cm, of what `heights` (n,) leave of a mean's prior."""
    # Precisions, 1 / variance, add up, and weight the means.
    precision = 1 / prior_stddev**2 + len(heights) / stddev**2
    mean = (prior_mean / prior_stddev**2 + np.sum(heights) / stddev**2) / precision
    return mean, precision**-0.5


def normal_log_likelihood(x, mu, sigma):
    """Return log p(x) under N(mu, sigma), sigma being the standard deviation."""
    return -np.log(sigma) - 0.5 * np.log(2 * np.pi) - 0.5 * ((x - mu) / sigma) ** 2


def neg_log_likelihood(y_actual, y_predict):
    """Return -log p(y), shape (N, 1), of y_actual (N, 1) under the N distributions y_predict."""
    return -y_predict.log_prob(y_actual)


def least_squares(x, y):
    """Return slope and intercept of the maximum likelihood under constant noise, in closed form."""
    x, y = np.float64(x), np.float64(y)
    slope = np.sum((x - x.mean()) * (y - y.mean())) / np.sum((x - x.mean()) ** 2)
    return slope, y.mean() - slope * x.mean()


def describe(x, y, distribution):
    """Return {name: number} of a distribution for each x (N, 1): line, band, mean NLL of y."""
    mean, stddev = distribution.mean().numpy(), distribution.stddev().numpy()  # (N, 1) each
    slope = (mean[-1, 0] - mean[0, 0]) / (x[-1, 0] - x[0, 0])
    numbers = {"slope": slope, "intercept": mean[0, 0] - slope * x[0, 0]}
    numbers |= {"first_stddev": stddev[0, 0], "last_stddev": stddev[-1, 0]}
    numbers["nll"] = np.mean(neg_log_likelihood(y, distribution))
    numbers["coverage"] = np.mean(np.abs(y - mean) <= 2 * stddev)
    return {name: float(value) for name, value in numbers.items()}


def show_probabilities():
    """Print the article's numbers: rain after rain, and a log likelihood."""
    after_dry = (RAIN - RAIN_AFTER_RAIN * RAIN) / (1 - RAIN)  # so that one day in ten is wet
    print(f"P(RT=1) = {RAIN}, P(RT=1 | RY=1) = {RAIN_AFTER_RAIN}, P(RT=1 | RY=0) = {after_dry:.4f}")
    print(f"P(RY=1 | RT=1) = {bayes_theorem(RAIN_AFTER_RAIN, RAIN, RAIN):.4f}, by Bayes' theorem")
    by_hand, by_tfp = normal_log_likelihood(8.0, 10.0, 1.0), tfd.Normal(10.0, 1.0).log_prob(8.0)
    print(f"log p(8) under N(10, 1): {by_hand:.4f} by the formula, {by_tfp:.4f} by log_prob")


# --- Training ---


class Progress(tf_keras.callbacks.Callback):
    """Shows a fit's progress; keeps each epoch's loss, for TensorBoard too, and saves at times."""

    def __init__(self, label, losses, save):
        super().__init__()
        self.label, self.losses, self.save = label, losses, save

    def on_train_begin(self, logs=None):
        print(f"{self.label}: {self.params['epochs']} epochs")
        self.progress = tf_keras.utils.Progbar(self.params["epochs"], verbose=VERBOSE % 2)
        self.saved = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.losses.append(float(logs["loss"]))
        tf.summary.scalar("loss", logs["loss"], step=epoch)
        self.progress.update(epoch + 1)
        if VERBOSE == 2 and (epoch + 1) % max(1, self.params["epochs"] // 5) == 0:
            print(f"Epoch {epoch + 1}: loss {logs['loss']:.4f}")
        if time.perf_counter() - self.saved > 2:
            self.save()
            self.saved = time.perf_counter()


def update_prior(args, run_dir, results):
    """Move the prior to the posterior, pupil by pupil; return [(mean, stddev)], the prior first."""
    start = time.perf_counter()
    heights = np.random.default_rng(args.seed).normal(CLASS_MEAN, CLASS_STDDEV, PUPILS)
    prior = (PRIOR_MEAN, PRIOR_STDDEV, CLASS_STDDEV)  # the spread of the class is taken as known
    curves = [posterior_of_mean(heights[:count], *prior) for count in range(PUPILS + 1)]
    means, stddevs = np.transpose(curves[1:]).tolist()
    with tf.summary.create_file_writer(str(run_dir / "prior")).as_default():
        for count, mean in enumerate(means, 1):
            tf.summary.scalar("mean", mean, step=count)
    record = {"history": {"mean": means, "stddev": stddevs}}
    record["final"] = {"mean": means[-1], "stddev": stddevs[-1]}
    results["arms"]["prior"] = record | {"seconds": time.perf_counter() - start}
    write_results(run_dir, results)
    print(f"heights: {PRIOR_MEAN} cm before, {means[-1]:.1f} cm after {PUPILS} pupils")
    return curves


def train(arm, args, run_dir, results):
    """Fit one arm, save its weights; return x, y and {name: distribution at x} to compare."""
    tf_keras.utils.set_random_seed(args.seed)
    x, y, stddev = load_data(arm, args.samples, args.noise, args.seed)
    model, losses = build_model(arm), []
    epochs = args.epochs * (2 if arm == "growing_noise" else 1)
    record = results["arms"][arm] = {"history": {"loss": losses}, "final": {}, "seconds": 0.0}
    at_one = model(np.array([[1.0]]))  # a distribution, of which more can be asked than a value
    asked = {"mean": at_one.mean(), "stddev": at_one.stddev(), "samples": at_one.sample(5)}
    told = (f"{name} {np.round(np.ravel(value), 2)}" for name, value in asked.items())
    print(f"{arm}, untrained, at x = 1:", *told)
    start = time.perf_counter()
    model.compile(optimizer=tf_keras.optimizers.Adam(LEARNING_RATE), loss=neg_log_likelihood)
    with tf.summary.create_file_writer(str(run_dir / arm)).as_default():
        progress = Progress(arm, losses, lambda: write_results(run_dir, results))
        if epochs:  # tf_keras refuses none
            model.fit(x, y, epochs=epochs, verbose=0, callbacks=[progress])
    model.save_weights(str(run_dir / f"{arm}.weights.h5"))
    found = {"fit": model(x)}
    if args.converge and epochs:
        # All points in each step, a step size that falls to zero, and a new Adam: the old one still
        # divides by the first gradients, which are huge where the scale starts out too small.
        rate = tf_keras.optimizers.schedules.CosineDecay(LAST_LEARNING_RATE, 2 * epochs)
        model.compile(optimizer=tf_keras.optimizers.Adam(rate), loss=neg_log_likelihood)
        progress = Progress(f"{arm}, converging", [], lambda: None)
        model.fit(x, y, len(x), epochs=2 * epochs, verbose=0, callbacks=[progress])
        found["converged"] = model(x)
    if arm == "constant_noise":
        slope, intercept = least_squares(x, y)
        found["least squares"] = tfd.Normal(np.float32(slope * x + intercept), scale=1)
    found["truth"] = tfd.Normal(GRAD * x + INTERCEPT, stddev)
    record["seconds"] = time.perf_counter() - start
    record["estimates"] = {name: describe(x, y, known) for name, known in found.items()}
    record["final"] = record["estimates"]["fit"] | {"parameters": model.count_params()}
    write_results(run_dir, results)
    return x, y, found


def show_estimates(arm, estimates):
    """Print what the fit, the closed form and the truth say, side by side."""
    print(f"\n{arm:<15}", *(f"{name:>14}" for name in estimates))
    for metric in estimates["fit"]:
        print(f"{metric:<15}", *(f"{numbers[metric]:>14.4f}" for numbers in estimates.values()))


# --- Plots ---


def plot_prior(run_dir, curves):
    """Draw the density of the class's mean height, before and after some of the pupils."""
    heights = np.linspace(100, 160, 601)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for count in (0, 1, 3, 10, PUPILS):
        label = f"posterior, n = {count}" if count else "prior"
        axes.plot(heights, np.exp(normal_log_likelihood(heights, *curves[count])), label=label)
    axes.axvline(CLASS_MEAN, color="black", linestyle=":", label="ground truth")
    axes.set(xlabel="mean height (cm)", ylabel="density", title="The prior moves to the evidence")
    axes.legend(loc="upper left")
    save_figure(figure, run_dir / "prior.png")


def plot(run_dir, arm, x, y, found):
    """Draw the article's two figures of an arm: the data, and what the fit makes of them."""
    labels = {"fit": "predicted", "converged": "converged", "truth": "ground truth"}
    for kind, names in {"data": [], "fit": [name for name in labels if name in found]}.items():
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        axes.scatter(x, y, s=12, color="gray", label="data")
        for name in names:
            mean, stddev = found[name].mean()[:, 0], found[name].stddev()[:, 0]
            axes.plot(x, mean, label=labels[name], linestyle="--" if name == "truth" else "-")
            if name != "truth" and arm == "growing_noise":
                band = {"alpha": 0.15, "label": f"{labels[name]}, two standard deviations"}
                axes.fill_between(x[:, 0], mean - 2 * stddev, mean + 2 * stddev, **band)
        axes.set(xlabel="x", ylabel="y", title=f"{arm.replace('_', ' ')}: {kind}")
        axes.legend(loc="upper left")
        save_figure(figure, run_dir / f"{arm}_{kind}.png")


# --- Main ---


def main(argv=None):
    """Run the script with the flags `argv`; return the final numbers of each arm."""
    args = parse_args(argv)
    device = select_device(args.device)
    run_dir, results = new_run_dir(args, f"{args.samples} made-up points", device)
    show_probabilities()
    plot_prior(run_dir, update_prior(args, run_dir, results))
    for arm in ("constant_noise", "growing_noise"):
        plot(run_dir, arm, *train(arm, args, run_dir, results))
    for arm in ("constant_noise", "growing_noise"):
        show_estimates(arm, results["arms"][arm]["estimates"])
    results["complete"] = True
    write_results(run_dir, results)
    report(run_dir, results)
    return {arm: record["final"] for arm, record in results["arms"].items()}


if __name__ == "__main__":
    run_as_command(main)
