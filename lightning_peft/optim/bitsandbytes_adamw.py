"""bitsandbytes' AdamW with states that stay paged when a run resumes."""

from typing import Any

from bitsandbytes.optim.optimizer import Optimizer2State


class BitsandbytesAdamW(Optimizer2State):
    """8-bit states (Dettmers et al. 2022, arXiv:2110.02861) or fp32 ones, paged or not."""

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """As the parent's, which puts every state on the device: large ones go back to paged memory."""
        super().load_state_dict(state_dict, move_to_device)
        if not self.is_paged:
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state.get(parameter, {})
                for key in ("state1", "state2"):
                    if key in state:
                        buffer = self.get_state_buffer(parameter, dtype=state[key].dtype)
                        state[key] = buffer.copy_(state[key])
