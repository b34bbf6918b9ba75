"""Dense and matched losses against their formulas."""
import itertools

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from icf.model import losses
from icf.model.losses import Losses, class_losses, dense_losses, matched_losses


def masks(n=3, size=16, classes=2):
    return torch.randint(0, classes, (n, 4, 4), dtype=torch.uint8).repeat_interleave(
        size // 4, 1).repeat_interleave(size // 4, 2)


def test_dense_losses_are_their_formulas():
    logits, target = 3 * torch.randn(2, 3, 1, 16, 16), masks()
    terms, y = dense_losses(logits, target), target.float()[:, None]
    dice = sum((1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)) / 3
               for head in logits.sigmoid() for p, t in zip(head, y, strict=True))
    torch.testing.assert_close(terms["bce"], sum(F.binary_cross_entropy_with_logits(x, y) for x in logits))
    torch.testing.assert_close(terms["dice"], dice)
    torch.testing.assert_close(terms["focal"], sum(sigmoid_focal_loss(x, y, reduction="mean") for x in logits))


def test_class_losses_are_cross_entropy_where_the_class_is_known():
    logits, target = torch.randn(2, 3, 5, 4, 4), masks(classes=5)
    target[:, :8] = losses.IGNORE
    large = [F.interpolate(x, size=(16, 16), mode="bilinear", align_corners=False)[:, :, 8:] for x in logits]
    expected = sum(F.cross_entropy(x, target[:, 8:].long()) for x in large)
    torch.testing.assert_close(class_losses(logits, target), {"ce": expected})
    assert class_losses(logits, torch.full_like(target, losses.IGNORE))["ce"] == 0


def test_logits_are_enlarged_to_the_masks():
    logits, target = torch.randn(1, 3, 1, 4, 4), masks()
    large = F.interpolate(logits[0], size=(16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(dense_losses(logits, target), dense_losses(large[None], target))


def test_unknown_pixels_do_not_count():
    logits, target = torch.randn(1, 3, 1, 16, 16), masks()
    target[:, :8] = losses.IGNORE
    changed = logits.clone()
    changed[..., :8, :] += 5
    torch.testing.assert_close(dense_losses(changed, target), dense_losses(logits, target))
    torch.testing.assert_close(dense_losses(logits, target)["bce"], dense_losses(
        logits[..., 8:, :], target[:, 8:])["bce"])


def test_silence_met_with_silence_costs_nothing():
    terms = dense_losses(torch.full((1, 2, 1, 8, 8), -30.0), torch.zeros(2, 8, 8, dtype=torch.uint8))
    assert all(value < 1e-6 for value in terms.values())


def perfect(target, classes, queries, first=0):
    """Logits of queries that hold the classes of each frame, in an order of their own."""
    n, size = len(target), target.shape[-1]
    class_logits = torch.full((1, n, queries, classes + 1), -20.0)
    mask_logits = torch.full((1, n, queries, size, size), -20.0)
    class_logits[..., -1] = 20
    for frame in range(n):
        order = torch.randperm(queries)
        for value, query in zip(target[frame].unique().tolist(), order, strict=False):
            if first <= value < classes + first:
                class_logits[0, frame, query, value - first], class_logits[0, frame, query, -1] = 20, -20
                mask_logits[0, frame, query][target[frame] == value] = 20
    return class_logits, mask_logits


@pytest.mark.parametrize("preset", ["paper", "combo"])
def test_a_perfect_answer_costs_little_in_any_order_of_queries(preset):
    target = masks(size=64, classes=4)
    class_logits, mask_logits = perfect(target, 7, 9)
    terms = matched_losses(class_logits, mask_logits, target, preset)
    wrong = matched_losses(class_logits, mask_logits, target.flip(0), preset)
    assert set(terms) == {"bce", "dice", "focal" if preset == "paper" else "ce"}
    assert terms["bce"] < 0.3 and terms["dice"] < 0.1                      # points between two pixels cost a little
    assert sum(value for name, value in terms.items() if name not in ("bce", "dice")) < 0.2 * wrong["dice"]
    assert wrong["bce"] > 2 and wrong["dice"] > 0.2


def test_matching_is_the_cheapest_assignment(monkeypatch):
    """Against all assignments, with the same points."""
    torch.manual_seed(1)
    target, queries = masks(2, 32, 3), 4
    class_logits, mask_logits = torch.randn(2, 2, queries, 4), torch.randn(2, 2, queries, 8, 8)
    points = torch.rand(2, 1, 256, 2)
    monkeypatch.setattr(losses.torch, "rand", lambda *shape, **options: points)
    labels, truth = losses._targets(target, 3)
    pairs = losses._match(class_logits, mask_logits, labels, truth, 256)
    monkeypatch.undo()
    grid = 2 * points - 1
    sample = {"padding_mode": "border", "align_corners": False}
    for head, n in itertools.product(range(2), range(2)):
        count = int((labels[n] >= 0).sum())
        x = F.grid_sample(mask_logits[head, n:n + 1], grid[n:n + 1], **sample)[0, :, 0]
        t = F.grid_sample(truth[n:n + 1], grid[n:n + 1], **sample)[0, :, 0]

        def cost(q, g, head=head, n=n, x=x, t=t):
            p, bce = x[q].sigmoid(), F.binary_cross_entropy_with_logits(x[q], t[g])
            dice = 1 - (2 * (p * t[g]).sum() + 1) / (p.sum() + t[g].sum() + 1)
            return float(5 * bce + 5 * dice - 2 * class_logits[head, n, q].softmax(-1)[labels[n, g]])

        best = min(itertools.permutations(range(queries), count), key=lambda p: sum(map(cost, p, range(count))))
        mine = pairs[head][:, pairs[head][0] == n]
        assert dict(zip(mine[2].tolist(), mine[1].tolist(), strict=True)) == dict(enumerate(best))


def test_frames_without_objects_train_the_class_term_only():
    class_logits, mask_logits = (torch.randn(shape, requires_grad=True) for shape in ((2, 3, 5, 2), (2, 3, 5, 4, 4)))
    terms = matched_losses(class_logits, mask_logits, torch.zeros(3, 16, 16, dtype=torch.uint8))
    sum(terms.values()).backward()
    assert terms["bce"] == 0 and terms["dice"] == 0 and terms["focal"] > 0
    assert mask_logits.grad.abs().max() == 0 and class_logits.grad.abs().min() > 0


def test_more_classes_than_queries_match_what_they_can():
    terms = matched_losses(torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 4, 4), masks(1, 16, 7))
    assert all(torch.isfinite(value) and value > 0 for value in terms.values())


def test_the_record_tells_every_term_without_a_graph():
    x = torch.ones((), requires_grad=True)
    record = Losses(2 * x, {"bce": x * 1}).detached()
    assert {name: (float(v), v.requires_grad) for name, v in record.items()} == {
        "total": (2.0, False), "bce": (1.0, False)}
