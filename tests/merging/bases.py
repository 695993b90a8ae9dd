"""Bases on disk with random weights under given names, in every form that a base has."""

import json

import numpy as np

from minilora.formats.safetensors import layout, open_tensors

KINDS = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # unit roundoff


def write_file(path, tensors, dtype="float32", metadata=None):
    """One safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(layout(tensors, dtype, metadata)))
    return path


def write_shards(folder, tensors, dtype="float32", stem="model", count=3):
    """A folder of shards with an index, the tensors dealt in turn."""
    names, weight_map = sorted(tensors), {}
    for i in range(count):
        file = f"{stem}-{i + 1:05}-of-{count:05}.safetensors"
        write_file(
            folder / file,
            {name: tensors[name] for name in names[i::count]},
            dtype,
            {"format": "pt", "i": f"{i}"},
        )
        weight_map |= dict.fromkeys(names[i::count], file)
    size = sum(a.size for a in tensors.values()) * (2 if "16" in dtype else int(dtype[-2:]) // 8)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_pipeline(folder, tensors, dtype="float32"):
    """A pipeline of the components with which names begin: the first in shards, each other in a file."""
    parts = {}
    for name, a in tensors.items():
        component, _, own = name.partition(".")
        parts.setdefault(component, {})[own] = a
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "Pipeline"}')
    for i, (component, some) in enumerate(sorted(parts.items())):
        stem = "model" if "encoder" in component else "diffusion_pytorch_model"
        if i:
            write_file(folder / component / f"{stem}.safetensors", some, dtype)
        else:
            write_shards(folder / component, some, dtype, stem)
        (folder / component / "config.json").write_text('{"_class_name": "Model"}')
    return folder


def read(where):
    """Name -> array of a base in any of these forms; of a pipeline with the component before the name."""
    if where.is_file():
        return dict(open_tensors(where))
    found = {}
    for file in sorted(where.rglob("*.safetensors")):
        inside = "".join(f"{part}." for part in file.parent.relative_to(where).parts)
        found |= {inside + name: a for name, a in open_tensors(file).items()}
    return found


def listed(folder):
    """Every path below, with the bytes of files."""
    return {p.relative_to(folder): p.is_file() and p.read_bytes() for p in sorted(folder.rglob("*"))}


def random_weights(shapes, seed=0):
    """A random array in float64 for each name."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}
