"""Which files the small model consists of, by the checksums in its README."""

import re
from pathlib import Path

from utils.files import sha256_of_file

TINY = Path(__file__).resolve().parent.parent / "tiny_model"
FOLDERS = ("pipeline", "training_images", "unplanted_images", "fixed_parts", "evaluators")
MEASURED = "evaluators/measured.json"  # of the evaluators, not of what they consist of


def listed() -> dict[str, str]:
    """Path in the README -> sha256."""
    text = (TINY / "README.md").read_text(encoding="utf-8")
    return dict(reversed(line.split()) for line in re.findall(r"^[0-9a-f]{64}  \S+$", text, re.M))


def shipped() -> dict[str, str]:
    """The same of the files that are here."""
    files = [path for folder in FOLDERS for path in (TINY / folder).rglob("*") if path.is_file()]
    names = {path.relative_to(TINY).as_posix(): path for path in files}
    names["planted_neurons.csv"] = TINY / "planted_neurons.csv"
    names |= {f"prompts/{p.name}": p for p in (TINY.parent / "prompts").glob("tiny_*.csv")}
    return {
        name: sha256_of_file(path)
        for name, path in names.items()
        if name != MEASURED and path.is_file()
    }


def altered() -> list[str]:
    """Files that are missing, additional or of other bytes than the README says."""
    here, there = shipped(), listed()
    return sorted(name for name in here | there if here.get(name) != there.get(name))
