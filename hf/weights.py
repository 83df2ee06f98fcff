"""A checkpoint's safetensors: into a model, sharded or not, out of it again, and their identity.

    load_weights(model, folder)     fills a model.Transformer; each process reads only its own rows
    save(model, source, out)        writes an ordinary Hugging Face folder
    fingerprint(folder)             the same text for the same weights

Nothing is unpickled, and nothing outside of the folder is opened. Next: hf/rrt.py.
"""

import hashlib
import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path, PurePath

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from hf.families import disk_pieces, local_folder, stacked_experts
from hf.tokenizer import load_tokenizer
from plumbing.config import InputError, read_json, whole_folder, write_json

INDEX = "model.safetensors.index.json"

# ------------------------------------------------------------------------------------------------
# Files


def weight_files(folder):
    """{tensor name: path of the safetensors file that holds it}.

    The single file comes before an index, as in transformers: an index beside it is a left-over.
    Raises InputError if there is neither, or if the index names a file that is not in the folder.
    """
    folder = Path(folder)
    single = folder / "model.safetensors"
    if single.exists():
        with open_weights(single) as file:
            return dict.fromkeys(file.keys(), single)
    index = folder / INDEX
    if not index.exists():
        raise InputError(
            f"{folder}: no model.safetensors and no index of shards (pickles are not read)"
        )
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict):
        raise InputError(f"{index}: no weight_map")
    for name, shard in found.items():
        # a downloaded index must not open files outside its folder
        plain = isinstance(shard, str) and PurePath(shard).name == shard
        if not plain or "\\" in shard or shard in (".", ".."):
            raise InputError(f"{index}: {name} lies in {shard!r}, which is not a plain file name")
        if not (folder / shard).exists():
            raise InputError(f"{folder / shard}: missing, but {INDEX} names it")
    return {name: folder / shard for name, shard in found.items()}


def open_weights(path):
    """safe_open. Raises InputError when the file is truncated or not safetensors at all."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: not a complete safetensors file ({error}); download or write it again"
        ) from None


def write_weights(tensors, path):
    """{name: tensor} -> a safetensors file. Raises InputError when the disk is full."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise InputError(f"{path}: cannot be written ({error})") from None


class Checkpoint:
    """A folder's tensors by name; a file is opened when the first of its tensors is read."""

    def __init__(self, folder, family):
        self.folder, self.family = folder, family
        self.files = weight_files(folder)
        self.handles = {}
        self.used = set()

    def slice_of(self, name, shape):
        """The tensor `name`, not yet read. Raises InputError if it is missing or unexpected."""
        if name not in self.files:
            raise InputError(f"{self.folder}: the tensor {name} is missing ({self.family} needs it)")
        path = self.files[name]
        if path not in self.handles:
            self.handles[path] = open_weights(path)
        try:
            stored = self.handles[path].get_slice(name)
        except SafetensorError as error:
            raise InputError(f"{path}: the tensor {name} is not in it ({error})") from None
        kind = stored.get_dtype()
        if kind not in ("F64", "F32", "BF16", "F16"):
            raise InputError(f"{path}: {name} is {kind}; only float weights are read")
        if stored.get_shape() != shape:
            found = stored.get_shape()
            raise InputError(f"{path}: {name} has shape {found}, config.json asks for {shape}")
        self.used.add(name)
        return stored


# ------------------------------------------------------------------------------------------------
# Into a model


@torch.no_grad()
def load_weights(model, folder):
    """Fill `model` from the folder, one tensor in memory at a time, cast to the parameters' dtype.

    A sharded model reads its own rows only. Raises InputError for a tensor that is missing or has
    another shape, one that the model has no place for, and an lm_head that differs from the
    embedding though config.json ties the two.
    """
    config = model.config
    checkpoint = Checkpoint(folder, config.model_type)
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        local, first, last = local_rows(parameter)
        for disk_name, rows, index in disk_pieces(config, name):
            shape = list(parameter.shape if index is None else parameter.shape[1:])
            stacked = None if index is None else stacked_experts(disk_name)
            if stacked in checkpoint.files:  # all experts in one tensor
                stored = checkpoint.slice_of(stacked, [config.num_experts, *shape])
                if first <= index < last:
                    local[index - first].copy_(stored[index : index + 1][0])
                continue
            if rows is not None:  # a part of a fused tensor
                heads = config.num_attention_heads + 2 * config.num_key_value_heads
                shape[0] = heads * config.head_dim
            stored = checkpoint.slice_of(disk_name, shape)
            if index is None and last > first:
                offset = rows.start if rows else 0
                local.copy_(stored[offset + first : offset + last])
            elif index is not None and first <= index < last:
                local[index - first].copy_(stored[:])
    check_head(config, checkpoint)
    check_left_over(config, checkpoint)


