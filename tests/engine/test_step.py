"""A step of the optimiser: however its clips are dealt out to batches, the gradient is that of all of them at once."""
import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from icf.data import Batch
from icf.engine.train import Progress, finite_step, log, shares, train_step
from icf.model.icf import ICF
from icf.model.losses import NO_OBJECT, Losses, matched_counts
from icf.model.visual import keep_finite


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


class Weighing(torch.nn.Module):
    """A loss with a gradient that is `value` in one of its weights, and a norm that sees `value`, too."""

    def __init__(self):
        super().__init__()
        self.weight, self.value = torch.nn.Parameter(torch.ones(3)), 1.0
        self.norm = keep_finite(torch.nn.BatchNorm1d(2))

    def forward(self, batch):
        seen = self.norm(torch.tensor([[1.0, 2.0], [3.0, self.value]])).square().mean()
        loss = (self.weight * torch.tensor([1.0, self.value, 2.0])).sum() + 0 * seen.detach().nan_to_num(0)
        return Losses({"bce": loss}, {"bce": loss})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("clip", [0.0, 0.1])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(accelerator, value, clip, fused):
    torch.manual_seed(0)
    model = Weighing()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    train_step(accelerator, model, [None], optimizer, schedule, clip)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    model.value = value
    losses = train_step(accelerator, model, [None], optimizer, schedule, clip)
    weights, state = model.state_dict(), optimizer.state_dict()["state"]
    assert torch.equal(weights["weight"], before[0]["weight"]) and (losses["skipped"], losses["left_out"]) == (1, 1)
    assert all(torch.equal(state[key][name], kept) for key in state for name, kept in before[1][key].items())
    model.value = 1.0
    losses = train_step(accelerator, model, [None], optimizer, schedule, clip)
    assert not torch.equal(model.weight, before[0]["weight"]) and model.weight.isfinite().all()
    assert (losses["skipped"], losses["left_out"]) == (1, 1)


def test_a_step_does_not_wait_to_know_whether_it_is_finite(accelerator):
    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "is_nonzero")
            return func(*args, **(kwargs or {}))

    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for value in (1.0, float("nan")):
        (model(torch.ones(1, 3)).sum() * value).backward()
        with Refuse():
            skipped = finite_step(accelerator, model, optimizer, 1.0)
    assert skipped == 1 and model.weight.isfinite().all()


def test_a_bad_step_is_told_and_many_end_the_run(capsys):
    accelerator, schedule = SimpleNamespace(log=lambda *_, **__: None), SimpleNamespace(get_last_lr=lambda: [1e-3])
    bar, progress = SimpleNamespace(set_postfix=lambda **_: None), Progress()

    def step(total, skipped):
        progress.step += 1
        losses = {"total": torch.tensor(total), "skipped": torch.tensor(float(skipped))}
        log(accelerator, losses, schedule, progress, bar)

    for total, skipped in [(1.0, 0), (torch.nan, 1), (1.0, 1), *((torch.nan, 2 + i) for i in range(9))]:
        step(total, skipped)
    assert [row["step"] for row in progress.steps] == [1, 3]
    assert "the loss became nan at step 2, which is skipped; 1 so far" in capsys.readouterr().out
    with pytest.raises(FloatingPointError, match="nan at step 13, and no step since 3"):
        step(torch.nan, 11)
