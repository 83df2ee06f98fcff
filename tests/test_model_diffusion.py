"""The diffusion families of model.py. No library that installs has them, so the oracles are made here:

LLaDA-8B is transformers' Llama under other names and without the causal mask; LLaDA2 is written out below in float64,
token by token and with plain loops, from the formulas of its authors' modeling file.
"""

import json
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from twins import close, edit_config, on_disk, on_meta, randomize, refused, same_tensors, tensors

import model
from hf import families

# ---------------------------------------------------------------------------------------------------------------------
# LLaDA-8B

LLADA = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "d_model": 48,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 4,
    "mlp_hidden_size": 80,
    "mlp_ratio": 4,
    "vocab_size": 90,
    "embedding_size": 97,
    "weight_tying": False,
    "activation_type": "silu",
    "block_type": "llama",
    "block_group_size": 1,
    "rope": True,
    "rope_theta": 500000.0,
    "rope_full_precision": True,
    "layer_norm_type": "rms",
    "rms_norm_eps": 1e-3,
    "attention_layer_norm": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "alibi": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "multi_query_attention": None,
    "max_sequence_length": 64,
    "mask_token_id": 89,
    "eos_token_id": 3,
    "pad_token_id": 3,
    "torch_dtype": "float32",
}
TWIN_NAMES = {  # LLaDA's name of each of Llama's layers; N is the block
    "model.embed_tokens": "model.transformer.wte",
    "model.layers.N.input_layernorm": "model.transformer.blocks.N.attn_norm",
    "model.layers.N.self_attn.q_proj": "model.transformer.blocks.N.q_proj",
    "model.layers.N.self_attn.k_proj": "model.transformer.blocks.N.k_proj",
    "model.layers.N.self_attn.v_proj": "model.transformer.blocks.N.v_proj",
    "model.layers.N.self_attn.o_proj": "model.transformer.blocks.N.attn_out",
    "model.layers.N.post_attention_layernorm": "model.transformer.blocks.N.ff_norm",
    "model.layers.N.mlp.gate_proj": "model.transformer.blocks.N.ff_proj",
    "model.layers.N.mlp.up_proj": "model.transformer.blocks.N.up_proj",
    "model.layers.N.mlp.down_proj": "model.transformer.blocks.N.ff_out",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
}


def llada_name(llama_name):
    layer, kind = llama_name.rsplit(".", 1)
    number = next((part for part in layer.split(".") if part.isdigit()), "N")
    return TWIN_NAMES[layer.replace(f".{number}.", ".N.")].replace("N", number) + "." + kind


@pytest.fixture(params=["LLaDA-8B", "grouped-and-tied"])
def llada(request, tmp_path):
    """(folder, the Llama it is a twin of). The second layout is iLLaDA's."""
    changes = {} if request.param == "LLaDA-8B" else {"n_kv_heads": 2, "weight_tying": True}
    raw = LLADA | changes
    oracle = randomize(
        AutoModelForCausalLM.from_config(
            LlamaConfig(
                vocab_size=97,
                hidden_size=48,
                intermediate_size=80,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=raw["n_kv_heads"],
                tie_word_embeddings=raw["weight_tying"],
                rms_norm_eps=1e-3,
                rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            )
        )
    )
    folder = tmp_path / "llada"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(
        {llada_name(n): p.detach() for n, p in oracle.named_parameters()},
        folder / "model.safetensors",
    )
    return folder, oracle


def test_llada_is_a_llama_without_causal_mask_and_without_shift(llada):
    folder, oracle = llada
    student = model.load(folder)
    torch.manual_seed(1)
    ids, targets, weights = (
        torch.randint(0, 97, (3, 23)),
        torch.randint(0, 97, (3, 23)),
        torch.rand(3, 23),
    )
    targets[torch.rand(3, 23) < 0.5] = -100
    logits = oracle(ids, attention_mask=torch.zeros(1, 1, 23, 23), use_cache=False).logits
    close(student(ids), logits)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(
        3, 23
    )
    nll = student(ids, targets=targets)
    close(nll, expected)
    (expected * weights).sum().backward()
    (nll * weights).sum().backward()
    theirs = {llada_name(name): p.grad for name, p in oracle.named_parameters()}
    for name, p in student.named_parameters():
        [(disk_name, _, _)] = families.disk_pieces(student.config, name)
        close(p.grad, theirs.pop(disk_name))
    assert not theirs
    close(student(ids, attention="causal"), oracle(ids).logits)


