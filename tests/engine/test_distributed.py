"""Several processes train as one does with the batch of all of them: contrast over all clips, DDP and FSDP2."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from icf.config import Config
from icf.data import Batch
from icf.model.icf import ICF

PROCESSES = 2
PROBLEMS = {"index": {"positives": "index"}, "diag": {"positives": "diag"}, "threshold": {"positives": "threshold"},
            "prototype": {"kind": "prototype"}, "feature": {"kind": "feature"}}
TERMS = ("va", "al", "vl", "alone", "bce", "dice", "focal")


def make_model(values: dict) -> ICF:
    """The model of a configuration."""
    cfg = Config.from_dict(values)
    torch.manual_seed(0)
    return ICF(cfg.model, cfg.loss, cfg.objective)


def clips(rank: int = 0, processes: int = 1) -> Batch:
    """The share of a process in four clips, two of which are shorter; equally many frames for two processes."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([5, 3, 3, 5])
    real = torch.arange(5) < lengths[:, None]
    whole = {"frames": torch.randint(0, 256, (4, 5, 3, 32, 32), generator=generator, dtype=torch.uint8),
             "log_mel": torch.randn(4, 5, 1, 96, 64, generator=generator),
             "masks": torch.randint(0, 2, (4, 5, 32, 32), generator=generator, dtype=torch.uint8),
             "frame_mask": real, "label_mask": real}
    own = slice(rank * 4 // processes, (rank + 1) * 4 // processes)
    return Batch(**{name: x[own] for name, x in whole.items()}, names=["clip"] * 4, categories=[()] * 4)


def step(model, batch: Batch) -> dict[str, Tensor]:
    """Losses and gradients by name."""
    losses = model(batch)
    losses.total.backward()
    whole = {"total": losses.total.detach(), **{name: losses.terms[name].detach() for name in TERMS}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = parameter.grad
            whole[f"grad {name.removeprefix('module.')}"] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return whole


def work(rank: int, path: str) -> None:
    """What one of the processes does."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=PROCESSES)
    batch = clips(rank, PROCESSES)
    problems = json.loads(Path(path, "problems.json").read_text())
    sharded = make_model(problems.pop("fsdp2"))
    results = {name: step(DistributedDataParallel(make_model(values)), batch) for name, values in problems.items()}
    for layer in sharded.pixel_decoder.layers:
        fully_shard(layer)
    results["fsdp2"] = step(fully_shard(sharded), batch)
    torch.save(results, f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def problems(small):
    """Configurations in which nothing is random, by name."""
    decoder = {"dim": 16, "pixel_ffn": 32, "layers": 1, "ffn": 32, "heads": 2, "queries": 4}
    return {name: small(model={"visual": {"freeze_norm": True}, "decoder": decoder},
                        objective={"sc": {"enabled": False}, "cdcl": {"text_negatives": "batch", **cdcl}}).to_dict()
            for name, cdcl in {**PROBLEMS, "fsdp2": {}}.items()}


@pytest.fixture(scope="module")
def results(problems, tmp_path_factory):
    """What the processes computed, by problem, of each process."""
    path = tmp_path_factory.mktemp("processes")
    (path / "problems.json").write_text(json.dumps(problems))
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['work'](int(sys.argv[2]), sys.argv[3])"
    processes = [subprocess.Popen([sys.executable, "-c", code, __file__, str(rank), str(path)])
                 for rank in range(PROCESSES)]
    assert [process.wait(300) for process in processes] == [0] * PROCESSES
    return [torch.load(path / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("name", [*PROBLEMS, "fsdp2"])
def test_processes_train_as_one_does_with_all_clips(problems, results, name):
    expected = step(make_model(problems[name]), clips())
    for result in results:
        for term in ("va", "al", "vl", "alone"):  # contrasted over all clips: the whole, in every process
            torch.testing.assert_close(result[name][term], expected[term], rtol=1e-5, atol=1e-6, msg=term)
        for gradient in (key for key in expected if key.startswith("grad")):
            error = (result[name][gradient] - expected[gradient]).abs().max()
            assert error <= 1e-5 + 1e-4 * expected[gradient].abs().max(), gradient
    for term in ("total", "bce", "dice", "focal"):
        mean = torch.stack([result[name][term] for result in results]).mean()
        torch.testing.assert_close(mean, expected[term], rtol=1e-5, atol=1e-6, msg=term)