def local_rows(parameter):
    """-> the part of a parameter that this process holds, its first row, and its last plus 1."""
    if not isinstance(parameter, DTensor):
        return parameter, 0, len(parameter)
    local, mesh = parameter.to_local(), parameter.device_mesh
    rows = -(-len(parameter) // mesh.size())  # FSDP2 cuts like torch.chunk
    first = min(mesh.get_local_rank() * rows, len(parameter))
    return local, first, first + len(local)


def check_head(config, checkpoint):
    """A tied checkpoint may store its head all the same (Qwen3-1.7B does), if it is the embedding.

    transformers would use a head that differs; whether that or config.json is the mistake, only the
    user knows.
    """
    [(head, _, _)] = disk_pieces(config, "lm_head.weight")
    if not config.tie_word_embeddings or head not in checkpoint.files:
        return
    [(embedding, _, _)] = disk_pieces(config, "model.embed_tokens.weight")
    shape = [config.vocab_size, config.hidden_size]
    one, other = (checkpoint.slice_of(name, shape) for name in (head, embedding))
    for i in range(0, config.vocab_size, 4096):
        rows = slice(i, i + 4096)
        if not torch.equal(one[rows].float(), other[rows].float()):
            raise InputError(
                f"{checkpoint.files[head]}: {head} differs from {embedding}, though config.json says "
                "that they are one (tie_word_embeddings); set it to false to use both, or delete "
                f"{head}"
            )


def check_left_over(config, checkpoint):
    """Raises InputError for a tensor that was not read; two kinds are known to be of no use."""
    first, ahead = config.num_hidden_layers, config.num_nextn_predict_layers
    extra = []
    for name in sorted(checkpoint.files.keys() - checkpoint.used):
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        of_prediction_ahead = layer and first <= int(layer[1]) < first + ahead
        if not of_prediction_ahead and not name.endswith("rotary_emb.inv_freq"):
            extra.append(name)
    if extra:
        raise InputError(
            f"{checkpoint.folder}: a {config.model_type} model has no place for {extra[0]} "
            f"({len(extra)} such)"
        )


# ------------------------------------------------------------------------------------------------
# Out of a model

TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
                   "merges.txt", "chat_template*", "generation_config.json")  # fmt: skip


@torch.no_grad()
def save(model, tokenizer_or_source_folder, out_folder, max_shard_bytes=5 * 10**9, dtype=None):
    """Write an ordinary Hugging Face folder: config.json, safetensors, tokenizer, generation config.

    dtype: of the stored parameters; None: as they are. Training keeps float32 and so do its
    checkpoints: at a learning rate of 1e-5 most updates are smaller than bfloat16's spacing, so
    differences of checkpoints (RRT) would be rounding noise. The router's bias stays float32.
    A sharded model is gathered one parameter at a time: then every process must call this, and
    process 0 writes. Raises InputError if the folder holds other things, or the disk is full.
    """
    given = tokenizer_or_source_folder
    source = local_folder(getattr(given, "folder", given))
    dtype = dtype or next(model.parameters()).dtype
    writes = not (dist.is_initialized() and dist.get_rank())
    stored = [(name, p, dtype) for name, p in model.named_parameters()]
    stored += [(name, b, b.dtype) for name, b in model.named_buffers()]
    shards = plan_shards(model.config, stored, max_shard_bytes)
    with whole_folder(out_folder, "*.safetensors") if writes else nullcontext() as out:
        for name, tensors in assembled(model.config, stored, shards, writes):
            write_weights(tensors, out / name)
        if writes:
            write_index(shards, out)
            raw = portable(model.config, source, out)
            key = "dtype" if "rope_parameters" in raw else "torch_dtype"
            write_json(out / "config.json", raw | {key: str(dtype).removeprefix("torch.")})
            copy_tokenizer(given, source, out)
    if dist.is_initialized():
        dist.barrier()


def plan_shards(config, stored, max_shard_bytes):
    """-> {file name: {tensor on disk: (how many of our parameters it is made of, its bytes)}}."""
    plan = {}
    for name, parameter, dtype in stored:
        pieces = disk_pieces(config, name)
        for disk_name, _, _ in pieces:
            count, size = plan.get(disk_name, (0, 0))
            more = parameter.numel() * dtype.itemsize // len(pieces)
            plan[disk_name] = count + 1, size + more
    shards = [{}]
    size = 0
    for disk_name, (count, more) in plan.items():
        if size and size + more > max_shard_bytes:
            shards.append({})
            size = 0
        size += more
        shards[-1][disk_name] = count, more
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    n = len(shards)
    return {f"model-{i + 1:05d}-of-{n:05d}.safetensors": shard for i, shard in enumerate(shards)}