def test_llada_config(llada):
    config = families.read_config(llada[0])
    assert config.is_diffusion and config.attention == "full"
    assert (config.mask_token_id, config.eos_token_ids, config.pad_token_id) == (89, [3], 3)
    assert (config.vocab_size, config.head_dim, config.rope_theta) == (97, 12, 500000.0)


@pytest.mark.parametrize("limit", [5 * 10**9, 20_000])
def test_llada_saves_what_it_loaded(llada, tmp_path, limit):
    folder, out = llada[0], tmp_path / "out"
    model.save(model.load(folder), folder, out, max_shard_bytes=limit)
    same_tensors(tensors(out), tensors(folder))
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )


def test_llada_options_that_are_not_computed_are_refused(llada):
    folder, _ = llada
    for key in ("alibi", "attention_layer_norm", "input_emb_norm", "scale_logits"):
        edit_config(folder, **LLADA | {key: True})
        refused(folder, "config.json", key)
    for key, value in (
        ("rope", False),
        ("layer_norm_type", "default"),
        ("block_type", "sequential"),
    ):
        edit_config(folder, **LLADA | {key: value})
        refused(folder, "config.json", f"{key} {value!r} is not supported")
    edit_config(folder, **LLADA | {"mask_token_id": 97})
    refused(folder, "config.json", "mask_token_id 97")
    edit_config(folder, **LLADA, remove=["mask_token_id"])
    refused(folder, "config.json", "mask_token_id")


def test_full_size_llada_8b(tmp_path):
    raw = LLADA | {
        "d_model": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 32,
        "mlp_hidden_size": 12288,
        "vocab_size": 126464,
        "embedding_size": 126464,
        "mask_token_id": 126336,
        "max_sequence_length": 4096,
    }
    shapes = on_disk(on_meta(raw, tmp_path))
    wide, tall, square, flat = [12288, 4096], [4096, 12288], [4096, 4096], [4096]
    block = {
        "attn_norm": flat,
        "q_proj": square,
        "k_proj": square,
        "v_proj": square,
        "attn_out": square,
        "ff_norm": flat,
        "ff_proj": wide,
        "up_proj": wide,
        "ff_out": tall,
    }
    expected = {
        f"model.transformer.blocks.{i}.{n}.weight": s for i in range(32) for n, s in block.items()
    }
    expected["model.transformer.wte.weight"] = expected["model.transformer.ff_out.weight"] = [
        126464,
        4096,
    ]
    expected["model.transformer.ln_f.weight"] = flat
    assert shapes == expected and len(shapes) == 291
    assert sum(math.prod(s) for s in shapes.values()) == 8_015_581_184


# ---------------------------------------------------------------------------------------------------------------------
# LLaDA2: the model again, one token at a time

LLADA2 = {
    "model_type": "llada2_moe",
    "architectures": ["LLaDA2MoeModelLM"],
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
    "vocab_size": 61,
    "partial_rotary_factor": 0.5,
    "rope_theta": 600000,
    "rope_scaling": None,
    "rms_norm_eps": 1e-3,
    "max_position_embeddings": 64,
    "num_experts": 16,
    "num_experts_per_tok": 3,
    "num_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "norm_topk_prob": True,
    "moe_router_enable_expert_bias": True,
    "router_dtype": "fp32",
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_bias": False,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "pad_token_id": 2,
    "eos_token_id": 2,
    "mask_token_id": 60,
    "block_length": 4,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "torch_dtype": "float32",
}


