"""A step of the optimiser: however its clips are dealt out to batches, the gradient is that of all of them at once."""
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from icf.data import Batch
from icf.engine.train import shares, train_step
from icf.model.icf import ICF
from icf.model.losses import NO_OBJECT, Losses, matched_counts


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)


class Still:
    """An optimiser that leaves weights and gradients as they are."""

    def step(self):
        pass

    zero_grad = lambda self, set_to_none: None  # noqa: E731


def gradients(accelerator, model, group):
    model.zero_grad()
    losses = train_step(accelerator, model, group, Still(), Still(), clip=0.0)
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def part(batch, clips):
    """Some clips of a batch."""
    return Batch(*(getattr(batch, name)[clips] for name in (
        "frames", "log_mel", "masks", "frame_mask", "label_mask", "names", "categories")))


@pytest.fixture
def still_model(small):
    """A model that computes every clip by itself: stored statistics in its norms."""
    def make(classes=1, loss=None):
        torch.manual_seed(0)
        return ICF(small(model={"classes": classes, "visual": {"freeze_norm": True}, "decoder": {"layers": 1}}).model,
                   loss).train()
    return make


@pytest.mark.parametrize("cuts", [(2, 4), (1, 4), (3, 4), (1, 2, 3, 4)])
def test_groups_of_batches_have_the_gradient_of_one_large_batch(accelerator, still_model, make_batch, cuts):
    """Clips of unequal numbers of labelled frames and known pixels, in batches of unequal size."""
    model = still_model()
    batch = make_batch((5, 4, 2, 3))
    batch.label_mask[0, 1:], batch.label_mask[2, 1:] = False, False                 # as in S4: the first frame alone
    batch.masks[1, :, :32] = 255                                   # half of it is not known
    starts = (0, *cuts[:-1])
    group = [part(batch, slice(start, stop)) for start, stop in zip(starts, cuts, strict=True)]
    expected_losses, expected = gradients(accelerator, model, [part(batch, slice(None))])
    losses, found = gradients(accelerator, model, group)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=1e-5, msg=name)
    for name, value in expected_losses.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_batch_without_labels_weighs_nothing_in_its_group(accelerator, still_model, make_batch):
    model, batch = still_model(), make_batch((5, 5, 5))
    batch.label_mask[2:] = False
    _, expected = gradients(accelerator, model, [part(batch, slice(0, 2))])
    _, found = gradients(accelerator, model, [part(batch, slice(0, 2)), part(batch, slice(2, 3))])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


class Two:
    """What a process of two knows of the other: the sums of both."""

    num_processes = 2

    def __init__(self, group, other):
        self.counts = {name: sum(c[name] for c in group) + sum(c[name] for c in other) for name in group[0]}

    def unwrap_model(self, model):
        return model

    def reduce(self, own, how):
        assert how == "sum"
        return torch.stack([*self.counts.values()]).float()


@pytest.mark.parametrize("cuts", [((1,), (3,)), ((2,), (2,)), ((1, 1), (1, 1))])
def test_processes_weigh_their_means_to_that_of_all_clips(still_model, make_batch, cuts):
    """DistributedDataParallel takes the mean of the processes' gradients."""
    model, batch = still_model(), make_batch((5, 4, 2, 3))
    batch.label_mask[0, 1:] = False
    parts, start = [], 0
    for sizes in cuts:
        parts.append([])
        for size in sizes:
            parts[-1].append(part(batch, slice(start, start + size)))
            start += size
    counts = [[model.counts(b) for b in group] for group in parts]
    expected = model(part(batch, slice(None))).total
    losses = [model(b).shared(share).total for own, other in ((0, 1), (1, 0))
              for b, share in zip(parts[own], shares(Two(counts[own], counts[other]), model, parts[own]), strict=True)]
    torch.testing.assert_close(sum(losses) / 2, expected, rtol=1e-5, atol=1e-6)


def test_matched_terms_count_pairs_and_the_weights_of_queries():
    masks = torch.zeros(4, 6, 6, dtype=torch.uint8)
    masks[1, :2], masks[1, 2:4], masks[2, 0, 0], masks[3] = 1, 2, 3, 255  # classes of the frames: 1, 3, 2, unknown
    counts = matched_counts(masks, classes=4, queries=5)
    assert counts["bce"] == counts["dice"] == 1 + 3 + 2
    assert float(counts["focal"]) == float(counts["ce"]) == pytest.approx(6 + NO_OBJECT * (3 * 5 - 6))
    assert matched_counts(masks, classes=4, queries=2)["bce"] == 1 + 2 + 2  # no more than there are queries


def test_one_batch_is_taken_as_it_is(accelerator, make_model, make_batch):
    assert shares(accelerator, make_model(), [make_batch()]) == [{}]


def test_batches_of_a_group_draw_their_own_numbers_and_the_same_again(accelerator, make_batch):
    class Drawing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.drawn = torch.nn.Parameter(torch.zeros(())), []

        def counts(self, batch):
            return {"bce": torch.ones(())}

        def forward(self, batch):
            self.drawn.append(float(torch.rand(())))
            return Losses({"bce": self.weight * 1}, {"bce": self.weight * 1})

    model, batch = Drawing(), make_batch()
    for seed in (5, 6, 5):
        train_step(accelerator, model, [batch] * 3, Still(), Still(), 0.0, seed)
    assert len({*model.drawn}) == 6 and model.drawn[:3] == model.drawn[6:]
