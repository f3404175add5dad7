"""FP32 master weights for modules whose parameters live in 16 bits.

:class:`MasterWeights` is the engine. It takes plain arguments and any ``torch.optim.Optimizer`` with
per-parameter state.
"""

from lightning_mp.master_weights.engine import MasterMode, MasterWeights
from lightning_mp.master_weights.gradients import Gradients, total_grad_norm
from lightning_mp.master_weights.plan import params_to_cast
from lightning_mp.master_weights.strangers import has_step_hooks
from lightning_mp.master_weights.targets import frozen_twins

__all__ = [
    "Gradients",
    "MasterMode",
    "MasterWeights",
    "frozen_twins",
    "has_step_hooks",
    "params_to_cast",
    "total_grad_norm",
]
