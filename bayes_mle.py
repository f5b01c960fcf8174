"""Fit lines with TensorFlow Probability: Bayes' theorem, maximum likelihood, a band of noise.

Article: "Bayes Theorem, maximum likelihood estimation and TensorFlow Probability".

Bayes' theorem turns a belief from before the data (the prior) into one from after them (the
posterior). Without a prior, the best parameters are those that make the data most likely. Here
networks that return distributions find them by minimising the negative log likelihood (NLL).

    python bayes_mle.py                # the article's fits, beside closed forms and the truth
    python bayes_mle.py --converge     # goes on until the maximum likelihood is reached

Result (seeds 0 to 4): the first fit differs from least squares by up to 0.07 in slope and 0.21 in
intercept. The second fit's NLL per point is 0.002 to 4.8 above the least possible, and its band
holds 42 to 95 % of the points (95 to 98 % with `--converge`, which is within 0.001 of the best).

Differences from the article:
1. x, y and the means are columns (N, 1). With a column y, the article's `loc=x[:, 0]` compares each
   y with every mean, without an error message, and the line is too flat (0.51 for seed 0).
2. tf_keras instead of Keras 3, whose models TensorFlow Probability's layers reject.
3. Sigma, which grows with x, is the standard deviation. The article calls it the variance.
4. The data are drawn with a seed. In the article the array `noise` replaces the function `noise`.
5. Added: a prior that moves, least squares. The second fit has a rate of 0.05, its notebook 0.001.
"""

# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["tensorflow>=2.20,<3", "tf-keras>=2.20,<3", "tensorflow-probability>=0.25,<1",
#     "tensorboard>=2.20,<3", "numpy>=2,<3", "matplotlib>=3.9,<4"]
# ///

import argparse
import functools
import json
import os
import pathlib
import sys
import time

if "ipykernel" not in sys.modules:
    os.environ["MPLBACKEND"] = "agg"  # only a notebook shows figures
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

try:
    import tf_keras as keras  # noqa: I001 - first: without it tfp fails with a long traceback
    import tensorflow_probability as tfp
except ImportError as error:
    raise SystemExit(
        f"error: {error}; install tensorflow-probability and tf-keras on Python 3.10 to 3.13"
    ) from None
tfd = tfp.distributions

SCRIPT = "bayes_mle"
MODULES = (tf, keras, tfp, np)  # results.json names their versions
GRAD = 2.0
INTERCEPT = 3.0
TRUTH = {"slope": GRAD, "intercept": INTERCEPT}
ARTICLE = {"constant_noise": TRUTH, "growing_noise": TRUTH}  # the article prints no estimates
RAIN = 0.1  # P(RT=1), rain today
RAIN_AFTER_RAIN = 0.3  # P(RT=1 | RY=1), rain today after rain yesterday
PRIOR_MEAN = 130.0  # cm, the teacher's guess; the next four numbers are not the article's
PRIOR_STDDEV = 10.0
CLASS_MEAN = 142.0
CLASS_STDDEV = 8.0
PUPILS = 30


# --- Algorithm ---
# The theorem, a prior that moves to the evidence, and the likelihood that the networks maximise.
def bayes_theorem(likelihood, prior, evidence):
    """Return the posterior P(theta | D) = P(D | theta) P(theta) / P(D)."""
    return likelihood * prior / evidence


def normal_log_likelihood(x, mu, sigma):
    """Return log p(x) under N(mu, sigma); sigma is the standard deviation."""
    return -np.log(sigma) - 0.5 * np.log(2 * np.pi) - 0.5 * ((x - mu) / sigma) ** 2


def neg_log_likelihood(y_actual, y_predict):
    """Return -log p(y), shape (N, 1), of y_actual (N, 1) under the N distributions y_predict."""
    return -y_predict.log_prob(y_actual)


