"""TensorBoard files of a run: its numbers by epoch, the pictures of its samples, its recipe as text and as hparams."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from fastflower.core.files import check_writable
from fastflower.core.runs import Run
from fastflower.recipe import Recipe, fields_of, to_yaml

COMPARED = (
    "clean_",
    "corrupt_raw",
    "corrupt_ema",
    "s_",
    "macro_f1_",
    "val_loss",
)  # columns of the HParams page


def hyperparameters(recipe: Recipe, run: Run) -> dict[str, bool | float | int | str]:
    """The keys that differ from the defaults, and backbone, fold and seed, as the HParams page takes them."""
    defaults = {dotted: value for dotted, value, _ in fields_of(Recipe())}
    changed = {
        dotted: value if isinstance(value, (bool, int, float, str)) else str(value)
        for dotted, value, _ in fields_of(recipe)
        if value != defaults[dotted]
    }
    return {**changed, "model.backbone": run.backbone, "data.fold": run.fold, "seed": run.seed}


class TensorBoard:
    """The writer of one run, which makes sure of its folder at once and creates its file with the first epoch.

    A resumed run writes epochs again, and TensorBoard shows the latest.
    """

    def __init__(self, recipe: Recipe, run: Run) -> None:
        self.recipe = recipe
        self.run = run
        self.folder = run.results_dir / "tensorboard" / run.stem
        self._writer: Any = None
        check_writable(self.folder)

    def add_epoch(self, numbers: dict[str, float], epoch: int) -> None:
        """Write the numbers of an epoch; with the first of them recipe, pictures and hparams too."""
        if self._writer is None:
            # slow to import; only the rank that writes needs it
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=epoch)
            self._describe_run([name for name in numbers if name.startswith(COMPARED)])
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def _describe_run(self, compared: list[str]) -> None:
        """Write what does not change: the recipe, the pictures of samples, and hparams with the scores to compare."""
        from torch.utils.tensorboard.summary import hparams

        recipe = to_yaml(self.recipe).strip()
        self._writer.add_text("recipe", "\n".join(f"    {line}" for line in recipe.splitlines()))  # as code
        for path in sorted(self.run.results_dir.glob(f"samples_{self.run.stem}*.png")):
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            size = path.stem.removeprefix(f"samples_{self.run.stem}").strip("_")
            self._writer.add_image(f"samples/{size or 'first size'}", pixels, dataformats="HWC")
        # by hand, as add_hparams would write them to a run of their own
        metrics = dict.fromkeys(compared, 0.0)
        for summary in hparams(hyperparameters(self.recipe, self.run), metrics):
            self._writer.file_writer.add_summary(summary)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
