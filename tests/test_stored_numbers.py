"""Numbers in the notebooks' prose that come from stored results: the sentence stands there, and the file agrees."""

from itertools import pairwise
from statistics import mean, pstdev

import numpy as np
import pytest
from scipy.stats import binomtest
from test_notebooks import FILES, prose_of

import sae_helpers as sae

PATHS = {path.stem: path for path in FILES}


def of(file, part, label, column):
    """Mean over the seeds of a stored run."""
    return mean(run[column] for run in sae.stored_results(file)[part]["results"][label])


def probe(part, label, column="error"):
    """What a linear probe found."""
    return sae.stored_results("downstream")[part]["results"]["rows"][label][column]


def members(column="error"):
    return [probe("test", f"member {m}", column) for m in range(5)]


def uneven(a, b):
    """How likely an at least so uneven split of the images that only one of two probes misreads is by chance."""
    a, b = ({image for image, *_ in probe("test", name, "misread")} for name in (a, b))
    return binomtest(len(a - b), len(a ^ b)).pvalue


def few(label, n):
    """Mean test error with n labels of each digit."""
    return mean(probe("few", "labels", label)[n])


def frontier(k, width, column="mse"):
    """A model of the frontier, by its place among 256, 1,024 and 4,096 features."""
    return sae.stored_results("sparsity")[f"k_{k}"]["results"]["rows"][width][column]


def gap(k, width):
    """The one-shot error over that of OMP."""
    return frontier(k, width, "sample")["mse"] / frontier(k, width, "omp")["mse"]


def searched(k, width):
    """The error of OMP with the dictionary of such a model."""
    return frontier(k, width, "omp")["mse"]


def rung(part, label, column="mse"):
    return sae.stored_results("sparsity")[part]["results"][label][column]


def schedule(shape):
    """Mean test error over the seeds, over that of the recipe's schedule."""
    errors = [mean(run["mse"] for run in sae.stored_results("schedules")[part]["results"]["seeds"])
              for part in (shape, "late_linear")]  # fmt: skip
    return errors[0] / errors[1]


KS = (10, 25, 50, 100, 200)
TIED, MAP = ("rates", "no map, 10 epochs, rate 0.003"), ("rates", "improved, 10 epochs, rate 0.006")


def seeds(part, label, column):
    """A figure of two or three runs with different seeds; the mean where it is one for each pair."""
    return float(np.mean(sae.stored_results("consistency")[part]["results"][label][column]))


def won_by_averaging(weight):
    """By how much the mean of the members' reconstructions is better than the best member."""
    return 1 - seeds("weights", weight, "mse_of_mean") / seeds("weights", weight, "mse_best_member")


def fastest(name, part="ensemble"):
    """Milliseconds of a step in the fastest turn."""
    return min(sae.stored_results("training_cpu")[part]["results"][name])


def memory(name):
    """MiB at the peak, above that of libraries and images."""
    found = sae.stored_results("training_cpu")["memory"]["results"]
    return found[name] - found["libraries and images"]


def of_precision(name, column):
    return float(np.mean(sae.stored_results("training_cpu")["precision"]["results"]["five_epochs"][name][column]))


def dead_share(label, column="dead_fraction"):
    """What a remedy left, upon the reference recipe."""
    return of("dead_features", "resampling", label, column)


def law():
    """Settings at which the selection floor was tried."""
    return [label for label in sae.stored_results("dead_features")["law"]["results"] if "without" not in label]


def bought_by_floor(k):
    """Pearson with the floor, less that without."""
    return of("dead_features", "law", f"k = {k}", "pearson") - of(
        "dead_features", "law", f"k = {k}, without the floor", "pearson"
    )


def falls(column):
    """What a consistency weight that falls at the end changes."""
    return of("dead_features", "ensemble", "consistency weight falls at the end", column) - of(
        "dead_features", "ensemble", "improved", column
    )


def known(part, row, column, over_worlds=np.mean):
    return over_worlds(sae.stored_results("known_features")[part]["results"][row][column])


LOG = ("+ mean image as decoder bias", "+ learning rate 0.002", "+ linear decay over the last 30 %",
       "+ one second moment a row", "+ encoder map")  # fmt: skip
LOG_STEPS = list(pairwise(LOG))


def rare_at(step):
    return of("dead_features", "log", step, "rare_fraction")


WORLDS = (("independent", (2, 4, 8, 12, 16, 24)), ("correlated", (2, 4, 8, 16)))