def show_probabilities():
    """Print the probabilities of rain, and a log likelihood."""
    # All days are alike: P(RT=1) = P(RT=1 | RY=1) P(RY=1) + P(RT=1 | RY=0) P(RY=0), P(RY) = P(RT).
    after_dry = (RAIN - RAIN_AFTER_RAIN * RAIN) / (1 - RAIN)
    print(f"P(RT=1) = {RAIN}, P(RT=1 | RY=1) = {RAIN_AFTER_RAIN}, P(RT=1 | RY=0) = {after_dry:.4f}")
    print(f"P(RY=1 | RT=1) = {bayes_theorem(RAIN_AFTER_RAIN, RAIN, RAIN):.4f}, by Bayes' theorem")
    by_formula = normal_log_likelihood(8.0, 10.0, 1.0)
    by_tfp = tfd.Normal(10.0, 1.0).log_prob(8.0)
    print(f"log p(8) under N(10, 1): {by_formula:.4f} by the formula, {by_tfp:.4f} by log_prob")


def posterior_of_mean(heights, prior_mean, prior_stddev, stddev):
    """Return the mean and standard deviation (cm) of the posterior, given `heights` (n,)."""
    # `stddev` is that of one height. Precisions, 1 / variance, add up and weight the two means.
    precision = 1 / prior_stddev**2 + len(heights) / stddev**2
    mean = (prior_mean / prior_stddev**2 + np.sum(heights) / stddev**2) / precision
    return mean, precision**-0.5


def update_prior(run):
    """Move the prior to the posterior, pupil by pupil; return each mean and standard deviation."""
    start = time.perf_counter()
    heights = np.random.default_rng(run.args.seed).normal(CLASS_MEAN, CLASS_STDDEV, PUPILS)
    prior = (PRIOR_MEAN, PRIOR_STDDEV)
    means, stddevs = [], []
    with tf.summary.create_file_writer(str(run.folder / "prior")).as_default():
        for count in range(1, PUPILS + 1):
            mean, stddev = posterior_of_mean(heights[:count], *prior, CLASS_STDDEV)
            means.append(float(mean))
            stddevs.append(float(stddev))
            tf.summary.scalar("mean", mean, step=count)
    run.results["arms"]["prior"] = {
        "history": {"mean": means, "stddev": stddevs},
        "final": {"mean": means[-1], "stddev": stddevs[-1]},
        "seconds": time.perf_counter() - start,
    }
    return [prior, *zip(means, stddevs)]


# --- Data ---
# Points around the line 2 x + 3, with noise that is the same everywhere or that grows with x.
def load_data(arm, samples, spread, seed):
    """Return x_range, lin_reg and the stddev of its noise: float32 columns (samples, 1)."""
    x_range = np.arange(samples)[:, np.newaxis] * 10.0 / samples  # 0, 0.1, ... 9.9
    stddev = np.full_like(x_range, spread)
    if arm == "growing_noise":
        stddev = (0.5 * x_range + 2.0) * spread / 3.0  # with the default: 0.5 x + 2
    noise = np.random.default_rng(seed).normal(0, stddev)
    lin_reg = x_range * GRAD + INTERCEPT + noise
    return np.float32(x_range), np.float32(lin_reg), np.float32(stddev)


def least_squares(x_range, lin_reg):
    """Return the most likely slope and intercept under constant noise, by a formula."""
    x = x_range.astype("float64")
    y = lin_reg.astype("float64")
    slope = np.sum((x - x.mean()) * (y - y.mean())) / np.sum((x - x.mean()) ** 2)
    return slope, y.mean() - slope * x.mean()


# --- Model ---
# The article's two models: one node for a mean, then a second one for the standard deviation.
def constant_noise_model():
    """Return the network from x (N, 1) to N Normals: a line x W + b of means, and a scale of 1."""
    normals = tfp.layers.DistributionLambda(lambda x: tfd.Normal(loc=x, scale=1))
    return keras.Sequential([keras.Input((1,)), keras.layers.Dense(1), normals])


def growing_noise_model():
    """Return the network from x (N, 1) to N Normals: two lines, of the means and of the scales."""
    # x[:, :1] keeps the shape (N, 1). With x[:, 0], (N,), log_prob of a column y would be (N, N).
    normals = tfp.layers.DistributionLambda(
        lambda x: tfd.Normal(loc=x[:, :1], scale=1e-3 + tf.math.softplus(0.3 * x[:, 1:]))
    )
    return keras.Sequential([keras.Input((1,)), keras.layers.Dense(2), normals])


MODELS = {"constant_noise": constant_noise_model, "growing_noise": growing_noise_model}


