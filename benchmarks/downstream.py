"""How good are sparse codes as features? Linear classifiers on them.

    python benchmarks/downstream.py [encoding] [training] [members] [choice] [few_choice] [test] [few]

Without a name all parts run, one after the other (about half an hour on two CPU cores). The
first five choose: autoencoders are trained, and classifiers fitted, on the first five sixths
of the training images (0-49,999), and compared on the last sixth (50,000-59,999). The last
two, `test` and `few`, change nothing any more: they train on all training images with what
`choice` and `few_choice` found, and they alone look at the test images. Each part prints a
line for each result and replaces its part of benchmarks/results/downstream.json; notebook 07
shows that file.
"""

import json
import sys
import time
import warnings
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from common import FORMER, RESULTS, main
from scipy.sparse import csr_matrix
from scipy.stats import binomtest
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

import sae_helpers as sae

IMPROVED = replace(FORMER, consistency_weight=0.0)
REFERENCE = replace(sae.RECIPES["reference"], consistency_weight=0.0)
K, KEPT = 25, 150  # in training, and when encoding for the classifier: what `encoding` and `training` led to
KS = (10, 15, 25, 50, 100)  # in training, to choose K
STRENGTHS = (3e-4, 1e-4, 3e-5, 1e-5)  # of the penalty, against a loss averaged over images


def train(recipe, x, trainer=sae.Trainer):
    return trainer(recipe, x).run(progress=False).model


# ---- codes ------------------------------------------------------------------------------


@torch.no_grad()
def pre_activations(model, m, x):
    """(x - b_dec) Wᵀ + b_enc of member m, [n, d_sae]; where the model has a ReLU, no less than 0."""
    parts = [torch.addmm(model.b_enc[m], part - model.b_dec[m], model.W[m].T) for part in x.split(5000)]
    return torch.cat(parts).relu_() if model.relu else torch.cat(parts)


def hard(pre, n):
    """The n largest, by value; the others become 0."""
    values, indices = pre.topk(n)
    return torch.zeros_like(pre).scatter_(1, indices, values)


def soft(pre, n):
    """How far each of the n largest lies above the next one; the others become 0."""
    return (pre - pre.topk(n + 1).values[:, -1:]).relu_()


def lifetime(pre, share, fit):
    """How far each lies above a threshold of its feature's own, which `share` of the first `fit` images exceed."""
    return (pre - torch.quantile(pre[: min(fit, 20_000)], 1 - share, dim=0)).relu_()


def codes(model, x, members, n=KEPT, encode=soft):
    """Codes of several members side by side, [n_images, d_sae · members]."""
    total = torch.empty(len(x), model.d_sae * len(members))
    for place, m in zip(total.split(model.d_sae, dim=1), members):
        place.copy_(encode(pre_activations(model, m, x), n))
    return total


def scaled(features, fit):
    """One number for all features, so that a penalty means the same everywhere: mean squared length 9."""
    return features.mul_(3 / features[:fit].square().sum(1).mean().sqrt())


# ---- classifiers ------------------------------------------------------------------------


