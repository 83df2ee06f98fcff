"""Safetensors in and out of a model, sharded or not."""

import shutil
from contextlib import nullcontext
from pathlib import Path, PurePath

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from hf.families import disk_pieces, local_folder
from plumbing.config import InputError, read_json, whole_folder, write_json


def weight_files(folder):
    """{tensor name: path of the safetensors file that holds it}, from the index or the single file."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise InputError(f"{folder}: no model.safetensors and no index of shards (pickles are not read)")
        with open_weights(single) as file:
            return dict.fromkeys(file.keys(), single)
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict):
        raise InputError(f"{index}: no weight_map")
    for name, shard in found.items():
        # a downloaded index must not open files outside its folder
        if not isinstance(shard, str) or PurePath(shard).name != shard or "\\" in shard or shard in (".", ".."):
            raise InputError(f"{index}: {name} lies in {shard!r}, which is not a plain file name")
        if not (folder / shard).exists():
            raise InputError(f"{folder / shard}: missing, but model.safetensors.index.json names it")
    return {name: folder / shard for name, shard in found.items()}


def open_weights(path):
    """safe_open, with a one-line error when the file is truncated or not safetensors at all."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a complete safetensors file ({error}); download or write it again") from None


def write_weights(tensors, path):
    """{name: tensor} -> a safetensors file. A full disk is an InputError, like anything that the user can put right."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise InputError(f"{path}: cannot be written ({error})") from None


def local_rows(parameter):
    """The part of a parameter that this process holds, and its first and last row: all of it unless FSDP cut it."""
    if not isinstance(parameter, DTensor):
        return parameter, 0, len(parameter)
    local, mesh = parameter.to_local(), parameter.device_mesh
    first = min(mesh.get_local_rank() * -(-len(parameter) // mesh.size()), len(parameter))  # FSDP2 cuts like chunk()
    return local, first, first + len(local)


@torch.no_grad()
def load_weights(model, folder):
    """Fill `model` from the folder's safetensors, one tensor in memory at a time, cast to the parameters' dtype.
    A sharded model reads its own rows only.

    Raises InputError for a missing tensor, a wrong shape, or one the model has no place for (except the lm_head
    that some tied checkpoints store all the same, and RoPE tables of old ones).
    """
    config, files = model.config, weight_files(folder)
    handles, used = {}, set()
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        local, first, last = local_rows(parameter)
        for disk_name, rows, index in disk_pieces(config, name):
            if disk_name not in files:
                raise InputError(f"{folder}: the tensor {disk_name} is missing ({config.model_type} needs it)")
            path = files[disk_name]
            if path not in handles:
                handles[path] = open_weights(path)
            try:
                stored = handles[path].get_slice(disk_name)
            except SafetensorError as error:
                raise InputError(f"{path}: the tensor {disk_name} is not in it ({error})") from None
            if stored.get_dtype() not in ("F64", "F32", "BF16", "F16"):
                raise InputError(f"{path}: {disk_name} is {stored.get_dtype()}; only float weights are read")
            used.add(disk_name)
            expected = list(parameter.shape if index is None else parameter.shape[1:])
            if rows is not None:  # a part of a fused tensor
                expected[0] = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
            if stored.get_shape() != expected:
                raise InputError(f"{path}: {disk_name} has shape {stored.get_shape()}, config.json asks for {expected}")
            if index is None and last > first:
                offset = rows.start if rows else 0
                local.copy_(stored[offset + first : offset + last])
            elif index is not None and first <= index < last:
                local[index - first].copy_(stored[:])
    known = ("rotary_emb.inv_freq", *(("lm_head.weight", "ff_out.weight") if config.tie_word_embeddings else ()))
    extra = sorted(name for name in files if name not in used and not name.endswith(known))
    if extra:
        raise InputError(f"{folder}: a {config.model_type} model has no place for {extra[0]} ({len(extra)} such)")


TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
                   "chat_template*", "generation_config.json")  # fmt: skip


@torch.no_grad()
def save(model, tokenizer_or_source_folder, out_folder, max_shard_bytes=5 * 10**9):
    """Write an ordinary Hugging Face folder: config.json, safetensors under the family's own names, tokenizer files.

    The dtype is the parameters'. Training keeps float32, and so do its checkpoints: at a learning rate of 1e-5 most
    updates are smaller than bfloat16's spacing, and differences of checkpoints (RRT) would be rounding noise.
    A sharded model is gathered one parameter at a time: then every process must call this, and process 0 writes.
    """
    source = local_folder(getattr(tokenizer_or_source_folder, "folder", tokenizer_or_source_folder))
    config = model.config
    writes = not (dist.is_initialized() and dist.get_rank())
    stored = [*model.named_parameters(), *model.named_buffers()]
    plan = {}  # tensor on disk -> how many of our parameters it is made of, and its bytes
    for name, parameter in stored:
        pieces = disk_pieces(config, name)
        for disk_name, _, _ in pieces:
            count, size = plan.get(disk_name, (0, 0))
            plan[disk_name] = count + 1, size + parameter.nbytes // len(pieces)
    shards, size = [[]], 0
    for disk_name, (_, more) in plan.items():
        if size and size + more > max_shard_bytes:
            shards.append([])
            size = 0
        size += more
        shards[-1].append(disk_name)
    files = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]  # fmt: skip
    file_of = {disk_name: file for file, names in zip(files, shards, strict=True) for disk_name in names}

    with whole_folder(out_folder, "*.safetensors") if writes else nullcontext() as out:
        parts, ready = {}, {file: {} for file in files}
        for name, parameter in stored:
            tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
            for disk_name, _, index in disk_pieces(config, name) if writes else []:
                parts.setdefault(disk_name, []).append((tensor if index is None else tensor[index]).cpu())
                if len(parts[disk_name]) < plan[disk_name][0]:
                    continue
                file, pieces = file_of[disk_name], parts.pop(disk_name)  # q, k, v come in the order of their rows
                ready[file][disk_name] = torch.cat(pieces) if len(pieces) > 1 else pieces[0].contiguous()
                if len(ready[file]) == len(shards[files.index(file)]):
                    write_weights(ready.pop(file), out / file)
        if writes:
            if len(files) > 1:
                index = {"metadata": {"total_size": sum(size for _, size in plan.values())}, "weight_map": file_of}
                write_json(out / "model.safetensors.index.json", index)
            dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
            raw = {k: v for k, v in config.raw.items() if k not in ("torch_dtype", "dtype")}
            write_json(out / "config.json", {**raw, "dtype" if "rope_parameters" in raw else "torch_dtype": dtype})
            for pattern in TOKENIZER_FILES:
                for path in source.glob(pattern):
                    if path.is_file():
                        shutil.copyfile(path, out / path.name)
    if dist.is_initialized():
        dist.barrier()
