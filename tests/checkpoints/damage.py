"""Two hundred ways a checkpoint can be wrong, from a seed: by accident, or because somebody means harm."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor

from trdq_core.checkpoints.files import describe_tensors
from trdq_core.checkpoints.manifest import KEY, canonical

INDEX, CONFIG = "diffusion_pytorch_model.safetensors.index.json", "config.json"
TRAVERSALS = (
    "../secret.safetensors",
    "/etc/passwd",
    "..\\..\\secret",
    "sub/../../x.safetensors",
    "a\x00b.safetensors",
    "",
)
Change = Callable[[Path, random.Random], None]


class Damage(NamedTuple):
    """One kind of damage, and how it is done to a copy of the folder."""

    kind: str
    apply: Change


class Stored:
    """A checkpoint taken apart, so that it can be put together wrong but in agreement with itself."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tensors = folder, {}
        for file in sorted(folder.glob("*.safetensors")):
            self.tensors |= load_file(file)
            with safe_open(file, "pt") as handle:
                self.manifest: dict[str, Any] = json.loads(handle.metadata()[KEY])

    def write(self, *, table: bool = True) -> None:
        """One file with a fresh digest, and with `table` fresh checksums too; the shards go."""
        for file in (*self.folder.glob("*.safetensors"), self.folder / INDEX):
            file.unlink(missing_ok=True)
        if table:
            self.manifest["tensors"] = [entry.to_dict() for entry in describe_tensors(self.tensors)]
        self.manifest.pop("digest", None)
        digest = hashlib.sha256(canonical(self.manifest).encode()).hexdigest()
        text = canonical({**self.manifest, "digest": digest})
        tensors = {name: tensor.clone().contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, self.folder / "diffusion_pytorch_model.safetensors", {"format": "pt", KEY: text})


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def truncated(folder: Path, rng: random.Random) -> None:
    file = rng.choice(shards(folder))
    data = file.read_bytes()
    file.write_bytes(data[: rng.choice([0, 7, 8, rng.randrange(len(data)), len(data) - 1])])


