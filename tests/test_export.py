"""plumbing/export.py: what other trainers read gives them the loss that train.py has."""

import builtins
import json

import hand_made
import numpy as np
import pytest
from worlds import KEYS, inside, make_world

import data
import train
from plumbing.config import InputError, load_select, read_json

select = load_select()


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return hand_made.Run()


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_labels_are_the_kept_tokens_at_their_places(run, capsys):
    out = select.main(run="sft", export="labels", show=0)
    mask, train_set = np.load(out / "mask.npy"), run.train_set
    rows = rows_of(out / "labels.jsonl")
    assert len(rows) == len(train_set)
    for row, (start, prompt_end, end) in zip(rows, train_set.spans, strict=True):
        assert set(row) == {"input_ids", "attention_mask", "labels", "weights"}
        ids = train_set.tokens[start:end].tolist()
        assert row["input_ids"] == ids and row["attention_mask"] == [1] * len(ids)
        assert row["labels"] == [t if keep else -100 for t, keep in zip(ids, mask[start:end], strict=True)]
        assert row["labels"][: prompt_end - start] == [-100] * (prompt_end - start)
        assert row["weights"] == mask[start:end].astype(float).tolist()
    said = capsys.readouterr().out
    assert f"{out}/labels.jsonl: 6 examples with input_ids, labels, weights" in said and "other than 1" not in said


def test_weights_are_exported_and_the_user_is_told_who_ignores_them(run, capsys):
    out = select.main(run="sft", rule="dft", export="labels", show=0)
    weights = np.concatenate([row["weights"] for row in rows_of(out / "labels.jsonl")])
    assert weights.tolist() == np.load(out / "mask.npy").astype(float).tolist()
    assert "a trainer that reads only labels trains on another loss" in capsys.readouterr().out


def test_an_example_without_labels_is_counted(run, capsys):
    rose = run.logprob(0).copy()
    start, prompt_end, end = run.train_set.spans[1]
    rose[prompt_end:end] += 1
    run.write(2, rose, np.array(hand_made.CORRECT[2], float))
    select.main(run="sft", export="labels", bottleneck=2, show=0)
    assert "1 of them have no label at all" in capsys.readouterr().out


def test_parquet_holds_the_same_rows(run):
    parquet = pytest.importorskip("pyarrow.parquet")
    jsonl = select.main(run="sft", export="labels", show=0)
    out = select.main(run="sft", export="labels", export_format="parquet", name="other", show=0)
    table = parquet.read_table(out / "labels.parquet")
    assert table.to_pylist() == rows_of(jsonl / "labels.jsonl")


def test_parquet_without_pyarrow_says_what_to_install(run, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match="needs pyarrow: pip install pyarrow"):
        select.main(run="sft", export="labels", export_format="parquet")


def test_trl_trains_on_it_to_our_losses(tmp_path):
    """Two full-batch steps of TRL's SFTTrainer on labels.jsonl, and two of train.py on mask.npy."""
    trl = pytest.importorskip("trl")
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    keys = KEYS | dict(steps=2, batch_size=0, micro_batch_size=9, schedule="constant", record_every=1,
                       save_every=0, resume_every=0, weight_decay=0.0, eval_data="")  # fmt: skip
    with inside(make_world(tmp_path, teacher=9, students=())):
        train.main(run="sft", **keys)
        folder = select.main(run="sft", bottleneck=1, share=0.4, export="labels", show=0)
        train.main(run="t3s", selection=str(folder), record_every=0)
        mask = np.load(folder / "mask.npy")
        assert 0 < mask.sum() < data.load("data/toy-1/teacher").response_mask().sum()
        arguments = trl.SFTConfig(
            output_dir="trl", max_steps=2, per_device_train_batch_size=9, learning_rate=1e-3, max_length=None,
            lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, logging_steps=1, report_to=[],
            save_strategy="no", use_cpu=True, bf16=False, dataloader_pin_memory=False,
            gradient_checkpointing=False)  # fmt: skip
        trainer = trl.SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained("data/toy-1/untrained", dtype="float32"),
            processing_class=AutoTokenizer.from_pretrained("data/toy-1/untrained"),
            train_dataset=load_dataset("json", data_files=f"{folder}/labels.jsonl", split="train", cache_dir="cache"),
            args=arguments)  # fmt: skip
        trainer.train()
        theirs = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        ours = [line["loss"] for line in map(json.loads, open("runs/t3s/log.jsonl")) if "loss" in line]
        assert len(ours) == 2 and theirs == pytest.approx(ours, abs=1e-4)  # TRL rounds what it logs to 4 digits
        assert abs(ours[0] - ours[1]) > 2e-3  # the second loss is that of updated weights
        plain = [line["loss"] for line in map(json.loads, open("runs/sft/log.jsonl")) if "loss" in line]
        assert abs(plain[0] - ours[0]) > 5e-4  # and the selection matters
        assert read_json(folder / "config.json")["export"] == "labels"