def llada2_shapes(c):
    """{name on disk: shape}, from the table of the released checkpoint."""
    C, D, H, K, E = (
        c[k]
        for k in (
            "hidden_size",
            "head_dim",
            "num_attention_heads",
            "num_key_value_heads",
            "num_experts",
        )
    )

    def mlp(prefix, width):
        return {
            f"{prefix}.gate_proj.weight": [width, C],
            f"{prefix}.up_proj.weight": [width, C],
            f"{prefix}.down_proj.weight": [C, width],
        }

    shapes = {
        "model.word_embeddings.weight": [c["vocab_size"], C],
        "lm_head.weight": [c["vocab_size"], C],
        "model.norm.weight": [C],
    }
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": [C],
            f"{layer}.post_attention_layernorm.weight": [C],
            f"{layer}.attention.query_key_value.weight": [(H + 2 * K) * D, C],
            f"{layer}.attention.query_layernorm.weight": [D],
            f"{layer}.attention.key_layernorm.weight": [D],
            f"{layer}.attention.dense.weight": [C, H * D],
        }
        if c["use_qkv_bias"]:
            shapes[f"{layer}.attention.query_key_value.bias"] = [(H + 2 * K) * D]
        if c["use_bias"]:
            shapes[f"{layer}.attention.dense.bias"] = [C]
        if i < c["first_k_dense_replace"]:
            shapes |= mlp(f"{layer}.mlp", c["intermediate_size"])
            continue
        shapes |= {f"{layer}.mlp.gate.weight": [E, C], f"{layer}.mlp.gate.expert_bias": [E]}
        for e in range(E):
            shapes |= mlp(f"{layer}.mlp.experts.{e}", c["moe_intermediate_size"])
        shapes |= mlp(
            f"{layer}.mlp.shared_experts", c["moe_intermediate_size"] * c["num_shared_experts"]
        )
    return shapes


def largest(scores, n):
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:n])


