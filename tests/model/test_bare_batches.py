"""Batches that lack something: labels, known pixels, seconds of a clip, or of all."""
from dataclasses import replace

import pytest
import torch

from icf.model.build import build_model


def bare(case, make_batch, classes):
    batch = make_batch({"nothing": (0, 0), "one_clip": (5, 0)}.get(case, (5, 3)), classes=classes)
    if case == "unlabelled":
        return replace(batch, label_mask=torch.zeros_like(batch.label_mask), labelled=None)
    return replace(batch, masks=torch.full_like(batch.masks, 255)) if case == "void" else batch


@pytest.mark.parametrize("network", ["icf", "tpavi", "avsegformer"])
@pytest.mark.parametrize("classes", [1, 7])
@pytest.mark.parametrize("icf", [False, True])
@pytest.mark.parametrize("case", ["unlabelled", "void", "one_clip", "nothing"])
def test_a_bare_batch_is_a_step_like_any_other(network, classes, icf, case, small, make_batch):
    model = build_model(small(model={"network": network, "classes": classes}, objective={"enabled": icf}))
    for given in (bare(case, make_batch, classes), make_batch((5, 3), classes=classes)):
        losses = model(given)
        losses.total.backward()
        assert all(torch.isfinite(x) for x in losses.detached().values())
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
        assert all(torch.isfinite(x).all() for x in model.buffers())


@pytest.mark.parametrize("network", ["icf", "tpavi", "avsegformer"])
@pytest.mark.parametrize("classes", [1, 7])
def test_without_labels_only_the_objective_trains(network, classes, small, make_batch):
    model = build_model(small(model={"network": network, "classes": classes}))
    terms = model(bare("unlabelled", make_batch, classes)).terms
    assert all(terms[name] == 0 for name in ("bce", "dice", "focal", "ce", "mix") if name in terms)
    assert terms["va"] > 0 and terms["eps"] > 0
