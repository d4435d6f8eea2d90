"""Progress of a training."""

from tqdm import tqdm
from transformers import TrainerCallback


class ProgressBar(TrainerCallback):
    """A progress bar that leaves nothing behind."""

    def __init__(self, name: str):
        self.name = name

    def on_train_begin(self, args, state, control, **kwargs):
        hidden = not state.is_world_process_zero
        self.bar = tqdm(total=state.max_steps, desc=self.name, leave=False, disable=hidden)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
