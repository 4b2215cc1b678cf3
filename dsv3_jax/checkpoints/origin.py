"""Where weights lie, and of which network they are: told without reading any of them."""

import dataclasses
from pathlib import Path
from typing import Literal

from dsv3_jax.checkpoints import hf_names
from dsv3_jax.checkpoints.metadata import config_from_dict
from dsv3_jax.checkpoints.safetensors_io import WeightsError, open_folder
from dsv3_jax.checkpoints.store import CheckpointStore
from dsv3_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Origin:
    """Weights that can be loaded.

    folder: the Hugging Face folder, or the `checkpoints/` of a run or a converted folder.
    step: of the checkpoint; None in a Hugging Face folder.
    config: the network, as config.json or the configuration of the run says.
    """

    kind: Literal["Hugging Face folder", "converted folder", "run"]
    folder: Path
    step: int | None
    config: ModelConfig

    @property
    def root(self) -> Path:
        """The folder in which tokenizer files are, if there are any."""
        return self.folder if self.step is None else self.folder.parent

    def mtp_modules(self) -> int:
        """How many of the config's MTP modules have tensors; reads headers.

        transformers saves none of them, and leaves their number in config.json.

        Raises:
          WeightsError: the files are damaged.
        """
        depth = self.config.num_nextn_predict_layers
        if self.step is not None or depth == 0:
            return depth
        names = open_folder(self.folder)
        found = {hf_names.mtp_module(name, self.config) for name in names}
        return next((k for k in range(depth) if k not in found), depth)


def checkpoint_folder(path: Path) -> Path | None:
    """The `checkpoints/` of a run or a converted folder, which may be `path`; None without one."""
    found = (path / "checkpoints", path)
    return next((p for p in found if p.name == "checkpoints" and p.is_dir()), None)


def find_weights(path: str | Path) -> Origin:
    """What `path` holds: a Hugging Face folder, a converted folder or a run (newest checkpoint).

    Raises:
      WeightsError: none of these.
      ConfigError: a config.json of another architecture, or no checkpoint.
      CheckpointError: the checkpoint is damaged.
    """
    folder = Path(path)
    run = checkpoint_folder(folder)
    if run is not None:
        store = CheckpointStore(run)
        step = store.latest_step()
        metadata = store.read_metadata(step)  # which says so where there is none
        config = config_from_dict(metadata["config"]).model
        kind = "converted folder" if "converted" in metadata else "run"
        return Origin(kind, run, step, config)
    if (folder / "config.json").is_file():
        return Origin("Hugging Face folder", folder, None, ModelConfig.from_hf(folder))
    raise WeightsError(f"neither a config.json nor checkpoints/ of a run ({folder})")