def assembled(config, stored, shards, writes):
    """Yields (file name, {tensor on disk: tensor}) as soon as all of a file's tensors are there.

    Where `writes` is false nothing is kept: such a process only takes part in the gathering.
    """
    plan = {}
    for file, shard in shards.items():
        plan |= {disk_name: (file, count) for disk_name, (count, _) in shard.items()}
    parts = {}
    ready = {file: {} for file in shards}
    for name, parameter, dtype in stored:
        whole = isinstance(parameter, DTensor)
        tensor = parameter.full_tensor() if whole else parameter.detach()
        for disk_name, _, index in disk_pieces(config, name) if writes else []:
            file, count = plan[disk_name]
            part = tensor if index is None else tensor[index]
            parts.setdefault(disk_name, []).append(part.to("cpu", dtype))
            if len(parts[disk_name]) < count:
                continue
            pieces = parts.pop(disk_name)  # q, k, v come in the order of their rows
            ready[file][disk_name] = torch.cat(pieces) if count > 1 else pieces[0].contiguous()
            if len(ready[file]) == len(shards[file]):
                yield file, ready.pop(file)


def write_index(shards, out):
    if len(shards) == 1:
        return
    total = sum(size for shard in shards.values() for _, size in shard.values())
    places = {name: file for file, shard in shards.items() for name in shard}
    write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def portable(config, source, out):
    """config.json for what is written: the source's own with as little changed as possible."""
    raw = {k: v for k, v in config.raw.items() if k not in ("torch_dtype", "dtype")}
    raw["model_type"] = config.model_type  # dFactory's name goes with stacked experts only
    if config.num_nextn_predict_layers:
        raw["num_nextn_predict_layers"] = 0  # those layers were not read, and are not written
    return portable_code(raw, source, out)


def portable_code(raw, source, out):
    """`auto_map` names the Python files of a family that transformers does not have (LLaDA).

    They are copied where the source has them; of a model from the hub, whose code was not fetched,
    the map is told which repository they are in; otherwise it is dropped, as it would lead nowhere.
    """
    if not raw.get("auto_map"):
        return raw
    code = list(source.glob("*.py"))
    if code:
        for path in code:
            shutil.copyfile(path, out / path.name)
        return raw
    cached = re.search(r"/models--([^/]+)--([^/]+)/snapshots/", f"{source.absolute().as_posix()}/")

    def place(target):
        if isinstance(target, list):  # a tokenizer's: slow and fast
            return [place(t) for t in target]
        return target if target is None or "--" in target else f"{cached[1]}/{cached[2]}--{target}"

    if cached:
        return raw | {"auto_map": {k: place(target) for k, target in raw["auto_map"].items()}}
    return {k: v for k, v in raw.items() if k != "auto_map"}


def copy_tokenizer(given, source, out):
    """Tokenizer, chat template and generation_config.json, which then lists what ends an answer.

    A base model trained on a chat template's turns ends them with a token that its
    generation_config.json does not know: it would write on and on elsewhere.
    """
    for pattern in TOKENIZER_FILES:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, out / path.name)
    tokenizer_config = out / "tokenizer_config.json"
    if tokenizer_config.exists():
        found = read_json(tokenizer_config)
        if found.get("auto_map"):
            write_json(tokenizer_config, portable_code(found, source, out))
    if not (source / "tokenizer.json").exists():
        return
    try:
        tokenizer = given if hasattr(given, "end_of_turn_id") else load_tokenizer(source)
    except InputError:  # one that we cannot read: then nothing was trained with it
        return
    list_end(tokenizer.end_of_turn_id, out)


def list_end(end, out):
    """Add a token to the ends that generation_config.json lists."""
    path = out / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    listed = generation.get("eos_token_id")
    if listed is None:  # transformers then takes config.json's
        listed = read_json(out / "config.json").get("eos_token_id")
    ends = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if end is not None and end not in ends:
        ends = [end, *ends]
        write_json(path, generation | {"eos_token_id": ends if len(ends) > 1 else end})


# ------------------------------------------------------------------------------------------------
# Identity


def fingerprint(folder):
    """sha256 of the names, shapes and dtypes of a model's tensors and of a sample of their bytes.

    Three kilobytes of each tensor are read, at its beginning, middle and end: training changes all
    tensors, and a 30B model takes seconds. How they are spread over files does not count.
    Raises InputError for a file that is not safetensors.
    """
    digest = hashlib.sha256()
    files = weight_files(folder)
    headers = {path: read_header(path) for path in sorted(set(files.values()))}
    opened = {path: open(path, "rb") for path in headers}
    try:
        for name in sorted(files):
            start, header = headers[files[name]]
            entry = header.get(name)
            if entry is None:
                raise InputError(f"{files[name]}: the tensor {name} is not in it")
            first, end = entry["data_offsets"]
            digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
            for at in (first, (first + end) // 2, max(first, end - 1024)):
                opened[files[name]].seek(start + at)
                digest.update(opened[files[name]].read(min(1024, end - at)))
    finally:
        for file in opened.values():
            file.close()
    return digest.hexdigest()


def read_header(path):
    """A safetensors file -> where its data begin, and {name: {"dtype", "shape", "data_offsets"}}."""
    with open_weights(path):  # checks the whole header, and the size of the file
        pass
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return 8 + size, json.loads(file.read(size))
