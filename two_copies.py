"""Who sees whom when a block-diffusion student (LLaDA2) is trained: the noisy and the clean copy.

    model(ids, positions=positions, attention=two_copies.attention(T, block_length, device))

The student reads [x_t, x_0], 2T tokens: the noisy text and behind it the clean one. Of block b

    noisy   sees noisy b, and clean 0 .. b - 1      (LLaDA2 report, eq. 3; dFactory's
    clean   sees clean 0 .. b                        block_diffusion_mask)

So one pass trains every block as it is decoded: from finished blocks and itself. One copy would not
do, since a block is noise when it is predicted and clean when later ones read it.

As a square that is 4 T^2 pairs, of which a quarter is seen; for 16,384 tokens it fills 1 GiB. Short
rows have the square all the same, which every kernel takes. Long ones are cut: on CUDA into tiles
for flex_attention, elsewhere into stretches of queries with the keys that these may see.
Next: sampling.py.
"""

import functools

import torch
import torch.nn.functional as F

SHORT = 1024  # tokens of both copies: up to here the square is small
STRETCH = 512  # queries that go through the kernel together, about
TILE = 128  # of flex_attention


def attention(T, block, device):
    """For rows of T tokens in blocks of `block`: what Transformer.forward takes as `attention`."""
    device = torch.device(device)
    if 2 * T <= SHORT:
        return square(T, block, device)[None, None]
    if device.type == "cuda" and TILE % block == T % block == 0:
        return tiles(T, block, device)
    return functools.partial(in_stretches, block=block)


def sees(query_block, query_is_noisy, key_block, key_is_noisy):
    """The rule above, for tensors that broadcast -> bool."""
    own_noise = query_is_noisy & key_is_noisy & (key_block == query_block)
    # <, not <=: in its own block the answer would lie open
    finished = query_is_noisy & ~key_is_noisy & (key_block < query_block)
    clean = ~query_is_noisy & ~key_is_noisy & (key_block <= query_block)
    return own_noise | finished | clean


def square(T, block, device="cpu"):
    """(2T, 2T) bool: may the query of this row see the key of this column?"""
    at = torch.arange(2 * T, device=device)
    number = at % T // block
    is_noisy = at < T
    return sees(number[:, None], is_noisy[:, None], number, is_noisy)


# --------------------------------------------------------------------------------------------------
# In stretches: any kernel, no square


@torch.compiler.disable  # every length would be compiled anew
def in_stretches(q, k, v, *, block):
    """Attention of q (B, H, 2T, D) to k, v (B, K, 2T, D) -> (B, H, 2T, D).

    Each stretch of queries goes through the kernel with the keys that come before its end. That is
    a quarter of the square's pairs, and a mask of STRETCH rows at a time.
    """
    T = q.shape[2] // 2
    noisy_q, clean_q = q.split(T, dim=2)
    noisy_k, clean_k = k.split(T, dim=2)
    noisy_v, clean_v = v.split(T, dim=2)
    number = torch.arange(T, device=q.device) // block
    yes = torch.tensor(True, device=q.device)
    is_grouped = q.shape[1] != k.shape[1]
    kernel = functools.partial(F.scaled_dot_product_attention, enable_gqa=is_grouped)
    step = max(1, STRETCH // block) * block  # whole blocks, so that a noisy block is not cut
    noisy = []
    clean = []
    for start in range(0, T, step):
        end = min(start + step, T)
        here = slice(start, end)
        own = number[here, None]  # (S, 1)
        earlier_k = clean_k[:, :, :end]
        earlier_v = clean_v[:, :, :end]

        of_clean = sees(own, yes, number[:end], ~yes)  # (S, end)
        of_noisy = sees(own, yes, number[here], yes)  # (S, S)
        mask = torch.cat([of_clean, of_noisy], dim=1)
        keys = torch.cat([earlier_k, noisy_k[:, :, here]], dim=2)
        values = torch.cat([earlier_v, noisy_v[:, :, here]], dim=2)
        queries = noisy_q[:, :, here]
        noisy.append(kernel(queries, keys, values, attn_mask=mask))

        mask = sees(own, ~yes, number[:end], ~yes)
        queries = clean_q[:, :, here]
        clean.append(kernel(queries, earlier_k, earlier_v, attn_mask=mask))
    return torch.cat(noisy + clean, dim=2)


# --------------------------------------------------------------------------------------------------
# In tiles: flex_attention on CUDA


@functools.lru_cache(maxsize=8)  # steps of the same length have the same tiles
def tiles(T, block, device):
    """A BlockMask for flex_attention, which skips tiles that are empty and does not look into full ones.

    torch's create_block_mask would make the square first. Whether a tile is empty or full follows
    from the square of blocks, which is `block`^2 times as small. block divides T and TILE.
    """
    from torch.nn.attention.flex_attention import BlockMask

    # the two copies meet inside of a tile if T is no multiple of TILE
    grid = square(T // block, 1, device)  # blocks in place of tokens
    per_tile = TILE // block
    rest = -len(grid) % per_tile
    n = (len(grid) + rest) // per_tile
    # behind the end there is nothing: such tiles are no full ones, and their rest is masked
    grid = F.pad(grid, (0, rest, 0, rest)).view(n, per_tile, n, per_tile)
    some = grid.any(3).any(1)  # (n, n)
    full = grid.all(3).all(1)

    def visible(row, head, query, key):
        query_block = query % T // block
        key_block = key % T // block
        return sees(query_block, query < T, key_block, key < T)

    partial = numbered(some & ~full)
    whole = numbered(full)
    ends = (2 * T, 2 * T)
    return BlockMask.from_kv_blocks(*partial, *whole, TILE, visible, seq_lengths=ends)


def numbered(chosen):
    """Which tiles of each row are chosen, (n, n) bool -> how many, (1, 1, n), and their numbers
    first, (1, 1, n, n): int32, as BlockMask wants them."""
    count = chosen.sum(1, dtype=torch.int32)
    first = chosen.int().argsort(dim=1, descending=True, stable=True).int()
    return count[None, None], first[None, None]
