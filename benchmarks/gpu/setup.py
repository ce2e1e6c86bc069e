"""What a run of the benchmark works on."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Setup:
    """The same for all parts; they are processes, so it travels as JSON."""

    out: str
    """Folder for results and for what the parts share: bases, datasets, attempts."""
    recipe: str
    """Name or file of the recipe that variants start from."""
    layers: int
    """Decoder layers of the large model."""
    tiny: bool
    """Whether a tiny model takes the place of the large one."""
    only: tuple[str, ...]
    """Words, one of which the name of a variant must have; empty for all variants."""

    @property
    def folder(self) -> Path:
        return Path(self.out)

    def wants(self, name: str) -> bool:
        """Whether a variant of this name is to be run."""
        return not self.only or any(word in name for word in self.only)
