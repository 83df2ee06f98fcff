"""hf/weights.py: folders that are written load in transformers, and what is read is what lies there."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from twins import close, edit_config, refused, same_tensors, some_ids, tensors

import model
from hf import weights
from hf.tokenizer import load_tokenizer
from plumbing.config import InputError

STUDENTS = Path(__file__).parent.parent / "students"


def test_shards_written_by_transformers(twin, tmp_path):
    folder, oracle = twin("qwen3")
    oracle.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(model.load(tmp_path)(some_ids()), model.load(folder)(some_ids()))


def test_bfloat16_in_and_out(twin, tmp_path):
    folder, oracle = twin("qwen2")
    student = model.load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    model.save(student, folder, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    stored = tensors(tmp_path / "out")
    same_tensors(stored, {name: t.bfloat16() for name, t in tensors(folder).items()})
    for name, p in model.load(tmp_path / "out").named_parameters():  # float32: the same numbers
        assert torch.equal(p, stored[name].float())
    exact, rounded = oracle(some_ids()).logits, student(some_ids())
    assert rounded.dtype == torch.bfloat16
    close(rounded, exact, 0.1)
    assert student(some_ids(), targets=some_ids()).dtype == torch.float32


def test_save_copies_the_tokenizer_and_nothing_else(twin, copy, tmp_path):
    source, out = copy(), tmp_path / "out"
    wanted = {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "merges.txt",
        "vocab.json",
        "generation_config.json",
        "special_tokens_map.json",
    }
    for name in wanted | {"pytorch_model.bin", "modeling_x.py", "optimizer.pt"}:
        (source / name).write_text("{}")
    model.save(model.load(source), source, out)
    assert {p.name for p in out.iterdir()} == wanted | {"config.json", "model.safetensors"}
    model.save(model.load(out), out, out)  # in place
    assert {p.name for p in out.iterdir()} == wanted | {"config.json", "model.safetensors"}
    same_tensors(tensors(out), tensors(source))


def test_save_erases_nothing_but_an_older_model(twin, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.json").write_text("{}")
    with pytest.raises(InputError, match="mine: holds other things .*; name another folder"):
        model.save(model.load(twin("qwen3")[0]), twin("qwen3")[0], tmp_path / "mine")
    assert (tmp_path / "mine/config.json").read_text() == "{}" and len(
        list(tmp_path.iterdir())
    ) == 1


def test_a_save_that_fails_midway_leaves_the_old_folder(twin, tmp_path, monkeypatch):
    folder, out = twin("qwen3")[0], tmp_path / "out"
    student = model.load(folder)
    model.save(student, folder, out, max_shard_bytes=30_000)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    calls = []

    def disk_full(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("No space left on device")
        return save_file(*args, **kwargs)

    monkeypatch.setattr(weights, "save_file", disk_full)
    with torch.no_grad():
        student.lm_head.weight.zero_()
    with pytest.raises(OSError, match="No space"):
        model.save(student, folder, out, max_shard_bytes=30_000)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_stored_rope_tables_are_ignored(copy):
    folder = copy("llama")
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in range(2)}
    save_file(tensors(folder) | buffers, folder / "model.safetensors")
    model.load(folder)


def test_a_tied_checkpoint_may_store_its_head_as_well(twin, copy):
    """Qwen3-1.7B does."""
    folder = copy("qwen3-tied")
    stored = tensors(folder)
    head = {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}
    save_file(stored | head, folder / "model.safetensors")
    assert torch.equal(
        model.load(folder)(some_ids()), model.load(twin("qwen3-tied")[0])(some_ids())
    )


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(copy):
    """transformers would use the head and not the embedding, so to take the embedding is to train another model."""
    folder = copy("qwen3-tied")
    stored = tensors(folder)
    other = stored["model.embed_tokens.weight"].clone()
    other[96, 47] += 1
    save_file(stored | {"lm_head.weight": other}, folder / "model.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(theirs.lm_head.weight, other)
    refused(folder, "lm_head.weight differs", "tie_word_embeddings")
    edit_config(folder, tie_word_embeddings=False)  # the way out that the message names
    close(model.load(folder)(some_ids()), theirs(some_ids()).logits)


def test_a_single_file_wins_over_an_index_that_was_left_beside_it(twin, tmp_path):
    folder, _ = twin("qwen3")
    student = model.load(folder)
    with torch.no_grad():
        student.model.norm.weight.add_(1)
    model.save(student, folder, tmp_path / "sharded", max_shard_bytes=30_000)
    assert len(list((tmp_path / "sharded").glob("model-*"))) > 1
    shutil.copy(folder / "model.safetensors", tmp_path / "sharded")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    for name, p in model.load(tmp_path / "sharded").named_parameters():
        assert torch.equal(p, theirs.get_parameter(name)), name
    same_tensors(dict(theirs.state_dict()), tensors(folder))


def test_bfloat16_on_the_way_out_only(twin, tmp_path):
    """--export_dtype: the numbers of a float32 student, rounded once, and half the size."""
    folder, _ = twin("qwen3")
    model.save(model.load(folder), folder, tmp_path / "out", dtype=torch.bfloat16)
    same_tensors(tensors(tmp_path / "out"), {n: t.bfloat16() for n, t in tensors(folder).items()})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    close(model.load(tmp_path / "out")(some_ids()), theirs.float()(some_ids()).logits)


# -------------------------------------------------------------------------------------------------
# What a saved folder says to other programs


@pytest.fixture
def toy(tmp_path):
    """A copy of a shipped student, whose tokenizer has a chat template that ends a turn with <|end|>, id 0."""
    return Path(shutil.copytree(STUDENTS / "toy-1", tmp_path / "toy"))


@pytest.mark.parametrize(
    "eos, generation, saved",
    [
        (3, None, [0, 3]),  # config.json alone knows an end
        (0, None, None),  # nothing to add: no file is made
        (3, {"eos_token_id": 3, "top_k": 20}, [0, 3]),
        (3, {"eos_token_id": [3, 2]}, [0, 3, 2]),
        (3, {"eos_token_id": [3, 0]}, [3, 0]),
        (None, {"temperature": 0.6, "do_sample": True}, 0),
    ],
)
def test_what_ended_the_turns_in_training_ends_an_answer_elsewhere(
    toy, tmp_path, eos, generation, saved
):
    edit_config(toy, eos_token_id=eos)
    if generation is not None:
        (toy / "generation_config.json").write_text(json.dumps(generation))
    out = tmp_path / "out"
    model.save(model.load(toy), toy, out)
    if saved is None:
        assert not (out / "generation_config.json").exists()
        return
    written = json.loads((out / "generation_config.json").read_text())
    assert written == (generation or {}) | {"eos_token_id": saved}
    theirs = AutoModelForCausalLM.from_pretrained(out)
    assert theirs.generation_config.eos_token_id == saved


def test_transformers_stops_where_the_student_stops(toy, tmp_path):
    """A base model whose files know another end than the one that its training wrote."""
    edit_config(toy, eos_token_id=3)
    prompt = torch.tensor([[1, *load_tokenizer(toy).encode("3+5?"), 2]])
    model.save(model.load(toy), toy, tmp_path / "out")
    ids = {}
    for folder in (toy, tmp_path / "out"):
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        ids[folder] = theirs.generate(prompt, max_new_tokens=100, do_sample=False, pad_token_id=0)[
            0
        ]
    stopped = ids[tmp_path / "out"].tolist()
    assert stopped[-1] == 0 and len(ids[toy]) == prompt.shape[1] + 100 > len(stopped)


CODE = {
    "configuration_tiny.py": """if True:
        from transformers import PretrainedConfig
        class TinyConfig(PretrainedConfig):
            model_type = "tiny_llada"
    """,
    "modeling_tiny.py": """if True:
        import torch
        from transformers import PreTrainedModel
        from .configuration_tiny import TinyConfig
        class TinyModel(PreTrainedModel):
            config_class = TinyConfig
            def __init__(self, config):
                super().__init__(config)
                self.body = torch.nn.Linear(2, 2)
                self.post_init()
    """,
}
AUTO_MAP = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyModel"}


def test_code_that_a_family_needs_elsewhere_travels_with_the_weights(copy, tmp_path):
    """LLaDA is loaded in transformers by its own files, with trust_remote_code; we copy and never run them."""
    source, out = copy(), tmp_path / "out"
    edit_config(source, auto_map=AUTO_MAP)
    for name, text in CODE.items():
        (source / name).write_text(text)
    model.save(model.load(source), source, out)
    edit_config(
        out, model_type="tiny_llada"
    )  # as transformers would not look at auto_map for its own families
    assert type(AutoConfig.from_pretrained(out, trust_remote_code=True)).__name__ == "TinyConfig"
    assert type(AutoModel.from_pretrained(out, trust_remote_code=True)).__name__ == "TinyModel"


def test_code_on_the_hub_is_named_by_its_repository(copy, tmp_path):
    source = tmp_path / "hub/models--org--name/snapshots/0123456"
    source.parent.mkdir(parents=True)
    copy().rename(source)
    edit_config(source, auto_map=AUTO_MAP | {"AutoModelForCausalLM": "else/where--modeling_x.X"})
    model.save(model.load(source), source, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["auto_map"] == {
        "AutoConfig": "org/name--configuration_tiny.TinyConfig",
        "AutoModel": "org/name--modeling_tiny.TinyModel",
        "AutoModelForCausalLM": "else/where--modeling_x.X",
    }


def test_a_map_to_code_that_is_nowhere_is_dropped(copy, tmp_path):
    source = copy()
    edit_config(source, auto_map=AUTO_MAP)
    model.save(model.load(source), source, tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out/config.json").read_text())


# -------------------------------------------------------------------------------------------------
# Identity


def test_the_fingerprint_is_of_the_weights_and_not_of_their_files(twin, tmp_path):
    folder, _ = twin("qwen3-moe")
    student = model.load(folder)
    model.save(student, folder, tmp_path / "one")
    model.save(student, folder, tmp_path / "many", max_shard_bytes=20_000)
    edit_config(tmp_path / "many", comment="not a weight")
    prints = {weights.fingerprint(f) for f in (folder, tmp_path / "one", tmp_path / "many")}
    assert len(prints) == 1


def test_a_changed_tensor_changes_the_fingerprint_whichever_it_is(twin, copy):
    folder = copy("qwen2")
    before = weights.fingerprint(folder)
    stored = tensors(folder)
    prints = {before}
    for name, tensor in stored.items():
        save_file(stored | {name: tensor + 1e-3}, folder / "model.safetensors")
        prints.add(weights.fingerprint(folder))
    assert len(prints) == len(stored) + 1
    renamed = {f"x.{name}": tensor for name, tensor in stored.items()}
    save_file(renamed, folder / "model.safetensors")
    assert weights.fingerprint(folder) not in prints
