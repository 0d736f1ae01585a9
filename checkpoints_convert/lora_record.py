"""`lora.json` of a checkpoint with adapters: which they are, and what they were trained on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from checkpoints_convert.fingerprint import weights_fingerprint
from megatron_longpo.errors import UserError
from megatron_longpo.model.lora import TARGETS, LoraSettings

LORA_NAME = "lora.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraRecord:
    """What a checkpoint without base weights must say about them."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """In the order of `TARGETS`."""
    base: str
    """Folder (absolute) or hub id of the base model."""
    base_fingerprint: str
    """`weights_fingerprint` of it."""

    @staticmethod
    def of(settings: LoraSettings, *, base: str, base_folder: str) -> LoraRecord:
        """The record of a run on `base`, which a user has named and which lies in `base_folder`."""
        path = Path(base).expanduser()
        return LoraRecord(
            rank=settings.rank,
            alpha=settings.alpha,
            targets=tuple(target for target in TARGETS if target in settings.targets),
            base=str(path.absolute()) if path.is_dir() else base,
            base_fingerprint=weights_fingerprint(base_folder),
        )

    @property
    def settings(self) -> LoraSettings:
        return LoraSettings(rank=self.rank, alpha=self.alpha, targets=self.targets)

    def text(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def read_lora_record(checkpoint: Path) -> LoraRecord | None:
    """The record of a checkpoint with adapters, None for one with whole weights."""
    path = checkpoint / LORA_NAME
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return LoraRecord(**{**values, "targets": tuple(values["targets"])})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not a record of adapters ({error}); restore the file") from error
