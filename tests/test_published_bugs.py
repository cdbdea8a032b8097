"""Faults seen in published distillation code, each with a test that it is not here."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemble_kd.classifier import Card, Classifier, Preprocess
from ensemble_kd.combine import combine
from ensemble_kd.data.dataset import Dataset
from ensemble_kd.distillation import distill
from ensemble_kd.errors import ModelError
from ensemble_kd.features import FeatureTerm
from ensemble_kd.losses import distillation_loss, kl_to_target
from ensemble_kd.objective import Viewing
from ensemble_kd.runs import Run
from ensemble_kd.stepping import Stepper
from ensemble_kd.teachers.ensemble import Ensemble, Teacher
from ensemble_kd.teachers.registry import load_teacher
from ensemble_kd.teachers.targets import LiveTargets, StoredTargets
from ensemble_kd.weighting import agree_weights, confidence_weights, entropy_weights, uniform_weights

QUICK = {"epochs": 2, "teacher_epochs": 1, "limit_train": 200, "controls": "none"}


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_teachers_batchnorm_buffers_do_not_move(few_digits: Dataset, tmp_path):
    """torchdistill: no `teacher.eval()`; 108 of 108 buffers changed in one epoch."""
    teacher = load_teacher("resnet8", few_digits, training={"epochs": 1})
    before = {name: buffer.clone() for name, buffer in teacher.classifier.named_buffers()}
    assert len(before) > 10
    run = distill([teacher], "lenet", views=0, out=tmp_path / "run", **QUICK)
    assert not any(module.training for module in teacher.classifier.modules())
    for name, buffer in teacher.classifier.named_buffers():
        assert torch.equal(buffer, before[name]), name
    (row,) = json.loads((run.folder / "manifest.json").read_text())["teachers"]
    assert row["before"] == row["after"]


@pytest.mark.parametrize("soft_weight", [0.1, 0.5, 0.9, 1.0])
def test_the_soft_side_has_its_factor_at_every_weight(soft_weight: float):
    """torchdistill: KDLoss(alpha=0) drops T², 16 times weaker at T = 4."""
    target = torch.log_softmax(logits(6, 10, seed=1) / 4, dim=1)
    student = logits(6, 10).requires_grad_()
    labels = torch.arange(6)
    loss = distillation_loss(student, labels, target, soft_weight=soft_weight, temperature=4.0)
    hard = (1 - soft_weight) * F.cross_entropy(student, labels)
    (gradient,) = torch.autograd.grad(loss - hard, student)
    q = torch.softmax(student.detach() / 4, dim=1)
    torch.testing.assert_close(gradient, soft_weight * 4 * (q - target.exp()) / 6)


def test_the_divergence_is_averaged_over_the_batch_alone():
    """DGKD, TAKD: KLDivLoss's mean over B·C, C times too small."""
    student, target = logits(6, 10), torch.log_softmax(logits(6, 10, seed=1), dim=1)
    ours = kl_to_target(student, target, 1.0)
    theirs = F.kl_div(F.log_softmax(student, dim=1), target, reduction="none", log_target=True)
    torch.testing.assert_close(ours, theirs.sum() / 6)
    assert float(ours / theirs.mean()) == pytest.approx(10)


