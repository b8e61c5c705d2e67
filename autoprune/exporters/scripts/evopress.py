"""Makes the database that EvoPress reads levels.txt with. Needs torch alone.

python load.py database
python eval_ppl.py ... --sparse_weights_path database --sparse_config_path levels.txt   # EvoPress's own script
"""

import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def unpack(folder: Path) -> None:
    """Write `folder/LAYER/LEVEL.pth` for each line of levels.txt, and what levels mean as `folder/metadata.pth`."""
    weights = torch.load(HERE / "weights.pt", weights_only=True)
    for line in (HERE / "levels.txt").read_text(encoding="utf-8").splitlines():
        layer, _, level = line.partition(": ")
        (folder / layer).mkdir(parents=True, exist_ok=True)
        torch.save(weights[layer], folder / layer / f"{int(level)}.pth")
    content = json.loads((HERE / "levels.json").read_text(encoding="utf-8"))
    torch.save(content["metadata"], folder / "metadata.pth")


if __name__ == "__main__":
    unpack(Path(sys.argv[1]))
