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
    record = Losses({"bce": 2 * x}, {"bce": x * 1}).detached()
    assert {name: (float(v), v.requires_grad) for name, v in record.items()} == {
        "total": (2.0, False), "bce": (1.0, False)}


@pytest.mark.parametrize("classes", [2, 8])
def test_the_class_term_is_the_focal_loss_of_the_softmax_that_is_read(classes):
    target, queries = masks(size=32, classes=classes), 9
    class_logits, mask_logits = perfect(target, classes, queries)
    scores = torch.randn_like(class_logits)
    for logits in (class_logits, mask_logits):
        logits.mul_(50)                                                     # which query holds what is beyond doubt
    wanted = class_logits[0].argmax(-1)
    error = F.cross_entropy(scores[0].flatten(0, 1), wanted.flatten(), reduction="none")
    p = scores[0].softmax(-1).gather(-1, wanted[..., None]).flatten()
    weight = torch.where(wanted.flatten() == classes, losses.NO_OBJECT, 1.0)
    expected = (weight * (1 - p) ** 2 * error).sum() / weight.sum()
    found = matched_losses(scores, mask_logits, target)["focal"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_class_that_holds_nine_times_in_ten_is_read_as_likely():
    """One query, always on the object, whose class is the first in nine frames of ten. A focal loss is a little too
    modest; the sum of sigmoid ones was read as .45."""
    target = torch.ones(10, 16, 16, dtype=torch.uint8)
    target[0] = 2
    scores = torch.zeros(1, 1, 1, 4, requires_grad=True)
    optimizer = torch.optim.Adam([scores], 0.1)
    mask_logits = torch.full((1, 10, 1, 16, 16), 20.0)
    for _ in range(200):
        loss = matched_losses(scores.expand(-1, 10, -1, -1), mask_logits, target)["focal"]
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert scores.softmax(-1)[0, 0, 0, 1] > 0.65


@pytest.mark.parametrize("preset", ["paper", "combo"])
@pytest.mark.parametrize("classes", [1, 7])
def test_frames_of_which_nothing_is_known_change_nothing(preset, classes):
    torch.manual_seed(2)
    target = masks(2, 32, 2 if classes == 1 else classes)
    class_logits, mask_logits = perfect(target, classes, 9, first=int(classes == 1))
    both = (torch.cat([class_logits, torch.randn_like(class_logits)], 1).requires_grad_(),
            torch.cat([mask_logits, torch.randn_like(mask_logits)], 1).requires_grad_())
    void = torch.cat([target, torch.full_like(target, losses.IGNORE)])
    found, expected = matched_losses(*both, void, preset), matched_losses(class_logits, mask_logits, target, preset)
    sum(found.values()).backward()
    name = "focal" if preset == "paper" else "ce"
    torch.testing.assert_close(found[name], expected[name])
    assert all(x.grad[:, 2:].abs().max() == 0 for x in both)


def test_pixels_that_are_not_known_do_not_count_for_matched_masks():
    target = masks(2, 32, 4)
    target[..., :16] = losses.IGNORE
    class_logits, mask_logits = perfect(masks(2, 32, 4), 4, 9)
    mask_logits = torch.randn(1, 2, 9, 32, 32, requires_grad=True)
    terms = matched_losses(class_logits, mask_logits, target)
    (terms["bce"] + terms["dice"]).backward()
    known = mask_logits.grad[..., 16:]
    assert mask_logits.grad[..., :15].abs().max() == 0 < known.abs().max()   # the column between is interpolated


@pytest.mark.parametrize("call", [
    lambda n, target: dense_losses(torch.randn(3, n, 1, 4, 4, requires_grad=True), target),
    lambda n, target: class_losses(torch.randn(3, n, 5, 4, 4, requires_grad=True), target),
    lambda n, target: matched_losses(torch.randn(3, n, 6, 8, requires_grad=True),
                                     torch.randn(3, n, 6, 4, 4, requires_grad=True), target),
    lambda n, target: matched_losses(torch.randn(3, n, 6, 2, requires_grad=True),
                                     torch.randn(3, n, 6, 4, 4, requires_grad=True), target, "combo")])
@pytest.mark.parametrize("n", [0, 2])
def test_nothing_labelled_or_nothing_known_costs_nothing(call, n):
    terms = call(n, torch.full((n, 16, 16), losses.IGNORE, dtype=torch.uint8))
    assert all(value == 0 and value.requires_grad for value in terms.values())
    sum(terms.values()).backward()