def flipped(folder: Path, rng: random.Random) -> None:
    file = rng.choice(shards(folder))
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def flipped_payload(folder: Path, rng: random.Random) -> None:
    file = rng.choice(shards(folder))
    data = bytearray(file.read_bytes())
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    data[rng.randrange(begin, len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def swapped_shards(folder: Path, rng: random.Random) -> None:
    a, b = rng.sample(shards(folder), 2)
    data = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(data)


def foreign_shard(folder: Path, rng: random.Random) -> None:
    """A shard of the same model with other weights, whole and with right checksums, under the name of ours."""
    file = rng.choice(shards(folder))
    stored = Stored(folder)
    tensors = load_file(file)
    name = rng.choice(sorted(name for name in tensors if tensors[name].is_floating_point()))
    tensors[name] = tensors[name] + 1
    stored.tensors |= tensors
    stored.manifest["tensors"] = [entry.to_dict() for entry in describe_tensors(stored.tensors)]
    stored.manifest.pop("digest")
    digest = hashlib.sha256(canonical(stored.manifest).encode()).hexdigest()
    save_file(tensors, file, {"format": "pt", KEY: canonical({**stored.manifest, "digest": digest})})


def lost_shard(folder: Path, rng: random.Random) -> None:
    rng.choice(shards(folder)).unlink()


def huge_header(folder: Path, rng: random.Random) -> None:
    file = rng.choice(shards(folder))
    data = file.read_bytes()
    file.write_bytes(struct.pack("<Q", rng.choice([2**63, 2**64 - 1, 10**9, 10**8 + 1, len(data)])) + data[8:])


def huge_tensor(folder: Path, rng: random.Random) -> None:
    file = rng.choice(shards(folder))
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    header[name]["shape"] = rng.choice([[2**40], [2**62, 2**62], [2**31, 2**31, 0], [-1]])
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def wrong_dtype(folder: Path, rng: random.Random, *, table: bool) -> None:
    stored = Stored(folder)
    name = rng.choice(sorted(name for name in stored.tensors if quantized(stored, name)))
    tensor = stored.tensors[name]
    other = torch.float16 if tensor.dtype is torch.float32 else torch.float32
    stored.tensors[name] = tensor.to(other)
    stored.write(table=table)


def wrong_shape(folder: Path, rng: random.Random, *, table: bool) -> None:
    stored = Stored(folder)
    name = rng.choice(sorted(stored.tensors))
    tensor = stored.tensors[name]
    stored.tensors[name] = rng.choice([tensor[None], tensor.flatten()[:-1], torch.cat([tensor, tensor])])
    stored.write(table=table)


def quantized(stored: Stored, name: str) -> bool:
    layers = [layer for entry in stored.manifest["inputs"] for layer in entry["layers"]]
    return any(name.startswith(f"{layer}.") for layer in layers)


def hostile_index(folder: Path, rng: random.Random) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][rng.choice(sorted(index["weight_map"]))] = rng.choice(TRAVERSALS)
    (folder / INDEX).write_text(json.dumps(index))


def hostile_tensor_name(folder: Path, rng: random.Random) -> None:
    names = ("../../x", "__class__", "transformer_blocks.0.forward", "trdq.sets.9.x", "..", " ", "config", "a" * 5000)
    stored = Stored(folder)
    name = rng.choice(sorted(stored.tensors))
    stored.tensors[rng.choice(names)] = stored.tensors[name] if rng.random() < 0.5 else stored.tensors.pop(name)
    stored.write()


def hostile_permutation(folder: Path, rng: random.Random) -> None:
    """Kernels read where it points: this one points outside of the activation, with right checksums."""
    stored = Stored(folder)
    name = rng.choice(sorted(name for name in stored.tensors if name.endswith(".permutation")))
    order: Tensor = stored.tensors[name].clone()
    order.view(-1)[rng.randrange(order.numel())] = rng.choice([-1, 2**31 - 1, order.shape[-1]])
    stored.tensors[name] = order
    stored.write()


BAD_JSON = ("[" * 100_000, "[]", "null", "7", '{"a": NaN}', '{"recipe": ' + "9" * 5000 + "}", "{", "")


def hostile_json(folder: Path, rng: random.Random) -> None:
    name = rng.choice([CONFIG, INDEX])
    (folder / name).write_text(rng.choice(BAD_JSON))


def hostile_description(folder: Path, rng: random.Random) -> None:
    """A header whose description is no such thing."""
    file = rng.choice(shards(folder))
    save_file(load_file(file), file, {"format": "pt", KEY: rng.choice(BAD_JSON)})


VALUES: dict[str, tuple[Any, ...]] = {
    "format_version": (2, 10**9, 0, -1, "1", None, True, [1]),
    "argument": ("timestep", 3, {"name": "__call__"}, {"name": "timestep", "scale": -1.0}, {"position": "x"}),
    "edges": ([500.0, 500.0], [-1.0], [2000.0], ["a"], 5, [0.5 * i + 0.25 for i in range(1500)]),
    "calibrated": ([1.0], [1.0, 2.0, 3.0], "no"),
    "model_class": ("os.system", "FluxTransformer2DModel", 0),
    "dtype": ("float64", "load", 7),
    "layers": ([], "x", [{"name": "../.."}], [{}]),
    "inputs": ([], [{}], [{"layers": ["config"]}], 0),
    "tensors": ([], [{}], "x"),
    "recipe": ({}, {"name": "fp"}, {"name": 3}, {"name": "x", "rules": [{"weight": {"bits": 4000}}]}, None),
    "unknown": (1,),
}
ENTRY_VALUES: dict[str, tuple[Any, ...]] = {
    "sets": (0, -1, 3, 10**12), "rotation": (-4, 3, 10**9), "hadamard_block": (-1, 10**9, 3), "rank": (-1, 1, 10**9),
    "clips": ([], ["x"], [1.0] * 7), "ranges": ([1.0], [0.0, 1.0], [1e400]), "layers": ([], ["x"], [["y"]]),
    "scale": (1, None), "permutation": ("yes", False), "second_rotation": (7, 0),
}  # fmt: skip


def hostile_value(folder: Path, rng: random.Random) -> None:
    stored = Stored(folder)
    key = rng.choice(sorted(VALUES))
    stored.manifest[key] = rng.choice(VALUES[key])
    stored.write(table=key != "tensors")


def hostile_entry(folder: Path, rng: random.Random) -> None:
    stored = Stored(folder)
    key = rng.choice(sorted(ENTRY_VALUES))
    entry = rng.choice(stored.manifest["inputs"])
    values = [value for value in ENTRY_VALUES[key] if value != entry[key] or type(value) is not type(entry[key])]
    entry[key] = rng.choice(values)
    try:
        stored.write()
    except ValueError:  # infinity has no place in our JSON; others may write it
        stored.manifest["digest"] = "0" * 64
        tensors = {name: tensor.clone().contiguous() for name, tensor in stored.tensors.items()}
        text = json.dumps(stored.manifest)
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt", KEY: text})


def other_config(folder: Path, rng: random.Random) -> None:
    data = json.loads((folder / CONFIG).read_text())
    changes: list[Callable[[], object]] = [
        lambda: data["quantization_config"].update(quant_method="other"),
        lambda: data["quantization_config"].update(format_version=rng.choice([2, 99, "1", None])),
        lambda: data["quantization_config"].update(surprise=1),
        lambda: data["quantization_config"].update(dtype="bfloat16"),
        lambda: data["quantization_config"].pop("recipe"),
        lambda: data["quantization_config"]["recipe"].update(name="another"),
        lambda: data["quantization_config"]["recipe"]["rules"][0]["weight"].update(bits=8),
        lambda: data.update(num_attention_heads=4),
        lambda: data.update(norm_eps=0.5),
        lambda: data.update(attention_head_dim=32),
        lambda: data.update(num_layers=2),
        lambda: data.update(sample_size=16),
        lambda: data.update(norm_type="ada_norm_singleX"),
        lambda: data.update(_class_name="FluxTransformer2DModel"),
        lambda: data.update(surprise=1),
        lambda: data.pop("norm_eps"),
        lambda: data.pop("quantization_config"),
        lambda: data.update(quantization_config=None),
    ]
    rng.choice(changes)()
    (folder / CONFIG).write_text(json.dumps(data))


def costly_config(folder: Path, rng: random.Random) -> None:
    """A configuration from which building a model takes minutes, or more memory than there is."""
    data = json.loads((folder / CONFIG).read_text())
    key, values = rng.choice(
        [("sample_size", (4096, 10**6)), ("num_layers", (2000, 10**9)), ("in_channels", (10**12,))]
    )
    data[key] = rng.choice(values)
    (folder / CONFIG).write_text(json.dumps(data))


def wrong_number(folder: Path, rng: random.Random) -> None:
    """One number of a quantized layer that nothing in the file contradicts: not finite, or a sum of other integers."""
    stored = Stored(folder)
    ends, values = rng.choice([(("scale",), (math.nan, math.inf)), (("column_sum",), (math.nan, 1e6, None))])
    name = rng.choice(sorted(n for n in stored.tensors if n.endswith(ends) and stored.tensors[n].is_floating_point()))
    tensor, value = stored.tensors[name].clone(), rng.choice(values)
    flat = tensor.view(-1)
    index = rng.randrange(flat.numel())
    flat[index] = flat[index] + 1 if value is None else value
    stored.tensors[name] = tensor
    stored.write()


class Harm:
    """A pickle that would leave a mark if anybody executed it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def pickled(folder: Path, rng: random.Random) -> None:
    for file in (*shards(folder), folder / INDEX):
        file.unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"x": Harm(folder.parent / "harmed")}))


KINDS: dict[str, tuple[int, Change]] = {
    "truncated": (15, truncated),
    "flipped": (20, flipped),
    "flipped payload": (20, flipped_payload),
    "swapped shards": (5, swapped_shards),
    "foreign shard": (5, foreign_shard),
    "lost shard": (3, lost_shard),
    "huge header": (8, huge_header),
    "huge tensor": (8, huge_tensor),
    "wrong dtype": (8, lambda folder, rng: wrong_dtype(folder, rng, table=False)),
    "wrong dtype, right table": (12, lambda folder, rng: wrong_dtype(folder, rng, table=True)),
    "wrong shape": (8, lambda folder, rng: wrong_shape(folder, rng, table=False)),
    "wrong shape, right table": (12, lambda folder, rng: wrong_shape(folder, rng, table=True)),
    "hostile index": (8, hostile_index),
    "hostile tensor name": (10, hostile_tensor_name),
    "hostile permutation": (5, hostile_permutation),
    "hostile JSON": (8, hostile_json),
    "hostile description": (8, hostile_description),
    "hostile value": (20, hostile_value),
    "hostile entry": (15, hostile_entry),
    "other configuration": (22, other_config),
    "costly configuration": (8, costly_config),
    "wrong number": (12, wrong_number),
    "pickle": (2, pickled),
}  # 242 in all


def damaged(source: Path, work: Path, seed: int) -> Iterator[tuple[str, Path]]:
    """Copies of `source`, each damaged in one way; a copy is gone when the next one comes."""
    rng = random.Random(seed)
    for kind, (count, change) in KINDS.items():
        for number in range(count):
            copy = work / "copy"
            shutil.copytree(source, copy)
            change(copy, rng)
            yield f"{kind} {number}", copy
            shutil.rmtree(copy)
