"""How good are sparse codes as features? Linear classifiers on them.

    python benchmarks/downstream.py [training] [encoding] [choice] [few_choice] [test] [few]

Without a name all parts run, one after the other (under half an hour on one CPU core). The
first four choose: autoencoders are trained, and classifiers fitted, on training images 0 to
49,999, and compared on 50,000 to 59,999. The last two, `test` and `few`, change nothing any
more: they train on all training images with what `choice` and `few_choice` found, and they
alone look at the test images. Each part prints a line for each result and replaces its part of
benchmarks/results/downstream.json; notebook 09 shows that file.
"""

import json
import sys
import warnings
from dataclasses import replace

import numpy as np
import sklearn
import torch
import torch.nn.functional as F
from common import CHOOSE_ON, RESULTS, main
from scipy.sparse import csr_matrix
from scipy.stats import binomtest
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

import sae_helpers as sae

K, KEPT = 25, 200  # in training, and when encoding for the classifier: what `training` and `encoding` led to
KS = (12, 25, 50, 100)  # in training, to choose K
STRENGTHS = (1e-4, 3e-5)  # of the penalty on the classifier, against a loss averaged over images
PLAIN = replace(sae.RECIPES["improved"], consistency_weight=0.0, n_members=1)
FIVE = replace(PLAIN, n_members=5, k=K)
REFERENCE = replace(sae.RECIPES["reference"], consistency_weight=0.0, n_members=1, k=K)
MODELS = {}


def train(recipe, x):
    return sae.Trainer(recipe, x).run(progress=False).model


def trained(data, recipe, on_all=False):
    """A trained model; parts that need the same one share it. Without `on_all` it never saw the held-out images."""
    if (recipe, on_all) not in MODELS:
        MODELS[recipe, on_all] = train(recipe, data.train if on_all else data.train[:CHOOSE_ON])
    return MODELS[recipe, on_all]


# ---- codes ------------------------------------------------------------------------------


@torch.no_grad()
def pre_activations(model, m, x):
    """What `model.pre_activations` gives for member m, without computing the others, [n, d_sae]."""
    y = x - model.b_dec[m]
    return torch.addmm(model.b_enc[m], y if model.A is None else y @ model.A[0], model.W[m].T)


def hard(pre, n):
    """The n largest, by value; the others become 0."""
    values, indices = pre.topk(n)
    return torch.zeros_like(pre).scatter_(1, indices, values)


def soft(pre, n):
    """How far each of the n largest lies above the next one; the others become 0."""
    return (pre - pre.topk(n + 1).values[:, -1:]).relu_()


def codes(model, x, members, n=KEPT, encode=soft):
    """Codes of several members side by side, [n_images, d_sae · members]."""
    total = torch.empty(len(x), model.d_sae * len(members))
    for images, rows in zip(x.split(5000), total.split(5000)):
        for m, place in zip(members, rows.split(model.d_sae, dim=1)):
            place.copy_(encode(pre_activations(model, m, images), n))
    return total


def scaled(features, fit):
    """One number for all features, so that a penalty means the same everywhere: mean squared length 9."""
    return features.mul_(3 / features[:fit].square().sum(1).mean().sqrt())


# ---- classifiers ------------------------------------------------------------------------


