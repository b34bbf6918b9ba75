"""From a configuration to the network it names."""
from __future__ import annotations

from torch import nn

from icf.config import Config
from icf.model.hosts import TPAVI, AVSegFormer
from icf.model.icf import ICF


def build_model(cfg: Config, pretrained: bool = True, inference: bool = False) -> nn.Module:
    """The network that `model.network` names: `ICF`, or a host of its objective with the same interface."""
    network = {"icf": ICF, "tpavi": TPAVI, "avsegformer": AVSegFormer}[cfg.model.network]
    return network(cfg.model, cfg.loss, cfg.objective, pretrained, inference)
