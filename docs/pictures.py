"""Draw the pictures of LoRA into figures/pictures/, and write what each says where a page shows it.

    python docs/pictures.py

The adapter whose numbers are shown, and the one that is added to it, were trained by

    minilora train --data folio --targets layers.0.self_attn.q_proj --lr 0.01 --out figures/pictures/adapter
    minilora train --data kjv --targets layers.0.self_attn.q_proj --lr 0.01 --out figures/pictures/adapter_kjv
"""

import json
import re
from pathlib import Path

import minilora as ml
from minilora import pictures
from minilora.experiments.beyond_tasks import SHAPE

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "figures/pictures"
MANIFEST = FOLDER / "MANIFEST.json"
SHOWN = re.compile(r"!\[[^\]]*\](\((?:\.\./)?figures/pictures/(\w+)\.png\))")


def drawn() -> dict[str, ml.plots.Picture]:
    """Every committed picture, by the name of its files."""
    adapter = ml.open_adapter(FOLDER / "adapter")
    model = ml.load()
    ml.load_adapter(model, FOLDER / "adapter")
    return {
        "overlays": pictures.overlays(ml.load()),
        "lora": pictures.lora(),
        "flow": pictures.flow(),
        "product": pictures.product(),
        "product_small": pictures.product(64, 64, 4),
        "block": pictures.block(),
        "block_all_linear": pictures.block(targets="all-linear"),
        "merging": pictures.merging(),
        "four_bits": pictures.four_bits(),
        "many_adapters": pictures.many_adapters(),
        "adding": pictures.adding(adapter, ml.open_adapter(FOLDER / "adapter_kjv")),
        "beyond_language": pictures.beyond_language(SHAPE),
        "factors": pictures.factors(adapter),
        "rank_one": pictures.rank_one(adapter),
        "rounding": pictures.rounding(),
        "ranks": pictures.ranks(),
        "beside_base": pictures.beside_base(model),
    }


def filled(page: str, says: dict[str, str]) -> str:
    """A page on which every picture has its sentence as alternative text."""
    return SHOWN.sub(lambda m: f"![{says[m[2]]}]{m[1]}", page)


def pages() -> list[Path]:
    """The pages that may show a picture."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    """Write the files, how they were made, and the alternative texts."""
    found = drawn()
    for name, picture in found.items():
        picture.save(FOLDER, name)
    says = {name: picture.says for name, picture in found.items()}
    made = ml.plots.made_with() | {"command": "python docs/pictures.py", "says": says}
    MANIFEST.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for page in pages():
        page.write_text(filled(page.read_text(encoding="utf-8"), says), encoding="utf-8")


if __name__ == "__main__":
    main()
