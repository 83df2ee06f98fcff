"""A selection as other trainers read it: one row per example, with input_ids, labels and weights.

`python select.py --run=sft --export=labels` writes it beside mask.npy, as labels.jsonl or, with
--export_format=parquet, as labels.parquet:

    input_ids       prompt and response, as this project trains on them
    attention_mask  all 1; Axolotl wants the column
    labels          the same ids, -100 where a token is not in the loss; not shifted, as usual
    weights         float, how much each token counts; 0 where the label is -100

    TRL            SFTTrainer(train_dataset=load_dataset("json", data_files="labels.jsonl"))
    Axolotl        datasets: {path: labels.jsonl, ds_type: json}, without a type
    LLaMA-Factory  load_dataset(...).save_to_disk(D), then tokenized_path: D
    verl           a custom dataset class: loss_mask = labels != -100

These trainers average the loss over the labels of a step, as train.py does, so they make the same
updates. They ignore `weights`, which matters only for a rule that weights tokens.
Next: plumbing/screen.py.
"""

import json

import numpy as np

from plumbing.config import InputError

FORMATS = ("jsonl", "parquet")


def check_export(cfg):
    """Raises InputError for an export that cannot be written; cfg is select.py's Config."""
    if cfg.export == "":
        return
    if cfg.export != "labels":
        raise InputError(f"--export={cfg.export}: must be labels")
    if cfg.kind != "keep" or cfg.rule == "rrt":
        raise InputError("--export=labels: only a --kind=keep selection can be said in labels")
    if cfg.export_format == "parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise InputError(
                "--export_format=parquet needs pyarrow: pip install pyarrow (or use jsonl)"
            ) from None


def labelled(train_set, mask):
    """Yields a row per example. mask: (n_tokens,) bool or float32, as in mask.npy."""
    for start, _, end in train_set.spans:
        ids = train_set.tokens[start:end].astype(np.int64)
        weights = mask[start:end].astype(np.float64)
        yield {
            "input_ids": ids.tolist(),
            "attention_mask": [1] * len(ids),
            "labels": np.where(weights > 0, ids, -100).tolist(),
            "weights": weights.tolist(),
        }


def write_labels(folder, train_set, mask, form="jsonl"):
    """Write folder/labels.jsonl or folder/labels.parquet -> its path."""
    path = folder / f"labels.{form}"
    rows = labelled(train_set, mask)
    if form == "parquet":
        write_parquet(path, rows)
    else:
        with open(path, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row) + "\n")
    return path


def write_parquet(path, rows, rows_at_once=256):
    import pyarrow
    from pyarrow import parquet

    whole = pyarrow.list_(pyarrow.int64())
    real = pyarrow.list_(pyarrow.float64())
    kinds = {"input_ids": whole, "attention_mask": whole, "labels": whole, "weights": real}
    schema = pyarrow.schema(kinds)
    with parquet.ParquetWriter(path, schema) as writer:
        block = []
        for row in rows:
            block.append(row)
            if len(block) == rows_at_once:
                writer.write_table(pyarrow.Table.from_pylist(block, schema=schema))
                block = []
        if block:
            writer.write_table(pyarrow.Table.from_pylist(block, schema=schema))


def describe_labels(path, train_set, mask):
    """What a user of another trainer must know."""
    empty = sum(not mask[start:end].any() for start, _, end in train_set.spans)
    print(f"{path}: {len(train_set)} examples with input_ids, labels, weights")
    if empty:
        print(f"  {empty} of them have no label at all: drop them if your trainer cannot")
    if mask.dtype != bool and ((mask > 0) & (mask != 1)).any():
        print(
            "  weights other than 1 occur: a trainer that reads only labels trains on another loss"
        )