def route(c, scores, bias):
    """Sigmoid scores of one token and the experts' bias, lists of floats -> the numbers of its experts."""
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    per = len(choice) // c["n_group"]
    groups = [choice[g * per : (g + 1) * per] for g in range(c["n_group"])]
    kept = largest([sum(sorted(group)[-2:]) for group in groups], c["topk_group"])
    allowed = [value if e // per in kept else -math.inf for e, value in enumerate(choice)]
    return largest(allowed, c["num_experts_per_tok"])


def brute_force(c, w, ids, positions, allowed):
    """One sequence: disk tensors w (float64), ids and positions (lists), allowed[i][j]: i sees j -> logits (T, V)."""
    D, H, K = c["head_dim"], c["num_attention_heads"], c["num_key_value_heads"]
    rotated = int(D * c["partial_rotary_factor"])

    def norm(x, weight):
        return x / torch.sqrt((x * x).mean() + c["rms_norm_eps"]) * weight

    def rotate(x, position):
        out = list(x)
        for i in range(rotated // 2):
            a, b, angle = (
                x[i],
                x[i + rotated // 2],
                position * c["rope_theta"] ** (-2 * i / rotated),
            )
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + rotated // 2] = b * math.cos(angle) + a * math.sin(angle)
        return torch.stack(out)

    def mlp(prefix, x):
        gate, up = w[f"{prefix}.gate_proj.weight"] @ x, w[f"{prefix}.up_proj.weight"] @ x
        return w[f"{prefix}.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)

    xs = [w["model.word_embeddings.weight"][i] for i in ids]
    for n in range(c["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        queries, keys, values = [], [], []
        for x, position in zip(xs, positions, strict=True):
            qkv = w[f"{layer}.attention.query_key_value.weight"] @ norm(
                x, w[f"{layer}.input_layernorm.weight"]
            )
            qkv = (qkv + w.get(f"{layer}.attention.query_key_value.bias", 0)).view(H + 2 * K, D)
            q_norm, k_norm = (
                w[f"{layer}.attention.{m}_layernorm.weight"] for m in ("query", "key")
            )
            queries.append([rotate(norm(qkv[h], q_norm), position) for h in range(H)])
            keys.append([rotate(norm(qkv[H + k], k_norm), position) for k in range(K)])
            values.append([qkv[H + K + k] for k in range(K)])
        for i in range(len(xs)):
            heads, seen = [], [j for j in range(len(ids)) if allowed[i][j]]
            for h in range(H):
                k = h // (H // K)
                scores = torch.stack(
                    [queries[i][h] @ keys[j][k] / math.sqrt(D) for j in seen]
                ).exp()
                heads.append(
                    sum(s / scores.sum() * values[j][k] for s, j in zip(scores, seen, strict=True))
                )
            out = w[f"{layer}.attention.dense.weight"] @ torch.cat(heads)
            xs[i] = xs[i] + out + w.get(f"{layer}.attention.dense.bias", 0)
        for i, x in enumerate(xs):
            x = norm(x, w[f"{layer}.post_attention_layernorm.weight"])
            if n < c["first_k_dense_replace"]:
                xs[i] = xs[i] + mlp(f"{layer}.mlp", x)
                continue
            scores = torch.sigmoid(w[f"{layer}.mlp.gate.weight"] @ x)
            chosen = route(c, scores.tolist(), w[f"{layer}.mlp.gate.expert_bias"].tolist())
            total = sum(scores[e] for e in chosen) + 1e-20
            for e in chosen:
                weight = scores[e] / total * c["routed_scaling_factor"]
                xs[i] = xs[i] + weight * mlp(f"{layer}.mlp.experts.{e}", x)
            xs[i] = xs[i] + mlp(f"{layer}.mlp.shared_experts", x)
    return torch.stack([w["lm_head.weight"] @ norm(x, w["model.norm.weight"]) for x in xs])


def make_llada2(folder, **changes):
    c = LLADA2 | changes
    torch.manual_seed(3)
    w = {}
    for name, shape in llada2_shapes(c).items():
        w[name] = torch.randn(shape) * (0.3 if len(shape) == 1 else 0.25) + (
            1.0 if "norm" in name else 0.0
        )
    (folder / "config.json").write_text(json.dumps(c))
    save_file(w, folder / "model.safetensors")
    return c, w


def block_causal(T, size):
    return [[j // size <= i // size for j in range(T)] for i in range(T)]


@pytest.mark.parametrize("biases", [False, True])
def test_llada2_equals_the_loops(tmp_path, biases):
    c, w = make_llada2(tmp_path, use_qkv_bias=biases, use_bias=biases)
    student, T = model.load(tmp_path), 11  # not a multiple of the block
    torch.manual_seed(4)
    ids, targets, weights = (
        torch.randint(0, 61, (2, T)),
        torch.randint(0, 61, (2, T)),
        torch.rand(2, T),
    )
    targets[torch.rand(2, T) < 0.4] = -100
    exact = {name: t.double().requires_grad_("expert_bias" not in name) for name, t in w.items()}
    logits = torch.stack(
        [brute_force(c, exact, row, range(T), block_causal(T, 4)) for row in ids.tolist()]
    )
    close(student(ids), logits, 1e-4)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, T)
    nll = student(ids, targets=targets)
    close(nll, expected, 1e-4)
    (expected * weights).sum().backward()
    (nll * weights).sum().backward()
    compared = Counter()
    for name, p in student.named_parameters():
        for disk_name, rows, index in families.disk_pieces(student.config, name):
            theirs = exact[disk_name].grad
            theirs = (
                torch.zeros_like(w[disk_name]) if theirs is None else theirs
            )  # an expert that nobody chose
            theirs = theirs if rows is None else theirs[rows]
            if name == "model.embed_tokens.weight":
                theirs[c["pad_token_id"]] = 0  # the public code's padding_idx: this row is not trained
            close(p.grad if index is None else p.grad[index], theirs, 1e-4)
            compared[disk_name] += 1
    assert compared.keys() == {name for name in w if "expert_bias" not in name}
    assert {n for count, n in ((v, k) for k, v in compared.items()) if count == 3} == {
        n for n in w if "query_key_value" in n
    }


def test_llada2_on_noisy_and_clean_copies_side_by_side(tmp_path):
    """The training input [x_t, x_0]: a mask of its own and every position twice."""
    c, w = make_llada2(tmp_path)
    L, block = 8, 4
    torch.manual_seed(5)
    ids, positions = torch.randint(0, 61, (1, 2 * L)), [*range(L), *range(L)]

    def allowed(i, j):
        a, b, noisy_i, noisy_j = i % L // block, j % L // block, i < L, j < L
        if noisy_i:
            return a == b if noisy_j else b < a
        return not noisy_j and b <= a

    mask = [[allowed(i, j) for j in range(2 * L)] for i in range(2 * L)]
    expected = brute_force(
        c, {n: t.double() for n, t in w.items()}, ids[0].tolist(), positions, mask
    )
    ours = model.load(tmp_path)(
        ids, positions=torch.tensor([positions]), attention=torch.tensor(mask)[None, None]
    )
    close(ours[0], expected, 1e-4)


def test_router_equals_the_loops_and_every_part_of_it_matters(tmp_path):
    """At LLaDA2-mini's proportions. The bias moves the choice, never the weight of what is chosen."""
    c, _ = make_llada2(tmp_path, num_experts=32, n_group=8, topk_group=4, num_experts_per_tok=8)
    router = model.Router(families.read_config(tmp_path))
    torch.manual_seed(6)
    with torch.no_grad():
        router.weight.normal_(), router.expert_bias.normal_(std=0.3)
        x = torch.randn(200, 32)
        weights, experts = router(x)
    scores, bias = (
        torch.sigmoid(x.double() @ router.weight.detach().double().T).tolist(),
        router.expert_bias.tolist(),
    )
    moved = ungrouped = 0
    for row in range(200):
        chosen = route(c, scores[row], bias)
        assert sorted(experts[row].tolist()) == chosen
        total = sum(scores[row][e] for e in chosen)
        for e, weight in zip(experts[row].tolist(), weights[row].tolist(), strict=True):
            assert weight == pytest.approx(2.5 * scores[row][e] / total, rel=1e-5)
        moved += chosen != route(c, scores[row], [0.0] * 32)
        ungrouped += chosen != route(c | {"n_group": 1, "topk_group": 1}, scores[row], bias)
    assert moved > 100 and ungrouped > 100
    assert weights.dtype == torch.float32 and router(x.bfloat16())[0].dtype == torch.float32


def test_block_mask_counts_blocks_from_position_0(tmp_path):
    positions = torch.arange(70)[None]
    mask = model.attention_mask("block", positions, positions, 32)
    assert mask.shape == (1, 1, 70, 70) and mask[0, 0].tolist() == block_causal(70, 32)
    later = model.attention_mask("block", positions[:, 40:], positions, 32)  # as with a cache
    assert later[0, 0].tolist() == block_causal(70, 32)[40:]
    make_llada2(tmp_path)
    student, ids = model.load(tmp_path), torch.arange(11)[None]
    seen = torch.tensor(block_causal(11, 4))[None, None]
    close(student(ids), student(ids, attention=seen))
    close(
        student(ids, attention="full"),
        student(ids, attention=torch.ones(1, 1, 11, 11, dtype=torch.bool)),
    )
    assert (student(ids) - student(ids, attention="causal")).abs().max() > 0.01


@torch.no_grad()
def test_llada2_cache_is_exact_block_by_block(tmp_path):
    make_llada2(tmp_path)
    student = model.load(tmp_path)
    torch.manual_seed(7)
    ids, noise = torch.randint(0, 61, (2, 16)), torch.randint(0, 61, (2, 4))
    cache = model.Cache(student.config, 2, 16)
    close(student(ids[:, :8], cache=cache), student(ids[:, :8]))
    for start in (8, 12):
        at = torch.arange(start, start + 4)[None]
        for block in (
            noise,
            ids[:, start : start + 4],
        ):  # denoising passes first, then the clean block stays
            whole = torch.cat((ids[:, :start], block), 1)
            close(student(block, positions=at, cache=cache), student(whole)[:, start:], 1e-4)


def test_llada2_config(tmp_path):
    make_llada2(tmp_path)
    config = families.read_config(tmp_path)
    assert config.is_diffusion and config.attention == "block" and config.block_length == 4
    assert (config.mask_token_id, config.moe_layers, config.partial_rotary_factor) == (
        60,
        {1, 2},
        0.5,
    )
    edit_config(
        tmp_path, remove=["mask_token_id", "block_length"], vocab_size=157184
    )  # as in the released file
    config = families.read_config(tmp_path)
    assert config.mask_token_id == 156895 and config.block_length == 32


def test_llada2_saves_what_it_loaded(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    _, w = make_llada2(source, use_qkv_bias=True)
    model.save(model.load(source), source, out, max_shard_bytes=10_000)
    same_tensors(tensors(out), w)
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    student = model.load(source, dtype=torch.bfloat16)
    model.save(student, source, out)
    same_tensors(tensors(out), {n: t if "expert_bias" in n else t.bfloat16() for n, t in w.items()})
    assert not any(
        "expert_bias" in name for name, _ in student.named_parameters()
    )  # nothing trains it


@pytest.mark.parametrize(
    "name, tensor, words",
    [
        (
            "model.layers.1.attention.query_key_value.weight",
            torch.ones(63, 32),
            ("[63, 32]", "[64, 32]"),
        ),
        ("model.layers.1.mlp.experts.7.up_proj.weight", None, ("missing",)),
        (
            "model.layers.1.mlp.experts.7.up_proj.weight",
            torch.ones(32, 12),
            ("[32, 12]", "[12, 32]"),
        ),
        ("model.layers.1.mlp.experts.16.up_proj.weight", torch.ones(12, 32), ("no place",)),
        ("model.layers.2.mlp.gate.expert_bias", None, ("missing",)),
    ],
)
def test_llada2_tensors_that_do_not_fit(tmp_path, name, tensor, words):
    _, w = make_llada2(tmp_path)
    save_file(
        {n: t for n, t in (w | {name: tensor}).items() if t is not None},
        tmp_path / "model.safetensors",
    )
    refused(tmp_path, name, *words)


def test_full_size_llada2_mini(tmp_path):
    raw = LLADA2 | {
        "hidden_size": 2048,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 5120,
        "moe_intermediate_size": 512,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "vocab_size": 157184,
        "pad_token_id": 156892,
        "max_position_embeddings": 32768,
        "block_length": 32,
        "mask_token_id": 156895,
    }
    student = on_meta(raw, tmp_path)
    shapes = on_disk(student)
    assert shapes == llada2_shapes(raw) and len(shapes) == 14_813
    assert sum(math.prod(s) for s in shapes.values()) == 16_255_643_392
    assert (
        sum(p.numel() for p in student.parameters()) == 16_255_638_528
    )  # without the 19 biases of 256 experts
    assert shapes["model.layers.7.attention.query_key_value.weight"] == [3072, 2048]
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == [5120, 2048]


@pytest.mark.parametrize("family, is_trained", [("llada", True), ("llada2_moe", False), ("qwen3", False)])
def test_the_embedding_of_padding_is_trained_where_the_public_code_trains_it(family, is_trained):
    """LLaDA-8B's wte has no padding_idx, LLaDA2's word_embeddings and transformers' embed_tokens have."""
    attention = {"llada": "full", "llada2_moe": "block"}.get(family, "causal")
    config = families.Config(
        model_type=family, vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e4,
        attention=attention, block_length=4, pad_token_id=2)  # fmt: skip
    student = model.Transformer(config).init_weights(0)
    student(torch.tensor([[5, 2, 7, 2]])).sum().backward()
    gradient = student.model.embed_tokens.weight.grad.abs().sum(1)
    assert gradient[[5, 7]].min() > 0 and (gradient[2] > 0) == is_trained