def support_vectors(features, labels, strength):
    """Scikit-learn's linear SVM: squared hinge, one digit against the rest; penalty strength / 2 · ‖weights‖².

    Codes are mostly zeros, which its dual solver makes use of.
    """
    C, few = 1 / (strength * len(features)), features.shape[1] < 1000
    model = LinearSVC(C=C, dual=not few, tol=0.01, max_iter=500, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # `iterations` is stored
        return model.fit(csr_matrix(features.numpy()), labels.numpy())


def logistic(features, labels, strength):
    """Scikit-learn's logistic regression with the same penalty."""
    model = LogisticRegression(C=1 / (strength * len(features)), max_iter=200, tol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(features.numpy(), labels.numpy())


def interval(wrong, n):
    """Error with its 95 % confidence interval (Wilson)."""
    low, high = binomtest(int(wrong), n).proportion_ci(method="wilson")
    return {"error": int(wrong) / n, "low": float(low), "high": float(high)}


# ---- what choosing looks at -------------------------------------------------------------


def held_out(data, features):
    """What the SVM, fitted on the first 50,000 training images, reads in the others, at its best strength, and that."""
    features, truth, found = scaled(features, CHOOSE_ON), data.train_labels[CHOOSE_ON:], []
    for strength in STRENGTHS:
        model = support_vectors(features[:CHOOSE_ON], data.train_labels[:CHOOSE_ON], strength)
        read = torch.from_numpy(model.predict(features[CHOOSE_ON:].numpy()))
        found.append(((read != truth).sum().item(), read, strength))
    return min(found, key=lambda one: one[0])[1:]


def row(data, name, read, base=None, **more):
    """Error of one setting, mean over its members; against `base` with the standard error of the difference."""
    truth = data.train_labels[CHOOSE_ON:]
    wrong = (torch.stack(read) != truth).double()  # [members, n_held]
    result = {"error": wrong.mean().item(), "members": wrong.mean(1).tolist(), **more}
    text = f"{name:44} {100 * result['error']:.2f} %"
    if base is not None:
        # Both misread mostly the same images: the difference is far surer than either error.
        difference = wrong.mean(0) - (torch.stack(base) != truth).double().mean(0)
        result["difference"] = difference.mean().item()
        result["se"] = (difference.std() / len(difference) ** 0.5).item()
        text += f"  {100 * result['difference']:+.2f} ± {100 * result['se']:.2f}"
    print(text, flush=True)
    return result


def training(data):
    """The code stays the same, the autoencoder changes, one member each; and each one's own code."""
    recipes = {f"k = {k}": replace(PLAIN, k=k) for k in (K, *KS)} | {f"reference recipe, k = {K}": REFERENCE}
    mean, rows, base = data.train[:CHOOSE_ON].mean(0), {}, None
    for name, recipe in recipes.items():
        model = trained(data, recipe)
        quality = sae.evaluate(model, data.train[CHOOSE_ON:], mean)
        more = {key: quality[key].item() for key in ("mse", "pearson", "dead_fraction", "rare_fraction")}
        read, own = (
            held_out(data, codes(model, data.train, [0], n, encode))[0] for n, encode in ((KEPT, soft), (model.k, hard))
        )
        rows[name] = row(data, name, [read], base, **more)
        rows[name]["own_code"] = row(data, f"{name}: its own code", [own], [read])
        base = base or [read]
    return rows


def encoding(data):
    """The autoencoder stays the same, the code changes; two members."""
    model, rows, base = trained(data, FIVE), {}, None
    for name, encode, n in (
        (f"soft, {KEPT} kept", soft, KEPT),
        ("soft, 50 kept", soft, 50),
        ("soft, 400 kept", soft, 400),
        (f"by value, {K} kept: its own code", hard, K),
        ("by value, 75 kept", hard, 75),
        (f"by value, {KEPT} kept", hard, KEPT),
        ("all that are above 0", lambda pre, n: pre.relu(), 0),
    ):
        read = [held_out(data, codes(model, data.train, [m], n, encode))[0] for m in (0, 1)]
        rows[name] = row(data, name, read, base)
        base = base or read
    return rows


# ---- chosen, then tested once -----------------------------------------------------------


def principal_components(x, fit, n=50):
    """Coefficients of the first n principal components of the first `fit` images."""
    centred = x - x[:fit].mean(0)
    _, directions = torch.linalg.eigh(centred[:fit].T @ centred[:fit])
    return centred @ directions.flip(1)[:, :n]


def representations(data, on_all=False):
    """What is compared, by name, each a function that gives its features: of the training images, or of the test's too.

    What is learned without labels (components, autoencoders) comes from all training images
    with `on_all`, else from the first 50,000.
    """
    x = torch.cat([data.train, data.test]) if on_all else data.train
    fit = len(data.train) if on_all else CHOOSE_ON
    untrained = sae.TopKSAE(x.shape[1], PLAIN.d_sae, PLAIN.k, b_dec=x[:fit].mean(0))
    return {
        "raw pixels": lambda: x.clone(),
        "PCA, 50 components": lambda: principal_components(x, fit),
        "untrained SAE, its own code": lambda: codes(untrained, x, [0], PLAIN.k, hard),
        "random features, soft code": lambda: codes(untrained, x, [0]),
        "SAE with k = 50, its own code": lambda: codes(trained(data, PLAIN, on_all), x, [0], PLAIN.k, hard),
        **{f"member {m}": lambda m=m: codes(trained(data, FIVE, on_all), x, [m]) for m in range(5)},
        "five members": lambda: codes(trained(data, FIVE, on_all), x, range(5)),
    }


def choice(data):
    """The strength of the penalty for each representation; and what five members give, by a vote and side by side."""
    read, rows = {}, {}
    for name, features in representations(data).items():
        read[name], strength = held_out(data, features())
        rows[name] = row(data, name, [read[name]], strength=strength)
    single = [read[f"member {m}"] for m in range(5)]
    votes = F.one_hot(torch.stack(single), 10).sum(0).argmax(1)  # of equal votes, the smallest digit
    rows["mean of five"] = row(data, "mean of five", single)
    rows["vote of five"] = row(data, "vote of five", [votes], single)
    rows["five members"] |= row(data, "five members", [read["five members"]], single)
    return rows


def stored(part):
    """What an earlier part found."""
    return json.loads((RESULTS / "downstream.json").read_text())[part]["results"]["rows"]


def test(data):
    """The SVM, fitted on all training images; the test images, for the only time."""
    chosen, rows, n = stored("choice"), {}, len(data.train)
    for name, features in representations(data, on_all=True).items():
        features, strength = scaled(features(), n), chosen[name]["strength"]
        model = support_vectors(features[:n], data.train_labels, strength)
        predicted = torch.from_numpy(model.predict(features[n:].numpy()))
        wrong = (predicted != data.test_labels).nonzero()[:, 0]
        rows[name] = {
            **interval(len(wrong), len(data.test)),
            "features": features.shape[1],
            "strength": strength,
            "iterations": int(np.max(model.n_iter_)),
            # The test image, its digit, and what it was taken for.
            "misread": [[i, data.test_labels[i].item(), predicted[i].item()] for i in wrong.tolist()],
        }
        print(f"{name:36} {100 * rows[name]['error']:.2f} %  {rows[name]['iterations']} iterations", flush=True)
    return rows


# ---- few labels, few features -----------------------------------------------------------

FEW = ("raw pixels", "PCA, 50 components", "random features, soft code", "member 0")
DRAWS = {1: 20, 10: 10, 100: 5}  # labels for each digit: how many draws
FEW_STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4)
PER_CLASS = (1, 5, 20)


def draw(labels, n, seed):
    """Indices of n images of each digit."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    return torch.cat([order[labels[order] == digit][:n] for digit in range(10)])


def with_few_labels(features, labels, fit, n, strength, seeds):
    """Errors on the images from `fit` on, of classifiers that saw n labels for each digit; one for each seed."""
    errors = []
    for seed in seeds:
        chosen = draw(labels[:fit], n, seed)
        model = logistic(features[chosen], labels[chosen], strength)
        errors.append((model.predict(features[fit:].numpy()) != labels[fit:].numpy()).mean())
    return [float(error) for error in errors]


def standardised(features, fit):
    """Mean 0 and variance 1 on the first `fit` images; what hardly ever varies becomes 0."""
    std = features[:fit].std(0)
    return (features - features[:fit].mean(0)) / std.where(std > 1e-3, torch.inf)


def best_together(features, labels, n):
    """For each digit n features, each the one most correlated with what those before leave unexplained, [10, n].

    Orthogonal matching pursuit, with the digit's label as the signal.
    """
    targets = F.one_hot(labels, 10).float()
    gram = (features.T @ features / len(features)).double()
    alone = (features.T @ (targets - targets.mean(0)) / len(features)).double()
    result = []
    for digit in range(10):
        chosen, left = [], alone[:, digit].clone()
        for _ in range(n):
            left[chosen] = 0
            chosen.append(left.abs().argmax().item())
            weights = torch.linalg.lstsq(gram[chosen][:, chosen], alone[chosen, digit, None]).solution
            left = alone[:, digit] - (gram[:, chosen] @ weights)[:, 0]
        result.append(chosen)
    return torch.tensor(result)


def with_few_features(features, labels, fit, strength=1e-5):
    """Errors on the images from `fit` on with the best features of each digit, by how many: as a dict."""
    features = standardised(features, fit)
    best, errors = best_together(features[:fit], labels[:fit], max(PER_CLASS)), {}
    for n in PER_CLASS:
        chosen = best[:, :n].unique()
        model = logistic(features[:fit, chosen], labels[:fit], strength)
        wrong = (model.predict(features[fit:, chosen].numpy()) != labels[fit:].numpy()).sum()
        errors[n] = {**interval(wrong, len(features) - fit), "features": len(chosen)}
    return errors


def few_choice(data):
    """The penalty, for few labels."""
    rows, every = {}, representations(data)
    for name in FEW:
        features = scaled(every[name](), CHOOSE_ON)
        for n in DRAWS:
            errors = {
                strength: np.mean(with_few_labels(features, data.train_labels, CHOOSE_ON, n, strength, range(2)))
                for strength in FEW_STRENGTHS
            }
            best = min(errors, key=errors.get)
            rows[f"{name}: {n}"] = {"strength": best, "error": float(errors[best])}
            print(f"{name}, {n} labels: {rows[f'{name}: {n}']}", flush=True)
    return rows


def few(data):
    """Few labels (penalty from `few_choice`) and few features, on the test images."""
    chosen, n_train, every = stored("few_choice"), len(data.train), representations(data, on_all=True)
    truth = torch.cat([data.train_labels, data.test_labels])
    by_labels, by_features = {}, {}
    for name in FEW:
        features = every[name]()
        by_features[name] = with_few_features(features, truth, n_train)
        print(name, {n: round(100 * e["error"], 2) for n, e in by_features[name].items()}, flush=True)
        features, by_labels[name] = scaled(features, n_train), {}
        for n, draws in DRAWS.items():
            strength = chosen[f"{name}: {n}"]["strength"]
            errors = with_few_labels(features, truth, n_train, n, strength, range(100, 100 + draws))
            by_labels[name][n] = errors
            print(f"{name}, {n} labels: {100 * np.mean(errors):.2f} ± {100 * np.std(errors):.2f} %", flush=True)
    return {"labels": by_labels, "features": by_features}


def with_version(part):
    """What a part found, with the version of what fitted the classifiers."""
    return lambda data: {"scikit_learn": sklearn.__version__, "rows": part(data)}


PARTS = {part.__name__: with_version(part) for part in (training, encoding, choice, few_choice, test, few)}

if __name__ == "__main__":
    main("downstream", PARTS, sys.argv[1:])
