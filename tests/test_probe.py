"""Classifiers on frozen features: closed forms against scikit-like definitions, and whole runs through the verb."""

import json

import pytest
import torch
import torch.nn.functional as F

from swin_scale.cli import main
from swin_scale.convert import convert
from swin_scale.errors import UserError
from swin_scale.models import create_model
from swin_scale.probe import first_of_each, logistic, nearest, ridge

NAME = "swinv2_nano_patch4_window4_32"


def blobs(n: int, classes: int, seed: int = 0, spread: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 12, generator=torch.Generator().manual_seed(99))
    y = torch.arange(n) % classes
    return centres[y] + spread * torch.randn(n, 12, generator=generator), y


def test_the_nearest_neighbours_vote():
    x, y = blobs(60, 3)
    queries, wanted = blobs(9, 3, seed=1)
    votes = nearest(x, y, queries, 3, k=5, temperature=0.1)
    for i in range(9):
        cosine = F.cosine_similarity(queries[i], x)
        near = cosine.argsort(descending=True)[:5]
        by_hand = [sum((cosine[j] / 0.1).exp() for j in near if y[j] == c) for c in range(3)]
        assert torch.allclose(votes[i], torch.tensor(by_hand), rtol=1e-4)
    assert (votes.argmax(1) == wanted).all()
    assert torch.equal(nearest(x, y, x, 3, k=1).argmax(1), y)


def test_ridge_solves_the_normal_equations_and_judges_by_leaving_out():
    x, y = blobs(40, 4, spread=1.5)
    target = F.one_hot(y, 4).double() * 2 - 1
    for penalty in (1e-4, 1e-1):
        matrix, chosen = ridge(x, y, 4, [penalty])
        centred = (x - x.mean(0)).double()
        gram = centred.t() @ centred + penalty * x.double().square().mean() * len(x) * torch.eye(12)
        wanted = torch.linalg.solve(gram, centred.t() @ (target - target.mean(0)))
        assert chosen == penalty and torch.allclose(matrix[:-1].double(), wanted, atol=1e-5)
        assert torch.allclose(x @ matrix[:-1] + matrix[-1],
                              (centred @ wanted + target.mean(0)).float(), atol=1e-4)  # fmt: skip

    def left_out(penalty: float) -> float:
        unit, error = float(x.square().mean()) * len(x), 0.0
        for i in range(len(x)):
            rest = torch.arange(len(x)) != i
            mean = x[rest].mean(0)
            a, b = (x[rest] - mean).double(), target[rest] - target[rest].mean(0)
            weights = torch.linalg.solve(a.t() @ a + penalty * unit * torch.eye(12).double(), a.t() @ b)
            error += float(((x[i] - mean).double() @ weights + target[rest].mean(0) - target[i]).square().sum())
        return error

    penalties = [1e-4, 1e-2, 1e-1, 1.0]
    assert ridge(x, y, 4, penalties)[1] == min(penalties, key=left_out)


def test_logistic_regression_is_at_its_minimum():
    x, y = blobs(80, 3, spread=1.0)
    matrix, penalty = logistic(x, y, 3, [1e-2])
    matrix = matrix.requires_grad_()
    loss = F.cross_entropy(x @ matrix[:-1] + matrix[-1], y) + penalty / 2 * matrix[:-1].square().sum()
    (gradient,) = torch.autograd.grad(loss, matrix)
    assert gradient.abs().max() < 1e-4
    # Features of noise alone want the strongest penalty, separable ones a weak one.
    noise = torch.randn(400, 12, generator=torch.Generator().manual_seed(1))
    assert logistic(noise, torch.arange(400) % 3, 3, [1e-6, 1.0])[1] == 1.0
    assert logistic(*blobs(300, 3, spread=0.2), 3, [1e-6, 1.0])[1] == 1e-6


def test_the_first_of_each_class_are_taken():
    y = torch.tensor([1, 0, 1, 2, 2, 0, 1, 2, 0])
    assert first_of_each(y, 3, 2).tolist() == [0, 1, 2, 3, 4, 5]
    assert first_of_each(y, 3, 3).tolist() == list(range(9))
    with pytest.raises(UserError, match="--shots: 4 images of each class are wanted, class 0 has 3"):
        first_of_each(y, 3, 4)


@pytest.mark.parametrize("method", ["knn", "linear", "few-shot"])
def test_probing_a_weight_file_through_the_verb(method, digits, tmp_path, capsys):
    """Even random features of digits tell more than chance, 10 %."""
    torch.save(create_model(NAME, num_classes=10).state_dict(), tmp_path / "random.pth")
    weights = tmp_path / "weights.safetensors"
    convert(tmp_path / "random.pth", weights, to="safetensors", model=NAME)
    arguments = ["eval", "--weights", str(weights), "--model", NAME, "--workers", "0", "--probe", method]
    assert main([*arguments, "--data", str(digits[1]), "--train", str(digits[0])]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["method"] == method and figures["samples"] == 50
    assert figures["train_samples"] == (50 if method == "few-shot" else 300)
    assert 20 < figures["top1"] <= figures["top5"] <= 100


def test_probe_and_train_go_together(digits, tmp_path, capsys):
    assert main(["eval", "--weights", "x.safetensors", "--data", str(digits[1]), "--probe", "knn"]) == 2
    assert "--probe knn needs --train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train", "x"], "--train is for --probe; add it"),
        (["--shots", "0"], "--shots is for --probe; add it"),
        (["--probe", "linear", "--train", "x", "--shots", "5"], "--shots is for --probe few-shot; add it"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, message, capsys):
    assert main(["eval", "--weights", "x.safetensors", "--data", "x", *options]) == 2
    assert message in capsys.readouterr().err