# notebook, words of its prose, what the stored file says, lowest and highest value for which they are true
NUMBERS = [
    # 03_amp_ensemble_training
    ("03_amp_ensemble_training", "Between ensembles the agreement rises by 0.02",
     lambda: seeds("weights", "0.01", "between") - seeds("weights", "0.0", "between"), 0.015, 0.025),
    ("03_amp_ensemble_training", "30 % less error than the best of them",
     lambda: won_by_averaging("0.0"), 0.295, 0.305),
    ("03_amp_ensemble_training", "with it 6 %", lambda: won_by_averaging("0.01"), 0.055, 0.065),
    ("03_amp_ensemble_training", "a quarter as many agree better (0.54)",
     lambda: seeds("widths", "256 features", "between"), 0.535, 0.545),
    ("03_amp_ensemble_training", "twice as many worse (0.41)",
     lambda: seeds("widths", "2,048 features", "between"), 0.405, 0.415),
    ("03_amp_ensemble_training", "A start from training images agrees more *before* training than after",
     lambda: seeds("reproducibility", "start from training images", "between_at_start")
     - seeds("reproducibility", "start from training images", "between"), 0.1, 0.5),
    ("03_amp_ensemble_training", "more than twice as many pairs are close",
     lambda: seeds("kinds", "ReLU and L1", "pairs_above_0.7") / seeds("kinds", "top-k", "pairs_above_0.7"), 2, 3),
    ("03_amp_ensemble_training", "L1 agrees more than top-k at the same sparsity",
     lambda: min(sae.stored_results("consistency")["kinds"]["results"]["ReLU and L1"]["between"])
     - max(sae.stored_results("consistency")["kinds"]["results"]["top-k"]["between"]), 0.02, 0.2),
    ("03_amp_ensemble_training", "at the same sparsity", lambda: seeds("kinds", "ReLU and L1", "l0"), 47, 53),
    ("03_amp_ensemble_training", "But it rebuilds worse",
     lambda: seeds("kinds", "ReLU and L1", "mse") / seeds("kinds", "top-k", "mse"), 1.5, 2),
    ("03_amp_ensemble_training", "agree better, at twice the error",
     lambda: seeds("reproducibility", "k = 25", "mse") / seeds("reproducibility", "improved", "mse"), 1.8, 2.2),
    ("03_amp_ensemble_training", "At L1's error, top-k ($k = 25$, first table)",
     lambda: seeds("reproducibility", "k = 25", "mse") / seeds("kinds", "ReLU and L1", "mse"), 0.9, 1.1),
    ("03_amp_ensemble_training", "agrees more in the mean",
     lambda: seeds("reproducibility", "k = 25", "between") - seeds("kinds", "ReLU and L1", "between"), 0.02, 0.1),
    ("03_amp_ensemble_training", "but has fewer close pairs",
     lambda: seeds("reproducibility", "k = 25", "pairs_above_0.7") - seeds("kinds", "ReLU and L1", "pairs_above_0.7"),
     -0.15, -0.03),
    ("03_amp_ensemble_training", "they would be a fifth of those",
     lambda: seeds("kinds", "top-k", "pairs_above_0.7") / (1 - seeds("kinds", "top-k", "rare_fraction")), 0.18, 0.21),
    ("03_amp_ensemble_training", "L1 has a third",
     lambda: seeds("kinds", "ReLU and L1", "pairs_above_0.7") / (1 - seeds("kinds", "ReLU and L1", "rare_fraction")),
     0.31, 0.36),
    ("03_amp_ensemble_training", "top-k's third of rare features",
     lambda: seeds("kinds", "top-k", "rare_fraction"), 0.28, 0.38),
    ("03_amp_ensemble_training", "without them the means are equal",
     lambda: seeds("kinds", "ReLU and L1", "between_not_rare") - seeds("kinds", "top-k", "between_not_rare"),
     -0.015, 0.015),
    ("03_amp_ensemble_training", "half the features are rare",
     lambda: seeds("kinds", "top-k with weight decay", "rare_fraction"), 0.44, 0.56),
    ("03_amp_ensemble_training", "most of them dead",
     lambda: seeds("kinds", "top-k with weight decay", "dead_fraction")
     / seeds("kinds", "top-k with weight decay", "rare_fraction"), 0.8, 1),
    ("03_amp_ensemble_training", "the rest agree more",
     lambda: seeds("kinds", "top-k with weight decay", "between_not_rare")
     - seeds("kinds", "top-k", "between_not_rare"), 0.03, 0.2),
    ("03_amp_ensemble_training", "Top-k without negative codes agrees as top-k does",
     lambda: seeds("kinds", "top-k without negative codes", "between") - seeds("kinds", "top-k", "between"),
     -0.01, 0.01),
    ("03_amp_ensemble_training", "| ReLU and L1, between seeds | 0.50 |",
     lambda: seeds("kinds", "ReLU and L1", "between"), 0.495, 0.505),
    ("03_amp_ensemble_training", "| 0.44, top-k |", lambda: seeds("kinds", "top-k", "between"), 0.435, 0.445),
    # A2_speed_and_precision
    ("A2_speed_and_precision", "| 40 times |",
     lambda: fastest("reference loop") / fastest("ours, with the consistency loss"), 39.5, 40.5),
    ("A2_speed_and_precision", "| 2.2 times |",
     lambda: fastest("five separate modules") / fastest("ours, without"), 2.15, 2.25),
    ("A2_speed_and_precision", "its members agreed even a little more after 200 steps",
     lambda: (lambda found: found["ours"][-1] - found["exact"][-1])(
         sae.stored_results("training_cpu")["agreement"]["results"]), 0.005, 0.1),
    ("A2_speed_and_precision", "Five members cost somewhat less than five times one",
     lambda: (lambda turns: min(turns["5"]) / min(turns["1"]))(
         sae.stored_results("training_cpu")["growth"]["results"]["n_members"]), 4, 4.9),
    ("A2_speed_and_precision", "ours takes some 100 MiB", lambda: memory("ours, with the consistency loss"), 85, 115),
    ("A2_speed_and_precision", "the reference loop two and a half times that",
     lambda: memory("reference loop") / memory("ours, with the consistency loss"), 2.3, 2.7),
    ("A2_speed_and_precision", "less than 0.001 from that of float32",
     lambda: abs(of_precision("bfloat16", "pearson") - of_precision("float32", "pearson")), 0, 0.001),
    ("A2_speed_and_precision", "on that CPU they took as long",
     lambda: of_precision("bfloat16", "seconds") / of_precision("float32", "seconds"), 0.9, 1.1),
    # 07_sparsity
    ("07_sparsity", "by a fifth at $k = 50$", lambda: frontier(50, 1) / frontier(50, 0), 0.77, 0.83),
    ("07_sparsity", "by two thirds at $k = 200$", lambda: frontier(200, 1) / frontier(200, 0), 0.28, 0.38),
    ("07_sparsity", "With $4096$ it falls no further", lambda: min(frontier(k, 2) / frontier(k, 1) for k in KS),
     0.995, 1.2),
    ("07_sparsity", "at $k = 50$ and $200$ it is about a tenth higher",
     lambda: min(frontier(k, 2) / frontier(k, 1) for k in (50, 200)), 1.05, 1.15),
    ("07_sparsity", "at $k = 50$ and $200$ it is about a tenth higher",
     lambda: max(frontier(k, 2) / frontier(k, 1) for k in (50, 200)), 1.05, 1.15),
    ("07_sparsity", "two of $4096$ at $k = 50$", lambda: 4096 * frontier(50, 2, "dead_fraction"), 1.9, 2.1),
    ("07_sparsity", "from $0.0069$ to $0.0047$", lambda: frontier(50, 0), 0.00465, 0.00475),
    # 08_encoders
    ("08_encoders", "four thousand features rebuilt images no better than one thousand",
     lambda: min(frontier(k, 2) / frontier(k, 1) for k in KS), 0.995, 1.2),
    ("08_encoders", "In every stored dictionary OMP does better",
     lambda: min(gap(k, w) for k in KS for w in range(3)), 1.05, 2),
    ("08_encoders", "the more so the wider it is",
     lambda: min(gap(k, w + 1) / gap(k, w) for k in KS for w in range(2)), 1.02, 2),
    ("08_encoders", "Its own error falls with every width",
     lambda: max(searched(k, w + 1) / searched(k, w) for k in KS for w in range(2)), 0.5, 0.97),
    ("08_encoders", "from $0.0041$ to $0.0024$ and $0.0021$", lambda: searched(50, 0), 0.00405, 0.00415),
    ("08_encoders", "from $0.0041$ to $0.0024$ and $0.0021$", lambda: searched(50, 1), 0.00235, 0.00245),
    ("08_encoders", "from $0.0041$ to $0.0024$ and $0.0021$", lambda: searched(50, 2), 0.00205, 0.00215),
    ("08_encoders", "at $k = 50$: $1.1$, $1.5$ and $1.9$ times", lambda: gap(50, 0), 1.05, 1.15),
    ("08_encoders", "at $k = 50$: $1.1$, $1.5$ and $1.9$ times", lambda: gap(50, 1), 1.45, 1.55),
    ("08_encoders", "at $k = 50$: $1.1$, $1.5$ and $1.9$ times", lambda: gap(50, 2), 1.85, 1.95),
    ("08_encoders", "The map has $7$ % less error", lambda: rung(*MAP) / rung(*TIED), 0.925, 0.935),
    ("08_encoders", "rows of its own about as much",
     lambda: rung("untied", "untied, 10 epochs") / rung(*TIED), 0.91, 0.95),
    ("08_encoders", "Two refinements do no better",
     lambda: rung("refinement", "two refinements, 10 epochs") / rung(*MAP), 0.995, 1.02),
    ("08_encoders", "The pursuit has three quarters of the map's error",
     lambda: rung("pursuit", "pursuit, 10 epochs") / rung(*MAP), 0.73, 0.79),
    ("08_encoders", "both pursuits come close to OMP",
     lambda: rung("pursuit", "pursuit, 10 epochs") / rung("pursuit", "pursuit, 10 epochs", "mse_omp"), 1, 1.1),
    ("08_encoders", "Twice the epochs bring the map to $0.0126$ (training images: $0.0110$)",
     lambda: mean(rung(f"one_shot_{seed}", f"improved, 20 epochs, seed {seed}") for seed in (0, 1)), 0.01255, 0.01265),
    ("08_encoders", "Twice the epochs bring the map to $0.0126$ (training images: $0.0110$)",
     lambda: mean(rung(f"one_shot_{seed}", f"improved, 20 epochs, seed {seed}", "mse_train") for seed in (0, 1)),
     0.01095, 0.01105),
    ("08_encoders", "encoder map: $0.0129$ | tied: $0.0139$", lambda: rung(*MAP), 0.01285, 0.01295),
    ("08_encoders", "encoder map: $0.0129$ | tied: $0.0139$", lambda: rung(*TIED), 0.01385, 0.01395),
    ("08_encoders", "$0.0099$; values fitted, $0.0095$",
     lambda: rung("pursuit", "pursuit, 10 epochs"), 0.00985, 0.00995),
    ("08_encoders", "$0.0099$; values fitted, $0.0095$",
     lambda: rung("pursuit", "pursuit, values fitted, 10 epochs"), 0.00945, 0.00955),
    ("08_encoders", "tied: $0.0139$; OMP, the pursuit's dictionary: $0.0092$",
     lambda: rung("pursuit", "pursuit, 10 epochs", "mse_omp"), 0.00915, 0.00925),
    # A3_schedules
    ("A3_schedules", "A constant rate costs a seventh of the error", lambda: schedule("constant"), 1.12, 1.17),
    ("A3_schedules", "the two ways of falling differ by less than two seeds do",
     lambda: abs(schedule("late_root") - 1), 0, 0.01),
    ("A3_schedules", "linear from the start $4$ %, cosine $8$ % more error", lambda: schedule("linear"), 1.035, 1.045),
    ("A3_schedules", "linear from the start $4$ %, cosine $8$ % more error", lambda: schedule("cosine"), 1.075, 1.09),
    # 09_downstream_classification
    ("09_downstream_classification", "with three times as many features, by value, it makes a fifth fewer mistakes",
     lambda: probe("encoding", "by value, 75 kept") / probe("encoding", "by value, 25 kept: its own code"), 0.75, 0.83),
    ("09_downstream_classification", "an SAE's own code gives 2.3 % (stored)",
     lambda: probe("choice", "SAE with k = 50, its own code"), 0.0225, 0.0235),
    ("09_downstream_classification", "The best four are less than two s.e. apart.",
     lambda: max(probe("encoding", code, "difference") / probe("encoding", code, "se")
                 for code in ("soft, 400 kept", "by value, 75 kept", "all that are above 0")), 0, 2),
    ("09_downstream_classification", "with 200 softly it stays",
     lambda: probe("encoding", "soft, 200 kept") / probe("encoding", "by value, 25 kept: its own code"), 0.7, 0.8),
    ("09_downstream_classification", "With 200 by value most lie below zero, and the gain is gone",
     lambda: probe("encoding", "by value, 200 kept") / probe("encoding", "by value, 25 kept: its own code"),
     0.95, 1.05),
    ("09_downstream_classification", "a soft code reads better than the SAE's own (held-out) | 1.8 %",
     lambda: probe("training", "k = 25"), 0.0175, 0.0185),
    ("09_downstream_classification", "| own code 2.2 % |",
     lambda: probe("training", "k = 25", "own_code")["error"], 0.0215, 0.0225),
    ("09_downstream_classification", "rebuilds with a fifth of the error of $k = 25$",
     lambda: probe("training", "k = 100", "mse") / probe("training", "k = 25", "mse"), 0.18, 0.22),
    ("09_downstream_classification", "rebuilds images five times better than another may read them worse",
     lambda: probe("training", "k = 25", "mse") / probe("training", "k = 100", "mse"), 4.5, 5.5),
    ("09_downstream_classification", "misreads more, with either code",
     lambda: probe("training", "k = 100") / probe("training", "k = 25"), 1.3, 1.9),
    ("09_downstream_classification", "misreads more, with either code",
     lambda: probe("training", "k = 100", "own_code")["error"] / probe("training", "k = 25", "own_code")["error"],
     1.2, 1.6),
    ("09_downstream_classification", "With their own codes $k = 12$ and $k = 100$ read alike",
     lambda: probe("training", "k = 12", "own_code")["error"] / probe("training", "k = 100", "own_code")["error"],
     0.95, 1.05),
    ("09_downstream_classification", "$k = 12$ and $k = 50$ are less than two s.e. behind",
     lambda: max(probe("training", f"k = {k}", "difference") / probe("training", f"k = {k}", "se") for k in (12, 50)),
     0, 2),
    ("09_downstream_classification", "which differs in much, reads worse.",  # by more than two standard errors
     lambda: probe("training", "reference recipe, k = 25", "difference")
     / probe("training", "reference recipe, k = 25", "se"), 2, 5),
    ("09_downstream_classification", "$k = 100$ rebuilds better than $k = 25$, and reads worse (held-out) | 2.9 %",
     lambda: probe("training", "k = 100"), 0.0285, 0.0295),
    ("09_downstream_classification", "$k = 25$: 1.8 %",
     lambda: probe("training", "k = 25"), 0.0175, 0.0185),
    ("09_downstream_classification", "no better than random with one",
     lambda: probe("few", "features", "random features, soft code")["1"]["error"]
     - probe("few", "features", "member 0")["1"]["error"], -0.02, 0.06),
    ("09_downstream_classification", "4 % against 8 % with twenty",
     lambda: probe("few", "features", "member 0")["20"]["error"], 0.035, 0.045),
    ("09_downstream_classification", "4 % against 8 % with twenty",
     lambda: probe("few", "features", "random features, soft code")["20"]["error"], 0.075, 0.085),
    ("09_downstream_classification", "which images are labelled matters more than the features",
     lambda: (few("raw pixels", "1") - few("member 0", "1")) / pstdev(probe("few", "labels", "member 0")["1"]),
     -0.7, 0.7),
    ("09_downstream_classification", "learnt features make little more than half the pixels' mistakes",
     lambda: few("member 0", "100") / few("raw pixels", "100"), 0.5, 0.56),
    ("09_downstream_classification", "more than two thirds of the way from the pixels to one member",
     lambda: (probe("test", "raw pixels") - probe("test", "random features, soft code"))
     / (probe("test", "raw pixels") - mean(members())), 0.67, 0.72),
    ("09_downstream_classification", "make more than a quarter fewer mistakes than one on average",
     lambda: probe("test", "five members") / mean(members()), 0.68, 0.75),
    ("09_downstream_classification", "each step is larger than chance allows", lambda: max(
        uneven(a, b) for a, b in pairwise(
            ("raw pixels", "random features, soft code", "SAE with k = 50, its own code", "member 0", "five members"))
     ), 0, 0.001),
    ("09_downstream_classification", "five members, with five times the features, read better than one (test) | 1.26 %",
     lambda: probe("test", "five members"), 0.01255, 0.01265),
    ("09_downstream_classification", "| one, on average: 1.76 % |", lambda: mean(members()), 0.01755, 0.01765),
    ("09_downstream_classification", "Each of our members misreads more", lambda: min(members()), 0.0135, 0.02),
    ("09_downstream_classification", "the interval of all five holds both",
     lambda: probe("test", "five members", "low"), 0, 0.012),
    ("09_downstream_classification", "the interval of all five holds both",
     lambda: probe("test", "five members", "high"), 0.0135, 0.02),
    # 10_known_features
    ("10_known_features", "It falls with every feature more, to an eighth from $k = 2$ to $k = 24$",
     lambda: known("k", "independent, k = 24", "mse") / known("k", "independent, k = 2", "mse"), 0.11, 0.14),
    ("10_known_features", "It falls with every feature more",
     lambda: min(a - b for kind, ks in WORLDS
                 for a, b in pairwise(known("k", f"{kind}, k = {k}", "mse") for k in ks)), 0.001, 1),
    ("10_known_features", "MCC rises to $0.92$ near the true number",
     lambda: known("k", "independent, k = 8", "mcc"), 0.915, 0.925),
    ("10_known_features", "MCC rises to $0.92$ near the true number",
     lambda: max(known("k", f"independent, k = {k}", "mcc") for k in (2, 4, 12, 16, 24)), 0.85, 0.915),
    ("10_known_features", "with the smallest error, it is $0.74$",
     lambda: known("k", "independent, k = 24", "mcc"), 0.735, 0.745),
    ("10_known_features", "one in ten is found, not nine",
     lambda: known("k", "independent, k = 24", "found"), 0.07, 0.15),
    ("10_known_features", "one in ten is found, not nine",
     lambda: known("k", "independent, k = 8", "found"), 0.87, 0.93),
    ("10_known_features", "| $88$ to $92$ % in three worlds",
     lambda: known("k", "independent, k = 8", "found", min), 0.875, 0.885),
    ("10_known_features", "| $88$ to $92$ % in three worlds",
     lambda: known("k", "independent, k = 8", "found", max), 0.915, 0.925),
    ("10_known_features", "half the error of $k = 8$",
     lambda: known("k", "independent, k = 24", "mse") / known("k", "independent, k = 8", "mse"), 0.4, 0.52),
    ("10_known_features", "Correlation makes it harder at every $k$",
     lambda: min(known("k", f"independent, k = {k}", "mcc") - known("k", f"correlated, k = {k}", "mcc")
                 for k in (2, 4, 8, 16)), 0.02, 1),
    ("10_known_features", "independent worlds lose only six points of what is found",
     lambda: known("k", "independent, k = 8", "found") - known("k", "independent, k = 16", "found"), 0.055, 0.065),
    ("10_known_features", "of what is found (correlated: $13$)",
     lambda: known("k", "correlated, k = 8", "found") - known("k", "correlated, k = 16", "found"), 0.125, 0.139),
    ("10_known_features", "the search has over a quarter less error",
     lambda: 1 - known("pursuit", "pursuit, k = 8", "mse") / known("k", "independent, k = 8", "mse"), 0.25, 0.33),
    ("10_known_features", "finds $72$ % in place of",
     lambda: known("pursuit", "pursuit, k = 8", "found"), 0.705, 0.725),
    ("10_known_features", "in place of $90$ %", lambda: known("k", "independent, k = 8", "found"), 0.895, 0.905),
    ("10_known_features", "the one trained with the search $0.0146$",
     lambda: known("pursuit", "pursuit, k = 8", "mse", lambda of_worlds: of_worlds[0]), 0.01455, 0.01465),
    ("10_known_features", "the truth $0.0108$",
     lambda: known("pursuit", "true features, k = 8", "mse", lambda of_worlds: of_worlds[0]), 0.01075, 0.01085),
    ("10_known_features", "With the `reference` recipe $56$ % of the features are true",
     lambda: known("agreement", "reference, independent", "true"), 0.555, 0.565),
    ("10_known_features", "but $97$ % of those that another run shares",
     lambda: known("agreement", "reference, independent", "true_of_agreeing"), 0.965, 0.975),
    ("10_known_features", "and $18$ % of the others",
     lambda: known("agreement", "reference, independent", "true_of_others"), 0.175, 0.185),
    ("10_known_features", "With `improved`, and with correlated features, those shared are nearly as trustworthy",
     lambda: min(known("agreement", f"improved, {kind}", "true_of_agreeing") for kind in ("independent", "correlated")),
     0.92, 1),
    ("10_known_features", "with `improved` half of what only one run has is true",
     lambda: known("agreement", "improved, independent", "true_of_others"), 0.4, 0.6),
    ("10_known_features", "with weight $0.01$ $62$ % are found",
     lambda: known("consistency", "reference, 0.01", "found"), 0.613, 0.625),
    ("10_known_features", "in place of $56$ %, more in each stored world",
     lambda: known("consistency", "reference, 0", "found"), 0.555, 0.565),
    ("10_known_features", "more in each stored world",
     lambda: min(np.subtract(*(known("consistency", f"reference, {w}", "found", list) for w in ("0.01", "0")))),
     0.01, 1),
    ("10_known_features", "with weight $1$ no more than without",
     lambda: known("consistency", "reference, 1", "found") - known("consistency", "reference, 0", "found"), -0.1, 0.01),
    ("10_known_features", "The good recipe gains nothing",
     lambda: known("consistency", "improved, 0.1", "found") - known("consistency", "improved, 0", "found"), -0.01,
     0.01),
    ("10_known_features", "already at $0.01$, the weight of our recipes, a third of all features are wrong and agree",
     lambda: known("consistency", "reference, 0.01", "wrong_and_agreeing"), 0.3, 0.36),
    ("10_known_features", "already at $0.01$, the weight of our recipes",
     lambda: sae.RECIPES["reference"].consistency_weight, 0.01, 0.01),
    ("10_known_features", "at $0.1$ *all* agree",
     lambda: known("consistency", "reference, 0.1", "agree"), 1, 1),
    ("10_known_features", "all agree, $61$ % true",
     lambda: known("consistency", "reference, 0.1", "true_of_agreeing"), 0.6, 0.615),
    ("10_known_features", "apart: half agree, $96$ % of these true",
     lambda: known("consistency", "reference, 0", "agree"), 0.45, 0.55),
    ("10_known_features", "apart: half agree, $96$ % of these true",
     lambda: known("consistency", "reference, 0", "true_of_agreeing"), 0.955, 0.97),
    ("10_known_features", "the parent's fires for $44$ to $49$ % of samples with a child",
     lambda: known("absorption", "with their parent", "recall_with_child", min), 0.435, 0.445),
    ("10_known_features", "the parent's fires for $44$ to $49$ % of samples with a child",
     lambda: known("absorption", "with their parent", "recall_with_child", max), 0.485, 0.495),
    ("10_known_features", "(control: $70$ to $79$ %)",
     lambda: known("absorption", "on their own", "recall_with_child", min), 0.695, 0.705),
    ("10_known_features", "(control: $70$ to $79$ %)",
     lambda: known("absorption", "on their own", "recall_with_child", max), 0.785, 0.795),
    # reference_system, a page
    ("reference_system", "the trained system has $0.0049$",
     lambda: of("dead_features", "final", "reference, one member", "mse"), 0.00485, 0.00495),
    ("reference_system", "from $0.48$ to $0.973$",
     lambda: of("dead_features", "final", "reference, one member", "pearson"), 0.9725, 0.974),
    ("reference_system", "a third of the features die",
     lambda: of("dead_features", "final", "reference, one member", "dead_fraction"), 0.3, 0.37),
    ("reference_system", "within an ensemble they become copies",
     lambda: sae.stored_results("consistency")["weights"]["results"]["0.01"]["within"], 0.9, 1),
    ("reference_system", "between two ensembles with different seeds the loss adds next to nothing",
     lambda: sae.stored_results("consistency")["weights"]["results"]["0.01"]["between"]
     - sae.stored_results("consistency")["weights"]["results"]["0.0"]["between"], -0.03, 0.03),
    # 04_reinit_analysis
    ("04_reinit_analysis", "With moments at 0 a restart might as well not have been.",
     lambda: dead_share("dead features, moments at 0") / dead_share("none"), 0.9, 1.15),
    ("04_reinit_analysis", "With the moments of the others nearly three quarters of the dead remain",
     lambda: dead_share("dead features, moments of the others") / dead_share("none"), 0.7, 0.75),
    ("04_reinit_analysis", "a rate warmed up again leaves fewer",
     lambda: dead_share("dead features, moments at 0, rate warmed up again") / dead_share("none"), 0.5, 0.65),
    ("04_reinit_analysis", "at some cost in Pearson",
     lambda: dead_share("dead features, moments at 0, rate warmed up again", "pearson") - dead_share("none", "pearson"),
     -0.003, -0.001),
    ("04_reinit_analysis", "AuxK less than half", lambda: dead_share("AuxK") / dead_share("none"), 0.35, 0.5),
    ("04_reinit_analysis", "Most of the rare stay.",
     lambda: min(dead_share(label, "rare_fraction") for label in (
         "dead features, moments of the others", "dead features, moments at 0, rate warmed up again", "AuxK"))
     / dead_share("none", "rare_fraction"), 0.75, 1),
    ("04_reinit_analysis", "and so does the monitor at a lower threshold",
     lambda: dead_share("whole members: its monitor, threshold 35", "pearson") - dead_share("none", "pearson"),
     -0.006, -0.003),
    ("04_reinit_analysis", "None rebuilds clearly better.",
     lambda: max(run["pearson"] for runs in sae.stored_results("dead_features")["resampling"]["results"].values()
                 for run in runs) - dead_share("none", "pearson"), 0, 0.0009),
    ("04_reinit_analysis", "At images it does harm",
     lambda: dead_share("dead features, moments at 0, at images as Bricken et al. choose them", "pearson")
     - dead_share("none", "pearson"), -0.05, -0.01),
    ("04_reinit_analysis", "A restart of *rare* features halves them",
     lambda: dead_share("rare features, moments of the others", "rare_fraction")
     / dead_share("none", "rare_fraction"), 0.4, 0.6),
    ("04_reinit_analysis", "and costs correlation",
     lambda: dead_share("rare features, moments of the others", "pearson") - dead_share("none", "pearson"),
     -0.004, -0.001),
    ("04_reinit_analysis", "the floor, our next subject, leaves few",
     lambda: dead_share("selection floor 0.2", "rare_fraction"), 0, 0.03),
    ("04_reinit_analysis", "Subtracting the mean image brings nearly all features back, alone.",
     lambda: of("dead_features", "log", "+ mean image as decoder bias", "rare_fraction"), 0, 0.02),
    ("04_reinit_analysis", "A higher rate, its decay, one moment a row and the map rebuild better.",
     lambda: min(of("dead_features", "log", after, "pearson") - of("dead_features", "log", before, "pearson")
                 for before, after in LOG_STEPS), 0.001, 0.003),
    ("04_reinit_analysis", "Rate and moments make features rare again",
     lambda: min(rare_at(after) - rare_at(before) for before, after in LOG_STEPS[::2]), 0.04, 0.12),
    ("04_reinit_analysis", "decay and map halve those",
     lambda: max(rare_at(after) / rare_at(before) for before, after in LOG_STEPS[1::2]), 0.4, 0.6),
    ("04_reinit_analysis", "the floor removes the rest",
     lambda: of("dead_features", "log", "+ selection floor", "rare_fraction"), 0, 0.002),
    ("04_reinit_analysis", "In Pearson, floor and mean change no more than the next seed would.",
     lambda: max(abs(of("dead_features", "log", after, "pearson") - of("dead_features", "log", before, "pearson"))
                 for before, after in (("reference recipe", "+ mean image as decoder bias"),
                                       ("+ encoder map", "+ selection floor"))), 0, 0.001),
    # A4_monitor_and_widths
    ("A4_monitor_and_widths", "Over a whole training, too, the middle threshold cost correlation",
     lambda: dead_share("whole members: its monitor, threshold 35", "pearson") - dead_share("none", "pearson"),
     -0.006, -0.003),
    ("A4_monitor_and_widths", "the first row, the recipe itself, is the mean of three",
     lambda: len(sae.stored_results("dead_features")["log"]["results"]["+ learning rate 0.003 = improved"]), 3, 3),
    ("A4_monitor_and_widths", "With the floor hardly a feature is dead",
     lambda: max(of("dead_features", "law", label, "dead_fraction") for label in law()), 0, 0.02),
    ("A4_monitor_and_widths", "over half of the features stay below one in a thousand",
     lambda: of("dead_features", "law", "8,192 features", "rare_fraction"), 0.5, 0.65),
    ("A4_monitor_and_widths", "asks for a fifth of the mean use, there little more than one image in a thousand",
     lambda: 1000 * sae.RECIPES["improved"].selection_floor * 50 / 8192, 1.1, 1.3),
    ("A4_monitor_and_widths", "Nor is wider better here: Pearson is lower.",
     lambda: of("dead_features", "law", "8,192 features", "pearson")
     - of("dead_features", "log", "+ learning rate 0.003 = improved", "pearson"), -0.01, -0.001),
    ("A4_monitor_and_widths", "a little higher at the smallest $k$", lambda: bought_by_floor(10), 0.0005, 0.003),
    ("A4_monitor_and_widths", "hardly lower at the largest", lambda: bought_by_floor(200), -0.0003, 0),
    ("A4_monitor_and_widths", "| the widest: few dead, 56 % rare |",
     lambda: of("dead_features", "law", "8,192 features", "dead_fraction"), 0.001, 0.03),
    ("A4_monitor_and_widths", "| the widest: few dead, 56 % rare |",
     lambda: of("dead_features", "law", "8,192 features", "rare_fraction"), 0.555, 0.565),
    ("A4_monitor_and_widths", "| the recipe's width: none;",
     lambda: of("dead_features", "log", "+ learning rate 0.003 = improved", "rare_fraction"), 0, 0.0005),
    ("A4_monitor_and_widths", "next to no feature is rare",
     lambda: of("dead_features", "ensemble", "improved", "rare_fraction"), 0, 0.005),
    ("A4_monitor_and_widths", "lets the members part a little", lambda: falls("matched_cosine"), -0.05, -0.005),
]  # fmt: skip


@pytest.mark.parametrize(("notebook", "words", "value", "low", "high"), NUMBERS)
def test_prose_says_what_the_stored_file_says(notebook, words, value, low, high):
    prose = " ".join(prose_of(PATHS[notebook]).split())
    assert words in prose
    assert low <= value() <= high, f"{words!r}: the file says {value()}"
