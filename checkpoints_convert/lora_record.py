"""`lora.json` of a checkpoint with adapters: their shape and the base they were trained on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from checkpoints_convert.fingerprint import weights_fingerprint
from megatron_longpo.config.names import LoraTarget
from megatron_longpo.config.train import LoraConfig
from megatron_longpo.errors import UserError
from megatron_longpo.model.lora import TARGETS

LORA_NAME = "lora.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraRecord:
    """The adapters of a checkpoint, and the base weights that it does not contain."""

    rank: int
    alpha: float
    targets: tuple[LoraTarget, ...]
    """In the order of `TARGETS`."""
    base: str
    """Folder (absolute) or hub id of the base model."""
    base_fingerprint: str
    """`weights_fingerprint` of it."""

    @staticmethod
    def of(config: LoraConfig, *, base: str, base_folder: str) -> LoraRecord:
        """Makes the record of a run on `base`, as the user named it, stored in `base_folder`."""
        path = Path(base).expanduser()
        return LoraRecord(
            rank=config.rank,
            alpha=config.alpha,
            targets=tuple(target for target in TARGETS if target in config.targets),
            base=str(path.absolute()) if path.is_dir() else base,
            base_fingerprint=weights_fingerprint(base_folder),
        )

    @property
    def config(self) -> LoraConfig:
        return LoraConfig(rank=self.rank, alpha=self.alpha, targets=self.targets)

    def text(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def read_lora_record(checkpoint: Path) -> LoraRecord | None:
    """Reads the record of a checkpoint; None if the checkpoint has whole weights."""
    path = checkpoint / LORA_NAME
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return LoraRecord(**{**values, "targets": tuple(values["targets"])})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not a record of adapters ({error}); restore the file") from error
