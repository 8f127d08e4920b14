"""bitsandbytes' AdamW that does not wait for the device, with states that stay paged when a run resumes."""

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.optim.optimizer import Optimizer2State


class BitsandbytesAdamW(Optimizer2State):
    """8-bit states (Dettmers et al. 2022, arXiv:2110.02861) or fp32 ones, paged or not."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do what the parent's step does without its wait for the device after every parameter.

        Kernels of one stream run in order; whoever reads a paged state on the host waits first (`wait_for_states`).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        for group_index, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.init_state(group, parameter, group_index, index)
                self.prefetch_state(parameter)
                self.update_step(group, parameter, group_index, index)
        return loss

    def wait_for_states(self) -> None:
        """Wait until the device has written the states that lie in memory which the host reads directly."""
        if self.is_paged:
            torch.cuda.synchronize()

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Load as the parent does, which puts every state on the device; then move large ones back to paged memory."""
        super().load_state_dict(state_dict, move_to_device)
        if not self.is_paged:
            return
        self.wait_for_states()
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state.get(parameter, {})
                for key in ("state1", "state2"):
                    if key in state:
                        buffer = self.get_state_buffer(parameter, dtype=state[key].dtype)
                        state[key] = buffer.copy_(state[key])
