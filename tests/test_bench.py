"""bench.py at tiny sizes: every section runs and its two sides agree. No times are checked here."""

import json
import os
from pathlib import Path

import bench
import bench_diffusion
import bench_parts
import measure
import pytest
import torch
import transformers

import model
import toy
from plumbing.config import InputError

STUDENT = Path(__file__).parent.parent / "students" / "toy-1"
QUICK = bench.Config(threads=1, repeats=1)


@pytest.fixture
def tiny(tmp_path):
    """A Llama made by transformers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def found(lines, what):
    """The one line of the table whose text has `what` in it."""
    [line] = [line for line in lines if what in line["what"]]
    return line


# --------------------------------------------------------------------------------------------------
# Against transformers


def test_training_and_generation_do_what_transformers_does(tiny, capsys):
    keys = dict(steps=3, repeats=1, new_tokens=5, threads=1)
    lines = bench.main(what="parity,train,generate", model=tiny, **keys)
    for name in ("transformers' Trainer", "TRL's SFTTrainer"):
        speed = found(lines, name)
        assert speed["ours"] > 0 and speed["other"] > 0 and speed["ratio"] > 0
        _, memory, losses = lines[lines.index(speed) :][:3]
        assert losses["what"] == "largest difference of the losses" and losses["ours"] < 1e-5
        assert 0.05 < memory["ours"] < 5 and 0.05 < memory["other"] < 5  # GB, with torch in it
    assert found(lines, "logits")["ours"] < 1e-5
    same = [line for line in lines if "same ids" in line["what"]]
    # with and without an end of text
    assert [(line["ours"], line["other"]) for line in same] == [(16, 16)] * 2
    last = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert last.startswith("generate: of these, same ids")


def test_decoding_and_batching_write_what_transformers_writes(tiny):
    examples = measure.random_examples(tiny)
    quick = bench.Config(model=str(tiny), threads=1, repeats=1, new_tokens=6)
    lines = bench.decode_section(quick, tiny, examples, batches=(1, 3))
    lines += bench.batching_section(quick, tiny, examples, answers=7, rows=3, every=8)
    same = [line for line in lines if "same ids" in line["what"]]
    assert [line["ours"] for line in same] == [line["other"] for line in same] == [1, 3, 7, 7]
    assert all(line["ratio"] > 0 for line in lines if "tokens/s" in line["what"])


def test_the_ids_of_texts_are_those_of_tokenizers(tmp_path):
    examples = []
    for i in range(300):
        examples.append({"prompt": "3 + 5 * 2 - 7 + 4 ?", "response": f"3 + 5 = 8 ; > {i}"})
    source = tmp_path / "traces.jsonl"
    source.write_text("\n".join(map(json.dumps, examples)))
    lines = bench.main(what="parity", model=str(STUDENT), data=str(source), threads=1)
    assert found(lines, "logits")["ours"] < 1e-4
    texts = found(lines, "texts")
    assert texts["ours"] == texts["other"] == 600


def test_the_random_student_has_the_shape_and_lengths_it_claims(tmp_path):
    folder = measure.random_student(tmp_path / "student")
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 576
    size = sum(p.numel() for p in model.load(folder).parameters())
    assert size == 134_515_008  # SmolLM2-135M's
    examples = measure.random_examples(folder)
    prompt, response = (examples.spans[:, i + 1] - examples.spans[:, i] for i in (0, 1))
    assert 85 < prompt.mean() < 97 and 115 < response.mean() < 137
    assert examples.tokens.max() < 49152 and examples.spans[-1, 2] == len(examples.tokens)


# --------------------------------------------------------------------------------------------------
# The loss and experts


def test_peak_memory_of_our_loss_does_not_grow_with_the_rows():
    V = 2**18
    chunk = 2**26 // V  # ours makes the logits of so many rows at a time, 256 MiB
    few, many = 6 * chunk, 12 * chunk  # up to LinearNLL.FEW chunks are kept
    ours = measure.alone(bench_parts.peaks_of_loss, "ours", 1, V, 4, (few, many))
    assert 4 * chunk * V < ours[few] < 5 * 4 * chunk * V
    assert ours[many] < 1.2 * ours[few]
    plain = measure.alone(bench_parts.peaks_of_loss, "all rows", 1, V, 4, (2 * chunk,))
    assert plain[2 * chunk] > 2 * 4 * 2 * chunk * V  # logits and their gradient at the least


def test_a_measuring_process_that_is_killed_is_an_error():
    with pytest.raises(InputError, match="the process that measured _exit was killed"):
        measure.alone(os._exit, 9)


def test_the_loss_section_leaves_out_what_does_not_fit(monkeypatch, capsys):
    # enough for 256 rows, not for 512
    monkeypatch.setattr(bench_parts, "free_memory", lambda: 2 * 3 * 4 * 256 * 500)
    measured = {"ours": 10**9, "all rows": 4 * 10**9}

    def alone(function, side, threads, vocabulary, width, sizes):
        return dict.fromkeys(sizes, measured[side])

    monkeypatch.setattr(bench_parts, "alone", alone)
    lines = bench_parts.loss_section(QUICK, None, None, vocabulary=500, width=8, rows=512)
    sides = [(line["ours"], line["other"], line["ratio"]) for line in lines[:3]]
    assert sides == [(1, 4, 4), (1, 4, 4), (1, None, None)]
    assert "all 512 rows" in capsys.readouterr().out
    assert len(lines) == 5 and all(line["ratio"] > 0 for line in lines[3:])


def test_both_ways_to_compute_the_loss_have_one_gradient():
    student, ids, targets = bench_parts.head_only(100, 16, 256, share=0.5)
    assert (targets != -100).float().mean() == 0.5
    gradients = []
    for step in (bench_parts.our_loss, bench_parts.plain_loss):
        step(student, ids, targets)
        gradients.append(student.model.embed_tokens.weight.grad.clone())
    assert torch.allclose(*gradients, atol=1e-4) and gradients[1].abs().max() > 0.1


def test_grouped_experts_equal_a_loop_over_them():
    sizes = dict(experts=16, width=8, expert_width=4, rows=(3, 20))
    lines = bench_parts.moe_section(QUICK, None, None, **sizes)
    assert len(lines) == 4
    assert found(lines, "largest difference")["ours"] < 1e-5


def test_what_train_pys_keys_cost(tiny):
    lines = bench.main(what="packing,recording,checkpoint", model=tiny, repeats=1, threads=1)
    padding = found(lines, "share of padding")
    assert padding["ours"] < padding["other"]
    assert found(lines, "first loss")["ours"] < 1e-5
    for what in ("seconds of a sweep", "resume state", "seconds a step"):
        assert found(lines, what)["ours"] > 0


# --------------------------------------------------------------------------------------------------
# Masked diffusion


def test_the_diffusion_loss_of_masked_positions_is_that_of_all(monkeypatch):
    peaks = {"ours": 10**8, "all rows": 3 * 10**8}
    monkeypatch.setattr(bench_diffusion, "alone", lambda function, side, *rest: peaks[side])
    sizes = dict(rows=1, length=16, vocabulary=500)
    lines = bench_diffusion.masked_section(QUICK, None, None, **sizes)
    assert found(lines, "memory")["ratio"] == pytest.approx(3)
    assert found(lines, "seconds")["ratio"] > 0
    assert found(lines, "difference")["ours"] < 1e-5


def test_cached_blocks_write_the_same_tokens():
    lines = bench_diffusion.blocks_section(QUICK, None, None, prompt=40, new_tokens=40)
    assert found(lines, "the same")["ours"] == found(lines, "the same")["other"] == 40


def test_a_lower_threshold_writes_more_tokens_a_pass(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert bench_diffusion.threshold_section(QUICK, None, None) == []
    assert "toy.py" in capsys.readouterr().out
    toy.main(seed=1, teacher_problems=1, unseen_problems=20)
    student = STUDENT.with_name("toy-diffusion-1")
    sizes = dict(student=student, thresholds=(1.0, 0.3))
    lines = bench_diffusion.threshold_section(QUICK, None, None, **sizes)
    assert lines[0]["ours"] == lines[0]["other"] == 1.0
    assert lines[1]["ours"] == lines[1]["other"] > 0.8
    assert lines[2]["ours"] > 2 and lines[3]["ours"] < 0.8


# --------------------------------------------------------------------------------------------------
# Refused


def test_bad_keys():
    with pytest.raises(InputError, match="--what=speed: must be among parity, train, generate"):
        bench.main(what="speed")
    with pytest.raises(InputError, match="--data needs --model"):
        bench.main(data="x.jsonl")
