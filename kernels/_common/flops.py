"""Operation counts for torch.utils.flop_counter.FlopCounterMode. A multiplication, an addition, a root and a comparison
of floating point numbers count as one each; integers, and what depends on the values of tensors, do not count."""
import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

import torch

COUNTER = "torch.utils.flop_counter"
_waiting = {}  # operator -> its formula, until the counter is imported


def count(op, formula):
    """Let the counter know `formula`, of the arguments of ``icf::<op>`` with shapes in place of tensors."""
    if COUNTER in sys.modules:
        known = sys.modules[COUNTER].register_flop_formula(getattr(torch.ops.icf, op))
        known(lambda *args, out_shape=None: formula(*args))
    else:
        _waiting[op] = formula


class _WhenImported(MetaPathFinder):
    """Hands over the formulas when the counter is imported, which itself imports Triton: too much for every user."""

    def find_spec(self, name, path=None, target=None):
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            for op, formula in _waiting.items():
                count(op, formula)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _WhenImported())