# --- Training ---
# The article's first fit: 500 epochs of Adam with a rate of 0.05. For the second its notebook has
# 1,000 epochs with a rate of 0.001, which stop too early. So here both have a rate of 0.05.
def fit(arm, model, x_range, lin_reg, epochs, run):
    """Fit a model by Adam, in batches of 32; record the loss of each epoch."""

    def record(epoch, logs):
        run.results["arms"][arm]["history"]["loss"].append(float(logs["loss"]))
        tf.summary.scalar("loss", logs["loss"], step=epoch)
        if (epoch + 1) % max(1, epochs // 5) == 0:
            print(f"{arm}, epoch {epoch + 1} of {epochs}: loss {logs['loss']:.4f}")
            run.write()

    model.compile(optimizer=keras.optimizers.Adam(learning_rate=0.05), loss=neg_log_likelihood)
    callback = keras.callbacks.LambdaCallback(on_epoch_end=record)
    with tf.summary.create_file_writer(str(run.folder / arm)).as_default():
        model.fit(x_range, lin_reg, epochs=epochs, verbose=False, callbacks=[callback])


def converge(model, x_range, lin_reg, epochs):
    """Go on to the maximum: all points in each step, and a step size that falls to zero."""
    print(f"going on for {epochs} epochs, to the maximum")
    # A new Adam, because the old one remembers its first gradients, which may have been huge.
    rate = keras.optimizers.schedules.CosineDecay(0.2, epochs)
    model.compile(optimizer=keras.optimizers.Adam(rate), loss=neg_log_likelihood)
    model.fit(x_range, lin_reg, batch_size=len(x_range), epochs=epochs, verbose=False)


def describe(x_range, lin_reg, yhat):
    """Return what N distributions say of the points: line, stddevs, mean NLL, share in the band."""
    mean, stddev = yhat.mean().numpy(), yhat.stddev().numpy()  # (N, 1) each
    slope = (mean[-1, 0] - mean[0, 0]) / (x_range[-1, 0] - x_range[0, 0])
    numbers = {
        "slope": slope,
        "intercept": mean[0, 0] - slope * x_range[0, 0],
        "first_stddev": stddev[0, 0],
        "last_stddev": stddev[-1, 0],
        "nll": np.mean(neg_log_likelihood(lin_reg, yhat)),
        "coverage": np.mean(np.abs(lin_reg - mean) <= 2 * stddev),
    }
    return {name: float(value) for name, value in numbers.items()}


def train(arm, run):
    """Fit an arm and save its weights; return x_range, lin_reg and {name: N distributions}."""
    args = run.args
    start = time.perf_counter()
    epochs = 2 * args.epochs if arm == "growing_noise" else args.epochs
    keras.utils.set_random_seed(args.seed)
    x_range, lin_reg, stddev = load_data(arm, args.samples, args.noise, args.seed)
    record = run.results["arms"][arm] = {"history": {"loss": []}, "final": {}, "seconds": 0.0}
    model = MODELS[arm]()
    output = model(np.array([[1.0]]))  # a distribution: it has a mean, a stddev and samples
    print(f"{arm}, untrained, at x = 1: mean {output.mean()[0, 0]:.2f}")
    print(f"stddev {output.stddev()[0, 0]:.2f}, samples {np.ravel(output.sample(10)).round(2)}")
    fit(arm, model, x_range, lin_reg, epochs, run)
    model.save_weights(run.folder / f"{arm}.weights.h5")
    outputs = {"fit": model(x_range)}
    if args.converge:
        converge(model, x_range, lin_reg, 2 * epochs)
        outputs["converged"] = model(x_range)
    if arm == "constant_noise":
        slope, intercept = least_squares(x_range, lin_reg)
        outputs["least squares"] = tfd.Normal(np.float32(slope * x_range + intercept), scale=1)
    outputs["truth"] = tfd.Normal(x_range * GRAD + INTERCEPT, stddev)
    record["seconds"] = time.perf_counter() - start
    record["estimates"] = {name: describe(x_range, lin_reg, y) for name, y in outputs.items()}
    record["final"] = record["estimates"]["fit"] | {"parameters": model.count_params()}
    return x_range, lin_reg, outputs


# --- Figures ---
# The article's figures: how the prior moves, and for each model the data and the fitted line.
def plot_prior(run, beliefs):
    """Draw the density of the class's mean height, before and after some of the pupils."""
    heights = np.linspace(100, 160, 601)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for count in (0, 1, 3, 10, PUPILS):
        density = np.exp(normal_log_likelihood(heights, *beliefs[count]))
        axes.plot(heights, density, label=f"pupils: {count}")
    axes.axvline(CLASS_MEAN, color="black", linestyle=":", label="ground truth")
    axes.set(xlabel="mean height (cm)", ylabel="density", title="The prior moves to the evidence")
    axes.legend(loc="upper left")
    figure.savefig(run.folder / "prior.png")


def plot(run, arm, x_range, lin_reg, outputs):
    """Draw the data of an arm, then the lines; for growing noise also bands of two stddevs."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.scatter(x_range, lin_reg, s=12, color="gray", label="data")
    axes.set(xlabel="x", ylabel="y", title=arm.replace("_", " "))
    figure.savefig(run.folder / f"{arm}_data.png")
    x = x_range[:, 0]
    for name, yhat in outputs.items():
        mean, stddev = yhat.mean()[:, 0], yhat.stddev()[:, 0]
        axes.plot(x, mean, label=name)
        if arm == "growing_noise" and name != "truth":
            axes.fill_between(x, mean - 2 * stddev, mean + 2 * stddev, alpha=0.15)
    axes.legend(loc="upper left")
    figure.savefig(run.folder / f"{arm}_fit.png")


def show_estimates(run, arm):
    """Print what the fits, the closed form and the truth say, side by side."""
    estimates = run.results["arms"][arm]["estimates"]
    print(f"\n{arm:<15}", *(f"{name:>14}" for name in estimates))
    for metric in estimates["fit"]:
        print(f"{metric:<15}", *(f"{numbers[metric]:>14.4f}" for numbers in estimates.values()))


# --- Command line ---
def main(argv=None):
    """Run the script with the flags `argv`; return the final numbers of each arm."""
    parser = make_parser("--epochs", default=500)
    add = parser.add_argument
    add("--samples", type=int, default=100, help="points of each data set")
    add("--noise", type=float, default=3.0, help="standard deviation of the noise")
    add("--converge", action="store_true", help="go on to the maximum of the likelihood")
    args = parse_flags(parser, argv)
    if args.samples < 2 or args.noise <= 0:
        parser.error("arguments --samples and --noise: the fits need two points and some noise")
    with Run(args, f"{args.samples} made-up points") as run:
        show_probabilities()
        plot_prior(run, update_prior(run))
        for arm in MODELS:
            plot(run, arm, *train(arm, run))
            show_estimates(run, arm)
        for arm in MODELS:
            if "ipykernel" not in sys.modules:
                print(f"from {SCRIPT} import {arm}_model", end="; ")
            print(f'model = {arm}_model(); model.load_weights("{run.folder}/{arm}.weights.h5")')
        return run.report()


# --- Frame: flags, faults, folder and results; the same text in every script ---
def make_parser(*names, default, several=False):
    """Return a parser with the flags of every script; `names` are the names of the first flag."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0], allow_abbrev=False)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    device = functools.partial(select_device, several=several)
    add = parser.add_argument
    add(*names, type=int, default=default, help=f"{names[-1][2:]} of each training")
    add("--device", type=device, default="auto", help="auto, cpu, gpu, gpu:N; all only for fit")
    add("--logdir", default="log", help="each run makes a folder of its own in this one")
    add("--seed", type=int, default=0, help="seed of all random numbers")
    return parser


def select_device(name, several):
    """Let TensorFlow see only the GPUs that --device names; return the name."""
    gpus = tf.config.list_physical_devices("GPU")
    choices = {"auto": gpus[:1], "cpu": []} | ({"all": gpus} if several else {})
    choices |= {f"gpu:{number}": [gpu] for number, gpu in enumerate(gpus)}
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    try:
        tf.config.set_visible_devices(choices["gpu:0" if name == "gpu" else name], "GPU")
    except KeyError:
        raise argparse.ArgumentTypeError(f"{name} is not here; use {', '.join(choices)}") from None
    except RuntimeError:  # TensorFlow has already started in this process
        raise argparse.ArgumentTypeError(f"too late for {name}; restart Python first") from None
    return name


def parse_flags(parser, argv):
    """Return the flags `argv`; None means those of the command line, or no flags in a notebook."""
    if argv is None and sys.argv[0].endswith(("kernel_launcher.py", "ipykernel/__main__.py")):
        argv = []
    try:
        args = parser.parse_args(argv)
    except SystemExit as end:
        raise SystemExit(end.code) from None  # Colab's IPython cannot show an error within an error
    for name, value in vars(args).items():
        if type(value) is int and value < (0 if name == "seed" else 1):
            parser.error(f"argument --{name.replace('_', '-')}: {value} is too small")
    if "://" in args.logdir:
        parser.error(f"argument --logdir: {args.logdir} is not a folder on this computer")
    return args


class Run:
    """One run: its flags in `args`, its `folder`, and the `results` that results.json keeps."""

    def __init__(self, args, data, results=None):
        """Make the folder of a new run on `data`, or go on with the `results` of --resume."""
        if hasattr(sys.stdout, "reconfigure"):  # a notebook's output has no such method
            sys.stdout.reconfigure(line_buffering=True)
        name = time.strftime("%Y%m%d-%H%M%S") + "-synthetic" * (data == "synthetic")
        self.args, self.folder = args, pathlib.Path(args.logdir).expanduser() / SCRIPT / name
        while self.folder.exists():  # two runs may start in one second
            self.folder = self.folder.with_name(f"{self.folder.name}-2")
        self.results = {"script": SCRIPT, "config": vars(args), "data": data, "arms": {}}
        if results:
            self.folder, self.results["arms"] = pathlib.Path(args.resume), results["arms"]
        self.results["versions"] = {module.__name__: module.__version__ for module in MODULES}
        gpus = [gpu.name for gpu in tf.config.get_visible_devices("GPU")]
        self.results["device"] = ", ".join(gpus) or "CPU"
        self.results["article"] = {} if data == "synthetic" else ARTICLE
        self.results["complete"] = False
        with self:  # its end writes results.json
            self.folder.mkdir(parents=True, exist_ok=True)
        print(f"{SCRIPT} on {data}, device {self.results['device']}, writes to {self.folder}")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        """Keep what was computed; end with one line after Ctrl-C or a fault of disk or network."""
        if isinstance(error, BrokenPipeError):
            sys.stdout = None  # its reader is gone, and Python would flush it at the end
        if isinstance(error, OSError) or kind is Exception:  # from Keras, if a download fails
            raise SystemExit(f"error: {kind.__name__}: {error}") from None
        if kind is not SystemExit:
            self.write()
        # NumPy may turn Ctrl-C into a SystemError; KeyboardInterrupt is then its cause.
        if KeyboardInterrupt in (kind, type(getattr(error, "__cause__", None))):
            print(f"interrupted; what was finished is in {self.folder}", file=sys.stderr)
            raise SystemExit(130) from None

    def write(self):
        """Write results.json beside the old one and rename it, so that it is never half written."""
        try:
            text = json.dumps(self.results, indent=1, allow_nan=False)
        except ValueError:
            raise SystemExit("error: a number is not finite; try another --seed") from None
        (self.folder / "results.json.tmp").write_text(text)
        os.replace(self.folder / "results.json.tmp", self.folder / "results.json")

    def report(self):
        """Print the results beside the article's and how to go on; return the final numbers."""
        self.results["complete"] = True
        self.write()
        print(f"\n{'arm':<16}{'metric':<34}{'here':>14}{'article':>14}")
        for arm, record in self.results["arms"].items():
            article = self.results["article"].get(arm, {})
            for metric, value in record["final"].items():
                print(f"{arm:<16}{metric:<34}{round(value, 4):>14,}{article.get(metric, '-'):>14}")
        for path in sorted(self.folder.glob("*.*")):
            print(f'model = keras.models.load_model("{path}")' if ".keras" in path.name else path)
        print(f'tensorboard --logdir "{self.folder}"')
        return {arm: record["final"] for arm, record in self.results["arms"].items()}


if __name__ == "__main__":
    main()
