"""The configuration of a run of the benchmark."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Setup:
    """The configuration that all parts share; it is passed to their processes as JSON."""

    out: str
    """Folder for results and shared data: bases, datasets, attempts."""
    recipe: str
    """Name or file of the recipe that variants are derived from."""
    layers: int
    """The number of decoder layers of the large model."""
    tiny: bool
    """Whether a tiny model replaces the large one."""
    only: tuple[str, ...]
    """Words, one of which the name of a variant must contain; empty to run all variants."""

    @property
    def folder(self) -> Path:
        return Path(self.out)

    def wants(self, name: str) -> bool:
        """Whether to run the variant of this name."""
        return not self.only or any(word in name for word in self.only)