def side_by_side(features, labels, fit, strengths=STRENGTHS, loss="logistic", epochs=10, seed=0):
    """Linear classifiers, one for each strength of the penalty, fitted on the first `fit` images at once.

    The loss (`logistic`, over the ten classes; or `squared hinge`, one class against the
    rest) is averaged over images; the penalty is strength / 2 · ‖weights‖². Minimised by
    Adam with a falling rate, which for many strengths is far quicker than one exact fit
    for each. Returns the digits predicted for the other images, [strengths, n - fit].
    """
    n_classes, n, batch = 10, len(strengths), 500
    weights, bias = torch.zeros(features.shape[1], n_classes * n), torch.zeros(n_classes * n)
    adam = torch.optim.Adam([weights, bias], lr=0.03, betas=(0.9, 0.995), fused=True)
    penalty = torch.tensor(strengths).repeat_interleave(n_classes)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(fit, generator=generator)[: fit // batch * batch] for _ in range(epochs)])
    steps = order.view(-1, batch)
    for step, chosen in enumerate(steps):
        x, target = features[chosen], F.one_hot(labels[chosen], n_classes).float()
        scores = (x @ weights + bias).view(batch, n, n_classes)
        if loss == "logistic":
            slope = scores.softmax(-1) - target[:, None]
        else:
            sign = 2 * target[:, None] - 1
            slope = -2 * sign * (1 - sign * scores).relu()
        slope = slope.flatten(1) / batch
        weights.grad, bias.grad = (x.T @ slope).addcmul_(penalty, weights), slope.sum(0)
        adam.param_groups[0]["lr"] = 0.03 * min(1, (step + 1) / 50) * (1 - step / len(steps))
        adam.step()
    scores = (features[fit:] @ weights + bias).view(-1, n, n_classes)
    return scores.argmax(-1).T


def logistic(features, labels, strength, max_iter=300):
    """Scikit-learn's logistic regression with the same penalty."""
    model = LogisticRegression(C=1 / (strength * len(features)), max_iter=max_iter, tol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # `iterations` is stored
        return model.fit(features.numpy(), labels.numpy())


def support_vectors(features, labels, strength):
    """Scikit-learn's linear SVM: squared hinge, one digit against the rest, the same penalty.

    Codes are mostly zeros, which its dual solver makes use of.
    """
    C, few = 1 / (strength * len(features)), features.shape[1] < 1000
    model = LinearSVC(C=C, dual=not few, tol=0.01, max_iter=500, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # `iterations` is stored
        return model.fit(csr_matrix(features.numpy()), labels.numpy())


def interval(wrong, n):
    """Error with its 95 % confidence interval (Wilson)."""
    low, high = binomtest(int(wrong), n).proportion_ci(method="wilson")
    return {"error": int(wrong) / n, "low": float(low), "high": float(high)}


# ---- what choosing looks at -------------------------------------------------------------


def n_fit(data):
    """How many training images are fitted on while choosing: five sixths, 50,000 of MNIST."""
    return len(data.train) * 5 // 6


MODELS = {}


def trained(data, recipe, on_all=False, trainer=sae.Trainer):
    """A trained model; parts that need the same one share it. Without `on_all` it never saw the last sixth."""
    key = recipe, on_all, trainer
    if key not in MODELS:
        MODELS[key] = train(recipe, data.train if on_all else data.train[: n_fit(data)], trainer)
    return MODELS[key]


def held_out(data, features, **settings):
    """Whether each held-out image is misread, at the best strength of the penalty: [n_held] and that strength."""
    fit, strengths = n_fit(data), settings.pop("strengths", STRENGTHS)
    predicted = side_by_side(scaled(features, fit), data.train_labels, fit, strengths, **settings)
    wrong = predicted != data.train_labels[fit:]
    best = wrong.double().mean(1).argmin()
    return wrong[best], strengths[best]


def row(name, wrongs, base=None, **more):
    """Error of one setting, mean over the members; against `base` with the standard error of the difference."""
    wrongs = torch.stack(list(wrongs)).double()  # [members, n_held]
    result = {"error": wrongs.mean().item(), "members": wrongs.mean(1).tolist(), **more}
    text = f"{name:52} {100 * result['error']:.2f} %"
    if base is not None:
        # Both misread mostly the same images: the difference is far surer than either error.
        difference = wrongs.mean(0) - torch.stack(list(base)).double().mean(0)
        result["difference"] = difference.mean().item()
        result["se"] = (difference.std() / len(difference) ** 0.5).item()
        text += f"  {100 * result['difference']:+.2f} ± {100 * result['se']:.2f}"
    print(text, flush=True)
    return result


FIVE = replace(IMPROVED, k=K)
TWO = (0, 1)


def encoding(data):
    """The autoencoder stays the same, the code changes; two members."""
    model = trained(data, FIVE)

    def wrongs(encode, n, change=lambda features: features, **settings):
        return [held_out(data, change(codes(model, data.train, [m], n, encode)), **settings)[0] for m in TWO]

    base = wrongs(soft, KEPT)
    rows = {f"soft, {KEPT} kept": row("soft", base)}
    kept = {
        **{f"by value, {n} kept": (hard, n) for n in (K, 50, 100, KEPT, 300)},
        **{f"soft, {n} kept": (soft, n) for n in (K, 50, 100, 200, 300, 500)},
        "soft, each feature for 10 % of the images": (lambda pre, share: lifetime(pre, share, n_fit(data)), 0.1),
        "all that are above 0": (lambda pre, n: pre.relu(), 0),
        "all pre-activations": (lambda pre, n: pre, 0),
    }
    scalings = {
        "every code of length 1": lambda f: F.normalize(f, dim=1),
        "square root": torch.sqrt,
        "every feature of variance 1": lambda f: f.div_(f[: n_fit(data)].std(0).clamp_min(1e-3)),
        "every feature of maximum 1": lambda f: f.div_(f[: n_fit(data)].amax(0).clamp_min(1e-3)),
    }
    for name, (encode, n) in kept.items():
        rows[name] = row(name, wrongs(encode, n), base)
    for name, change in scalings.items():
        rows[name] = row(name, wrongs(soft, KEPT, change), base)
    name = "squared hinge in place of the logistic loss"
    rows[name] = row(name, wrongs(soft, KEPT, loss="squared hinge"), base)
    return rows


class WinnerTakeAll(sae.Trainer):
    """Lifetime sparsity after Makhzani & Frey 2015: a feature keeps its largest 5 % within a batch; no top k."""

    share = 0.05

    def update(self, x):
        model = self.model
        pre = torch.baddbmm(model.b_enc[:, None], x - model.b_dec[:, None], model.W.transpose(1, 2)).relu()
        kept = pre >= pre.topk(max(1, round(self.share * len(x))), dim=1).values[:, -1:]
        values = pre * kept  # [M, B, d_sae]
        x_hat = torch.bmm(values, F.normalize(model.W, dim=-1)) + model.b_dec[:, None]
        fires = (values > 0).sum(1)
        self.fires += fires
        model.zero_grad()
        self.losses(x, x_hat).sum().backward()
        for m, part in enumerate(self.parts):
            for name, view in part.items():
                view.grad = getattr(model, name).grad[m]
        self.optimizer.step()
        return x_hat.detach(), fires, torch.zeros(())


def training(data):
    """The code stays the same, the autoencoder changes; each one's own code beside it. Two members, where not noted."""
    sweeps = [trained(data, replace(IMPROVED, n_members=len(KS), k=KS, seed=seed)) for seed in (0, 1)]
    sources = {f"k = {k}": [(sweep, m) for sweep in sweeps] for m, k in enumerate(KS)}
    one = replace(FIVE, n_members=1)
    reference = trained(data, replace(REFERENCE, n_members=2, k=(K, 50)))
    sources |= {
        "reference recipe, k = 50 (one member)": [(reference, 1)],
        f"reference recipe, k = {K} (one member)": [(reference, 0)],
        f"k = {K}, consistency loss": [(trained(data, replace(FIVE, consistency_weight=0.01)), m) for m in TWO],
        f"k = {K}, 20 epochs (one member)": [(trained(data, replace(one, epochs=20)), 0)],
        "lifetime sparsity 5 %, no top k (one member)": [
            # Once trained, its code is all that lies above 0.
            (trained(data, replace(one, reinit="none", k=one.d_sae, relu=True), trainer=WinnerTakeAll), 0)
        ],
        **{
            f"k = {K}, {width:,} features (one member)": [(trained(data, replace(one, d_sae=width)), 0)]
            for width in (2048, 4096)
        },
    }

    def wrongs(sources, encode, n=None):
        result = []
        for model, m in sources:
            k = sae.per_member("k", model.k, model.n_members)[m]
            kept = n or k
            features = codes(model, data.train, [m], round(kept * model.d_sae / 1024) if n else kept, encode)
            result.append(held_out(data, features)[0])
        return result

    base = wrongs(sources[f"k = {K}"], soft, KEPT)
    mean = data.train[: n_fit(data)].mean(0)
    rows = {}
    for name, of in sources.items():
        compared = base[:1] if len(of) == 1 else base
        quality = [sae.evaluate(model, data.train[n_fit(data) :], mean) for model, _ in of]
        more = {
            key: float(np.mean([q[key][m].item() for q, (_, m) in zip(quality, of)]))
            for key in ("mse", "pearson", "dead_fraction")
        }
        rows[name] = row(name, base if of is sources[f"k = {K}"] else wrongs(of, soft, KEPT), compared, **more)
        rows[name]["own_code"] = row(f"{name}: its own code", wrongs(of, hard))
    return rows


def members(data):
    """Codes of one and of five members side by side, with and without the consistency loss; and the members' vote."""
    ensembles = {"independent": FIVE, "consistency loss": replace(FIVE, consistency_weight=0.01)}
    fit, rows = n_fit(data), {}
    truth = data.train_labels[fit:]

    def read(features):
        features = scaled(features, fit)
        classifier = support_vectors(features[:fit], data.train_labels[:fit], 1e-4)
        return torch.from_numpy(classifier.predict(features[fit:].numpy()))

    for name, recipe in ensembles.items():
        model = trained(data, recipe)
        single = torch.stack([read(codes(model, data.train, [m])) for m in range(5)])
        votes = F.one_hot(single, 10).sum(0).argmax(1)  # of equal votes, the smallest digit
        together = read(codes(model, data.train, range(5)))
        rows[name] = {
            "matched_cosine": sae.matched_cosine(model.features()),
            "alone": row(f"{name}: one member", single != truth),
            "vote": row(f"{name}: vote of five", [votes != truth], single != truth),
            "together": row(f"{name}: five members", [together != truth], single != truth),
        }
    return rows


# ---- chosen, then tested once -----------------------------------------------------------


def principal_components(x, fit, n=50):
    """Coefficients of the first n principal components of the first `fit` images."""
    mean = x[:fit].mean(0)
    centred = x - mean
    _, directions = torch.linalg.eigh(centred[:fit].T @ centred[:fit])
    return centred @ directions.flip(1)[:, :n]


def untrained(data, on_all):
    """Orthogonal weights that were never trained, with the decoder bias at the mean image."""
    mean = (data.train if on_all else data.train[: n_fit(data)]).mean(0)
    return sae.TopKSAE(data.train.shape[1], 1024, K, b_dec=mean)


def representations(data, on_all=False):
    """Name and features of what is compared, one at a time: of the training images, with `on_all` also of the test's.

    What is learned without labels (components, autoencoders) comes from all training images
    with `on_all`, else from the first five sixths.
    """
    x = torch.cat([data.train, data.test]) if on_all else data.train
    fit = len(data.train) if on_all else n_fit(data)
    plain = replace(IMPROVED, n_members=1)
    yield "raw pixels", x.clone()
    yield "PCA, 50 components", principal_components(x, fit)
    for n in (50, KEPT):
        yield f"random features, soft, {n} kept", codes(untrained(data, on_all), x, [0], n)
    yield (
        "reference recipe, its own code",
        codes(trained(data, replace(REFERENCE, n_members=1), on_all), x, [0], 50, hard),
    )
    yield "improved recipe, its own code", codes(trained(data, plain, on_all), x, [0], plain.k, hard)
    independent = trained(data, FIVE, on_all)
    for m in range(3) if on_all else (0,):  # one is enough to choose by
        yield f"one member ({m})", codes(independent, x, [m])
    yield "five members", codes(independent, x, range(5))


def choice(data):
    """The strength of the penalty for each representation, for scikit-learn's linear SVM."""
    fit, rows = n_fit(data), {}
    for name, features in representations(data):
        features, errors = scaled(features, fit), {}
        for strength in (1e-4, 3e-5):
            classifier = support_vectors(features[:fit], data.train_labels[:fit], strength)
            predicted = classifier.predict(features[fit:].numpy())
            errors[strength] = float((predicted != data.train_labels[fit:].numpy()).mean())
        rows[name] = {"error": min(errors.values()), "strength": min(errors, key=errors.get)}
        print(f"{name}: {errors}", flush=True)
    return rows


def stored(part):
    """What an earlier part found."""
    return json.loads((RESULTS / "downstream.json").read_text())[part]["results"]


def test(data):
    """Scikit-learn's linear SVM, fitted on all training images; the test images, for the only time."""
    chosen, rows, n = stored("choice"), {}, len(data.train)
    better = min((name for name in chosen if name.startswith("random")), key=lambda name: chosen[name]["error"])
    for name, features in representations(data, on_all=True):
        if name.startswith("random") and name != better:
            continue
        began = time.perf_counter()
        features = scaled(features, n)
        strength = chosen["one member (0)" if name.startswith("one member") else name]["strength"]
        model = support_vectors(features[:n], data.train_labels, strength)
        predicted = torch.from_numpy(model.predict(features[n:].numpy()))
        wrong = (predicted != data.test_labels).nonzero()[:, 0]
        rows[name] = {
            **interval(len(wrong), len(data.test)),
            "features": features.shape[1],
            "mean_active": (features[n:] != 0).double().sum(1).mean().item(),
            "strength": strength,
            "iterations": int(np.max(model.n_iter_)),
            "seconds": time.perf_counter() - began,
            # The test image, its digit, and what it was taken for.
            "misread": [[i, data.test_labels[i].item(), predicted[i].item()] for i in wrong.tolist()],
        }
        print(f"{name:36} {100 * rows[name]['error']:.2f} %  {rows[name]['iterations']} iterations", flush=True)
    return rows


# ---- few labels, few features -----------------------------------------------------------

FEW = ("raw pixels", "PCA, 50 components", f"random features, soft, {KEPT} kept", "one member (0)", "five members")
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


def best_alone(features, labels, n):
    """For each digit the n features whose own correlation with it is largest, [10, n]."""
    targets = F.one_hot(labels, 10).float()
    correlation = features.T @ (targets - targets.mean(0)) / targets.std(0)
    return correlation.abs().topk(n, dim=0).indices.T


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


def with_few_features(features, labels, fit, choose, strength=1e-5):
    """Errors on the images from `fit` on with the best features of each digit, by how many: as a dict."""
    features = standardised(features, fit)
    errors = {}
    for n in PER_CLASS:
        chosen = choose(features[:fit], labels[:fit], n).unique()
        model = logistic(features[:fit, chosen], labels[:fit], strength)
        wrong = (model.predict(features[fit:, chosen].numpy()) != labels[fit:].numpy()).sum()
        errors[n] = {**interval(wrong, len(features) - fit), "features": len(chosen)}
    return errors


def few_choice(data):
    """For few labels the penalty; for few features how to choose them and from which autoencoder."""
    fit, labels, rows = n_fit(data), {}, {}
    for name, features in representations(data):
        if name in FEW:
            features = scaled(features, fit)
            for n in DRAWS:
                errors = {
                    strength: float(np.mean(with_few_labels(features, data.train_labels, fit, n, strength, range(2))))
                    for strength in FEW_STRENGTHS
                }
                labels[f"{name}: {n}"] = {"strength": min(errors, key=errors.get), "error": min(errors.values())}
                print(f"{name}, {n} labels: {labels[f'{name}: {n}']}", flush=True)
    for k, model in ((K, trained(data, FIVE)), (50, trained(data, replace(IMPROVED, n_members=1)))):
        for choose in (best_alone, best_together):
            errors = with_few_features(codes(model, data.train, [0]), data.train_labels, fit, choose)
            rows[f"k = {k}, {choose.__name__}"] = errors
            print(f"k = {k}, {choose.__name__}: {errors}", flush=True)
    return {"labels": labels, "features": rows}


def few(data):
    """Few labels and few features, on the test images: settings from `few_choice`."""
    chosen, n_train = stored("few_choice"), len(data.train)
    truth = torch.cat([data.train_labels, data.test_labels])
    by_labels, by_features = {}, {}
    for name, features in representations(data, on_all=True):
        if name in FEW:
            if name != "five members":
                by_features[name] = with_few_features(features, truth, n_train, best_together)
                print(name, {n: round(100 * e["error"], 2) for n, e in by_features[name].items()}, flush=True)
            features = scaled(features, n_train)
            by_labels[name] = {}
            for n, draws in DRAWS.items():
                strength = chosen["labels"][f"{name}: {n}"]["strength"]
                errors = with_few_labels(features, truth, n_train, n, strength, range(100, 100 + draws))
                by_labels[name][n] = errors
                print(f"{name}, {n} labels: {100 * np.mean(errors):.2f} ± {100 * np.std(errors):.2f} %", flush=True)
    return {"labels": by_labels, "features": by_features}


PARTS = {part.__name__: part for part in (encoding, training, members, choice, few_choice, test, few)}

if __name__ == "__main__":
    main("downstream", PARTS, sys.argv[1:])