def test_a_head_for_other_classes_is_never_made_up(few_digits: Dataset, tmp_path):
    """timm: a teacher of 1000 classes gets a random head for 10, silently."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 1000))
    card = Card("lenet", "small", Preprocess(1, (8, 8), (0.3,), (0.4,)), tuple(map(str, range(1000))))
    teacher = Teacher.of("wide", Classifier(net, card), "made here")
    with pytest.raises(ModelError, match="'wide' has 1000 classes, and digits has 10"):
        distill([teacher], "lenet", out=tmp_path / "run", **QUICK)
    assert not (tmp_path / "run").exists()


def test_every_term_of_the_feature_loss_has_a_gradient():
    """FitNet-MKD in AE-KD and CA-MKD: losses averaged through torch.tensor(list), gradient zero."""
    term = FeatureTerm(8, [5, 16], weight=0.5, seed=0)
    features = torch.randn(6, 8, requires_grad=True)
    loss = term(features, [torch.randn(6, 5), torch.randn(6, 16)], uniform_weights(2))
    loss.backward()
    assert float(features.grad.abs().max()) > 0
    for name, parameter in term.named_parameters():
        assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_equal_teachers_have_the_same_loss_whatever_weighs_them(count: int):
    """CA-MKD divides by K twice and is NaN at K = 1; EBKD's weights sum to (K − 1)/K."""
    z = logits(1, 6, 10).expand(count, 6, 10)
    student, labels, temperatures = logits(6, 10, seed=1), torch.arange(6), torch.full((count,), 4.0)
    expected = kl_to_target(student, torch.log_softmax(z[0] / 4, dim=1), 4.0)
    for weights in (uniform_weights(count), entropy_weights(z), confidence_weights(z, labels)):
        torch.testing.assert_close(weights.double().sum(dim=0), torch.ones_like(weights.sum(dim=0)).double())
        loss = kl_to_target(student, combine(z, weights, temperatures), 4.0)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_agreeing_gradients_are_weighed_by_what_they_are_not_by_their_place():
    """AE-KD: [0.6, 0.4, 0] in the order of the list for every input, its tolerance as large as its Gram."""
    z, student, temperatures = logits(3, 16, 10), logits(16, 10, seed=1), torch.full((3,), 4.0)
    weights = agree_weights(z, student, temperatures)
    turned = agree_weights(z[[2, 0, 1]], student, temperatures)
    torch.testing.assert_close(turned, weights[[2, 0, 1]], rtol=0, atol=1e-6)
    others = [agree_weights(logits(3, 16, 10, seed=s), student, temperatures) for s in range(2, 6)]
    assert len({tuple(w.round(decimals=3).tolist()) for w in [weights, *others]}) == 5


def test_the_student_trains_in_train_mode_in_every_epoch(few_digits: Dataset, tmp_path, monkeypatch):
    """KD_Lib: in eval mode from epoch 2 on."""
    teacher = load_teacher("lenet", few_digits, training={"epochs": 1})
    modes, step = [], Stepper.__call__

    def watched(self, loss):
        modes.append(self.net.training)
        step(self, loss)

    monkeypatch.setattr(Stepper, "__call__", watched)
    distill([teacher], "resnet8", out=tmp_path / "run", **QUICK)
    assert len(modes) == 2 * (200 // 32)
    assert all(modes)


def test_stored_outputs_belong_to_the_crop_that_the_student_sees(few_digits: Dataset):
    """torchdistill up to 1.1.4: a cache keyed by index alone, under random crops."""
    teacher = load_teacher("lenet", few_digits, training={"epochs": 1})
    ensemble = Ensemble([teacher], torch.ones(1), torch.ones(1))
    viewing, index = Viewing("crop", 2, 3), torch.tensor([5, 17, 3])
    stored = StoredTargets(ensemble, few_digits.train, viewing)
    seen = []
    for epoch in (0, 1):
        batch = viewing.take(few_digits.train, index, viewing.id_of(epoch))
        kept, live = (source(batch, index, epoch, None) for source in (stored, LiveTargets(ensemble)))
        torch.testing.assert_close(kept.soft.exp(), live.soft.exp(), rtol=0, atol=2e-3)
        seen.append(kept.soft)
    assert float((seen[0] - seen[1]).abs().max()) > 0.01


def test_the_last_epoch_is_kept_not_the_best_on_the_test_split(tmp_path):
    """MTKD-RL reports the best test epoch."""
    options = {**QUICK, "epochs": 4, "lr": 0.3, "sets": ["training.clip_norm=null"]}
    run = distill("lenet", "lenet", seed=1, out=tmp_path / "run", **options)
    rows = Run(run.folder).history()
    data = distill("lenet", "lenet", seed=1, out=tmp_path / "again", **options)
    assert data.student.fingerprint() == run.student.fingerprint()
    assert not any("test" in row for row in rows)
    from ensemble_kd.data import load_data

    val = load_data("digits", limit_train=200).val
    accuracy = (run.student(val.pixels).argmax(dim=1) == val.labels).float().mean()
    assert float(accuracy) == pytest.approx(rows[-1]["val"]["accuracy"])
